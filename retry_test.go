package natsx

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func TestWaitingRetriesStallNobody(t *testing.T) {
	t.Parallel()
	const failing, healthy = 3000, 20
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "WAIT", Subjects: []string{"wait.*"}})
	publishMany(t, nc, failing, numbered("wait.bad"))

	var failed tally
	handled := make(chan time.Time, healthy)
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(4))
	r := runBroker(t, b, Route("wait.*").Durable("d").Backoff(30*time.Second, 30*time.Second).
		Handle(func(_ context.Context, m *Msg) error {
			if m.Subject == "wait.good" {
				handled <- time.Now()
				return nil
			}
			failed.add(string(m.Data))
			return errors.New("not now")
		}))
	eventually(t, "all have failed", func() bool { return r.Stats().Routes[0].Retried == failing })
	if got := r.Stats().Routes[0]; got.Running != 0 || got.Delayed != failing {
		t.Errorf("got %+v, want all delayed and no worker occupied", got)
	}

	// One after another; the median does not tell what else this machine does.
	onceWithin(t, 200*time.Millisecond, func() time.Duration {
		var delays []time.Duration
		for range healthy {
			sent := time.Now()
			publish(t, nc, &nats.Msg{Subject: "wait.good"})
			delays = append(delays, receive(t, handled, "a healthy message").Sub(sent))
		}
		slices.Sort(delays)
		return delays[healthy/2]
	})
	began := time.Now()
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("Run returned after %v: it must not wait for retries", took)
	}
	failed.wantOnce(t, failing)
}

// Messages that together exceed the client's pending limit of 64 MiB.
func TestLargeMessagesAreAllHandled(t *testing.T) {
	t.Parallel()
	const messages, size = 300, 512 << 10
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "LARGE", Subjects: []string{"large.*"}})
	body := make([]byte, size)
	publishMany(t, nc, messages, func(i int) *nats.Msg {
		m := numbered("large.x")(i)
		m.Header = nats.Header{"X-Number": {string(m.Data)}}
		m.Data = body
		return m
	})
	var seen tally
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(8))
	r := runBroker(t, b, Route("large.*").Durable("d").Retry(2).
		Handle(func(ctx context.Context, m *Msg) error {
			if len(m.Data) != size {
				t.Errorf("got %d bytes, want %d", len(m.Data), size)
			}
			seen.add(m.Header.Get("X-Number"))
			return busyFor(ctx, 50*time.Millisecond)
		}))
	eventually(t, "all are settled", func() bool {
		return seen.keys() >= messages && settled(t, nc, "LARGE", "d")
	})
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, messages)
}
