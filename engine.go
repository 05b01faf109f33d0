package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// startAtOnce is how many routes start at the same time.
const startAtOnce = 16

// engine is one Run of a broker, from start to drain. It alone knows the routes.
type engine struct {
	*env
	service   *service // nil without WithService
	streams   []StreamSpec
	retry     *retryStream // nil for none
	specs     []Spec
	ready     chan struct{} // the broker's
	routes    []runner      // all, in the order given to Run
	durables  []*durableRoute
	cores     []*coreRoute
	discovery *discovery // nil until it is started, and without WithService
	hung      hungWatch
	outages   connectLog // of the connection

	replaying sync.WaitGroup // replays that use the pool

	stateMu   sync.Mutex
	state     string          // for Health, empty when all is well
	waitsFor  error           // what keeps the broker from its start, or nil
	claimed   map[string]Spec // by stream and durable
	replays   map[*replay]struct{}
	noReplays bool // the drain has begun
}

// hasStopped is the state of an engine whose Run has returned.
const hasStopped = "has stopped"

// runner is a route that runs.
type runner interface {
	base() *route
	// locate finds and checks what the route needs.
	locate(ctx context.Context) error
	// start begins to receive.
	start() error
	// stop ends the intake: when it returns nothing more arrives. ctx bounds it.
	stop(ctx context.Context)
	// denied reports whether the route needs what the server refused.
	denied(*PermissionError) bool
	report() RouteStats
}

func newEngine(ctx context.Context, b *Broker, js jetstream.JetStream, specs []Spec) *engine {
	e := &engine{
		env:     newEnv(ctx, &b.settings, b.nc, js, b.workers),
		service: b.service, streams: b.streams, retry: b.retry, specs: specs, ready: b.ready,
		state: "is starting", claimed: map[string]Spec{}, replays: map[*replay]struct{}{},
	}
	e.claim, e.claimFilter = e.claimOnce, e.claimFilterOnce
	for _, spec := range specs {
		if spec.route.durable == "" {
			r := newCoreRoute(e.env, spec)
			e.cores, e.routes = append(e.cores, r), append(e.routes, r)
		} else {
			r := newDurableRoute(e.env, spec)
			e.durables, e.routes = append(e.durables, r), append(e.routes, r)
			e.ownDurables = append(e.ownDurables, spec.route.durable)
			if e.retry != nil && retried(spec) {
				r.moveTo(e.retry)
			}
		}
	}
	for _, d := range e.durables {
		e.env.durables++
		if d.retries != nil {
			e.env.durables++
		}
	}
	e.hung.init(e)
	return e
}

func (e *engine) run() error {
	async := watchAsync(e.api.nc, e.onAsyncError)
	status := e.link.watch(e.onStatus)
	if e.api.nc.IsClosed() {
		e.fail(ErrConnectionClosed)
	}
	e.start()
	if e.prepare() && e.open() {
		defer e.anchor()()
		e.setState("")
		close(e.ready)
		e.log.Info("natsx: broker is ready", "routes", len(e.routes), "workers", e.workers)
		<-e.intake.Done()
	}
	e.setState("is draining")
	err := e.drain()
	e.link.unwatch(status)
	async.stop()
	e.close()
	e.setState(hasStopped)

	e.mu.Lock()
	defer e.mu.Unlock()
	return errors.Join(append(e.failures, err)...)
}

// prepare ensures the streams and locates all routes. It reports whether the routes can
// be opened.
func (e *engine) prepare() bool {
	if !e.awaitConnection() {
		return false
	}
	if e.retries() {
		if err := e.retry.serverFault(e.api.nc.ConnectedServerVersion()); err != nil {
			e.fail(err)
			return false
		}
	}
	for _, s := range e.streams {
		e.markFound(s.name)
		if err := s.forLetters(e.specs).ensureBy(e.intake, e.api, e.log, e.waiting); err != nil && e.intake.Err() == nil {
			e.note(err)
		}
		e.setWaitsFor(nil)
	}
	if e.failed() {
		e.endIntake()
		return false
	}
	if !e.each(func(r runner) error { return r.locate(e.intake) }) || !e.locateRetries() {
		return false
	}
	e.spawn(e.warnOfLookAlikes)
	return true
}

