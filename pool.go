package natsx

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxBurst is the most works of a fast handler that a worker takes at once. After
	// burstTurn it leaves those that it has not started to others.
	maxBurst  = 32
	burstTurn = int64(200 * time.Microsecond)
	// watchEvery is how often the pool checks for bursts that a slow work delays, and for
	// requests that wait while all workers are busy.
	watchEvery = int64(5 * time.Millisecond)
	// reserveShare bounds the workers reserved for lanes without one: 1/reserveShare of all.
	reserveShare = 8
)

// pool runs the works of all lanes on a fixed number of workers.
//
// Its mutex also guards the lanes and their owners' state of pulls and leases. So a
// message costs one lock when it arrives, and at most one when a worker takes the next.
//
// Lanes with work take turns, and some workers are reserved for lanes that hold none: no
// lane takes the last ones while the broker has other lanes, and lanes of messages do not
// take those reserved for requests. If all workers are busy, a lane of requests without a
// worker gets an extra one, since the busy ones may be waiting for its answers.
type pool struct {
	size  int
	gone  chan struct{}  // closed when the pool is closed and its last worker has ended
	alarm func(at int64) // schedules watch; set before start
	full  func()         // called when the last free worker is taken; set before start
	clock func() int64

	mu       sync.Mutex
	wake     *sync.Cond
	lanes    int                  // open lanes
	replies  int                  // of these, for requests
	empty    int                  // of these, without a worker
	ready    fifo[*lane]          // lanes with waiting work, below their limit
	wanting  fifo[*lane]          // lanes without waiting work that would pull if they got a worker
	active   int                  // lanes with work, waiting or running
	busy     int                  // workers that hold work
	serving  int                  // of these, for requests
	waiting  int                  // works that no worker has taken, over all lanes
	taken    int                  // works that workers have taken and not booked
	held     int                  // works that are handled and not settled yet
	idle     int                  // parked workers
	waking   bool                 // a worker was signalled and has not woken up yet
	alive    int                  // workers that have not ended
	watching bool                 // watch is scheduled
	workers  map[*worker]struct{} // all
	bursts   map[*worker]int32    // those with several works, and how many were started at the last watch
	closed   bool
	allDone  chan struct{} // of drained, closed once nothing is in hand; or nil
}

// lane is the queue of one route or replay in the pool. Guarded by the pool's mutex.
type lane struct {
	owner    job
	limit    int            // works of this lane that run at once
	requests bool           // it is a lane of requests
	burst    int            // works that a worker takes at once, 0 for 1
	rate     *bucket        // of its starts, nil for no limit
	later    func(at int64) // schedules resume
	name     string         // of the handler, to report one that does not return
	timeout  time.Duration  // of a work, 0 for none
	peer     *lane          // another one of the same route, with which it shares its limit; nil for none

	open    bool
	first   fifo[*work] // runs before queue
	queue   fifo[*work]
	taken   int  // works that a worker has taken and not booked
	running int  // workers that hold work of this lane
	listed  bool // in pool.ready
	counted bool // in pool.active
	wanting bool // in pool.wanting
}

// waiting is how many works no worker has taken, and inHand how many there are in all.
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
	// run handles and settles w on a worker.
	run(w *work)
	// conclude settles w by the result of its handler, as a part of run.
	conclude(w *work, err error)
	// bookAll books finished works, with the pool locked, and returns the next pull.
	bookAll(done []*work) pullRequest
	// workerFree is called with the pool locked when a wanting lane may get a worker.
	workerFree()
	// send sends a pull request, with the pool unlocked.
	send(r pullRequest)
}

// worker is a goroutine of the pool with its burst of works.
type worker struct {
	lane  *lane
	next  atomic.Int32 // index of the next work to start; whoever advances it owns the works passed
	burst [maxBurst]*work
	turns uint64       // bursts so far; guarded by the pool's mutex
	since atomic.Int64 // when the burst was begun, which what runs of it was soon after; 0 until it is

	// Guarded by the pool's mutex.
	size   int // of the burst when it was taken
	count  int // works in burst that still belong to it
	booked int // those of them that are booked already
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

// close ends every worker as soon as it is idle. Queued works are dropped.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.wake.Broadcast()
	p.mu.Unlock()
}

// enter adds l to the lanes that workers are reserved for. The pool is locked.
func (p *pool) enter(l *lane) {
	if l.open {
		return
	}
	l.open = true
	p.countLane(l, 1)
}

// leave undoes enter. The pool is locked.
func (p *pool) leave(l *lane) {
	if !l.open {
		return
	}
	l.open = false
	p.countLane(l, -1)
}

func (p *pool) countLane(l *lane, n int) {
	p.lanes += n
	if l.requests {
		p.replies += n
	}
	if l.running == 0 {
		p.empty += n
	}
}

