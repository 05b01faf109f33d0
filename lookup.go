package natsx

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// lookupError is a question that has no answer yet: nothing was sent, and the question
// is asked again.
type lookupError struct {
	reason string
	err    error // nil when another JetStream may have the answer
}

func (e *lookupError) Error() string { return "natsx: " + e.reason }
func (e *lookupError) Unwrap() error { return e.err }

// lookUp asks which stream captures the subject, at most every lookupPause, and not
// for each of many subjects when nobody answers.
func (c *call) lookUp(ctx context.Context, subject string) finding {
	if f, ok := c.found[subject]; ok && time.Since(f.at) < lookupPause {
		return f
	}
	if time.Since(c.silent) < lookupWait {
		return finding{err: context.DeadlineExceeded}
	}
	var f finding
	f.err = c.ask(ctx, "STREAM.NAMES", func(ctx context.Context) (err error) {
		f.stream, err = c.p.js.StreamNameBySubject(ctx, subject)
		return err
	})
	f.at = time.Now()
	if errors.Is(f.err, jetstream.ErrStreamNotFound) {
		f.stream, f.err = "", nil
	}
	if c.found == nil {
		c.found = make(map[string]finding)
	}
	c.found[subject] = f
	return f
}

// ask makes one request of the JetStream API within lookupWait. What the user may not
// ask is not asked again for a while.
func (c *call) ask(ctx context.Context, operation string, fn func(context.Context) error) error {
	if err := c.p.recent.denied(operation); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lookupWait)
	defer cancel()
	err := requestWith(ctx, c.p.nc, apiPrefix(c.p.js)+operation, fn)
	switch {
	case errors.Is(err, ErrPermission):
		c.p.recent.deny(operation, err)
	case errors.Is(err, context.DeadlineExceeded):
		c.silent = time.Now()
	}
	return err
}

// elsewhere is why a JetStream without a stream for a subject is no proof that there is
// none, or empty. A server with a domain may be a leaf node, and what is published there
// goes to the streams of other domains too, which are asked only by their names.
func (p *Publisher) elsewhere() string {
	if opts := p.js.Options(); opts.Domain != "" || opts.APIPrefix != "" {
		return ""
	}
	switch domain := p.nc.ConnectedDomain(); {
	case domain != "":
		return fmt.Sprintf("no stream of JetStream domain %q captures the subject, and one of another domain may; WithPublisherJetStream names the domain to ask", domain)
	case !p.nc.IsConnected():
		return disconnected
	}
	return ""
}

// noStream is the error of a subject that no stream captures. It passes when another
// JetStream may have one.
func (c *call) noStream(subject string) error {
	if reason := c.p.elsewhere(); reason != "" {
		return &lookupError{reason: reason}
	}
	return failure(fmt.Sprintf("publish to %q: no stream captures the subject", subject), ErrNoStream)
}

// known is a stream of this call that captures subject, or nil.
func (c *call) known(subject string) *jetstream.StreamInfo {
	for _, info := range c.streams {
		if captures(info, subject) {
			return info
		}
	}
	return nil
}

// streamOf looks up the stream that captures subject, once for each stream of the
// call. An error that passes is a [*lookupError].
func (c *call) streamOf(ctx context.Context, subject string) (*jetstream.StreamInfo, error) {
	if info := c.known(subject); info != nil {
		return info, nil
	}
	f := c.lookUp(ctx, subject)
	if f.err == nil && f.stream == "" {
		return nil, c.noStream(subject)
	}
	var info *jetstream.StreamInfo
	if f.err == nil {
		f.err = c.ask(ctx, "STREAM.INFO."+f.stream, func(ctx context.Context) error {
			s, err := c.p.js.Stream(ctx, f.stream)
			if err == nil {
				info = s.CachedInfo()
			}
			return err
		})
	}
	switch {
	case errors.Is(f.err, ErrPermission):
		return nil, failure(fmt.Sprintf("publish to %q: look up its stream: %s", subject, cause(f.err)), f.err)
	case f.err != nil:
		return nil, &lookupError{"its stream could not be looked up: " + cause(f.err), f.err}
	}
	c.streams = append(c.streams, info)
	c.p.recent.add(info)
	return info, nil
}

