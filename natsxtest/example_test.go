package natsxtest_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/natsxtest"
)

type order struct{ ID string }

// charge gives up on an order at its third attempt.
func charge(ctx context.Context, o order) error {
	if natsx.MsgFrom(ctx).Attempt() >= 3 {
		return natsx.Permanent(errors.New("the bank has refused " + o.ID + " three times"))
	}
	return errors.New("the bank does not answer")
}

// A handler is tested without a server.
func ExampleContext() {
	m := natsxtest.Msg("orders.created", []byte(`{"ID": "o-1"}`), natsxtest.Durable("billing"), natsxtest.Attempt(3))
	err := natsx.JSON(charge)(natsxtest.Context(context.Background(), m), m)
	fmt.Println(natsx.OutcomeOf(err), err)

	// Output:
	// dead the bank has refused o-1 three times
}

// So is a policy of retries that takes an hour.
func ExampleSettle() {
	billing := natsx.Route("orders.*").Durable("billing").Retry(7).Backoff(30*time.Second, 20*time.Minute).DLQ("dlq.orders").
		Handle(natsx.JSON(charge))
	for attempt := 1; ; attempt++ {
		s := natsxtest.Settle(billing, errors.New("the bank does not answer"), attempt)
		if s.Outcome == natsx.OutcomeDead {
			fmt.Println(attempt, s.Outcome, s.Reason)
			break
		}
		fmt.Println(attempt, s.Outcome, s.After)
	}

	// Output:
	// 1 retried 30s
	// 2 retried 1m0s
	// 3 retried 2m0s
	// 4 retried 4m0s
	// 5 retried 8m0s
	// 6 retried 16m0s
	// 7 retried 20m0s
	// 8 dead exhausted
}
