package natsx

import (
	"context"
	"errors"
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
// It asks for what workers can take now and for what it has proven to get done a
// moment later (demand). Every message in hand holds a lease, which is the server's
// AckWait; the keeper renews it with in-progress acks, and what has lost it is neither
// started nor settled. Whatever casts doubt on the consumer (a reconnect, a missed
// heartbeat, a refused pull) has it verified.
type durableRoute struct {
	route
	target  consumerTarget         // stream, consumer and their identity
	located atomic.Bool            // target is complete
	inbox   atomic.Pointer[string] // pulls reply to inbox.<token>
	gate    chan struct{}          // full while one of resume, pause and stop is at work; capacity 1
	alarm   alarm

	// Guarded by the pool's mutex.
	puller    puller
	window    window
	leases    leases
	known     history
	ackWait   time.Duration // of the consumer
	inactive  time.Duration // after which the server removes the consumer, 0 for never
	keptAlive int64         // when that was last prevented during a pause
	alarmAt   int64         // when the alarm is set for, 0 for never
	open      bool          // the subscription receives
	stopped   bool          // for good
	openedAt  int64
	arrived   int64    // when the last message came, or the route was opened
	rang      bool     // the server has messages
	pullsFail bool     // Health tells that pulls are refused or not served
	seen      uint64   // the highest consumer sequence that came
	unplanned int      // messages that came since the last plan
	mean      float64  // of the handler's time in ns, leaning to the slow side
	started   int64    // when a message was last finished, or began to wait for that
	heldAt    int64    // when it was last considered to give back what waits
	delayed   timeHeap // when the retries given back by this process come due

	suspects fifo[*work] // to be run with nothing else of the route in hand
	isolated *work       // that runs so
	doubtful fifo[*work] // held until the consumer was looked at

	checks  consumerChecks // owned by consumer.go
	letters letterBox      // owned by dlq.go
	passer  passer
	mover   *mover        // to the retry stream, nil without one
	retries *durableRoute // delivers the retries that are due, nil without a retry stream
	retryOf *durableRoute // whose retries this route delivers, nil for its own messages

	free []*work // to be used again
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
	r.passer.route = &r.route
	r.letters = letterBox{route: &r.route, owner: r, passer: &r.passer}
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
	r.from = &origin{stream: r.target.stream, durable: r.target.consumer, ctx: r.env.handlers}
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

// begin subscribes and begins to pull, after a look at the consumer unless that
// is known; it does nothing when that was done.
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
		if err := r.unchanged(); err != nil {
			return err
		}
	}
	inbox := r.env.api.nc.NewInbox()
	r.inbox.Store(&inbox)
	sub, err := r.subscribe(inbox+".*", "", r.receive)
	if err != nil {
		return err
	}
	// What may arrive is bounded by the pulls; a limit would only drop it.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	p.mu.Lock()
	if r.stopped { // meanwhile, by a drain that did not wait for the end of this
		p.mu.Unlock()
		return sub.Unsubscribe()
	}
	now := processTime()
	r.open, r.puller.open, r.openedAt, r.arrived = true, true, now, now
	r.puller.forget()
	r.checks.looked = now
	next := r.plan(now)
	p.mu.Unlock()
	r.send(next)
	return nil
}

// pause ends the intake. Nothing that the server sent is lost or given back, unless
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
	case <-ctx.Done(): // whoever is at work ends the intake too
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

// stop is a pause for good.
func (r *durableRoute) stop(ctx context.Context) {
	p := r.env.pool
	p.mu.Lock()
	r.stopped = true
	if r.retries != nil {
		r.retries.stopped = true
	}
	p.mu.Unlock()
	r.pause(ctx)
	p.mu.Lock()
	p.leave(&r.lane)
	p.mu.Unlock()
	// What takes only a moment is run; the rest is somebody else's.
	for end := time.Now().Add(stopMoment); r.waiting() > 0 && time.Now().Before(end); {
		if !wait(ctx, 2*time.Millisecond) {
			break
		}
	}
	if r.retries != nil {
		r.retries.returnWaiting()
	}
	r.returnWaiting()
}

func (r *durableRoute) waiting() int {
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	n := r.lane.waiting()
	if r.retries != nil {
		n += r.retries.lane.waiting()
	}
	return n
}

