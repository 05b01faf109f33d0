package natsx

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

// Handler handles one message. Its result decides how a JetStream message is settled; see
// the package documentation. Up to the route's concurrency, a handler is called by
// several goroutines at once.
//
// The context carries the message ([MsgFrom]) and the values of the context passed to
// [Broker.Run] or [Broker.Replay]. It does not end with that context, but at the route's
// Timeout, if there is one, and when a shutdown exceeds the drain timeout, then with
// [ErrDrainTimeout] as its cause. AckWait does not end it.
type Handler func(ctx context.Context, m *Msg) error

// BatchHandler handles several messages at once; see [RouteBuilder.Batch]. Its result
// applies to each message like that of a [Handler], unless it is or wraps a [BatchError].
// The context carries no message: [MsgFrom] returns nil, and a [Publisher] adds random
// message ids, so that a redelivery may publish again.
type BatchHandler func(ctx context.Context, ms []*Msg) error

// BatchError holds the results of single messages of a batch: the key is the index of a
// message, from 0, and the value is the result that a [Handler] would return for it. Other
// messages have succeeded. With an index outside the batch it is a failure of all
// messages.
type BatchError map[int]error

// Error returns the number of failures and the first one.
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

// Unwrap returns the failures in the order of their messages.
func (e BatchError) Unwrap() (errs []error) {
	for _, i := range slices.Sorted(maps.Keys(e)) {
		if e[i] != nil {
			errs = append(errs, e[i])
		}
	}
	return errs
}

// Responder answers one request. The bytes are the reply's payload, and [Msg.ReplyHeader]
// its headers. An error is answered too: see [Fail]. The context is that of a [Handler],
// and also ends at the requester's deadline, if the request carries one; see
// [RouteBuilder.Reply].
type Responder func(ctx context.Context, m *Msg) ([]byte, error)

// Middleware wraps a handler in another one. [WithMiddleware] has every handler of a broker
// wrapped, once for each route and replay; what that returns is called by many goroutines
// at once, and [Msg.Route] tells it the route. The handler of one route is wrapped in the
// chain: Handle(mw(handler)). The broker's middleware is then around that.
//
// The examples show a timeout, a correlation id, a log, deduplication by a key in a
// key-value bucket, an alert of poison messages, and one that is for some routes only.
type Middleware func(Handler) Handler

// Msg is a received message. It belongs to its handler, which may keep it and set
// its fields; it is not safe for concurrent use while it is changed. The bytes of
// Data and the values in Header stay as they are: a dead letter is made of them.
//
// The methods of a nil Msg, which [MsgFrom] returns outside of a handler, and of the zero
// Msg return what they return for an empty message of core NATS. Package natsxtest makes
// messages for unit tests.
type Msg struct {
	Subject string      // as it was published
	Data    []byte      // the payload
	Header  nats.Header // nil if the message has none; names are case-sensitive (ADR-4)

	from    *origin   // nil if no route has received it
	reply   *nats.Msg // has the message's Reply; nil for none
	seq     uint64
	time    int64 // Unix nanoseconds, 0 for a core message
	attempt uint32
	answer  nats.Header
}

// Attempt is the number of this run of the handler for the message, 1 for the first, as
// far as is known. It is always 1 for messages that are not from a durable, and never
// above the attempts that Retry allows. A delivery that this process did not start or
// gave back at a shutdown is no attempt. Deliveries to other processes count as attempts,
// unless the broker has a [WithRetryStream]: then exactly the runs that returned do.
func (m *Msg) Attempt() int {
	if m == nil {
		return 1
	}
	return max(int(m.attempt), 1)
}

// Route is the filter of the route or replay that the message was received by, empty for
// an answer to a request.
func (m *Msg) Route() string { return m.origin().filter }

// IsRequest reports whether the message is a request to a reply route, whose sender waits
// for the answer.
func (m *Msg) IsRequest() bool { return m.origin().request }

// Stream is the name of the stream the message is from, empty for core NATS.
func (m *Msg) Stream() string { return m.origin().stream }

// Durable is the name of the durable consumer, empty for core NATS and replays.
func (m *Msg) Durable() string { return m.origin().durable }

// Sequence is the message's sequence in its stream, 0 for core NATS.
func (m *Msg) Sequence() uint64 {
	if m == nil {
		return 0
	}
	return m.seq
}

// Time is when the stream stored the message, the zero time for core NATS.
func (m *Msg) Time() time.Time {
	if m == nil || m.time == 0 {
		return time.Time{}
	}
	return time.Unix(0, m.time)
}

// Token returns the i-th token of the subject, counted from 0, or the empty string if
// there is no such token.
func (m *Msg) Token(i int) string {
	if m == nil {
		return ""
	}
	return subjectToken(m.Subject, i)
}

// ReplyHeader returns the headers of the answer, which a [Responder] may set. It is never
// nil; for a message that is not a request it is not sent.
func (m *Msg) ReplyHeader() nats.Header {
	if m == nil {
		return nats.Header{}
	}
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

// origin is the common part of the messages of one route or replay.
type origin struct {
	filter  string
	request bool            // of a reply route
	stream  string          // empty for core NATS
	durable string          // empty for core NATS and a replay
	ctx     context.Context // that handlers run under
}

var noOrigin = origin{ctx: context.Background()}

func (m *Msg) origin() *origin {
	if m == nil || m.from == nil {
		return &noOrigin
	}
	return m.from
}