// locate finds out, once for each envelope, what must be known of its stream before it
// is sent.
func (c *call) locate(ctx context.Context, o *outgoing) error {
	if err := c.refuseNoAck(o); err != nil || o.located {
		return err
	}
	switch {
	case o.e.delayed():
		if err := c.schedule(ctx, o); err != nil {
			return err
		}
	case o.e.set&envTTL != 0:
		if err := c.checkTTL(ctx, o); err != nil {
			return err
		}
	}
	o.located = true
	return nil
}

// refuseNoAck refuses what a stream without acks would take, where that is known.
func (c *call) refuseNoAck(o *outgoing) error {
	info := c.known(o.e.subject)
	if info == nil && c.p.recent.noAck.Load() {
		info = c.p.recent.of(o.e.subject, func(cfg *jetstream.StreamConfig) bool { return cfg.NoAck })
	}
	if info == nil || !info.Config.NoAck {
		return nil
	}
	return noAck(o, info)
}

// checkTTL refuses a TTL that would be ignored: by a server before 2.11, which has no
// streams that allow it.
func (c *call) checkTTL(ctx context.Context, o *outgoing) error {
	allowed := func(cfg *jetstream.StreamConfig) bool { return cfg.AllowMsgTTL && !cfg.NoAck }
	if c.p.recent.of(o.e.subject, allowed) != nil {
		return nil
	}
	info, err := c.streamOf(ctx, o.e.subject)
	version := c.p.nc.ConnectedServerVersion()
	switch {
	case err == nil && info.Config.NoAck:
		return noAck(o, info)
	case err == nil && info.Config.AllowMsgTTL:
		return nil
	case err == nil:
		return failure(fmt.Sprintf("publish to %q: stream %q does not have AllowMsgTTL", o.e.subject, info.Config.Name), ErrTTLNotAllowed)
	case !olderThan(version, 2, 11):
		return nil // the stream judges, wherever it is
	case errors.Is(err, ErrPermission):
		return failure(fmt.Sprintf("publish to %q: server %s ignores a TTL, and whether the stream allows it may not be asked", o.e.subject, version),
			ErrTTLNotAllowed, err)
	}
	return err
}

// noAck is the error of a stream that does not acknowledge.
func noAck(o *outgoing, info *jetstream.StreamInfo) error {
	sent := "it was not sent"
	if o.unanswered > 0 {
		sent = "and may have stored the message"
	}
	return failure(fmt.Sprintf("publish to %q: stream %q acknowledges nothing (NoAck), %s: Send needs no ack", o.e.subject, info.Config.Name, sent), ErrNoAck)
}

// unacknowledged looks for the reason why a message that was sent has no ack. An
// error ends it.
func (c *call) unacknowledged(ctx context.Context, o *outgoing) error {
	if err := c.denied(o.subject); err != nil {
		return err
	}
	c.p.denials.renew()
	acknowledges := func(cfg *jetstream.StreamConfig) bool { return !cfg.NoAck }
	if c.p.recent.of(o.subject, acknowledges) != nil {
		return nil
	}
	info, err := c.streamOf(ctx, o.subject)
	var passing *lookupError
	switch {
	case err == nil && !acknowledges(&info.Config):
		return noAck(o, info)
	case errors.Is(err, ErrNoStream), errors.As(err, &passing) && passing.err == nil:
		o.trouble = noStreamHere
	}
	return nil
}

