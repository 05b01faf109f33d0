package natsx_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"

	"github.com/natsx/natsx"
)

// A paused durable keeps its position: new messages wait in the stream.
func ExampleBroker_Pause() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	handled := make(chan string, 2)
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("orders.*").Durable("billing").
			Handle(func(ctx context.Context, m *natsx.Msg) error {
				handled <- string(m.Data)
				return nil
			}))
	}()
	<-broker.Ready()
	pub := natsx.NewPublisher(nc)
	send := func(id string) {
		if _, err := pub.Publish(ctx, natsx.To("orders.created").Data([]byte(id))); err != nil {
			fmt.Println(err)
		}
	}

	send("o-1")
	fmt.Println("handled", <-handled)
	fmt.Println("paused:", broker.Pause("billing"))
	send("o-2")
	fmt.Println("received", broker.Stats().Routes[0].Received, "healthy:", broker.Health() == nil)
	fmt.Println("resumed:", broker.Resume("billing"))
	fmt.Println("handled", <-handled)

	err := broker.Pause("invoices")
	fmt.Println(errors.Is(err, natsx.ErrUnknownDurable))
	cancel()
	fmt.Println("stopped:", <-stopped)

	// Output:
	// handled o-1
	// paused: <nil>
	// received 1 healthy: true
	// resumed: <nil>
	// handled o-2
	// true
	// stopped: <nil>
}

// A readiness probe calls Health, which makes no network call; metrics come from Stats.
func ExampleBroker_Health() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	fmt.Println(broker.Health())
	running, shutDown := context.WithCancel(ctx)
	defer shutDown()
	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(running, natsx.Route("orders.*").Durable("billing").
			Handle(func(ctx context.Context, m *natsx.Msg) error {
				shutDown()
				return nil
			}))
	}()
	<-broker.Ready()
	fmt.Println(broker.Health())
	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("orders.created")); err != nil {
		fmt.Println(err)
	}
	fmt.Println("stopped:", <-stopped)
	fmt.Println(broker.Health())
	for _, r := range broker.Stats().Routes {
		fmt.Println(r.Route, r.Durable, r.Stream, r.Received, r.Succeeded)
	}

	// Output:
	// natsx: broker is not running
	// <nil>
	// stopped: <nil>
	// natsx: broker has stopped
	// orders.* billing ORDERS 1 1
}

// Ensure creates a stream as described, and updates it later. Changes that would lose data,
// or that the server does not allow, are refused with the difference.
func ExampleStreamSpec_Ensure() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	orders := natsx.Stream("ORDERS").Subjects("orders.>").MaxAge(24 * time.Hour)
	fmt.Println(orders.Ensure(ctx, nc))
	fmt.Println(orders.Ensure(ctx, nc)) // nothing to do
	fmt.Println(orders.MaxAge(48*time.Hour).Ensure(ctx, nc))

	err := orders.Storage(jetstream.MemoryStorage).Ensure(ctx, nc)
	if conflict, ok := errors.AsType[*natsx.StreamConflictError](err); ok {
		for _, d := range conflict.Diffs {
			fmt.Printf("%s is %s, not %s: %s\n", d.Field, d.Have, d.Want, d.Reason)
		}
	}

	// Output:
	// <nil>
	// <nil>
	// <nil>
	// storage is File, not Memory: the server cannot change it
}

// A broker ensures its streams before its routes start. The stream for dead letters refuses
// new letters when it is full, instead of dropping old ones.
func ExampleWithStreams() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"),
		natsx.Stream("DLQ").Subjects("dlq.*").MaxMsgs(100_000),
	))
	go func() {
		<-broker.Ready()
		cancel()
	}()
	err := broker.Run(ctx, natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").
		Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	fmt.Println("stopped:", err)

	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, name := range []string{"ORDERS", "DLQ"} {
		stream, err := js.Stream(context.Background(), name)
		if err != nil {
			fmt.Println(err)
			return
		}
		cfg := stream.CachedInfo().Config
		fmt.Println(cfg.Name, cfg.Subjects, cfg.Discard)
	}

	// Output:
	// stopped: <nil>
	// ORDERS [orders.*] DiscardOld
	// DLQ [dlq.*] DiscardNew
}

// Tools for NATS micro, such as the nats CLI, find the service and its statistics.
func ExampleWithService() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithService("pricing", "1.4.0", "what things cost"))
	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("prices.get").Queue("pricing").
			Reply(func(ctx context.Context, m *natsx.Msg) ([]byte, error) { return []byte("290"), nil }))
	}()
	<-broker.Ready()

	ask := func(verb micro.Verb, v any) {
		subject, err := micro.ControlSubject(verb, "pricing", "") // $SRV.INFO.pricing
		if err != nil {
			fmt.Println(err)
			return
		}
		answer, err := nc.RequestWithContext(ctx, subject, nil)
		if err != nil {
			fmt.Println(err)
			return
		}
		if err := json.Unmarshal(answer.Data, v); err != nil {
			fmt.Println(err)
		}
	}
	var info micro.Info
	ask(micro.InfoVerb, &info)
	fmt.Println(info.Name, info.Version, info.Description)
	for _, e := range info.Endpoints {
		fmt.Println(e.Name, e.Subject, e.QueueGroup)
	}

	price, err := natsx.NewPublisher(nc).Request(ctx, natsx.To("prices.get"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s\n", price.Data)
	cancel()
	fmt.Println("stopped:", <-stopped)

	// Output:
	// pricing 1.4.0 what things cost
	// prices-get prices.get pricing
	// 290
	// stopped: <nil>
}
