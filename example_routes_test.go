package natsx_test

import (
	"context"
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
