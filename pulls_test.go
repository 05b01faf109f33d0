package natsx

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// slowLink forwards to the server at url so many bytes a second, with little room on
// the way.
func slowLink(t testing.TB, to string, perSecond int) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	forward := func(to, from net.Conn, perSecond int) {
		defer to.Close()
		defer from.Close()
		buf := make([]byte, 16<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			if perSecond > 0 {
				time.Sleep(time.Duration(n) * time.Second / time.Duration(perSecond))
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", strings.TrimPrefix(to, "nats://"))
			if err != nil {
				client.Close()
				continue
			}
			upstream.(*net.TCPConn).SetReadBuffer(64 << 10)
			client.(*net.TCPConn).SetWriteBuffer(64 << 10)
			go forward(upstream, client, 0)
			go forward(client, upstream, perSecond)
		}
	}()
	return "nats://" + ln.Addr().String()
}

func inMemory(cfg *jetstream.StreamConfig) { cfg.Storage = jetstream.MemoryStorage }

// sized is a message of size bytes whose first ones are its number.
func sized(subject string, size int) func(i int) *nats.Msg {
	return func(i int) *nats.Msg {
		return &nats.Msg{Subject: subject, Data: append(fmt.Appendf(nil, "%d ", i), make([]byte, size)...)}
	}
}

func numberOf(m *Msg) string {
	n, _, _ := strings.Cut(string(m.Data), " ")
	return n
}

// A handler that was fast and gets slow keeps nothing that it has not started: each
// stop takes as long as what runs, and what was given back is no attempt.
func TestHandlerThatTurnsSlowGivesBack(t *testing.T) {
	t.Parallel()
	const messages, fast, slow = 3000, 300, 500 * time.Millisecond
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	var runs tally
	for process := range 4 {
		var calls atomic.Int64
		b := NewBroker(connect(t, s.ClientURL()), WithWorkers(16))
		r := runBroker(t, b, Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").Handle(func(ctx context.Context, m *Msg) error {
			runs.add(string(m.Data))
			if calls.Add(1) > fast {
				return busyFor(context.WithoutCancel(ctx), slow)
			}
			return nil
		}))
		eventually(t, "it is slow", func() bool { return calls.Load() >= fast+16 })
		began := time.Now()
		if err := r.stop(t); err != nil {
			t.Errorf("process %d: %v", process, err)
		}
		if took := time.Since(began); took > 10*slow {
			t.Errorf("process %d took %v to stop with handlers of %v", process, took, slow)
		}
	}
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		runs.add(string(m.Data))
		return nil
	}))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	runs.wantOnce(t, messages)
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters", n)
	}
}

// Handlers that hang keep what they run, and nothing else for longer than a lease.
func TestHangingHandlersHoldNothingElse(t *testing.T) {
	t.Parallel()
	const messages, fast, workers = 2000, 1000, 4
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	hang := make(chan struct{})
	defer close(hang)
	var calls atomic.Int64
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(workers)), Route("orders.*").Durable("d").AckWait(500*time.Millisecond).
		Handle(func(context.Context, *Msg) error {
			if calls.Add(1) > fast {
				<-hang
			}
			return nil
		}))
	eventually(t, "they hang", func() bool { return calls.Load() == fast+workers })
	// What was asked for before they hung may still come, and is given back.
	var delivered uint64
	since := time.Now()
	eventually(t, "nothing waits for those that hang, and for two leases nothing is delivered to them", func() bool {
		if now := consumerInfo(t, nc, "ORDERS", "d").Delivered.Consumer; now != delivered {
			delivered, since = now, time.Now()
		}
		return time.Since(since) > time.Second && r.Stats().Routes[0].Waiting == 0
	})
}

