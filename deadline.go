package natsx

import (
	"context"
	"sync"
	"time"
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
