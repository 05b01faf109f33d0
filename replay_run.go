package natsx

import (
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// ReplayInactive is how long the server keeps the consumer of a replay whose
	// process is gone.
	ReplayInactive = time.Minute
	// replayBurst is how many messages are taken in at a time.
	replayBurst = 64
	// replayRun is how many messages a worker gets at once, and replayTurn when it
	// leaves what it did not start yet to the next turn.
	replayRun  = 32
	replayTurn = 200 * time.Microsecond
	// replayWindow is how many messages may be here or on their way.
	replayWindow = 2048
	// replayBytes is how much of a replay may be here before it asks for more, and
	// how much it asks for at once.
	replayBytes = 16 << 20
	// replayAhead is how far other messages may get ahead of the slowest handler.
	replayAhead = 1 << 16
	// replayBeat is how often the server tells that a pull has nothing to bring.
	replayBeat = time.Second
)

// replay is one replay under way.
//
// It reads through an ephemeral pull consumer that acknowledges nothing, in the
// manner of an ordered consumer: whatever casts doubt on it (a gap in its
// sequence, missed heartbeats, a reconnect, its end) has it replaced by one that
// starts behind the last message received. What was received waits in up to three
// places: early until it is due, keys while another message of its key is in hand,
// backlog for one of the replay's handlers. Only what may run is in the pool.
//
// The goroutine of the caller watches over it (supervise), one of its own releases
// what is due, and one tells the progress.
type replay struct {
	route
	want    ReplaySpec
	started time.Time

	// intake ends with the caller's context, the broker or the first failure;
	// serving is what handlers run under.
	intake    context.Context
	endIntake context.CancelFunc
	serving   context.Context
	abort     context.CancelCauseFunc
	wake      chan struct{} // tells supervise to look; capacity 1
	first     chan struct{} // tells the pacing that early is not empty any more; capacity 1

	// Fixed once located.
	stream    string
	created   time.Time
	from      *origin // of its messages
	replicas  int
	schedules bool          // some of the messages may be schedules
	inactive  time.Duration // threshold of the consumers
	end       uint64        // last sequence of the replay
	endTime   int64         // Unix nanoseconds of the last message, 0 when unknown
	total     uint64        // as counted at the start
	inbox     string

	arrivals []arrival      // of receiveAll, kept for the next burst
	place    placeParser    // of receiveAll
	msgs     chan *nats.Msg // what comes in; never closed, has room for all that may be on its way
	closing  chan struct{}  // closed to end receiveAll
	joined   chan struct{}  // closed when it has ended; nil before it begins

	// Of the caller's goroutine.
	inlet *nats.Subscription
	owned []string // consumers that may exist

	cut     atomic.Uint64 // nothing above this sequence is started
	through atomic.Uint64 // the last sequence that a worker is done with

	// Guarded by the pool's mutex.
	consumer    string // empty while there is none to trust
	seqHere     uint64 // consumer sequence of the last message
	received    uint64 // stream sequence of the last message
	taken       int    // messages received
	pulling     bool
	pulls       []pull
	outstanding int
	tokens      uint64
	heard       int64 // engine time of the last word from the server
	limits      pullLimits
	doubt       bool // the consumer is to be replaced
	verify      bool // there may be nothing more
	complete    bool // everything was received
	stopping    bool
	cause       error // of stopping, nil for a failure alone
	failure     *ReplayFailure
	located     bool // received is where the replay is
	begun       bool // a message at or after FromTime has come

	pace    tempo
	asking  int64 // engine time since which the stream owes a message
	heldOff bool  // nothing is asked for, since enough is here
	early   fifo[*delivery]
	keys    *keyedQueue // nil without an order
	backlog fifo[*delivery]
	fed     uint64    // highest sequence given to the pool
	atWork  *delivery // first of the run of messages given to the pool
	// Handlers are left running: what they do is not in the report any more.
	abandoned bool
	hand      ledger
	bytes     int   // of what is in hand
	current   int64 // stream time of the last message handled
	report    ReplayReport
}

