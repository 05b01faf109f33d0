package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func digestOf(e Envelope) digest { return e.digest() }

func TestDigest(t *testing.T) {
	t.Parallel()
	at := time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC)
	e := To("a").Data([]byte("x"))
	for _, tt := range []struct {
		name string
		a, b Envelope
		same bool
	}{
		{"the same", e, To("a").Data([]byte("x")), true},
		{"no payload", To("a"), To("a").Data([]byte{}), true},
		{"subject", e, To("b").Data([]byte("x")), false},
		{"payload", e, To("a").Data([]byte("y")), false},
		{"moved border", To("a").Data([]byte("bx")), To("ab").Data([]byte("x")), false},
		{"header", e, e.Header("K", "v"), false},
		{"header value", e.Header("K", "v"), e.Header("K", "w"), false},
		{"header name", e.Header("K", "v"), e.Header("k", "v"), false},
		{"header order", e.Header("K", "v").Header("L", "w"), e.Header("L", "w").Header("K", "v"), true},
		{"value order", e.Header("K", "v").Header("K", "w"), e.Header("K", "w").Header("K", "v"), false},
		{"moved value", e.Header("K", "v").Header("L", ""), e.Header("K", "").Header("L", "v"), false},
		{"content type", To("a").JSON("x"), To("a").Data([]byte(`"x"`)), false},
		{"own content type", To("a").JSON("x"), To("a").Data([]byte(`"x"`)).Header("Content-Type", "application/json"), true},
		{"trace context", e.Header("traceparent", "1").Header("Tracestate", "1"), e.Header("traceparent", "2"), true},
		{"own correlation", e.Header("Correlation-Id", "1"), e.Header("Correlation-Id", "2"), false},
		{"expectations", e.ExpectLastSequence(1), e.ExpectLastSequence(2).ExpectStream("S"), true},
		{"TTL", e.TTL(time.Second), e.TTL(time.Minute), false},
		{"rounded TTL", e.TTL(1500 * time.Millisecond), e.TTL(2 * time.Second), true},
		{"delay or not", e, e.After(0), false},
		{"delay", e.After(time.Second), e.After(time.Second), true},
		{"other delay", e.After(time.Second), e.After(2 * time.Second), false},
		{"time", e.At(at), e.At(at.In(time.FixedZone("", 3600))), true},
		{"other time", e.At(at), e.At(at.Add(1)), false},
	} {
		if got := digestOf(tt.a) == digestOf(tt.b); got != tt.same {
			t.Errorf("%s: equal %t, want %t", tt.name, got, tt.same)
		}
	}
	batch := []Envelope{e, To("b")}
	for name, other := range map[string][]Envelope{
		"less": {e}, "another": {e, To("c")}, "order": {To("b"), e}, "own id": {e.MsgID("i"), To("b")},
	} {
		if batchDigest(batch) == batchDigest(other) {
			t.Errorf("%s: the batches count as equal", name)
		}
	}
	if batchDigest([]Envelope{e}) == digestOf(e) {
		t.Error("a batch of one counts as an envelope")
	}
}

// A number is given out once, unless it comes back, and the lowest first.
func TestNumbers(t *testing.T) {
	t.Parallel()
	a, b := digestOf(To("a")), digestOf(To("b"))
	m := &numbering{taken: make(map[digest]uint32)}
	for i, step := range []struct {
		of   digest
		back uint32 // given back, or else one is taken
		want uint32
	}{
		{a, 0, 1}, {a, 0, 2}, {b, 0, 1}, {a, 0, 3},
		{a, 1, 0}, {a, 2, 0}, {a, 0, 1}, {a, 0, 2}, {a, 0, 4}, // holes
		{a, 4, 0}, {a, 0, 4}, // the last
		{a, 4, 0}, {a, 3, 0}, {a, 0, 3}, {a, 0, 4}, {a, 0, 5},
		{a, 2, 0}, {a, 4, 0}, {a, 1, 0}, {a, 0, 1}, {a, 0, 2}, {a, 0, 4}, {a, 0, 6},
		{b, 0, 2},
	} {
		if step.back > 0 {
			m.giveBack(number{step.of, step.back})
		} else if got := m.take(step.of); got.n != step.want {
			t.Errorf("step %d: got %d, want %d", i, got.n, step.want)
		}
	}
}