// work is the loop of a worker. With only set it is an extra worker, which runs the burst
// that it holds already and ends.
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
		// The handler called runtime.Goexit. attempt has settled its work; another worker
		// replaces this one.
		p.mu.Lock()
		l := w.lane
		next := p.releaseWorker(w, done+1)
		delete(p.workers, w)
		if only == nil {
			go p.work(nil)
		} else {
			p.workerEnded()
		}
		p.mu.Unlock()
		l.owner.send(next)
	}()
	p.mu.Lock()
	p.workers[w] = struct{}{}
	for {
		if w.lane == nil && !p.take(w) {
			break
		}
		l, count := w.lane, w.count
		p.mu.Unlock()
		done = 0
		began := p.clock()
		w.since.Store(began)
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
		next := p.releaseWorker(w, done)
		if next.batch > 0 {
			p.mu.Unlock()
			l.owner.send(next)
			p.mu.Lock()
		}
		if only != nil {
			p.signal() // a worker may wait for the place that this one took
			break
		}
	}
	left = false
	delete(p.workers, w)
	p.workerEnded()
	p.mu.Unlock()
}

// workerEnded counts a worker that ends. The pool is locked.
func (p *pool) workerEnded() {
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
	p.enlist(l)
	p.signal()
}

// drop removes the works from the queue for which pick reports true, and returns them.
// The pool is locked.
func (p *pool) drop(l *lane, q *fifo[*work], pick func(*work) bool) (dropped []*work) {
	for range q.len() {
		if d := q.pop(); pick(d) {
			dropped = append(dropped, d)
			p.waiting--
		} else {
			q.push(d)
		}
	}
	p.updateActive(l)
	return dropped
}

// updateActive no longer counts l as active once it has no work. The pool is locked.
func (p *pool) updateActive(l *lane) {
	if l.counted && l.inHand() == 0 {
		l.counted = false
		p.active--
		p.checkDrained()
	}
}

// enlist adds l to ready if it has work that it may run. The pool is locked.
func (p *pool) enlist(l *lane) {
	if l.listed || l.waiting() == 0 || l.free() <= 0 {
		return
	}
	if l.rate != nil {
		if at := l.rate.next(p.clock()); at != 0 {
			l.later(at)
			return
		}
	}
	l.listed = true
	p.ready.push(l)
	if p.busy >= p.size && l.unserved() {
		p.watchIn(watchEvery)
	}
}

// unserved reports whether l is a lane of requests for which no worker is at work. When all
// workers are busy, with messages that may wait for its answers, watch gives it one.
func (l *lane) unserved() bool { return l.requests && l.running == 0 }

// resume continues a lane that has waited for its rate. The pool is not locked.
func (p *pool) resume(l *lane) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enlist(l)
	p.signal()
}

// signal wakes one worker for work that is ready. Only one at a time is waking up: it
// wakes the next if more work is left. So few workers run a burst of short works, and
// soon all of them a burst of long ones.
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
		p.offerWorkers()
		p.idle++
		p.wake.Wait()
		p.idle--
		p.waking = false
	}
	return false
}

// assign gives w a burst of l, which is not in ready. The pool is locked.
func (p *pool) assign(w *worker, l *lane) {
	n := min(max(l.burst, 1), l.waiting(), maxBurst)
	if l.rate != nil {
		n = 1
		l.rate.take(p.clock())
	}
	for i := range n {
		w.burst[i] = l.pop()
	}
	w.lane, w.size, w.count, w.booked = l, n, n, 0
	w.turns++
	w.next.Store(0)
	w.since.Store(0)
	if l.running == 0 && l.open {
		p.empty--
	}
	l.running++
	l.taken += n
	p.taken += n
	l.listed = false
	if p.busy++; p.busy == p.size {
		p.full()
		for i := range p.ready.len() {
			if p.ready.at(i).unserved() {
				p.watchIn(watchEvery)
			}
		}
	}
	if l.requests {
		p.serving++
	}
	p.waiting -= n
	if n > 1 {
		p.bursts[w] = 0
		p.watchIn(watchEvery)
	}
	p.enlist(l)
}

// turn removes and returns the lane whose turn it is: of the ready lanes that may have one
// more worker, the first one below its share, or else the first one. The pool is locked.
func (p *pool) turn() *lane {
	var next *lane
	share := p.share()
	for range p.ready.len() {
		l := p.ready.pop()
		if l.rate != nil { // which two lanes may share
			if at := l.rate.next(p.clock()); at != 0 {
				l.listed = false
				l.later(at)
				continue
			}
		}
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
		free = min(free, p.size-min(p.replies, p.reserve(), p.size-1)-(p.busy-p.serving))
	}
	if l.running == 0 {
		return min(free, max(free-p.reservedFor(l), 1))
	}
	return free - p.reservedFor(l)
}

