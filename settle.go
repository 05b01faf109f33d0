package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"strconv"
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

// is tells whether err's chain has an error of type E.
func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
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

// ackInfo is what the reply subject of a delivered message tells.
type ackInfo struct {
	stream      string
	consumer    string
	delivered   uint64
	sequence    uint64
	consumerSeq uint64
	time        int64  // Unix nanoseconds
	pending     uint64 // messages that the consumer had left
}

// parseDelivery reads an ack subject of either form (ADR-15, and the form with domain
// and account hash of the server's js_ack_fc_v2):
//
//	$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>
//	$JS.ACK.<domain>.<hash>.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>[.<more>]
func parseDelivery(reply string) (a ackInfo, ok bool) {
	const prefix = "$JS.ACK."
	if len(reply) <= len(prefix) || reply[:len(prefix)] != prefix {
		return a, false
	}
	var dots [12]int
	n := 0
	for i := len(prefix); i < len(reply); i++ {
		if reply[i] == '.' {
			if n == len(dots) {
				return a, false
			}
			dots[n] = i
			n++
		}
	}
	first := 0 // index of the dot that ends the stream's token
	start := len(prefix)
	switch {
	case n == 6:
	case n >= 8:
		first = 2
		start = dots[1] + 1
	default:
		return a, false
	}
	a.stream = reply[start:dots[first]]
	a.consumer = reply[dots[first]+1 : dots[first+1]]
	var okDelivered, okSeq, okHere, okTime, okPending bool
	a.delivered, okDelivered = parseUint(reply[dots[first+1]+1 : dots[first+2]])
	a.sequence, okSeq = parseUint(reply[dots[first+2]+1 : dots[first+3]])
	a.consumerSeq, okHere = parseUint(reply[dots[first+3]+1 : dots[first+4]])
	var nanos uint64
	nanos, okTime = parseUint(reply[dots[first+4]+1 : dots[first+5]])
	a.time = int64(nanos)
	end := len(reply)
	if n > first+6 {
		end = dots[first+6]
	}
	a.pending, okPending = parseUint(reply[dots[first+5]+1 : end])
	return a, okDelivered && okSeq && okHere && okTime && okPending && a.stream != "" && a.consumer != "" && nanos <= math.MaxInt64
}

func parseUint(s string) (v uint64, ok bool) {
	if s == "" || len(s) > 19 {
		return 0, false
	}
	for i := range len(s) {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		v = v*10 + uint64(c)
	}
	return v, true
}

var (
	ackAck        = []byte("+ACK")
	ackInProgress = []byte("+WPI")
)

func ackNak(delay time.Duration) []byte {
	return append(strconv.AppendInt([]byte(`-NAK {"delay":`), int64(delay), 10), '}')
}

func ackTerm(reason string) []byte { return []byte("+TERM " + reason) }
