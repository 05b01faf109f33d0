package natsx

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// idleAfter is how long a route without messages waits before its pulls are idle.
	idleAfter = 2 * time.Second
	// idleStay is how long an idle pull waits at the server, and idleHeartbeat its idle
	// heartbeat.
	idleStay      = 30 * time.Second
	idleHeartbeat = 10 * time.Second
	// leastStay and mostStay bound how long a real pull waits at the server. A pull
	// cannot be cancelled, so a pause or a stop waits for its end. A quarter of the lease
	// bounds it too: a lease is counted from the pull where the message may have been long
	// in transit.
	leastStay = 200 * time.Millisecond
	mostStay  = time.Second
	// heldFor is how long a message may wait for a worker before the route checks whether
	// another process could run it.
	heldFor = 250 * time.Millisecond
	// checkBusyEvery is how often a busy route checks its consumer, and checkIdleEvery an
	// idle one. With many routes it is less often: one check per checkShare in all.
	checkBusyEvery = 8 * time.Second
	checkIdleEvery = 15 * time.Second
	checkShare     = 30 * time.Millisecond
	// minCheckGap is the shortest time between two checks that an event has caused.
	minCheckGap = time.Second
	// While the server has no messages, a route asks for as many as one worker handles in
	// trickleTurn, at most mostTrickle.
	trickleTurn = 5 * time.Millisecond
	mostTrickle = 8
	// planEvery is how many messages may arrive between two plans while more are in
	// transit.
	planEvery = 16
	// stopMoment is how long a stop still starts messages that wait.
	stopMoment = 200 * time.Millisecond
	// servedSoon is how many pulls in a row may go unserved before Health reports it.
	servedSoon = 3
)

// demand is how many messages the route wants in transit: as many as it can get workers
// for, plus as many as it has handled within the last moment, less those that wait. The
// pool is locked.
func (r *durableRoute) demand(now int64) demand {
	p := r.env.pool
	d := demand{stay: min(max(time.Duration(now-r.openedAt)/2, leastStay), mostStay, r.ackWait/4)}
	if r.letters.active || r.mover.full() || r.checks.suspended || r.isolating() || r.other().isolating() {
		return d
	}
	mayHold := -1
	if r.breaker != nil {
		if _, mayHold = r.breaker.now(now); r.order != nil && r.order.unsure {
			mayHold = -1 // nothing starts before the doubt is over
		} else if mayHold == 0 {
			return d
		}
	}
	waiting := r.waitingMessages()
	room := min(r.lane.free(), p.roomToPull(&r.lane))
	if !r.pending {
		room = min(room, max(p.size/max(p.lanes, 1), r.trickle()))
	}
	if room <= 0 && waiting == 0 && r.pending && r.running < p.share() && r.lane.running < r.lane.limit {
		p.waitForWorker(&r.lane)
	}
	room = max(room, 0)
	each := 1 // messages of a start
	if r.batch != nil {
		each = r.batch.most
		room = min(room*each, max(deepest, each))
	}
	ahead := min(r.window.recent(now), deepest)
	if r.ackWait < time.Second {
		ahead = int(int64(ahead) * int64(r.ackWait) / int64(time.Second))
	}
	d.messages = room + ahead - waiting
	d.refill = max(ahead/2, min(r.puller.outstanding, room-1))
	idle := r.inHand() == 0 && !r.pending
	switch {
	case idle && r.target.canIdle && (room == 0 || now-r.arrived > int64(idleAfter)):
		return demand{idle: true, stay: idleStay, heartbeat: idleHeartbeat}
	case idle && room == 0:
		d.messages = 1 // without a pull the route would not learn of a message
	}
	if r.rate != nil {
		most := r.rate.soon(now)*each - waiting
		d.refill = min(d.refill, int(r.rate.most)/4)
		if d.messages > most && most-r.puller.outstanding < max(d.refill, 1) {
			d.again = r.rate.reach(now, (waiting+r.puller.outstanding+max(d.refill, 1)-1)/each+1)
		}
		d.messages = min(d.messages, most)
	}
	if r.order != nil {
		d = r.order.limit(now, d, r.leases.count, r.puller.size, r.puller.pin != "")
	}
	if mayHold > 0 {
		d.messages, d.refill = min(d.messages, mayHold-r.waitingMessages()), 0
	}
	return d
}

