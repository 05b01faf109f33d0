package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A handler that obeys when a shutdown ends its context has not failed, and its message
// has all its attempts left.
func TestShutdownIsNoAttempt(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.x", "long job")
	began := make(chan int, 10)
	spec := func(fn Handler) Spec { return Route("orders.*").Durable("d").Retry(1).DLQ("dlq.x").Handle(fn) }
	for range 4 {
		var events []Event
		b := NewBroker(nc, WithDrainTimeout(time.Millisecond), WithObserver(observerFunc(func(e Event) { events = append(events, e) })))
		r := runBroker(t, b, spec(func(ctx context.Context, m *Msg) error {
			began <- m.Attempt()
			<-ctx.Done()
			return fmt.Errorf("gave up: %w", ctx.Err())
		}))
		receive(t, began, "the handler")
		var drain *DrainError
		if err := r.stop(t); !errors.As(err, &drain) || drain.Running != 0 {
			t.Errorf("Run: %v, want a drain that was cut off", err)
		}
		if got := b.Stats().Routes[0]; got.Returned != 1 || got.Dead+got.Retried != 0 {
			t.Errorf("got %+v, want one returned", got)
		}
		if len(events) != 1 || events[0].Outcome != OutcomeReturned {
			t.Errorf("observed %+v, want one returned", events)
		}
	}
	b := NewBroker(nc)
	runBroker(t, b, spec(func(context.Context, *Msg) error { return errors.New("broken") }))
	routeStats(t, b, "it is dead", func(st RouteStats) bool { return st.Dead == 1 })
	l := letters(t, nc, "DLQ")
	if len(l) != 1 || l[0].Header.Get(HeaderDLQReason) != "exhausted" || l[0].Header.Get(HeaderDLQError) != "broken" {
		t.Errorf("letters %v, want one with the handler's error", l)
	}
}

// Deliveries that are lost with the connection, or whose acknowledgement is, are no
// attempts: without a retry nothing dies.
func TestCutsMakeNoLetter(t *testing.T) {
	t.Parallel()
	const messages, cuts = 30_000, 4
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, messages, numbered("orders.x"))
	p := startProxy(t, s.ClientURL())
	var seen tally
	_, log := newLogBook()
	b := NewBroker(connect(t, p.url()), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(0).AckWait(time.Second).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return nil
	}))
	for i := range cuts {
		eventually(t, "the work goes on", func() bool { return seen.keys() > (i+1)*messages/(cuts+2) })
		p.cut()
	}
	eventually(t, "all are handled", func() bool { return seen.keys() == messages })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters, want none", n)
	}
	seen.wantOnce(t, messages)
}

// A server that stands still for a while is not taken for one that is gone.
func TestServerThatStandsStill(t *testing.T) {
	t.Parallel()
	const messages = 400
	at, start := serverProcess(t)
	srv := start()
	nc := connect(t, at)
	orders(t, nc)
	publishMany(t, nc, messages, numbered("orders.x"))
	var seen tally
	own := connect(t, at)
	b := NewBroker(own, WithWorkers(8))
	r := runBroker(t, b, Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(ctx context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return busyFor(ctx, 20*time.Millisecond)
	}))
	eventually(t, "a part is done", func() bool { return seen.sum() > messages/4 })
	if err := srv.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * time.Second)
	if err := srv.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are handled", func() bool { return seen.keys() == messages })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	seen.wantOnce(t, messages)
	if n := own.Stats().Reconnects; n != 0 || stored(t, nc, "DLQ") != 0 {
		t.Errorf("%d reconnects and %d letters, want none", n, stored(t, nc, "DLQ"))
	}
}

// What was handled and whose acknowledgement was lost is acknowledged when it comes
// again, and not handled.
func TestLostAcksAreSentAgain(t *testing.T) {
	t.Parallel()
	const messages = 50
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	p := startProxy(t, s.ClientURL())
	var seen tally
	hold := make(chan struct{})
	_, log := newLogBook()
	b := NewBroker(connect(t, p.url(), nats.ReconnectBufSize(-1)), WithWorkers(messages), WithLogger(log))
	runBroker(t, b, Route("orders.*").Durable("d").Retry(0).AckWait(2*time.Second).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		<-hold
		return nil
	}))
	publishMany(t, nc, messages, numbered("orders.x"))
	eventually(t, "all run", func() bool { return seen.sum() == messages })
	p.refuse()
	eventually(t, "it is away", func() bool { return b.Health() != nil })
	close(hold)
	routeStats(t, b, "all are handled", func(st RouteStats) bool { return st.Succeeded+st.Lapsed == messages })
	p.allow()
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	seen.wantOnce(t, messages)
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters", n)
	}
}

