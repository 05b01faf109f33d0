package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
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
	const messages = 30
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var inside gauge
	var failed, done tally
	b := NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, Route("orders.*").Durable("d").Concurrency(2).Handle(func(ctx context.Context, m *Msg) error {
		defer inside.enter()()
		if m.Subject == "orders.again" && m.Attempt() == 1 {
			failed.add(string(m.Data))
			return RetryAfter(200*time.Millisecond, errors.New("once more"))
		}
		busyFor(ctx, 20*time.Millisecond)
		done.add(m.Subject + string(m.Data))
		return nil
	}))
	publishMany(t, nc, messages, numbered("orders.again"))
	eventually(t, "all are to come back", func() bool { return failed.keys() == messages })
	publishMany(t, nc, messages, numbered("orders.new")) // which are handled meanwhile
	eventually(t, "all are done", func() bool { return done.keys() == 2*messages })
	if n := inside.highest(); n != 2 {
		t.Errorf("%d handlers at once, want 2", n)
	}
	done.wantOnce(t, 2*messages)
}

var ordersPlace = retryPlace{"RETRY", "ORDERS", "d"}

// die leaves what a process leaves that dies while it moves a message of durable d: the
// message, delivered and not settled, and its copy, for at or at once.
func die(t testing.TB, nc *nats.Conn, ackWait time.Duration, at time.Time, edit func(*retryCopy)) (stored uint64) {
	t.Helper()
	js := jetStream(t, nc)
	c, err := js.CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "d", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy, AckWait: ackWait, MaxDeliver: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Next()
	if err != nil {
		t.Fatal(err)
	}
	meta, err := m.Metadata()
	if err != nil {
		t.Fatal(err)
	}
	copy := retryCopy{
		stream: "ORDERS", durable: "d", subject: m.Subject(), number: 1, attempt: 2, from: m.Reply(),
		id: messageID{meta.Sequence.Stream, meta.Timestamp.UnixNano()},
	}
	copy.life = fmt.Sprintf("%d@%d", copy.id.seq, copy.id.time)
	if edit != nil {
		edit(&copy)
	}
	return publish(t, nc, ordersPlace.message(&copy, &nats.Msg{Header: m.Headers(), Data: m.Data()}, at))
}

// A message whose process died when its copy was stored is not handled where it was, and
// not moved again.
func TestStoredCopyTakesTheMessagesPlace(t *testing.T) {
	t.Parallel()
	hour := time.Now().Add(time.Hour)
	for _, test := range []struct {
		name    string
		ackWait time.Duration
		window  time.Duration // of the retry stream
		at      time.Time
		gone    bool // the copy was handled meanwhile
		runs    int
	}{
		{"it waits", 500 * time.Millisecond, 2 * time.Minute, hour, false, 0},
		{"it waits, and its id is forgotten", 500 * time.Millisecond, 100 * time.Millisecond, hour, false, 0},
		{"it is done with", 500 * time.Millisecond, 2 * time.Minute, time.Time{}, true, 0},
		{"it is due first", 30 * time.Second, 2 * time.Minute, time.Time{}, false, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc)
			if err := RetryStream("RETRY").DedupWindow(test.window).Ensure(testContext(t), nc); err != nil {
				t.Fatal(err)
			}
			publishAcked(t, nc, "orders.x", "payload")
			seq := die(t, nc, test.ackWait, test.at, nil)
			if test.gone {
				if err := streamNow(t, nc, "RETRY").DeleteMsg(testContext(t), seq); err != nil {
					t.Fatal(err)
				}
			}
			var runs tally
			unsettled := make(chan int, 10)
			b := NewBroker(nc, WithRetryStream("RETRY"))
			runBroker(t, b, Route("orders.*").Durable("d").AckWait(test.ackWait).Retry(1).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
				unsettled <- consumerInfo(t, nc, "ORDERS", "d").NumAckPending
				runs.add(fmt.Sprint(m.Sequence(), " ", m.Attempt()))
				return nil
			}))
			if test.runs > 0 {
				if n := receive(t, unsettled, "the run"); n != 0 {
					t.Errorf("%d messages are unsettled while the copy runs, want none", n)
				}
			}
			eventually(t, "it is settled", func() bool { return settled(t, nc, "ORDERS", "d") })
			eventually(t, "the copies are where they belong", func() bool {
				return stored(t, nc, "RETRY") == map[bool]int{true: 1}[!test.at.IsZero()]
			})
			if runs.sum() != test.runs || runs.get("1 2") != test.runs {
				t.Errorf("ran %v, want %d runs at attempt 2", runs.counts, test.runs)
			}
		})
	}
}

