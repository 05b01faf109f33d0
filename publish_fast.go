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

// WithFastIngest has [Publisher.PublishAll] store what it may in the server's fast
// batches (ADR-50), which are acknowledged as a whole, some hundred messages at once.
// The price is in the acks. Of a message that its batch stored the Ack has the
// Stream, Duplicate is false even if the stream had the message already, and Sequence
// is 0, not told, but for the last message of a batch: it is known when natsx made the
// message id, or left it out, outside of handlers. Default is one by one.
//
// In a batch go envelopes without expectations, delay and Nats-* headers, for
// streams with AllowBatchPublish (nats-server 2.14), next to each other and for
// one stream. All others go one by one, with full acks. So does, under the same
// message id, what a batch did not confirm: because it or a message before it was
// refused, the stream changed its leader or the connection was lost.
//
// It pays most together with [WithoutMessageIDs]; what message ids cost the server
// stays, and with them it is mainly the client that has less to do. The stream is
// looked up once for each call and stream, which takes longer than it saves for a
// few envelopes; where that may not be asked, all go one by one.
func WithFastIngest() PublisherOption {
	return func(p *Publisher) { p.fast = true }
}

const (
	maxBatchMessages = maxPublishesInFlight / 4
	maxBatchBytes    = maxBytesInFlight / 4

	// The end of a reply subject <inbox>.<batch>.<flow>.<gap>.<number>.<op>.$FI:
	// a sign of life every 256 messages, and with a message that is refused or
	// lost the batch ends, so that an ack confirms each message up to its number.
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

// fastBatch is a run of messages that a stream acknowledges together. The server
// numbers them from 1 and stores number n only after all before.
type fastBatch struct {
	id, stream, subject string
	sent                []int32 // the envelopes by number, from 0
	held                *sent   // the last, which is sent once it is known whether it ends the batch
	bytes               int
	order               int       // of its start among the batches of the call
	left                int       // messages without a word of what became of them
	when                time.Time // of giving up on the ack, once the batch is committed
}

// fastStream names the stream that takes the message in a batch, if one does. One that
// may be too large goes alone: a batch that it should end would need an empty message
// to end, which subscribers of the subject see.
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
		// Some that the server knows it judges after it has counted the message.
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

// add puts a message at the end of the open batch.
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

// commit ends the open batch with the message held back.
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

// unanswered is message n of a batch while nothing is known of it, or nil.
func (b *bulk) unanswered(f *fastBatch, n int) *sent {
	if n < 1 || n > len(f.sent) || b.slot[f.sent[n-1]] == 0 {
		return nil
	}
	if s := &b.out[b.slot[f.sent[n-1]]-1]; s.batch == f {
		return s
	}
	return nil
}

// leaveBatch has a message not settled by the batch's ack any more.
func (b *bulk) leaveBatch(s *sent) {
	if f := s.batch; f != nil {
		s.batch = nil
		if f.left--; f.left == 0 && f != b.open {
			delete(b.batches, f.id)
		}
	}
}

// receiveFast takes an answer about message n of a batch, which came on
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
	// The stream takes one batch after the other.
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
		// Where the batch is, or that it has a gap, after which its ack comes.
	case answer.Batch == f.id:
		b.confirm(ctx, f, answer.Count, answer.Sequence)
	default:
		ack, err := parseAck(r.Data, b.stream)
		if err != nil {
			b.refused(ctx, f, n, err, false)
		} else if s := b.unanswered(f, n); s != nil {
			// A stream took it on its own that knows no batches.
			b.acks[s.index] = ack
			b.release(s)
		}
	}
}

// confirm takes the ack of a batch: it ended with count messages, all but those
// that were refused one by one stored, the last of them at sequence.
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

// over ends a batch that the server has not, or not any more. Message n and what
// follows was not stored; whether what comes before it was nobody will tell.
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

// sendAgain sends what the batch did not store on its own, if that was not done.
func (b *bulk) sendAgain(ctx context.Context, s *sent) {
	b.leaveBatch(s)
	if !s.alone {
		b.send(ctx, s)
	}
}

// refused is an error of message n alone. With known set the server counts it as
// the end of the batch and acknowledges what comes before. Else it has not seen
// it, and it notices with the next message, if there is one.
func (b *bulk) refused(ctx context.Context, f *fastBatch, n int, err error, known bool) {
	if s := b.unanswered(f, n); s != nil {
		b.failed(ctx, s, Ack{}, err)
	}
	if n == len(f.sent) && !known {
		b.end(ctx, f)
	}
}

// end ends a batch without its last message. What has an id is better sent again:
// where subscribers of the subject listen beside the stream, they see an empty
// message that ends a batch.
func (b *bulk) end(ctx context.Context, f *fastBatch) {
	b.giveUp(ctx, f)
	bare := func(i int32) bool { return b.slot[i] > 0 && b.out[b.slot[i]-1].id == "" }
	if slices.ContainsFunc(f.sent, bare) {
		m := nats.Msg{Subject: f.subject, Reply: f.reply(b.inbox, len(f.sent)+1, batchEnd)}
		_ = b.p.nc.PublishMsg(&m) // without it they wait for the end of ctx
	}
}

// giveUp has the messages of a batch that may be sent again sent on their own.
// They and the others may still be settled by its ack.
func (b *bulk) giveUp(ctx context.Context, f *fastBatch) {
	for n := 1; n <= len(f.sent); n++ {
		if s := b.unanswered(f, n); s != nil && s.id != "" && !s.alone {
			s.alone = true
			b.retry(ctx, s, Ack{}, errNoAck)
		}
	}
}

// overdueBatches gives up on batches that nobody has answered for.
func (b *bulk) overdueBatches(ctx context.Context, now time.Time) {
	for _, f := range b.batches {
		if f.when.Before(now) {
			f.when = now.Add(commitWait)
			b.giveUp(ctx, f)
		}
	}
}
