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

// deadlineContext is a delivery's context with a deadline. It is
// [context.WithDeadline] but for its cost, which is a timer and four objects: they
// are made when somebody first asks for the channel, and a handler that is done
// soon never does.
type deadlineContext struct {
	*delivery
	at time.Time

	mu     sync.Mutex
	ended  bool            // the handler has returned
	timed  context.Context // the real one, nil until it is needed
	cancel context.CancelFunc
}

func withDeadline(d *delivery, at time.Time) *deadlineContext {
	return &deadlineContext{delivery: d, at: at}
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

// real returns the real context. c is locked.
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

// Err makes the real context as soon as there is an error, so that it stays the
// same from then on.
func (c *deadlineContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timed == nil && !c.ended && c.delivery.Err() == nil && time.Now().Before(c.at) {
		return nil
	}
	return c.real().Err()
}

// Value passes on to the real context, so that contexts derived from c are linked
// to it without a goroutine.
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
// allocation for each message. The handler may keep it; the engine does not touch it
// once the handler has returned, except through its work.
type delivery struct {
	msg  Msg                  // the handler's, who may change it
	work *work                // of the engine; only for the time that the handler runs
	made atomic.Pointer[made] // owned by publishing: what was published with this context
}

// Deadline, Done and Err are those of the context that handlers run under.
func (d *delivery) Deadline() (time.Time, bool) { return d.msg.origin().ctx.Deadline() }
func (d *delivery) Done() <-chan struct{}       { return d.msg.origin().ctx.Done() }
func (d *delivery) Err() error                  { return d.msg.origin().ctx.Err() }

// Value finds the delivery itself and else asks the parent.
func (d *delivery) Value(key any) any {
	if key == (deliveryKey{}) {
		return d
	}
	return d.msg.origin().ctx.Value(key)
}

type deliveryKey struct{}

func deliveryFrom(ctx context.Context) *delivery {
	d, _ := ctx.Value(deliveryKey{}).(*delivery)
	return d
}

// work is a delivery on its way through the engine, from its arrival until it is
// settled. It is the worker's while it runs, else its lane's, under the pool's lock;
// what other goroutines touch is atomic. A pool uses it again for another delivery.
type work struct {
	*delivery
	raw   *nats.Msg // as it came, for its acknowledgement and its dead letter
	id    messageID // where it came from
	count uint64    // how often the server has delivered it
	lost  uint64    // of these, before this one, how many nobody knows of what they ran
	copied
	key string // of its order; see keyedQueue

	alone     bool // it is to run with nothing else of its route in hand
	marked    bool // and that was written down; see alone.go
	confirmed bool // its acknowledgement was confirmed

	leased // owned by lease.go

	// The attempt, written by the worker that runs it.
	outcome  Outcome
	reason   Reason // of a dead one
	began    int64  // when it was started or given up
	ended    int64  // when the handler had returned
	swift    bool   // nothing that takes time was done after that
	err      error
	due      int64       // of its retry or of its replay, or when a requester waits no more
	answer   []byte      // of a responder
	answered atomic.Bool // the request was replied to

	letter *heldLetter // on its way to the DLQ; owned by dlq.go
	copy   *heldCopy   // on its way to the retry stream; owned by retrystream.go
	again  bool        // it was delivered before, and is to be moved to the retry stream
}

// copied is which message a work is, which may have come as a copy of a retry stream.
type copied struct {
	source messageID // in its own stream
	token  string    // of its life, empty for the first
	number uint64    // of the copy, 0 for the message itself
	from   string    // ack subject of what the copy was made of
}

// life names a message, and by how often it was redriven, its lives. It is one token.
func (c *copied) life() string {
	if c.token != "" {
		return c.token
	}
	return fmt.Sprintf("%d@%d", c.source.seq, c.source.time)
}

// took is how long the handler ran.
func (w *work) took() time.Duration { return time.Duration(w.ended - w.began) }

// leased is the lease on a message of a durable: the server's AckWait, counted from
// the arrival and then from each renewal that the server has confirmed. Past its end
// the message may be somebody else's.
type leased struct {
	ends  atomic.Int64  // only ever moved to later, but by a nak
	state atomic.Uint64 // the use of the work, times leaseStates, and one of these

	// Guarded by the pool's mutex.
	renew      int64 // when it is to be renewed
	prev, next *work // in leases, by renewal
	chain      *work // in leases, of equal hash
	listed     bool  // in leases
}

const (
	leaseHeld    uint64 = iota
	leaseRenewed        // an in-progress ack is being written
	leaseSettled        // the settling has begun: nothing is renewed any more
	leaseStates
)

// begin makes a work that was used before hold a new lease.
func (l *leased) begin(ends, renew int64) {
	l.state.Store((l.state.Load()/leaseStates + 1) * leaseStates)
	l.ends.Store(ends)
	l.renew = renew
}

// claim ends the renewals. It waits for one that is being written: the server would
// take an in-progress ack behind a nak for a new lease and forget the nak's delay.
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

// settling reports whether the settling has begun.
func (l *leased) settling() bool { return l.state.Load()%leaseStates == leaseSettled }

// MsgFrom returns the message that is handled with ctx, or nil when ctx is not,
// and does not derive from, a handler's context. A typed handler finds subject,
// headers and attempt this way.
func MsgFrom(ctx context.Context) *Msg {
	if d := deliveryFrom(ctx); d != nil {
		return &d.msg
	}
	return nil
}
