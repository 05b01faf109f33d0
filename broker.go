package natsx

import (
	"context"
	"errors"
	"log/slog"
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
// [DefaultWorkers]; below 1 is refused by [Broker.Run].
func WithWorkers(n int) Option { return func(b *Broker) { b.workers = n } }

// WithLogger sets where the broker logs. Default is [slog.Default].
func WithLogger(l *slog.Logger) Option { return func(b *Broker) { b.log = l } }

// WithMiddleware wraps the handlers of all routes; the first is the outermost.
func WithMiddleware(mw ...Middleware) Option {
	return func(b *Broker) { b.middleware = append(b.middleware, mw...) }
}

// WithObserver has o told of every finished attempt.
func WithObserver(o Observer) Option { return func(b *Broker) { b.observer = o } }

// WithDrainTimeout sets how long a shutdown waits for running handlers before it
// cancels their contexts. Default is [DefaultDrainTimeout]; it must be above zero.
func WithDrainTimeout(d time.Duration) Option { return func(b *Broker) { b.drainTimeout = d } }

// WithErrorText sets what of an error goes into a dead letter, for errors that
// hold what must not be stored. Default is the error's text.
func WithErrorText(fn func(error) string) Option { return func(b *Broker) { b.errorText = fn } }

// WithJetStream sets the JetStream context that durables and dead letters use,
// for a domain or an API prefix. It must be of the broker's connection.
func WithJetStream(js jetstream.JetStream) Option { return func(b *Broker) { b.js = js } }

// Broker runs routes on one shared pool of workers. It is safe for concurrent
// use. It does not own its connection.
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

	ready chan struct{} // closed when every route receives
}

// NewBroker returns a broker over nc.
func NewBroker(nc *nats.Conn, opts ...Option) *Broker {
	b := &Broker{
		nc:           nc,
		workers:      DefaultWorkers,
		drainTimeout: DefaultDrainTimeout,
		ready:        make(chan struct{}),
	}
	for _, opt := range opts {
		opt(b)
	}
	return b
}

// Run consumes specs until ctx ends.
func (b *Broker) Run(ctx context.Context, specs ...Spec) error {
	if err := Validate(specs...); err != nil {
		return err
	}
	return errors.New("natsx: not implemented")
}

// Ready is closed when every route receives.
func (b *Broker) Ready() <-chan struct{} { return b.ready }

// Health tells what keeps the broker from its work.
func (b *Broker) Health() error { return nil }

// Stats returns the counters of every route.
func (b *Broker) Stats() Stats { return Stats{} }