// warnOfLookAlikes warns of durables that were created beside one with nearly the same
// name: a slip of the pen, which would have the new one handle the whole stream.
func (e *engine) warnOfLookAlikes() {
	names := map[string][]string{} // by stream
	for _, d := range e.durables {
		stream := d.target.stream
		if !d.created || e.intake.Err() != nil {
			continue
		}
		if _, asked := names[stream]; !asked {
			names[stream], _ = e.api.consumerNames(e.intake, stream) // without the permission there is no warning
			names[stream] = slices.DeleteFunc(names[stream], func(name string) bool { return slices.Contains(e.ownDurables, name) })
		}
		if other := lookAlike(d.target.consumer, names[stream]); other != "" {
			e.log.Warn("natsx: the durable is new, and looks like one that exists: is its name spelled as intended?",
				d.names("stream", stream, "existing", other)...)
		}
	}
}

// retries reports whether a route uses the retry stream.
func (e *engine) retries() bool {
	return slices.ContainsFunc(e.durables, func(d *durableRoute) bool { return d.retries != nil })
}

// locateRetries opens the retry stream and finds or makes its consumers.
func (e *engine) locateRetries() bool {
	if !e.retries() {
		return true
	}
	if err := e.retry.open(e.intake, e.api, e.log, sources(e.durables)); err != nil {
		if e.intake.Err() == nil {
			e.fail(err)
		}
		return false
	}
	return e.each(func(r runner) error {
		if d, ok := r.(*durableRoute); ok && d.retries != nil {
			return d.retries.locateRetries(e.intake)
		}
		return nil
	})
}

// waiting is the policy of retries of a stream that is ensured; the health says what the
// broker waits for.
func (e *engine) waiting(a *api, policy retry) retry {
	told := policy.told
	policy.told = func(err error) {
		e.setWaitsFor(err)
		told(err)
	}
	return e.starting(a, policy)
}

func (e *engine) setWaitsFor(err error) {
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	e.waitsFor = err
}

// open starts every route, and reports whether all receive.
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
	for e.api.nc.FlushTimeout(apiTimeout) != nil {
		if e.intake.Err() != nil || e.api.nc.IsClosed() {
			return false
		}
	}
	return e.intake.Err() == nil
}

// anchor keeps a message unread in a subscription until release is called. Meanwhile an
// application's [nats.Conn.Drain] does not close the connection, so that running
// messages can still be settled and answered.
func (e *engine) anchor() (release func()) {
	nc := e.api.nc
	inbox := nc.NewInbox()
	ask := func() error { return nil }
	if len(e.responders()) > 0 { // the user may publish to inboxes
		ask = func() error { return nc.Publish(inbox, nil) }
	}
	for _, d := range e.durables {
		if d.target.canIdle { // such a pull takes nothing, and is always answered
			ask = func() error {
				return nc.PublishRequest(d.target.nextSubject, inbox, pullRequest{batch: 1, maxBytes: 1, expires: time.Millisecond}.body())
			}
		}
	}
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return func() {}
	}
	if err := ask(); err != nil {
		e.log.Debug("natsx: connection has no anchor", "error", err)
	}
	return func() {
		if sub.Unsubscribe() != nil { // the connection drains, and waits for it to be read
			sub.NextMsg(time.Second)
		}
	}
}

// each calls fn for every route, several at once, and records all failures. It reports
// whether the broker can go on.
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

// awaitConnection waits until the connection is up: the first connect may be retried in
// the background.
func (e *engine) awaitConnection() bool {
	logged := false
	for !e.link.up() || !e.api.nc.IsConnected() {
		if !logged {
			logged = true
			e.log.Warn("natsx: waiting for the connection", "status", e.link.state().String(), "error", e.api.nc.LastError())
		}
		if !wait(e.intake, 50*time.Millisecond) {
			return false
		}
	}
	return e.intake.Err() == nil
}

// claimOnce reserves a durable of a stream for one route, or returns a fault.
func (e *engine) claimOnce(stream string, s Spec) error {
	key := stream + "\x00" + s.route.durable
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	if earlier, taken := e.claimed[key]; taken {
		return s.duplicateOf(earlier)
	}
	e.claimed[key] = s
	return nil
}

