package natsx

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxBurst is how many works of a fast handler a worker takes at once, and
	// burstTurn when it leaves what it has not started to others.
	maxBurst  = 32
	burstTurn = int64(200 * time.Microsecond)
	// watchEvery is how often the pool looks after bursts that one work holds up, and
	// after requests that wait for handlers which may wait for their answers.
	watchEvery = int64(5 * time.Millisecond)
	// keptShare is the part of the workers that is kept for lanes without one, at most.
	keptShare = 8
)

// pool runs the works of all lanes on a fixed number of workers.
//
// Its mutex also guards the lanes, and what their owners keep about pulls and leases:
// a message then costs one lock when it arrives and at most one when a worker goes
// from it to the next.
//
// Lanes with work take turns, and some workers are kept for lanes that hold none: no
// lane takes the last ones while the broker has others, and lanes of messages do not
// take those of requests. A lane of requests that holds no worker gets one beyond the
// pool's size when all are taken, since they may be waiting for its answers.
type pool struct {
	size  int
	gone  chan struct{}  // closed when the pool is closed and its last worker has ended
	alarm func(at int64) // has watch called at this time; set before start
	full  func()         // is told that all workers are busy, once until one is free; set before start
	clock func() int64

	mu       sync.Mutex
	wake     *sync.Cond
	lanes    int                  // open lanes
	replies  int                  // of these, for requests
	empty    int                  // of these, without a worker
	ready    fifo[*lane]          // lanes with work that may run more of it
	hungry   fifo[*lane]          // lanes without work that would ask for some if they got a worker
	active   int                  // lanes with work, waiting or running
	busy     int                  // workers that hold work
	serving  int                  // of these, for requests
	waiting  int                  // works that no worker has taken, over all lanes
	taken    int                  // works that workers have taken and not booked
	held     int                  // works that are handled and not settled yet
	idle     int                  // parked workers
	waking   bool                 // a worker was signalled and did not look yet
	alive    int                  // workers that did not end
	watching bool                 // watch is to be called
	workers  map[*worker]struct{} // that hold work
	bursts   map[*worker]int32    // of these, with several, and how many were started when last looked
	closed   bool
	quiet    chan struct{} // when not nil, closed once nothing is in hand
}

// lane is what takes turns in the pool: the queue of one route or replay. Guarded by
// the pool's mutex.
type lane struct {
	owner    job
	limit    int           // works of this lane that run at once
	requests bool          // it is a lane of requests
	burst    int           // works that a worker takes at once, 0 for 1
	name     string        // of the code that the lane runs, for who looks after what hangs
	timeout  time.Duration // of a work, 0 for none
	peer     *lane         // another one of the same route, with which it shares limit and turns; or nil

	open    bool
	first   fifo[*work] // runs before queue
	queue   fifo[*work]
	taken   int  // works that a worker has taken and not booked
	running int  // workers that hold work of this lane
	listed  bool // in pool.ready
	counted bool // in pool.active
	starved bool // in pool.hungry
}

// waiting is how many works no worker has taken, and inHand how many there are.
func (l *lane) waiting() int { return l.first.len() + l.queue.len() }
func (l *lane) inHand() int  { return l.waiting() + l.taken }

// holds is how many workers hold works of the lane's route, and free how many more may.
func (l *lane) holds() int {
	if l.peer != nil {
		return l.running + l.peer.running
	}
	return l.running
}

func (l *lane) free() int { return l.limit - l.holds() }

func (l *lane) pop() *work {
	if l.first.len() > 0 {
		return l.first.pop()
	}
	return l.queue.pop()
}

// job is the owner of a lane.
type job interface {
	// run handles and settles w on a worker, from w.began on.
	run(w *work)
	// conclude settles w by the result of its handler, as a part of run.
	conclude(w *work, err error)
	// finish books what is done, with the pool locked, and says what to pull next.
	finish(done []*work) pullRequest
	// feed is called with the pool locked when a hungry lane may get a worker.
	feed()
	// send sends a pull request, with the pool unlocked.
	send(r pullRequest)
}

