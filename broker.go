package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Defaults of a broker.
const (
	DefaultWorkers      = 64
	DefaultDrainTimeout = 20 * time.Second
)

// Option configures a [Broker].
type Option func(*Broker)

// WithWorkers sets how many handlers run at once over all routes. Default is
// [DefaultWorkers]; below 1 is [ErrOutOfRange].
func WithWorkers(n int) Option { return func(b *Broker) { b.workers = n } }

// WithLogger sets where the broker logs. Default, also for nil, is
// [slog.Default].
func WithLogger(l *slog.Logger) Option { return func(b *Broker) { b.log = l } }

// WithMiddleware wraps the handlers of all routes, responders and replays
// included; the first is the outermost, and several calls add up. Default is none;
// nil is [ErrOutOfRange], and one that returns nil [ErrNoHandler].
//
// A middleware must not return before the next handler has: what it returns settles
// the message or answers the request. The context that it passes on must derive from
// the one that it got, which is where [MsgFrom], a [Publisher]'s message ids and the
// answer of a responder are found. A middleware that does not call the next handler
// decides itself: of a request it then sends no payload.
func WithMiddleware(mw ...Middleware) Option {
	return func(b *Broker) { b.middleware = append(b.middleware, mw...) }
}

// WithObserver has o told of every finished attempt, those of replays included. Of
// several the last one holds; default, also for nil, is none.
func WithObserver(o Observer) Option { return func(b *Broker) { b.observer = o } }

// WithDrainTimeout sets how long a shutdown waits for running handlers before it
// cancels their contexts. Default is [DefaultDrainTimeout]; it must be above zero,
// else it is [ErrOutOfRange]. A replay that is stopped keeps to it as well.
func WithDrainTimeout(d time.Duration) Option { return func(b *Broker) { b.drainTimeout = d } }

// WithErrorText sets what of an error goes into a dead letter, for errors that
// hold what must not be stored. Default is the error's text. fn is called by many
// at once; nil is [ErrOutOfRange]. The stack of a panic, and the log, are not changed.
func WithErrorText(fn func(error) string) Option { return func(b *Broker) { b.errorText = fn } }

// WithJetStream sets the JetStream context that durables, dead letters, replays and
// [WithStreams] use, for a domain or an API prefix. It must be of the broker's
// connection, else it is [ErrOptionConflict]. Default, also for nil, is a plain one.
func WithJetStream(js jetstream.JetStream) Option { return func(b *Broker) { b.js = js } }

// Broker runs routes on one shared pool of workers. It is safe for concurrent
// use, and runs once. It does not own its connection, and leaves it open; any number
// of brokers, publishers and others may share that.
type Broker struct {
	settings
	nc      *nats.Conn
	js      jetstream.JetStream
	streams []StreamSpec
	retry   *retryStream // nil without WithRetryStream
	service *service     // nil without WithService

	ready chan struct{} // closed when every route receives
	ran   atomic.Pointer[engine]
}

// NewBroker returns a broker over nc, which must outlive its Run. Faulty options,
// and a nc that is nil, are reported by [Broker.Run] and [Broker.Replay].
func NewBroker(nc *nats.Conn, opts ...Option) *Broker {
	b := &Broker{
		settings: settings{workers: DefaultWorkers, drainTimeout: DefaultDrainTimeout, errorText: error.Error},
		nc:       nc,
		ready:    make(chan struct{}),
	}
	for _, opt := range opts {
		opt(b)
	}
	if b.log == nil {
		b.log = slog.Default()
	}
	return b
}

// Run consumes specs until ctx ends or a route cannot go on, and then drains:
// pulling stops, what runs goes on with a live context, what was pulled is
// finished, acknowledgements are flushed. At the drain timeout the contexts of
// the handlers are cancelled, and after a grace of [DrainGrace], and a last second at
// most for what is to be sent, Run returns in any case. It returns nil after a clean
// drain that ctx asked for, and else the joined causes:
//
//   - the faults of [Validate] and of the options, before any network call;
//   - of [WithStreams], a [*StreamConflictError], [ErrPermission] or an error of the
//     server; no route starts then;
//   - [*RouteError]s of all routes that could not start or go on, with what they
//     wrap: [ErrNoStream], [ErrAmbiguousStream], [ErrDuplicateDurable],
//     [ErrWouldLose], [ErrBadDLQ], [ErrConsumerConflict], [ErrConsumerDeleted],
//     [ErrStreamDeleted], [ErrPermission], or an error of the server;
//   - of [WithRetryStream], a [*StreamError] with [ErrBadRetryStream], [ErrServerTooOld],
//     [ErrPermission] or an error of the server;
//   - of [WithService], [ErrPermission];
//   - [ErrConnectionClosed] when the connection was closed for good;
//   - a [*DrainError] when the drain was cut off, or [ErrDrainTimeout] alone when
//     everything was handled and the last acknowledgements could not be flushed.
//
// What passes by itself (a reconnect, an election, a server that starts) is
// retried for as long as ctx lives; [Broker.Health] shows it. A server without
// JetStream looks like one that starts: a route that starts gives up after 10 s
// without an answer, with [nats.ErrNoResponders]; with WithStreams it is waited for.
// A broker runs once: another Run returns [ErrAlreadyRun], unless the first was
// refused for faults.
func (b *Broker) Run(ctx context.Context, specs ...Spec) error {
	if err := errors.Join(b.validate(), Validate(specs...)); err != nil {
		return err
	}
	js, err := b.jetStream()
	if err != nil {
		return err
	}
	e := newEngine(ctx, b, js, specs)
	for _, r := range e.routes {
		if r.base().handler == nil {
			e.close()
			return r.base().spec.fault("middleware", "", "returned no handler", ErrNoHandler)
		}
	}
	if !b.ran.CompareAndSwap(nil, e) {
		e.close()
		return ErrAlreadyRun
	}
	return e.run()
}

