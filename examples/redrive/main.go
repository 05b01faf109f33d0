// Redrive repairs the effects of an incident: a bug in billing has moved most orders to
// the dead letter queue. It prints what is dead and why, starts the repaired service,
// redrives the letters to billing alone, and checks that every order was billed once and
// audited once: otherwise its exit status is 1.
//
// It starts a nats-server and ends by itself after some seconds. On a terminal it draws a
// progress bar; to a pipe or a file it prints plain lines.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

const orders = 600

type order struct {
	ID      string
	Country string
	Cents   int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := run(ctx, os.Stdout, isTerminal(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "redrive:", err)
		os.Exit(1)
	}
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

func run(ctx context.Context, out io.Writer, terminal bool) error {
	url, stopServer, err := embedded.Run()
	if err != nil {
		return err
	}
	defer stopServer()
	nc, err := natsx.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	letters := natsx.DeadLetters("dlq.orders")
	billed, audited := newBook(), newBook()

	fmt.Fprintf(out, "Yesterday: %d orders, and a release of billing that knows the VAT of DE alone.\n", orders)
	err = serve(ctx, nc, billed, audited, brokenVAT, func() error {
		if err := publish(ctx, nc); err != nil {
			return err
		}
		return until(ctx, "every order is billed or dead", func() (bool, error) {
			counts, err := letters.Count(ctx, nc)
			return billed.size()+counts.Total == orders && audited.size() == orders, err
		})
	})
	if err != nil {
		return err
	}

	if err := show(ctx, out, nc, letters); err != nil {
		return err
	}

	fmt.Fprintf(out, "\nToday: the repaired billing is up, and the letters go back to it.\n")
	err = serve(ctx, nc, billed, audited, repairedVAT, func() error {
		// An order without a country fails in every attempt.
		q := letters.Durable("billing").Reason(natsx.ReasonPanic)
		dry, err := q.DryRun().Redrive(ctx, nc)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "A dry run would redrive %d letters.\n", dry.Redriven)
		bar := progress{out: out, terminal: terminal}
		report, err := q.Rate(250).Redrive(ctx, nc, natsx.WithRedriveProgress(bar.show))
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "Redriven %d, skipped %d, failed %d.\n", report.Redriven, report.Skipped, report.Failed)
		return until(ctx, "every redriven order is billed", func() (bool, error) {
			left, err := letters.Count(ctx, nc)
			return billed.size()+left.Total == orders, err
		})
	})
	if err != nil {
		return err
	}
	return check(ctx, out, nc, letters, billed, audited)
}

// show prints an overview of the dead letters.
func show(ctx context.Context, out io.Writer, nc *nats.Conn, letters natsx.DeadLetterQuery) error {
	counts, err := letters.Count(ctx, nc)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%d dead letters:\n", counts.Total)
	for _, g := range counts.Groups {
		fmt.Fprintf(out, "%6d  durable %s, %s\n", g.Count, g.Durable, g.Reason)
		for l, err := range letters.Durable(g.Durable).Reason(g.Reason).Limit(2).List(ctx, nc) {
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "        %s %d of %s, attempt %d: %s\n        %s\n", l.Subject, l.Sequence, l.Stream, l.Attempts, l.Error, l.Data)
		}
	}
	return nil
}

