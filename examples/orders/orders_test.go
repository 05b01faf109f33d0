package main

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/natsx/natsx"
)

// booked is a tally of one good and one declined order that went as they should.
func booked() (*tally, []natsx.DeadLetter) {
	t := newTally(&screen{begun: time.Now(), out: io.Discard}, "billing", false)
	t.publish(1, order{ID: "o-01", Item: "tea", Card: cardGood, Cents: 240})
	t.publish(2, order{ID: "o-02", Item: "tea", Card: cardDeclined, Cents: 240})
	t.priced.Add(2)
	t.audited.Add(2)
	t.seen[1] = fate{outcome: natsx.Succeeded}
	t.seen[2] = fate{outcome: natsx.Dead, retries: retries}
	return t, []natsx.DeadLetter{{Sequence: 2, Reason: natsx.ReasonExhausted, Attempts: 3}}
}

func TestSummaryIsChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		upset func(*tally, *[]natsx.DeadLetter)
		fault string // empty when all fits
	}{
		"all fits":         {func(*tally, *[]natsx.DeadLetter) {}, ""},
		"handled and lost": {func(t *tally, _ *[]natsx.DeadLetter) { t.seen[1] = fate{outcome: natsx.Dead} }, "o-01"},
		"letter missing":   {func(_ *tally, ls *[]natsx.DeadLetter) { *ls = nil }, "o-02"},
		"letter twice":     {func(_ *tally, ls *[]natsx.DeadLetter) { *ls = append(*ls, (*ls)[0]) }, "two dead letters"},
		"other reason":     {func(_ *tally, ls *[]natsx.DeadLetter) { (*ls)[0].Reason = natsx.ReasonPanic }, "o-02"},
		"a retry too few":  {func(t *tally, _ *[]natsx.DeadLetter) { t.seen[2] = fate{outcome: natsx.Dead, retries: retries - 1} }, "o-02"},
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

func TestServeDrainsWhenInterrupted(t *testing.T) {
	t.Setenv("NATS_URL", "")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := run(ctx, true, false); err != nil {
		t.Errorf("run: %v", err)
	}
}
