package natsx

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// minTTL is the shortest time to live that a stream accepts.
const minTTL = time.Second

// envelopeOption is one bit for each setter; see [option].
type envelopeOption uint16

const (
	envMsgID envelopeOption = 1 << iota
	envTTL
	envAt
	envAfter
	envStream
	envLastSequence
	envLastSubjectSequence
)

// field is one header. A name may occur several times.
type field struct{ name, value string }

// Envelope is a message to be published. It is a value: each setter returns a changed
// copy, so an envelope can be kept, shared between goroutines and forked. If a setter is
// called twice, the last call wins, except that [Envelope.Header] adds. Setters never
// fail; the publishing method reports every fault of an envelope, before it is sent, as
// joined [*EnvelopeError]s: [ErrInvalidSubject], [ErrInvalidName], [ErrOutOfRange],
// [ErrOptionConflict] or the codec's error.
//
// The payload is not copied: it must not be changed before the publishing method has
// returned.
type Envelope struct {
	set         envelopeOption
	subject     string
	data        []byte
	contentType string  // of the codec
	headers     []field // shared between copies: replaced, never appended to in place
	encodeFault error

	msgID               string
	ttl                 time.Duration
	at                  time.Time
	after               time.Duration
	stream              string
	lastSequence        uint64
	lastSubjectSequence uint64
}

// To starts an envelope with an empty payload. A subject with a wildcard, an empty token,
// white space or a control character, or one that starts with $, is [ErrInvalidSubject]
// when it is published; [EscapeToken] returns a safe token for any text.
func To(subject string) Envelope { return Envelope{subject: subject} }

// Data sets the payload, nil for an empty one, and replaces that of JSON or Encode. The
// default is an empty payload.
func (e Envelope) Data(b []byte) Envelope {
	e.data, e.contentType, e.encodeFault = b, "", nil
	return e
}

// JSON is [Envelope.Encode] with a [JSONCodec]: the payload is v as JSON, null for
// nil, with the Content-Type application/json.
func (e Envelope) JSON(v any) Envelope { return e.Encode(JSONCodec{}, v) }

// Encode encodes v immediately as the payload, and sets the header Content-Type unless
// [Envelope.Header] does. The publishing method returns an error of the codec, or of a nil
// codec, as an [*EnvelopeError].
func (e Envelope) Encode(codec Codec, v any) Envelope {
	e.data, e.contentType = nil, ""
	if codec == nil {
		e.encodeFault = errors.New("no codec")
		return e
	}
	e.data, e.encodeFault = codec.Marshal(v)
	e.contentType = codec.ContentType()
	return e
}

// Header adds a header; there may be several values for one name, which are all sent.
// Names must be HTTP tokens (letters, digits and characters such as -), else it is
// [ErrInvalidName]; they are case-sensitive (ADR-4). nats.go replaces line ends in the
// value by spaces and removes white space around it.
//
// Headers that are set by a setter of the envelope or by natsx are [ErrOptionConflict], in
// any case: Nats-Msg-Id, Nats-TTL, Nats-Expected-Stream, Nats-Expected-Last-Sequence,
// Nats-Expected-Last-Subject-Sequence, Nats-Schedule, Nats-Schedule-*, Nats-Scheduler,
// Nats-Batch-* and Natsx-Timeout. So is Status on a message without payload, which clients
// treat as a status message of the server. Other Nats-* headers, which are reserved for
// NATS (docs.nats.io, JetStream headers), are sent unchanged: Nats-Rollup, for example,
// needs AllowRollup.
func (e Envelope) Header(name, value string) Envelope {
	// append copies a clipped slice, so that forks of e do not share the new header.
	e.headers = append(slices.Clip(e.headers), field{name, value})
	return e
}

// MsgID sets the message id, the header Nats-Msg-Id. Within its duplicate window
// ([StreamSpec.DedupWindow]) a stream stores only one message with the same id; for
// another one [Ack.Duplicate] is set. The default is an automatic id; see [Publisher] and
// [WithoutMessageIDs]. An id that is empty, has a line end, or has white space around it
// is [ErrOutOfRange].
func (e Envelope) MsgID(id string) Envelope {
	e.set |= envMsgID
	e.msgID = id
	return e
}

// TTL makes the stream delete the message after d, rounded up to seconds, with the header
// Nats-TTL (ADR-43). Below 1 s it is [ErrOutOfRange]. The default is none: only the
// stream's MaxAge applies. The stream must have AllowMsgTTL (nats-server 2.11), else it is
// [ErrTTLNotAllowed] and nothing is stored. Since a server may ignore a TTL, the stream is
// looked up, at most every ten seconds; if the user may not do that, a TTL is refused on a
// server before 2.11. The TTL of a delayed message counts from its delivery to the stream.
func (e Envelope) TTL(d time.Duration) Envelope {
	e.set |= envTTL
	e.ttl = d
	return e
}

