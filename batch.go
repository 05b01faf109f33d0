package natsx

import (
	"context"
	"sync"
	"time"
)

// settleAtOnce is how many messages of a batch are settled at once, if each takes a round
// trip.
const settleAtOnce = 32

// batcher gathers the messages of a route with Batch until the batch is full or wait has
// passed. The batch is then one work of the pool. Guarded by the pool's mutex.
type batcher struct {
	most     int
	wait     time.Duration
	owner    batchOwner
	route    *route
	gathered fifo[*work]
	since    int64 // when the first of them arrived
	queued   int   // messages in batches that wait for a worker
}

// batchOwner is the part of a route that its batcher uses.
type batchOwner interface {
	// mayRun reports whether a message is to be handled, and settles it otherwise.
	mayRun(w *work) bool
	// mayStart reports whether the breaker allows a handler to start, and turnAway gives
	// back a message if it does not.
	mayStart(now int64) bool
	turnAway(w *work)
	// brake accounts for a result in the breaker, and returns the delay of the redelivery
	// if it was no attempt, else 0.
	brake(now int64, j judgement, err error, cut bool) (rest time.Duration)
	// settleAttempt settles a message by its result.
	settleAttempt(w *work, j judgement, err error, cut bool, rest time.Duration)
}

// waiting is how many messages no worker has taken.
func (b *batcher) waiting() int { return b.gathered.len() + b.queued }

// wake is when the gathered messages have waited for wait, 0 for never.
func (b *batcher) wake() int64 {
	if b.gathered.len() == 0 {
		return 0
	}
	return b.since + int64(b.wait)
}

// take adds gathered messages to a batch, as many as fit.
func (b *batcher) take(p *pool, batch []*work) []*work {
	for len(batch) < b.most && b.gathered.len() > 0 {
		batch = append(batch, b.gathered.pop())
		p.held--
	}
	return batch
}

// run handles a batch on a worker.
func (b *batcher) run(batch *work) {
	p := b.route.env.pool
	p.mu.Lock()
	b.queued -= len(batch.members)
	batch.members = b.take(p, batch.members)
	p.mu.Unlock()
	var run []*work
	for _, w := range batch.members {
		w.began, w.ended, w.shared = batch.began, batch.began, true
		if b.owner.mayRun(w) {
			run = append(run, w)
		}
	}
	switch {
	case len(run) == 0:
	case !b.owner.mayStart(batch.began):
		for _, w := range run {
			b.owner.turnAway(w)
		}
	default:
		b.handle(batch, run)
	}
}

// handle runs the handler on the messages of a batch and settles each.
func (b *batcher) handle(batch *work, run []*work) {
	r := b.route
	msgs := make([]*Msg, len(run))
	for i, w := range run {
		w.began, w.peers = processTime(), len(run)
		msgs[i] = &w.msg
	}
	batch.began = run[0].began
	returned := false
	conclude := func(err error) {
		returned = true
		batch.ended = processTime()
		failure := err
		results, err := batchResults(err, len(run))
		j, err := judge(err)
		cut := r.env.handlers.Err() != nil
		rest := b.owner.brake(batch.ended, j, err, cut)
		if results != nil {
			r.env.log.Warn("natsx: attempt of a batch failed", r.names("messages", len(run), "error", failure)...)
		}
		b.settle(run, results, batch.ended, cut, rest)
	}
	defer func() {
		if !returned {
			conclude(&PanicError{Value: "runtime.Goexit"})
		}
	}()
	conclude(sound(b.call(msgs)))
}

// call runs the handler within the route's timeout.
func (b *batcher) call(msgs []*Msg) error {
	r := b.route
	h := func(ctx context.Context, _ *Msg) error { return r.spec.batch(ctx, msgs) }
	if r.spec.route.timeout == 0 {
		return invoke(h, r.from.ctx, nil)
	}
	ctx, cancel := context.WithTimeout(r.from.ctx, r.spec.route.timeout)
	defer cancel()
	return lateness(ctx, r.spec.route.timeout, invoke(h, ctx, nil))
}

// settle settles the messages of a batch by their results. Plain acknowledgements are
// written together; those that take a round trip are made for several messages at once.
func (b *batcher) settle(run []*work, results []error, ended int64, cut bool, rest time.Duration) {
	slots := make(chan struct{}, settleAtOnce)
	var slow sync.WaitGroup
	for i, w := range run {
		w.ended = ended
		var err error
		if results != nil {
			err = sound(results[i])
		}
		j, err := judge(err)
		if j.verdict == verdictSuccess && b.route.spec.route.set&optConfirmAcks == 0 {
			b.owner.settleAttempt(w, j, err, cut, 0)
			continue
		}
		slots <- struct{}{}
		slow.Go(func() {
			defer func() { <-slots }()
			b.owner.settleAttempt(w, j, err, cut, rest)
		})
	}
	slow.Wait()
}