// A copy of a message of an earlier stream settles no message of the same sequence.
func TestCopySettlesNoOtherMessage(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	if err := RetryStream("RETRY").Ensure(testContext(t), nc); err != nil {
		t.Fatal(err)
	}
	publishAcked(t, nc, "orders.x", "payload")
	die(t, nc, 30*time.Second, time.Time{}, func(c *retryCopy) {
		c.id.time -= int64(time.Hour)
		c.from = ackSubject("ORDERS", "d", c.id.seq, c.id.time)
		c.life = fmt.Sprintf("%d@%d", c.id.seq, c.id.time)
	})
	b := NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, Route("orders.*").Durable("d").Handle(succeed))
	routeStats(t, b, "the copy is handled", func(st RouteStats) bool { return st.Succeeded == 1 })
	if n := consumerInfo(t, nc, "ORDERS", "d").NumAckPending; n != 1 {
		t.Errorf("%d messages are unsettled, want the one that the copy is not of", n)
	}
}

// What is given back at a stop before it was started goes to the retry stream: it has all
// its attempts left, and no delivery counts against it.
func TestRetryStreamTakesWhatAStopGivesBack(t *testing.T) {
	t.Parallel()
	const messages = 3000
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, inMemory, workQueue)
	publishMany(t, nc, messages, numbered("orders.x"))
	var seen tally
	hold, holding := make(chan struct{}), make(chan struct{}, messages)
	route := Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x")
	b := NewBroker(nc, WithRetryStream("RETRY"), WithWorkers(2))
	r := runBroker(t, b, route.Handle(func(_ context.Context, m *Msg) error {
		if seen.add(string(m.Data)) > messages/3 {
			holding <- struct{}{}
			<-hold
		}
		return nil
	}))
	receive(t, holding, "a slow handler")
	receive(t, holding, "another one")
	routeStats(t, b, "many wait", func(st RouteStats) bool { return st.Waiting >= 20 })
	r.cancel()
	eventually(t, "they are in the retry stream", func() bool { return stored(t, nc, "RETRY") >= 20 && b.Stats().Routes[0].Waiting == 0 })
	close(hold)
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if info := consumerInfo(t, nc, "ORDERS", "d"); info.NumRedelivered+info.NumAckPending != 0 {
		t.Errorf("%d redelivered and %d unsettled, want none", info.NumRedelivered, info.NumAckPending)
	}
	var attempts tally
	b = NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, route.Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		attempts.add(fmt.Sprint(m.Attempt()))
		return nil
	}))
	eventually(t, "all are handled", func() bool { return stored(t, nc, "ORDERS") == 0 && stored(t, nc, "RETRY") == 0 })
	seen.wantOnce(t, messages)
	if attempts.get("1") != attempts.sum() || stored(t, nc, "DLQ") != 0 {
		t.Errorf("ran at attempts %v with %d letters, want the first of each", attempts.counts, stored(t, nc, "DLQ"))
	}
}

// What the drain timeout cuts off goes to the retry stream without an attempt.
func TestRetryStreamTakesWhatADrainCutsOff(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.x", "long job")
	began := make(chan int, 10)
	for round := range 3 {
		b := NewBroker(nc, WithDrainTimeout(time.Millisecond), WithRetryStream("RETRY"))
		r := runBroker(t, b, Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(ctx context.Context, m *Msg) error {
			began <- m.Attempt()
			<-ctx.Done()
			return ctx.Err()
		}))
		if attempt := receive(t, began, "the handler"); attempt != 1 {
			t.Errorf("attempt %d, want 1", attempt)
		}
		var drain *DrainError
		if err := r.stop(t); !errors.As(err, &drain) {
			t.Errorf("Run: %v, want a drain that was cut off", err)
		}
		if st := b.Stats().Routes[0]; st.Returned != 1 || st.Dead+st.Retried != 0 {
			t.Errorf("got %+v, want one returned", st)
		}
		if !settled(t, nc, "ORDERS", "d") || stored(t, nc, "RETRY") != 1 {
			t.Errorf("round %d: the message is not in the retry stream alone", round)
		}
	}
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters, want none", n)
	}
}

