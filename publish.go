package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// DefaultPublishTimeout ends a JetStream publish whose context has no deadline.
	DefaultPublishTimeout = 30 * time.Second

	// ackWait is how long the first try waits for its ack, see [tryWait]. Tries
	// share the message id, so a slow ack costs a duplicate answer at most.
	ackWait = time.Second
	// lookupWait bounds one question to the JetStream API.
	lookupWait = time.Second
	// unknownStreamWait is how long a publish goes on without responders when
	// it may not ask whether a stream captures the subject.
	unknownStreamWait = 3 * time.Second
)

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
	// ErrTTLNotAllowed is an envelope with a TTL for a stream without AllowMsgTTL.
	ErrTTLNotAllowed = errors.New("natsx: message TTL is not allowed")
	// ErrBadAck is an answer to a publish that no stream gave: a subscriber of
	// the subject replied instead. Whether the message is stored is unknown.
	ErrBadAck = errors.New("natsx: not an ack of a stream")
)

// SequenceError is a failed expectation. The message was not stored. Of an atomic
// batch in which several may have failed, which the server does not tell, it names
// the first.
// [errors.Is] finds [ErrWrongSequence] and [errors.As] the server's
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

// Ack is a stream's word that it has the message.
type Ack struct {
	Stream   string
	Sequence uint64 // 0 where [WithFastIngest] leaves it unknown
	// Duplicate tells that the stream already had a message with this id, be it
	// from an earlier try of the same call, and that Sequence is of that one.
	Duplicate bool
}

// Publisher publishes envelopes. It is safe for concurrent use, has no
// goroutines and needs no closing. It does not own its connection.
//
// Published with a handler's context, an envelope carries over the headers
// traceparent, tracestate, baggage and Correlation-Id of the handled message
// that it does not set itself. In a durable's handler, an envelope without a
// message id that goes to JetStream gets
//
//	<stream>@<created>/<durable>/<sequence>/<n>
//
// made of the handled message and the count n of envelopes that its handler
// published so far. When the message is delivered again, its handler therefore
// publishes nothing twice within the duplicate window, if it publishes the same
// envelopes in the same order. One that is refused with [ErrWrongSequence] does not
// count when the next call expects a sequence too and its first subject is the same:
// a handler may read anew and try again. A handler that publishes from several
// goroutines at once, or depends on the time, sets MsgID.
type Publisher struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	bare   bool          // no automatic message ids
	fast   bool          // batches in PublishAll
	prefix string        // of automatic message ids
	count  atomic.Uint64 // automatic message ids so far
}

// PublisherOption configures a [Publisher].
type PublisherOption func(*Publisher)

// WithPublisherJetStream sets the JetStream context that is asked about streams,
// for a domain or an API prefix. It must be of the publisher's connection.
func WithPublisherJetStream(js jetstream.JetStream) PublisherOption {
	return func(p *Publisher) { p.js = js }
}

// WithoutMessageIDs leaves out the automatic message ids of Publish and
// PublishAll, which cost a server about a third of its rate. Without an id a
// second try might be a second copy. So an envelope that has none, neither its
// own nor a handler's, waits for the one ack until ctx ends, and when that is
// lost, as in a leader election, it is an error of which nobody knows whether the
// message is stored.
func WithoutMessageIDs() PublisherOption {
	return func(p *Publisher) { p.bare = true }
}

// NewPublisher returns a publisher over nc.
func NewPublisher(nc *nats.Conn, opts ...PublisherOption) *Publisher {
	p := &Publisher{nc: nc, prefix: rand.Text()[:16]}
	for _, opt := range opts {
		opt(p)
	}
	if p.js == nil {
		// Without options there is nothing that New could refuse.
		p.js, _ = jetstream.New(nc)
	}
	return p
}