// A replica that starts after handlers have turned slow gets its share at once.
func TestSecondReplicaGetsItsShare(t *testing.T) {
	t.Parallel()
	const messages, fast, workers, slow = 1000, 500, 8, 2 * time.Second
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	var all atomic.Int64
	spec := func(calls *atomic.Int64) Spec {
		return Route("orders.*").Durable("d").Handle(func(ctx context.Context, m *Msg) error {
			calls.Add(1)
			if all.Add(1) > fast {
				return busyFor(ctx, slow)
			}
			return nil
		})
	}
	var first, second atomic.Int64
	one := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(workers), WithDrainTimeout(time.Millisecond)), spec(&first))
	eventually(t, "it is slow", func() bool { return all.Load() >= fast+workers })
	two := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(workers), WithDrainTimeout(time.Millisecond)), spec(&second))
	eventually(t, "the second is full", func() bool { return two.Stats().Routes[0].Running == workers })
	if st := one.Stats().Routes[0]; st.Waiting > 0 {
		eventually(t, "the first holds no more than runs", func() bool { return one.Stats().Routes[0].Waiting == 0 })
	}
}

// What waits for workers that another route holds is given to a replica that has some.
func TestWhatWaitsIsGivenToOthers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "BOTH", Subjects: []string{"a.*", "b.*"}})
	hold := make(chan struct{})
	defer close(hold)
	var handled [2]tally
	block := make(chan struct{})
	broker := func(i int) *running {
		return runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(2), WithDrainTimeout(100*time.Millisecond)),
			Route("a.*").Durable("a").Handle(func(ctx context.Context, m *Msg) error {
				select {
				case <-hold:
				case <-ctx.Done():
				}
				return nil
			}),
			Route("b.*").Durable("b").AckWait(20*time.Second).Handle(func(ctx context.Context, m *Msg) error {
				handled[i].add(string(m.Data))
				if i == 0 {
					select { // the worker that is kept for it is taken as well
					case <-block:
					case <-ctx.Done():
					}
				}
				return nil
			}))
	}
	first := broker(0)
	publishMany(t, nc, 1, numbered("a.x"))
	publishMany(t, nc, 10, numbered("b.x"))
	eventually(t, "the first is full", func() bool { return handled[0].sum() == 1 })
	broker(1)
	eventually(t, "the second has the rest", func() bool { return handled[1].sum() == 9 })
	if got := first.Stats().Routes[1]; got.Running != 1 || got.Waiting != 0 {
		t.Errorf("the first has %+v, want what runs alone", got)
	}
	close(block)
}

// However large the messages and however many the routes: nothing is lost on the way,
// no lease ends, and the server never takes the client for a slow consumer. One with
// a small buffer does so until the window is small enough; nothing runs twice then.
func TestLargeBacklogs(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name             string
		routes, messages int
		size             int
		maxPending       int64
		ackWait          time.Duration
	}{
		{"large messages", 2, 2000, 20 << 10, 0, DefaultAckWait},
		{"a small send buffer", 2, 2000, 10 << 10, 2 << 20, 2 * time.Second},
		{"the largest messages", 3, 40, 1<<20 - 100, 0, DefaultAckWait},
		{"many routes", 100, 120, 1 << 10, 0, 2 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, func(o *server.Options) { o.MaxPending = tt.maxPending })
			nc := connect(t, s.ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "BIG", Subjects: []string{"big.*"}, Storage: jetstream.MemoryStorage})
			createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq"}})
			var seen tally
			var specs []Spec
			for i := range tt.routes {
				publishMany(t, nc, tt.messages, sized(fmt.Sprintf("big.%d", i), tt.size))
				specs = append(specs, Route(fmt.Sprintf("big.%d", i)).Durable(fmt.Sprintf("d%d", i)).AckWait(tt.ackWait).Retry(0).DLQ("dlq").
					Handle(func(_ context.Context, m *Msg) error {
						seen.add(m.Subject + " " + numberOf(m))
						return nil
					}))
			}
			b := NewBroker(connect(t, s.ClientURL()))
			r := runBroker(t, b, specs...)
			eventually(t, "all are handled", func() bool { return seen.keys() == tt.routes*tt.messages })
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			seen.wantOnce(t, tt.routes*tt.messages)
			for _, st := range b.Stats().Routes {
				if (st.Lapsed != 0 || st.Received != uint64(tt.messages)) && tt.maxPending == 0 {
					t.Errorf("%s: %d received and %d lapsed, want %d and none", st.Route, st.Received, st.Lapsed, tt.messages)
				}
			}
			if n := s.NumSlowConsumers(); n > 5 || n != 0 && tt.maxPending == 0 {
				t.Errorf("%d times a slow consumer", n)
			}
		})
	}
}

