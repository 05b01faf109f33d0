package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	headerSchedule = "Nats-Schedule"
	headerMarker   = "Nats-Marker-Reason"
	// takeTimeout is how long a route tries to remove the letter of a redriven message, and
	// to find the original of another durable's.
	takeTimeout = 3 * time.Second
	// keyFor is for how long a route relies on the identity of another durable, and
	// mostKeys how many it remembers.
	keyFor   = 10 * time.Second
	mostKeys = 64
)

// passer decides which messages of a stream are not for a route, and removes the letters
// of those that were redriven for it.
type passer struct {
	route   *route
	stream  string
	durable string
	key     *atomic.Pointer[string] // of the durable's copies, see redriveToken; shared with the route of its retries

	denied atomic.Bool // the user lacks the permission to remove letters

	mu   sync.Mutex
	keys map[string]durableKey // of other durables of the stream
}

// durableKey is what is known about a durable: whether it exists, and its key, which is
// empty if natsx gave it none or the user may not ask for it.
type durableKey struct {
	key    string
	exists bool
	asked  time.Time
}

// judge returns what to do with a message instead of handling it, or actHandle.
func (p *passer) judge(ctx context.Context, w *work, c *jetstream.StreamConfig) (act action, delay time.Duration) {
	if w.raw.Header[HeaderRedriveTo] != nil && p.redriven(ctx, w, c) {
		return actAck, 0
	}
	if isTombstone(w.raw, c) && p.route.spec.route.set&optTombstones == 0 {
		return actAck, 0
	}
	if !isSchedule(w.raw, c) {
		return actHandle, 0
	}
	if c.Retention == jetstream.LimitsPolicy {
		return actAck, 0
	}
	// An ack would delete the schedule before it is due.
	return actNak, untilDue(w.raw.Header.Get(headerSchedule))
}

// isTombstone reports whether m is a marker that the server stores when the last message
// of a subject expires or is deleted (ADR-43). It has no payload and no headers of an
// application, and is only in streams with SubjectDeleteMarkerTTL, or with messages of
// other streams: elsewhere the header means nothing.
func isTombstone(m *nats.Msg, c *jetstream.StreamConfig) bool {
	if m.Header[headerMarker] == nil || len(m.Data) > 0 ||
		c == nil || c.SubjectDeleteMarkerTTL == 0 && c.Mirror == nil && len(c.Sources) == 0 {
		return false
	}
	for name := range m.Header {
		if !hasPrefixFold(name, "Nats-") {
			return false
		}
	}
	return true
}

// isSchedule reports whether m is a message that the server keeps to publish later
// (ADR-51). Only streams with AllowMsgSchedules have schedules, and they refuse invalid
// ones; in other streams the header means nothing.
func isSchedule(m *nats.Msg, c *jetstream.StreamConfig) bool {
	return c != nil && c.AllowMsgSchedules && len(m.Header[headerSchedule]) > 0
}

// takesNoCopy returns why a message that is published on a subject would not be stored on
// that subject in the stream, so that letters cannot be redriven, or "".
func takesNoCopy(c *jetstream.StreamConfig, subject string) string {
	captured := slices.ContainsFunc(c.Subjects, func(s string) bool { return subjectMatches(s, subject) })
	switch {
	case c.Mirror != nil:
		return fmt.Sprintf("is a mirror of %q, and takes no copy: a route on that stream could have its letters redriven", c.Mirror.Name)
	case captured && transformed(c, subject) != subject:
		return fmt.Sprintf("would store the copy on another subject than %q: it transforms %q to %q", subject, c.SubjectTransform.Source, c.SubjectTransform.Destination)
	case captured:
		return ""
	case len(c.Sources) > 0:
		return fmt.Sprintf("has messages on %q from its sources alone, and takes no copy: a route on their stream could have its letters redriven", subject)
	case c.SubjectTransform != nil:
		return fmt.Sprintf("has messages on %q by a transform alone, and takes no copy", subject)
	}
	return ""
}

// untilDue is how long a schedule stays, plus a moment for the server to remove it. For a
// repeated one it is a guess.
func untilDue(schedule string) time.Duration {
	at, err := time.Parse(time.RFC3339Nano, strings.TrimPrefix(schedule, "@at "))
	if err != nil {
		return time.Minute
	}
	return max(time.Until(at), 0) + 5*time.Second
}

// redriven reports whether a message with the headers of a redrive is for another durable
// and this durable had its original. For a proven redrive for this durable it removes the
// letter.
//
// Anybody may write the headers. A message for this durable is handled in any case; only a
// valid token lets it have the letter removed and the message ids of its original.
func (p *passer) redriven(ctx context.Context, w *work, config *jetstream.StreamConfig) bool {
	c, ok := readCopy(w.raw.Header)
	if !ok || c.stream != p.stream {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, takeTimeout)
	defer cancel()
	if c.durable != p.durable {
		return p.hasOriginal(ctx, w.raw, c, config)
	}
	if key := p.key.Load(); key != nil && *key != "" && provenCopy(*key, w.raw.Subject, w.raw.Header, w.raw.Data) {
		w.redrive = &c
		w.delivery.numbering.Store(newNumbering(deliveryID(p.stream, p.durable, c.original)))
		p.takeLetter(ctx, w, c)
	}
	return false
}

