package natsx

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// logged returns what was logged at any level and holds text.
func (b *logBook) logged(text string) (found []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.records {
		if strings.Contains(r.text, text) {
			found = append(found, r.text)
		}
	}
	return found
}

// What of an existing durable is not as the route says is an error that names option,
// both values and the remedy, or changed where the route adopts changes.
func TestChangedRoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	plain := Route("orders.*")
	tests := []struct {
		name          string
		before, after RouteBuilder
		field, want   string // of the fault
		have          string // in the fault's reason; empty for no fault
		fixed         bool   // not changed by AdoptChanges
	}{
		{"nothing", plain.MaxAckPending(10), plain, "", "", "", false},
		{"the same", plain.MaxAckPending(10).AckWait(time.Minute).DeliverFromTime(at), plain.MaxAckPending(10).AckWait(time.Minute).DeliverFromTime(at), "", "", "", false},
		{"filter", plain, Route("orders.x"), "subject", `["orders.x"]`, `its filter is ["orders.*"]`, false},
		{"more-filters", Route("orders.x"), Route("orders.x").Also("orders.y"), "subject", `["orders.x" "orders.y"]`, `its filter is ["orders.x"]`, false},
		{"fewer-filters", Route("orders.x").Also("orders.y"), Route("orders.y"), "subject", `["orders.y"]`, `its filter is ["orders.x" "orders.y"]`, false},
		{"filters-in-another-order", Route("orders.x").Also("orders.y"), Route("orders.y").Also("orders.x"), "", "", "", false},
		{"max-ack-pending", plain.MaxAckPending(10), plain.MaxAckPending(20), "maxAckPending", "20", "its MaxAckPending is 10", false},
		{"ack-wait", plain.AckWait(time.Second), plain.AckWait(2 * time.Second), "ackWait", "2s", "its AckWait is 1s", false},
		{"inactive", plain.InactiveThreshold(time.Hour), plain.InactiveThreshold(time.Minute), "inactiveThreshold", "1m0s", "its InactiveThreshold is 1h0m0s", false},
		{"pinned", plain, plain.PinnedBy("g"), "pinnedBy", `pinned_client of ["g"]`, "its priority policy is none", false},
		{"group", plain.PinnedBy("f"), plain.PinnedBy("g"), "pinnedBy", `pinned_client of ["g"]`, `its priority policy is pinned_client of ["f"]`, false},
		{"not-pinned", plain.PinnedBy("f"), plain, "pinnedBy", "none", `its priority policy is pinned_client of ["f"]`, false},
		{"deliver", plain, plain.DeliverNew(), "deliver", "new", "its deliver policy is all", true},
		{"deliver-sequence", plain.DeliverFromSequence(7), plain.DeliverFromSequence(8), "deliver", "by_start_sequence 8", "its deliver policy is by_start_sequence 7", true},
		{"deliver-time", plain.DeliverFromTime(at), plain.DeliverFromTime(at.Add(1)), "deliver", "by_start_time 2026-01-02T03:04:05.000000007Z", "its deliver policy is by_start_time 2026-01-02T03:04:05.000000006Z", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			durable := strings.ReplaceAll(tt.name, " ", "-")
			run := func(r RouteBuilder) (*logBook, error) {
				ctx, cancel := context.WithCancel(testContext(t))
				defer cancel()
				book, log := newLogBook()
				b := NewBroker(nc, WithLogger(log))
				go func() {
					select {
					case <-b.Ready():
						cancel()
					case <-ctx.Done():
					}
				}()
				return book, b.Run(ctx, r.Durable(durable).Handle(succeed))
			}
			if _, err := run(tt.before); err != nil {
				t.Fatal(err)
			}
			before := consumerInfo(t, nc, "ORDERS", durable).Config
			wantFault := func(err error, remedy string) {
				t.Helper()
				var fault *RouteError
				if !errors.Is(err, ErrConsumerConflict) || !errors.As(err, &fault) || fault.Durable != durable ||
					fault.Field != tt.field || fault.Value != tt.want || !strings.Contains(fault.Reason, tt.have) || !strings.Contains(fault.Reason, remedy) {
					t.Errorf("got %v, want an ErrConsumerConflict of %s %s that says %q and %q", err, tt.field, tt.want, tt.have, remedy)
				}
				if now := consumerInfo(t, nc, "ORDERS", durable).Config; !cmp.Equal(before, now) {
					t.Errorf("the refusal changed the durable (-before +now):\n%s", cmp.Diff(before, now))
				}
			}
			_, err := run(tt.after)
			if tt.have == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantFault(err, map[bool]string{true: "delete it to start anew", false: "AdoptChanges"}[tt.fixed])
			book, err := run(tt.after.AdoptChanges())
			if tt.fixed {
				wantFault(err, "the server cannot change")
				return
			}
			if err != nil {
				t.Fatalf("with AdoptChanges: %v", err)
			}
			said := strings.Replace(tt.have, " is ", " was ", 1)
			if lines := book.logged("durable changed to match"); len(lines) != 1 || !strings.Contains(lines[0], tt.want) || !strings.Contains(lines[0], said) {
				t.Errorf("logged %q, want one line that tells %q and %q", lines, tt.want, said)
			}
			if book, err := run(tt.after); err != nil || len(book.logged("durable changed to match")) != 0 {
				t.Errorf("once more: %v, logged %q", err, book.logged("durable changed to match"))
			}
			if now := consumerInfo(t, nc, "ORDERS", durable); now.Created.IsZero() || now.Config.Metadata[metadataID] != before.Metadata[metadataID] {
				t.Error("the durable was made anew")
			}
		})
	}
}