// trickle is the least number of messages that a route asks for while the server has
// none. Where many routes have few messages, a pull for each message costs too much. The
// pool is locked.
func (r *durableRoute) trickle() int {
	if r.mean == 0 {
		return 1
	}
	return int(max(min(float64(trickleTurn)/r.mean, mostTrickle), 1))
}

// plan returns the next pull, already booked, and sets the alarm. The pool is locked.
func (r *durableRoute) plan(now int64) pullRequest {
	r.unplanned = 0
	d := r.demand(now)
	next, ok := r.puller.next(now, d)
	if ok && r.order != nil && r.order.unsure {
		r.order.missing = 0
	}
	r.more = d.again
	if !ok && r.keepsPin() {
		next, _ = r.puller.keepPin(now)
	}
	r.setAlarm(now)
	return next
}

// keepsPin reports whether the route still needs its pin: it is open or has messages in
// hand. The pool is locked.
func (r *durableRoute) keepsPin() bool { return r.open || r.leases.head != nil }

// setAlarm schedules tick for when the next time limit ends. The pool is locked.
func (r *durableRoute) setAlarm(now int64) {
	at := r.alarmAt
	soonest := func(t int64) {
		if t != 0 && (at == 0 || t < at) {
			at = t
		}
	}
	soonest(r.puller.wake(now))
	soonest(r.leases.wake())
	if r.keepsPin() {
		soonest(r.puller.pinDue())
	}
	if r.puller.starved {
		soonest(now + starvedPause)
	}
	if r.batch != nil {
		soonest(r.batch.wake())
	}
	if r.order != nil {
		soonest(r.order.wake())
	}
	if r.lane.waiting() > 0 {
		soonest(max(r.started, r.heldAt) + int64(heldFor))
	}
	if !r.stopped && (r.open || r.leases.head != nil) {
		soonest(r.checks.at(r.arrived))
	}
	if r.open {
		soonest(r.more)
		if r.breaker != nil {
			soonest(r.breaker.wake(now))
		}
	}
	if r.needsKeepAlive() {
		soonest(r.keptAlive + int64(r.inactive)/4)
	}
	if r.behind && at != 0 {
		at = max(at, now+int64(time.Millisecond))
	}
	if at != r.alarmAt {
		r.alarmAt = at
		r.env.agenda.set(&r.alarm, max(at, now))
	}
}

// workerFree lets the route plan a pull soon. The pool is locked.
func (r *durableRoute) workerFree() {
	r.alarmAt = 1
	r.env.agenda.set(&r.alarm, 1)
}

// tick handles the time limits that have ended.
func (r *durableRoute) tick(now int64) {
	p := r.env.pool
	p.mu.Lock()
	r.alarmAt = 0
	// What waits in the subscription came before now: it may be what a pull has delivered.
	r.behind = r.queued()
	silent := !r.behind && r.puller.expire(now) && r.open
	due := r.leases.due(now, r.ackWait, nil)
	if r.batch != nil && r.batch.wake() != 0 && r.batch.wake() <= now {
		r.queueBatch(now)
	}
	back := r.unserved(now)
	if r.order != nil {
		for _, w := range r.order.rested(now) {
			p.held--
			r.leases.remove(w)
			back = append(back, w)
		}
	}
	if !r.stopped && r.checks.due(now, r.arrived) {
		r.requestCheck(now, false)
	}
	r.release(now)
	if r.needsKeepAlive() && now-r.keptAlive >= int64(r.inactive)/4 {
		r.keptAlive = now
		defer r.keepAlive()
	}
	next := r.plan(now)
	p.mu.Unlock()
	r.send(next)
	r.env.keeper.renew(due)
	if r.mover != nil && len(back) > 0 {
		r.env.spawn(func() { r.giveBackAll(back) }) // which waits for answers
	} else {
		r.giveBackAll(back)
	}
	if silent {
		r.env.link.check(r.env.closing, patienceFor(r.ackWaitNow()), r.env.log, r.env.spawn)
		r.verify(true, nil)
	}
}

