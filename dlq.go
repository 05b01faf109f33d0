package natsx

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	headerPrefix  = "Natsx-"
	letterPrefix  = "Natsx-Dlq-"
	origPrefix    = "Natsx-Orig-"
	letterTry     = 2 * time.Second        // for one try to publish a letter
	letterPause   = 250 * time.Millisecond // before the first retry, then doubled
	letterPauseUp = 5 * time.Second        // at most
	// unsettledRest is how long a dead message stays unsettled that has no letter
	// with its payload, on a stream that would delete it when it is settled.
	unsettledRest = 10 * 365 * 24 * time.Hour
)

// letterBox holds the dead messages of one route that the DLQ did not take yet.
// Guarded by the pool's mutex.
type letterBox struct {
	queue  fifo[*delivery]
	down   bool // the last try failed: the route does not pull
	active bool // a goroutine writes
}

// letterTarget is the stream that captures a route's DLQ subject, as far as the
// user may know it. Guarded by the pool's mutex once the route runs.
type letterTarget struct {
	stream     string        // empty when it may not be asked for
	maxMsgSize int64         // 0 unlimited
	window     time.Duration // in which it knows an id again, 0 when that is unknown
	fault      error         // why the stream that was made anew would not keep letters
}

// checkDLQ makes sure that letters can be kept, and remembers where.
func (r *durableRoute) checkDLQ(ctx context.Context) error {
	subject := r.spec.route.dlq
	bad := func(format string, args ...any) error {
		return r.spec.fault("dlq", strconv.Quote(subject), fmt.Sprintf(format, args...), ErrBadDLQ)
	}
	names, err := r.streamNames(ctx, subject)
	switch {
	case errors.Is(err, ErrPermission):
		r.log.Warn("natsx: DLQ cannot be checked", "subject", subject, "error", err)
		return nil
	case err != nil:
		return r.spec.fault("dlq", strconv.Quote(subject), fmt.Sprintf("could not be looked up: %v", err), err)
	case len(names) == 0:
		return r.spec.fault("dlq", strconv.Quote(subject), "no stream captures it", fmt.Errorf("%w: %w", ErrBadDLQ, ErrNoStream))
	case len(names) > 1:
		return bad("several streams capture it: %q", names)
	}
	info, err := r.streamInfo(ctx, names[0])
	if errors.Is(err, ErrPermission) {
		r.log.Warn("natsx: DLQ cannot be checked", "subject", subject, "stream", names[0], "error", err)
		r.letterTarget = letterTarget{stream: names[0]}
		return nil
	}
	if err != nil {
		return r.spec.fault("dlq", strconv.Quote(subject), fmt.Sprintf("stream %q: %v", names[0], err), err)
	}
	if reason := letterFault(info, r.target.config); reason != "" {
		return bad("stream %q %s", names[0], reason)
	}
	c := info.Config
	if c.Discard == jetstream.DiscardOld && (c.MaxMsgs > 0 || c.MaxBytes > 0 || c.MaxMsgsPerSubject > 0) {
		r.log.Warn("natsx: the DLQ's stream discards old letters when it is full; DiscardNew keeps them", "stream", names[0])
	}
	if c.Duplicates < 2*r.spec.route.lease() {
		r.log.Warn("natsx: the DLQ's duplicate window is shorter than two ack waits: a process that dies while it writes a letter may leave it twice",
			"stream", names[0], "window", c.Duplicates)
	}
	if source := r.target.config; c.Storage == jetstream.MemoryStorage && source != nil && source.Storage == jetstream.FileStorage {
		r.log.Warn("natsx: the DLQ's stream keeps letters in memory, which ends with its server", "stream", names[0])
	}
	r.letterTarget = letterTarget{stream: names[0], maxMsgSize: max(int64(c.MaxMsgSize), 0), window: c.Duplicates}
	return nil
}

// letterFault tells why a stream cannot keep the letters of a source, or nothing.
// The source is nil when it is not known.
func letterFault(info *jetstream.StreamInfo, source *jetstream.StreamConfig) string {
	c := info.Config
	switch {
	case c.NoAck:
		return "does not acknowledge (NoAck)"
	case c.Sealed:
		return "is sealed"
	case c.Mirror != nil:
		return "is a mirror"
	case c.PersistMode == jetstream.AsyncPersistMode:
		return "acknowledges before it stores (async persist mode)"
	case c.Retention == jetstream.InterestPolicy:
		return "has interest retention: without a consumer of the subject it stores nothing, and acknowledges that"
	case c.MaxMsgSize > 0 && c.MaxMsgSize < smallestLetter:
		return fmt.Sprintf("has a MaxMsgSize of %d, too small for the headers of a letter, which need %d", c.MaxMsgSize, smallestLetter)
	case source == nil:
		return ""
	case c.Replicas < source.Replicas:
		return fmt.Sprintf("has %d replicas, fewer than the %d of the source %q", c.Replicas, source.Replicas, source.Name)
	case c.MaxMsgSize > 0 && (source.MaxMsgSize <= 0 || c.MaxMsgSize < source.MaxMsgSize):
		return fmt.Sprintf("has a MaxMsgSize of %d, smaller than that of the source %q", c.MaxMsgSize, source.Name)
	}
	return ""
}

