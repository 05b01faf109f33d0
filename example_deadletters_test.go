package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
)

// makeLetters publishes an order for each payload and runs billing until they are dead.
func makeLetters(ctx context.Context, nc *nats.Conn, payloads ...string) {
	giveUp(ctx, nc, len(payloads), payloads...)
}

// giveUp runs billing until a number of orders are dead. It publishes those of payloads.
func giveUp(ctx context.Context, nc *nats.Conn, n int, payloads ...string) {
	ctx, cancel := context.WithCancel(ctx)
	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(
		natsx.Stream("ORDERS").Subjects("orders.*"),
		natsx.Stream("DLQ").Subjects("dlq.*"),
	))
	go func() {
		<-broker.Ready()
		pub := natsx.NewPublisher(nc)
		for _, p := range payloads {
			pub.Publish(ctx, natsx.To("orders.created").Data([]byte(p)))
		}
		for broker.Stats().Routes[0].Dead < uint64(n) {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	err := broker.Run(ctx, natsx.Route("orders.*").Durable("billing").Retry(0).DLQ("dlq.orders").Concurrency(1).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if strings.HasPrefix(string(m.Data), "bad") {
				return natsx.Permanent(errors.New("not an order"))
			}
			return errors.New("the bank is closed")
		}))
	if err != nil {
		panic(err)
	}
}

// Listing yields letters in the order of the DLQ and changes nothing.
func ExampleDeadLetterQuery_List() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "bad", "o-2", "o-3")

	letters := natsx.DeadLetters("dlq.orders").Durable("billing").Reason(natsx.ReasonExhausted).
		Since(time.Now().Add(-24 * time.Hour)).Limit(100)
	for l, err := range letters.List(ctx, nc) {
		if errors.Is(err, natsx.ErrNotALetter) {
			continue // not a dead letter
		}
		if err != nil {
			fmt.Println("stopped:", err)
			return
		}
		fmt.Printf("%s %d: %s: %s after %d attempt: %s\n", l.Stream, l.Sequence, l.Data, l.Reason, l.Attempts, l.Error)
	}

	// Output:
	// ORDERS 1: o-1: exhausted after 1 attempt: the bank is closed
	// ORDERS 3: o-2: exhausted after 1 attempt: the bank is closed
	// ORDERS 4: o-3: exhausted after 1 attempt: the bank is closed
}

// The letters of one subject and one span of time, such as that of an outage.
func ExampleDeadLetterQuery_List_outage() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	began := time.Now()
	makeLetters(ctx, nc, "o-1", "o-2")
	over := time.Now()
	makeLetters(ctx, nc, "o-3")

	outage := natsx.DeadLetters("dlq.orders").Subject("orders.*").Since(began).Until(over)
	for l, err := range outage.List(ctx, nc) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s of %s\n", l.Data, l.Subject)
	}
	none, err := natsx.DeadLetters("dlq.orders").Subject("invoices.>").Count(ctx, nc)
	fmt.Println(none.Total, "of invoices", err)

	// Output:
	// o-1 of orders.created
	// o-2 of orders.created
	// 0 of invoices <nil>
}

// Counting gives an overview without fetching payloads.
func ExampleDeadLetterQuery_Count() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "bad", "o-2", "o-3")

	counts, err := natsx.DeadLetters("dlq.orders").Count(ctx, nc)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(counts.Total, "letters")
	for _, g := range counts.Groups {
		fmt.Println(g.Count, g.Durable, g.Reason)
	}

	// Output:
	// 4 letters
	// 3 billing exhausted
	// 1 billing permanent
}

// A redrive sends letters back to the durable that failed. The other durables of
// the stream do not handle them again.
func ExampleDeadLetterQuery_Redrive() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "bad", "o-2")

	report, err := natsx.DeadLetters("dlq.orders").Reason(natsx.ReasonExhausted).Rate(100).
		Redrive(ctx, nc, natsx.WithRedriveProgress(func(p natsx.RedriveProgress) {
			fmt.Printf("%d of %d: %s\n", p.Done(), p.Total, p.Letter.Data)
		}))
	fmt.Printf("redriven %d, skipped %d, failed %d, stopped by %v\n", report.Redriven, report.Skipped, report.Failed, err)

	handled := 0
	err = natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").Concurrency(1).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			fmt.Printf("%s: attempt %d\n", m.Data, m.Attempt())
			if handled++; handled == report.Redriven {
				cancel()
			}
			return nil
		}))
	fmt.Println("stopped:", err)

	// Output:
	// 1 of 2: o-1
	// 2 of 2: o-2
	// redriven 2, skipped 0, failed 0, stopped by <nil>
	// o-1: attempt 1
	// o-2: attempt 1
	// stopped: <nil>
}