// worker is a goroutine of the pool with the burst of works that it is at.
type worker struct {
	lane  *lane
	next  atomic.Int32 // index of the next work to start; whoever moves it owns what it passes
	burst [maxBurst]*work
	turns uint64 // bursts so far; guarded by the pool's mutex

	// Guarded by the pool's mutex.
	count  int // works in burst that are its own
	booked int // of these, those that somebody else has finished
}

func newPool(size int) *pool {
	p := &pool{
		size: size, gone: make(chan struct{}), bursts: map[*worker]int32{}, workers: map[*worker]struct{}{},
		alarm: func(int64) {}, full: func() {}, clock: processTime,
	}
	p.wake = sync.NewCond(&p.mu)
	return p
}

// start starts the workers; close ends them.
func (p *pool) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.alive = p.size
	for range p.size {
		go p.work(nil)
	}
}

// close ends every worker that is idle or becomes so. What is queued is dropped.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.wake.Broadcast()
	p.mu.Unlock()
}

// enter makes l one of the lanes that workers are kept for. The pool is locked.
func (p *pool) enter(l *lane) {
	if l.open {
		return
	}
	l.open = true
	p.tally(l, 1)
}

// leave takes l out again. The pool is locked.
func (p *pool) leave(l *lane) {
	if !l.open {
		return
	}
	l.open = false
	p.tally(l, -1)
}

func (p *pool) tally(l *lane, n int) {
	p.lanes += n
	if l.requests {
		p.replies += n
	}
	if l.running == 0 {
		p.empty += n
	}
}

// work is a worker: one of the pool's size or, with only set, one beyond it that runs
// one burst of that lane, which it holds already.
func (p *pool) work(only *worker) {
	w := only
	if w == nil {
		w = &worker{}
	}
	done, left := 0, true
	defer func() {
		if !left {
			return
		}
		// The handler left by runtime.Goexit. Its work was settled on the way out;
		// another worker takes this one's place.
		p.mu.Lock()
		l := w.lane
		next := p.finish(w, done+1)
		if only == nil {
			go p.work(nil)
		} else {
			p.end()
		}
		p.mu.Unlock()
		l.owner.send(next)
	}()
	p.mu.Lock()
	for {
		if w.lane == nil && !p.take(w) {
			break
		}
		l, count := w.lane, w.count
		p.mu.Unlock()
		done = 0
		began := p.clock()
		for now := began; ; {
			i := int(w.next.Add(1)) - 1
			if i >= count {
				break
			}
			d := w.burst[i]
			if now == 0 {
				now = p.clock()
			}
			d.began, d.ended, d.swift = now, now, false
			l.owner.run(d)
			if now = d.ended; !d.swift {
				now = 0
			}
			if done++; done == count || d.ended-began > burstTurn {
				break
			}
		}
		p.mu.Lock()
		next := p.finish(w, done)
		if next.batch > 0 {
			p.mu.Unlock()
			l.owner.send(next)
			p.mu.Lock()
		}
		if only != nil {
			break
		}
	}
	left = false
	p.end()
	p.mu.Unlock()
}

// end counts a worker out. The pool is locked.
func (p *pool) end() {
	if p.alive--; p.alive == 0 && p.closed {
		close(p.gone)
	}
}

// put queues d. The pool is locked.
func (p *pool) put(l *lane, d *work) { p.queue(l, &l.queue, d) }

// queue puts d into one of l's queues. The pool is locked.
func (p *pool) queue(l *lane, q *fifo[*work], d *work) {
	if !l.counted {
		l.counted = true
		p.active++
	}
	q.push(d)
	p.waiting++
	p.list(l)
	p.signal()
	if l.requests && l.running == 0 && p.busy >= p.size {
		p.watchIn(watchEvery)
	}
}

// drop takes all works that no worker has taken out of the queue for which pick
// reports true, and returns them. The pool is locked.
func (p *pool) drop(l *lane, q *fifo[*work], pick func(*work) bool) (dropped []*work) {
	for range q.len() {
		if d := q.pop(); pick(d) {
			dropped = append(dropped, d)
			p.waiting--
		} else {
			q.push(d)
		}
	}
	p.settle(l)
	return dropped
}

