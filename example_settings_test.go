package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

// begin runs specs until end is called, which prints how Run ended.
func begin(broker *natsx.Broker, specs ...natsx.Spec) (end func()) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	stopped := make(chan error, 1)
	go func() { stopped <- broker.Run(ctx, specs...) }()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		stopped <- err
	}
	return func() {
		cancel()
		fmt.Println("stopped:", <-stopped)
	}
}

// A new durable starts where its route says. One that exists goes on where it is.
func ExampleRouteBuilder_DeliverNew() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 5*time.Millisecond) // 1 ann, 2 bob, 3 ann, 4 ann, 5 bob, 6 ann
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	fourth, err := js.Stream(ctx, "BOOKINGS")
	if err != nil {
		fmt.Println(err)
		return
	}
	stored, err := fourth.GetMsg(ctx, 4)
	if err != nil {
		fmt.Println(err)
		return
	}

	var mu sync.Mutex
	got := map[string][]uint64{}
	handle := func(ctx context.Context, m *natsx.Msg) error {
		mu.Lock()
		defer mu.Unlock()
		got[m.Durable()] = append(got[m.Durable()], m.Sequence())
		return nil
	}
	route := natsx.Route("bookings.*").Stream("BOOKINGS").Concurrency(1)
	end := begin(natsx.NewBroker(nc, quiet),
		route.Durable("all").Handle(handle),
		route.Durable("new").DeliverNew().Handle(handle),
		route.Durable("last").DeliverLast().Handle(handle),
		route.Durable("last-per-subject").DeliverLastPerSubject().Handle(handle),
		route.Durable("from-sequence").DeliverFromSequence(3).Handle(handle),
		route.Durable("from-time").DeliverFromTime(stored.Time).Handle(handle),
	)
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("bookings.carol")); err != nil { // 7
		fmt.Println(err)
	}
	for {
		mu.Lock()
		done := len(got) == 6 && !slices.ContainsFunc(slices.Collect(maps.Values(got)), func(of []uint64) bool { return of[len(of)-1] != 7 })
		mu.Unlock()
		if done {
			break
		}
		time.Sleep(time.Millisecond)
	}
	end()
	for _, durable := range slices.Sorted(maps.Keys(got)) {
		fmt.Println(durable, got[durable])
	}

	// Output:
	// stopped: <nil>
	// all [1 2 3 4 5 6 7]
	// from-sequence [3 4 5 6 7]
	// from-time [4 5 6 7]
	// last [6 7]
	// last-per-subject [5 6 7]
	// new [7]
}

// Timeout bounds one attempt. AckWait is how soon the message of a process that died is
// delivered again, MaxAckPending how many may be unsettled at once, and ConfirmAcks has
// the server confirm each ack.
func ExampleRouteBuilder_Timeout() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))

	done := make(chan struct{})
	end := begin(broker, natsx.Route("orders.*").Durable("billing").
		Timeout(50*time.Millisecond).AckWait(10*time.Second).MaxAckPending(1000).ConfirmAcks().Backoff(time.Millisecond, time.Second).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if m.Attempt() == 1 {
				<-ctx.Done() // a bank that does not answer
				fmt.Println(ctx.Err())
				return ctx.Err()
			}
			fmt.Println("attempt", m.Attempt(), "of", m.Stream(), "stored within a minute:", time.Since(m.Time()) < time.Minute)
			close(done)
			return nil
		}))
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created")); err != nil {
		fmt.Println(err)
	}
	<-done
	end()

	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	durable, err := js.Consumer(ctx, "ORDERS", "billing")
	if err != nil {
		fmt.Println(err)
		return
	}
	c := durable.CachedInfo().Config
	fmt.Println(c.AckWait, c.MaxAckPending, c.MaxDeliver)

	// Output:
	// context deadline exceeded
	// attempt 2 of ORDERS stored within a minute: true
	// stopped: <nil>
	// 10s 1000 -1
}