// A stream in which retries could be lost is refused, with what is wrong with it.
func TestBadRetryStreams(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(c *jetstream.StreamConfig) { c.MaxMsgSize = 10_000 })
	good := func() jetstream.StreamConfig { return jetstream.StreamConfig{AllowMsgSchedules: true} }
	for field, edit := range map[string]func(*jetstream.StreamConfig){
		"allowMsgSchedules": func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = false },
		"retention":         func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy },
		"noAck":             func(c *jetstream.StreamConfig) { c.NoAck = true },
		"maxMsgSize":        func(c *jetstream.StreamConfig) { c.MaxMsgSize = 5000 },
		"subjects":          func(c *jetstream.StreamConfig) { c.Subjects = []string{"subjects.wait.*", "subjects.*.due.>"} },
		"subjectTransform": func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: ">", Destination: "subjectTransform.x.>"}
		},
	} {
		cfg := good()
		cfg.Name, cfg.Subjects = field, []string{field + ".>"}
		edit(&cfg)
		createStream(t, nc, cfg)
		b := NewBroker(nc, WithRetryStream(field))
		err := startBroker(t, b, Route("orders.*").Durable("d").Handle(succeed)).wait(t)
		var fault *StreamError
		if !errors.Is(err, ErrBadRetryStream) || !errors.As(err, &fault) || fault.Field != field || fault.Stream != field {
			t.Errorf("%s: got %v", field, err)
		}
		if _, err := jetStream(t, nc).Consumer(testContext(t), field, ordersPlace.consumer()); err == nil {
			t.Errorf("%s: has a consumer", field)
		}
	}
	// The stream of the route itself, and what is no name.
	createStream(t, nc, jetstream.StreamConfig{Name: "OWN", Subjects: []string{"own.>"}, AllowMsgSchedules: true})
	b := NewBroker(nc, WithRetryStream("OWN"))
	if err := startBroker(t, b, Route("own.x").Durable("d").Handle(succeed)).wait(t); !errors.Is(err, ErrBadRetryStream) {
		t.Errorf("got %v, want a stream of its own", err)
	}
	for _, name := range []string{"", "a.b", "*"} {
		err := NewBroker(nc, WithRetryStream(name)).Run(t.Context(), Route("orders.*").Durable("d").Handle(succeed))
		if !errors.Is(err, ErrInvalidName) {
			t.Errorf("%q: got %v", name, err)
		}
	}
	// What it cannot make.
	createStream(t, nc, jetstream.StreamConfig{Name: "TAKEN", Subjects: []string{"R.>"}})
	err := startBroker(t, NewBroker(nc, WithRetryStream("R")), Route("orders.*").Durable("d").Handle(succeed)).wait(t)
	var fault *StreamError
	if !errors.As(err, &fault) || fault.Stream != "R" {
		t.Errorf("got %v, want the refusal of the server", err)
	}
}

// While the retry stream takes nothing, what failed is held and the rest goes on.
func TestRetryStreamThatTakesNothing(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	handled := make(chan string, 10)
	_, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").AckWait(time.Second).Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		if m.Subject == "orders.bad" && m.Attempt() == 1 {
			return errors.New("broken")
		}
		handled <- fmt.Sprint(string(m.Data), " ", m.Attempt())
		return nil
	}))
	change := func(size int32) {
		cfg := streamNow(t, nc, "RETRY").CachedInfo().Config
		cfg.MaxMsgSize = size
		if _, err := jetStream(t, nc).UpdateStream(testContext(t), cfg); err != nil {
			t.Fatal(err)
		}
	}
	change(10)
	publishAcked(t, nc, "orders.bad", "bad")
	var fault *RouteError
	eventually(t, "it is told", func() bool { return errors.As(b.Health(), &fault) && fault.Field == "retryStream" })
	publishAcked(t, nc, "orders.good", "good")
	if got := receive(t, handled, "the good message"); got != "good 1" {
		t.Errorf("got %q", got)
	}
	eventually(t, "only what is held is unsettled", func() bool { return consumerInfo(t, nc, "ORDERS", "d").NumAckPending == 1 })
	change(-1)
	if got := receive(t, handled, "the retry"); got != "bad 2" {
		t.Errorf("got %q", got)
	}
	eventually(t, "all is well", func() bool { return b.Health() == nil && idle(t, nc, "ORDERS", "d") })
	if st := b.Stats().Routes[0]; st.Retried != 1 || st.Received != 3 {
		t.Errorf("got %+v, want one retry without a redelivery", st)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A message waits for its retry beyond the MaxAge of its stream, and not beyond that of
// the retry stream.
func TestRetryStreamOutlivesMaxAge(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(c *jetstream.StreamConfig) { c.MaxAge = 300 * time.Millisecond })
	createStream(t, nc, jetstream.StreamConfig{Name: "RETRY", Subjects: []string{"RETRY.>"}, AllowMsgSchedules: true, MaxAge: time.Minute})
	book, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithLogger(log))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(3).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		switch m.Attempt() {
		case 1:
			return RetryAfter(600*time.Millisecond, errors.New("later"))
		case 2:
			return RetryAfter(time.Hour, errors.New("much later"))
		}
		return nil
	}))
	publishAcked(t, nc, "orders.x", "payload")
	eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 })
	l := letters(t, nc, "DLQ")[0]
	if l.Header.Get(HeaderDLQAttempts) != "2" || l.Header.Get(HeaderDLQError) != "much later" || string(l.Data) != "payload" {
		t.Errorf("letter %v, want one after the retry that MaxAge allows", l.Header)
	}
	if got := book.alarms("retries that nobody has handled in time"); len(got) != 1 {
		t.Errorf("warned %q of the retry stream's MaxAge", got)
	}
}

