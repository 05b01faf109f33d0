package natsx

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Ack is a stream's confirmation of storage.
type Ack struct {
	Stream   string // that stores the message
	Sequence uint64 // 0 if unknown; see [WithFastIngest]
	// Duplicate reports that the stream already had a message with this id, possibly
	// from an earlier try of the same call. Sequence is then of that message.
	Duplicate bool
}

// Publisher publishes envelopes. It is safe for concurrent use, has no
// goroutines and needs no closing. It does not own its connection.
//
// An envelope published with a handler's context gets the headers traceparent, tracestate,
// baggage and Correlation-Id of the handled message, unless it sets them itself;
// [WithPublishMiddleware] may choose others, such as the trace context of a current span.
// In a durable's handler, an envelope without a message id that is published to JetStream
// gets
//
//	<stream>/<durable>/<sequence>@<stored time in Unix nanoseconds>/<hash>/<n>
//
// The parts are those of the handled message, a hash of the envelope, and its number among
// equal envelopes that the handler has stored. So if the message is handled again, equal
// envelopes are not stored twice within the duplicate window, whatever else that run
// publishes, in any order and from any goroutines; different envelopes are never taken for
// duplicates. A handler that stores two equal envelopes in each of two runs has stored
// two. An envelope that was not stored, or whose outcome is unknown, leaves its number to
// the next equal one, so that a retry in the handler is safe.
//
// Envelopes are equal if they have the same subject, payload, TTL, delay ([Envelope.After],
// or the time of [Envelope.At]) and headers. The trace context (traceparent, tracestate)
// and expected streams and sequences are ignored. An envelope that contains a time or a
// random id is thus a different message in each run: give it an [Envelope.MsgID]. For an
// atomic batch the envelopes of the whole batch are compared.
//
// This holds for the first 131,072 different envelopes of one handler call. Of further
// ones, a run that publishes them in another order may store some again.
//
// If a message is too large with the headers that natsx adds, they are left out: first the
// carried ones, then the codec's Content-Type, at last the automatic message id, with the
// effect of [WithoutMessageIDs].
type Publisher struct {
	nc         *nats.Conn
	js         jetstream.JetStream
	bare       bool   // no automatic message ids
	fast       bool   // batches in PublishAll
	prefix     string // of automatic message ids
	middleware []PublishMiddleware
	around     PublishFunc   // the middleware around a call; nil without any
	count      atomic.Uint64 // automatic message ids so far
	recent     recentStreams

	replies atomic.Pointer[replies] // of requests without headers, once there was one
	denials *denials                // stopped by a cleanup of the publisher
}

// PublisherOption configures a [Publisher].
type PublisherOption func(*Publisher)

// WithPublisherJetStream sets the JetStream context that looks up streams, for a domain or
// an API prefix. It must use the publisher's connection, which is not checked. The
// default, also for nil, is [jetstream.New] without options.
//
// On a server with a JetStream domain, which may be a leaf node, [Publisher.Publish]
// returns [ErrNoStream] at once only if this option names the domain of the streams.
func WithPublisherJetStream(js jetstream.JetStream) PublisherOption {
	return func(p *Publisher) { p.js = js }
}

// WithoutMessageIDs disables the automatic message ids of Publish and PublishAll, which
// cost a server about a third of its rate. Without an id a retry could store a second
// copy. So an envelope without an id, neither its own nor one from a handler, is sent only
// once, when the connection is up, and its ack is awaited until ctx ends. If the ack is
// lost, as in a leader election, the error says that the message may be stored; an error
// that says "not sent" means that it is not.
func WithoutMessageIDs() PublisherOption {
	return func(p *Publisher) { p.bare = true }
}

// NewPublisher returns a publisher over nc, which must not be nil.
func NewPublisher(nc *nats.Conn, opts ...PublisherOption) *Publisher {
	p := &Publisher{nc: nc, prefix: rand.Text()[:16], denials: &denials{nc: nc}}
	runtime.AddCleanup(p, (*denials).stop, p.denials)
	for _, opt := range opts {
		opt(p)
	}
	p.around = wrapPublish(p.middleware)
	if p.js == nil {
		// Without options New does not fail.
		p.js, _ = jetstream.New(nc)
	}
	return p
}

// online waits for the first connect: until then nats.go does not know the server's
// features, and refuses headers.
func (p *Publisher) online(ctx context.Context) error {
	for p.nc.MaxPayload() == 0 && !p.nc.IsClosed() {
		if err := ctx.Err(); err != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
	return nil
}

// localFailure is an error of the connection during an operation on m.
func (p *Publisher) localFailure(doing string, m *nats.Msg, err error) error {
	what := fmt.Sprintf("%s %q: ", doing, m.Subject)
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return failure(fmt.Sprintf("%s%d bytes of payload and headers are above the server's maximum of %d",
			what, messageSize(m), p.nc.MaxPayload()), err)
	case errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, nats.ErrConnectionDraining):
		return failure(what+"connection closed", ErrConnectionClosed, err)
	}
	return failure(what+cause(err), err)
}