// A batch handler gets several messages at once, for one insert in place of many. A
// BatchError tells the results apart: the others have succeeded.
func ExampleRouteBuilder_HandleBatch() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")))
	pub := natsx.NewPublisher(nc)
	if err := natsx.Stream("ORDERS").Subjects("orders.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	var es []natsx.Envelope
	for _, cents := range []int{100, 0, 300} {
		es = append(es, natsx.To("orders.created").JSON(Order{ID: fmt.Sprint("o-", cents), Cents: cents}))
	}
	if _, err := pub.PublishAll(ctx, es...); err != nil {
		fmt.Println(err)
	}

	end := begin(broker, natsx.Route("orders.*").Durable("insert").Retry(2).DLQ("dlq.orders").Batch(3, time.Second).
		HandleBatch(natsx.JSONBatch(func(ctx context.Context, orders []Order) error {
			failed := natsx.BatchError{}
			for i, o := range orders {
				if o.Cents == 0 {
					failed[i] = natsx.Permanent(errors.New("nothing to pay"))
				}
			}
			fmt.Println(len(orders), "at once,", len(failed), "refused")
			return failed
		})))
	for broker.Stats().Routes[0].Succeeded < 2 || broker.Stats().Routes[0].Dead < 1 {
		time.Sleep(time.Millisecond)
	}
	end()

	// Output:
	// 3 at once, 1 refused
	// stopped: <nil>
}

// A batch of another encoding.
func ExampleDecodeBatch() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	done := make(chan struct{})
	end := begin(broker, natsx.Route("orders.*").Durable("insert").Batch(10, 10*time.Millisecond).
		HandleBatch(natsx.DecodeBatch(gobCodec{}, func(ctx context.Context, orders []Order) error {
			fmt.Println(orders[0].ID)
			close(done)
			return nil
		})))
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created").Encode(gobCodec{}, Order{ID: "o-1"})); err != nil {
		fmt.Println(err)
	}
	<-done
	end()

	// Output:
	// o-1
	// stopped: <nil>
}

// breakers prints when a breaker opens first, and when it closes.
type breakers struct {
	opened sync.Once
	closed chan struct{}
}

func (*breakers) Observe(context.Context, natsx.Event) {}

func (b *breakers) ObserveBreaker(e natsx.BreakerEvent) {
	if e.State == natsx.BreakerClosed {
		fmt.Println(e.Durable, "closed")
		close(b.closed)
		return
	}
	b.opened.Do(func() { fmt.Println(e.Durable, "open:", e.Err) })
}

// While what the handlers need is out of order, a route with a breaker rests, and uses
// up no attempts.
func ExampleRouteBuilder_Breaker() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	closed := make(chan struct{})
	broker := natsx.NewBroker(nc, quiet, natsx.WithObserver(&breakers{closed: closed}),
		natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")))
	calls := 0
	end := begin(broker, natsx.Route("orders.*").Durable("billing").Concurrency(1).
		Retry(3).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.orders").Breaker(2, 20*time.Millisecond).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if calls++; calls < 10 {
				return errors.New("the bank is closed")
			}
			return nil
		}))
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created")); err != nil {
		fmt.Println(err)
	}
	<-closed
	fmt.Println("dead:", broker.Stats().Routes[0].Dead)
	end()

	// Output:
	// billing open: the bank is closed
	// billing closed
	// dead: 0
	// stopped: <nil>
}

// What a provider allows is kept to, whatever waits.
func ExampleRouteBuilder_Rate() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("MAILS").Subjects("mails.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	es := slices.Repeat([]natsx.Envelope{natsx.To("mails.new")}, 10)
	if _, err := natsx.NewPublisher(nc).PublishAll(ctx, es...); err != nil {
		fmt.Println(err)
	}
	broker := natsx.NewBroker(nc, quiet)
	begun := time.Now()
	end := begin(broker, natsx.Route("mails.*").Durable("mailer").Rate(50).
		Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	for broker.Stats().Routes[0].Succeeded < 10 {
		time.Sleep(time.Millisecond)
	}
	// At most five at once, and the rest 20 ms apart.
	fmt.Println("ten took at least 80 ms:", time.Since(begun) >= 80*time.Millisecond)
	end()

	// Output:
	// ten took at least 80 ms: true
	// stopped: <nil>
}

// Middleware wraps every handler. What of an error must not be stored is kept out of the
// dead letter, and what is logged goes to a logger of one's own.
func ExampleWithMiddleware() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()

	timed := func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			err := next(ctx, m)
			fmt.Printf("%s: %v\n", m.Subject, err)
			return err
		}
	}
	log := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		Level: slog.LevelError, // nothing of what this example does
	}))
	broker := natsx.NewBroker(nc,
		natsx.WithMiddleware(timed),
		natsx.WithLogger(log),
		natsx.WithErrorText(func(err error) string { return strings.ReplaceAll(err.Error(), "4111-1111", "xxxx") }),
		natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")),
	)
	end := begin(broker, natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			return natsx.Permanent(errors.New("card 4111-1111 is declined"))
		}))
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created")); err != nil {
		fmt.Println(err)
	}
	for broker.Stats().Routes[0].Dead == 0 {
		time.Sleep(time.Millisecond)
	}
	end()
	for l, err := range natsx.DeadLetters("dlq.orders").List(ctx, nc) {
		fmt.Println(l.Error, err)
	}

	// Output:
	// orders.created: card 4111-1111 is declined
	// stopped: <nil>
	// card xxxx is declined <nil>
}

