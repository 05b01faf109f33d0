package natsx

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Messages that wait in a client past their lease are delivered again. natsx
// pulls what it can start, and keeps alive what runs. Nothing keeps the leases of a
// process that does not run for most of one, so that such a try does not count.
func TestSlowHandlersShareWithoutDuplicates(t *testing.T) {
	t.Parallel()
	const ackWait = time.Second
	undisturbed(t, ackWait, func(fault func(format string, args ...any)) { shareSlowly(t, ackWait, fault) })
}

// shareSlowly has two brokers with handlers slower than the lease share a backlog,
// and reports what went wrong.
func shareSlowly(t *testing.T, ackWait time.Duration, fault func(format string, args ...any)) {
	const messages, workers = 32, 4
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	// In memory, since a disk that stalls for half a lease is no fault of natsx.
	createStream(t, nc, jetstream.StreamConfig{Name: "SLOW", Subjects: []string{"slow.*"}, Storage: jetstream.MemoryStorage})
	publishMany(t, nc, messages, numbered("slow.x"))

	var seen, shares tally
	var brokers []*running
	for i := range 2 {
		name := fmt.Sprint(i)
		b := NewBroker(connect(t, s.ClientURL()), WithWorkers(workers))
		brokers = append(brokers, runBroker(t, b, Route("slow.*").Durable("d").AckWait(ackWait).
			Handle(func(ctx context.Context, m *Msg) error {
				seen.add(string(m.Data))
				shares.add(name)
				return busyFor(ctx, ackWait*5/2)
			})))
	}
	eventually(t, "all are started", func() bool { return seen.sum() >= messages })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "SLOW", "d") })
	for i, r := range brokers {
		if err := r.stop(t); err != nil {
			fault("Run: %v", err)
		}
		if got := r.Stats().Routes[0]; got.Lapsed != 0 {
			fault("broker %d: got %+v, want no lapsed lease", i, got)
		}
		if got := shares.get(fmt.Sprint(i)); got < messages*40/100 || got > messages*60/100 {
			fault("broker %d handled %d of %d, want 40 to 60 %%", i, got, messages)
		}
	}
	if seen.sum() != messages || seen.keys() != messages {
		fault("%d messages handled %d times, want each of %d once", seen.keys(), seen.sum(), messages)
	}
	if got := consumerInfo(t, nc, "SLOW", "d").NumRedelivered; got != 0 {
		fault("%d redelivered, want none", got)
	}
}

// What has been running for a moment says nothing of how long it will: before the
// first handler returns, no more is pulled than can be started.
func TestFirstMessagesAreNotTakenForFastOnes(t *testing.T) {
	t.Parallel()
	const workers = 2
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "FIRST", Subjects: []string{"first.*"}})
	publishMany(t, nc, 100, numbered("first.x"))
	entered, free := make(chan struct{}, 100), make(chan struct{})
	b := NewBroker(nc, WithWorkers(workers))
	runBroker(t, b, Route("first.*").Durable("d").Handle(func(context.Context, *Msg) error {
		entered <- struct{}{}
		<-free
		return nil
	}))
	defer close(free)
	receive(t, entered, "the first message")
	r := b.ran.Load().durables[0]
	p := r.env.pool
	for range 20 {
		r.tick(processTime())
		p.mu.Lock()
		if n := r.lane.inHand() + r.puller.outstanding; n > workers {
			t.Errorf("%d are in hand or asked for, want at most %d", n, workers)
		}
		p.mu.Unlock()
		<-time.After(time.Millisecond)
	}
}

// A message that comes at the end of a pull that has waited for it has its lease: with a
// short one too it is delivered once.
func TestShortLeaseOfAMessageThatWasWaitedFor(t *testing.T) {
	t.Parallel()
	const messages = 6
	for _, ackWait := range []time.Duration{2 * minAckWait, 500 * time.Millisecond, time.Second} {
		t.Run(ackWait.String(), func(t *testing.T) {
			t.Parallel()
			undisturbed(t, ackWait, func(fault func(format string, args ...any)) {
				nc := connect(t, startServer(t).ClientURL())
				orders(t, nc, inMemory)
				seen := make(chan string, 10*messages)
				b := NewBroker(nc, WithWorkers(2))
				r := runBroker(t, b, Route("orders.*").Durable("d").AckWait(ackWait).Handle(func(_ context.Context, m *Msg) error {
					seen <- string(m.Data)
					return nil
				}))
				for i := range messages {
					<-time.After(mostStay - 50*time.Millisecond) // not yet idle
					publishAcked(t, nc, "orders.x", fmt.Sprint(i))
					receive(t, seen, "the message")
				}
				eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
				r.stop(t)
				if st := b.Stats().Routes[0]; st.Received != messages || st.Lapsed != 0 {
					fault("got %+v, want %d received and none lapsed", st, messages)
				}
			})
		})
	}
}

