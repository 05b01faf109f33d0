package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// orders makes the streams of most tests: ORDERS for orders.> and DLQ for dlq.>.
func orders(t testing.TB, nc *nats.Conn, edit ...func(*jetstream.StreamConfig)) {
	t.Helper()
	cfg := jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}}
	for _, fn := range edit {
		fn(&cfg)
	}
	createStream(t, nc, cfg)
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
}

func workQueue(cfg *jetstream.StreamConfig) { cfg.Retention = jetstream.WorkQueuePolicy }

// publishAcked stores a message for each payload.
func publishAcked(t testing.TB, nc *nats.Conn, subject string, payloads ...string) {
	t.Helper()
	js := jetStream(t, nc)
	for _, p := range payloads {
		if _, err := js.Publish(testContext(t), subject, []byte(p)); err != nil {
			t.Fatalf("publish: %v", err)
		}
	}
}

// routeStats waits until the counters of the only route are as cond wants them.
func routeStats(t testing.TB, b *Broker, what string, cond func(RouteStats) bool) RouteStats {
	t.Helper()
	eventually(t, what, func() bool { return cond(b.Stats().Routes[0]) })
	return b.Stats().Routes[0]
}

func succeed(context.Context, *Msg) error { return nil }

// Every outcome of the documented table, end to end on a work-queue stream, where
// what is settled is deleted.
func TestOutcomesOfADurable(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, workQueue)
	publishAcked(t, nc, "orders.new", "ok", "once", "always", "permanent", "discard", "panic", "late", "{bad json", "goexit", "after")
	var mu sync.Mutex
	attempts := map[string][]int{}
	type order struct{ ID int }
	typed := JSON(func(context.Context, order) error { return nil })
	b := NewBroker(nc, WithWorkers(4), WithErrorText(func(err error) string { return "text: " + err.Error() }))
	r := runBroker(t, b, Route("orders.*").Durable("billing").Retry(1).Backoff(time.Millisecond, 10*time.Millisecond).
		Timeout(2*time.Second).DLQ("dlq.orders").Handle(func(ctx context.Context, m *Msg) error {
		mu.Lock()
		attempts[string(m.Data)] = append(attempts[string(m.Data)], m.Attempt())
		mu.Unlock()
		switch string(m.Data) {
		case "once":
			if m.Attempt() == 1 {
				return errors.New("passing")
			}
		case "always":
			return errors.New("broken")
		case "permanent":
			return Permanent(errors.New("no such customer"))
		case "discard":
			return Discard(errors.New("not for us"))
		case "panic":
			panic("oops")
		case "late":
			<-ctx.Done()
		case "{bad json":
			return typed(ctx, m)
		case "goexit":
			runtime.Goexit()
		case "after":
			if m.Attempt() == 1 {
				return RetryAfter(0, errors.New("soon"))
			}
		}
		return nil
	}))
	routeStats(t, b, "all are settled", func(s RouteStats) bool { return s.Succeeded+s.Dead+s.Discarded == 10 })
	if err := r.stop(t); err != nil {
		t.Fatalf("Run: %v", err)
	}
	got := b.Stats().Routes[0]
	if got.HandlerTime < 4*time.Second {
		t.Errorf("handler time %s, want the two timeouts at least", got.HandlerTime)
	}
	got.HandlerTime, got.Delayed = 0, 0
	want := RouteStats{Route: "orders.*", Durable: "billing", Stream: "ORDERS",
		Received: 16, Succeeded: 3, Retried: 6, Dead: 6, Discarded: 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stats differ (-want +got):\n%s", diff)
	}
	wantAttempts := map[string][]int{
		"ok": {1}, "once": {1, 2}, "always": {1, 2}, "permanent": {1}, "discard": {1},
		"panic": {1, 2}, "late": {1, 2}, "{bad json": {1}, "goexit": {1, 2}, "after": {1, 2},
	}
	if diff := cmp.Diff(wantAttempts, attempts); diff != "" {
		t.Errorf("attempts differ (-want +got):\n%s", diff)
	}
	dead := map[string]string{}
	for _, l := range letters(t, nc, "DLQ") {
		dead[string(l.Data)] = l.Header.Get(HeaderDLQReason) + " " + l.Header.Get(HeaderDLQAttempts) + " " + l.Header.Get(HeaderDLQError)
		if stack := l.Header.Get(HeaderDLQStack); (string(l.Data) == "panic") != strings.Contains(stack, "TestOutcomesOfADurable") {
			t.Errorf("letter %q has the stack %q", l.Data, stack)
		}
	}
	wantDead := map[string]string{
		"always":    "exhausted 2 text: broken",
		"permanent": "permanent 1 text: no such customer",
		"panic":     "panic 2 text: natsx: handler panicked: oops",
		"late":      "exhausted 2 text: natsx: handler did not return within 2s: context deadline exceeded",
		"{bad json": `undecodable 1 text: natsx: decode application/json from "orders.new": invalid character 'b' looking for beginning of object key string`,
		"goexit":    "panic 2 text: natsx: handler panicked: runtime.Goexit",
	}
	if diff := cmp.Diff(wantDead, dead); diff != "" {
		t.Errorf("letters differ (-want +got):\n%s", diff)
	}
	if n := stored(t, nc, "ORDERS"); n != 0 {
		t.Errorf("%d messages left in the source", n)
	}
}

