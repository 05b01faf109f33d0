package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
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

// patient is a durable that fails on everything until it is cured.
type patient struct {
	cured   atomic.Bool
	handled tally // by payload, once cured
	copies  tally // by payload and sequence
	last    atomic.Pointer[Msg]
}

func (p *patient) handle(_ context.Context, m *Msg) error {
	if !p.cured.Load() {
		return Permanent(errors.New("ill"))
	}
	p.last.Store(m)
	p.copies.add(fmt.Sprintf("%s at %d", m.Data, m.Sequence()))
	p.handled.add(string(m.Data))
	return nil
}

func (p *patient) route() Spec {
	return patientRoute.Handle(p.handle)
}

var patientRoute = Route("orders.>").Durable("billing").AckWait(5 * time.Second).DLQ("dlq.orders")

// die has a patient make letters of so many messages, and cures it.
func (p *patient) die(t testing.TB, nc *nats.Conn, count int, build func(int) *nats.Msg) {
	t.Helper()
	p.dieOf(t, nc, patientRoute, count, build)
}

// dieInOrder is die for letters in the order of their messages.
func (p *patient) dieInOrder(t testing.TB, nc *nats.Conn, count int, build func(int) *nats.Msg) {
	t.Helper()
	p.dieOf(t, nc, patientRoute.Concurrency(1), count, build)
}

func (p *patient) dieOf(t testing.TB, nc *nats.Conn, route RouteBuilder, count int, build func(int) *nats.Msg) {
	t.Helper()
	r := runBroker(t, NewBroker(nc, WithDrainTimeout(testLimit)), route.Handle(p.handle))
	publishMany(t, nc, count, build)
	eventually(t, "all are dead", func() bool { return stored(t, nc, "DLQ") == count })
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	p.cured.Store(true)
}

func redriveAll(t testing.TB, nc *nats.Conn, want RedriveReport) RedriveReport {
	t.Helper()
	return redriveQuery(t, nc, DeadLetters("dlq.orders"), want)
}

func redriveQuery(t testing.TB, nc *nats.Conn, q DeadLetterQuery, want RedriveReport) RedriveReport {
	t.Helper()
	got, err := q.Redrive(testContext(t), nc)
	if err != nil {
		t.Fatal(err)
	}
	plain := got
	plain.Errors = nil
	if diff := cmp.Diff(want, plain); diff != "" {
		t.Errorf("report (-want +got):\n%s%v", diff, got.Errors)
	}
	return got
}

func shortWindow(cfg *jetstream.StreamConfig) { cfg.Duplicates = 100 * time.Millisecond }

func TestRedriveForOneDurable(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"acks", "confirmed acks"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc)
			var billing patient
			billing.die(t, nc, 5, func(i int) *nats.Msg {
				return &nats.Msg{
					Subject: "orders.new", Data: fmt.Append(nil, i),
					Header: nats.Header{
						"Customer": {"7"}, "Nats-Msg-Id": {fmt.Sprint("o-", i)}, "Natsx-Dlq-Reason": {"x"},
						"Natsx-Redrive-Count": {"17"}, "natsx-redrive-token": {"x"},
					},
				}
			})
			var audit tally
			auditRoute := Route("orders.>").Durable("audit")
			if mode == "confirmed acks" {
				auditRoute = auditRoute.ConfirmAcks()
			}
			b := NewBroker(nc)
			runBroker(t, b, billing.route(), auditRoute.Handle(func(_ context.Context, m *Msg) error {
				audit.add(string(m.Data))
				return nil
			}))
			eventually(t, "the other durable has seen them", func() bool { return audit.sum() == 5 })

			redriveQuery(t, nc, DeadLetters("dlq.orders").DryRun(), RedriveReport{Redriven: 5})
			if n := stored(t, nc, "DLQ"); n != 5 || billing.handled.sum() != 0 {
				t.Fatalf("after the dry run %d letters are left and %d messages handled", n, billing.handled.sum())
			}
			redriveAll(t, nc, RedriveReport{Redriven: 5})
			eventually(t, "all are handled", func() bool {
				return settled(t, nc, "ORDERS", "billing") && settled(t, nc, "ORDERS", "audit")
			})
			billing.handled.wantOnce(t, 5)
			audit.wantOnce(t, 5)
			m := billing.last.Load()
			if m.Attempt() != 1 || m.Subject != "orders.new" {
				t.Errorf("attempt %d of %q, want the first of the original subject", m.Attempt(), m.Subject)
			}
			for name, want := range map[string]string{
				"Customer": "7", "Natsx-Dlq-Reason": "x", HeaderRedriveTo: "billing", HeaderRedriveCount: "1", "natsx-redrive-token": "",
			} {
				if got := m.Header.Get(name); got != want {
					t.Errorf("header %s is %q, want %q", name, got, want)
				}
			}
			if id := m.Header.Get("Nats-Msg-Id"); !strings.HasPrefix(id, "redrive/DLQ@") {
				t.Errorf("message id %q", id)
			}
			if s := b.Stats().Routes[1]; s.Received != 10 || s.Succeeded != 5 {
				t.Errorf("the other durable received %d and handled %d, want 10 and 5", s.Received, s.Succeeded)
			}
			if n := stored(t, nc, "DLQ"); n != 0 {
				t.Errorf("%d letters are left", n)
			}
			redriveAll(t, nc, RedriveReport{})
		})
	}
}

