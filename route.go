package natsx

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// route is the common part of core and durable routes.
type route struct {
	lane
	env     *env
	spec    Spec
	named   Spec    // in logs, errors and events: spec, or that of the route it is a part of
	handler Handler // with the broker's middleware; stores a responder's answer in the work
	from    *origin // of its messages; fixed once started
	waits   alarm   // of a rate

	// Guarded by the pool's mutex.
	stats  RouteStats
	sub    *nats.Subscription
	closed chan struct{} // closed when the subscription's last callback has returned

	over atomic.Bool // the route has failed and settles nothing more

	troublesMu sync.Mutex
	troubles   map[string]error // what keeps the route from its work, by kind
}

func (r *route) init(e *env, spec Spec, owner job) {
	r.env, r.spec, r.named, r.owner = e, spec, spec, owner
	if r.handler == nil {
		r.handler = wrap(spec, e.middleware)
	}
	r.troubles = map[string]error{}
	r.requests = spec.kind == kindReply
	r.limit = e.workers
	if spec.route.set&optConcurrency != 0 {
		r.limit = min(e.workers, spec.route.concurrency)
	}
	if spec.route.set&optRate != 0 {
		r.rate = newBucket(spec.route.rate, processTime())
		r.waits.ring = func(int64) { e.pool.resume(&r.lane) }
		r.later = func(at int64) { e.agenda.set(&r.waits, at) }
	}
	r.from = &origin{filter: spec.route.filter, request: r.requests, ctx: e.handlers}
	r.lane.name, r.lane.timeout = "handler of "+spec.String(), spec.route.timeout
	r.stats = RouteStats{Route: spec.route.filter, Durable: spec.route.durable}
}

// wrap puts middleware around the function of a route.
func wrap(spec Spec, middleware []Middleware) Handler {
	h := spec.handler
	if spec.kind == kindBatch {
		// A message that must run by itself; middleware is for handlers of one message.
		return func(ctx context.Context, m *Msg) error {
			results, _ := batchResults(spec.batch(ctx, []*Msg{m}), 1)
			if results == nil {
				return nil
			}
			return results[0]
		}
	}
	if spec.kind == kindReply {
		h = func(ctx context.Context, m *Msg) error {
			data, err := spec.responder(ctx, m)
			deliveryFrom(ctx).work.answer = data
			return err
		}
	}
	return wrapHandler(h, middleware)
}

func (r *route) base() *route { return r }

// names are the log attributes that name the route.
func (r *route) names(more ...any) []any {
	args := []any{"route", r.named.route.filter}
	if r.named.route.durable != "" {
		args = append(args, "durable", r.named.route.durable)
	}
	return append(args, more...)
}

// about are the log attributes that name a message.
func (r *route) about(w *work, more ...any) []any {
	args := r.names("subject", w.raw.Subject)
	if w.id.seq > 0 {
		args = append(args, "stream", w.msg.origin().stream, "sequence", w.source.seq, "attempt", w.msg.Attempt())
	}
	if panicked, ok := w.err.(*PanicError); ok && len(panicked.Stack) > 0 {
		args = append(args, "stack", string(panicked.Stack))
	}
	return append(args, more...)
}

// fail ends Run with a fault of the route, which settles nothing more.
func (r *route) fail(fault error) {
	r.over.Store(true)
	r.env.fail(fault)
}

// trouble records an error for Health, and logs it if it is new or has changed.
func (r *route) trouble(kind string, err error) {
	r.troublesMu.Lock()
	before, known := r.troubles[kind]
	r.troubles[kind] = err
	r.troublesMu.Unlock()
	if !known || before.Error() != err.Error() && !transient(err) {
		r.env.log.Warn("natsx: route is unhealthy", r.names("kind", kind, "error", err)...)
	}
}

// clear removes a trouble.
func (r *route) clear(kind string) {
	r.troublesMu.Lock()
	_, known := r.troubles[kind]
	delete(r.troubles, kind)
	r.troublesMu.Unlock()
	if known {
		r.env.log.Info("natsx: route is healthy again", r.names("kind", kind)...)
	}
}

// troubleIf calls trouble if is is set, and else clear.
func (r *route) troubleIf(is bool, kind string, err error) {
	if is {
		r.trouble(kind, err)
	} else {
		r.clear(kind)
	}
}

