package natsx

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Faults of a description: of a route, a replay, a stream, an envelope, a query of dead
// letters, or a broker's options. A fault of a route is wrapped in a [*RouteError], which
// names the route, the option and the value; there are also [*ReplayError],
// [*StreamError] and [*EnvelopeError].
var (
	// ErrInvalidSubject is a subject that violates the grammar in the package
	// documentation, or that may not be published to.
	ErrInvalidSubject = errors.New("natsx: invalid subject")
	// ErrInvalidName is the name of a durable, stream, queue group, service, header or
	// domain, or a service's version, that the server or other clients do not accept.
	ErrInvalidName = errors.New("natsx: invalid name")
	// ErrInvalidURL is an invalid URL passed to [Connect].
	ErrInvalidURL = errors.New("natsx: invalid url")
	// ErrOutOfRange is a number, duration or time outside its documented bounds, or
	// a broker's option that is nil.
	ErrOutOfRange = errors.New("natsx: value out of range")
	// ErrNoHandler is a nil function passed to a terminal, or returned by a middleware.
	ErrNoHandler = errors.New("natsx: no handler")
	// ErrNoRoutes is a call to [Validate] or [Broker.Run] without a route.
	ErrNoRoutes = errors.New("natsx: no routes")
	// ErrOptionConflict is an option that excludes another one, or a [WithJetStream] of
	// another connection than the broker's.
	ErrOptionConflict = errors.New("natsx: options do not fit together")
	// ErrDuplicateDurable is one durable used by two routes of one stream.
	// [Validate] finds it if both routes name the stream, or neither does and their
	// filters overlap; otherwise [Broker.Run] does.
	ErrDuplicateDurable = errors.New("natsx: durable used twice on one stream")
	// ErrDLQLoop is a dead letter subject that the route itself consumes.
	ErrDLQLoop = errors.New("natsx: dead letters would come back to their route")
	// ErrNotSupported is an option that this version knows and does not implement; at present
	// there is none.
	ErrNotSupported = errors.New("natsx: not supported by this version")
)

// RouteError is one fault of one route. [Validate] joins all of them with
// [errors.Join], each on a separate line; [Broker.Run] and [Broker.Health] return more
// of them.
type RouteError struct {
	Route   string // the filter subject given to [Route]
	Durable string // the durable, empty for a core route
	// Field is the option at fault, by its setter's name in lower camel case, such
	// as "ackWait", or one of these:
	//
	//   - "subject" for the filters, "handler" for the function, and "deliver" for a
	//     Deliver option of a core route, or one that differs from the durable's;
	//   - from Run: "middleware", which returned no handler; "publish" or "subscribe",
	//     which the server does not permit; "maxDeliver", which was limited at the server;
	//   - from Health: "start", the route waits for JetStream; "consumer", it cannot be
	//     verified; "pull", the server refuses pulls or none serves them; "paused", the
	//     consumer is paused at the server; "retries", they fill MaxAckPending; "subject",
	//     the stream no longer captures it; "dlq", it accepts no letter;
	//     "retryStream", it accepts no retry.
	Field  string
	Value  string // the value as it was given, quoted when it is a string; empty when there is none
	Reason string // what is wrong with it
	Err    error  // the sentinel or the cause
}

// Error returns the fault on one line that names route, durable and option.
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

// faultLine is the text of a fault: where it is, the option and its value if there is
// one, and what is wrong.
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

// RetryAfter returns an error that requests the next attempt after d instead of the
// route's backoff. It counts as an attempt. A negative d is zero. It wraps err, which may
// be nil.
func RetryAfter(d time.Duration, err error) error {
	return &retryAfterError{delay: max(d, 0), err: err}
}

// Permanent returns an error after which a retry would not help: the message is dead at
// once. It wraps err, which may be nil.
func Permanent(err error) error { return &permanentError{err} }

// Discard returns an error that drops the message: it is terminated and logged, without
// a retry and without a dead letter. It wraps err, which may be nil.
func Discard(err error) error { return &discardError{err} }

// PanicError is a panic of a handler, which is a failed attempt like any other error. Its
// stack is logged and added to the dead letter.
type PanicError struct {
	Value any    // what the handler panicked with
	Stack []byte // the goroutine's stack at that moment
}

// Error returns the panic's value without the stack.
func (e *PanicError) Error() string { return "natsx: handler panicked: " + cause(e.Value) }