// A publisher who knows all that messages and letters show cannot have a message passed
// over: neither one of its own nor an original once more.
func TestRedriveForgedByAPublisher(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, shortWindow)
	var billing patient
	billing.die(t, nc, 1, numbered("orders.new"))
	redriveAll(t, nc, RedriveReport{Redriven: 1})
	real := letters(t, nc, "ORDERS")[1]
	created := streamNow(t, nc, "ORDERS").CachedInfo().Created.UnixNano()
	original := real.Header.Get(HeaderRedriveOriginal)
	// copied is the header of the real copy with changes; an id is taken again past the
	// duplicate window, and here it need not wait.
	copied := func(i int, changes ...string) nats.Header {
		h := nats.Header{}
		for k, v := range real.Header {
			h[k] = v
		}
		h.Set("Nats-Msg-Id", fmt.Sprint(real.Header.Get("Nats-Msg-Id"), i))
		for i := 0; i < len(changes); i += 2 {
			h.Set(changes[i], changes[i+1])
		}
		return h
	}
	// signed has a token made with what a publisher may know in place of the secret.
	signed := func(key string, data []byte) nats.Header {
		h := nats.Header{HeaderRedriveTo: {"billing"}, HeaderRedriveCount: {"1"}, HeaderRedriveOriginal: {original}, "Nats-Msg-Id": {"redrive/DLQ@1/" + key}}
		h.Set(HeaderRedriveToken, redriveToken(key, "orders.new", h, data))
		return h
	}
	forged := []*nats.Msg{
		{Header: nats.Header{HeaderRedriveTo: {"billing"}}},
		{Header: nats.Header{HeaderRedriveTo: {"nobody"}, HeaderRedriveToken: {"0000"}}},
		{Header: nats.Header{HeaderRedriveTo: {""}, HeaderRedriveToken: {""}}},
		{Header: nats.Header{HeaderRedriveTo: {}}},
		{Header: copied(4)},
		{Header: copied(5), Subject: "orders.old"},
		{Header: copied(6, HeaderRedriveTo, "nobody")},
		{Header: copied(7, HeaderRedriveTo, "nobody", HeaderRedriveOriginal, strings.Replace(original, "billing", "nobody", 1))},
		{Header: copied(8, HeaderRedriveTo, "a.>", HeaderRedriveOriginal, strings.Replace(original, "billing", "a.>", 1))},
		// The original once more: it is another message.
		{Header: copied(9), Data: []byte("0")},
		{Header: copied(10, "Customer", "8"), Data: []byte("0")},
		// Made by somebody who knows how, but not the durable's identity.
		{Header: signed("", []byte("0")), Data: []byte("0")},
		{Header: signed(fmt.Sprint(created, " ORDERS"), []byte("0")), Data: []byte("0")},
		{Header: signed("billing", []byte("0")), Data: []byte("0")},
	}
	publishMany(t, nc, len(forged), func(i int) *nats.Msg {
		m := *forged[i]
		if m.Data == nil {
			m.Data = fmt.Append(nil, "forged ", i)
		}
		if m.Subject == "" {
			m.Subject = "orders.new"
		}
		return &m
	})
	var audit tally
	runBroker(t, NewBroker(nc), billing.route(), Route("orders.>").Durable("audit").Handle(func(_ context.Context, m *Msg) error {
		audit.add(fmt.Sprint(m.Sequence()))
		return nil
	}))
	eventually(t, "all are settled", func() bool {
		return settled(t, nc, "ORDERS", "billing") && settled(t, nc, "ORDERS", "audit")
	})
	if n := billing.handled.sum(); n != 1+len(forged) {
		t.Errorf("the durable of the redrive handled %d, want %d", n, 1+len(forged))
	}
	if audit.get("2") != 0 {
		t.Error("the other durable handled the real copy")
	}
	for i := range forged {
		if n := audit.get(fmt.Sprint(i + 3)); n != 1 {
			t.Errorf("the other durable handled forged message %d %d times", i, n)
		}
	}
}

