package natsx

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

const (
	// MaxReplayFailures is the most failures in a [ReplayReport], which counts all.
	MaxReplayFailures = 1000
	// maxReplaySpeed is the highest factor of [ReplayBuilder.Speed].
	maxReplaySpeed = 1e9
	// progressEvery is the shortest time between two calls of a progress function.
	progressEvery = 100 * time.Millisecond
)

const (
	replayStream option = 1 << iota
	replayFromSequence
	replayFromTime
	replayUntilSequence
	replayUntilTime
	replayLimit
	replaySpeed
	replayConcurrency
	replayOrderedBy
	replayTimeout
)

// ReplayBuilder describes a part of a stream that is to be handled again. Like
// [RouteBuilder] it is a small comparable value: each setter returns a changed
// copy and never fails, and [ReplaySpec.Validate] reports every fault. The
// terminal [ReplayBuilder.Handle] ends the chain.
type ReplayBuilder struct {
	set option

	filter     string
	stream     string
	fromSeq    uint64
	untilSeq   uint64
	from       instant
	until      instant
	limit      int
	speed      float64
	workers    int
	order      OrderKey
	timeout    time.Duration
	continuing bool
}

// Replay starts a replay of the stored messages whose subject matches filter, which may
// have the wildcards * and >; ">" is the whole stream. A filter that violates the grammar
// in the package documentation is [ErrInvalidSubject]. By default it goes from the first
// message to the last one that is stored when it starts.
func Replay(filter string) ReplayBuilder { return ReplayBuilder{filter: filter} }

// Stream names the stream. Without it the stream is looked up by the filter, and exactly
// one must match, else it is [ErrNoStream] or [ErrAmbiguousStream]. The rules for names
// are those of [RouteBuilder.Durable] ([ErrInvalidName]).
func (r ReplayBuilder) Stream(name string) ReplayBuilder {
	r.set |= replayStream
	r.stream = name
	return r
}

// FromSequence starts with the first message at or after a stream sequence; 0 is
// [ErrOutOfRange]. Use [ReplayReport.Next] to continue an interrupted replay. It excludes
// FromTime ([ErrOptionConflict]).
func (r ReplayBuilder) FromSequence(seq uint64) ReplayBuilder {
	r.set |= replayFromSequence
	r.fromSeq = seq
	return r
}

// FromTime starts with the first message stored at or after t; the zero time is
// [ErrOutOfRange]. It excludes FromSequence ([ErrOptionConflict]).
func (r ReplayBuilder) FromTime(t time.Time) ReplayBuilder {
	r.set |= replayFromTime
	r.from = instantOf(t)
	return r
}

// UntilSequence ends with the last message at or before a stream sequence; 0, and a
// sequence below FromSequence, is [ErrOutOfRange]. Messages that are stored after the
// start of the replay are never part of it.
func (r ReplayBuilder) UntilSequence(seq uint64) ReplayBuilder {
	r.set |= replayUntilSequence
	r.untilSeq = seq
	return r
}

// UntilTime ends with the last message stored at or before t; the zero time, and a time
// before FromTime, is [ErrOutOfRange]. With UntilSequence too, the earlier end applies.
func (r ReplayBuilder) UntilTime(t time.Time) ReplayBuilder {
	r.set |= replayUntilTime
	r.until = instantOf(t)
	return r
}

// Limit ends the replay after n messages; below 1 it is [ErrOutOfRange]. The default is no
// limit.
func (r ReplayBuilder) Limit(n int) ReplayBuilder {
	r.set |= replayLimit
	r.limit = n
	return r
}

// Speed replays messages with the time between them as they were stored, divided by x: 1
// is the original pace, 10 is ten times as fast, and 0, the default, is as fast as
// possible. It must be between 0 and 1e9, else it is [ErrOutOfRange].
//
// Messages are scheduled from the first one on, so delays do not add up: after a slow
// handler the replay catches up. It does not catch up with the time in which no messages
// arrive (a reconnect). A message that is not due yet occupies no worker.
func (r ReplayBuilder) Speed(x float64) ReplayBuilder {
	r.set |= replaySpeed
	r.speed = x
	return r
}

