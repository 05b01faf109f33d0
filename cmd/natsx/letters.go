package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// letter is a dead letter as JSON shows it. Of what is no letter, fault says why.
type letter struct {
	Sequence uint64    `json:"dlq_sequence"`
	DLQ      string    `json:"dlq_stream"`
	On       string    `json:"dlq_subject"`
	Stored   time.Time `json:"dlq_time"`
	Fault    string    `json:"fault,omitempty"`

	Subject   string       `json:"subject"`
	Stream    string       `json:"stream"`
	Original  uint64       `json:"sequence"`
	Durable   string       `json:"durable"`
	Attempts  int          `json:"attempts"`
	Reason    natsx.Reason `json:"reason"`
	Error     string       `json:"error"`
	Stack     string       `json:"stack,omitempty"`
	Time      time.Time    `json:"time"`
	Published time.Time    `json:"published"`
	Host      string       `json:"host"`
	Redrives  int          `json:"redrives"`
	Pointer   bool         `json:"pointer"`
	Header    nats.Header  `json:"header,omitempty"`
	Data      []byte       `json:"data"`
	Text      string       `json:"text,omitempty"` // the data, where it is text
}

func letterOf(l natsx.DeadLetter, fault error) letter {
	j := letter{
		Sequence: l.DLQSequence, DLQ: l.DLQStream, On: l.DLQSubject, Stored: l.DLQTime,
		Subject: l.Subject, Stream: l.Stream, Original: l.Sequence, Durable: l.Durable, Attempts: l.Attempts, Reason: l.Reason,
		Error: l.Error, Stack: l.Stack, Time: l.Time, Published: l.Published, Host: l.Host,
		Redrives: l.Redrives, Pointer: l.Pointer, Header: l.Header, Data: l.Data,
	}
	if fault != nil {
		j.Fault = strings.TrimPrefix(fault.Error(), "natsx: ")
	}
	if utf8.Valid(l.Data) {
		j.Text = string(l.Data)
	}
	return j
}

// selection is which letters a command is about: flags, and sequences as arguments.
type selection struct {
	dlq     string
	durable string
	reason  string
	subject string
	since   moment
	until   moment
	seqs    sequences
	limit   int
	failed  pattern
}

func (t *tool) selection() *selection {
	s := &selection{}
	fs := t.flags
	fs.StringVar(&s.durable, "durable", "", "letters of the durable with this `NAME`")
	fs.StringVar(&s.reason, "reason", "", "letters with this `REASON`: exhausted, permanent, panic, undecodable or crashed")
	fs.StringVar(&s.subject, "subject", "", "letters of messages whose subject matches `FILTER`")
	fs.Var(&s.since, "since", "letters of messages that died at `TIME` or later: "+momentForms)
	fs.Var(&s.until, "until", "letters of messages that died before `TIME`")
	fs.Var(&s.seqs, "sequence", "letters with these `SEQUENCES` in the DLQ's stream, such as 7,9,12-20; may also be given as arguments behind the DLQ")
	fs.IntVar(&s.limit, "limit", 0, "at most `NUMBER` letters")
	fs.Var(&s.failed, "error", "letters whose error matches the regular `EXPRESSION`")
	return s
}

// read takes the arguments: the DLQ and sequences.
func (t *tool) readArgs(s *selection) error {
	if len(t.args) == 0 {
		return usagef("%s: which DLQ? Give its subject", t.flags.Name())
	}
	s.dlq = t.args[0]
	for _, text := range t.args[1:] {
		if err := s.seqs.Set(text); err != nil {
			return usagef("%s: sequence %q: %w", t.flags.Name(), text, err)
		}
	}
	return nil
}

// query selects the letters up to a sequence, 0 for all. seen, if there is one, is called
// for each.
func (t *tool) query(s *selection, last uint64, seen func(natsx.DeadLetter)) natsx.DeadLetterQuery {
	q := natsx.DeadLetters(s.dlq)
	for name, set := range map[string]func(){
		"durable": func() { q = q.Durable(s.durable) },
		"reason":  func() { q = q.Reason(natsx.Reason(s.reason)) },
		"subject": func() { q = q.Subject(s.subject) },
		"since":   func() { q = q.Since(s.since.Time) },
		"until":   func() { q = q.Until(s.until.Time) },
		"limit":   func() { q = q.Limit(s.limit) },
	} {
		if t.isSet(name) {
			set()
		}
	}
	if single := s.seqs.single(); single != nil {
		q = q.Sequence(single...)
	}
	if len(s.seqs) > 0 || s.failed.Regexp != nil || last > 0 || seen != nil {
		q = q.Where(func(l natsx.DeadLetter) bool {
			if !s.seqs.has(l.DLQSequence) || s.failed.Regexp != nil && !s.failed.MatchString(l.Error) || last > 0 && l.DLQSequence > last {
				return false
			}
			if seen != nil {
				seen(l)
			}
			return true
		})
	}
	if t.domain != "" {
		q = q.Domain(t.domain)
	} else if t.apiPrefix != "" {
		q = q.APIPrefix(t.apiPrefix)
	}
	return q
}

