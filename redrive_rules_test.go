package natsx

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// another is a route of another durable than the patient's, which counts what it handles.
func another(seen *tally) Spec {
	return Route("orders.>").Durable("audit").Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return nil
	})
}

// A copy is proven after a restart of the server as before it, and by a process that
// begins then.
func TestRedriveIsProvenOverARestart(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	orders(t, nc)
	var billing patient
	billing.die(t, nc, 3, numbered("orders.new"))
	redriveAll(t, nc, RedriveReport{Redriven: 3})
	p.stop()
	p.start(t)
	var audit tally
	runBroker(t, NewBroker(nc), billing.route(), another(&audit))
	eventually(t, "all are settled", func() bool {
		return settled(t, nc, "ORDERS", "billing") && settled(t, nc, "ORDERS", "audit")
	})
	billing.handled.wantOnce(t, 3)
	audit.wantOnce(t, 3)
}

// Another durable handles a copy whose original its stream has no more: it may never
// have had that.
func TestRedriveIsHandledWhereTheOriginalIsGone(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var billing patient
	billing.dieInOrder(t, nc, 2, numbered("orders.new"))
	if err := streamNow(t, nc, "ORDERS").DeleteMsg(testContext(t), 1); err != nil {
		t.Fatal(err)
	}
	redriveAll(t, nc, RedriveReport{Redriven: 2})
	var audit tally
	runBroker(t, NewBroker(nc), billing.route(), another(&audit))
	eventually(t, "all are settled", func() bool {
		return settled(t, nc, "ORDERS", "billing") && settled(t, nc, "ORDERS", "audit")
	})
	billing.handled.wantOnce(t, 2)
	audit.wantOnce(t, 2) // the copy of the first, the original of the second
}

// A durable that has no identity of natsx has no secret either. Its copies are passed
// over where the original says the same.
func TestRedriveForADurableWithoutIdentity(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var billing patient
	billing.dieInOrder(t, nc, 2, numbered("orders.new"))
	info := consumerInfo(t, nc, "ORDERS", "billing")
	info.Config.Metadata = nil
	if _, err := jetStream(t, nc).UpdateConsumer(testContext(t), "ORDERS", info.Config); err != nil {
		t.Fatal(err)
	}
	redriveQuery(t, nc, DeadLetters("dlq.orders").Limit(1), RedriveReport{Redriven: 1})
	// The token of such a copy is no secret: another payload is another message.
	copied := letters(t, nc, "ORDERS")[2]
	forged := &nats.Msg{Subject: "orders.new", Data: []byte("forged"), Header: copied.Header}
	forged.Header.Set("Nats-Msg-Id", "redrive/DLQ@1/1")
	forged.Header.Set(HeaderRedriveToken, redriveToken("", "orders.new", forged.Header, forged.Data))
	publish(t, nc, forged)
	var audit tally
	runBroker(t, NewBroker(nc), another(&audit))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "audit") })
	if audit.sum() != 3 || audit.get("0") != 1 || audit.get("forged") != 1 {
		t.Errorf("got %v, want both originals and what was forged, once each", audit.counts)
	}
}

