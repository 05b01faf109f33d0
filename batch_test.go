package natsx

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
)

func TestBatchResults(t *testing.T) {
	t.Parallel()
	one, two := errors.New("one"), errors.New("two")
	tests := []struct {
		name  string
		err   error
		each  []string
		whole bool
	}{
		{"nil", nil, nil, false},
		{"an error", one, []string{"one", "one", "one"}, true},
		{"none failed", BatchError{}, []string{"", "", ""}, false},
		{"a nil entry", BatchError{1: nil}, []string{"", "", ""}, false},
		{"some", BatchError{0: one, 2: two}, []string{"one", "", "two"}, false},
		{"wrapped", fmt.Errorf("insert: %w", BatchError{1: two}), []string{"", "two", ""}, false},
		{"all", BatchError{0: one, 1: one, 2: two}, []string{"one", "one", "two"}, true},
		{"an index too high", BatchError{3: one}, slices.Repeat([]string{"natsx: BatchError has an index 3 in a batch of 3: 1 of the batch failed, the first at index 3: one"}, 3), true},
		{"a negative index", BatchError{-1: one}, slices.Repeat([]string{"natsx: BatchError has an index -1 in a batch of 3: 1 of the batch failed, the first at index -1: one"}, 3), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			each, whole := batchResults(tt.err, 3)
			var got []string
			for _, err := range each {
				text := ""
				if err != nil {
					text = err.Error()
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(tt.each, got); diff != "" || (whole != nil) != tt.whole {
				t.Errorf("whole %v, want %v; each (-want +got):\n%s", whole, tt.whole, diff)
			}
		})
	}
	if err := (BatchError{4: two, 1: one, 2: nil}); err.Error() != "natsx: 2 of the batch failed, the first at index 1: one" || !errors.Is(err, two) {
		t.Errorf("got %q", err)
	}
}

func sequencesOf(ms []*Msg) (seqs []uint64) {
	for _, m := range ms {
		seqs = append(seqs, m.Sequence())
	}
	return seqs
}

// A batch is handled when it is full, and when its first message has waited.
func TestBatchIsFullOrTimed(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 25, numbered("orders.x"))
	batches := make(chan []uint64, 10)
	const patience = 300 * time.Millisecond
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(1))
	r := runBroker(t, b, Route("orders.*").Durable("d").Batch(10, patience).HandleBatch(func(ctx context.Context, ms []*Msg) error {
		if MsgFrom(ctx) != nil {
			t.Error("the context of a batch is that of one message")
		}
		batches <- sequencesOf(ms)
		return nil
	}))
	next := uint64(1)
	for _, size := range []int{10, 10, 5} {
		got := receive(t, batches, "a batch")
		if len(got) != size || got[0] != next {
			t.Errorf("a batch of %d from %d on, want %d from %d on", len(got), got[0], size, next)
		}
		next += uint64(size)
	}
	began := time.Now()
	publish(t, nc, numbered("orders.x")(26))
	if got := receive(t, batches, "a batch of one"); len(got) != 1 {
		t.Errorf("got %d, want the one", got)
	}
	if took := time.Since(began); took < patience {
		t.Errorf("a batch that is not full was handled after %v, want %v", took, patience)
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	st := b.Stats().Routes[0]
	if st.Succeeded != 26 || st.Received != 26 {
		t.Errorf("got %+v, want 26 received and succeeded", st)
	}
}