func newReplay(ctx context.Context, e *engine, want ReplaySpec) *replay {
	r := &replay{
		want: want, started: time.Now(),
		wake: make(chan struct{}, 1), first: make(chan struct{}, 1), closing: make(chan struct{}),
		arrivals: make([]arrival, 0, replayBurst),
	}
	r.init(e, Spec{route: RouteBuilder{filter: want.replay.filter}, handler: want.handler}, r)
	r.limit = want.replay.concurrency(e.workers)
	r.intake, r.endIntake = context.WithCancel(ctx)
	r.serving, r.abort = context.WithCancelCause(context.WithoutCancel(ctx))
	r.cut.Store(math.MaxUint64)
	r.pace.speed = want.replay.speed
	if want.replay.set&replayOrderedBy != 0 {
		r.keys = newKeyedQueue(want.replay.order)
	}
	if at := want.replay.start(); at.seq > 0 {
		r.received, r.located = at.seq-1, true
	}
	return r
}

// carryOut does the replay.
func (r *replay) carryOut(ctx context.Context) (ReplayReport, error) {
	defer r.endIntake()
	defer r.abort(context.Canceled)
	if r.handler == nil {
		return ReplayReport{}, r.want.fault("middleware", "", "returned no handler", ErrNoHandler)
	}
	unlink := context.AfterFunc(r.eng.intake, func() {
		if ctx.Err() == nil {
			r.halt(ErrBrokerStopped)
		}
	})
	defer unlink()
	unserve := context.AfterFunc(r.eng.handlers, func() { r.abort(context.Cause(r.eng.handlers)) })
	defer unserve()
	watch := watchAsync(r.eng.nc, r.onAsyncError)
	defer watch.stop()
	status := r.eng.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer r.eng.nc.RemoveStatusListener(status)

	var helpers sync.WaitGroup
	if r.pace.speed > 0 {
		helpers.Go(r.releaseDue)
	}
	if r.want.progress != nil {
		helpers.Go(r.tellProgress)
	}
	if err := r.open(); err != nil {
		r.halt(err)
	}
	cut := r.supervise(ctx, status)
	r.endIntake()
	helpers.Wait()
	r.close()
	if r.want.progress != nil {
		r.want.progress(r.progress())
	}
	return r.result(cut)
}

// result is the report and the error of a replay that is over.
func (r *replay) result(cut error) (ReplayReport, error) {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	rep := r.report
	rep.Stream, rep.Started, rep.Took = r.stream, r.started, time.Since(r.started)
	if lowest, any := r.hand.lowest(); any {
		rep.Next = lowest
	} else if r.located && r.stream != "" {
		rep.Next = r.received + 1
		if r.complete && !r.limited() {
			rep.Next = max(r.received, r.end) + 1
		}
	}
	errs := []error{r.cause}
	if r.failure != nil {
		errs = append(errs, r.failure)
	}
	errs = append(errs, cut)
	return rep, joined(errs)
}

func (r *replay) limited() bool {
	return r.want.replay.set&replayLimit != 0 && r.taken >= r.want.replay.limit
}

