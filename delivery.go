package natsx

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// deadlineContext is a delivery's context with a deadline. It avoids the cost of
// [context.WithDeadline], a timer and four objects, which it makes only when Done is
// first called: a fast handler never does.
type deadlineContext struct {
	*delivery
	at time.Time

	mu     sync.Mutex
	ended  bool            // the handler has returned
	timed  context.Context // nil until it is needed
	cancel context.CancelFunc
}

// withDeadline makes the context of a delivery in c, or a new one when that is nil.
func withDeadline(c *deadlineContext, d *delivery, at time.Time) *deadlineContext {
	if c == nil {
		c = &deadlineContext{}
	}
	c.delivery, c.at = d, at
	return c
}

// end cancels the context once its handler has returned.
func (c *deadlineContext) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.timed != nil {
		c.cancel()
	}
}

// real returns the context of [context.WithDeadline]. c is locked.
func (c *deadlineContext) real() context.Context {
	if c.timed == nil {
		c.timed, c.cancel = context.WithDeadline(c.delivery, c.at)
		if c.ended {
			c.cancel()
		}
	}
	return c.timed
}

func (c *deadlineContext) Deadline() (time.Time, bool) { return c.at, true }

func (c *deadlineContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.real().Done()
}

// Err makes the real context as soon as there is an error, so that the error stays the
// same.
func (c *deadlineContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timed == nil && !c.ended && c.delivery.Err() == nil && time.Now().Before(c.at) {
		return nil
	}
	return c.real().Err()
}

// passed reports whether the deadline has ended the context, now.
func (c *deadlineContext) passed(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timed == nil {
		return !now.Before(c.at) && c.delivery.Err() == nil
	}
	return c.timed.Err() == context.DeadlineExceeded
}

// Value asks the real context, so that contexts derived from c need no goroutine to
// follow it.
func (c *deadlineContext) Value(key any) any {
	c.mu.Lock()
	timed := c.timed
	c.mu.Unlock()
	if timed != nil {
		return timed.Value(key)
	}
	return c.delivery.Value(key)
}

// delivery is a message and the context of its handler in one object, which saves an
// allocation per message. The handler may keep it; the engine does not use it after the
// handler has returned, except through its work.
type delivery struct {
	msg       Msg                       // owned by the handler, which may change it
	work      *work                     // of the engine; only while the handler runs
	numbering atomic.Pointer[numbering] // owned by publishing: what was published with this context
}

// Deadline, Done and Err are those of the broker's context for handlers.
func (d *delivery) Deadline() (time.Time, bool) { return d.msg.origin().ctx.Deadline() }
func (d *delivery) Done() <-chan struct{}       { return d.msg.origin().ctx.Done() }
func (d *delivery) Err() error                  { return d.msg.origin().ctx.Err() }

// Value returns the delivery itself or its message for their keys, and else asks the parent.
func (d *delivery) Value(key any) any {
	switch key.(type) {
	case deliveryKey:
		return d
	case msgKey:
		return &d.msg
	}
	return d.msg.origin().ctx.Value(key)
}

type (
	deliveryKey struct{}
	msgKey      struct{}
)

func deliveryFrom(ctx context.Context) *delivery {
	d, _ := ctx.Value(deliveryKey{}).(*delivery)
	return d
}

// work is a delivery from its arrival until it is settled. While it runs its worker owns
// it, else its lane does, under the pool's lock; what other goroutines use is atomic. It
// is reused for later deliveries.
type work struct {
	*delivery
	raw   *nats.Msg // as received, for its acknowledgement and its dead letter
	id    messageID // where it came from
	count uint64    // the server's delivery count
	lost  uint64    // earlier deliveries of which it is not known what they ran
	copied
	key string // its order key; see keyedQueue

	unchecked bool // it is held until the consumer was checked
	rests     bool // it is kept until its retry is due; see sequencer
	first     bool // it is the one of its key that may run; see sequencer
	alone     bool // it is to run in isolation
	marked    bool // and that was recorded; see alone.go
	confirmed bool // its acknowledgement was confirmed

	leased // owned by lease.go

	// The attempt, written by the worker that runs it.
	outcome  Outcome
	reason   Reason  // of a dead message
	late     Outcome // of one that lapsed when only its acknowledgement was missing, else empty
	members  []*work // of a batch, which has no delivery of its own
	shared   bool    // it is one of a batch, whose time is counted once
	peers    int     // messages of the batch that were handled together, 0 for none
	arrived  int64   // 0 if it is not measured
	began    int64   // when it was started or given up
	ended    int64   // when the handler returned
	swift    bool    // ended is still the current time: nothing slow was done since
	err      error
	due      int64            // when its retry or replay is due, or its requester gives up
	timed    *deadlineContext // for the handler's deadline, or nil
	answer   []byte           // of a responder
	answered atomic.Bool      // the request was answered

	redrive *redriveCopy // a proven redrive for this durable; owned by passover.go
	outbox  taker        // takes it when its worker has left it, to pass it on; nil for none
	letter  *heldLetter  // on its way to the DLQ; owned by dlq.go
	copy    *heldCopy    // on its way to the retry stream; owned by retrystream.go
	again   bool         // it was delivered before, and is to be moved to the retry stream
}

