package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/natsx/natsx"
)

// fate is the outcome of an order.
type fate struct {
	outcome natsx.Outcome
	reason  natsx.Reason // of a dead order
	retries int
}

// fateOf returns the expected outcome of an order. An order without an item is one that
// does not decode.
func fateOf(o order) fate {
	switch {
	case o.Item == "":
		return fate{outcome: natsx.OutcomeDead, reason: natsx.ReasonUndecodable}
	case o.Card == cardCancelled:
		return fate{outcome: natsx.OutcomeDiscarded}
	case o.Cents == 0:
		return fate{outcome: natsx.OutcomeDead, reason: natsx.ReasonPermanent}
	case o.Card == cardBusy:
		return fate{outcome: natsx.OutcomeSucceeded, retries: 1}
	case o.Card == cardDeclined:
		return fate{outcome: natsx.OutcomeDead, reason: natsx.ReasonExhausted, retries: retries}
	case o.Card == cardCursed:
		return fate{outcome: natsx.OutcomeDead, reason: natsx.ReasonPanic, retries: retries}
	}
	return fate{outcome: natsx.OutcomeSucceeded}
}

// tally records the published orders and their outcomes by stream sequence. It is the
// broker's observer.
type tally struct {
	say     *screen
	durable string
	shared  bool // other processes may bill and audit the same orders

	unsent, repeats, duplicates, priced, refused, audited atomic.Int64

	mu        sync.Mutex
	published map[uint64]order
	seen      map[uint64]fate
	open      int           // published and not settled
	progress  chan struct{} // notified when open changes; capacity 1
}

func newTally(say *screen, durable string, shared bool) *tally {
	return &tally{
		say: say, durable: durable, shared: shared,
		published: map[uint64]order{}, seen: map[uint64]fate{},
		progress: make(chan struct{}, 1),
	}
}

func (f fate) settled() bool {
	return f.outcome == natsx.OutcomeSucceeded || f.outcome == natsx.OutcomeDead || f.outcome == natsx.OutcomeDiscarded
}

// publish records an order once it is stored. Billing may have handled it before.
func (t *tally) publish(seq uint64, o order) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.published[seq] = o
	if !t.seen[seq].settled() {
		t.open++
	}
	t.changed()
}

// Observe records and prints the attempts of the billing route.
func (t *tally) Observe(_ context.Context, e natsx.Event) {
	if e.Durable != t.durable {
		return
	}
	t.show(e)
	t.mu.Lock()
	defer t.mu.Unlock()
	seq := e.Msg.Sequence()
	f := t.seen[seq]
	f.outcome = e.Outcome
	if e.Outcome == natsx.OutcomeRetried {
		f.retries++
	}
	t.seen[seq] = f
	if _, mine := t.published[seq]; mine && f.settled() {
		t.open--
	}
	t.changed()
}

func (t *tally) show(e natsx.Event) {
	id := e.Msg.Header.Get("Nats-Msg-Id")
	id = id[strings.LastIndexByte(id, '/')+1:]
	attempt := e.Msg.Attempt()
	var o order
	_ = json.Unmarshal(e.Msg.Data, &o) // the zero order if it does not decode
	switch e.Outcome {
	case natsx.OutcomeSucceeded:
		what := fmt.Sprintf("✓ charged %d.%02d for %d %s", o.Cents/100, o.Cents%100, o.Count, o.Item)
		if attempt > 1 {
			what += fmt.Sprintf(" at attempt %d", attempt)
		}
		t.say.line(green, "billing", id, what)
	case natsx.OutcomeRetried:
		t.say.line(yellow, "billing", id, fmt.Sprintf("↻ attempt %d: %s", attempt, brief(e.Err)))
	case natsx.OutcomeDead:
		t.say.line(red, "billing", id, fmt.Sprintf("✗ dead at attempt %d: %s", attempt, brief(e.Err)))
	case natsx.OutcomeDiscarded:
		t.say.line(grey, "billing", id, "· discarded: "+brief(e.Err))
	default:
		t.say.line(yellow, "billing", id, "… "+string(e.Outcome))
	}
}

