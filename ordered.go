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
	// orderedBeat its idle heartbeat.
	orderedStay = 30 * time.Second
	orderedBeat = time.Second
	// orderedPulls is the most pulls of one reader at the server.
	orderedPulls = 32
	// orderedMisses is how many times in a row a stream must be unknown to the server
	// before it counts as deleted: a server that has just started may not know it yet.
	orderedMisses = 4
)

var (
	errGap         = errors.New("natsx: the consumer skipped a message")
	errSilent      = errors.New("natsx: the server does not answer")
	errLags        = errors.New("natsx: the consumer lags behind the stream's leader")
	errReconnected = errors.New("natsx: the connection was replaced")
)

// startPoint is where a consumer starts: at a sequence or, if that is 0, at a time.
type startPoint struct {
	seq  uint64
	time time.Time
}

func (s startPoint) apply(cfg *jetstream.ConsumerConfig) {
	if s.seq > 0 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, s.seq
		return
	}
	cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &s.time
}

// ordered reads a part of a stream in order, and each message once. It is a state machine
// without clock, lock or connection: its owner reports events and executes what pull and
// next return.
//
// It reads through an ephemeral consumer without acknowledgements. After a gap in the
// consumer sequence, missed heartbeats, a reconnect, a refused pull or a deletion it
// makes a new consumer that starts after the last message received. A consumer cannot
// tell the end of the part reliably: its server may lag behind the stream's leader, and
// messages that it counted may be deleted. So the leader is asked.
type ordered struct {
	start    startPoint    // of the first consumer
	last     uint64        // highest sequence of the part
	lenient  bool          // without the permission to ask the leader, trust the consumer
	single   bool          // with lenient: there is one replica, so always trust the consumer
	patience time.Duration // how long to wait for the next message, 0 for ever
	puller   puller

	consumer    string    // empty while there is none
	consumerSeq uint64    // consumer sequence of its last message
	read        messageID // the last message received
	received    uint64    // all up to this sequence were received, or are not in the part
	begun       bool      // a message at or after the start has arrived
	made        bool      // a first consumer was made
	ahead       uint64    // messages pending for it then, including those after the part

	up        bool  // the connection is up
	session   int64 // counts its connects
	progress  int64 // when something was last received
	notBefore int64 // no consumer is made before this time
	pause     backoff
	mark      uint64 // value of received when a consumer was last abandoned
	tries     int    // failed attempts to make a consumer, in a row
	misses    int    // times that the stream was not found, in a row
	doubtful  bool   // the connection may be dead
	ask       bool   // ask the leader for the end
	starved   bool   // the byte budget did not allow the last pull

	trouble error // why there is no consumer, nil for none
	done    bool  // everything was received
	fault   error // what ended it instead
}

// stepKind is what the owner is to do.
type stepKind uint8

const (
	stepWait   stepKind = iota // for messages, until a time
	stepCreate                 // make a consumer
	stepAsk                    // ask the leader for the first message from a sequence on
	stepDone                   // everything was received
	stepFail                   // it cannot go on
)

// orderedStep is what the owner is to do, with its arguments.
type orderedStep struct {
	kind  stepKind
	at    int64      // of stepWait: when to call next even if nothing happens, 0 for never
	start startPoint // of stepCreate
	seq   uint64     // of stepAsk
	err   error      // of stepFail
}

func newOrdered(start startPoint, last uint64) ordered {
	o := ordered{start: start, last: last, begun: start.seq > 0, pause: backoff{first: 50 * time.Millisecond, most: 2 * time.Second}}
	if start.seq > 0 {
		o.received = start.seq - 1
		o.mark = o.received
	}
	return o
}

func (o *ordered) over() bool { return o.done || o.fault != nil }

// fail ends the reading with an error, unless it is over.
func (o *ordered) fail(err error) {
	if !o.over() {
		o.fault = err
	}
}

// resume is called when the owner goes on after it was busy with what it received.
func (o *ordered) resume(now int64) { o.progress = now }

// connection updates whether the connection is up, and its session.
func (o *ordered) connection(now int64, up bool, session int64) {
	if o.session != session && o.consumer != "" {
		o.abandonConsumer(now, errReconnected)
	}
	o.up, o.session = up, session
}