// However many different envelopes a handler publishes, what is remembered is bounded,
// no number of one is given out twice, and in the same order they are the same.
func TestNumbersAreBounded(t *testing.T) {
	t.Parallel()
	of := func(i int) digest { return digestOf(To(fmt.Sprint("s.", i))) }
	run := func(n int) (*numbering, []uint32) {
		m := &numbering{taken: make(map[digest]uint32)}
		numbers := make([]uint32, n)
		for i := range n {
			numbers[i] = m.take(of(i)).n
		}
		return m, numbers
	}
	const n = maxExactNumbers + 3*numberBuckets
	m, first := run(n)
	if _, second := run(n); !slices.Equal(first, second) {
		t.Error("the same envelopes in the same order have other numbers")
	}
	if len(m.taken) > maxExactNumbers || len(m.beyond) > numberBuckets || len(m.free) > 0 {
		t.Errorf("%d exact, %d buckets, %d free", len(m.taken), len(m.beyond), len(m.free))
	}
	for _, i := range []int{0, maxExactNumbers - 1, maxExactNumbers, n - 1} {
		seen := map[uint32]bool{first[i]: true}
		for range 3 {
			again := m.take(of(i))
			if seen[again.n] {
				t.Errorf("envelope %d has number %d twice", i, again.n)
			}
			seen[again.n] = true
			m.giveBack(again)
			if got := m.take(of(i)); got != again {
				t.Errorf("envelope %d: got number %d once %d had come back", i, got.n, again.n)
			}
		}
	}
}

// handlerCase is what a message's handler publishes in its first run and in its second.
type handlerCase struct {
	name          string
	first, second func(ctx context.Context, pub *Publisher) error
	want          []string // the bodies that are stored then, sorted
}

func publishing(bodies ...string) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		for _, body := range bodies {
			if _, err := pub.Publish(ctx, To("s.x").Data([]byte(body))); err != nil {
				return err
			}
		}
		return nil
	}
}

func publishingAll(bodies ...string) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		_, err := pub.PublishAll(ctx, envelopesOf(bodies)...)
		return err
	}
}

func publishingAtomic(bodies ...string) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		_, err := pub.PublishAtomic(ctx, envelopesOf(bodies)...)
		return err
	}
}

func envelopesOf(bodies []string) (es []Envelope) {
	for _, body := range bodies {
		es = append(es, To("s.x").Data([]byte(body)))
	}
	return es
}

// atOnce publishes from as many goroutines, in whatever order.
func atOnce(bodies ...string) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		var wg sync.WaitGroup
		errs := make([]error, len(bodies))
		for _, i := range rand.Perm(len(bodies)) {
			wg.Go(func() { errs[i] = publishing(bodies[i])(ctx, pub) })
		}
		wg.Wait()
		return errors.Join(errs...)
	}
}

// refused fails for sure: no message is that large.
func refused(then func(context.Context, *Publisher) error) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		for _, e := range []Envelope{To("s.x").Data(make([]byte, 3_000)), To("s.x").Data([]byte("b")).ExpectLastSequence(1 << 40)} {
			if _, err := pub.Publish(ctx, e); err == nil {
				return errors.New("what should be refused is stored")
			}
			if _, err := pub.PublishAll(ctx, e, e); err == nil {
				return errors.New("what should be refused is stored")
			}
			if _, err := pub.PublishAtomic(ctx, e); err == nil {
				return errors.New("what should be refused is stored")
			}
		}
		return then(ctx, pub)
	}
}

// cutShort publishes all with a deadline that comes before the ack of the first, which
// is stored nevertheless.
func cutShort(bodies ...string) func(context.Context, *Publisher) error {
	return func(ctx context.Context, pub *Publisher) error {
		ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		if _, err := pub.PublishAll(ctx, lostFirst(bodies)...); !errors.Is(err, ErrTimeout) {
			return fmt.Errorf("got %w, want ErrTimeout", err)
		}
		return nil
	}
}

// lostFirst are envelopes of which the first has no ack at the first time.
func lostFirst(bodies []string) []Envelope {
	es := envelopesOf(bodies)
	es[0].subject = "lost.x"
	return es
}

