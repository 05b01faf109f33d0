package natsx

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// lookupError is a lookup without an answer yet: nothing was sent, and it is retried.
type lookupError struct {
	reason string
	err    error // nil if the stream may be in another JetStream domain
}

func (e *lookupError) Error() string { return "natsx: " + e.reason }
func (e *lookupError) Unwrap() error { return e.err }

// lookUp asks which stream captures the subject, at most once per lookupPause, and not
// right after a request without an answer.
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

// ask makes one request to the JetStream API within lookupWait. A request that the user
// lacks the permission for is not repeated for a while.
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

// elsewhere is why another JetStream may have a stream for the subject, or empty. A server
// with a domain may be a leaf node: what is published there also reaches streams of other
// domains, which must be asked by domain name.
func (p *Publisher) elsewhere() string {
	if opts := p.js.Options(); opts.Domain != "" || opts.APIPrefix != "" {
		return ""
	}
	switch domain := p.nc.ConnectedDomain(); {
	case domain != "":
		return fmt.Sprintf("no stream of JetStream domain %q captures the subject, but one of another domain may; set the domain with WithPublisherJetStream", domain)
	case !p.nc.IsConnected():
		return disconnected
	}
	return ""
}

// noStream is the error of a subject that no stream captures: a [*lookupError] if another
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

// streamOf looks up the stream that captures subject, once for each stream of the call. A
// transient error is a [*lookupError].
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

// locate looks up, once per envelope, what must be known of its stream before it is sent.
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

// refuseNoAck refuses an envelope whose stream is known not to acknowledge.
func (c *call) refuseNoAck(o *outgoing) error {
	info := c.known(o.e.subject)
	if info == nil && c.p.recent.noAck.Load() {
		info = c.p.recent.find(o.e.subject, func(cfg *jetstream.StreamConfig) bool { return cfg.NoAck })
	}
	if info == nil || !info.Config.NoAck {
		return nil
	}
	return noAck(o, info)
}

// checkTTL refuses a TTL that the stream or a server before 2.11 would ignore.
func (c *call) checkTTL(ctx context.Context, o *outgoing) error {
	allowed := func(cfg *jetstream.StreamConfig) bool { return cfg.AllowMsgTTL && !cfg.NoAck }
	if c.p.recent.find(o.e.subject, allowed) != nil {
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
		return nil // the stream decides, in whatever domain it is
	case errors.Is(err, ErrPermission):
		return failure(fmt.Sprintf("publish to %q: server %s may ignore a TTL, and the user may not look up the stream", o.e.subject, version),
			ErrTTLNotAllowed, err)
	}
	return err
}

// noAck is the error of a stream that does not acknowledge.
func noAck(o *outgoing, info *jetstream.StreamInfo) error {
	sent := "the message was not sent"
	if o.unanswered > 0 {
		sent = "the message may be stored"
	}
	return failure(fmt.Sprintf("publish to %q: stream %q does not acknowledge (NoAck), %s: use Send", o.e.subject, info.Config.Name, sent), ErrNoAck)
}

// unacknowledged looks for the reason of a missing ack. An error ends the message.
func (c *call) unacknowledged(ctx context.Context, o *outgoing) error {
	if err := c.denied(o.subject); err != nil {
		return err
	}
	c.p.denials.renew()
	acknowledges := func(cfg *jetstream.StreamConfig) bool { return !cfg.NoAck }
	if c.p.recent.find(o.subject, acknowledges) != nil {
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

// noResponders distinguishes a subject without a stream, which is an error, from a stream
// without a leader and from an outage.
func (c *call) noResponders(ctx context.Context, o *outgoing) error {
	f := c.lookUp(ctx, o.subject)
	var passing *lookupError
	switch {
	case f.err != nil:
		o.trouble = "no responders, and the JetStream API does not answer whether a stream captures the subject: " + cause(f.err)
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

// hasMessage reports whether the stream that refused a message for a wrong sequence has it
// already, and its ack. After an error that is unknown.
func (c *call) hasMessage(ctx context.Context, o *outgoing, stream string, refused *SequenceError) (Ack, bool, error) {
	ack, stored, err := c.p.probe(ctx, o)
	if err == nil || ctx.Err() != nil {
		return ack, stored, err
	}
	return c.readBack(ctx, o, stream, refused)
}

// probe asks whether a stream has a message with this id, with a message that the server
// only traces (ADR-41): it is neither stored nor delivered. If the id is unknown, the
// server refuses it for its invalid rollup header.
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

// The trace is sent to a subject without subscribers: only the stream's answer is needed.
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

// probed parses the answer to a probe.
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

// readBack reads the position where the message is if it was stored: right after the
// sequence that it expects. It does not find a message that was deleted since.
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