// A JetStream of a domain, such as that of a hub behind a leaf node, is named for each
// part that asks it.
func ExampleWithJetStream() {
	s, stopServer, err := embedded.Start(func(o *server.Options) { o.JetStreamDomain = "hub" })
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stopServer()
	nc, err := natsx.Connect(s.ClientURL())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer nc.Close()
	ctx := context.Background()
	js, err := jetstream.NewWithDomain(nc, "hub")
	if err != nil {
		fmt.Println(err)
		return
	}

	broker := natsx.NewBroker(nc, quiet, natsx.WithJetStream(js),
		natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")))
	end := begin(broker, natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").
		Handle(func(ctx context.Context, m *natsx.Msg) error { return natsx.Permanent(errors.New("never")) }))
	pub := natsx.NewPublisher(nc, natsx.WithPublisherJetStream(js))
	if _, err := pub.Publish(ctx, natsx.To("orders.created")); err != nil {
		fmt.Println(err)
	}
	for broker.Stats().Routes[0].Dead == 0 {
		time.Sleep(time.Millisecond)
	}
	end()
	audit := natsx.Stream("AUDIT").Subjects("audit.*")
	fmt.Println(audit.Domain("hub").Ensure(ctx, nc), audit.APIPrefix("$JS.hub.API").Ensure(ctx, nc))
	letters := natsx.DeadLetters("dlq.orders")
	for _, there := range []natsx.DeadLetterQuery{letters.Domain("hub"), letters.APIPrefix("$JS.hub.API")} {
		count, err := there.Count(ctx, nc)
		fmt.Println(count.Total, err)
	}
	_, err = pub.Publish(ctx, natsx.To("order.created")) // a slip of the pen
	fmt.Println(errors.Is(err, natsx.ErrNoStream))

	// Output:
	// stopped: <nil>
	// <nil> <nil>
	// 1 <nil>
	// 1 <nil>
	// true
}

// All that a stream can be told.
func ExampleStream() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	made := func(s natsx.StreamSpec, name string) jetstream.StreamConfig {
		if err := s.Ensure(ctx, nc); err != nil {
			fmt.Println(err)
		}
		stream, err := js.Stream(ctx, name)
		if err != nil {
			fmt.Println(err)
			return jetstream.StreamConfig{}
		}
		return stream.CachedInfo().Config
	}

	orders := made(natsx.Stream("ORDERS").Subjects("orders.>").
		Description("what was ordered").
		Storage(jetstream.FileStorage).Compression(jetstream.S2Compression).Replicas(1).
		MaxAge(30*24*time.Hour).MaxBytes(10<<30).MaxMsgs(1_000_000).MaxMsgSize(64<<10).
		DedupWindow(10*time.Minute).
		AllowDirect().AllowAtomicPublish().AllowBatchPublish().AllowMsgTTL(), "ORDERS")
	fmt.Println(orders.Subjects, orders.Description, orders.Compression, orders.Duplicates)
	fmt.Println(orders.MaxAge, orders.MaxBytes, orders.MaxMsgs, orders.MaxMsgSize)

	// A ledger that nobody can shorten, and refuses what does not fit.
	ledger := made(natsx.Stream("LEDGER").Subjects("ledger.*").DenyDelete().DenyPurge().Discard(jetstream.DiscardNew), "LEDGER")
	fmt.Println(ledger.DenyDelete, ledger.DenyPurge, ledger.Discard)

	// The last state of each customer, and publishes for later.
	state := made(natsx.Stream("STATE").Subjects("state.*").MaxMsgsPerSubject(1).AllowRollup().AllowMsgSchedules(), "STATE")
	fmt.Println(state.MaxMsgsPerSubject, state.AllowRollup, state.AllowMsgSchedules)

	// Jobs that are gone when they are done.
	jobs := made(natsx.Stream("JOBS").Subjects("jobs.*").Retention(jetstream.WorkQueuePolicy), "JOBS")
	fmt.Println(jobs.Retention)

	// Output:
	// [orders.>] what was ordered S2 10m0s
	// 720h0m0s 10737418240 1000000 65536
	// true true DiscardNew
	// 1 true true
	// WorkQueue
}

