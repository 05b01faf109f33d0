package main

import (
	"strings"
	"testing"
	"time"

	"github.com/natsx/natsx"
)

func TestRunChecksItself(t *testing.T) {
	t.Setenv("NATS_URL", "")
	var out strings.Builder
	if err := run(t.Context(), &screen{out: &out}); err != nil {
		t.Fatalf("%v after:\n%s", err, out.String())
	}
	for _, want := range []string{"rebuild: ", "interrupted after", "30000 of 30000", "ten times as fast: 40 of 40", "the audit objects to", "every balance"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
}

func TestBar(t *testing.T) {
	t.Parallel()
	steps := []natsx.ReplayProgress{
		{Done: 10, Total: 100, Remaining: 9 * time.Second},
		{Done: 11, Total: 100, Remaining: 8 * time.Second},
		{Done: 60, Total: 100, Remaining: 4 * time.Second},
		{Done: 100, Total: 100},
	}
	for name, c := range map[string]struct {
		terminal bool
		want     string
	}{
		"piped": {false, "t: 10 of 100, about 9s left\nt: 60 of 100, about 4s left\nt: 100 of 100\nend\n"},
		"terminal": {true, "" +
			"\r\x1b[2Kt                  [###...........................]  10 %  10 of 100, about 9s left" +
			"\r\x1b[2Kt                  [###...........................]  11 %  11 of 100, about 8s left" +
			"\r\x1b[2Kt                  [##################............]  60 %  60 of 100, about 4s left" +
			"\r\x1b[2Kt                  [##############################] 100 %  100 of 100\nend\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			screen := &screen{out: &out, terminal: c.terminal}
			show := screen.bar("t")
			for _, p := range steps {
				show(p)
			}
			screen.line("end")
			if got := out.String(); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	var out strings.Builder
	(&screen{out: &out}).bar("t")(natsx.ReplayProgress{})
	if got := out.String(); got != "t: 0 of 0\n" {
		t.Errorf("nothing to do: got %q", got)
	}
}