// request is what a responder may keep of a request, in one allocation.
type request struct {
	delivery delivery
	timed    deadlineContext
}

// copied is which message a work is, which may have come as a copy of a retry stream.
type copied struct {
	source messageID // in its own stream
	token  string    // of its life, empty for the first
	number uint64    // of the copy, 0 for the message itself
	from   string    // ack subject of the message that the copy was made of
}

// life identifies a message of a durable: each redrive begins another life. It is one
// token of a subject.
func (c *copied) life() string {
	if c.token != "" {
		return c.token
	}
	return fmt.Sprintf("%d@%d", c.source.seq, c.source.time)
}

// taker takes a work that its worker could not settle.
type taker interface{ take(w *work) }

// took is how long the handler ran.
func (w *work) took() time.Duration { return time.Duration(w.ended - w.began) }

// event is what observers get for it.
func (w *work) event(filter, durable string) Event {
	e := Event{
		Route: filter, Durable: durable, Msg: &w.msg, Outcome: w.outcome, Err: w.err,
		Duration: w.took(),
	}
	if w.began > 0 {
		e.Started = time.Now().Add(time.Duration(w.began - processTime()))
		if w.arrived > 0 {
			e.Waited = time.Duration(w.began - w.arrived)
		}
	}
	switch w.outcome {
	case OutcomeDead:
		e.Reason = w.reason
	case OutcomeRetried:
		e.Delay = time.Duration(w.due - w.ended)
	}
	return e
}

// leased is the lease on a message of a durable: the server's AckWait, counted from the
// arrival and then from each renewal that the server has confirmed. After its end the
// server may deliver the message to another process.
type leased struct {
	ends  atomic.Int64  // only a nak makes it earlier
	state atomic.Uint64 // number of the use of the work times leaseStates, plus one of these

	// Guarded by the pool's mutex.
	renew      int64 // when it is to be renewed
	prev, next *work // in leases, by renewal
	chain      *work // in leases, of equal hash
	listed     bool  // in leases
}

const (
	leaseHeld    uint64 = iota
	leaseRenewed        // an in-progress ack is being written
	leaseSettled        // settling has begun: no more renewals
	leaseStates
)

// begin starts a new lease on a work that may have been used before.
func (l *leased) begin(ends, renew int64) {
	l.state.Store((l.state.Load()/leaseStates + 1) * leaseStates)
	l.ends.Store(ends)
	l.renew = renew
}

// claim ends the renewals. It waits for one that is being written: an in-progress ack
// after a nak would start a new ack wait and cancel the nak's delay.
func (l *leased) claim() {
	for {
		s := l.state.Load()
		switch s % leaseStates {
		case leaseSettled:
			return
		case leaseHeld:
			if l.state.CompareAndSwap(s, s+leaseSettled) {
				return
			}
		default:
			runtime.Gosched()
		}
	}
}

// settling reports whether settling has begun.
func (l *leased) settling() bool { return l.state.Load()%leaseStates == leaseSettled }

// MsgFrom returns the message that is handled with ctx, or nil if ctx is neither a
// handler's context nor derived from one. A typed handler gets subject, headers and
// attempt this way.
func MsgFrom(ctx context.Context) *Msg {
	m, _ := ctx.Value(msgKey{}).(*Msg)
	return m
}

// contextOf is a context under which m is handled, as far as a handler can tell, without
// an engine.
func contextOf(ctx context.Context, m *Msg) context.Context {
	d := &delivery{}
	if m != nil {
		d.msg = *m
	}
	return context.WithValue(context.WithValue(ctx, deliveryKey{}, d), msgKey{}, m)
}
