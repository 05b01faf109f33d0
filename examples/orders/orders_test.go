package main

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/natsx/natsx"
)

// booked is a tally of one good and one declined order with the expected outcomes.
func booked() (*tally, []natsx.DeadLetter) {
	t := newTally(&screen{begun: time.Now(), out: io.Discard}, "billing", false)
	t.publish(1, order{ID: "o-01", Item: "tea", Card: cardGood, Cents: 240})
	t.publish(2, order{ID: "o-02", Item: "tea", Card: cardDeclined, Cents: 240})
	t.priced.Add(2)
	t.audited.Add(2)
	t.seen[1] = fate{outcome: natsx.OutcomeSucceeded}
	t.seen[2] = fate{outcome: natsx.OutcomeDead, retries: retries}
	return t, []natsx.DeadLetter{{Sequence: 2, Reason: natsx.ReasonExhausted, Attempts: 3}}
}

func TestSummaryIsChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		upset func(*tally, *[]natsx.DeadLetter)
		fault string // empty for none
	}{
		"all fits":         {func(*tally, *[]natsx.DeadLetter) {}, ""},
		"handled and lost": {func(t *tally, _ *[]natsx.DeadLetter) { t.seen[1] = fate{outcome: natsx.OutcomeDead} }, "o-01"},
		"letter missing":   {func(_ *tally, ls *[]natsx.DeadLetter) { *ls = nil }, "o-02"},
		"letter twice":     {func(_ *tally, ls *[]natsx.DeadLetter) { *ls = append(*ls, (*ls)[0]) }, "two dead letters"},
		"other reason":     {func(_ *tally, ls *[]natsx.DeadLetter) { (*ls)[0].Reason = natsx.ReasonPanic }, "o-02"},
		"a retry too few": {func(t *tally, _ *[]natsx.DeadLetter) {
			t.seen[2] = fate{outcome: natsx.OutcomeDead, retries: retries - 1}
		}, "o-02"},
		"reply missing":    {func(t *tally, _ *[]natsx.DeadLetter) { t.priced.Add(-1) }, "replies"},
		"order not sent":   {func(t *tally, _ *[]natsx.DeadLetter) { t.unsent.Add(1) }, "sent"},
		"repeat stored":    {func(t *tally, _ *[]natsx.DeadLetter) { t.repeats.Add(1) }, "duplicates"},
		"audited too much": {func(t *tally, _ *[]natsx.DeadLetter) { t.audited.Add(1) }, "audited"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tally, letters := booked()
			c.upset(tally, &letters)
			got := strings.Join(tally.summary(letters), "; ")
			if (got == "") != (c.fault == "") || !strings.Contains(got, c.fault) {
				t.Errorf("faults %q, want one with %q", got, c.fault)
			}
		})
	}
}

// show keeps what a shop prints, and ends its context at a certain line.
type show struct {
	strings.Builder
	until string // part of that line, empty for none
	end   context.CancelFunc
}

func (s *show) Write(line []byte) (int, error) {
	if s.until != "" && strings.Contains(string(line), s.until) {
		s.end()
	}
	return s.Builder.Write(line)
}

func TestRunShowsWhatBecameOfEachOrder(t *testing.T) {
	for name, c := range map[string]struct {
		serve bool
		until string
		want  []string
	}{
		"each customer twice": {false, "", []string{
			"A shop on a nats-server of its own",
			"billing  o-01  ✓ charged 2.90 for 1 coffee\n",
			"billing  o-03  ↻ attempt 1: the bank is busy\n",
			"billing  o-03  ✓ charged 7.20 for 3 tea at attempt 2\n",
			"billing  o-05  ✗ dead at attempt 3: the card is declined\n",
			"billing  o-07  ✗ dead at attempt 1: does not decode",
			"billing  o-10  ↻ attempt 1: panic: the till is on fire\n",
			"pricing  o-11  ? unicorn: 404 no such item\n",
			"billing  o-12  · discarded: the customer cancelled\n",
			"published  26 orders, 3 of them sent twice and stored once\n",
			"handled    16, 4 of them after a retry\n",
			"retried    12 attempts\n",
			"discarded  2\n",
			"dead       8 letters in the DLQ\n",
			"o-05  exhausted    after 3 attempts: the card is declined\n",
			"o-07  undecodable  after 1 attempt: ",
			"o-10  panic        after 3 attempts: handler panicked: the till is on fire\n",
			"o-11  permanent    after 1 attempt: unicorn has no price\n",
			"replies    24: 22 prices, 2 refused\n",
			"Every order is accounted for.\n",
		}},
		"until interrupted": {true, "o-02  ✓ charged", []string{
			"Interrupted: draining.\n", "Summary\n", "Every order is accounted for.\n",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NATS_URL", "")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			out := &show{until: c.until, end: cancel}
			if err := run(ctx, &screen{begun: time.Now(), out: out}, c.serve, false); err != nil {
				t.Errorf("run: %v", err)
			}
			for _, want := range c.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("not printed: %q", want)
				}
			}
			if t.Failed() {
				t.Logf("printed:\n%s", out)
			}
		})
	}
}
