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
	// takeTimeout bounds how long a route tries to remove the letter of a redriven
	// message.
	takeTimeout = 3 * time.Second
)

// passer decides which messages of a stream are none for a route, and removes the
// letters of those that were redriven for it.
type passer struct {
	route   *route
	stream  string
	durable string
	created int64 // the stream's creation, Unix nanoseconds

	denied atomic.Bool // the user may not remove letters
}

// judge is what is to be done with a message in place of handling it; actHandle is
// nothing.
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
	// Acknowledged it would be deleted, and never come due.
	return actNak, untilDue(w.raw.Header.Get(headerSchedule))
}

// isSchedule reports whether m is a message that the server keeps to publish later
// (ADR-51). Only a stream with AllowMsgSchedules has schedules, and it refuses
// what looks like one and is none; elsewhere the header means nothing.
func isSchedule(m *nats.Msg, c *jetstream.StreamConfig) bool {
	return c != nil && c.AllowMsgSchedules && len(m.Header[headerSchedule]) > 0
}

// untilDue is how long a schedule stays, with a moment for the server to remove
// it. Of a repeated one it is a guess.
func untilDue(schedule string) time.Duration {
	at, err := time.Parse(time.RFC3339Nano, strings.TrimPrefix(schedule, "@at "))
	if err != nil {
		return time.Minute
	}
	return max(time.Until(at), 0) + 5*time.Second
}

// redriveHeaders is what proves the redrives of a message that its durable's route
// gives up, as the message's letter keeps it in every form: without it the count
// would begin anew.
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

// redriven reports whether a message with the header of a redrive is for another
// durable, and proven to be. Of one that is for this one it removes the letter.
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

// takeLetter removes the letter of a redriven message before that is handled, as
// the redrive does once the copy is stored, unless it is killed between the two. A
// later redrive would then store a second copy, if the first were handled and
// gone and the stream's duplicate window over: it finds a copy that is not handled
// yet, and no letter of one that is.
//
// It does what it may and can. A user who must not read or delete in the DLQ
// relies on the duplicate window.
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

// discardLetter deletes a letter, after the original that only waits for its sake.
func discardLetter(ctx context.Context, a *api, l *DeadLetter) error {
	if l.Pointer {
		if err := releaseOriginal(ctx, a, l); err != nil {
			return err
		}
	}
	return a.remove(ctx, l.DLQStream, l.DLQSequence)
}

// releaseOriginal lets go of the original of a pointer, which its durable left unsettled
// on a stream that would have deleted it. On a work queue nobody else waits for
// it. On a stream with interest retention others may: there it is settled for its
// durable alone, and the server deletes it when that was the last.
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
		return nil // it does not hold the original, and the server knows who else does
	}
	if err != nil {
		return err
	}
	// The server goes by the stream's sequence alone.
	subject := ackSubject(l.Stream, l.Durable, l.Sequence, m.time.UnixNano())
	return retry{limit: readPatience}.do(ctx, func(ctx context.Context) error {
		return requestWith(ctx, a.nc, subject, func(ctx context.Context) error {
			_, err := a.nc.RequestWithContext(ctx, subject, ackAck)
			return err
		})
	})
}