// health returns one [*RouteError] for each trouble.
func (r *route) health() []error {
	r.troublesMu.Lock()
	defer r.troublesMu.Unlock()
	var errs []error
	for _, kind := range slices.Sorted(maps.Keys(r.troubles)) {
		err := r.troubles[kind]
		errs = append(errs, r.named.fault(kind, "", cause(err), err))
	}
	return errs
}

// count adds a finished work to the counters. The pool is locked.
func (r *route) count(w *work) {
	if !w.shared {
		r.stats.HandlerTime += w.took()
	}
	r.countOutcome(w.outcome)
}

func (r *route) countOutcome(o Outcome) {
	switch o {
	case OutcomeSucceeded:
		r.stats.Succeeded++
	case OutcomeRetried:
		r.stats.Retried++
	case OutcomeDead:
		r.stats.Dead++
	case OutcomeDiscarded:
		r.stats.Discarded++
	case OutcomeReturned:
		r.stats.Returned++
	case OutcomeLapsed:
		r.stats.Lapsed++
	case OutcomeFailed:
		r.stats.Failed++
	}
}

// report returns the route's current counters.
func (r *route) report() RouteStats {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	st := r.stats
	st.Running = r.lane.running
	st.OldestRunning = p.oldest(&r.lane)
	st.Waiting = r.lane.waiting() + max(r.lane.taken-r.lane.running, 0)
	return st
}

// observe reports the outcome of w to the observers.
func (r *route) observe(w *work) {
	if len(r.env.observers) > 0 {
		r.env.observe(r.observing(), w.delivery, r.event(w))
	}
}

func (r *route) observing() string { return "observer of " + r.named.String() }

func (r *route) event(w *work) Event {
	e := w.event(r.named.route.filter, r.named.route.durable)
	if r.spec.kind == kindBatch {
		e.Batch = max(w.peers, 1)
	}
	return e
}

// subscribe subscribes and stores the subscription in the route. Callbacks may run before
// it returns.
func (r *route) subscribe(subject, queue string, receive nats.MsgHandler) (*nats.Subscription, error) {
	closed := make(chan struct{})
	sub, err := r.env.api.nc.QueueSubscribe(subject, queue, receive)
	if err != nil {
		return nil, r.spec.fault("subject", fmt.Sprintf("%q", subject), "could not subscribe: "+cause(err), closedCause(err))
	}
	sub.SetClosedHandler(func(string) { close(closed) })
	r.env.pool.mu.Lock()
	r.sub, r.closed = sub, closed
	r.env.pool.mu.Unlock()
	return sub, nil
}

// unsubscribe ends the subscription and waits for the callbacks of all messages that the
// server sent before. If ctx ends first, or without a connection, buffered messages are
// dropped.
func (r *route) unsubscribe(ctx context.Context) {
	r.env.pool.mu.Lock()
	sub, closed := r.sub, r.closed
	r.sub = nil
	r.env.pool.mu.Unlock()
	if sub == nil {
		return
	}
	if !r.env.link.up() || sub.Drain() != nil {
		sub.Unsubscribe()
	}
	select {
	case <-closed:
	case <-ctx.Done():
		sub.Unsubscribe()
	}
}

// locateStream returns the name of the stream of a route or replay: the given one, or the
// only one with subjects that match the filter.
func locateStream(given string, names func() ([]string, error), near func() string) (name string, reason string, err error) {
	if given != "" {
		return given, "", nil
	}
	found, err := names()
	switch {
	case err != nil:
		return "", "could not be looked up by the filter: " + cause(err), err
	case len(found) == 0:
		return "", "no stream has subjects that match the filter; " + near(), ErrNoStream
	case len(found) > 1:
		return "", fmt.Sprintf("several have subjects that match the filter: %q; name one with Stream", found), ErrAmbiguousStream
	}
	return found[0], "", nil
}

func (r *route) streamInfo(ctx context.Context, name string) (info *jetstream.StreamInfo, err error) {
	err = r.tryOn(ctx, func(ctx context.Context) (err error) {
		info, err = r.env.api.streamInfo(ctx, name)
		return err
	})
	return info, err
}

// tryOn sends a request to the JetStream API for a route that starts, and retries
// transient failures. Its health says what it waits for.
func (r *route) tryOn(ctx context.Context, try func(context.Context) error) error {
	defer r.clear("start")
	return r.env.starting(r.env.api, retry{
		told:   func(err error) { r.trouble("start", err) },
		enough: func(err error) bool { return hasCode(err, codeStreamNotFound) || r.env.failed() },
	}).do(ctx, try)
}
