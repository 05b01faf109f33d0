package natsx

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// changeConsumer has somebody else update a durable.
func changeConsumer(t testing.TB, nc *nats.Conn, stream, durable string, change func(*jetstream.ConsumerConfig)) {
	t.Helper()
	cfg := consumerInfo(t, nc, stream, durable).Config
	change(&cfg)
	if _, err := jetStream(t, nc).UpdateConsumer(testContext(t), stream, cfg); err != nil {
		t.Fatal(err)
	}
}

// What of a changed consumer a route cannot follow ends it, before a message is lost.
func TestChangesThatEndRun(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		change func(*jetstream.ConsumerConfig)
		want   string
	}{
		{"deliveries limited", func(c *jetstream.ConsumerConfig) { c.MaxDeliver = 2 }, "maxDeliver 2"},
		{"headers only", func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true }, "headers only"},
		{"backoff", func(c *jetstream.ConsumerConfig) {
			c.MaxDeliver, c.BackOff = 5, []time.Duration{time.Second, time.Minute}
		}, ""},
		{"another filter", func(c *jetstream.ConsumerConfig) { c.FilterSubject = "orders.y" }, `its filter is ["orders.y"]`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const messages = 10
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			tried := make(chan struct{}, 1000)
			var empty tally
			_, log := newLogBook()
			spec := Route("orders.*").Durable("d").Retry(5).DLQ("dlq.x").Backoff(3*time.Second, 3*time.Second).Handle(func(_ context.Context, m *Msg) error {
				if len(m.Data) == 0 {
					empty.add(m.Subject)
				}
				tried <- struct{}{}
				return errors.New("broken")
			})
			r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), spec)
			publishMany(t, nc, messages, numbered("orders.x"))
			receive(t, tried, "a try")
			changeConsumer(t, nc, "ORDERS", "d", c.change)
			publishMany(t, nc, messages, numbered("orders.y"))
			err := r.wait(t)
			var route *RouteError
			if !errors.As(err, &route) || !errors.Is(err, ErrConsumerConflict) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), `"d"`) {
				t.Errorf("Run: %v, want a consumer conflict that tells %q", err, c.want)
			}
			if empty.sum() != 0 {
				t.Errorf("%d messages were handled without their payload", empty.sum())
			}
			ci := consumerInfo(t, nc, "ORDERS", "d")
			if n := stored(t, nc, "DLQ"); n != 0 || ci.AckFloor.Stream != 0 {
				t.Errorf("%d letters, acknowledged to %d: want none", n, ci.AckFloor.Stream)
			}
		})
	}
}

// The leases follow an AckWait that somebody lowers under running handlers.
func TestLoweredAckWaitIsFollowed(t *testing.T) {
	t.Parallel()
	for _, paused := range []bool{false, true} {
		t.Run("paused "+strconv.FormatBool(paused), func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			started, end := make(chan struct{}, 100), make(chan struct{})
			var seen tally
			book, log := newLogBook()
			b := NewBroker(connect(t, s.ClientURL()), WithWorkers(2), WithLogger(log))
			r := runBroker(t, b, Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").AckWait(30*time.Second).Handle(func(_ context.Context, m *Msg) error {
				if seen.add(string(m.Data)); string(m.Data) == "long" {
					started <- struct{}{}
					<-end
				}
				return nil
			}))
			publishAcked(t, nc, "orders.x", "long")
			receive(t, started, "the handler")
			if paused {
				if err := b.Pause("d"); err != nil {
					t.Fatal(err)
				}
			}
			changeConsumer(t, nc, "ORDERS", "d", func(c *jetstream.ConsumerConfig) { c.AckWait = time.Second })
			load := 0
			eventually(t, "it is noticed", func() bool {
				publishAcked(t, nc, "orders.x", strconv.Itoa(load))
				load++
				return len(book.alarms("the consumer's AckWait was changed")) > 0
			})
			if paused {
				if err := b.Resume("d"); err != nil {
					t.Fatal(err)
				}
			}
			// Three times the new lease.
			<-time.After(3 * time.Second)
			close(end)
			eventually(t, "all is settled", func() bool { return settled(t, nc, "ORDERS", "d") })
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			// The delivery that the server repeated before the change was noticed is not
			// run beside the one under way.
			if n := seen.get("long"); n != 1 {
				t.Errorf("the long message ran %d times, want once", n)
			}
		})
	}
}

// Bounds of pull requests that somebody sets are kept to.
func TestLoweredPullBoundsAreFollowed(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*jetstream.ConsumerConfig){
		"expires": func(c *jetstream.ConsumerConfig) { c.MaxRequestExpires = 2 * time.Second },
		"batch":   func(c *jetstream.ConsumerConfig) { c.MaxRequestBatch = 1 },
		"bytes":   func(c *jetstream.ConsumerConfig) { c.MaxRequestMaxBytes = 2048 },
		"all": func(c *jetstream.ConsumerConfig) {
			c.MaxRequestExpires, c.MaxRequestBatch, c.MaxRequestMaxBytes = time.Second, 2, 4096
		},
		"window":  func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 2000 },
		"nothing": func(c *jetstream.ConsumerConfig) { c.Description = "of somebody" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			var seen tally
			_, log := newLogBook()
			b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
			r := runBroker(t, b, Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
				seen.add(string(m.Data))
				return nil
			}))
			publishMany(t, nc, 100, numbered("orders.x"))
			eventually(t, "the first are handled", func() bool { return seen.keys() == 100 })
			changeConsumer(t, nc, "ORDERS", "d", change)
			publishMany(t, nc, 300, func(i int) *nats.Msg { return numbered("orders.x")(i + 100) })
			eventually(t, "all are handled", func() bool { return seen.keys() == 400 })
			eventually(t, "the route is well", func() bool { return b.Health() == nil })
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			seen.wantOnce(t, 400)
		})
	}
}

