package natsx

import (
	"context"
	"errors"
	"fmt"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// wantRefused runs specs and expects Run to end by itself with every error of
// want, before any route is ready.
func wantRefused(t *testing.T, nc *nats.Conn, specs []Spec, want ...error) error {
	t.Helper()
	_, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	err := startBroker(t, b, specs...).wait(t)
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Errorf("got %v, want %v", err, w)
		}
	}
	select {
	case <-b.Ready():
		t.Error("the broker is ready")
	default:
	}
	return err
}

func TestRunReportsAllFaultsBeforeTheNetwork(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	nc.Close()
	const faulty = 25
	var specs []Spec
	for i := range faulty {
		specs = append(specs, Route(fmt.Sprintf("a..%d", i)).Durable("d").Retry(-i-1).Handle(succeed))
	}
	err := wantRefused(t, nc, specs, ErrInvalidSubject, ErrOutOfRange)
	if errors.Is(err, ErrConnectionClosed) {
		t.Errorf("got %v, want no word of the connection", err)
	}
	for i := range faulty {
		for _, want := range []string{fmt.Sprintf("%q", fmt.Sprintf("a..%d", i)), fmt.Sprintf("retry %d:", -i-1)} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not name %s", want)
			}
		}
	}
	if got := strings.Count(err.Error(), "\n") + 1; got < 2*faulty {
		t.Errorf("got %d lines, want one for each of %d faults:\n%v", got, 2*faulty, err)
	}
}

func TestRunOnAClosedConnection(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	nc.Close()
	wantRefused(t, nc, []Spec{Route("a").Handle(succeed)}, ErrConnectionClosed)
}

func TestRouteThatCannotStartStopsAll(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "GOOD", Subjects: []string{"good.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "WQ", Subjects: []string{"wq.*"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "TWO1", Subjects: []string{"two.one"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "TWO2", Subjects: []string{"two.two"}})
	user := connect(t, s.ClientURL())
	err := wantRefused(t, user, []Spec{
		Route("good.*").Durable("fine").Handle(succeed),
		Route("core").Handle(succeed),
		Route("missing.*").Durable("lost").Handle(succeed),
		Route("good.x").Stream("NOWHERE").Durable("nowhere").Handle(succeed),
		Route("two.*").Durable("torn").Handle(succeed),
		Route("wq.*").Durable("careless").Retry(3).Handle(succeed),
		Route("good.*").Durable("undead").DLQ("dlq.missing").Handle(succeed),
	}, ErrNoStream, ErrAmbiguousStream, ErrWouldLose, ErrBadDLQ)
	for _, durable := range []string{"lost", "nowhere", "torn", "careless", "undead"} {
		if !strings.Contains(err.Error(), fmt.Sprintf("durable %q", durable)) {
			t.Errorf("got %v, want a word of %q", err, durable)
		}
	}
	if strings.Contains(err.Error(), "fine") {
		t.Errorf("got %v, want nothing of the sound route", err)
	}
	eventually(t, "no subscription is left", func() bool { return user.NumSubscriptions() <= 1 }) // of requests
}

func TestRetryWithoutDLQMustNotDelete(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "WQ", Subjects: []string{"wq.*"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "INT", Subjects: []string{"int.*"}, Retention: jetstream.InterestPolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "LIM", Subjects: []string{"lim.*"}})
	for _, filter := range []string{"wq.*", "int.*"} {
		for _, retries := range []int{0, 3} {
			wantRefused(t, nc, []Spec{Route(filter).Durable("d").Retry(retries).Handle(succeed)}, ErrWouldLose)
		}
		// Without Retry nothing ever dies of its attempts.
		if err := runBroker(t, NewBroker(nc), Route(filter).Durable("d").Handle(succeed)).stop(t); err != nil {
			t.Errorf("%s without Retry: %v", filter, err)
		}
	}
	if err := runBroker(t, NewBroker(nc), Route("lim.*").Durable("d").Retry(3).Handle(succeed)).stop(t); err != nil {
		t.Errorf("a stream that keeps what is dead: %v", err)
	}
}

