package natsx

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Bounds of one PublishAll: messages sent and not acknowledged yet.
const (
	maxPublishesInFlight = 4096
	maxBytesInFlight     = 16 << 20 // of payload; one message may be larger
)

// PublishError reports which envelopes of a [Publisher.PublishAll] have no ack.
type PublishError struct {
	// Errors has an entry for each envelope, in their order, nil for those that are
	// stored. An entry is what Publish would have returned.
	Errors []error
}

// Error returns the number of failures and the first one.
func (e *PublishError) Error() string {
	failed, first := 0, -1
	for i, err := range e.Errors {
		if err != nil {
			if failed++; first < 0 {
				first = i
			}
		}
	}
	if first < 0 {
		return "natsx: no envelope failed"
	}
	return fmt.Sprintf("natsx: %d of %d envelopes failed, the first is number %d: %s", failed, len(e.Errors), first, cause(e.Errors[first]))
}

// Unwrap returns the errors that are not nil.
func (e *PublishError) Unwrap() []error {
	var errs []error
	for _, err := range e.Errors {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// PublishAll is [Publisher.Publish] for many envelopes at once, which do not wait for each
// other's acks. At most 4,096 messages and 16 MiB of payload are in flight. The envelopes
// are sent in order, and stored in order unless one must be retried.
//
// The acks are in the order of the envelopes. If some fail, the others are still
// published, and the error is a [*PublishError]; failed envelopes have the zero Ack. If
// ctx has no deadline, PublishAll gives up when nothing was stored or refused for
// [DefaultPublishTimeout]. Nothing is sent after ctx has ended or while the connection is
// down. Without envelopes it returns no acks and no error.
func (p *Publisher) PublishAll(ctx context.Context, es ...Envelope) ([]Ack, error) {
	if p.around == nil {
		return p.publishAll(ctx, DefaultPublishTimeout, es)
	}
	c, err := p.through(ctx, OperationPublishAll, slices.Clone(es), func(ctx context.Context, c *PublishCall) (err error) {
		c.Acks, err = p.publishAll(ctx, DefaultPublishTimeout, c.Envelopes)
		return err
	})
	return c.Acks, err
}

// publishAll gives up after limit without progress if ctx has no deadline.
func (p *Publisher) publishAll(ctx context.Context, limit time.Duration, es []Envelope) ([]Ack, error) {
	if len(es) == 0 {
		return nil, nil
	}
	b := p.newCall(ctx).newBulk(es)
	sub, err := b.subscribe()
	if err != nil {
		for i := range es {
			b.fail(i, p.publishFailure(&outgoing{e: &es[i]}, err))
		}
		return b.acks, &PublishError{b.errs}
	}
	defer sub.Unsubscribe()
	b.run(ctx, limit)
	if b.errs != nil {
		return b.acks, &PublishError{b.errs}
	}
	return b.acks, nil
}

// goOn retries one envelope, first after a wait, until it is settled or ctx ends, which
// has a deadline.
func (c *call) goOn(ctx context.Context, o *outgoing, wait time.Duration) (Ack, error) {
	b := c.newBulk([]Envelope{*o.e})
	sub, err := b.subscribe()
	if err != nil {
		return Ack{}, c.p.publishFailure(o, err)
	}
	defer sub.Unsubscribe()
	b.put(*o).when = time.Now().Add(wait)
	o.number = number{} // the bulk gives it back
	b.run(ctx, 0)
	if b.errs != nil {
		return Ack{}, b.errs[0]
	}
	return b.acks[0], nil
}

// bulk is one PublishAll, or the retries of a Publish. It sends and receives on the
// caller's goroutine.
type bulk struct {
	*call
	es   []Envelope
	acks []Ack
	errs []error // nil until one fails

	next    int     // the first envelope that was not sent
	slot    []int32 // for each envelope its index in out plus one, 0 for none
	out     []sent
	free    []int32 // unused indexes of out
	bytes   int     // of payload in flight
	replies chan *nats.Msg
	inbox   string      // subject of the replies, which ends in the envelope's number
	header  nats.Header // of the message that is being sent, reused
	stream  string      // of the last ack
	heard   int         // the last envelope that was answered individually
	moved   bool        // there was progress since the last tick
	since   time.Time   // of the last progress

	// Of WithFastIngest.
	fast        bool
	asked, home string // a subject, and its stream if that accepts batches
	open        *fastBatch
	batches     map[string]*fastBatch // by id, until all of their messages are settled
	started     int                   // batches so far
}

// sent is an envelope in flight.
type sent struct {
	outgoing
	index  int
	batch  *fastBatch // whose ack settles it, or nil
	alone  bool       // it was or will be sent individually after its batch
	sent   bool       // it waits for an ack, not for another try
	looked bool       // it has no id, and the reason of the missing ack was looked up
	when   time.Time  // of the next try if no ack comes and it has an id
}

var errNoAck = fmt.Errorf("no ack in time: %w", context.DeadlineExceeded)

func (c *call) newBulk(es []Envelope) *bulk {
	b := &bulk{
		call: c,
		es:   es,
		acks: make([]Ack, len(es)),
		slot: make([]int32, len(es)),
		out:  make([]sent, min(len(es), maxPublishesInFlight)),
		// More than messages: a retried one may have two acks, and one of a fast batch
		// also answers about the batch.
		replies: make(chan *nats.Msg, 4*min(len(es), maxPublishesInFlight)),
		fast:    c.p.fast,
		inbox:   c.p.nc.NewInbox() + ".",
		header:  make(nats.Header),
	}
	for i := range b.out {
		b.free = append(b.free, int32(i))
	}
	return b
}

// subscribe subscribes to one inbox for all answers, those to earlier tries too.
func (b *bulk) subscribe() (*nats.Subscription, error) {
	return b.p.nc.ChanSubscribe(b.inbox+">", b.replies)
}

func (b *bulk) run(ctx context.Context, limit time.Duration) {
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	b.since = time.Now()
	_, limited := ctx.Deadline()
	for b.next < len(b.es) || len(b.free) < len(b.out) {
		if err := b.ending(ctx, ""); err != nil {
			b.receiveAll(ctx)
			b.abandon(err)
			return
		}
		for b.next < len(b.es) && b.room() && b.p.nc.IsConnected() {
			b.start(ctx)
		}
		if b.open != nil {
			b.commit(ctx)
		}
		select {
		case r := <-b.replies:
			b.receive(ctx, r)
			b.receiveAll(ctx)
		case now := <-tick.C:
			b.receiveAll(ctx)
			if b.moved {
				b.moved, b.since = false, now
			}
			b.endDenied()
			if b.p.nc.IsConnected() {
				b.overdueBatches(ctx, now)
				b.overdue(ctx, now)
			}
			if !limited && now.Sub(b.since) > limit {
				b.abandon(context.DeadlineExceeded)
				return
			}
		case <-ctx.Done():
		}
	}
}

func (b *bulk) room() bool {
	return len(b.free) == len(b.out) ||
		len(b.free) > 0 && b.bytes+len(b.es[b.next].data) <= maxBytesInFlight
}

// start sends the next envelope for the first time.
func (b *bulk) start(ctx context.Context) {
	o, err := b.prepare(&b.es[b.next], b.p.bare)
	if err != nil {
		b.fail(b.next, err)
		b.next++
		return
	}
	s := b.put(o)
	stream := ""
	if b.fast && b.locate(ctx, &s.outgoing) == nil {
		stream = b.fastStream(ctx, &s.outgoing)
	}
	if b.open != nil && b.open.stream != stream {
		b.commit(ctx)
	}
	if stream != "" {
		b.add(ctx, stream, s)
	} else {
		b.send(ctx, s)
	}
}

// put adds the next envelope to out.
func (b *bulk) put(o outgoing) *sent {
	place := b.free[len(b.free)-1]
	b.free = b.free[:len(b.free)-1]
	b.slot[b.next] = place + 1
	b.bytes += len(o.e.data)
	s := &b.out[place]
	*s = sent{outgoing: o, index: b.next}
	b.next++
	return s
}

// send sends a message individually.
func (b *bulk) send(ctx context.Context, s *sent) {
	err := b.locate(ctx, &s.outgoing)
	if err == nil {
		err = b.write(s, b.inbox+strconv.Itoa(s.index))
	}
	if err != nil {
		b.failed(ctx, s, Ack{}, err)
		return
	}
	s.sent, s.looked = true, false
	s.when = time.Now().Add(tryWait(ackWait, s.unanswered))
}

func (b *bulk) write(s *sent, reply string) error {
	// Keep the names with empty values, which are not sent, to reuse the map and its
	// slices. A message without an id may have no headers at all.
	if len(b.header) > 64 || s.id == "" {
		clear(b.header)
	}
	for k, v := range b.header {
		b.header[k] = v[:0]
	}
	s.fill(b.header)
	m := nats.Msg{Subject: s.subject, Reply: reply, Header: b.header, Data: s.e.data}
	return b.p.nc.PublishMsg(&m)
}

// receiveAll handles the answers that have arrived.
func (b *bulk) receiveAll(ctx context.Context) {
	for range len(b.replies) {
		b.receive(ctx, <-b.replies)
	}
}

func (b *bulk) receive(ctx context.Context, r *nats.Msg) {
	at := r.Subject[len(b.inbox):]
	if strings.HasSuffix(at, batchSuffix) {
		b.receiveFast(ctx, at, r)
		return
	}
	i, err := strconv.Atoi(at)
	if err != nil || i < 0 || i >= len(b.es) || b.slot[i] == 0 {
		return // to a try before the acknowledged one
	}
	s := &b.out[b.slot[i]-1]
	b.heard = max(b.heard, i)
	if len(r.Data) == 0 && r.Header.Get("Status") == "503" {
		b.failed(ctx, s, Ack{}, nats.ErrNoResponders)
		return
	}
	ack, err := checkedAck(r.Data, s.e.stream, b.stream)
	if err != nil {
		b.failed(ctx, s, ack, err)
		return
	}
	b.stream = ack.Stream
	b.acks[i] = ack
	b.release(s)
}

// failed ends an envelope or schedules a retry. The ack of a refusal names the stream.
func (b *bulk) failed(ctx context.Context, s *sent, ack Ack, err error) {
	b.leaveBatch(s)
	b.retry(ctx, s, ack, err)
}

// retry is failed for a message that the ack of its batch may still settle.
func (b *bulk) retry(ctx context.Context, s *sent, ack Ack, err error) {
	ack, wait, final := b.after(ctx, &s.outgoing, ack, err)
	switch {
	case wait > 0:
		s.sent, s.when = false, time.Now().Add(wait)
	case wait == 0:
		s.sent, s.when = false, time.Time{}
	case final != nil:
		b.fail(s.index, final)
		b.release(s)
	default:
		b.acks[s.index] = ack
		b.release(s)
	}
}

// overdue resends messages whose ack is overdue.
func (b *bulk) overdue(ctx context.Context, now time.Time) {
	for place := range b.out {
		s := &b.out[place]
		if s.e == nil || s.batch != nil && !s.alone || s.when.After(now) || s.looked {
			continue
		}
		if s.sent {
			if b.heard < s.index && now.Sub(b.since) < ackWait {
				continue // the server is still busy with earlier messages
			}
			if s.id == "" {
				s.looked = true
				s.unanswered++
				if err := b.unacknowledged(ctx, &s.outgoing); err != nil {
					b.fail(s.index, err)
					b.release(s)
				}
				continue
			}
			b.retry(ctx, s, Ack{}, errNoAck)
		}
		if s.e != nil && !s.sent && !s.when.After(now) {
			b.send(ctx, s)
		}
	}
}

// endDenied ends envelopes that the user may not publish.
func (b *bulk) endDenied() {
	if b.p.denials.count.Load() == b.mark {
		return
	}
	for place := range b.out {
		if s := &b.out[place]; s.e != nil {
			if err := b.call.denied(s.subject); err != nil {
				b.fail(s.index, err)
				b.release(s)
			}
		}
	}
}

func (b *bulk) release(s *sent) {
	b.leaveBatch(s)
	place := b.slot[s.index] - 1
	b.slot[s.index] = 0
	b.bytes -= len(s.e.data)
	b.free = append(b.free, place)
	b.moved = true
	*s = sent{}
}

func (b *bulk) fail(i int, err error) {
	if b.errs == nil {
		b.errs = make([]error, len(b.es))
	}
	b.errs[i] = err
	if b.slot[i] > 0 {
		b.giveBack(b.out[b.slot[i]-1].number)
	}
}

// abandon ends all envelopes without an ack.
func (b *bulk) abandon(why error) {
	down := b.p.down()
	for place := range b.out {
		if s := &b.out[place]; s.e != nil {
			if s.sent || s.batch != nil {
				s.tries++
			}
			if down != "" {
				s.trouble = down
			}
			b.fail(s.index, s.ended(why))
			b.release(s)
		}
	}
	for ; b.next < len(b.es); b.next++ {
		b.fail(b.next, (&outgoing{e: &b.es[b.next], trouble: down}).ended(why))
	}
}