// hasOriginal reports whether a copy for another durable is proven, and its original was or
// will be delivered to this durable too: the stream has it, with the same subject and time.
// A message that an interest stream has deleted was settled by all its durables.
//
// If the other durable has no identity, or the user may not ask for it, the token proves
// nothing. Then the original must also have the copy's payload, so that no message is
// skipped that this durable does not receive.
func (p *passer) hasOriginal(ctx context.Context, m *nats.Msg, c redriveCopy, config *jetstream.StreamConfig) bool {
	k, err := p.keyOf(ctx, c.durable)
	if err != nil || !k.exists || !provenCopy(k.key, m.Subject, m.Header, m.Data) {
		return false
	}
	original, err := p.route.env.api.get(ctx, p.stream, getRequest{Seq: c.original.seq})
	switch {
	case err != nil:
		return false
	case original == nil:
		return k.key != "" && config != nil && config.Retention == jetstream.InterestPolicy
	}
	return original.time.UnixNano() == c.original.time && original.subject == m.Subject && (k.key != "" || bytes.Equal(original.data, m.Data))
}

// keyOf is the key of another durable of the stream, which may be some seconds old.
func (p *passer) keyOf(ctx context.Context, durable string) (durableKey, error) {
	p.mu.Lock()
	k, known := p.keys[durable]
	p.mu.Unlock()
	if known && time.Since(k.asked) < keyFor {
		return k, nil
	}
	var info jetstream.ConsumerInfo
	err := p.route.env.api.ask(ctx, "CONSUMER.INFO."+p.stream+"."+durable, struct{}{}, &info)
	k = durableKey{key: info.Config.Metadata[metadataID], exists: true, asked: time.Now()}
	switch {
	case hasCode(err, codeConsumerNotFound):
		k.exists = false
	case err != nil && !errors.Is(err, ErrPermission):
		return k, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.keys == nil || len(p.keys) >= mostKeys {
		p.keys = make(map[string]durableKey)
	}
	p.keys[durable] = k
	return k, nil
}

// takeLetter removes the letter of a redriven message before the message is handled. The
// redrive itself does that once the copy is stored, unless it is killed in between. Then
// a later redrive could store a second copy after the first was handled and the
// duplicate window has passed.
//
// Without the permission to read or delete in the DLQ only the duplicate window protects
// from that.
func (p *passer) takeLetter(ctx context.Context, w *work, c redriveCopy) {
	if p.denied.Load() {
		return
	}
	a := p.route.env.api
	err := func() error {
		m, err := a.get(ctx, c.dlq, getRequest{Seq: c.letter.seq})
		if err != nil || m == nil || m.time.UnixNano() != c.letter.time {
			return err
		}
		l, err := parseLetter(c.dlq, m)
		if err != nil {
			return err
		}
		_, err = discardLetter(ctx, a, &l)
		return err
	}()
	switch {
	case err == nil || hasCode(err, codeStreamNotFound) || errors.Is(err, ErrStreamDeleted):
	case errors.Is(err, ErrPermission):
		p.denied.Store(true)
		fallthrough
	default:
		p.route.env.log.Warn("natsx: letter of a redriven message not removed", p.route.about(w, "letter", c.letter.seq, "dlq", c.dlq, "error", err)...)
	}
}

// findLetter reports whether a letter is still in the DLQ. Another message in its place
// is an [ErrStreamDeleted]: the DLQ was recreated.
func findLetter(ctx context.Context, a *api, l *DeadLetter) (bool, error) {
	m, err := a.get(ctx, l.DLQStream, getRequest{Seq: l.DLQSequence})
	if err != nil || m == nil {
		return false, err
	}
	if !m.time.Equal(l.DLQTime) {
		return false, failure(fmt.Sprintf("stream %q has another message %d than before", l.DLQStream, l.DLQSequence), ErrStreamDeleted)
	}
	return true, nil
}

// discardLetter deletes a letter, after releasing an original that was kept only for it,
// and reports whether this call deleted it.
func discardLetter(ctx context.Context, a *api, l *DeadLetter) (bool, error) {
	if there, err := findLetter(ctx, a, l); !there {
		return false, err
	}
	if l.Pointer {
		if err := releaseOriginal(ctx, a, l); err != nil {
			return false, err
		}
	}
	return a.remove(ctx, l.DLQStream, l.DLQSequence)
}

// releaseOriginal releases the original of a pointer letter, which its durable left
// unsettled so that the stream does not delete it. On a work queue it is deleted. On a
// stream with interest retention it is acknowledged for its durable alone, since other
// consumers may still need it.
func releaseOriginal(ctx context.Context, a *api, l *DeadLetter) error {
	var source jetstream.StreamInfo
	err := a.ask(ctx, "STREAM.INFO."+l.Stream, struct{}{}, &source)
	if hasCode(err, codeStreamNotFound) {
		return nil
	}
	if err != nil || source.Config.Retention == jetstream.LimitsPolicy {
		return err
	}
	m, err := a.get(ctx, l.Stream, getRequest{Seq: l.Sequence})
	if err != nil || m == nil || !l.pointsTo(m) {
		return err
	}
	if source.Config.Retention == jetstream.WorkQueuePolicy {
		_, err := a.remove(ctx, l.Stream, l.Sequence)
		return err
	}
	var durable jetstream.ConsumerInfo
	err = a.ask(ctx, "CONSUMER.INFO."+l.Stream+"."+l.Durable, struct{}{}, &durable)
	if hasCode(err, codeConsumerNotFound) || err == nil && (l.Sequence > durable.Delivered.Stream || l.Sequence <= durable.AckFloor.Stream) {
		return nil // the durable does not hold the original
	}
	if err != nil {
		return err
	}
	// The server uses only the stream sequence of the ack subject.
	return a.acknowledge(ctx, ackSubject(l.Stream, l.Durable, l.Sequence, m.time.UnixNano()), readPatience)
}