// Concurrency limits the handlers of this replay that run at once. The default is 1, in
// stream order, or with OrderedBy the pool's size (see [WithWorkers]), which is also the
// highest effective value. Below 1 it is [ErrOutOfRange]. Above 1 without OrderedBy there
// is no order.
func (r ReplayBuilder) Concurrency(n int) ReplayBuilder {
	r.set |= replayConcurrency
	r.workers = n
	return r
}

// OrderedBy handles messages with the same key one after another, in stream order, and
// those with different keys concurrently. The default is the order of the stream if
// Concurrency is 1, else none. The zero key is [ErrOutOfRange].
func (r ReplayBuilder) OrderedBy(key OrderKey) ReplayBuilder {
	r.set |= replayOrderedBy
	r.order = key
	return r
}

// Timeout ends the handler's context d after its start. The message has then failed with
// an error that wraps [context.DeadlineExceeded]. It must be above zero, else it is
// [ErrOutOfRange]. The default is none.
func (r ReplayBuilder) Timeout(d time.Duration) ReplayBuilder {
	r.set |= replayTimeout
	r.timeout = d
	return r
}

// ContinueOnError continues after a failure and reports it in [ReplayReport.Failures]. By
// default the first failure ends the replay.
func (r ReplayBuilder) ContinueOnError() ReplayBuilder {
	r.continuing = true
	return r
}

// Handle ends the chain with the function that handles each message; nil is
// [ErrNoHandler]. There are no retries: an error or panic is final. [Discard] is not a
// failure.
func (r ReplayBuilder) Handle(fn Handler) ReplaySpec { return ReplaySpec{replay: r, handler: fn} }

// ReplaySpec is a complete replay: a builder's chain with its function. It is a value and
// safe to share; [Broker.Replay] may be called with it several times.
type ReplaySpec struct {
	replay   ReplayBuilder
	handler  Handler
	progress func(ReplayProgress)
}

// Progress sets a function that is called with the progress of the replay: at most ten
// times a second, and once more at the end, one call at a time. It delays the end of the
// replay by at most a second; a call that has not returned by then, and a panic, is
// logged. The default, also for nil, is none. It comes after Handle, since a builder has
// no functions.
func (s ReplaySpec) Progress(fn func(ReplayProgress)) ReplaySpec {
	s.progress = fn
	return s
}

// String names the replay by its filter.
func (s ReplaySpec) String() string { return fmt.Sprintf("replay %q", s.replay.filter) }

// ReplayProgress is the progress of a replay.
type ReplayProgress struct {
	Done uint64 // messages handled, failed ones included
	// Total is the number of messages of the replay as counted at its start, including
	// those that will be skipped. At the end of a complete replay it is Done.
	Total uint64
	// Elapsed is the time since the start.
	Elapsed time.Duration
	// Remaining is an estimate, from the rate so far or, with Speed, from the messages'
	// times; 0 if unknown.
	Remaining time.Duration
}

// ReplayReport is the result of a replay, also of one that was interrupted.
type ReplayReport struct {
	Stream  string // the stream that was read
	Handled uint64 // messages whose handler returned nil or a [Discard]
	Failed  uint64 // messages whose handler failed

	First uint64 // lowest sequence that was handled, failed or not; 0 for none
	Last  uint64 // highest sequence that was handled, failed or not; 0 for none

	// Next is where to continue with [ReplayBuilder.FromSequence]: the lowest sequence
	// that was not handled or, without ContinueOnError, that failed. A handler that was
	// cancelled at the drain timeout has not handled its message. With several handlers at
	// once, messages above Next may already be handled if a handler failed or was
	// cancelled; none is after a drained interruption. After a complete replay, Next
	// continues with messages stored after its start. It is 0 if the replay did not find
	// its stream, or the sequence of FromTime.
	Next uint64

	// Failures are the first [MaxReplayFailures] failed messages, in the order in
	// which they failed.
	Failures []*ReplayFailure

	Started time.Time     // by the clock of this process
	Took    time.Duration // from start to end
}

// ReplayFailure is a message whose handler failed.
type ReplayFailure struct {
	Replay   string // the filter
	Stream   string // of the message
	Sequence uint64 // in the stream
	Subject  string // of the message
	Err      error  // the handler's error, or a [*PanicError]
}

// Error returns the position and the handler's error.
func (f *ReplayFailure) Error() string {
	return fmt.Sprintf("natsx: replay %q: message %d of stream %q on %q: %s", f.Replay, f.Sequence, f.Stream, f.Subject, cause(f.Err))
}

