package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

type colour string

const (
	plain  colour = ""
	green  colour = "32"
	yellow colour = "33"
	red    colour = "31"
	grey   colour = "90"
	bold   colour = "1"
)

// screen prints one line per event, with colours on a terminal.
type screen struct {
	begun    time.Time
	coloured bool

	mu  sync.Mutex
	out io.Writer
}

func newScreen(f *os.File) *screen {
	info, err := f.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	return &screen{
		begun: time.Now(), out: f,
		coloured: terminal && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb",
	}
}

// line prints one event: its time, place, order and text.
func (s *screen) line(c colour, where, id, what string) {
	at := fmt.Sprintf("%6.2fs", time.Since(s.begun).Seconds())
	s.printf("%s  %-8s %-5s %s\n", s.paint(grey, at), where, id, s.paint(c, what))
}

func (s *screen) printf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format, args...)
}

func (s *screen) paint(c colour, text string) string {
	if !s.coloured || c == plain {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}