// noResponders tells a subject without a stream, which is an error, from a stream
// that has no leader at the moment and from an outage in which nobody can tell.
func (c *call) noResponders(ctx context.Context, o *outgoing) error {
	f := c.lookUp(ctx, o.subject)
	var passing *lookupError
	switch {
	case f.err != nil:
		o.trouble = "nobody takes it, and the JetStream API does not tell whether a stream captures the subject: " + cause(f.err)
	case f.stream != "":
		o.trouble = leaderless
	default:
		err := c.noStream(o.subject)
		if !errors.As(err, &passing) {
			return err
		}
		o.trouble = passing.reason
	}
	return nil
}

// hasMessage reports whether the stream that refused a message for a wrong sequence has
// it nevertheless, and where. An error leaves it open.
func (c *call) hasMessage(ctx context.Context, o *outgoing, stream string, refused *SequenceError) (Ack, bool, error) {
	ack, stored, err := c.p.probe(ctx, o)
	if err == nil || ctx.Err() != nil {
		return ack, stored, err
	}
	return c.readBack(ctx, o, stream, refused)
}

// probe asks whether a stream has the message by its id. The server only traces what it
// would do with it (ADR-41): nothing is stored, and no subscriber sees it. What it
// does not know it refuses for the invalid rollup, whatever its version.
func (p *Publisher) probe(ctx context.Context, o *outgoing) (ack Ack, stored bool, err error) {
	if version := p.nc.ConnectedServerVersion(); olderThan(version, 2, 11) {
		return Ack{}, false, fmt.Errorf("natsx: server %s cannot trace messages", version)
	}
	ctx, cancel := context.WithTimeout(ctx, tryWait(ackWait, o.unanswered))
	defer cancel()
	m := p.probeFor(o)
	err = requestWith(ctx, p.nc, m.Header.Get(traceDestHeader), func(ctx context.Context) error {
		ack, err = publishOnce(ctx, p.nc, m)
		return err
	})
	return probed(ack, err)
}

// The trace goes to a subject that nobody listens on: the stream's answer is enough.
const (
	traceDestHeader = "Nats-Trace-Dest"
	traceOnlyHeader = "Nats-Trace-Only"
)

func (p *Publisher) probeFor(o *outgoing) *nats.Msg {
	return &nats.Msg{Subject: o.subject, Header: nats.Header{
		jetstream.MsgIDHeader: {o.id},
		jetstream.MsgRollup:   {"natsx-probe"},
		traceDestHeader:       {p.nc.NewInbox()},
		traceOnlyHeader:       {"true"},
	}}
}

// probed reads the answer to a probe.
func probed(ack Ack, err error) (Ack, bool, error) {
	switch {
	case hasCode(err, codeRollupFailed):
		return Ack{}, false, nil
	case err == nil && !ack.Duplicate:
		err = failure("a probe was stored", ErrBadAck)
	}
	if err != nil {
		return Ack{}, false, err
	}
	return ack, true, nil
}

// readBack looks where the message is if it was stored: what it expects is what came
// right before it. Of one that was deleted since nothing is found.
func (c *call) readBack(ctx context.Context, o *outgoing, stream string, refused *SequenceError) (Ack, bool, error) {
	if stream == "" || !refused.Known {
		return Ack{}, false, errors.New("natsx: the stream is unknown")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*lookupWait)
	defer cancel()
	streams := newAPI(c.p.nc, c.p.js)
	want := getRequest{Seq: refused.Want + 1}
	if o.e.set&envLastSubjectSequence != 0 {
		if refused.Have == 0 {
			return Ack{}, false, nil
		}
		last, err := streams.get(ctx, stream, getRequest{Seq: refused.Have})
		if err != nil || last == nil {
			return Ack{}, false, err
		}
		want.NextFor = last.subject // as the stream has it, which may be a mapped one
	}
	m, err := streams.get(ctx, stream, want)
	if err != nil || m == nil || m.header.Get(jetstream.MsgIDHeader) != o.id {
		return Ack{}, false, err
	}
	return Ack{Stream: stream, Sequence: m.seq, Duplicate: true}, true, nil
}