// A redrive never has the stream delete what is newer.
func TestRedriveKeepsNewerMessages(t *testing.T) {
	t.Parallel()
	perSubject := func(n int64) func(*jetstream.StreamConfig) {
		return func(cfg *jetstream.StreamConfig) { cfg.MaxMsgsPerSubject = n }
	}
	atMost := func(n int64) func(*jetstream.StreamConfig) {
		return func(cfg *jetstream.StreamConfig) { cfg.MaxMsgs = n }
	}
	for _, c := range []struct {
		name   string
		edit   func(*jetstream.StreamConfig)
		newer  []string // subjects
		refuse string   // empty when it is redriven
		left   string   // sequences afterwards
	}{
		{"only the original", perSubject(1), nil, "", "[2]"},
		{"a newer one in its place", perSubject(1), []string{"orders.new"}, "keeps 1 messages a subject, and would delete the newer message 2", "[2]"},
		{"room beside a newer one", perSubject(2), []string{"orders.new"}, "", "[2 3]"},
		{"two newer ones", perSubject(2), []string{"orders.new", "orders.new"}, "keeps 2 messages a subject, and would delete the newer message 2", "[2 3]"},
		{"newer ones of other subjects", perSubject(1), []string{"orders.a", "orders.b"}, "", "[2 3 4]"},
		{"a full stream", atMost(2), []string{"orders.a", "orders.b"}, "is full, and would delete message 2", "[2 3]"},
		{"a full stream with the original", atMost(2), []string{"orders.a"}, "", "[2 3]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc, c.edit)
			var billing patient
			billing.die(t, nc, 1, func(int) *nats.Msg { return &nats.Msg{Subject: "orders.new", Data: []byte("old")} })
			for _, subject := range c.newer {
				publish(t, nc, &nats.Msg{Subject: subject, Data: []byte("newer " + subject)})
			}
			want := RedriveReport{Redriven: 1}
			if c.refuse != "" {
				want = RedriveReport{Failed: 1}
			}
			report := redriveAll(t, nc, want)
			if c.refuse != "" && (len(report.Errors) != 1 || !errors.Is(report.Errors[0], ErrWouldEvict) || !strings.Contains(report.Errors[0].Error(), c.refuse)) {
				t.Errorf("got %v, want %q", report.Errors, c.refuse)
			}
			if n := stored(t, nc, "DLQ"); n != report.Failed {
				t.Errorf("%d letters are left", n)
			}
			var left []uint64
			for _, m := range letters(t, nc, "ORDERS") {
				left = append(left, m.Sequence)
			}
			if fmt.Sprint(left) != c.left {
				t.Errorf("the stream has %v, want %s", left, c.left)
			}
		})
	}
}

// A full stream of which the durable has settled the first messages goes on as always.
func TestRedriveIntoAFullStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(cfg *jetstream.StreamConfig) { cfg.MaxMsgs = 2 })
	var billing patient
	billing.die(t, nc, 1, numbered("orders.new"))
	publishMany(t, nc, 3, numbered("orders.other"))
	r := runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	redriveAll(t, nc, RedriveReport{Redriven: 1})
}

// While a letter is redriven somebody publishes on its subject, which keeps one message.
func TestRedriveSeesWhatComesMeanwhile(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(cfg *jetstream.StreamConfig) { cfg.MaxMsgsPerSubject = 1 })
	var billing patient
	billing.die(t, nc, 1, numbered("orders.new"))
	// Another one comes right behind the last question before the copy.
	asked := 0
	proxyAPI(t, connect(t, nc.ConnectedUrl()), "RACE.API", func(operation string, m *nats.Msg) {
		if operation != "STREAM.MSG.GET.ORDERS" || !strings.Contains(string(m.Data), "next_by_subj") {
			nc.PublishRequest("$JS.API."+operation, m.Reply, m.Data)
			return
		}
		answer, err := nc.Request("$JS.API."+operation, m.Data, testLimit)
		if err != nil {
			t.Error(err)
			return
		}
		if asked++; asked == 1 {
			publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte("newer")})
		}
		m.Respond(answer.Data)
	})
	report := redriveQuery(t, nc, DeadLetters("dlq.orders").APIPrefix("RACE.API"), RedriveReport{Failed: 1})
	if !errors.Is(errors.Join(report.Errors...), ErrWouldEvict) {
		t.Errorf("got %v", report.Errors)
	}
	if left := letters(t, nc, "ORDERS"); len(left) != 1 || string(left[0].Data) != "newer" {
		t.Errorf("got %v, want the newer message alone", left)
	}
}

// proxyAPI passes the requests on a prefix on by fn.
func proxyAPI(t testing.TB, nc *nats.Conn, prefix string, fn func(operation string, m *nats.Msg)) {
	t.Helper()
	sub, err := nc.Subscribe(prefix+".>", func(m *nats.Msg) { fn(strings.TrimPrefix(m.Subject, prefix+"."), m) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sub.Unsubscribe() })
}

