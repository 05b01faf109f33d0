package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
)

// report prints a section as a Markdown table.
func report(w io.Writer, s section, n int, results [][]figure) {
	columns := s.columns
	if columns == nil {
		columns = rateColumns
	}
	fmt.Fprintf(w, "\n### %s (`%s`, %s %s, load %s)\n\n", s.title, s.name, grouped(n), cmp.Or(s.unit, "messages"), loadAverage())
	head := []string{""}
	for _, c := range columns {
		head = append(head, c.head)
	}
	fmt.Fprintf(w, "| %s |\n|%s\n", strings.Join(head, " | "), "---|"+strings.Repeat("---:|", len(columns)))
	for i, fs := range results {
		if len(fs) == 0 {
			continue
		}
		row := []string{s.peers[i].name}
		for _, c := range columns {
			row = append(row, c.cell(fs, results[0]))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
	}
}

// grouped writes n with commas between thousands.
func grouped(n int) string {
	digits := fmt.Sprint(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// loadAverage is the run queue of the last minute, where the system tells it.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	load, _, _ := strings.Cut(string(text), " ")
	return load
}

func moduleVersion(path string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == path {
				return m.Version
			}
		}
	}
	return "unknown"
}