// Pause holds retries too, and what is in the retry stream without being a retry is
// dropped.
func TestPausedRetries(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	failed, done := make(chan struct{}, 1), make(chan struct{}, 1)
	book, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Backoff(time.Millisecond, time.Millisecond).Handle(func(_ context.Context, m *Msg) error {
		if m.Attempt() == 1 {
			failed <- struct{}{}
			return RetryAfter(time.Second, nil)
		}
		done <- struct{}{}
		return nil
	}))
	publishAcked(t, nc, "orders.x", "payload")
	receive(t, failed, "the first run")
	if err := b.Pause("d"); err != nil {
		t.Fatal(err)
	}
	due := ordersPlace.subject("due", "life", 1)
	publish(t, nc, &nats.Msg{Subject: due, Data: []byte("no retry"), Header: nats.Header{"X": {"y"}}})
	pending := func() uint64 { return consumerInfo(t, nc, "RETRY", ordersPlace.consumer()).NumPending }
	eventually(t, "the retry is due", func() bool { return pending() == 2 })
	select {
	case <-done:
		t.Error("the retry ran while the durable was paused")
	default:
	}
	if err := b.Resume("d"); err != nil {
		t.Fatal(err)
	}
	receive(t, done, "the retry")
	eventually(t, "nothing is left", func() bool { return idle(t, nc, "ORDERS", "d") })
	if got := book.alarms("message in the retry stream dropped"); len(got) != 1 {
		t.Errorf("logged %q, want the message that is no retry", got)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A message too large for a copy is retried where it is.
func TestMessageTooLargeForACopy(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, withMaxPayload(64<<10)).ClientURL())
	orders(t, nc)
	publish(t, nc, &nats.Msg{Subject: "orders.x", Data: make([]byte, 63<<10)})
	var attempts tally
	b := NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		attempts.add(fmt.Sprint(m.Attempt()))
		return errors.New("broken")
	}))
	eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 })
	if attempts.wantOnce(t, 3); stored(t, nc, "RETRY") != 0 {
		t.Error("the retry stream is not empty")
	}
}

// What a handler publishes at several attempts is stored once, as without a retry stream.
func TestRetriesPublishOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out.>"}})
	pub := NewPublisher(nc)
	var events []Event
	b := NewBroker(nc, WithRetryStream("RETRY"), WithWorkers(1), WithObserver(observerFunc(func(e Event) { events = append(events, e) })))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Handle(func(ctx context.Context, m *Msg) error {
		if _, err := pub.Publish(ctx, To("out.x").Data(m.Data)); err != nil {
			t.Error(err)
		}
		return errors.New("broken")
	}))
	publishAcked(t, nc, "orders.x", "payload")
	eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if n := stored(t, nc, "OUT"); n != 1 {
		t.Errorf("%d messages published, want 1", n)
	}
	for i, e := range events {
		want := map[bool]Outcome{true: OutcomeRetried, false: OutcomeDead}[i < 2]
		if e.Route != "orders.*" || e.Durable != "d" || e.Outcome != want || e.Msg.Attempt() != i+1 || e.Delay < 0 || e.Delay > time.Millisecond {
			t.Errorf("event %d: %+v, want %s of the route", i, e, want)
		}
	}
	if len(events) != 3 {
		t.Errorf("%d events, want 3", len(events))
	}
}

// Messages that take their process down end in the DLQ, with a retry stream too.
func TestRetryStreamBuriesBombs(t *testing.T) {
	t.Parallel()
	crashesOf(t, "retried bombs", 60, 2, 0)
}