// All differences are named at once, and one that stays keeps the others from being made.
func TestSeveralChangesAreNamedAtOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	if err := runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").MaxAckPending(10).Handle(succeed)).stop(t); err != nil {
		t.Fatal(err)
	}
	next := Route("orders.x").Durable("d").MaxAckPending(20).DeliverNew()
	for _, r := range []RouteBuilder{next, next.AdoptChanges()} {
		err := wantRefused(t, nc, []Spec{r.Handle(succeed)}, ErrConsumerConflict)
		for _, want := range []string{"subject [", "maxAckPending 20", "deliver new"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q named", err, want)
			}
		}
	}
	if c := consumerInfo(t, nc, "ORDERS", "d").Config; c.FilterSubject != "orders.*" || c.MaxAckPending != 10 {
		t.Errorf("the durable was changed: %+v", c)
	}
}

// A durable of another client is made one for the route, and a refusal of the server names
// what was to be changed.
func TestAdoptsADurableOfAnotherClient(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy })
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "d", FilterSubject: "orders.x", AckPolicy: jetstream.AckExplicitPolicy, HeadersOnly: true, MaxDeliver: 3, MaxAckPending: 10,
		BackOff: []time.Duration{10 * time.Millisecond, time.Minute}, Description: "kept",
		PriorityPolicy: jetstream.PriorityPolicyOverflow, PriorityGroups: []string{"g"},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "e", FilterSubject: "orders.z", AckPolicy: jetstream.AckExplicitPolicy,
	}); err != nil {
		t.Fatal(err)
	}
	err := wantRefused(t, nc, []Spec{Route("orders.*").Durable("d").MaxAckPending(11).AdoptChanges().Handle(succeed)}, ErrConsumerConflict)
	for _, want := range []string{"maxAckPending 11, where its MaxAckPending was 10", `subject ["orders.*"], where its filter was ["orders.x"]`, "BackOff", "err_code=10100"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q named", err, want)
		}
	}
	if err := jetStream(t, nc).DeleteConsumer(testContext(t), "ORDERS", "e"); err != nil {
		t.Fatal(err)
	}
	publishAcked(t, nc, "orders.y", "1")
	handled := make(chan string, 10)
	r := runBroker(t, NewBroker(connect(t, nc.ConnectedUrl())), Route("orders.*").Durable("d").AdoptChanges().Handle(func(_ context.Context, m *Msg) error {
		handled <- string(m.Data)
		return nil
	}))
	if got := receive(t, handled, "the message"); got != "1" {
		t.Errorf("got the payload %q", got)
	}
	got := consumerInfo(t, nc, "ORDERS", "d").Config
	if got.FilterSubject != "orders.*" || got.HeadersOnly || len(got.BackOff) != 0 || got.MaxDeliver != -1 || got.MaxAckPending != 10 ||
		got.AckWait != DefaultAckWait || got.PriorityPolicy != jetstream.PriorityPolicyNone || got.Description != "kept" {
		t.Errorf("it became %+v", got)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A route that runs follows the limits that a redeployed one adopts, and ends when the
// filters are not its own any more.
func TestAdoptedChangesUnderARunningRoute(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	base := Route("orders.*").Durable("d").MaxAckPending(10)
	var seen tally
	count := func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return nil
	}
	_, log := newLogBook()
	old := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), base.Handle(count))
	second := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), base.MaxAckPending(20).AdoptChanges().Handle(count))
	publishMany(t, nc, 100, numbered("orders.x"))
	eventually(t, "all are handled", func() bool { return seen.keys() == 100 })
	if err := errors.Join(old.Health(), second.Health()); err != nil {
		t.Error(err)
	}
	third := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), Route("orders.x").Durable("d").AdoptChanges().Handle(count))
	for _, r := range []*running{old, second} {
		if err := r.wait(t); !errors.Is(err, ErrConsumerConflict) || !strings.Contains(err.Error(), `its filter is ["orders.x"]`) {
			t.Errorf("Run of another filter: %v", err)
		}
	}
	publishMany(t, nc, 100, func(i int) *nats.Msg { return numbered("orders.x")(100 + i) })
	eventually(t, "all are handled", func() bool { return seen.keys() == 200 })
	if err := third.stop(t); err != nil {
		t.Error(err)
	}
}