// What is done and whose acknowledgement the server did not get within the lease is
// acknowledged when it comes again, whatever the handler returned, and counted then.
func TestLateAcksAreSentAgain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		result error
		want   RouteStats
	}{
		{"handled", nil, RouteStats{Received: 2, Succeeded: 1, Lapsed: 1}},
		{"discarded", Discard(errors.New("not wanted")), RouteStats{Received: 2, Discarded: 1, Lapsed: 1}},
		{"dead", Permanent(errors.New("broken")), RouteStats{Received: 2, Dead: 1, Lapsed: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc, inMemory)
			var runs tally
			b := NewBroker(connect(t, s.ClientURL()))
			runBroker(t, b, Route("orders.*").Durable("d").Retry(0).AckWait(time.Second).ConfirmAcks().DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
				runs.add(string(m.Data))
				return tt.result
			}))
			acks := "$JS.ACK.ORDERS.d.>"
			if err := s.GlobalAccount().AddMapping(acks, "acks.lost.>"); err != nil {
				t.Fatal(err)
			}
			publishAcked(t, nc, "orders.x", "payload")
			routeStats(t, b, "the acknowledgement is not confirmed", func(st RouteStats) bool { return st.Lapsed == 1 })
			s.GlobalAccount().RemoveMapping(acks)
			eventually(t, "it is settled", func() bool { return settled(t, nc, "ORDERS", "d") })
			got := routeStats(t, b, "it is counted", func(st RouteStats) bool { return st.Succeeded+st.Discarded+st.Dead > 0 })
			if got.Received < tt.want.Received || got.Succeeded != tt.want.Succeeded || got.Discarded != tt.want.Discarded || got.Dead != tt.want.Dead || got.Lapsed != tt.want.Lapsed {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			runs.wantOnce(t, 1)
			if n := stored(t, nc, "DLQ"); n != int(tt.want.Dead) {
				t.Errorf("%d letters", n)
			}
		})
	}
}

// A deploy that lowers Retry below what a message has had runs it once more, and its
// letter has the error of that run.
func TestLoweredRetry(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.x", "payload")
	spec := func(n int) Spec {
		return Route("orders.*").Durable("d").Retry(n).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").
			Handle(func(_ context.Context, m *Msg) error { return fmt.Errorf("broken at attempt %d", m.Attempt()) })
	}
	b := NewBroker(nc)
	r := runBroker(t, b, spec(1000))
	routeStats(t, b, "it was tried", func(st RouteStats) bool { return st.Retried > 5 })
	r.stop(t)
	b = NewBroker(nc)
	runBroker(t, b, spec(2))
	routeStats(t, b, "it is dead", func(st RouteStats) bool { return st.Dead == 1 })
	l := letters(t, nc, "DLQ")
	if len(l) != 1 || l[0].Header.Get(HeaderDLQReason) != "exhausted" || l[0].Header.Get(HeaderDLQError) != "broken at attempt 3" {
		t.Errorf("letters %v, want one that is exhausted", l)
	}
}

// A message whose stream would delete it before its next attempt is dead before that.
func TestMaxAgeEndsRetries(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(c *jetstream.StreamConfig) { c.MaxAge = time.Minute; c.AllowMsgTTL = true })
	book, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	runBroker(t, b,
		Route("orders.a").Durable("a").Retry(10).DLQ("dlq.x").Handle(func(context.Context, *Msg) error { return RetryAfter(time.Hour, errors.New("a")) }),
		Route("orders.b").Durable("b").Retry(5).Backoff(2*time.Second, time.Hour).DLQ("dlq.x").Handle(func(context.Context, *Msg) error { return errors.New("b") }),
		Route("orders.c").Durable("c").Retry(1).DLQ("dlq.x").Handle(func(context.Context, *Msg) error { return nil }))
	publish(t, nc, &nats.Msg{Subject: "orders.a"})
	publish(t, nc, &nats.Msg{Subject: "orders.b", Header: nats.Header{jetstream.MsgTTLHeader: {"1s"}}})
	eventually(t, "both have letters", func() bool { return stored(t, nc, "DLQ") == 2 })
	for _, l := range letters(t, nc, "DLQ") {
		if l.Header.Get(HeaderDLQReason) != "exhausted" || l.Header.Get(HeaderDLQAttempts) != "1" {
			t.Errorf("letter %v", l.Header)
		}
	}
	if got := book.alarms("retries may take longer"); len(got) != 2 || !strings.Contains(got[0]+got[1], "durable=a") || !strings.Contains(got[0]+got[1], "durable=b") {
		t.Errorf("warned %q, want of a and b", got)
	}
}

func init() { childModes["bombs"] = bombsChild }

const bombAttempts = 3

