package natsx

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
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

// BatchHandler handles several messages at once. Its result counts for each. This
// version refuses a route with one; see [RouteBuilder.Batch].
type BatchHandler func(ctx context.Context, ms []*Msg) error

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

	reply   string
	from    *origin // nil for a core message
	seq     uint64
	attempt uint64
	time    int64 // Unix nanoseconds, 0 for a core message
	answer  nats.Header
}

// Attempt counts the deliveries of the message to this durable: 1 on the first.
// It is 1 for every message that is not from a durable.
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

// origin is what the messages of one consumer have in common.
type origin struct {
	stream  string
	durable string // empty for a replay
	created int64  // the stream's creation in Unix nanoseconds, 0 when unknown
}

var noOrigin origin

func (m *Msg) origin() *origin {
	if m.from == nil {
		return &noOrigin
	}
	return m.from
}

func subjectToken(subject string, i int) string {
	if i < 0 {
		return ""
	}
	for ; i > 0; i-- {
		dot := strings.IndexByte(subject, '.')
		if dot < 0 {
			return ""
		}
		subject = subject[dot+1:]
	}
	token, _, _ := strings.Cut(subject, ".")
	return token
}

// delivery is a message in the hands of a handler. It is also the handler's
// context, which saves an allocation for each message.
type delivery struct {
	context.Context
	msg   Msg       // the handler's, who may change it
	raw   *nats.Msg // as it came, for its dead letter
	route *route

	made     atomic.Pointer[made] // owned by publishing: what was published with this context
	settling atomic.Int32         // see delivery.renewing

	// The lease on a message of a durable. The times are the engine's.
	lease      atomic.Int64 // when it ends; only ever moved to later
	renew      int64        // when it is to be renewed
	prev, next *delivery    // in the route's list of leases
	key        string       // of its order; see keyedQueue

	// The attempt, written by the worker that runs it.
	outcome  Outcome
	began    int64 // when it was started or given up, engine time
	ended    int64 // when the handler had returned, engine time
	err      error
	due      int64       // of its retry or of its replay, or when a requester waits no more; engine time
	answer   []byte      // of a responder
	answered atomic.Bool // the request was replied to

	// A dead letter on its way; see durableRoute.bury.
	held   bool  // the DLQ did not take it yet
	stored bool  // the letter is in the DLQ
	form   uint8 // of the letter; see durableRoute.letter
	letter *nats.Msg
}

// The states of delivery.settling.
const (
	inHand int32 = iota
	inRenewal
	inSettlement
)

// renewing sends an in-progress ack, unless the settling of d has begun: the
// server would take it for a new lease and forget the delay of a nak.
func (d *delivery) renewing(send func(*delivery)) bool {
	if !d.settling.CompareAndSwap(inHand, inRenewal) {
		return false
	}
	send(d)
	d.settling.Store(inHand)
	return true
}

// claim ends the renewals of d. It waits for one that is being written.
func (d *delivery) claim() {
	for !d.settling.CompareAndSwap(inHand, inSettlement) && d.settling.Load() != inSettlement {
		runtime.Gosched()
	}
}

// took is how long the handler ran.
func (d *delivery) took() time.Duration { return time.Duration(d.ended - d.began) }

type deliveryKey struct{}

// Value finds the delivery itself and else asks the parent.
func (d *delivery) Value(key any) any {
	if key == (deliveryKey{}) {
		return d
	}
	return d.Context.Value(key)
}

func deliveryFrom(ctx context.Context) *delivery {
	d, _ := ctx.Value(deliveryKey{}).(*delivery)
	return d
}

// MsgFrom returns the message that is handled with ctx, or nil when ctx is not,
// and does not derive from, a handler's context. A typed handler finds subject,
// headers and attempt this way.
func MsgFrom(ctx context.Context) *Msg {
	if d := deliveryFrom(ctx); d != nil {
		return &d.msg
	}
	return nil
}

// Connect is [nats.Connect] with defaults for production ahead of opts: the
// executable's name as connection name, reconnecting for ever with a wait of
// 500 ms and a jitter of up to 500 ms (TLS: 2 s), a retry when the first connect
// fails, a drain timeout of 30 s, and asynchronous errors, disconnects and
// reconnects logged to [slog.Default]. Every default can be overridden by opts.
// The url may be several with commas between them, which are tried in random order;
// an empty one is [nats.DefaultURL], nats://127.0.0.1:4222.
//
// Since a failed first connect is retried in the background, Connect returns
// before the connection is up when no server answers; [Broker.Run] waits for it.
// What is wrong with url or opts is an error at once. The caller closes the
// connection.
func Connect(url string, opts ...nats.Option) (*nats.Conn, error) {
	defaults := []nats.Option{
		nats.Name(filepath.Base(os.Args[0])),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ReconnectJitter(500*time.Millisecond, 2*time.Second),
		nats.RetryOnFailedConnect(true),
		nats.DrainTimeout(30 * time.Second),
		nats.ErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
			args := []any{"error", err, "connection", nc.Opts.Name}
			if sub != nil {
				args = append(args, "subject", sub.Subject)
			}
			slog.Error("natsx: asynchronous error of the connection", args...)
		}),
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if err != nil {
				slog.Warn("natsx: disconnected", "error", err, "connection", nc.Opts.Name)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			slog.Info("natsx: reconnected", "url", nc.ConnectedUrlRedacted(), "connection", nc.Opts.Name)
		}),
	}
	return nats.Connect(url, append(defaults, opts...)...)
}
