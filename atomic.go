package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// MaxAtomicEnvelopes is the most envelopes in one [Publisher.PublishAtomic], the server's
// limit (ADR-50).
const MaxAtomicEnvelopes = 1000

// ErrAtomicNotAllowed is an atomic publish to a stream without
// AllowAtomicPublish, or to a server before 2.12, which has no atomic batches.
var ErrAtomicNotAllowed = errors.New("natsx: atomic publishing is not allowed")

const (
	batchIDHeader       = "Nats-Batch-Id"
	batchSequenceHeader = "Nats-Batch-Sequence"
	batchCommitHeader   = "Nats-Batch-Commit"

	// commitWait is how long the first try waits for the ack of its commit; see tryWait.
	commitWait = 2 * time.Second

	codeWrongLastMsgID   jetstream.ErrorCode = 10070
	codeAtomicDisabled   jetstream.ErrorCode = 10174
	codeAtomicIncomplete jetstream.ErrorCode = 10176
	codeAtomicHeader     jetstream.ErrorCode = 10177 // not supported in a batch
	codeAtomicDuplicate  jetstream.ErrorCode = 10201
	codeAtomicInFlight   jetstream.ErrorCode = 10210
)

// PublishAtomic stores all envelopes or none, one after another in one stream, and no
// consumer reads only a part of them (ADR-50). The ack is of the last envelope; the first
// one has the sequence Ack.Sequence - len(es) + 1. The stream must have
// AllowAtomicPublish, else it is [ErrAtomicNotAllowed].
//
// There must be 1 to [MaxAtomicEnvelopes] envelopes, else it is [ErrOutOfRange], none of
// them delayed ([ErrOptionConflict]). If an expectation does not hold when the batch is
// committed, nothing is stored: [ErrWrongSequence]. Only the first envelope may have
// ExpectLastSequence, and an envelope may have ExpectLastSubjectSequence only if no
// earlier one has the same subject ([ErrOptionConflict]).
//
// It retries as [Publisher.Publish] does, with the same message ids, so that no batch is
// stored twice within the duplicate window. Before a retry it checks whether the batch is
// stored, and a late ack of an earlier try counts. A batch whose message ids are all
// stored already, by an unanswered try or an earlier run of the handler, is acknowledged
// as a duplicate; if only some are, it is refused and not stored.
func (p *Publisher) PublishAtomic(ctx context.Context, es ...Envelope) (Ack, error) {
	if p.around == nil {
		return p.publishAtomic(ctx, es)
	}
	c, err := p.through(ctx, OperationPublishAtomic, slices.Clone(es), func(ctx context.Context, c *PublishCall) error {
		ack, err := p.publishAtomic(ctx, c.Envelopes)
		c.Acks = []Ack{ack}
		return err
	})
	return c.ack(), err
}

func (p *Publisher) publishAtomic(ctx context.Context, es []Envelope) (Ack, error) {
	if err := checkAtomic(es); err != nil {
		return Ack{}, err
	}
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	c := p.newCall(ctx)
	b := &atomicBatch{call: c, out: make([]outgoing, len(es))}
	number := b.prepare(es)
	ack, err := b.publish(ctx)
	if err != nil {
		c.giveBack(number)
		return Ack{}, err
	}
	return ack, nil
}