// jetStream is the JetStream context of the options, or a plain one.
func (b *Broker) jetStream() (jetstream.JetStream, error) {
	if b.js != nil {
		return b.js, nil
	}
	js, err := jetstream.New(b.nc)
	if err != nil {
		return nil, fmt.Errorf("natsx: JetStream context: %w", err)
	}
	return js, nil
}

func (b *Broker) validate() error {
	var faults []error
	add := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf("natsx: "+format+": %w", append(args, ErrOutOfRange)...))
	}
	if b.nc == nil {
		add("broker without a connection")
	}
	if b.js != nil && b.nc != nil && b.js.Conn() != b.nc {
		faults = append(faults, fmt.Errorf("natsx: JetStream context of another connection: %w", ErrOptionConflict))
	}
	if b.workers < 1 {
		add("workers %d: must be at least 1", b.workers)
	}
	if b.drainTimeout <= 0 {
		add("drain timeout %s: must be above zero", b.drainTimeout)
	}
	if b.errorText == nil {
		add("error text function is nil")
	}
	if b.service != nil {
		faults = append(faults, b.service.faults()...)
	}
	for i, mw := range b.middleware {
		if mw == nil {
			add("middleware %d is nil", i)
		}
	}
	if b.retry != nil {
		faults = append(faults, RetryStream(b.retry.name).Validate())
	}
	return errors.Join(append(faults, validateStreams(b.streams))...)
}

// Ready is closed when every route receives. It stays open when Run fails first.
func (b *Broker) Ready() <-chan struct{} { return b.ready }

// Health returns nil while every route does its work, and else the joined reasons
// why not: not running yet or any more, what ends Run, not connected, and a
// [*RouteError] for each route that waits for JetStream, whose consumer does not
// answer or refuses pulls, whose DLQ takes no letters, whose retries fill
// MaxAckPending, or whose consumer got a MaxDeliver from somebody; see
// [RouteError.Field]. A paused route is healthy. Health asks no server.
func (b *Broker) Health() error {
	e := b.ran.Load()
	if e == nil {
		return errors.New("natsx: broker is not running")
	}
	return e.health()
}

// Stats returns the counters of every route of Run; replays have none. There are
// none before Run, and they are kept after it has returned.
func (b *Broker) Stats() Stats {
	e := b.ran.Load()
	if e == nil {
		return Stats{}
	}
	return e.stats()
}

// Pause stops the intake of this broker's routes with the durable: what was pulled
// is finished, nothing more is pulled until [Broker.Resume]. Other brokers, in this
// process or another, go on. It returns when nothing more arrives: for each route
// after half a second at most while the server answers, and after 5 s in any case;
// what was still on its way then is delivered again. Pausing twice is harmless.
// [ErrUnknownDurable] tells that no running route has the durable, as before
// [Broker.Ready] and once a shutdown has begun.
func (b *Broker) Pause(durable string) error {
	return b.forDurable(durable, func(r *durableRoute) error {
		ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
		defer cancel()
		r.pause(ctx)
		return nil
	})
}

// Resume ends a [Broker.Pause], and does not wait for the first message. Resuming
// what is not paused is harmless. [ErrUnknownDurable] tells that no running route has
// the durable; a [*RouteError], that it could not subscribe again.
func (b *Broker) Resume(durable string) error {
	return b.forDurable(durable, (*durableRoute).resume)
}

func (b *Broker) forDurable(name string, fn func(*durableRoute) error) error {
	e := b.ran.Load()
	found := false
	var errs []error
	if e != nil && e.isReady() {
		for _, d := range e.durables {
			if d.spec.route.durable == name {
				found = true
				errs = append(errs, fn(d))
			}
		}
	}
	if !found {
		return fmt.Errorf("%w %q", ErrUnknownDurable, name)
	}
	return errors.Join(errs...)
}

