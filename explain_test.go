package natsx

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
)

// told returns what was logged at info level and begins with text.
func (b *logBook) told(text string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []string
	for _, r := range b.records {
		if strings.HasPrefix(r.text, text) {
			found = append(found, r.text)
		}
	}
	return found
}

// wantTold fails the test unless one line was logged that begins with text and holds
// all of want.
func wantTold(t *testing.T, book *logBook, text string, want ...string) {
	t.Helper()
	lines := book.told(text)
	if len(lines) != 1 {
		t.Errorf("%q was logged %d times, want once: %q", text, len(lines), book.told(""))
		return
	}
	for _, w := range want {
		if !strings.Contains(lines[0], w) {
			t.Errorf("logged %q, want %q in it", lines[0], w)
		}
	}
}

// A start logs each stream and durable once: whether it was found, created or changed,
// and what was changed.
func TestStartLogsWhatItFoundAndMade(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "AUDIT", Subjects: []string{"audit.*"}})
	start := func(ackWait, maxAge time.Duration) *logBook {
		t.Helper()
		book, log := newLogBook()
		b := NewBroker(nc, WithLogger(log), WithStreams(
			Stream("ORDERS").Subjects("orders.*").MaxAge(maxAge),
			Stream("DLQ").Subjects("dlq.*"),
		))
		err := runBroker(t, b,
			Route("orders.*").Durable("billing").DeliverNew().AckWait(ackWait).MaxAckPending(65536).AdoptChanges().DLQ("dlq.orders").Handle(succeed),
			Route("audit.a").Durable("one").Handle(succeed),
			Route("audit.b").Durable("two").Handle(succeed),
		).stop(t)
		if err != nil {
			t.Fatal(err)
		}
		return book
	}

	book := start(time.Minute, time.Hour)
	wantTold(t, book, "natsx: stream created stream=ORDERS", `subjects=["orders.*"]`, "retention=Limits", "storage=File", "replicas=1")
	wantTold(t, book, "natsx: stream created stream=DLQ")
	wantTold(t, book, "natsx: stream found stream=AUDIT", "messages=0")
	wantTold(t, book, "natsx: durable created route=orders.* durable=billing", "stream=ORDERS", "ack_wait=1m0s", "deliver=new", "pending=0")
	wantTold(t, book, "natsx: durable created route=audit.a durable=one")

	book = start(time.Minute, time.Hour)
	wantTold(t, book, "natsx: stream found stream=ORDERS")
	wantTold(t, book, "natsx: stream found stream=AUDIT")
	wantTold(t, book, "natsx: durable found route=orders.* durable=billing")
	if lines := slices.Concat(book.told("natsx: stream c"), book.told("natsx: durable c")); len(lines) > 0 {
		t.Errorf("logged %q, want nothing created or changed", lines)
	}

	publishAcked(t, nc, "orders.x", "1")
	if _, err := jetStream(t, nc).UpdateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "billing", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy, DeliverPolicy: jetstream.DeliverNewPolicy,
		MaxDeliver: 7, MaxAckPending: 1000, AckWait: time.Minute,
	}); err != nil {
		t.Fatal(err)
	}
	book = start(2*time.Minute, 2*time.Hour)
	wantTold(t, book, "natsx: stream changed stream=ORDERS", "changes=[maxAge: 1h0m0s -> 2h0m0s]")
	wantTold(t, book, "natsx: durable changed to match the route route=orders.* durable=billing", "pending=1",
		"ackWait 2m0s, where its AckWait was 1m0s", "maxDeliver unlimited, where its MaxDeliver was 7", "maxAckPending 65536, where its MaxAckPending was 1000")
}

func TestEnsureLogsWhatItDid(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	name := "LOGGED" + strings.ToUpper(strings.ReplaceAll(t.Name(), "/", ""))
	for _, c := range []struct {
		age time.Duration
		did string
	}{{time.Hour, "created"}, {time.Hour, "found"}, {2 * time.Hour, "changed"}} {
		if err := Stream(name).Subjects("logged.*").MaxAge(c.age).Ensure(t.Context(), nc); err != nil {
			t.Fatal(err)
		}
		wantTold(t, defaultLog, "natsx: stream "+c.did+" stream="+name)
	}
}

