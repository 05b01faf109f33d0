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

// call is the common part of the envelopes of one call. It is not safe for concurrent
// use.
type call struct {
	p       *Publisher
	d       *delivery // of the handler that calls, or nil
	carried []field   // headers that go with every envelope
	mark    uint64    // of denials at its start

	streams []*jetstream.StreamInfo // looked up
	found   map[string]finding      // by subject
	silent  time.Time               // when the JetStream API last did not answer
}

func (p *Publisher) newCall(ctx context.Context) *call {
	return &call{p: p, d: deliveryFrom(ctx), carried: p.carried(ctx), mark: p.denials.mark()}
}

// denied is the permission that keeps a message on subject from being stored and
// acknowledged, if the server has refused it since the call began.
func (c *call) denied(subject string) error { return c.p.denials.since(subject, c.mark) }

// inDurable reports whether a durable's handler calls, so that message ids are made of
// the handled message.
func (c *call) inDurable() bool { return c.d != nil && c.d.msg.Durable() != "" }

// giveBack frees the number of an envelope that was not stored, as far as is known.
func (c *call) giveBack(number number) {
	if number.n > 0 {
		c.d.output().giveBack(number)
	}
}

// outgoing is one envelope that is published to a stream, with the state of its tries.
type outgoing struct {
	e       *Envelope
	id      string    // message id, empty for none
	number  number    // of which the id is made
	subject string    // where it is sent: the schedule's subject for a delayed one
	due     time.Time // of a delayed envelope
	carried []field   // headers that go with every envelope
	located bool      // call.locate found nothing against it

	tries      int    // how many times it was sent
	unanswered int    // tries after which the message may be stored
	waits      int    // pauses before another try
	trouble    string // the last known obstacle
}

// prepare checks the envelope and sets its message id, unless bare is set and it has none.
func (c *call) prepare(e *Envelope, bare bool) (outgoing, error) {
	o := outgoing{e: e, id: e.msgID, subject: e.subject, carried: c.carried}
	if err := e.check(); err != nil {
		return o, err
	}
	if e.delayed() {
		o.due = e.due()
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
	return o, nil
}

// nextID returns a unique id, which is one subject token.
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

// slim removes one of the headers that natsx adds, the least needed first, from a message
// that is too large with them. It returns false if none is left, or only an id that is
// needed.
func (o *outgoing) slim(needID bool) bool {
	switch {
	case len(o.carried) > 0:
		o.carried = nil
	case o.e.contentType != "":
		plain := *o.e
		plain.contentType = ""
		o.e = &plain
	case o.id != "" && o.e.set&envMsgID == 0 && !needID:
		o.id = ""
	default:
		return false
	}
	return true
}

// mayHave reports whether a stream that refuses the message may have it already: from an
// unanswered try, an earlier run of the handler, or an earlier call.
func (o *outgoing) mayHave() bool {
	return o.id != "" && (o.unanswered > 0 || o.number.n > 0 || o.e.set&envMsgID != 0)
}

// after decides what follows a failed try: another one after wait or, if wait is
// negative, the end with the returned ack or error. The ack of a refusal names the stream.
func (c *call) after(ctx context.Context, o *outgoing, ack Ack, err error) (_ Ack, wait time.Duration, _ error) {
	var api *jetstream.APIError
	var passing *lookupError
	switch {
	case errors.As(err, &passing):
		o.trouble = passing.reason
		return c.again(ctx, o, o.pause(50*time.Millisecond))
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		o.trouble = disconnected
		return c.again(ctx, o, o.pause(50*time.Millisecond))
	case errors.Is(err, nats.ErrMaxPayload) && o.slim(false):
		return c.again(ctx, o, 0)
	case errors.Is(err, ErrNoStream), errors.Is(err, ErrNoAck), errors.Is(err, ErrTTLNotAllowed), errors.Is(err, ErrSchedulesNotAllowed), errors.Is(err, ErrPermission):
		return Ack{}, -1, err // of call.locate
	case isLocal(err):
		return Ack{}, -1, c.p.publishFailure(o, err)
	}
	o.tries++
	switch {
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeTooManyRequests:
			o.trouble = overloaded
			return c.again(ctx, o, o.pause(50*time.Millisecond))
		case codeClusterNoLeader, codeClusterNotLeader:
			o.trouble = leaderless
			return c.again(ctx, o, o.pause(50*time.Millisecond))
		case codeIDInProcess, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			// A message with this id, or one on the expected subject, is being
			// replicated; the next try gets its outcome. A server (as of 2.15) that was
			// leader before may keep such an id for its whole window.
			o.trouble = inProcess
			return c.again(ctx, o, o.pause(20*time.Millisecond))
		case jetstream.JSErrCodeStreamMessageExceedsMaximum:
			if o.slim(false) {
				return c.again(ctx, o, 0)
			}
		case jetstream.JSErrCodeStreamWrongLastSequence:
			return c.wrongSequence(ctx, o, ack.Stream, api)
		}
		return Ack{}, -1, o.refusal(api)
	case errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck):
		return Ack{}, -1, c.p.publishFailure(o, err)
	case errors.Is(err, nats.ErrNoResponders):
		if err := c.noResponders(ctx, o); err != nil {
			return Ack{}, -1, err
		}
		return c.again(ctx, o, o.pause(50*time.Millisecond))
	}
	o.unanswered++
	if ctx.Err() == nil {
		if err := c.unacknowledged(ctx, o); err != nil {
			return Ack{}, -1, err
		}
	}
	if o.id == "" && ctx.Err() == nil {
		return Ack{}, -1, failure(fmt.Sprintf("publish to %q: no ack, and the message may be stored: %s", o.subject, cause(err)), err)
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		wait = 100 * time.Millisecond
	}
	return c.again(ctx, o, wait)
}