// storeCopies is a redrive that is killed after the copies of the first count
// letters were stored, before one of these was removed, and its mark before it began.
func storeCopies(t testing.TB, nc *nats.Conn, count int) {
	t.Helper()
	ctx := testContext(t)
	d, err := DeadLetters("dlq.orders").Limit(count).open(ctx, nc)
	if err != nil {
		t.Fatal(err)
	}
	killed := &redrive{deadLetters: d, sources: map[string]*redriveSource{}, marks: newRedriveMarks(d)}
	for l, err := range d.limited(ctx, false) {
		if err != nil {
			t.Fatal(err)
		}
		src, err := killed.source(ctx, &l)
		if err != nil {
			t.Fatal(err)
		}
		if err := killed.marks.put(ctx, l.Stream, src.info.State.LastSeq); err != nil {
			t.Fatal(err)
		}
		publish(t, nc, src.copyOf(&l, l.Header, l.Data))
	}
}

// windowOver waits until the stream of orders has forgotten the ids it knows.
func windowOver(t testing.TB, nc *nats.Conn) {
	t.Helper()
	// That is so when it takes one id twice.
	probe := func() bool {
		m := &nats.Msg{Subject: "orders.probe", Data: []byte("probe"), Header: nats.Header{"Nats-Msg-Id": {"probe"}}}
		ack, err := jetStream(t, nc).PublishMsg(testContext(t), m)
		return err == nil && !ack.Duplicate
	}
	probe()
	eventually(t, "the duplicate window is over", probe)
}

// TestRedriveAfterAKill has the state that a redrive leaves which was killed when
// the copy was stored and the letter not removed yet, and is repeated when the
// server has forgotten the copy's id.
func TestRedriveAfterAKill(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		for _, handledBetween := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s handled between %t", retention, handledBetween), func(t *testing.T) {
				t.Parallel()
				nc := connect(t, startServer(t).ClientURL())
				orders(t, nc, shortWindow, func(cfg *jetstream.StreamConfig) { cfg.Retention = retention })
				var billing patient
				billing.dieInOrder(t, nc, 3, numbered("orders.new"))

				storeCopies(t, nc, 2)
				if handledBetween {
					r := runBroker(t, NewBroker(nc), billing.route())
					eventually(t, "the copies are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
					if err := r.stop(t); err != nil {
						t.Fatal(err)
					}
				}
				windowOver(t, nc)

				want := RedriveReport{Redriven: 1, Skipped: 2, Skips: map[SkipReason]int{SkipRedriven: 2}}
				if handledBetween {
					want = RedriveReport{Redriven: 1}
				}
				redriveAll(t, nc, want)
				runBroker(t, NewBroker(nc), billing.route())
				eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
				for _, payload := range []string{"0", "1", "2"} {
					if n := billing.handled.get(payload); n != 1 {
						t.Errorf("message %s was handled %d times", payload, n)
					}
				}
				if n := stored(t, nc, "DLQ"); n != 0 {
					t.Errorf("%d letters are left", n)
				}
			})
		}
	}
}

// A copy is found also when the replica that is searched lags behind.
func TestRedriveOnALaggingReplica(t *testing.T) {
	t.Parallel()
	url := startServer(t).ClientURL()
	nc := connect(t, url)
	startLagging(t, connect(t, url))
	orders(t, nc, shortWindow)
	var billing patient
	billing.dieInOrder(t, nc, 3, numbered("orders.new"))
	storeCopies(t, nc, 2)
	windowOver(t, nc)
	redriveQuery(t, nc, DeadLetters("dlq.orders").APIPrefix(laggingPrefix),
		RedriveReport{Redriven: 1, Skipped: 2, Skips: map[SkipReason]int{SkipRedriven: 2}})
	runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	for _, payload := range []string{"0", "1", "2"} {
		if n := billing.handled.get(payload); n != 1 {
			t.Errorf("message %s was handled %d times", payload, n)
		}
	}
}

