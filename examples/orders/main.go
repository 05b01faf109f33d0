// Orders is a small shop on natsx: it requests prices, publishes orders, bills them with
// retries and a dead letter queue, and audits all of them. Some orders fail once, some
// always, some make billing panic, some do not decode.
//
// It starts a nats-server, or uses that of NATS_URL, and ends after some seconds with a
// summary that it compares with what it published: its exit status is 1 if they differ.
// With -serve it runs until it is interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

func main() {
	serve := flag.Bool("serve", false, "go on until interrupted, instead of serving each customer twice")
	verbose := flag.Bool("v", false, "show the log of natsx on stderr")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	if err := run(ctx, newScreen(os.Stdout), *serve, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "orders:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, say *screen, serve, verbose bool) (err error) {
	url, where := os.Getenv("NATS_URL"), "the nats-server at"
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
		where = "a nats-server of its own at"
	}
	nc, err := natsx.Connect(url, nats.Name("natsx orders"))
	if err != nil {
		return err
	}
	defer nc.Close()
	s := &shop{name: "serve", pub: natsx.NewPublisher(nc), say: say}
	if !serve {
		s.name = "demo-" + strconv.FormatInt(time.Now().UnixMilli(), 36)
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		ctx = limited
	}
	s.tally = newTally(say, s.durable(), serve)
	level := slog.LevelError
	if verbose {
		level = slog.LevelInfo
	}
	broker := natsx.NewBroker(nc,
		natsx.WithStreams(s.streams()...),
		natsx.WithService("shop", "1.0.0", "tells prices"),
		natsx.WithObserver(s.tally),
		natsx.WithDrainTimeout(3*time.Second),
		natsx.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))),
	)

	// The broker outlives the customers: it is stopped when the last order is
	// settled, or when ctx has ended.
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	stopped := make(chan error, 1)
	go func() { stopped <- broker.Run(running, s.routes()...) }()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return err
	case <-ctx.Done():
		err := fmt.Errorf("not ready in time: %w", broker.Health())
		stop()
		return errors.Join(err, <-stopped)
	}
	say.printf("A shop on %s %s\n\n", where, nc.ConnectedUrlRedacted())

	customersIn, closeShop := context.WithCancel(ctx)
	defer closeShop()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if serve {
			s.serve(customersIn, 0, 400*time.Millisecond)
		} else {
			s.serve(customersIn, 2*len(customers), 100*time.Millisecond)
			s.tally.wait(customersIn)
		}
	}()
	select {
	case <-served:
	case err = <-stopped: // a route has failed
		closeShop()
		<-served
		return err
	}
	late := errors.Is(ctx.Err(), context.DeadlineExceeded)
	if ctx.Err() != nil && !late {
		say.printf("\nInterrupted: draining.\n")
	}
	stop()
	if err := <-stopped; err != nil {
		return err
	}
	err = s.close(nc, serve)
	if late && !serve {
		err = errors.Join(errors.New("not every order was settled in time"), err)
	}
	return err
}

// close prints the summary and reports differences.
func (s *shop) close(nc *nats.Conn, serve bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var letters []natsx.DeadLetter
	for l, err := range natsx.DeadLetters(s.dlq()).List(ctx, nc) {
		if err != nil {
			return fmt.Errorf("read dead letters: %w", err)
		}
		letters = append(letters, l)
	}
	faults := s.tally.summary(letters)
	if !serve { // no later run uses these streams
		js, err := jetstream.New(nc)
		if err != nil {
			return err
		}
		if err := js.DeleteConsumer(ctx, "SHOP_ORDERS", s.durable()); err != nil {
			return err
		}
	}
	if len(faults) > 0 {
		return fmt.Errorf("the summary does not fit what was published:\n  %s", strings.Join(faults, "\n  "))
	}
	s.say.printf("\n%s\n", s.say.paint(green, "Every order is accounted for."))
	return nil
}
