package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

// A price that expires leaves a marker, which only a route with Tombstones handles.
func ExampleRouteBuilder_Tombstones() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "PRICES", Subjects: []string{"prices.*"}, MaxMsgsPerSubject: 1,
		AllowMsgTTL: true, AllowRollup: true, SubjectDeleteMarkerTTL: time.Hour,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("prices.tea").Data([]byte("290")).TTL(time.Second)); err != nil {
		fmt.Println(err)
		return
	}
	err = natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("prices.*").Durable("cache").Tombstones().
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if why := m.Header.Get("Nats-Marker-Reason"); why != "" {
				fmt.Println(m.Subject, "is gone:", why)
				cancel()
				return nil
			}
			fmt.Printf("%s is %s\n", m.Subject, m.Data)
			return nil
		}))
	fmt.Println("stopped:", err)

	// Output:
	// prices.tea is 290
	// prices.tea is gone: MaxAge
	// stopped: <nil>
}

// exampleServer starts a nats-server for an example and connects to it.
func exampleServer() (nc *nats.Conn, stop func()) {
	url, stopServer, err := embedded.Run()
	if err != nil {
		panic(err)
	}
	nc, err = natsx.Connect(url)
	if err != nil {
		panic(err)
	}
	return nc, func() {
		nc.Close()
		stopServer()
	}
}

// quiet drops the expected failures from the tests' output.
var quiet = natsx.WithLogger(slog.New(slog.DiscardHandler))

type Order struct {
	ID    string
	Cents int
}

// A route handles the orders of a stream, once each, until the context ends.
func Example() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	bill := func(ctx context.Context, m *natsx.Msg) error {
		fmt.Printf("%s: %s, attempt %d\n", m.Subject, m.Data, m.Attempt())
		if m.Token(1) == "last" {
			cancel()
		}
		return nil
	}
	broker := natsx.NewBroker(nc, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"),
		natsx.Stream("DLQ").Subjects("dlq.*"),
	))
	go func() {
		<-broker.Ready()
		pub := natsx.NewPublisher(nc)
		pub.Publish(ctx, natsx.To("orders.first").Data([]byte("one coffee")))
		pub.Publish(ctx, natsx.To("orders.last").Data([]byte("two teas")))
	}()
	err := broker.Run(ctx,
		natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").Concurrency(1).Handle(bill),
	)
	fmt.Println("stopped:", err)

	// Output:
	// orders.first: one coffee, attempt 1
	// orders.last: two teas, attempt 1
	// stopped: <nil>
}

// A message that fails is retried after a delay. When its retries are used up, it is moved
// to the dead letter queue, which is a stream like any other.
func ExampleRouteBuilder_DLQ() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	bill := func(ctx context.Context, m *natsx.Msg) error {
		fmt.Println("attempt", m.Attempt())
		return errors.New("the card is declined")
	}
	alert := func(ctx context.Context, l natsx.DeadLetter) error {
		fmt.Printf("%s of %s is dead after %d attempts: %s: %s\n", l.Data, l.Subject, l.Attempts, l.Reason, l.Error)
		cancel()
		return nil
	}
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"),
		natsx.Stream("DLQ").Subjects("dlq.*"),
	))
	go func() {
		<-broker.Ready()
		natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created").Data([]byte("o-1")))
	}()
	err := broker.Run(ctx,
		natsx.Route("orders.*").Durable("billing").
			Retry(2).Backoff(10*time.Millisecond, time.Second).
			DLQ("dlq.orders").
			Handle(bill),
		natsx.Route("dlq.orders").Durable("alerts").Handle(natsx.OnDeadLetter(alert)),
	)
	fmt.Println("stopped:", err)

	// Output:
	// attempt 1
	// attempt 2
	// attempt 3
	// o-1 of orders.created is dead after 3 attempts: exhausted: the card is declined
	// stopped: <nil>
}

// A typed handler gets the decoded payload, and the message from its context.
func ExampleJSON() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	charge := func(ctx context.Context, o Order) error {
		fmt.Printf("%s: %d cents, from %s\n", o.ID, o.Cents, natsx.MsgFrom(ctx).Subject)
		cancel()
		return nil
	}
	broker := natsx.NewBroker(nc, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	go func() {
		<-broker.Ready()
		natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created").JSON(Order{ID: "o-1", Cents: 990}))
	}()
	err := broker.Run(ctx, natsx.Route("orders.*").Durable("billing").Handle(natsx.JSON(charge)))
	fmt.Println("stopped:", err)

	// Output:
	// o-1: 990 cents, from orders.created
	// stopped: <nil>
}