// supervise returns when all is handled, or after a stop what was started. It
// returns a DrainError when handlers had to be cut off.
func (r *replay) supervise(ctx context.Context, status <-chan nats.Status) error {
	tick := time.NewTicker(replayBeat / 5)
	defer tick.Stop()
	ended := r.intake.Done()
	var late <-chan time.Time
	var cut *DrainError
	pause, mark := time.Duration(0), uint64(0) // a consumer that brings nothing is not replaced at once
	for {
		p := r.eng.pool
		p.mu.Lock()
		over, stopping, doubt, verify, received := r.over(), r.stopping, r.doubt, r.verify, r.received
		if !stopping && r.silent() {
			doubt = true
			r.distrust()
		}
		p.mu.Unlock()
		switch {
		case over:
			if cut != nil {
				return cut
			}
			return nil
		case stopping:
			ended = nil
			if late == nil {
				late = time.After(r.eng.drainTimeout)
			}
		case doubt:
			if received > mark {
				pause, mark = 0, received
			}
			if !wait(r.intake, pause) {
				break
			}
			pause = min(2*pause+50*time.Millisecond, 2*time.Second)
			if err := r.replace(); err != nil {
				r.halt(err)
			}
			continue
		case verify:
			if err := r.verifyEnd(received); err != nil {
				r.halt(err)
			}
			continue
		}
		select {
		case <-ended:
			ended = nil
			if err := ctx.Err(); err != nil {
				r.halt(err)
			}
		case s := <-status:
			switch s {
			case nats.CLOSED:
				r.halt(r.want.fault("", "", cause(ErrConnectionClosed), ErrConnectionClosed))
			case nats.CONNECTED:
				p.mu.Lock()
				r.distrust()
				p.mu.Unlock()
			}
		case <-r.wake:
		case <-tick.C:
		case <-late:
			p.mu.Lock()
			left := r.running + r.queue.len()
			p.mu.Unlock()
			if cut == nil {
				cut = &DrainError{Timeout: r.eng.drainTimeout, Abandoned: left}
				r.cut.Store(0)
				r.abort(ErrDrainTimeout)
				late = time.After(DrainGrace)
				continue
			}
			cut.Running = left
			r.leave()
			return cut
		}
	}
}

// leave gives up on handlers that do not return. What a worker has done before it
// came upon such a one counts.
func (r *replay) leave() {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	r.abandoned = true
	through := r.through.Load()
	for d := r.atWork; d != nil && d.msg.seq <= through; d = d.next {
		r.book(d)
	}
}

// over tells whether nothing is left to do. The pool is locked.
func (r *replay) over() bool {
	if r.stopping {
		return r.running == 0 && r.queue.len() == 0 && r.backlog.len() == 0
	}
	return r.complete && r.hand.len() == 0
}

// halt stops the replay: what was given to the pool is finished, nothing more.
func (r *replay) halt(err error) {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.stopping || r.complete && r.hand.len() == 0 {
		return
	}
	r.cause = err
	r.stopAt(r.fed)
	r.feed(p.put)
}

// stopAt stops the replay behind a sequence. The pool is locked.
func (r *replay) stopAt(seq uint64) {
	r.stopping, r.pulling = true, false
	r.cut.Store(min(r.cut.Load(), seq))
	r.early = fifo[*delivery]{}
	r.endIntake()
	r.tell()
}

// tell has supervise look.
func (r *replay) tell() { notify(r.wake) }

// admit passes a message that is due towards the pool. The pool is locked.
func (r *replay) admit(d *delivery) {
	if r.keys != nil && !r.keys.admit(d) {
		return
	}
	r.backlog.push(d)
	r.feed(r.eng.pool.put)
}

// feed gives the pool what may run. The pool is locked.
//
// A replay with one handler hands over a run of messages at a time, linked by
// next: a fast handler then costs the pool little. What the worker leaves of it
// comes back with finish.
func (r *replay) feed(put func(*lane, *delivery)) {
	if !r.stopping && r.intake.Err() != nil {
		return // about to be halted, which feeds what is to be finished
	}
	for r.backlog.len() > 0 && r.running+r.queue.len() < r.limit {
		d := r.backlog.pop()
		if d.msg.seq > r.cut.Load() {
			continue
		}
		r.fed = max(r.fed, d.msg.seq)
		if r.limit == 1 && r.keys == nil {
			for last, n := d, 1; n < replayRun && r.backlog.len() > 0; n++ {
				last.next = r.backlog.pop()
				last = last.next
			}
			r.atWork = d
		}
		put(&r.lane, d)
	}
}

// run handles a message on a worker, and those linked to it for as long as that
// is no long time.
func (r *replay) run(d *delivery) {
	end := r.eng.now() + int64(replayTurn)
	for began := end - int64(replayTurn); d != nil && d.msg.seq <= r.cut.Load() && began < end; d = d.next {
		d.began = began
		r.attempt(d, r.want.replay.timeout)
		r.through.Store(d.msg.seq)
		if began = d.ended; d.outcome == Failed && !r.want.replay.continuing || r.intake.Err() != nil {
			return
		}
	}
}

