package natsx

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// idleAfter is after how long without a message a route waits with a bell.
	idleAfter = 2 * time.Second
	// bellStay is how long a bell waits at the server, and bellBeat how often the server
	// says that it still does.
	bellStay = 30 * time.Second
	bellBeat = 10 * time.Second
	// leastStay and mostStay bound how long a pull for messages waits at the server. A
	// pull cannot be taken back, so this is what a pause or a stop waits for.
	leastStay = 200 * time.Millisecond
	mostStay  = time.Second
	// heldFor is how long a message may wait for a worker before the route asks whether
	// others could run it.
	heldFor = 250 * time.Millisecond
	// lookEvery is how often a busy route looks at its consumer, and lookIdle an idle one.
	// Many routes look less often: each has a lookShare of the time to itself.
	lookEvery = 8 * time.Second
	lookIdle  = 15 * time.Second
	lookShare = 30 * time.Millisecond
	// lookSoon is the shortest time between two looks that something has caused.
	lookSoon = time.Second
	// trickleTurn is the time that what a route asks for ahead may take one worker, and
	// mostTrickle how many messages that is at most, while the server has none.
	trickleTurn = 5 * time.Millisecond
	mostTrickle = 8
	// planEvery is how many messages may come between two plans while more are on their
	// way: what comes takes the place of what was asked for.
	planEvery = 16
	// stopMoment is how long a stop lets what waits be started.
	stopMoment = 200 * time.Millisecond
	// servedSoon is how many pulls in a row nobody may serve before Health tells.
	servedSoon = 3
)

// demand is how many messages the route wants in hand or on their way beyond those that
// have come: as many as it gets workers for, and as many as it has proven to get done
// within a moment. The pool is locked.
func (r *durableRoute) demand(now int64) demand {
	p := r.env.pool
	d := demand{stay: min(max(time.Duration(now-r.openedAt)/2, leastStay), mostStay)}
	if r.letters.down || r.mover.full() || r.checks.suspended || r.isolating() {
		return d
	}
	waiting := r.lane.waiting()
	room := min(r.lane.free(), p.roomToPull(&r.lane))
	if !r.rang {
		room = min(room, max(p.size/max(p.lanes, 1), r.trickle()))
	}
	if room <= 0 && waiting == 0 && r.rang && r.running < p.share() && r.lane.free() > 0 {
		p.hunger(&r.lane)
	}
	room = max(room, 0)
	ahead := min(r.window.recent(now), deepest)
	if r.ackWait < time.Second {
		ahead = int(int64(ahead) * int64(r.ackWait) / int64(time.Second))
	}
	d.messages = room + ahead - waiting
	d.refill = max(ahead/2, min(r.puller.outstanding, room-1))
	idle := r.lane.inHand() == 0 && !r.rang
	switch {
	case idle && r.target.bells && (room == 0 || now-r.arrived > int64(idleAfter)):
		return demand{bell: true, stay: bellStay, heartbeat: bellBeat}
	case idle && room == 0:
		d.messages = 1 // nothing else would tell that there is one
	}
	return d
}

// trickle is how many messages a route asks for while the server has none, at the least:
// as many as one worker has proven to get done within a moment. A pull for each message
// costs more than what it brings, where many routes have few. The pool is locked.
func (r *durableRoute) trickle() int {
	if r.mean == 0 {
		return 1
	}
	return int(max(min(float64(trickleTurn)/r.mean, mostTrickle), 1))
}

// plan decides on the next pull and books it, and sets the alarm. The pool is locked.
func (r *durableRoute) plan(now int64) pullRequest {
	r.unplanned = 0
	next, _ := r.puller.next(now, r.demand(now))
	r.setAlarm(now)
	return next
}

