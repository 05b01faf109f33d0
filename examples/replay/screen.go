package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/natsx/natsx"
)

// screen prints lines and, on a terminal, progress bars. Nothing else is printed while a
// replay reports its progress.
type screen struct {
	out      io.Writer
	terminal bool
	drawing  bool // the cursor is on a bar
}

func newScreen(f *os.File) *screen {
	info, err := f.Stat()
	return &screen{
		out:      f,
		terminal: err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb",
	}
}

func (s *screen) line(format string, args ...any) {
	if s.drawing {
		s.drawing = false
		fmt.Fprintln(s.out)
	}
	fmt.Fprintf(s.out, format+"\n", args...)
}

const barWidth = 30

// bar returns a progress function: it draws a bar on a terminal, or else prints a line at
// the start, at every quarter and at the end.
func (s *screen) bar(title string) func(natsx.ReplayProgress) {
	shown := -1
	return func(p natsx.ReplayProgress) {
		done := 1.0
		if p.Total > 0 {
			done = float64(p.Done) / float64(p.Total)
		}
		left := ""
		if p.Remaining > 0 {
			left = fmt.Sprintf(", about %s left", p.Remaining.Round(10*time.Millisecond))
		}
		if !s.terminal {
			if quarter := int(4 * done); quarter > shown {
				shown = quarter
				s.line("%s: %d of %d%s", title, p.Done, p.Total, left)
			}
			return
		}
		full := int(barWidth * done)
		fmt.Fprintf(s.out, "\r\x1b[2K%-18s [%s%s] %3.0f %%  %d of %d%s", title,
			strings.Repeat("#", full), strings.Repeat(".", barWidth-full), 100*done, p.Done, p.Total, left)
		s.drawing = true
	}
}