// Send publishes on core NATS: at most once, without an ack. The message is
// handed to the connection, which sends it in the background and buffers it
// while it reconnects; before it was up for the first time it takes no headers, which
// is [nats.ErrHeadersNotSupported]. An envelope with a schedule or an expectation is refused:
// only a stream can honour it.
func (p *Publisher) Send(ctx context.Context, e Envelope) error {
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return failure(fmt.Sprintf("send to %q", m.Subject), err)
	}
	if err := p.nc.PublishMsg(m); err != nil {
		return p.localFailure("send to", m, err)
	}
	return nil
}

// Publish stores an envelope in a stream and returns its ack.
//
// Every try bears one message id, by default an automatic one, so that within
// the stream's duplicate window no retry is a second copy. Without an ack it
// tries again after a second, then after 2 s, 4 s and 8 s each, and it goes on
// while the stream has no leader, more waits for it than the server holds, or the
// connection was never up, until ctx ends or, when ctx has no deadline, for
// [DefaultPublishTimeout]. The error is then [ErrTimeout] with
// [context.DeadlineExceeded], or [context.Canceled]; the message may be stored
// nevertheless, and another call has another id, unless the envelope brings one.
//
// A subject that no stream captures is [ErrNoStream] at once, or after three
// seconds where the JetStream API is not there, or may not be asked for stream
// names. What the server refuses is returned at once with its
// [*jetstream.APIError] in the chain: [ErrWrongSequence], [ErrWrongStream],
// [ErrTTLNotAllowed], [ErrSchedulesNotAllowed] and whatever else it may be. A
// message above the server's maximum is [nats.ErrMaxPayload].
//
// A delayed envelope (At, After) is stored as a schedule, see [Envelope.At], and
// the ack is of the schedule.
func (p *Publisher) Publish(ctx context.Context, e Envelope) (Ack, error) {
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	call := p.newCall(ctx)
	call.number(e.subject, e.expects(), 1)
	o, err := call.prepare(ctx, &e, p.bare)
	if err != nil {
		return Ack{}, err
	}
	if err := p.online(ctx); err != nil {
		o.trouble = offline
		return Ack{}, o.ended(err)
	}
	m := &nats.Msg{Subject: o.subject, Data: e.data, Header: make(nats.Header, len(e.headers)+4)}
	o.fill(m.Header)
	for {
		ack, err := o.try(ctx, p.nc, m)
		if err == nil {
			return ack, nil
		}
		ack, wait, err := call.after(ctx, &o, err)
		if wait < 0 {
			call.numberAgain(err)
			return ack, err
		}
		if o.unanswered == 2 && o.trouble == "" {
			if f := call.lookUp(ctx, o.subject); !f.exists && f.err == nil {
				o.trouble = noStreamHere
			}
		}
		pause(ctx, wait)
	}
}

