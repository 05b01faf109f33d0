//go:build !windows

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/natsx/natsx"
)

// terminal is the tool, run at a pseudo-terminal of 100 columns.
type terminal struct {
	t    *testing.T
	cmd  *exec.Cmd
	tty  *os.File
	read chan []byte
	said bytes.Buffer
}

func startTerminal(t *testing.T, s *site, env []string, args ...string) *terminal {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), os.Args[0], append(args, "-server", s.ClientURL())...)
	cmd.Env = append(append(os.Environ(), asTool+"=1"), env...)
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 30, Cols: 100})
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, cmd: cmd, tty: tty, read: make(chan []byte)}
	go func() {
		defer close(term.read)
		for {
			part := make([]byte, 4096)
			n, err := tty.Read(part)
			if n > 0 {
				term.read <- part[:n]
			}
			if err != nil { // EIO when the tool has ended
				return
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		for range term.read {
		}
		tty.Close()
	})
	return term
}

// await reads until the tool has printed text.
func (term *terminal) await(text string) {
	term.t.Helper()
	late := time.After(limit)
	for !strings.Contains(term.said.String(), text) {
		select {
		case part, ok := <-term.read:
			if !ok {
				term.t.Fatalf("no %q in %q", text, term.said.String())
			}
			term.said.Write(part)
		case <-late:
			term.t.Fatalf("no %q in time in %q", text, term.said.String())
		}
	}
}

func (term *terminal) typed(text string) {
	term.t.Helper()
	if _, err := io.WriteString(term.tty, text); err != nil {
		term.t.Fatal(err)
	}
}

// end waits for the tool and returns all that it has printed.
func (term *terminal) end(code int) string {
	term.t.Helper()
	for part := range term.read {
		term.said.Write(part)
	}
	err := term.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		term.t.Fatal(err)
	}
	said := term.said.String()
	if got := term.cmd.ProcessState.ExitCode(); got != code {
		term.t.Errorf("exit code %d, want %d: %q", got, code, said)
	}
	return said
}

func TestTerminalConfirms(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 2)
	for _, answer := range []string{"n\n", "\n", "yesterday\n", "\x04"} {
		term := startTerminal(t, s, nil, "letters", "purge", "dlq.orders")
		term.await("Delete 2 letters of dlq.orders (billing: exhausted 1, billing: permanent 1) for good? [y/N] ")
		term.typed(answer)
		if said := term.end(exitUnconfirmed); !strings.Contains(said, "not confirmed, nothing was changed") {
			t.Errorf("answered %q: %q", answer, said)
		}
	}
	s.wantLeft(t, 1, 2, 3, 4)

	term := startTerminal(t, s, nil, "letters", "redrive", "dlq.orders")
	term.await("? [y/N] ")
	if err := term.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if said := term.end(exitInterrupted); !strings.Contains(said, "interrupted") {
		t.Errorf("interrupted: %q", said)
	}
	s.wantLeft(t, 1, 2, 3, 4)

	// What comes while a person thinks is not meant.
	term = startTerminal(t, s, nil, "letters", "purge", "dlq.orders")
	term.await("? [y/N] ")
	s.publish(t, natsx.To("orders.9").Data([]byte("late")))
	s.runRoutes(t, 1, natsx.Route("orders.*").Durable("billing").Retry(0).DLQ("dlq.orders").Handle(func(_ context.Context, m *natsx.Msg) error {
		return natsx.Permanent(errors.New("late"))
	}))
	term.typed("y\n")
	if said := term.end(exitOK); !strings.Contains(said, "2 letters deleted") {
		t.Errorf("confirmed: %q", said)
	}
	s.wantLeft(t, 3, 4, 5)
}

func TestInterrupted(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	term := startTerminal(t, s, nil, "letters", "redrive", "dlq.orders", "-yes", "-rate", "0.01")
	term.await("1 of 5 done") // the next one is far away
	term.typed("\x03")
	said := term.end(exitInterrupted)
	if !strings.Contains(said, "redriven 1, skipped 0, failed 0\r\nnatsx: interrupted") {
		t.Errorf("said %q", said)
	}
	s.wantLeft(t, 2, 3, 4, 5, 6)
}

var bars = regexp.MustCompile(`\r\x1b\[K\[(#*-*)\] +\d+ %  \d+ of (\d+) done`)