func TestOpenCopyRefuses(t *testing.T) {
	t.Parallel()
	c := retryCopy{
		stream: "ORDERS", durable: "d", subject: "orders.x", id: messageID{7, 1234567890123456789}, life: "7@1234567890123456789",
		number: 3, attempt: 2, lost: 1, from: "$JS.ACK.ORDERS.d.1.7.1.1.0", text: "broken",
	}
	original := &nats.Msg{Subject: "orders.x", Header: nats.Header{"A": {"1", "2"}}, Data: []byte("\r\n\r\n")}
	m := ordersPlace.message(&c, original, time.Time{})
	got, opened, err := ordersPlace.openCopy(m)
	if err != nil || opened != c {
		t.Fatalf("got %+v, %v, want %+v", opened, err, c)
	}
	if diff := cmp.Diff(original.Header, got.Header); diff != "" || string(got.Data) != string(original.Data) {
		t.Errorf("got %q with %v", got.Data, got.Header)
	}
	for name, edit := range map[string]func(*nats.Msg){
		"another durable": func(m *nats.Msg) { m.Header.Set(HeaderRetryDurable, "e") },
		"subject":         func(m *nats.Msg) { m.Subject = "RETRY.due.ORDERS.e.life.1" },
		"short subject":   func(m *nats.Msg) { m.Subject = "3" },
		"no number":       func(m *nats.Msg) { m.Subject += "x" },
		"attempt":         func(m *nats.Msg) { m.Header.Set(HeaderRetryAttempt, "0") },
		"sequence":        func(m *nats.Msg) { m.Header.Del(HeaderRetrySequence) },
		"time":            func(m *nats.Msg) { m.Header.Set(HeaderRetryTime, "now") },
		"lost":            func(m *nats.Msg) { m.Header.Set(HeaderRetryLost, "-1") },
		"payload":         func(m *nats.Msg) { m.Data = []byte("plain") },
		"header block":    func(m *nats.Msg) { m.Data = []byte("NATS/1.0\r\nx\r\n\r\n") },
	} {
		bad := ordersPlace.message(&c, original, time.Time{})
		edit(bad)
		if _, _, err := ordersPlace.openCopy(bad); err == nil {
			t.Errorf("%s: taken for a copy", name)
		}
	}
}

// No two durables share the consumer of their retries.
func TestRetryConsumerNames(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxNameLength)
	names := map[string]bool{}
	places := []retryPlace{{"R", "a-b", "c"}, {"R", "a", "b-c"}, {"R", long, "d"}, {"R", "d", long}, {"R", long, long}}
	for _, p := range places {
		name := p.consumer()
		if reason := nameFault(name); reason != "" {
			t.Errorf("%q %s", name, reason)
		}
		names[name] = true
	}
	if len(names) != len(places) {
		t.Errorf("got %d names of %d durables", len(names), len(places))
	}
}

func FuzzCopiedMessage(f *testing.F) {
	f.Add("A: 1\r\nA:2\r\nb:  c \r\n", []byte("payload"))
	f.Add("Nats-Schedule: @at\r\n", []byte("\r\n\r\n"))
	f.Add("x\r\n", []byte(nil))
	f.Fuzz(func(t *testing.T, block string, data []byte) {
		h, err := nats.DecodeHeadersMsg([]byte(headerBlock + block + "\r\n"))
		if err != nil {
			return // it would have come without headers
		}
		got, rest, err := splitMessage(joinMessage(h, data))
		if err != nil {
			t.Fatal(err)
		}
		if len(h) == 0 {
			h = nil
		}
		if diff := cmp.Diff(h, got); diff != "" || string(rest) != string(data) {
			t.Errorf("%q: payload %q, headers (-want +got):\n%s", block, rest, diff)
		}
	})
}

// oldServer is a connection to a server that gives another version.
type oldServer struct {
	net.Conn
	version string
}

func (c oldServer) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	copy(b[:n], bytes.Replace(b[:n], []byte(`"version":"`+server.VERSION+`"`), []byte(`"version":"`+c.version+`"`), 1))
	return n, err
}

type oldServerDialer string

func (version oldServerDialer) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address)
	return oldServer{c, string(version)}, err
}