// queued reports whether something from the server waits for the subscription's callback.
// The pool is locked.
func (r *durableRoute) queued() bool {
	if r.sub == nil {
		return false
	}
	n, _, err := r.sub.Pending()
	return err == nil && n > 0
}

func (r *durableRoute) ackWaitNow() time.Duration {
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	return r.ackWait
}

// unserved removes from the queue what another process could run: messages that wait
// while the route finishes none. It does so once it is known that another process pulls,
// and in any case after a lease. The pool is locked.
func (r *durableRoute) unserved(now int64) []*work {
	if r.lane.waiting() == 0 || now < max(r.started, r.heldAt)+int64(heldFor) {
		return nil
	}
	r.heldAt = now
	if r.puller.outstanding > 0 || r.puller.pin != "" {
		return nil // the server would deliver it here again
	}
	if now-r.started < max(int64(r.ackWait), int64(time.Second)) && !r.checks.othersPull {
		r.requestCheck(now, false)
		return nil
	}
	r.checks.othersPull = false
	return r.takeWaiting()
}

// takeWaiting removes all messages that no worker has taken, as deliveries that ran
// nothing. The pool is locked.
func (r *durableRoute) takeWaiting() []*work {
	var back []*work
	if r.order != nil {
		r.doubtOrder(processTime()) // they come back in any order
		back = r.order.takeAll()
		r.env.pool.held -= len(back)
	} else {
		back = r.unqueue()
	}
	if r.batch != nil {
		back = r.unbatch(back)
	}
	for _, w := range back {
		if w.rests { // it has run
			r.leases.remove(w)
		} else {
			r.removeUnrun(w)
		}
	}
	return back
}

// unqueue removes all works that no worker has taken from the pool. The pool is locked.
func (r *durableRoute) unqueue() []*work {
	p := r.env.pool
	all := func(*work) bool { return true }
	return append(p.drop(&r.lane, &r.lane.first, all), p.drop(&r.lane, &r.lane.queue, all)...)
}

// watchOrder follows the order of deliveries: this one has a consumer sequence, and may be
// the first to a newly pinned client. The pool is locked.
func (r *durableRoute) watchOrder(seq uint64, pinned bool, now int64) {
	if pinned && len(r.order.retries) > 0 {
		r.doubtOrder(now) // others may have had what was given back
		r.order.forgetRetries()
	}
	if r.order.arrived(seq) {
		r.doubtOrder(now)
	}
	if r.order.unsure && pinned {
		r.requestCheck(now, true)
	}
}

// doubtOrder starts nothing any more until the order is known again. The pool is locked.
func (r *durableRoute) doubtOrder(now int64) {
	if r.order.unsure {
		return
	}
	p := r.env.pool
	p.held += r.lane.waiting()
	unstarted := r.unqueue()
	for r.suspects.len() > 0 {
		unstarted = append(unstarted, r.suspects.pop())
	}
	if slices.Contains(unstarted, r.isolated) {
		r.isolated = nil
	}
	r.order.doubt(now, unstarted)
	r.requestCheck(now, true)
}

// orderIsStill reports whether nothing of a route in doubt of its order is on its way to
// or from the server. The pool is locked.
func (r *durableRoute) orderIsStill() bool {
	return r.order != nil && r.order.unsure && r.puller.pin != "" &&
		r.lane.inHand() == 0 && r.puller.outstanding == 0 && !r.letters.active
}

// orderStalls reports whether the order is in doubt for longer than leases last. The pool is
// locked.
func (r *durableRoute) orderStalls(now int64) bool {
	return r.order != nil && r.order.unsure && r.puller.pin != "" && now-r.order.since > 4*max(int64(r.ackWait), int64(time.Second))
}

// judgeOrder ends the doubt in the order when all unsettled messages are in hand, given
// what the server said while the route was still. The pool is locked.
func (r *durableRoute) judgeOrder(info *jetstream.ConsumerInfo, still bool, now int64) {
	s := r.order
	if s == nil {
		return
	}
	if !s.unsure {
		if ids := s.overdue(now - max(int64(r.ackWait), int64(5*time.Second))); len(ids) > 0 {
			r.env.spawn(func() { r.findGone(ids) })
		}
		return
	}
	if still && r.orderIsStill() {
		s.missing = max(info.NumAckPending-r.leases.count-len(s.retries), 0)
		if s.missing == 0 {
			held := s.sure()
			r.env.pool.held -= len(held)
			for _, w := range held {
				r.enqueue(w, &r.lane.queue, now)
			}
			return
		}
	}
	r.checks.soon = r.puller.pin != ""
}