// Unwrap returns the panic's value if that is an error, else nil.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// DecodeError is a payload that a typed handler's codec could not read. It is a
// permanent failure: the same bytes will not decode on the next attempt.
type DecodeError struct {
	Subject     string // of the message
	ContentType string // of the codec
	Err         error  // the codec's error
}

// Error names the subject and the codec.
func (e *DecodeError) Error() string {
	return fmt.Sprintf("natsx: decode %s from %q: %s", e.ContentType, e.Subject, cause(e.Err))
}

// Unwrap returns the codec's error.
func (e *DecodeError) Unwrap() error { return e.Err }

// ErrTooLarge is a payload above the limit of a [LimitCodec]. It is wrapped in a
// [*DecodeError].
var ErrTooLarge = errors.New("natsx: payload is too large")

// Failures of a request, of publishing and of a running broker.
var (
	// ErrNoStream is a subject or filter that no stream captures, a named stream that does
	// not exist, or one that captures no subject of the filter. It is returned only when
	// JetStream has answered so.
	ErrNoStream = errors.New("natsx: no stream")
	// ErrAmbiguousStream is a filter that several streams capture. Name one of them with
	// the Stream method of the route or replay.
	ErrAmbiguousStream = errors.New("natsx: several streams match")
	// ErrNoResponders is a request to a subject without subscribers.
	ErrNoResponders = errors.New("natsx: no responders")
	// ErrTimeout is a request that was not answered, or a publish that was not
	// acknowledged, in time. The error is also [context.DeadlineExceeded], unless the
	// responder of a request answered with code 504: then it is a [*ReplyError].
	ErrTimeout = errors.New("natsx: timeout")
	// ErrWouldLose is a route whose dead messages would be deleted: it has Retry
	// and no DLQ on a work-queue or interest stream.
	ErrWouldLose = errors.New("natsx: dead messages would be lost")
	// ErrBadDLQ is a dead letter subject that no stream captures (the error is then also
	// [ErrNoStream]), or several do, or whose stream cannot keep letters; see
	// [RouteBuilder.DLQ]. From a redrive or purge it is a DLQ that denies deletion.
	ErrBadDLQ = errors.New("natsx: dead letters would not be kept")
	// ErrWouldEvict is a letter that is not redriven, since the stream would delete a newer
	// message for the copy.
	ErrWouldEvict = errors.New("natsx: would evict a newer message")
	// ErrBadRetryStream is a stream in which the retries of [WithRetryStream] could be lost;
	// the [*StreamError] around it names the setting.
	ErrBadRetryStream = errors.New("natsx: retries would not be kept")
	// ErrConsumerConflict is an existing durable that is not what the route says, or was
	// changed while the route ran; see [RouteBuilder.Durable] and
	// [RouteBuilder.AdoptChanges].
	ErrConsumerConflict = errors.New("natsx: durable exists with other settings")
	// ErrStreamConflict is an existing stream that cannot be changed to the description;
	// see [StreamConflictError].
	ErrStreamConflict = errors.New("natsx: stream exists with other settings")
	// ErrConsumerDeleted is a durable that was deleted while its route ran, even if it,
	// or its stream, was recreated. From a redrive it is a letter whose durable no longer
	// exists.
	ErrConsumerDeleted = errors.New("natsx: consumer deleted")
	// ErrStreamDeleted is a stream that was deleted while its route or replay ran, or a
	// DLQ's while its letters were redriven or purged, also when it was recreated.
	ErrStreamDeleted = errors.New("natsx: stream deleted")
	// ErrPermission is a permission that the connection's user lacks at the server. The
	// error is a [*PermissionError], which names the subject, except for streams.
	ErrPermission = errors.New("natsx: permission denied")
	// ErrConnectionClosed is a connection that was closed for good; from a [Publisher]
	// also one that is draining.
	ErrConnectionClosed = errors.New("natsx: connection closed")
	// ErrDrainTimeout is a shutdown that exceeded the drain timeout, as a [*DrainError].
	// Without one everything was handled, but the last acknowledgements could not be
	// flushed. It is also the [context.Cause] of handlers' contexts that the drain timeout
	// cancels.
	ErrDrainTimeout = errors.New("natsx: drain timeout")
	// ErrUnknownDurable is a durable that no running route of the broker has.
	ErrUnknownDurable = errors.New("natsx: no running route has the durable")
	// ErrServerTooOld is a server without a feature that is needed; the text names the
	// version that has it.
	ErrServerTooOld = errors.New("natsx: server is too old")
	// ErrNoJetStream is a server on which JetStream is not enabled, or does not answer.
	ErrNoJetStream = errors.New("natsx: JetStream is not enabled")
	// ErrAlreadyRun is a second [Broker.Run] of one broker.
	ErrAlreadyRun = errors.New("natsx: broker was already run")
)

