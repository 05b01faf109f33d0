package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"time"
)

// errCrashed is the error of a message that crashed its process each time it ran, in the
// end in isolation.
var errCrashed = errors.New("natsx: no attempt returned: the process ended each time")

// judgement is the meaning of a handler's error, independent of the route.
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

// judge derives a judgement from an error's chain. An error that panics while its chain
// is read, such as one with a nil pointer, is replaced by the panic.
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
// [OutcomeDiscarded]. If err wraps several outcomes, the first of Discard, Permanent and
// retry applies.
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
	actAck    action = iota // acknowledge
	actNak                  // redeliver after the delay
	actReturn               // redeliver at once: it was no attempt
	actTerm                 // terminate without a letter
	actBury                 // move to the DLQ
	actHandle               // nothing: the handler is to run
)

// settlement is the decision about one attempt.
type settlement struct {
	action  action
	delay   time.Duration // of actNak
	reason  Reason        // of a dead message
	expires bool          // dead because the stream would delete the message before the next attempt
	outcome Outcome
}

// circumstances are the other inputs of a decision.
type circumstances struct {
	attempt int           // 1 for the first
	cut     bool          // a shutdown cancelled the handler's context
	void    time.Duration // the failure is no attempt, and this is the delay of the redelivery; 0 for an attempt
	life    time.Duration // until the stream deletes the message, 0 for never
	spread  float64       // a random number in [0, 1) for the jitter
}

// decide returns how to settle a message of a durable. It is a pure function. A handler
// that was cancelled by a shutdown has not failed.
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
	// Streams do not apply their age limit exactly on time.
	if c.life > 0 && s.delay >= c.life-min(c.life/10, time.Second) {
		s = dead(last)
		s.expires = true
	}
	return s
}

// backoffDelay is the delay before retry k, from 1: low*2^(k-1), varied by ±20 % by
// spread, a random number in [0, 1), and at most high.
func backoffDelay(low, high time.Duration, k int, spread float64) time.Duration {
	d := math.Ldexp(float64(low), min(k-1, 62)) // at most 2^125, far from overflow
	d = min(d, float64(high)) * (0.8 + 0.4*spread)
	return min(time.Duration(min(d, math.MaxInt64/2)), high)
}

// longestBackoff is the longest sum of all delays between the attempts of r.
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

// invokeWithin is invoke with a deadline. A handler that returns after the deadline has
// failed even if it returns nil, since it may have stopped its work at the end of its
// context.
func invokeWithin(timeout time.Duration, h Handler, w *work) error {
	ctx := withDeadline(w.timed, w.delivery, atProcessTime(w.began).Add(timeout))
	defer ctx.end()
	err := invoke(h, ctx, &w.msg)
	if w.ended = processTime(); !ctx.passed(atProcessTime(w.ended)) {
		return err
	}
	return lateness(ctx, timeout, err)
}

// lateness is the result of a handler that has returned err under a context with a
// timeout.
func lateness(ctx context.Context, timeout time.Duration, err error) error {
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
	return failure(fmt.Sprintf("handler did not return within %s: %v: %s", timeout, context.DeadlineExceeded, cause(err)),
		context.DeadlineExceeded, err)
}

// sound makes an error of users' code safe for the engine. If reading its chain panics, it
// is replaced by the panic; if its Error method panics, it gets another text. Like the
// handler, the error's methods may end the goroutine.
func sound(err error) error {
	if err == nil {
		return nil
	}
	_, err = judge(err)
	return textual(err)
}

// textual returns err, or an error with another text if err.Error panics.
func textual(err error) (safe error) {
	defer func() {
		if v := recover(); v != nil {
			safe = &textlessError{fmt.Sprintf("%T without a text: %v", err, v), err}
		}
	}()
	_ = err.Error()
	return err
}

// textlessError is an error whose own Error method panics.
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

// attempt runs a handler on w within timeout, 0 for no limit, and calls the owner's
// conclude exactly once, even if the handler calls runtime.Goexit.
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
		err = invokeWithin(timeout, h, w)
	} else {
		err = invoke(h, w.delivery, &w.msg)
		w.ended = processTime()
	}
	if err != nil {
		err = sound(err)
		w.ended = processTime()
	}
	returned = true
	owner.conclude(w, err)
}