func TestRedriveByTwoOperators(t *testing.T) {
	t.Parallel()
	const count = 80
	url := startServer(t).ClientURL()
	nc := connect(t, url)
	orders(t, nc)
	var billing patient
	billing.die(t, nc, count, numbered("orders.new"))
	var reports [2]RedriveReport
	var operators sync.WaitGroup
	for i := range reports {
		own := connect(t, url)
		operators.Go(func() {
			report, err := DeadLetters("dlq.orders").Redrive(testContext(t), own)
			if err != nil {
				t.Error(err)
			}
			reports[i] = report
		})
	}
	operators.Wait()
	if reports[0].Redriven+reports[1].Redriven != count || reports[0].Failed+reports[1].Failed != 0 {
		t.Errorf("got %+v and %+v, want %d redriven together", reports[0], reports[1], count)
	}
	if n := stored(t, nc, "ORDERS"); n != 2*count {
		t.Errorf("the stream has %d messages, want each twice", n)
	}
	runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	billing.handled.wantOnce(t, count)
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters are left", n)
	}
}

func TestRedriveThatCannotArrive(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, func(o *server.Options) { o.MaxPayload = 8192 }).ClientURL())
	js, ctx := jetStream(t, nc), testContext(t)
	orders(t, nc)
	for stream, subject := range map[string]string{"GONE": "gone.>", "MOVED": "moved.>", "FULL": "full.>", "TURNED": "turned.>"} {
		cfg := jetstream.StreamConfig{Name: stream, Subjects: []string{subject}}
		if stream == "TURNED" {
			cfg.SubjectTransform = &jetstream.SubjectTransformConfig{Source: "turned.*", Destination: "turned.{{wildcard(1)}}.about"}
		}
		if stream == "FULL" {
			cfg.MaxMsgs, cfg.Discard = 1, jetstream.DiscardNew
		}
		createStream(t, nc, cfg)
		if _, err := js.CreateConsumer(ctx, stream, jetstream.ConsumerConfig{Durable: "billing"}); err != nil {
			t.Fatal(err)
		}
	}
	publish(t, nc, &nats.Msg{Subject: "full.new"})
	if _, err := js.CreateConsumer(ctx, "ORDERS", jetstream.ConsumerConfig{Durable: "narrow", FilterSubject: "orders.eu"}); err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name   string
		edit   func(*nats.Msg)
		want   error
		reason string
	}{
		{"stream gone", func(m *nats.Msg) {
			m.Header.Set(HeaderDLQStream, "GONE")
			m.Header.Set(HeaderDLQSubject, "gone.new")
		}, ErrNoStream, `original stream "GONE" is gone`},
		{"subject moved", func(m *nats.Msg) {
			m.Header.Set(HeaderDLQStream, "MOVED")
			m.Header.Set(HeaderDLQSubject, "moved.new")
		}, ErrNoStream, `original stream "MOVED" does not take the subject "moved.new" any more`},
		{"subject of another stream", func(m *nats.Msg) { m.Header.Set(HeaderDLQSubject, "full.new") },
			ErrNoStream, `original stream "ORDERS" does not take the subject "full.new" any more`},
		{"durable gone", func(m *nats.Msg) { m.Header.Set(HeaderDLQDurable, "gone") },
			ErrConsumerDeleted, `durable "gone" of stream "ORDERS" is gone`},
		{"durable takes others", func(m *nats.Msg) { m.Header.Set(HeaderDLQDurable, "narrow") },
			ErrConsumerConflict, `durable "narrow" of stream "ORDERS" does not take the subject "orders.new" any more`},
		{"stream full", func(m *nats.Msg) {
			m.Header.Set(HeaderDLQStream, "FULL")
			m.Header.Set(HeaderDLQSubject, "full.new")
		}, nil, `copy not stored in stream "FULL": nats: API error: code=503 err_code=10077 description=maximum messages exceeded`},
		{"subject transformed", func(m *nats.Msg) {
			m.Header.Set(HeaderDLQStream, "TURNED")
			m.Header.Set(HeaderDLQSubject, "turned.new")
		}, ErrNoStream, `original stream "TURNED" would store the copy on another subject than "turned.new": it transforms "turned.*" to "turned.{{wildcard(1)}}.about"`},
		// Letters are data too: this one would have the operator call the API.
		{"subject of the server", func(m *nats.Msg) { m.Header.Set(HeaderDLQSubject, "$JS.API.STREAM.DELETE.ORDERS") },
			ErrInvalidSubject, `original subject "$JS.API.STREAM.DELETE.ORDERS" cannot be published to: starts with $, which belongs to the server`},
		{"subject of another client", func(m *nats.Msg) { m.Header.Set(HeaderDLQSubject, "orders.*") },
			ErrInvalidSubject, `original subject "orders.*" cannot be published to: has a wildcard`},
		{"pointer to nothing", func(m *nats.Msg) {
			m.Header.Set(HeaderDLQPointer, "true")
			m.Data = nil
		}, nil, `the letter is a pointer, and its original, message 1 of stream "ORDERS", is gone`},
	}
	var billing patient
	runBroker(t, NewBroker(nc), billing.route()).stop(t)
	publishMany(t, nc, len(cases), func(i int) *nats.Msg {
		m := testLetter("billing", ReasonExhausted, 0)
		cases[i].edit(m)
		return m
	})
	publish(t, nc, &nats.Msg{Subject: "dlq.orders", Data: []byte("foreign")})
	if err := js.DeleteStream(ctx, "GONE"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.UpdateStream(ctx, jetstream.StreamConfig{Name: "MOVED", Subjects: []string{"elsewhere.>"}}); err != nil {
		t.Fatal(err)
	}
	report := redriveAll(t, nc, RedriveReport{Failed: len(cases), Skipped: 1, Skips: map[SkipReason]int{SkipForeign: 1}})
	for i, err := range report.Errors {
		c := cases[i]
		prefix := fmt.Sprintf("natsx: dead letter %d of stream \"DLQ\": ", i+1)
		if got, want := err.Error(), prefix+c.reason; got != want {
			t.Errorf("%s: got %q, want %q", c.name, got, want)
		}
		var fault *LetterError
		if !errors.As(err, &fault) || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
	found, _ := listed(t, nc, DeadLetters("dlq.orders").Subject("orders.*"))
	if n := len(found); n != 4 || found[2].Subject != "orders.*" {
		t.Errorf("listed %d letters of orders.*, want 4", n)
	}
	if n := stored(t, nc, "DLQ"); n != len(cases)+1 {
		t.Errorf("%d letters are left, want all", n)
	}
	if n := stored(t, nc, "ORDERS"); n != 0 {
		t.Errorf("%d copies were stored", n)
	}
}

func TestRedriveEndsALoop(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var ill patient // for good
	b := NewBroker(nc)
	runBroker(t, b, ill.route())
	// A count by nobody who can prove it is none.
	publish(t, nc, &nats.Msg{Subject: "orders.new", Header: nats.Header{HeaderRedriveCount: {"99"}, HeaderRedriveTo: {"billing"}}})
	died := func() uint64 { return b.Stats().Routes[0].Dead }
	for i := range uint64(3) {
		eventually(t, "it is dead", func() bool { return died() == i+1 && stored(t, nc, "DLQ") == 1 })
		q := DeadLetters("dlq.orders")
		if i == 2 {
			redriveQuery(t, nc, q.MaxRedrives(2), RedriveReport{Skipped: 1, Skips: map[SkipReason]int{SkipMaxRedrives: 1}})
		}
		redriveQuery(t, nc, q, RedriveReport{Redriven: 1})
	}
	eventually(t, "it is dead again", func() bool { return died() == 4 && stored(t, nc, "DLQ") == 1 })
	redriveAll(t, nc, RedriveReport{Skipped: 1, Skips: map[SkipReason]int{SkipMaxRedrives: 1}})
	found, _ := listed(t, nc, DeadLetters("dlq.orders"))
	if len(found) != 1 || found[0].Redrives != 3 {
		t.Errorf("got %v, want one letter that was redriven 3 times", found)
	}
}

// A letter that had no room for the original's headers keeps the count of redrives.
func TestRedriveEndsALoopWithoutHeaders(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, func(o *server.Options) { o.MaxPayload = 4096 }).ClientURL())
	orders(t, nc)
	var ill patient // for good
	runBroker(t, NewBroker(nc), ill.route())
	publish(t, nc, &nats.Msg{Subject: "orders.new", Header: nats.Header{"Customer": {strings.Repeat("7", 400)}}, Data: make([]byte, 2860)})
	latest := func(seq uint64) DeadLetter {
		t.Helper()
		eventually(t, "it is dead", func() bool {
			left := letters(t, nc, "DLQ")
			return len(left) == 1 && left[0].Sequence == seq
		})
		found, _ := listed(t, nc, DeadLetters("dlq.orders"))
		return found[0]
	}
	if l := latest(1); l.Header.Get("Customer") == "" || len(l.Data) == 0 {
		t.Fatal("the first letter lacks its headers or payload")
	}
	redriveAll(t, nc, RedriveReport{Redriven: 1})
	l := latest(2)
	if l.Header.Get("Customer") != "" || len(l.Data) == 0 {
		t.Fatal("the second letter has all headers or no payload")
	}
	if l.Redrives != 1 {
		t.Errorf("the letter tells of %d redrives, want 1", l.Redrives)
	}
	redriveQuery(t, nc, DeadLetters("dlq.orders").MaxRedrives(1), RedriveReport{Skipped: 1, Skips: map[SkipReason]int{SkipMaxRedrives: 1}})
}