func TestBadDLQIsRefused(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	js := jetStream(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "SRC", Subjects: []string{"src.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "SMALLSRC", Subjects: []string{"smallsrc.*"}, MaxMsgSize: 4096})
	createStream(t, nc, jetstream.StreamConfig{Name: "NOACK", Subjects: []string{"dlq.noack"}, NoAck: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "SMALL", Subjects: []string{"dlq.small"}, MaxMsgSize: 1024})
	createStream(t, nc, jetstream.StreamConfig{Name: "TINYSRC", Subjects: []string{"tinysrc.*"}, MaxMsgSize: 512})
	createStream(t, nc, jetstream.StreamConfig{Name: "TINY", Subjects: []string{"dlq.tiny"}, MaxMsgSize: 512})
	createStream(t, nc, jetstream.StreamConfig{Name: "IDLE", Subjects: []string{"dlq.idle"}, Retention: jetstream.InterestPolicy})
	// What wants letters now may be gone when one comes.
	createStream(t, nc, jetstream.StreamConfig{Name: "WANTED", Subjects: []string{"dlq.wanted"}, Retention: jetstream.InterestPolicy})
	if _, err := js.CreateConsumer(testContext(t), "WANTED", jetstream.ConsumerConfig{Durable: "triage"}); err != nil {
		t.Fatal(err)
	}
	createStream(t, nc, jetstream.StreamConfig{Name: "GOOD", Subjects: []string{"dlq.good"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "ROOMY", Subjects: []string{"dlq.roomy"}, MaxMsgSize: 64 << 10})
	createStream(t, nc, jetstream.StreamConfig{
		Name: "HASTY", Subjects: []string{"dlq.hasty"}, PersistMode: jetstream.AsyncPersistMode,
	})
	createStream(t, nc, jetstream.StreamConfig{Name: "COUNTER", Subjects: []string{"dlq.counter"}, AllowMsgCounter: true})
	createStream(t, nc, jetstream.StreamConfig{
		Name: "LATEST", Subjects: []string{"dlq.latest"}, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true,
	})
	createStream(t, nc, jetstream.StreamConfig{
		Name: "ELSEWHERE", Subjects: []string{"dlq.moved"}, SubjectTransform: &jetstream.SubjectTransformConfig{Source: "dlq.moved", Destination: "moved"},
	})
	sealed := jetstream.StreamConfig{Name: "SEALED", Subjects: []string{"dlq.sealed"}}
	createStream(t, nc, sealed)
	sealed.Sealed = true
	if _, err := js.UpdateStream(testContext(t), sealed); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		filter, dlq string
		want        error
	}{
		{"src.*", "dlq.none", ErrBadDLQ},
		{"src.*", "dlq.noack", ErrBadDLQ},
		{"src.*", "dlq.sealed", ErrBadDLQ},
		{"src.*", "dlq.small", ErrBadDLQ},
		{"smallsrc.*", "dlq.small", ErrBadDLQ},
		{"tinysrc.*", "dlq.tiny", ErrBadDLQ},
		{"src.*", "dlq.idle", ErrBadDLQ},
		{"src.*", "dlq.wanted", ErrBadDLQ},
		{"src.*", "dlq.hasty", ErrBadDLQ},
		{"src.*", "dlq.counter", ErrBadDLQ},
		{"src.*", "dlq.latest", ErrBadDLQ},
		{"src.*", "dlq.moved", ErrBadDLQ},
		{"src.*", "dlq.good", nil},
		{"smallsrc.*", "dlq.good", nil},
		{"smallsrc.*", "dlq.roomy", nil},
	} {
		spec := Route(c.filter).Durable("d").DLQ(c.dlq).Handle(succeed)
		if c.want != nil {
			err := wantRefused(t, nc, []Spec{spec}, c.want)
			if err != nil && (!strings.Contains(err.Error(), fmt.Sprintf("%q", c.dlq)) || !strings.Contains(err.Error(), `"d"`)) {
				t.Errorf("got %v, want the subject and the durable named", err)
			}
			continue
		}
		_, log := newLogBook()
		if err := runBroker(t, NewBroker(nc, WithLogger(log)), spec).stop(t); err != nil {
			t.Errorf("%s to %s: %v", c.filter, c.dlq, err)
		}
	}
}

func TestDLQWithFewerReplicasIsRefused(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "SRC", Subjects: []string{"src.*"}, Replicas: 3})
	createStream(t, nc, jetstream.StreamConfig{Name: "ONE", Subjects: []string{"dlq.one"}, Replicas: 1})
	createStream(t, nc, jetstream.StreamConfig{Name: "THREE", Subjects: []string{"dlq.three"}, Replicas: 3})
	wantRefused(t, nc, []Spec{Route("src.*").Durable("d").DLQ("dlq.one").Handle(succeed)}, ErrBadDLQ)
	_, log := newLogBook()
	if err := runBroker(t, NewBroker(nc, WithLogger(log)), Route("src.*").Durable("d").DLQ("dlq.three").Handle(succeed)).stop(t); err != nil {
		t.Errorf("as many replicas: %v", err)
	}
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "NAP", Subjects: []string{"nap.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "AWAKE", Subjects: []string{"awake.*"}})
	var handled, other atomic.Int64
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())),
		Route("nap.*").Durable("d").Handle(func(context.Context, *Msg) error {
			handled.Add(1)
			return nil
		}),
		Route("awake.*").Durable("e").Handle(func(context.Context, *Msg) error {
			other.Add(1)
			return nil
		}))
	publish(t, nc, &nats.Msg{Subject: "nap.x"})
	eventually(t, "the route works", func() bool { return handled.Load() == 1 })

	for range 2 { // twice is harmless
		if err := r.Pause("d"); err != nil {
			t.Fatalf("Pause: %v", err)
		}
	}
	publishMany(t, nc, 21, numbered("nap.x"))
	for i := range 20 {
		publish(t, nc, &nats.Msg{Subject: "awake.x"})
		eventually(t, "the other route works", func() bool { return other.Load() == int64(i)+1 })
	}
	if got := handled.Load(); got != 1 {
		t.Errorf("%d handled while paused, want 1 from before", got)
	}
	for range 2 {
		if err := r.Resume("d"); err != nil {
			t.Fatalf("Resume: %v", err)
		}
	}
	eventually(t, "the route goes on", func() bool { return handled.Load() == 22 })
	if r.Pause("nobody") == nil || r.Resume("nobody") == nil {
		t.Error("an unknown durable must be an error")
	}
	if err := r.Pause("d"); err != nil {
		t.Fatalf("Pause: %v", err)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run of a paused broker: %v", err)
	}
	// The pause was this broker's, not the durable's.
	publish(t, nc, &nats.Msg{Subject: "nap.x"})
	again := runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("nap.*").Durable("d").Handle(func(context.Context, *Msg) error {
		handled.Add(1)
		return nil
	}))
	eventually(t, "another broker works", func() bool { return handled.Load() == 23 })
	if err := again.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestPushConsumerIsNotAdopted(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "PUSH", Subjects: []string{"push.*"}})
	if _, err := jetStream(t, nc).CreatePushConsumer(testContext(t), "PUSH", jetstream.ConsumerConfig{
		Durable: "d", FilterSubject: "push.*", DeliverSubject: "deliver", AckPolicy: jetstream.AckExplicitPolicy,
	}); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, nc, []Spec{Route("push.*").Durable("d").Handle(succeed)}, ErrConsumerConflict)
}

