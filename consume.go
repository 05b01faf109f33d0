package natsx

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Bounds of the pull loop.
const (
	// lookahead is how much work may wait locally, as time that the route needs
	// for it, at most; a fiftieth of the lease where that is less.
	lookahead = 100 * time.Millisecond
	// deepest is how many messages may wait locally, however fast the handler.
	deepest = 8192
	// pullExpires is how long a pull request stays at the server, at most.
	pullExpires = 30 * time.Second
	// briefPull is how long a pull stays while messages come. A pull cannot be
	// taken back, so this is what a pause waits for.
	briefPull = 200 * time.Millisecond
	// pullBytes bounds the bytes that one pull may bring.
	pullBytes = 64 << 20
	// lookEvery is how often the consumer is asked for while nothing comes.
	lookEvery = 30 * time.Second
	// pullPause is the pause after the server refused a pull.
	pullPause = time.Second
	// renewals is how often a lease is renewed within its length: this side, the
	// network and the server may together stand still for most of it.
	renewals = 4
)

// durableRoute consumes one route from a durable pull consumer.
//
// It asks for what workers can take now and, for a fast handler, for what they
// will have done a moment later (plan). Every message in hand holds a lease,
// which is the server's AckWait counted from its arrival; the engine's keeper
// renews it with in-progress acks, and what has lost it is neither started nor
// settled. Whatever casts doubt on the consumer (a reconnect, a missed
// heartbeat, a refused pull) stops the pulls and verifies it first.
type durableRoute struct {
	route
	target consumerTarget // stream, consumer and their creation; fixed once started
	from   *origin        // of its messages; fixed once started

	heartbeat time.Duration          // of the server while a pull waits
	inbox     atomic.Pointer[string] // pulls reply to inbox.<token>
	located   atomic.Bool            // target is complete
	heard     atomic.Int64           // engine time of the last word from the server
	gate      chan struct{}          // full while one of resume, pause and stop is at work; capacity 1

	// Guarded by the pool's mutex.
	open         bool   // the subscription receives
	pulling      bool   // pulls may be sent: open, verified and not held up
	stopped      bool   // for good
	notBefore    int64  // no pull before this engine time
	pulls        []pull // at the server
	outstanding  int    // messages asked for and not here yet
	single       bool   // the next pull is for one message, of any size
	tokens       uint64
	mean         float64 // of the handler's time in ns, leaning to the slow side
	arrived      int64   // engine time of the last message, or of the subscription
	finished     int64   // engine time of the last finish, or of the first arrival after a pause
	leases       leaseList
	delayed      timeHeap // when the retries given back by this process come due
	verifying    bool
	verifyAgain  bool
	pullsLost    bool  // with the next verification the pulls sent so far are gone
	doubts       int   // words of the server in a row that cast doubt on the consumer
	gone         error // what the last of them said of the consumer's end
	crowded      bool  // by all processes together, when last asked; see look
	asked        int64 // engine time of the last look at the consumer
	letters      letterBox
	letterTarget letterTarget

	mayNotTake atomic.Bool // letters of redriven messages; see takeLetter
}

// start opens the route for messages.
func (r *durableRoute) start() error {
	r.eng.pool.mu.Lock()
	r.stats.Stream = r.target.stream
	r.eng.pool.mu.Unlock()
	r.lease = r.target.ackWait
	r.from = &origin{r.target.stream, r.target.consumer, r.target.streamCreated}
	r.heartbeat = min(max(r.target.ackWait/6, 500*time.Millisecond), 5*time.Second)
	return r.begin(true)
}

// resume opens the route again after a pause.
func (r *durableRoute) resume() error { return r.begin(false) }

// begin subscribes and begins to pull, after a look at the consumer unless that
// is known; it does nothing when that was done.
func (r *durableRoute) begin(known bool) error {
	r.gate <- struct{}{}
	defer func() { <-r.gate }()
	p := r.eng.pool
	p.mu.Lock()
	done := r.open || r.stopped
	p.mu.Unlock()
	if done {
		return nil
	}
	inbox := r.eng.nc.NewInbox()
	r.inbox.Store(&inbox)
	if err := r.subscribe(inbox+".*", "", r.receive); err != nil {
		return err
	}
	p.mu.Lock()
	sub := r.sub
	p.mu.Unlock()
	// What may arrive is bounded by the pulls; a limit would only drop it.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	p.mu.Lock()
	if r.stopped { // meanwhile, by a drain that did not wait for the end of this
		p.mu.Unlock()
		return sub.Unsubscribe()
	}
	now := r.eng.now()
	r.open, r.pulling, r.arrived = true, known, now
	r.pulls, r.outstanding = r.pulls[:0], 0
	next := r.plan(now)
	p.mu.Unlock()
	r.pull(next)
	if !known {
		r.verify(true)
	}
	return nil
}