// Two durables of a work queue cannot want the same messages.
func ExampleBroker_Validate() {
	handle := func(ctx context.Context, m *natsx.Msg) error { return nil }
	nc, stop := exampleServer()
	defer stop()
	broker := natsx.NewBroker(nc, natsx.WithStreams(
		natsx.Stream("JOBS").Subjects("jobs.*").Retention(jetstream.WorkQueuePolicy)))
	fmt.Println(broker.Validate(
		natsx.Route("jobs.*").Durable("worker").Handle(handle),
		natsx.Route("jobs.mail").Durable("mailer").Handle(handle),
	))
	fmt.Println(natsx.Route("jobs.*").Durable("worker").Timeout(-time.Second).Handle(handle).Validate())

	// Output:
	// natsx: route "jobs.mail" durable "mailer": subject "jobs.mail": overlaps with "jobs.*" of the durable "worker", and the work-queue stream "JOBS" gives each message to one durable
	// natsx: route "jobs.*" durable "worker": timeout -1s: must be above zero
}

// What a durable route does with an error, for the test of a handler.
func ExampleOutcomeOf() {
	declined := errors.New("the card is declined")
	fmt.Println(natsx.OutcomeOf(nil))
	fmt.Println(natsx.OutcomeOf(declined))
	fmt.Println(natsx.OutcomeOf(natsx.Permanent(declined)))
	fmt.Println(natsx.OutcomeOf(fmt.Errorf("bill o-1: %w", natsx.Discard(declined))))

	// Output:
	// succeeded
	// retried
	// dead
	// discarded
}

// A typed handler of another encoding, and the JSON one that is the default.
func ExampleDecode() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	handled := make(chan Order)
	charge := func(ctx context.Context, o Order) error {
		handled <- o
		return nil
	}
	end := begin(natsx.NewBroker(nc, quiet),
		natsx.Route("orders.gob").Handle(natsx.Decode(gobCodec{}, charge)),
		natsx.Route("orders.json").Handle(natsx.Decode(natsx.JSONCodec{}, charge)))
	pub := natsx.NewPublisher(nc)
	for _, e := range []natsx.Envelope{
		natsx.To("orders.gob").Encode(gobCodec{}, Order{ID: "o-1"}),
		natsx.To("orders.json").JSON(Order{ID: "o-2"}),
	} {
		if err := pub.Send(ctx, e); err != nil { // core NATS: at most once
			fmt.Println(err)
		}
		fmt.Println((<-handled).ID)
	}
	end()

	var codec natsx.JSONCodec
	data, err := codec.Marshal(Order{ID: "o-3"})
	fmt.Println(string(data), codec.ContentType(), err)
	var o Order
	fmt.Println(codec.Unmarshal(data, &o), o.ID)

	// Output:
	// o-1
	// o-2
	// stopped: <nil>
	// {"ID":"o-3","Cents":0} application/json <nil>
	// <nil> o-3
}

// A responder may send headers with its answer. A middleware sees requests and messages.
func ExampleMsg_ReplyHeader() {
	nc, stop := exampleServer()
	defer stop()
	logged := natsx.WithMiddleware(func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println("request:", m.IsRequest())
			return next(ctx, m)
		}
	})
	end := begin(natsx.NewBroker(nc, quiet, logged), natsx.Route("prices.get").Queue("pricing").
		Reply(func(ctx context.Context, m *natsx.Msg) ([]byte, error) {
			m.ReplyHeader().Set("Currency", "EUR")
			return []byte("290"), nil
		}))
	answer, err := natsx.NewPublisher(nc).Request(context.Background(), natsx.To("prices.get"))
	if err == nil {
		fmt.Printf("%s %s\n", answer.Data, answer.Header.Get("Currency"))
	}
	end()

	// Output:
	// request: true
	// 290 EUR
	// stopped: <nil>
}