// created accepts a new consumer.
func (o *ordered) created(now int64, info *jetstream.ConsumerInfo) {
	if !o.made {
		o.made, o.ahead = true, info.NumPending
		o.received = max(o.received, info.Delivered.Stream)
	}
	o.consumer, o.consumerSeq = info.Name, 0
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

// notCreated handles the failure of a stepCreate.
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

// message accepts a message of size bytes and reports whether it is the next of the part.
func (o *ordered) message(now int64, m ackInfo, size int) (next bool) {
	if o.over() || m.consumer != o.consumer {
		return false
	}
	o.puller.message(now, size)
	if o.consumerSeq++; m.consumerSeq != o.consumerSeq {
		o.abandonConsumer(now, errGap)
		return false
	}
	switch {
	case m.sequence > o.last:
		o.done = true
		return false
	case m.sequence > o.received:
		o.received, o.read, o.progress = m.sequence, messageID{m.sequence, m.time}, now
		next, o.ask = true, false
		// A replica that lags behind may start too early, since it does not have the
		// start yet.
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

// end handles the end of the consumer's messages, which may be the end of the part.
func (o *ordered) end() {
	if o.lenient && o.single {
		o.done = true
	}
	o.ask = true
}

// status handles a pull status message.
func (o *ordered) status(now int64, s pullStatus) {
	if o.over() || !slices.ContainsFunc(o.puller.pulls, func(p pull) bool { return p.token == s.token }) {
		return // of an earlier consumer, or of a pull that is complete
	}
	switch o.puller.status(now, s) {
	case pullGoesOn, pullWoken:
		// Nothing arrived for a while, although more is expected.
		o.ask = o.ask || s.kind == statusHeartbeat || s.kind == statusNoMessages || s.code == "408" && s.left > 0
	default:
		o.abandonConsumer(now, &pullError{s.code, s.text})
	}
}

// answered handles the leader's answer: the sequence of the first message that was not
// received, 0 for none. more reports that messages have arrived meanwhile.
func (o *ordered) answered(now int64, seq uint64, err error, more bool) {
	o.ask = false
	switch {
	case errors.Is(err, ErrPermission):
		if o.lenient {
			o.done = true
		} else {
			o.fail(err)
		}
	case err != nil: // of the leader or the connection
		o.doubtful = true
		o.abandonConsumer(now, err)
	case seq == 0 || seq > o.last:
		o.done = true
	case !more:
		o.abandonConsumer(now, errLags)
	}
}

// abandonConsumer gives the consumer up. The next one is made at once, or after a pause if
// this one has delivered nothing.
func (o *ordered) abandonConsumer(now int64, why error) {
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

// pull returns the next request to send, if there is one. All messages that have arrived
// must have been reported before.
func (o *ordered) pull(now int64, want demand) (r pullRequest, ok bool) {
	o.starved = false
	if o.up && o.consumer != "" && o.puller.expire(now) {
		o.doubtful = true
		o.abandonConsumer(now, errSilent)
	}
	if o.over() || !o.up || o.consumer == "" || want.messages <= 0 || len(o.puller.pulls) >= orderedPulls {
		return r, false
	}
	if left := o.last - o.received; uint64(want.messages) >= left {
		// Ask for all that is left at once.
		want.messages = int(left)
		want.refill = min(want.refill, max(want.messages-o.puller.outstanding, 1))
	}
	want.refill = min(want.refill, want.messages)
	r, ok = o.puller.next(now, want)
	o.starved = !ok && o.puller.starved && want.messages-o.puller.outstanding >= max(want.refill, 1)
	return r, ok
}

// next returns what to do when there is no pull to send.
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
		return orderedStep{kind: stepCreate, start: o.nextStart()}
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

// nextStart is where the next consumer starts.
func (o *ordered) nextStart() startPoint {
	if !o.made {
		return o.start
	}
	return startPoint{seq: o.received + 1}
}

// streamMark identifies a stream, to distinguish it later from another one of the same
// name. A server may report a different creation time after a restart
// (nats-server#8470); then the messages decide.
type streamMark struct {
	name    string
	created time.Time
	first   messageID // oldest message, zero for none
	last    messageID // the last one that was stored, zero for none
}

// streamMatch is the result of a comparison of streams.
type streamMatch uint8

const (
	streamSame streamMatch = iota
	streamOther
	streamUnsure // the last message received decides
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

// compare reports whether info is of the marked stream. read is the last message received
// from that, zero for none.
func (m streamMark) compare(info *jetstream.StreamInfo, read messageID) streamMatch {
	now := markOf(info)
	switch {
	case now.created.Equal(m.created):
		return streamSame
	case now.last.seq < max(m.last.seq, read.seq):
		if now.first.seq > 0 && now.first == m.first {
			return streamSame // it has lost its last messages
		}
		return streamOther
	case now.first.seq > 0 && now.first.seq < m.first.seq:
		return streamOther // deleted messages do not come back
	case now.first.seq > 0 && now.first.seq == m.first.seq:
		return streamIf(now.first == m.first)
	case now.last == m.last, read.seq == 0, info.State.FirstSeq > read.seq:
		return streamSame // its limits have removed what could be compared
	}
	return streamUnsure
}

// decide settles streamUnsure by the message that the stream has at the sequence of the
// last message received: stored, nil if there is none.
func (m streamMark) decide(info *jetstream.StreamInfo, read messageID, stored *storedMsg) streamMatch {
	if stored != nil {
		return streamIf(stored.time.UnixNano() == read.time)
	}
	// It was deleted. In the same stream the messages before it are older.
	return streamIf(info.State.FirstTime.UnixNano() <= read.time)
}

func streamIf(same bool) streamMatch {
	if same {
		return streamSame
	}
	return streamOther
}
