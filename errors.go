package natsx

import (
	"errors"
	"fmt"
	"time"
)

// Faults of what was described: a route, a replay, a stream, an envelope, a query
// of dead letters, or a broker's options. Those of a route come inside a
// [*RouteError], which names the route, the option and the value; in the same way
// there are [*ReplayError], [*StreamError] and [*EnvelopeError].
var (
	// ErrInvalidSubject is a subject that breaks the grammar of the package
	// documentation, or one that may not be published to.
	ErrInvalidSubject = errors.New("natsx: invalid subject")
	// ErrInvalidName is the name of a durable, stream, queue, service, header or
	// domain, or a service's version, that the server or other clients do not take.
	ErrInvalidName = errors.New("natsx: invalid name")
	// ErrOutOfRange is a number, duration or time outside its documented bounds, or
	// a broker's option that is nil.
	ErrOutOfRange = errors.New("natsx: value out of range")
	// ErrNoHandler is a terminal that was given no function, or a middleware that
	// returned none.
	ErrNoHandler = errors.New("natsx: no handler")
	// ErrNoRoutes is a call to [Validate] or [Broker.Run] without a route.
	ErrNoRoutes = errors.New("natsx: no routes")
	// ErrOptionConflict is an option that does not fit the others, or a
	// [WithJetStream] of another connection than the broker's.
	ErrOptionConflict = errors.New("natsx: options do not fit together")
	// ErrDuplicateDurable is one durable used by two routes of one stream.
	// [Validate] sees it where both name the stream, or neither does and their
	// filters overlap; else [Broker.Run] does.
	ErrDuplicateDurable = errors.New("natsx: durable used twice on one stream")
	// ErrDLQLoop is a dead letter subject that the route itself consumes.
	ErrDLQLoop = errors.New("natsx: dead letters would come back to their route")
	// ErrNotSupported is an option that this version knows and cannot serve.
	ErrNotSupported = errors.New("natsx: not supported by this version")
)

// RouteError is one fault of one route. [Validate] joins all of them with
// [errors.Join], each on a line of its own; [Broker.Run] and [Broker.Health] have
// more of them.
type RouteError struct {
	Route   string // the filter subject given to [Route]
	Durable string // the durable, empty for a core route
	// Field is the option at fault, by its setter's name in lower camel case, such
	// as "ackWait", or one of these:
	//
	//   - "subject", the filter, "handler", the function, and "deliver", a Deliver
	//     option of a core route;
	//   - of Run: "middleware", which returned no handler, and "publish" or
	//     "subscribe", what the server does not permit;
	//   - of Health: "start", JetStream does not let the route start yet; "consumer",
	//     it cannot be verified; "pull", the server refuses pulls; "retries", they
	//     fill MaxAckPending; "dlq", it takes no letter; "maxDeliver", somebody had the
	//     server limit the attempts.
	Field  string
	Value  string // the value as it was given, quoted when it is a string; empty when there is none
	Reason string // what is wrong with it
	Err    error  // the sentinel or the cause
}

// Error gives the fault on one line that names route, durable and option.
func (e *RouteError) Error() string {
	where := fmt.Sprintf("route %q", e.Route)
	if e.Durable != "" {
		where += fmt.Sprintf(" durable %q", e.Durable)
	}
	reason := e.Reason
	if reason == "" && e.Err != nil {
		reason = cause(e.Err)
	}
	return faultLine(where, e.Field, e.Value, reason)
}

// faultLine is the text of a fault: where it is, the option and its value when
// there is one, and what is wrong.
func faultLine(where, field, value, reason string) string {
	line := "natsx: " + where
	if field != "" {
		line += ": " + field
		if value != "" {
			line += " " + value
		}
	}
	return line + ": " + reason
}

// Unwrap returns the sentinel or cause in Err.
func (e *RouteError) Unwrap() error { return e.Err }

type retryAfterError struct {
	delay time.Duration
	err   error
}

func (e *retryAfterError) Error() string { return text(e.err, "retry later") }
func (e *retryAfterError) Unwrap() error { return e.err }

type permanentError struct{ err error }

func (e *permanentError) Error() string { return text(e.err, "permanent failure") }
func (e *permanentError) Unwrap() error { return e.err }

type discardError struct{ err error }

func (e *discardError) Error() string { return text(e.err, "discarded") }
func (e *discardError) Unwrap() error { return e.err }

func text(err error, none string) string {
	if err == nil {
		return none
	}
	return err.Error()
}

// RetryAfter returns an error that asks for the next attempt after d instead of
// the route's backoff. It counts as an attempt. A d below zero counts as zero.
// The chain of err stays visible to [errors.Is] and [errors.As]; err may be nil.
func RetryAfter(d time.Duration, err error) error {
	return &retryAfterError{delay: max(d, 0), err: err}
}

