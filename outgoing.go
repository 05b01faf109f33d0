package natsx

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// call is what the envelopes of one call have in common.
type call struct {
	p       *Publisher
	d       *delivery               // of the handler whose context it is, or nil
	carried []field                 // headers of the handled message
	mark    uint64                  // of denials when it began
	streams []*jetstream.StreamInfo // looked up for schedules
	found   map[string]finding      // what the server said of subjects without responders
	silent  time.Time               // when it last said nothing
}

type finding struct {
	exists bool
	err    error // why the question was not answered
	at     time.Time
}

func (p *Publisher) newCall(ctx context.Context) call {
	d := deliveryFrom(ctx)
	return call{p: p, d: d, carried: carriedFrom(d), mark: p.denials.mark()}
}

// denied is the permission that keeps a message on subject from being stored and
// acknowledged, if the server has refused it since the call began.
func (c *call) denied(subject string) error { return c.p.denials.of(subject, c.mark) }

// inDurable reports whether the call is a durable's handler's, whose envelopes have
// message ids made of the handled message.
func (c *call) inDurable() bool { return c.d != nil && c.d.msg.Durable() != "" }

// giveBack frees the number of what was not stored, as far as anybody knows.
func (c *call) giveBack(number number) {
	if number.n > 0 {
		c.d.output().giveBack(number)
	}
}

// mayHave reports whether a stream may have the message though it refuses it: from an
// unanswered try, an earlier attempt of the handler, or an earlier call.
func (o *outgoing) mayHave() bool {
	return o.id != "" && (o.unanswered > 0 || o.number.n > 0 || o.e.set&envMsgID != 0)
}

// outgoing is one envelope on its way to a stream, with what its tries share.
type outgoing struct {
	e       *Envelope
	id      string
	number  number    // of which the id is made
	subject string    // where it is sent: the schedule's subject for a delayed one
	due     time.Time // of a delayed one
	carried []field   // headers of the handled message

	tries      int
	unanswered int       // of those, after which the message may be stored
	trouble    string    // what kept its stream from taking it, when last heard of
	unknown    time.Time // when it first met nobody, and nobody could say why
}

// prepare judges the envelope and settles its message id and subject. A bare one
// gets no automatic id.
func (c *call) prepare(ctx context.Context, e *Envelope, bare bool) (outgoing, error) {
	o := outgoing{e: e, id: e.msgID, subject: e.subject, carried: c.carried}
	if err := e.check(); err != nil {
		return o, err
	}
	switch {
	case o.id != "":
	case c.inDurable():
		made := c.d.output()
		o.number = made.take(e.digest())
		o.id = made.id(o.number)
	case !bare:
		o.id = c.p.nextID()
	}
	if e.delayed() {
		subject, err := c.scheduleSubject(ctx, &o)
		if err != nil {
			c.giveBack(o.number)
			return o, err
		}
		o.subject, o.due = subject, e.due()
	}
	return o, nil
}

// nextID returns an id that nobody else has. It is one subject token.
func (p *Publisher) nextID() string {
	return p.prefix + "-" + strconv.FormatUint(p.count.Add(1), 36)
}

// fill adds the message's headers to h.
func (o *outgoing) fill(h nats.Header) {
	e := o.e
	e.fill(h, o.carried)
	set := func(k, v string) { h[k] = append(h[k], v) }
	if o.id != "" {
		set(jetstream.MsgIDHeader, o.id)
	}
	if e.set&envStream != 0 {
		set(jetstream.ExpectedStreamHeader, e.stream)
	}
	if e.set&envLastSequence != 0 {
		set(jetstream.ExpectedLastSeqHeader, strconv.FormatUint(e.lastSequence, 10))
	}
	if e.set&envLastSubjectSequence != 0 {
		set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(e.lastSubjectSequence, 10))
	}
	if e.set&envTTL != 0 {
		name := jetstream.MsgTTLHeader
		if e.delayed() {
			name = jetstream.ScheduleTTLHeader
		}
		set(name, e.ttlText())
	}
	if e.delayed() {
		set(jetstream.ScheduleHeader, "@at "+o.due.UTC().Format(time.RFC3339Nano))
		set(jetstream.ScheduleTargetHeader, e.subject)
	}
}

