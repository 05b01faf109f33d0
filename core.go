package natsx

import (
	"context"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// coreQueue is how many messages of a core route may wait for a worker. When
	// they do, the rest waits in the subscription, up to its pending limits.
	coreQueue = 1024
	// MaxWaitingRequests is how many requests of one route may wait for a worker;
	// one more is answered with code 503 at once.
	MaxWaitingRequests = 1024
)

// coreRoute consumes one route from a core NATS subscription: messages, or requests
// when it has a responder.
type coreRoute struct {
	route

	// Guarded by the pool's mutex.
	full    bool          // the callback waits for room
	room    chan struct{} // told when there is room again; capacity 1
	dropped uint64        // by the client as a slow consumer, when last asked
}

// receive is the subscription's callback. It blocks while the route has enough to
// do, so that what comes meanwhile waits in the subscription.
func (r *coreRoute) receive(m *nats.Msg) {
	d := &delivery{
		Context: r.eng.handlers,
		route:   &r.route,
		msg:     Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, reply: m.Reply},
	}
	p := r.eng.pool
	p.mu.Lock()
	r.stats.Received++
	if r.isReply() {
		if r.queue.len() >= MaxWaitingRequests {
			r.stats.Failed++
			p.mu.Unlock()
			r.respond(d, Fail(503, "service is busy"))
			return
		}
	} else {
		for r.queue.len() >= coreQueue && !p.closed {
			r.full = true
			p.mu.Unlock()
			<-r.room
			p.mu.Lock()
		}
	}
	p.put(&r.lane, d)
	p.mu.Unlock()
}

func (r *coreRoute) isReply() bool { return r.spec.kind == kindReply }

// run handles one message on a worker.
func (r *coreRoute) run(d *delivery) {
	d.began = r.eng.now()
	if r.isReply() && r.spec.route.timeout > 0 {
		// The requester is answered when the time is up, whatever the responder
		// does with the end of its context.
		late := time.AfterFunc(r.spec.route.timeout, func() {
			r.respond(d, Fail(504, "no answer within "+r.spec.route.timeout.String()))
		})
		defer late.Stop()
	}
	r.attempt(d)
}

// conclude books the result of a message, and answers a request.
func (r *coreRoute) conclude(d *delivery, err error) {
	d.err = err
	switch {
	case err == nil:
		d.outcome = Succeeded
	case is[*discardError](err):
		d.outcome = Discarded
	default:
		d.outcome = Failed
	}
	if r.isReply() {
		r.respond(d, err)
	} else if err != nil {
		r.log.Error("natsx: handler failed, core message is gone", append(r.about(d), "error", err)...)
	}
	r.observe(d)
}

// respond answers a request once; a second answer is dropped.
func (r *coreRoute) respond(d *delivery, err error) {
	if d.msg.reply == "" || d.answered.Swap(true) {
		return
	}
	var data []byte
	var header nats.Header
	if err == nil { // else the responder may still be at work on both
		data, header = d.answer, d.msg.answer
	}
	data, header, internal := answer(data, header, err)
	if internal {
		r.log.Error("natsx: request failed, answered as internal error", append(r.about(d), "error", err)...)
	}
	reply := &nats.Msg{Subject: d.msg.reply, Data: data, Header: header}
	if most := r.eng.nc.MaxPayload(); int64(messageSize(reply)) > most {
		r.log.Error("natsx: answer is too large, answered as internal error", append(r.about(d), "bytes", messageSize(reply))...)
		reply.Data, reply.Header, _ = answer(nil, nil, Fail(500, "answer is larger than "+strconv.FormatInt(most, 10)+" bytes"))
	}
	if err := r.eng.nc.PublishMsg(reply); err != nil {
		r.log.Error("natsx: answer not sent", append(r.about(d), "error", err)...)
	}
}

// finish books a message whose worker is done with it. The pool is locked.
func (r *coreRoute) finish(d *delivery) pull {
	r.count(d)
	if r.full && r.queue.len() <= coreQueue/2 {
		r.makeRoom()
	}
	return pull{}
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
func (r *coreRoute) verify() {}
