package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"
	"strconv"
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

// Ack is a stream's confirmation of storage.
type Ack struct {
	Stream   string // that has the message
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
//	<stream>/<durable>/<sequence>@<stored time in Unix nanoseconds>/<hash>/<n>
//
// made of the handled message, a hash of the envelope and its number among equal
// ones that the handler has stored. So when the message is handled again, what was
// stored is not stored twice within the duplicate window, whatever else that run
// publishes, in which order and from how many goroutines; and what is different is
// never taken for a repetition. Equal envelopes in equal number are one: a handler that
// stores two equal ones in one run and two in the next has stored two. An envelope that
// was not stored, or of which that is unknown, leaves its number to the next equal one,
// so that trying again is safe.
//
// Equal are envelopes with the same subject, payload, TTL, delay ([Envelope.After], or
// the time of [Envelope.At]) and headers. The trace context (traceparent, tracestate)
// and expected streams and sequences do not count. So an envelope that differs from
// run to run, by a time or a random id in it, is another message in each: give it a
// [Envelope.MsgID]. In an atomic batch the envelopes of the whole batch count.
//
// Of what one handler publishes, the first 131,072 different envelopes are counted one by
// one. Of those beyond, a run that publishes them in another order may store some again.
//
// A message that is too large with the headers that natsx adds goes without them:
// first without those carried over, then without the codec's Content-Type, at last
// without an automatic message id, as [WithoutMessageIDs] has it.
type Publisher struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	bare   bool          // no automatic message ids
	fast   bool          // batches in PublishAll
	prefix string        // of automatic message ids
	count  atomic.Uint64 // automatic message ids so far
	recent recentStreams

	denials *denials // which the end of the publisher stops
}

// PublisherOption configures a [Publisher].
type PublisherOption func(*Publisher)

// WithPublisherJetStream sets the JetStream context that is asked about streams,
// for a domain or an API prefix. It must be of the publisher's connection, which is
// not checked. Default, also for nil, is a plain one.
//
// A publisher at a server with a JetStream domain, which may be a leaf node, needs one
// with the domain of its streams to be told at once that no stream captures a subject:
// see [Publisher.Publish].
func WithPublisherJetStream(js jetstream.JetStream) PublisherOption {
	return func(p *Publisher) { p.js = js }
}

// WithoutMessageIDs leaves out the automatic message ids of Publish and
// PublishAll, which cost a server about a third of its rate. Without an id a
// second try might be a second copy. So an envelope that has none, neither its
// own nor a handler's, is sent once, when the connection is up, and waits for the one
// ack until ctx ends. When that is lost, as in a leader election, the error says that
// the message may be stored; what says "not sent" is not stored.
func WithoutMessageIDs() PublisherOption {
	return func(p *Publisher) { p.bare = true }
}

// NewPublisher returns a publisher over nc, which must outlive it and is not nil.
func NewPublisher(nc *nats.Conn, opts ...PublisherOption) *Publisher {
	p := &Publisher{nc: nc, prefix: rand.Text()[:16], denials: &denials{nc: nc}}
	runtime.AddCleanup(p, (*denials).stop, p.denials)
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
// is [nats.ErrHeadersNotSupported]. An envelope with a schedule or an expectation is
// [ErrOptionConflict]: only a stream can honour it. A message id and a TTL are sent
// along, for a stream that captures the subject. An ended ctx is its error, a connection
// that is closed or draining [ErrConnectionClosed], and a message above the server's
// maximum [nats.ErrMaxPayload].
func (p *Publisher) Send(ctx context.Context, e Envelope) error {
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return failure(fmt.Sprintf("send to %q", m.Subject), err)
	}
	if err := p.closed(); err != nil {
		return p.localFailure("send to", m, err)
	}
	err = p.nc.PublishMsg(m)
	for errors.Is(err, nats.ErrMaxPayload) && slimCore(m, &e) {
		err = p.nc.PublishMsg(m)
	}
	if err != nil {
		return p.localFailure("send to", m, err)
	}
	return nil
}

