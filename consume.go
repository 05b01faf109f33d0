package natsx

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// durableRoute consumes one route from a durable pull consumer.
//
// It pulls what workers can take now, plus as much as it has handled within the last
// moment (see demand). Every message in hand holds a lease, which is the server's
// AckWait. The keeper renews it with in-progress acks. A message whose lease was lost
// is neither started nor settled. After a reconnect, a missed heartbeat or a refused
// pull the route verifies its consumer.
type durableRoute struct {
	route
	target  consumerTarget         // stream, consumer and their identity
	located atomic.Bool            // target is complete
	created bool                   // the durable is new; set before located
	inbox   atomic.Pointer[string] // pulls reply to inbox.<token>
	gate    chan struct{}          // held by resume, pause and stop, one at a time; capacity 1
	alarm   alarm

	// Guarded by the pool's mutex.
	puller    puller
	window    window
	leases    leases
	history   history
	ackWait   time.Duration // of the consumer
	inactive  time.Duration // the consumer's inactive threshold, 0 for none
	keptAlive int64         // last keepAlive during a pause
	alarmAt   int64         // when the alarm is set for, 0 for never
	open      bool          // the subscription receives
	stopped   bool          // for good
	openedAt  int64
	arrived   int64    // when the last message arrived, or the route was opened
	pending   bool     // the server has messages
	pullsFail bool     // Health reports that pulls are refused or not served
	seen      uint64   // highest consumer sequence received
	more      int64    // when the demand grows even if nothing happens, 0 for never
	behind    bool     // the callback had something to work off when last looked
	unplanned int      // messages received since the last plan
	mean      float64  // handler time in ns, weighted towards slow runs
	started   int64    // when a message was last finished, or the first began to wait
	heldAt    int64    // when unserved was last evaluated
	delayed   timeHeap // when the retries that this process gave back are due

	suspects fifo[*work] // run one by one with nothing else of the route in hand
	isolated *work       // the suspect that runs now
	doubtful fifo[*work] // held until the consumer was checked

	checks  consumerChecks // owned by consumer.go
	letters letterBox      // owned by dlq.go
	passer  passer
	breaker *breaker   // nil for none
	batch   *batcher   // nil for a route that handles one message at a time
	order   *sequencer // nil for a route without an order

	mover   *mover        // to the retry stream, nil for none
	retries *durableRoute // delivers the retries that are due, nil without a retry stream
	retryOf *durableRoute // whose retries this route delivers, nil for its own messages

	free []*work // for reuse
}

func newDurableRoute(e *env, spec Spec) *durableRoute {
	r := &durableRoute{gate: make(chan struct{}, 1)}
	r.setUp(e, spec)
	return r
}

func (r *durableRoute) setUp(e *env, spec Spec) {
	r.init(e, spec, r)
	r.alarm.ring = r.tick
	r.puller.budget = &e.link.budget
	r.passer.route, r.passer.key = &r.route, new(atomic.Pointer[string])
	r.letters.init(&r.route, r)
	if spec.route.set&optOrderedBy != 0 {
		r.order = newSequencer(spec.route.order)
	}
	if spec.kind == kindBatch {
		r.batch = &batcher{owner: r, route: &r.route, most: spec.route.batch, wait: spec.route.batchWait}
	}
	if spec.route.set&optBreaker != 0 {
		r.breaker = newBreaker(spec.route.breakerAfter, spec.route.breakerRest)
	}
}

// other is the route that this one is a part of, or that is a part of it; or nil.
func (r *durableRoute) other() *durableRoute {
	if r.retries != nil {
		return r.retries
	}
	return r.retryOf
}

// start opens the route for messages.
func (r *durableRoute) start() error {
	p := r.env.pool
	p.mu.Lock()
	r.stats.Stream = r.target.stream
	r.from = &origin{filter: r.spec.route.filter, stream: r.target.stream, durable: r.target.consumer, ctx: r.env.handlers}
	p.enter(&r.lane)
	p.mu.Unlock()
	if r.retries != nil {
		r.retries.from = r.from
		if err := r.retries.begin(true); err != nil {
			return err
		}
	}
	return r.begin(true)
}

