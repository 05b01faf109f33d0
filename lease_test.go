package natsx

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Messages that wait in a client past their lease are delivered again. natsx
// pulls what it can start, and keeps alive what runs.
func TestSlowHandlersShareWithoutDuplicates(t *testing.T) {
	t.Parallel()
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
		brokers = append(brokers, runBroker(t, b, Route("slow.*").Durable("d").AckWait(time.Second).
			Handle(func(ctx context.Context, m *Msg) error {
				seen.add(string(m.Data))
				shares.add(name)
				return work(ctx, 2500*time.Millisecond)
			})))
	}
	eventually(t, "all are started", func() bool { return seen.sum() >= messages })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "SLOW", "d") })
	for i, r := range brokers {
		if err := r.stop(t); err != nil {
			t.Errorf("Run: %v", err)
		}
		if got := r.Stats().Routes[0]; got.Lapsed != 0 {
			t.Errorf("broker %d: got %+v, want no lapsed lease", i, got)
		}
		if got := shares.get(fmt.Sprint(i)); got < messages*40/100 || got > messages*60/100 {
			t.Errorf("broker %d handled %d of %d, want 40 to 60 %%", i, got, messages)
		}
	}
	seen.wantOnce(t, messages)
	if got := consumerInfo(t, nc, "SLOW", "d").NumRedelivered; got != 0 {
		t.Errorf("%d redelivered, want none", got)
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