// Publish stores an envelope in a stream and returns its ack.
//
// Every try has one message id, by default an automatic one, so that within
// the stream's duplicate window no retry is a second copy. Without an ack it
// tries again after a second, then after 2 s, 4 s and 8 s each, and it goes on
// while the stream has no leader or no quorum, more waits for it than the server holds,
// the JetStream API does not answer or the connection is down, until ctx ends or, when
// ctx has no deadline, for [DefaultPublishTimeout]. The error is then [ErrTimeout] with
// [context.DeadlineExceeded], or [context.Canceled], and says what was in the way. The
// message may be stored nevertheless, unless the error says that it was not sent; and
// another call has another id, unless the envelope brings one or a handler publishes
// it (see [Publisher]).
//
// A subject that no stream captures is [ErrNoStream] at once, when the JetStream API
// says so. At a server with a JetStream domain that is no proof: the server may be a leaf
// node, and the stream in another domain. There the publisher goes on, unless
// [WithPublisherJetStream] names the domain. Where somebody subscribes to the
// subject, nobody acknowledges, and it is [ErrTimeout]. What the server refuses is
// returned at once with its [*jetstream.APIError] in the chain: [ErrWrongSequence],
// [ErrWrongStream], [ErrTTLNotAllowed], [ErrSchedulesNotAllowed] and whatever else it
// may be. A TTL that the stream would ignore is [ErrTTLNotAllowed] before anything is
// sent, a stream that does not acknowledge [ErrNoAck] after a second, a
// message above the server's maximum [nats.ErrMaxPayload], a subject that the user may
// not publish to [ErrPermission], a connection that is closed or draining
// [ErrConnectionClosed].
//
// A delayed envelope (At, After) is stored as a schedule, see [Envelope.At], and
// the ack is of the schedule.
func (p *Publisher) Publish(ctx context.Context, e Envelope) (Ack, error) {
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	c := p.newCall(ctx)
	o, err := c.prepare(&e, p.bare)
	if err != nil {
		return Ack{}, err
	}
	ack, err := c.publish(ctx, &o)
	if err != nil {
		c.giveBack(o.number)
		return Ack{}, err
	}
	return ack, nil
}

// publish has its first try wait for the answer in nats.go's own subscription, which
// costs the server less than another one. What needs more tries is a bulk of one.
func (c *call) publish(ctx context.Context, o *outgoing) (Ack, error) {
	if ctx.Err() != nil || !c.p.nc.IsConnected() {
		if err := c.ending(ctx, o.subject); err != nil {
			return Ack{}, o.ended(err)
		}
		return c.goOn(ctx, o, 0)
	}
	var ack Ack
	err := c.locate(ctx, o)
	if err == nil {
		ack, err = c.try(ctx, o)
		for errors.Is(err, nats.ErrMaxPayload) && o.slim(false) {
			ack, err = c.try(ctx, o)
		}
		if err == nil {
			return ack, nil
		}
	}
	ack, wait, err := c.after(ctx, o, ack, err)
	if wait < 0 {
		return ack, err
	}
	return c.goOn(ctx, o, wait)
}

// try publishes once. Without an id it is the only try, and waits until ctx ends, or
// until it turns out that there will be no ack.
func (c *call) try(ctx context.Context, o *outgoing) (Ack, error) {
	m := &nats.Msg{Subject: o.subject, Data: o.e.data, Header: make(nats.Header, len(o.e.headers)+4)}
	o.fill(m.Header)
	if o.id != "" {
		ctx, cancel := context.WithTimeout(ctx, ackWait)
		defer cancel()
		return publishOnce(ctx, c.p.nc, m)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	looked := make(chan struct{})
	late := time.AfterFunc(ackWait, func() {
		defer close(looked)
		o.unanswered++
		if err := c.unacknowledged(ctx, o); err != nil {
			cancel(err)
		}
	})
	ack, err := publishOnce(ctx, c.p.nc, m)
	cancel(nil)
	if !late.Stop() {
		<-looked
	}
	if why := context.Cause(ctx); err != nil && (errors.Is(why, ErrNoAck) || errors.Is(why, ErrPermission)) {
		return Ack{}, why
	}
	return ack, err
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

// publishOnce is one JetStream publish with one awaited and checked ack: no
// retry, no check of the envelope. It waits until ctx ends.
//
// Nobody there is [nats.ErrNoResponders], a refusal [*jetstream.APIError] with an Ack
// that names the stream, an answer that no stream gave [ErrBadAck], an ack from another stream than the
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

// isLocal reports whether err is of a message that never left.
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
		return failure(fmt.Sprintf("%s%d bytes of payload and headers are above the server's maximum of %d",
			what, messageSize(m), p.nc.MaxPayload()), err)
	case errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, nats.ErrConnectionDraining):
		return failure(what+"connection closed", ErrConnectionClosed, err)
	}
	return failure(what+cause(err), err)
}

// closed is an error for a connection on which nothing is published any more, with
// [ErrConnectionClosed] and that of nats.go in its chain, and else nil.
func (p *Publisher) closed() error {
	switch p.nc.Status() {
	case nats.CLOSED:
		return errClosed
	case nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		return errDraining
	}
	return nil
}

var (
	errClosed   = failure("connection closed", ErrConnectionClosed, nats.ErrConnectionClosed)
	errDraining = failure("connection is draining", ErrConnectionClosed, nats.ErrConnectionDraining)
)

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
