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

// WithWorkers sets how many handlers run at once over all routes. The default is
// [DefaultWorkers]; below 1 is [ErrOutOfRange].
func WithWorkers(n int) Option { return func(b *Broker) { b.workers = n } }

// WithLogger sets the broker's logger. The default, also for nil, is [slog.Default].
func WithLogger(l *slog.Logger) Option { return func(b *Broker) { b.log = l } }

// WithMiddleware wraps the handlers of all routes, responders and replays
// included. The first is the outermost; several calls add up. The default is none. A nil
// middleware is [ErrOutOfRange], and one that returns nil is [ErrNoHandler].
//
// A middleware must not return before the next handler has: its result settles the
// message or answers the request. It must pass on a context derived from its own, which
// carries what [MsgFrom], a [Publisher] and a responder need. If it does not call the
// next handler, its own result decides, and a request is answered without a payload.
func WithMiddleware(mw ...Middleware) Option {
	return func(b *Broker) { b.middleware = append(b.middleware, mw...) }
}

// WithObserver adds an observer of every finished attempt, those of replays included.
// Several calls add up, and the observers are told one after another; nil adds none.
// Default is none.
func WithObserver(o Observer) Option {
	return func(b *Broker) {
		if o != nil {
			b.observers = append(b.observers, o)
		}
	}
}

// WithDrainTimeout sets how long a shutdown waits for running handlers before it
// cancels their contexts. The default is [DefaultDrainTimeout]; it must be above zero,
// else it is [ErrOutOfRange]. It also applies to a replay that is stopped.
func WithDrainTimeout(d time.Duration) Option { return func(b *Broker) { b.drainTimeout = d } }

// WithErrorText sets the function that returns the text of an error for a dead letter,
// for errors with content that must not be stored. The default is [error.Error]. fn must
// be safe for concurrent use; nil is [ErrOutOfRange]. It does not apply to the stack of
// a panic, nor to the log.
func WithErrorText(fn func(error) string) Option { return func(b *Broker) { b.errorText = fn } }

// WithJetStream sets the JetStream context that durables, dead letters, replays and
// [WithStreams] use, for a domain or an API prefix. It must use the broker's connection,
// else it is [ErrOptionConflict]. The default, also for nil, is [jetstream.New] without
// options.
func WithJetStream(js jetstream.JetStream) Option { return func(b *Broker) { b.js = js } }

// Broker runs routes on one shared pool of workers. It is safe for concurrent use, and
// runs once. It does not own its connection: it leaves it open, and other brokers and
// publishers may share it.
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

// NewBroker returns a broker over nc, which must stay open until Run returns.
// [Broker.Run] and [Broker.Replay] report a nil nc and invalid options.
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

// Validate reports every fault of the broker's options, its streams and specs, without a
// server, as [Broker.Run] does before its first network call. Beyond [Validate] it
// compares the routes with the streams of [WithStreams]: two durables of a work-queue
// stream whose filters overlap are [ErrOptionConflict], since such a stream gives each
// message to one durable.
func (b *Broker) Validate(specs ...Spec) error {
	return errors.Join(b.validate(), Validate(specs...), overlapFaults(b.streams, specs))
}

// overlapFaults are the durables of work-queue streams that want the same messages.
func overlapFaults(streams []StreamSpec, specs []Spec) error {
	var faults []error
	for _, stream := range streams {
		if stream.set&optRetention == 0 || stream.retention != jetstream.WorkQueuePolicy {
			continue
		}
		var of []Spec
		for _, s := range specs {
			if stream.has(s) {
				of = append(of, s)
			}
		}
		for i, s := range of {
			for _, earlier := range of[:i] {
				if s.overlaps(earlier) {
					faults = append(faults, s.overlapWith(earlier, stream.name))
				}
			}
		}
	}
	return errors.Join(faults...)
}

