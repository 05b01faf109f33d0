package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
)

// letterSite has n dead letters of billing, with the sequences from 1 on, permanent and
// exhausted in turn, and behind them one of mail, and a message that is no letter.
func letterSite(t *testing.T, n int) *site {
	t.Helper()
	s := newSite(t, natsx.Stream("ORDERS").Subjects("orders.>"), natsx.Stream("DLQ").Subjects("dlq.>"))
	for i := range n {
		s.publish(t, natsx.To(fmt.Sprintf("orders.%d", i+1)).Header("X-Number", fmt.Sprint(i+1)).JSON(map[string]int{"cents": -i}))
	}
	s.runRoutes(t, n, natsx.Route("orders.*").Durable("billing").Concurrency(1).Retry(0).DLQ("dlq.orders").Handle(func(_ context.Context, m *natsx.Msg) error {
		err := fmt.Errorf("nothing to pay for %s", m.Subject)
		if m.Sequence()%2 == 1 {
			err = natsx.Permanent(err)
		}
		return err
	}))
	s.publish(t, natsx.To("orders.mail.1").Data([]byte("hello")))
	s.runRoutes(t, 1, natsx.Route("orders.mail.*").Durable("mail").Retry(0).DLQ("dlq.mail").Handle(func(context.Context, *natsx.Msg) error {
		panic("no mail \x1b[2J")
	}))
	s.publish(t, natsx.To("dlq.orders").Header("X-Evil", "\x1b[31m").Data([]byte("no letter")))
	return s
}

// left are the sequences in the DLQ.
func (s *site) left(t *testing.T) (seqs []uint64) {
	t.Helper()
	for l, err := range natsx.DeadLetters("dlq.>").List(testContext(t), s.nc) {
		if err != nil && !errors.Is(err, natsx.ErrNotALetter) {
			t.Fatal(err)
		}
		seqs = append(seqs, l.DLQSequence)
	}
	return seqs
}

func (s *site) wantLeft(t *testing.T, want ...uint64) {
	t.Helper()
	if diff := cmp.Diff(want, s.left(t)); diff != "" {
		t.Errorf("in the DLQ (-want +got):\n%s", diff)
	}
}

// last is the message of ORDERS that was stored last.
func (s *site) last(t *testing.T) (header nats.Header, data string) {
	t.Helper()
	stream, err := s.js.Stream(testContext(t), "ORDERS")
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.GetMsg(testContext(t), stream.CachedInfo().State.LastSeq)
	if err != nil {
		t.Fatal(err)
	}
	return m.Header, string(m.Data)
}

