// Replay rebuilds the balances of a bank from the stream of its transfers. The rebuild is
// interrupted half-way and continued; then the latest transfers are replayed ten times as
// fast as they happened, and an audit of all transfers reports large ones.
//
// It starts a nats-server, or uses that of NATS_URL, and ends by itself after some seconds.
// Its exit status is 1 if a balance is wrong. On a terminal it draws progress bars, else it
// prints a line now and then.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, newScreen(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "replay:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out *screen) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	url := os.Getenv("NATS_URL")
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
	}
	nc, err := natsx.Connect(url, nats.Name("natsx replay"))
	if err != nil {
		return err
	}
	defer nc.Close()
	b := newBank(nc, "transfers-"+strconv.FormatInt(time.Now().UnixMilli(), 36))
	if err := natsx.Stream(b.stream()).Subjects(b.name+".>").MaxAge(time.Hour).Storage(jetstream.MemoryStorage).Ensure(ctx, nc); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.drop()) }()
	for _, step := range []func(context.Context, *screen) error{b.trade, b.rebuild, b.watch, b.audit} {
		if err := step(ctx, out); err != nil {
			return err
		}
	}
	out.line("every balance is as it should be")
	return nil
}

const (
	accounts  = 50
	transfers = 30_000
	lively    = 40 // transfers that are made one by one at the end
	limit     = 9_990
)

// transfer is a message of the stream, on <bank>.<account>.
type transfer struct{ Cents int }

// bank has the expected balances.
type bank struct {
	nc     *nats.Conn
	broker *natsx.Broker
	name   string
	want   [accounts]int
	large  int       // transfers above the limit
	live   time.Time // when the last ones began
}

func newBank(nc *nats.Conn, name string) *bank {
	return &bank{nc: nc, broker: natsx.NewBroker(nc, natsx.WithWorkers(8)), name: name}
}

func (b *bank) stream() string { return b.name }

// trade publishes the transfers: most at once, and the last ones with pauses.
func (b *bank) trade(ctx context.Context, out *screen) error {
	pub := natsx.NewPublisher(b.nc)
	draw := func() natsx.Envelope {
		account, cents := rand.IntN(accounts), rand.IntN(20_001)-10_000
		b.want[account] += cents
		if cents > limit {
			b.large++
		}
		return natsx.To(fmt.Sprintf("%s.%d", b.name, account)).JSON(transfer{cents})
	}
	envelopes := make([]natsx.Envelope, transfers-lively)
	for i := range envelopes {
		envelopes[i] = draw()
	}
	if _, err := pub.PublishAll(ctx, envelopes...); err != nil {
		return err
	}
	b.live = time.Now()
	for range lively {
		if _, err := pub.Publish(ctx, draw()); err != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	out.line("%d transfers on %d accounts are in the stream, the last %d of them made within %s",
		transfers, accounts, lively, time.Since(b.live).Round(100*time.Millisecond))
	return nil
}

// rebuild computes the balances from the transfers: the accounts concurrently, each one in
// order. It is interrupted half-way.
func (b *bank) rebuild(ctx context.Context, out *screen) error {
	var mu sync.Mutex
	var balances [accounts]int
	done := 0
	first, interrupt := context.WithCancel(ctx)
	defer interrupt()
	add := func(ctx context.Context, t transfer) error {
		account, err := strconv.Atoi(natsx.MsgFrom(ctx).Token(1))
		if err != nil || account < 0 || account >= accounts {
			return fmt.Errorf("no such account: %q", natsx.MsgFrom(ctx).Token(1))
		}
		mu.Lock()
		defer mu.Unlock()
		balances[account] += t.Cents
		if done++; done == transfers/2 {
			interrupt()
		}
		return nil
	}
	replay := natsx.Replay(b.name + ".*").OrderedBy(natsx.SubjectToken(1))
	report, err := b.broker.Replay(first, replay.Handle(natsx.JSON(add)).Progress(out.bar("rebuild")))
	if !errors.Is(err, context.Canceled) || ctx.Err() != nil {
		return fmt.Errorf("the rebuild was not interrupted: %w", err)
	}
	out.line("interrupted after %d transfers, to go on from sequence %d", report.Handled, report.Next)
	report, err = b.broker.Replay(ctx, replay.FromSequence(report.Next).Handle(natsx.JSON(add)).Progress(out.bar("the rest")))
	if err != nil {
		return err
	}
	if done != transfers {
		return fmt.Errorf("%d transfers were handled, want each of %d once", done, transfers)
	}
	for account, cents := range balances {
		if cents != b.want[account] {
			return fmt.Errorf("account %d has %d cents, want %d", account, cents, b.want[account])
		}
	}
	out.line("rebuilt %d balances, the rest in %s", accounts, report.Took.Round(time.Millisecond))
	return nil
}

// watch replays the last transfers ten times as fast as they happened.
func (b *bank) watch(ctx context.Context, out *screen) error {
	var began, first, last time.Time
	late := time.Duration(0)
	report, err := b.broker.Replay(ctx, natsx.Replay(b.name+".*").FromTime(b.live).Speed(10).
		Handle(func(_ context.Context, m *natsx.Msg) error {
			if last = m.Time(); began.IsZero() {
				began, first = time.Now(), last
			}
			late = max(late, time.Since(began)-last.Sub(first)/10)
			return nil
		}).Progress(out.bar("ten times as fast")))
	if err != nil {
		return err
	}
	if report.Handled != lively {
		return fmt.Errorf("%d transfers were shown, want the last %d", report.Handled, lively)
	}
	out.line("what took %s was shown in %s, at most %s late",
		last.Sub(first).Round(time.Millisecond), report.Took.Round(time.Millisecond), late.Round(time.Millisecond))
	return nil
}

// audit reports large transfers and goes on.
func (b *bank) audit(ctx context.Context, out *screen) error {
	report, err := b.broker.Replay(ctx, natsx.Replay(b.name+".*").Concurrency(8).ContinueOnError().
		Handle(natsx.JSON(func(_ context.Context, t transfer) error {
			if t.Cents > limit {
				return fmt.Errorf("%d cents are above the limit", t.Cents)
			}
			return nil
		})).Progress(out.bar("audit")))
	if err != nil {
		return err
	}
	if report.Handled+report.Failed != transfers || report.Failed != uint64(b.large) {
		return fmt.Errorf("the audit objects to %d of %d transfers, want %d of %d",
			report.Failed, report.Handled+report.Failed, b.large, transfers)
	}
	out.line("the audit objects to %d transfers", report.Failed)
	if len(report.Failures) > 0 {
		f := report.Failures[0]
		out.line("  such as message %d on %s: %v", f.Sequence, f.Subject, f.Err)
	}
	return nil
}

func (b *bank) drop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	js, err := jetstream.New(b.nc)
	if err != nil {
		return err
	}
	return js.DeleteStream(ctx, b.stream())
}