// outcomes prints the outcome of each attempt.
type outcomes struct {
	last string
	done func()
}

func (o outcomes) Observe(ctx context.Context, e natsx.Event) {
	fmt.Printf("%s, attempt %d: %s\n", e.Msg.Subject, e.Msg.Attempt(), e.Outcome)
	if e.Outcome == natsx.OutcomeSucceeded && e.Msg.Subject == o.last {
		o.done()
	}
}

// The result of a handler decides how its message is settled.
func ExampleHandler() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	bill := func(ctx context.Context, m *natsx.Msg) error {
		switch {
		case m.Token(1) == "cancelled":
			return natsx.Discard(errors.New("nobody wants it any more"))
		case m.Token(1) == "malformed":
			return natsx.Permanent(errors.New("has no items"))
		case m.Token(1) == "early" && m.Attempt() == 1:
			return natsx.RetryAfter(300*time.Millisecond, errors.New("not on sale yet"))
		}
		return nil
	}
	broker := natsx.NewBroker(nc, quiet,
		natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")),
		natsx.WithObserver(outcomes{last: "orders.early", done: cancel}),
	)
	go func() {
		<-broker.Ready()
		pub := natsx.NewPublisher(nc)
		for _, kind := range []string{"cancelled", "malformed", "good", "early"} {
			pub.Publish(ctx, natsx.To("orders."+kind))
		}
	}()
	err := broker.Run(ctx,
		natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").Concurrency(1).Handle(bill))
	fmt.Println("stopped:", err)

	// Output:
	// orders.cancelled, attempt 1: discarded
	// orders.malformed, attempt 1: dead
	// orders.good, attempt 1: succeeded
	// orders.early, attempt 1: retried
	// orders.early, attempt 2: succeeded
	// stopped: <nil>
}

type (
	PriceRequest struct{ Item string }
	Price        struct{ Cents int }
)

// A responder's error reaches the requester with its code. Without responders a request
// fails at once, not with a timeout.
func ExampleRequestJSON() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	price := func(ctx context.Context, q PriceRequest) (Price, error) {
		if q.Item != "coffee" {
			return Price{}, natsx.Fail(404, "no such item")
		}
		return Price{Cents: 290}, nil
	}
	broker := natsx.NewBroker(nc)
	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("prices.get").Queue("pricing").Reply(natsx.JSONReply(price)))
	}()
	<-broker.Ready()

	pub := natsx.NewPublisher(nc)
	p, err := natsx.RequestJSON[Price](ctx, pub, natsx.To("prices.get").JSON(PriceRequest{"coffee"}))
	fmt.Println(p.Cents, err)

	_, err = natsx.RequestJSON[Price](ctx, pub, natsx.To("prices.get").JSON(PriceRequest{"unicorn"}))
	var refused *natsx.ReplyError
	if errors.As(err, &refused) {
		fmt.Println(refused.Code, refused.Message)
	}
	_, err = pub.Request(ctx, natsx.To("prices.set"))
	fmt.Println(errors.Is(err, natsx.ErrNoResponders))

	cancel()
	fmt.Println("stopped:", <-stopped)

	// Output:
	// 290 <nil>
	// 404 no such item
	// true
	// stopped: <nil>
}

// When Run's context ends, running handlers go on with a live context, and their messages
// are settled before Run returns.
func ExampleBroker_Run_gracefulShutdown() {
	nc, stop := exampleServer()
	defer stop()
	ctx, interrupt := context.WithTimeout(context.Background(), time.Minute) // in a service: signal.NotifyContext
	defer interrupt()

	started := make(chan struct{})
	slow := func(ctx context.Context, m *natsx.Msg) error {
		close(started)
		select {
		case <-time.After(200 * time.Millisecond):
			fmt.Println("finished")
			return nil
		case <-ctx.Done(): // at the drain timeout
			return ctx.Err()
		}
	}
	broker := natsx.NewBroker(nc,
		natsx.WithStreams(natsx.Stream("JOBS").Subjects("jobs.*")),
		natsx.WithDrainTimeout(30*time.Second),
	)
	go func() {
		<-broker.Ready()
		natsx.NewPublisher(nc).Publish(ctx, natsx.To("jobs.new"))
		<-started
		fmt.Println("interrupted")
		interrupt()
	}()
	err := broker.Run(ctx, natsx.Route("jobs.*").Durable("worker").Handle(slow))
	fmt.Println("stopped:", err)
	fmt.Println("handled:", broker.Stats().Routes[0].Succeeded)

	// Output:
	// interrupted
	// finished
	// stopped: <nil>
	// handled: 1
}