// bury moves a dead message to the DLQ, on the worker while the DLQ takes
// letters, and returns true. Else the message is held, its lease kept, the route
// stops pulling, and one goroutine tries until the DLQ takes it: an
// acknowledgement without a stored letter would lose the message.
func (r *durableRoute) bury(d *delivery, reason Reason) bool {
	p := r.eng.pool
	d.letter = r.letter(d, reason)
	p.mu.Lock()
	down := r.letters.down
	p.mu.Unlock()
	if !down {
		err := r.moveLetter(r.eng.closing, d)
		if err == nil {
			return true
		}
		r.trouble("dlq", err)
	}
	d.held = true
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held++
	r.letters.queue.push(d)
	r.letters.down = true
	if !r.letters.active {
		r.letters.active = true
		r.eng.background.Go(r.writeLetters)
	}
	return false
}

// writeLetters moves held letters, the oldest first, until none is left.
func (r *durableRoute) writeLetters() {
	p := r.eng.pool
	pause := letterPause
	for {
		p.mu.Lock()
		if r.letters.queue.len() == 0 {
			r.letters.active, r.letters.down = false, false
			next := r.plan(r.eng.now())
			p.mu.Unlock()
			r.clear("dlq")
			r.pull(next)
			return
		}
		d := r.letters.queue.pop()
		p.mu.Unlock()
		for {
			err := r.moveLetter(r.eng.closing, d)
			if err == nil {
				pause = letterPause
				break
			}
			r.trouble("dlq", err)
			if !wait(r.eng.closing, pause) {
				return
			}
			pause = min(2*pause, letterPauseUp)
			r.refreshDLQ()
		}
		r.observe(d)
		p.mu.Lock()
		p.held--
		r.leases.remove(d)
		r.count(d)
		p.checkQuiet()
		p.mu.Unlock()
	}
}

// moveLetter publishes the letter of d and settles d once it is stored. Nil means
// that nothing is left to do, also since the lease is lost or the route is over:
// the next delivery brings the same letter again, under the same id.
func (r *durableRoute) moveLetter(ctx context.Context, d *delivery) error {
	if r.eng.now() >= d.lease.Load() || r.over.Load() {
		r.lapse(d)
		return nil
	}
	for !d.stored {
		err := r.storeLetter(ctx, d)
		if tooLarge(err) && d.form < letterForms-1 {
			d.form++
			d.letter = r.letter(d, Reason(d.letter.Header.Get(HeaderDLQReason)))
			continue
		}
		if err != nil {
			return fmt.Errorf("natsx: dead letter not stored in %q: %w", r.spec.route.dlq, err)
		}
		d.stored = true
	}
	settle := ackAck
	if d.letter.Header.Get(HeaderDLQPointer) != "" {
		settle = ackTerm("its dead letter points to it")
		if !r.target.keepsTerminated() {
			settle = ackNak(unsettledRest)
			d.due = d.ended + int64(unsettledRest)
		}
	}
	d.claim()
	if !r.confirm(ctx, d, settle) {
		if err := ctx.Err(); err != nil {
			return err
		}
		r.lapse(d)
	}
	return nil
}

// storeLetter publishes the letter of d once.
func (r *durableRoute) storeLetter(ctx context.Context, d *delivery) error {
	p := r.eng.pool
	p.mu.Lock()
	target := r.letterTarget
	p.mu.Unlock()
	if target.fault != nil {
		return target.fault
	}
	if target.stream != "" {
		d.letter.Header.Set(nats.ExpectedStreamHdr, target.stream)
	} else {
		d.letter.Header.Del(nats.ExpectedStreamHdr)
	}
	ctx, cancel := context.WithTimeout(ctx, letterTry)
	defer cancel()
	ack, err := publishOnce(ctx, r.eng.nc, d.letter)
	if err != nil || !ack.Duplicate || time.Since(r.target.consumerCreated) > target.window {
		return err
	}
	// A durable of the same name may have written the letter, and been deleted with
	// the letter gone since. That of this durable is in the DLQ, as far as anybody
	// can tell who may not look there.
	earlier, err := r.eng.store().get(ctx, ack.Stream, getRequest{Seq: ack.Sequence})
	if earlier != nil || errors.Is(err, ErrPermission) {
		return nil
	}
	if err == nil {
		id := fmt.Sprintf("%s/%d", letterID(d), r.target.consumerCreated.UnixNano())
		d.letter.Header.Set(nats.MsgIdHdr, id)
		_, err = publishOnce(ctx, r.eng.nc, d.letter)
	}
	return err
}

