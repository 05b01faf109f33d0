package natsx

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// startAtOnce bounds how many routes start at the same time.
const startAtOnce = 16

// engine is one Run of a broker: starting, running, draining, over.
type engine struct {
	*Broker
	js          jetstream.JetStream
	pool        *pool
	acks        *acker
	specs       []Spec
	routes      []runner
	discovery   *discovery // nil until it answers, and without WithService
	durables    int        // number of durable routes
	base        time.Time  // of the engine's clock
	apiPrefix   string     // of JetStream's API, with its last dot
	inboxPrefix string

	// intake ends when no more messages are wanted: the caller's context ended
	// or something failed. handlers is what handlers run under; it ends at the
	// drain timeout. closing bounds what is left to say to the server after that.
	intake        context.Context
	endIntake     context.CancelFunc
	handlers      context.Context
	abortHandlers context.CancelCauseFunc
	closing       context.Context
	endClosing    context.CancelFunc

	unsent atomic.Bool  // an acknowledgement waits for a reconnect
	awake  atomic.Int64 // engine time at which the process was last known to run; see pulse

	background sync.WaitGroup // goroutines that routes start when something is wrong
	replaying  sync.WaitGroup // replays that use the pool
	asking     chan struct{}  // slots for those that ask for their consumer

	mu         sync.Mutex
	state      string // for Health, empty when all is well
	failures   []error
	claimed    map[string]Spec // by stream and durable
	lastForced time.Time       // when the connection was last forced to reconnect
	replays    map[*replay]struct{}
	noReplays  bool // the drain has begun
}

func newEngine(ctx context.Context, b *Broker, js jetstream.JetStream, specs []Spec) *engine {
	e := &engine{
		Broker: b, js: js, specs: specs, pool: newPool(b.workers), base: time.Now(),
		asking: make(chan struct{}, startAtOnce), state: "is starting", claimed: map[string]Spec{},
		replays: map[*replay]struct{}{},
	}
	e.acks = newAcker(func(replies []string) {
		for _, reply := range replies {
			if err := b.nc.Publish(reply, ackAck); err != nil {
				b.log.Warn("natsx: acknowledgement not sent", "reply", reply, "error", err)
			}
		}
		e.said()
	})
	e.intake, e.endIntake = context.WithCancel(ctx)
	live := context.WithoutCancel(ctx)
	e.handlers, e.abortHandlers = context.WithCancelCause(live)
	e.closing, e.endClosing = context.WithCancel(live)
	e.apiPrefix = apiPrefix(js)
	e.inboxPrefix = inboxPrefix(b.nc)
	for _, spec := range specs {
		if spec.route.durable != "" {
			e.durables++
		}
	}
	for _, spec := range specs {
		e.routes = append(e.routes, newRunner(e, spec))
	}
	return e
}

// now is the engine's clock: nanoseconds since its start, monotonic.
func (e *engine) now() int64 { return int64(time.Since(e.base)) }

func (e *engine) run() error {
	defer e.endIntake()
	async := watchAsync(e.nc, e.onAsyncError)
	status := e.nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.CLOSED)
	watcher := make(chan struct{})
	go func() {
		defer close(watcher)
		e.watchStatus(status)
	}()
	if e.nc.IsClosed() {
		e.fail(ErrConnectionClosed)
	}
	e.pool.start()
	go e.acks.run()
	prepared := e.prepare()
	keeper, endKeeper := context.WithCancel(context.Background())
	var kept sync.WaitGroup
	kept.Go(func() { e.keep(keeper) })
	e.awake.Store(e.now())
	kept.Go(func() { e.pulse(keeper) })
	if prepared && e.open() {
		e.setState("")
		close(e.ready)
		e.log.Info("natsx: broker is ready", "routes", len(e.routes), "workers", e.workers)
		<-e.intake.Done()
	}
	e.setState("is draining")
	err := e.drain()
	endKeeper()
	kept.Wait()
	e.replaying.Wait()
	e.endClosing()
	e.background.Wait()
	async.stop()
	e.nc.RemoveStatusListener(status)
	<-watcher
	e.abortHandlers(context.Canceled)
	e.setState("has stopped")

	e.mu.Lock()
	defer e.mu.Unlock()
	return errors.Join(append(e.failures, err)...)
}

