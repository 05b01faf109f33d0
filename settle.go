package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"time"
)

// errCrashed stands for an attempt that never came back: the message was
// delivered once more than its attempts.
var errCrashed = errors.New("natsx: every attempt ended without a result: its process crashed or lost the lease")

// action is what is done to a message after an attempt.
type action uint8

const (
	actAck  action = iota // done
	actNak                // deliver again after the delay
	actTerm               // never deliver again, keep no letter
	actBury               // move to the DLQ
)

// settlement is the decision about one attempt.
type settlement struct {
	action  action
	delay   time.Duration // of actNak
	reason  Reason        // of a dead message
	outcome Outcome
}

// decide tells what becomes of a message of a durable from the result of an
// attempt alone. spread is a random number in [0, 1) for the jitter.
func decide(r RouteBuilder, attempt int, err error, spread float64) settlement {
	if err == nil {
		return settlement{action: actAck, outcome: Succeeded}
	}
	dead := func(reason Reason) settlement {
		act := actTerm
		if r.dlq != "" {
			act = actBury
		}
		return settlement{action: act, reason: reason, outcome: Dead}
	}
	switch {
	case errors.Is(err, errCrashed):
		return dead(ReasonCrashed)
	case is[*discardError](err):
		return settlement{action: actTerm, outcome: Discarded}
	case is[*permanentError](err):
		return dead(ReasonPermanent)
	case is[*DecodeError](err):
		return dead(ReasonUndecodable)
	}
	if n := r.attempts(); n > 0 && attempt >= n {
		if is[*PanicError](err) {
			return dead(ReasonPanic)
		}
		return dead(ReasonExhausted)
	}
	if later, ok := errors.AsType[*retryAfterError](err); ok {
		return settlement{action: actNak, delay: later.delay, outcome: Retried}
	}
	low, high := r.backoff()
	return settlement{action: actNak, delay: backoffDelay(low, high, attempt, spread), outcome: Retried}
}

// backoffDelay is the delay before retry k (from 1): low*2^(k-1) spread by ±20 %
// with a random number in [0, 1), and never above high.
func backoffDelay(low, high time.Duration, k int, spread float64) time.Duration {
	d := math.Ldexp(float64(low), min(k-1, 62)) // at most 2^125, far from overflow
	d = min(d, float64(high)) * (0.8 + 0.4*spread)
	return min(time.Duration(min(d, math.MaxInt64/2)), high)
}

// invoke runs a handler and turns a panic into an error, also that of an error
// which cannot be asked for its chain, as a nil pointer in it.
func invoke(h Handler, ctx context.Context, m *Msg) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	if err = h(ctx, m); err != nil {
		_ = errors.Is(err, errCrashed)
	}
	return err
}

// attempt runs the route's handler on d within timeout, unless that is 0, and has
// its owner conclude it exactly once, also when the handler leaves by
// runtime.Goexit.
func (r *route) attempt(d *delivery, timeout time.Duration) {
	returned := false
	defer func() {
		if !returned {
			d.ended = r.eng.now()
			r.owner.conclude(d, &PanicError{Value: "runtime.Goexit"})
		}
	}()
	var err error
	if timeout > 0 {
		err = invokeWithin(timeout, r.handler, d)
	} else {
		err = invoke(r.handler, d, &d.msg)
	}
	returned = true
	d.ended = r.eng.now()
	r.owner.conclude(d, err)
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
	switch {
	case err == nil:
		return fmt.Errorf("natsx: handler did not return within %s: %w", timeout, context.DeadlineExceeded)
	case errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return fmt.Errorf("natsx: handler did not return within %s: %w: %w", timeout, context.DeadlineExceeded, err)
}