// Letters of a route whose stream takes no copies stay, and the route says so when it
// starts.
func TestRedriveIntoStreamsOfOthers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		cfg    jetstream.StreamConfig
		filter string
		want   string
	}{
		{"mirror", jetstream.StreamConfig{Mirror: &jetstream.StreamSource{Name: "ORDERS"}}, "orders.>",
			`is a mirror of "ORDERS", and takes no copy`},
		{"source", jetstream.StreamConfig{Sources: []*jetstream.StreamSource{{Name: "ORDERS"}}}, "orders.>",
			`from its sources alone, and takes no copy`},
		{"source with a transform", jetstream.StreamConfig{Sources: []*jetstream.StreamSource{{Name: "ORDERS",
			SubjectTransforms: []jetstream.SubjectTransformConfig{{Source: "orders.>", Destination: "all.>"}}}}}, "all.>",
			`from its sources alone, and takes no copy`},
		{"transform", jetstream.StreamConfig{Subjects: []string{"raw.>"}, SubjectTransform: &jetstream.SubjectTransformConfig{Source: "raw.>", Destination: "all.>"}}, "all.>",
			`by a transform alone, and takes no copy`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc)
			c.cfg.Name = "COPY"
			createStream(t, nc, c.cfg)
			book, log := newLogBook()
			runBroker(t, NewBroker(nc, WithLogger(log)), Route(c.filter).Stream("COPY").Durable("billing").DLQ("dlq.orders").
				Handle(func(context.Context, *Msg) error { return Permanent(errors.New("ill")) }))
			if got := book.alarms("may not be redriven"); len(got) != 1 || !strings.Contains(got[0], c.want) {
				t.Errorf("said at the start: %q, want %q", got, c.want)
			}
			for _, subject := range []string{"orders.new", "raw.new"} {
				nc.Publish(subject, []byte("x"))
			}
			eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 })
			report := redriveAll(t, nc, RedriveReport{Failed: 1})
			if err := errors.Join(report.Errors...); !errors.Is(err, ErrNoStream) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrNoStream and %q", err, c.want)
			}
			if n := stored(t, nc, "DLQ"); n != 1 {
				t.Errorf("%d letters are left, want it", n)
			}
		})
	}
}

// A redrive with a limit gets on though letters that cannot be redriven stand first.
func TestRedriveLimitCountsWhatWasRedriven(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	for i := range 5 {
		gone := testLetter("billing", ReasonPanic, i)
		gone.Header.Set(HeaderDLQStream, "GONE")
		publish(t, nc, gone)
	}
	var billing patient
	r := runBroker(t, NewBroker(nc), billing.route())
	publishMany(t, nc, 4, numbered("orders.new"))
	eventually(t, "all are dead", func() bool { return stored(t, nc, "DLQ") == 9 })
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	var total int
	q := DeadLetters("dlq.orders").Limit(3)
	got, err := q.DryRun().Redrive(testContext(t), nc, WithRedriveProgress(func(p RedriveProgress) { total = p.Total }))
	if err != nil || got.Redriven != 3 || got.Failed != 5 || total != 9 {
		t.Errorf("dry run: got %+v, %v, of %d, want 3 of 9 and 5 failures", got, err, total)
	}
	redriveQuery(t, nc, q, RedriveReport{Redriven: 3, Failed: 5})
	redriveQuery(t, nc, q, RedriveReport{Redriven: 1, Failed: 5})
	if n := stored(t, nc, "DLQ"); n != 5 {
		t.Errorf("%d letters are left, want 5", n)
	}
}

// What a letter costs does not grow with what was stored behind its original.
func TestRedriveAsksLittleForALetter(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			url := startServer(t).ClientURL()
			nc, operator := connect(t, url), connect(t, url)
			orders(t, nc, shortWindow, func(cfg *jetstream.StreamConfig) { cfg.Retention = retention })
			var billing patient
			const count = 20
			billing.die(t, nc, count, func(i int) *nats.Msg { return numbered(fmt.Sprint("orders.", i%10))(i) })
			publishMany(t, nc, 3000, func(i int) *nats.Msg { return numbered(fmt.Sprint("orders.", i%10))(i) })
			before := operator.Stats()
			redriveQuery(t, operator, DeadLetters("dlq.orders"), RedriveReport{Redriven: count})
			// For each letter: itself, whether there are other redrives, itself twice more,
			// its copy's ack, its deletion, and now and then its stream.
			if n := operator.Stats().InMsgs - before.InMsgs; n > 40+count*10 {
				t.Errorf("%d messages came for %d letters", n, count)
			}
			noConsumers(t, nc, "DLQ")
		})
	}
}

