package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
)

// bookings stores six bookings of two accounts, some milliseconds apart.
func bookings(ctx context.Context, nc *nats.Conn, pause time.Duration) {
	if err := natsx.Stream("BOOKINGS").Subjects("bookings.*").Ensure(ctx, nc); err != nil {
		panic(err)
	}
	pub := natsx.NewPublisher(nc)
	for i, account := range []string{"ann", "bob", "ann", "ann", "bob", "ann"} {
		if i > 0 {
			time.Sleep(pause)
		}
		if _, err := pub.Publish(ctx, natsx.To("bookings."+account).Data(fmt.Append(nil, 10*(i+1)))); err != nil {
			panic(err)
		}
	}
}

// A replay hands the stored messages of a stream to a handler once more, in stream
// order, and touches no durable.
func ExampleBroker_Replay() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	report, err := natsx.NewBroker(nc).Replay(ctx,
		natsx.Replay("bookings.ann").Handle(func(ctx context.Context, m *natsx.Msg) error {
			fmt.Printf("%d: %s\n", m.Sequence(), m.Data)
			return nil
		}))
	fmt.Println(report.Handled, "handled, next", report.Next, err)
	// Output:
	// 1: 10
	// 3: 30
	// 4: 40
	// 6: 60
	// 4 handled, next 7 <nil>
}

// An interrupted replay tells where to go on.
func ExampleReplayReport_goOn() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithCancel(context.Background())
	bookings(ctx, nc, 0)

	broker := natsx.NewBroker(nc)
	replay := natsx.Replay("bookings.>")
	rebuild := func(ctx context.Context, m *natsx.Msg) error {
		fmt.Printf("%s ", m.Data)
		if m.Sequence() == 4 {
			cancel() // the process is asked to stop
		}
		return nil
	}
	report, err := broker.Replay(ctx, replay.Handle(rebuild))
	fmt.Println(err)

	_, err = broker.Replay(context.Background(), replay.FromSequence(report.Next).Handle(rebuild))
	fmt.Println(err)
	// Output:
	// 10 20 30 40 context canceled
	// 50 60 <nil>
}

// A long audit is done in parts: each tells how far it came and where the next begins,
// behind the failures too, since they are reported.
func ExampleReplayReport_inParts() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	broker := natsx.NewBroker(nc)
	audit := func(ctx context.Context, m *natsx.Msg) error {
		if string(m.Data) == "40" {
			return errors.New("no receipt")
		}
		return nil
	}
	for next := uint64(1); next <= 6; {
		report, err := broker.Replay(ctx, natsx.Replay("bookings.>").FromSequence(next).Limit(4).ContinueOnError().
			Handle(audit).
			Progress(func(p natsx.ReplayProgress) {
				if p.Done == p.Total {
					fmt.Println(p.Done, "done")
				}
			}))
		if err != nil {
			fmt.Println(err)
			return
		}
		for _, f := range report.Failures {
			fmt.Println(f.Sequence, f.Err)
		}
		next = report.Next
		fmt.Println("next", next)
	}
	// Output:
	// 4 done
	// 4 no receipt
	// next 5
	// 2 done
	// next 7
}

// The first failure ends a replay; the report goes on from the message that failed.
func ExampleReplayFailure() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	report, err := natsx.NewBroker(nc).Replay(ctx, natsx.Replay("bookings.>").
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if m.Sequence() == 3 {
				return errors.New("no such account")
			}
			return nil
		}))
	fmt.Println(err)
	if failure, ok := errors.AsType[*natsx.ReplayFailure](err); ok {
		fmt.Println(failure.Sequence, failure.Subject, "next", report.Next)
	}
	// Output:
	// natsx: replay "bookings.>": message 3 of stream "BOOKINGS" on "bookings.ann": no such account
	// 3 bookings.ann next 3
}

// An audit looks at everything and collects what it objects to.
func ExampleReplayBuilder_ContinueOnError() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	report, err := natsx.NewBroker(nc).Replay(ctx, natsx.Replay("bookings.>").ContinueOnError().
		Handle(natsx.JSON(func(ctx context.Context, cents int) error {
			if cents%20 == 0 {
				return fmt.Errorf("%d is even", cents)
			}
			return nil
		})))
	fmt.Println(report.Handled, report.Failed, err)
	for _, f := range report.Failures {
		fmt.Println(f.Sequence, f.Err)
	}
	// Output:
	// 3 3 <nil>
	// 2 20 is even
	// 4 40 is even
	// 6 60 is even
}

