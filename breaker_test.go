package natsx

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestBreakerStates(t *testing.T) {
	t.Parallel()
	const rest = 10 * time.Second
	at := func(s float64) int64 { return int64(s * float64(time.Second)) }
	type step struct {
		at     float64
		v      verdict
		cut    bool
		starts bool // mayStart before it
		void   bool
		turned BreakerState
		then   BreakerState
	}
	tests := map[string][]step{
		"successes between failures": {
			{1, verdictRetry, false, true, false, BreakerNone, BreakerClosed},
			{2, verdictSuccess, false, true, false, BreakerNone, BreakerClosed},
			{3, verdictPanic, false, true, false, BreakerNone, BreakerClosed},
		},
		"what says nothing of others": {
			{1, verdictRetry, false, true, false, BreakerNone, BreakerClosed},
			{2, verdictPermanent, false, true, false, BreakerNone, BreakerClosed},
			{3, verdictDiscard, false, true, false, BreakerNone, BreakerClosed},
			{3, verdictRetry, true, true, false, BreakerNone, BreakerClosed},
			{4, verdictRetryAfter, false, true, false, BreakerOpen, BreakerOpen},
		},
		"opens, probes, opens, probes, closes": {
			{1, verdictRetry, false, true, false, BreakerNone, BreakerClosed},
			{1, verdictRetry, false, true, false, BreakerOpen, BreakerOpen},
			{2, verdictRetry, false, false, true, BreakerNone, BreakerOpen},
			{3, verdictSuccess, false, false, false, BreakerNone, BreakerOpen},
			{12, verdictRetry, false, true, true, BreakerOpen, BreakerOpen},
			{13, verdictRetry, false, false, true, BreakerNone, BreakerOpen},
			{23, verdictPermanent, false, true, false, BreakerNone, BreakerHalfOpen},
			{24, verdictSuccess, false, true, false, BreakerClosed, BreakerClosed},
			{25, verdictRetry, false, true, false, BreakerNone, BreakerClosed},
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBreaker(2, rest)
			for i, s := range steps {
				if got := b.mayStart(at(s.at)); got != s.starts {
					t.Errorf("step %d: mayStart %v", i, got)
				}
				if b.state == BreakerHalfOpen && b.mayStart(at(s.at)) {
					t.Errorf("step %d: a second one may start", i)
				}
				void, turned := b.judge(at(s.at), s.v, s.cut)
				state, _ := b.now(at(s.at))
				if void != s.void || turned != s.turned || state != s.then {
					t.Errorf("step %d: void %v, turned %q, then %q; want %v, %q, %q", i, void, turned, state, s.void, s.turned, s.then)
				}
			}
		})
	}
}

type breakerObserver struct {
	observerFunc
	mu    sync.Mutex
	told  []BreakerState
	cause error
}

func (o *breakerObserver) ObserveBreaker(e BreakerEvent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.told = append(o.told, e.State)
	if e.Err != nil {
		o.cause = e.Err
	}
}

// An outage of what the handlers need makes no letters and uses up no attempts beyond
// those that found it out, however long it takes.
func TestBreakerOutlastsAnOutage(t *testing.T) {
	t.Parallel()
	const messages, workers, cooldown = 3000, 16, 100 * time.Millisecond
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	var out atomic.Bool
	out.Store(true)
	var failures atomic.Int64
	var runs tally
	down := errors.New("database is down")
	o := &breakerObserver{observerFunc: func(Event) {}}
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(workers), WithObserver(o))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Breaker(3, cooldown).
		Handle(func(_ context.Context, m *Msg) error {
			if out.Load() {
				failures.Add(1)
				return down
			}
			runs.add(string(m.Data))
			return nil
		}))
	eventually(t, "it is open", func() bool { return b.Stats().Routes[0].Breaker == BreakerOpen })
	eventually(t, "Health says so", func() bool {
		err := b.Health()
		return errors.Is(err, down) && strings.Contains(err.Error(), "breaker is open")
	})
	probes := failures.Load()
	eventually(t, "it has probed some times", func() bool { return failures.Load() > probes+3 })
	eventually(t, "nothing waits for it", func() bool { return b.Stats().Routes[0].Waiting == 0 })
	began := time.Now()
	before := failures.Load()
	eventually(t, "ten more cool-downs are over", func() bool { return time.Since(began) > 10*cooldown })
	if n := failures.Load() - before; n > 11 {
		t.Errorf("%d handlers were started within 10 cool-downs", n)
	}
	out.Store(false)
	eventually(t, "all are handled", func() bool { return settled(t, nc, "ORDERS", "d") })
	runs.wantOnce(t, messages)
	st := b.Stats().Routes[0]
	if st.Retried > workers || st.Dead != 0 || stored(t, nc, "DLQ") != 0 {
		t.Errorf("%d attempts and %d letters, want at most %d and 0: %+v", st.Retried, st.Dead, workers, st)
	}
	if st.Breaker != BreakerClosed {
		t.Errorf("the breaker is %q", st.Breaker)
	}
	if err := b.Health(); err != nil {
		t.Errorf("Health: %v", err)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.told) < 2 || o.told[0] != BreakerOpen || o.told[len(o.told)-1] != BreakerClosed || !errors.Is(o.cause, down) {
		t.Errorf("observed %q, cause %v", o.told, o.cause)
	}
}

// A message that always fails does not keep a breaker open while there are others: they
// are probed, and it dies.
func TestBreakerProbesAnother(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, 20, numbered("orders.x"))
	var good atomic.Int64
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(1))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Breaker(1, 50*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			if m.Sequence() == 1 {
				return errors.New("poison")
			}
			good.Add(1)
			return nil
		}))
	eventually(t, "the others are handled", func() bool { return good.Load() == 19 })
	eventually(t, "it is dead", func() bool {
		publish(t, nc, numbered("orders.x")(20))
		return stored(t, nc, "DLQ") == 1
	})
}