// The mark of a killed redrive is taken over by the next one, and ends with what it
// stands for.
func TestRedriveTakesOverTheMarkOfAKilledOne(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ctx := testContext(t)
	orders(t, nc, shortWindow)
	var billing patient
	billing.dieInOrder(t, nc, 4, numbered("orders.new"))
	storeCopies(t, nc, 2)
	windowOver(t, nc)
	// It is old, as far as anybody can see.
	for info := range streamNow(t, nc, "DLQ").ListConsumers(ctx).Info() {
		info.Config.Metadata[metadataRedrive] = regexp.MustCompile(`"at":\d+`).ReplaceAllString(info.Config.Metadata[metadataRedrive], `"at":1`)
		if _, err := jetStream(t, nc).UpdateConsumer(ctx, "DLQ", info.Config); err != nil {
			t.Fatal(err)
		}
	}
	redriveQuery(t, nc, DeadLetters("dlq.orders").DryRun().Limit(1), RedriveReport{Redriven: 1, Skipped: 2, Skips: map[SkipReason]int{SkipRedriven: 2}})
	// One that does not deal with all letters leaves it to the next.
	redriveQuery(t, nc, DeadLetters("dlq.orders").Sequence(4), RedriveReport{Redriven: 1})
	if n := consumers(t, nc, "DLQ"); n != 1 {
		t.Errorf("%d marks are left, want one", n)
	}
	redriveAll(t, nc, RedriveReport{Redriven: 1, Skipped: 2, Skips: map[SkipReason]int{SkipRedriven: 2}})
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters are left", n)
	}
	runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	for i := range 4 {
		if n := billing.handled.get(fmt.Sprint(i)); n != 1 {
			t.Errorf("message %d was handled %d times", i, n)
		}
	}
}

// Where the DLQ's stream keeps no marks, copies are searched for in all of the stream.
func TestRedriveAfterAKillWithoutMarks(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*jetstream.StreamConfig){
		"work queue": workQueue,
		"consumers":  func(cfg *jetstream.StreamConfig) { cfg.MaxConsumers = 1 },
		"inactive": func(cfg *jetstream.StreamConfig) {
			cfg.ConsumerLimits = jetstream.StreamConsumerLimits{InactiveThreshold: time.Hour}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			cfg := jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}}
			edit(&cfg)
			createStream(t, nc, cfg)
			createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}, Duplicates: 100 * time.Millisecond})
			if cfg.MaxConsumers == 1 {
				if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "DLQ", jetstream.ConsumerConfig{Durable: "alerts"}); err != nil {
					t.Fatal(err)
				}
			}
			var billing patient
			billing.dieInOrder(t, nc, 3, numbered("orders.new"))
			storeCopies(t, nc, 2)
			windowOver(t, nc)
			redriveAll(t, nc, RedriveReport{Redriven: 1, Skipped: 2, Skips: map[SkipReason]int{SkipRedriven: 2}})
		})
	}
}

// A purge that finds its DLQ recreated deletes nothing of the new one.
func TestDeadLetterPurgeOfARecreatedDLQ(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ctx := testContext(t)
	letterStream(t, nc, 20)
	deletions := 0
	proxyAPI(t, nc, "NEW.API", func(operation string, m *nats.Msg) {
		// Before the fourth deletion is asked for.
		if operation == "STREAM.MSG.GET.DLQ" {
			if deletions++; deletions == 4 {
				if err := jetStream(t, nc).DeleteStream(ctx, "DLQ"); err != nil {
					t.Error(err)
				}
				letterStream(t, nc, 20)
			}
		}
		nc.PublishRequest("$JS.API."+operation, m.Reply, m.Data)
	})
	operator := connect(t, nc.ConnectedUrl())
	n, err := DeadLetters("dlq.orders").APIPrefix("NEW.API").Rate(1000).Purge(ctx, operator)
	if n != 3 || !errors.Is(err, ErrStreamDeleted) {
		t.Errorf("got %d, %v, want 3 and a stream that was deleted", n, err)
	}
	if n := stored(t, nc, "DLQ"); n != 20 {
		t.Errorf("%d letters of the new DLQ are left, want 20", n)
	}
}

func TestDeadLetterPurgeByTwo(t *testing.T) {
	t.Parallel()
	const count = 300
	url := startServer(t).ClientURL()
	nc := connect(t, url)
	letterStream(t, nc, count)
	type result struct {
		n   int
		err error
	}
	ends := make(chan result, 2)
	for range 2 {
		own := connect(t, url)
		go func() {
			n, err := DeadLetters("dlq.orders").Purge(testContext(t), own)
			ends <- result{n, err}
		}()
	}
	sum := 0
	for range 2 {
		r := receive(t, ends, "a purge")
		if r.err != nil {
			t.Error(r.err)
		}
		sum += r.n
	}
	if sum != count {
		t.Errorf("both purged %d of %d", sum, count)
	}
}