func TestRedriveOfPointers(t *testing.T) {
	t.Parallel()
	const payload = 4096
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t, func(o *server.Options) { o.MaxPayload = payload }).ClientURL())
			orders(t, nc, func(cfg *jetstream.StreamConfig) { cfg.Retention = retention })
			var billing patient
			large := func(size int) func(int) *nats.Msg {
				return func(i int) *nats.Msg {
					return &nats.Msg{Subject: "orders.new", Data: []byte(strings.Repeat(fmt.Sprint(i), size))}
				}
			}
			billing.dieInOrder(t, nc, 3, large(payload-360))
			found, _ := listed(t, nc, DeadLetters("dlq.orders"))
			if len(found) != 3 || !found[0].Pointer {
				t.Fatalf("got %v, want 3 pointers", found)
			}
			redriveQuery(t, nc, DeadLetters("dlq.orders").Limit(1), RedriveReport{Redriven: 1})
			if n, err := DeadLetters("dlq.orders").Limit(1).Purge(testContext(t), nc); n != 1 || err != nil {
				t.Fatalf("purged %d, %v", n, err)
			}
			left := 2 // a copy and the original of the last letter
			if retention == jetstream.LimitsPolicy {
				left = 4
			}
			if n := stored(t, nc, "ORDERS"); n != left {
				t.Errorf("the stream has %d messages, want %d", n, left)
			}
			redriveAll(t, nc, RedriveReport{Redriven: 1})
			runBroker(t, NewBroker(nc), billing.route())
			eventually(t, "both are handled", func() bool { return billing.handled.sum() == 2 })
			billing.handled.wantOnce(t, 2)
			if retention == jetstream.WorkQueuePolicy {
				eventually(t, "nothing is left", func() bool { return stored(t, nc, "ORDERS") == 0 })
			}
		})
	}
}

