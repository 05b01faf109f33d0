package natsx

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Messages that wait in a client past their lease are delivered again. natsx
// pulls what it can start, and keeps alive what runs. Nothing keeps the leases of a
// process that does not run for most of one, so that such a try does not count.
func TestSlowHandlersShareWithoutDuplicates(t *testing.T) {
	t.Parallel()
	const ackWait = time.Second
	for range 5 {
		stalled := stalls()
		faults := shareSlowly(t, ackWait)
		if stood := stalled(); len(faults) > 0 && stood > ackWait/4 {
			t.Logf("after the process stood still for %v: %q", stood, faults)
			continue
		}
		for _, fault := range faults {
			t.Error(fault)
		}
		return
	}
	t.Skip("the machine stands still for too long, again and again")
}

// shareSlowly has two brokers with handlers slower than the lease share a backlog,
// and returns what went wrong.
func shareSlowly(t *testing.T, ackWait time.Duration) (faults []string) {
	const messages, workers = 32, 4
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
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
				return work(ctx, ackWait*5/2)
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
	return faults
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
	r := b.ran.Load().routes[0].(*durableRoute)
	p := r.eng.pool
	inHand := func() int { return r.running + r.queue.len() + r.outstanding }
	for ms := range int64(20) {
		p.mu.Lock()
		now := r.finished + ms*int64(time.Millisecond)
		p.mu.Unlock()
		r.tick(now, nil)
		p.mu.Lock()
		if n := inHand(); n > workers {
			t.Errorf("%d ms after the first message, %d are in hand or asked for, want at most %d", ms, n, workers)
		}
		p.mu.Unlock()
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
				return work(ctx, 4*time.Second)
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
				return work(ctx, 20*time.Millisecond)
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
