package natsx

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// MaxAtomicEnvelopes is the most that a server takes in one atomic batch (ADR-50).
const MaxAtomicEnvelopes = 1000

// ErrAtomicNotAllowed is an atomic publish to a stream without
// AllowAtomicPublish, or to a server before 2.12, which has no atomic batches.
var ErrAtomicNotAllowed = errors.New("natsx: atomic publishing is not allowed")

const (
	batchIDHeader       = "Nats-Batch-Id"
	batchSequenceHeader = "Nats-Batch-Sequence"
	batchCommitHeader   = "Nats-Batch-Commit"

	// commitWait is how long the first try waits for the ack of its commit, see
	// [tryWait].
	commitWait = 2 * time.Second

	codeAtomicDisabled   jetstream.ErrorCode = 10174
	codeAtomicIncomplete jetstream.ErrorCode = 10176
	codeAtomicDuplicate  jetstream.ErrorCode = 10201
	codeAtomicInFlight   jetstream.ErrorCode = 10210
)

// PublishAtomic stores all envelopes or none, one after another in one stream,
// and nobody reads a part of them (ADR-50). The ack is of the last envelope; the
// first has the sequence Ack.Sequence - len(es) + 1. The stream must have
// AllowAtomicPublish, else it is [ErrAtomicNotAllowed].
//
// 1 to [MaxAtomicEnvelopes] go together, else it is [ErrOutOfRange], none of them
// delayed ([ErrOptionConflict]). All expectations must hold when the batch is
// committed, or nothing is stored: [ErrWrongSequence]. Only the first envelope may
// have ExpectLastSequence, and an envelope may have ExpectLastSubjectSequence only if
// none before it has its subject ([ErrOptionConflict]).
//
// It tries again as [Publisher.Publish] does, with the same message ids, so that
// no batch is stored twice within the duplicate window. A batch of which every
// message id is already stored, be it by an unanswered try or when a handler runs
// again, is acknowledged as a duplicate; one of which only some are is refused and
// not stored.
func (p *Publisher) PublishAtomic(ctx context.Context, es ...Envelope) (Ack, error) {
	if err := checkAtomic(es); err != nil {
		return Ack{}, err
	}
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	b := atomicBatch{call: p.newCall(ctx), out: make([]outgoing, len(es))}
	number := b.prepare(es)
	ack, err := b.publish(ctx)
	if err != nil {
		b.giveBack(number)
		return Ack{}, err
	}
	return ack, nil
}

