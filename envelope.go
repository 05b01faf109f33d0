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

// minTTL is the shortest time to live that a stream takes.
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

// Envelope is a message to be published. It is a value: each setter returns a
// changed copy, so an envelope can be kept, shared between goroutines and forked.
// Of a setter called twice the last call holds, but [Envelope.Header] adds.
// Setters never fail; the publishing method reports every fault of an envelope,
// before it is sent, as joined [*EnvelopeError]s: [ErrInvalidSubject],
// [ErrInvalidName], [ErrOutOfRange], [ErrOptionConflict] or the codec's error.
//
// The payload is not copied: it must stay as it is until the publishing method
// has returned.
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

// To starts an envelope with an empty payload. A subject with a wildcard, an
// empty token, white space or a control character, or one that starts with $,
// is [ErrInvalidSubject] when it is published; [EscapeToken] makes a safe token
// of any text.
func To(subject string) Envelope { return Envelope{subject: subject} }

// Data sets the payload, nil for an empty one, in place of what JSON or Encode set.
// Default is an empty one.
func (e Envelope) Data(b []byte) Envelope {
	e.data, e.contentType, e.encodeFault = b, "", nil
	return e
}

// JSON is [Envelope.Encode] with a [JSONCodec]: the payload is v as JSON, null for
// nil, with the Content-Type application/json.
func (e Envelope) JSON(v any) Envelope { return e.Encode(JSONCodec{}, v) }

// Encode sets the payload to what codec makes of v, at once, and the header
// Content-Type unless [Envelope.Header] sets it. What the codec refuses is an
// [*EnvelopeError] of the publishing method with the codec's error in it, and so is a
// codec that is nil.
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

// Header adds a header; of one name there may be several, which are all sent. Names
// are HTTP tokens (letters, digits, dashes and the like), else it is
// [ErrInvalidName], and keep their case, which counts (ADR-4). Line ends in the value
// become spaces and white space around it is lost, as nats.go has it.
//
// Headers that a setter of the envelope, or natsx itself, makes are
// [ErrOptionConflict], whatever their case: Nats-Msg-Id, Nats-TTL, Nats-Expected-Stream,
// Nats-Expected-Last-Sequence, Nats-Expected-Last-Subject-Sequence, Nats-Schedule,
// Nats-Schedule-*, Nats-Scheduler, Nats-Batch-* and Natsx-Timeout. So is Status on a
// message without payload, which clients take for a word of the server. Other
// Nats-* headers, which NATS keeps for itself (docs.nats.io, JetStream headers), are
// sent as they are: Nats-Rollup, for one, needs AllowRollup.
func (e Envelope) Header(name, value string) Envelope {
	// The clipped slice has no room, so that append copies it: a fork of e
	// never sees what is added here.
	e.headers = append(slices.Clip(e.headers), field{name, value})
	return e
}

// MsgID sets the id, the header Nats-Msg-Id, by which a stream knows a message that
// it already has within its duplicate window ([StreamSpec.DedupWindow]): it stores
// it once, and [Ack.Duplicate] tells. Default is an automatic one; see [Publisher]
// and [WithoutMessageIDs]. An empty id, and one with a line end or with white space
// around it, is [ErrOutOfRange].
func (e Envelope) MsgID(id string) Envelope {
	e.set |= envMsgID
	e.msgID = id
	return e
}

// TTL has the stream delete the message after d, in whole seconds rounded up, with
// the header Nats-TTL (ADR-43). It is at least 1 s, else it is [ErrOutOfRange];
// default is none, and the stream's MaxAge holds. The stream must have AllowMsgTTL
// (nats-server 2.11), else it is [ErrTTLNotAllowed], and nothing is stored: since a server
// may ignore a TTL, the stream is looked up, not more than once in ten seconds, and the
// TTL refused where a server before 2.11 does not let it be looked up. The TTL of a
// delayed message counts from its delivery to the stream.
func (e Envelope) TTL(d time.Duration) Envelope {
	e.set |= envTTL
	e.ttl = d
	return e
}