// Another durable of an interest stream still gets the original of a pointer that
// is redriven or purged. The server deletes it when that durable is done as well.
func TestPointersLeaveOriginalsToOthers(t *testing.T) {
	t.Parallel()
	const payload = 4096
	nc := connect(t, startServer(t, func(o *server.Options) { o.MaxPayload = payload }).ClientURL())
	orders(t, nc, func(cfg *jetstream.StreamConfig) { cfg.Retention = jetstream.InterestPolicy })
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "audit", AckWait: DefaultAckWait, FilterSubject: "orders.>", MaxAckPending: DefaultMaxAckPending, MaxDeliver: -1,
	}); err != nil {
		t.Fatal(err)
	}
	var billing patient
	billing.dieInOrder(t, nc, 2, func(i int) *nats.Msg {
		return &nats.Msg{Subject: "orders.new", Data: []byte(strings.Repeat(fmt.Sprint(i), payload-360))}
	})
	redriveQuery(t, nc, DeadLetters("dlq.orders").Limit(1), RedriveReport{Redriven: 1})
	if n, err := DeadLetters("dlq.orders").Purge(testContext(t), nc); n != 1 || err != nil {
		t.Fatalf("purged %d, %v", n, err)
	}
	if n := stored(t, nc, "ORDERS"); n != 3 {
		t.Errorf("the stream has %d messages, want a copy and both originals, which the other durable needs", n)
	}
	if info := consumerInfo(t, nc, "ORDERS", "billing"); info.NumAckPending != 0 {
		t.Errorf("the durable that failed still holds %d", info.NumAckPending)
	}
	var audit tally
	runBroker(t, NewBroker(nc), billing.route(), Route("orders.>").Durable("audit").Handle(func(_ context.Context, m *Msg) error {
		audit.add(string(m.Data[:1]))
		return nil
	}))
	eventually(t, "nothing is left", func() bool { return stored(t, nc, "ORDERS") == 0 })
	audit.wantOnce(t, 2)
	billing.handled.wantOnce(t, 1)
}