// claimFilterOnce refuses a route of a work-queue stream whose filter overlaps with that
// of another durable.
func (e *engine) claimFilterOnce(stream string, s Spec) error {
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	for key, other := range e.claimed {
		if of, _, _ := strings.Cut(key, "\x00"); of == stream && s.overlaps(other) {
			return s.overlapWith(other, stream)
		}
	}
	return nil
}

func (e *engine) setState(s string) {
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	e.state = s
}

// stopped reports whether Run has returned, or is about to.
func (e *engine) stopped() bool {
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	return e.state == hasStopped
}

func (e *engine) isReady() bool {
	select {
	case <-e.ready:
		return e.intake.Err() == nil
	default:
		return false
	}
}

// onAsyncError ends the run when a route lacks a permission.
func (e *engine) onAsyncError(_ *nats.Subscription, err error) {
	denied := permissionError(err)
	if denied == nil {
		return
	}
	for _, r := range e.routes {
		if r.denied(denied) {
			b := r.base()
			b.fail(b.spec.fault(denied.Operation, fmt.Sprintf("%q", denied.Subject), "permission denied by the server", denied))
		}
	}
	if e.service != nil && e.service.denied(denied) {
		e.fail(e.service.failure(denied))
	}
}

// onStatus handles a change of the connection's status.
func (e *engine) onStatus(s nats.Status) {
	switch s {
	case nats.RECONNECTING, nats.DISCONNECTED:
		if why := e.link.lastCause(); e.outages.worth(why) { // each failed attempt has the same status
			e.log.Warn("natsx: connection lost, routes wait for it", "error", why)
		}
	case nats.CONNECTED:
		e.outages.end()
		e.acks.connected()
		e.log.Info("natsx: connection is up", "server", e.api.nc.ConnectedUrlRedacted())
		for _, d := range e.durables {
			d.verify(true, nil)
			if d.retries != nil {
				d.retries.verify(true, nil)
			}
		}
	case nats.DRAINING_SUBS:
		e.fail(fmt.Errorf("%w: the application drained it", ErrConnectionClosed))
	case nats.CLOSED:
		e.fail(closedBy(e.link.lastCause()))
	}
}

// closedBy is ErrConnectionClosed with the cause, if that is known.
func closedBy(why error) error {
	if why == nil {
		return ErrConnectionClosed
	}
	return fmt.Errorf("%w: %w", ErrConnectionClosed, why)
}

// admit lets a replay use the pool, unless the drain has begun.
func (e *engine) admit(r *replay) bool {
	e.stateMu.Lock()
	defer e.stateMu.Unlock()
	if e.noReplays || e.intake.Err() != nil {
		return false
	}
	e.replays[r] = struct{}{}
	e.replaying.Add(1)
	return true
}

// leave ends an admitted replay.
func (e *engine) leave(r *replay) {
	e.stateMu.Lock()
	delete(e.replays, r)
	e.stateMu.Unlock()
	e.replaying.Done()
}

// haltReplays stops the replays and admits no more. After that they queue only messages
// that wait for a running one with the same key.
func (e *engine) haltReplays() {
	e.stateMu.Lock()
	e.noReplays = true
	replays := make([]*replay, 0, len(e.replays))
	for r := range e.replays {
		replays = append(replays, r)
	}
	e.stateMu.Unlock()
	for _, r := range replays {
		r.halt(ErrBrokerStopped)
	}
}

// drain ends the intake, waits for the messages in hand, and ends the workers.
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
		err := e.flush(ctx)
		for _, d := range e.durables {
			stopping.Go(func() { d.unpin(ctx) })
		}
		stopping.Wait()
		e.endServing(0)
		return err
	case <-ctx.Done():
	}
	cut := &DrainError{Timeout: e.drainTimeout, Abandoned: e.pool.unfinished()}
	e.pool.close()
	for _, r := range e.cores {
		r.giveUp()
	}
	e.abortHandlers(ErrDrainTimeout)
	grace := time.NewTimer(DrainGrace)
	defer grace.Stop()
	select {
	case <-e.pool.gone:
	case <-grace.C:
		e.endClosing() // for workers that only wait for an answer of the server
		select {
		case <-e.pool.gone:
		case <-time.After(100 * time.Millisecond):
		}
		cut.Running = e.pool.running()
		for _, r := range e.cores {
			r.abandon()
		}
	}
	e.acks.stop()
	e.api.nc.FlushTimeout(time.Second)
	e.endServing(DrainGrace)
	cut.Stuck = append(e.pool.stuck(), e.openUserCalls()...)
	return cut
}