// conclude takes the result of a handler.
func (r *replay) conclude(d *delivery, err error) {
	d.err, d.outcome = err, Succeeded
	if err != nil {
		d.outcome = Failed
		if _, ok := errors.AsType[*discardError](err); ok {
			d.outcome = Discarded
		}
	}
	r.observe(d)
}

// finish books what a worker is done with. The pool is locked.
func (r *replay) finish(d *delivery) pull {
	if r.abandoned {
		return pull{}
	}
	r.atWork = nil
	for d != nil && d.outcome != "" {
		next := d.next
		d.next = nil
		r.book(d)
		d = next
	}
	if d != nil && !r.stopping {
		r.returned(d)
	}
	r.feed(r.eng.pool.refill)
	if r.over() {
		r.tell()
	}
	return r.plan(r.eng.now())
}

// returned puts back what a worker left of a run of messages.
func (r *replay) returned(d *delivery) {
	var run [replayRun]*delivery
	n := 0
	for ; d != nil; n++ {
		run[n] = d
		d, d.next = d.next, nil
	}
	for n--; n >= 0; n-- {
		r.backlog.pushFront(run[n])
	}
}

// book takes a handled message into account. The pool is locked.
func (r *replay) book(d *delivery) {
	seq := d.msg.seq
	rep := &r.report
	if rep.First == 0 || seq < rep.First {
		rep.First = seq
	}
	rep.Last = max(rep.Last, seq)
	r.current = d.msg.time
	settled := true
	if d.outcome == Failed {
		rep.Failed++
		failure := &ReplayFailure{Replay: r.want.replay.filter, Stream: r.stream, Sequence: seq, Subject: d.msg.Subject, Err: d.err}
		if len(rep.Failures) < MaxReplayFailures {
			rep.Failures = append(rep.Failures, failure)
		}
		// The failure of a handler that is cut off says nothing of its message.
		settled = r.want.replay.continuing && r.serving.Err() == nil
		if !r.want.replay.continuing {
			if r.failure == nil || seq < r.failure.Sequence {
				r.failure = failure
			}
			r.stopAt(seq)
		}
	} else {
		rep.Handled++
	}
	if settled {
		r.bytes -= r.hand.settle(seq)
	}
	if r.keys != nil {
		if next := r.keys.release(d); next != nil {
			r.backlog.push(next)
		}
	}
}

// releaseDue passes on what waits for its time.
func (r *replay) releaseDue() {
	p := r.eng.pool
	for {
		p.mu.Lock()
		now, pause := r.eng.now(), time.Duration(-1)
		for r.early.len() > 0 {
			if due := r.early.peek().due; due > now {
				pause = time.Duration(due - now)
				break
			}
			r.admit(r.early.pop())
		}
		p.mu.Unlock()
		if pause < 0 {
			select {
			case <-r.first:
			case <-r.intake.Done():
				return
			}
		} else if !wait(r.intake, pause) {
			return
		}
	}
}

// tellProgress calls the progress function while the replay moves.
func (r *replay) tellProgress() {
	told := uint64(0)
	for wait(r.intake, progressEvery) {
		if now := r.progress(); now.Done != told && r.intake.Err() == nil {
			told = now.Done
			r.want.progress(now)
		}
	}
}

func (r *replay) progress() ReplayProgress {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	g := ReplayProgress{Done: r.report.Handled + r.report.Failed, Total: r.total, Elapsed: time.Since(r.started)}
	g.Total = max(g.Total, g.Done)
	if r.complete && r.hand.len() == 0 {
		g.Total = g.Done // what was deleted or passed over meanwhile is not part of it
	}
	switch left := g.Total - g.Done; {
	case left == 0 || g.Done == 0:
	case r.pace.speed > 0 && r.endTime > 0:
		g.Remaining = time.Duration(max(float64(r.endTime-r.current)/r.pace.speed, 0))
	default:
		g.Remaining = time.Duration(float64(g.Elapsed) / float64(g.Done) * float64(left))
	}
	return g
}
