package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/natsx/natsx"
)

// redriving is what redrive and edit have in common.
type redriving struct {
	*selection
	rate        float64
	maxRedrives int
	dryRun      bool
}

func (t *tool) redriving() *redriving {
	r := &redriving{selection: t.selection()}
	t.flags.Float64Var(&r.rate, "rate", 0, "at most `NUMBER` letters a second")
	t.flags.IntVar(&r.maxRedrives, "max-redrives", natsx.DefaultMaxRedrives, "leave letters alone that were redriven `NUMBER` times")
	t.flags.BoolVar(&r.dryRun, "dry-run", false, "change nothing, report what would become of each letter")
	t.flags.BoolVar(&t.yes, "yes", false, "do not ask")
	t.flags.BoolVar(&t.yes, "force", false, "same as -yes")
	return r
}

func (t *tool) redriveQuery(r *redriving, last uint64) natsx.DeadLetterQuery {
	q := t.query(r.selection, last, nil).MaxRedrives(r.maxRedrives)
	if t.isSet("rate") {
		q = q.Rate(r.rate)
	}
	if r.dryRun {
		q = q.DryRun()
	}
	return q
}

func prepareLettersRedrive(t *tool) func(context.Context) error {
	r := t.redriving()
	return func(ctx context.Context) error {
		if err := t.readArgs(r.selection); err != nil {
			return err
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		return t.redrive(ctx, r, "Redrive", nil)
	}
}

// redriveReport is a report as JSON shows it.
type redriveReport struct {
	Redriven  int                      `json:"redriven"`
	Unchanged int                      `json:"unchanged"`
	Skipped   int                      `json:"skipped"`
	Failed    int                      `json:"failed"`
	Skips     map[natsx.SkipReason]int `json:"skips,omitempty"`
	Errors    []letterFault            `json:"errors,omitempty"`
	DryRun    bool                     `json:"dry_run"`
}

type letterFault struct {
	Sequence uint64 `json:"dlq_sequence"`
	Error    string `json:"error"`
}

// maxFaults is how many failures the JSON report names; it counts all.
const maxFaults = 1000

// errUnchanged is of a letter that an edit has not changed. It stays.
var errUnchanged = errors.New("not changed by the edit")

// redrive counts, asks, redrives and reports. edit may be nil.
func (t *tool) redrive(ctx context.Context, r *redriving, verb string, edit func(*natsx.DeadLetter) error) error {
	last := t.bound(ctx, r.dlq)
	q := t.redriveQuery(r, last)
	counts, err := q.Count(ctx, t.nc)
	if err != nil {
		return judged(err)
	}
	total := uint64(counts.Total + counts.Foreign)
	if !r.dryRun && counts.Total > 0 {
		if err := t.confirm(ctx, verb+" "+countedText(r.dlq, counts)+"?"); err != nil {
			return err
		}
	}
	bar := t.progress("done")
	var fates *table
	if r.dryRun && !t.json && counts.Total > 0 {
		fates = t.table("seq", "subject", "durable", "would be")
	}
	unchanged := 0
	var faults []letterFault // those of the report may all be of unchanged letters
	report, err := q.Redrive(ctx, t.nc, natsx.WithRedriveEdit(edit), natsx.WithRedriveProgress(func(p natsx.RedriveProgress) {
		fate := "redriven"
		switch {
		case errors.Is(p.Err, errUnchanged):
			unchanged++
			fate = errUnchanged.Error()
		case p.Err != nil:
			fate = "failed: " + faultText(p.Err)
			if len(faults) < maxFaults {
				faults = append(faults, letterFault{p.Letter.DLQSequence, faultText(p.Err)})
			}
			if fates == nil {
				bar.line(fmt.Sprintf("letter %d: %s", p.Letter.DLQSequence, faultText(p.Err)))
			}
		case p.Skip != "":
			fate = "skipped: " + string(p.Skip)
		}
		if fates != nil {
			fates.row(strconv.FormatUint(p.Letter.DLQSequence, 10), p.Letter.Subject, p.Letter.Durable, fate)
			return
		}
		bar.set(uint64(p.Done()), max(total, uint64(p.Done())), false)
	}))
	if fates == nil {
		done := uint64(report.Redriven + report.Skipped + report.Failed)
		bar.set(done, max(total, done), true)
	}
	bar.end()
	if fates != nil {
		fates.end()
	}
	report.Failed -= unchanged
	if t.json {
		j := redriveReport{report.Redriven, unchanged, report.Skipped, report.Failed, report.Skips, faults, r.dryRun}
		if err := t.printJSON(j); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(t.out, reportText(report, unchanged, r.dryRun))
	}
	if err == nil && report.Failed > 0 {
		return errPartly
	}
	return judged(err)
}

// faultText is what is wrong with a letter that is named beside it.
func faultText(err error) string {
	var l *natsx.LetterError
	if errors.As(err, &l) && l.Err != nil {
		err = l.Err
	}
	return strings.TrimPrefix(err.Error(), "natsx: ")
}

func reportText(r natsx.RedriveReport, unchanged int, dryRun bool) string {
	text := fmt.Sprintf("redriven %d, skipped %d", r.Redriven, r.Skipped)
	if dryRun {
		text = "would be " + text
	}
	var skips []string
	for _, reason := range slices.Sorted(maps.Keys(r.Skips)) {
		skips = append(skips, fmt.Sprintf("%s %d", reason, r.Skips[reason]))
	}
	if len(skips) > 0 {
		text += " (" + strings.Join(skips, ", ") + ")"
	}
	if unchanged > 0 {
		text += fmt.Sprintf(", unchanged %d", unchanged)
	}
	return fmt.Sprintf("%s, failed %d", text, r.Failed)
}