// Single letters are selected by their sequences in the DLQ, and any by a function.
func ExampleDeadLetterQuery_Where() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "bad", "o-2")

	show := func(q natsx.DeadLetterQuery) {
		for l, err := range q.List(ctx, nc) {
			fmt.Printf("letter %d: %s %v\n", l.DLQSequence, l.Data, err)
		}
	}
	letters := natsx.DeadLetters("dlq.orders")
	show(letters.Sequence(1, 3))
	show(letters.Where(func(l natsx.DeadLetter) bool { return strings.HasPrefix(string(l.Data), "bad") }))

	// Output:
	// letter 1: o-1 <nil>
	// letter 3: o-2 <nil>
	// letter 2: bad <nil>
}

// An edit repairs letters before they are redriven. A letter for which it returns an error
// stays.
func ExampleWithRedriveEdit() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "bad-1", "bad-2")

	report, err := natsx.DeadLetters("dlq.orders").Redrive(ctx, nc, natsx.WithRedriveEdit(func(l *natsx.DeadLetter) error {
		number, _ := strings.CutPrefix(string(l.Data), "bad-")
		if number == "2" {
			return errors.New("nobody knows what it means")
		}
		l.Data = []byte("o-" + number)
		l.Header.Set("Repaired", "yes")
		return nil
	}))
	fmt.Println(report.Redriven, "redriven,", report.Errors[0], err)
	err = natsx.NewBroker(nc, quiet).Run(ctx, natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			fmt.Printf("%s, repaired: %s\n", m.Data, m.Header.Get("Repaired"))
			cancel()
			return nil
		}))
	fmt.Println("stopped:", err)

	// Output:
	// 1 redriven, natsx: dead letter 2 of stream "DLQ": edit: nobody knows what it means <nil>
	// o-1, repaired: yes
	// stopped: <nil>
}

// A dry run reports what a redrive would do. Here billing fails again, and messages that
// were redriven before are skipped.
func ExampleDeadLetterQuery_Redrive_dryRun() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "o-2")

	once := natsx.DeadLetters("dlq.orders").MaxRedrives(1)
	show := func(q natsx.DeadLetterQuery) {
		report, err := q.Redrive(ctx, nc)
		fmt.Println(report.Redriven, "redriven", report.Skips[natsx.SkipMaxRedrives], "had their turn", report.Failed, "failed", err)
	}
	show(once.DryRun())
	show(once)
	giveUp(ctx, nc, 2) // the copies
	makeLetters(ctx, nc, "o-3")
	show(once.DryRun())

	// Output:
	// 2 redriven 0 had their turn 0 failed <nil>
	// 2 redriven 0 had their turn 0 failed <nil>
	// 1 redriven 2 had their turn 0 failed <nil>
}

// A purge deletes the selected letters, and a dry run reports how many.
func ExampleDeadLetterQuery_Purge() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "o-1", "bad", "o-2")

	permanent := natsx.DeadLetters("dlq.orders").Reason(natsx.ReasonPermanent)
	fmt.Println(permanent.DryRun().Purge(ctx, nc))
	fmt.Println(permanent.Purge(ctx, nc))
	fmt.Println(permanent.Purge(ctx, nc))

	// Output:
	// 1 <nil>
	// 1 <nil>
	// 0 <nil>
}

// A DLQ is a stream like any other: a route handles letters as they arrive.
func ExampleOnDeadLetter() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	makeLetters(ctx, nc, "bad")

	alert := func(ctx context.Context, l natsx.DeadLetter) error {
		fmt.Printf("%s gave up %q of %s: %s\n", l.Durable, l.Data, l.Subject, l.Error)
		cancel()
		return nil
	}
	err := natsx.NewBroker(nc, quiet).Run(ctx,
		natsx.Route("dlq.orders").Durable("alerts").Handle(natsx.OnDeadLetter(alert)))
	fmt.Println("stopped:", err)

	// Output:
	// billing gave up "bad" of orders.created: not an order
	// stopped: <nil>
}
