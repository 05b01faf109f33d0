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
	// DrainGrace is how long handlers have to return after their contexts were
	// cancelled at the drain timeout.
	DrainGrace = 2 * time.Second
)

// Option configures a [Broker].
type Option func(*Broker)

// WithWorkers sets how many handlers run at once over all routes. Default is
// [DefaultWorkers]; below 1 is refused by [Broker.Run].
func WithWorkers(n int) Option { return func(b *Broker) { b.workers = n } }

// WithLogger sets where the broker logs. Default, also for nil, is
// [slog.Default].
func WithLogger(l *slog.Logger) Option { return func(b *Broker) { b.log = l } }

// WithMiddleware wraps the handlers of all routes, responders and replays
// included; the first is the outermost. A middleware that does not call the next
// handler decides itself: of a request it then sends no payload. Nil is refused by
// [Broker.Run].
func WithMiddleware(mw ...Middleware) Option {
	return func(b *Broker) { b.middleware = append(b.middleware, mw...) }
}

// WithObserver has o told of every finished attempt. Of several the last one
// holds.
func WithObserver(o Observer) Option { return func(b *Broker) { b.observer = o } }

// WithDrainTimeout sets how long a shutdown waits for running handlers before it
// cancels their contexts. Default is [DefaultDrainTimeout]; it must be above zero.
func WithDrainTimeout(d time.Duration) Option { return func(b *Broker) { b.drainTimeout = d } }

// WithErrorText sets what of an error goes into a dead letter, for errors that
// hold what must not be stored. Default is the error's text. fn is called by many
// at once; nil is refused by [Broker.Run].
func WithErrorText(fn func(error) string) Option { return func(b *Broker) { b.errorText = fn } }

// WithJetStream sets the JetStream context that durables and dead letters use,
// for a domain or an API prefix. It must be of the broker's connection.
func WithJetStream(js jetstream.JetStream) Option { return func(b *Broker) { b.js = js } }

// Broker runs routes on one shared pool of workers. It is safe for concurrent
// use, and runs once. It does not own its connection, and leaves it open.
type Broker struct {
	nc           *nats.Conn
	js           jetstream.JetStream
	log          *slog.Logger
	workers      int
	drainTimeout time.Duration
	middleware   []Middleware
	streams      []StreamSpec
	observer     Observer
	errorText    func(error) string
	service      *service // nil without WithService

	ready chan struct{} // closed when every route receives
	ran   atomic.Pointer[engine]
}

// NewBroker returns a broker over nc, which must outlive it. Faulty options are
// reported by [Broker.Run].
func NewBroker(nc *nats.Conn, opts ...Option) *Broker {
	b := &Broker{
		nc:           nc,
		workers:      DefaultWorkers,
		drainTimeout: DefaultDrainTimeout,
		errorText:    error.Error,
		ready:        make(chan struct{}),
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
// the handlers are cancelled, and after a grace of [DrainGrace] Run returns in any
// case. It returns nil after a clean drain that ctx asked for, and else the joined
// causes:
//
//   - the faults of [Validate] and of the options, before any network call;
//   - [*RouteError]s of all routes that could not start or go on, with what they
//     wrap: [ErrNoStream], [ErrAmbiguousStream], [ErrDuplicateDurable],
//     [ErrWouldLose], [ErrBadDLQ], [ErrConsumerConflict], [ErrConsumerDeleted],
//     [ErrStreamDeleted], [ErrPermission], or an error of the server;
//   - [ErrConnectionClosed] when the connection was closed for good;
//   - a [*DrainError] when the drain was cut off.
//
// What passes by itself (a reconnect, an election, a server that starts) is
// retried for as long as ctx lives; [Broker.Health] shows it. A broker runs once:
// another Run returns [ErrAlreadyRun].
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
			return r.base().spec.fault("middleware", "", "returned no handler", ErrNoHandler)
		}
	}
	if !b.ran.CompareAndSwap(nil, e) {
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
	return errors.Join(append(faults, validateStreams(b.streams))...)
}

// Ready is closed when every route receives. It stays open when Run fails first.
func (b *Broker) Ready() <-chan struct{} { return b.ready }

// Health returns nil while every route does its work, and else the joined reasons
// why not: not running yet or any more, not connected, a route whose DLQ takes no
// letters, whose consumer does not answer, or whose retries fill MaxAckPending.
// A paused route is healthy.
func (b *Broker) Health() error {
	e := b.ran.Load()
	if e == nil {
		return errors.New("natsx: broker is not running")
	}
	return e.health()
}

// Stats returns the counters of every route. There are none before Run, and they
// are kept after it has returned.
func (b *Broker) Stats() Stats {
	e := b.ran.Load()
	if e == nil {
		return Stats{}
	}
	return e.stats()
}

// Pause stops the intake of all routes of this process with the durable: what was
// pulled is finished, nothing more is pulled until [Broker.Resume]. Other
// processes go on. It returns when nothing more arrives: after half a second at
// most while the server answers, and after 5 s in any case. Pausing twice is
// harmless. ErrUnknownDurable tells that no running route has the durable.
func (b *Broker) Pause(durable string) error {
	return b.forDurable(durable, func(r *durableRoute) error {
		ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
		defer cancel()
		r.pause(ctx)
		return nil
	})
}

// Resume ends a Pause. Resuming what is not paused is harmless.
func (b *Broker) Resume(durable string) error {
	return b.forDurable(durable, (*durableRoute).resume)
}

func (b *Broker) forDurable(name string, fn func(*durableRoute) error) error {
	e := b.ran.Load()
	found := false
	var errs []error
	if e != nil && e.isReady() {
		for _, r := range e.routes {
			if d, ok := r.(*durableRoute); ok && d.spec.route.durable == name {
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

// DrainError is a shutdown that did not end within the drain timeout. It is an
// [ErrDrainTimeout].
type DrainError struct {
	Timeout   time.Duration
	Abandoned int // messages that were not finished at the timeout: the server delivers them again
	Running   int // of those, handlers that still ran when Run returned
}

// Error gives the counts.
func (e *DrainError) Error() string {
	return fmt.Sprintf("natsx: drain timeout: %d messages were not finished within %s, %d handlers still run",
		e.Abandoned, e.Timeout, e.Running)
}

// Unwrap gives [ErrDrainTimeout].
func (e *DrainError) Unwrap() error { return ErrDrainTimeout }