// A link that carries little has little on its way: nothing gets old in transit.
func TestSlowLinkLosesNoLease(t *testing.T) {
	t.Parallel()
	const messages, size, ackWait = 1000, 10 << 10, 2 * time.Second
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, sized("orders.x", size))
	var seen tally
	b := NewBroker(connect(t, slowLink(t, s.ClientURL(), 2<<20)))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(2).AckWait(ackWait).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		seen.add(numberOf(m))
		return nil
	}))
	eventually(t, "all are handled", func() bool { return seen.keys() == messages })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	seen.wantOnce(t, messages)
	if st := b.Stats().Routes[0]; st.Received != messages || st.Lapsed != 0 || stored(t, nc, "DLQ") != 0 {
		t.Errorf("got %+v and %d letters", st, stored(t, nc, "DLQ"))
	}
}

// Renewals are confirmed in time though another route fills the link with messages.
func TestRenewalsPassBesideData(t *testing.T) {
	t.Parallel()
	const ackWait = 2 * time.Second
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "BOTH", Subjects: []string{"data", "long"}, Storage: jetstream.MemoryStorage})
	publishMany(t, nc, 10_000, sized("data", 4<<10))
	publishMany(t, nc, 4, numbered("long"))
	var data atomic.Int64
	b := NewBroker(connect(t, slowLink(t, s.ClientURL(), 6<<20)))
	r := runBroker(t, b,
		Route("data").Durable("data").Handle(func(context.Context, *Msg) error {
			data.Add(1)
			return nil
		}),
		Route("long").Durable("long").AckWait(ackWait).Handle(func(ctx context.Context, _ *Msg) error { return busyFor(ctx, 2*ackWait) }))
	eventually(t, "the long ones are done", func() bool { return b.Stats().Routes[1].Succeeded == 4 })
	if n := data.Load(); n == 10_000 {
		t.Log("the data was done before: the test shows less than it means to")
	}
	if got := b.Stats().Routes[1]; got.Received != 4 || got.Lapsed != 0 {
		t.Errorf("got %+v, want each delivered once", got)
	}
	r.stop(t)
}

// A message that comes while a route pauses or stops is delivered to whoever is there
// next, as a first delivery.
func TestNothingIsDeliveredToAPausedRoute(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	type got struct {
		data    string
		attempt int
		count   uint64
	}
	handled := make(chan got, 10)
	own := connect(t, s.ClientURL())
	b := NewBroker(own)
	runBroker(t, b, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		info, _ := parseDelivery(m.replyTo())
		handled <- got{string(m.Data), m.Attempt(), info.delivered}
		return nil
	}))
	publishAcked(t, nc, "orders.x", "first")
	receive(t, handled, "the first message")
	for i := range 20 {
		pausing := make(chan error, 1)
		go func() { pausing <- b.Pause("d") }()
		<-time.After(time.Duration(i%5) * time.Millisecond)
		publishAcked(t, nc, "orders.x", fmt.Sprint(i))
		if err := receive(t, pausing, "the pause"); err != nil {
			t.Fatal(err)
		}
		if err := b.Resume("d"); err != nil {
			t.Fatal(err)
		}
		if m := receive(t, handled, "a message"); m.data != fmt.Sprint(i) || m.attempt != 1 || m.count != 1 {
			t.Errorf("got %+v, want message %d at its first attempt and delivery", m, i)
		}
	}
}

