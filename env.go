package natsx

import (
	"context"
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

// DrainGrace is how long handlers have to return after their contexts were cancelled at
// the drain timeout.
const DrainGrace = 2 * time.Second

// settings are the options of a broker that its routes and replays go by.
type settings struct {
	log          *slog.Logger
	workers      int
	drainTimeout time.Duration
	middleware   []Middleware
	observer     Observer
	errorText    func(error) string
}

// env is what a route, a replay or a tool gets instead of the broker: the connection
// and JetStream's API, the pool and what serves it, and the contexts of its life. It
// does not know the routes.
type env struct {
	*settings
	api    *api
	link   *link
	pool   *pool
	agenda *agenda
	keeper *keeper
	acks   *acker

	// intake ends when no more messages are wanted: the caller's context ended or
	// something failed. handlers is what handlers run under; it ends at the drain
	// timeout. closing bounds what is left to say to the server after that.
	intake        context.Context
	endIntake     context.CancelFunc
	handlers      context.Context
	abortHandlers context.CancelCauseFunc
	closing       context.Context
	endClosing    context.CancelFunc

	background sync.WaitGroup // what serves the routes and ends after them
	services   sync.WaitGroup // agenda, keeper, acker; they end last
	endService context.CancelFunc
	service    context.Context

	routesLooking int // routes that share the looks at their consumers

	// claim makes a durable of a stream one route's own.
	claim func(stream string, s Spec) error
	// claimFilter makes the filter one durable's own, on a work-queue stream that it
	// has claimed.
	claimFilter func(stream string, s Spec) error

	ownDurables []string // of all routes

	mu       sync.Mutex
	found    map[string]bool // streams that were logged as found
	failures []error
	inside   map[*visit]struct{} // calls of users' code that have not returned
}

// visit is a call of users' code.
type visit struct{ what string }

// newEnv makes an environment over a connection; close ends it.
func newEnv(ctx context.Context, s *settings, nc *nats.Conn, js jetstream.JetStream, workers int) *env {
	e := &env{settings: s, api: newAPI(nc, js), link: openLink(nc), pool: newPool(workers), agenda: newAgenda(), inside: map[*visit]struct{}{}}
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

// start starts the workers and what serves them.
func (e *env) start() {
	e.pool.start()
	e.services.Go(func() { e.agenda.run(e.service) })
	e.services.Go(func() { e.keeper.run(e.service) })
	go e.acks.run()
}

// close ends what start has started, after the workers, and joins it.
func (e *env) close() {
	e.endIntake()
	e.endService()
	e.services.Wait()
	e.endClosing()
	e.abortHandlers(context.Canceled)
	e.link.close()
}

// spawn starts a goroutine that the end of the environment waits for.
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

// visit calls users' code, which may panic, block or end its goroutine, and logs a panic.
// While it does not return, it is named by the end of the environment.
func (e *env) visit(what string, fn func()) {
	v := &visit{what}
	e.mu.Lock()
	e.inside[v] = struct{}{}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.inside, v)
		e.mu.Unlock()
		if p := recover(); p != nil {
			e.log.Error("natsx: "+what+" panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	fn()
}

// visitApart is visit on a goroutine of its own, for callers that must go on whatever
// the code does: it returns at the latest when the environment closes.
func (e *env) visitApart(what string, fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.visit(what, fn)
	}()
	select {
	case <-done:
	case <-e.closing.Done():
	}
}

// visiting names the users' code that has not returned.
func (e *env) visiting() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	count := map[string]int{}
	for v := range e.inside {
		count[v.what]++
	}
	return counted(count)
}

// counted lists names in order, with how often each occurs.
func counted(count map[string]int) (list []string) {
	for _, name := range slices.Sorted(maps.Keys(count)) {
		if n := count[name]; n > 1 {
			name = fmt.Sprintf("%s (%d times)", name, n)
		}
		list = append(list, name)
	}
	return list
}

// textOf is the text of err for a letter, by users' code.
func (e *env) textOf(err error) string {
	text := fmt.Sprintf("%T without a text", err) // when that ends its goroutine
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
