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
	Stream   string // that has the message
	Sequence uint64 // 0 where [WithFastIngest] leaves it unknown
	// Duplicate tells that the stream already had a message with this id, be it
	// from an earlier try of the same call, and that Sequence is of that one.
	Duplicate bool
}

// Publisher publishes envelopes. It is safe for concurrent use, has no
// goroutines and needs no closing. It does not own its connection.
//
// Published with a handler's context, an envelope carries over the headers
// traceparent, tracestate, baggage and Correlation-Id of the handled message
// that it does not set itself; [WithPublishMiddleware] may carry over others in their
// place, such as the trace context of a current span. In a durable's handler, an envelope without a
// message id that goes to JetStream gets
//
//	<stream>/<durable>/<sequence>@<stored time in Unix nanoseconds>/<hash>/<n>
//
// made of the handled message, a hash of the envelope and its number among equal
// ones that the handler has stored. So when the message is handled again, what was
// stored is not stored twice within the duplicate window, whatever else that run
// publishes, in which order and from how many goroutines; and what is different is
// never taken for a repetition. Equal envelopes in equal number are one: a handler that
// stores two equal ones in one run and two in the next has stored two. An envelope that
// was not stored, or of which that is unknown, leaves its number to the next equal one,
// so that trying again is safe.
//
// Equal are envelopes with the same subject, payload, TTL, delay ([Envelope.After], or
// the time of [Envelope.At]) and headers. The trace context (traceparent, tracestate)
// and expected streams and sequences do not count. So an envelope that differs from
// run to run, by a time or a random id in it, is another message in each: give it a
// [Envelope.MsgID]. In an atomic batch the envelopes of the whole batch count.
//
// Of what one handler publishes, the first 131,072 different envelopes are counted one by
// one. Of those beyond, a run that publishes them in another order may store some again.
//
// A message that is too large with the headers that natsx adds goes without them:
// first without those carried over, then without the codec's Content-Type, at last
// without an automatic message id, as [WithoutMessageIDs] has it.
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

	denials *denials // which the end of the publisher stops
}

// PublisherOption configures a [Publisher].
type PublisherOption func(*Publisher)

// WithPublisherJetStream sets the JetStream context that is asked about streams,
// for a domain or an API prefix. It must be of the publisher's connection, which is
// not checked. Default, also for nil, is a plain one.
//
// A publisher at a server with a JetStream domain, which may be a leaf node, needs one
// with the domain of its streams to be told at once that no stream captures a subject:
// see [Publisher.Publish].
func WithPublisherJetStream(js jetstream.JetStream) PublisherOption {
	return func(p *Publisher) { p.js = js }
}

// WithoutMessageIDs leaves out the automatic message ids of Publish and
// PublishAll, which cost a server about a third of its rate. Without an id a
// second try might be a second copy. So an envelope that has none, neither its
// own nor a handler's, is sent once, when the connection is up, and waits for the one
// ack until ctx ends. When that is lost, as in a leader election, the error says that
// the message may be stored; what says "not sent" is not stored.
func WithoutMessageIDs() PublisherOption {
	return func(p *Publisher) { p.bare = true }
}

// NewPublisher returns a publisher over nc, which must outlive it and is not nil.
func NewPublisher(nc *nats.Conn, opts ...PublisherOption) *Publisher {
	p := &Publisher{nc: nc, prefix: rand.Text()[:16], denials: &denials{nc: nc}}
	runtime.AddCleanup(p, (*denials).stop, p.denials)
	for _, opt := range opts {
		opt(p)
	}
	p.around = wrapPublish(p.middleware)
	if p.js == nil {
		// Without options there is nothing that New could refuse.
		p.js, _ = jetstream.New(nc)
	}
	return p
}

// online waits until the connection has been up once: until then nats.go knows
// nothing of the server, and refuses headers.
func (p *Publisher) online(ctx context.Context) error {
	for p.nc.MaxPayload() == 0 && !p.nc.IsClosed() {
		if err := ctx.Err(); err != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
	return nil
}

// localFailure is an error of the connection, in the words of what was to be done.
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

// closed is an error for a connection on which nothing is published any more, with
// [ErrConnectionClosed] and that of nats.go in its chain, and else nil.
func (p *Publisher) closed() error {
	switch p.nc.Status() {
	case nats.CLOSED:
		return errClosed
	case nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		return errDraining
	}
	return nil
}

// isLocal reports whether err is of a message that never left.
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

// withLimit ends ctx after d unless it has a deadline of its own.
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

// tryWait is how long a try waits for its ack after so many without one: longer
// from try to try, or a server that is slower than what is under way would be kept
// busy with repetitions.
func tryWait(first time.Duration, unanswered int) time.Duration {
	return first << min(unanswered, 3)
}

// checkedAck is [parseAck] for a message that expects a stream, unless want is
// empty.
func checkedAck(data []byte, want, last string) (Ack, error) {
	ack, err := parseAck(data, last)
	if err == nil && want != "" && ack.Stream != want {
		return Ack{}, failure(fmt.Sprintf("expected stream %q, stored in %q", want, ack.Stream), ErrWrongStream)
	}
	return ack, err
}

// parseAck reads a stream's answer to a publish: an ack, a refusal as
// [*jetstream.APIError] with an Ack that names the stream, or [ErrBadAck]. last is the
// stream of an earlier ack: the same name is not allocated again.
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

// parsePlainAck reads {"stream":"S","seq":1}, which almost every ack is, without
// a JSON decoder. Whatever else it leaves to that.
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

	// ackWait is how long the first try waits for its ack, see [tryWait]. Tries
	// share the message id, so a slow ack costs a duplicate answer at most.
	ackWait = time.Second
)

var (
	errClosed   = failure("connection closed", ErrConnectionClosed, nats.ErrConnectionClosed)
	errDraining = failure("connection is draining", ErrConnectionClosed, nats.ErrConnectionDraining)
)

func cut(b []byte, n int) []byte { return b[:min(len(b), n)] }

// publishOnce is one JetStream publish with one awaited and checked ack: no
// retry, no check of the envelope. It waits until ctx ends.
//
// Nobody there is [nats.ErrNoResponders], a refusal [*jetstream.APIError] with an Ack
// that names the stream, an answer that no stream gave [ErrBadAck], an ack from another stream than the
// one in the message's Nats-Expected-Stream [ErrWrongStream]. Anything else
// leaves open whether the message is stored.
func publishOnce(ctx context.Context, nc *nats.Conn, m *nats.Msg) (Ack, error) {
	r, err := nc.RequestMsgWithContext(ctx, m)
	if err != nil {
		return Ack{}, err
	}
	return checkedAck(r.Data, m.Header.Get(jetstream.ExpectedStreamHeader), "")
}
