package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// coreQueue is how many messages of a core route may wait for a worker. The rest
	// waits in the subscription, up to its pending limits.
	coreQueue = 1024
	// waitingRequestsPerHandler is how many requests may wait for each handler that a
	// reply route may run at once, and minWaitingRequests how many may wait in any case.
	// Further ones are answered with code 503 at once. RouteBuilder.Reply documents both.
	waitingRequestsPerHandler = 16
	minWaitingRequests        = 128
)

var (
	errBusy         = Fail(http.StatusServiceUnavailable, "service is busy")
	errShuttingDown = Fail(http.StatusServiceUnavailable, "service is shutting down")
	// errGone is a request whose requester no longer waits.
	errGone = fmt.Errorf("natsx: the requester's deadline passed before a worker was free: %w", context.DeadlineExceeded)
	// errLate is a result that came after the request had been answered with a timeout.
	errLate = fmt.Errorf("natsx: responder returned too late: %w", context.DeadlineExceeded)
)

// coreRoute consumes one route from a core NATS subscription: messages, or requests
// when it has a responder.
type coreRoute struct {
	route

	// Guarded by the pool's mutex.
	full      bool          // the callback waits for room
	room      chan struct{} // notified when there is room again; capacity 1
	dropped   uint64        // by the client as a slow consumer, at the last check
	lastError error         // of a request
	open      leases        // requests that wait or run, in the order of their arrival
	free      []*work       // of messages, for reuse
	mean      float64       // handler time in ns

	alarm alarm // for the check of dropped messages
}

func newCoreRoute(e *env, spec Spec) *coreRoute {
	r := &coreRoute{room: make(chan struct{}, 1)}
	r.init(e, spec, r)
	r.alarm.ring = r.tick
	return r
}

// receive is the subscription's callback. It blocks while coreQueue messages wait, so
// that further ones wait in the subscription.
func (r *coreRoute) receive(m *nats.Msg) {
	if r.isReply() {
		q := &request{delivery: delivery{msg: Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, from: r.from, reply: m}}}
		r.admit(q, m)
		return
	}
	d := &delivery{msg: Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, from: r.from, reply: m}}
	arrived := r.arrival()
	p := r.env.pool
	p.mu.Lock()
	r.stats.Received++
	for r.lane.waiting() >= coreQueue && !p.closed {
		r.full = true
		p.mu.Unlock()
		<-r.room
		p.mu.Lock()
	}
	p.put(&r.lane, r.newWork(d, m, arrived))
	p.mu.Unlock()
}

// newWork returns a work for a delivery. The pool is locked.
func (r *coreRoute) newWork(d *delivery, m *nats.Msg, arrived int64) *work {
	var w *work
	if n := len(r.free); n > 0 {
		w, r.free = r.free[n-1], r.free[:n-1]
	} else {
		w = &work{}
	}
	w.delivery, w.raw = d, m
	w.arrived = arrived
	d.work = w
	return w
}

// recycle has w used again. Nobody else may hold it; once the pool is closed abandon may.
// The pool is locked.
func (r *coreRoute) recycle(w *work) {
	if r.env.pool.closed {
		return
	}
	w.delivery.work = nil
	w.delivery, w.raw, w.timed, w.err, w.answer, w.outcome, w.reason = nil, nil, nil, nil, nil, "", ""
	w.began, w.ended, w.due = 0, 0, 0
	w.answered.Store(false)
	if len(r.free) < coreQueue {
		r.free = append(r.free, w)
	}
}

// arrival is the time for those who observe it, and else 0: the clock is not free.
func (r *coreRoute) arrival() int64 {
	if len(r.env.observers) == 0 {
		return 0
	}
	return processTime()
}

// admit queues a request, or refuses it while too many wait.
func (r *coreRoute) admit(q *request, m *nats.Msg) {
	due, arrived := int64(0), r.arrival()
	if patience, ok := requestTimeout(m); ok {
		due = processTime() + int64(min(patience, math.MaxInt64/2))
	}
	p := r.env.pool
	var refusal error
	p.mu.Lock()
	r.stats.Received++
	w := r.newWork(&q.delivery, m, arrived)
	w.timed, w.due = &q.timed, due
	switch {
	case p.closed:
		refusal = errShuttingDown
	case r.lane.waiting() >= max(minWaitingRequests, waitingRequestsPerHandler*r.limit):
		refusal = errBusy
	default:
		r.open.append(w)
		p.put(&r.lane, w)
	}
	p.mu.Unlock()
	if refusal != nil {
		r.refuse(w, refusal)
	}
}