// PermissionError is a publish or a subscription that the server does not permit to the
// connection's user. It matches [ErrPermission].
type PermissionError struct {
	Operation string // "publish" or "subscribe"
	Subject   string // as the server named it
	Err       error  // the error of nats.go
}

// Error names the operation and the subject.
func (e *PermissionError) Error() string {
	return fmt.Sprintf("natsx: permission denied: %s %q", e.Operation, e.Subject)
}

// Unwrap returns [ErrPermission] and the error of nats.go.
func (e *PermissionError) Unwrap() []error { return []error{ErrPermission, e.Err} }

// Errors of an incomplete replay.
var (
	// ErrNotReplayable is a stream with work-queue retention: reading it would remove
	// messages.
	ErrNotReplayable = errors.New("natsx: stream cannot be replayed")
	// ErrBrokerStopped is a replay that ended because the broker's Run ended.
	ErrBrokerStopped = errors.New("natsx: broker was stopped")
)

// ReplayError is a fault of a replay, or the error that ended it. [ReplaySpec.Validate]
// joins all faults with [errors.Join], each on a separate line.
type ReplayError struct {
	Replay string // the filter
	Field  string // the option at fault, by its setter's name in lower camel case; empty for none
	Value  string // the value as it was given, quoted when it is a string
	Reason string // what is wrong
	Err    error  // the sentinel or the cause
}

// Error returns the fault on one line that names replay and option.
func (e *ReplayError) Error() string {
	return faultLine(fmt.Sprintf("replay %q", e.Replay), e.Field, e.Value, e.Reason)
}

// Unwrap returns the sentinel or cause in Err.
func (e *ReplayError) Unwrap() error { return e.Err }

// StreamError is one fault of one stream's description, or of the stream of
// [WithRetryStream]. [StreamSpec.Validate] joins all of them with [errors.Join], each on a
// separate line.
type StreamError struct {
	Stream string // the name given to [Stream]
	Field  string // the option at fault, by its setter's name in lower camel case
	Value  string // the value as it was given, quoted when it is a string
	Reason string // what is wrong with it
	Err    error  // the sentinel
}

// Error returns the fault on one line that names stream and option.
func (e *StreamError) Error() string {
	return faultLine(fmt.Sprintf("stream %q", e.Stream), e.Field, e.Value, e.Reason)
}

// Unwrap returns the sentinel in Err.
func (e *StreamError) Unwrap() error { return e.Err }

// EnvelopeError is one fault of an envelope, found before it is sent.
type EnvelopeError struct {
	Subject string // given to [To]
	Field   string // the setter at fault in lower camel case, or subject
	Value   string // the value as it was given, quoted when it is a string
	Reason  string // what is wrong with it
	Err     error  // the sentinel or the cause
}

// Error returns the fault on one line that names subject, setter and value.
func (e *EnvelopeError) Error() string {
	field := e.Field
	if field == "subject" {
		field = "" // the line names it anyway
	}
	return faultLine(fmt.Sprintf("publish to %q", e.Subject), field, e.Value, e.Reason)
}

// Unwrap returns the sentinel or cause in Err.
func (e *EnvelopeError) Unwrap() error { return e.Err }

// ErrNotALetter is a message on a DLQ subject that is not a dead letter of natsx; see
// [LetterError].
var ErrNotALetter = errors.New("natsx: not a dead letter")

// LetterError is an error of one message of a DLQ. It does not affect the others.
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

// DrainError is a shutdown of [Broker.Run], or of a stopped [Broker.Replay], that exceeded
// the drain timeout. It matches [ErrDrainTimeout].
type DrainError struct {
	Timeout time.Duration // the drain timeout
	// Abandoned counts the messages that waited, ran or were being moved to the DLQ at
	// the timeout. The result of a handler that returned within [DrainGrace] still counts.
	// Other messages of durables are redelivered, those of core routes are lost, requests
	// are answered with code 503, and those of a replay are not in its report.
	Abandoned int
	Running   int // those of them whose handlers still ran when Run or Replay returned
	// Stuck names the code that has not returned: handlers by their route, observers and
	// progress functions. It is nil if all have returned.
	Stuck []string
}