// resume opens the route again after a pause.
func (r *durableRoute) resume() error {
	if r.retries != nil {
		if err := r.retries.begin(false); err != nil {
			return err
		}
	}
	return r.begin(false)
}

// begin subscribes and begins to pull. It checks the consumer first, unless known is
// set. It does nothing on an open or stopped route.
func (r *durableRoute) begin(known bool) error {
	r.gate <- struct{}{}
	defer func() { <-r.gate }()
	p := r.env.pool
	p.mu.Lock()
	done := r.open || r.stopped
	p.mu.Unlock()
	if done {
		return nil
	}
	if !known {
		if err := r.checkOnce(); err != nil {
			return err
		}
	}
	inbox := r.env.api.nc.NewInbox()
	r.inbox.Store(&inbox)
	sub, err := r.subscribe(inbox+".*", "", r.receive)
	if err != nil {
		return err
	}
	// The pulls bound what arrives; a limit here would only drop messages.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	p.mu.Lock()
	if r.stopped { // by a drain that did not wait for this function
		p.mu.Unlock()
		return sub.Unsubscribe()
	}
	now := processTime()
	r.open, r.puller.open, r.openedAt, r.arrived = true, true, now, now
	r.puller.forget()
	r.checks.lastCheck = now
	next := r.plan(now)
	p.mu.Unlock()
	r.send(next)
	return nil
}

// pause ends the intake. Messages that the server has sent are still received, unless
// ctx ends first.
func (r *durableRoute) pause(ctx context.Context) {
	if r.retries != nil {
		var both sync.WaitGroup
		both.Go(func() { r.retries.pause(ctx) })
		defer both.Wait()
	}
	select {
	case r.gate <- struct{}{}:
		defer func() { <-r.gate }()
	case <-ctx.Done(): // the holder of the gate ends the intake too
		return
	}
	p := r.env.pool
	p.mu.Lock()
	if !r.open {
		p.mu.Unlock()
		return
	}
	r.open, r.puller.open = false, false
	r.setAlarm(processTime())
	p.mu.Unlock()
	r.awaitPulls(ctx)
	r.unsubscribe(ctx)
}

// stop ends the intake for good.
func (r *durableRoute) stop(ctx context.Context) {
	p := r.env.pool
	parts := []*durableRoute{r}
	if r.retries != nil {
		parts = append(parts, r.retries)
	}
	p.mu.Lock()
	for _, part := range parts {
		part.stopped = true
	}
	p.mu.Unlock()
	r.pause(ctx)
	p.mu.Lock()
	for _, part := range parts {
		if part.batch != nil && part.batch.gathered.len() > 0 {
			part.queueBatch(processTime())
		}
	}
	p.leave(&r.lane)
	p.mu.Unlock()
	// Run what takes only a moment; give the rest back for other processes.
	waiting := func() (n int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, part := range parts {
			n += part.lane.waiting()
		}
		return n
	}
	for end := time.Now().Add(stopMoment); waiting() > 0 && time.Now().Before(end); {
		if !wait(ctx, 2*time.Millisecond) {
			break
		}
	}
	for _, part := range parts {
		part.giveBackWaiting()
	}
}

func (r *durableRoute) denied(e *PermissionError) bool {
	if !r.located.Load() {
		return false // locate receives the error itself
	}
	if r.retries != nil && (r.retries.denied(e) || r.mover.writes(e.Subject)) {
		return true
	}
	if e.Operation == "subscribe" {
		return strings.HasPrefix(e.Subject, inboxPrefix(r.env.api.nc))
	}
	return e.Subject == r.target.nextSubject || e.Subject == r.spec.route.dlq ||
		strings.HasPrefix(e.Subject, "$JS.ACK.") &&
			strings.Contains(e.Subject, "."+r.target.stream+"."+r.target.consumer+".")
}