// wrongSequence decides what follows a refusal for a wrong sequence. Without replicas a
// server checks expectations before message ids: the sequence may be wrong because the
// message is stored already.
func (c *call) wrongSequence(ctx context.Context, o *outgoing, stream string, api *jetstream.APIError) (Ack, time.Duration, error) {
	refused := o.wrongSequence(api)
	if !o.mayHave() {
		return Ack{}, -1, refused
	}
	ack, stored, err := c.hasMessage(ctx, o, stream, refused)
	switch {
	case stored:
		return ack, -1, nil
	case err == nil:
		return Ack{}, -1, refused
	case ctx.Err() != nil, transient(err):
		o.unanswered++
		return c.again(ctx, o, 100*time.Millisecond)
	}
	why := err
	if denied, ok := errors.AsType[*PermissionError](err); ok {
		why = denied
	}
	return Ack{}, -1, failure(cause(refused)+", and whether that is an earlier try of the same message is unknown: "+cause(why), refused, err)
}

// again returns another try after a wait, unless it could no longer succeed.
func (c *call) again(ctx context.Context, o *outgoing, wait time.Duration) (Ack, time.Duration, error) {
	if err := c.ending(ctx, o.subject); err != nil {
		return Ack{}, -1, o.ended(err)
	}
	return Ack{}, wait, nil
}

// ending is why a message on subject can no longer succeed, or nil: a missing permission,
// the connection or ctx.
func (c *call) ending(ctx context.Context, subject string) error {
	if err := c.denied(subject); err != nil {
		return err
	}
	if err := c.p.closed(); err != nil {
		return err
	}
	return ctx.Err()
}

// Obstacles between a message and its stream.
const (
	overloaded = "its stream has had more than it can take"
	leaderless = "its stream has had no leader"
	// The stream may be in another account, so this is no reason to give up.
	noStreamHere = "no stream of this account captures the subject"
	offline      = "the connection was never up"
	disconnected = "the connection is down"
	inProcess    = "its message id, or one on its subject, has been in process"
	batchesInUse = "its stream has had as many batches in process as it takes"
)

// down is why nothing can be sent now, or empty. nats.go would buffer a message while it
// reconnects, and send it long after its call has given up.
func (p *Publisher) down() string {
	switch {
	case p.nc.IsConnected():
		return ""
	case p.nc.MaxPayload() == 0:
		return offline
	}
	return disconnected
}

// pause is the wait before another try of a message that was refused temporarily. It
// grows with each one.
func (o *outgoing) pause(first time.Duration) time.Duration {
	o.waits++
	return againWait(first, o.waits)
}

// againWait is the wait after a number of temporary refusals, first after one.
func againWait(first time.Duration, tries int) time.Duration {
	return min(first<<min(tries-1, 5), 500*time.Millisecond)
}

// Error codes of the server that nats.go does not name.
const (
	codeStreamNotMatch jetstream.ErrorCode = 10060
	codeRollupFailed   jetstream.ErrorCode = 10111
	codeIDInProcess    jetstream.ErrorCode = 10158
	codeTTLDisabled    jetstream.ErrorCode = 10166
	// codeTooManyRequests is a message that the server dropped, since too many wait for
	// its stream.
	codeTooManyRequests jetstream.ErrorCode = 10167
)

// refusal is the error for a refusal of the server.
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

// ended is the error of a message without an ack when ctx or the connection has ended.
func (o *outgoing) ended(why error) error {
	if errors.Is(why, ErrPermission) {
		return why
	}
	what := fmt.Sprintf("publish to %q: no ack after %d tries", o.e.subject, o.tries)
	if o.tries == 0 {
		what = fmt.Sprintf("publish to %q: not sent", o.e.subject)
	}
	if o.trouble != "" {
		what += ", " + o.trouble
	}
	if !errors.Is(why, context.DeadlineExceeded) {
		what += ": " + cause(why)
	}
	return endFailure(what, why)
}

func (p *Publisher) publishFailure(o *outgoing, err error) error {
	m := &nats.Msg{Subject: o.e.subject, Data: o.e.data, Header: nats.Header{}}
	o.fill(m.Header)
	return p.localFailure("publish to", m, err)
}

// output is the record of what d's handler has stored.
func (d *delivery) output() *numbering {
	if m := d.numbering.Load(); m != nil {
		return m
	}
	d.numbering.CompareAndSwap(nil, newNumbering(deliveryID(d.msg.Stream(), d.msg.Durable(), messageID{d.msg.seq, d.msg.time})))
	return d.numbering.Load()
}