// endServing ends the background goroutines and replays, and waits for them for grace
// plus a second: users' code may block them for ever.
func (e *engine) endServing(grace time.Duration) {
	e.endClosing()
	done := make(chan struct{})
	go func() {
		e.background.Wait()
		e.replaying.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(grace + time.Second):
	}
}

// flush flushes pending acks. Without a connection it waits for one, unless no acks are
// pending.
func (e *engine) flush(ctx context.Context) error {
	for {
		if e.link.state() == nats.CLOSED || !e.link.up() && !e.acks.unsent.Load() {
			return nil // onStatus reports a closed connection
		}
		try, cancel := context.WithTimeout(ctx, apiTimeout)
		err := e.api.nc.FlushWithContext(try)
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
	e.stateMu.Lock()
	if e.state != "" {
		errs = append(errs, errors.New("natsx: broker "+e.state))
	}
	if e.waitsFor != nil {
		errs = append(errs, e.waitsFor)
	}
	e.stateMu.Unlock()
	e.mu.Lock()
	errs = append(errs, e.failures...)
	e.mu.Unlock()
	if !e.link.up() {
		err := fmt.Errorf("natsx: connection is %s", strings.ToLower(e.link.state().String()))
		if why := e.link.lastCause(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		errs = append(errs, err)
	}
	if err := e.hung.fault(); err != nil {
		errs = append(errs, err)
	}
	for _, r := range e.routes {
		errs = append(errs, r.base().health()...)
	}
	for _, d := range e.durables {
		if d.retries != nil {
			errs = append(errs, d.retries.health()...)
		}
	}
	return errors.Join(errs...)
}

func (e *engine) stats() Stats {
	s := Stats{Routes: make([]RouteStats, len(e.routes))}
	for i, r := range e.routes {
		s.Routes[i] = r.report()
	}
	return s
}

// hungWatch detects that all workers hang: each runs the same work for longer than the
// Timeout of its route.
type hungWatch struct {
	e     *engine
	alarm alarm

	mu    sync.Mutex
	since map[*worker]hungWork
	err   error
}

type hungWork struct {
	turn uint64
	at   int64
}

// hungEvery is how often the workers are checked while all are busy.
const hungEvery = time.Second

func (h *hungWatch) init(e *engine) {
	h.e = e
	h.alarm.ring = h.look
	e.pool.full = func() { e.agenda.set(&h.alarm, processTime()+int64(hungEvery)) }
}

func (h *hungWatch) look(now int64) {
	p := h.e.pool
	p.mu.Lock()
	all := p.busy >= p.size
	seen := make(map[*worker]hungWork, len(p.workers))
	hung := all
	h.mu.Lock()
	for w := range p.workers {
		if w.lane == nil {
			continue
		}
		since, known := h.since[w]
		if !known || since.turn != w.turns {
			since = hungWork{w.turns, now}
		}
		seen[w] = since
		if timeout := w.lane.timeout; timeout == 0 || now-since.at <= int64(timeout) {
			hung = false
		}
	}
	p.mu.Unlock()
	h.since = seen
	before := h.err
	h.err = nil
	if hung {
		h.err = errHung
	}
	h.mu.Unlock()
	switch {
	case hung && before == nil:
		h.e.log.Error("natsx: all workers hang", "workers", h.e.workers, "error", errHung)
	case !hung && before != nil:
		h.e.log.Info("natsx: workers are free again")
	}
	if all {
		h.e.agenda.set(&h.alarm, now+int64(hungEvery))
	}
}

var errHung = errors.New("natsx: all workers are blocked by handlers that have not returned within the Timeout of their route")

func (h *hungWatch) fault() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}