// A tombstone is no message of a typed route.
func TestTombstones(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, func(cfg *jetstream.StreamConfig) {
		// With one message a subject the server lets a message expire before its marker would.
		cfg.AllowMsgTTL, cfg.AllowRollup, cfg.SubjectDeleteMarkerTTL, cfg.MaxMsgsPerSubject = true, true, time.Hour, 1
	})
	createStream(t, nc, jetstream.StreamConfig{Name: "PLAIN", Subjects: []string{"plain.>"}})
	type order struct{ ID string }
	typed := func(seen *tally) Handler {
		return JSON(func(_ context.Context, o order) error {
			seen.add(o.ID)
			return nil
		})
	}
	var skipping, plain tally
	asking := make(chan *Msg, 10)
	b := NewBroker(nc)
	runBroker(t, b,
		Route("orders.>").Durable("skipping").DLQ("dlq.orders").Handle(typed(&skipping)),
		Route("orders.>").Durable("asking").Tombstones().Handle(func(_ context.Context, m *Msg) error {
			asking <- m
			return nil
		}),
		Route("plain.>").Durable("plain").DLQ("dlq.plain").Handle(typed(&plain)))
	publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte(`{"ID":"a"}`), Header: nats.Header{"Nats-TTL": {"1s"}}})
	// What only looks like one is a message: it has something to say.
	publish(t, nc, &nats.Msg{Subject: "orders.b", Data: []byte(`{"ID":"b"}`), Header: nats.Header{headerMarker: {"MaxAge"}}})
	publish(t, nc, &nats.Msg{Subject: "orders.c", Header: nats.Header{headerMarker: {"MaxAge"}, "Customer": {"7"}}})
	publish(t, nc, &nats.Msg{Subject: "plain.d", Header: nats.Header{headerMarker: {"MaxAge"}}})
	var reasons []string
	for range 4 {
		m := receive(t, asking, "a message")
		reasons = append(reasons, m.Subject+" "+m.Header.Get(headerMarker))
	}
	slices.Sort(reasons)
	if diff := cmp.Diff([]string{"orders.b MaxAge", "orders.c MaxAge", "orders.new ", "orders.new MaxAge"}, reasons); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "skipping") && settled(t, nc, "PLAIN", "plain") })
	if skipping.sum() != 2 || skipping.get("a") != 1 || skipping.get("b") != 1 {
		t.Errorf("handled %v, want a and b once", skipping.counts)
	}
	var dead []string
	for _, l := range letters(t, nc, "DLQ") {
		dead = append(dead, l.Header.Get(HeaderDLQSubject))
	}
	slices.Sort(dead)
	if diff := cmp.Diff([]string{"orders.c", "plain.d"}, dead); diff != "" {
		t.Errorf("letters (-want +got):\n%s", diff)
	}
	// A replay passes it over as well.
	var replayed tally
	if report, err := b.Replay(testContext(t), Replay("orders.new").Handle(typed(&replayed))); err != nil || replayed.sum() != 0 {
		t.Errorf("replayed %d, %+v, %v, want nothing", replayed.sum(), report, err)
	}
	if err := Validate(Route("orders.>").Tombstones().Handle(typed(&plain))); !errors.Is(err, ErrOptionConflict) {
		t.Errorf("got %v, want a durable to be asked for", err)
	}
}