// receive is the subscription's callback.
func (r *durableRoute) receive(m *nats.Msg) {
	now := processTime()
	// Only status messages have no reply subject. Headers prove nothing, since
	// publishers write them.
	if m.Reply == "" {
		r.status(parseStatus(m), now)
		return
	}
	info, ok := parseDelivery(m.Reply)
	if !ok || info.stream != r.target.stream || info.consumer != r.target.consumer {
		r.env.log.Warn("natsx: message on the route's inbox is not from its consumer", r.names("reply", m.Reply)...)
		return
	}
	pin := ""
	if r.spec.route.pinGroup() != "" {
		pin = takePin(m)
	}
	id, count, size := messageID{info.sequence, info.time}, info.delivered, m.Size()
	c := retryCopy{id: id, attempt: 1}
	if r.retryOf != nil {
		original, copied, err := r.mover.openCopy(m)
		if err != nil {
			r.refuseCopy(m, err)
			return
		}
		m, c, count = original, copied, count+copied.lost
	}
	d := &delivery{msg: Msg{
		Subject: m.Subject, Data: m.Data, Header: m.Header,
		from: r.from, reply: m, seq: c.id.seq, time: c.id.time, attempt: c.attempt,
	}}
	p := r.env.pool
	p.mu.Lock()
	pinned := r.puller.pinned(pin)
	if r.order != nil {
		r.watchOrder(info.consumerSeq, pinned, now)
	}
	r.stats.Received++
	// The server's ack wait began between the pull and the arrival. When that is a
	// long time, assume the earlier one.
	since := now
	if asked := r.puller.since(now); now-asked > int64(r.ackWait)/4 {
		since = asked
	}
	r.puller.message(now, size)
	r.checks.pending = info.pending
	r.arrived, r.pending, r.seen = now, info.pending > 0, max(r.seen, info.consumerSeq)
	w := r.newWork(d, m, id, count)
	w.lost, w.copied = c.lost, copied{c.id, c.life, c.number, c.from}
	w.arrived = now
	w.begin(since+int64(r.ackWait)*9/10, since+int64(r.ackWait)/renewals)
	handled := false
	if info.delivered > 1 {
		handled = r.redelivered(w, now)
	} else {
		r.leases.push(w)
		switch {
		case r.headersOnly(w):
			r.hold(w, now)
		case w.lost > 0 && r.suspicious(w):
			r.suspect(w, now)
		default:
			r.enqueue(w, &r.lane.queue, now)
		}
	}
	var next pullRequest
	if r.unplanned++; r.unplanned >= planEvery || r.inHand() <= 1 || r.puller.outstanding <= planEvery {
		next = r.plan(now)
	}
	well := r.pullsFail
	r.pullsFail = false
	p.mu.Unlock()
	r.send(next)
	if handled {
		r.env.acks.push(m.Reply)
	}
	if well {
		r.clear("pull")
	}
	if pinned {
		r.env.log.Info("natsx: route is pinned and receives the messages of its durable", r.names("group", r.spec.route.pinGroup())...)
	}
}

// redelivered accepts a message that was delivered before. It reports whether this
// process has already handled it, so that only its ack was lost. The pool is locked.
func (r *durableRoute) redelivered(w *work, now int64) (handled bool) {
	held := r.leases.find(w.id.seq)
	if held != nil && held.settling() {
		// It was given back, and was redelivered before that was booked.
		r.leases.remove(held)
		held = nil
	}
	if held != nil && held.id == w.id {
		// The server has ended a lease that is valid here: AckWait was shortened. The
		// work in hand continues under the new lease.
		if ends := w.ends.Load(); held.ends.Load() < ends {
			held.ends.Store(ends)
		}
		held.renew = 0
		r.history.ranNothing(w.id)
		r.recycle(w)
		r.requestCheck(now, true)
		return false
	}
	if r.history.wasHandled(w.id) {
		r.countOutcome(r.history.settledLate(now, w.id))
		r.recycle(w)
		return true
	}
	attempt := r.history.attempt(w.id, w.count)
	w.lost = attempt - 1
	if w.again = r.mover.takes(w); !w.again {
		w.msg.attempt = uint32(min(attempt, 1<<31))
	}
	r.leases.push(w)
	switch {
	case r.headersOnly(w):
		r.hold(w, now)
	case !w.again && r.suspicious(w):
		w.msg.attempt = uint32(r.spec.route.attempts())
		r.suspect(w, now)
	default:
		r.enqueue(w, &r.lane.first, now)
	}
	return false
}