// after decides what follows a failed try: another one after a wait, or, when
// wait is negative, the end with this ack or error.
func (c *call) after(ctx context.Context, o *outgoing, err error) (ack Ack, wait time.Duration, _ error) {
	o.tries++
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeTooManyRequests:
			o.trouble = overloaded
			return o.again(ctx, againWait(50*time.Millisecond, o.tries))
		case codeIDInProcess, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			// A message with this id, or one on the expected subject, is on its
			// way through the cluster; the next try learns what became of it. A server
			// (as of 2.15) that led before may keep an id of then for all of its window.
			o.trouble = inProcess
			return o.again(ctx, againWait(20*time.Millisecond, o.tries))
		case jetstream.JSErrCodeStreamWrongLastSequence:
			// A server without replicas checks expectations before message ids:
			// the sequence may be wrong because the message is stored.
			if !o.mayHave() {
				break
			}
			ack, stored, err := c.p.probe(ctx, o)
			switch {
			case stored:
				return ack, -1, nil
			case err != nil:
				o.unanswered++
				return o.again(ctx, 100*time.Millisecond)
			}
		}
		return ack, -1, o.refusal(api)
	case errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck), isLocal(err):
		return ack, -1, c.p.publishFailure(o, err)
	case errors.Is(err, nats.ErrNoResponders):
		if err := c.noResponders(ctx, o); err != nil {
			return ack, -1, err
		}
		wait = againWait(50*time.Millisecond, o.tries)
	default:
		o.unanswered++
		if err := c.denied(o.subject); err != nil {
			return ack, -1, err
		}
		if o.id == "" && ctx.Err() == nil {
			return ack, -1, failure(fmt.Sprintf("publish to %q: no ack, and the message may be stored: %v", o.subject, err), err)
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			wait = 100 * time.Millisecond
		}
	}
	return o.again(ctx, wait)
}

// again is another try after a wait, unless ctx has ended.
func (o *outgoing) again(ctx context.Context, wait time.Duration) (Ack, time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return Ack{}, -1, o.ended(err)
	}
	return Ack{}, wait, nil
}

// What keeps a stream from taking a message, or the message from its stream.
const (
	overloaded = "its stream has had more than it can take"
	leaderless = "its stream has had no leader"
	// Its stream may be another account's, so it is no reason to give up.
	noStreamHere = "no stream of this account captures the subject"
	offline      = "the connection was never up"
	inProcess    = "its message id, or one on its subject, has been in process"
)

// againWait is the wait after so many tries that were refused for the moment, first
// after one.
func againWait(first time.Duration, tries int) time.Duration {
	return min(first<<min(tries-1, 5), 500*time.Millisecond)
}

// noResponders tells a subject without a stream, which is an error, from a
// stream that has no leader at the moment.
func (c *call) noResponders(ctx context.Context, o *outgoing) error {
	f := c.lookUp(ctx, o.subject)
	switch {
	case f.exists:
		o.trouble, o.unknown = leaderless, time.Time{}
	case f.err == nil:
		return failure(fmt.Sprintf("publish to %q: no stream captures the subject", o.subject), ErrNoStream)
	case errors.Is(f.err, context.DeadlineExceeded):
		// The cluster is looking for the leader who would know.
	case o.unknown.IsZero():
		o.unknown = time.Now()
	case time.Since(o.unknown) > unknownStreamWait:
		return failure(fmt.Sprintf("publish to %q: nobody answers, and whether a stream captures the subject is unknown: %v",
			o.subject, f.err), ErrNoStream, f.err)
	}
	return nil
}