// Run consumes specs until ctx ends or a route fails, and then drains. Pulling stops,
// and running handlers go on with a live context. Waiting messages of durables are
// started for 200 ms more; the rest is given back to the server. Acks are flushed. At the
// drain timeout the contexts of the handlers are cancelled. Run returns [DrainGrace] plus
// at most a second after that in any case. It returns nil after a clean drain that ctx
// has started, else the joined causes:
//
//   - the faults of [Broker.Validate], before any network call;
//   - for [WithStreams] a [*StreamConflictError], [ErrPermission] or an error of the
//     server; no route is started then;
//   - a [*RouteError] for each route that could not start or has failed. It wraps
//     [ErrNoStream], [ErrAmbiguousStream], [ErrDuplicateDurable], [ErrWouldLose],
//     [ErrBadDLQ], [ErrConsumerConflict], [ErrConsumerDeleted], [ErrStreamDeleted],
//     [ErrPermission], or an error of the server;
//   - for [WithRetryStream] a [*StreamError] that wraps [ErrBadRetryStream],
//     [ErrServerTooOld], [ErrPermission] or an error of the server;
//   - for [WithService] [ErrPermission];
//   - [ErrConnectionClosed] if the connection was closed for good;
//   - a [*DrainError] if the shutdown exceeded the drain timeout, or [ErrDrainTimeout]
//     alone if only the last acknowledgements could not be flushed.
//
// Transient failures (a reconnect, a leader election, a server restart) are retried
// until ctx ends; [Broker.Health] reports them. A server without JetStream cannot be
// distinguished from one that starts: log and Health say so, and after 10 s without an
// answer Run returns [ErrNoJetStream]. A broker runs once: another Run returns
// [ErrAlreadyRun], unless the first was refused for faults.
func (b *Broker) Run(ctx context.Context, specs ...Spec) error {
	if err := b.Validate(specs...); err != nil {
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

// jetStream returns the JetStream context of WithJetStream, or one without options.
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
		faults = append(faults, failure(fmt.Sprintf(format, args...), ErrOutOfRange))
	}
	if b.nc == nil {
		add("broker has no connection")
	}
	if b.js != nil && b.nc != nil && b.js.Conn() != b.nc {
		faults = append(faults, failure("JetStream context of another connection", ErrOptionConflict))
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

// Ready returns a channel that is closed when every route receives. It stays open if Run
// fails before.
func (b *Broker) Ready() <-chan struct{} { return b.ready }

// Health returns nil while all routes work, else the joined reasons: the broker is not
// running, Run is ending with an error, the connection is down, all workers hang, or a
// [*RouteError] for each problem of a route; see [RouteError.Field]. A paused route is
// healthy. Health makes no network call.
func (b *Broker) Health() error {
	e := b.ran.Load()
	if e == nil {
		return errors.New("natsx: broker is not running")
	}
	return e.health()
}

// Stats returns the counters of every route; replays have none. There are none before
// Run, and they are kept after it has returned.
func (b *Broker) Stats() Stats {
	e := b.ran.Load()
	if e == nil {
		return Stats{}
	}
	return e.stats()
}

// Pause stops the intake of this broker's routes with the durable: messages that were
// pulled are handled, and nothing more is pulled until [Broker.Resume]. Other brokers go
// on. It returns when nothing more arrives: within about a second while the server
// answers, and after 5 s in any case; messages still in transit then are redelivered.
// Pausing twice is harmless. The error is [ErrUnknownDurable] if no running route has the
// durable, also before [Broker.Ready] and during a shutdown.
func (b *Broker) Pause(durable string) error {
	return b.forDurable(durable, func(r *durableRoute) error {
		ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
		defer cancel()
		r.pause(ctx)
		return nil
	})
}

// Resume ends a [Broker.Pause]. It does not wait for the first message. Resuming a route
// that is not paused is harmless. The error is [ErrUnknownDurable] if no running route
// has the durable, or a [*RouteError] if its consumer has changed or it could not
// subscribe.
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

// WithStreams sets the streams that [Broker.Run] ensures before any route starts, as
// [StreamSpec.Ensure] does. A stream that captures a route's DLQ subject is created with
// DiscardNew, unless Discard or AllowMsgSchedules is set: a full DLQ then refuses letters,
// and their originals stay. Several calls add up; the same name twice is
// [ErrOptionConflict]. The streams are made in the JetStream of [WithJetStream], unless
// [StreamSpec.Domain] or [StreamSpec.APIPrefix] names another one. The default is none.
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
// each durable with a consumer of its own on it. The retries of routes with
// OrderedBy or PinnedBy, and of messages within 2 KiB of the server's maximum payload,
// wait in their own stream.
//
// The stream is made as [RetryStream] describes, with as many replicas as the streams of
// the routes, unless it exists or [WithStreams] makes it. Run refuses one that could lose
// retries with a [*StreamError] that matches [ErrBadRetryStream], and a server before 2.12
// with [ErrServerTooOld]; a bad name is [ErrInvalidName]. While the stream takes no
// copies, failed messages are held, up to 1,000 for each route, and Health tells. Only
// brokers should be allowed to publish to it. In addition to the permissions of a durable
// on it, a broker needs $JS.API.STREAM.INFO.<name> and $JS.API.STREAM.MSG.GET.<name>, and to
// publish to <name>.wait.> and <name>.due.>.
//
// All brokers of a durable use the same retry stream. A broker without it does not handle
// what waits there; take it away when it is empty.
func WithRetryStream(name string) Option {
	return func(b *Broker) { b.retry = &retryStream{name: name} }
}

// Replay handles stored messages again, within the bounds of spec. It ends at the last
// message that was stored when it started. It reads through an ephemeral consumer, which
// it deletes at the end; if the process is killed, the server removes the consumer after
// a minute or the stream's shorter limit. It acknowledges nothing and affects no
// durable.
//
// Messages are replayed as they are stored. A redriven message (see
// [DeadLetterQuery.Redrive]) is in the stream twice, as the original and as its copy with
// [HeaderRedriveTo], and both are handled. A schedule, which the server keeps to publish
// a message later, is skipped; the message that it published is not. So are the markers
// that [RouteBuilder.Tombstones] describes.
//
// While Run is active the replay uses its pool, where it takes turns with the routes;
// else it has its own pool. It also has its own if ctx is a handler's, since that handler
// occupies a worker while it waits; such a replay ends with the handler's context. The
// broker's middleware and observer apply.
//
// After a reconnect, a server restart or a leader election the replay continues after the
// last message received, without a gap or a repetition.
//
// It returns nil if everything was handled. Otherwise the report says how far it came,
// and the error is
//
//   - the faults of [ReplaySpec.Validate] and of the broker's options;
//   - a [*ReplayFailure] if a handler failed and ContinueOnError was not called;
//   - ctx's error if ctx ended: running handlers go on with a live context up to the
//     broker's drain timeout, after which a [*DrainError] is joined;
//   - [ErrBrokerStopped] if the broker's Run ended meanwhile;
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
	// Within a handler, a replay in the same pool could wait for that handler's worker.
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
