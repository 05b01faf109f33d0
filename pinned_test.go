package natsx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() { childModes["pinned"] = pinnedChild }

// pinnedChild takes messages until it is killed.
func pinnedChild() int {
	nc, err := nats.Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, log := newLogBook()
	b := NewBroker(nc, WithWorkers(3), WithLogger(log))
	go b.Run(context.Background(), Route("orders.*").Durable("d").PinnedBy("g").AckWait(time.Second).Handle(func(_ context.Context, m *Msg) error {
		fmt.Println("took", string(m.Data))
		select {}
	}))
	<-b.Ready()
	fmt.Println("ready")
	select {}
}

// One of several gets all; when it ends its Run, another one takes over at once.
func TestPinnedRouteIsHandedOver(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	var seen [3]tally
	var runs [3]*running
	for i := range runs {
		_, log := newLogBook()
		runs[i] = runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
			Route("orders.*").Durable("d").PinnedBy("g").Handle(func(_ context.Context, m *Msg) error {
				if seen[i].add(string(m.Data)); len(m.Header) > 0 {
					t.Errorf("message %s came with the headers %v", m.Data, m.Header)
				}
				return nil
			}))
	}
	stopped := map[int]bool{}
	for left := len(runs); left > 0; left-- {
		var before [3]int
		handled := 0
		for i := range seen {
			before[i] = seen[i].sum()
			handled += before[i]
		}
		begun := time.Now()
		publishMany(t, nc, 200, func(i int) *nats.Msg { return numbered("orders.x")(handled + i) })
		eventually(t, "all are handled", func() bool { return seen[0].sum()+seen[1].sum()+seen[2].sum() == handled+200 })
		if took := time.Since(begun); took > 40*time.Second {
			t.Errorf("they were handled after %v, when the pin had expired", took)
		}
		pinned := -1
		for i := range seen {
			switch seen[i].sum() - before[i] {
			case 0:
			case 200:
				pinned = i
			default:
				t.Errorf("broker %d handled %d of 200, want all or none", i, seen[i].sum()-before[i])
			}
			if err := runs[i].Health(); err != nil && !stopped[i] {
				t.Errorf("broker %d: %v", i, err)
			}
		}
		if pinned < 0 {
			t.Fatal("no broker handled all")
		}
		if err := runs[pinned].stop(t); err != nil {
			t.Error(err)
		}
		stopped[pinned] = true
	}
	if len(stopped) != len(runs) {
		t.Errorf("%d brokers were pinned, want each of %d once", len(stopped), len(runs))
	}
}

// When the pinned process is killed, another one takes over and gets first what that one
// had in hand.
func TestPinnedRouteOfAKilledProcess(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	lines := make(chan string, 100)
	c := startChild(t, "pinned", s.ClientURL(), lines)
	if !c.serves(t) {
		t.Fatalf("the child ended: %v", c.err)
	}
	publishMany(t, nc, 3, numbered("orders.x"))
	for taken := 0; taken < 3; {
		if strings.HasPrefix(receive(t, lines, "the child"), "took") {
			taken++
		}
	}
	var mu sync.Mutex
	var got []string
	_, log := newLogBook()
	b := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		Route("orders.*").Durable("d").PinnedBy("g").AckWait(time.Second).Concurrency(1).Handle(func(_ context.Context, m *Msg) error {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, string(m.Data))
			return nil
		}))
	publishMany(t, nc, 10, func(i int) *nats.Msg { return numbered("orders.x")(3 + i) })
	// The child neither pulls nor finishes, for longer than a pin lasts that is not
	// renewed.
	<-time.After(pinFor(time.Second) + time.Second)
	if n := b.Stats().Routes[0].Received; n != 0 {
		t.Fatalf("the broker that stands by received %d", n)
	}
	c.kill()
	eventually(t, "the other one takes over", func() bool { return settled(t, nc, "ORDERS", "d") })
	mu.Lock()
	defer mu.Unlock()
	for i, data := range got {
		if first := data == "0" || data == "1" || data == "2"; first != (i < 3) {
			t.Errorf("handled %q, want what the killed process had before all else", got)
			break
		}
	}
	if len(got) != 13 {
		t.Errorf("handled %q, want each of 13 once", got)
	}
}

// A change of leader takes the pin away, and a restart of the server; all is handled on.
func TestPinnedRouteOutlivesItsServer(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	orders(t, nc)
	var seen tally
	for range 2 {
		_, log := newLogBook()
		runBroker(t, NewBroker(connect(t, p.url()), WithLogger(log)),
			Route("orders.*").Durable("d").PinnedBy("g").Handle(func(_ context.Context, m *Msg) error {
				seen.add(string(m.Data))
				return nil
			}))
	}
	for round := range 2 {
		publishMany(t, nc, 100, func(i int) *nats.Msg { return numbered("orders.x")(round*100 + i) })
		eventually(t, "all are handled", func() bool { return seen.keys() == (round+1)*100 })
		eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
		if round == 0 {
			p.stop()
			eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
			p.start(t)
			eventually(t, "the client is back", nc.IsConnected)
		}
	}
	seen.wantOnce(t, 200)
}