// One durable takes the messages of several filters, in the order of the stream, and of
// no other subject.
func TestSeveralFilters(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "SHOP", Subjects: []string{"orders.*", "returns.*", "stock.*"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.*"}})
	for i, subject := range []string{"orders.a", "returns.a", "stock.a", "orders.bad", "returns.bad", "stock.b", "orders.b"} {
		publishAcked(t, nc, subject, strconv.Itoa(i))
	}
	var got, stock tally
	failing := true
	order := make(chan string, 100)
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log), WithWorkers(1))
	r := runBroker(t, b,
		Route("orders.*").Also("returns.*").Durable("d").Retry(0).DLQ("dlq.d").Handle(func(_ context.Context, m *Msg) error {
			got.add(m.Subject)
			if strings.HasSuffix(m.Subject, ".bad") && failing {
				return errors.New("broken")
			}
			order <- m.Subject
			return nil
		}),
		Route("stock.*").Durable("e").Handle(func(_ context.Context, m *Msg) error {
			stock.add(m.Subject)
			return nil
		}))
	eventually(t, "all are settled", func() bool { return stored(t, nc, "SHOP") == 0 && stored(t, nc, "DLQ") == 2 })
	got.wantOnce(t, 5)
	stock.wantOnce(t, 2)
	if all := []string{<-order, <-order, <-order}; !slices.Equal(all, []string{"orders.a", "returns.a", "orders.b"}) {
		t.Errorf("handled %q, want them in the stream's order", all)
	}
	if st := b.Stats().Routes[0]; st.Route != "orders.*" || st.Durable != "d" || st.Succeeded != 3 || st.Dead != 2 {
		t.Errorf("stats %+v", st)
	}
	if c := consumerInfo(t, nc, "SHOP", "d").Config; c.FilterSubject != "" || !slices.Equal(c.FilterSubjects, []string{"orders.*", "returns.*"}) {
		t.Errorf("the durable has the filters %q %q", c.FilterSubject, c.FilterSubjects)
	}
	// A pause and an idle pull serve both filters, and so does a redrive.
	if err := errors.Join(b.Pause("d"), b.Resume("d")); err != nil {
		t.Error(err)
	}
	failing = false
	report, err := DeadLetters("dlq.d").Redrive(testContext(t), nc)
	if err != nil || report.Redriven != 2 {
		t.Errorf("redrive: %+v %v", report, err)
	}
	eventually(t, "the redriven ones are handled", func() bool { return stored(t, nc, "SHOP") == 0 })
	if got.get("orders.bad") != 2 || got.get("returns.bad") != 2 {
		t.Errorf("handled %+v", &got)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// Several filters must be subjects of one stream.
func TestSeveralFiltersNeedOneStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "A", Subjects: []string{"a.*", "c.1"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "B", Subjects: []string{"b.*", "c.2"}})
	for _, c := range []struct {
		route RouteBuilder
		want  error
		says  string
	}{
		{Route("a.*").Also("b.*"), ErrAmbiguousStream, `["A" "B"]`},
		{Route("a.*").Also("c.*"), ErrAmbiguousStream, `["A" "B"]`},
		{Route("a.*").Also("x"), ErrNoStream, `"x"`},
		{Route("x").Also("y"), ErrNoStream, ""},
		{Route("a.*").Also("b.*").Stream("A"), ErrNoStream, `"b.*"`},
	} {
		err := wantRefused(t, nc, []Spec{c.route.Durable("d").Handle(succeed)}, c.want)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("got %v, want %q in it", err, c.says)
		}
	}
	handled := make(chan string, 1)
	_, log := newLogBook()
	runBroker(t, NewBroker(nc, WithLogger(log)), Route("a.*").Also("c.*").Stream("A").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled <- m.Subject
		return nil
	}))
	publishAcked(t, nc, "c.1", "")
	if got := receive(t, handled, "the message"); got != "c.1" {
		t.Errorf("got %q", got)
	}
}

