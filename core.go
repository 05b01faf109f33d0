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
	// coreQueue is how many messages of a core route may wait for a worker. When
	// they do, the rest waits in the subscription, up to its pending limits.
	coreQueue = 1024
	// WaitingRequestsPerHandler is how many requests may wait for each handler
	// that a reply route runs at once; MinWaitingRequests may in any case. One
	// more is answered with code 503 at once.
	WaitingRequestsPerHandler = 16
	MinWaitingRequests        = 128
)

var (
	errBusy         = Fail(http.StatusServiceUnavailable, "service is busy")
	errShuttingDown = Fail(http.StatusServiceUnavailable, "service is shutting down")
	// errGone is a request whose requester waits no more.
	errGone = fmt.Errorf("natsx: the requester's deadline passed before a worker was free: %w", context.DeadlineExceeded)
	// errLate is a result that came after the request was answered without it.
	errLate = fmt.Errorf("natsx: responder was too late: %w", context.DeadlineExceeded)
)

// coreRoute consumes one route from a core NATS subscription: messages, or requests
// when it has a responder.
type coreRoute struct {
	route

	// Guarded by the pool's mutex.
	full      bool          // the callback waits for room
	room      chan struct{} // told when there is room again; capacity 1
	dropped   uint64        // by the client as a slow consumer, when last asked
	lastError error         // of a request
	open      leaseList     // requests that wait or run
}

// receive is the subscription's callback. It blocks while the route has enough to
// do, so that what comes meanwhile waits in the subscription.
func (r *coreRoute) receive(m *nats.Msg) {
	d := &delivery{
		Context: r.eng.handlers,
		route:   &r.route,
		msg:     Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, reply: m.Reply},
	}
	if r.isReply() {
		r.admit(d)
		return
	}
	p := r.eng.pool
	p.mu.Lock()
	r.stats.Received++
	for r.queue.len() >= coreQueue && !p.closed {
		r.full = true
		p.mu.Unlock()
		<-r.room
		p.mu.Lock()
	}
	p.put(&r.lane, d)
	p.mu.Unlock()
}

// admit queues a request, or refuses it while too many wait.
func (r *coreRoute) admit(d *delivery) {
	if patience, ok := requestTimeout(d.msg.Header); ok {
		d.due = r.eng.now() + int64(min(patience, math.MaxInt64/2))
	}
	p := r.eng.pool
	var refusal error
	p.mu.Lock()
	r.stats.Received++
	switch {
	case p.closed:
		refusal = errShuttingDown
	case r.queue.len() >= max(MinWaitingRequests, WaitingRequestsPerHandler*r.limit):
		refusal = errBusy
	default:
		r.open.push(d)
		p.put(&r.lane, d)
	}
	p.mu.Unlock()
	if refusal != nil {
		r.refuse(d, refusal)
	}
}

// refuse answers and books a request that no worker takes.
func (r *coreRoute) refuse(d *delivery, err error) {
	r.conclude(d, err)
	r.eng.pool.mu.Lock()
	r.book(d)
	r.eng.pool.mu.Unlock()
}

// giveUp lets go of what no worker will take any more, after the pool was closed.
func (r *coreRoute) giveUp() {
	p := r.eng.pool
	p.mu.Lock()
	r.makeRoom()
	var rest []*delivery
	for r.isReply() && r.queue.len() > 0 {
		d := r.queue.pop()
		r.open.remove(d)
		rest = append(rest, d)
		p.waiting--
	}
	p.mu.Unlock()
	for _, d := range rest {
		r.refuse(d, errShuttingDown)
	}
}

// abandon answers the requests whose responders did not return in time.
func (r *coreRoute) abandon() {
	p := r.eng.pool
	p.mu.Lock()
	var rest []*delivery
	for d := r.open.head; d != nil; d = d.next {
		rest = append(rest, d)
	}
	p.mu.Unlock()
	for _, d := range rest {
		r.respondFor(d, errShuttingDown)
	}
}

func (r *coreRoute) isReply() bool { return r.spec.kind == kindReply }

// run handles one message on a worker.
func (r *coreRoute) run(d *delivery) {
	now := r.eng.now()
	d.began, d.ended = now, now
	timeout := r.spec.route.timeout
	if !r.isReply() {
		r.attempt(d, timeout)
		return
	}
	patience := timeout
	if d.due > 0 {
		if patience = time.Duration(d.due - now); patience <= 0 {
			r.conclude(d, errGone)
			return
		}
	}
	if timeout == 0 || patience < timeout {
		// Nobody waits for an answer at the end of the requester's patience.
		r.attempt(d, patience)
		return
	}
	// The requester is answered when the time is up, whatever the responder does
	// with the end of its context.
	answered := make(chan struct{})
	late := time.AfterFunc(timeout, func() {
		defer close(answered)
		r.respondFor(d, Fail(http.StatusGatewayTimeout, "no answer within "+timeout.String()))
	})
	defer func() {
		if !late.Stop() {
			<-answered
		}
	}()
	r.attempt(d, timeout)
}

