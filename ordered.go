package natsx

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// orderedStay is how long a pull of an ordered reader waits at the server, and
	// orderedBeat how often the server says that it still does.
	orderedStay = 30 * time.Second
	orderedBeat = time.Second
	// orderedPulls is how many pulls of one reader are at the server at most.
	orderedPulls = 32
	// orderedMisses is how often in a row a stream is not found before it counts as
	// deleted: a server that just started may not know it yet.
	orderedMisses = 4
)

var (
	errGap         = errors.New("natsx: the consumer has left out a message")
	errSilent      = errors.New("natsx: the server is silent")
	errLags        = errors.New("natsx: the consumer lags behind the stream's leader")
	errReconnected = errors.New("natsx: the connection is another one")
)

// startAt is where a consumer starts: at a sequence, or at a time when that is 0.
type startAt struct {
	seq  uint64
	time time.Time
}

func (s startAt) apply(cfg *jetstream.ConsumerConfig) {
	if s.seq > 0 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, s.seq
		return
	}
	cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &s.time
}

// ordered reads a part of a stream in order and each message once. It is a state machine
// without clock, lock or connection: its owner tells it what happens and does what pull
// and next say.
//
// It reads through a throwaway consumer that acknowledges nothing. Whatever casts doubt
// on that one (a gap in its sequence, silence, a reconnect, a refused pull, its end) has
// it replaced by one that starts behind the last message received. What a consumer says
// of the end of the part may be wrong: its server may lag behind the stream's leader, and
// what it counted may be deleted. So the leader is asked.
type ordered struct {
	start    startAt       // of the first consumer
	last     uint64        // highest sequence of the part
	lenient  bool          // a leader that may not be asked is no fault: the consumer decides on the end
	single   bool          // and so it does in any case when it has no messages left: there is one replica
	patience time.Duration // how long it goes on while no message comes, 0 for ever
	puller   puller

	consumer string    // empty while there is none to trust
	here     uint64    // consumer sequence of its last message
	read     messageID // the last message received
	received uint64    // everything up to this sequence was received, or is not in the part
	begun    bool      // a message at or after the start has come
	made     bool      // a first consumer was made
	ahead    uint64    // messages that it had to deliver then, those behind the part included

	up        bool  // the connection is up
	session   int64 // its number
	progress  int64 // when something was last received
	notBefore int64 // no consumer is made before
	pause     backoff
	mark      uint64 // received, when a consumer was last given up
	tries     int    // of making a consumer, in a row
	misses    int    // of finding the stream, in a row
	doubtful  bool   // the connection may be up in name only
	ask       bool   // the leader is to be asked for the end
	starved   bool   // the last pull was not allowed by the byte budget

	trouble error // why there is no consumer, nil for none
	done    bool  // everything was received
	fault   error // what ended it instead
}

// stepKind is what the owner of an ordered is to do.
type stepKind uint8

const (
	stepWait   stepKind = iota // for what comes, until a time
	stepCreate                 // make a consumer
	stepAsk                    // ask the leader for the first message from a sequence on
	stepDone                   // everything was received
	stepFail                   // it cannot go on
)

// orderedStep is a step with what it needs.
type orderedStep struct {
	kind  stepKind
	at    int64   // of stepWait: when to look again though nothing happens, 0 for never
	start startAt // of stepCreate
	seq   uint64  // of stepAsk
	err   error   // of stepFail
}

func newOrdered(start startAt, last uint64) ordered {
	o := ordered{start: start, last: last, begun: start.seq > 0, pause: backoff{first: 50 * time.Millisecond, most: 2 * time.Second}}
	if start.seq > 0 {
		o.received = start.seq - 1
		o.mark = o.received
	}
	return o
}

func (o *ordered) over() bool { return o.done || o.fault != nil }

// fail ends it.
func (o *ordered) fail(err error) {
	if !o.over() {
		o.fault = err
	}
}

// resume is called when the owner goes on after it was busy with what it received.
func (o *ordered) resume(now int64) { o.progress = now }

// connection takes over whether the connection is up, and the number of its session.
func (o *ordered) connection(now int64, up bool, session int64) {
	if o.session != session && o.consumer != "" {
		o.distrust(now, errReconnected)
	}
	o.up, o.session = up, session
}