// What a publish expects of its stream is checked when it is stored.
func ExampleEnvelope_ExpectLastSequence() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()
	pub := natsx.NewPublisher(nc)

	first := natsx.To("orders.created").MsgID("o-1").Data([]byte("one coffee")).Header("Region", "eu").ExpectStream("ORDERS").ExpectLastSequence(0)
	fmt.Println(first.ID(), first.Size(), "bytes")
	ack, err := pub.Publish(ctx, first)
	fmt.Println(ack.Stream, ack.Sequence, err)
	_, err = pub.Publish(ctx, natsx.To("orders.created").ExpectLastSequence(0))
	var late *natsx.SequenceError
	fmt.Println(errors.As(err, &late), errors.Is(err, natsx.ErrWrongSequence))

	// Output:
	// o-1 10 bytes
	// ORDERS 1 <nil>
	// true true
}

// Many messages that may be stored twice when an ack is lost, as fast as the server
// takes them.
func ExampleWithFastIngest() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("READINGS").Subjects("readings.*").AllowBatchPublish().Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	es := make([]natsx.Envelope, 1000)
	for i := range es {
		es[i] = natsx.To("readings.roof").Data(fmt.Append(nil, i))
	}
	acks, err := natsx.NewPublisher(nc, natsx.WithFastIngest(), natsx.WithoutMessageIDs()).PublishAll(ctx, es...)
	fmt.Println(len(acks), acks[0].Stream, err)

	// Output:
	// 1000 READINGS <nil>
}

// A part of a stream is replayed: of one that is named, up to a time.
func ExampleReplayBuilder_UntilTime() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)
	report, err := natsx.NewBroker(nc).Replay(ctx,
		natsx.Replay("bookings.*").Stream("BOOKINGS").UntilTime(time.Now()).Timeout(time.Second).
			OrderedBy(natsx.SubjectKey()).Concurrency(4). // or HeaderKey("Customer")
			Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	fmt.Println(report.Handled, err)

	// Output:
	// 6 <nil>
}

// The messages of one customer are handled in their order, also when one of them is
// retried; those of others go on.
func ExampleRouteBuilder_OrderedBy() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("BOOKINGS").Subjects("bookings.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	for _, b := range []string{"ann 1", "bob 1", "ann 2", "bob 2"} {
		customer, _, _ := strings.Cut(b, " ")
		if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("bookings."+customer).Data([]byte(b))); err != nil {
			fmt.Println(err)
		}
	}

	var mu sync.Mutex
	booked := map[string][]string{}
	broker := natsx.NewBroker(nc, quiet)
	end := begin(broker, natsx.Route("bookings.*").Durable("ledger").OrderedBy(natsx.SubjectToken(1)).Backoff(time.Millisecond, time.Second).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if string(m.Data) == "ann 1" && m.Attempt() < 3 {
				return errors.New("the ledger is locked")
			}
			mu.Lock()
			defer mu.Unlock()
			booked[m.Token(1)] = append(booked[m.Token(1)], string(m.Data))
			return nil
		}))
	for broker.Stats().Routes[0].Succeeded < 4 {
		time.Sleep(time.Millisecond)
	}
	end()
	fmt.Println(booked["ann"], booked["bob"])

	// Output:
	// stopped: <nil>
	// [ann 1 ann 2] [bob 1 bob 2]
}

// The key of an order may be the subject, a token of it, or a header.
func ExampleOrderKey() {
	fmt.Println(natsx.SubjectKey(), natsx.SubjectToken(1), natsx.HeaderKey("Customer"))

	// Output:
	// SubjectKey() SubjectToken(1) HeaderKey("Customer")
}

// The text of a token comes back as it was.
func ExampleUnescapeToken() {
	token := natsx.EscapeToken("ann@example.com")
	text, err := natsx.UnescapeToken(token)
	fmt.Println(text, err)
	_, err = natsx.UnescapeToken("ann=example")
	fmt.Println(errors.Is(err, natsx.ErrInvalidSubject))

	// Output:
	// ann@example.com <nil>
	// true
}
