package natsx

import (
	"context"
	"math"
	"time"
)

var processStart = time.Now()

// processTime is the monotonic clock for all of natsx: nanoseconds since the start of the
// process, never 0.
func processTime() int64 { return int64(time.Since(processStart)) + 1 }

// atProcessTime returns the time at a process time.
func atProcessTime(at int64) time.Time { return processStart.Add(time.Duration(at - 1)) }

// wait pauses for d, or until ctx ends, and reports whether ctx has not ended.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// backoff is the pause between retries: first, then doubled each time, at most most.
type backoff struct {
	first, most time.Duration
	tries       int
}

// next is the length of the next pause.
func (b *backoff) next() time.Duration {
	d := float64(b.first) * math.Pow(2, float64(min(b.tries, 62)))
	b.tries++
	return time.Duration(min(d, float64(b.most)))
}

// wait waits for the next pause, or until ctx ends, and reports whether ctx has not ended.
func (b *backoff) wait(ctx context.Context) bool { return wait(ctx, b.next()) }

// notify sends to a channel of capacity 1, unless that is full.
func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
