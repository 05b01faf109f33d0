package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// route is what core and durable routes have in common while they run.
type route struct {
	lane
	eng     *engine
	spec    Spec
	handler Handler // with the broker's middleware; a responder's answer goes into the delivery
	log     *slog.Logger
	lease   time.Duration // of a durable's messages, fixed once started

	// Guarded by the pool's mutex.
	stats  RouteStats
	sub    *nats.Subscription
	closed chan struct{} // closed when the subscription's last callback has returned

	over atomic.Bool // for lack of a permission or of its consumer the route settles nothing more

	troublesMu sync.Mutex
	troubles   map[string]error // what keeps the route from its work, by kind
}

// runner is a running route.
type runner interface {
	job
	base() *route
	// locate finds and checks what the route needs.
	locate(ctx context.Context) error
	// start begins to receive.
	start() error
	// stop ends the intake: when it returns nothing more arrives. ctx bounds it.
	stop(ctx context.Context)
	// tick is called by the keeper all the time; it adds what needs a renewal.
	tick(now int64, due []*delivery) []*delivery
	// verify is called when messages may not come any more, and pulls may be lost.
	verify(lost bool)
	// denied tells whether the route needs what the server refused.
	denied(*PermissionError) bool
}

func newRunner(e *engine, spec Spec) runner {
	if spec.route.durable == "" {
		r := &coreRoute{room: make(chan struct{}, 1)}
		r.init(e, spec, r)
		return r
	}
	r := &durableRoute{gate: make(chan struct{}, 1)}
	r.init(e, spec, r)
	return r
}

func (r *route) init(e *engine, spec Spec, owner job) {
	r.eng, r.spec, r.log, r.owner = e, spec, e.log, owner
	r.handler = e.wrap(spec)
	r.troubles = map[string]error{}
	r.limit = e.workers
	if spec.route.set&optConcurrency != 0 {
		r.limit = min(e.workers, spec.route.concurrency)
	}
	r.stats = RouteStats{Route: spec.route.filter, Durable: spec.route.durable}
}

// wrap puts the middleware around the route's function.
func (e *engine) wrap(spec Spec) Handler {
	h := spec.handler
	if spec.kind == kindReply {
		h = func(ctx context.Context, m *Msg) error {
			data, err := spec.responder(ctx, m)
			deliveryFrom(ctx).answer = data
			return err
		}
	}
	for i := len(e.middleware) - 1; i >= 0; i-- {
		h = e.middleware[i](h)
	}
	return h
}

func (r *route) base() *route { return r }

// about gives the log attributes of a delivery.
func (r *route) about(d *delivery) []any {
	args := []any{"route", r.spec.route.filter, "subject", d.msg.Subject}
	if from := d.msg.origin(); from.durable != "" {
		args = append(args, "durable", from.durable, "stream", from.stream, "sequence", d.msg.seq, "attempt", d.msg.Attempt())
	}
	if panicked, ok := errors.AsType[*PanicError](d.err); ok && len(panicked.Stack) > 0 {
		args = append(args, "stack", string(panicked.Stack))
	}
	return args
}

// fail ends Run by a fault of the route, which can settle nothing any more.
func (r *route) fail(fault error) {
	r.over.Store(true)
	r.eng.fail(fault)
}

// trouble records what keeps the route from its work, for Health, and logs it
// when it is new.
func (r *route) trouble(kind string, err error) {
	r.troublesMu.Lock()
	_, known := r.troubles[kind]
	r.troubles[kind] = err
	r.troublesMu.Unlock()
	if !known {
		r.log.Warn("natsx: route is unhealthy", "route", r.spec.route.filter, "durable", r.spec.route.durable, "kind", kind, "error", err)
	}
}

// clear takes a trouble back.
func (r *route) clear(kind string) {
	r.troublesMu.Lock()
	_, known := r.troubles[kind]
	delete(r.troubles, kind)
	r.troublesMu.Unlock()
	if known {
		r.log.Info("natsx: route is healthy again", "route", r.spec.route.filter, "durable", r.spec.route.durable, "kind", kind)
	}
}

func (r *route) health() []error {
	r.troublesMu.Lock()
	defer r.troublesMu.Unlock()
	var errs []error
	for kind, err := range r.troubles {
		errs = append(errs, &RouteError{
			Route: r.spec.route.filter, Durable: r.spec.route.durable, Field: kind,
			Reason: strings.TrimPrefix(err.Error(), "natsx: "), Err: err,
		})
	}
	return errs
}

// count adds a finished delivery to the counters. The pool is locked.
func (r *route) count(d *delivery) {
	r.stats.HandlerTime += d.took()
	switch d.outcome {
	case Succeeded:
		r.stats.Succeeded++
	case Retried:
		r.stats.Retried++
	case Dead:
		r.stats.Dead++
	case Discarded:
		r.stats.Discarded++
	case Lapsed:
		r.stats.Lapsed++
	case Failed:
		r.stats.Failed++
	}
}

func (r *route) observe(d *delivery) {
	o := r.eng.observer
	if o == nil {
		return
	}
	defer func() {
		if v := recover(); v != nil {
			r.eng.log.Error("natsx: observer panicked", append(r.about(d), "panic", v, "stack", string(debug.Stack()))...)
		}
	}()
	o.Observe(d, Event{
		Route: r.spec.route.filter, Durable: r.spec.route.durable, Msg: &d.msg,
		Outcome: d.outcome, Err: d.err, Duration: d.took(),
	})
}

// subscribe makes sub the route's subscription. Its callbacks may have begun.
func (r *route) subscribe(subject, queue string, receive nats.MsgHandler) error {
	closed := make(chan struct{})
	sub, err := r.eng.nc.QueueSubscribe(subject, queue, receive)
	if err != nil {
		return r.spec.fault("subject", fmt.Sprintf("%q", subject), "could not subscribe: "+cause(err), err)
	}
	sub.SetClosedHandler(func(string) { close(closed) })
	r.eng.pool.mu.Lock()
	r.sub, r.closed = sub, closed
	r.eng.pool.mu.Unlock()
	return nil
}

// unsubscribe ends the subscription after the callbacks of all that the server
// sent before it knew, and joins them. When ctx ends first, or without a
// connection, what the client has buffered is dropped.
func (r *route) unsubscribe(ctx context.Context) {
	r.eng.pool.mu.Lock()
	sub, closed := r.sub, r.closed
	r.sub = nil
	r.eng.pool.mu.Unlock()
	if sub == nil {
		return
	}
	if !r.eng.nc.IsConnected() || sub.Drain() != nil {
		sub.Unsubscribe()
	}
	select {
	case <-closed:
	case <-ctx.Done():
		sub.Unsubscribe()
	}
}
