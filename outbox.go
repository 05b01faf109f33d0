package natsx

import (
	"context"
	"time"
)

// outbox passes messages of a route on to a place that may not accept them at the moment:
// on the worker while the place does, otherwise later, from one goroutine that tries until
// it does, the oldest first. A message that waits keeps its lease.
type outbox struct {
	route *route
	owner outboxOwner
	kind  string        // of the trouble that Health reports
	pause time.Duration // before the first retry, then doubled
	// pass passes a message on and settles it. Nil means that nothing is left to do.
	pass  func(ctx context.Context, w *work) error
	again func() // called before each retry; nil for nothing

	// Guarded by the pool's mutex.
	queue  fifo[*work]
	active bool // the last try failed, and the goroutine runs
}

// outboxPauseUp is the longest pause between two tries.
const outboxPauseUp = 5 * time.Second

// outboxOwner books the messages that were passed on later.
type outboxOwner interface {
	// book records the outcome of a message. The pool is locked.
	book(w *work)
	// flow plans the next pull once no message waits.
	flow()
}

// send passes w on from its worker and returns true. If the place does not accept it, send
// returns false: the message waits, and once its worker has left it, take queues it.
func (o *outbox) send(w *work) bool {
	r, p := o.route, o.route.env.pool
	p.mu.Lock()
	down := o.active
	p.mu.Unlock()
	if !down {
		err := o.pass(r.env.closing, w)
		if err == nil {
			return true
		}
		r.trouble(o.kind, err)
	}
	w.outbox = o
	return false
}

// take queues a message that send could not pass on. The pool is locked.
func (o *outbox) take(w *work) {
	o.route.env.pool.held++
	o.queue.push(w)
	if !o.active {
		o.active = true
		o.route.env.spawn(o.run)
	}
}

// run passes on what waits until nothing does.
func (o *outbox) run() {
	r, p := o.route, o.route.env.pool
	for {
		p.mu.Lock()
		if o.queue.len() == 0 {
			o.active = false
			p.mu.Unlock()
			r.clear(o.kind)
			o.owner.flow()
			return
		}
		w := o.queue.pop()
		p.mu.Unlock()
		pause := backoff{first: o.pause, most: outboxPauseUp}
		for {
			err := o.pass(r.env.closing, w)
			if err == nil {
				break
			}
			r.trouble(o.kind, err)
			if !pause.wait(r.env.closing) {
				return
			}
			if o.again != nil {
				o.again()
			}
		}
		for _, observer := range r.env.observers {
			if w.outcome != "" { // otherwise it did not run
				r.env.callUserApart(r.observing(), func() { observer.Observe(w.delivery, r.event(w)) })
			}
		}
		p.mu.Lock()
		p.held--
		o.owner.book(w)
		p.checkDrained()
		p.mu.Unlock()
	}
}