// What may lose letters or the durable and is the owner's to decide is said once.
func TestStartUpWarnings(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{
		Name: "ORDERS", Subjects: []string{"orders.*"}, ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: time.Hour},
	})
	createStream(t, nc, jetstream.StreamConfig{
		Name: "DLQ", Subjects: []string{"dlq.*"}, MaxMsgs: 10, Duplicates: time.Second, Storage: jetstream.MemoryStorage, MaxAge: time.Hour,
	})
	book, log := newLogBook()
	if err := runBroker(t, NewBroker(nc, WithLogger(log)), Route("orders.*").Durable("d").DLQ("dlq.x").Handle(succeed)).stop(t); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"discards old letters", "duplicate window shorter", "letters in memory", "inactive_threshold=1h0m0s", "max_age=1h0m0s"} {
		if got := book.alarms(want); len(got) != 1 {
			t.Errorf("%q was said %d times, want once: %q", want, len(got), book.alarms(""))
		}
	}
}

// A server without JetStream looks like one that starts, but not for ever. Meanwhile log
// and Health say what the broker waits for.
func TestServerWithoutJetStream(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		opts []Option
	}{
		{"a route", nil},
		{"a stream", []Option{WithStreams(Stream("ORDERS").Subjects("orders.*"))}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t, func(o *server.Options) { o.JetStream = false }).ClientURL())
			book, log := newLogBook()
			r := startBroker(t, NewBroker(nc, append(tt.opts, WithLogger(log))...), Route("orders.*").Durable("d").Handle(succeed))
			eventually(t, "Health says so", func() bool { return errors.Is(r.Health(), ErrNoJetStream) })
			eventually(t, "the log says so", func() bool { return len(book.alarms("JetStream is not enabled")) == 1 })
			if err := r.wait(t); !errors.Is(err, ErrNoJetStream) || !errors.Is(err, nats.ErrNoResponders) || !strings.Contains(err.Error(), "JetStream is not enabled") || strings.Count(err.Error(), "natsx:") != 1 {
				t.Errorf("got %v, want that JetStream is not enabled", err)
			}
			if got := book.alarms("JetStream is not enabled"); len(got) != 1 {
				t.Errorf("said %q, want it once", got)
			}
		})
	}
}

