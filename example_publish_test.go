package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// ordersServer runs a server of its own with the stream ORDERS.
func ordersServer() (nc *nats.Conn, stop func()) {
	dir, err := os.MkdirTemp("", "natsx-example")
	if err != nil {
		log.Fatal(err)
	}
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true,
	})
	if err != nil {
		log.Fatal(err)
	}
	s.Start()
	if nc, err = natsx.Connect(s.ClientURL()); err != nil {
		log.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := js.CreateStream(context.Background(), jetstream.StreamConfig{
		Name:     "ORDERS",
		Subjects: []string{"orders.>", "natsx-schedule.*.orders.>"},
		// What some of the examples need.
		AllowAtomicPublish: true, AllowMsgSchedules: true, AllowMsgTTL: true,
	}); err != nil {
		log.Fatal(err)
	}
	return nc, func() {
		nc.Close()
		s.Shutdown()
		s.WaitForShutdown()
		os.RemoveAll(dir)
	}
}

type order struct {
	ID    string `json:"id"`
	Total int    `json:"total"`
}

// A stream stores a message id once within its duplicate window, no matter how
// often and from where it is published.
func ExamplePublisher_Publish_deduplication() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()

	pub := natsx.NewPublisher(nc)
	for range 2 {
		ack, err := pub.Publish(ctx, natsx.To("orders.created").MsgID("o-42").JSON(order{ID: "o-42", Total: 12}))
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(ack.Stream, ack.Sequence, ack.Duplicate)
	}
	// Output:
	// ORDERS 1 false
	// ORDERS 1 true
}

// What a handler has stored is not stored again when its message is handled again, and
// what it stores then for the first time is. The envelopes have no message ids of their
// own: they are made of the handled message.
func ExamplePublisher_Publish_handler() {
	nc, stop := ordersServer()
	defer stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	pub := natsx.NewPublisher(nc)
	if _, err := pub.Publish(ctx, natsx.To("orders.created").JSON(order{ID: "o-42"})); err != nil {
		fmt.Println(err)
		return
	}
	charge := func(ctx context.Context, m *natsx.Msg) error {
		steps := []string{"orders.reserved", "orders.paid"}
		for _, step := range steps[:m.Attempt()] {
			ack, err := pub.Publish(ctx, natsx.To(step).Data(m.Data))
			if err != nil {
				return err
			}
			fmt.Println(m.Attempt(), step, ack.Sequence, ack.Duplicate)
		}
		if m.Attempt() == 1 {
			return errors.New("the payment is down")
		}
		cancel()
		return nil
	}
	err := natsx.NewBroker(nc, quiet).Run(ctx,
		natsx.Route("orders.created").Durable("billing").Retry(3).Backoff(time.Millisecond, time.Second).Handle(charge))
	fmt.Println(err)
	// Output:
	// 1 orders.reserved 2 false
	// 2 orders.reserved 2 true
	// 2 orders.paid 3 false
	// <nil>
}

// A subject that no stream captures is told at once.
func ExamplePublisher_Publish_noStream() {
	nc, stop := ordersServer()
	defer stop()

	_, err := natsx.NewPublisher(nc).Publish(context.Background(), natsx.To("order.created"))
	fmt.Println(errors.Is(err, natsx.ErrNoStream))
	fmt.Println(err)
	// Output:
	// true
	// natsx: publish to "order.created": no stream captures the subject
}

// Two writers that have read the same state cannot both write: the second is told
// what it has missed.
func ExampleEnvelope_ExpectLastSubjectSequence() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()

	pub := natsx.NewPublisher(nc)
	created, err := pub.Publish(ctx, natsx.To("orders.o-42").Data([]byte("created")).ExpectLastSubjectSequence(0))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, event := range []string{"paid", "cancelled"} {
		_, err := pub.Publish(ctx, natsx.To("orders.o-42").Data([]byte(event)).ExpectLastSubjectSequence(created.Sequence))
		var wrong *natsx.SequenceError
		switch {
		case errors.As(err, &wrong):
			fmt.Printf("%s: somebody wrote number %d first\n", event, wrong.Have)
		case err != nil:
			fmt.Println(err)
		default:
			fmt.Printf("%s: stored\n", event)
		}
	}
	// Output:
	// paid: stored
	// cancelled: somebody wrote number 2 first
}