func TestLettersRead(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	for _, test := range []struct {
		name string
		args string
		want []uint64
	}{
		{"all", "dlq.>", []uint64{1, 2, 3, 4, 5, 6}},
		{"one DLQ", "dlq.mail", []uint64{5}},
		{"durable", "dlq.> -durable billing", []uint64{1, 2, 3, 4}},
		{"reason", "dlq.> -reason exhausted", []uint64{2, 4}},
		{"subject", "dlq.> -subject orders.mail.>", []uint64{5}},
		{"since", "dlq.> -since 1h -limit 2", []uint64{1, 2}},
		{"since tomorrow", "dlq.> -since 2100-01-01", nil},
		{"until", "dlq.> -until 1d", nil},
		{"sequences", "dlq.> -sequence 4,1 3", []uint64{1, 3, 4}},
		{"range", "dlq.> 2-3 -sequence 5", []uint64{2, 3, 5}},
		{"limit", "dlq.> -limit 3", []uint64{1, 2, 3}},
		{"error", "dlq.> -error for.orders.[23]$", []uint64{2, 3}},
		{"all at once", "dlq.orders 1-3 -durable billing -reason permanent -subject orders.* -since 2d -limit 5 -error nothing", []uint64{1, 3}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := runTool(t, s.Server, append([]string{"letters", "ls", "-json"}, strings.Fields(test.args)...)...)
			r.want(t, exitOK)
			var got []uint64
			for line := range strings.Lines(r.out) {
				var l letter
				if err := json.Unmarshal([]byte(line), &l); err != nil {
					t.Fatalf("%v: %q", err, line)
				}
				got = append(got, l.Sequence)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("letters (-want +got):\n%s", diff)
			}
		})
	}

	r := runTool(t, s.Server, "letters", "ls", "dlq.>")
	r.want(t, exitOK, "SEQ\tDIED\tDURABLE\tREASON\t", "\tbilling\tpermanent\t1\t0\torders.1\tnothing to pay for orders.1\n", "6\t", "\tno letter\t")
	r.wantNot(t, "\x1b")
	runTool(t, s.Server, "letters", "ls", "dlq.orders", "-durable", "nobody").want(t, exitOK, "no letters")

	r = runTool(t, s.Server, "letters", "show", "dlq.>", "1", "5", "6")
	r.want(t, exitOK, "Letter 1 of stream DLQ on dlq.orders\n", "Error      nothing to pay for orders.1\n", "X-Number: 1\n", "Payload    11 bytes\n{\"cents\":0}\n",
		"Message    1 of stream ORDERS on orders.1", "Stack\ngoroutine", `X-Evil: \x1b[31m`)
	r.wantNot(t, "\x1b")
	r = runTool(t, s.Server, "letters", "show", "dlq.orders", "2", "-raw")
	r.want(t, exitOK)
	if r.out != `{"cents":-1}` {
		t.Errorf("raw payload %q", r.out)
	}
	r = runTool(t, s.Server, "letters", "show", "dlq.orders", "2", "-json")
	r.want(t, exitOK, `"dlq_sequence":2,`, `"text":"{\"cents\":-1}"`, `"reason":"exhausted"`, `"X-Number":["2"]`)
	runTool(t, s.Server, "letters", "show", "dlq.orders", "2", "99", "77").want(t, exitFailed, "not in dlq.orders: [77 99]", "Letter 2 ")

	runTool(t, s.Server, "letters", "count", "dlq.>").want(t, exitOK, "2\tbilling\texhausted\n2\tbilling\tpermanent\n1\tmail\tpanic\n5\ttotal\t\n1\tno letters\t\n")
	runTool(t, s.Server, "letters", "count", "dlq.>", "-durable", "mail", "-json").want(t, exitOK, `{"total":1,"foreign":0,"groups":[{"durable":"mail","reason":"panic","count":1}]}`)

	for args, text := range map[string]string{
		"ls":                             "which DLQ?",
		"ls dlq.> 0":                     "not a sequence",
		"ls dlq.> 5-4":                   "not a range",
		"ls dlq.> -reason bad":           `"bad"`,
		"ls dlq.> -durable a.b":          `"a.b"`,
		"ls dlq.> -limit 0":              "must be at least 1",
		"ls dlq.> -since yesterday":      "how long ago",
		"ls dlq.> -error (":              "parsing regexp",
		"ls dlq..x":                      "dlq..x",
		"show dlq.>":                     "which letters?",
		"show dlq.> 1 2 -raw":            "for one letter",
		"edit dlq.> 1":                   "no terminal for an editor",
		"edit dlq.> -data -":             "for one letter",
		"edit dlq.> 1 -header x":         "NAME=VALUE",
		"edit dlq.> 1 -data - -with cat": "exclude each other",
		"frobnicate":                     "letters does what?",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			runTool(t, s.Server, append([]string{"letters"}, strings.Fields(args)...)...).want(t, exitUsage, text)
		})
	}
	runTool(t, s.Server, "letters", "ls", "prices.dead").want(t, exitFailed, "no stream")
	runTool(t, s.Server, "letters", "-h").want(t, exitOK, "letters purge DLQ")
}

func TestLettersRedrive(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	runTool(t, s.Server, "letters", "redrive", "dlq.>").want(t, exitUnconfirmed, "needs -yes")
	r := runTool(t, s.Server, "letters", "redrive", "dlq.>", "-dry-run")
	r.want(t, exitOK, "1\torders.1\tbilling\tredriven\n", "skipped: foreign\n", "would be redriven 5, skipped 1 (foreign 1), failed 0\n")
	s.wantLeft(t, 1, 2, 3, 4, 5, 6)

	// Single letters, and then what is left, with one that cannot be.
	r = runTool(t, s.Server, "letters", "redrive", "dlq.orders", "2", "-yes")
	r.want(t, exitOK, "redriven 1, skipped 0, failed 0\n", "1 of 1 done\n")
	s.wantLeft(t, 1, 3, 4, 5, 6)
	if h, data := s.last(t); h.Get(natsx.HeaderRedriveTo) != "billing" || h.Get("X-Number") != "2" || data != `{"cents":-1}` {
		t.Errorf("redriven %v %q", h, data)
	}
	if err := s.js.DeleteConsumer(testContext(t), "ORDERS", "mail"); err != nil {
		t.Fatal(err)
	}
	r = runTool(t, s.Server, "letters", "redrive", "dlq.>", "-force", "-json")
	r.want(t, exitPartly, "letter 5: ", `"mail"`)
	var report redriveReport
	if err := json.Unmarshal([]byte(r.out), &report); err != nil {
		t.Fatal(err)
	}
	want := redriveReport{Redriven: 3, Skipped: 1, Failed: 1, Skips: map[natsx.SkipReason]int{natsx.SkipForeign: 1}, Errors: report.Errors}
	if diff := cmp.Diff(want, report); diff != "" || len(report.Errors) != 1 || report.Errors[0].Sequence != 5 {
		t.Errorf("report (-want +got):\n%s\n%v", diff, report.Errors)
	}
	s.wantLeft(t, 5, 6)
	runTool(t, s.Server, "letters", "redrive", "dlq.orders").want(t, exitOK, "redriven 0, skipped 1 (foreign 1), failed 0")
}