// refuse answers a request that no worker takes, and books it.
func (r *coreRoute) refuse(w *work, err error) {
	r.conclude(w, err)
	r.env.pool.mu.Lock()
	r.book(w)
	r.env.pool.mu.Unlock()
}

// giveUp refuses the requests that wait, after the pool was closed.
func (r *coreRoute) giveUp() {
	p := r.env.pool
	p.mu.Lock()
	r.makeRoom()
	var rest []*work
	if r.isReply() {
		rest = p.drop(&r.lane, &r.lane.queue, func(*work) bool { return true })
		for _, w := range rest {
			r.open.unlist(w)
		}
	}
	p.mu.Unlock()
	for _, w := range rest {
		r.refuse(w, errShuttingDown)
	}
}

// abandon answers the requests whose responders have not returned.
func (r *coreRoute) abandon() {
	p := r.env.pool
	p.mu.Lock()
	var rest []*work
	for w := r.open.head; w != nil; w = w.next {
		rest = append(rest, w)
	}
	p.mu.Unlock()
	for _, w := range rest {
		r.respondFor(w, errShuttingDown)
	}
}

func (r *coreRoute) isReply() bool { return r.spec.kind == kindReply }

// run handles one message on a worker.
func (r *coreRoute) run(w *work) {
	timeout := r.spec.route.timeout
	if !r.isReply() {
		attempt(r.owner, r.handler, w, timeout)
		return
	}
	patience := timeout
	if w.due > 0 {
		if patience = time.Duration(w.due - w.began); patience <= 0 {
			r.conclude(w, errGone)
			return
		}
	}
	if timeout == 0 || patience < timeout {
		// The requester gives up first, so no answer is needed at the timeout.
		attempt(r.owner, r.handler, w, patience)
		return
	}
	// The requester is answered at the timeout, even if the responder ignores its
	// context.
	answered := make(chan struct{})
	late := time.AfterFunc(timeout, func() {
		defer close(answered)
		r.respondFor(w, Fail(http.StatusGatewayTimeout, "no answer within "+timeout.String()))
	})
	defer func() {
		if !late.Stop() {
			<-answered
		}
	}()
	attempt(r.owner, r.handler, w, timeout)
}

// conclude records the result of a message, and answers a request.
func (r *coreRoute) conclude(w *work, err error) {
	j, err := judge(err)
	w.err = err
	if r.isReply() {
		w.err = r.respond(w, err)
	} else if err != nil {
		r.env.log.Error("natsx: handler failed, core message is lost", r.about(w, "error", err)...)
	}
	if w.err != nil && j.verdict == verdictSuccess {
		j.verdict = verdictRetry // the answer was not sent as it is
	}
	w.outcome = coreOutcome(r.spec.kind, j)
	w.swift = w.outcome == OutcomeSucceeded && len(r.env.observers) == 0 && !r.isReply()
	r.observe(w)
}

// coreOutcome is the outcome of a message that no server keeps.
func coreOutcome(kind specKind, j judgement) Outcome {
	switch {
	case j.verdict == verdictSuccess:
		return OutcomeSucceeded
	case j.verdict == verdictDiscard && kind != kindReply:
		return OutcomeDiscarded
	}
	return OutcomeFailed
}

// respond answers a request with the result of its responder, unless it was already
// answered, and returns the error to record.
func (r *coreRoute) respond(w *work, err error) error {
	if w.answered.Swap(true) {
		if err == nil {
			err = errLate
		}
		r.env.log.Warn("natsx: responder returned too late, its result is dropped", r.about(w, "error", err, "took", w.took())...)
		return err
	}
	if err != nil && r.env.handlers.Err() != nil && errors.Is(err, context.Canceled) {
		err = failure(cause(errShuttingDown)+": "+cause(err), errShuttingDown, err)
	}
	if err != nil {
		if _, internal := replyFor(err); internal {
			r.env.log.Error("natsx: request failed", r.about(w, "error", err)...)
		}
	}
	sent, failed := r.answer(w, w.answer, w.msg.answer, err)
	if failed != nil {
		r.env.log.Error("natsx: answer could not be sent", r.about(w, "error", failed)...)
	}
	return sent
}