// A writer that was overtaken reads anew and tries again.
func ExampleEnvelope_ExpectLastSubjectSequence_readAnew() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	stream, err := js.Stream(ctx, "ORDERS")
	if err != nil {
		fmt.Println(err)
		return
	}

	pub := natsx.NewPublisher(nc)
	write := func(total string) (natsx.Ack, error) {
		return pub.Publish(ctx, natsx.To("orders.o-42").Data([]byte(total)))
	}
	add := func(n int, meanwhile func()) error {
		for {
			last, err := stream.GetLastMsgForSubject(ctx, "orders.o-42")
			if err != nil {
				return err
			}
			total, err := strconv.Atoi(string(last.Data))
			if err != nil {
				return err
			}
			meanwhile()
			_, err = pub.Publish(ctx, natsx.To("orders.o-42").JSON(total+n).ExpectLastSubjectSequence(last.Sequence))
			if !errors.Is(err, natsx.ErrWrongSequence) {
				fmt.Println(total, "+", n, "is stored:", err == nil)
				return err
			}
			fmt.Println(total, "is old")
		}
	}
	if _, err := write("10"); err != nil {
		fmt.Println(err)
		return
	}
	overtake := sync.OnceFunc(func() { write("20") })
	if err := add(5, overtake); err != nil {
		fmt.Println(err)
	}
	// Output:
	// 10 is old
	// 20 + 5 is stored: true
}

// The failure of one envelope does not hide the others.
func ExamplePublisher_PublishAll() {
	nc, stop := ordersServer()
	defer stop()

	acks, err := natsx.NewPublisher(nc).PublishAll(context.Background(),
		natsx.To("orders.created").JSON(order{ID: "o-1"}),
		natsx.To("orders.*").JSON(order{ID: "o-2"}),
		natsx.To("orders.created").JSON(order{ID: "o-3"}),
	)
	var failed *natsx.PublishError
	if err != nil && !errors.As(err, &failed) {
		fmt.Println(err)
		return
	}
	for i, ack := range acks {
		if failed != nil && failed.Errors[i] != nil {
			fmt.Println(i, failed.Errors[i])
			continue
		}
		fmt.Println(i, ack.Stream, ack.Sequence)
	}
	// Output:
	// 0 ORDERS 1
	// 1 natsx: publish to "orders.*": the subject has a wildcard
	// 2 ORDERS 2
}

// An order and its items are stored together or not at all.
func ExamplePublisher_PublishAtomic() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()

	pub := natsx.NewPublisher(nc)
	write := func(id string) {
		ack, err := pub.PublishAtomic(ctx,
			natsx.To("orders.head").JSON(order{ID: id}).ExpectLastSubjectSequence(0),
			natsx.To("orders.item").Data([]byte("apples")),
			natsx.To("orders.item").Data([]byte("pears")),
		)
		fmt.Println(ack.Sequence, errors.Is(err, natsx.ErrWrongSequence))
	}
	write("o-1")
	write("o-2") // expects to be the first, and leaves no items behind
	// Output:
	// 3 false
	// 0 true
}