func brief(err error) string {
	var panicked *natsx.PanicError
	if errors.As(err, &panicked) {
		return fmt.Sprintf("panic: %v", panicked.Value)
	}
	var undecodable *natsx.DecodeError
	if errors.As(err, &undecodable) {
		return "does not decode: " + undecodable.Err.Error()
	}
	return err.Error()
}

// changed wakes wait. The tally is locked.
func (t *tally) changed() {
	select {
	case t.progress <- struct{}{}:
	default:
	}
}

// wait returns when every published order is settled, or ctx has ended.
func (t *tally) wait(ctx context.Context) {
	for {
		t.mu.Lock()
		open := t.open
		t.mu.Unlock()
		if open == 0 {
			return
		}
		select {
		case <-t.progress:
		case <-ctx.Done():
			return
		}
	}
}

// summary prints the outcomes, and returns the differences from what was published.
func (t *tally) summary(letters []natsx.DeadLetter) (faults []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }

	buried := map[uint64]natsx.DeadLetter{}
	for _, l := range letters {
		if _, mine := t.published[l.Sequence]; !mine {
			continue // of an earlier run of the same shop
		}
		if _, twice := buried[l.Sequence]; twice {
			fault("sequence %d has two dead letters", l.Sequence)
		}
		buried[l.Sequence] = l
	}

	var handled, again, discarded, retried, left, asked int
	var dead []string
	for _, seq := range slices.Sorted(maps.Keys(t.published)) {
		o, got := t.published[seq], t.seen[seq]
		if o.Item != "" {
			asked++
		}
		retried += got.retries
		l, hasLetter := buried[seq]
		if !got.settled() && (t.shared || !hasLetter) {
			delete(buried, seq)
			left++
			continue
		}
		got.reason = l.Reason
		want := fateOf(o)
		if t.shared {
			want.retries = got.retries
		}
		if got != want {
			fault("%s (sequence %d) ended as %+v, not as %+v", o.ID, seq, got, want)
		}
		switch got.outcome {
		case natsx.OutcomeSucceeded:
			handled++
			if got.retries > 0 {
				again++
			}
		case natsx.OutcomeDiscarded:
			discarded++
		case natsx.OutcomeDead:
			dead = append(dead, fmt.Sprintf("%-5s %-12s after %s: %s", o.ID, l.Reason, plural(l.Attempts, "attempt"), strings.TrimPrefix(l.Error, "natsx: ")))
		}
	}
	published := len(t.published)
	priced, refused := t.priced.Load(), t.refused.Load()
	if n := handled + discarded + len(dead) + left; n != published {
		fault("%d orders published, %d accounted for", published, n)
	}
	if len(dead) != len(buried) {
		fault("%d orders are dead, %d letters are in the DLQ", len(dead), len(buried))
	}
	unsent := t.unsent.Load()
	if unsent > 0 && !t.shared {
		fault("%d orders could not be sent", unsent)
	}
	if n := priced + refused; n < int64(asked) || n > int64(asked)+unsent {
		fault("%d price requests, %d replies", asked, n)
	}
	if t.repeats.Load() != t.duplicates.Load() {
		fault("%d orders sent twice, %d recognised as duplicates", t.repeats.Load(), t.duplicates.Load())
	}
	sent := int64(published) + t.repeats.Load()
	if n := t.audited.Load(); n > sent && !t.shared {
		fault("%d messages sent, %d audited", sent, n)
	}

	row := func(name, format string, args ...any) {
		t.say.printf("  %s %s\n", t.say.paint(bold, fmt.Sprintf("%-10s", name)), fmt.Sprintf(format, args...))
	}
	t.say.printf("\n%s\n", t.say.paint(bold, "Summary"))
	row("published", "%d orders, %d of them sent twice and stored once", published, t.duplicates.Load())
	row("handled", "%d, %d of them after a retry", handled, again)
	row("retried", "%d attempts", retried)
	row("discarded", "%d", discarded)
	row("dead", "%d letters in the DLQ", len(dead))
	for _, d := range dead {
		t.say.printf("             %s\n", t.say.paint(red, d))
	}
	row("replies", "%d: %d prices, %d refused", priced+refused, priced, refused)
	row("audited", "%d of %d messages sent here", t.audited.Load(), sent)
	if left > 0 {
		row("left", "%d in the stream, not settled here", left)
	}
	return faults
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
