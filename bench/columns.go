package main

import (
	"fmt"
	"slices"
	"time"
)

// A column makes the cells of a table: from the figures of a peer, one for each
// round, and those of the section's first peer.
type column struct {
	head string
	cell func(fs, base []figure) string
}

var (
	rateColumns = []column{
		{"per s", func(fs, _ []figure) string { return grouped(int(median(each(fs, figure.rate)))) }},
		ratio("ratio", figure.rate),
		spread(figure.rate),
		value("allocs", "%.1f", figure.allocs),
		value("bytes", "%.0f", figure.bytes),
		value("client µs", "%.2f", figure.clientMicros),
		ratio("ratio", figure.clientMicros),
		value("server µs", "%.2f", figure.serverMicros),
		value("RSS MB", "%.0f", figure.rssMB),
		most("others", "%.0f %%", figure.othersPercent),
	}
	requestColumns = slices.Concat(rateColumns, []column{
		value("p50 ms", "%.2f", figure.p50Millis),
		value("p99 ms", "%.2f", figure.p99Millis),
		ratio("p99 ratio", figure.p99Millis),
	})
	coreColumns = slices.Concat(rateColumns, []column{value("waiting", "%.0f %%", figure.waitedPercent)})
	idleColumns = []column{
		value("ready s", "%.2f", figure.seconds),
		ratio("ratio", figure.seconds),
		spread(figure.seconds),
		value("goroutines", "%.2f", figure.goroutines),
		value("heap MB", "%.1f", func(f figure) float64 { return float64(f.Heap) / 1e6 }),
		value("RSS MB", "%.0f", figure.rssMB),
		value("idle client %", "%.2f", func(f figure) float64 { return 100 * f.IdleClient }),
		value("idle server %", "%.2f", func(f figure) float64 { return 100 * f.IdleServer }),
		most("others", "%.0f %%", figure.othersPercent),
	}
	trickleColumns = []column{
		value("per s", "%.0f", figure.rate),
		value("pulls", "%.3f", func(f figure) float64 { return float64(f.Pulls) / float64(f.N) }),
		value("server µs", "%.2f", figure.serverMicros),
		ratio("ratio", figure.serverMicros),
		spread(figure.serverMicros),
		value("client µs", "%.2f", figure.clientMicros),
		ratio("ratio", figure.clientMicros),
		value("allocs", "%.1f", figure.allocs),
		value("bytes", "%.0f", figure.bytes),
		value("RSS MB", "%.0f", figure.rssMB),
		most("others", "%.0f %%", figure.othersPercent),
	}
	drainColumns = slices.Concat(rateColumns, []column{
		value("settled s", "%.2f", figure.settledSeconds),
		most("repeats", "%.0f", func(f figure) float64 { return float64(f.Repeats) }),
		most("slow consumers", "%.0f", func(f figure) float64 { return float64(f.SlowConsumers) }),
	})
)

// value is the median over the rounds.
func value(head, format string, of func(figure) float64) column {
	return column{head, func(fs, _ []figure) string { return fmt.Sprintf(format, median(each(fs, of))) }}
}

// most is the highest value of any round.
func most(head, format string, of func(figure) float64) column {
	return column{head, func(fs, _ []figure) string { return fmt.Sprintf(format, slices.Max(each(fs, of))) }}
}

// ratio is the median of the ratios to the first peer within each round.
func ratio(head string, of func(figure) float64) column {
	return column{head, func(fs, base []figure) string { return fmt.Sprintf("%.2f", median(against(fs, base, of))) }}
}

// spread is the lowest and the highest of the ratios.
func spread(of func(figure) float64) column {
	return column{"(range)", func(fs, base []figure) string {
		ratios := against(fs, base, of)
		return fmt.Sprintf("%.2f–%.2f", slices.Min(ratios), slices.Max(ratios))
	}}
}

func (f figure) rate() float64          { return float64(f.N) / f.Elapsed.Seconds() }
func (f figure) allocs() float64        { return float64(f.Mallocs) / float64(f.N) }
func (f figure) bytes() float64         { return float64(f.Bytes) / float64(f.N) }
func (f figure) clientMicros() float64  { return micros(f.ClientCPU) / float64(f.N) }
func (f figure) serverMicros() float64  { return micros(f.ServerCPU) / float64(f.N) }
func (f figure) rssMB() float64         { return float64(f.MaxRSS) / 1e6 }
func (f figure) othersPercent() float64 { return 100 * f.Others }
func (f figure) p50Millis() float64     { return micros(f.P50) / 1000 }
func (f figure) p99Millis() float64     { return micros(f.P99) / 1000 }

func (f figure) seconds() float64        { return f.Elapsed.Seconds() }
func (f figure) goroutines() float64     { return float64(f.Goroutines) / float64(f.N) }
func (f figure) settledSeconds() float64 { return f.Settled.Seconds() }

func (f figure) waitedPercent() float64 { return 100 * f.Waited }

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