// At delays the message until t (ADR-51, nats-server 2.12); a t in the past is now. It is
// published within milliseconds of t, or up to 250 ms late if another schedule of the
// stream was due shortly before: a server (as of 2.15) checks at most that often. Until
// then it is a schedule, a message on the subject
//
//	natsx-schedule.<unique token>.<subject>
//
// of the same stream. The stream must have AllowMsgSchedules and should capture that
// subject too, for example natsx-schedule.*.orders.> beside orders.>, so that consumers of
// orders.> do not receive schedules. Otherwise, with limits retention, the subject is
// <subject>.natsx-schedule.<unique token> if the stream captures that, or else the subject
// with natsx-schedule-<unique token> in place of a token for which the stream has a *. A
// consumer whose filter matches then receives the schedule early, with the header
// Nats-Schedule; durable routes of natsx skip it. Any other stream, and one with interest
// retention, which drops schedules, is [ErrSchedulesNotAllowed]. The stream is looked up
// for each call; if none captures the subject, it is [ErrNoStream]. In a durable's handler
// the token is derived from the message id, so that a repetition replaces its schedule.
//
// The zero time is [ErrOutOfRange]. At excludes [Envelope.After],
// [Envelope.ExpectLastSubjectSequence], an atomic batch and core NATS
// ([ErrOptionConflict]).
//
// The message published at t has the headers of the envelope, plus Nats-Scheduler and
// Nats-Schedule-Next, and without Nats-Msg-Id: MsgID deduplicates only the schedule.
func (e Envelope) At(t time.Time) Envelope {
	e.set |= envAt
	e.at = t
	return e
}

// After is [Envelope.At] with a delay from the call of the publishing method. Prefer it in
// a handler: with At, a time that differs from run to run makes a different message; see
// [Publisher]. 0 is published at once, but as a schedule; a negative d is [ErrOutOfRange].
func (e Envelope) After(d time.Duration) Envelope {
	e.set |= envAfter
	e.after = d
	return e
}

// ExpectStream requires that this stream stores the message, else it is [ErrWrongStream]
// and not stored. An invalid name is [ErrInvalidName]. The default is any stream.
func (e Envelope) ExpectStream(name string) Envelope {
	e.set |= envStream
	e.stream = name
	return e
}

// ExpectLastSequence requires that the stream's last sequence is n, 0 if it never had a
// message; deleted messages count. Otherwise the error is a [*SequenceError], which
// matches [ErrWrongSequence], and the message is not stored. It excludes
// ExpectLastSubjectSequence ([ErrOptionConflict]).
func (e Envelope) ExpectLastSequence(n uint64) Envelope {
	e.set |= envLastSequence
	e.lastSequence = n
	return e
}

// ExpectLastSubjectSequence requires that the last stored message of the subject has the
// stream sequence n, 0 if there is none. Otherwise the error is a [*SequenceError], which
// matches [ErrWrongSequence], and the message is not stored. It excludes
// ExpectLastSequence, At and After ([ErrOptionConflict]).
func (e Envelope) ExpectLastSubjectSequence(n uint64) Envelope {
	e.set |= envLastSubjectSequence
	e.lastSubjectSequence = n
	return e
}

// Subject is what [To] was given.
func (e Envelope) Subject() string { return e.subject }

// Size is the number of bytes of the payload.
func (e Envelope) Size() int { return len(e.data) }

// ID is what [Envelope.MsgID] was given, empty for an automatic one.
func (e Envelope) ID() string { return e.msgID }

func (e *Envelope) delayed() bool { return e.set&(envAt|envAfter) != 0 }

// expects reports whether a last sequence is expected.
func (e *Envelope) expects() bool { return e.set&(envLastSequence|envLastSubjectSequence) != 0 }

// due is when a delayed envelope is to be published.
func (e *Envelope) due() time.Time {
	if e.set&envAfter != 0 {
		return time.Now().Add(e.after)
	}
	return e.at
}

func (e *Envelope) ttlText() string {
	return strconv.FormatInt(int64((e.ttl+time.Second-1)/time.Second), 10) + "s"
}

