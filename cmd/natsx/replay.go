package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// replayed is a message as replay prints it.
type replayed struct {
	Stream   string      `json:"stream"`
	Sequence uint64      `json:"sequence"`
	Subject  string      `json:"subject"`
	Time     time.Time   `json:"time"`
	Header   nats.Header `json:"header,omitempty"`
	Data     []byte      `json:"data"`
	Text     string      `json:"text,omitempty"` // the data, where it is text
}

func prepareReplay(t *tool) func(context.Context) error {
	stream := t.flags.String("stream", "", "`NAME` of the stream (default the one whose subjects match the filter)")
	var from, until moment
	t.flags.Var(&from, "since", "begin with what was stored at `TIME`: "+momentForms)
	t.flags.Var(&until, "until", "end with what was stored at `TIME`")
	fromSeq := t.flags.Uint64("from-sequence", 0, "begin with the message of this `SEQUENCE`")
	untilSeq := t.flags.Uint64("until-sequence", 0, "end with the message of this `SEQUENCE`")
	limit := t.flags.Int("limit", 0, "end after `NUMBER` messages")
	speed := t.flags.Float64("speed", 0, "1 for the pace at which the messages were stored, 10 for ten times as fast (default as fast as possible)")
	count := t.flags.Bool("count", false, "count the messages by subject and print none")
	to := t.flags.String("to", "", "copy each message to `PREFIX`.<its subject>, which another stream must have")
	t.flags.BoolVar(&t.yes, "yes", false, "do not ask before -to")
	return func(ctx context.Context) error {
		filter, err := t.oneArg("a subject filter")
		if err != nil {
			return err
		}
		if *count && *to != "" {
			return usagef("replay: -count and -to exclude each other")
		}
		r := natsx.Replay(filter)
		for name, set := range map[string]func(){
			"stream":         func() { r = r.Stream(*stream) },
			"since":          func() { r = r.FromTime(from.Time) },
			"until":          func() { r = r.UntilTime(until.Time) },
			"from-sequence":  func() { r = r.FromSequence(*fromSeq) },
			"until-sequence": func() { r = r.UntilSequence(*untilSeq) },
			"limit":          func() { r = r.Limit(*limit) },
			"speed":          func() { r = r.Speed(*speed) },
		} {
			if t.isSet(name) {
				set()
			}
		}
		handle, done := t.printMessages()
		if *count {
			handle, done = t.countMessages()
		}
		if err := r.Handle(handle).Validate(); err != nil {
			return usageError{err}
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		verb := "read"
		if *to != "" {
			verb = "copied"
			if handle, err = t.copyMessages(ctx, *to); err != nil {
				return err
			}
			done = func() error { return nil }
			if err := t.confirm(ctx, fmt.Sprintf("Copy what %s has to %s.>?", filter, *to)); err != nil {
				return err
			}
		}
		spec := r.Handle(handle)
		bar := t.progress(verb)
		if *count || *to != "" || !isTerminal(t.out) { // printed lines are progress enough
			spec = spec.Progress(func(p natsx.ReplayProgress) { bar.set(p.Done, p.Total, p.Done > 0 && p.Done == p.Total) })
		}
		broker := natsx.NewBroker(t.nc, natsx.WithJetStream(t.js), natsx.WithLogger(slog.New(slog.NewTextHandler(t.err, nil))))
		report, err := broker.Replay(ctx, spec)
		bar.end()
		if done := done(); err == nil {
			err = done
		}
		var failure *natsx.ReplayFailure
		if errors.As(err, &failure) {
			err = fmt.Errorf("message %d of stream %q: %w", failure.Sequence, failure.Stream, failure.Err)
		}
		if err != nil && report.Next > 0 {
			fmt.Fprintf(t.err, "%d messages %s; to go on from there: -from-sequence %d\n", report.Handled, verb, report.Next)
		}
		if err == nil && *to != "" {
			if t.json {
				return t.printJSON(map[string]any{"stream": report.Stream, "copied": report.Handled, "first": report.First, "last": report.Last})
			}
			fmt.Fprintf(t.out, "copied %d messages of stream %s\n", report.Handled, report.Stream)
		}
		return err
	}
}

// printMessages prints each message.
func (t *tool) printMessages() (natsx.Handler, func() error) {
	return func(_ context.Context, m *natsx.Msg) error {
		if t.json {
			r := replayed{m.Stream(), m.Sequence(), m.Subject, m.Time(), m.Header, m.Data, ""}
			if utf8.Valid(m.Data) {
				r.Text = string(m.Data)
			}
			return t.printJSON(r)
		}
		_, err := fmt.Fprintf(t.out, "%d\t%s\t%s\t%s\n", m.Sequence(), m.Time().Format(time.RFC3339Nano), clean(m.Subject), clean(string(m.Data)))
		return err
	}, func() error { return nil }
}

// maxCounted bounds the subjects that are counted one by one.
const maxCounted = 10_000

// countMessages counts the messages by subject, and prints that at the end.
func (t *tool) countMessages() (natsx.Handler, func() error) {
	type subjectCount struct {
		Subject string `json:"subject"`
		Count   int    `json:"count"`
	}
	var total int
	var order []*subjectCount
	bySubject := map[string]*subjectCount{}
	count := func(_ context.Context, m *natsx.Msg) error {
		total++
		c := bySubject[m.Subject]
		if c == nil {
			if len(order) >= maxCounted {
				return nil
			}
			c = &subjectCount{Subject: m.Subject}
			bySubject[m.Subject], order = c, append(order, c)
		}
		c.Count++
		return nil
	}
	return count, func() error {
		if t.json {
			return t.printJSON(struct {
				Total    int             `json:"total"`
				Subjects []*subjectCount `json:"subjects"`
			}{total, order})
		}
		tab := t.table("count", "subject")
		for _, c := range order {
			tab.row(strconv.Itoa(c.Count), c.Subject)
		}
		tab.row(strconv.Itoa(total), "total")
		return tab.end()
	}
}

// copyMessages publishes each message below a prefix, where a stream has to store it: one
// that is none of those read, so that a copy is never copied in turn. A repetition stores
// no message twice within the duplicate window of that stream.
func (t *tool) copyMessages(ctx context.Context, prefix string) (natsx.Handler, error) {
	targets := map[string]bool{}
	names := t.js.StreamNames(ctx, jetstream.WithStreamListSubject(prefix+".>"))
	for name := range names.Name() {
		targets[name] = true
	}
	if err := names.Err(); err != nil {
		return nil, fmt.Errorf("streams of %s.> cannot be looked up: %w", prefix, err)
	}
	if len(targets) == 0 {
		return nil, fmt.Errorf("no stream has %s.>, so that the copies would be lost", prefix)
	}
	pub := natsx.NewPublisher(t.nc, natsx.WithPublisherJetStream(t.js))
	return func(ctx context.Context, m *natsx.Msg) error {
		if targets[m.Stream()] {
			return fmt.Errorf("stream %q has %s.> itself: copies must go to another stream", m.Stream(), prefix)
		}
		e := natsx.To(prefix + "." + m.Subject).Data(m.Data).MsgID(fmt.Sprintf("replay/%s/%d@%d", m.Stream(), m.Sequence(), m.Time().UnixNano()))
		for name, values := range m.Header {
			if low := strings.ToLower(name); !strings.HasPrefix(low, "nats-") && !strings.HasPrefix(low, "natsx-") { // they were about the original
				for _, value := range values {
					e = e.Header(name, value)
				}
			}
		}
		_, err := pub.Publish(ctx, e)
		return err
	}, nil
}
