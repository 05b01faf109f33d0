package natsx

import (
	"context"
	"math"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// replayInactive is how long the server keeps the consumer of a killed process.
	replayInactive = time.Minute
	// replayWindow is how many messages may be in hand or in transit.
	replayWindow = 2048
	// replayBytes is the size of messages in hand from which on no more are pulled.
	replayBytes = 16 << 20
	// replayAhead is how many messages may be handled ahead of the slowest handler.
	replayAhead = 1 << 16
	// progressPatience is how long the end of a replay waits for its progress function.
	progressPatience = time.Second
)

// replay is one running replay.
//
// Messages of its reader wait in up to three places: in early until they are due, in keys
// while another message with the same key is in hand, and in backlog for a handler. Only
// messages that may run are in the lane. With one handler they are queued in bursts, so
// that a fast handler costs the pool little.
//
// The caller's goroutine runs supervise, a second one reads, and a third one calls the
// progress function. The environment's agenda releases messages that are due.
type replay struct {
	lane
	env     *env
	want    ReplaySpec
	handler Handler // with the broker's middleware
	started time.Time

	// intake ends with the caller's context, the broker or the first failure; serving is
	// the context of handlers.
	intake    context.Context
	endIntake context.CancelFunc
	serving   context.Context
	abort     context.CancelCauseFunc
	wake      chan struct{} // wakes supervise; capacity 1
	more      chan struct{} // wakes the reader to pull; capacity 1
	observing string        // names the observer
	reader    *reader       // owned by the goroutine that reads, then by the caller's; nil for none

	cut atomic.Uint64 // nothing above this sequence is started

	// Guarded by the pool's mutex. The goroutine that reads may use fields without it that
	// are fixed once the stream was found.
	stream    string  // empty until it is found
	from      *origin // of its messages
	config    *jetstream.StreamConfig
	end       uint64 // last sequence of the replay
	endTime   int64  // Unix nanoseconds of the last message, 0 if unknown
	total     uint64 // as counted at the start
	located   bool   // received is valid
	received  uint64 // stream sequence of the last message received
	accepted  int    // messages received that are to be handled
	complete  bool   // everything was received
	stopping  bool
	cause     error // of stopping, nil for a failure alone
	failure   *ReplayFailure
	abandoned bool // handlers still run: their results are not in the report

	pace    tempo
	asking  int64 // since when a message is awaited from the stream
	heldOff bool  // nothing is pulled, since enough is in hand
	short   int   // messages to be finished before there is room to pull, 0 if there is
	early   fifo[*work]
	release alarm       // for early
	keys    *keyedQueue // nil without an order
	backlog fifo[*work]
	reached uint64 // highest sequence that was finished
	hand    ledger
	bytes   int   // of what is in hand
	current int64 // stream time of the last message handled
	report  ReplayReport
	free    []*work // for reuse
}

func newReplay(ctx context.Context, e *env, want ReplaySpec) *replay {
	r := &replay{
		env: e, want: want, handler: wrapHandler(want.handler, e.middleware), started: time.Now(),
		wake: make(chan struct{}, 1), more: make(chan struct{}, 1), observing: "observer of " + want.String()}
	r.lane = lane{owner: r, limit: want.replay.concurrency(e.workers), name: "handler of " + want.String(), timeout: want.replay.timeout}
	r.intake, r.endIntake = context.WithCancel(ctx)
	r.serving, r.abort = context.WithCancelCause(context.WithoutCancel(ctx))
	r.cut.Store(math.MaxUint64)
	r.release.ring = r.releaseDue
	r.pace.speed = want.replay.speed
	if want.replay.set&replayOrderedBy != 0 {
		r.keys = newKeyedQueue(want.replay.order)
	}
	if r.single() {
		r.lane.burst = maxBurst
	}
	if at := want.replay.start(); at.seq > 0 {
		r.received, r.located = at.seq-1, true
	}
	return r
}

// single reports whether messages are handled one after another, in stream order.
func (r *replay) single() bool { return r.limit == 1 && r.keys == nil }

// carryOut runs the replay.
func (r *replay) carryOut(ctx context.Context) (ReplayReport, error) {
	defer r.endIntake()
	defer r.abort(context.Canceled)
	if r.handler == nil {
		return ReplayReport{}, r.want.fault("middleware", "", "returned no handler", ErrNoHandler)
	}
	unlink := context.AfterFunc(r.env.intake, func() {
		if ctx.Err() == nil {
			r.halt(ErrBrokerStopped)
		}
	})
	defer unlink()
	p := r.env.pool
	p.mu.Lock()
	p.enter(&r.lane)
	p.mu.Unlock()
	read := make(chan struct{})
	go func() {
		defer close(read)
		r.read()
	}()
	told := r.reportProgress()
	cut := r.supervise(ctx)
	r.endIntake()
	<-read
	if r.reader != nil {
		r.reader.close()
	}
	p.mu.Lock()
	p.leave(&r.lane)
	p.mu.Unlock()
	if !told() && cut != nil {
		cut.Stuck = append(cut.Stuck, r.telling())
	}
	return r.result(cut)
}