// TestHandlerPublishesWhatItSays handles a message twice, as after a failure. What is
// stored is, of each envelope, the most that one run has stored.
func TestHandlerPublishesWhatItSays(t *testing.T) {
	t.Parallel()
	twoTries := func(then ...string) func(context.Context, *Publisher) error {
		return func(ctx context.Context, pub *Publisher) error {
			// The ack is lost, so that nobody knows whether the message is stored.
			lost, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			if _, err := pub.Publish(lost, To("lost.x").Data([]byte("a"))); err == nil {
				return errors.New("the ack was not lost")
			}
			if _, err := pub.Publish(ctx, To("lost.x").Data([]byte("a"))); err != nil {
				return err
			}
			return publishing(then...)(ctx, pub)
		}
	}
	lostBatch := func(ctx context.Context, pub *Publisher) error {
		es := []Envelope{To("lostbatch.x").Data([]byte("a")), To("lostbatch.x").Data([]byte("b"))}
		lost, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		if _, err := pub.PublishAtomic(lost, es...); err == nil {
			return errors.New("the ack was not lost")
		}
		ack, err := pub.PublishAtomic(ctx, es...)
		if err == nil && (!ack.Duplicate || ack.Sequence != 2) {
			err = fmt.Errorf("got %+v, want what the first try stored", ack)
		}
		return err
	}
	for _, tt := range []handlerCase{
		{"the same", publishing("a", "b"), publishing("a", "b"), []string{"a", "b"}},
		{"another branch", publishing("a"), publishing("b"), []string{"a", "b"}},
		{"another order", publishing("a", "b", "c"), publishing("c", "a", "b"), []string{"a", "b", "c"}},
		{"equal ones", publishing("a", "a"), publishing("a", "a"), []string{"a", "a"}},
		{"more equal ones", publishing("a", "a"), publishing("a", "b", "a", "a"), []string{"a", "a", "a", "b"}},
		{"less equal ones", publishing("a", "a", "a"), publishing("a"), []string{"a", "a", "a"}},
		{"all", publishingAll("a", "b", "a"), publishingAll("b", "a", "a", "c"), []string{"a", "a", "b", "c"}},
		{"one by one and all", publishing("a", "b"), publishingAll("b", "c", "a"), []string{"a", "b", "c"}},
		{"goroutines", atOnce("a", "b", "c", "d", "a", "a"), atOnce("a", "b", "c", "d", "a", "a", "e"), []string{"a", "a", "a", "b", "c", "d", "e"}},
		{"refused", refused(publishing("a", "b")), publishing("b", "a", "b"), []string{"a", "b", "b"}},
		{"refused again", refused(publishing("a")), refused(publishing("b", "a")), []string{"a", "b"}},
		{"cut short", cutShort("a", "b", "c"), func(ctx context.Context, pub *Publisher) error {
			es := lostFirst([]string{"a", "d", "c"})
			slices.Reverse(es)
			_, err := pub.PublishAll(ctx, es...)
			return err
		}, []string{"a", "b", "c", "d"}},
		{"batches", publishingAtomic("a", "b"), publishingAtomic("a", "b"), []string{"a", "b"}},
		{"another batch", publishingAtomic("a"), publishingAtomic("b"), []string{"a", "b"}},
		{"a batch with another message", publishingAtomic("a", "b"), publishingAtomic("a", "c"), []string{"a", "a", "b", "c"}},
		{"two tries of a batch", lostBatch, publishing("c"), []string{"a", "b", "c"}},
		{"two tries", twoTries("b"), publishing("c", "b"), []string{"a", "b", "c"}},
		{"two tries in the second run", publishing("b"), twoTries(), []string{"a", "b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t, withMaxPayload(3_000)).ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, MaxMsgSize: 2_500, AllowAtomicPublish: true})
			ackThief(t, nc, "lost.x", "s.lost", 1)
			ackThief(t, nc, "lostbatch.x", "s.lost", 2)
			pub := NewPublisher(nc)
			for i, run := range []func(context.Context, *Publisher) error{tt.first, tt.second} {
				if err := run(handling(testContext(t), nil), pub); err != nil {
					t.Errorf("run %d: %v", i+1, err)
				}
			}
			got := bodies(t, nc, "S")
			slices.Sort(got)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("stored (-want +got):\n%s", diff)
			}
		})
	}
}

// An envelope that was given up gives its number back once, and the next two are two.
func TestHandlerGoesOnAfterGivingUp(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	pub := NewPublisher(nc, WithPublisherJetStream(knownJS{JetStream: jetStream(t, nc), ask: func(context.Context) error { return nil }}))
	ctx := handling(testContext(t), nil)
	for name, store := range storing(pub) {
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		if err := store(short, To("s.x")); !errors.Is(err, ErrTimeout) {
			t.Errorf("%s without a stream: got %v, want ErrTimeout", name, err)
		}
		cancel()
	}
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	for seq := range uint64(3) {
		if ack, err := pub.Publish(ctx, To("s.x")); err != nil || !sameAck(ack, Ack{Stream: "S", Sequence: seq + 1}) {
			t.Errorf("got %+v, %v, want the next sequence", ack, err)
		}
	}
}