func TestConfirmedAcksAreStored(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.new", "ok", "retry", "discard")
	b := NewBroker(nc)
	runBroker(t, b, Route("orders.*").Durable("billing").ConfirmAcks().Backoff(time.Millisecond, time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			switch {
			case string(m.Data) == "retry" && m.Attempt() == 1:
				return errors.New("again")
			case string(m.Data) == "discard":
				return Discard(nil)
			}
			return nil
		}))
	routeStats(t, b, "all are settled", func(s RouteStats) bool { return s.Succeeded == 2 && s.Discarded == 1 })
	// No flush and no polling: what was counted was confirmed.
	info := consumerInfo(t, nc, "ORDERS", "billing")
	if info.NumAckPending != 0 || info.AckFloor.Stream != 3 {
		t.Errorf("pending %d, ack floor %d, want 0 and 3", info.NumAckPending, info.AckFloor.Stream)
	}
}

func TestDurableStartsWhereItIsTold(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.a", "1", "2")
	publishAcked(t, nc, "orders.b", "3", "4")
	s := streamNow(t, nc, "ORDERS")
	third, err := s.GetMsg(testContext(t), 3)
	if err != nil {
		t.Fatal(err)
	}
	base := Route("orders.*")
	tests := []struct {
		name  string
		route RouteBuilder
		want  string // of 1 to 4 and 5, which comes later
	}{
		{"all", base, "1 2 3 4 5"},
		{"new", base.DeliverNew(), "5"},
		{"last", base.DeliverLast(), "4 5"},
		{"last-per-subject", base.DeliverLastPerSubject(), "2 4 5"},
		{"sequence", base.DeliverFromSequence(2), "2 3 4 5"},
		{"time", base.DeliverFromTime(third.Time), "3 4 5"},
		{"last-called-wins", base.DeliverNew().DeliverFromSequence(4), "4 5"},
	}
	got := make([]chan string, len(tests))
	var specs []Spec
	for i, tt := range tests {
		got[i] = make(chan string, 10)
		specs = append(specs, tt.route.Durable(tt.name).Concurrency(1).Handle(func(_ context.Context, m *Msg) error {
			got[i] <- string(m.Data)
			return nil
		}))
	}
	runBroker(t, NewBroker(nc), specs...)
	publishAcked(t, nc, "orders.a", "5")
	for i, tt := range tests {
		var all []string
		for len(all) == 0 || all[len(all)-1] != "5" {
			all = append(all, receive(t, got[i], "messages of "+tt.name))
		}
		if s := strings.Join(all, " "); s != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, s, tt.want)
		}
	}
}

