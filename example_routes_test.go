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