// checkAtomic reports every fault of a batch that can be found without a server.
func checkAtomic(es []Envelope) error {
	if len(es) == 0 || len(es) > MaxAtomicEnvelopes {
		return failure(fmt.Sprintf("publish atomically: %d envelopes: must be 1 to %d", len(es), MaxAtomicEnvelopes), ErrOutOfRange)
	}
	var faults []error
	ids := make(map[string]bool)
	subjects := make(map[string]bool)
	for i := range es {
		e := &es[i]
		if err := e.check(); err != nil {
			faults = append(faults, err)
		}
		conflict := func(name, value, reason string) {
			faults = append(faults, &EnvelopeError{Subject: e.subject, Field: name, Value: value, Reason: reason, Err: ErrOptionConflict})
		}
		if e.delayed() {
			conflict("at", "", "a delay does not fit with an atomic batch")
		}
		if e.set&envMsgID != 0 && ids[e.msgID] {
			conflict("msgID", strconv.Quote(e.msgID), "occurs twice in one atomic batch")
		}
		if e.set&envLastSequence != 0 && i > 0 {
			conflict("expectLastSequence", strconv.FormatUint(e.lastSequence, 10), "fits the first envelope of an atomic batch alone")
		}
		if e.set&envLastSubjectSequence != 0 && subjects[e.subject] {
			conflict("expectLastSubjectSequence", strconv.FormatUint(e.lastSubjectSequence, 10),
				"must be on the first envelope with this subject in an atomic batch")
		}
		ids[e.msgID], subjects[e.subject] = true, true
	}
	return errors.Join(faults...)
}

// atomicBatch is one PublishAtomic. It sends and receives on the caller's goroutine.
//
// Without an ack for a try the stream is asked, after what was sent, whether it has the
// last message. Only if it does not, or does not answer, the batch is resent.
type atomicBatch struct {
	*call
	out      []outgoing
	own      bool // an envelope has its own message id, which another batch may have stored
	untraced bool // a probe was not answered
	tick     *time.Ticker

	inbox   string         // subject of the replies, which ends in <try>.<index>, or <try>.askToken
	replies chan *nats.Msg // of all tries
	try     int            // the latest
	rest    []*nats.Msg    // of it, to be sent once the first message is staged
	careful bool           // the stream was overloaded: send the first message alone
	step    atomicStep
	when    time.Time // of the next step, unless an answer arrives before
}

type atomicStep int

const (
	atomicSend  atomicStep = iota // the batch is to be sent
	atomicStage                   // its first message is sent
	atomicWait                    // its ack is awaited
	atomicAsk                     // its ack, or whether its last message is stored
)

const askToken = "stored"

func (b *atomicBatch) what() string {
	return fmt.Sprintf("publish %d envelopes atomically to %q", len(b.out), b.out[0].subject)
}

// prepare sets the message ids of the envelopes. In a handler they are made of the whole
// batch, since another run may store a batch with some of the same envelopes.
func (b *atomicBatch) prepare(es []Envelope) number {
	var number number
	if b.inDurable() {
		number = b.d.output().take(batchDigest(es))
	}
	for i := range es {
		o := outgoing{e: &es[i], id: es[i].msgID, subject: es[i].subject, carried: b.carried}
		switch {
		case o.id != "":
			b.own = true
		case number.n > 0:
			o.id = b.d.output().id(number) + "/" + strconv.Itoa(i+1)
		default:
			o.id = b.p.nextID()
		}
		b.out[i] = o
	}
	return number
}

func (b *atomicBatch) publish(ctx context.Context) (Ack, error) {
	if err := b.ending(ctx, ""); err != nil {
		return Ack{}, b.ended(err)
	}
	b.inbox = b.p.nc.NewInbox() + "."
	// The answers to one try are read before the next one is sent.
	b.replies = make(chan *nats.Msg, 3*len(b.out)+16)
	sub, err := b.p.nc.ChanSubscribe(b.inbox+">", b.replies)
	if err != nil {
		return Ack{}, b.p.publishFailure(&b.out[0], err)
	}
	defer sub.Unsubscribe()
	b.tick = time.NewTicker(25 * time.Millisecond)
	defer b.tick.Stop()
	for {
		if err := b.ended(b.endingAny(ctx)); err != nil {
			return Ack{}, err
		}
		ack, done, err := b.next(ctx)
		if done {
			return ack, err
		}
	}
}

// endingAny is call.ending for all envelopes.
func (b *atomicBatch) endingAny(ctx context.Context) error {
	if b.p.denials.count.Load() != b.mark {
		for i := range b.out {
			if err := b.denied(b.out[i].subject); err != nil {
				return err
			}
		}
	}
	return b.ending(ctx, "")
}