func TestExistingDurable(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	js := jetStream(t, nc)
	base := jetstream.ConsumerConfig{
		FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: 7 * time.Second, MaxDeliver: 3, MaxAckPending: 10, Description: "kept",
	}
	with := func(edit func(*jetstream.ConsumerConfig)) jetstream.ConsumerConfig {
		cfg := base
		edit(&cfg)
		return cfg
	}
	tests := []struct {
		name    string
		have    jetstream.ConsumerConfig
		refused string // part of the reason, empty when it is adopted
	}{
		{"plain", base, ""},
		{"backoff", with(func(c *jetstream.ConsumerConfig) { c.BackOff = []time.Duration{time.Second} }), "BackOff"},
		{"ack-all", with(func(c *jetstream.ConsumerConfig) { c.AckPolicy = jetstream.AckAllPolicy }), "ack policy"},
		{"filter", with(func(c *jetstream.ConsumerConfig) { c.FilterSubject = "orders.x" }), `["orders.x"]`},
		{"filters", with(func(c *jetstream.ConsumerConfig) {
			c.FilterSubject, c.FilterSubjects = "", []string{"orders.x", "orders.y"}
		}), `["orders.x" "orders.y"]`},
		{"headers-only", with(func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true }), "headers only"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.have.Durable = tt.name
			if _, err := js.CreateConsumer(testContext(t), "ORDERS", tt.have); err != nil {
				t.Fatal(err)
			}
			b := NewBroker(nc)
			route := Route("orders.*").Durable(tt.name).Handle(succeed)
			if tt.refused != "" {
				err := b.Run(testContext(t), route)
				var fault *RouteError
				if !errors.Is(err, ErrConsumerConflict) || !errors.As(err, &fault) || fault.Durable != tt.name || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("got %v, want ErrConsumerConflict for its %s", err, tt.refused)
				}
				return
			}
			runBroker(t, b, route)
			info := consumerInfo(t, nc, "ORDERS", tt.name)
			got := info.Config
			if got.AckWait != 7*time.Second || got.MaxDeliver != -1 || got.MaxAckPending != 10 || got.Description != "kept" {
				t.Errorf("adopted as %+v", got)
			}
		})
	}
}

func TestStartUpRefusals(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "A", Subjects: []string{"a.>"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "B", Subjects: []string{"b.>"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "I", Subjects: []string{"i.>"}, Retention: jetstream.InterestPolicy})
	tests := []struct {
		name  string
		specs []Spec
		want  []error
	}{
		{"no stream", []Spec{Route("x.*").Durable("d").Handle(succeed)}, []error{ErrNoStream}},
		{"named stream is missing", []Spec{Route("x.*").Durable("d").Stream("X").Handle(succeed)}, []error{ErrNoStream}},
		{"filter outside the stream", []Spec{Route("x.*").Durable("d").Stream("B").Handle(succeed)}, []error{ErrNoStream}},
		{"several streams", []Spec{Route(">").Durable("d").Handle(succeed)}, []error{ErrAmbiguousStream}},
		{"work queue would lose", []Spec{Route("b.*").Durable("d").Retry(1).Handle(succeed)}, []error{ErrWouldLose}},
		{"interest would lose", []Spec{Route("i.*").Durable("d").Retry(0).Handle(succeed)}, []error{ErrWouldLose}},
		{"one durable, one stream, found at start", []Spec{
			Route("a.x").Durable("twice").Handle(succeed), Route("a.y").Durable("twice").Handle(succeed),
		}, []error{ErrDuplicateDurable}},
		{"all causes", []Spec{
			Route("x.*").Durable("d").Handle(succeed), Route("b.*").Durable("e").Retry(1).Handle(succeed),
			Route("core").Handle(succeed), Route("a.z").Durable("f").DLQ("nowhere").Handle(succeed),
		}, []error{ErrNoStream, ErrWouldLose, ErrBadDLQ}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := NewBroker(nc)
			err := b.Run(testContext(t), tt.specs...)
			for _, want := range tt.want {
				if !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			select {
			case <-b.Ready():
				t.Error("broker said it was ready")
			default:
			}
			if b.Health() == nil {
				t.Error("healthy after a failed start")
			}
		})
	}
}

func TestOneDurableNameOnTwoStreams(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "A", Subjects: []string{"a.>"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "B", Subjects: []string{"b.>"}})
	got := make(chan string, 2)
	handle := func(_ context.Context, m *Msg) error { got <- m.Stream() + m.Durable(); return nil }
	runBroker(t, NewBroker(nc), Route("a.*").Durable("svc").Handle(handle), Route("b.*").Durable("svc").Handle(handle))
	publishAcked(t, nc, "a.x", "")
	publishAcked(t, nc, "b.x", "")
	both := []string{receive(t, got, "a message"), receive(t, got, "a message")}
	slices.Sort(both)
	if diff := cmp.Diff([]string{"Asvc", "Bsvc"}, both); diff != "" {
		t.Error(diff)
	}
}

