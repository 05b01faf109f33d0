package natsx

import (
	"context"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// scheduleToken is a token in the subjects of schedules.
const scheduleToken = "natsx-schedule"

// schedule sets the subject of a schedule, in the stream that captures its target.
//
// The server requires that it differs from the target and is in the same stream. A later
// schedule on the same subject replaces the earlier one, so a schedule of a handler has
// the same subject in each run: it is stored once even after the duplicate window.
func (c *call) schedule(ctx context.Context, o *outgoing) error {
	target := o.e.subject
	info, err := c.streamOf(ctx, target)
	if err != nil {
		return err
	}
	refuse := func(reason string) error {
		return failure(fmt.Sprintf("publish to %q: stream %q %s", target, info.Config.Name, reason), ErrSchedulesNotAllowed)
	}
	limits := info.Config.Retention == jetstream.LimitsPolicy
	switch {
	case info.Config.NoAck:
		return noAck(o, info)
	case !info.Config.AllowMsgSchedules:
		return refuse("does not have AllowMsgSchedules")
	case info.Config.Retention == jetstream.InterestPolicy:
		return refuse("has interest retention, which drops schedules")
	case o.e.set&envTTL != 0 && !info.Config.AllowMsgTTL:
		return failure(fmt.Sprintf("publish to %q: stream %q does not have AllowMsgTTL", target, info.Config.Name), ErrTTLNotAllowed)
	}
	id := c.p.nextID()
	if o.number.n > 0 {
		sum := sha256.Sum256([]byte(o.id))
		id = digest(sum[:len(digest{})]).String()
	}
	above, below := scheduleToken+"."+id+"."+target, target+"."+scheduleToken+"."+id
	switch wildcard := wildcardSubject(info, target, id); {
	case captures(info, above):
		o.subject = above
	case limits && captures(info, below):
		o.subject = below
	case limits && wildcard != "":
		o.subject = wildcard
	default:
		return refuse(fmt.Sprintf("captures no subject for a schedule, such as %q", scheduleToken+".*."+target))
	}
	return nil
}

// wildcardSubject is the target with a unique token at the position of the last * of a
// matching subject of the stream, or empty if there is none.
func wildcardSubject(info *jetstream.StreamInfo, target, id string) string {
	for _, pattern := range info.Config.Subjects {
		if !subjectMatches(pattern, target) {
			continue
		}
		wild, tokens := strings.Split(pattern, "."), strings.Split(target, ".")
		for i := len(wild) - 1; i >= 0; i-- {
			if wild[i] == "*" {
				tokens[i] = scheduleToken + "-" + id
				return strings.Join(tokens, ".")
			}
		}
	}
	return ""
}