func (r *durableRoute) denied(e *PermissionError) bool {
	if !r.located.Load() {
		return false // whoever asks for something now hears of it
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
	// A message of the stream has an ack subject for its reply, a status has none:
	// headers prove nothing, since publishers write them.
	if m.Reply == "" {
		r.status(parseStatus(m), now)
		return
	}
	info, ok := parseDelivery(m.Reply)
	if !ok || info.stream != r.target.stream || info.consumer != r.target.consumer {
		r.env.log.Warn("natsx: message on the route's inbox is not from its consumer", r.names("reply", m.Reply)...)
		return
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
	r.stats.Received++
	// The server began to count somewhere between its pull and its arrival. While that
	// is no long time, it does not matter where.
	since := now
	if asked := r.puller.since(now); now-asked > int64(r.ackWait)/4 {
		since = asked
	}
	r.puller.message(now, size)
	r.arrived, r.rang, r.seen = now, info.pending > 0, max(r.seen, info.consumerSeq)
	w := r.newWork(d, m, id, count)
	w.lost, w.copied = c.lost, copied{c.id, c.life, c.number, c.from}
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
	if r.unplanned++; r.unplanned >= planEvery || r.lane.inHand() <= 1 || r.puller.outstanding <= planEvery {
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
}

// redelivered takes a message that was delivered before. It reports whether it was
// handled already, and only its acknowledgement was lost. The pool is locked.
func (r *durableRoute) redelivered(w *work, now int64) (handled bool) {
	held := r.leases.find(w.id.seq)
	if held != nil && held.settling() {
		// It was given back, and comes before that is booked.
		r.leases.remove(held)
		held = nil
	}
	if held != nil && held.id == w.id {
		// The server has ended a lease that this side takes for valid: somebody has
		// shortened AckWait. The one in hand goes on under the new lease.
		if ends := w.ends.Load(); held.ends.Load() < ends {
			held.ends.Store(ends)
		}
		held.renew = 0
		r.known.ranNothing(w.id)
		r.recycle(w)
		r.look(now, true)
		return false
	}
	if r.known.wasHandled(w.id) {
		r.recycle(w)
		return true
	}
	attempt := r.known.attempt(w.id, w.count)
	w.lost = attempt - 1
	if w.again = r.mover.takes(w); !w.again {
		w.msg.attempt = uint32(min(attempt, 1<<31))
	}
	r.leases.push(w)
	switch {
	case r.headersOnly(w):
		r.hold(w, now)
	case !w.again && r.suspicious(w):
		// The attempts are used up without a failure that is known.
		w.msg.attempt = uint32(r.spec.route.attempts())
		r.suspect(w, now)
	default:
		r.enqueue(w, &r.lane.first, now)
	}
	return false
}

// suspicious reports whether more deliveries of a message are not accounted for than it
// has attempts: it may be the message that takes processes down, or one that was beside
// it. The pool is locked.
func (r *durableRoute) suspicious(w *work) bool {
	most := uint64(r.spec.route.attempts())
	return most > 0 && w.lost >= most
}

// suspect has a message run by itself. The pool is locked.
func (r *durableRoute) suspect(w *work, now int64) {
	w.alone = true
	r.suspects.push(w)
	r.env.pool.held++
	r.release(now)
}

// refuseCopy drops what is no copy of a message from the retry stream, unless that is
// due to the consumer.
func (r *durableRoute) refuseCopy(m *nats.Msg, err error) {
	if m.Header[headerMsgSize] != nil {
		now := processTime()
		r.env.pool.mu.Lock()
		r.look(now, true)
		r.setAlarm(now)
		r.env.pool.mu.Unlock()
		return
	}
	r.env.log.Error("natsx: message in the retry stream dropped", r.names("subject", m.Subject, "error", err)...)
	r.env.acks.write(m.Reply, ackTerm("not a retry"))
}

// newWork returns a work for a delivery. The pool is locked.
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

// recycle has w used again. Nobody else may hold it, but for renewals, which tell one
// use from another. The pool is locked.
func (r *durableRoute) recycle(w *work) {
	w.claim()
	w.delivery.work = nil
	w.delivery, w.raw = nil, nil
	w.copy, w.again = nil, false
	w.key, w.alone, w.marked, w.confirmed, w.outcome, w.reason = "", false, false, false, "", ""
	w.began, w.ended, w.err, w.due, w.answer, w.letter = 0, 0, nil, 0, nil, nil
	if len(r.free) < deepest {
		r.free = append(r.free, w)
	}
}

// run handles one message on a worker.
func (r *durableRoute) run(w *work) {
	if w.began >= w.ends.Load() {
		r.lapse(w)
		return
	}
	if len(w.msg.Header) > 0 {
		source := r.source()
		if w.number > 0 {
			source = nil // a copy of a schedule is never made
		}
		if act, delay := r.passer.judge(r.env.closing, w, source); act != actHandle {
			r.passOver(w, act, delay)
			return
		}
		if w.began = processTime(); w.began >= w.ends.Load() { // that may have taken a while
			w.ended = w.began
			r.lapse(w)
			return
		}
		if r.spec.route.dlq != "" || r.mover != nil {
			w.msg.Header = maps.Clone(w.msg.Header)
		}
	}
	if w.again {
		w.ended = w.began
		r.leave(w, 0, w.msg.attempt, w.lost)
		return
	}
	if w.number > 0 && !r.mover.settleBefore(r.env.closing, w) {
		w.ended = w.began
		r.lapse(w)
		return
	}
	if w.alone && !r.mayRunAlone(w) {
		return
	}
	attempt(r.owner, r.handler, w, r.spec.route.timeout)
	r.unmark(w)
}

// passOver settles a message that is none for this route. It is not counted as an
// attempt.
func (r *durableRoute) passOver(w *work, act action, delay time.Duration) {
	if act == actAck {
		r.ack(w)
	} else {
		r.settle(w, ackNak(delay))
	}
}

// mayRunAlone reports whether a suspect is to be run once more, and concludes it
// otherwise. It runs on the worker that is to run it.
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
		r.env.log.Warn("natsx: message runs by itself and that could not be written down", r.about(w, "error", err)...)
	}
	now := processTime()
	w.began, w.ended = now, now
	switch {
	case now >= w.ends.Load():
		r.lapse(w)
		return false
	case proven:
		r.conclude(w, errCrashed)
		return false
	}
	w.marked = err == nil
	return true
}

// unmark takes the mark of a message back whose run has returned and which comes again.
func (r *durableRoute) unmark(w *work) {
	if !w.marked || w.confirmed && w.copy == nil {
		return
	}
	if _, err := r.notes().mark(r.env.closing, w.source, 0); err != nil {
		r.env.log.Warn("natsx: note of a message that ran by itself not taken back", r.about(w, "error", err)...)
	}
}

func (r *durableRoute) notes() aloneNotes {
	return aloneNotes{r.env.api, r.target.stream, r.target.consumer}
}

// What the letter box asks of its route.
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
	r.env.log.Warn("natsx: lease lost, message left to its next delivery", r.about(w)...)
}