// check reports every fault that can be found without a server.
func (e *Envelope) check() error {
	var faults []error
	add := func(name, value, reason string, err error) {
		faults = append(faults, &EnvelopeError{Subject: e.subject, Field: name, Value: value, Reason: reason, Err: err})
	}
	if reason := publishFault(e.subject); reason != "" {
		add("subject", strconv.Quote(e.subject), "the subject "+reason, ErrInvalidSubject)
	}
	if e.encodeFault != nil {
		add("encode", "", e.encodeFault.Error(), e.encodeFault)
	}
	for _, h := range e.headers {
		name := strconv.Quote(h.name)
		if reason := headerNameFault(h.name); reason != "" {
			add("header", name, "the name "+reason, ErrInvalidName)
		} else if setter := reservedHeader(h.name); setter != "" {
			add("header", name, "is set by "+setter, ErrOptionConflict)
		} else if len(e.data) == 0 && strings.EqualFold(h.name, "Status") {
			add("header", name, "without a payload would be treated as a status message of the server", ErrOptionConflict)
		}
	}
	if e.set == 0 {
		return errors.Join(faults...)
	}
	has := func(o envelopeOption) bool { return e.set&o != 0 }
	if has(envMsgID) {
		switch {
		case e.msgID == "":
			add("msgID", `""`, "must not be empty", ErrOutOfRange)
		case strings.TrimSpace(e.msgID) != e.msgID || strings.ContainsAny(e.msgID, "\r\n"):
			add("msgID", strconv.Quote(e.msgID), "has a line end, or white space around it, which would be changed", ErrOutOfRange)
		}
	}
	if has(envTTL) && e.ttl < minTTL {
		add("ttl", e.ttl.String(), "must be at least "+minTTL.String(), ErrOutOfRange)
	}
	if has(envAt) && e.at.IsZero() {
		add("at", "", "must not be the zero time", ErrOutOfRange)
	}
	if has(envAfter) && e.after < 0 {
		add("after", e.after.String(), "must not be negative", ErrOutOfRange)
	}
	if has(envAt) && has(envAfter) {
		add("after", e.after.String(), "does not fit with At", ErrOptionConflict)
	}
	if has(envStream) {
		if reason := nameFault(e.stream); reason != "" {
			add("expectStream", strconv.Quote(e.stream), reason, ErrInvalidName)
		}
	}
	if e.delayed() && has(envLastSubjectSequence) {
		add("expectLastSubjectSequence", strconv.FormatUint(e.lastSubjectSequence, 10),
			"does not fit with a delay: a schedule has a subject of its own", ErrOptionConflict)
	}
	if has(envLastSequence) && has(envLastSubjectSequence) {
		add("expectLastSubjectSequence", strconv.FormatUint(e.lastSubjectSequence, 10),
			"does not fit with ExpectLastSequence: the server would not say which one failed", ErrOptionConflict)
	}
	return errors.Join(faults...)
}

// checkCore is check for core NATS, which excludes options that need a stream.
func (e *Envelope) checkCore() error {
	err := e.check()
	for _, o := range []struct {
		bit  envelopeOption
		name string
	}{
		{envAt, "at"}, {envAfter, "after"}, {envStream, "expectStream"},
		{envLastSequence, "expectLastSequence"}, {envLastSubjectSequence, "expectLastSubjectSequence"},
	} {
		if e.set&o.bit != 0 {
			err = errors.Join(err, &EnvelopeError{Subject: e.subject, Field: o.name,
				Reason: "needs a stream: publish it to JetStream", Err: ErrOptionConflict})
		}
	}
	return err
}

// reservedHeader returns the setter or method of a header that may not be set directly, or
// "".
func reservedHeader(name string) string {
	if len(name) < len("Nats-") || !strings.EqualFold(name[:4], "Nats") {
		return ""
	}
	for _, r := range []struct{ name, maker string }{
		{jetstream.MsgIDHeader, "MsgID"},
		{jetstream.MsgTTLHeader, "TTL"},
		{jetstream.ExpectedStreamHeader, "ExpectStream"},
		{jetstream.ExpectedLastSeqHeader, "ExpectLastSequence"},
		{jetstream.ExpectedLastSubjSeqHeader, "ExpectLastSubjectSequence"},
		{jetstream.SchedulerHeader, "At and After"},
		{timeoutHeader, "Request"},
	} {
		if strings.EqualFold(name, r.name) {
			return r.maker
		}
	}
	switch lower := strings.ToLower(name); {
	case lower == "nats-schedule", strings.HasPrefix(lower, "nats-schedule-"):
		return "At and After"
	case strings.HasPrefix(lower, "nats-batch-"):
		return "PublishAtomic"
	}
	return ""
}

// fill adds the envelope's headers and the carried ones to h.
func (e *Envelope) fill(h nats.Header, carried []field) {
	for _, f := range e.headers {
		h[f.name] = append(h[f.name], f.value)
	}
	if e.contentType != "" && !e.hasHeader("Content-Type") {
		h["Content-Type"] = append(h["Content-Type"], e.contentType)
	}
	for _, f := range carried {
		if !e.hasHeader(f.name) {
			h[f.name] = append(h[f.name], f.value)
		}
	}
}

func (e *Envelope) hasHeader(name string) bool {
	return slices.ContainsFunc(e.headers, func(f field) bool { return strings.EqualFold(f.name, name) })
}

// carriedHeaders are copied from a handled message to what its handler publishes.
var carriedHeaders = []string{"traceparent", "tracestate", "baggage", "Correlation-Id"}

// plain reports whether the envelope has a subject and a payload and no more.
func (e *Envelope) plain() bool { return len(e.headers) == 0 && e.contentType == "" && e.set == 0 }