// A server without schedules is refused before a stream is made, where a route would need
// them.
func TestRetryStreamNeedsANewServer(t *testing.T) {
	t.Parallel()
	const version = "2.11.9"
	if len(version) != len(server.VERSION) {
		t.Fatalf("the version %q must be as long as %q", version, server.VERSION)
	}
	url := startServer(t).ClientURL()
	nc := connect(t, url, nats.SetCustomDialer(oldServerDialer(version)))
	options := []Option{WithRetryStream("RETRY"), WithStreams(Stream("ORDERS").Subjects("orders.*"))}
	err := startBroker(t, NewBroker(nc, options...), Route("orders.*").Durable("d").Handle(succeed)).wait(t)
	var fault *StreamError
	if !errors.Is(err, ErrServerTooOld) || !errors.As(err, &fault) || fault.Stream != "RETRY" || !strings.Contains(err.Error(), "2.12") || !strings.Contains(err.Error(), version) {
		t.Errorf("got %v, want the version that is needed and the one that is there", err)
	}
	if _, err := jetStream(t, nc).Stream(testContext(t), "ORDERS"); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("got %v, want no stream made", err)
	}
	r := runBroker(t, NewBroker(nc, options...), Route("audit.*").Handle(succeed))
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// The messages of a batch come back one by one, each with its own attempt, and beside new
// ones.
func TestRetriesOfABatch(t *testing.T) {
	t.Parallel()
	const messages = 60
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, workQueue)
	publishMany(t, nc, messages, numbered("orders.x"))
	var runs tally
	b := NewBroker(nc, WithRetryStream("RETRY"))
	runBroker(t, b, Route("orders.*").Durable("d").Batch(20, 50*time.Millisecond).Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").
		HandleBatch(func(_ context.Context, ms []*Msg) error {
			failed := BatchError{}
			for i, m := range ms {
				runs.add(fmt.Sprint(string(m.Data), " ", m.Attempt()))
				if n, _ := strconv.Atoi(string(m.Data)); n%3 == 0 && m.Attempt() == 1 || n%6 == 0 {
					failed[i] = errors.New("broken")
				}
			}
			if len(failed) == 0 {
				return nil
			}
			return failed
		}))
	eventually(t, "all are settled", func() bool { return stored(t, nc, "ORDERS") == 0 && idle(t, nc, "ORDERS", "d") })
	if n := stored(t, nc, "DLQ"); n != messages/6 {
		t.Errorf("%d letters, want %d", n, messages/6)
	}
	for _, l := range letters(t, nc, "DLQ") {
		if l.Header.Get(HeaderDLQAttempts) != "3" {
			t.Errorf("letter %v, want 3 attempts", l.Header)
		}
	}
	runs.wantOnce(t, messages+messages/3+messages/6)
}

// The breaker of a route is that of its retries: here new messages open it, and retries
// close it.
func TestBreakerOfRetries(t *testing.T) {
	t.Parallel()
	const messages = 5
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, workQueue)
	var down atomic.Bool
	down.Store(true)
	var attempts tally
	_, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithWorkers(4), WithLogger(log))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(6).Backoff(time.Millisecond, time.Millisecond).Breaker(messages, 500*time.Millisecond).DLQ("dlq.x").
		Handle(func(_ context.Context, m *Msg) error {
			attempts.add(fmt.Sprint(string(m.Data), " ", m.Attempt()))
			if down.Load() {
				return errors.New("down")
			}
			return nil
		}))
	publishMany(t, nc, messages, numbered("orders.x"))
	routeStats(t, b, "the breaker has opened", func(st RouteStats) bool { return st.Breaker == BreakerOpen })
	eventually(t, "Health tells", func() bool { return b.Health() != nil })
	down.Store(false)
	eventually(t, "all are handled", func() bool { return stored(t, nc, "ORDERS") == 0 && stored(t, nc, "RETRY") == 0 })
	eventually(t, "the breaker is closed", func() bool { return b.Stats().Routes[0].Breaker == BreakerClosed && b.Health() == nil })
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters, want none", n)
	}
	attempts.wantOnce(t, 2*messages)
}