// conclude settles an attempt.
func (r *durableRoute) conclude(w *work, err error) {
	j, err := judge(err)
	w.err = err
	if w.ended >= w.ends.Load() {
		r.lapse(w)
		if j.verdict == verdictSuccess {
			w.reason = handledLate
		}
		r.observe(w)
		return
	}
	if j.verdict == verdictSuccess {
		w.swift = r.env.observer == nil && !w.alone && r.spec.route.set&optConfirmAcks == 0
		r.carryOut(w, settlement{action: actAck, outcome: OutcomeSucceeded})
		return
	}
	c := circumstances{
		attempt: w.msg.Attempt(), cut: r.env.handlers.Err() != nil,
		life: r.lifeOf(w), spread: rand.Float64(),
	}
	if c.cut && errors.Is(err, context.Canceled) {
		j.verdict = verdictRetry // whatever else it says
	}
	r.carryOut(w, decide(r.spec.route, j, c))
}

// handledLate marks a work whose handler succeeded when its lease was lost.
const handledLate Reason = "handled late"

// carryOut does what was decided about an attempt.
func (r *durableRoute) carryOut(w *work, s settlement) {
	w.outcome, w.reason = s.outcome, s.reason
	err := w.err
	if s.expires {
		r.env.log.Error("natsx: message is dead, since its stream deletes it before its next attempt", r.about(w, "error", err)...)
	}
	switch s.action {
	case actAck:
		r.ack(w)
	case actNak:
		r.env.log.Warn("natsx: attempt failed", r.about(w, "error", err, "retry_in", s.delay)...)
		if !r.leave(w, s.delay, w.msg.attempt+1, 0) {
			return // whoever moves the copy concludes
		}
	case actReturn:
		r.env.log.Info("natsx: handler was cut off by the shutdown, message given back", r.about(w, "error", err)...)
		if !r.leave(w, 0, w.msg.attempt, 0) {
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
			r.env.log.Error("natsx: message is dead, the route has no DLQ, and its stream would delete it: it stays unsettled",
				r.about(w, "reason", s.reason, "error", err)...)
			r.giveBack(w, unsettledRest)
		}
	case actBury:
		if !r.letters.bury(w) {
			return // whoever moves the letter concludes
		}
	}
	if w.number > 0 && w.copy == nil && w.due == 0 && w.outcome != OutcomeLapsed {
		r.mover.forget(r.env.closing, w)
	}
	r.observe(w)
}

