package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

const (
	barWidth  = 30
	drawEvery = 100 * time.Millisecond
	lineEvery = 5 * time.Second // between plain lines
	tableRows = 200             // aligned with each other; the rest is still to be read
)

// isTerminal reports whether a stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// clean makes text of any origin harmless on a terminal: what cannot be printed is shown
// as an escape.
func clean(s string) string { return cleanBut(s, "") }

// cleanBut leaves the characters of kept as they are.
func cleanBut(s, kept string) string {
	var b []byte
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			b = fmt.Appendf(b, `\x%02x`, s[i])
		case strconv.IsPrint(r) || strings.ContainsRune(kept, r):
			b = append(b, s[i:i+n]...)
		default:
			quoted := strconv.QuoteRune(r)
			b = append(b, quoted[1:len(quoted)-1]...)
		}
		i += n
	}
	return string(b)
}

// confirm asks a person, who has to answer yes. Without a terminal -yes must be given.
func (t *tool) confirm(ctx context.Context, question string) error {
	if t.yes {
		return nil
	}
	if !isTerminal(t.in) || !isTerminal(t.err) {
		return fmt.Errorf("%w: there is no terminal to ask on, so it needs -yes", errUnconfirmed)
	}
	fmt.Fprintf(t.err, "%s [y/N] ", clean(question))
	answer := make(chan string, 1)
	go func() { // a read of a terminal cannot be cancelled; the process ends soon
		line, _ := bufio.NewReader(t.in).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(t.err)
		return ctx.Err()
	case line := <-answer:
		if line == "y" || line == "yes" {
			return nil
		}
		return errUnconfirmed
	}
}

// table prints rows: aligned and cut to the width of a terminal, else with tabs between
// the cells.
type table struct {
	to      io.Writer
	width   int // of the terminal, 0 for none
	buf     bytes.Buffer
	aligned *tabwriter.Writer
	rows    int
}

func (t *tool) table(header ...string) *table {
	tab := &table{to: t.out}
	if isTerminal(t.out) {
		tab.width = 80
		if width, _, err := term.GetSize(int(t.out.(*os.File).Fd())); err == nil && width > 0 {
			tab.width = width
		}
		tab.aligned = tabwriter.NewWriter(&tab.buf, 0, 0, 2, ' ', 0)
	}
	for i := range header {
		header[i] = strings.ToUpper(header[i])
	}
	tab.row(header...)
	return tab
}

func (tab *table) row(cells ...string) error {
	for i := range cells {
		cells[i] = clean(cells[i])
	}
	line := strings.Join(cells, "\t") + "\n"
	if tab.aligned == nil {
		_, err := io.WriteString(tab.to, line)
		return err
	}
	io.WriteString(tab.aligned, line)
	if tab.rows++; tab.rows%tableRows == 0 {
		return tab.end()
	}
	return nil
}

// end prints what is left.
func (tab *table) end() error {
	if tab.aligned == nil {
		return nil
	}
	tab.aligned.Flush()
	for line := range strings.Lines(tab.buf.String()) {
		cells := []rune(strings.TrimRight(line, " \n"))
		if _, err := fmt.Fprintln(tab.to, string(cells[:min(len(cells), tab.width)])); err != nil {
			return err
		}
	}
	tab.buf.Reset()
	return nil
}

// progress shows how far something is: a bar in a terminal, else a line now and then.
type progress struct {
	to    io.Writer
	bar   bool
	verb  string // such as "redriven"
	drawn time.Time
	open  bool // a bar is on the current line
	last  string
}

func (t *tool) progress(verb string) *progress {
	p := &progress{to: t.err, bar: isTerminal(t.err), verb: verb}
	if !p.bar {
		p.drawn = time.Now() // what is soon done needs one line
	}
	return p
}

// set shows done of total, at most as often as is of use, or always with now.
func (p *progress) set(done, total uint64, now bool) {
	every := lineEvery
	if p.bar {
		every = drawEvery
	}
	if !now && time.Since(p.drawn) < every {
		return
	}
	p.drawn = time.Now()
	text := fmt.Sprintf("%d of %d %s", done, total, p.verb)
	if !p.bar {
		if text != p.last {
			fmt.Fprintln(p.to, text)
		}
		p.last = text
		return
	}
	part := 1.0
	if total > 0 {
		part = min(float64(done)/float64(total), 1)
	}
	full := int(part * barWidth)
	fmt.Fprintf(p.to, "\r\x1b[K[%s%s] %3d %%  %s", strings.Repeat("#", full), strings.Repeat("-", barWidth-full), int(part*100), text)
	p.open = true
}

// line prints a line above the bar.
func (p *progress) line(text string) {
	if p.open {
		fmt.Fprint(p.to, "\r\x1b[K")
		p.open = false
	}
	fmt.Fprintln(p.to, clean(text))
}

// end leaves the bar.
func (p *progress) end() {
	if p.open {
		fmt.Fprintln(p.to)
		p.open = false
	}
}