// A user with the documented permissions needs no more, and one who may not publish to the
// retry stream is told.
func TestRetryStreamPermissions(t *testing.T) {
	t.Parallel()
	name := ordersPlace.consumer()
	least := []string{
		"$JS.API.CONSUMER.CREATE.ORDERS.d.>", "$JS.API.CONSUMER.INFO.ORDERS.d", "$JS.API.CONSUMER.MSG.NEXT.ORDERS.d", "$JS.ACK.ORDERS.d.>",
		"$JS.API.CONSUMER.CREATE.RETRY." + name + ".>", "$JS.API.CONSUMER.INFO.RETRY." + name, "$JS.API.CONSUMER.MSG.NEXT.RETRY." + name, "$JS.ACK.RETRY." + name + ".>",
		"$JS.API.STREAM.INFO.RETRY", "$JS.API.STREAM.MSG.GET.RETRY", "RETRY.due.>", "RETRY.wait.>",
	}
	for _, allowed := range [][]string{least, least[:len(least)-1]} {
		admin, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: allowed}})
		orders(t, admin)
		if err := RetryStream("RETRY").Ensure(testContext(t), admin); err != nil {
			t.Fatal(err)
		}
		_, log := newLogBook()
		b := NewBroker(user, WithRetryStream("RETRY"), WithLogger(log))
		r := runBroker(t, b, Route("orders.*").Stream("ORDERS").Durable("d").Backoff(time.Millisecond, time.Millisecond).Handle(func(_ context.Context, m *Msg) error {
			if m.Attempt() < 3 {
				return errors.New("broken")
			}
			return nil
		}))
		publishAcked(t, admin, "orders.x", "payload")
		if len(allowed) < len(least) {
			var denied *PermissionError
			if err := r.wait(t); !errors.As(err, &denied) || !strings.HasPrefix(denied.Subject, "RETRY.wait.ORDERS.d.") {
				t.Errorf("got %v, want the subject that may not be published to", err)
			}
			continue
		}
		eventually(t, "it is handled", func() bool { return b.Stats().Routes[0].Succeeded == 1 && idle(t, admin, "ORDERS", "d") })
		if err := errors.Join(b.Health(), r.stop(t)); err != nil {
			t.Error(err)
		}
	}
}

// Without its retry stream a broker cannot go on.
func TestDeletedRetryStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(nc, WithRetryStream("RETRY"), WithLogger(log)), Route("orders.*").Durable("d").Handle(succeed))
	if err := jetStream(t, nc).DeleteStream(testContext(t), "RETRY"); err != nil {
		t.Fatal(err)
	}
	if err := r.wait(t); !errors.Is(err, ErrStreamDeleted) {
		t.Errorf("got %v, want ErrStreamDeleted", err)
	}
}

// An ordered route keeps its retries, which hold up what is behind them.
func TestOrderedRouteKeepsItsRetries(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var order []string
	b := NewBroker(nc, WithRetryStream("RETRY"))
	r := runBroker(t, b, Route("orders.*").Durable("d").OrderedBy(SubjectKey()).Backoff(100*time.Millisecond, 100*time.Millisecond).Handle(func(_ context.Context, m *Msg) error {
		order = append(order, fmt.Sprint(string(m.Data), m.Attempt()))
		if string(m.Data) == "a" && m.Attempt() == 1 {
			return errors.New("broken")
		}
		return nil
	}))
	publishAcked(t, nc, "orders.x", "a", "b")
	eventually(t, "both are handled", func() bool { return b.Stats().Routes[0].Succeeded == 2 })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"a1", "a2", "b1"}, order); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}

// A letter goes back to its durable by the retry stream, once for each redrive, and can die
// again. No other durable sees it.
func TestRedriveByTheRetryStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	runs := make(chan run, 10)
	var others atomic.Int32
	b := NewBroker(nc, WithRetryStream("RETRY"))
	r := runBroker(t, b,
		Route("orders.*").Durable("d").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
			runs <- runOf(m)
			return errors.New("broken")
		}),
		Route("orders.*").Durable("other").Handle(func(context.Context, *Msg) error {
			others.Add(1)
			return nil
		}))
	publish(t, nc, &nats.Msg{Subject: "orders.x", Header: nats.Header{"X": {"y"}}, Data: []byte("payload")})
	first := receive(t, runs, "a run")
	receive(t, runs, "the retry")
	for redrives := range 3 {
		eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 && idle(t, nc, "ORDERS", "d") })
		for l, err := range DeadLetters("dlq.x").List(testContext(t), nc) {
			if err != nil || l.header.Get(HeaderDLQRetryStream) != "RETRY" || l.Sequence != 1 || l.Attempts != 2 || l.Redrives != redrives {
				t.Fatalf("letter %+v, %v", l, err)
			}
		}
		if redrives == 2 {
			break
		}
		reports := make(chan RedriveReport, 2)
		for range 2 { // at once
			go func() {
				report, err := DeadLetters("dlq.x").Limit(1).Redrive(testContext(t), nc)
				if err != nil || report.Failed > 0 {
					t.Errorf("redrive: %+v %v", report, err)
				}
				reports <- report
			}()
		}
		for attempt := 1; attempt <= 2; attempt++ {
			got := receive(t, runs, "a run")
			for name := range got.Header {
				if strings.HasPrefix(name, "Natsx-Redrive-") || name == nats.MsgIdHdr || name == nats.ExpectedStreamHdr {
					delete(got.Header, name)
				}
			}
			first.Attempt = attempt
			if diff := cmp.Diff(first, got); diff != "" {
				t.Errorf("redrive %d (-first +got):\n%s", redrives+1, diff)
			}
		}
		receive(t, reports, "a report")
		receive(t, reports, "the other report")
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if n := len(runs); n != 0 || others.Load() != 1 || stored(t, nc, "ORDERS") != 1 {
		t.Errorf("%d more runs, %d of the other durable, %d messages stored, want 0, 1 and 1", n, others.Load(), stored(t, nc, "ORDERS"))
	}
}