// lifeOf is how long the message stays in its stream, 0 for as long as it takes.
func (r *durableRoute) lifeOf(w *work) time.Duration {
	most := time.Duration(0)
	if c := r.source(); c != nil {
		if most = c.MaxAge; r.mover.takes(w) {
			most = 0 // its copy is not that old
		}
		if ttl := w.raw.Header.Get(jetstream.MsgTTLHeader); ttl != "" && c.AllowMsgTTL {
			if d, ok := parseTTL(ttl); ok && (most == 0 || d < most) {
				most = d
			}
		}
	}
	kept := time.Duration(0)
	if r.mover.takes(w) {
		kept = r.mover.to.maxAge
	}
	if most == 0 {
		return kept
	}
	left := max(most-time.Since(time.Unix(0, w.source.time)), 1)
	if kept > 0 {
		return min(left, kept)
	}
	return left
}

// leave has w delivered again after a delay: moved to the retry stream as the given
// attempt, or where there is none, by the server. It reports whether that is done; else
// the mover concludes it.
func (r *durableRoute) leave(w *work, delay time.Duration, attempt uint32, lost uint64) bool {
	if r.mover.takes(w) {
		return r.mover.move(w, delay, attempt, lost)
	}
	r.giveBack(w, delay)
	if delay > 0 {
		r.lookSoonAfterFailure()
	}
	return true
}

// giveBack has the server deliver w again after a delay.
func (r *durableRoute) giveBack(w *work, delay time.Duration) {
	w.due = w.ended + int64(delay)
	// A nak that is sent after a reconnect, or again after the delay, may hit a
	// delivery that somebody else has by then; the end of the lease does the same
	// without it.
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

// settle sends an acknowledgement, confirmed where the route asks for it. A
// message whose acknowledgement is not confirmed within the lease has lapsed:
// the server may deliver it again.
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

// confirm sends an acknowledgement until the server confirms it, at least once, and
// gives up when the lease is lost, the route is over, or ctx ends.
func (r *durableRoute) confirm(ctx context.Context, w *work, ack []byte) bool {
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for tried := false; (!tried || processTime() < w.ends.Load()) && !r.over.Load(); tried = true {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := r.env.api.nc.RequestWithContext(try, w.raw.Reply, ack)
		cancel()
		if err == nil {
			return true
		}
		if !pause.wait(ctx) {
			return false
		}
	}
	return false
}

// finish books what is done. The pool is locked.
func (r *durableRoute) finish(done []*work) pullRequest {
	now, ran := int64(0), 0
	for _, w := range done {
		now = max(now, w.ended)
		if w.ended != w.began { // else it was given up without a run
			r.learn(w.took())
			ran++
		}
		if w == r.isolated {
			r.isolated = nil
			if other := r.other(); other != nil {
				other.feed() // it may pull again
			}
		}
		if w.letter != nil && w.letter.held || w.copy != nil && w.copy.held {
			continue
		}
		r.book(w)
	}
	r.started = now
	r.window.done(now, ran)
	r.release(now)
	return r.plan(now)
}

// book ends the engine's part in w. The pool is locked.
func (r *durableRoute) book(w *work) {
	switch w.outcome {
	case OutcomeLapsed:
		if w.reason == handledLate {
			r.known.handle(w.ended, w.id)
		} else if w.began == w.ended {
			r.known.ranNothing(w.id)
		}
	case OutcomeReturned:
		r.known.ranNothing(w.id)
	case OutcomeSucceeded:
		if !w.confirmed {
			r.known.handle(w.ended, w.id)
		}
	default:
		if w.due > 0 {
			r.delayed.push(w.due)
		}
	}
	r.leases.remove(w)
	r.count(w)
	r.recycle(w)
}

// report is the route's counters as they are now.
func (r *durableRoute) report() RouteStats {
	st := r.route.report()
	if r.retries != nil {
		st.add(r.retries.report())
	}
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	st.Delayed += r.delayed.after(processTime())
	return st
}
