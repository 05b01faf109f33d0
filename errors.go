package natsx

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
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
	// ErrInvalidURL is a URL of [Connect] that no server can have.
	ErrInvalidURL = errors.New("natsx: invalid url")
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
	//   - of Health: "retryStream", it takes no retries; "start", JetStream does not let the route start yet; "consumer",
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
	// ErrBadRetryStream is a stream in which the retries of [WithRetryStream] could be lost;
	// the [*StreamError] around it names the setting.
	ErrBadRetryStream = errors.New("natsx: retries would not be kept")
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
	// ErrServerTooOld is a server that lacks what was asked for; the text names the version
	// that it needs.
	ErrServerTooOld = errors.New("natsx: server is too old")
	// ErrNoJetStream is a server on which JetStream is not enabled, or does not answer.
	ErrNoJetStream = errors.New("natsx: JetStream is not enabled")
	// ErrAlreadyRun is a second Run of one broker.
	ErrAlreadyRun = errors.New("natsx: broker was already run")
)

// PermissionError is a publish or a subscription that the server refused the
// connection's user. It is an [ErrPermission].
type PermissionError struct {
	Operation string // "publish" or "subscribe"
	Subject   string // as the server named it
	Err       error  // what nats.go reported
}

// Error names the operation and the subject.
func (e *PermissionError) Error() string {
	return fmt.Sprintf("natsx: permission denied: %s %q", e.Operation, e.Subject)
}

// Unwrap gives [ErrPermission] and the error of nats.go.
func (e *PermissionError) Unwrap() []error { return []error{ErrPermission, e.Err} }

// Ends of a replay that is not complete.
var (
	// ErrNotReplayable is a stream that cannot be read without taking from it: one
	// with work-queue retention.
	ErrNotReplayable = errors.New("natsx: stream cannot be replayed")
	// ErrBrokerStopped is a replay that ended because the broker's Run did.
	ErrBrokerStopped = errors.New("natsx: broker was stopped")
)

// ReplayError is a fault of a replay or what ended it. [ReplaySpec.Validate] joins
// all faults with [errors.Join], each on a line of its own.
type ReplayError struct {
	Replay string // the filter
	Field  string // the option at fault, by its setter's name in lower camel case; empty for none
	Value  string // the value as it was given, quoted when it is a string
	Reason string // what is wrong
	Err    error  // the sentinel or the cause
}

// Error gives the fault on one line that names replay and option.
func (e *ReplayError) Error() string {
	return faultLine(fmt.Sprintf("replay %q", e.Replay), e.Field, e.Value, e.Reason)
}

// Unwrap returns the sentinel or cause in Err.
func (e *ReplayError) Unwrap() error { return e.Err }

// StreamError is one fault of one stream's description, or of the stream that
// [WithRetryStream] names. [StreamSpec.Validate] joins all of them with [errors.Join],
// each on a line of its own.
type StreamError struct {
	Stream string // the name given to [Stream]
	Field  string // the option at fault, by its setter's name in lower camel case
	Value  string // the value as it was given, quoted when it is a string
	Reason string // what is wrong with it
	Err    error  // the sentinel
}

// Error gives the fault on one line that names the stream and the option.
func (e *StreamError) Error() string {
	return faultLine(fmt.Sprintf("stream %q", e.Stream), e.Field, e.Value, e.Reason)
}

// Unwrap returns the sentinel in Err.
func (e *StreamError) Unwrap() error { return e.Err }

// EnvelopeError is one fault of an envelope, found before it was sent.
type EnvelopeError struct {
	Subject string // given to [To]
	Field   string // the setter at fault in lower camel case, or subject
	Value   string // the value as it was given, quoted when it is a string
	Reason  string // what is wrong with it
	Err     error  // the sentinel or the cause
}

// Error gives the fault on one line that names subject, setter and value.
func (e *EnvelopeError) Error() string {
	field := e.Field
	if field == "subject" {
		field = "" // it is named anyway
	}
	return faultLine(fmt.Sprintf("publish to %q", e.Subject), field, e.Value, e.Reason)
}

// Unwrap returns the sentinel or cause in Err.
func (e *EnvelopeError) Unwrap() error { return e.Err }

// ErrNotALetter is a message on a DLQ subject that is no dead letter of natsx;
// see [LetterError].
var ErrNotALetter = errors.New("natsx: not a dead letter")

// LetterError is what is wrong with one message of a DLQ. The others are not
// concerned by it.
type LetterError struct {
	Subject  string // of the message in the DLQ
	Stream   string // of the DLQ
	Sequence uint64 // in that stream
	Err      error  // the cause, such as [ErrNotALetter]
}

// Error names the message by stream and sequence.
func (e *LetterError) Error() string {
	return fmt.Sprintf("natsx: dead letter %d of stream %q: %s", e.Sequence, e.Stream, cause(e.Err))
}

// Unwrap returns the cause.
func (e *LetterError) Unwrap() error { return e.Err }

// DrainError is a shutdown of [Broker.Run], or of a [Broker.Replay] that was stopped,
// which took longer than the drain timeout. It is an [ErrDrainTimeout].
type DrainError struct {
	Timeout time.Duration // the drain timeout
	// Abandoned counts the messages that waited, ran or were on their way to the DLQ
	// at the timeout. What a handler returned within [DrainGrace] holds. Of the others
	// those of durables are delivered again, those of core routes are gone, requests
	// were answered with code 503, and those of a replay are not in its report.
	Abandoned int
	Running   int // of those, handlers that still ran when Run or Replay returned
	// Stuck names the code that had not returned: handlers by their route, observers and
	// progress functions. It is nil when all had.
	Stuck []string
}

