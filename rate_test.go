package natsx

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestBucket(t *testing.T) {
	t.Parallel()
	const second = int64(time.Second)
	b := newBucket(100, 0)
	if at := b.next(0); at != 0 {
		t.Errorf("a new bucket has a token at %d", at)
	}
	b.take(0)
	if at := b.next(0); at < second/100 || at > second/100+1000 {
		t.Errorf("the next token comes at %d, want after 10 ms", at)
	}
	if n := b.soon(0); n != 2 {
		t.Errorf("%d may start within 20 ms, want 2", n)
	}
	if at := b.reach(0, 5); at < 29*second/1000 || at > 31*second/1000 {
		t.Errorf("5 may start soon at %d, want at 30 ms", at)
	}
	b.fill(second)
	if b.tokens != 10 {
		t.Errorf("a full bucket holds %v, want a tenth of a second's worth", b.tokens)
	}
	slow := newBucket(0.5, 0)
	slow.fill(100 * second)
	if slow.tokens != 1 {
		t.Errorf("a full slow bucket holds %v, want 1", slow.tokens)
	}
}

// starts keeps when handlers were started.
type starts struct {
	mu sync.Mutex
	at []time.Time
}

func (s *starts) mark() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, time.Now())
	return len(s.at)
}

// within fails where more were started in any stretch of time than the rate and its
// bucket allow. A loaded machine starts late, never early.
func (s *starts) within(t *testing.T, perSecond float64) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	most := max(perSecond/10, 1)
	for i := range s.at {
		for j := i; j < len(s.at); j++ {
			allowed := most + perSecond*s.at[j].Sub(s.at[i]).Seconds()
			// What was taken from the bucket may have been started a moment later.
			if n := j - i + 1; float64(n) > 1.1*allowed+2 {
				t.Fatalf("%d were started within %v, want at most %.1f", n, s.at[j].Sub(s.at[i]), allowed)
			}
		}
	}
}

func TestRateIsKept(t *testing.T) {
	t.Parallel()
	for _, rate := range []float64{20, 300} {
		s := startServer(t)
		nc := connect(t, s.ClientURL())
		orders(t, nc, inMemory)
		publishMany(t, nc, 2000, numbered("orders.x"))
		var began starts
		want := int(rate)
		reached := make(chan struct{})
		begin := time.Now()
		r := runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("orders.*").Durable("d").Rate(rate).Handle(func(context.Context, *Msg) error {
			if began.mark() == want {
				close(reached)
			}
			return nil
		}))
		receive(t, reached, "a second's worth was started")
		took := time.Since(begin)
		// What is not near its turn is left to others.
		info := consumerInfo(t, nc, "ORDERS", "d")
		if hold := int(info.Delivered.Consumer) - int(info.AckFloor.Consumer); hold > int(rate)/5+10 {
			t.Errorf("rate %v: %d are held", rate, hold)
		}
		if err := r.stop(t); err != nil {
			t.Error(err)
		}
		if took < 800*time.Millisecond {
			t.Errorf("rate %v: %d were started within %v", rate, want, took)
		}
		began.within(t, rate)
	}
}

// Two processes share what a rate leaves, and a stop does not wait for the rest.
func TestRateLeavesMessagesToOthers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, 200, numbered("orders.x"))
	var slow, fast atomic.Int64
	spec := func(n *atomic.Int64) RouteBuilder { return Route("orders.*").Durable("d") }
	count := func(n *atomic.Int64) Handler { return func(context.Context, *Msg) error { n.Add(1); return nil } }
	a := runBroker(t, NewBroker(connect(t, s.ClientURL())), spec(&slow).Rate(2).Handle(count(&slow)))
	eventually(t, "the slow one has begun", func() bool { return slow.Load() > 0 })
	runBroker(t, NewBroker(connect(t, s.ClientURL())), spec(&fast).Handle(count(&fast)))
	eventually(t, "all are handled", func() bool { return slow.Load()+fast.Load() >= 200 })
	if n := fast.Load(); n < 150 {
		t.Errorf("the one without a rate got %d of 200", n)
	}
	begun := time.Now()
	if err := a.stop(t); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("the stop took %v", took)
	}
}

func TestRateOfACoreRoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	var began starts
	done := make(chan struct{})
	runBroker(t, NewBroker(nc), Route("events.*").Rate(50).Handle(func(context.Context, *Msg) error {
		if began.mark() == 30 {
			close(done)
		}
		return nil
	}))
	for range 30 {
		if err := nc.Publish("events.x", nil); err != nil {
			t.Fatal(err)
		}
	}
	receive(t, done, "all are handled")
	began.within(t, 50)
}