// WithStreams has [Broker.Run] ensure these streams before any route starts, as
// [StreamSpec.Ensure] does. One that captures a route's DLQ subject is created
// with DiscardNew unless Discard or AllowMsgSchedules says otherwise: a full DLQ
// refuses letters, which stay with their route, and loses none. Several calls add up,
// and a name twice is [ErrOptionConflict]. They are made in the JetStream of
// [WithJetStream]. Default is none.
func WithStreams(specs ...StreamSpec) Option {
	return func(b *Broker) { b.streams = append(b.streams, specs...) }
}

// WithRetryStream has the messages of durable routes wait for their retries in a stream of
// their own, which also takes what is given back at a shutdown. Default is none: a message
// that waits then stays unsettled in its own stream.
//
// A message that fails and has attempts left is stored there as a copy, which the server
// publishes when the retry is due (ADR-51), and acknowledged in its own stream once the
// copy is stored. So retries do not count against MaxAckPending, do not end with the
// MaxAge of their stream, and their attempts are exact: an attempt is a run that returned,
// however often the message was delivered. A run that ended with its process is repeated
// as the same attempt; a message that takes down its process again and again is dead
// with [ReasonCrashed] all the same.
//
// The handler sees no difference: subject, headers, payload, sequence, time and stream are
// those of the original. A retry comes up to a quarter of a second after it is due, since
// the server looks for what is due that often. The copies of all routes share the stream,
// each durable with a consumer of its own on it. These are as before: a route with
// OrderedBy, and a message within 2 KiB of the server's maximum payload.
//
// The stream is made as [RetryStream] describes, with as many replicas as the streams of
// the routes, unless it exists or [WithStreams] makes it. Run refuses one that could lose
// retries with a [*StreamError] that matches [ErrBadRetryStream], and a server before 2.12
// with [ErrServerTooOld]; a bad name is [ErrInvalidName]. While the stream takes no
// copies, failed messages are held, up to 1,000 for each route, and Health tells. Only
// brokers should be allowed to publish to it. Beside the permissions of a durable on it,
// a broker needs to publish to <name>.wait.> and <name>.due.>, and $JS.API.STREAM.MSG.GET
// on it.
//
// All brokers of a durable use the same retry stream. A broker without it does not handle
// what waits there; take it away when it is empty.
func WithRetryStream(name string) Option {
	return func(b *Broker) { b.retry = &retryStream{name: name} }
}

// Replay handles stored messages once more, from the bounds of spec on, and ends
// at what was last stored when it started. It reads through a consumer of its own,
// which is deleted at the end and expires by itself after [ReplayInactive], or
// sooner by the stream's limit, when the process is killed; no durable is touched,
// nothing is acknowledged.
//
// What is stored is replayed as it is. A message that was redriven (see
// [DeadLetterQuery.Redrive]) is in the stream twice, the original and its copy with
// [HeaderRedriveTo], and both are handled. A schedule, which the server keeps to
// publish a message later, is passed over; the message that it published is not.
//
// While Run is under way the replay uses its pool, where it takes turns with the
// routes; else it has a pool of its own for as long as it takes. So it has when ctx
// is a handler's: that one holds a worker while it waits, and the replay's are
// beyond [WithWorkers]. Such a replay ends with its handler's context. The broker's
// middleware and observer apply.
//
// A reconnect, a server's restart and a change of leader are survived: the replay
// goes on behind the last message it got, without gap or repeat.
//
// It returns nil when everything was handled. Else the report says how far it
// came, and the error is
//
//   - the faults of [ReplaySpec.Validate] and of the broker's options;
//   - a [*ReplayFailure] when a handler failed and ContinueOnError was not called;
//   - ctx's error when ctx ended: handlers that run then go on with a live context
//     up to the broker's drain timeout, after which a [*DrainError] is joined;
//   - [ErrBrokerStopped] when the broker's Run ended meanwhile;
//   - a [*ReplayError] that wraps [ErrNoStream], [ErrAmbiguousStream],
//     [ErrStreamDeleted], [ErrNotReplayable], [ErrPermission],
//     [ErrConnectionClosed] or an error of the server.
func (b *Broker) Replay(ctx context.Context, spec ReplaySpec) (ReplayReport, error) {
	if err := errors.Join(b.validate(), spec.Validate()); err != nil {
		return ReplayReport{}, err
	}
	js, err := b.jetStream()
	if err != nil {
		return ReplayReport{}, err
	}
	// A handler that holds a worker of the pool may wait for a replay that waits for
	// that worker.
	if e := b.ran.Load(); e != nil && deliveryFrom(ctx) == nil {
		r := newReplay(ctx, e.env, spec)
		if e.admit(r) {
			defer e.leave(r)
			return r.carryOut(ctx)
		}
		r.endIntake()
	}
	e := newEnv(ctx, &b.settings, b.nc, js, spec.replay.concurrency(b.workers))
	e.start()
	r := newReplay(ctx, e, spec)
	report, err := r.carryOut(ctx)
	e.pool.close()
	if !r.abandoned {
		<-e.pool.gone
	}
	e.acks.stop()
	e.close()
	return report, err
}