// ended returns the error of a batch when ctx or the connection has ended, nil for nil.
func (b *atomicBatch) ended(why error) error {
	if why == nil {
		return nil
	}
	if down := b.p.down(); down != "" {
		b.out[0].trouble = down
	}
	return b.out[0].ended(why)
}

// next executes the next step if it is due, and else handles the next answer.
func (b *atomicBatch) next(ctx context.Context) (ack Ack, done bool, err error) {
	if b.p.nc.IsConnected() && !b.when.After(time.Now()) {
		return b.act(ctx)
	}
	select {
	case r := <-b.replies:
		return b.receive(ctx, r)
	case <-b.tick.C:
	case <-ctx.Done():
	}
	return Ack{}, false, nil
}

func (b *atomicBatch) act(ctx context.Context) (Ack, bool, error) {
	first := &b.out[0]
	switch b.step {
	case atomicSend:
		if old := b.p.nc.ConnectedServerVersion(); olderThan(old, 2, 12) {
			return Ack{}, true, failure(fmt.Sprintf("%s: server %s has no atomic batches, which need 2.12", b.what(), old), ErrAtomicNotAllowed, ErrServerTooOld)
		}
		if at, err := b.send(ctx); err != nil {
			return b.afterTry(ctx, at, err)
		}
	case atomicStage:
		b.wait(atomicSend, 0)
	case atomicWait:
		first.unanswered++
		if err := b.unacknowledged(ctx, first); err != nil {
			return Ack{}, true, err
		}
		m := b.p.probeFor(&b.out[len(b.out)-1])
		m.Reply = fmt.Sprintf("%s%d.%s", b.inbox, b.try, askToken)
		if err := b.p.nc.PublishMsg(m); err != nil {
			return b.afterTry(ctx, len(b.out)-1, err)
		}
		b.wait(atomicAsk, tryWait(commitWait, first.unanswered))
	case atomicAsk:
		b.wait(atomicSend, 0)
	}
	return Ack{}, false, nil
}

func (b *atomicBatch) wait(step atomicStep, d time.Duration) {
	b.step, b.when = step, time.Now().Add(d)
}

// send sends the batch with a new batch id, since the server drops what an earlier try
// has staged. at is the envelope that an error is about.
func (b *atomicBatch) send(ctx context.Context) (at int, err error) {
	nc, id := b.p.nc, b.p.nextID()
	b.try++
	last := len(b.out) - 1
	messages := make([]*nats.Msg, len(b.out))
	for i := range b.out {
		o := &b.out[i]
		if err := b.locate(ctx, o); err != nil {
			return i, err
		}
		m := &nats.Msg{Subject: o.subject, Reply: fmt.Sprintf("%s%d.%d", b.inbox, b.try, i), Data: o.e.data}
		// Fail before the server has staged the earlier messages.
		for fits := false; !fits; {
			m.Header = nats.Header{batchIDHeader: {id}, batchSequenceHeader: {strconv.Itoa(i + 1)}}
			if i == last {
				m.Header[batchCommitHeader] = []string{"1"}
			}
			o.fill(m.Header)
			fits = int64(messageSize(m)) <= nc.MaxPayload()
			if !fits && !o.slim(true) {
				return i, failure(fmt.Sprintf("publish to %q: %d bytes of payload and headers, with those of an atomic batch, are above the server's maximum of %d",
					o.subject, messageSize(m), nc.MaxPayload()), nats.ErrMaxPayload)
			}
		}
		messages[i] = m
	}
	b.out[0].tries = b.try
	b.rest = messages
	if b.careful && last > 0 {
		b.wait(atomicStage, tryWait(commitWait, b.out[0].unanswered))
		return 0, b.sendRest(1)
	}
	return b.sendAll()
}

// sendAll sends what is left of a try.
func (b *atomicBatch) sendAll() (at int, err error) {
	b.wait(atomicWait, tryWait(commitWait, b.out[0].unanswered))
	err = b.sendRest(len(b.rest))
	return len(b.out) - len(b.rest), err
}