func TestLettersEdit(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	runTool(t, s.Server, "letters", "edit", "dlq.orders", "1", "-with", "cat").want(t, exitUnconfirmed, "needs -yes")
	runTool(t, s.Server, "letters", "edit", "dlq.orders", "1-2", "-with", "cat", "-yes").want(t, exitOK, "redriven 0, skipped 0, unchanged 2, failed 0")
	runTool(t, s.Server, "letters", "edit", "dlq.orders", "1-2", "-with", "echo mend it yourself >&2; false", "-yes").want(t, exitPartly, "letter 2: edit: ", "mend it yourself", "failed 2")
	runTool(t, s.Server, "letters", "edit", "dlq.orders", "1-2", "-with", "tr 0 7", "-dry-run").want(t, exitOK, "1\torders.1\tbilling\tredriven\n", "2\torders.2\tbilling\tnot changed by the edit\n")
	s.wantLeft(t, 1, 2, 3, 4, 5, 6)

	runTool(t, s.Server, "letters", "edit", "dlq.orders", "1-2", "-with", "tr 0 7", "-yes").want(t, exitOK, "redriven 1, skipped 0, unchanged 1, failed 0")
	s.wantLeft(t, 2, 3, 4, 5, 6)
	if h, data := s.last(t); data != `{"cents":7}` || h.Get("X-Number") != "1" || h.Get(natsx.HeaderRedriveTo) != "billing" {
		t.Errorf("redriven %v %q", h, data)
	}
	file := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(file, []byte("\x00new"), 0o600); err != nil {
		t.Fatal(err)
	}
	runTool(t, s.Server, "letters", "edit", "dlq.orders", "3", "-data", file, "-header", "Mended=by me", "-delete-header", "X-Number", "-yes").want(t, exitOK, "redriven 1,")
	h, data := s.last(t)
	if data != "\x00new" || h.Get("Mended") != "by me" || h["X-Number"] != nil {
		t.Errorf("redriven %v %q", h, data)
	}
	s.wantLeft(t, 2, 4, 5, 6)

	// The durable gets what was mended, as its first attempt.
	var got []string
	s.runRoutes(t, 2, natsx.Route("orders.*").Durable("billing").Concurrency(1).Handle(func(_ context.Context, m *natsx.Msg) error {
		got = append(got, fmt.Sprintf("%s %d %q", m.Subject, m.Attempt(), m.Data))
		return nil
	}))
	slices.Sort(got)
	if diff := cmp.Diff([]string{`orders.1 1 "{\"cents\":7}"`, `orders.3 1 "\x00new"`}, got); diff != "" {
		t.Errorf("handled (-want +got):\n%s", diff)
	}
}

func TestLettersPurge(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	runTool(t, s.Server, "letters", "purge", "dlq.>").want(t, exitUnconfirmed, "needs -yes")
	runTool(t, s.Server, "letters", "purge", "dlq.>", "-reason", "permanent", "-dry-run").want(t, exitOK, "2 letters would be deleted\n")
	s.wantLeft(t, 1, 2, 3, 4, 5, 6)
	runTool(t, s.Server, "letters", "purge", "dlq.>", "-reason", "permanent", "-limit", "1", "-yes").want(t, exitOK, "1 letters deleted\n")
	s.wantLeft(t, 2, 3, 4, 5, 6)
	runTool(t, s.Server, "letters", "purge", "dlq.>", "3-4", "-force", "-json").want(t, exitOK, `{"purged":2,"dry_run":false}`)
	s.wantLeft(t, 2, 5, 6)
	runTool(t, s.Server, "letters", "purge", "dlq.>", "-yes").want(t, exitOK, "2 letters deleted\n", "read\n")
	s.wantLeft(t, 6) // no letter
}

func TestLetterText(t *testing.T) {
	t.Parallel()
	l := &natsx.DeadLetter{DLQSequence: 7, Subject: "orders.1", Error: "line\nbreak", Header: nats.Header{"A": {"1", "2"}, "B": {"x: y"}}}
	for _, data := range []string{"", "text", "text\n", "# no comment\n\nmore\r\n", "\n\n"} {
		l.Data = []byte(data)
		for _, saved := range []string{"", "\n"} { // an editor ends the last line
			text := letterText(l)
			if saved != "" && !strings.HasSuffix(data, "\n") {
				text = append(text, saved...)
			}
			c, err := parseLetterText(text, l.Data)
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			if string(c.data) != data || !maps.EqualFunc(l.Header, c.header, slices.Equal) {
				t.Errorf("%q became %q, %v", text, c.data, c.header)
			}
		}
	}
	for _, text := range []string{"no header\n\nx", "A: 1", ": x\n\n"} {
		if c, err := parseLetterText([]byte(text), nil); err == nil {
			t.Errorf("%q is taken as %v", text, c)
		}
	}
	if c, err := parseLetterText([]byte(" \n"), nil); c != nil || err != nil {
		t.Errorf("an empty file is %v, %v", c, err)
	}
}