// result is the report and the error of a replay that is over.
func (r *replay) result(cut *DrainError) (ReplayReport, error) {
	p := r.env.pool
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
	if cut != nil {
		errs = append(errs, cut)
	}
	return rep, joined(errs)
}

func (r *replay) limited() bool {
	return r.want.replay.set&replayLimit != 0 && r.accepted >= r.want.replay.limit
}

// supervise returns when everything was handled or, after a stop, everything that was
// started. It returns a DrainError if handlers had to be cancelled.
func (r *replay) supervise(ctx context.Context) (cut *DrainError) {
	ended := r.intake.Done()
	var late <-chan time.Time
	for {
		p := r.env.pool
		p.mu.Lock()
		over, stopping := r.over(), r.stopping
		p.mu.Unlock()
		switch {
		case over:
			return cut
		case stopping && late == nil:
			late = time.After(r.env.drainTimeout)
		}
		select {
		case <-ended:
			ended = nil
			if err := ctx.Err(); err != nil {
				r.halt(err)
			}
		case <-r.wake:
		case <-late:
			left := r.cutOff(cut != nil)
			if cut != nil {
				if cut.Running = left; left > 0 {
					cut.Stuck = counted(map[string]int{r.lane.name: left})
				}
				return cut
			}
			cut = &DrainError{Timeout: r.env.drainTimeout, Abandoned: left}
			r.abort(ErrDrainTimeout)
			late = time.After(DrainGrace)
		}
	}
}

// cutOff starts nothing more, and returns how many handlers run. With abandon it gives up
// on these: only results until then count.
func (r *replay) cutOff(abandon bool) (running int) {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.recall(&r.lane)
	running = r.lane.inHand()
	r.cut.Store(0)
	r.dropQueued()
	r.abandoned = abandon
	return running
}

// over reports whether nothing is left to do. The pool is locked.
func (r *replay) over() bool {
	if r.stopping {
		return r.lane.inHand() == 0 && r.backlog.len() == 0
	}
	return r.complete && r.hand.len() == 0
}

// halt stops the replay: messages that were started, and those before them, are finished.
func (r *replay) halt(err error) {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.stopping || r.complete && r.hand.len() == 0 {
		return
	}
	started := uint64(0)
	for _, w := range p.recall(&r.lane) {
		started = max(started, w.id.seq)
	}
	r.cause = err
	r.stopAt(max(started, r.reached))
}

// stopAt stops the replay after a sequence. The pool is locked.
func (r *replay) stopAt(seq uint64) {
	r.stopping = true
	r.lowerCut(seq)
	r.early = fifo[*work]{}
	r.env.agenda.set(&r.release, 1) // it may be set for a much later time
	r.endIntake()
	r.dropQueued()
	r.supply()
	notify(r.wake)
}

// lowerCut starts nothing above a sequence.
func (r *replay) lowerCut(seq uint64) {
	for old := r.cut.Load(); seq < old && !r.cut.CompareAndSwap(old, seq); old = r.cut.Load() {
	}
}

// dropQueued removes messages from the lane that are not to be started. The pool is
// locked.
func (r *replay) dropQueued() {
	r.env.pool.drop(&r.lane, &r.lane.queue, func(w *work) bool { return w.id.seq > r.cut.Load() })
}

// admit queues a message that is due. The pool is locked.
func (r *replay) admit(w *work) {
	if r.keys == nil || r.keys.admit(w) {
		r.backlog.push(w)
	}
}

// supply moves messages that may run to the lane. The pool is locked.
func (r *replay) supply() {
	if !r.stopping && r.intake.Err() != nil {
		return // halt follows, and supplies what is to be finished
	}
	room := max(r.limit-r.lane.running, 1)
	if r.single() {
		room = maxBurst
	}
	for room -= r.lane.waiting(); r.backlog.len() > 0 && room > 0; {
		if w := r.backlog.pop(); w.id.seq <= r.cut.Load() {
			r.env.pool.put(&r.lane, w)
			room--
		}
	}
}

// run handles a message on a worker.
func (r *replay) run(w *work) {
	if w.id.seq > r.cut.Load() || r.single() && r.intake.Err() != nil {
		return // without an outcome
	}
	attempt(r, r.handler, w, r.want.replay.timeout)
}