// lookUp asks whether a stream captures the subject, at most every 200 ms, and not
// for each of many subjects when nobody answers.
func (c *call) lookUp(ctx context.Context, subject string) finding {
	if f, ok := c.found[subject]; ok && time.Since(f.at) < 200*time.Millisecond {
		return f
	}
	if time.Since(c.silent) < lookupWait {
		return finding{err: context.DeadlineExceeded}
	}
	ctx, cancel := context.WithTimeout(ctx, lookupWait)
	defer cancel()
	err := requestWith(ctx, c.p.nc, apiPrefix(c.p.js)+"STREAM.NAMES", func(ctx context.Context) error {
		_, err := c.p.js.StreamNameBySubject(ctx, subject)
		return err
	})
	f := finding{exists: err == nil, at: time.Now()}
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		f.err = err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		c.silent = f.at
	}
	if c.found == nil {
		c.found = make(map[string]finding)
	}
	c.found[subject] = f
	return f
}

// probe asks whether a stream has the message by its id, without storing
// anything: an invalid rollup is what the server, with and without replicas,
// refuses after it has looked for a duplicate and before it does anything else.
func (p *Publisher) probe(ctx context.Context, o *outgoing) (ack Ack, stored bool, err error) {
	m := &nats.Msg{Subject: o.subject, Header: nats.Header{
		jetstream.MsgIDHeader: {o.id},
		jetstream.MsgRollup:   {"natsx-probe"},
	}}
	ack, err = o.try(ctx, p.nc, m)
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == codeRollupFailed {
		return Ack{}, false, nil
	}
	if err == nil && !ack.Duplicate {
		err = failure(fmt.Sprintf("publish to %q: a probe was stored", o.subject), ErrBadAck)
	}
	return ack, err == nil, err
}

// Error codes of the server that nats.go does not name.
const (
	codeStreamNotMatch jetstream.ErrorCode = 10060
	codeRollupFailed   jetstream.ErrorCode = 10111
	codeIDInProcess    jetstream.ErrorCode = 10158
	codeTTLDisabled    jetstream.ErrorCode = 10166
	// codeTooManyRequests is a message that the server dropped, since too many
	// wait for their stream already.
	codeTooManyRequests jetstream.ErrorCode = 10167
)

// refusal is the server's error in the publisher's words.
func (o *outgoing) refusal(api *jetstream.APIError) error {
	var kind error
	switch api.ErrorCode {
	case jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
		return o.wrongSequence(api)
	case codeStreamNotMatch:
		kind = ErrWrongStream
	case codeTTLDisabled:
		kind = ErrTTLNotAllowed
	case jetstream.JSErrCodeMessageSchedulesDisabled, jetstream.JSErrCodeScheduleTargetInvalid:
		kind = ErrSchedulesNotAllowed
	}
	return failure(fmt.Sprintf("publish to %q: refused: %s (%d)", o.e.subject, api.Description, api.ErrorCode), kind, api)
}

func (o *outgoing) wrongSequence(api *jetstream.APIError) *SequenceError {
	e := &SequenceError{Subject: o.e.subject, Want: o.e.lastSequence, Err: api}
	if o.e.set&envLastSubjectSequence != 0 {
		e.Want = o.e.lastSubjectSequence
	}
	if _, have, ok := strings.Cut(api.Description, ": "); ok {
		n, err := strconv.ParseUint(have, 10, 64)
		e.Have, e.Known = n, err == nil
	}
	return e
}

// ended is the error of a message that has no ack when its time is over.
func (o *outgoing) ended(cause error) error {
	what := fmt.Sprintf("publish to %q: no ack after %d tries", o.e.subject, o.tries)
	if o.tries == 0 {
		what = fmt.Sprintf("publish to %q: not sent", o.e.subject)
	}
	if o.trouble != "" {
		what += ", " + o.trouble
	}
	if !errors.Is(cause, context.DeadlineExceeded) {
		what += ": " + strings.TrimPrefix(cause.Error(), "natsx: ")
	}
	return endFailure(what, cause)
}