func (b *atomicBatch) sendRest(n int) error {
	for range n {
		if err := b.p.nc.PublishMsg(b.rest[0]); err != nil {
			return err
		}
		b.rest = b.rest[1:]
	}
	return nil
}

// receive handles an answer. A refusal of an earlier try does not concern the latest.
func (b *atomicBatch) receive(ctx context.Context, r *nats.Msg) (Ack, bool, error) {
	try, index, _ := strings.Cut(r.Subject[len(b.inbox):], ".")
	latest := try == strconv.Itoa(b.try) && b.step != atomicSend
	if index == askToken {
		if latest && b.step == atomicAsk {
			return b.receiveAsked(ctx, r)
		}
		return Ack{}, false, nil
	}
	i, err := strconv.Atoi(index)
	last := len(b.out) - 1
	if err != nil || i < 0 || i > last {
		return Ack{}, false, nil
	}
	ack, err := atomicAnswer(r, b.out[i].e.stream, i == last)
	switch {
	case err == nil && i < last && ack == Ack{}: // staged
		if latest && i == 0 && b.step == atomicStage {
			if at, err := b.sendAll(); err != nil {
				return b.afterTry(ctx, at, err)
			}
		}
		return Ack{}, false, nil
	case err == nil:
		return ack, true, nil
	case latest:
		return b.afterTry(ctx, i, err)
	}
	return Ack{}, false, nil
}

// atomicAnswer parses the answer to one message of a batch: the zero Ack if it is staged.
func atomicAnswer(r *nats.Msg, stream string, last bool) (Ack, error) {
	if len(r.Data) == 0 {
		if r.Header.Get("Status") == "503" {
			return Ack{}, nats.ErrNoResponders
		}
		if !last {
			return Ack{}, nil
		}
	}
	ack, err := checkedAck(r.Data, stream, "")
	if err == nil && !last {
		err = failure("an envelope of the batch was stored individually", ErrAtomicNotAllowed)
	}
	return ack, err
}

// receiveAsked handles the answer to the question whether the last message is stored.
func (b *atomicBatch) receiveAsked(ctx context.Context, r *nats.Msg) (Ack, bool, error) {
	last := len(b.out) - 1
	ack, err := atomicAnswer(r, "", true)
	ack, stored, err := probed(ack, err)
	switch {
	case stored && !b.own:
		return ack, true, nil
	case errors.Is(err, nats.ErrNoResponders):
		return b.afterTry(ctx, last, err)
	case stored, err == nil:
		// It is stored, but maybe not by this batch: resend, and let the server decide.
		b.wait(atomicSend, 0)
	}
	return Ack{}, false, nil
}

// afterTry is [call.after] for a whole batch.
func (b *atomicBatch) afterTry(ctx context.Context, at int, err error) (Ack, bool, error) {
	first, o := &b.out[0], &b.out[at]
	again := func(trouble string) (Ack, bool, error) {
		first.trouble = trouble
		b.wait(atomicSend, first.pause(40*time.Millisecond))
		return Ack{}, false, nil
	}
	var passing *lookupError
	switch {
	case errors.As(err, &passing):
		return again(passing.reason)
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return again(disconnected)
	case errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck), errors.Is(err, ErrAtomicNotAllowed):
		return Ack{}, true, b.p.publishFailure(o, err)
	case is[*failedError](err):
		return Ack{}, true, err // from send, which is more specific
	case isLocal(err):
		return Ack{}, true, b.p.publishFailure(o, err)
	}
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeAtomicDisabled:
			return Ack{}, true, failure(b.what()+": the stream does not have AllowAtomicPublish", ErrAtomicNotAllowed, api)
		case codeAtomicHeader:
			if o.id != "" && strings.Contains(api.Description, jetstream.MsgIDHeader) {
				return Ack{}, true, failure(b.what()+": message ids in a batch need nats-server 2.12.1", ErrAtomicNotAllowed, ErrServerTooOld, api)
			}
		case codeAtomicDuplicate:
			ack, stored, err := b.stored(ctx)
			switch {
			case stored:
				return ack, true, nil
			case err != nil:
				return again(first.trouble)
			}
		case codeAtomicIncomplete:
			// The staged messages were lost with the leader, or a part of the batch went
			// to another stream.
			if err := b.oneStream(ctx); err != nil {
				return Ack{}, true, err
			}
			return again(first.trouble)
		case codeTooManyRequests:
			b.careful = true
			return again(overloaded)
		case codeClusterNoLeader, codeClusterNotLeader:
			return again(leaderless)
		case codeAtomicInFlight:
			b.careful = true
			return again(batchesInUse)
		case codeIDInProcess, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			return again(inProcess)
		case jetstream.JSErrCodeStreamWrongLastSequence:
			o = b.failed(o, api)
		}
		return Ack{}, true, o.refusal(api)
	case errors.Is(err, nats.ErrNoResponders):
		if err := b.noResponders(ctx, o); err != nil {
			return Ack{}, true, err
		}
		return again(o.trouble)
	}
	return Ack{}, true, b.p.publishFailure(o, err)
}