// What a handler published before its message died is published once, also when the
// message is redriven, however often.
func TestRedriveKeepsTheIdsOfWhatIsPublished(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "BILLS", Subjects: []string{"bills.>"}})
	pub := NewPublisher(nc)
	var lives atomic.Int32
	var ids []string
	runBroker(t, NewBroker(nc), patientRoute.Concurrency(1).Handle(func(ctx context.Context, m *Msg) error {
		if string(m.Data) == "forged" {
			_, err := pub.Publish(ctx, To("bills.new").Data([]byte("bill")))
			return err
		}
		if _, err := pub.Publish(ctx, To("bills.new").Data([]byte("bill"))); err != nil {
			return err
		}
		ids = append(ids, m.Header.Get(HeaderOriginalMsgID))
		if n := lives.Add(1); n < 3 {
			return Permanent(errors.New("ill"))
		}
		return nil
	}))
	publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte("0"), Header: nats.Header{"Nats-Msg-Id": {"o-42"}}})
	for range 2 {
		eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 })
		redriveAll(t, nc, RedriveReport{Redriven: 1})
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	bills := letters(t, nc, "BILLS")
	if len(bills) != 1 || lives.Load() != 3 {
		t.Errorf("%d bills after %d lives, want one after 3", len(bills), lives.Load())
	}
	original := letters(t, nc, "ORDERS")[0]
	if want := deliveryID("ORDERS", "billing", messageID{1, original.Time.UnixNano()}); !strings.HasPrefix(bills[0].Header.Get("Nats-Msg-Id"), want+"/") {
		t.Errorf("the bill's id is %q, want it to begin with %s", bills[0].Header.Get("Nats-Msg-Id"), want)
	}
	if diff := cmp.Diff([]string{"", "o-42", "o-42"}, ids); diff != "" {
		t.Errorf("message ids of the original (-want +got):\n%s", diff)
	}

	// A publisher that claims to be a copy gets ids of its own: what its handler says is
	// not taken for said.
	forged := &nats.Msg{Subject: "orders.new", Data: []byte("forged"), Header: letters(t, nc, "ORDERS")[1].Header}
	forged.Header.Set("Nats-Msg-Id", "redrive/DLQ@1/1")
	publish(t, nc, forged)
	eventually(t, "there is another bill", func() bool { return stored(t, nc, "BILLS") == 2 })
}

func TestDeadLettersBySequenceAndFunction(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, 6)
	publish(t, nc, &nats.Msg{Subject: "dlq.orders", Data: []byte("foreign")})
	other := testLetter("billing", ReasonPanic, 7)
	other.Subject = "dlq.other"
	publish(t, nc, other)
	all := DeadLetters("dlq.orders")
	even := func(l DeadLetter) bool { return len(l.Data) == 1 && (l.Data[0]-'0')%2 == 0 }
	for _, c := range []struct {
		name    string
		query   DeadLetterQuery
		want    string
		foreign int
	}{
		{"some", all.Sequence(5, 2, 5), "[2 5]", 0},
		{"not there, and of another DLQ", all.Sequence(1, 8, 99), "[1]", 0},
		{"no letter", all.Sequence(7), "[]", 1},
		{"last call", all.Sequence(1).Sequence(3), "[3]", 0},
		{"with another filter", all.Sequence(1, 2).Durable("none"), "[]", 0},
		{"function", all.Where(even), "[1 3 5]", 0},
		{"both and a limit", all.Where(even).Sequence(1, 2, 3, 4, 5).Limit(2), "[1 3]", 0},
	} {
		found, foreign := listed(t, nc, c.query)
		seqs := []uint64{}
		for _, l := range found {
			seqs = append(seqs, l.DLQSequence)
		}
		if fmt.Sprint(seqs) != c.want || len(foreign) != c.foreign {
			t.Errorf("%s: got %v and %v, want %s", c.name, seqs, foreign, c.want)
		}
	}
	// What reads no payloads otherwise gives them to the function.
	if counts, err := all.Where(even).Count(testContext(t), nc); err != nil || counts.Total != 3 {
		t.Errorf("counted %+v, %v, want 3", counts, err)
	}
	if n, err := all.Where(even).Limit(2).Purge(testContext(t), nc); n != 2 || err != nil {
		t.Errorf("purged %d, %v, want 2", n, err)
	}
	if n, err := all.Sequence(1, 2).Purge(testContext(t), nc); n != 1 || err != nil {
		t.Errorf("purged %d, %v, want the one that is left", n, err)
	}
	for name, q := range map[string]DeadLetterQuery{
		"no sequence": all.Sequence(), "sequence 0": all.Sequence(0), "sequence 0 and others": all.Sequence(3, 0),
		"no function": all.Where(nil), "unknown reason": all.Reason("exhuasted"),
	} {
		if _, err := q.Count(testContext(t), nc); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("%s: got %v, want ErrOutOfRange", name, err)
		}
	}
	if all.Sequence(1, 2) != all.Sequence(2, 1) || all.Sequence(1) == all.Sequence(2) {
		t.Error("queries by sequence do not compare")
	}
}