// Permanent returns an error that no retry can mend: the message is dead at
// once. The chain of err stays visible; err may be nil.
func Permanent(err error) error { return &permanentError{err} }

// Discard returns an error that drops the message on purpose: it is terminated
// and logged, without a retry and without a dead letter. The chain of err stays
// visible; err may be nil.
func Discard(err error) error { return &discardError{err} }

// PanicError is what a handler's panic becomes: a failed attempt like any other
// error. Its stack goes to the log and into the dead letter.
type PanicError struct {
	Value any    // what the handler panicked with
	Stack []byte // the goroutine's stack at that moment
}

// Error gives the panic's value without the stack.
func (e *PanicError) Error() string { return fmt.Sprintf("natsx: handler panicked: %v", e.Value) }

// Unwrap returns the panic's value when that is an error, else nil.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// DecodeError is a payload that a typed handler's codec could not read. It is a
// permanent failure: the same bytes will not decode on the next attempt.
type DecodeError struct {
	Subject     string // of the message
	ContentType string // of the codec
	Err         error  // what the codec said
}

// Error names the subject and the codec.
func (e *DecodeError) Error() string {
	return fmt.Sprintf("natsx: decode %s from %q: %v", e.ContentType, e.Subject, e.Err)
}

// Unwrap returns the codec's error.
func (e *DecodeError) Unwrap() error { return e.Err }

// ErrTooLarge is a payload beyond the limit of a [LimitCodec]. It comes inside a
// [*DecodeError].
var ErrTooLarge = errors.New("natsx: payload is too large")

// Failures of a request, of publishing and of a running broker.
var (
	// ErrNoStream is a subject or filter of which no stream has a subject, a named
	// stream that does not exist, or one that has none of the filter's subjects. It is
	// JetStream's answer: a JetStream that does not answer is no reason for it.
	ErrNoStream = errors.New("natsx: no stream")
	// ErrAmbiguousStream is a filter of which several streams have subjects. A route
	// or a replay then names one with Stream.
	ErrAmbiguousStream = errors.New("natsx: several streams match")
	// ErrNoResponders is a request to a subject that nobody listens on.
	ErrNoResponders = errors.New("natsx: no responders")
	// ErrTimeout is a request that was not answered, or a publish that was not
	// acknowledged, in time. It comes together with [context.DeadlineExceeded].
	ErrTimeout = errors.New("natsx: timeout")
	// ErrWouldLose is a route whose dead messages would be deleted: it has Retry
	// and no DLQ on a work-queue or interest stream.
	ErrWouldLose = errors.New("natsx: dead messages would be lost")
	// ErrBadDLQ is a dead letter subject that no stream captures (then it is an
	// [ErrNoStream] too), or several, or one that cannot keep letters; see
	// [RouteBuilder.DLQ]. Of a purge it is a DLQ that refuses deletion.
	ErrBadDLQ = errors.New("natsx: dead letters would not be kept")
	// ErrConsumerConflict is an existing durable that the route cannot adopt; see
	// [RouteBuilder.Durable].
	ErrConsumerConflict = errors.New("natsx: durable exists with other settings")
	// ErrStreamConflict is an existing stream that cannot become what was
	// described; see [StreamConflictError].
	ErrStreamConflict = errors.New("natsx: stream exists with other settings")
	// ErrConsumerDeleted is a durable that was deleted while its route ran, also when
	// it was made anew or went with its stream, which was made anew. Of a redrive it
	// is a letter whose durable is gone.
	ErrConsumerDeleted = errors.New("natsx: consumer deleted")
	// ErrStreamDeleted is a stream that was deleted while its route or replay ran.
	ErrStreamDeleted = errors.New("natsx: stream deleted")
	// ErrPermission is a permission of the server that the connection's user lacks:
	// for what a route needs, a publish, a stream, a replay or dead letters. Of all but
	// streams it comes as a [*PermissionError], which tells the subject.
	ErrPermission = errors.New("natsx: permission denied")
	// ErrConnectionClosed is a connection that was closed for good; of a [Publisher],
	// also one that is draining.
	ErrConnectionClosed = errors.New("natsx: connection closed")
	// ErrDrainTimeout is a shutdown that did not end in time, as a [*DrainError]; or,
	// without one, that everything was handled and the last acknowledgements could
	// not be flushed to the server. It is also the cause of the handlers' contexts
	// that the drain timeout ends; see [context.Cause].
	ErrDrainTimeout = errors.New("natsx: drain timeout")
	// ErrUnknownDurable is a durable that no running route of the broker has.
	ErrUnknownDurable = errors.New("natsx: no running route has the durable")
	// ErrAlreadyRun is a second Run of one broker.
	ErrAlreadyRun = errors.New("natsx: broker was already run")
)
