package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var diedAt = time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC)

// testLetter is the i-th of a series of letters, from 0, that died a minute apart.
func testLetter(durable string, reason Reason, i int) *nats.Msg {
	return &nats.Msg{
		Subject: "dlq.orders",
		Header: nats.Header{
			HeaderDLQSubject:   {"orders.new"},
			HeaderDLQStream:    {"ORDERS"},
			HeaderDLQSequence:  {fmt.Sprint(i + 1)},
			HeaderDLQDurable:   {durable},
			HeaderDLQAttempts:  {"3"},
			HeaderDLQReason:    {string(reason)},
			HeaderDLQError:     {"no such customer"},
			HeaderDLQTime:      {diedAt.Add(time.Duration(i) * time.Minute).Format(time.RFC3339Nano)},
			HeaderDLQPublished: {diedAt.Add(-time.Hour).Format(time.RFC3339Nano)},
			HeaderDLQHost:      {"test"},
		},
		Data: fmt.Append(nil, i),
	}
}

// letterStream makes a DLQ with so many letters of one durable.
func letterStream(t testing.TB, nc *nats.Conn, count int) {
	t.Helper()
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	publishMany(t, nc, count, func(i int) *nats.Msg { return testLetter("billing", ReasonPanic, i) })
}

// wantListed lists the DLQ, fails the test unless it yields the letters 1 to count
// in order, and calls at with the sequence of each.
func wantListed(t testing.TB, nc *nats.Conn, count uint64, at func(seq uint64)) {
	t.Helper()
	next := uint64(1)
	for l, err := range DeadLetters("dlq.orders").List(testContext(t), nc) {
		if err != nil {
			t.Fatal(err)
		}
		if l.DLQSequence != next {
			t.Fatalf("got letter %d, want %d", l.DLQSequence, next)
		}
		next++
		at(l.DLQSequence)
	}
	if next != count+1 {
		t.Errorf("read up to %d, want %d", next-1, count)
	}
}

// listed collects a query's letters, and the errors that concern one message.
func listed(t testing.TB, nc *nats.Conn, q DeadLetterQuery) (found []DeadLetter, foreign []error) {
	t.Helper()
	for l, err := range q.List(testContext(t), nc) {
		switch {
		case errors.Is(err, ErrNotALetter):
			foreign = append(foreign, err)
		case err != nil:
			t.Fatal(err)
		default:
			found = append(found, l)
		}
	}
	return found, foreign
}

// consumers counts what reads or read a stream.
func consumers(t testing.TB, nc *nats.Conn, stream string) int {
	t.Helper()
	s := streamNow(t, nc, stream)
	return s.CachedInfo().State.Consumers
}

func TestDeadLettersOfARoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte("other")})
	began := time.Now()
	publish(t, nc, &nats.Msg{
		Subject: "orders.new",
		Header: nats.Header{
			"Customer": {"7", "8"}, "Nats-Msg-Id": {"o-1"}, "Natsx-Dlq-Reason": {"forged"}, "Natsx-Orig-X": {"y"}, "Status": {"503"},
		},
	})
	seen := make(chan DeadLetter, 1)
	runBroker(t, NewBroker(nc),
		Route("orders.*").Durable("billing").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.orders").
			Handle(func(ctx context.Context, m *Msg) error {
				if string(m.Data) == "other" {
					return nil
				}
				panic("no such customer")
			}),
		Route("dlq.orders").Durable("alerts").Handle(OnDeadLetter(func(ctx context.Context, l DeadLetter) error {
			seen <- l
			return nil
		})))
	handled := receive(t, seen, "the letter's handler")
	found, foreign := listed(t, nc, DeadLetters("dlq.orders"))
	if len(found) != 1 || len(foreign) != 0 {
		t.Fatalf("got %v and %v, want one letter", found, foreign)
	}
	l := found[0]
	ignoreHeader := cmp.Comparer(func(a, b nats.Header) bool { return cmp.Equal(map[string][]string(a), map[string][]string(b)) })
	if diff := cmp.Diff(handled, l, ignoreHeader, cmp.AllowUnexported(DeadLetter{})); diff != "" {
		t.Errorf("OnDeadLetter and List differ:\n%s", diff)
	}
	if !strings.Contains(l.Stack, "\n") || !strings.Contains(l.Stack, "deadletters_test.go") {
		t.Errorf("stack %q", l.Stack)
	}
	for name, at := range map[string]time.Time{"Time": l.Time, "Published": l.Published, "DLQTime": l.DLQTime} {
		if at.Before(began.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
			t.Errorf("%s is %s", name, at)
		}
	}
	l.header, l.Stack, l.Time, l.Published, l.DLQTime = nil, "", time.Time{}, time.Time{}, time.Time{}
	want := DeadLetter{
		Subject: "orders.new", Stream: "ORDERS", Sequence: 2, Durable: "billing", Attempts: 2, Reason: ReasonPanic,
		Error: "natsx: handler panicked: no such customer", Host: hostname,
		Header:     nats.Header{"Customer": {"7", "8"}, "Nats-Msg-Id": {"o-1"}, "Natsx-Dlq-Reason": {"forged"}, "Natsx-Orig-X": {"y"}, "Status": {"503"}},
		Data:       []byte{},
		DLQSubject: "dlq.orders", DLQStream: "DLQ", DLQSequence: 1,
	}
	if diff := cmp.Diff(want, l, ignoreHeader, cmp.AllowUnexported(DeadLetter{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDeadLetterFilters(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	publishMany(t, nc, 10, func(i int) *nats.Msg {
		m := testLetter([]string{"billing", "audit"}[i%2], []Reason{ReasonExhausted, ReasonPermanent, ReasonPanic}[i%3], i)
		if i == 4 {
			m.Header.Set(HeaderDLQSubject, "orders.eu.new")
		}
		// To a client this looks like the end of what it asked for.
		m.Header.Set("Status", "404")
		return m
	})
	publish(t, nc, &nats.Msg{Subject: "dlq.orders", Header: nats.Header{"Status": {"409"}}})
	lacking := testLetter("billing", ReasonPanic, 10)
	lacking.Header.Set(HeaderDLQSequence, "-1")
	publish(t, nc, lacking)
	publish(t, nc, &nats.Msg{Subject: "dlq.other", Data: []byte("not asked for")})

	all := DeadLetters("dlq.orders")
	for _, c := range []struct {
		name    string
		query   DeadLetterQuery
		want    string // payloads of the letters
		foreign int
	}{
		{"all", all, "[0 1 2 3 4 5 6 7 8 9]", 2},
		{"durable", all.Durable("audit"), "[1 3 5 7 9]", 0},
		{"durable of a faulty letter", all.Durable("billing"), "[0 2 4 6 8]", 1},
		{"unknown durable", all.Durable("none"), "[]", 0},
		{"reason", all.Reason(ReasonPermanent), "[1 4 7]", 0},
		{"both", all.Reason(ReasonPermanent).Durable("billing"), "[4]", 0},
		{"subject", all.Subject("orders.*.new"), "[4]", 0},
		{"wildcard", all.Subject(">").Limit(2), "[0 1]", 0},
		{"since", all.Since(diedAt.Add(8 * time.Minute)), "[8 9]", 1},
		{"until", all.Until(diedAt.Add(2 * time.Minute)), "[0 1]", 0},
		{"between", all.Since(diedAt.Add(2 * time.Minute)).Until(diedAt.Add(4 * time.Minute)), "[2 3]", 0},
		{"limit", all.Limit(3), "[0 1 2]", 0},
		{"limit of selected", all.Durable("audit").Limit(2), "[1 3]", 0},
		{"subjects of the DLQ", DeadLetters("dlq.*").Durable("audit").Limit(1), "[1]", 0},
	} {
		found, foreign := listed(t, nc, c.query)
		payloads := []string{}
		for _, l := range found {
			payloads = append(payloads, string(l.Data))
		}
		if got := fmt.Sprint(payloads); got != c.want || len(foreign) != c.foreign {
			t.Errorf("%s: got %s and %q, want %s and %d foreign", c.name, got, foreign, c.want, c.foreign)
		}
	}

	counts, err := all.Count(testContext(t), nc)
	if err != nil {
		t.Fatal(err)
	}
	want := LetterCounts{Total: 10, Foreign: 2, Groups: []LetterGroup{
		{"audit", ReasonExhausted, 2}, {"audit", ReasonPanic, 1}, {"audit", ReasonPermanent, 2},
		{"billing", ReasonExhausted, 2}, {"billing", ReasonPanic, 2}, {"billing", ReasonPermanent, 1},
	}}
	if diff := cmp.Diff(want, counts); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
	var fault *LetterError
	if _, foreign := listed(t, nc, all.Durable("billing").Reason(ReasonPanic)); len(foreign) != 1 || !errors.As(foreign[0], &fault) {
		t.Errorf("got %v", foreign)
	} else if got, want := fault.Error(), `natsx: dead letter 12 of stream "DLQ": not a dead letter: Natsx-Dlq-Sequence "-1" is not a sequence`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	noConsumers(t, nc, "DLQ")
}

func TestDeadLetterPurge(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy, jetstream.InterestPolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, Retention: retention})
			if retention == jetstream.InterestPolicy {
				if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "DLQ", jetstream.ConsumerConfig{Durable: "keeper"}); err != nil {
					t.Fatal(err)
				}
			}
			publishMany(t, nc, 300, func(i int) *nats.Msg {
				return testLetter([]string{"billing", "audit"}[i%2], ReasonExhausted, i)
			})
			publish(t, nc, &nats.Msg{Subject: "dlq.orders", Data: []byte("foreign")})
			q := DeadLetters("dlq.orders").Durable("audit")
			if n, err := q.DryRun().Purge(testContext(t), nc); n != 150 || err != nil {
				t.Errorf("dry run: got %d, %v, want 150", n, err)
			}
			if n := stored(t, nc, "DLQ"); n != 301 {
				t.Errorf("%d are left after the dry run, want all", n)
			}
			if n, err := q.Purge(testContext(t), nc); n != 150 || err != nil {
				t.Errorf("got %d, %v, want 150", n, err)
			}
			if n, err := DeadLetters("dlq.orders").Limit(100).Purge(testContext(t), nc); n != 100 || err != nil {
				t.Errorf("got %d, %v, want 100", n, err)
			}
			if n, err := DeadLetters("dlq.orders").Purge(testContext(t), nc); n != 50 || err != nil {
				t.Errorf("got %d, %v, want 50", n, err)
			}
			if left := letters(t, nc, "DLQ"); len(left) != 1 || string(left[0].Data) != "foreign" {
				t.Errorf("got %v, want what is no letter", left)
			}
		})
	}
}