// findGone lets the keys go on whose message was deleted while it waited for its retry.
func (r *durableRoute) findGone(ids []messageID) {
	for _, id := range ids {
		m, err := r.env.api.get(r.env.closing, r.target.stream, getRequest{Seq: id.seq})
		if err != nil {
			return
		}
		if m != nil && m.time.UnixNano() == id.time {
			continue
		}
		p := r.env.pool
		p.mu.Lock()
		if next := r.order.gone(id); next != nil {
			p.held--
			r.dispatch(next, &r.lane.first, processTime())
		}
		p.mu.Unlock()
		r.flow()
	}
}

// waitingMessages is how many messages no worker has taken, and inHand how many there
// are in all. The pool is locked.
func (r *durableRoute) waitingMessages() int {
	if r.batch != nil {
		return r.batch.waiting() + r.lane.first.len()
	}
	return r.lane.waiting()
}

func (r *durableRoute) inHand() int { return r.waitingMessages() + r.lane.taken }

// removeUnrun ends the lease of a message, as a delivery that ran nothing. The pool is
// locked.
func (r *durableRoute) removeUnrun(w *work) {
	if w == r.isolated {
		r.isolated = nil
	}
	r.history.ranNothing(w.id)
	r.leases.remove(w)
}

// giveBackAll gives back works that takeWaiting or removeUnrun has removed.
func (r *durableRoute) giveBackAll(back []*work) {
	if len(back) == 0 {
		return
	}
	left := back
	if r.mover != nil {
		left = r.mover.giveBack(back)
	}
	for _, w := range left {
		w.claim()
		if r.env.link.up() && processTime() < w.ends.Load() {
			r.env.acks.write(w.raw.Reply, ackNak(0))
		}
	}
	p := r.env.pool
	p.mu.Lock()
	for _, w := range back {
		r.recycle(w)
	}
	p.checkDrained()
	p.mu.Unlock()
}

// giveBackWaiting gives back, at a stop, all messages that no worker has taken.
func (r *durableRoute) giveBackWaiting() {
	p := r.env.pool
	p.mu.Lock()
	back := r.takeWaiting()
	for _, q := range []*fifo[*work]{&r.suspects, &r.doubtful} {
		for q.len() > 0 {
			w := q.pop()
			p.held--
			r.removeUnrun(w)
			back = append(back, w)
		}
	}
	p.checkDrained()
	p.mu.Unlock()
	r.giveBackAll(back)
}

// hold keeps a message until the consumer was checked. The pool is locked.
func (r *durableRoute) hold(w *work, now int64) {
	w.unchecked = true
	r.requestCheck(now, true)
	r.enqueue(w, &r.lane.first, now)
}

// releaseHeld queues the messages that were held. The pool is locked.
func (r *durableRoute) releaseHeld(now int64) {
	for r.doubtful.len() > 0 {
		w := r.doubtful.pop()
		w.unchecked = false
		r.env.pool.held--
		r.enqueue(w, &r.lane.first, now)
	}
}

// send sends a planned pull. If that fails, expire notices that its end is missing.
func (r *durableRoute) send(next pullRequest) {
	// Without a connection nats.go would buffer the pull, on top of those sent after the
	// reconnect.
	if next.batch == 0 || !r.env.link.up() {
		return
	}
	reply := *r.inbox.Load() + "." + utoa(next.token)
	if err := r.env.api.nc.PublishRequest(r.target.nextSubject, reply, next.body()); err != nil {
		r.env.log.Debug("natsx: pull not sent", r.names("error", err)...)
	}
}

func (r *durableRoute) flow() {
	p := r.env.pool
	p.mu.Lock()
	next := r.plan(processTime())
	p.mu.Unlock()
	r.send(next)
}

