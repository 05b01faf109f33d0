package natsx

import "sync"

// pool runs the deliveries of all lanes on a fixed number of workers.
//
// Its mutex also guards the lanes and what their owners keep about pulls and
// leases: a message then costs one lock when it arrives and one when a worker
// goes from it to the next.
type pool struct {
	size int
	gone chan struct{} // closed when the last worker has ended

	mu      sync.Mutex
	wake    *sync.Cond
	ready   fifo[*lane] // lanes with work that may run more of it
	active  int         // lanes with work, waiting or running
	busy    int         // workers that hold a delivery
	waiting int         // deliveries queued over all lanes
	held    int         // deliveries that are handled and not settled yet
	idle    int         // parked workers
	waking  bool        // a worker was signalled and did not look yet
	alive   int         // workers that did not end
	closed  bool
	quiet   chan struct{} // when not nil, closed once nothing is in hand
}

// lane is what takes turns in the pool: the queue of one route or replay.
// Guarded by the pool's mutex.
type lane struct {
	owner   job
	limit   int // deliveries of this lane that run at once
	queue   fifo[*delivery]
	running int
	listed  bool // in pool.ready
}

// job is the owner of a lane.
type job interface {
	// run handles and settles d on a worker.
	run(d *delivery)
	// conclude settles d by the result of its handler, as a part of run.
	conclude(d *delivery, err error)
	// finish books d, with the pool locked, and says what to pull next.
	finish(d *delivery) pull
	// pull asks the server for messages, with the pool unlocked.
	pull(p pull)
}

func newPool(size int) *pool {
	p := &pool{size: size, gone: make(chan struct{})}
	p.wake = sync.NewCond(&p.mu)
	return p
}

// start starts the workers; close ends them.
func (p *pool) start() {
	p.alive = p.size
	for range p.size {
		go p.work()
	}
}

// close ends every worker that is idle or becomes so. What is queued is dropped.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.wake.Broadcast()
	p.mu.Unlock()
}

func (p *pool) work() {
	var l *lane
	var d *delivery
	defer func() {
		if d == nil {
			return
		}
		// The handler left by runtime.Goexit. The delivery was settled on the
		// way out; a new worker takes this one's place.
		p.mu.Lock()
		next := p.finish(l, d)
		p.mu.Unlock()
		l.owner.pull(next)
		go p.work()
	}()
	p.mu.Lock()
	for {
		if l, d = p.take(); d == nil {
			if p.alive--; p.alive == 0 {
				close(p.gone)
			}
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		l.owner.run(d)
		p.mu.Lock()
		if next := p.finish(l, d); next.batch > 0 {
			p.mu.Unlock()
			l.owner.pull(next)
			p.mu.Lock()
		}
	}
}

// put queues d. The pool is locked.
func (p *pool) put(l *lane, d *delivery) {
	if l.running == 0 && l.queue.len() == 0 {
		p.active++
	}
	l.queue.push(d)
	p.waiting++
	p.list(l)
	p.signal()
}

// refill queues d from within [job.finish], where l counts as active. The pool is
// locked.
func (p *pool) refill(l *lane, d *delivery) {
	l.queue.push(d)
	p.waiting++
}

// list makes l take turns when it has work it may run. The pool is locked.
func (p *pool) list(l *lane) {
	if !l.listed && l.queue.len() > 0 && l.running < l.limit {
		l.listed = true
		p.ready.push(l)
	}
}

// signal wakes one worker for work that is ready. Only one at a time is on its
// way: it wakes the next when it leaves work behind, so that a burst of short
// work is done by few workers and one of long work soon by all.
func (p *pool) signal() {
	if p.idle > 0 && !p.waking && p.ready.len() > 0 {
		p.waking = true
		p.wake.Signal()
	}
}

// take returns the next delivery, or none when the pool is closed. The pool is
// locked, and unlocked while it waits.
func (p *pool) take() (*lane, *delivery) {
	for !p.closed {
		if l := p.turn(); l != nil {
			d := l.queue.pop()
			l.running++
			l.listed = false
			p.busy++
			p.waiting--
			p.list(l)
			p.signal()
			return l, d
		}
		p.idle++
		p.wake.Wait()
		p.idle--
		p.waking = false
	}
	return nil, nil
}

// turn returns the lane whose turn it is: the first that holds less than its
// share of the workers, or the first.
func (p *pool) turn() *lane {
	n := p.ready.len()
	if n > 1 {
		share := p.share()
		for range n {
			l := p.ready.pop()
			if l.running < share {
				return l
			}
			p.ready.push(l)
		}
	}
	if n == 0 {
		return nil
	}
	return p.ready.pop()
}

// share is what each lane with work gets of the workers. The pool is locked.
func (p *pool) share() int {
	if p.active <= 1 {
		return p.size
	}
	return (p.size + p.active - 1) / p.active
}

// free is the number of workers that nothing waits for. The pool is locked.
func (p *pool) free() int { return max(p.size-p.busy-p.waiting, 0) }

func (p *pool) finish(l *lane, d *delivery) pull {
	l.running--
	p.busy--
	next := l.owner.finish(d)
	p.settleLane(l)
	p.list(l)
	return next
}

// settleLane counts l out when its last work is gone. The pool is locked.
func (p *pool) settleLane(l *lane) {
	if l.running == 0 && l.queue.len() == 0 {
		p.active--
		p.checkQuiet()
	}
}

// checkQuiet closes quiet when nothing is in hand. The pool is locked.
func (p *pool) checkQuiet() {
	if p.quiet != nil && p.busy == 0 && p.waiting == 0 && p.held == 0 {
		close(p.quiet)
		p.quiet = nil
	}
}

// drained returns a channel that is closed once nothing waits, runs or is held.
func (p *pool) drained() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	ch := make(chan struct{})
	p.quiet = ch
	p.checkQuiet()
	return ch
}

// unfinished counts what is in hand.
func (p *pool) unfinished() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.busy + p.waiting + p.held
}