func TestRedriveIsCancelled(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var billing patient
	billing.dieInOrder(t, nc, 20, numbered("orders.new"))
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var told []int
	began := time.Now()
	report, err := DeadLetters("dlq.orders").Durable("billing").Rate(50).Redrive(ctx, nc, WithRedriveProgress(func(p RedriveProgress) {
		told = append(told, p.Done())
		if p.Total != 20 || p.Err != nil || string(p.Letter.Data) != fmt.Sprint(p.Done()-1) {
			t.Errorf("progress %+v", p)
		}
		if p.Done() == 6 {
			cancel()
		}
	}))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context", err)
	}
	if diff := cmp.Diff(RedriveReport{Redriven: 6}, report); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]int{1, 2, 3, 4, 5, 6}, told); diff != "" {
		t.Errorf("progress (-want +got):\n%s", diff)
	}
	if took := time.Since(began); took < 100*time.Millisecond {
		t.Errorf("6 letters at 50 a second took %s, want at least 100 ms", took)
	}
	redriveQuery(t, nc, DeadLetters("dlq.orders").Limit(4), RedriveReport{Redriven: 4})
	redriveAll(t, nc, RedriveReport{Redriven: 10})
	runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are handled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	billing.handled.wantOnce(t, 20)
}

func TestRedriveFromARecreatedDLQ(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	js, ctx := jetStream(t, nc), testContext(t)
	orders(t, nc)
	var billing patient
	for i := range 2 {
		billing.cured.Store(false)
		billing.die(t, nc, 1, func(int) *nats.Msg { return numbered("orders.new")(i) })
		redriveAll(t, nc, RedriveReport{Redriven: 1})
		if err := js.DeleteStream(ctx, "DLQ"); err != nil {
			t.Fatal(err)
		}
		createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
		// The next letter has the sequence of the one before, whose copy is not
		// handled yet.
		if i == 1 {
			publish(t, nc, testLetter("billing", ReasonPanic, 0))
		}
		r := runBroker(t, NewBroker(nc), billing.route())
		eventually(t, "the copy is handled", func() bool { return settled(t, nc, "ORDERS", "billing") })
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
	}
	billing.handled.wantOnce(t, 2)
	if n := stored(t, nc, "DLQ"); n != 1 {
		t.Errorf("the DLQ has %d letters, want the one of another message", n)
	}
}

// TestRedriveWithoutPermission has a broker that may not touch the DLQ's letters:
// it handles what is redriven all the same.
func TestRedriveWithoutPermission(t *testing.T) {
	t.Parallel()
	s := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "operator", Password: "x"},
			{Username: "service", Password: "x", Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.MSG.GET.DLQ", "$JS.API.STREAM.MSG.DELETE.DLQ"}},
				Subscribe: &server.SubjectPermission{Allow: []string{">"}},
			}},
			{Username: "stranger", Password: "x", Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Deny: []string{"$JS.API.CONSUMER.CREATE.>"}},
			}},
		}
	})
	operator := connect(t, s.ClientURL(), nats.UserInfo("operator", "x"))
	service := connect(t, s.ClientURL(), nats.UserInfo("service", "x"))
	orders(t, operator)
	var billing patient
	billing.dieInOrder(t, operator, 3, numbered("orders.new"))
	runBroker(t, NewBroker(service), billing.route())
	redriveAll(t, operator, RedriveReport{Redriven: 3})
	eventually(t, "all are handled", func() bool { return billing.handled.sum() == 3 })
	billing.handled.wantOnce(t, 3)

	publish(t, operator, testLetter("billing", ReasonPanic, 0))
	stranger := connect(t, s.ClientURL(), nats.UserInfo("stranger", "x"))
	if _, err := DeadLetters("dlq.orders").Redrive(testContext(t), stranger); !errors.Is(err, ErrPermission) {
		t.Errorf("got %v, want a lack of permission", err)
	}
}

func TestRedriveOverAServerRestart(t *testing.T) {
	t.Parallel()
	const count = 100
	p := startPhoenix(t)
	nc := connect(t, p.url())
	orders(t, nc)
	var billing patient
	billing.die(t, nc, count, numbered("orders.new"))
	restarted := make(chan struct{})
	report, err := DeadLetters("dlq.orders").Rate(200).Redrive(testContext(t), nc, WithRedriveProgress(func(now RedriveProgress) {
		if now.Done() == 20 {
			go func() {
				defer close(restarted)
				p.stop()
				p.start(t)
			}()
		}
	}))
	receive(t, restarted, "the restart")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(RedriveReport{Redriven: count}, report); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}
	runBroker(t, NewBroker(nc), billing.route())
	eventually(t, "all are handled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	billing.handled.wantOnce(t, count)
}