// closed returns an [ErrConnectionClosed] if the connection is closed or draining, else
// nil.
func (p *Publisher) closed() error {
	switch p.nc.Status() {
	case nats.CLOSED:
		return errClosed
	case nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		return errDraining
	}
	return nil
}

// isLocal reports whether err is of a message that was not sent.
func isLocal(err error) bool {
	for _, local := range []error{
		nats.ErrMaxPayload, nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrInvalidConnection,
		nats.ErrHeadersNotSupported, nats.ErrBadSubject, nats.ErrBadHeaderMsg,
	} {
		if errors.Is(err, local) {
			return true
		}
	}
	return false
}

// withLimit ends ctx after d, unless it has a deadline.
func withLimit(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// tryWait is how long a try waits for its ack, after a number of unanswered ones. It grows
// so that a slow server is not kept busy with retries.
func tryWait(first time.Duration, unanswered int) time.Duration {
	return first << min(unanswered, 3)
}

// checkedAck is [parseAck] with a check of the expected stream, if want is not empty.
func checkedAck(data []byte, want, last string) (Ack, error) {
	ack, err := parseAck(data, last)
	if err == nil && want != "" && ack.Stream != want {
		return Ack{}, failure(fmt.Sprintf("expected stream %q, stored in %q", want, ack.Stream), ErrWrongStream)
	}
	return ack, err
}

// parseAck parses a stream's answer to a publish: an ack, a refusal as
// [*jetstream.APIError] with an Ack that names the stream, or [ErrBadAck]. last is the
// stream of an earlier ack, to avoid an allocation for the same name.
func parseAck(data []byte, last string) (Ack, error) {
	if ack, ok := parsePlainAck(data, last); ok {
		return ack, nil
	}
	var r struct {
		Error     *jetstream.APIError `json:"error"`
		Stream    string              `json:"stream"`
		Sequence  uint64              `json:"seq"`
		Duplicate bool                `json:"duplicate"`
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return Ack{}, failure(fmt.Sprintf("the answer %q is not an ack of a stream", cut(data, 64)), ErrBadAck)
	}
	if r.Error != nil {
		return Ack{Stream: r.Stream}, r.Error
	}
	if r.Stream == "" {
		return Ack{}, failure(fmt.Sprintf("the answer %q names no stream", cut(data, 64)), ErrBadAck)
	}
	return Ack{Stream: r.Stream, Sequence: r.Sequence, Duplicate: r.Duplicate}, nil
}

// parsePlainAck parses {"stream":"S","seq":1} without a JSON decoder, since almost every
// ack has this form. It reports false for all others.
func parsePlainAck(data []byte, last string) (Ack, bool) {
	rest, ok := bytes.CutPrefix(data, []byte(`{"stream":"`))
	if !ok {
		return Ack{}, false
	}
	end := bytes.IndexByte(rest, '"')
	if end <= 0 {
		return Ack{}, false
	}
	name := rest[:end]
	for _, c := range name {
		if c == '\\' || c < ' ' || c >= 0x7f {
			return Ack{}, false
		}
	}
	rest, ok = bytes.CutPrefix(rest[end:], []byte(`","seq":`))
	if !ok || len(rest) < 2 || len(rest) > 20 || rest[len(rest)-1] != '}' || rest[0] == '0' && len(rest) > 2 {
		return Ack{}, false
	}
	var seq uint64
	for _, c := range rest[:len(rest)-1] {
		if c < '0' || c > '9' {
			return Ack{}, false
		}
		seq = seq*10 + uint64(c-'0')
	}
	if string(name) != last {
		last = string(name)
	}
	return Ack{Stream: last, Sequence: seq}, true
}

const (
	// DefaultPublishTimeout ends a JetStream publish whose context has no deadline.
	DefaultPublishTimeout = 30 * time.Second

	// ackWait is how long the first try waits for its ack; see tryWait. Tries share the
	// message id, so a slow ack costs a duplicate answer at most.
	ackWait = time.Second
)

var (
	errClosed   = failure("connection closed", ErrConnectionClosed, nats.ErrConnectionClosed)
	errDraining = failure("connection is draining", ErrConnectionClosed, nats.ErrConnectionDraining)
)

func cut(b []byte, n int) []byte { return b[:min(len(b), n)] }

// publishOnce publishes once to JetStream and waits for the ack until ctx ends, without
// retries and without checking the envelope.
//
// The error is [nats.ErrNoResponders] without subscribers; a [*jetstream.APIError] for a
// refusal, with an Ack that names the stream; [ErrBadAck] for an answer that is not from a
// stream; [ErrWrongStream] for an ack of another stream than the message's
// Nats-Expected-Stream. After any other error the outcome is unknown.
func publishOnce(ctx context.Context, nc *nats.Conn, m *nats.Msg) (Ack, error) {
	r, err := nc.RequestMsgWithContext(ctx, m)
	if err != nil {
		return Ack{}, err
	}
	return checkedAck(r.Data, m.Header.Get(jetstream.ExpectedStreamHeader), "")
}