// bombsChild runs a route whose message "bomb" takes the process down, and says what it
// handled.
func bombsChild() int {
	nc, err := nats.Connect(childURL(), nats.MaxReconnects(-1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := NewBroker(nc, WithWorkers(16))
	go func() {
		<-b.Ready()
		fmt.Println("ready")
	}()
	err = b.Run(context.Background(), Route("jobs.*").Durable("worker").AckWait(500*time.Millisecond).
		Retry(bombAttempts-1).Backoff(10*time.Millisecond, 20*time.Millisecond).DLQ("dlq.jobs").
		Handle(func(ctx context.Context, m *Msg) error {
			busyFor(ctx, 5*time.Millisecond)
			if strings.HasPrefix(string(m.Data), "bomb") {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
			return nil
		}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// Messages that take their process down each time end in the DLQ, and take none with
// them that were beside them.
func TestBombsTakeNoOtherWithThem(t *testing.T) {
	t.Parallel()
	crashes(t, 60, 2, 0)
}

// Processes that are killed at random leave no message to be blamed for it.
func TestRandomKillsBlameNobody(t *testing.T) {
	t.Parallel()
	crashes(t, 400, 0, 12)
}

func crashes(t *testing.T, messages, bombs, kills int) { crashesOf(t, "bombs", messages, bombs, kills) }

func crashesOf(t *testing.T, mode string, messages, bombs, kills int) {
	if *soak {
		messages, kills = 10*messages, 10*kills
	}
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "JOBS", Subjects: []string{"jobs.*"}, Retention: jetstream.WorkQueuePolicy, Storage: jetstream.MemoryStorage})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	publishMany(t, nc, messages, func(i int) *nats.Msg {
		m := numbered("jobs.x")(i)
		if i%(messages/max(bombs, 1)) == messages/max(bombs, 1)/2 && bombs > 0 {
			m.Data = fmt.Appendf(nil, "bomb %d", i)
		}
		return m
	})
	c := startChild(t, mode, s.ClientURL(), nil)
	ended := 0
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	strike := time.NewTicker(150 * time.Millisecond)
	defer strike.Stop()
	for limit := time.After(testLimit); stored(t, nc, "JOBS")+stored(t, nc, "RETRY") > 0; {
		select {
		case <-c.done:
			ended++
			c = startChild(t, mode, s.ClientURL(), nil)
		case <-poll.C:
		case <-strike.C:
			if kills > 0 && c.serves(t) {
				<-time.After(rand.N(40 * time.Millisecond))
				c.kill()
				kills--
			}
		case <-limit:
			t.Fatalf("after %d ends %d messages are left, and %d letters", ended, stored(t, nc, "JOBS"), stored(t, nc, "DLQ"))
		}
	}
	c.kill()
	var dead []string
	for _, l := range letters(t, nc, "DLQ") {
		dead = append(dead, string(l.Data))
		if l.Header.Get(HeaderDLQReason) != "crashed" || mode == "bombs" && l.Header.Get(HeaderDLQAttempts) != fmt.Sprint(bombAttempts) {
			t.Errorf("letter of %q: %v", l.Data, l.Header)
		}
	}
	slices.Sort(dead)
	if len(dead) != bombs || slices.ContainsFunc(dead, func(d string) bool { return !strings.HasPrefix(d, "bomb") }) || len(slices.Compact(dead)) != bombs {
		t.Errorf("letters of %q, want each of the %d bombs", dead, bombs)
	}
	if most := bombs * (bombAttempts + aloneProof); kills == 0 && bombs > 0 && ended > most {
		t.Errorf("%d processes ended, want at most %d", ended, most)
	}
	t.Logf("%d processes ended", ended)
}

// A message that loses its lease before its isolated run has not run: what was recorded of
// the run is taken back, and it never counts as crashed for that.
func TestSuspectThatLapsesHasNotRun(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	r := runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(succeed))
	d := r.ran.Load().durables[0]
	m := &nats.Msg{Subject: "orders.x"}
	id := messageID{1, 1}
	marks := func() string { return consumerInfo(t, nc, "ORDERS", "d").Config.Metadata[metadataAlone] }
	if _, err := d.notes().mark(t.Context(), id, 1); err != nil {
		t.Fatal(err)
	}
	before := parseAloneMarks(marks()).count(id)
	for range aloneProof + 1 {
		w := &work{delivery: &delivery{msg: Msg{Subject: m.Subject, seq: id.seq, time: id.time}}, raw: m, id: id, count: 2, alone: true}
		w.source = id
		w.begin(1, 1) // over long ago
		if d.mayRunAlone(w) || w.outcome != OutcomeLapsed {
			t.Fatalf("outcome %q, want it lapsed", w.outcome)
		}
		if n := parseAloneMarks(marks()).count(id); n != before {
			t.Fatalf("%d isolated runs are recorded, want the %d of before", n, before)
		}
	}
}