// Each message of a batch has attempts and an end of its own.
func TestBatchSettlesEachMessage(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 8, numbered("orders.x"))
	var mu sync.Mutex
	attempts := map[string][]int{}
	handle := func(_ context.Context, ms []*Msg) error {
		mu.Lock()
		defer mu.Unlock()
		results := BatchError{}
		for i, m := range ms {
			attempts[string(m.Data)] = append(attempts[string(m.Data)], m.Attempt())
			switch string(m.Data) {
			case "1":
				results[i] = errors.New("always")
			case "2":
				results[i] = Permanent(errors.New("never"))
			case "3":
				results[i] = Discard(errors.New("unwanted"))
			case "4":
				if m.Attempt() == 1 {
					results[i] = RetryAfter(time.Millisecond, errors.New("later"))
				}
			}
		}
		return results
	}
	b := NewBroker(connect(t, s.ClientURL()))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").
		Batch(8, 50*time.Millisecond).HandleBatch(handle))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") && stored(t, nc, "DLQ") == 2 })
	mu.Lock()
	defer mu.Unlock()
	want := map[string][]int{"0": {1}, "1": {1, 2, 3}, "2": {1}, "3": {1}, "4": {1, 2}, "5": {1}, "6": {1}, "7": {1}}
	if diff := cmp.Diff(want, attempts); diff != "" {
		t.Errorf("attempts (-want +got):\n%s", diff)
	}
	reasons := map[string]string{}
	for _, l := range letters(t, nc, "DLQ") {
		reasons[string(l.Data)] = l.Header.Get(HeaderDLQReason) + " after " + l.Header.Get(HeaderDLQAttempts)
	}
	if diff := cmp.Diff(map[string]string{"1": "exhausted after 3", "2": "permanent after 1"}, reasons); diff != "" {
		t.Errorf("letters (-want +got):\n%s", diff)
	}
	eventually(t, "all are counted", func() bool {
		st := b.Stats().Routes[0]
		return st.Succeeded == 5 && st.Retried == 3 && st.Dead == 2 && st.Discarded == 1
	})
}

// What fails as a whole is an attempt of each message, whatever way it fails.
func TestBatchFailsAsAWhole(t *testing.T) {
	t.Parallel()
	ways := map[string]func(ctx context.Context) error{
		"error":   func(context.Context) error { return errors.New("boom") },
		"panic":   func(context.Context) error { panic("boom") },
		"goexit":  func(context.Context) error { runtime.Goexit(); return nil },
		"timeout": func(ctx context.Context) error { <-ctx.Done(); return nil },
	}
	for name, fail := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			publishMany(t, nc, 5, numbered("orders.x"))
			var runs tally
			b := NewBroker(connect(t, s.ClientURL()))
			runBroker(t, b, Route("orders.*").Durable("d").Retry(1).Backoff(time.Millisecond, time.Millisecond).Timeout(100*time.Millisecond).DLQ("dlq.x").
				Batch(5, 20*time.Millisecond).ConfirmAcks().HandleBatch(func(ctx context.Context, ms []*Msg) error {
				for _, m := range ms {
					runs.add(string(m.Data))
				}
				return fail(ctx)
			}))
			eventually(t, "all are dead", func() bool { return settled(t, nc, "ORDERS", "d") && stored(t, nc, "DLQ") == 5 })
			for i := range 5 {
				if n := runs.get(strconv.Itoa(i)); n != 2 {
					t.Errorf("message %d ran %d times, want 2", i, n)
				}
			}
		})
	}
}

// A payload that does not decode ends its own message and no other.
func TestJSONBatch(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	for _, data := range []string{"1", "x", "3", "4"} {
		publish(t, nc, &nats.Msg{Subject: "orders.x", Data: []byte(data)})
	}
	got := make(chan []int, 10)
	runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Batch(4, time.Minute).
		HandleBatch(JSONBatch(func(_ context.Context, values []int) error {
			got <- values
			return BatchError{1: Permanent(errors.New("no threes"))}
		})))
	if diff := cmp.Diff([]int{1, 3, 4}, receive(t, got, "the batch")); diff != "" {
		t.Errorf("values (-want +got):\n%s", diff)
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") && stored(t, nc, "DLQ") == 2 })
	reasons := map[string]string{}
	for _, l := range letters(t, nc, "DLQ") {
		reasons[string(l.Data)] = l.Header.Get(HeaderDLQReason)
	}
	if diff := cmp.Diff(map[string]string{"x": "undecodable", "3": "permanent"}, reasons); diff != "" {
		t.Errorf("letters (-want +got):\n%s", diff)
	}
	if JSONBatch[int](nil) != nil || DecodeBatch[int](nil, func(context.Context, []int) error { return nil }) != nil {
		t.Error("a batch handler without a function or a codec is not nil")
	}
}

