package main

import (
	"context"
	"fmt"
	"os"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

func Example() {
	url, stop, err := embedded.Run()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stop()
	os.Setenv("NATS_URL", url)

	go func() {
		nc, err := natsx.Connect(url)
		if err != nil {
			fmt.Println(err)
			return
		}
		defer nc.Close()
		dead := make(chan *nats.Msg, 1)
		sub, err := nc.ChanSubscribe("dlq.orders", dead)
		if err != nil {
			fmt.Println(err)
			return
		}
		defer sub.Unsubscribe()

		// The stream may be made before the service runs, and with it the orders.
		ctx := context.Background()
		if err := natsx.Stream("ORDERS").Subjects("orders.*").Ensure(ctx, nc); err != nil {
			fmt.Println(err)
		}
		pub := natsx.NewPublisher(nc)
		for _, o := range []Order{{"o-1", 990}, {"o-2", 0}} {
			if _, err := pub.Publish(ctx, natsx.To("orders.created").JSON(o)); err != nil {
				fmt.Println(err)
			}
			if o.Cents == 0 {
				letter := <-dead
				fmt.Println("dead:", letter.Header.Get(natsx.HeaderDLQReason))
			}
		}
		self, err := os.FindProcess(os.Getpid())
		if err == nil {
			err = self.Signal(os.Interrupt) // Ctrl-C
		}
		if err != nil {
			fmt.Println(err)
		}
	}()
	main()
	// Unordered output:
	// charged o-1
	// dead: permanent
}