func TestMaxAckPendingYieldsToLimits(t *testing.T) {
	t.Parallel()
	for _, limited := range []string{"stream", "server"} {
		t.Run(limited, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, func(o *server.Options) {
				if limited == "server" {
					o.JetStreamLimits.MaxAckPending = 500
				}
			})
			nc := connect(t, s.ClientURL())
			orders(t, nc, func(c *jetstream.StreamConfig) {
				if limited == "stream" {
					c.ConsumerLimits.MaxAckPending = 500
				}
			})
			runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Handle(succeed))
			info := consumerInfo(t, nc, "ORDERS", "d")
			if got := info.Config.MaxAckPending; got != 500 {
				t.Errorf("MaxAckPending %d, want 500", got)
			}
			err := NewBroker(nc).Run(testContext(t), Route("orders.*").Durable("e").MaxAckPending(501).Handle(succeed))
			if err == nil || !strings.Contains(err.Error(), "500") {
				t.Errorf("an explicit cap above the limit: got %v", err)
			}
		})
	}
}

func TestPullLimitsOfTheConsumer(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "small", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy,
		MaxRequestBatch: 3, MaxRequestExpires: 2 * time.Second,
	}); err != nil {
		t.Fatal(err)
	}
	var payloads []string
	for i := range 100 {
		payloads = append(payloads, strconv.Itoa(i))
	}
	publishAcked(t, nc, "orders.new", payloads...)
	b := NewBroker(nc)
	runBroker(t, b, Route("orders.*").Durable("small").Handle(succeed))
	s := routeStats(t, b, "all are handled", func(s RouteStats) bool { return s.Succeeded == 100 })
	if s.Received != 100 {
		t.Errorf("received %d, want 100", s.Received)
	}
}

type observed struct {
	mu     sync.Mutex
	events []Event
}

func (o *observed) Observe(ctx context.Context, e Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if MsgFrom(ctx) == e.Msg {
		o.events = append(o.events, e)
	}
}

// lines tells all events, one a line.
func (o *observed) lines(line func(Event) string) (all []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.events {
		all = append(all, line(e))
	}
	return all
}

// observerFunc is an Observer made of a function.
type observerFunc func(Event)

func (f observerFunc) Observe(_ context.Context, e Event) { f(e) }

// An observer that panics is reported, and changes nothing of what it is told of.
func TestObserverPanics(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	book, log := newLogBook()
	b := NewBroker(nc, WithWorkers(1), WithLogger(log), WithObserver(observerFunc(func(e Event) { panic(string(e.Outcome)) })))
	runBroker(t, b,
		Route("orders.*").Durable("d").Retry(0).DLQ("dlq.orders").Handle(func(_ context.Context, m *Msg) error {
			if string(m.Data) == "bad" {
				return errors.New("bad")
			}
			return nil
		}),
		Route("ask").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("yes"), nil }))
	publishAcked(t, nc, "orders.new", "good", "bad", "good")
	routeStats(t, b, "all are handled", func(s RouteStats) bool { return s.Succeeded == 2 && s.Dead == 1 })
	if m, err := nc.Request("ask", nil, testLimit); err != nil || string(m.Data) != "yes" {
		t.Fatalf("request: %v", err)
	}
	if report, err := b.Replay(testContext(t), Replay("orders.>").Handle(succeed)); err != nil || report.Handled != 3 {
		t.Errorf("replay: got %+v, %v", report, err)
	}
	if n := stored(t, nc, "DLQ"); n != 1 || !settled(t, nc, "ORDERS", "d") {
		t.Errorf("%d letters, or something is not settled", n)
	}
	eventually(t, "every panic is logged", func() bool { return len(book.alarms("panicked panic=")) == 3+1+3 })
}

