package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"time"
)

// errCrashed stands for attempts that never came back: the message took its process
// down each time it ran, in the end with nothing else of its route in hand.
var errCrashed = errors.New("natsx: no attempt returned: each time its process ended")

// judgement is what an error of a handler means, whatever the route.
type judgement struct {
	verdict verdict
	after   time.Duration // of verdictRetryAfter
}

type verdict uint8

const (
	verdictSuccess verdict = iota
	verdictRetry
	verdictRetryAfter
	verdictPanic
	verdictPermanent
	verdictUndecodable
	verdictDiscard
	verdictCrashed
)

// judge reads the outcome out of an error's chain. An error that panics when it is
// asked for its chain, as a nil pointer in an error does, is replaced by the panic.
func judge(err error) (j judgement, safe error) {
	if err == nil {
		return judgement{}, nil
	}
	defer func() {
		if v := recover(); v != nil {
			j, safe = judgement{verdict: verdictPanic}, &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	j.verdict = verdictRetry
	switch {
	case err == errCrashed:
		j.verdict = verdictCrashed
	case is[*discardError](err):
		j.verdict = verdictDiscard
	case is[*permanentError](err):
		j.verdict = verdictPermanent
	case is[*DecodeError](err):
		j.verdict = verdictUndecodable
	case is[*PanicError](err):
		j.verdict = verdictPanic
	default:
		if later, ok := errors.AsType[*retryAfterError](err); ok {
			j = judgement{verdictRetryAfter, later.delay}
		}
	}
	return j, err
}

// OutcomeOf reports what a durable route with attempts left does with a message whose
// handler returned err: [OutcomeSucceeded], [OutcomeRetried], [OutcomeDead] or
// [OutcomeDiscarded]. Of an error in which several outcomes are wrapped it takes the
// first of Discard, Permanent and retry.
func OutcomeOf(err error) Outcome {
	j, _ := judge(err)
	switch j.verdict {
	case verdictSuccess:
		return OutcomeSucceeded
	case verdictDiscard:
		return OutcomeDiscarded
	case verdictPermanent, verdictUndecodable, verdictCrashed:
		return OutcomeDead
	}
	return OutcomeRetried
}

// action is what is done to a message after an attempt.
type action uint8

const (
	actAck    action = iota // done
	actNak                  // deliver again after the delay
	actReturn               // deliver again at once: it was no attempt
	actTerm                 // never deliver again, keep no letter
	actBury                 // move to the DLQ
	actHandle               // none yet
)

// settlement is the decision about one attempt.
type settlement struct {
	action  action
	delay   time.Duration // of actNak
	reason  Reason        // of a dead message
	expires bool          // it is dead since its stream would delete it before the next attempt
	outcome Outcome
}

// circumstances are what a decision takes into account beside the result.
type circumstances struct {
	attempt int           // 1 for the first
	cut     bool          // the handler's context was ended by a shutdown
	void    time.Duration // an open breaker makes a failure no attempt; the message rests so long
	life    time.Duration // until the stream deletes the message, 0 for never
	spread  float64       // a random number in [0, 1) for the jitter
}

// decide is what becomes of a message of a durable from the result of an attempt
// alone. A handler that a shutdown has cut off has not failed.
func decide(r RouteBuilder, j judgement, c circumstances) settlement {
	dead := func(reason Reason) settlement {
		act := actTerm
		if r.dlq != "" {
			act = actBury
		}
		return settlement{action: act, reason: reason, outcome: OutcomeDead}
	}
	switch j.verdict {
	case verdictSuccess:
		return settlement{action: actAck, outcome: OutcomeSucceeded}
	case verdictCrashed:
		return dead(ReasonCrashed)
	case verdictDiscard:
		return settlement{action: actTerm, outcome: OutcomeDiscarded}
	case verdictPermanent:
		return dead(ReasonPermanent)
	case verdictUndecodable:
		return dead(ReasonUndecodable)
	}
	if c.cut {
		return settlement{action: actReturn, outcome: OutcomeReturned}
	}
	if c.void > 0 {
		return settlement{action: actReturn, delay: c.void, outcome: OutcomeReturned}
	}
	last := ReasonExhausted
	if j.verdict == verdictPanic {
		last = ReasonPanic
	}
	if n := r.attempts(); n > 0 && c.attempt >= n {
		return dead(last)
	}
	s := settlement{action: actNak, delay: j.after, outcome: OutcomeRetried}
	if j.verdict != verdictRetryAfter {
		low, high := r.backoff()
		s.delay = backoffDelay(low, high, c.attempt, c.spread)
	}
	// A stream's limit is not kept to the moment.
	if c.life > 0 && s.delay >= c.life-min(c.life/10, time.Second) {
		s = dead(last)
		s.expires = true
	}
	return s
}

// backoffDelay is the delay before retry k (from 1): low*2^(k-1) spread by ±20 %
// with a random number in [0, 1), and never above high.
func backoffDelay(low, high time.Duration, k int, spread float64) time.Duration {
	d := math.Ldexp(float64(low), min(k-1, 62)) // at most 2^125, far from overflow
	d = min(d, float64(high)) * (0.8 + 0.4*spread)
	return min(time.Duration(min(d, math.MaxInt64/2)), high)
}

// longestBackoff is the most that all delays between the attempts of r add up to.
func longestBackoff(r RouteBuilder) time.Duration {
	low, high := r.backoff()
	var sum time.Duration
	for k := 1; k < r.attempts(); k++ {
		d := backoffDelay(low, high, k, 1)
		if sum += d; sum > math.MaxInt64/4 {
			break
		}
		if d == high { // so are all that follow
			return sum + min(time.Duration(r.attempts()-1-k), math.MaxInt64/4/high)*high
		}
	}
	return sum
}

// invoke runs a handler and turns a panic into an error.
func invoke(h Handler, ctx context.Context, m *Msg) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return h(ctx, m)
}

// invokeWithin is invoke with a deadline. What returns after the deadline has
// failed, also when it says nothing of it: a handler that gave up its work at the
// end of its context may well return nil.
func invokeWithin(timeout time.Duration, h Handler, d *delivery) error {
	ctx := withDeadline(d, time.Now().Add(timeout))
	defer ctx.end()
	err := invoke(h, ctx, &d.msg)
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	if err == nil {
		return fmt.Errorf("natsx: handler did not return within %s: %w", timeout, context.DeadlineExceeded)
	}
	_, err = judge(err)
	if errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("natsx: handler did not return within %s: %w: %w", timeout, context.DeadlineExceeded, err)
}

// sound asks an error of users' code all that the engine may ask it later. One that panics
// is replaced by the panic, one without a text gets one. It may end the goroutine, as may
// the handler that returned err.
func sound(err error) error {
	if err == nil {
		return nil
	}
	_, err = judge(err)
	return textual(err)
}

// textual is err, with a text if it panics when it is asked for its own.
func textual(err error) (safe error) {
	defer func() {
		if v := recover(); v != nil {
			safe = &textlessError{fmt.Sprintf("%T without a text: %v", err, v), err}
		}
	}()
	_ = err.Error()
	return err
}

// textlessError gives an error the text that it has not.
type textlessError struct {
	text string
	err  error
}

func (e *textlessError) Error() string { return e.text }
func (e *textlessError) Unwrap() error { return e.err }

// wrapHandler puts middleware around a handler, the first outermost.
func wrapHandler(h Handler, middleware []Middleware) Handler {
	for i := len(middleware) - 1; i >= 0; i-- {
		h = middleware[i](h)
	}
	return h
}

// attempt runs a handler on w within timeout, unless that is 0, and has the owner
// conclude it exactly once, also when the handler leaves by runtime.Goexit.
func attempt(owner job, h Handler, w *work, timeout time.Duration) {
	returned := false
	defer func() {
		if !returned {
			w.ended = processTime()
			owner.conclude(w, &PanicError{Value: "runtime.Goexit"})
		}
	}()
	var err error
	if timeout > 0 {
		err = invokeWithin(timeout, h, w.delivery)
	} else {
		err = invoke(h, w.delivery, &w.msg)
	}
	err = sound(err)
	returned = true
	w.ended = processTime()
	owner.conclude(w, err)
}