// At has the stream hold the message back until t (ADR-51, nats-server 2.12); a t in
// the past is now. It comes within milliseconds of t, or up to 250 ms late when
// another schedule of the stream was due shortly before: a server (as of 2.15) looks
// at most that often. Until then it is a schedule, a message on the subject
//
//	natsx-schedule.<unique token>.<subject>
//
// of the same stream. The stream must have AllowMsgSchedules and capture that
// subject too, as natsx-schedule.*.orders.> beside orders.>, so that no consumer
// of orders.> takes schedules for orders. A stream with limits retention that
// does not is sent <subject>.natsx-schedule.<unique token> where it captures
// this, or else the subject with natsx-schedule-<unique token> for a token that
// the stream leaves open with *. A consumer that matches it sees the schedule
// early, with the header Nats-Schedule; durable routes of natsx pass it over. Any
// other stream, and one with interest retention, which drops schedules, is
// [ErrSchedulesNotAllowed]. The stream is looked up for each call, as often as that has
// no answer; that no stream captures the subject is [ErrNoStream]. In a durable's handler
// the token is made of the message id, so that a repetition replaces its schedule.
//
// The zero time is [ErrOutOfRange]. At excludes [Envelope.After],
// [Envelope.ExpectLastSubjectSequence], an atomic batch and core NATS
// ([ErrOptionConflict]).
//
// What arrives at t has the headers of the envelope without Nats-Msg-Id, so that
// MsgID deduplicates the schedule only, and Nats-Scheduler and Nats-Schedule-Next
// beside them.
func (e Envelope) At(t time.Time) Envelope {
	e.set |= envAt
	e.at = t
	return e
}

// After is [Envelope.At] with a delay from the time of publishing: that of the call
// and not of the envelope. In a handler it is the better of the two: with At, a time that
// differs from run to run makes another message of it, see [Publisher]. 0 comes at once, through a schedule nevertheless; below
// zero is [ErrOutOfRange].
func (e Envelope) After(d time.Duration) Envelope {
	e.set |= envAfter
	e.after = d
	return e
}

// ExpectStream has the message stored in this stream, else it is [ErrWrongStream] and
// not stored. A name that no stream can have is [ErrInvalidName]. Default is
// whichever stream captures the subject.
func (e Envelope) ExpectStream(name string) Envelope {
	e.set |= envStream
	e.stream = name
	return e
}

// ExpectLastSequence has the message stored only if the last sequence that the stream
// gave out is n, 0 for one that never had a message; what was deleted since counts
// too. Else it is a [*SequenceError], which is [ErrWrongSequence], and not stored. It
// excludes ExpectLastSubjectSequence ([ErrOptionConflict]).
func (e Envelope) ExpectLastSequence(n uint64) Envelope {
	e.set |= envLastSequence
	e.lastSequence = n
	return e
}

// ExpectLastSubjectSequence has the message stored only if the last message that the
// stream holds on its subject has the stream sequence n, 0 for none. Else it is a
// [*SequenceError], which is [ErrWrongSequence], and not stored. It excludes
// ExpectLastSequence, At and After ([ErrOptionConflict]).
func (e Envelope) ExpectLastSubjectSequence(n uint64) Envelope {
	e.set |= envLastSubjectSequence
	e.lastSubjectSequence = n
	return e
}

func (e *Envelope) delayed() bool { return e.set&(envAt|envAfter) != 0 }

// expects tells whether the last sequence of the stream or the subject matters.
func (e *Envelope) expects() bool { return e.set&(envLastSequence|envLastSubjectSequence) != 0 }

// due is when a delayed envelope is to arrive.
func (e *Envelope) due() time.Time {
	if e.set&envAfter != 0 {
		return time.Now().Add(e.after)
	}
	return e.at
}

func (e *Envelope) ttlText() string {
	return strconv.FormatInt(int64((e.ttl+time.Second-1)/time.Second), 10) + "s"
}

// check reports every fault that shows without a server.
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
			add("header", name, "is made by "+setter, ErrOptionConflict)
		} else if len(e.data) == 0 && strings.EqualFold(h.name, "Status") {
			add("header", name, "without a payload would be taken for a word of the server", ErrOptionConflict)
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
			add("msgID", strconv.Quote(e.msgID), "would be changed: it has a line end, or white space around it", ErrOutOfRange)
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

// checkCore is check for core NATS, where no stream is asked for.
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

// reservedHeader names the maker of a header that may not be set by hand.
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

// fill adds the envelope's own headers and the carried ones to h.
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

// carriedHeaders go from a handled message to what its handler publishes.
var carriedHeaders = []string{"traceparent", "tracestate", "baggage", "Correlation-Id"}
