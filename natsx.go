package natsx

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

// Handler handles one message. What it returns decides what becomes of a
// JetStream message; see the package documentation. A handler is called by many
// goroutines at once, up to the route's concurrency.
//
// The context carries the message ([MsgFrom]) and the values of the context that
// [Broker.Run] or [Broker.Replay] was given. It does not end with that one: it ends
// at the route's Timeout, if there is one, and when a shutdown passes its drain
// timeout, then with [ErrDrainTimeout] as its cause. AckWait does not end it.
type Handler func(ctx context.Context, m *Msg) error

// BatchHandler handles several messages at once; see [RouteBuilder.Batch]. Its result
// counts for each message, as that of a [Handler] does, unless it is or wraps a
// [BatchError]. The context is not that of one message: [MsgFrom] does not find any, and
// what is published with it has no id that a later delivery repeats.
type BatchHandler func(ctx context.Context, ms []*Msg) error

// BatchError tells the results of the single messages of a batch apart: the key is the
// index of a message, from 0, and the value what a [Handler] would have returned for it.
// Messages that are not named have succeeded. With an index that the batch does not have
// it counts as a failure of all.
type BatchError map[int]error

// Error gives the number of failures and the first of them.
func (e BatchError) Error() string {
	failed := 0
	first := -1
	for i, err := range e {
		if err == nil {
			continue
		}
		failed++
		if first < 0 || i < first {
			first = i
		}
	}
	if failed == 0 {
		return "natsx: no message of the batch failed"
	}
	return fmt.Sprintf("natsx: %d of the batch failed, the first at index %d: %s", failed, first, cause(e[first]))
}

// Unwrap gives the failures in the order of their messages.
func (e BatchError) Unwrap() (errs []error) {
	for _, i := range slices.Sorted(maps.Keys(e)) {
		if e[i] != nil {
			errs = append(errs, e[i])
		}
	}
	return errs
}

// Responder answers one request. The bytes are the reply's payload, and
// [Msg.ReplyHeader] its headers. An error is answered too: see [Fail]. The context is
// that of a [Handler], and ends with the requester's deadline as well, where the
// request tells it: see [RouteBuilder.Reply].
type Responder func(ctx context.Context, m *Msg) ([]byte, error)

// Middleware wraps every handler of a broker; see [WithMiddleware]. It is called once
// for each route and replay; what it returns is called by many goroutines at once.
type Middleware func(Handler) Handler

// Msg is a received message. It belongs to its handler, which may keep it and set
// its fields; it is not safe for concurrent use while it is changed. The bytes of
// Data and the values in Header stay as they are: a dead letter is made of them.
type Msg struct {
	Subject string
	Data    []byte
	Header  nats.Header // nil when the message has none; the case of names counts (ADR-4)

	from    *origin   // nil for one that no route received
	reply   *nats.Msg // whose Reply is that of the message; nil for none
	seq     uint64
	time    int64 // Unix nanoseconds, 0 for a core message
	attempt uint32
	answer  nats.Header
}

// Attempt counts the runs of the handler for this message, as far as they are known: 1
// on the first. It is 1 for every message that is not from a durable, and never more
// than the attempts that the route's Retry allows. What the server delivered and this
// process did not start, or gave back at a shutdown, is no attempt; of other processes
// only the deliveries are known.
func (m *Msg) Attempt() int { return max(int(m.attempt), 1) }

// Stream is the name of the stream the message is from, empty for core NATS.
func (m *Msg) Stream() string { return m.origin().stream }

// Durable is the name of the durable consumer, empty for core NATS and replays.
func (m *Msg) Durable() string { return m.origin().durable }

// Sequence is the message's sequence in its stream, 0 for core NATS.
func (m *Msg) Sequence() uint64 { return m.seq }

// Time is when the stream stored the message, the zero time for core NATS.
func (m *Msg) Time() time.Time {
	if m.time == 0 {
		return time.Time{}
	}
	return time.Unix(0, m.time)
}

// Token returns the i-th token of the subject, counted from 0, and the empty
// string when there is no such token.
func (m *Msg) Token(i int) string { return subjectToken(m.Subject, i) }

// ReplyHeader is what a [Responder] may fill to send headers with its answer.
// It is never nil; for a message that is not a request it is not sent.
func (m *Msg) ReplyHeader() nats.Header {
	if m.answer == nil {
		m.answer = nats.Header{}
	}
	return m.answer
}

// replyTo is the reply subject, empty for none.
func (m *Msg) replyTo() string {
	if m.reply == nil {
		return ""
	}
	return m.reply.Reply
}

// origin is what the messages of one route or replay have in common.
type origin struct {
	stream  string          // empty for core NATS
	durable string          // empty for core NATS and a replay
	ctx     context.Context // that handlers run under
}

var noOrigin = origin{ctx: context.Background()}

func (m *Msg) origin() *origin {
	if m.from == nil {
		return &noOrigin
	}
	return m.from
}