// TestRedriveOverElections stops the leaders of both streams, one after the other,
// while letters are redriven and handled.
func TestRedriveOverElections(t *testing.T) {
	t.Parallel()
	const count = 60
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}, Replicas: 3, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, Replicas: 3})
	var billing patient
	billing.die(t, nc, count, numbered("orders.new"))
	runBroker(t, NewBroker(connect(t, c.url())), billing.route())
	again := make(chan struct{})
	report, err := DeadLetters("dlq.orders").Rate(75).Redrive(testContext(t), nc, WithRedriveProgress(func(now RedriveProgress) {
		if now.Done() == 20 {
			go func() {
				defer close(again)
				for _, stream := range []string{"ORDERS", "DLQ"} {
					leader := c.leader(t, stream, "")
					leader.stop()
					c.leader(t, stream, "")
					leader.start(t)
					whole(t, nc, "ORDERS", "DLQ")
				}
			}()
		}
	}))
	receive(t, again, "the servers to be back")
	if err != nil || report.Failed > 0 {
		t.Fatalf("got %+v, %v", report, err)
	}
	eventually(t, "all are handled", func() bool { return billing.handled.keys() == count })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
	// An election may lose an ack, and the message is handled again; a second copy
	// would be another message.
	if got := billing.copies.keys(); got != count {
		t.Errorf("%d copies of %d letters were handled", got, count)
	}
	if n := stored(t, nc, "DLQ"); n != 0 {
		t.Errorf("%d letters are left", n)
	}
}

// TestRedriveOfATakenID has somebody publish with the id that a copy will have: it
// must not pass for the copy.
func TestRedriveOfATakenID(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	var billing patient
	billing.dieInOrder(t, nc, 2, numbered("orders.new"))
	found, _ := listed(t, nc, DeadLetters("dlq.orders"))
	publish(t, nc, &nats.Msg{Subject: "orders.new", Data: []byte("squatter"), Header: nats.Header{
		"Nats-Msg-Id": {redriveID(&found[0])}, HeaderRedriveTo: {"billing"}, HeaderRedriveCount: {"1"}, HeaderRedriveToken: {"x"},
	}})
	report := redriveAll(t, nc, RedriveReport{Redriven: 1, Failed: 1})
	if len(report.Errors) != 1 || !errors.Is(report.Errors[0], ErrBadAck) {
		t.Errorf("got %v", report.Errors)
	}
	if left := letters(t, nc, "DLQ"); len(left) != 1 || string(left[0].Data) != "0" {
		t.Errorf("got %v, want the letter whose id is taken", left)
	}
}

func init() { childModes["redrive"] = redriveChild }

// redriveChild redrives until it is killed or nothing is left.
func redriveChild() int {
	nc, err := nats.Connect(childURL(), nats.Name("operator"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer nc.Close()
	fmt.Println("ready")
	report, err := DeadLetters("dlq.orders").Redrive(context.Background(), nc)
	if err != nil || report.Failed > 0 {
		fmt.Fprintln(os.Stderr, report, err)
		return 1
	}
	return 0
}

func TestRedriveSurvivesKills(t *testing.T) {
	t.Parallel()
	const count = 150
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			// A new operator starts later than the server forgets a copy's id.
			orders(t, nc, shortWindow, func(cfg *jetstream.StreamConfig) { cfg.Retention = retention })
			var billing patient
			billing.die(t, nc, count, numbered("orders.new"))
			routes := []Spec{billing.route()}
			var audit tally
			if retention == jetstream.LimitsPolicy {
				routes = append(routes, Route("orders.>").Durable("audit").Handle(func(_ context.Context, m *Msg) error {
					audit.add(string(m.Data))
					return nil
				}))
			}
			runBroker(t, NewBroker(nc), routes...)
			kills, ended := 0, false
			for !ended {
				c := startChild(t, "redrive", s.ClientURL(), nil)
				if !c.serves(t) {
					t.Fatalf("the operator did not start: %v", c.err)
				}
				// A random number of letters later; early enough for many kills.
				before, life := stored(t, nc, "DLQ"), rand.IntN(20)
				eventually(t, "the operator has done some or ended", func() bool {
					select {
					case <-c.done:
						return true
					default:
						return before-stored(t, nc, "DLQ") > life
					}
				})
				select {
				case <-c.done:
					if c.err != nil {
						t.Fatal(c.err)
					}
					ended = true
				default:
					c.kill()
					kills++
				}
			}
			eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "billing") })
			billing.handled.wantOnce(t, count)
			if retention == jetstream.LimitsPolicy {
				eventually(t, "the other durable is done", func() bool { return settled(t, nc, "ORDERS", "audit") })
				audit.wantOnce(t, count)
			}
			if n := stored(t, nc, "DLQ"); n != 0 {
				t.Errorf("%d letters are left", n)
			}
			if kills < 3 {
				t.Errorf("killed only %d times", kills)
			}
			t.Logf("killed %d times", kills)
		})
	}
}