// By key, accounts go on beside each other, and each in its own order.
func ExampleReplayBuilder_OrderedBy() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	balances := map[string][]string{"ann": nil, "bob": nil} // an entry for each key: no lock
	ann, bob := make(chan string, 6), make(chan string, 6)
	_, err := natsx.NewBroker(nc).Replay(ctx, natsx.Replay("bookings.*").OrderedBy(natsx.SubjectToken(1)).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			if m.Token(1) == "ann" {
				ann <- string(m.Data)
			} else {
				bob <- string(m.Data)
			}
			return nil
		}))
	close(ann)
	close(bob)
	for cents := range ann {
		balances["ann"] = append(balances["ann"], cents)
	}
	for cents := range bob {
		balances["bob"] = append(balances["bob"], cents)
	}
	fmt.Println(balances, err)
	// Output:
	// map[ann:[10 30 40 60] bob:[20 50]] <nil>
}

// A replay runs beside the routes of its broker, in turns on the same pool, and the
// durable goes on where it is.
func ExampleBroker_Replay_besideRun() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	bookings(ctx, nc, 0)

	live := make(chan uint64, 7)
	broker := natsx.NewBroker(nc, natsx.WithWorkers(8), quiet)
	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("bookings.*").Durable("ledger").Concurrency(1).
			Handle(func(ctx context.Context, m *natsx.Msg) error {
				live <- m.Sequence()
				return nil
			}))
	}()
	for range 6 {
		<-live
	}

	var mu sync.Mutex
	accounts := map[string][]string{}
	report, err := broker.Replay(ctx, natsx.Replay("bookings.*").Concurrency(4).OrderedBy(natsx.SubjectToken(1)).
		Handle(func(ctx context.Context, m *natsx.Msg) error {
			mu.Lock()
			defer mu.Unlock()
			accounts[m.Token(1)] = append(accounts[m.Token(1)], string(m.Data))
			return nil
		}))
	fmt.Println("replayed", report.Handled, accounts, err)

	if _, err := natsx.NewPublisher(nc).Publish(ctx, natsx.To("bookings.ann")); err != nil {
		fmt.Println(err)
	}
	fmt.Println("ledger goes on with", <-live)
	cancel()
	fmt.Println("stopped:", <-stopped)
	// Output:
	// replayed 6 map[ann:[10 30 40 60] bob:[20 50]] <nil>
	// ledger goes on with 7
	// stopped: <nil>
}

// With a speed, messages come in the time they were stored in, or a fraction of it.
func ExampleReplayBuilder_Speed() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 40*time.Millisecond)

	for _, speed := range []float64{1, 0} {
		report, err := natsx.NewBroker(nc).Replay(ctx, natsx.Replay("bookings.>").Speed(speed).
			Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
		fmt.Println(report.Handled, report.Took >= 200*time.Millisecond, err)
	}
	// Output:
	// 6 true <nil>
	// 6 false <nil>
}

// A part of a stream: what came since a time, up to a sequence, at most so many.
func ExampleReplay() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	before := time.Now().Add(-time.Minute)
	bookings(ctx, nc, 0)

	report, err := natsx.NewBroker(nc).Replay(ctx,
		natsx.Replay("bookings.ann").FromTime(before).UntilSequence(5).Limit(2).
			Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	fmt.Println(report.Handled, report.First, report.Last, report.Next, err)
	// Output: 2 1 3 4 <nil>
}

// A progress function hears of a long replay at most ten times a second, and once
// at its end.
func ExampleReplaySpec_Progress() {
	nc, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	bookings(ctx, nc, 0)

	_, err := natsx.NewBroker(nc).Replay(ctx, natsx.Replay("bookings.>").
		Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }).
		Progress(func(p natsx.ReplayProgress) {
			if p.Done == p.Total {
				fmt.Printf("%d of %d\n", p.Done, p.Total)
			}
		}))
	fmt.Println(err)
	// Output:
	// 6 of 6
	// <nil>
}

// Every fault of a replay is told, without a server.
func ExampleReplaySpec_Validate() {
	replay := natsx.Replay("bookings..>").FromSequence(20).UntilSequence(10).Speed(-1).
		Handle(func(ctx context.Context, m *natsx.Msg) error { return nil })
	fmt.Println(replay.Validate())
	// Output:
	// natsx: replay "bookings..>": subject "bookings..>": has an empty token
	// natsx: replay "bookings..>": untilSequence 10: is before fromSequence 20
	// natsx: replay "bookings..>": speed -1: must be between 0 and 1e+09
}