// settle counts l out when its last work is gone. The pool is locked.
func (p *pool) settle(l *lane) {
	if l.counted && l.inHand() == 0 {
		l.counted = false
		p.active--
		p.checkQuiet()
	}
}

// list makes l take turns when it has work it may run. The pool is locked.
func (p *pool) list(l *lane) {
	if !l.listed && l.waiting() > 0 && l.free() > 0 {
		l.listed = true
		p.ready.push(l)
	}
}

// signal wakes one worker for work that is ready. Only one at a time is on its way: it
// wakes the next when it leaves work behind, so that a burst of short works is done by
// few workers and one of long works soon by all.
func (p *pool) signal() {
	if p.idle > 0 && !p.waking && p.ready.len() > 0 {
		p.waking = true
		p.wake.Signal()
	}
}

// take gives w the next works, or none when the pool is closed. The pool is locked,
// and unlocked while it waits.
func (p *pool) take(w *worker) bool {
	for !p.closed {
		if l := p.turn(); l != nil {
			p.assign(w, l)
			p.signal()
			return true
		}
		p.feed()
		p.idle++
		p.wake.Wait()
		p.idle--
		p.waking = false
	}
	return false
}

// assign gives w a burst of l, which is not listed. The pool is locked.
func (p *pool) assign(w *worker, l *lane) {
	n := min(max(l.burst, 1), l.waiting(), maxBurst)
	for i := range n {
		w.burst[i] = l.pop()
	}
	w.lane, w.count, w.booked = l, n, 0
	w.turns++
	w.next.Store(0)
	if l.running == 0 && l.open {
		p.empty--
	}
	l.running++
	l.taken += n
	p.taken += n
	l.listed = false
	if p.busy++; p.busy == p.size {
		p.full()
	}
	if l.requests {
		p.serving++
	}
	p.waiting -= n
	p.workers[w] = struct{}{}
	if n > 1 {
		p.bursts[w] = 0
		p.watchIn(watchEvery)
	}
	p.list(l)
}

// turn takes the lane whose turn it is out of ready: of those that may have one more
// worker the first that holds less than its share, or the first.
func (p *pool) turn() *lane {
	var next *lane
	share := p.share()
	for range p.ready.len() {
		l := p.ready.pop()
		switch {
		case !p.mayRun(l):
		case l.holds() < share:
			if next != nil {
				p.ready.push(next)
			}
			return l
		case next == nil:
			next = l
			continue
		}
		p.ready.push(l)
	}
	return next
}

// mayRun reports whether l may have one more of the free workers.
func (p *pool) mayRun(l *lane) bool { return l.free() > 0 && p.room(l) > 0 }

// room is how many of the free workers l may have. The pool is locked.
func (p *pool) room(l *lane) int {
	free := p.size - p.busy
	if !l.requests {
		// The last workers are for requests.
		free = min(free, p.size-min(p.replies, p.kept(), p.size-1)-(p.busy-p.serving))
	}
	if l.running == 0 {
		return min(free, max(free-p.keptFor(l), 1))
	}
	return free - p.keptFor(l)
}

// roomToPull is how many of the free workers are left for messages of l that are not
// here yet: those that no other lane's waiting works may take. The pool is locked.
func (p *pool) roomToPull(l *lane) int {
	room := p.room(l)
	for i := 0; room > 0 && i < p.ready.len(); i++ {
		if other := p.ready.at(i); other != l {
			room -= min(other.waiting(), other.free(), max(p.room(other), 0))
		}
	}
	return room
}

// kept is how many workers are kept for lanes without one at most, and keptFor for
// those other than l.
func (p *pool) kept() int { return max(p.size/keptShare, 1) }

func (p *pool) keptFor(l *lane) int {
	others := p.empty
	if l.running == 0 && l.open {
		others--
	}
	n := min(others, p.kept())
	if l.running >= p.share() {
		n += p.hungry.len()
		if l.starved {
			n--
		}
	}
	return n
}

// share is what each lane with work, or hungry for some, gets of the workers. The pool
// is locked.
func (p *pool) share() int {
	lanes := p.active + p.hungry.len()
	if lanes <= 1 {
		return p.size
	}
	return (p.size + lanes - 1) / lanes
}

