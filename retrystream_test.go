package natsx

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// run is what a handler saw of a message.
type run struct {
	Subject, Data, Stream, Durable string
	Header                         nats.Header
	Attempt                        int
	Sequence                       uint64
	Time                           time.Time
}

func runOf(m *Msg) run {
	return run{m.Subject, string(m.Data), m.Stream(), m.Durable(), maps.Clone(m.Header), m.Attempt(), m.Sequence(), m.Time()}
}

// idle reports whether a durable has settled all and the retry stream is empty.
func idle(t testing.TB, nc *nats.Conn, stream, durable string) bool {
	t.Helper()
	return settled(t, nc, stream, durable) && stored(t, nc, "RETRY") == 0
}

// A message that fails comes back through the retry stream as it was, attempt by attempt,
// and leaves nothing behind: neither while it waits in its own stream's consumer, nor at
// the end in the retry stream.
func TestRetryStreamBringsBackTheOriginal(t *testing.T) {
	t.Parallel()
	for name, retention := range map[string]jetstream.RetentionPolicy{"work queue": jetstream.WorkQueuePolicy, "limits": jetstream.LimitsPolicy} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc, workQueue)
			createStream(t, nc, jetstream.StreamConfig{Name: "RETRY", Subjects: []string{"retries.>"}, AllowMsgSchedules: true, Retention: retention})
			runs := make(chan run, 10)
			b := NewBroker(nc, WithRetryStream("RETRY"))
			r := runBroker(t, b, Route("orders.*").Durable("d").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").
				Handle(func(_ context.Context, m *Msg) error {
					runs <- runOf(m)
					if m.Header != nil {
						m.Header.Set("X-Mine", "changed")
					}
					if m.Subject == "orders.good" && m.Attempt() == 2 {
						return nil
					}
					return errors.New("broken")
				}))
			header := nats.Header{
				"X-Order": {"a", "b"}, "x-order": {"other case"}, "X-Mine": {"as it was"}, "Nats-Msg-Id": {"one"},
				"Natsx-Retry-Attempt": {"7"}, "Status": {"503"}, "Traceparent": {""},
			}
			original := &nats.Msg{Subject: "orders.bad", Header: header, Data: []byte("line\r\n\r\nline")}
			publish(t, nc, original)
			first := receive(t, runs, "the first run")
			want := run{"orders.bad", "line\r\n\r\nline", "ORDERS", "d", header, 1, 1, first.Time}
			if diff := cmp.Diff(want, first); diff != "" {
				t.Errorf("attempt 1 (-want +got):\n%s", diff)
			}
			for attempt := 2; attempt <= 3; attempt++ {
				got := receive(t, runs, "a retry")
				want.Attempt = attempt
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("attempt %d (-want +got):\n%s", attempt, diff)
				}
			}
			eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
			wantLetter(t, letters(t, nc, "DLQ")[0], original, map[string]string{
				"Stream": "ORDERS", "Sequence": "1", "Durable": "d", "Attempts": "3",
			}, "exhausted")

			publish(t, nc, &nats.Msg{Subject: "orders.good"})
			for attempt := 1; attempt <= 2; attempt++ {
				if got := receive(t, runs, "a run"); got.Attempt != attempt || got.Header != nil {
					t.Errorf("got %+v, want attempt %d", got, attempt)
				}
			}
			eventually(t, "nothing is left", func() bool { return idle(t, nc, "ORDERS", "d") && stored(t, nc, "ORDERS") == 0 })
			st := b.Stats().Routes[0]
			if st.Retried != 3 || st.Dead != 1 || st.Succeeded != 1 || st.Received != 5 || st.Durable != "d" {
				t.Errorf("got %+v, want the retries counted with the route", st)
			}
			if err := b.Health(); err != nil {
				t.Error(err)
			}
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// Retries that wait take nothing of MaxAckPending.
func TestRetryStreamLeavesTheWindowFree(t *testing.T) {
	t.Parallel()
	const failing = 300
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishMany(t, nc, failing, numbered("orders.bad"))
	handled := make(chan string, 10)
	_, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithWorkers(4), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Backoff(time.Hour, time.Hour).MaxAckPending(5).Handle(func(_ context.Context, m *Msg) error {
		if m.Subject == "orders.good" {
			handled <- string(m.Data)
			return nil
		}
		return errors.New("not now")
	}))
	routeStats(t, b, "all have failed", func(st RouteStats) bool { return st.Retried == failing && st.Delayed == failing })
	publishAcked(t, nc, "orders.good", "good")
	receive(t, handled, "the good message")
	if info := consumerInfo(t, nc, "ORDERS", "d"); info.NumAckPending > 1 || info.NumRedelivered > 0 {
		t.Errorf("%d unsettled and %d redelivered, want none", info.NumAckPending, info.NumRedelivered)
	}
	if n := stored(t, nc, "RETRY"); n != failing {
		t.Errorf("%d retries wait, want %d", n, failing)
	}
	if err := b.Health(); err != nil {
		t.Error(err)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// The handler's limit counts for a route and its retries together.
func TestRetryStreamKeepsTheLimit(t *testing.T) {
	t.Parallel()
	const messages = 40
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var inside gauge
	var done tally
	b := NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, Route("orders.*").Durable("d").Concurrency(2).Backoff(time.Millisecond, time.Millisecond).Handle(func(ctx context.Context, m *Msg) error {
		defer inside.enter()()
		busyFor(ctx, 10*time.Millisecond)
		if m.Attempt() == 1 {
			return errors.New("once more")
		}
		done.add(string(m.Data))
		return nil
	}))
	for i := range messages { // so that some are new while others come back
		publishAcked(t, nc, "orders.x", fmt.Sprint(i))
	}
	eventually(t, "all are done", func() bool { return done.keys() == messages })
	if n := inside.highest(); n > 2 {
		t.Errorf("%d handlers at once, want at most 2", n)
	}
	done.wantOnce(t, messages)
}
