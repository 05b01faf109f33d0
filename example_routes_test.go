package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/natsx/natsx"
)

// Of two processes one gets all messages, and the other takes over when it ends.
func ExampleRouteBuilder_PinnedBy() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	handled := make(chan string)
	start := func(process string) (end func()) {
		running, shutDown := context.WithCancel(ctx)
		broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
		stopped := make(chan error)
		go func() {
			stopped <- broker.Run(running, natsx.Route("orders.*").Durable("ledger").PinnedBy("ledger").
				Handle(func(ctx context.Context, m *natsx.Msg) error {
					handled <- process + " handled " + string(m.Data)
					return nil
				}))
		}()
		<-broker.Ready()
		return func() {
			shutDown()
			<-stopped
		}
	}
	pub := natsx.NewPublisher(nc)
	send := func(id string) {
		if _, err := pub.Publish(ctx, natsx.To("orders.created").Data([]byte(id))); err != nil {
			fmt.Println(err)
		}
		fmt.Println(<-handled)
	}

	endFirst := start("the first")
	send("o-1")
	endSecond := start("the second")
	send("o-2")
	endFirst()
	send("o-3")
	endSecond()

	// Output:
	// the first handled o-1
	// the first handled o-2
	// the second handled o-3
}

// One durable takes the messages of several filters, in the order of the stream.
func ExampleRouteBuilder_Also() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	handled := 0
	book := func(ctx context.Context, m *natsx.Msg) error {
		fmt.Println(m.Subject)
		if handled++; handled == 3 {
			cancel()
		}
		return nil
	}
	broker := natsx.NewBroker(nc, natsx.WithStreams(natsx.Stream("SHOP").Subjects("orders.*", "returns.*", "prices.*")))
	go func() {
		<-broker.Ready()
		pub := natsx.NewPublisher(nc)
		for _, subject := range []string{"orders.created", "prices.changed", "returns.received", "orders.paid"} {
			// The last one is handled, and ends ctx, before its ack may be here.
			if _, err := pub.Publish(context.WithoutCancel(ctx), natsx.To(subject)); err != nil {
				fmt.Println(err)
			}
		}
	}()
	err := broker.Run(ctx,
		natsx.Route("orders.*").Also("returns.*").Durable("ledger").Concurrency(1).Handle(book),
	)
	fmt.Println("stopped:", err)

	// Output:
	// orders.created
	// returns.received
	// orders.paid
	// stopped: <nil>
}

// A redeployed route with another filter and limit does not start on the durable of
// before, until it says that the durable is to be changed.
func ExampleRouteBuilder_AdoptChanges() {
	nc, stop := exampleServer()
	defer stop()
	run := func(route natsx.RouteBuilder) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
		go func() {
			select {
			case <-broker.Ready():
				cancel()
			case <-ctx.Done():
			}
		}()
		return broker.Run(ctx, route.Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	}

	fmt.Println(run(natsx.Route("orders.*").Durable("billing").MaxAckPending(1000)))

	next := natsx.Route("orders.created").Durable("billing").MaxAckPending(100)
	err := run(next)
	fmt.Println(errors.Is(err, natsx.ErrConsumerConflict))
	fmt.Println(err)

	fmt.Println(run(next.AdoptChanges()))

	// Output:
	// <nil>
	// true
	// natsx: route "orders.created" durable "billing": subject ["orders.created"]: the durable exists and its filter is ["orders.*"]: let the route have what it has, or change the durable with AdoptChanges
	// natsx: route "orders.created" durable "billing": maxAckPending 100: the durable exists and its MaxAckPending is 1000: let the route have what it has, or change the durable with AdoptChanges
	// <nil>
}

// The durable of one replica, which follows the prices from its start on, goes with it.
func ExampleRouteBuilder_InactiveThreshold() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("PRICES").Subjects("prices.*")))
	go func() {
		<-broker.Ready()
		// It is handled, and ends ctx, before its ack may be here.
		if _, err := natsx.NewPublisher(nc).Publish(context.WithoutCancel(ctx), natsx.To("prices.tea").Data([]byte("250"))); err != nil {
			fmt.Println(err)
		}
	}()
	err := broker.Run(ctx, natsx.Route("prices.*").Durable("prices-of-pod-7").DeliverNew().InactiveThreshold(time.Minute).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println(m.Token(1), string(m.Data))
			cancel()
			return nil
		}))
	fmt.Println("stopped:", err)

	// Output:
	// tea 250
	// stopped: <nil>
}

// A message that fails waits for its retry in a stream of its own, and comes back as it was.
func ExampleWithRetryStream() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithRetryStream("RETRY"), natsx.WithStreams(
		natsx.RetryStream("RETRY").Replicas(1), // 3 in production
		natsx.Stream("ORDERS").Subjects("orders.*"),
	))
	running, shutDown := context.WithCancel(ctx)
	stopped := make(chan error)
	handled := make(chan struct{})
	go func() {
		stopped <- broker.Run(running, natsx.Route("orders.*").Durable("billing").Retry(5).Backoff(time.Millisecond, time.Second).
			Handle(func(ctx context.Context, m *natsx.Msg) error {
				fmt.Printf("%s: message %d of %s, attempt %d\n", m.Data, m.Sequence(), m.Stream(), m.Attempt())
				if m.Attempt() < 3 {
					return errors.New("the bank does not answer")
				}
				close(handled)
				return nil
			}))
	}()
	<-broker.Ready()
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created").Data([]byte("o-1"))); err != nil {
		fmt.Println(err)
	}
	<-handled
	shutDown()
	fmt.Println("stopped:", <-stopped)

	// Output:
	// o-1: message 1 of ORDERS, attempt 1
	// o-1: message 1 of ORDERS, attempt 2
	// o-1: message 1 of ORDERS, attempt 3
	// stopped: <nil>
}