func TestDeadLettersThatCannotBeRead(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ctx := testContext(t)
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, DenyDelete: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ2", Subjects: []string{"dlq2.>"}})
	publish(t, nc, testLetter("billing", ReasonPanic, 0))
	check := func(name string, err error, want ...error) {
		t.Helper()
		for _, w := range want {
			if !errors.Is(err, w) {
				t.Errorf("%s: got %v, want %v", name, err, w)
			}
		}
	}
	list := func(q DeadLetterQuery) error {
		for l, err := range q.List(ctx, nc) {
			if err != nil {
				return err
			}
			t.Errorf("got %v", l)
		}
		return nil
	}
	check("no stream", list(DeadLetters("none.x")), ErrNoStream)
	check("two streams", list(DeadLetters("*.x")), ErrAmbiguousStream)
	_, err := DeadLetters("dlq.orders").Purge(ctx, nc)
	check("deny delete", err, ErrBadDLQ)
	check("every fault", list(DeadLetters("a..b").Durable("").Reason("").Subject("x y").Limit(0).Rate(-1).MaxRedrives(0).
		Since(diedAt).Until(diedAt).Domain("").APIPrefix("a.>.")),
		ErrInvalidSubject, ErrInvalidName, ErrOutOfRange, ErrOptionConflict)
	if n := len(strings.Split(list(DeadLetters("a..b").Durable("").Reason("").Limit(0)).Error(), "\n")); n != 4 {
		t.Errorf("%d faults, want 4", n)
	}
	domain, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := list0(domain, nc, DeadLetters("dlq.orders").Domain("elsewhere")); err == nil {
		t.Error("another domain has no such DLQ")
	}
	stopped, stop := context.WithCancel(ctx)
	stop()
	check("cancelled", list0(stopped, nc, DeadLetters("dlq.orders")), context.Canceled)
	if DeadLetters("a").Durable("b") != DeadLetters("a").Durable("b") {
		t.Error("queries do not compare")
	}
}

