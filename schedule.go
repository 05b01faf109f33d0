package natsx

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// scheduleToken is a token of the subjects that schedules are kept on.
const scheduleToken = "natsx-schedule"

// scheduleSubject finds a subject of its own for a schedule, in the stream that
// captures its target.
//
// The server wants it to differ from the target and in the same stream, and a
// later schedule on one subject replaces the earlier. So that of a handler, which
// publishes it again when its message is handled again, has the same subject each time:
// beyond the duplicate window too there is one of it.
func (c *call) scheduleSubject(ctx context.Context, o *outgoing) (string, error) {
	target := o.e.subject
	info, err := c.streamOf(ctx, target)
	if err != nil {
		return "", err
	}
	refuse := func(reason string) error {
		return failure(fmt.Sprintf("publish to %q: stream %q %s", target, info.Config.Name, reason), ErrSchedulesNotAllowed)
	}
	if !info.Config.AllowMsgSchedules {
		return "", refuse("does not have AllowMsgSchedules")
	}
	if info.Config.Retention == jetstream.InterestPolicy {
		return "", refuse("has interest retention, which drops schedules")
	}
	id := c.p.nextID()
	if o.number.n > 0 {
		sum := sha256.Sum256([]byte(o.id))
		id = digest(sum[:len(digest{})]).String()
	}
	subject := scheduleToken + "." + id + "." + target
	if captures(info, subject) {
		return subject, nil
	}
	if below := target + "." + scheduleToken + "." + id; info.Config.Retention == jetstream.LimitsPolicy && captures(info, below) {
		return below, nil
	}
	if beside := besideSubject(info, target, id); info.Config.Retention == jetstream.LimitsPolicy && beside != "" {
		return beside, nil
	}
	return "", refuse(fmt.Sprintf("captures no subject for a schedule, such as %q", scheduleToken+".*."+target))
}

// besideSubject is the target with a unique token where a subject of the stream
// has its last *, or empty when no subject of the stream has one there.
func besideSubject(info *jetstream.StreamInfo, target, id string) string {
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

// streamOf looks up the stream that captures subject, once for each stream of
// the call.
func (c *call) streamOf(ctx context.Context, subject string) (*jetstream.StreamInfo, error) {
	for _, info := range c.streams {
		if captures(info, subject) {
			return info, nil
		}
	}
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	name, err := c.p.js.StreamNameBySubject(ctx, subject)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, failure(fmt.Sprintf("publish to %q: no stream captures the subject", subject), ErrNoStream)
	}
	if err != nil {
		return nil, failure(fmt.Sprintf("publish to %q: look up its stream: %v", subject, err), err)
	}
	s, err := c.p.js.Stream(ctx, name)
	if err != nil {
		return nil, failure(fmt.Sprintf("publish to %q: look up stream %q: %v", subject, name, err), err)
	}
	info := s.CachedInfo()
	c.streams = append(c.streams, info)
	return info, nil
}

func captures(info *jetstream.StreamInfo, subject string) bool {
	return slices.ContainsFunc(info.Config.Subjects, func(s string) bool { return subjectMatches(s, subject) })
}