// suspicious reports whether as many deliveries as w has attempts ended without a known
// failure: w may crash its process, or may have been in hand when another message did. The
// pool is locked.
func (r *durableRoute) suspicious(w *work) bool {
	most := uint64(r.spec.route.attempts())
	return most > 0 && w.lost >= most
}

// suspect has w run in isolation. The pool is locked.
func (r *durableRoute) suspect(w *work, now int64) {
	w.alone = true
	r.enqueue(w, &r.lane.first, now)
}

// refuseCopy drops a message of the retry stream that is not a copy, unless the consumer
// was changed so that it does not deliver payloads.
func (r *durableRoute) refuseCopy(m *nats.Msg, err error) {
	if m.Header[headerMsgSize] != nil {
		now := processTime()
		r.env.pool.mu.Lock()
		r.requestCheck(now, true)
		r.setAlarm(now)
		r.env.pool.mu.Unlock()
		return
	}
	r.env.log.Error("natsx: message in the retry stream dropped", r.names("subject", m.Subject, "error", err)...)
	r.env.acks.write(m.Reply, ackTerm("not a retry"))
}

// newWork returns a new or reused work for a delivery. The pool is locked.
func (r *durableRoute) newWork(d *delivery, m *nats.Msg, id messageID, count uint64) *work {
	var w *work
	if n := len(r.free); n > 0 {
		w, r.free = r.free[n-1], r.free[:n-1]
	} else {
		w = &work{}
	}
	w.delivery, w.raw, w.id, w.count = d, m, id, count
	d.work = w
	return w
}

// recycle keeps w for reuse. No one else may hold it, except renewals, which can
// distinguish one use from the next. The pool is locked.
func (r *durableRoute) recycle(w *work) {
	w.claim()
	w.delivery.work = nil
	w.delivery, w.raw = nil, nil
	w.copy, w.again, w.outbox = nil, false, nil
	w.key, w.first, w.rests, w.unchecked, w.alone, w.marked, w.confirmed, w.outcome, w.reason, w.late = "", false, false, false, false, false, false, "", "", ""
	w.began, w.ended, w.err, w.due, w.answer, w.redrive, w.letter, w.shared, w.peers = 0, 0, nil, 0, nil, nil, nil, false, 0
	if len(r.free) < deepest {
		r.free = append(r.free, w)
	}
}

// run handles one message, or a batch, on a worker.
func (r *durableRoute) run(w *work) {
	if w.members != nil {
		r.batch.run(w)
		return
	}
	if !r.mayRun(w) || w.alone && !r.mayRunAlone(w) {
		return
	}
	if !r.mayStart(w.began) {
		r.turnAway(w)
		return
	}
	attempt(r.owner, r.handler, w, r.spec.route.timeout)
	r.unmark(w)
}