// created takes a new consumer.
func (o *ordered) created(now int64, info *jetstream.ConsumerInfo) {
	if !o.made {
		o.made, o.ahead = true, info.NumPending
		o.received = max(o.received, info.Delivered.Stream)
	}
	o.consumer, o.here = info.Name, 0
	o.puller.limits = pullLimitsOf(info.Config)
	o.puller.open, o.puller.notBefore, o.puller.unserved = true, 0, 0
	o.tries, o.misses, o.doubtful, o.trouble = 0, 0, false, nil
	switch {
	case o.received >= o.last:
		o.done = true
	case info.NumPending == 0:
		o.end()
	}
}

// notCreated takes the failure of a step that was to make a consumer.
func (o *ordered) notCreated(now int64, err error) {
	missing := hasCode(err, codeStreamNotFound)
	if missing {
		o.misses++
	} else {
		o.misses = 0
	}
	switch {
	case o.misses >= orderedMisses:
		o.fail(ErrStreamDeleted)
	case !missing && !transient(err):
		o.fail(err)
	}
	o.tries++
	o.doubtful, o.trouble = true, err
	o.notBefore = now + int64(o.pause.next())
}

// message takes a message of size bytes and reports whether it is the next of the part.
func (o *ordered) message(now int64, m ackInfo, size int) (next bool) {
	if o.over() || m.consumer != o.consumer {
		return false
	}
	o.puller.message(now, size)
	if o.here++; m.consumerSeq != o.here {
		o.distrust(now, errGap)
		return false
	}
	switch {
	case m.sequence > o.last:
		o.done = true
		return false
	case m.sequence > o.received:
		o.received, o.read, o.progress = m.sequence, messageID{m.sequence, m.time}, now
		next, o.ask = true, false
		// Only a replica that lags behind starts earlier than it was to, since it does
		// not have the start yet.
		o.begun = o.begun || !time.Unix(0, m.time).Before(o.start.time)
	}
	switch {
	case m.sequence == o.last:
		o.done = true
	case m.pending == 0:
		o.end()
	}
	return next && o.begun
}

// end is the consumer's end, which may be that of the part.
func (o *ordered) end() {
	if o.lenient && o.single {
		o.done = true
	}
	o.ask = true
}

// status takes a pull status message.
func (o *ordered) status(now int64, s pullStatus) {
	if o.over() || !slices.ContainsFunc(o.puller.pulls, func(p pull) bool { return p.token == s.token }) {
		return // of an earlier consumer, or of a pull that is complete
	}
	switch o.puller.status(now, s) {
	case pullGoesOn, pullRang:
		// Nothing came for a while, though more is expected.
		o.ask = o.ask || s.kind == statusHeartbeat || s.kind == statusNoMessages || s.code == "408" && s.left > 0
	default:
		o.distrust(now, &pullError{s.code, s.text})
	}
}

// answered takes the leader's answer about the end: the sequence of the first message
// that was not received, 0 for none. With more, something has come in meanwhile.
func (o *ordered) answered(now int64, seq uint64, err error, more bool) {
	o.ask = false
	switch {
	case errors.Is(err, ErrPermission):
		if o.lenient {
			o.done = true
		} else {
			o.fail(err)
		}
	case err != nil: // the leader or the connection is in trouble
		o.doubtful = true
		o.distrust(now, err)
	case seq == 0 || seq > o.last:
		o.done = true
	case !more:
		o.distrust(now, errLags)
	}
}

// distrust gives the consumer up. The next one is made at once, unless this one has
// brought nothing.
func (o *ordered) distrust(now int64, why error) {
	o.puller.forget()
	o.puller.open = false
	o.consumer, o.ask, o.trouble = "", false, why
	o.notBefore = now
	if o.received > o.mark {
		o.mark, o.pause.tries = o.received, 0
	} else {
		o.notBefore += int64(o.pause.next())
	}
}