// prepare makes the streams and finds or makes what every route needs. It tells
// whether the routes can be opened.
func (e *engine) prepare() bool {
	if !e.awaitConnection() {
		return false
	}
	for _, s := range e.streams {
		if err := s.forLetters(e.specs).ensure(e.intake, e.js, e.log); err != nil && e.intake.Err() == nil {
			e.note(err)
		}
	}
	if e.failed() {
		e.endIntake()
		return false
	}
	return e.each(func(r runner) error { return r.locate(e.intake) })
}

// open has every route receive, and tells whether all do.
func (e *engine) open() bool {
	if !e.each(runner.start) {
		return false
	}
	if e.service != nil {
		var err error
		if e.discovery, err = startDiscovery(e); err != nil {
			e.fail(err)
			return false
		}
	}
	for e.nc.FlushTimeout(apiTimeout) != nil {
		if e.intake.Err() != nil || e.nc.IsClosed() {
			return false
		}
	}
	return e.intake.Err() == nil
}

// each calls fn for every route, several at once, and reports all failures: one
// does not stop the others from finding theirs.
func (e *engine) each(fn func(runner) error) bool {
	slots := make(chan struct{}, startAtOnce)
	var wg sync.WaitGroup
	for _, r := range e.routes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := fn(r); err != nil && e.intake.Err() == nil {
				e.note(err)
			}
		})
	}
	wg.Wait()
	if e.failed() {
		e.endIntake()
	}
	return e.intake.Err() == nil
}

// awaitConnection waits until the connection is up, which a first connect that is
// retried in the background may take a while for.
func (e *engine) awaitConnection() bool {
	logged := false
	for !e.nc.IsConnected() {
		if !logged {
			logged = true
			e.log.Warn("natsx: waiting for the connection", "status", e.nc.Status().String())
		}
		if !wait(e.intake, 50*time.Millisecond) {
			return false
		}
	}
	return e.intake.Err() == nil
}

// claim makes a durable of a stream one route's own.
func (e *engine) claim(stream string, s Spec) error {
	key := stream + "\x00" + s.route.durable
	e.mu.Lock()
	defer e.mu.Unlock()
	if earlier, taken := e.claimed[key]; taken {
		return s.duplicateOf(earlier)
	}
	e.claimed[key] = s
	return nil
}

// note records a failure; fail also ends the intake.
func (e *engine) note(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, known := range e.failures {
		if known.Error() == err.Error() {
			return
		}
	}
	e.failures = append(e.failures, err)
}

func (e *engine) fail(err error) {
	e.note(err)
	e.endIntake()
}

func (e *engine) failed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.failures) > 0
}

func (e *engine) setState(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = s
}

func (e *engine) isReady() bool {
	select {
	case <-e.ready:
		return e.intake.Err() == nil
	default:
		return false
	}
}

// call makes one call of JetStream's API within apiTimeout.
func (e *engine) call(ctx context.Context, subject string, fn func(context.Context) error) error {
	return requestWith(ctx, e.nc, e.apiPrefix+subject, fn)
}

// onAsyncError ends the run when a route lacks a permission.
func (e *engine) onAsyncError(_ *nats.Subscription, err error) {
	denied := permissionError(err)
	if denied == nil {
		return
	}
	for _, r := range e.routes {
		if r.denied(denied) {
			r.base().fail(r.base().spec.fault(denied.Operation, fmt.Sprintf("%q", denied.Subject), "permission denied by the server", denied))
		}
	}
	if e.service != nil && e.service.denied(denied) {
		e.fail(e.service.failure(denied))
	}
}

