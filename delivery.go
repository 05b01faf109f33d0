package natsx

import (
	"context"
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

// delivery is a message in the hands of a handler. It is also the handler's
// context, which saves an allocation for each message.
type delivery struct {
	context.Context
	msg   Msg       // the handler's, who may change it
	raw   *nats.Msg // as it came, for its dead letter
	route *route

	published atomic.Uint32           // envelopes published with this context so far
	refused   atomic.Pointer[numbers] // of the last call, when it stored nothing; see call.number
	settling  atomic.Int32            // see delivery.renewing

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