// Error returns the counts.
func (e *DrainError) Error() string {
	text := fmt.Sprintf("natsx: drain timeout: %d messages were not finished within %s, %d handlers still run",
		e.Abandoned, e.Timeout, e.Running)
	if len(e.Stuck) > 0 {
		text += ": " + strings.Join(e.Stuck, ", ")
	}
	return text
}

// Unwrap returns [ErrDrainTimeout].
func (e *DrainError) Unwrap() error { return ErrDrainTimeout }

// ReplyError is an error that a responder answered with, in the headers of NATS
// micro (ADR-32): Nats-Service-Error-Code and Nats-Service-Error.
type ReplyError struct {
	Code    int    // such as 404; 0 if the code is not a number
	Message string // the responder's message
	RawCode string // the code as it was sent; other services may send any text

	// Data is the body that a responder sends with the error, in place of the data that it
	// returns. In a received error it is empty, since it is in the message that is returned
	// with it, except for [RequestJSON], which returns no message.
	Data []byte
	// Header are the headers that a responder sends with the error, in addition to
	// [Msg.ReplyHeader]. In a received error they are where Data is.
	Header nats.Header
}

// Is reports that a responder that exceeded its deadline (code 504) is an [ErrTimeout].
func (e *ReplyError) Is(target error) bool {
	return target == ErrTimeout && e.Code == http.StatusGatewayTimeout
}

// Error returns code and message.
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
// [*ReplyError], and a client of NATS micro in the headers of its services. Codes are
// defined by the application; HTTP status codes are usual. An empty message is sent as
// "error". Every other error of a responder is answered as 500 "internal error", except
// a payload that does not decode as 400, one above the limit of a [LimitCodec] as 413,
// and an exceeded deadline as 504. A [*ReplyError] made by the application may also have
// a body and headers.
func Fail(code int, message string) error { return &ReplyError{Code: code, Message: message} }

// failedError is a text with the errors that callers branch on.
type failedError struct {
	text   string
	causes []error
}

func (e *failedError) Error() string { return "natsx: " + e.text }

func (e *failedError) Unwrap() []error { return e.causes }

// endFailure is [failure] for the end of a context or a connection: an exceeded deadline
// is also an [ErrTimeout].
func endFailure(text string, cause error) error {
	if errors.Is(cause, context.DeadlineExceeded) {
		return failure(text, ErrTimeout, cause)
	}
	return failure(text, cause)
}

// failure returns an error with a text and its causes, of which nil ones are left out.
func failure(text string, causes ...error) error {
	e := &failedError{text: text}
	for _, c := range causes {
		if c != nil {
			e.causes = append(e.causes, c)
		}
	}
	return e
}

// is reports whether err's chain has an error of type E.
func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// cause is the text of an error, or of a panic's value, as a part of another error's text,
// which has the prefix "natsx: " already.
func cause(v any) string { return strings.TrimPrefix(fmt.Sprint(v), "natsx: ") }

// joined is errors.Join, except that it returns a single error unchanged.
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

// tooLargeError is an ErrTooLarge with its numbers.
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
	// ErrTTLNotAllowed is an envelope with a TTL for a stream without AllowMsgTTL, such as
	// any stream of a server before 2.11. The message was not stored.
	ErrTTLNotAllowed = errors.New("natsx: message TTL is not allowed")
	// ErrNoAck is an envelope for a stream without acks (NoAck). It was sent once and may
	// be stored, unless the error says that it was not sent. Use [Publisher.Send] for such
	// a stream.
	ErrNoAck = errors.New("natsx: the stream does not acknowledge")
	// ErrBadAck is an answer to a publish that is not from a stream: a subscriber of the
	// subject replied instead. Whether the message is stored is unknown.
	ErrBadAck = errors.New("natsx: not an ack of a stream")
)

// SequenceError is an expected last sequence that is not the actual one. The message was
// not stored, unless the error around it says that this is unknown: then an earlier try
// may have stored it, and the server neither traces messages (which needs 2.11 and the
// permission to publish to inboxes) nor lets them be read. In an atomic batch with several
// expectations the server does not say which one failed; the error names the first.
// [errors.Is] finds [ErrWrongSequence] and [errors.As] the server's
// [*jetstream.APIError].
type SequenceError struct {
	Subject string // of the message
	Want    uint64 // the expected sequence
	Have    uint64 // the actual one, if Known
	Known   bool   // whether the actual sequence is known
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