// What was gathered is handled at a stop, and the leases of what waits are kept.
func TestBatchKeepsWhatItGathers(t *testing.T) {
	t.Parallel()
	const ackWait = 500 * time.Millisecond
	undisturbed(t, ackWait, func(fault func(format string, args ...any)) {
		s := startServer(t)
		nc := connect(t, s.ClientURL())
		orders(t, nc, inMemory)
		publishMany(t, nc, 7, numbered("orders.x"))
		var runs tally
		spec := Route("orders.*").Durable("d").AckWait(ackWait).Batch(100, time.Hour).HandleBatch(func(_ context.Context, ms []*Msg) error {
			for _, m := range ms {
				runs.add(string(m.Data))
			}
			return nil
		})
		var all []*running
		for range 2 {
			all = append(all, runBroker(t, NewBroker(connect(t, s.ClientURL())), spec))
		}
		eventually(t, "all are gathered", func() bool { return all[0].Stats().Routes[0].Waiting+all[1].Stats().Routes[0].Waiting >= 7 })
		<-time.After(4 * ackWait)
		if n := consumerInfo(t, nc, "ORDERS", "d").Delivered.Consumer; n != 7 {
			fault("%d deliveries, want 7", n)
		}
		for _, r := range all {
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
		}
		if runs.keys() != 7 || runs.sum() != 7 {
			fault("%d different messages handled and %d in all, want 7", runs.keys(), runs.sum())
		}
		if !settled(t, nc, "ORDERS", "d") {
			fault("not all are settled: %+v", consumerInfo(t, nc, "ORDERS", "d"))
		}
	})
}

// Several workers share a backlog, and each batch is full while it lasts.
func TestBatchesOfABacklog(t *testing.T) {
	t.Parallel()
	const messages, size = 5000, 100
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	var runs tally
	var calls atomic.Int64
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(4))
	runBroker(t, b, Route("orders.*").Durable("d").Batch(size, 2*time.Second).HandleBatch(func(_ context.Context, ms []*Msg) error {
		calls.Add(1)
		for _, m := range ms {
			runs.add(string(m.Data))
		}
		return nil
	}))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	runs.wantOnce(t, messages)
	if n := calls.Load(); n > messages/size+4 {
		t.Errorf("%d batches of at most %d for %d messages", n, size, messages)
	}
	eventually(t, "they are counted", func() bool { return b.Stats().Routes[0].Succeeded == messages })
}

// A message that may have taken its process down runs by itself, without the others.
func TestBatchSuspectRunsAlone(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 3, numbered("orders.x"))
	spec := Route("orders.*").Durable("d").Retry(0).AckWait(minAckWait).DLQ("dlq.x").Batch(3, 20*time.Millisecond)
	first := runBroker(t, NewBroker(nc), spec.HandleBatch(func(context.Context, []*Msg) error { return nil }))
	eventually(t, "the durable is there and all is settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := first.stop(t); err != nil {
		t.Fatal(err)
	}
	publishMany(t, nc, 3, numbered("orders.y"))
	// Another process takes them, and dies.
	c, err := streamNow(t, nc, "ORDERS").Consumer(t.Context(), "d")
	if err != nil {
		t.Fatal(err)
	}
	taken, err := c.Fetch(3)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, taken.Messages(), "a message for the process that dies")
	}
	sizes := make(chan int, 10)
	runBroker(t, NewBroker(connect(t, s.ClientURL())), spec.HandleBatch(func(_ context.Context, ms []*Msg) error {
		sizes <- len(ms)
		return nil
	}))
	for range 3 {
		if n := receive(t, sizes, "a message"); n != 1 {
			t.Errorf("a suspect ran in a batch of %d", n)
		}
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
}
