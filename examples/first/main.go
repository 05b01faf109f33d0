// First is the smallest service on natsx: one route with retries and a dead letter
// queue. It needs a nats-server with JetStream.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/natsx/natsx"
)

type Order struct {
	ID    string
	Cents int
}

func charge(ctx context.Context, o Order) error {
	if o.Cents <= 0 {
		return natsx.Permanent(errors.New("nothing to pay")) // a retry would not help
	}
	fmt.Println("charged", o.ID)
	return nil // acknowledged; any other error is retried
}

func main() {
	nc, err := natsx.Connect(os.Getenv("NATS_URL")) // empty: nats://127.0.0.1:4222
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	broker := natsx.NewBroker(nc, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"),
		natsx.Stream("DLQ").Subjects("dlq.*"),
	))
	err = natsx.Serve(context.Background(), broker, // until SIGINT or SIGTERM, then drains
		natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").
			Handle(natsx.JSON(charge)),
	)
	if err != nil {
		log.Fatal(err)
	}
}