// mayRun reports whether a message is to be handled, and settles it otherwise.
func (r *durableRoute) mayRun(w *work) bool {
	if w.began >= w.ends.Load() {
		r.lapse(w)
		return false
	}
	if len(w.msg.Header) == 0 && r.mover == nil {
		return true
	}
	if len(w.msg.Header) > 0 {
		source := r.source()
		if w.number > 0 {
			source = nil // a schedule is never copied
		}
		if act, delay := r.passer.judge(r.env.closing, w, source); act != actHandle {
			r.passOver(w, act, delay)
			return false
		}
	}
	switch {
	case w.again:
		w.ended = w.began
		r.leave(w, 0, w.msg.attempt, w.lost)
		return false
	case w.number > 0 && !r.mover.settleBefore(r.env.closing, w):
		w.ended = w.began
		r.lapse(w)
		return false
	}
	if w.began = processTime(); w.began >= w.ends.Load() { // judge may have taken a while
		w.ended = w.began
		r.lapse(w)
		return false
	}
	if r.spec.route.dlq != "" || r.mover != nil {
		w.msg.Header = maps.Clone(w.msg.Header)
	}
	return true
}

// mayStart reports whether the breaker lets a handler start.
func (r *durableRoute) mayStart(now int64) bool {
	return r.breaker == nil || r.breaker.mayStart(now)
}

// turnAway gives back a message that an open breaker does not let run.
func (r *durableRoute) turnAway(w *work) {
	w.ended = w.began
	w.outcome = OutcomeReturned
	r.leave(w, r.breaker.redeliverAfter(), w.msg.attempt, w.lost)
	r.unmark(w)
}

// passOver settles a message that is not for this route. It is no attempt.
func (r *durableRoute) passOver(w *work, act action, delay time.Duration) {
	if act == actAck {
		r.ack(w)
	} else {
		r.settle(w, ackNak(delay))
	}
}

// mayRunAlone reports whether the worker is to run a suspect once more, and concludes
// the suspect otherwise.
func (r *durableRoute) mayRunAlone(w *work) bool {
	p := r.env.pool
	p.mu.Lock()
	flood := r.suspects.len() >= floodOfSuspects
	p.mu.Unlock()
	beyond := w.count - uint64(r.spec.route.attempts())
	if flood && beyond < aloneDeliveries {
		return true
	}
	before, err := r.notes().mark(r.env.closing, w.source, 1)
	proven := before >= aloneProof
	if err != nil {
		proven = errors.Is(err, ErrPermission) && beyond >= aloneDeliveries
		r.env.log.Warn("natsx: message runs in isolation, which could not be recorded", r.about(w, "error", err)...)
	}
	now := processTime()
	w.began, w.ended = now, now
	switch {
	case now >= w.ends.Load():
		r.lapse(w)
		if err == nil && !proven { // it was counted, and did not run
			r.lowerMark(w, -1)
		}
		return false
	case proven:
		r.conclude(w, errCrashed)
		return false
	}
	w.marked = err == nil
	return true
}

// unmark removes the mark of a message whose run has returned and which will be
// delivered again.
func (r *durableRoute) unmark(w *work) {
	if !w.marked || w.confirmed && w.copy == nil {
		return
	}
	r.lowerMark(w, 0)
}

// lowerMark takes isolated runs of a message back, as [aloneNotes.mark] does.
func (r *durableRoute) lowerMark(w *work, by int) {
	if _, err := r.notes().mark(r.env.closing, w.source, by); err != nil {
		r.env.log.Warn("natsx: record of an isolated run not removed", r.about(w, "error", err)...)
	}
}

func (r *durableRoute) notes() aloneNotes {
	return aloneNotes{r.env.api, r.target.stream, r.target.consumer}
}

// Methods of letterOwner.
func (r *durableRoute) keepsTerminated() bool           { return r.own().target.keepsTerminated() }
func (r *durableRoute) source() *jetstream.StreamConfig { return r.own().target.config.Load() }
func (r *durableRoute) consumerCreated() time.Time      { return r.own().target.identity.created }

// own is the route whose messages r delivers.
func (r *durableRoute) own() *durableRoute {
	if r.retryOf != nil {
		return r.retryOf
	}
	return r
}

func (r *durableRoute) lapse(w *work) {
	w.outcome = OutcomeLapsed
	r.env.log.Warn("natsx: lease lost, message will be redelivered", r.about(w)...)
}