func TestRedriveOfEditedLetters(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var billing patient
	billing.dieInOrder(t, nc, 3, func(i int) *nats.Msg {
		return &nats.Msg{Subject: "orders.new", Data: fmt.Append(nil, i), Header: nats.Header{"Customer": {"7"}, "Currency": {"DM"}}}
	})
	refusal := errors.New("not to be mended")
	edits := 0
	report, err := DeadLetters("dlq.orders").Redrive(testContext(t), nc, WithRedriveEdit(func(l *DeadLetter) error {
		if edits++; l.Sequence == 2 {
			return refusal
		}
		l.Data[0] += 'a' - '0'
		l.Data = append(l.Data, " mended"...)
		l.Header.Set("Currency", "EUR\r\nX: y")
		l.Header.Del("Customer")
		l.Header.Set("Nats-Rollup", "all")
		l.Subject, l.Durable = "orders.elsewhere", "nobody"
		return nil
	}))
	if err != nil || report.Redriven != 2 || report.Failed != 1 || !errors.Is(errors.Join(report.Errors...), refusal) || edits != 3 {
		t.Errorf("got %+v, %v after %d edits, want 2 and the refusal", report, err, edits)
	}
	left := letters(t, nc, "DLQ")
	if len(left) != 1 || string(left[0].Data) != "1" {
		t.Errorf("got %v, want the letter that was refused, as it was", left)
	}
	var audit tally
	runBroker(t, NewBroker(nc), billing.route(), another(&audit))
	eventually(t, "all are settled", func() bool {
		return settled(t, nc, "ORDERS", "billing") && settled(t, nc, "ORDERS", "audit")
	})
	audit.wantOnce(t, 3) // the originals
	if billing.handled.sum() != 2 || billing.handled.get("a mended") != 1 || billing.handled.get("c mended") != 1 {
		t.Errorf("handled %v", billing.handled.counts)
	}
	if h := billing.last.Load().Header; h.Get("Currency") != "EUR  X: y" || h.Get("Customer") != "" || h.Get("Nats-Rollup") != "" {
		t.Errorf("got the header %v", h)
	}
}

// An edit of a letter that points to its original sees the original's payload.
func TestRedriveOfAnEditedPointer(t *testing.T) {
	t.Parallel()
	const payload = 4096
	nc := connect(t, startServer(t, withMaxPayload(payload)).ClientURL())
	orders(t, nc)
	var billing patient
	billing.die(t, nc, 1, func(int) *nats.Msg { return &nats.Msg{Subject: "orders.new", Data: make([]byte, payload-300)} })
	report, err := DeadLetters("dlq.orders").Redrive(testContext(t), nc, WithRedriveEdit(func(l *DeadLetter) error {
		if !l.Pointer || len(l.Data) != payload-300 {
			t.Errorf("pointer %t with %d bytes", l.Pointer, len(l.Data))
		}
		l.Data = []byte("small")
		return nil
	}))
	if err != nil || report.Redriven != 1 {
		t.Fatalf("got %+v, %v", report, err)
	}
	if copied := letters(t, nc, "ORDERS")[1]; string(copied.Data) != "small" {
		t.Errorf("the copy has %d bytes", len(copied.Data))
	}
}

// A redriven message that waits for its retry in a retry stream is still known to be one.
func TestRedriveWithARetryStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "BILLS", Subjects: []string{"bills.>"}})
	pub := NewPublisher(nc)
	var runs atomic.Int32
	runBroker(t, NewBroker(nc, WithRetryStream("RETRIES")),
		Route("orders.>").Durable("billing").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.orders").
			Handle(func(ctx context.Context, m *Msg) error {
				if _, err := pub.Publish(ctx, To("bills.new").Data([]byte("bill"))); err != nil {
					return err
				}
				runs.Add(1)
				return errors.New("ill")
			}))
	publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte("0"), Header: nats.Header{"Nats-Msg-Id": {"o-42"}}})
	for redrives := range 3 {
		eventually(t, "it is dead", func() bool { return stored(t, nc, "DLQ") == 1 && int(runs.Load()) == 2*(redrives+1) })
		found, _ := listed(t, nc, DeadLetters("dlq.orders"))
		if l := found[0]; l.Redrives != redrives || l.Attempts != 2 || redrives > 0 && l.Header.Get(HeaderOriginalMsgID) != "o-42" {
			t.Errorf("after %d redrives and %d runs: %d redrives, %d attempts, headers %v", redrives, runs.Load(), l.Redrives, l.Attempts, l.Header)
		}
		if n := stored(t, nc, "BILLS"); n != 1 {
			t.Errorf("%d bills after %d redrives, want one", n, redrives)
		}
		if redrives < 2 {
			redriveAll(t, nc, RedriveReport{Redriven: 1})
		}
	}
}