// list0 returns the first error of a query.
func list0(ctx context.Context, nc *nats.Conn, q DeadLetterQuery) error {
	for _, err := range q.List(ctx, nc) {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestDeadLettersBreak(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, 1000)
	before := nc.NumSubscriptions()
	n := 0
	for range DeadLetters("dlq.orders").List(testContext(t), nc) {
		if n++; n == 3 {
			break
		}
	}
	noConsumers(t, nc, "DLQ")
	if n := nc.NumSubscriptions(); n > before+1 { // that of requests
		t.Errorf("%d subscriptions, %d before", n, before)
	}
	// What comes while it is read is not read: a redrive could go on for ever.
	n = 0
	for _, err := range DeadLetters("dlq.orders").List(testContext(t), nc) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n <= 10 {
			publish(t, nc, testLetter("billing", ReasonPanic, n))
		}
	}
	if n != 1000 {
		t.Errorf("got %d letters, want the 1000 that were there", n)
	}
}

// TestDeadLettersSurviveTheirReader has the reader's consumer vanish, as it does
// with a server, and the server restart.
func TestDeadLettersSurviveTheirReader(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	letterStream(t, nc, 1500)
	s := streamNow(t, nc, "DLQ")
	wantListed(t, nc, 1500, func(seq uint64) {
		switch seq {
		case 300:
			deleteConsumers(t, s)
		case 900:
			p.stop()
			p.start(t)
		}
	})
}

// A reader whose consumer vanishes, and that gets no other, goes on where it was.
func TestDeadLettersWithoutRoomForAReader(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, MaxConsumers: 1})
	publishMany(t, nc, 600, func(i int) *nats.Msg { return testLetter("billing", ReasonPanic, i) })
	wantListed(t, nc, 600, func(seq uint64) {
		if seq == 299 {
			deleteConsumers(t, s)
			if _, err := s.CreateConsumer(testContext(t), jetstream.ConsumerConfig{Durable: "alerts"}); err != nil {
				t.Error(err)
			}
		}
	})
}

// A message with headers that cannot be read is no letter, and hides none.
func TestDeadLettersBesideBrokenHeaders(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, Retention: retention})
			publish(t, nc, testLetter("billing", ReasonPanic, 0))
			raw, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			// nats.go does not send such a thing.
			fmt.Fprintf(raw, "CONNECT {\"headers\":true,\"verbose\":false}\r\nHPUB dlq.orders 17 19\r\nnot a header at \n{}\r\n")
			eventually(t, "it is stored", func() bool { return stored(t, nc, "DLQ") == 2 })
			publish(t, nc, testLetter("billing", ReasonPanic, 2))
			found, foreign := listed(t, nc, DeadLetters("dlq.orders"))
			if len(found) != 2 || len(foreign) != 1 {
				t.Errorf("got %d letters and %q, want 2 and one that is none", len(found), foreign)
			}
			if n, err := DeadLetters("dlq.orders").Purge(testContext(t), nc); n != 2 || err != nil {
				t.Errorf("purged %d, %v, want 2", n, err)
			}
		})
	}
}

// A stream's and a server's limits on consumers hold for the reader too.
func TestDeadLettersWithinLimits(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, func(o *server.Options) { o.JetStreamLimits.MaxRequestBatch = 100 }).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"},
		ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: 2 * time.Second}})
	publishMany(t, nc, 300, func(i int) *nats.Msg { return testLetter("billing", ReasonPanic, i) })
	n := 0
	for _, err := range DeadLetters("dlq.orders").List(testContext(t), nc) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n > 1 {
			continue
		}
		for info := range s.ListConsumers(testContext(t)).Info() {
			if got := info.Config.InactiveThreshold; got != 2*time.Second {
				t.Errorf("the server keeps the reader's consumer for %s, want the stream's 2s", got)
			}
		}
	}
	if n != 300 {
		t.Errorf("got %d letters, want 300", n)
	}
}

// laggingPrefix begins the API of startLagging.
const laggingPrefix = "LAG.API"

