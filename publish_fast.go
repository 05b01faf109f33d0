package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// WithFastIngest makes [Publisher.PublishAll] use the server's fast batches (ADR-50) where
// possible. Some hundred messages are then acknowledged together, so their acks say less:
// Stream is set, Duplicate is always false, and Sequence is 0 except for the last message
// of a batch. That one has its sequence if natsx made or left out the message id, outside
// of handlers. The default is to publish messages individually.
//
// A batch has consecutive envelopes for one stream with AllowBatchPublish (nats-server
// 2.14), without expectations, delays and Nats-* headers. All others are published
// individually, with full acks. So are, with the same message id, messages that a batch
// did not confirm, because they or an earlier message were refused, the stream changed its
// leader, or the connection was lost.
//
// The gain is largest with [WithoutMessageIDs]: with message ids mainly the client saves
// work. The stream is looked up once per call and stream, which costs more than it saves
// for a few envelopes; without that permission all are published individually.
func WithFastIngest() PublisherOption {
	return func(p *Publisher) { p.fast = true }
}

const (
	maxBatchMessages = maxPublishesInFlight / 4
	maxBatchBytes    = maxBytesInFlight / 4

	// The end of a reply subject <inbox>.<batch>.<flow>.<gap>.<number>.<op>.$FI. The
	// server reports its progress every 256 messages, and ends the batch at a refused or
	// lost message, so that an ack confirms each message up to its number.
	batchMode   = ".256.fail."
	batchSuffix = ".$FI"

	batchStart  = 0
	batchAppend = 1
	batchCommit = 2 // with the last message
	batchEnd    = 3 // without one

	codeBatchDisabled   jetstream.ErrorCode = 10205
	codeBatchBadPattern jetstream.ErrorCode = 10206
	codeBatchBadID      jetstream.ErrorCode = 10207
	codeBatchUnknown    jetstream.ErrorCode = 10208
	codeBatchTooMany    jetstream.ErrorCode = 10211
)

// fastBatch is a series of messages that a stream acknowledges together. The server
// numbers them from 1 and stores number n only after all before it.
type fastBatch struct {
	id, stream, subject string
	sent                []int32 // the envelopes by number, from 0
	held                *sent   // the last, sent once it is known whether it ends the batch
	bytes               int
	order               int       // of its start among the batches of the call
	left                int       // messages without an outcome
	when                time.Time // of giving up on the ack, once the batch is committed
}

// fastStream returns the name of the stream if it accepts the message in a batch. A
// message that may be too large is sent individually: if it should end the batch, that
// would need an empty message, which subscribers of the subject would receive.
func (b *bulk) fastStream(ctx context.Context, o *outgoing) string {
	if o.e.set&^(envMsgID|envTTL) != 0 {
		return ""
	}
	size := len(o.e.data) + len(o.id) + len(o.e.contentType) + 256
	for _, headers := range [...][]field{o.carried, o.e.headers} {
		for _, h := range headers {
			size += len(h.name) + len(h.value) + 4
		}
	}
	if int64(size) > b.p.nc.MaxPayload() {
		return ""
	}
	for _, h := range o.e.headers {
		// The server checks some of these only after it has counted the message.
		if len(h.name) >= 5 && strings.EqualFold(h.name[:5], "Nats-") {
			return ""
		}
	}
	if o.subject != b.asked {
		info, err := b.streamOf(ctx, o.subject)
		b.asked, b.home = o.subject, ""
		switch {
		case err == nil && info.Config.AllowBatchPublish && !info.Config.NoAck:
			b.home = info.Config.Name
		case err != nil && !errors.Is(err, ErrNoStream):
			b.fast = false
		}
	}
	return b.home
}

// add appends a message to the open batch.
func (b *bulk) add(ctx context.Context, stream string, s *sent) {
	if b.open == nil {
		b.started++
		b.open = &fastBatch{id: b.p.nextID(), stream: stream, subject: s.subject, order: b.started}
		if b.batches == nil {
			b.batches = make(map[string]*fastBatch)
		}
		b.batches[b.open.id] = b.open
	}
	f := b.open
	if f.held != nil {
		b.sendHeld(ctx, f, batchAppend)
	}
	s.batch, f.held = f, s
	f.left++
	f.bytes += len(s.e.data)
	if len(f.sent)+1 >= maxBatchMessages || f.bytes >= maxBatchBytes {
		b.commit(ctx)
	}
}

// commit ends the open batch with the message that is held.
func (b *bulk) commit(ctx context.Context) {
	f := b.open
	b.open = nil
	f.when = time.Now().Add(commitWait)
	if !b.sendHeld(ctx, f, batchCommit) {
		b.end(ctx, f)
	}
}

func (b *bulk) sendHeld(ctx context.Context, f *fastBatch, op int) bool {
	s := f.held
	f.held = nil
	if len(f.sent) == 0 && op == batchAppend {
		op = batchStart
	}
	if err := b.write(s, f.reply(b.inbox, len(f.sent)+1, op)); err != nil {
		b.failed(ctx, s, Ack{}, err)
		return false
	}
	f.sent = append(f.sent, int32(s.index))
	return true
}

func (f *fastBatch) reply(inbox string, number, op int) string {
	var text [128]byte
	r := append(append(append(text[:0], inbox...), f.id...), batchMode...)
	r = append(strconv.AppendInt(r, int64(number), 10), '.', '0'+byte(op))
	return string(append(r, batchSuffix...))
}

// unanswered is message n of a batch if it has no outcome yet, or nil.
func (b *bulk) unanswered(f *fastBatch, n int) *sent {
	if n < 1 || n > len(f.sent) || b.slot[f.sent[n-1]] == 0 {
		return nil
	}
	if s := &b.out[b.slot[f.sent[n-1]]-1]; s.batch == f {
		return s
	}
	return nil
}