// conclude settles an attempt by the handler's result.
func (r *durableRoute) conclude(w *work, err error) {
	j, err := judge(err)
	cut := r.env.handlers.Err() != nil
	r.settleAttempt(w, j, err, cut, r.brake(w.ended, j, err, cut))
}

// settleAttempt settles w by the result of its handler, which a shutdown may have cut off,
// or an open breaker have made no attempt: then the message rests.
func (r *durableRoute) settleAttempt(w *work, j judgement, err error, cut bool, rest time.Duration) {
	w.err = err
	if w.ended >= w.ends.Load() {
		r.lapse(w)
		if j.verdict == verdictSuccess {
			w.late = OutcomeSucceeded
		}
		r.observe(w)
		return
	}
	if j.verdict == verdictSuccess {
		w.swift = len(r.env.observers) == 0 && !w.alone && r.spec.route.set&optConfirmAcks == 0
		r.carryOut(w, settlement{action: actAck, outcome: OutcomeSucceeded})
		return
	}
	c := circumstances{attempt: w.msg.Attempt(), cut: cut, void: rest, life: r.remainingLife(w), spread: rand.Float64()}
	if cut && errors.Is(err, context.Canceled) {
		j.verdict = verdictRetry // whatever else it wraps
	}
	r.carryOut(w, decide(r.spec.route, j, c))
}

// carryOut executes the decision about an attempt.
func (r *durableRoute) carryOut(w *work, s settlement) {
	w.outcome, w.reason = s.outcome, s.reason
	err := w.err
	if s.expires {
		r.env.log.Error("natsx: message is dead: its stream would delete it before the next attempt", r.about(w, "error", err)...)
	}
	switch s.action {
	case actAck:
		r.ack(w)
	case actNak:
		level := slog.LevelWarn
		if w.shared {
			level = slog.LevelDebug // the batch was logged
		}
		r.env.log.Log(context.Background(), level, "natsx: attempt failed", r.about(w, "error", err, "retry_in", s.delay)...)
		if !r.leave(w, s.delay, w.msg.attempt+1, 0) {
			return // the mover concludes
		}
	case actReturn:
		why := "natsx: handler was cancelled by the shutdown, message given back"
		if s.delay > 0 {
			why = "natsx: attempt failed while the breaker is not closed and does not count, message given back"
		}
		r.env.log.Info(why, r.about(w, "error", err)...)
		if !r.leave(w, s.delay, w.msg.attempt, 0) {
			return
		}
	case actTerm:
		switch {
		case s.outcome == OutcomeDiscarded:
			r.env.log.Info("natsx: message discarded", r.about(w, "error", err)...)
			r.settle(w, ackTerm("discarded"))
		case r.keepsTerminated():
			r.env.log.Error("natsx: message is dead and the route has no DLQ", r.about(w, "reason", s.reason, "error", err)...)
			r.settle(w, ackTerm(string(s.reason)))
		default:
			r.env.log.Error("natsx: message is dead and the route has no DLQ; it stays unsettled, since its stream would delete it",
				r.about(w, "reason", s.reason, "error", err)...)
			r.giveBack(w, unsettledRest)
		}
	case actBury:
		if !r.letters.bury(w) {
			return // the letter box concludes
		}
	}
	if w.number > 0 && w.copy == nil && w.due == 0 && w.outcome != OutcomeLapsed {
		r.mover.forget(r.env.closing, w)
	}
	if w.outcome == OutcomeLapsed && (s.outcome == OutcomeSucceeded || s.outcome == OutcomeDiscarded) {
		w.late = s.outcome
	}
	r.observe(w)
}