func TestMiddlewareAndObserverSeeEveryKindOfRoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var mu sync.Mutex
	var trail []string
	mw := func(name string) Middleware {
		return func(next Handler) Handler {
			return func(ctx context.Context, m *Msg) error {
				mu.Lock()
				trail = append(trail, name+" "+m.Route()+" "+m.Subject)
				mu.Unlock()
				return next(ctx, m)
			}
		}
	}
	o := &observed{}
	b := NewBroker(nc, WithWorkers(1), WithMiddleware(mw("outer"), mw("inner")), WithObserver(o))
	runBroker(t, b,
		Route("orders.*").Durable("d").Handle(func(context.Context, *Msg) error { return Discard(errors.New("no")) }),
		Route("core").Handle(func(context.Context, *Msg) error { return errors.New("lost") }),
		Route("ask").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("yes"), nil }))
	publishAcked(t, nc, "orders.new", "")
	routeStats(t, b, "the durable's message is handled", func(s RouteStats) bool { return s.Discarded == 1 })
	if err := nc.Publish("core", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the core message is handled", func() bool { return b.Stats().Routes[1].Failed == 1 })
	if m, err := nc.Request("ask", nil, testLimit); err != nil || string(m.Data) != "yes" {
		t.Fatalf("request: %v", err)
	}
	eventually(t, "the request is counted", func() bool { return b.Stats().Routes[2].Succeeded == 1 })
	if report, err := b.Replay(testContext(t), Replay("orders.>").Handle(succeed)); err != nil || report.Handled != 1 {
		t.Fatalf("replay: %+v %v", report, err)
	}
	mu.Lock()
	defer mu.Unlock()
	want := []string{
		"outer orders.* orders.new", "inner orders.* orders.new", "outer core core", "inner core core", "outer ask ask", "inner ask ask",
		"outer orders.> orders.new", "inner orders.> orders.new",
	}
	if diff := cmp.Diff(want, trail); diff != "" {
		t.Errorf("middleware (-want +got):\n%s", diff)
	}
	got := o.lines(func(e Event) string { return fmt.Sprintf("%s %s %s %v", e.Route, e.Durable, e.Outcome, e.Err) })
	wantEvents := []string{"orders.* d discarded no", "core  failed lost", "ask  succeeded <nil>", "orders.>  succeeded <nil>"}
	if diff := cmp.Diff(wantEvents, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func TestRunOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	b := NewBroker(nc)
	if err := b.Health(); err == nil {
		t.Error("healthy before it runs")
	}
	r := runBroker(t, b, Route("a").Handle(succeed))
	if err := b.Health(); err != nil {
		t.Errorf("health while it runs: %v", err)
	}
	if err := b.Run(testContext(t), Route("a").Handle(succeed)); !errors.Is(err, ErrAlreadyRun) {
		t.Errorf("a second Run: got %v", err)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := b.Health(); err == nil {
		t.Error("healthy after it ran")
	}
}

func TestFaultyOptions(t *testing.T) {
	t.Parallel()
	err := NewBroker(nil, WithWorkers(0), WithDrainTimeout(-1), WithMiddleware(nil), WithErrorText(nil)).
		Run(context.Background(), Route("a b").Handle(succeed))
	for _, want := range []string{"connection", "workers 0", "drain timeout -1ns", "middleware 0", "error text", `"a b"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %q: %v", want, err)
		}
	}
	if !errors.Is(err, ErrOutOfRange) || !errors.Is(err, ErrInvalidSubject) {
		t.Errorf("got %v", err)
	}
}

// A first connect that nobody answers is waited for, and ends with the context.
func TestRunWaitsForTheConnection(t *testing.T) {
	t.Parallel()
	nc, err := Connect("nats://127.0.0.1:1", nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatalf("Connect: %v", err)
	}
	defer nc.Close()
	b := NewBroker(nc)
	r := startBroker(t, b, Route("a").Handle(succeed))
	eventually(t, "health tells of the connection", func() bool {
		err := b.Health()
		return err != nil && strings.Contains(err.Error(), "connection is")
	})
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestClosedConnectionEndsRun(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	r := runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Handle(succeed), Route("a").Handle(succeed))
	nc.Close()
	if err := r.wait(t); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("got %v, want ErrConnectionClosed", err)
	}
}

func TestDomainAndPrefix(t *testing.T) {
	t.Parallel()
	s := startServer(t, func(o *server.Options) { o.JetStreamDomain = "hub" })
	nc := connect(t, s.ClientURL())
	orders(t, nc, workQueue)
	publishAcked(t, nc, "orders.new", "a", "bad")
	for _, make := range []func() (jetstream.JetStream, error){
		func() (jetstream.JetStream, error) { return jetstream.NewWithDomain(nc, "hub") },
		func() (jetstream.JetStream, error) { return jetstream.NewWithAPIPrefix(nc, "$JS.hub.API") },
	} {
		js, err := make()
		if err != nil {
			t.Fatal(err)
		}
		b := NewBroker(nc, WithJetStream(js))
		r := runBroker(t, b, Route("orders.*").Durable("d").Retry(0).DLQ("dlq.orders").Handle(func(_ context.Context, m *Msg) error {
			if string(m.Data) == "bad" {
				return errors.New("bad")
			}
			return nil
		}))
		routeStats(t, b, "all are settled", func(s RouteStats) bool { return s.Succeeded == 1 && s.Dead == 1 })
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
		publishAcked(t, nc, "orders.new", "a", "bad")
	}
}

func TestStreamOfLettersIsCreatedToKeepThem(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	streams := WithStreams(
		Stream("ORDERS").Subjects("orders.>"), Stream("DLQ").Subjects("x", "dlq.>").MaxMsgs(1),
		Stream("OLD").Subjects("old").Discard(jetstream.DiscardOld), Stream("letters"))
	b := NewBroker(nc, streams)
	runBroker(t, b, Route("orders.a").Durable("d").Retry(0).DLQ("dlq.orders").Handle(func(context.Context, *Msg) error { return errors.New("no") }),
		Route("orders.b").Durable("e").DLQ("old").Handle(succeed),
		Route("orders.c").Durable("f").DLQ("letters").Handle(succeed))
	want := map[string]jetstream.DiscardPolicy{"ORDERS": jetstream.DiscardOld, "DLQ": jetstream.DiscardNew, "OLD": jetstream.DiscardOld,
		"letters": jetstream.DiscardNew} // of which it is the subject
	for name, policy := range want {
		s := streamNow(t, nc, name)
		if got := s.CachedInfo().Config.Discard; got != policy {
			t.Errorf("stream %s has %s, want %s", name, got, policy)
		}
	}
	// The second letter finds the DLQ full: it waits, and is moved once there is room.
	publishAcked(t, nc, "orders.a", "1", "2")
	eventually(t, "health tells of the full DLQ", func() bool {
		err := b.Health()
		return err != nil && strings.Contains(err.Error(), "maximum messages exceeded")
	})
	s := streamNow(t, nc, "DLQ")
	if err := s.Purge(testContext(t)); err != nil {
		t.Fatal(err)
	}
	routeStats(t, b, "both are moved", func(s RouteStats) bool { return s.Dead == 2 })
	eventually(t, "the route is well again", func() bool { return b.Health() == nil })
}

func TestMiddlewareWithoutAHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	b := NewBroker(nc, WithMiddleware(func(Handler) Handler { return nil }))
	if err := b.Run(testContext(t), Route("core").Handle(succeed)); !errors.Is(err, ErrNoHandler) || !strings.Contains(err.Error(), `"core"`) {
		t.Errorf("got %v, want ErrNoHandler that names the route", err)
	}
	if _, err := b.Replay(testContext(t), Replay("past").Handle(succeed)); !errors.Is(err, ErrNoHandler) || !strings.Contains(err.Error(), `"past"`) {
		t.Errorf("got %v, want ErrNoHandler that names the replay", err)
	}
}

func TestJetStreamOfAnotherConnection(t *testing.T) {
	t.Parallel()
	url := startServer(t).ClientURL()
	nc, other := connect(t, url), connect(t, url)
	err := NewBroker(nc, WithJetStream(jetStream(t, other))).Run(testContext(t), Route("core").Handle(succeed))
	if !errors.Is(err, ErrOptionConflict) {
		t.Errorf("got %v, want ErrOptionConflict", err)
	}
}

// A work queue deletes what is terminated: a dead message without a DLQ stays.
func TestDeadWithoutADLQStaysInAWorkQueue(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, workQueue)
	book, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Handle(JSON(func(_ context.Context, v struct{ Discard bool }) error {
		if v.Discard {
			return Discard(errors.New("not wanted"))
		}
		return nil
	})))
	publishAcked(t, nc, "orders.x", "{not json", `{"discard":true}`, "{}")
	routeStats(t, b, "all are done with", func(s RouteStats) bool { return s.Dead == 1 && s.Discarded == 1 && s.Succeeded == 1 })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	eventually(t, "what is settled is deleted", func() bool { return stored(t, nc, "ORDERS") <= 1 })
	if got := letters(t, nc, "ORDERS"); len(got) != 1 || string(got[0].Data) != "{not json" {
		t.Errorf("%d messages are left, want the dead one", len(got))
	}
	if len(book.alarms("it stays unsettled")) != 1 {
		t.Errorf("it was not said: %q", book.alarms(""))
	}
}

// wrapError cannot be asked for its chain when it is a nil pointer in an error.
type wrapError struct{ cause error }

func (e *wrapError) Error() string { return "wrapped: " + e.cause.Error() }
func (e *wrapError) Unwrap() error { return e.cause }

func TestErrorWithoutAChainIsAPanic(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		var err *wrapError
		return err
	}))
	publishAcked(t, nc, "orders.x", "payload")
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	if got := letters(t, nc, "DLQ")[0].Header.Get(HeaderDLQReason); got != string(ReasonPanic) {
		t.Errorf("reason %q, want panic", got)
	}
}

// The delays of retries are spread, so that what failed together does not come
// again together.
func TestBackoffIsSpread(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	book, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	runBroker(t, b, Route("orders.*").Durable("d").Backoff(time.Hour, time.Hour).Handle(func(context.Context, *Msg) error {
		return errors.New("not now")
	}))
	publishMany(t, nc, 10, numbered("orders.x"))
	routeStats(t, b, "all have failed", func(s RouteStats) bool { return s.Retried == 10 })
	var delays tally
	for _, line := range book.alarms("retry_in=") {
		_, delay, _ := strings.Cut(line, "retry_in=")
		d, err := time.ParseDuration(delay)
		if err != nil || d < 48*time.Minute || d > time.Hour {
			t.Errorf("delay %q, want 48m to 1h", delay)
		}
		delays.add(delay)
	}
	if delays.sum() != 10 || delays.keys() < 3 {
		t.Errorf("%d different of %d delays", delays.keys(), delays.sum())
	}
}

// Retries of a process that is gone fill MaxAckPending as those of this one do.
func TestCrowdedRouteShowsInHealth(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	spec := Route("orders.*").Durable("d").MaxAckPending(5).Handle(func(context.Context, *Msg) error {
		return RetryAfter(time.Hour, errors.New("not now"))
	})
	publishMany(t, nc, 6, numbered("orders.x"))
	for _, process := range []string{"the one that fails them", "the next"} {
		b := NewBroker(nc)
		r := runBroker(t, b, spec)
		eventually(t, "Health of "+process+" tells", func() bool {
			err := b.Health()
			return err != nil && strings.Contains(err.Error(), "fill MaxAckPending")
		})
		if err := r.stop(t); err != nil {
			t.Error(err)
		}
	}
}

// A fast handler has messages pulled by the hundred, not by the worker.
func TestFastHandlerPullsDeep(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishMany(t, nc, 5000, numbered("orders.x"))
	var deepest atomic.Int64
	if _, err := nc.Subscribe("$JS.API.CONSUMER.MSG.NEXT.ORDERS.d", func(m *nats.Msg) {
		var r struct{ Batch int64 }
		if err := json.Unmarshal(m.Data, &r); err != nil {
			t.Errorf("pull %q: %v", m.Data, err)
		}
		deepest.Store(max(deepest.Load(), r.Batch))
	}); err != nil {
		t.Fatal(err)
	}
	var handled tally
	runBroker(t, NewBroker(nc, WithWorkers(4)), Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled.add(string(m.Data))
		return nil
	}))
	eventually(t, "all are handled", func() bool { return handled.sum() == 5000 })
	if got := deepest.Load(); got < 64 {
		t.Errorf("the deepest pull was for %d messages, want more than for 4 workers", got)
	}
}