// judged has an error of what the command line asked for be one of usage.
func judged(err error) error {
	for _, fault := range []error{natsx.ErrInvalidSubject, natsx.ErrInvalidName, natsx.ErrOutOfRange, natsx.ErrOptionConflict} {
		var letter *natsx.LetterError
		if errors.Is(err, fault) && !errors.As(err, &letter) {
			return usageError{err}
		}
	}
	return err
}

func prepareLettersLs(t *tool) func(context.Context) error {
	s := t.selection()
	return func(ctx context.Context) error {
		if err := t.readArgs(s); err != nil {
			return err
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		var tab *table
		for l, err := range t.query(s, 0, nil).List(ctx, t.nc) {
			if err != nil && !errors.Is(err, natsx.ErrNotALetter) {
				return judged(err)
			}
			if t.json {
				if err := t.printJSON(letterOf(l, err)); err != nil {
					return err
				}
				continue
			}
			if tab == nil {
				tab = t.table("seq", "died", "durable", "reason", "attempts", "redrives", "subject", "error")
			}
			died := l.Time.Local().Format(time.DateTime)
			if err != nil {
				l.Reason, l.Error = "no letter", err.Error()
				died = l.DLQTime.Local().Format(time.DateTime)
			}
			if err := tab.row(strconv.FormatUint(l.DLQSequence, 10), died, l.Durable, string(l.Reason),
				strconv.Itoa(l.Attempts), strconv.Itoa(l.Redrives), cmp.Or(l.Subject, l.DLQSubject), l.Error); err != nil {
				return err
			}
		}
		if tab != nil {
			return tab.end()
		}
		if !t.json {
			fmt.Fprintln(t.err, "no letters")
		}
		return nil
	}
}

func prepareLettersShow(t *tool) func(context.Context) error {
	raw := t.flags.Bool("raw", false, "print the payload of one letter alone, byte by byte")
	s := &selection{}
	return func(ctx context.Context) error {
		if err := t.readArgs(s); err != nil {
			return err
		}
		single := s.seqs.single()
		switch {
		case single == nil:
			return usagef("letters show: which letters? Give their sequences, one by one")
		case *raw && len(single) != 1:
			return usagef("letters show: -raw is for one letter")
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		missing := map[uint64]bool{}
		for _, seq := range single {
			missing[seq] = true
		}
		for l, err := range t.query(s, 0, nil).List(ctx, t.nc) {
			if err != nil && !errors.Is(err, natsx.ErrNotALetter) {
				return judged(err)
			}
			delete(missing, l.DLQSequence)
			switch {
			case *raw && l.Pointer:
				err = fmt.Errorf("letter %d is a pointer: its payload is message %d of stream %q", l.DLQSequence, l.Sequence, l.Stream)
			case *raw:
				_, err = t.out.Write(l.Data)
			case t.json:
				err = t.printJSON(letterOf(l, err))
			default:
				_, err = io.WriteString(t.out, showLetter(l, err))
			}
			if err != nil {
				return err
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("not in %s: %v", s.dlq, slices.Sorted(maps.Keys(missing)))
		}
		return nil
	}
}

// showLetter describes a letter in full.
func showLetter(l natsx.DeadLetter, fault error) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-10s %s\n", name, clean(fmt.Sprintf(format, args...)))
	}
	at := func(at time.Time) string {
		return at.Local().Format(time.RFC3339) + " (" + since(at) + " ago)"
	}
	fmt.Fprintf(&b, "Letter %d of stream %s on %s\n", l.DLQSequence, clean(l.DLQStream), clean(l.DLQSubject))
	if fault != nil {
		line("No letter", "%s", strings.TrimPrefix(fault.Error(), "natsx: "))
	} else {
		line("Died", "%s, %s, attempt %d, on host %q", at(l.Time), l.Reason, l.Attempts, l.Host)
		line("Error", "%s", l.Error)
		line("Durable", "%s", l.Durable)
		line("Message", "%d of stream %s on %s, stored %s", l.Sequence, l.Stream, l.Subject, at(l.Published))
		if l.Redrives > 0 {
			line("Redriven", "%d times", l.Redrives)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.Header)) {
		for _, value := range l.Header[name] {
			line("Header", "%s: %s", name, value)
		}
	}
	if l.Stack != "" {
		fmt.Fprintf(&b, "  Stack\n%s\n", cleanBut(l.Stack, "\n\t"))
	}
	if l.Pointer {
		line("Payload", "in the original message")
	} else {
		fmt.Fprintf(&b, "  Payload    %d bytes\n%s\n", len(l.Data), cleanBut(string(l.Data), "\n\t"))
	}
	return b.String()
}

// letterGroup is a group of a count as JSON shows it.
type letterGroup struct {
	Durable string       `json:"durable"`
	Reason  natsx.Reason `json:"reason"`
	Count   int          `json:"count"`
}

func prepareLettersCount(t *tool) func(context.Context) error {
	s := t.selection()
	return func(ctx context.Context) error {
		if err := t.readArgs(s); err != nil {
			return err
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		counts, err := t.query(s, 0, nil).Count(ctx, t.nc)
		if err != nil {
			return judged(err)
		}
		if t.json {
			groups := []letterGroup{}
			for _, g := range counts.Groups {
				groups = append(groups, letterGroup(g))
			}
			return t.printJSON(struct {
				Total   int           `json:"total"`
				Foreign int           `json:"foreign"`
				Groups  []letterGroup `json:"groups"`
			}{counts.Total, counts.Foreign, groups})
		}
		tab := t.table("count", "durable", "reason")
		for _, g := range counts.Groups {
			tab.row(strconv.Itoa(g.Count), g.Durable, string(g.Reason))
		}
		tab.row(strconv.Itoa(counts.Total), "total", "")
		if counts.Foreign > 0 {
			tab.row(strconv.Itoa(counts.Foreign), "no letters", "")
		}
		return tab.end()
	}
}

// bound is the last sequence of the DLQ, so that what comes while a person thinks is left
// alone; 0 if it is not known.
func (t *tool) bound(ctx context.Context, dlq string) uint64 {
	names := t.js.StreamNames(ctx, jetstream.WithStreamListSubject(dlq))
	var found []string
	for name := range names.Name() {
		found = append(found, name)
	}
	if names.Err() != nil || len(found) != 1 {
		return 0 // the query says why it cannot be
	}
	s, err := t.js.Stream(ctx, found[0])
	if err != nil {
		return 0
	}
	return s.CachedInfo().State.LastSeq
}

// countedText names counted letters, such as "3 letters of dlq.orders (billing: permanent 3)".
func countedText(dlq string, counts natsx.LetterCounts) string {
	var groups []string
	for i, g := range counts.Groups {
		if i == 5 {
			groups = append(groups, "...")
			break
		}
		groups = append(groups, fmt.Sprintf("%s: %s %d", g.Durable, g.Reason, g.Count))
	}
	letters := "letters"
	if counts.Total == 1 {
		letters = "letter"
	}
	return fmt.Sprintf("%d %s of %s (%s)", counts.Total, letters, dlq, strings.Join(groups, ", "))
}

func prepareLettersPurge(t *tool) func(context.Context) error {
	s := t.selection()
	rate := t.flags.Float64("rate", 0, "at most `NUMBER` letters a second")
	dryRun := t.flags.Bool("dry-run", false, "delete nothing, report what would be deleted")
	t.flags.BoolVar(&t.yes, "yes", false, "do not ask")
	t.flags.BoolVar(&t.yes, "force", false, "same as -yes")
	return func(ctx context.Context) error {
		if err := t.readArgs(s); err != nil {
			return err
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		last := t.bound(ctx, s.dlq)
		counts, err := t.query(s, last, nil).Count(ctx, t.nc)
		if err != nil {
			return judged(err)
		}
		bar := t.progress("read")
		read := uint64(0)
		q := t.query(s, last, func(natsx.DeadLetter) {
			bar.set(read, uint64(counts.Total+counts.Foreign), false)
			read++
		})
		if t.isSet("rate") {
			q = q.Rate(*rate)
		}
		if *dryRun {
			q = q.DryRun()
		} else if counts.Total > 0 {
			if err := t.confirm(ctx, "Delete "+countedText(s.dlq, counts)+" for good?"); err != nil {
				return err
			}
		}
		n, err := q.Purge(ctx, t.nc)
		if err == nil {
			bar.set(read, read, true)
		}
		bar.end()
		switch {
		case t.json:
			err = errors.Join(judged(err), t.printJSON(struct {
				Purged int  `json:"purged"`
				DryRun bool `json:"dry_run"`
			}{n, *dryRun}))
		case *dryRun:
			fmt.Fprintf(t.out, "%d letters would be deleted\n", n)
		default:
			fmt.Fprintf(t.out, "%d letters deleted\n", n)
		}
		return judged(err)
	}
}

// sequences is a set of sequences: ranges, of which single ones have one number.
type sequences [][2]uint64

func (s *sequences) String() string { return "" }

func (s *sequences) Set(text string) error {
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		low, err := strconv.ParseUint(from, 10, 64)
		if err != nil || low == 0 {
			return errors.New("not a sequence, which is a number above zero, or a range such as 12-20")
		}
		high := low
		if isRange {
			if high, err = strconv.ParseUint(to, 10, 64); err != nil || high < low {
				return errors.New("not a range such as 12-20")
			}
		}
		*s = append(*s, [2]uint64{low, high})
	}
	return nil
}

// single returns the sequences if none is a range.
func (s sequences) single() (single []uint64) {
	for _, r := range s {
		if r[0] != r[1] {
			return nil
		}
		single = append(single, r[0])
	}
	return single
}

func (s sequences) has(seq uint64) bool {
	return len(s) == 0 || slices.ContainsFunc(s, func(r [2]uint64) bool { return r[0] <= seq && seq <= r[1] })
}

// pattern is a flag with a regular expression.
type pattern struct{ *regexp.Regexp }

func (p *pattern) String() string { return "" }

func (p *pattern) Set(text string) (err error) {
	p.Regexp, err = regexp.Compile(text)
	return err
}