// remainingLife is how long the stream still keeps the message, 0 for no limit.
func (r *durableRoute) remainingLife(w *work) time.Duration {
	most, copies := time.Duration(0), r.mover.takes(w)
	if c := r.source(); c != nil {
		if !copies {
			most = c.MaxAge
		}
		if ttl := w.raw.Header.Get(jetstream.MsgTTLHeader); ttl != "" && c.AllowMsgTTL {
			if d, ok := parseTTL(ttl); ok && (most == 0 || d < most) {
				most = d
			}
		}
	}
	left := time.Duration(0)
	if most > 0 {
		left = max(most-time.Since(time.Unix(0, w.source.time)), 1)
	}
	if copies && r.mover.to.maxAge > 0 && (left == 0 || r.mover.to.maxAge < left) {
		left = r.mover.to.maxAge // of the next copy
	}
	return left
}

// leave has w delivered again after a delay, as the given attempt: by the retry stream,
// or if there is none by the server's own delivery count. It reports whether w is
// settled; otherwise the mover concludes it.
func (r *durableRoute) leave(w *work, delay time.Duration, attempt uint32, lost uint64) bool {
	if r.mover.takes(w) {
		return r.mover.move(w, delay, attempt, lost)
	}
	r.giveBack(w, delay)
	if w.outcome == OutcomeRetried {
		r.checkAfterFailure()
	}
	return true
}

// giveBack asks the server to deliver w again after a delay.
func (r *durableRoute) giveBack(w *work, delay time.Duration) {
	if r.order != nil && delay < unsettledRest {
		if w.rests = r.env.intake.Err() == nil; !w.rests {
			delay = min(delay, r.ackWaitNow()) // another process waits for it
		}
	}
	w.due = w.ended + int64(delay)
	if w.rests {
		return
	}
	// A nak that is sent after a reconnect may end a later delivery to another process.
	// Without one the message is redelivered when its lease ends.
	if !r.env.link.up() {
		return
	}
	w.claim()
	w.ends.Store(min(w.ends.Load(), w.due))
	r.settle(w, ackNak(delay))
}

// parseTTL reads a time to live as the server does (ADR-43), 0 for never.
func parseTTL(text string) (time.Duration, bool) {
	if n, err := strconv.ParseInt(text, 10, 32); err == nil && n > 0 {
		return time.Duration(n) * time.Second, true
	}
	d, err := time.ParseDuration(text)
	return d, err == nil && d > 0
}

func (r *durableRoute) ack(w *work) {
	if w.alone || r.spec.route.set&optConfirmAcks != 0 {
		r.settle(w, ackAck)
		return
	}
	w.claim()
	r.env.acks.push(w.raw.Reply)
}

// settle sends an acknowledgement, and waits for its confirmation if the route asks
// for one. A message whose acknowledgement is not confirmed within the lease has
// lapsed: the server may deliver it again.
func (r *durableRoute) settle(w *work, ack []byte) {
	w.claim()
	if w.alone || r.spec.route.set&optConfirmAcks != 0 {
		if w.confirmed = r.confirm(r.env.closing, w, ack); !w.confirmed {
			r.lapse(w)
		}
		return
	}
	r.env.acks.write(w.raw.Reply, ack)
}

// confirm sends an acknowledgement, at least once, until the server confirms it. It
// gives up when the lease is lost, the route is over, or ctx ends.
func (r *durableRoute) confirm(ctx context.Context, w *work, ack []byte) bool {
	left := func() time.Duration { return time.Duration(w.ends.Load() - processTime()) }
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for tried := false; (!tried || left() > 0) && !r.over.Load(); tried = true {
		limit := confirmTry
		if w.due == 0 { // else it is a nak, and giveBack has ended the lease
			limit = min(limit, max(left(), leastConfirm))
		}
		try, cancel := context.WithTimeout(ctx, limit)
		_, err := r.env.api.nc.RequestWithContext(try, w.raw.Reply, ack)
		cancel()
		if err == nil {
			return true
		}
		if !wait(ctx, min(pause.next(), max(left(), 0))) {
			return false
		}
	}
	return false
}

// confirmTry is the timeout of one try to confirm an acknowledgement, and leastConfirm what
// a try has at least, however soon the lease ends.
const (
	confirmTry   = 2 * time.Second
	leastConfirm = 100 * time.Millisecond
)

