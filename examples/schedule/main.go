// Schedule has the server publish: once at a time, and again and again by a schedule, with
// no process of ours running a clock. A schedule is a message in the stream; it is made
// anew with each start, replaces the one before, and outlives the process.
//
// It starts a nats-server of its own, or uses that of NATS_URL, and ends by itself. The
// server must be 2.12 or later for the delay and 2.14 or later for the schedule.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "schedule:", err)
		os.Exit(1)
	}
}

// every has the server publish to target by a schedule: "@every 5m", "@daily", or a cron
// expression with seconds, "0 30 6 * * 1-5" (ADR-51). name is the schedule's own subject in
// the same stream, which holds one schedule: the last.
func every(ctx context.Context, js jetstream.JetStream, schedule, name, target string, data []byte) error {
	_, err := js.PublishMsg(ctx, &nats.Msg{Subject: name, Data: data, Header: nats.Header{
		"Nats-Schedule":        {schedule},
		"Nats-Schedule-Target": {target},
	}})
	return err
}

// cancel ends a schedule.
func cancel(ctx context.Context, js jetstream.JetStream, stream, name string) error {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return err
	}
	return s.Purge(ctx, jetstream.WithPurgeSubject(name))
}

func run() (err error) {
	url := os.Getenv("NATS_URL")
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
	}
	nc, err := natsx.Connect(url, nats.Name("natsx schedule"))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	ctx, end := context.WithTimeout(context.Background(), 30*time.Second)
	defer end()

	handled := make(chan string, 10)
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		natsx.Stream("REPORTS").AllowMsgSchedules().MaxAge(24*time.Hour).
			Subjects("reports.*", "report-schedules.*", "natsx-schedule.*.reports.*"), // the last are those of After and At
	))
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running, natsx.Route("reports.*").Durable("report-writer").DeliverNew().
			Handle(func(_ context.Context, m *natsx.Msg) error {
				handled <- m.Token(1)
				return nil
			}))
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		if errors.Is(err, natsx.ErrStreamConflict) {
			fmt.Println("this server has no message schedules:", err)
			return nil
		}
		return err
	}
	err = schedule(ctx, js, natsx.NewPublisher(nc), handled)
	stop()
	return errors.Join(err, <-stopped)
}

// schedule waits for one delayed report and for two of a schedule.
func schedule(ctx context.Context, js jetstream.JetStream, pub *natsx.Publisher, handled <-chan string) error {
	if _, err := pub.Publish(ctx, natsx.To("reports.once").After(300*time.Millisecond)); err != nil {
		return err
	}
	err := every(ctx, js, "@every 1s", "report-schedules.sales", "reports.sales", []byte("{}"))
	if errors.Is(err, jetstream.ErrSchedulePatternInvalid) {
		fmt.Println("this server knows only delays:", err)
		return nil
	}
	if err != nil {
		return err
	}
	for seen := map[string]int{}; seen["once"] < 1 || seen["sales"] < 2; {
		select {
		case report := <-handled:
			if seen[report]++; seen[report] == 1 {
				fmt.Println("first report:", report)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	fmt.Println("and sales again")
	return cancel(ctx, js, "REPORTS", "report-schedules.sales")
}