// check compares the records with the orders.
func check(ctx context.Context, out io.Writer, nc *nats.Conn, letters natsx.DeadLetterQuery, billed, audited *book) error {
	left, err := letters.Count(ctx, nc)
	if err != nil {
		return err
	}
	var faults []error
	for i := range orders {
		o := makeOrder(i)
		want := 1
		if o.Country == "" {
			want = 0
		}
		if n := billed.times(o.ID); n != want {
			faults = append(faults, fmt.Errorf("order %s was billed %d times, not %d", o.ID, n, want))
		}
		if n := audited.times(o.ID); n != 1 {
			faults = append(faults, fmt.Errorf("order %s was audited %d times", o.ID, n))
		}
	}
	if billed.size()+left.Total != orders {
		faults = append(faults, fmt.Errorf("%d orders are billed and %d letters left, of %d orders", billed.size(), left.Total, orders))
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%d orders were billed once, %d audited once, %d letters are left for a look.\n", billed.size(), audited.size(), left.Total)
	return nil
}

// serve runs the service while do does.
func serve(ctx context.Context, nc *nats.Conn, billed, audited *book, vat func(country string) int, do func() error) error {
	bill := func(ctx context.Context, o order) error {
		if o.Country == "" {
			return natsx.Permanent(errors.New("an order without a country"))
		}
		o.Cents += o.Cents * vat(o.Country) / 100
		billed.enter(o)
		return nil
	}
	audit := func(ctx context.Context, o order) error {
		audited.enter(o)
		return nil
	}
	broker := natsx.NewBroker(nc,
		natsx.WithLogger(slog.New(slog.DiscardHandler)), // every panic of billing
		natsx.WithStreams(
			natsx.Stream("ORDERS").Subjects("orders.*"),
			natsx.Stream("DLQ").Subjects("dlq.*"),
		))
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(ctx,
			natsx.Route("orders.*").Durable("billing").Retry(1).Backoff(10*time.Millisecond, time.Second).DLQ("dlq.orders").Handle(natsx.JSON(bill)),
			natsx.Route("orders.*").Durable("audit").Handle(natsx.JSON(audit)),
		)
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return errors.Join(errors.New("the service did not start"), err)
	}
	err := do()
	stop()
	return errors.Join(err, <-stopped)
}

func brokenVAT(country string) int { return map[string][]int{"DE": {19}}[country][0] }

func repairedVAT(country string) int { return map[string]int{"DE": 19, "FR": 20, "SE": 25}[country] }

func makeOrder(i int) order {
	o := order{ID: fmt.Sprintf("o-%03d", i), Country: []string{"DE", "FR", "SE"}[i%3], Cents: 100 + i}
	if i%100 == 99 {
		o.Country = ""
	}
	return o
}

func publish(ctx context.Context, nc *nats.Conn) error {
	var envelopes []natsx.Envelope
	for i := range orders {
		o := makeOrder(i)
		envelopes = append(envelopes, natsx.To("orders.created").MsgID(o.ID).JSON(o))
	}
	_, err := natsx.NewPublisher(nc).PublishAll(ctx, envelopes...)
	return err
}

// until polls a condition.
func until(ctx context.Context, what string, is func() (bool, error)) error {
	for {
		if ok, err := is(); ok || err != nil {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("not in time: %s", what)
		}
	}
}

// progress draws a bar on a terminal, or else prints a line for each tenth.
type progress struct {
	out      io.Writer
	terminal bool
	drawn    int
}

func (p *progress) show(now natsx.RedriveProgress) {
	const width = 40
	steps := 10
	if p.terminal {
		steps = width
	}
	step := now.Done() * steps / max(now.Total, 1)
	if step == p.drawn {
		return
	}
	p.drawn = step
	if !p.terminal {
		fmt.Fprintf(p.out, "redriven %d of %d\n", now.Done(), now.Total)
		return
	}
	fmt.Fprintf(p.out, "\r[%s%s] %d of %d", strings.Repeat("#", step), strings.Repeat("-", width-step), now.Done(), now.Total)
	if now.Done() == now.Total {
		fmt.Fprintln(p.out)
	}
}

// book counts how many times each order was handled.
type book struct {
	mu   sync.Mutex
	seen map[string]int // by order
}

func newBook() *book { return &book{seen: map[string]int{}} }

func (b *book) enter(o order) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen[o.ID]++
}

func (b *book) times(id string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen[id]
}

// size is how many different orders are in the book.
func (b *book) size() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.seen)
}
