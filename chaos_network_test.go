package natsx

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func TestDeletionsEndRun(t *testing.T) {
	t.Parallel()
	deleteConsumer := func(ctx context.Context, js jetstream.JetStream) error {
		return js.DeleteConsumer(ctx, "GONE", "d")
	}
	deleteStream := func(ctx context.Context, js jetstream.JetStream) error {
		return js.DeleteStream(ctx, "GONE")
	}
	for _, c := range []struct {
		name    string
		away    bool // the client is disconnected meanwhile
		delete  func(context.Context, jetstream.JetStream) error
		want    error
		wantNot error
	}{
		{"consumer while running", false, deleteConsumer, ErrConsumerDeleted, ErrStreamDeleted},
		{"stream while running", false, deleteStream, ErrStreamDeleted, ErrConsumerDeleted},
		{"consumer while away", true, deleteConsumer, ErrConsumerDeleted, ErrStreamDeleted},
		{"stream while away", true, deleteStream, ErrStreamDeleted, ErrConsumerDeleted},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			admin := connect(t, s.ClientURL())
			createStream(t, admin, jetstream.StreamConfig{Name: "GONE", Subjects: []string{"gone.*"}})
			p := startProxy(t, s.ClientURL())
			nc := connect(t, p.url())
			handled := make(chan struct{}, 1)
			_, log := newLogBook()
			r := runBroker(t, NewBroker(nc, WithLogger(log)),
				Route("gone.*").Durable("d").Handle(func(context.Context, *Msg) error {
					handled <- struct{}{}
					return nil
				}),
				Route("other").Handle(func(context.Context, *Msg) error { return nil }))
			publish(t, admin, &nats.Msg{Subject: "gone.x"})
			receive(t, handled, "a message")

			if c.away {
				p.refuse()
				eventually(t, "the client is away", func() bool { return !nc.IsConnected() })
			}
			if err := c.delete(testContext(t), jetStream(t, admin)); err != nil {
				t.Fatal(err)
			}
			p.allow()
			began := time.Now()
			err := r.wait(t)
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("Run returned after %v", took)
			}
			if !errors.Is(err, c.want) || errors.Is(err, c.wantNot) || !strings.Contains(err.Error(), `"d"`) {
				t.Errorf("got %v, want %v that names the durable", err, c.want)
			}
			if names, err := jetStream(t, admin).Consumer(testContext(t), "GONE", "d"); err == nil {
				t.Errorf("the durable was made again: %v", names.CachedInfo().Created)
			}
		})
	}
}

func TestRouteSurvivesAServerRestart(t *testing.T) {
	t.Parallel()
	const messages = 200
	p := startPhoenix(t)
	admin := connect(t, p.url())
	createStream(t, admin, jetstream.StreamConfig{Name: "KEPT", Subjects: []string{"kept.*"}})
	publishMany(t, admin, messages, numbered("kept.x"))

	var seen tally
	book, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, p.url()), WithWorkers(4), WithLogger(log)),
		Route("kept.*").Durable("d").AckWait(2*time.Second).Handle(func(ctx context.Context, m *Msg) error {
			seen.add(m.Subject + " " + string(m.Data))
			return busyFor(ctx, 10*time.Millisecond)
		}),
		Route("core.>").Handle(func(_ context.Context, m *Msg) error {
			seen.add(m.Subject)
			return nil
		}))
	eventually(t, "half of it is done", func() bool { return seen.sum() >= messages/2 })
	if err := r.Health(); err != nil {
		t.Errorf("Health: %v, want none at first", err)
	}
	p.stop()
	down := time.After(3 * time.Second)
	eventually(t, "Health tells", func() bool { return r.Health() != nil })
	<-down
	if r.Health() == nil {
		t.Error("Health is good while the server is down")
	}
	p.start(t)
	eventually(t, "Health is good again", func() bool { return r.Health() == nil })
	eventually(t, "the admin is back", admin.IsConnected)
	publishMany(t, admin, messages, numbered("kept.y"))
	if err := admin.Publish("core.x", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are handled", func() bool { return seen.keys() >= 2*messages+1 })
	eventually(t, "all are settled", func() bool { return settled(t, admin, "KEPT", "d") })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := seen.keys(); got != 2*messages+1 {
		t.Errorf("%d handled, want %d", got, 2*messages+1)
	}
	counts := map[string]int{}
	for _, line := range book.alarms("") {
		if counts[line]++; counts[line] > 1 {
			t.Errorf("one outage was logged more than once: %s", line)
		}
	}
	if len(counts) == 0 || len(counts) > 10 {
		t.Errorf("one outage made %d log lines, want few: %q", len(counts), book.alarms(""))
	}
}