// setAlarm has tick called when there is something to do though nothing happens. The
// pool is locked.
func (r *durableRoute) setAlarm(now int64) {
	at := r.alarmAt
	soonest := func(t int64) {
		if t != 0 && (at == 0 || t < at) {
			at = t
		}
	}
	soonest(r.puller.wake(now))
	soonest(r.leases.wake())
	if r.puller.starved {
		soonest(now + starvedPause)
	}
	if r.lane.waiting() > 0 {
		soonest(max(r.started, r.heldAt) + int64(heldFor))
	}
	if !r.stopped && (r.open || r.leases.head != nil) {
		soonest(r.checks.at(r.arrived))
	}
	if !r.open && !r.stopped && r.inactive > 0 {
		soonest(r.keptAlive + int64(r.inactive)/4)
	}
	if at != r.alarmAt {
		r.alarmAt = at
		r.env.agenda.set(&r.alarm, max(at, now))
	}
}

// feed is called when a worker is free: the pool is locked.
func (r *durableRoute) feed() {
	r.alarmAt = 1
	r.env.agenda.set(&r.alarm, 1)
}

// tick does what is due at a time.
func (r *durableRoute) tick(now int64) {
	p := r.env.pool
	p.mu.Lock()
	r.alarmAt = 0
	silent := r.puller.expire(now) && r.open
	due := r.leases.due(now, r.ackWait, nil)
	back := r.overheld(now)
	if !r.stopped && r.checks.due(now, r.arrived) {
		r.look(now, false)
	}
	r.release(now)
	if alive := r.keptAlive; !r.open && !r.stopped && r.inactive > 0 && now-alive >= int64(r.inactive)/4 {
		r.keptAlive = now
		defer r.ringOnce()
	}
	next := r.plan(now)
	p.mu.Unlock()
	r.send(next)
	r.env.keeper.renew(due)
	r.returnAll(back)
	if silent {
		r.env.link.check(r.env.closing, patienceFor(r.ackWaitNow()), r.env.log, r.env.spawn)
		r.verify(true, nil)
	}
}

func (r *durableRoute) ackWaitNow() time.Duration {
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	return r.ackWait
}

// overheld takes out of the queue what others could run: messages that wait while none
// of the route is finished, once it is known that another process asks for messages, and
// in any case after a lease. The pool is locked.
func (r *durableRoute) overheld(now int64) []*work {
	if r.lane.waiting() == 0 || now < max(r.started, r.heldAt)+int64(heldFor) {
		return nil
	}
	r.heldAt = now
	if r.puller.outstanding > 0 {
		return nil // what was given back would come again
	}
	if now-r.started < max(int64(r.ackWait), int64(time.Second)) && !r.checks.wanted {
		r.look(now, false)
		return nil
	}
	r.checks.wanted = false
	return r.takeBack()
}

// takeBack takes all that no worker has taken out of the route's hands, as deliveries
// that ran nothing. The pool is locked.
func (r *durableRoute) takeBack() []*work {
	p := r.env.pool
	all := func(*work) bool { return true }
	back := append(p.drop(&r.lane, &r.lane.first, all), p.drop(&r.lane, &r.lane.queue, all)...)
	for _, w := range back {
		r.takeOut(w)
	}
	return back
}

// takeOut takes a message out of the route's hands, as a delivery that ran nothing.
func (r *durableRoute) takeOut(w *work) {
	if w == r.isolated {
		r.isolated = nil
	}
	r.known.ranNothing(w.id)
	r.leases.remove(w)
}

// returnAll gives works back that were not started and are not in hand any more.
func (r *durableRoute) returnAll(back []*work) {
	if len(back) == 0 {
		return
	}
	all := back
	if r.mover != nil {
		back = r.mover.giveBack(back)
	}
	for _, w := range back {
		w.claim()
		if r.env.link.up() && processTime() < w.ends.Load() {
			r.env.acks.write(w.raw.Reply, ackNak(0))
		}
	}
	p := r.env.pool
	p.mu.Lock()
	for _, w := range all {
		r.recycle(w)
	}
	p.mu.Unlock()
}

// returnWaiting gives back what no worker has taken, at a stop.
func (r *durableRoute) returnWaiting() {
	p := r.env.pool
	p.mu.Lock()
	back := r.takeBack()
	for _, q := range []*fifo[*work]{&r.suspects, &r.doubtful} {
		for q.len() > 0 {
			w := q.pop()
			p.held--
			r.takeOut(w)
			back = append(back, w)
		}
	}
	p.checkQuiet()
	p.mu.Unlock()
	r.returnAll(back)
}