// A publisher's header with the name of the server's changes nothing and stays.
func TestPinHeaderOfAPublisher(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	got := make(chan nats.Header, 100)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log)),
		Route("orders.*").Durable("d").PinnedBy("g").Handle(func(_ context.Context, m *Msg) error {
			got <- m.Header
			return nil
		}))
	for range 20 {
		publish(t, nc, &nats.Msg{Subject: "orders.x", Header: nats.Header{"Nats-Pin-Id": {"mine"}}})
		if h := receive(t, got, "a message"); len(h) != 1 || len(h["Nats-Pin-Id"]) != 1 || h.Get("Nats-Pin-Id") != "mine" {
			t.Errorf("got the headers %v, want those of the publisher", h)
		}
	}
	info := consumerInfo(t, nc, "ORDERS", "d")
	if len(info.PriorityGroups) != 1 || info.PriorityGroups[0].PinnedClientID == "" {
		t.Errorf("priority groups %+v, want one with a pinned client", info.PriorityGroups)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A durable with another policy is none for the route.
func TestPinnedRouteOnAnotherDurable(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	for name, policy := range map[string]jetstream.PriorityPolicy{"none": jetstream.PriorityPolicyNone, "overflow": jetstream.PriorityPolicyOverflow} {
		cfg := jetstream.ConsumerConfig{Durable: name, FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy, PriorityPolicy: policy}
		if policy != jetstream.PriorityPolicyNone {
			cfg.PriorityGroups = []string{"g"}
		}
		if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", cfg); err != nil {
			t.Fatal(err)
		}
		err := wantRefused(t, nc, []Spec{Route("orders.*").Durable(name).PinnedBy("g").Handle(succeed)}, ErrConsumerConflict)
		if !strings.Contains(err.Error(), "priority policy is "+name) && !strings.Contains(err.Error(), `priority policy is "`+name) {
			t.Errorf("got %v, want its priority policy named", err)
		}
	}
	var fault *RouteError
	if err := wantRefused(t, nc, []Spec{Route("orders.*").Durable("overflow").Handle(succeed)}, ErrConsumerConflict); !errors.As(err, &fault) {
		t.Errorf("got %v, want a *RouteError", err)
	}
}

// A user who may not release the pin stops as well; the pin expires.
func TestPinnedRouteWithoutThePermissionToUnpin(t *testing.T) {
	t.Parallel()
	admin, user := startGuarded(t, &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: []string{">"}, Deny: []string{"$JS.API.CONSUMER.UNPIN.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>"}},
	})
	orders(t, admin)
	handled := make(chan struct{}, 10)
	book, log := newLogBook()
	handle := func(context.Context, *Msg) error {
		handled <- struct{}{}
		return nil
	}
	route := Route("orders.*").Durable("d").PinnedBy("g").AckWait(time.Second).Handle(handle)
	first := runBroker(t, NewBroker(user, WithLogger(log)), route)
	publishAcked(t, admin, "orders.x", "1")
	receive(t, handled, "the first message")
	if err := first.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if lines := book.logged("pin not released"); len(lines) != 1 {
		t.Errorf("logged %q, want that the pin was not released", lines)
	}
	runBroker(t, NewBroker(admin, WithLogger(log)), route)
	publishAcked(t, admin, "orders.x", "2")
	receive(t, handled, "the second message")
}

// What waits for a worker is not given back for the processes that stand by, since the
// server would deliver it here again.
func TestPinnedRouteKeepsWhatWaits(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	const messages = 3000
	var seen tally
	run := func() *running {
		_, log := newLogBook()
		return runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log)),
			Route("orders.*").Durable("d").PinnedBy("g").Handle(func(_ context.Context, m *Msg) error {
				if seen.add(string(m.Data)) == messages/2 {
					<-time.After(3 * time.Second) // while many wait here that were proven to be done in a moment
				}
				return nil
			}))
	}
	publishMany(t, nc, messages, numbered("orders.x"))
	first := run()
	eventually(t, "the first has begun", func() bool { return seen.sum() > 0 })
	second := run()
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	seen.wantOnce(t, messages)
	if a, b := first.Stats().Routes[0].Received, second.Stats().Routes[0].Received; a != messages || b != 0 {
		t.Errorf("the first received %d and the second %d, want %d and none", a, b, messages)
	}
}