func TestRouteSurvivesALostLeader(t *testing.T) {
	t.Parallel()
	const messages = 600
	c := startCluster(t)
	admin := connect(t, c.url())
	createStream(t, admin, jetstream.StreamConfig{Name: "R3", Subjects: []string{"r3.*"}, Replicas: 3})
	createStream(t, admin, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.r3"}, Replicas: 3})
	publishMany(t, admin, messages, numbered("r3.x"))

	var seen tally
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, c.url()), WithWorkers(4), WithLogger(log)),
		Route("r3.*").Durable("d").AckWait(2*time.Second).ConfirmAcks().DLQ("dlq.r3").
			Handle(func(ctx context.Context, m *Msg) error {
				seen.add(string(m.Data))
				busyFor(ctx, 5*time.Millisecond)
				if len(m.Data) == 1 { // 0 to 9
					return Permanent(errors.New("never"))
				}
				return nil
			}))
	eventually(t, "a part is done", func() bool { return seen.sum() >= messages/4 })
	c.leader(t, "R3", "d").stop()
	eventually(t, "all are handled", func() bool { return seen.keys() >= messages })
	eventually(t, "all are settled", func() bool {
		consumer, err := jetStream(t, admin).Consumer(testContext(t), "R3", "d")
		if err != nil {
			return false // until there is a new leader
		}
		info := consumer.CachedInfo()
		return info.NumPending == 0 && info.NumAckPending == 0
	})
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := len(letters(t, admin, "DLQ")); got != 10 {
		t.Errorf("%d letters, want 10", got)
	}
}

// A black hole leaves the connection up in name. It is found long before the
// client's own pings, which take minutes.
func TestDeliveryGoesOnAfterABlackHole(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		freeze func(*proxy)
		thaw   func(*proxy)
	}{
		{"another way is open", (*proxy).freezeExisting, func(*proxy) {}},
		{"the network comes back", (*proxy).freeze, func(p *proxy) {
			<-time.After(5 * time.Second)
			p.thaw()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const ackWait, heartbeat = 2 * time.Second, 500 * time.Millisecond
			onceWithin(t, ackWait+2*heartbeat, func() time.Duration { return crossBlackHole(t, ackWait, c.freeze, c.thaw) })
		})
	}
}

// crossBlackHole returns how long after the thaw everything was handled.
func crossBlackHole(t *testing.T, ackWait time.Duration, freeze, thaw func(*proxy)) (took time.Duration) {
	const messages = 100
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	createStream(t, admin, jetstream.StreamConfig{Name: "HOLE", Subjects: []string{"hole.*"}})
	p := startProxy(t, s.ClientURL())
	var seen tally
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, p.url()), WithWorkers(4), WithLogger(log)),
		Route("hole.*").Durable("d").AckWait(ackWait).Handle(func(ctx context.Context, m *Msg) error {
			seen.add(m.Subject + " " + string(m.Data))
			return busyFor(ctx, 10*time.Millisecond)
		}))
	publishMany(t, admin, messages, numbered("hole.before"))
	eventually(t, "a part is done", func() bool { return seen.sum() >= messages/2 })
	freeze(p)
	publishMany(t, admin, messages, numbered("hole.after"))
	thaw(p)
	began := time.Now()
	eventually(t, "all are handled", func() bool { return seen.keys() >= 2*messages })
	took = time.Since(began)
	eventually(t, "all are settled", func() bool { return settled(t, admin, "HOLE", "d") })
	eventually(t, "Health is good again", func() bool { return r.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	return took
}

// Handlers that publish into a black hole hold up neither Health nor the recovery, though
// nats.go holds its connection's lock while it writes.
func TestBlackHoleWhileHandlersPublish(t *testing.T) {
	t.Parallel()
	const messages, size = 20_000, 64 << 10
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	orders(t, admin, inMemory)
	createStream(t, admin, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out"}, Storage: jetstream.MemoryStorage, MaxMsgs: 10})
	publishMany(t, admin, messages, numbered("orders.x"))
	p := startProxy(t, s.ClientURL())
	nc, err := Connect(p.url())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	var seen tally
	payload := make([]byte, size)
	_, log := newLogBook()
	b := NewBroker(nc, WithWorkers(16), WithLogger(log), WithDrainTimeout(testLimit))
	runBroker(t, b, Route("orders.*").Durable("d").AckWait(3*time.Second).Handle(func(context.Context, *Msg) error {
		seen.add("")
		return nc.Publish("out", payload)
	}))
	eventually(t, "the work is under way", func() bool { return seen.sum() > messages/100 })
	p.freezeExisting()
	frozen := time.Now()
	before := nc.Stats().Reconnects // the lock is free until the buffers are full
	slowest := time.Duration(0)
	for seen.sum() < messages/20 || b.Health() != nil {
		at := time.Now()
		b.Health()
		slowest = max(slowest, time.Since(at))
		if time.Since(frozen) > testLimit {
			t.Fatalf("no recovery, Health is %v", b.Health())
		}
		<-time.After(5 * time.Millisecond)
	}
	took := time.Since(frozen)
	t.Logf("recovered after %v, Health took %v at most", took, slowest)
	if nc.Stats().Reconnects == before {
		t.Error("the connection did not meet the black hole")
	}
	if slowest > 2*time.Second {
		t.Errorf("Health took %v", slowest)
	}
	if took > 40*time.Second {
		t.Errorf("the recovery took %v", took)
	}
}