// refreshDLQ looks the DLQ's stream up again, which may have been made anew, with
// another name or as one that would not keep letters.
func (r *durableRoute) refreshDLQ() {
	ctx, cancel := context.WithTimeout(r.eng.closing, apiTimeout)
	defer cancel()
	var names []string
	err := r.eng.call(ctx, "STREAM.NAMES", func(ctx context.Context) (err error) {
		names, err = streamsFor(ctx, r.eng.js, r.spec.route.dlq)
		return err
	})
	if err != nil || len(names) != 1 {
		return
	}
	var fault error
	err = r.eng.call(ctx, "STREAM.INFO."+names[0], func(ctx context.Context) error {
		s, err := r.eng.js.Stream(ctx, names[0])
		if err != nil {
			return err
		}
		if reason := letterFault(s.CachedInfo(), r.target.config); reason != "" {
			fault = fmt.Errorf("%w: stream %q %s", ErrBadDLQ, names[0], reason)
		}
		return nil
	})
	if err != nil && !errors.Is(err, ErrPermission) {
		return
	}
	p := r.eng.pool
	p.mu.Lock()
	r.letterTarget.stream, r.letterTarget.fault = names[0], fault
	p.mu.Unlock()
}

// maxHeader is the size of a message's headers from which on no stream stores it.
const maxHeader = math.MaxUint16

// letter makes the dead letter of d. One that would be too large loses its error
// and stack, then the original's headers, then the payload. It is at least as
// small as the form d.form, and sets that.
func (r *durableRoute) letter(d *delivery, reason Reason) *nats.Msg {
	m := &d.msg
	attempts := m.Attempt()
	if reason == ReasonCrashed {
		attempts--
	}
	core := nats.Header{
		nats.MsgIdHdr:      {letterID(d)},
		HeaderDLQSubject:   {d.raw.Subject},
		HeaderDLQStream:    {m.Stream()},
		HeaderDLQSequence:  {strconv.FormatUint(m.seq, 10)},
		HeaderDLQDurable:   {m.Durable()},
		HeaderDLQAttempts:  {strconv.Itoa(attempts)},
		HeaderDLQReason:    {string(reason)},
		HeaderDLQTime:      {time.Now().UTC().Format(time.RFC3339Nano)},
		HeaderDLQPublished: {m.Time().UTC().Format(time.RFC3339Nano)},
		HeaderDLQHost:      {hostname},
	}
	maps.Copy(core, r.redriveHeaders(d.raw))
	text := r.eng.textOf(d.err)
	why := nats.Header{HeaderDLQError: {headerText(text, MaxLetterError)}}
	var panicked *PanicError
	if errors.As(d.err, &panicked) && len(panicked.Stack) > 0 {
		why.Set(HeaderDLQStack, headerText(string(panicked.Stack), MaxLetterStack))
	}
	brief := nats.Header{HeaderDLQError: {headerText(text, 128)}}
	pointer := nats.Header{HeaderDLQPointer: {"true"}}
	original := originalHeaders(d.raw.Header, len(d.raw.Data) == 0)

	limit := r.eng.nc.MaxPayload()
	if most := r.letterTarget.maxMsgSize; most > 0 {
		limit = min(limit, most)
	}
	forms := [letterForms]struct {
		headers []nats.Header
		data    []byte
	}{
		{[]nats.Header{original, why, core}, d.raw.Data},
		{[]nats.Header{original, brief, core}, d.raw.Data},
		{[]nats.Header{brief, core}, d.raw.Data},
		{[]nats.Header{original, why, core, pointer}, nil},
		{[]nats.Header{brief, core, pointer}, nil},
	}
	for ; ; d.form++ {
		letter := &nats.Msg{Subject: r.spec.route.dlq, Header: nats.Header{}, Data: forms[d.form].data}
		for _, h := range forms[d.form].headers {
			for k, v := range h {
				letter.Header[k] = v
			}
		}
		// The expected stream is added when it is published.
		size := messageSize(letter) + len(nats.ExpectedStreamHdr) + MaxNameLength + 4
		if d.form == letterForms-1 || size <= int(limit) && size-len(letter.Data) <= maxHeader {
			return letter
		}
	}
}

// letterForms is how many forms a letter has, from the whole to the smallest.
const letterForms = 5

// tooLarge tells that a smaller form of the letter may be stored where this one was
// not, as under a limit of the stream that the user may not ask for.
func tooLarge(err error) bool {
	return errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrBadHeaderMsg) ||
		hasCode(err, codeMessageTooLarge) || hasCode(err, codeHeaderTooLarge)
}

// textOf is the text of err for a letter. An error may panic when it is asked for
// it, as a nil pointer in an error does.
func (b *Broker) textOf(err error) (text string) {
	defer func() {
		if v := recover(); v != nil {
			text = fmt.Sprintf("%T without a text: %v", err, v)
		}
	}()
	return b.errorText(err)
}

var hostname, _ = os.Hostname()

// messageSize is what counts against the server's max payload: headers as they
// go over the wire, and data. It is of a message that is to be sent.
func messageSize(m *nats.Msg) int { return m.Size() - len(m.Subject) - len(m.Reply) }
