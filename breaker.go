package natsx

import (
	"sync"
	"time"
)

// breaker counts the consecutive failures of one route. It is safe for concurrent use.
type breaker struct {
	most int
	rest time.Duration

	mu       sync.Mutex
	state    BreakerState
	failures int
	until    int64 // end of the cool-down while it is open
	probing  bool  // a handler runs while it is half-open
}

func newBreaker(failures int, rest time.Duration) *breaker {
	return &breaker{most: failures, rest: rest, state: BreakerClosed}
}

// now returns the current state and how many messages may be in hand, -1 for no limit.
func (b *breaker) now(now int64) (state BreakerState, mayHold int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	switch b.state {
	case BreakerOpen:
		return b.state, 0
	case BreakerHalfOpen:
		if b.probing {
			return b.state, 0
		}
		return b.state, 1
	}
	return b.state, -1
}

func (b *breaker) turn(now int64) {
	if b.state == BreakerOpen && now >= b.until {
		b.state, b.probing = BreakerHalfOpen, false
	}
}

// wake is when an open breaker becomes half-open, 0 if it is not open.
func (b *breaker) wake(now int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	if b.state != BreakerOpen {
		return 0
	}
	return b.until
}

// mayStart reports whether a handler may be started, whose result is then passed to
// judge.
func (b *breaker) mayStart(now int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	if b.state == BreakerClosed {
		return true
	}
	if b.state == BreakerOpen || b.probing {
		return false
	}
	b.probing = true
	return true
}

// judge accounts for the result of a handler. void reports a failure while the breaker is
// not closed, which is no attempt. turned is the state that the result has caused, or
// BreakerNone.
func (b *breaker) judge(now int64, v verdict, cut bool) (void bool, turned BreakerState) {
	b.mu.Lock()
	defer b.mu.Unlock()
	failed := !cut && (v == verdictRetry || v == verdictRetryAfter || v == verdictPanic)
	switch b.state {
	case BreakerClosed:
		switch {
		case v == verdictSuccess:
			b.failures = 0
		case failed:
			if b.failures++; b.failures >= b.most {
				b.open(now)
				return false, BreakerOpen
			}
		}
	case BreakerOpen:
		return failed, BreakerNone
	case BreakerHalfOpen:
		b.probing = false
		switch {
		case v == verdictSuccess:
			b.state, b.failures = BreakerClosed, 0
			return false, BreakerClosed
		case failed:
			b.open(now)
			return true, BreakerOpen
		}
	}
	return false, BreakerNone
}

func (b *breaker) open(now int64) { b.state, b.until = BreakerOpen, now+int64(b.rest) }

// redeliverAfter is the delay of a message whose failure was no attempt, so that others
// are tried before it.
func (b *breaker) redeliverAfter() time.Duration { return b.rest + b.rest/4 }