// pause ends the intake. Nothing that the server sent is lost or given back, unless
// ctx ends first.
func (r *durableRoute) pause(ctx context.Context) {
	select {
	case r.gate <- struct{}{}:
		defer func() { <-r.gate }()
	case <-ctx.Done(): // whoever is at work ends the intake too
		return
	}
	p := r.eng.pool
	p.mu.Lock()
	if !r.open {
		p.mu.Unlock()
		return
	}
	r.open, r.pulling = false, false
	p.mu.Unlock()
	r.awaitPulls(ctx)
	r.unsubscribe(ctx)
}

// awaitPulls lets the pulls be served or end, since the server would count a
// delivery that finds no subscription as an attempt. Only the pull of a route to
// which nothing came for long is not waited for: it is for one message.
func (r *durableRoute) awaitPulls(ctx context.Context) {
	const short, patience = 500 * time.Millisecond, 2 * time.Second
	p := r.eng.pool
	for end := r.eng.now() + int64(patience); r.eng.nc.IsConnected(); {
		now := r.eng.now()
		p.mu.Lock()
		done := r.outstanding == 0 || len(r.pulls) > 0 && r.pulls[0].expires-now > int64(short)
		p.mu.Unlock()
		if done || now > end || !wait(ctx, 2*time.Millisecond) {
			return
		}
	}
}

// stop is a pause for good.
func (r *durableRoute) stop(ctx context.Context) {
	p := r.eng.pool
	p.mu.Lock()
	r.stopped = true
	p.mu.Unlock()
	r.pause(ctx)
}

func (r *durableRoute) denied(e *PermissionError) bool {
	if !r.located.Load() {
		return false // whoever asks for something now hears of it
	}
	if e.Operation == "subscribe" {
		return strings.HasPrefix(e.Subject, r.eng.inboxPrefix)
	}
	return e.Subject == r.target.nextSubject || e.Subject == r.spec.route.dlq ||
		strings.HasPrefix(e.Subject, "$JS.ACK.") &&
			strings.Contains(e.Subject, "."+r.target.stream+"."+r.target.consumer+".")
}

// receive is the subscription's callback.
func (r *durableRoute) receive(m *nats.Msg) {
	now := r.eng.now()
	r.heard.Store(now)
	p := r.eng.pool
	// A message of the stream has an ack subject for its reply, a word of the
	// server has none: headers prove nothing, since publishers write them.
	if m.Reply == "" {
		r.status(m, now)
		return
	}
	info, ok := parseDelivery(m.Reply)
	if !ok || info.stream != r.target.stream || info.consumer != r.target.consumer {
		r.log.Warn("natsx: message on the route's inbox is not from its consumer", "reply", m.Reply)
		return
	}
	d := &delivery{
		Context: r.eng.handlers,
		route:   &r.route,
		raw:     m,
		msg: Msg{
			Subject: m.Subject, Data: m.Data, Header: m.Header,
			reply: m.Reply, from: r.from, seq: info.sequence, attempt: info.delivered, time: info.time,
		},
	}
	lease := int64(r.target.ackWait)
	arrived := now
	if r.slept(now) {
		arrived = r.eng.awake.Load()
		r.verify(false)
	}
	// The server counts from a moment before the arrival; the tenth is for that.
	d.lease.Store(arrived + lease - lease/10)
	d.renew = now + lease/renewals

	p.mu.Lock()
	r.stats.Received++
	r.doubts, r.gone, r.crowded = 0, nil, false
	if r.outstanding--; r.outstanding <= 0 {
		r.outstanding = 0
		r.pulls = r.pulls[:0]
	}
	r.arrived = now
	r.leases.push(d)
	if r.running == 0 && r.queue.len() == 0 {
		r.finished = now
	}
	p.put(&r.lane, d)
	next := r.plan(now)
	p.mu.Unlock()
	r.pull(next)
}

// slept tells whether the process may have been stopped for so long, and so
// lately, that what arrives now has waited for it.
func (r *durableRoute) slept(now int64) bool {
	return now-r.eng.awake.Load() > int64(r.target.ackWait)/2
}