// Equal envelopes that expect one sequence after another are as many.
func TestHandlerStoresEqualEventsInTurn(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: replicas})
		pub := NewPublisher(nc)
		for run := range 2 {
			ctx := handling(testContext(t), nil)
			for seq := range uint64(3) {
				if run == 0 { // what is refused does not count
					if _, err := pub.Publish(ctx, To("s.x").ExpectLastSubjectSequence(77)); !errors.Is(err, ErrWrongSequence) {
						t.Errorf("got %v, want ErrWrongSequence", err)
					}
				}
				ack, err := pub.Publish(ctx, To("s.x").ExpectLastSubjectSequence(seq))
				if want := (Ack{Stream: "S", Sequence: seq + 1, Duplicate: run > 0}); err != nil || !sameAck(ack, want) {
					t.Errorf("run %d: got %+v, %v, want %+v", run+1, ack, err, want)
				}
			}
		}
		if n := stored(t, nc, "S"); n != 3 {
			t.Errorf("%d are stored, want 3", n)
		}
	})
}

// The headers that are carried over do not make another message.
func TestCarriedHeadersMakeNoDifference(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	for run, h := range []nats.Header{{"traceparent": {"1"}, "Correlation-Id": {"1"}}, {"traceparent": {"2"}}} {
		ack, err := NewPublisher(nc).Publish(handling(testContext(t), h), To("s.x"))
		if want := (Ack{Stream: "S", Sequence: 1, Duplicate: run > 0}); err != nil || !sameAck(ack, want) {
			t.Errorf("run %d: got %+v, %v, want %+v", run+1, ack, err, want)
		}
	}
}

// A delayed message has another due time in each run, and is one nevertheless, also
// when the duplicate window is over.
func TestHandlerDelaysOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>", "natsx-schedule.*.s.>"},
		AllowMsgSchedules: true, AllowRollup: true, Duplicates: 500 * time.Millisecond})
	pub := NewPublisher(nc)
	once := func(duplicate bool) {
		t.Helper()
		ctx := handling(testContext(t), nil)
		for range 2 { // equal ones in one run are two
			if ack, err := pub.Publish(ctx, To("s.x").After(time.Hour)); err != nil || ack.Duplicate && !duplicate {
				t.Errorf("got %+v, %v", ack, err)
			}
		}
		if n := stored(t, nc, "S"); n != 2 {
			t.Errorf("%d schedules, want 2", n)
		}
	}
	once(false)
	once(true)
	eventually(t, "the window is over", func() bool {
		ack, err := pub.Publish(testContext(t), To("s.y").MsgID("y"))
		return err == nil && !ack.Duplicate && ack.Sequence > 3
	})
	if err := s.Purge(testContext(t), jetstream.WithPurgeSubject("s.y")); err != nil {
		t.Fatal(err)
	}
	once(false)
}

// A durable that was deleted and made anew handles its messages again, and other
// envelopes than before are stored.
func TestRecreatedDurablePublishesAnew(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "IN", Subjects: []string{"in.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	pub := NewPublisher(nc)
	publish(t, nc, &nats.Msg{Subject: "in.x"})
	for _, version := range []string{"old", "new"} {
		done := make(chan error, 1)
		r := runBroker(t, NewBroker(nc), Route("in.*").Durable("d").Handle(func(ctx context.Context, m *Msg) error {
			done <- publishing("both", version)(ctx, pub)
			return nil
		}))
		if err := receive(t, done, "a handler"); err != nil {
			t.Error(err)
		}
		if err := r.stop(t); err != nil {
			t.Error(err)
		}
		if err := jetStream(t, nc).DeleteConsumer(testContext(t), "IN", "d"); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"both", "old", "new"}, bodies(t, nc, "S")); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
}

// The longest names still make an id that a stream takes.
func TestHandlerIDsFit(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	long := strings.Repeat("n", maxNameLength)
	ctx := handling(testContext(t), nil)
	deliveryFrom(ctx).msg.from = &origin{stream: long, durable: long, ctx: testContext(t)}
	if _, err := NewPublisher(nc).Publish(ctx, To("s.x")); err != nil {
		t.Fatal(err)
	}
	m, err := s.GetMsg(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	if id := m.Header.Get("Nats-Msg-Id"); len(id) > 2*maxNameLength+80 {
		t.Errorf("the id has %d bytes", len(id))
	}
}