// A missing stream is explained by what there is, and by what would make it.
func TestMissingStreamNamesTheNearest(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	fault := func(spec Spec) string {
		t.Helper()
		return wantRefused(t, nc, []Spec{spec}, ErrNoStream).Error()
	}
	empty := fault(Route("order.*").Durable("d").Handle(succeed))
	for _, want := range []string{"the account has no streams", `WithStreams(Stream("ORDER").Subjects("order.*"))`} {
		if !strings.Contains(empty, want) {
			t.Errorf("got %q, want %q in it", empty, want)
		}
	}
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*", "returns.eu.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "PAYMENTS", Subjects: []string{"payments.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.orders"}})
	for _, c := range []struct {
		spec Spec
		want []string
	}{
		{Route("order.*").Durable("d").Handle(succeed), []string{`the nearest are "orders.*" of stream "ORDERS",`, `Stream("ORDER").Subjects("order.*")`}},
		{Route("*.new").Stream("SHOP").Durable("d").Handle(succeed), []string{"does not exist", `Stream("SHOP").Subjects("*.new")`}},
		{Route("*.eu.x.y").Durable("d").Handle(succeed), []string{`"returns.eu.*" of stream "ORDERS"`, `Stream("NAME").Subjects("*.eu.x.y")`}},
		{Route("orders.*").Durable("d").DLQ("dlq.order").Handle(succeed), []string{`the nearest are "dlq.orders" of stream "DLQ",`, `Stream("DLQ").Subjects("dlq.order")`}},
	} {
		got := fault(c.spec)
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s: got %q, want %q in it", c.spec, got, want)
			}
		}
	}
	_, log := newLogBook()
	_, err := NewBroker(nc, WithLogger(log)).Replay(t.Context(), Replay("payment.>").Handle(succeed))
	if !errors.Is(err, ErrNoStream) || !strings.Contains(err.Error(), `the nearest are "payments.*" of stream "PAYMENTS",`) {
		t.Errorf("Replay: %v, want the nearest subject", err)
	}
}

// Who may not list streams is told what makes one, and nothing else changes.
func TestMissingStreamWithoutPermissionToList(t *testing.T) {
	t.Parallel()
	_, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.LIST"}}})
	err := wantRefused(t, user, []Spec{Route("orders.*").Durable("d").Handle(succeed)}, ErrNoStream)
	if !strings.Contains(err.Error(), `subjects that match the filter; WithStreams(Stream("ORDERS").Subjects("orders.*")) makes one`) {
		t.Errorf("got %v", err)
	}
}

func TestSubjectDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"orders.new", "orders.new", 0}, {"orders.*", "orders.new", 0}, {"orders.>", "orders.a.b.c", 0},
		{"order.new", "orders.new", 1}, {"Orders.new", "orders.new", 1}, {"oders.*", "orders.new", 1},
		{"orders", "orders.new", 3}, {"orders.eu.new", "orders.new", 3}, {"eu.orders.new", "orders.*", 3},
		{"a", "xyz", 3},
	} {
		if got := subjectDistance(c.a, c.b); got != c.want {
			t.Errorf("from %q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
		if got := subjectDistance(c.b, c.a); got != c.want {
			t.Errorf("from %q to %q: %d, want %d", c.b, c.a, got, c.want)
		}
	}
}

func TestLookAlike(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, other, want string }{
		{"biling", "billing", "billing"}, {"billing", "Billing", "Billing"}, {"order_mails", "order-mails", "order-mails"},
		{"ordermails", "order-mails", "order-mails"}, {"invoice-writer", "invoices-writer", "invoices-writer"}, {"notifcatoin", "notification", ""},
		{"notificatoin", "notification", "notification"},
		{"billing", "billing", ""}, {"billing", "shipping", ""}, {"billing-1", "billing-2", ""}, {"billing9", "billing10", ""},
		{"billing-eu", "billing-us", ""}, {"audit-a", "audit-b", ""}, {"a", "b", ""}, {"east", "west", ""}, {"billing-v2", "billing", ""},
	} {
		if got := lookAlike(c.name, []string{"zzzzzzzz", c.other}); got != c.want {
			t.Errorf("%q beside %q: %q, want %q", c.name, c.other, got, c.want)
		}
	}
}

// A durable that is new, with a name nearly that of one that exists, may be a misspelled
// one: it would handle everything again.
func TestNewDurableThatLooksLikeAnotherIsWarnedOf(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	start := func(durables ...string) []string {
		t.Helper()
		book, log := newLogBook()
		var specs []Spec
		for _, d := range durables {
			specs = append(specs, Route("orders.*").Durable(d).Handle(succeed))
		}
		b := NewBroker(nc, WithLogger(log))
		r := runBroker(t, b, specs...)
		b.ran.Load().background.Wait()
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
		return book.alarms("looks like one that exists")
	}
	if got := start("billing"); len(got) != 0 {
		t.Errorf("the first durable: warned of %q", got)
	}
	if got := start("biling", "shipping"); len(got) != 1 || !strings.Contains(got[0], "durable=biling stream=ORDERS existing=billing") {
		t.Errorf("a misspelled one: warned of %q, want once of billing", got)
	}
	if got := start("biling"); len(got) != 0 {
		t.Errorf("it is not new any more: warned of %q", got)
	}
	if got := start("shippings", "shipping"); len(got) != 0 {
		t.Errorf("both are routes of this broker: warned of %q", got)
	}
}