// run handles one delivery on a worker.
func (r *durableRoute) run(d *delivery) {
	now := r.eng.now()
	d.began, d.ended = now, now
	if now >= d.lease.Load() {
		r.lapse(d)
		return
	}
	if len(d.msg.Header) > 0 && r.passOver(d) {
		return
	}
	if n := r.spec.route.attempts(); n > 0 && d.msg.Attempt() > n {
		r.conclude(d, errCrashed)
		return
	}
	if r.spec.route.dlq != "" {
		d.msg.Header = maps.Clone(d.msg.Header)
	}
	r.attempt(d, r.spec.route.timeout)
}

// passOver settles what is in the stream and is no message for this route. It is
// not counted as an attempt.
func (r *durableRoute) passOver(d *delivery) bool {
	if d.msg.Header[HeaderRedriveTo] != nil && r.redriven(d) {
		return true
	}
	if !r.isSchedule(d) {
		return false
	}
	if r.target.config.Retention == jetstream.LimitsPolicy {
		r.settle(d, ackAck)
	} else {
		// Acknowledged it would be deleted, and never come due.
		r.settle(d, ackNak(untilDue(d.msg.Header.Get(headerSchedule))))
	}
	return true
}

// isSchedule tells whether d is a message that the server keeps to publish later
// (ADR-51). Only a stream with AllowMsgSchedules has schedules, and it refuses
// what looks like one and is none; elsewhere the header means nothing.
func (r *durableRoute) isSchedule(d *delivery) bool {
	c := r.target.config
	return c != nil && c.AllowMsgSchedules && len(d.msg.Header[headerSchedule]) > 0
}

const headerSchedule = "Nats-Schedule"

// untilDue is how long a schedule stays, with a moment for the server to remove
// it. Of a repeated one it is a guess.
func untilDue(schedule string) time.Duration {
	at, err := time.Parse(time.RFC3339Nano, strings.TrimPrefix(schedule, "@at "))
	if err != nil {
		return time.Minute
	}
	return max(time.Until(at), 0) + 5*time.Second
}

func (r *durableRoute) lapse(d *delivery) {
	d.outcome = Lapsed
	r.log.Warn("natsx: lease lost, message left to its next delivery", r.about(d)...)
}

// conclude settles an attempt.
func (r *durableRoute) conclude(d *delivery, err error) {
	d.err = err
	if d.ended >= d.lease.Load() {
		r.lapse(d)
		r.observe(d)
		return
	}
	s := decide(r.spec.route, d.msg.Attempt(), err, rand.Float64())
	d.outcome = s.outcome
	switch s.action {
	case actAck:
		r.ack(d)
	case actNak:
		r.log.Warn("natsx: attempt failed", append(r.about(d), "error", err, "retry_in", s.delay)...)
		r.giveBack(d, s.delay)
	case actTerm:
		switch {
		case s.outcome == Discarded:
			r.log.Info("natsx: message discarded", append(r.about(d), "error", err)...)
			r.settle(d, ackTerm("discarded"))
		case r.target.keepsTerminated():
			r.log.Error("natsx: message is dead and the route has no DLQ", append(r.about(d), "reason", s.reason, "error", err)...)
			r.settle(d, ackTerm(string(s.reason)))
		default:
			r.log.Error("natsx: message is dead, the route has no DLQ, and its stream would delete it: it stays unsettled",
				append(r.about(d), "reason", s.reason, "error", err)...)
			r.giveBack(d, unsettledRest)
		}
	case actBury:
		if !r.bury(d, s.reason) {
			return // whoever moves the letter concludes
		}
	}
	r.observe(d)
}

// giveBack has the server deliver d again after a delay.
func (r *durableRoute) giveBack(d *delivery, delay time.Duration) {
	d.due = d.ended + int64(delay)
	// A nak that is sent after a reconnect, or again after the delay, may hit a
	// delivery that somebody else has by then; the end of the lease does the same
	// without it.
	if !r.eng.nc.IsConnected() {
		return
	}
	d.claim()
	d.lease.Store(min(d.lease.Load(), d.due))
	r.settle(d, ackNak(delay))
}

func (r *durableRoute) ack(d *delivery) {
	if r.spec.route.set&optConfirmAcks != 0 {
		r.settle(d, ackAck)
		return
	}
	d.claim()
	r.eng.acks.push(d.msg.reply)
}

