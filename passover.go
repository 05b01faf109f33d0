package natsx

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	headerSchedule = "Nats-Schedule"
	// takeTimeout is how long a route tries to remove the letter of a redriven message.
	takeTimeout = 3 * time.Second
)

// passer decides which messages of a stream are not for a route, and removes the letters
// of those that were redriven for it.
type passer struct {
	route   *route
	stream  string
	durable string
	created int64 // the stream's creation, Unix nanoseconds

	denied atomic.Bool // the user lacks the permission to remove letters
}

// judge returns what to do with a message instead of handling it, or actHandle.
func (p *passer) judge(ctx context.Context, w *work, c *jetstream.StreamConfig) (act action, delay time.Duration) {
	if w.raw.Header[HeaderRedriveTo] != nil && p.redriven(ctx, w) {
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

// isSchedule reports whether m is a message that the server keeps to publish later
// (ADR-51). Only streams with AllowMsgSchedules have schedules, and they refuse invalid
// ones; in other streams the header means nothing.
func isSchedule(m *nats.Msg, c *jetstream.StreamConfig) bool {
	return c != nil && c.AllowMsgSchedules && len(m.Header[headerSchedule]) > 0
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

// redriveHeaders returns the redrive headers of a message that is dead again, for its
// letter, so that its redrives are still counted.
func (p *passer) redriveHeaders(raw *nats.Msg) nats.Header {
	h := raw.Header
	if h[HeaderRedriveToken] == nil {
		return nil
	}
	if _, ok := proveRedrive(p.stream, p.created, raw.Subject, h, raw.Data); !ok {
		return nil
	}
	kept := nats.Header{}
	for _, name := range []string{HeaderRedriveTo, HeaderRedriveCount, HeaderRedriveToken, nats.MsgIdHdr} {
		kept[name] = h[name]
	}
	return originalHeaders(kept, false)
}

// redriven reports whether a message is a proven redrive for another durable. For a
// redrive for this durable it removes the letter.
func (p *passer) redriven(ctx context.Context, w *work) bool {
	proof, ok := proveRedrive(p.stream, p.created, w.raw.Subject, w.raw.Header, w.raw.Data)
	if !ok {
		return false // anybody may write headers
	}
	if proof.durable != p.durable {
		return true
	}
	p.takeLetter(ctx, w, proof)
	return false
}

// takeLetter removes the letter of a redriven message before the message is handled. The
// redrive itself does that once the copy is stored, unless it is killed in between. Then
// a later redrive could store a second copy after the first was handled and the
// duplicate window has passed.
//
// Without the permission to read or delete in the DLQ only the duplicate window protects
// from that.
func (p *passer) takeLetter(ctx context.Context, w *work, proof redriveProof) {
	if p.denied.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, takeTimeout)
	defer cancel()
	a := p.route.env.api
	err := func() error {
		m, err := a.get(ctx, proof.dlq, getRequest{Seq: proof.seq})
		if err != nil || m == nil || m.time.UnixNano() != proof.stored {
			return err
		}
		l, err := parseLetter(proof.dlq, m)
		if err != nil {
			return err
		}
		return discardLetter(ctx, a, &l)
	}()
	switch {
	case err == nil || hasCode(err, codeStreamNotFound):
	case errors.Is(err, ErrPermission):
		p.denied.Store(true)
		fallthrough
	default:
		p.route.env.log.Warn("natsx: letter of a redriven message not removed", p.route.about(w, "letter", proof.seq, "dlq", proof.dlq, "error", err)...)
	}
}

// discardLetter deletes a letter, after releasing an original that was kept only for it.
func discardLetter(ctx context.Context, a *api, l *DeadLetter) error {
	if l.Pointer {
		if err := releaseOriginal(ctx, a, l); err != nil {
			return err
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
		return a.remove(ctx, l.Stream, l.Sequence)
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
	subject := ackSubject(l.Stream, l.Durable, l.Sequence, m.time.UnixNano())
	return retry{limit: readPatience}.do(ctx, func(ctx context.Context) error {
		return requestWith(ctx, a.nc, subject, func(ctx context.Context) error {
			_, err := a.nc.RequestWithContext(ctx, subject, ackAck)
			return err
		})
	})
}
