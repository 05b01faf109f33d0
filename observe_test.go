package natsx

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Of several observers each is told, also when the one before it panics.
func TestObserversAddUp(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	_, log := newLogBook()
	first, second := &observed{}, &observed{}
	b := NewBroker(nc, WithLogger(log), WithWorkers(1), WithObserver(first), WithObserver(nil),
		WithObserver(observerFunc(func(Event) { panic("no") })), WithObserver(second))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(1).Backoff(time.Millisecond, 40*time.Millisecond).DLQ("dlq.orders").
		Handle(func(_ context.Context, m *Msg) error {
			switch string(m.Data) {
			case "later":
				if m.Attempt() == 1 {
					return RetryAfter(70*time.Millisecond, errors.New("later"))
				}
			case "never":
				return Permanent(errors.New("never"))
			}
			return nil
		}))
	publishAcked(t, nc, "orders.new", "good", "later", "never")
	routeStats(t, b, "all are settled", func(s RouteStats) bool { return s.Succeeded == 2 && s.Dead == 1 })
	if _, err := b.Replay(testContext(t), Replay("orders.*").UntilSequence(1).Handle(succeed)); err != nil {
		t.Fatal(err)
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	line := func(e Event) string {
		return string(e.Msg.Data) + " " + string(e.Outcome) + " " + string(e.Reason) + " " + e.Delay.String() + " " + e.Msg.Route()
	}
	want := []string{
		"good succeeded  0s orders.*", "good succeeded  0s orders.*", "later retried  70ms orders.*", "later succeeded  0s orders.*",
		"never dead permanent 0s orders.*",
	}
	for _, o := range []*observed{first, second} {
		got := o.lines(line)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("events differ (-want +got):\n%s", diff)
		}
	}
}

// The times of an event are those of its message: it came, waited for the worker, and ran.
func TestEventTimes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	for _, of := range []struct {
		name    string
		route   RouteBuilder
		subject string
	}{
		{"durable", Route("orders.*").Durable("d"), "orders.new"},
		{"core", Route("core"), "core"},
	} {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			events := make(chan Event, 2)
			begun, leave := make(chan time.Time, 2), make(chan struct{})
			b := NewBroker(nc, WithWorkers(1), WithObserver(observerFunc(func(e Event) { events <- e })))
			runBroker(t, b, of.route.Handle(func(context.Context, *Msg) error {
				begun <- time.Now()
				<-leave
				return nil
			}))
			sent := time.Now()
			for range 2 {
				if err := nc.Publish(of.subject, nil); err != nil {
					t.Fatal(err)
				}
			}
			first := receive(t, begun, "the first to run")
			routeStats(t, b, "the first runs", func(s RouteStats) bool {
				return s.Running == 1 && s.OldestRunning > 20*time.Millisecond && s.OldestRunning <= time.Since(sent)
			})
			close(leave)
			for i := range 2 {
				e := receive(t, events, "an event")
				began := first
				if i == 1 {
					began = receive(t, begun, "the second to run")
				}
				if off := began.Sub(e.Started); off < -time.Millisecond || off > 10*time.Second {
					t.Errorf("message %d was started %s before its handler ran", i, off)
				}
				if e.Waited <= 0 || e.Waited > e.Started.Sub(sent)+time.Millisecond {
					t.Errorf("message %d waited %s of the %s since it was sent", i, e.Waited, e.Started.Sub(sent))
				}
				if i == 0 && e.Duration < 20*time.Millisecond {
					t.Errorf("the first ran for %s", e.Duration)
				}
			}
			routeStats(t, b, "none runs", func(s RouteStats) bool { return s.Running == 0 && s.OldestRunning == 0 })
		})
	}
}

// What the server says of a durable is in its route's stats, for as long as that runs.
func TestStatsOfTheConsumer(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.new", "1", "2", "3", "4", "5")
	var failed atomic.Bool
	leave := make(chan struct{})
	b := NewBroker(nc, WithWorkers(1))
	r := runBroker(t, b,
		Route("orders.*").Durable("d").MaxAckPending(2).Backoff(time.Hour, time.Hour).Handle(func(context.Context, *Msg) error {
			if failed.CompareAndSwap(false, true) {
				return errors.New("later")
			}
			<-leave
			return nil
		}),
		Route("core").Handle(succeed))
	routeStats(t, b, "its consumer is full", func(s RouteStats) bool {
		return s.Consumer != nil && s.Consumer.NumAckPending == 2 && s.Consumer.NumPending == 3 && time.Since(s.Consumer.At) < testLimit
	})
	if got := b.Stats().Routes[1].Consumer; got != nil {
		t.Errorf("a core route has a consumer: %+v", got)
	}
	close(leave)
	routeStats(t, b, "nothing is left", func(s RouteStats) bool { return s.Consumer.NumPending == 0 })
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	if got := b.Stats().Routes[0].Consumer; got != nil {
		t.Errorf("a stopped route has a consumer: %+v", got)
	}
}

// An event of a batch says how many messages its handler was called with.
func TestEventsOfABatch(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	events := make(chan Event, 3)
	b := NewBroker(nc, WithObserver(observerFunc(func(e Event) { events <- e })))
	runBroker(t, b,
		Route("orders.a").Durable("a").Batch(2, time.Hour).HandleBatch(func(context.Context, []*Msg) error { return nil }),
		Route("orders.b").Durable("b").Handle(succeed))
	publishAcked(t, nc, "orders.a", "1", "2")
	publishAcked(t, nc, "orders.b", "3")
	for range 3 {
		e := receive(t, events, "an event")
		want := 2
		if e.Durable == "b" {
			want = 0
		}
		if e.Batch != want {
			t.Errorf("%s: a batch of %d, want %d", e.Durable, e.Batch, want)
		}
	}
}