// learn updates the mean handler time, which rises fast and falls slowly, and from it how
// many messages a worker takes at once. The pool is locked.
func (r *durableRoute) learn(took time.Duration) {
	switch ns := float64(took); {
	case r.mean == 0:
		r.mean = ns
	case ns > r.mean:
		r.mean += (ns - r.mean) / 4
	default:
		r.mean += (ns - r.mean) / 32
	}
	if r.batch != nil || r.order != nil {
		return
	}
	r.burst = int(min(float64(burstTurn)/2/max(r.mean, 1), maxBurst))
}

// status handles a pull status message.
func (r *durableRoute) status(s pullStatus, now int64) {
	p := r.env.pool
	p.mu.Lock()
	event := r.puller.status(now, s)
	var back []*work
	if event == pullUnpinned && r.order != nil {
		back = r.takeWaiting() // the next one waits for it
		r.order.forgetRetries()
	}
	if event == pullWoken {
		r.pending = true
	} else if s.kind == statusEnded && s.left > 0 {
		r.pending = false
	}
	r.release(now)
	next := r.plan(now)
	unserved := r.puller.unserved
	bad := event == pullRefused || event == pullMoved && unserved > servedSoon
	well := r.pullsFail && event == pullGoesOn && s.kind != statusHeartbeat
	r.pullsFail = (r.pullsFail || bad) && !well
	if event == pullMoved && unserved == 1 {
		r.history.doubt(now, r.ackWait) // acks may be lost when the leader changes
	}
	p.mu.Unlock()
	r.send(next)
	r.giveBackAll(back)
	if bad || well {
		r.troubleIf(bad, "pull", &pullError{s.code, s.text})
	}
	switch event {
	case pullUnpinned:
		r.env.log.Info("natsx: route is no longer pinned, another process may receive the messages of the durable", r.names("group", r.spec.route.pinGroup())...)
	case pullRefused:
		r.verify(false, nil)
	case pullMoved:
		if unserved > 1 {
			r.verify(false, nil)
		}
	case pullGone:
		r.verify(true, ErrConsumerDeleted)
	case pullStreamGone:
		r.verify(true, ErrStreamDeleted)
	}
}

// needsKeepAlive reports whether no pull keeps the server from removing the consumer of
// this route after its inactive threshold: it is paused, or all its handlers are busy. The
// pool is locked.
func (r *durableRoute) needsKeepAlive() bool {
	return r.inactive > 0 && (!r.open || len(r.puller.pulls) == 0) && (!r.stopped || r.leases.head != nil)
}

// keepAlive sends an idle pull that no message fits.
func (r *durableRoute) keepAlive() {
	if r.env.link.up() {
		idle := pullRequest{batch: 1, maxBytes: 1, expires: time.Second, group: r.spec.route.pinGroup()}
		if idle.group != "" {
			idle.pin = "natsx" // else the server might pin this client
		}
		r.env.api.nc.PublishRequest(r.target.nextSubject, r.env.api.nc.NewInbox(), idle.body())
	}
}

// awaitPulls waits until the real pulls are served or have ended: the server would count
// a delivery after the route has unsubscribed. They stay for mostStay at most.
func (r *durableRoute) awaitPulls(ctx context.Context) {
	p := r.env.pool
	for r.env.link.state() == nats.CONNECTED {
		p.mu.Lock()
		now := processTime()
		until := r.puller.waitsUntil()
		done := r.puller.outstanding == 0 || now > until+int64(mostStay)
		p.mu.Unlock()
		if done || !wait(ctx, 2*time.Millisecond) {
			return
		}
	}
}

// enqueue hands w to the pool. The pool is locked.
func (r *durableRoute) enqueue(w *work, q *fifo[*work], now int64) {
	if r.order != nil && !r.order.admit(w) {
		r.env.pool.held++
		return
	}
	r.dispatch(w, q, now)
}

// dispatch queues a message that may run. The pool is locked.
func (r *durableRoute) dispatch(w *work, q *fifo[*work], now int64) {
	switch {
	case w.unchecked:
		r.doubtful.push(w)
		r.env.pool.held++
	case w.alone:
		r.suspects.push(w)
		r.env.pool.held++
		r.release(now)
	case r.batch != nil:
		r.gather(w, now)
	default:
		r.queueWork(w, q, now)
	}
}