// settle sends an acknowledgement, confirmed where the route asks for it. A
// message whose acknowledgement is not confirmed within the lease has lapsed:
// the server may deliver it again.
func (r *durableRoute) settle(d *delivery, ack []byte) {
	d.claim()
	if r.spec.route.set&optConfirmAcks != 0 {
		if !r.confirm(r.eng.closing, d, ack) {
			r.lapse(d)
		}
		return
	}
	if err := r.eng.nc.Publish(d.msg.reply, ack); err != nil {
		r.log.Warn("natsx: acknowledgement not sent", append(r.about(d), "error", err)...)
	}
	r.eng.said()
}

// confirm sends an acknowledgement until the server confirms it, at least once, and
// gives up when the lease is lost, the route is over, or ctx ends.
func (r *durableRoute) confirm(ctx context.Context, d *delivery, ack []byte) bool {
	for pause, tried := 50*time.Millisecond, false; (!tried || r.eng.now() < d.lease.Load()) && !r.over.Load(); pause, tried = min(2*pause, time.Second), true {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := r.eng.nc.RequestWithContext(try, d.msg.reply, ack)
		cancel()
		if err == nil {
			return true
		}
		if !wait(ctx, pause) {
			return false
		}
	}
	return false
}

// finish books a delivery whose worker is done with it. The pool is locked.
func (r *durableRoute) finish(d *delivery) pull {
	r.finished = d.ended
	if d.ended != d.began { // else it was given up without a run
		r.learn(d.took())
	}
	if !d.held {
		if d.due > 0 {
			r.delayed.push(d.due)
		}
		r.leases.remove(d)
		r.count(d)
	}
	return r.plan(d.ended)
}

// learn updates the mean handler time, fast upwards and slowly downwards: pulling
// too little costs a little, holding too much keeps messages from other replicas.
func (r *durableRoute) learn(took time.Duration) {
	switch ns := float64(took); {
	case r.mean == 0:
		r.mean = ns
	case ns > r.mean:
		r.mean += (ns - r.mean) / 4
	default:
		r.mean += (ns - r.mean) / 32
	}
}

// tick is the keeper's visit: it expires pulls without a word, misses
// heartbeats and plans anew. It returns what is due for a renewal.
func (r *durableRoute) tick(now int64, due []*delivery) []*delivery {
	p := r.eng.pool
	p.mu.Lock()
	due = r.leases.due(now, int64(r.target.ackWait)/renewals, due)
	crowded := r.crowded || 10*r.delayed.after(now) >= 9*r.target.maxAckPending
	for i := 0; i < len(r.pulls); {
		if r.pulls[i].expires+int64(2*r.heartbeat) < now {
			r.ended(r.pulls[i].token, 0)
			continue
		}
		i++
	}
	// Of handlers that hang, before they return. While none has returned, nothing is
	// known, and least of all that they are as fast as the first has been running.
	if since := now - r.finished; r.running > 0 && r.mean > 0 && float64(since) > r.mean {
		r.learn(time.Duration(since))
	}
	silent := false
	if r.pulling && len(r.pulls) > 0 {
		silent = now-max(r.heard.Load(), r.pulls[0].sent) > 2*int64(r.heartbeat)
	}
	unrefused := now > r.notBefore+int64(10*pullPause)
	stuck := r.open && !r.pulling && !r.verifying // nobody heard that the connection is back
	if r.pulling && now-max(r.arrived, r.asked) > int64(lookEvery) {
		r.asked = now
		r.eng.background.Go(r.look)
	}
	next := r.plan(now)
	p.mu.Unlock()
	r.pull(next)
	if crowded {
		r.trouble("retries", errCrowded)
	} else {
		r.clear("retries")
	}
	if unrefused {
		r.clear("pull")
	}
	if silent || stuck && r.eng.nc.IsConnected() {
		r.verify(true)
	}
	return due
}

// look asks for the consumer of a route to which nothing comes.
func (r *durableRoute) look() {
	ctx, cancel := context.WithTimeout(r.eng.intake, apiTimeout)
	defer cancel()
	if info, err := r.consumerInfoOnce(ctx); err == nil {
		r.inform(info)
	}
}

// inform takes what the server tells of the consumer as it is now.
func (r *durableRoute) inform(info *jetstream.ConsumerInfo) {
	p := r.eng.pool
	p.mu.Lock()
	r.crowded = info.NumPending > 0 && info.NumAckPending >= r.target.maxAckPending
	p.mu.Unlock()
	if n := info.Config.MaxDeliver; n > 0 {
		r.trouble("maxDeliver", fmt.Errorf("natsx: somebody set the consumer's MaxDeliver to %d: the server then gives up on messages", n))
	} else {
		r.clear("maxDeliver")
	}
}