// pull is the next request to send, when there is one, after all that has come was taken.
func (o *ordered) pull(now int64, want demand) (r pullRequest, ok bool) {
	o.starved = false
	if o.up && o.consumer != "" && o.puller.expire(now) {
		o.doubtful = true
		o.distrust(now, errSilent)
	}
	if o.over() || !o.up || o.consumer == "" || want.messages <= 0 || len(o.puller.pulls) >= orderedPulls {
		return r, false
	}
	if left := o.last - o.received; uint64(want.messages) >= left {
		// What is left is asked for at once.
		want.messages = int(left)
		want.refill = min(want.refill, max(want.messages-o.puller.outstanding, 1))
	}
	want.refill = min(want.refill, want.messages)
	r, ok = o.puller.next(now, want)
	o.starved = !ok && o.puller.starved && want.messages-o.puller.outstanding >= max(want.refill, 1)
	return r, ok
}

// next is what is to be done when no pull is to be sent.
func (o *ordered) next(now int64) orderedStep {
	if o.patience > 0 && now-o.progress > int64(o.patience) {
		o.fail(cmp.Or(o.trouble, errSilent))
	}
	step := orderedStep{kind: stepWait}
	soonest := func(t int64) {
		if t != 0 && (step.at == 0 || t < step.at) {
			step.at = t
		}
	}
	if o.patience > 0 {
		soonest(o.progress + int64(o.patience) + 1)
	}
	switch {
	case o.fault != nil:
		return orderedStep{kind: stepFail, err: o.fault}
	case o.done:
		return orderedStep{kind: stepDone}
	case !o.up:
	case o.consumer == "" && now >= o.notBefore:
		return orderedStep{kind: stepCreate, start: o.behind()}
	case o.consumer == "":
		soonest(o.notBefore)
	case o.ask:
		return orderedStep{kind: stepAsk, seq: o.received + 1}
	default:
		soonest(o.puller.wake(now))
		if o.starved {
			soonest(now + starvedPause)
		}
	}
	return step
}

// behind is where the next consumer starts.
func (o *ordered) behind() startAt {
	if !o.made {
		return o.start
	}
	return startAt{seq: o.received + 1}
}

// streamMark is what is known of a stream, to distinguish it later from another one of
// its name. A server may report another creation time after a restart
// (nats-server#8470), so a different one proves nothing: then the messages decide.
type streamMark struct {
	name    string
	created time.Time
	first   messageID // oldest message, zero for none
	last    messageID // the last one that was stored, zero for none
}

// kin is whether a stream is the one that was known.
type kin uint8

const (
	kinSame kin = iota
	kinOther
	kinUnsure // the last message received decides
)

func markOf(info *jetstream.StreamInfo) streamMark {
	s := info.State
	m := streamMark{name: info.Config.Name, created: info.Created}
	if s.Msgs > 0 {
		m.first = messageID{s.FirstSeq, s.FirstTime.UnixNano()}
	}
	if s.LastSeq > 0 {
		m.last = messageID{s.LastSeq, s.LastTime.UnixNano()}
	}
	return m
}

// compare judges what a stream says of itself now, when read is the last message received
// from the one that is known, zero for none.
func (m streamMark) compare(info *jetstream.StreamInfo, read messageID) kin {
	now := markOf(info)
	switch {
	case now.created.Equal(m.created):
		return kinSame
	case now.last.seq < max(m.last.seq, read.seq):
		if now.first.seq > 0 && now.first == m.first {
			return kinSame // it has lost its end
		}
		return kinOther
	case now.first.seq > 0 && now.first.seq < m.first.seq:
		return kinOther // what was deleted does not come back
	case now.first.seq > 0 && now.first.seq == m.first.seq:
		return kinIf(now.first == m.first)
	case now.last == m.last, read.seq == 0, info.State.FirstSeq > read.seq:
		return kinSame // its limits have passed what is known
	}
	return kinUnsure
}

// decide is compare once the stream was asked for the last message received: stored is
// nil when it does not have it.
func (m streamMark) decide(info *jetstream.StreamInfo, read messageID, stored *storedMsg) kin {
	if stored != nil {
		return kinIf(stored.time.UnixNano() == read.time)
	}
	// It was deleted by itself. In the same stream the messages ahead of it are older.
	return kinIf(info.State.FirstTime.UnixNano() <= read.time)
}

func kinIf(same bool) kin {
	if same {
		return kinSame
	}
	return kinOther
}