// roomToPull is how many of the free workers are left for messages that l may pull, after
// the waiting works of other lanes. The pool is locked.
func (p *pool) roomToPull(l *lane) int {
	room := p.room(l)
	for i := 0; room > 0 && i < p.ready.len(); i++ {
		if other := p.ready.at(i); other != l {
			room -= min(other.waiting(), other.free(), max(p.room(other), 0))
		}
	}
	return room
}

// reserve is the most workers that are reserved for lanes without one, and reservedFor
// how many are reserved for lanes other than l.
func (p *pool) reserve() int { return max(p.size/reserveShare, 1) }

func (p *pool) reservedFor(l *lane) int {
	others := p.empty
	if l.running == 0 && l.open {
		others--
	}
	n := min(others, p.reserve())
	if l.running >= p.share() {
		n += p.wanting.len()
		if l.wanting {
			n--
		}
	}
	return n
}

// share is the number of workers for each lane that has or wants work. The pool is
// locked.
func (p *pool) share() int {
	lanes := p.active + p.wanting.len()
	if lanes <= 1 {
		return p.size
	}
	return (p.size + lanes - 1) / lanes
}

// waitForWorker adds l to the wanting lanes. The pool is locked.
func (p *pool) waitForWorker(l *lane) {
	if !l.wanting {
		l.wanting = true
		p.wanting.push(l)
	}
}

// offerWorkers lets wanting lanes pull for free workers. The pool is locked.
func (p *pool) offerWorkers() {
	free := p.size - p.busy
	for i := p.wanting.len(); i > 0 && free > 0; i-- {
		l := p.wanting.pop()
		if l.free() <= 0 {
			p.wanting.push(l) // its peer has all workers of their route
			continue
		}
		free--
		l.wanting = false
		l.owner.workerFree()
		p.watchIn(watchEvery) // in case l pulls nothing
	}
}

// releaseWorker books the first done works of w's burst, returns the others to its lane,
// and frees w. The pool is locked.
func (p *pool) releaseWorker(w *worker, done int) pullRequest {
	l := w.lane
	p.reclaim(w)
	next := p.book(w, done)
	if clear(w.burst[:w.count]); w.size > 1 {
		delete(p.bursts, w)
	}
	w.lane = nil
	l.running--
	p.busy--
	if l.requests {
		p.serving--
	}
	if l.running == 0 && l.open {
		p.empty++
	}
	p.updateActive(l)
	p.enlist(l)
	if l.peer != nil {
		p.enlist(l.peer)
	}
	if p.wanting.len() > 0 && p.ready.len() == 0 {
		p.offerWorkers()
	}
	return next
}

// book books the works of w's burst up to done that are not booked yet. The pool is
// locked.
func (p *pool) book(w *worker, done int) pullRequest {
	if done <= w.booked {
		return pullRequest{}
	}
	works := w.burst[w.booked:done]
	w.booked = done
	w.lane.taken -= len(works)
	p.taken -= len(works)
	return w.lane.owner.bookAll(works)
}

// reclaim returns the works that w has not started to its lane. The pool is locked.
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

// recall leaves every worker of l only the work that it runs: finished works are booked,
// those not started go back to the queue. It returns the running works. The pool is
// locked.
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
	p.enlist(l)
	return started
}

// watchIn schedules watch after d. The pool is locked.
func (p *pool) watchIn(d int64) {
	if !p.watching {
		p.watching = true
		p.alarm(p.clock() + d)
	}
}

// watch gives works that wait behind a slow one to other workers, and starts an extra
// worker for requests that hold none. The pool is not locked.
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
		p.enlist(l)
	}
	for range p.ready.len() {
		l := p.ready.pop()
		if l.unserved() && p.busy >= p.size {
			w := &worker{}
			p.alive++
			p.workers[w] = struct{}{}
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

// checkDrained closes the channel of drained when nothing is in hand. The pool is locked.
func (p *pool) checkDrained() {
	if p.allDone != nil && p.busy == 0 && p.waiting == 0 && p.held == 0 {
		close(p.allDone)
		p.allDone = nil
	}
}

// drained returns a channel that is closed once nothing waits, runs or is held.
func (p *pool) drained() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	ch := make(chan struct{})
	p.allDone = ch
	p.checkDrained()
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

// oldest is how long the oldest running work of l has been running. The pool is locked.
func (p *pool) oldest(l *lane) time.Duration {
	first := int64(math.MaxInt64)
	for w := range p.workers {
		if since := w.since.Load(); w.lane == l && since > 0 {
			first = min(first, since)
		}
	}
	return time.Duration(max(p.clock()-first, 0))
}

// stuck names the handlers that have not returned.
func (p *pool) stuck() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	count := map[string]int{}
	for w := range p.workers {
		if w.lane != nil {
			count[w.lane.name]++
		}
	}
	return counted(count)
}