func (e *engine) watchStatus(status <-chan nats.Status) {
	lost := false
	for s := range status {
		switch s {
		case nats.RECONNECTING:
			if !lost {
				e.log.Warn("natsx: connection lost, routes wait for it", "error", e.nc.LastError())
			}
			lost = true
		case nats.CONNECTED:
			if lost {
				e.log.Info("natsx: connection is back", "server", e.nc.ConnectedUrlRedacted())
			}
			lost = false
			for _, r := range e.routes {
				r.verify(true)
			}
		case nats.CLOSED:
			e.fail(ErrConnectionClosed)
		}
	}
}

// reconnect replaces a connection that is up in name only, but not one after
// another. It tells whether the connection will come back as a new one.
func (e *engine) reconnect() bool {
	if !e.nc.IsConnected() {
		return true
	}
	e.mu.Lock()
	early := time.Since(e.lastForced) < 2*time.Second
	if !early {
		e.lastForced = time.Now()
	}
	e.mu.Unlock()
	if early {
		return false
	}
	e.log.Warn("natsx: connection does not answer, reconnecting", "server", e.nc.ConnectedUrlRedacted())
	if err := e.nc.ForceReconnect(); err != nil {
		e.log.Error("natsx: reconnect failed", "error", err)
		return false
	}
	return true
}

// alive makes sure of the connection with a round trip. Messages that come in
// meanwhile are as good as its answer, and so is a new connection.
func (e *engine) alive() bool {
	before := e.nc.Stats()
	if e.nc.FlushTimeout(time.Second) == nil {
		return true
	}
	now := e.nc.Stats()
	return now.InMsgs != before.InMsgs || now.Reconnects != before.Reconnects
}

// keep visits every route all the time and renews the leases that they name.
func (e *engine) keep(ctx context.Context) {
	var due []*delivery
	for period := e.period(); wait(ctx, period); {
		due = due[:0]
		for _, r := range e.routes {
			due = r.tick(e.now(), due)
		}
		if len(due) > 0 && e.nc.IsConnected() {
			e.renew(due)
		}
		clear(due)
	}
}

// period is how often leases are looked after: several times within the shortest.
func (e *engine) period() time.Duration {
	period := 500 * time.Millisecond
	for _, r := range e.routes {
		if d, ok := r.(*durableRoute); ok && d.target.ackWait > 0 {
			period = min(period, max(d.target.ackWait/(4*renewals), 5*time.Millisecond))
		}
	}
	return period
}

// pulse keeps the time at which the process was last known to run. One that was
// stopped for a while finds messages in its socket that are as old as the stop:
// the time stays behind until the server has answered a ping, which comes after
// them.
func (e *engine) pulse(ctx context.Context) {
	for period := e.period(); wait(ctx, period); {
		now := e.now()
		if now-e.awake.Load() > 5*int64(period) && e.nc.IsConnected() {
			for _, r := range e.routes {
				r.verify(false)
			}
			// What was read before the answer is with the routes a moment later.
			if e.nc.FlushTimeout(time.Second) != nil || !wait(ctx, period) {
				continue
			}
			now = e.now()
		}
		e.awake.Store(now)
	}
}

// renew sends in-progress acks. They count once the server has answered a ping
// behind them: a lease is never longer in the client's eyes than in the server's.
func (e *engine) renew(due []*delivery) {
	sent := e.now()
	renewed := due[:0]
	for _, d := range due {
		// Past its end a lease may be somebody else's.
		if sent < d.lease.Load() && d.renewing(func(d *delivery) { e.nc.Publish(d.msg.reply, ackInProgress) }) {
			renewed = append(renewed, d)
		}
	}
	if len(renewed) == 0 {
		return
	}
	if e.nc.FlushTimeout(time.Second) != nil {
		if !e.alive() {
			e.reconnect()
		}
		return
	}
	// The answer may come from behind a network that stood still meanwhile. What it
	// proves is that the server has the acks by now: a lease that has ended by now
	// may have ended before they came.
	confirmed := e.now()
	for _, d := range renewed {
		if confirmed < d.lease.Load() {
			d.lease.Store(sent + int64(d.route.lease))
		}
	}
}

// admit lets a replay use the pool, unless the drain has begun.
func (e *engine) admit(r *replay) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.noReplays || e.intake.Err() != nil {
		return false
	}
	e.replays[r] = struct{}{}
	e.replaying.Add(1)
	return true
}