// Error gives the counts.
func (e *DrainError) Error() string {
	text := fmt.Sprintf("natsx: drain timeout: %d messages were not finished within %s, %d handlers still run",
		e.Abandoned, e.Timeout, e.Running)
	if len(e.Stuck) > 0 {
		text += ": " + strings.Join(e.Stuck, ", ")
	}
	return text
}

// Unwrap gives [ErrDrainTimeout].
func (e *DrainError) Unwrap() error { return ErrDrainTimeout }

// ReplyError is an error that a responder answered with, in the headers of NATS
// micro (ADR-32): Nats-Service-Error-Code and Nats-Service-Error.
type ReplyError struct {
	Code    int    // such as 404; 0 when the code is not a number
	Message string // what the responder said
	RawCode string // the code as it was sent; of a foreign service it may be any text
}

// Error gives code and message.
func (e *ReplyError) Error() string {
	return fmt.Sprintf("natsx: reply error %s: %s", e.code(), e.Message)
}

func (e *ReplyError) code() string {
	if e.RawCode != "" {
		return e.RawCode
	}
	return strconv.Itoa(e.Code)
}

// Fail returns an error that a [Responder] answers with: the requester gets it as
// [*ReplyError], and a client of NATS micro in the headers that it knows. Codes
// are the application's own; those of HTTP are what most readers expect. An empty
// message is sent as "error". Every other error of a responder is answered as 500
// "internal error", but a payload that does not decode as 400, one beyond the limit of
// a [LimitCodec] as 413 and a passed deadline as 504.
func Fail(code int, message string) error { return &ReplyError{Code: code, Message: message} }

// failedError is a sentence with the errors that callers branch on.
type failedError struct {
	text   string
	causes []error
}

func (e *failedError) Error() string { return "natsx: " + e.text }

func (e *failedError) Unwrap() []error { return e.causes }

// endFailure is [failure] for what the end of a context or a connection has ended:
// a deadline is an [ErrTimeout] too.
func endFailure(text string, cause error) error {
	if errors.Is(cause, context.DeadlineExceeded) {
		return failure(text, ErrTimeout, cause)
	}
	return failure(text, cause)
}

// failure makes an error of a sentence; causes may have nils.
func failure(text string, causes ...error) error {
	e := &failedError{text: text}
	for _, c := range causes {
		if c != nil {
			e.causes = append(e.causes, c)
		}
	}
	return e
}

// is tells whether err's chain has an error of type E.
func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// cause is the text of err for the reason of a RouteError.
func cause(err error) string { return strings.TrimPrefix(err.Error(), "natsx: ") }

// joined is errors.Join that leaves a single error as it is.
func joined(errs []error) error {
	var only error
	for _, err := range errs {
		if err == nil {
			continue
		}
		if only != nil {
			return errors.Join(errs...)
		}
		only = err
	}
	return only
}

// tooLargeError is an ErrTooLarge.
type tooLargeError struct{ size, most int }

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("payload of %d bytes is larger than the limit of %d", e.size, e.most)
}

func (e *tooLargeError) Unwrap() error { return ErrTooLarge }

// Refusals of a publish.
var (
	// ErrWrongSequence is an expected last sequence that is not the actual one;
	// see [SequenceError].
	ErrWrongSequence = errors.New("natsx: wrong last sequence")
	// ErrWrongStream is a stream other than the expected one.
	ErrWrongStream = errors.New("natsx: wrong stream")
	// ErrSchedulesNotAllowed is a delayed envelope for a stream that cannot
	// keep message schedules.
	ErrSchedulesNotAllowed = errors.New("natsx: message schedules are not allowed")
	// ErrTTLNotAllowed is an envelope with a TTL for a stream without AllowMsgTTL, which
	// all streams of a server before 2.11 are. The message was not stored.
	ErrTTLNotAllowed = errors.New("natsx: message TTL is not allowed")
	// ErrNoAck is an envelope for a stream that acknowledges nothing (NoAck). It was sent
	// once, and may be stored, unless the error says that it was not sent.
	// [Publisher.Send] stores in such a stream without an ack.
	ErrNoAck = errors.New("natsx: the stream does not acknowledge")
	// ErrBadAck is an answer to a publish that no stream gave: a subscriber of
	// the subject replied instead. Whether the message is stored is unknown.
	ErrBadAck = errors.New("natsx: not an ack of a stream")
)

// SequenceError is a failed expectation. The message was not stored, unless the error
// around it says that this is unknown: the server may have it from an earlier try, and
// neither traces messages (from 2.11 on, for a user who may publish to inboxes) nor
// lets them be read. Of an atomic batch in which several may have failed, which the
// server does not tell, it names the first. [errors.Is] finds [ErrWrongSequence] and [errors.As] the server's
// [*jetstream.APIError].
type SequenceError struct {
	Subject string // of the message
	Want    uint64 // the expected sequence
	Have    uint64 // the actual one, when Known
	Known   bool   // whether the server told the actual sequence
	Err     error  // the server's answer
}

// Error names the subject and both sequences.
func (e *SequenceError) Error() string {
	have := "another"
	if e.Known {
		have = strconv.FormatUint(e.Have, 10)
	}
	return fmt.Sprintf("natsx: publish to %q: expected last sequence %d, have %s", e.Subject, e.Want, have)
}

// Unwrap returns [ErrWrongSequence] and the server's answer.
func (e *SequenceError) Unwrap() []error { return []error{ErrWrongSequence, e.Err} }
