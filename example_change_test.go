package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// handleUntil runs a route of a durable until it has handled so many messages.
func handleUntil(nc *nats.Conn, n int, route natsx.RouteBuilder) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := natsx.NewBroker(nc, quiet).Run(ctx, route.Concurrency(1).Handle(func(ctx context.Context, m *natsx.Msg) error {
		fmt.Println(m.Durable(), "handles", m.Subject)
		if n--; n == 0 {
			cancel()
		}
		return nil
	}))
	fmt.Println("stopped:", err)
}

// publishEmpty stores an empty message on each subject.
func publishEmpty(ctx context.Context, nc *nats.Conn, subjects ...string) {
	for _, subject := range subjects {
		if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To(subject)); err != nil {
			fmt.Println(err)
		}
	}
}

// successor is a route for a new durable that goes on where another one is. What that
// one has handled beyond its ack floor is handled again.
func successor(ctx context.Context, js jetstream.JetStream, stream, durable string, route natsx.RouteBuilder) (natsx.RouteBuilder, error) {
	before, err := js.Consumer(ctx, stream, durable)
	if err != nil {
		return route, err
	}
	return route.Stream(stream).DeliverFromSequence(before.CachedInfo().AckFloor.Stream + 1), nil
}

// A durable keeps its filter: a route with another one is refused, or changes it where it
// says so. What was stored before on a filter that is added is not handled.
func ExampleRouteBuilder_AdoptChanges_filter() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("ORDERS").Subjects("orders.>").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	publishEmpty(ctx, nc, "orders.new", "orders.paid")
	handleUntil(nc, 2, natsx.Route("orders.*").Durable("billing"))
	publishEmpty(ctx, nc, "orders.eu.new", "orders.paid")

	handle := func(ctx context.Context, m *natsx.Msg) error { return nil }
	err := natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("orders.>").Durable("billing").Handle(handle))
	fmt.Println(errors.Is(err, natsx.ErrConsumerConflict))

	handleUntil(nc, 2, natsx.Route("orders.>").Durable("billing").AdoptChanges())

	// Output:
	// billing handles orders.new
	// billing handles orders.paid
	// stopped: <nil>
	// true
	// billing handles orders.eu.new
	// billing handles orders.paid
	// stopped: <nil>
}

// A new durable goes on where an old one stopped.
func ExampleRouteBuilder_DeliverFromSequence_successor() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("ORDERS").Subjects("orders.>").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	publishEmpty(ctx, nc, "orders.new", "orders.paid")
	handleUntil(nc, 2, natsx.Route("orders.*").Durable("billing"))
	publishEmpty(ctx, nc, "orders.eu.new", "orders.paid")

	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	route, err := successor(ctx, js, "ORDERS", "billing", natsx.Route("orders.>").Durable("invoicing"))
	if err != nil {
		fmt.Println(err)
	}
	handleUntil(nc, 2, route)
	fmt.Println(js.DeleteConsumer(ctx, "ORDERS", "billing")) // when no process uses it any more

	// Output:
	// billing handles orders.new
	// billing handles orders.paid
	// stopped: <nil>
	// invoicing handles orders.eu.new
	// invoicing handles orders.paid
	// stopped: <nil>
	// <nil>
}

// A stream cannot be renamed. Its subjects move to a new one, and the old one keeps what
// it has stored, which a replay still reads.
func ExampleStreamSpec_Subjects_move() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("ORDERS").Subjects("orders.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	publishEmpty(ctx, nc, "orders.new")
	handleUntil(nc, 1, natsx.Route("orders.*").Durable("billing")) // until nothing is pending

	err := errors.Join(
		natsx.Stream("ORDERS").Subjects("moved.orders").Ensure(ctx, nc),
		natsx.Stream("SALES").Subjects("orders.*").Ensure(ctx, nc),
	)
	fmt.Println(err)
	publishEmpty(ctx, nc, "orders.paid")
	handleUntil(nc, 1, natsx.Route("orders.*").Durable("billing")) // of SALES now

	js, err := jetstream.New(nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	old, err := js.Stream(ctx, "ORDERS")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(old.CachedInfo().State.Msgs, "kept")

	// Output:
	// billing handles orders.new
	// stopped: <nil>
	// <nil>
	// billing handles orders.paid
	// stopped: <nil>
	// 1 kept
}

// An existing durable goes on where it is: another start is refused. To handle again what
// was handled, replay it, or start a new durable.
func ExampleRouteBuilder_DeliverFromSequence() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	if err := natsx.Stream("ORDERS").Subjects("orders.*").Ensure(ctx, nc); err != nil {
		fmt.Println(err)
	}
	publishEmpty(ctx, nc, "orders.new", "orders.paid")
	handleUntil(nc, 2, natsx.Route("orders.*").Durable("billing"))

	handle := func(ctx context.Context, m *natsx.Msg) error { return nil }
	err := natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("orders.*").Durable("billing").DeliverFromSequence(2).Handle(handle))
	fmt.Println(errors.Is(err, natsx.ErrConsumerConflict))

	report, err := natsx.NewBroker(nc, quiet).Replay(ctx, natsx.Replay("orders.*").FromSequence(2).Handle(handle))
	fmt.Println("replayed:", report.Handled, err)
	handleUntil(nc, 1, natsx.Route("orders.*").Durable("billing-2").DeliverFromSequence(2))

	// Output:
	// billing handles orders.new
	// billing handles orders.paid
	// stopped: <nil>
	// true
	// replayed: 1 <nil>
	// billing-2 handles orders.paid
	// stopped: <nil>
}