// Unwrap returns the handler's error.
func (f *ReplayFailure) Unwrap() error { return f.Err }

func (s ReplaySpec) fault(field, value, reason string, err error) *ReplayError {
	return &ReplayError{Replay: s.replay.filter, Field: field, Value: value, Reason: reason, Err: err}
}

// Validate reports every fault of the replay as joined [*ReplayError]s, without a
// server.
func (s ReplaySpec) Validate() error {
	r := s.replay
	var faults []error
	add := func(field, value, reason string, err error) {
		faults = append(faults, s.fault(field, value, reason, err))
	}
	has := func(o option) bool { return r.set&o != 0 }

	if reason := filterFault(r.filter); reason != "" {
		add("subject", strconv.Quote(r.filter), reason, ErrInvalidSubject)
	}
	if s.handler == nil {
		add("handler", "nil", "a replay needs a function", ErrNoHandler)
	}
	if has(replayStream) {
		if reason := nameFault(r.stream); reason != "" {
			add("stream", strconv.Quote(r.stream), reason, ErrInvalidName)
		}
	}
	zero := instantOf(time.Time{})
	bound := func(opt option, field string, seq uint64) {
		if has(opt) && seq == 0 {
			add(field, "0", "sequences start at 1", ErrOutOfRange)
		}
	}
	bound(replayFromSequence, "fromSequence", r.fromSeq)
	bound(replayUntilSequence, "untilSequence", r.untilSeq)
	moment := func(opt option, field string, at instant) {
		if has(opt) && at == zero {
			add(field, "", "must not be the zero time", ErrOutOfRange)
		}
	}
	moment(replayFromTime, "fromTime", r.from)
	moment(replayUntilTime, "untilTime", r.until)
	if has(replayFromSequence) && has(replayFromTime) {
		add("fromTime", r.from.time().Format(time.RFC3339Nano), "does not fit with fromSequence: a replay has one start", ErrOptionConflict)
	}
	if has(replayFromSequence) && has(replayUntilSequence) && r.untilSeq > 0 && r.fromSeq > r.untilSeq {
		add("untilSequence", strconv.FormatUint(r.untilSeq, 10), fmt.Sprintf("is before fromSequence %d", r.fromSeq), ErrOutOfRange)
	}
	if has(replayFromTime) && has(replayUntilTime) && r.until != zero && r.from.after(r.until) {
		add("untilTime", r.until.time().Format(time.RFC3339Nano), "is before fromTime "+r.from.time().Format(time.RFC3339Nano), ErrOutOfRange)
	}
	if has(replayLimit) && r.limit < 1 {
		add("limit", strconv.Itoa(r.limit), "must be at least 1", ErrOutOfRange)
	}
	if has(replaySpeed) && !(r.speed >= 0 && r.speed <= maxReplaySpeed) {
		add("speed", strconv.FormatFloat(r.speed, 'g', -1, 64), fmt.Sprintf("must be between 0 and %g", float64(maxReplaySpeed)), ErrOutOfRange)
	}
	if has(replayConcurrency) && r.workers < 1 {
		add("concurrency", strconv.Itoa(r.workers), "must be at least 1", ErrOutOfRange)
	}
	if has(replayOrderedBy) {
		if reason, err := r.order.fault(); err != nil {
			add("orderedBy", r.order.String(), reason, err)
		}
	}
	if has(replayTimeout) && r.timeout <= 0 {
		add("timeout", r.timeout.String(), "must be above zero", ErrOutOfRange)
	}
	return errors.Join(faults...)
}

// concurrency is how many handlers of r may run at once in a pool.
func (r ReplayBuilder) concurrency(pool int) int {
	switch {
	case r.set&replayConcurrency != 0:
		return min(r.workers, pool)
	case r.set&replayOrderedBy != 0:
		return pool
	}
	return 1
}

// start is where the first consumer of a replay begins.
func (r ReplayBuilder) start() startPoint {
	switch {
	case r.set&replayFromSequence != 0:
		return startPoint{seq: r.fromSeq}
	case r.set&replayFromTime != 0:
		return startPoint{time: r.from.time()}
	}
	return startPoint{seq: 1}
}