// hunger has l fed when a worker is free. The pool is locked.
func (p *pool) hunger(l *lane) {
	if !l.starved {
		l.starved = true
		p.hungry.push(l)
	}
}

// feed lets hungry lanes ask for what free workers can take. The pool is locked.
func (p *pool) feed() {
	for free := p.size - p.busy; free > 0 && p.hungry.len() > 0; free-- {
		l := p.hungry.pop()
		l.starved = false
		l.owner.feed()
		p.watchIn(watchEvery) // for those that have left the worker to it
	}
}

// finish books the first done works of w's burst, those that nobody else has booked,
// and gives the rest back to its lane. The pool is locked.
func (p *pool) finish(w *worker, done int) pullRequest {
	l := w.lane
	p.reclaim(w)
	next := p.book(w, done)
	clear(w.burst[:])
	delete(p.bursts, w)
	delete(p.workers, w)
	w.lane = nil
	l.running--
	p.busy--
	if l.requests {
		p.serving--
	}
	if l.running == 0 && l.open {
		p.empty++
	}
	p.settle(l)
	p.list(l)
	if l.peer != nil {
		p.list(l.peer)
	}
	if p.hungry.len() > 0 && p.ready.len() == 0 {
		p.feed()
	}
	return next
}

// book finishes the works of w's burst up to done.
func (p *pool) book(w *worker, done int) pullRequest {
	if done <= w.booked {
		return pullRequest{}
	}
	works := w.burst[w.booked:done]
	w.booked = done
	w.lane.taken -= len(works)
	p.taken -= len(works)
	return w.lane.owner.finish(works)
}

// reclaim gives what w has not started back to its lane. The pool is locked.
func (p *pool) reclaim(w *worker) (started int) {
	started = min(int(w.next.Swap(maxBurst)), w.count)
	for i := w.count - 1; i >= started; i-- {
		w.lane.queue.pushFront(w.burst[i])
		w.burst[i] = nil
		w.lane.taken--
		p.taken--
		p.waiting++
	}
	w.count = started
	return started
}

// recall has every worker of l keep the work that it is at and no other: what it has
// done is finished, what it has not started goes back to the queue. It returns those
// works. The pool is locked.
func (p *pool) recall(l *lane) (started []*work) {
	for w := range p.workers {
		if w.lane != l {
			continue
		}
		if n := p.reclaim(w); n > 0 {
			started = append(started, w.burst[n-1])
			p.book(w, n-1)
		}
		delete(p.bursts, w)
	}
	p.list(l)
	return started
}

// watchIn has watch called after d. The pool is locked.
func (p *pool) watchIn(d int64) {
	if !p.watching {
		p.watching = true
		p.alarm(p.clock() + d)
	}
}

// watch gives what waits behind a work that takes long to other workers, and requests
// that hold no worker one of their own. The pool is not locked.
func (p *pool) watch() {
	p.mu.Lock()
	p.watching = false
	type sending struct {
		l *lane
		r pullRequest
	}
	var send []sending
	for w, before := range p.bursts {
		started := w.next.Load()
		if started != before || started == 0 {
			p.bursts[w] = started
			continue
		}
		l := w.lane
		n := p.reclaim(w)
		delete(p.bursts, w)
		if next := p.book(w, n-1); next.batch > 0 {
			send = append(send, sending{l, next})
		}
		p.list(l)
	}
	for range p.ready.len() {
		l := p.ready.pop()
		if l.requests && l.running == 0 && p.busy >= p.size {
			w := &worker{}
			p.alive++
			p.assign(w, l)
			go p.work(w)
			continue
		}
		p.ready.push(l)
	}
	if len(p.bursts) > 0 {
		p.watchIn(watchEvery)
	}
	p.signal()
	p.mu.Unlock()
	for _, s := range send {
		s.l.owner.send(s.r)
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
	return p.waiting + p.taken + p.held
}

// running counts the workers that hold work.
func (p *pool) running() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.busy
}

// stuck names the code that workers have not returned from.
func (p *pool) stuck() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	count := map[string]int{}
	for w := range p.workers {
		count[w.lane.name]++
	}
	return counted(count)
}