// prepare settles the message ids of envelopes that were checked. In a handler they
// are made of the batch as a whole: a part of a batch is not what another run stored.
func (b *atomicBatch) prepare(es []Envelope) number {
	var number number
	if b.inDurable() {
		number = b.d.output().take(batchDigest(es))
	}
	for i := range es {
		o := outgoing{e: &es[i], id: es[i].msgID, subject: es[i].subject, carried: b.carried}
		switch {
		case o.id != "":
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
	p := b.p
	if err := p.online(ctx); err != nil {
		b.out[0].trouble = offline
	}
	if err := ctx.Err(); err != nil {
		return Ack{}, b.out[0].ended(err)
	}
	if old := p.nc.ConnectedServerVersion(); beforeAtomic(old) {
		return Ack{}, failure(fmt.Sprintf("%s: server %s has no atomic batches", b.what(), old), ErrAtomicNotAllowed)
	}
	for {
		ack, at, err := b.try(ctx)
		if err == nil {
			return ack, nil
		}
		ack, wait, err := b.afterTry(ctx, at, err)
		if wait < 0 {
			return ack, err
		}
		pause(ctx, wait)
	}
}

// checkAtomic reports every fault of a batch that shows without a server.
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

// beforeAtomic tells whether a server version is below 2.12. One that it cannot
// read is not.
func beforeAtomic(version string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); n < 2 {
		return false
	}
	return major < 2 || major == 2 && minor < 12
}

// atomicBatch is one PublishAtomic.
type atomicBatch struct {
	call
	out []outgoing
}

func (b *atomicBatch) what() string {
	return fmt.Sprintf("publish %d envelopes atomically to %q", len(b.out), b.out[0].subject)
}

// try sends the batch under an id of its own, since the server has forgotten what
// an earlier try staged, or will. at is the envelope that an error is about.
func (b *atomicBatch) try(ctx context.Context) (ack Ack, at int, err error) {
	nc, id := b.p.nc, b.p.nextID()
	inbox := nc.NewInbox() + "."
	replies := make(chan *nats.Msg, len(b.out))
	sub, err := nc.ChanSubscribe(inbox+"*", replies)
	if err != nil {
		return Ack{}, 0, err
	}
	defer sub.Unsubscribe()
	last := len(b.out) - 1
	messages := make([]*nats.Msg, len(b.out))
	for i := range b.out {
		o := &b.out[i]
		m := &nats.Msg{Subject: o.subject, Reply: inbox + strconv.Itoa(i), Data: o.e.data, Header: nats.Header{}}
		o.fill(m.Header)
		m.Header[batchIDHeader] = []string{id}
		m.Header[batchSequenceHeader] = []string{strconv.Itoa(i + 1)}
		if i == last {
			m.Header[batchCommitHeader] = []string{"1"}
		}
		// Rather than after the server has staged what comes before it.
		if int64(messageSize(m)) > nc.MaxPayload() {
			return Ack{}, i, nats.ErrMaxPayload
		}
		messages[i] = m
	}
	for i, m := range messages {
		if err := nc.PublishMsg(m); err != nil {
			return Ack{}, i, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, tryWait(commitWait, b.out[0].unanswered))
	defer cancel()
	for {
		var r *nats.Msg
		select {
		case r = <-replies:
		case <-ctx.Done():
			return Ack{}, last, ctx.Err()
		}
		i, err := strconv.Atoi(r.Subject[len(inbox):])
		if err != nil || i < 0 || i > last {
			continue
		}
		if len(r.Data) == 0 && r.Header.Get("Status") == "503" {
			return Ack{}, i, nats.ErrNoResponders
		}
		if i < last && len(r.Data) == 0 {
			continue // staged
		}
		ack, err := checkedAck(r.Data, b.out[i].e.stream, "")
		if err == nil && i < last {
			err = failure("an envelope of the batch was stored on its own", ErrAtomicNotAllowed)
		}
		return ack, i, err
	}
}

// afterTry is [call.after] for a whole batch.
func (b *atomicBatch) afterTry(ctx context.Context, at int, err error) (Ack, time.Duration, error) {
	first, o := &b.out[0], &b.out[at]
	first.tries++
	again := func(wait time.Duration) (Ack, time.Duration, error) { return first.again(ctx, wait) }
	wait := againWait(40*time.Millisecond, first.tries)
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api):
		switch api.ErrorCode {
		case codeAtomicDisabled:
			return Ack{}, -1, failure(b.what()+": the stream does not have AllowAtomicPublish", ErrAtomicNotAllowed, api)
		case codeAtomicDuplicate:
			ack, all, err := b.probeAll(ctx)
			switch {
			case all:
				return ack, -1, nil
			case err != nil:
				return again(wait)
			}
		case codeAtomicIncomplete:
			// What was staged is gone with its leader, or part of the batch went
			// to another stream.
			if err := b.oneStream(ctx); err != nil {
				return Ack{}, -1, err
			}
			return again(wait)
		case codeTooManyRequests:
			first.trouble = overloaded
			return again(wait)
		case codeAtomicInFlight, codeIDInProcess, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
			first.trouble = inProcess
			return again(wait)
		case jetstream.JSErrCodeStreamWrongLastSequence:
			o = b.failed(o, api)
		}
		return Ack{}, -1, o.refusal(api)
	case errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck), errors.Is(err, ErrAtomicNotAllowed), isLocal(err):
		return Ack{}, -1, b.p.publishFailure(o, err)
	case errors.Is(err, nats.ErrNoResponders):
		if err := b.noResponders(ctx, o); err != nil {
			return Ack{}, -1, err
		}
		first.trouble = o.trouble
		return again(wait)
	}
	if err := b.denied(o.subject); err != nil {
		return Ack{}, -1, err
	}
	first.unanswered++
	// The commit may have been taken; then the next try is refused for its
	// message ids, or as long as the commit is still on its way through a cluster.
	return again(0)
}

// failed is the envelope whose expectation failed. The server names none, only the
// sequence that it has: it is the first that expects another.
func (b *atomicBatch) failed(o *outgoing, api *jetstream.APIError) *outgoing {
	for i := range b.out {
		c := &b.out[i]
		if e := c.wrongSequence(api); c.e.expects() && !(e.Known && e.Have == e.Want) {
			return c
		}
	}
	return o
}

// probeAll tells whether every message of the batch is stored, and where the last is.
func (b *atomicBatch) probeAll(ctx context.Context) (ack Ack, all bool, err error) {
	for i := range b.out {
		ack, all, err = b.p.probe(ctx, &b.out[i])
		if err != nil {
			b.out[i].unanswered++
		}
		if !all {
			return Ack{}, false, err
		}
	}
	return ack, true, nil
}

// oneStream looks up whether all subjects belong to one stream.
func (b *atomicBatch) oneStream(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookupWait)
	defer cancel()
	home := ""
	asked := make(map[string]bool)
	for i := range b.out {
		subject := b.out[i].subject
		if asked[subject] {
			continue
		}
		asked[subject] = true
		name, err := b.p.js.StreamNameBySubject(ctx, subject)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			return failure(fmt.Sprintf("publish to %q: no stream captures the subject", subject), ErrNoStream)
		case err != nil:
			return nil // it may be one
		case home != "" && name != home:
			return failure(fmt.Sprintf("publish atomically: %q is of stream %q and %q of stream %q",
				b.out[0].subject, home, subject, name), ErrOptionConflict)
		}
		home = name
	}
	return nil
}