func TestOverlappingDurablesOnAWorkQueue(t *testing.T) {
	t.Parallel()
	jobs := Stream("JOBS").Subjects("jobs.>").Retention(jetstream.WorkQueuePolicy)
	other := Stream("OTHER").Subjects("other.>")
	spec := func(filter, durable string) Spec { return Route(filter).Durable(durable).Handle(succeed) }
	nc := connect(t, startServer(t).ClientURL())
	for _, c := range []struct {
		name    string
		streams []StreamSpec
		specs   []Spec
		want    []string
	}{
		{"overlap", []StreamSpec{jobs}, []Spec{spec("jobs.*", "a"), spec("jobs.mail", "b")}, []string{
			`natsx: route "jobs.mail" durable "b": subject "jobs.mail": overlaps with "jobs.*" of the durable "a", and the work-queue stream "JOBS" gives each message to one durable`,
		}},
		{"named streams", []StreamSpec{jobs}, []Spec{Route("jobs.x").Stream("JOBS").Durable("a").Handle(succeed), spec("jobs.>", "b")}, []string{
			`natsx: route "jobs.>" durable "b": subject "jobs.>": overlaps with "jobs.x" of the durable "a", and the work-queue stream "JOBS" gives each message to one durable`,
		}},
		{"three", []StreamSpec{jobs}, []Spec{spec("jobs.*", "a"), spec("jobs.mail", "b"), spec("jobs.mail", "c")}, []string{
			`natsx: route "jobs.mail" durable "b": subject "jobs.mail": overlaps with "jobs.*" of the durable "a", and the work-queue stream "JOBS" gives each message to one durable`,
			`natsx: route "jobs.mail" durable "c": subject "jobs.mail": overlaps with "jobs.*" of the durable "a", and the work-queue stream "JOBS" gives each message to one durable`,
			`natsx: route "jobs.mail" durable "c": subject "jobs.mail": overlaps with "jobs.mail" of the durable "b", and the work-queue stream "JOBS" gives each message to one durable`,
		}},
		{"apart", []StreamSpec{jobs}, []Spec{spec("jobs.mail", "a"), spec("jobs.print", "b")}, nil},
		{"another stream", []StreamSpec{jobs, other}, []Spec{spec("other.*", "a"), spec("other.x", "b"), spec("jobs.*", "c")}, nil},
		{"a stream that is not described", nil, []Spec{spec("jobs.*", "a"), spec("jobs.mail", "b")}, nil},
	} {
		if diff := cmp.Diff(c.want, lines(NewBroker(nc, WithStreams(c.streams...)).Validate(c.specs...))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}

	// Run refuses it before its first network call, and where only the server knows the
	// stream, at the start; so it does with a durable of another process.
	closed := connect(t, startServer(t).ClientURL())
	closed.Close()
	_, log := newLogBook()
	err := startBroker(t, NewBroker(closed, WithLogger(log), WithStreams(jobs)), spec("jobs.*", "a"), spec("jobs.mail", "b")).wait(t)
	if !errors.Is(err, ErrOptionConflict) || errors.Is(err, ErrConnectionClosed) {
		t.Errorf("Run: %v, want only the overlap", err)
	}
	if err := jobs.Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	const overlap = `and the work-queue stream "JOBS" gives each message to one durable`
	err = wantRefused(t, nc, []Spec{spec("jobs.*", "a"), spec("jobs.mail", "b")}, ErrOptionConflict)
	if !strings.Contains(err.Error(), overlap) {
		t.Errorf("Run: %v, want %q", err, overlap)
	}
	deleteConsumers(t, streamNow(t, nc, "JOBS"))
	if err := runBroker(t, NewBroker(nc, WithLogger(log)), spec("jobs.*", "a")).stop(t); err != nil {
		t.Fatal(err)
	}
	err = wantRefused(t, nc, []Spec{spec("jobs.mail", "b")}, ErrOptionConflict)
	if want := `overlaps with "jobs.*" of the durable "a", ` + overlap; !strings.Contains(err.Error(), want) {
		t.Errorf("Run: %v, want %q", err, want)
	}
}