// leave is an admitted replay's last word.
func (e *engine) leave(r *replay) {
	e.mu.Lock()
	delete(e.replays, r)
	e.mu.Unlock()
	e.replaying.Done()
}

// haltReplays stops the replays and admits no more. What they give the pool after
// it has returned is only what waits behind a running message of its key.
func (e *engine) haltReplays() {
	e.mu.Lock()
	e.noReplays = true
	replays := slices.Collect(maps.Keys(e.replays))
	e.mu.Unlock()
	for _, r := range replays {
		r.halt(ErrBrokerStopped)
	}
}

// drain ends the intake and waits for what is in hand.
func (e *engine) drain() error {
	e.endIntake()
	e.haltReplays()
	if e.discovery != nil {
		e.discovery.stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), e.drainTimeout)
	defer cancel()
	var stopping sync.WaitGroup
	for _, r := range e.routes {
		stopping.Go(func() { r.stop(ctx) })
	}
	stopping.Wait()
	select {
	case <-e.pool.drained():
		e.pool.close()
		<-e.pool.gone
		e.acks.stop()
		return e.flush(ctx)
	case <-ctx.Done():
	}
	cut := &DrainError{Timeout: e.drainTimeout, Abandoned: e.pool.unfinished()}
	e.pool.close()
	for _, r := range e.routes {
		if c, ok := r.(*coreRoute); ok {
			c.giveUp()
		}
	}
	e.abortHandlers(ErrDrainTimeout)
	grace := time.NewTimer(DrainGrace)
	defer grace.Stop()
	select {
	case <-e.pool.gone:
	case <-grace.C:
		e.endClosing() // for workers that only wait for the server's word
		select {
		case <-e.pool.gone:
		case <-time.After(100 * time.Millisecond):
		}
		e.pool.mu.Lock()
		cut.Running = e.pool.busy
		e.pool.mu.Unlock()
		for _, r := range e.routes {
			if c, ok := r.(*coreRoute); ok {
				c.abandon()
			}
		}
	}
	e.acks.stop()
	e.nc.FlushTimeout(time.Second)
	return cut
}

// said is told that acknowledgements were handed to the connection.
func (e *engine) said() {
	if !e.nc.IsConnected() {
		e.unsent.Store(true)
	}
}

// flush has the server take what was said last. Without a connection it waits for
// one, unless no acknowledgement does.
func (e *engine) flush(ctx context.Context) error {
	for {
		if e.nc.IsClosed() || !e.nc.IsConnected() && !e.unsent.Load() {
			return nil // what a closed one means is told elsewhere
		}
		try, cancel := context.WithTimeout(ctx, apiTimeout)
		err := e.nc.FlushWithContext(try)
		cancel()
		if err == nil {
			return nil
		}
		if !wait(ctx, 50*time.Millisecond) {
			return fmt.Errorf("%w: the last acknowledgements were not flushed within %s: %w", ErrDrainTimeout, e.drainTimeout, err)
		}
	}
}

func (e *engine) health() error {
	var errs []error
	e.mu.Lock()
	if e.state != "" {
		errs = append(errs, errors.New("natsx: broker "+e.state))
	}
	errs = append(errs, e.failures...)
	e.mu.Unlock()
	if !e.nc.IsConnected() {
		errs = append(errs, fmt.Errorf("natsx: connection is %s", strings.ToLower(e.nc.Status().String())))
	}
	for _, r := range e.routes {
		errs = append(errs, r.base().health()...)
	}
	return errors.Join(errs...)
}

func (e *engine) stats() Stats {
	e.pool.mu.Lock()
	defer e.pool.mu.Unlock()
	s := Stats{Routes: make([]RouteStats, len(e.routes))}
	for i, r := range e.routes {
		b := r.base()
		st := b.stats
		st.Running, st.Waiting = b.running, b.queue.len()
		if d, ok := r.(*durableRoute); ok {
			st.Delayed = d.delayed.after(e.now())
		}
		s.Routes[i] = st
	}
	return s
}