func TestTerminalShowsABar(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 10)
	// The rate makes it last for several redraws.
	term := startTerminal(t, s, nil, "letters", "redrive", "dlq.orders", "-durable", "billing", "-yes", "-rate", "20")
	said := term.end(exitOK)
	drawn := bars.FindAllStringSubmatch(said, -1)
	if len(drawn) < 3 || drawn[len(drawn)-1][1] != strings.Repeat("#", barWidth) || drawn[0][2] != "10" {
		t.Errorf("%d bars in %q", len(drawn), said)
	}
	if !strings.HasSuffix(said, "redriven 10, skipped 0, failed 0\r\n") || strings.Contains(said, "done\r\n10 of") {
		t.Errorf("said %q", said)
	}
	// Rows are aligned and cut.
	said = startTerminal(t, s, nil, "letters", "ls", "dlq.>").end(exitOK)
	lines := strings.Split(strings.TrimSpace(said), "\r\n")
	for _, line := range lines {
		if len(line) > 100 || strings.Contains(line, "\t") {
			t.Errorf("line %q", line)
		}
	}
	if !strings.HasPrefix(lines[0], "SEQ  DIED  ") || strings.Index(lines[0], "DURABLE") != strings.Index(lines[1], "mail") {
		t.Errorf("not aligned: %q", lines)
	}
}

func TestTerminalEditor(t *testing.T) {
	t.Parallel()
	s := letterSite(t, 4)
	dir := t.TempDir()
	script := func(name, text string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
			t.Fatal(err)
		}
		return file
	}
	temp := []string{"TMPDIR=" + t.TempDir()}
	files := func() int {
		t.Helper()
		found, err := os.ReadDir(strings.TrimPrefix(temp[0], "TMPDIR="))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	// Letter 1 gets another payload and header, letter 2 stays.
	mend := script("mend", `grep -q 'X-Number: 1' "$1" || exit 0
grep -q '^# permanent: nothing to pay for orders.1' "$1" || exit 1
sed -i -e 's/X-Number: 1/X-Number: one/' -e 's/"cents":0/"cents":100/' -e '$a\' "$1"
`)
	term := startTerminal(t, s, append(temp, "EDITOR="+mend), "letters", "edit", "dlq.orders", "1", "2")
	term.await("Redrive, as edited, 1 letter of dlq.orders (billing: permanent 1)? [y/N] ")
	term.typed("y\n")
	said := term.end(exitOK)
	for _, text := range []string{"letter 1: 13 bytes of payload, before 11", "letter 2: not changed, it stays", "redriven 1, skipped 0, failed 0"} {
		if !strings.Contains(said, text) {
			t.Errorf("no %q in %q", text, said)
		}
	}
	s.wantLeft(t, 2, 3, 4, 5, 6)
	if h, data := s.last(t); data != `{"cents":100}` || h.Get("X-Number") != "one" {
		t.Errorf("redriven %v %q", h, data)
	}
	if n := files(); n > 0 {
		t.Errorf("%d files left", n)
	}
	// Without a change nothing is asked; an editor that fails keeps the text.
	if said := startTerminal(t, s, temp, "letters", "edit", "dlq.orders", "3", "-editor", "true").end(exitOK); !strings.Contains(said, "it stays") {
		t.Errorf("said %q", said)
	}
	if said := startTerminal(t, s, temp, "letters", "edit", "dlq.orders", "3", "-editor", "false").end(exitFailed); !strings.Contains(said, "what you wrote is in ") || files() != 1 {
		t.Errorf("%d files, said %q", files(), said)
	}
	if said := startTerminal(t, s, temp, "letters", "edit", "dlq.orders", "99").end(exitFailed); !strings.Contains(said, "no letter of dlq.orders") {
		t.Errorf("said %q", said)
	}
	s.wantLeft(t, 2, 3, 4, 5, 6)
}

// Plain lines when piped: see runTool's tests, and here with a long run.
func TestPlainProgress(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &progress{to: &out, verb: "done", drawn: time.Now().Add(-lineEvery)}
	for i := range 3 {
		p.set(uint64(i), 2, false)
	}
	p.line("letter 7: \x1b[31m")
	p.set(2, 2, true)
	p.set(2, 2, true)
	p.end()
	if want := "0 of 2 done\nletter 7: \\x1b[31m\n2 of 2 done\n"; out.String() != want {
		t.Errorf("printed %q, want %q", out.String(), want)
	}
}