func TestLeases(t *testing.T) {
	t.Parallel()
	var l leases
	works := make([]*work, 200)
	for i := range works {
		works[i] = &work{id: messageID{seq: uint64(1000 * i)}, raw: &nats.Msg{}}
		works[i].begin(1<<40, int64(10*i))
		l.push(works[i])
	}
	for i := 0; i < len(works); i += 2 {
		l.remove(works[i])
	}
	for i, w := range works {
		if got := l.find(w.id.seq); (got == w) != (i%2 == 1) {
			t.Fatalf("sequence %d is found as %v", w.id.seq, got)
		}
	}
	due := l.due(15, 400, nil)
	if len(due) != 1 || due[0].work != works[1] || works[1].renew != 115 {
		t.Fatalf("due %v", due)
	}
	works[3].claim()
	if due = l.due(50, 400, nil); len(due) != 1 || due[0].work != works[5] {
		t.Fatalf("due %v, want the one that is not being settled", due)
	}
	for i := 1; i < len(works); i += 2 {
		l.remove(works[i])
	}
	if l.head != nil || l.tail != nil || l.count != 0 || l.wake() != 0 {
		t.Error("list is not empty")
	}
}

// An in-progress ack is never written behind the settling, nor for the next delivery
// of a work that is used again.
func TestRenewalEndsWithTheSettling(t *testing.T) {
	t.Parallel()
	w := &work{raw: &nats.Msg{Reply: "first"}}
	w.begin(100, 1)
	var l leases
	l.push(w)
	due := l.due(2, 40, nil)
	var sent []string
	send := func(reply string) { sent = append(sent, reply) }
	for range 2 {
		if !due[0].write(send) {
			t.Error("a held lease was not renewed")
		}
	}
	w.claim()
	if due[0].write(send) {
		t.Error("renewed behind the settling")
	}
	w.raw = &nats.Msg{Reply: "second"}
	w.begin(200, 150)
	if due[0].write(send) || !slices.Equal(sent, []string{"first", "first"}) {
		t.Errorf("sent %q", sent)
	}
}

// A handler that is fast at first teaches natsx to pull deep. Turning slow it
// must not let what was pulled outlive its lease.
func TestHandlerThatTurnsSlowKeepsItsLease(t *testing.T) {
	t.Parallel()
	const fast, slow = 3000, 8
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "TURN", Subjects: []string{"turn.*"}})
	var seen, again tally
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(4))
	r := runBroker(t, b, Route("turn.*").Durable("d").AckWait(3*time.Second).
		Handle(func(ctx context.Context, m *Msg) error {
			if m.Attempt() != 1 {
				again.add(string(m.Data))
			}
			if seen.add(string(m.Data)) > fast {
				return busyFor(ctx, 4*time.Second)
			}
			return nil
		}))
	publishMany(t, nc, fast+slow, numbered("turn.x"))
	eventually(t, "all are settled", func() bool {
		return seen.sum() >= fast+slow && settled(t, nc, "TURN", "d")
	})
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, fast+slow)
	again.wantOnce(t, 0)
}

func TestRollingRestartsBurnNoAttempt(t *testing.T) {
	t.Parallel()
	messages, restarts, fleet := 3000, 10, 4
	if *soak {
		messages, restarts = 30000, 200
	}
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ROLL", Subjects: []string{"roll.*"}})
	publishMany(t, nc, messages, numbered("roll.x"))

	var seen, again tally
	start := func() *running {
		conn := connect(t, s.ClientURL())
		return runBroker(t, NewBroker(conn, WithWorkers(8)), Route("roll.*").Durable("d").Retry(3).
			Handle(func(ctx context.Context, m *Msg) error {
				if m.Attempt() != 1 {
					again.add(string(m.Data))
				}
				seen.add(string(m.Data))
				return busyFor(ctx, 20*time.Millisecond)
			}))
	}
	var brokers []*running
	for range fleet {
		brokers = append(brokers, start())
	}
	for i := range restarts {
		eventually(t, "the work goes on", func() bool { return seen.sum() >= (i+1)*messages/(restarts+2) })
		if err := brokers[i%fleet].stop(t); err != nil {
			t.Errorf("restart %d: Run: %v", i, err)
		}
		brokers[i%fleet] = start()
	}
	eventually(t, "all are settled", func() bool {
		return seen.sum() >= messages && settled(t, nc, "ROLL", "d")
	})
	for _, r := range brokers {
		if err := r.stop(t); err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	seen.wantOnce(t, messages)
	again.wantOnce(t, 0)
	if got := consumerInfo(t, nc, "ROLL", "d"); got.NumRedelivered != 0 || got.Delivered.Consumer != uint64(messages) {
		t.Errorf("%d redelivered, %d delivered, want 0 and %d", got.NumRedelivered, got.Delivered.Consumer, messages)
	}
}
