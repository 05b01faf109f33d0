package natsx_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/natsx/natsx"
)

// A faulty configuration is told whole, before anything is sent: here a negative
// retry, a dead letter subject that the route itself consumes, and an empty name
// as from an unset environment variable.
func ExampleValidate() {
	bill := func(ctx context.Context, m *natsx.Msg) error { return nil }

	err := natsx.Validate(
		natsx.Route("orders.*").Durable("billing").Retry(-1).DLQ("orders.dead").Handle(bill),
		natsx.Route("prices..get").Queue("").Handle(bill),
	)
	fmt.Println(err)

	var first *natsx.RouteError
	fmt.Println(errors.As(err, &first), first.Durable, first.Field, errors.Is(err, natsx.ErrDLQLoop))

	// Output:
	// natsx: route "orders.*" durable "billing": retry -1: must not be negative
	// natsx: route "orders.*" durable "billing": dlq "orders.dead": is matched by the route's own filter: dead letters would come back
	// natsx: route "prices..get": subject "prices..get": has an empty token
	// natsx: route "prices..get": queue "": must not be empty
	// true billing retry true
}

// A stream's description is judged the same way.
func ExampleStreamSpec_Validate() {
	err := natsx.Stream("ORDERS").Subjects("orders.>", "orders.new").Replicas(7).Validate()
	fmt.Println(err)

	// Output:
	// natsx: stream "ORDERS": subjects "orders.new": overlaps with "orders.>"
	// natsx: stream "ORDERS": replicas 7: must be 1 to 5
}