// A reminder comes by itself. Until then the stream keeps it on a subject of its
// own, which it has to capture: natsx-schedule.*.orders.> here.
func ExampleEnvelope_After() {
	nc, stop := ordersServer()
	defer stop()
	ctx := context.Background()

	pub := natsx.NewPublisher(nc)
	if _, err := pub.Publish(ctx, natsx.To("orders.reminder").After(50*time.Millisecond).Data([]byte("o-42 is unpaid"))); err != nil {
		fmt.Println(err)
		return
	}
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	orders, err := js.OrderedConsumer(ctx, "ORDERS", jetstream.OrderedConsumerConfig{FilterSubjects: []string{"orders.>"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	m, err := orders.Next()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s: %s\n", m.Subject(), m.Data())
	// Output: orders.reminder: o-42 is unpaid
}

// An offer that comes at a time and is gone an hour after it came.
func ExampleEnvelope_TTL() {
	nc, stop := ordersServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	pub := natsx.NewPublisher(nc)
	offer := natsx.To("orders.offer").Data([]byte("apples")).TTL(time.Hour)
	if _, err := pub.Publish(ctx, offer.At(time.Now().Add(50*time.Millisecond))); err != nil {
		fmt.Println(err)
		return
	}
	err := natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("orders.offer").Durable("shop").
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println(m.Subject, string(m.Data), m.Header.Get("Nats-TTL"))
			cancel()
			return nil
		}))
	fmt.Println("stopped:", err)

	ctx = context.Background()
	if err := natsx.Stream("PLAIN").Subjects("plain.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
		return
	}
	_, err = pub.Publish(ctx, natsx.To("plain.offer").TTL(time.Hour))
	fmt.Println(errors.Is(err, natsx.ErrTTLNotAllowed))
	// Output:
	// orders.offer apples 3600s
	// stopped: <nil>
	// true
}

// A requester learns what went wrong, from any responder that speaks the protocol
// of NATS micro.
func ExamplePublisher_Request_errors() {
	nc, stop := ordersServer()
	defer stop()
	if _, err := nc.Subscribe("prices.get", func(m *nats.Msg) {
		m.RespondMsg(&nats.Msg{Header: nats.Header{
			"Nats-Service-Error-Code": {"404"},
			"Nats-Service-Error":      {"no such article"},
		}})
	}); err != nil {
		fmt.Println(err)
		return
	}

	pub := natsx.NewPublisher(nc)
	for _, subject := range []string{"prices.get", "prices.set"} {
		_, err := pub.Request(context.Background(), natsx.To(subject).Data([]byte("apples")))
		var reply *natsx.ReplyError
		switch {
		case errors.As(err, &reply):
			fmt.Println("answered:", reply.Code, reply.Message)
		case errors.Is(err, natsx.ErrNoResponders):
			fmt.Println("nobody is there")
		case errors.Is(err, natsx.ErrTimeout):
			fmt.Println("nobody answered in time")
		default:
			fmt.Println(err)
		}
	}
	// Output:
	// answered: 404 no such article
	// nobody is there
}

// Everybody who listens answers; the caller breaks when it has enough.
func ExamplePublisher_RequestMany() {
	nc, stop := ordersServer()
	defer stop()
	for range 3 {
		if _, err := nc.Subscribe("stock.get", func(m *nats.Msg) { m.Respond([]byte("7")) }); err != nil {
			fmt.Println(err)
			return
		}
	}

	answers := 0
	for m, err := range natsx.NewPublisher(nc).RequestMany(context.Background(), natsx.To("stock.get")) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s in stock\n", m.Data)
		if answers++; answers == 3 {
			break
		}
	}
	// Output:
	// 7 in stock
	// 7 in stock
	// 7 in stock
}

// Any text becomes one token of a subject.
func ExampleEscapeToken() {
	fmt.Println("users." + natsx.EscapeToken("ann@example.com"))
	// Output: users.ann=40example=2Ecom
}

// A middleware sees what a publisher is asked for and what comes of it, and adds a header
// that an envelope may overrule.
func ExampleWithPublishMiddleware() {
	nc, stop := ordersServer()
	defer stop()
	pub := natsx.NewPublisher(nc, natsx.WithPublishMiddleware(func(next natsx.PublishFunc) natsx.PublishFunc {
		return func(ctx context.Context, c *natsx.PublishCall) error {
			c.Carried["Tenant"] = []string{"acme"}
			err := next(ctx, c)
			fmt.Println(c.Operation, c.Envelopes[0].Subject(), c.Acks, err)
			return err
		}
	}))
	pub.Publish(context.Background(), natsx.To("orders.created").JSON(order{ID: "o-1"}))
	pub.Send(context.Background(), natsx.To("news"))

	// Output:
	// publish orders.created [{ORDERS 1 false}] <nil>
	// send news [] <nil>
}