// conclude books the result of a message, and answers a request.
func (r *coreRoute) conclude(d *delivery, err error) {
	d.err = err
	if r.isReply() {
		d.err = r.respond(d, err)
	} else if err != nil {
		r.log.Error("natsx: handler failed, core message is gone", append(r.about(d), "error", err)...)
	}
	switch {
	case d.err == nil:
		d.outcome = Succeeded
	case is[*discardError](err) && !r.isReply():
		d.outcome = Discarded
	default:
		d.outcome = Failed
	}
	r.observe(d)
}

// respond answers a request with the result of its responder, unless it was
// answered without it, and returns the error that counts.
func (r *coreRoute) respond(d *delivery, err error) error {
	if d.answered.Swap(true) {
		if err == nil {
			err = errLate
		}
		r.log.Warn("natsx: responder was too late, its result is dropped", append(r.about(d), "error", err, "took", d.took())...)
		return err
	}
	if errors.Is(err, context.Canceled) && r.eng.handlers.Err() != nil {
		err = fmt.Errorf("%w: %w", errShuttingDown, err)
	}
	if err != nil {
		if _, internal := replyFor(err); internal {
			r.log.Error("natsx: request failed", append(r.about(d), "error", err)...)
		}
	}
	told, failed := r.send(d, d.answer, d.msg.answer, err)
	if failed != nil {
		r.log.Error("natsx: answer not sent as it is", append(r.about(d), "error", failed)...)
	}
	return told
}

// respondFor answers a request while its responder is still at work: it may be
// changing everything else of the delivery.
func (r *coreRoute) respondFor(d *delivery, err error) {
	if d.answered.Swap(true) {
		return
	}
	if _, failed := r.send(d, nil, nil, err); failed != nil {
		r.log.Error("natsx: answer not sent", "route", r.spec.route.filter, "error", failed)
	}
}

// send publishes the answer that data, header and err make. What cannot be sent is
// replaced by an error. It returns the error that the requester was told, and what
// failed.
func (r *coreRoute) send(d *delivery, data []byte, header nats.Header, err error) (told, failed error) {
	if d.msg.reply == "" {
		return err, nil
	}
	reply := &nats.Msg{Subject: d.msg.reply}
	reply.Data, reply.Header, _ = answer(data, header, err)
	failed = r.eng.nc.PublishMsg(reply)
	var instead string
	switch {
	case errors.Is(failed, nats.ErrMaxPayload):
		instead = "answer is larger than " + strconv.FormatInt(r.eng.nc.MaxPayload(), 10) + " bytes"
	case errors.Is(failed, nats.ErrBadHeaderMsg):
		instead = "answer has an invalid header"
	default:
		return err, failed
	}
	err = errors.Join(Fail(http.StatusInternalServerError, instead), err)
	reply.Data, reply.Header, _ = answer(nil, nil, err)
	return err, errors.Join(fmt.Errorf("natsx: %s: %w", instead, failed), r.eng.nc.PublishMsg(reply))
}

// finish books a message whose worker is done with it. The pool is locked.
func (r *coreRoute) finish(d *delivery) pull {
	if r.isReply() {
		r.open.remove(d)
	}
	r.book(d)
	if r.full && r.queue.len() <= coreQueue/2 {
		r.makeRoom()
	}
	return pull{}
}

// book adds a finished message to the counters. The pool is locked.
func (r *coreRoute) book(d *delivery) {
	r.count(d)
	if r.isReply() && d.err != nil {
		r.lastError = d.err
	}
}

// makeRoom lets a waiting callback go on. The pool is locked.
func (r *coreRoute) makeRoom() {
	r.full = false
	select {
	case r.room <- struct{}{}:
	default:
	}
}

func (r *coreRoute) pull(pull) {}

func (r *coreRoute) locate(context.Context) error { return nil }

func (r *coreRoute) start() error {
	return r.subscribe(r.spec.route.filter, r.spec.route.queue, r.receive)
}

func (r *coreRoute) stop(ctx context.Context) { r.unsubscribe(ctx) }

func (r *coreRoute) denied(e *PermissionError) bool {
	return e.Operation == "subscribe" && e.Subject == r.spec.route.filter
}

// tick is the keeper's visit: it notices what the client dropped.
func (r *coreRoute) tick(now int64, due []*delivery) []*delivery {
	p := r.eng.pool
	p.mu.Lock()
	sub := r.sub
	p.mu.Unlock()
	if sub == nil {
		return due
	}
	n, err := sub.Dropped()
	if err != nil || n <= 0 {
		return due
	}
	p.mu.Lock()
	more := uint64(n) - min(r.dropped, uint64(n))
	r.dropped = uint64(n)
	r.stats.Dropped += more
	p.mu.Unlock()
	if more > 0 {
		r.log.Error("natsx: slow consumer, messages were dropped", "route", r.spec.route.filter, "dropped", more, "in_all", n)
	}
	return due
}

// verify does nothing: a core subscription comes back by itself.
func (r *coreRoute) verify(bool) {}
