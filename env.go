package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// DrainGrace is how long handlers may still run after the drain timeout has cancelled
// their contexts.
const DrainGrace = 2 * time.Second

// startPatience is how long a start waits for JetStream to answer. A server without
// JetStream does not answer either.
const startPatience = 10 * time.Second

// settings are the options of a broker that its routes and replays use.
type settings struct {
	log          *slog.Logger
	workers      int
	drainTimeout time.Duration
	middleware   []Middleware
	observers    []Observer
	errorText    func(error) string
}

// env is what routes and replays get instead of the broker: the connection and the
// JetStream API, the pool and its helpers, and the contexts. It does not know the routes.
type env struct {
	*settings
	api    *api
	link   *link
	pool   *pool
	agenda *agenda
	keeper *keeper
	acks   *acker

	// intake ends when the caller's context ends or something failed: no more messages
	// are accepted. handlers is the context of all handlers; it ends at the drain timeout.
	// closing bounds the last requests to the server after that.
	intake        context.Context
	endIntake     context.CancelFunc
	handlers      context.Context
	abortHandlers context.CancelCauseFunc
	closing       context.Context
	endClosing    context.CancelFunc

	background sync.WaitGroup // goroutines of spawn
	services   sync.WaitGroup // agenda and keeper; they end last
	endService context.CancelFunc
	service    context.Context

	durables int // routes that share the looks at their consumers

	// claim reserves a durable of a stream for one route, or returns a fault.
	claim func(stream string, s Spec) error
	// claimFilter makes the filter one durable's own, on a work-queue stream that it
	// has claimed.
	claimFilter func(stream string, s Spec) error

	ownDurables []string // of all routes

	mu        sync.Mutex
	found     map[string]bool // streams that were logged as found
	failures  []error
	userCalls map[*userCall]struct{} // that have not returned
}

// userCall is a running call of users' code.
type userCall struct{ what string }

// newEnv returns an environment over a connection. close ends it.
func newEnv(ctx context.Context, s *settings, nc *nats.Conn, js jetstream.JetStream, workers int) *env {
	e := &env{settings: s, api: newAPI(nc, js), link: openLink(nc), pool: newPool(workers), agenda: newAgenda(), userCalls: map[*userCall]struct{}{}}
	e.intake, e.endIntake = context.WithCancel(ctx)
	live := context.WithoutCancel(ctx)
	e.handlers, e.abortHandlers = context.WithCancelCause(live)
	e.closing, e.endClosing = context.WithCancel(live)
	e.service, e.endService = context.WithCancel(context.Background())
	e.keeper = newKeeper(e.link, e.pool, e.log)
	e.acks = newAcker(nc, e.link, e.log)
	watch := &alarm{ring: func(int64) { e.pool.watch() }}
	e.pool.alarm = func(at int64) { e.agenda.set(watch, at) }
	return e
}

// start starts the workers and their helpers.
func (e *env) start() {
	e.pool.start()
	e.services.Go(func() { e.agenda.run(e.service) })
	e.services.Go(func() { e.keeper.run(e.service) })
	go e.acks.run()
}

// close ends the helpers and waits for them, after the workers have ended.
func (e *env) close() {
	e.endIntake()
	e.endService()
	e.services.Wait()
	e.endClosing()
	e.abortHandlers(context.Canceled)
	e.link.close()
}

// starting is the policy r for calls of the JetStream API of something that starts. It
// gives up if JetStream does not answer for startPatience on a connection that is up.
func (e *env) starting(a *api, r retry) retry {
	silent := func(err error) bool { return errors.Is(err, nats.ErrNoResponders) && e.link.up() }
	var since time.Time // when it did not answer for the first time
	enough := r.enough
	r.enough = func(err error) bool {
		if !silent(err) {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		}
		return !since.IsZero() && time.Since(since) > startPatience || enough != nil && enough(err)
	}
	r.explain = func(err error) error {
		if !silent(err) {
			return err
		}
		return failure(fmt.Sprintf("JetStream is not enabled, or its server is starting: no answer on %q: %s", a.prefix, cause(err)), ErrNoJetStream, err)
	}
	return r
}

// spawn starts a goroutine that a drain waits for.
func (e *env) spawn(fn func()) { e.background.Go(fn) }

// foundStream logs a stream that a route uses, once for all routes.
func (e *env) foundStream(info *jetstream.StreamInfo) {
	if e.markFound(info.Config.Name) {
		streamReport{did: "found", info: info}.log(e.log)
	}
}

// markFound notes that a stream is logged, and reports whether it was not before.
func (e *env) markFound(stream string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.found[stream] {
		return false
	}
	if e.found == nil {
		e.found = map[string]bool{}
	}
	e.found[stream] = true
	return true
}

// note records a failure; fail also ends the intake.
func (e *env) note(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, known := range e.failures {
		if known.Error() == err.Error() {
			return
		}
	}
	e.failures = append(e.failures, err)
}

func (e *env) fail(err error) {
	e.note(err)
	e.endIntake()
}

func (e *env) failed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.failures) > 0
}

// callUser calls users' code, which may panic, block or end its goroutine, and logs a
// panic. While the call has not returned, openUserCalls names it.
func (e *env) callUser(what string, fn func()) {
	v := &userCall{what}
	e.mu.Lock()
	e.userCalls[v] = struct{}{}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.userCalls, v)
		e.mu.Unlock()
		if p := recover(); p != nil {
			e.log.Error("natsx: "+what+" panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	fn()
}

// observe reports a finished attempt to every observer.
func (e *env) observe(what string, ctx context.Context, ev Event) {
	for _, o := range e.observers {
		e.callUser(what, func() { o.Observe(ctx, ev) })
	}
}

// callUserApart is callUser on a separate goroutine, for callers that must not be blocked
// for ever: it returns when closing ends at the latest.
func (e *env) callUserApart(what string, fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.callUser(what, fn)
	}()
	select {
	case <-done:
	case <-e.closing.Done():
	}
}

// openUserCalls describes the calls of users' code that have not returned.
func (e *env) openUserCalls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	count := map[string]int{}
	for v := range e.userCalls {
		count[v.what]++
	}
	return counted(count)
}

// counted lists names in order, with how many times each occurs.
func counted(count map[string]int) (list []string) {
	for _, name := range slices.Sorted(maps.Keys(count)) {
		if n := count[name]; n > 1 {
			name = fmt.Sprintf("%s (%d times)", name, n)
		}
		list = append(list, name)
	}
	return list
}

// textOf returns the text of err for a letter, from the user's WithErrorText.
func (e *env) textOf(err error) string {
	text := fmt.Sprintf("%T without a text", err) // if that ends its goroutine
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if v := recover(); v != nil {
				text += fmt.Sprint(": ", v)
			}
		}()
		text = e.errorText(err)
	}()
	<-done
	return text
}