// The letters of a durable on a mirror are redriven by its retry stream, which takes what
// the mirror does not, and by their own stream when the retry stream is gone.
func TestRedriveOnAMirror(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "COPY", Mirror: &jetstream.StreamSource{Name: "ORDERS"}})
	var mended atomic.Bool
	handled := make(chan string, 10)
	fails := func(_ context.Context, m *Msg) error {
		if !mended.Load() {
			return Permanent(errors.New("broken"))
		}
		handled <- m.Stream() + " " + string(m.Data)
		return nil
	}
	_, log := newLogBook()
	b := NewBroker(nc, WithRetryStream("RETRY"), WithLogger(log))
	r := runBroker(t, b,
		Route("orders.*").Stream("COPY").Durable("mirrored").DLQ("dlq.mirrored").Handle(fails),
		Route("orders.*").Stream("ORDERS").Durable("d").DLQ("dlq.own").Handle(fails))
	publishAcked(t, nc, "orders.x", "payload")
	eventually(t, "both are dead", func() bool { return stored(t, nc, "DLQ") == 2 })
	mended.Store(true)
	report, err := DeadLetters("dlq.mirrored").Redrive(testContext(t), nc)
	if err != nil || report.Redriven != 1 {
		t.Errorf("redrive: %+v %v", report, err)
	}
	if got := receive(t, handled, "the message"); got != "COPY payload" {
		t.Errorf("got %q", got)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if err := jetStream(t, nc).DeleteStream(testContext(t), "RETRY"); err != nil {
		t.Fatal(err)
	}
	report, err = DeadLetters("dlq.own").Redrive(testContext(t), nc)
	if err != nil || report.Redriven != 1 || stored(t, nc, "ORDERS") != 2 {
		t.Errorf("redrive without the retry stream: %+v %v", report, err)
	}
}

// A redeployed route takes the consumer of its retries along.
func TestRetriesFollowAChangedRoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	route := Route("orders.*").Durable("d")
	for _, next := range []RouteBuilder{route, route.AckWait(time.Minute).MaxAckPending(100).AdoptChanges()} {
		r := runBroker(t, NewBroker(nc, WithRetryStream("RETRY")), next.Handle(succeed))
		if err := r.stop(t); err != nil {
			t.Error(err)
		}
	}
	if c := consumerInfo(t, nc, "RETRY", ordersPlace.consumer()).Config; c.AckWait != time.Minute || c.MaxAckPending != 100 {
		t.Errorf("got %s and %d, want those of the route", c.AckWait, c.MaxAckPending)
	}
}

// Retries that are due while the route's own messages have all of its workers are pulled as
// soon as a worker is free.
func TestRetriesGoOnWhenAWorkerIsFree(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	failed, began, release, done := make(chan struct{}, 1), make(chan struct{}), make(chan struct{}), make(chan struct{})
	b := NewBroker(nc, WithRetryStream("RETRY"), WithWorkers(4))
	r := runBroker(t, b, Route("orders.*").Durable("d").Concurrency(1).Handle(func(_ context.Context, m *Msg) error {
		if m.Subject == "orders.long" {
			close(began)
			<-release
			return nil
		}
		select {
		case <-began:
			close(done)
			return nil
		default:
		}
		if m.Attempt() == 1 {
			failed <- struct{}{}
		}
		return RetryAfter(50*time.Millisecond, nil)
	}))
	publishAcked(t, nc, "orders.short", "short")
	receive(t, failed, "the first failure")
	publishAcked(t, nc, "orders.long", "long")
	receive(t, began, "the long message")
	part, p := b.ran.Load().durables[0].retries, b.ran.Load().durables[0].env.pool
	const soon = checkBusyEvery / 2
	eventually(t, "the retry is due, and nothing else of its route is soon", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return part.pending && len(part.puller.pulls) == 0 && part.inHand() == 0 && part.alarmAt-processTime() > int64(soon)
	})
	freed := time.Now()
	close(release)
	receive(t, done, "the retry")
	if took := time.Since(freed); took > soon {
		t.Errorf("the retry waited for %v, until the next check of its consumer", took)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