// failed is the envelope whose expectation failed. The server reports only its actual
// sequence: it is the first envelope that expects another one.
func (b *atomicBatch) failed(o *outgoing, api *jetstream.APIError) *outgoing {
	for i := range b.out {
		c := &b.out[i]
		if e := c.wrongSequence(api); c.e.expects() && !(e.Known && e.Have == e.Want) {
			return c
		}
	}
	return o
}

// stored reports whether all messages of a batch that was refused as a duplicate are
// stored, and the ack of the last one.
func (b *atomicBatch) stored(ctx context.Context) (ack Ack, all bool, err error) {
	of := b.out
	if !b.own {
		of = of[len(of)-1:] // only the whole batch has these ids
	}
	for i := range of {
		ack, all, err = b.has(ctx, &of[i])
		if !all {
			return Ack{}, false, err
		}
	}
	return ack, true, nil
}

// has reports whether one message is stored, and its ack. If the server does not trace
// messages for this user, the message is sent with an expectation that cannot hold: the
// server checks for a duplicate first.
func (b *atomicBatch) has(ctx context.Context, o *outgoing) (Ack, bool, error) {
	if !b.untraced {
		ack, stored, err := b.p.probe(ctx, o)
		if err == nil {
			return ack, stored, nil
		}
		b.untraced = true
	}
	m := &nats.Msg{Subject: o.subject, Data: o.e.data, Header: nats.Header{}}
	o.fill(m.Header)
	m.Header.Del(jetstream.ExpectedLastSeqHeader)
	m.Header.Del(jetstream.ExpectedLastSubjSeqHeader)
	m.Header.Set(jetstream.ExpectedLastMsgIDHeader, b.p.nextID())
	ctx, cancel := context.WithTimeout(ctx, tryWait(ackWait, o.unanswered))
	defer cancel()
	ack, err := publishOnce(ctx, b.p.nc, m)
	if hasCode(err, codeWrongLastMsgID) {
		return Ack{}, false, nil
	}
	return probed(ack, err)
}

// oneStream checks that all subjects belong to one stream.
func (b *atomicBatch) oneStream(ctx context.Context) error {
	home := ""
	asked := make(map[string]bool)
	for i := range b.out {
		subject := b.out[i].subject
		if asked[subject] {
			continue
		}
		asked[subject] = true
		f := b.lookUp(ctx, subject)
		switch {
		case f.err != nil:
			return nil // it may be one
		case f.stream == "":
			if err := b.noStream(subject); errors.Is(err, ErrNoStream) {
				return err
			}
			return nil
		case home != "" && f.stream != home:
			return failure(fmt.Sprintf("publish atomically: %q is of stream %q and %q of stream %q",
				b.out[0].subject, home, subject, f.stream), ErrOptionConflict)
		}
		home = f.stream
	}
	return nil
}