// bookAll books finished works and plans the next pull. The pool is locked.
func (r *durableRoute) bookAll(done []*work) pullRequest {
	now, ran := int64(0), 0
	for _, w := range done {
		now = max(now, w.ended)
		if w.members != nil {
			ran += r.finishBatch(w)
			continue
		}
		if w.ended != w.began { // otherwise it was not run
			r.learn(w.took())
			ran++
		}
		if w == r.isolated {
			r.isolated = nil
			if other := r.other(); other != nil {
				other.workerFree() // it may pull again
			}
		}
		r.bookOne(w)
	}
	r.started = now
	r.window.add(now, ran)
	r.release(now)
	return r.plan(now)
}

// bookOne books a work that its worker has left, unless it is not settled yet. The pool is
// locked.
func (r *durableRoute) bookOne(w *work) {
	switch {
	case w.outbox != nil:
		w.outbox.take(w)
	case w.rests:
		r.keepResting(w)
	default:
		r.book(w)
	}
}

// keepResting books an attempt whose message is kept until its retry is due. The pool is
// locked.
func (r *durableRoute) keepResting(w *work) {
	if w.outcome == OutcomeReturned {
		r.history.ranNothing(w.id)
	} else {
		r.delayed.push(w.due)
	}
	if r.stopped {
		w.due = w.ended // what waits may be given back already: the next tick gives it back
	}
	r.count(w)
	r.order.rest(w)
	r.env.pool.held++
}

// finishBatch books the messages of a batch. The pool is locked.
func (r *durableRoute) finishBatch(batch *work) (ran int) {
	for _, w := range batch.members {
		if w.ended != w.began {
			ran++
		}
		r.bookOne(w)
	}
	if ran > 0 {
		r.stats.HandlerTime += batch.took()
		r.learn(batch.took() / time.Duration(ran))
	}
	batch.members = nil
	return ran
}

// book records the outcome of w and releases it. The pool is locked.
func (r *durableRoute) book(w *work) {
	switch w.outcome {
	case OutcomeLapsed:
		if w.late != "" {
			r.history.addLate(w.id, w.late)
		} else if w.began == w.ended {
			r.history.ranNothing(w.id)
		}
	case OutcomeReturned:
		r.history.ranNothing(w.id)
	case OutcomeSucceeded, OutcomeDiscarded:
		if !w.confirmed {
			r.history.addHandled(w.ended, w.id)
		}
	default:
		if w.due > 0 {
			r.delayed.push(w.due)
		}
	}
	r.leases.remove(w)
	r.count(w)
	if r.order != nil {
		r.advance(w)
	}
	r.recycle(w)
}

// advance lets the next message of a key run behind w, unless w comes again. The pool is
// locked.
func (r *durableRoute) advance(w *work) {
	now := max(w.ended, w.began)
	if w.outcome == OutcomeLapsed {
		r.doubtOrder(now) // it is delivered again, to whomever
	}
	if w.outcome == OutcomeRetried || w.outcome == OutcomeReturned {
		r.order.retry(w, w.due)
		return
	}
	if next := r.order.ended(w); next != nil {
		r.env.pool.held--
		r.dispatch(next, &r.lane.first, now)
	}
}

// report returns the route's current counters.
func (r *durableRoute) report() RouteStats {
	st := r.route.report()
	if r.retries != nil {
		st.add(r.retries.report())
	}
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	now := processTime()
	st.Delayed += r.delayed.after(now)
	if r.order != nil {
		st.Waiting += r.order.waiting()
	}
	if r.batch != nil {
		st.Waiting += r.batch.waiting() - r.lane.waiting()
	}
	if r.breaker != nil {
		st.Breaker, _ = r.breaker.now(now)
	}
	if !r.stopped && !r.checks.reported.IsZero() {
		st.Consumer = &ConsumerStats{NumPending: r.checks.pending, NumAckPending: r.checks.ackPending, At: r.checks.reported}
	}
	return st
}
