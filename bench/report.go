package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// report prints a section as a Markdown table. Absolute values are medians over
// the rounds; a ratio is the median of the ratios within each round, with the
// lowest and the highest beside it.
func report(w io.Writer, s section, n int, results [][]figure) {
	timed := slices.ContainsFunc(results, func(fs []figure) bool { return len(fs) > 0 && fs[0].P99 > 0 })
	fmt.Fprintf(w, "\n### %s (`%s`, %s messages, load %s)\n\n", s.title, s.name, grouped(n), loadAverage())
	head := []string{"", "per s", "ratio", "(range)", "allocs", "client µs", "ratio", "server µs", "others"}
	if timed {
		head = append(head, "p50 ms", "p99 ms", "p99 ratio")
	}
	fmt.Fprintf(w, "| %s |\n|%s\n", strings.Join(head, " | "), "---|"+strings.Repeat("---:|", len(head)-1))
	base := results[0]
	for i, fs := range results {
		if len(fs) == 0 {
			continue
		}
		ratios := against(fs, base, figure.rate)
		row := []string{
			s.peers[i].name,
			grouped(int(median(each(fs, figure.rate)))),
			fmt.Sprintf("%.2f", median(ratios)),
			fmt.Sprintf("%.2f–%.2f", slices.Min(ratios), slices.Max(ratios)),
			fmt.Sprintf("%.1f", median(each(fs, figure.allocs))),
			fmt.Sprintf("%.2f", median(each(fs, figure.clientMicros))),
			fmt.Sprintf("%.2f", median(against(fs, base, figure.clientMicros))),
			fmt.Sprintf("%.2f", median(each(fs, figure.serverMicros))),
			fmt.Sprintf("%.0f %%", 100*slices.Max(each(fs, figure.others))),
		}
		if timed {
			row = append(row,
				fmt.Sprintf("%.2f", median(each(fs, figure.p50Millis))),
				fmt.Sprintf("%.2f", median(each(fs, figure.p99Millis))),
				fmt.Sprintf("%.2f", median(against(fs, base, figure.p99Millis))))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
	}
}

func (f figure) rate() float64         { return float64(f.N) / f.Elapsed.Seconds() }
func (f figure) allocs() float64       { return float64(f.Mallocs) / float64(f.N) }
func (f figure) clientMicros() float64 { return micros(f.ClientCPU) / float64(f.N) }
func (f figure) serverMicros() float64 { return micros(f.ServerCPU) / float64(f.N) }
func (f figure) p50Millis() float64    { return micros(f.P50) / 1000 }
func (f figure) p99Millis() float64    { return micros(f.P99) / 1000 }

func (f figure) others() float64 { return f.Others }

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func each(fs []figure, value func(figure) float64) []float64 {
	vs := make([]float64, len(fs))
	for i, f := range fs {
		vs[i] = value(f)
	}
	return vs
}

// against divides the figures of a peer by those of the base in the same round.
func against(fs, base []figure, value func(figure) float64) []float64 {
	vs := each(fs, value)
	for i := range vs {
		vs[i] /= value(base[i])
	}
	return vs
}

func median(vs []float64) float64 {
	vs = slices.Sorted(slices.Values(vs))
	if mid := len(vs) / 2; len(vs)%2 == 1 {
		return vs[mid]
	} else {
		return (vs[mid-1] + vs[mid]) / 2
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