// startLagging passes JetStream's API on under laggingPrefix, as if its streams had
// three replicas and some consumers were on one that lags behind: every other pull
// finds nothing, the first included, and whoever wants to start at a time starts
// at the 6th message, behind all that the replica has. pulls counts them.
func startLagging(t testing.TB, nc *nats.Conn) (pulls *tally) {
	t.Helper()
	pulls = new(tally)
	startTime := regexp.MustCompile(`"deliver_policy":"by_start_time","opt_start_time":"[^"]+"`)
	sub, err := nc.Subscribe(laggingPrefix+".>", func(m *nats.Msg) {
		operation := strings.TrimPrefix(m.Subject, laggingPrefix+".")
		switch {
		case strings.HasPrefix(operation, "STREAM.INFO."):
			answer, err := nc.Request("$JS.API."+operation, m.Data, testLimit)
			if err != nil {
				t.Error(err)
				return
			}
			m.Respond(bytes.Replace(answer.Data, []byte(`"num_replicas":1`), []byte(`"num_replicas":3`), 1))
		case strings.HasPrefix(operation, "CONSUMER.MSG.NEXT.") && pulls.add("all")%2 == 1:
			m.RespondMsg(&nats.Msg{Header: nats.Header{"Status": {"404"}, "Description": {"No Messages"}}})
		default:
			nc.PublishRequest("$JS.API."+operation, m.Reply, startTime.ReplaceAll(m.Data, []byte(`"deliver_policy":"by_start_sequence","opt_start_seq":6`)))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sub.Unsubscribe() })
	return pulls
}

// What a replica does not have yet is not the end of the stream.
func TestDeadLettersOnALaggingReplica(t *testing.T) {
	t.Parallel()
	url := startServer(t).ClientURL()
	nc := connect(t, url)
	pulls := startLagging(t, connect(t, url))
	letterStream(t, nc, 600)
	found, _ := listed(t, nc, DeadLetters("dlq.orders").APIPrefix(laggingPrefix))
	if len(found) != 600 || found[599].DLQSequence != 600 {
		t.Errorf("got %d letters, want all 600", len(found))
	}
	if pulls.sum() < 2 {
		t.Errorf("got %d pulls, want the first to find nothing", pulls.sum())
	}
	noConsumers(t, nc, "DLQ")
}

func FuzzLetterHeaders(f *testing.F) {
	f.Add("Customer", "7", false)
	f.Add("Nats-Msg-Id", "o-1", true)
	f.Add("Status", "503", true)
	f.Add("Natsx-Orig-Nats-TTL", "1s", false)
	f.Add("Natsx-Dlq-Sequence", "-1", true)
	f.Fuzz(func(t *testing.T, name, value string, empty bool) {
		original := nats.Header{name: {value}}
		kept := originalHeaders(original, empty)
		// What is said about the message, whatever it says itself.
		letter := testLetter("billing", ReasonPanic, 0)
		for k, v := range kept {
			if _, taken := letter.Header[k]; taken {
				t.Fatalf("header %q becomes the letter's own %q", name, k)
			}
			letter.Header[k] = v
		}
		if empty {
			letter.Data = nil
		}
		l, err := parseLetter("DLQ", &storedMsg{subject: "dlq.orders", seq: 1, header: letter.Header, data: letter.Data})
		if err != nil {
			t.Fatal(err)
		}
		for k := range l.Header {
			// What nats.go would not send in a name is replaced.
			if name := sendableName(name); !strings.EqualFold(k, name) && !strings.EqualFold(name, "Nats-"+k) {
				t.Errorf("header %q comes back as %q", name, k)
			}
		}
		if len(l.Header) != 1 {
			t.Errorf("header %q is lost", name)
		}
		// As a foreign message that has nothing but this header.
		parseLetter("DLQ", &storedMsg{subject: "dlq.orders", seq: 1, header: original})
		readCopy(original)
		provenCopy("key", "orders.new", original, nil)
	})
}

// A query with a limit gets on though what is no letter stands before the letters.
func TestDeadLettersLimitCountsLetters(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	for i := range 4 {
		publish(t, nc, &nats.Msg{Subject: "dlq.orders", Data: []byte("foreign")})
		publish(t, nc, testLetter("billing", ReasonPanic, i))
	}
	q := DeadLetters("dlq.orders").Limit(2)
	if found, foreign := listed(t, nc, q); len(found) != 2 || len(foreign) != 2 {
		t.Errorf("listed %d letters and %d others, want the first two of both", len(found), len(foreign))
	}
	if n, err := q.Purge(testContext(t), nc); n != 2 || err != nil || stored(t, nc, "DLQ") != 6 {
		t.Errorf("purged %d, %v, %d are left, want 6", n, err, stored(t, nc, "DLQ"))
	}
}