// hold keeps a message until the consumer was looked at. The pool is locked.
func (r *durableRoute) hold(w *work, now int64) {
	r.doubtful.push(w)
	r.env.pool.held++
	r.look(now, true)
}

// unhold passes on what was held. The pool is locked.
func (r *durableRoute) unhold(now int64) {
	for r.doubtful.len() > 0 {
		r.env.pool.held--
		r.enqueue(r.doubtful.pop(), &r.lane.first, now)
	}
}

// send sends a planned pull. A failure to send is found by its missing end.
func (r *durableRoute) send(next pullRequest) {
	// A pull that waited for a reconnect would come on top of the new ones.
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

// learn updates the mean handler time, fast upwards and slowly downwards, and with it
// how many messages a worker takes at once. The pool is locked.
func (r *durableRoute) learn(took time.Duration) {
	switch ns := float64(took); {
	case r.mean == 0:
		r.mean = ns
	case ns > r.mean:
		r.mean += (ns - r.mean) / 4
	default:
		r.mean += (ns - r.mean) / 32
	}
	r.burst = int(min(float64(burstTurn)/2/max(r.mean, 1), maxBurst))
}

// status takes a pull status message.
func (r *durableRoute) status(s pullStatus, now int64) {
	p := r.env.pool
	p.mu.Lock()
	event := r.puller.status(now, s)
	if event == pullRang {
		r.rang = true
	} else if s.kind == statusEnded && s.left > 0 {
		r.rang = false
	}
	r.release(now)
	next := r.plan(now)
	unserved := r.puller.unserved
	bad := event == pullRefused || event == pullMoved && unserved > servedSoon
	well := r.pullsFail && event == pullGoesOn && s.kind != statusHeartbeat
	r.pullsFail = (r.pullsFail || bad) && !well
	if event == pullMoved && unserved == 1 {
		r.known.doubt(now, r.ackWait) // a leader that changes may lose what it was sent
	}
	p.mu.Unlock()
	r.send(next)
	if bad || well {
		r.troubleIf(bad, "pull", &pullError{s.code, s.text})
	}
	switch event {
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

// ringOnce sends a bell that nobody listens to: it keeps a server from removing the
// consumer of a paused route, where that has an inactive threshold, and takes nothing.
func (r *durableRoute) ringOnce() {
	if r.env.link.up() {
		r.env.api.nc.PublishRequest(r.target.nextSubject, r.env.api.nc.NewInbox(), pullRequest{batch: 1, maxBytes: 1, expires: time.Second}.body())
	}
}

// awaitPulls lets the pulls for messages be served or end, since the server would count
// a delivery that finds no subscription. They stay for mostStay at the longest.
func (r *durableRoute) awaitPulls(ctx context.Context) {
	p := r.env.pool
	for r.env.link.is() == nats.CONNECTED {
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
	if r.lane.inHand() == 0 {
		r.started = now
	}
	r.env.pool.queue(&r.lane, q, w)
}

// release lets the next suspect run once nothing else of the route is in hand. The pool
// is locked.
func (r *durableRoute) release(now int64) {
	for _, r := range []*durableRoute{r, r.other()} {
		if r == nil || r.suspects.len() == 0 || !r.empty() || !r.other().empty() {
			continue
		}
		r.isolated = r.suspects.pop()
		r.env.pool.held--
		r.enqueue(r.isolated, &r.lane.first, now)
	}
}

// isolating reports whether nothing may be pulled for the sake of a suspect, and empty
// whether nothing is in hand or on its way but suspects that wait. The pool is locked.
func (r *durableRoute) isolating() bool {
	other := r.other()
	return r.suspects.len() > 0 || r.isolated != nil || other != nil && (other.suspects.len() > 0 || other.isolated != nil)
}

func (r *durableRoute) empty() bool {
	return r == nil || r.isolated == nil && r.lane.inHand() == 0 && r.puller.outstanding == 0
}