// conclude records the result of a handler.
func (r *replay) conclude(w *work, err error) {
	j, err := judge(err)
	w.err = err
	switch j.verdict {
	case verdictSuccess:
		w.outcome = OutcomeSucceeded
	case verdictDiscard:
		w.outcome = OutcomeDiscarded
	default:
		w.outcome = OutcomeFailed
		if !r.want.replay.continuing {
			r.lowerCut(w.id.seq)
		}
	}
	if len(r.env.observers) > 0 {
		r.env.observe(r.observing, w.delivery, w.event(r.want.replay.filter, ""))
	}
}

// bookAll books finished works. The pool is locked.
func (r *replay) bookAll(done []*work) pullRequest {
	if r.abandoned {
		return pullRequest{}
	}
	for _, w := range done {
		if w.outcome != "" {
			r.book(w)
		}
		r.recycle(w)
	}
	r.supply()
	if r.over() {
		notify(r.wake)
	}
	if r.short > 0 {
		if r.short = max(r.short-len(done), 0); r.short == 0 {
			notify(r.more)
		}
	}
	return pullRequest{}
}

func (r *replay) workerFree()      {}
func (r *replay) send(pullRequest) {}

// book accounts for a handled message. The pool is locked.
func (r *replay) book(w *work) {
	seq := w.id.seq
	rep := &r.report
	if rep.First == 0 || seq < rep.First {
		rep.First = seq
	}
	rep.Last = max(rep.Last, seq)
	r.reached = max(r.reached, seq)
	r.current = w.id.time
	settled := true
	if w.outcome == OutcomeFailed {
		rep.Failed++
		failure := &ReplayFailure{Replay: r.want.replay.filter, Stream: r.stream, Sequence: seq, Subject: w.raw.Subject, Err: w.err}
		if len(rep.Failures) < MaxReplayFailures {
			rep.Failures = append(rep.Failures, failure)
		}
		// The error of a cancelled handler says nothing about its message.
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
		if next := r.keys.release(w.key); next != nil {
			r.backlog.push(next)
		}
	}
}

// newWork returns a new or reused work for a message. The pool is locked.
func (r *replay) newWork(d *delivery, a arrival) *work {
	var w *work
	if n := len(r.free); n > 0 {
		w, r.free = r.free[n-1], r.free[:n-1]
	} else {
		w = &work{}
	}
	w.delivery, w.raw, w.id, w.count = d, a.msg, messageID{a.sequence, a.time}, 1
	return w
}

// recycle keeps w for reuse. The pool is locked.
func (r *replay) recycle(w *work) {
	w.delivery, w.raw, w.err = nil, nil, nil
	w.key, w.outcome, w.due = "", "", 0
	if len(r.free) < replayWindow {
		r.free = append(r.free, w)
	}
}

// releaseDue admits messages that are due.
func (r *replay) releaseDue(now int64) {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	for r.early.len() > 0 && r.early.peek().due <= now {
		r.admit(r.early.pop())
	}
	r.supply()
	if r.early.len() > 0 {
		r.env.agenda.set(&r.release, r.early.peek().due)
	}
}

// reportProgress calls the progress function while the replay makes progress, until end is
// called: that calls it once more, and reports whether it has returned.
func (r *replay) reportProgress() (end func() bool) {
	fn := r.want.progress
	if fn == nil {
		return func() bool { return true }
	}
	over, done, leave := make(chan struct{}), make(chan struct{}), make(chan struct{})
	tell := func(now ReplayProgress) (returned bool) {
		back := make(chan struct{})
		go func() {
			defer close(back)
			r.env.callUser(r.telling(), func() { fn(now) })
		}()
		select {
		case <-back:
			return true
		case <-leave:
			return false
		}
	}
	go func() {
		defer close(done)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for told := uint64(0); ; {
			select {
			case <-over:
				tell(r.progress())
				return
			case <-tick.C:
			}
			if now := r.progress(); now.Done != told && r.intake.Err() == nil {
				if told = now.Done; !tell(now) {
					return
				}
			}
		}
	}()
	return func() bool {
		close(over)
		select {
		case <-done:
			return true
		case <-time.After(progressPatience):
			r.env.log.Warn("natsx: replay ended while its progress function has not returned", "replay", r.want.replay.filter)
			close(leave)
			<-done
			return false
		}
	}
}

func (r *replay) telling() string { return "progress function of " + r.want.String() }

func (r *replay) progress() ReplayProgress {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	g := ReplayProgress{Done: r.report.Handled + r.report.Failed, Total: r.total, Elapsed: time.Since(r.started)}
	g.Total = max(g.Total, g.Done)
	if r.complete && r.hand.len() == 0 {
		g.Total = g.Done // without messages that were deleted or skipped meanwhile
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