// leaveBatch removes a message from its batch, whose ack no longer settles it.
func (b *bulk) leaveBatch(s *sent) {
	if f := s.batch; f != nil {
		s.batch = nil
		if f.left--; f.left == 0 && f != b.open {
			delete(b.batches, f.id)
		}
	}
}

// receiveFast handles an answer about message n of a batch, received on
// <batch>.<flow>.<gap>.<n>.<op>.$FI.
func (b *bulk) receiveFast(ctx context.Context, at string, r *nats.Msg) {
	part := strings.Split(at, ".")
	f := b.batches[part[0]]
	if f == nil || len(part) != 6 {
		return // the batch is settled
	}
	n, err := strconv.Atoi(part[3])
	if err != nil {
		return
	}
	// The stream handles one batch after another.
	when := time.Now().Add(commitWait)
	for _, g := range b.batches {
		if g.stream == f.stream && g.order >= f.order {
			g.when = when
		}
	}
	if len(r.Data) == 0 && r.Header.Get("Status") == "503" {
		b.refused(ctx, f, n, nats.ErrNoResponders, false)
		return
	}
	var answer struct {
		Type     string              `json:"type"`
		Error    *jetstream.APIError `json:"error"`
		Batch    string              `json:"batch"`
		Count    int                 `json:"count"`
		Sequence uint64              `json:"seq"`
	}
	if json.Unmarshal(r.Data, &answer) != nil {
		_, err := parseAck(r.Data, "")
		b.refused(ctx, f, n, err, false)
		return
	}
	switch api := answer.Error; {
	case api != nil:
		switch api.ErrorCode {
		case codeBatchDisabled, codeBatchBadPattern, codeBatchBadID, codeBatchTooMany:
			b.fast = false
			b.over(ctx, f, n)
		case codeBatchUnknown:
			b.over(ctx, f, n)
		default:
			b.refused(ctx, f, n, api, answer.Type == "err")
		}
	case answer.Type != "":
		b.moved = true
		// The progress of the batch, or a gap, after which its ack follows.
	case answer.Batch == f.id:
		b.confirm(ctx, f, answer.Count, answer.Sequence)
	default:
		ack, err := parseAck(r.Data, b.stream)
		if err != nil {
			b.refused(ctx, f, n, err, false)
		} else if s := b.unanswered(f, n); s != nil {
			// A stream without batches stored it individually.
			b.acks[s.index] = ack
			b.release(s)
		}
	}
}

// confirm handles the ack of a batch of count messages. All of them are stored except
// those that were refused individually, the last one at sequence.
func (b *bulk) confirm(ctx context.Context, f *fastBatch, count int, sequence uint64) {
	for n := 1; n <= len(f.sent); n++ {
		s := b.unanswered(f, n)
		switch {
		case s == nil:
		case n > count:
			b.sendAgain(ctx, s)
		default:
			ack := Ack{Stream: f.stream}
			if n == count && s.e.set&envMsgID == 0 && b.d == nil {
				ack.Sequence = sequence
			}
			b.acks[s.index] = ack
			b.release(s)
		}
	}
}

// over ends a batch that is unknown to the server. Message n and later ones were not
// stored; for earlier ones that is unknown.
func (b *bulk) over(ctx context.Context, f *fastBatch, n int) {
	for m := 1; m <= len(f.sent); m++ {
		if s := b.unanswered(f, m); s == nil {
			continue
		} else if m < n && !s.alone {
			b.failed(ctx, s, Ack{}, errNoAck)
		} else {
			b.sendAgain(ctx, s)
		}
	}
}

// sendAgain sends a message individually that the batch did not store, unless that was
// done already.
func (b *bulk) sendAgain(ctx context.Context, s *sent) {
	b.leaveBatch(s)
	if !s.alone {
		b.send(ctx, s)
	}
}

// refused handles an error of message n. With known set the server ends the batch with it
// and acknowledges the earlier ones. Otherwise the server has not counted it, and detects
// the gap at the next message, if there is one.
func (b *bulk) refused(ctx context.Context, f *fastBatch, n int, err error, known bool) {
	if s := b.unanswered(f, n); s != nil {
		b.failed(ctx, s, Ack{}, err)
	}
	if n == len(f.sent) && !known {
		b.end(ctx, f)
	}
}

// end ends a batch without its last message. Messages with an id are resent instead, since
// subscribers of the subject would receive the empty message that ends a batch.
func (b *bulk) end(ctx context.Context, f *fastBatch) {
	b.giveUp(ctx, f)
	bare := func(i int32) bool { return b.slot[i] > 0 && b.out[b.slot[i]-1].id == "" }
	if slices.ContainsFunc(f.sent, bare) {
		m := nats.Msg{Subject: f.subject, Reply: f.reply(b.inbox, len(f.sent)+1, batchEnd)}
		_ = b.p.nc.PublishMsg(&m) // if it fails, they wait for the end of ctx
	}
}

// giveUp resends individually the messages of a batch that have an id. The ack of the
// batch may still settle all of them.
func (b *bulk) giveUp(ctx context.Context, f *fastBatch) {
	for n := 1; n <= len(f.sent); n++ {
		if s := b.unanswered(f, n); s != nil && s.id != "" && !s.alone {
			s.alone = true
			b.retry(ctx, s, Ack{}, errNoAck)
		}
	}
}

// overdueBatches gives up on batches without an answer.
func (b *bulk) overdueBatches(ctx context.Context, now time.Time) {
	for _, f := range b.batches {
		if f.when.Before(now) {
			f.when = now.Add(commitWait)
			b.giveUp(ctx, f)
		}
	}
}