// respondFor answers a request while its responder still runs, and so may change
// everything else of the delivery.
func (r *coreRoute) respondFor(w *work, err error) {
	if w.answered.Swap(true) {
		return
	}
	if _, failed := r.answer(w, nil, nil, err); failed != nil {
		r.env.log.Error("natsx: answer could not be sent", r.names("error", failed)...)
	}
}

// answer publishes the answer made of data, header and err. An answer that cannot be
// sent is replaced by an error. It returns the error that was sent, and what failed.
func (r *coreRoute) answer(w *work, data []byte, header nats.Header, err error) (sent, failed error) {
	if w.raw.Reply == "" {
		return err, nil
	}
	nc := r.env.api.nc
	reply := &nats.Msg{Subject: w.raw.Reply}
	reply.Data, reply.Header, _ = answer(data, header, err)
	failed = nc.PublishMsg(reply)
	var instead string
	switch {
	case errors.Is(failed, nats.ErrMaxPayload):
		instead = "answer is larger than " + strconv.FormatInt(nc.MaxPayload(), 10) + " bytes"
	case errors.Is(failed, nats.ErrBadHeaderMsg):
		instead = "answer has an invalid header"
	default:
		return err, failed
	}
	err = errors.Join(Fail(http.StatusInternalServerError, instead), err)
	reply.Data, reply.Header, _ = answer(nil, nil, err)
	return err, errors.Join(failure(instead+": "+cause(failed), failed), nc.PublishMsg(reply))
}

// bookAll books finished works. The pool is locked.
func (r *coreRoute) bookAll(done []*work) pullRequest {
	for _, w := range done {
		r.mean += (float64(w.took()) - r.mean) / 16
		if r.isReply() {
			r.open.unlist(w)
		}
		r.book(w)
		r.recycle(w)
	}
	if !r.isReply() {
		r.burst = int(min(float64(burstTurn)/2/max(r.mean, 1), maxBurst))
	}
	if r.full && r.lane.waiting() <= coreQueue/2 {
		r.makeRoom()
	}
	return pullRequest{}
}

// book adds a finished message to the counters. The pool is locked.
func (r *coreRoute) book(w *work) {
	r.count(w)
	if r.isReply() && w.err != nil {
		r.lastError = w.err
	}
}

// makeRoom wakes a callback that waits for room. The pool is locked.
func (r *coreRoute) makeRoom() {
	r.full = false
	notify(r.room)
}

// A core route does not pull.
func (r *coreRoute) workerFree()      {}
func (r *coreRoute) send(pullRequest) {}

func (r *coreRoute) locate(context.Context) error { return nil }

func (r *coreRoute) start() error {
	p := r.env.pool
	p.mu.Lock()
	p.enter(&r.lane)
	p.mu.Unlock()
	_, err := r.subscribe(r.spec.route.filter, r.spec.route.queue, r.receive)
	r.env.agenda.set(&r.alarm, processTime()+int64(droppedEvery))
	return err
}

func (r *coreRoute) stop(ctx context.Context) {
	r.unsubscribe(ctx)
	p := r.env.pool
	p.mu.Lock()
	p.leave(&r.lane)
	p.mu.Unlock()
}

func (r *coreRoute) denied(e *PermissionError) bool {
	return e.Operation == "subscribe" && e.Subject == r.spec.route.filter
}

// droppedEvery is how often a route checks for messages that the client dropped.
const droppedEvery = time.Second

// tick counts and logs messages that the client dropped.
func (r *coreRoute) tick(now int64) {
	p := r.env.pool
	p.mu.Lock()
	sub := r.sub
	p.mu.Unlock()
	if sub == nil {
		return
	}
	r.env.agenda.set(&r.alarm, now+int64(droppedEvery))
	n, err := sub.Dropped()
	if err != nil || n <= 0 {
		return
	}
	p.mu.Lock()
	more := uint64(n) - min(r.dropped, uint64(n))
	r.dropped = uint64(n)
	r.stats.Dropped += more
	p.mu.Unlock()
	if more > 0 {
		r.env.log.Error("natsx: slow consumer, messages were dropped", r.names("dropped", more, "in_all", n)...)
	}
}
