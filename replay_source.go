package natsx

import (
	"context"
	"errors"
	"math"
	"sort"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// replayConsumer is the prefix of the names of replays' consumers.
const replayConsumer = "natsx-replay-"

// read reads the messages of the replay until its end.
func (r *replay) read() {
	err := r.openSource()
	for err == nil {
		var burst []arrival
		burst, err = r.reader.next(r.intake)
		if err != nil {
			err = r.unreadable(err)
		} else if !r.arrive(burst) {
			return
		}
	}
	if r.intake.Err() == nil {
		r.halt(err)
	}
}

// openSource finds the stream and the bounds, and makes the first consumer.
func (r *replay) openSource() error {
	info, err := r.locate()
	if err != nil {
		return err
	}
	c := &info.Config
	if c.Retention == jetstream.WorkQueuePolicy {
		return r.want.fault("stream", strconv.Quote(c.Name), "is a work queue: reading it takes messages from its consumers", ErrNotReplayable)
	}
	p := r.env.pool
	p.mu.Lock()
	r.stream, r.config = c.Name, c
	r.from = &origin{filter: r.want.replay.filter, stream: c.Name, ctx: r.serving}
	p.mu.Unlock()
	r.reader, err = openReader(r.env.api, r.env.link, r.env.log, info, readerOptions{
		filter: r.want.replay.filter, consumers: replayConsumer, inactive: replayInactive,
		window: replayWindow, want: r.demand, wake: r.more,
	})
	if err != nil {
		return r.want.fault("", "", "could not subscribe: "+cause(err), err)
	}
	return r.begin(info)
}

// locate looks the stream up.
func (r *replay) locate() (*jetstream.StreamInfo, error) {
	want := r.want.replay
	name, reason, err := locateStream(want.stream, func() (names []string, err error) {
		err = r.try(func(ctx context.Context) (err error) {
			names, err = r.env.api.streamNames(ctx, want.filter)
			return err
		})
		return names, err
	}, func() string { return r.env.api.nearStreams(context.Background(), "", want.filter) })
	if err != nil {
		if errors.Is(err, ErrConnectionClosed) {
			return nil, r.unreadable(err)
		}
		return nil, r.want.fault("stream", "", reason, err)
	}
	var info *jetstream.StreamInfo
	err = r.try(func(ctx context.Context) (err error) {
		info, err = r.env.api.streamInfo(ctx, name)
		return err
	})
	switch {
	case hasCode(err, codeStreamNotFound):
		return nil, r.want.fault("stream", strconv.Quote(name), "does not exist", ErrNoStream)
	case errors.Is(err, ErrConnectionClosed):
		return nil, r.unreadable(err)
	case err != nil:
		return nil, r.want.fault("stream", strconv.Quote(name), cause(err), err)
	}
	return info, nil
}

// begin determines the end and makes the first consumer, whose pending messages without
// those after the end are the total.
func (r *replay) begin(info *jetstream.StreamInfo) error {
	want := r.want.replay
	end, endTime := info.State.LastSeq, info.State.LastTime
	var behind uint64
	if until := want.until.time(); want.set&replayUntilTime != 0 && until.Before(endTime) {
		after, err := r.peek(startPoint{time: until.Add(1)})
		if err != nil {
			return err
		}
		last, err := r.lastUntil(until, after.Delivered.Stream, info.Config.Replicas)
		if err != nil {
			return err
		}
		end, endTime, behind = min(end, last), until, after.NumPending
	}
	if want.set&replayUntilSequence != 0 && want.untilSeq < end {
		after, err := r.peek(startPoint{seq: want.untilSeq + 1})
		if err != nil {
			return err
		}
		end, endTime, behind = want.untilSeq, time.Time{}, after.NumPending
	}
	if err := r.reader.begin(r.intake, newOrdered(want.start(), end)); err != nil {
		return r.unreadable(err)
	}
	o := &r.reader.o
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	r.received, r.located, r.end = max(r.received, o.received), true, end
	if !endTime.IsZero() && want.set&replayLimit == 0 {
		r.endTime = endTime.UnixNano()
	}
	if r.received < end {
		r.total = o.ahead - min(behind, o.ahead)
	}
	if want.set&replayLimit != 0 {
		r.total = min(r.total, uint64(want.limit))
	}
	return nil
}

// peek makes a consumer only to see where it starts and how much is pending.
func (r *replay) peek(at startPoint) (info *jetstream.ConsumerInfo, err error) {
	err = r.try(func(ctx context.Context) (err error) {
		info, err = r.reader.peek(ctx, at)
		return err
	})
	if err != nil {
		return nil, r.unreadable(err)
	}
	return info, nil
}

// lastUntil is the last sequence of a replay until a time. at is the one that a consumer
// reports, which may be too low if its server lags behind. So for a replicated stream the
// leader is asked, if the user may do that.
func (r *replay) lastUntil(until time.Time, at uint64, replicas int) (uint64, error) {
	if replicas <= 1 {
		return at, nil
	}
	after := until.Add(1)
	m, err := r.env.api.get(r.intake, r.stream, getRequest{StartTime: &after, NextFor: r.want.replay.filter})
	switch {
	case errors.Is(err, ErrPermission):
		return at, nil
	case err != nil:
		return 0, r.unreadable(err)
	case m == nil:
		return math.MaxUint64, nil
	case !m.time.After(until): // an older server's answer
		return at, nil
	}
	return max(at, m.seq-1), nil
}

// try sends a request to the JetStream API and retries transient failures. It gives up if
// JetStream does not answer at all.
func (r *replay) try(fn func(context.Context) error) error {
	l := r.env.link
	for !l.up() {
		if l.state() == nats.CLOSED {
			return ErrConnectionClosed
		}
		if !wait(r.intake, 50*time.Millisecond) {
			return r.intake.Err()
		}
	}
	logged := false
	return closedCause(r.env.starting(r.env.api, retry{
		told: func(err error) {
			if !logged {
				logged = true
				r.env.log.Warn("natsx: replay cannot start, trying again", "replay", r.want.replay.filter, "error", err)
			}
		},
		enough: func(err error) bool { return hasCode(err, codeStreamNotFound) },
	}).do(r.intake, fn))
}

// unreadable is the fault of a stream that can no longer be read.
func (r *replay) unreadable(err error) error {
	denied, ok := errors.AsType[*PermissionError](err)
	switch {
	case ok && denied.Operation == "subscribe":
		return r.want.fault(denied.Operation, strconv.Quote(denied.Subject), "permission denied by the server", denied)
	case errors.Is(err, ErrConnectionClosed):
		return r.want.fault("", "", cause(err), err)
	case errors.Is(err, ErrStreamDeleted), errors.Is(err, ErrPermission):
		return r.want.fault("stream", strconv.Quote(r.stream), cause(err), err)
	}
	return r.want.fault("stream", strconv.Quote(r.stream), "could not be read: "+cause(err), err)
}

// arrive accepts messages, none at the end, and reports whether to continue.
func (r *replay) arrive(burst []arrival) (more bool) {
	var ds [readBurst]*delivery
	for i, a := range burst {
		ds[i] = &delivery{msg: Msg{Subject: a.msg.Subject, Data: a.msg.Data, Header: a.msg.Header, from: r.from, seq: a.sequence, time: a.time}}
	}
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	now := processTime()
	for i, a := range burst {
		if r.stopping || r.limited() {
			break
		}
		r.take(ds[i], a, now)
	}
	if r.stopping {
		return false
	}
	if len(burst) == 0 || r.limited() {
		r.complete = true
	}
	r.supply()
	if r.over() {
		notify(r.wake)
	}
	return !r.complete
}

// take accepts a message. The pool is locked.
func (r *replay) take(d *delivery, a arrival, now int64) {
	waited := now - r.asking
	r.asking = now
	r.received = a.sequence
	if len(a.msg.Header) > 0 && (isSchedule(a.msg, r.config) || isTombstone(a.msg, r.config)) {
		return
	}
	w := r.newWork(d, a)
	r.accepted++
	r.hand.push(a.sequence, a.size)
	r.bytes += a.size
	if r.pace.speed == 0 {
		r.admit(w)
		return
	}
	w.due = r.pace.due(a.time, now, waited)
	if r.early.push(w); r.early.len() == 1 {
		r.env.agenda.set(&r.release, w.due)
	}
}

// demand is the pull policy of the replay: half a window at a time.
func (r *replay) demand(now int64, pl *puller) demand {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	d := demand{stay: orderedStay, heartbeat: orderedBeat}
	r.short = 0
	if r.complete || r.stopping {
		return d
	}
	window := min(replayWindow, max(replayBytes/int(max(pl.size, 1)), 1))
	d.refill = (window + 1) / 2
	d.messages = window - r.early.len() - r.backlog.len() - r.lane.inHand()
	if r.keys != nil {
		d.messages -= r.keys.waiting
	}
	missing := d.refill - (d.messages - pl.outstanding)
	if r.bytes > replayBytes || r.hand.len()+pl.outstanding > replayAhead {
		d.messages, missing = 0, max(missing, 1)
	}
	if missing > 0 {
		r.short = missing
		r.heldOff = r.heldOff || pl.outstanding == 0
		return d
	}
	if r.heldOff {
		r.heldOff, r.asking = false, now
	}
	if want := r.want.replay; want.set&replayLimit != 0 {
		d.messages = min(d.messages, want.limit-r.accepted)
	}
	return d
}

// ledger keeps the sequences in hand, in stream order, to find the lowest one.
type ledger struct {
	ring  []entry // its length is a power of two
	head  int
	count int
}

type entry struct {
	seq  uint64
	size int
	done bool
}

func (l *ledger) len() int { return l.count }

func (l *ledger) at(i int) *entry { return &l.ring[(l.head+i)&(len(l.ring)-1)] }

// push adds a sequence that is higher than all others.
func (l *ledger) push(seq uint64, size int) {
	if l.count == len(l.ring) {
		ring := make([]entry, max(64, 2*len(l.ring)))
		for i := range l.count {
			ring[i] = *l.at(i)
		}
		l.ring, l.head = ring, 0
	}
	l.count++
	*l.at(l.count - 1) = entry{seq: seq, size: size}
}

// settle marks a sequence as done and returns its size.
func (l *ledger) settle(seq uint64) int {
	i := 0
	if l.at(0).seq != seq {
		i = sort.Search(l.count, func(i int) bool { return l.at(i).seq >= seq })
	}
	e := l.at(i)
	e.done = true
	size := e.size
	for l.count > 0 && l.at(0).done {
		l.head = (l.head + 1) & (len(l.ring) - 1)
		l.count--
	}
	return size
}

// lowest is the lowest sequence that is not done.
func (l *ledger) lowest() (seq uint64, any bool) {
	if l.count == 0 {
		return 0, false
	}
	return l.at(0).seq, true
}

// tempo computes when messages are due, in nanoseconds of processTime, from their stored
// times in Unix nanoseconds.
type tempo struct {
	speed  float64 // above zero
	begun  bool
	stored int64 // stored time of the reference message
	base   int64 // when that message was due
	last   int64 // when the latest message is due
}

// tempoSlack is how long a late message may be awaited without delaying the next ones.
const tempoSlack = int64(100 * time.Millisecond)

// due is when a message that arrives now is to be handled, never before the previous one.
// waited is how long it was awaited: this delay is kept, while any further delay is caused
// by busy handlers, and is caught up with.
func (p *tempo) due(stored, now, waited int64) int64 {
	if !p.begun {
		p.begun, p.stored, p.base, p.last = true, stored, now, now
		return now
	}
	gap := float64(stored-p.stored) / p.speed
	due := p.base + int64(max(min(gap, math.MaxInt64/4), -math.MaxInt64/4))
	if late := min(now-due, waited); late > tempoSlack {
		p.base += late
		due += late
	}
	p.last = max(due, p.last)
	return p.last
}