// Retries that leave healthy messages no room are told, and so is their end.
func TestCrowdedConsumerIsTold(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	var tried tally
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").Backoff(time.Minute, time.Minute).Handle(func(_ context.Context, m *Msg) error {
		if tried.add(string(m.Data)); m.Subject == "orders.bad" {
			return errors.New("broken")
		}
		return nil
	}))
	publishMany(t, nc, 10, numbered("orders.bad"))
	eventually(t, "the bad ones are tried", func() bool { return tried.keys() == 10 })
	changeConsumer(t, nc, "ORDERS", "d", func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 10 })
	publishMany(t, nc, 1, func(int) *nats.Msg { return &nats.Msg{Subject: "orders.good", Data: []byte("good")} })
	eventually(t, "it is told", func() bool { return errors.Is(b.Health(), errAckPendingFull) })
	changeConsumer(t, nc, "ORDERS", "d", func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 100 })
	eventually(t, "the good one is handled", func() bool { return tried.get("good") == 1 })
	eventually(t, "it is well again", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A consumer that is paused at the server is told once, and its end.
func TestConsumerPausedAtTheServer(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	handled := make(chan struct{}, 100)
	book, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Handle(func(context.Context, *Msg) error {
		handled <- struct{}{}
		return nil
	}))
	publishAcked(t, nc, "orders.x", "1")
	receive(t, handled, "the first")
	if _, err := jetStream(t, nc).PauseConsumer(testContext(t), "ORDERS", "d", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	publishAcked(t, nc, "orders.x", "2")
	eventually(t, "it is told", func() bool { h := b.Health(); return h != nil && strings.Contains(h.Error(), "paused at the server") })
	if len(book.alarms("paused at the server")) != 1 {
		t.Errorf("said %q, want it once", book.alarms(""))
	}
	if _, err := jetStream(t, nc).ResumeConsumer(testContext(t), "ORDERS", "d"); err != nil {
		t.Fatal(err)
	}
	receive(t, handled, "the second")
	eventually(t, "it is well again", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A stream that no longer takes the route's subject is told, and its return.
func TestSubjectThatLeavesTheStream(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	stream := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"a.*", "b.*"}})
	book, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("a.*").Durable("d").Handle(succeed))
	cfg := stream.CachedInfo().Config
	cfg.Subjects = []string{"b.*"}
	if _, err := jetStream(t, nc).UpdateStream(testContext(t), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is told", func() bool { return errors.Is(b.Health(), ErrNoStream) })
	if len(book.alarms("none of the filter's subjects")) != 1 {
		t.Errorf("said %q, want it once", book.alarms(""))
	}
	cfg.Subjects = []string{"a.*", "b.*"}
	if _, err := jetStream(t, nc).UpdateStream(testContext(t), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is well again", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// Retries that somebody purges leave the route well.
func TestPurgedRetriesAreNoTrouble(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	var tried tally
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").MaxAckPending(64).Backoff(24*time.Hour, 24*time.Hour).Handle(func(_ context.Context, m *Msg) error {
		if tried.add(string(m.Data)); m.Subject == "orders.bad" {
			return errors.New("broken")
		}
		return nil
	}))
	publishMany(t, nc, 64, numbered("orders.bad"))
	eventually(t, "the bad ones are tried", func() bool { return tried.keys() == 64 })
	publishAcked(t, nc, "orders.x", "waits")
	eventually(t, "the retries are told", func() bool { return errors.Is(b.Health(), errAckPendingFull) })
	if err := streamNow(t, nc, "ORDERS").Purge(testContext(t), jetstream.WithPurgeSubject("orders.bad")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what waited is handled", func() bool { return tried.get("waits") == 1 })
	eventually(t, "the route is well", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A pause that is longer than an adopted durable's inactive threshold neither loses the
// durable nor has anything handled again.
func TestPauseBeyondTheInactiveThreshold(t *testing.T) {
	t.Parallel()
	const threshold = time.Second
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "d", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy, InactiveThreshold: threshold,
	}); err != nil {
		t.Fatal(err)
	}
	var seen tally
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return nil
	}))
	publishMany(t, nc, 10, numbered("orders.x"))
	eventually(t, "all are handled", func() bool { return seen.keys() == 10 })
	if err := b.Pause("d"); err != nil {
		t.Fatal(err)
	}
	<-time.After(4 * threshold)
	if err := b.Resume("d"); err != nil {
		t.Errorf("Resume: %v", err)
	}
	publishMany(t, nc, 10, func(i int) *nats.Msg { return numbered("orders.x")(i + 10) })
	eventually(t, "all are handled", func() bool { return seen.keys() == 20 })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	seen.wantOnce(t, 20)
}