// Neither requests nor a quick route wait for the long handlers of a flooded one.
func TestLongHandlersHoldNobodyUp(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "BOTH", Subjects: []string{"long.*", "quick.*"}})
	publishMany(t, nc, 100, numbered("long.x"))
	hold := make(chan struct{})
	quick := make(chan string, 100)
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(8))
	runBroker(t, b,
		Route("long.*").Durable("long").Handle(func(ctx context.Context, _ *Msg) error {
			<-hold
			return nil
		}),
		Route("quick.*").Durable("quick").Handle(func(_ context.Context, m *Msg) error {
			quick <- string(m.Data)
			return nil
		}),
		Route("ask").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("yes"), nil }))
	defer close(hold)
	eventually(t, "the flood has what it gets", func() bool { return b.Stats().Routes[0].Running >= 6 })
	for i := range 20 {
		publishAcked(t, nc, "quick.x", fmt.Sprint(i))
		if got := receive(t, quick, "a quick message"); got != fmt.Sprint(i) {
			t.Errorf("got %s, want %d", got, i)
		}
		if m, err := nc.Request("ask", nil, testLimit); err != nil || string(m.Data) != "yes" {
			t.Fatalf("request: %v", err)
		}
	}
	if n := b.Stats().Routes[0].Running; n > 7 {
		t.Errorf("the flood has %d workers of 8", n)
	}
}

// A durable's handler that requests from a responder of its own broker, whose responder
// requests from another one of it, has its answer whatever else waits.
func TestHandlersRequestFromTheirOwnBroker(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{1, 2, 16} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			t.Parallel()
			const messages = 100
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			publishMany(t, nc, messages, numbered("orders.x"))
			own := connect(t, s.ClientURL())
			ask := func(ctx context.Context, subject string) error {
				_, err := own.RequestWithContext(ctx, subject, nil)
				return err
			}
			b := NewBroker(own, WithWorkers(workers))
			runBroker(t, b,
				Route("orders.*").Durable("d").Timeout(testLimit).Retry(0).DLQ("dlq.x").Handle(func(ctx context.Context, _ *Msg) error { return ask(ctx, "outer") }),
				Route("outer").Timeout(testLimit).Reply(func(ctx context.Context, _ *Msg) ([]byte, error) { return nil, ask(ctx, "inner") }),
				Route("inner").Reply(func(context.Context, *Msg) ([]byte, error) { return nil, nil }))
			st := routeStats(t, b, "all are settled", func(st RouteStats) bool { return st.Succeeded+st.Dead == messages })
			if st.Succeeded != messages {
				t.Errorf("got %+v", st)
			}
		})
	}
}

// A leader that steps down leaves an idle route deaf for no longer than its successor
// needs.
func TestIdleRouteHearsANewLeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "R3", Subjects: []string{"r3.*"}, Replicas: 3})
	handled := make(chan string, 10)
	runBroker(t, NewBroker(connect(t, c.url())), Route("r3.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled <- string(m.Data)
		return nil
	}))
	publish(t, nc, &nats.Msg{Subject: "r3.x", Data: []byte("first")})
	receive(t, handled, "the first message")
	<-time.After(idleAfter + mostStay) // until it waits with an idle pull
	onceWithin(t, 500*time.Millisecond, func() time.Duration {
		old := c.leader(t, "R3", "d")
		if _, err := nc.Request("$JS.API.CONSUMER.LEADER.STEPDOWN.R3.d", nil, testLimit); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another server leads", func() bool { return c.leader(t, "R3", "d") != old })
		began := time.Now()
		publish(t, nc, &nats.Msg{Subject: "r3.x", Data: []byte("next")})
		receive(t, handled, "a message")
		return time.Since(began)
	})
}