// online waits until the connection has been up once: until then nats.go knows
// nothing of the server, and refuses headers.
func (p *Publisher) online(ctx context.Context) error {
	for p.nc.MaxPayload() == 0 && !p.nc.IsClosed() {
		if err := ctx.Err(); err != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
	return nil
}

// tryWait is how long a try waits for its ack after so many without one: longer
// from try to try, or a server that is slower than what is under way would be kept
// busy with repetitions.
func tryWait(first time.Duration, unanswered int) time.Duration {
	return first << min(unanswered, 3)
}

// try publishes once. Without an id it is the only try, and waits until ctx ends.
func (o *outgoing) try(ctx context.Context, nc *nats.Conn, m *nats.Msg) (Ack, error) {
	if o.id != "" {
		limited, cancel := context.WithTimeout(ctx, tryWait(ackWait, o.unanswered))
		defer cancel()
		ctx = limited
	}
	return publishOnce(ctx, nc, m)
}

// publishOnce is one JetStream publish with one awaited and checked ack: no
// retry, no check of the envelope. It waits until ctx ends.
//
// Nobody there is [nats.ErrNoResponders], a refusal [*jetstream.APIError], an
// answer that no stream gave [ErrBadAck], an ack from another stream than the
// one in the message's Nats-Expected-Stream [ErrWrongStream]. Anything else
// leaves open whether the message is stored.
func publishOnce(ctx context.Context, nc *nats.Conn, m *nats.Msg) (Ack, error) {
	r, err := nc.RequestMsgWithContext(ctx, m)
	if err != nil {
		return Ack{}, err
	}
	return checkedAck(r.Data, m.Header.Get(jetstream.ExpectedStreamHeader), "")
}

// checkedAck is [parseAck] for a message that expects a stream, unless want is
// empty.
func checkedAck(data []byte, want, last string) (Ack, error) {
	ack, err := parseAck(data, last)
	if err == nil && want != "" && ack.Stream != want {
		return Ack{}, failure(fmt.Sprintf("expected stream %q, stored in %q", want, ack.Stream), ErrWrongStream)
	}
	return ack, err
}

// call is what the envelopes of one call have in common.
type call struct {
	p       *Publisher
	d       *delivery               // of the handler whose context it is, or nil
	carried []field                 // headers of the handled message
	streams []*jetstream.StreamInfo // looked up for schedules
	found   map[string]finding      // what the server said of subjects without responders
	silent  time.Time               // when it last said nothing
	numbers numbers                 // of a handler's envelopes
}

// numbers are those of one call's envelopes among what a handler published.
type numbers struct {
	subject  string // of the first
	from, to uint32 // the first is from+1
}

type finding struct {
	exists bool
	err    error // why the question was not answered
	at     time.Time
}

func (p *Publisher) newCall(ctx context.Context) call {
	d := deliveryFrom(ctx)
	return call{p: p, d: d, carried: carriedFrom(d)}
}

// number tells where the numbers of n envelopes begin. A handler that is refused
// for a sequence, reads it anew and tries again uses the same numbers: when it runs
// once more its first try may be taken, which must not be a second copy.
func (c *call) number(subject string, expects bool, n int) {
	if c.d == nil {
		return
	}
	if r := c.d.refused.Swap(nil); r != nil && expects && r.subject == subject {
		// Unless another goroutine of the handler has numbers above.
		c.d.published.CompareAndSwap(r.to, r.from)
	}
	from := c.d.published.Load()
	c.numbers = numbers{subject: subject, from: from, to: from + uint32(n)}
}

// numberAgain keeps the numbers of a call that stored nothing for the next one.
func (c *call) numberAgain(err error) {
	if c.d != nil && errors.Is(err, ErrWrongSequence) {
		c.d.refused.Store(&c.numbers)
	}
}

// mayHave tells whether a stream may have the message though it refuses it: from an
// unanswered try, or from an earlier attempt of the handler.
func (c *call) mayHave(o *outgoing) bool {
	return o.unanswered > 0 || c.d != nil && o.id != "" && c.d.msg.Attempt() > 1
}

// outgoing is one envelope on its way to a stream, with what its tries share.
type outgoing struct {
	e       *Envelope
	id      string
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
	var n uint32
	if c.d != nil {
		n = c.d.published.Add(1)
	}
	if o.id == "" {
		if c.d != nil && c.d.msg.Durable() != "" {
			o.id = letterID(c.d) + "/" + strconv.FormatUint(uint64(n), 10)
		} else if !bare {
			o.id = c.p.nextID()
		}
	}
	if e.delayed() {
		subject, err := c.scheduleSubject(ctx, e.subject)
		if err != nil {
			return o, err
		}
		o.subject, o.due = subject, e.due()
	}
	return o, nil
}

// letterID names the handled message: <stream>@<created>/<durable>/<sequence>.
func letterID(d *delivery) string {
	from := d.msg.origin()
	return fmt.Sprintf("%s@%d/%s/%d", from.stream, from.created, from.durable, d.msg.seq)
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
			return o.again(ctx, againWait(o.tries))
		case codeIDInProcess, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			// A message with this id, or one on the expected subject, is on its
			// way through the cluster; the next try learns what became of it.
			return o.again(ctx, 20*time.Millisecond)
		case jetstream.JSErrCodeStreamWrongLastSequence:
			// A server without replicas checks expectations before message ids:
			// the sequence may be wrong because the message is stored.
			if !c.mayHave(o) {
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
		wait = againWait(o.tries)
	default:
		o.unanswered++
		if err := c.p.denied(o.subject); err != nil {
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
)

// againWait is the wait after so many tries that were refused for the moment.
func againWait(tries int) time.Duration {
	return min(50*time.Millisecond<<min(tries-1, 4), 500*time.Millisecond)
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
	case errors.Is(f.err, context.DeadlineExceeded) && c.p.denied(".STREAM.NAMES") == nil:
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
	_, err := c.p.js.StreamNameBySubject(ctx, subject)
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
		e := &SequenceError{Subject: o.e.subject, Want: o.e.lastSequence, Err: api}
		if o.e.set&envLastSubjectSequence != 0 {
			e.Want = o.e.lastSubjectSequence
		}
		if _, have, ok := strings.Cut(api.Description, ": "); ok {
			n, err := strconv.ParseUint(have, 10, 64)
			e.Have, e.Known = n, err == nil
		}
		return e
	case codeStreamNotMatch:
		kind = ErrWrongStream
	case codeTTLDisabled:
		kind = ErrTTLNotAllowed
	case jetstream.JSErrCodeMessageSchedulesDisabled, jetstream.JSErrCodeScheduleTargetInvalid:
		kind = ErrSchedulesNotAllowed
	}
	return failure(fmt.Sprintf("publish to %q: refused: %s (%d)", o.e.subject, api.Description, api.ErrorCode), kind, api)
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
	if errors.Is(cause, context.DeadlineExceeded) {
		return failure(what, ErrTimeout, cause)
	}
	return failure(what+": "+strings.TrimPrefix(cause.Error(), "natsx: "), cause)
}

// isLocal tells the errors of a message that never left.
func isLocal(err error) bool {
	for _, local := range []error{
		nats.ErrMaxPayload, nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrInvalidConnection,
		nats.ErrHeadersNotSupported, nats.ErrBadSubject, nats.ErrBadHeaderMsg,
	} {
		if errors.Is(err, local) {
			return true
		}
	}
	return false
}

func (p *Publisher) publishFailure(o *outgoing, err error) error {
	m := &nats.Msg{Subject: o.e.subject, Data: o.e.data, Header: nats.Header{}}
	o.fill(m.Header)
	return p.localFailure("publish to", m, err)
}

// localFailure is an error of the connection, in the words of what was to be done.
func (p *Publisher) localFailure(doing string, m *nats.Msg, err error) error {
	what := fmt.Sprintf("%s %q: ", doing, m.Subject)
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		size := len(m.Data)
		for k, vs := range m.Header {
			for _, v := range vs {
				size += len(k) + len(": \r\n") + len(v)
			}
		}
		return failure(fmt.Sprintf("%s%d bytes of payload and headers are above the server's maximum of %d",
			what, size, p.nc.MaxPayload()), err)
	case errors.Is(err, nats.ErrConnectionClosed):
		return failure(what+"connection closed", ErrConnectionClosed, err)
	}
	return failure(what+strings.TrimPrefix(err.Error(), "natsx: "), err)
}

// denied tells whether the server has refused this user to publish to subject, or,
// when that starts with a dot, to one that ends in it. The server says so to the
// connection and not to the message.
func (p *Publisher) denied(subject string) error {
	e := permissionError(p.nc.LastError())
	if e == nil || e.Operation != "publish" ||
		e.Subject != subject && !(subject[0] == '.' && strings.HasSuffix(e.Subject, subject)) {
		return nil
	}
	return e
}

// withLimit ends ctx after d unless it has a deadline of its own.
func withLimit(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// failedError is a sentence with the errors that callers branch on.
type failedError struct {
	text   string
	causes []error
}

func (e *failedError) Error() string   { return "natsx: " + e.text }
func (e *failedError) Unwrap() []error { return e.causes }

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