func (r *durableRoute) queueWork(w *work, q *fifo[*work], now int64) {
	if r.lane.inHand() == 0 {
		r.started = now
	}
	r.env.pool.queue(&r.lane, q, w)
}

// release queues the next suspect if nothing else of the route is in hand. The pool is
// locked.
func (r *durableRoute) release(now int64) {
	for _, r := range []*durableRoute{r, r.other()} {
		if r == nil || r.suspects.len() == 0 || !r.empty() || !r.other().empty() {
			continue
		}
		r.isolated = r.suspects.pop()
		r.env.pool.held--
		r.queueWork(r.isolated, &r.lane.first, now)
	}
}

// isolating reports whether nothing may be pulled because of suspects. It may be called on
// nil. The pool is locked.
func (r *durableRoute) isolating() bool {
	return r != nil && (r.suspects.len() > 0 || r.isolated != nil)
}

// empty reports whether nothing is in hand or in transit except suspects that wait. It may
// be called on nil. The pool is locked.
func (r *durableRoute) empty() bool {
	return r == nil || r.isolated == nil && r.inHand() == 0 && r.puller.outstanding == 0
}

// gather adds a message to the next batch. The pool is locked.
func (r *durableRoute) gather(w *work, now int64) {
	b := r.batch
	if b.gathered.len() == 0 {
		b.since = now
	}
	b.gathered.push(w)
	r.env.pool.held++
	full := b.gathered.len() >= b.most
	if r.breaker != nil && !full {
		_, mayHold := r.breaker.now(now)
		full = mayHold > 0 // the one message that a half-open breaker tries
	}
	if full || r.stopped {
		r.queueBatch(now)
	} else if b.gathered.len() == 1 {
		r.setAlarm(now)
	}
}

// queueBatch queues the gathered messages as a batch. The pool is locked.
func (r *durableRoute) queueBatch(now int64) {
	b := r.batch
	batch := &work{members: b.take(r.env.pool, nil)}
	b.queued += len(batch.members)
	r.queueWork(batch, &r.lane.queue, now)
}

// unbatch replaces the batches among works by their messages, and adds the gathered ones.
// The pool is locked.
func (r *durableRoute) unbatch(works []*work) (all []*work) {
	b := r.batch
	for _, w := range works {
		if w.members == nil {
			all = append(all, w)
			continue
		}
		all = append(all, w.members...)
		b.queued -= len(w.members)
	}
	for b.gathered.len() > 0 {
		all = append(all, b.gathered.pop())
		r.env.pool.held--
	}
	return all
}

// brake accounts for a result and acts on a change of the breaker. It returns the delay of
// the message's redelivery if the result was no attempt, else 0.
func (r *durableRoute) brake(now int64, j judgement, err error, cut bool) (rest time.Duration) {
	b := r.breaker
	if b == nil {
		return 0
	}
	no, turned := b.judge(now, j.verdict, cut)
	switch turned {
	case BreakerOpen:
		r.giveBackNow(now)
		r.other().giveBackNow(now)
		r.own().trouble("breaker", failure(fmt.Sprintf("breaker is open: %d failures in a row, the last: %s", b.most, cause(err)), err))
	case BreakerClosed:
		r.own().clear("breaker")
		err = nil
		r.flow()
		if other := r.other(); other != nil {
			other.flow()
		}
	}
	for _, o := range r.env.observers {
		if o, ok := o.(BreakerObserver); ok && turned != BreakerNone {
			r.env.callUser(r.observing(), func() {
				o.ObserveBreaker(BreakerEvent{Route: r.named.route.filter, Durable: r.named.route.durable, State: turned, Err: err})
			})
		}
	}
	if no {
		return b.redeliverAfter()
	}
	return 0
}

// giveBackNow gives back all messages that no worker has taken. It may be called on nil.
func (r *durableRoute) giveBackNow(now int64) {
	if r == nil || r.order != nil { // others would not get what is ordered
		return
	}
	p := r.env.pool
	p.mu.Lock()
	back := r.takeWaiting()
	r.setAlarm(now)
	p.mu.Unlock()
	r.giveBackAll(back)
}