// A rolling start that lowers the ack wait leaves the leases of those that still
// run alone.
func TestAckWaitIsNotLoweredUnderOthers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	started, end := make(chan struct{}, 10), make(chan struct{})
	spec := func(ackWait time.Duration) Spec {
		return Route("orders.*").Durable("d").AdoptChanges().AckWait(ackWait).Handle(func(context.Context, *Msg) error {
			started <- struct{}{}
			<-end
			return nil
		})
	}
	old := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1)), spec(20*time.Second))
	publishAcked(t, nc, "orders.x", "1")
	receive(t, started, "the handler")
	book, log := newLogBook()
	runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log)), spec(time.Second))
	if got := consumerInfo(t, nc, "ORDERS", "d").Config.AckWait; got != 20*time.Second {
		t.Errorf("the ack wait is %v, want 20s as long as somebody holds a message", got)
	}
	if len(book.alarms("keeps its longer ack wait")) != 1 {
		t.Errorf("it was not said: %q", book.alarms(""))
	}
	close(end)
	if err := old.stop(t); err != nil {
		t.Error(err)
	}
}

// A stream whose server is down for a moment is waited for.
func TestStartWaitsForAStreamThatIsOffline(t *testing.T) {
	t.Parallel()
	for _, code := range []int{10118, 10119, 10008, 10009} {
		t.Run(strconv.Itoa(code), func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			var asked tally
			sub, err := nc.Subscribe("api.>", func(m *nats.Msg) {
				_, operation, _ := strings.Cut(m.Subject, ".")
				kind := operation[:strings.LastIndex(operation, "ORDERS")+len("ORDERS")]
				if asked.add(kind); asked.get(kind) <= 2 && strings.Contains(operation, "ORDERS") && !strings.Contains(operation, "MSG.NEXT") {
					m.Respond(fmt.Appendf(nil, `{"error":{"code":500,"err_code":%d,"description":"is offline"}}`, code))
					return
				}
				nc.PublishRequest("$JS.API."+operation, m.Reply, m.Data)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe()
			js, err := jetstream.NewWithAPIPrefix(nc, "api")
			if err != nil {
				t.Fatal(err)
			}
			_, log := newLogBook()
			handled := make(chan struct{}, 1)
			r := runBroker(t, NewBroker(nc, WithJetStream(js), WithLogger(log)),
				Route("orders.*").Stream("ORDERS").Durable("d").Handle(func(context.Context, *Msg) error {
					handled <- struct{}{}
					return nil
				}))
			publishAcked(t, nc, "orders.x", "1")
			receive(t, handled, "the message")
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
			if asked.get("STREAM.INFO.ORDERS") < 3 || asked.get("CONSUMER.CREATE.ORDERS") < 3 {
				t.Errorf("asked %+v times", &asked)
			}
		})
	}
}

// The start of a thousand durables takes no more than the server's time, their pulls cost
// no goroutine each, and they stop at once.
func TestThousandIdleRoutes(t *testing.T) {
	t.Parallel()
	const routes = 1000
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "MANY", Subjects: []string{"many.*"}, Storage: jetstream.MemoryStorage})
	handled := make(chan string, routes)
	specs := make([]Spec, routes)
	for i := range specs {
		specs[i] = Route(fmt.Sprintf("many.%d", i)).Durable(fmt.Sprintf("d%d", i)).Handle(func(_ context.Context, m *Msg) error {
			handled <- m.Subject
			return nil
		})
	}
	user := connect(t, s.ClientURL())
	// The first request on a connection starts a goroutine that stays with it.
	if _, err := jetStream(t, user).AccountInfo(testContext(t)); err != nil {
		t.Fatal(err)
	}
	label := "goroutines of " + t.Name()
	var r *running
	pprof.Do(t.Context(), pprof.Labels("test", label), func(context.Context) {
		r = runBroker(t, NewBroker(user), specs...)
	})
	if n := labelled(t, label); n == 0 || n > 2*routes+50 {
		t.Errorf("%d routes have %d goroutines, want at most 2 each", routes, n)
	}
	for _, i := range []int{0, routes / 2, routes - 1} {
		subject := fmt.Sprintf("many.%d", i)
		publish(t, nc, &nats.Msg{Subject: subject})
		if got := receive(t, handled, "the message of "+subject); got != subject {
			t.Errorf("got a message of %q, want %q", got, subject)
		}
	}
	if err := r.Health(); err != nil {
		t.Error(err)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	eventually(t, "no goroutine is left", func() bool { return labelled(t, label) == 0 })
	for _, st := range r.Stats().Routes {
		if st.Lapsed != 0 || st.Received > 1 {
			t.Errorf("got %+v, want no message twice", st)
		}
	}
}