// A filter that the stream does not take any more is told, whichever it is.
func TestOneOfSeveralFiltersLeavesTheStream(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	stream := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"a.*", "b.*"}})
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("a.*").Also("b.*").Durable("d").Handle(succeed))
	cfg := stream.CachedInfo().Config
	cfg.Subjects = []string{"a.*"}
	if _, err := jetStream(t, nc).UpdateStream(testContext(t), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is told", func() bool {
		err := b.Health()
		return errors.Is(err, ErrNoStream) && strings.Contains(err.Error(), `"b.*"`)
	})
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}

// A durable with a threshold outlives a pause and handlers that take longer than it, and
// goes when nobody reads it.
func TestInactiveThreshold(t *testing.T) {
	t.Parallel()
	const threshold = time.Second
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	var seen tally
	busy, end := make(chan struct{}, 10), make(chan struct{})
	book, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").InactiveThreshold(threshold).AckWait(threshold).Handle(func(_ context.Context, m *Msg) error {
		if seen.add(string(m.Data)); string(m.Data) == "0" {
			busy <- struct{}{}
			<-end
		}
		return nil
	}))
	created := consumerInfo(t, nc, "ORDERS", "d")
	if got := created.Config.InactiveThreshold; got != threshold {
		t.Errorf("the durable's threshold is %v", got)
	}
	publishMany(t, nc, 10, numbered("orders.x"))
	receive(t, busy, "the handler")
	<-time.After(4 * threshold)
	close(end)
	eventually(t, "all are handled", func() bool { return seen.keys() == 10 })
	if err := b.Pause("d"); err != nil {
		t.Fatal(err)
	}
	<-time.After(4 * threshold)
	if err := b.Resume("d"); err != nil {
		t.Errorf("Resume: %v", err)
	}
	publishMany(t, nc, 10, func(i int) *nats.Msg { return numbered("orders.x")(10 + i) })
	eventually(t, "all are handled", func() bool { return seen.keys() == 20 })
	if now := consumerInfo(t, nc, "ORDERS", "d"); !now.Created.Equal(created.Created) {
		t.Error("the durable was made anew")
	}
	if said := book.alarms("inactive"); len(said) != 0 {
		t.Errorf("warned of what the route asks for: %q", said)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	eventually(t, "the durable is gone", func() bool {
		_, err := jetStream(t, nc).Consumer(testContext(t), "ORDERS", "d")
		return errors.Is(err, jetstream.ErrConsumerNotFound)
	})
	seen.wantOnce(t, 20)
}

func TestFiltersOfARoute(t *testing.T) {
	t.Parallel()
	for _, filters := range [][]string{
		{"a"}, {"a.*", "b.*", "c.>"}, {"a", ""}, {"a", `"`, `\`}, {"a", "b c"}, {"a", "b\x00c", "\xff"}, {"a", "a"},
	} {
		r := Route(filters[0])
		for _, f := range filters[1:] {
			r = r.Also(f)
		}
		if got := r.filters(); !slices.Equal(got, filters) {
			t.Errorf("got %q, want %q", got, filters)
		}
	}
	if Route("a").Also("b").Also("c") != Route("a").Also("b").Also("c") || Route("a").Also("b") == Route("a").Also("b").Also("c") {
		t.Error("routes do not compare by their filters")
	}
}
