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
	letterTry     = 2 * time.Second        // for one try to publish a letter
	letterPause   = 250 * time.Millisecond // before the first retry, then doubled
	letterPauseUp = 5 * time.Second        // at most
	// lettersNight is the shortest MaxAge of a DLQ that nobody is warned of: time for
	// somebody to see a letter.
	lettersNight = 24 * time.Hour
	// unsettledRest is how long a dead message stays unsettled that has no letter
	// with its payload, on a stream that would delete it when it is settled.
	unsettledRest = 10 * 365 * 24 * time.Hour
)

// letterBox moves the dead messages of one route to its DLQ, and holds those that the
// DLQ did not take yet.
type letterBox struct {
	route   *route
	owner   letterOwner
	passer  *passer
	stream  string // of the route
	durable string

	// Guarded by the pool's mutex.
	queue  fifo[*work]
	down   bool // the last try failed: the route does not pull
	active bool // a goroutine writes
	target letterTarget
}

// letterOwner settles the messages whose letters are stored.
type letterOwner interface {
	// confirm settles a message until the server confirms that, and reports whether it did.
	confirm(ctx context.Context, w *work, ack []byte) bool
	// lapse leaves a message to its next delivery.
	lapse(w *work)
	// keepsTerminated reports whether a message stays in its stream when it is terminated.
	keepsTerminated() bool
	// source is the configuration of the route's stream, nil when it is not known.
	source() *jetstream.StreamConfig
	// consumerCreated is when the durable was made, as far as known. The pool is locked.
	consumerCreated() time.Time
	// book ends the engine's part in a message whose letter was held. The pool is locked.
	book(w *work)
	// flow plans the next pull when no letter is held any more.
	flow()
}

// letterTarget is the stream that captures a route's DLQ subject, as far as the
// user may know it. Guarded by the pool's mutex once the route runs.
type letterTarget struct {
	stream     string        // empty when it may not be asked for
	maxMsgSize int64         // 0 unlimited
	window     time.Duration // in which it knows an id again, 0 when that is unknown
	fault      error         // why the stream that was made anew would not keep letters
}

// check makes sure that letters can be kept, and remembers where.
func (b *letterBox) check(ctx context.Context) error {
	r := b.route
	subject := r.spec.route.dlq
	bad := func(format string, args ...any) error {
		return r.spec.fault("dlq", strconv.Quote(subject), fmt.Sprintf(format, args...), ErrBadDLQ)
	}
	var names []string
	err := r.tryOn(ctx, func(ctx context.Context) (err error) {
		names, err = r.env.api.streamNames(ctx, subject)
		return err
	})
	switch {
	case errors.Is(err, ErrPermission):
		r.env.log.Warn("natsx: DLQ cannot be checked", r.names("subject", subject, "error", err)...)
		return nil
	case err != nil:
		return r.spec.fault("dlq", strconv.Quote(subject), "could not be looked up: "+cause(err), err)
	case len(names) == 0:
		return r.spec.fault("dlq", strconv.Quote(subject), "no stream captures it", fmt.Errorf("%w: %w", ErrBadDLQ, ErrNoStream))
	case len(names) > 1:
		return bad("several streams capture it: %q", names)
	}
	info, err := r.streamInfo(ctx, names[0])
	if errors.Is(err, ErrPermission) {
		r.env.log.Warn("natsx: DLQ cannot be checked", r.names("subject", subject, "stream", names[0], "error", err)...)
		b.target = letterTarget{stream: names[0]}
		return nil
	}
	if err != nil {
		return r.spec.fault("dlq", strconv.Quote(subject), fmt.Sprintf("stream %q: %s", names[0], cause(err)), err)
	}
	if reason := letterFault(&info.Config, b.owner.source(), subject); reason != "" {
		return bad("stream %q %s", names[0], reason)
	}
	c := info.Config
	warn := func(what string, args ...any) {
		r.env.log.Warn("natsx: the DLQ's stream "+what, r.names(append(args, "stream", c.Name)...)...)
	}
	if c.Discard == jetstream.DiscardOld && (c.MaxMsgs > 0 || c.MaxBytes > 0 || c.MaxMsgsPerSubject > 0) {
		warn("discards old letters when it is full; DiscardNew keeps them")
	}
	if c.MaxAge > 0 && c.MaxAge < lettersNight {
		warn("deletes letters before somebody may have seen them", "max_age", c.MaxAge)
	}
	if c.Duplicates < 2*r.spec.route.lease() {
		warn("has a duplicate window shorter than two ack waits: a process that dies while it writes a letter may leave it twice", "window", c.Duplicates)
	}
	if source := b.owner.source(); c.Storage == jetstream.MemoryStorage && source != nil && source.Storage == jetstream.FileStorage {
		warn("keeps letters in memory, which ends with its server")
	}
	b.target = letterTarget{stream: names[0], maxMsgSize: max(int64(c.MaxMsgSize), 0), window: c.Duplicates}
	return nil
}

// letterFault is why a stream cannot keep the letters of a source on a subject, or
// nothing. The source is nil when it is not known.
func letterFault(c, source *jetstream.StreamConfig, subject string) string {
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
	case c.AllowMsgCounter:
		return "holds counters, and takes no other messages"
	case c.Discard == jetstream.DiscardNew && c.DiscardNewPerSubject && c.MaxMsgsPerSubject == 1:
		return "keeps one message a subject and refuses the next, so that it has room for one letter"
	case transformed(c, subject) != subject:
		return fmt.Sprintf("would store letters on the subject %q", transformed(c, subject))
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

// transformed is the subject on which a stream stores what is published to subject; a
// transform that it does not work out it names by its destination.
func transformed(c *jetstream.StreamConfig, subject string) string {
	t := c.SubjectTransform
	if t == nil || t.Source == t.Destination || t.Source != "" && !subjectMatches(t.Source, subject) {
		return subject
	}
	return t.Destination
}

// bury moves a dead message to the DLQ, on the worker while the DLQ takes
// letters, and returns true. Else the message is held, its lease kept, the route
// stops pulling, and one goroutine tries until the DLQ takes it: an
// acknowledgement without a stored letter would lose the message.
func (b *letterBox) bury(w *work) bool {
	r, p := b.route, b.route.env.pool
	w.letter = &heldLetter{text: r.env.textOf(w.err)}
	w.letter.msg = b.letter(w)
	p.mu.Lock()
	down := b.down
	p.mu.Unlock()
	if !down {
		err := b.moveLetter(r.env.closing, w)
		if err == nil {
			return true
		}
		r.trouble("dlq", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w.letter.held = true
	p.held++
	b.queue.push(w)
	b.down = true
	if !b.active {
		b.active = true
		r.env.spawn(b.writeLetters)
	}
	return false
}

// writeLetters moves held letters, the oldest first, until none is left.
func (b *letterBox) writeLetters() {
	r, p := b.route, b.route.env.pool
	for {
		p.mu.Lock()
		if b.queue.len() == 0 {
			b.active, b.down = false, false
			p.mu.Unlock()
			r.clear("dlq")
			b.owner.flow()
			return
		}
		w := b.queue.pop()
		p.mu.Unlock()
		pause := backoff{first: letterPause, most: letterPauseUp}
		for {
			err := b.moveLetter(r.env.closing, w)
			if err == nil {
				break
			}
			r.trouble("dlq", err)
			if !pause.wait(r.env.closing) {
				return
			}
			b.refreshDLQ()
		}
		if r.env.observer != nil {
			r.env.callUserApart(r.observing(), func() { r.notifyObserver(w) })
		}
		p.mu.Lock()
		p.held--
		b.owner.book(w)
		p.checkDrained()
		p.mu.Unlock()
	}
}

// moveLetter publishes the letter of w and settles w once it is stored. Nil means
// that nothing is left to do, also since the lease is lost or the route is over:
// the next delivery brings the same letter again, under the same id.
func (b *letterBox) moveLetter(ctx context.Context, w *work) error {
	r := b.route
	if processTime() >= w.ends.Load() || r.over.Load() {
		b.owner.lapse(w)
		return nil
	}
	l := w.letter
	for !l.stored {
		err := b.storeLetter(ctx, w)
		if tooLarge(err) && l.form < letterForms-1 {
			l.form++
			l.msg = b.letter(w)
			continue
		}
		if err != nil {
			return failure(fmt.Sprintf("dead letter not stored in %q: %s", r.spec.route.dlq, cause(err)), err)
		}
		l.stored = true
	}
	settle := ackAck
	if l.msg.Header.Get(HeaderDLQPointer) != "" {
		settle = ackTerm("its dead letter points to it")
		if !b.owner.keepsTerminated() {
			settle = ackNak(unsettledRest)
			w.due = w.ended + int64(unsettledRest)
		}
	}
	w.claim()
	if w.confirmed = b.owner.confirm(ctx, w, settle); !w.confirmed {
		if err := ctx.Err(); err != nil {
			return err
		}
		b.owner.lapse(w)
	}
	return nil
}

// storeLetter publishes the letter of w once.
func (b *letterBox) storeLetter(ctx context.Context, w *work) error {
	r, letter := b.route, w.letter.msg
	p := r.env.pool
	p.mu.Lock()
	target, created := b.target, b.owner.consumerCreated()
	p.mu.Unlock()
	if target.fault != nil {
		return target.fault
	}
	if target.stream != "" {
		letter.Header.Set(nats.ExpectedStreamHdr, target.stream)
	} else {
		letter.Header.Del(nats.ExpectedStreamHdr)
	}
	ctx, cancel := context.WithTimeout(ctx, letterTry)
	defer cancel()
	ack, err := publishOnce(ctx, r.env.api.nc, letter)
	if err != nil || !ack.Duplicate || time.Since(created) > target.window {
		return err
	}
	// A durable of the same name may have written the letter, and been deleted with
	// the letter gone since. That of this durable is in the DLQ, as far as anybody
	// can tell who may not look there.
	earlier, err := r.env.api.get(ctx, ack.Stream, getRequest{Seq: ack.Sequence})
	if earlier != nil || errors.Is(err, ErrPermission) {
		return nil
	}
	if err == nil {
		letter.Header.Set(nats.MsgIdHdr, letter.Header.Get(nats.MsgIdHdr)+"/"+strconv.FormatInt(created.UnixNano(), 10))
		_, err = publishOnce(ctx, r.env.api.nc, letter)
	}
	return err
}

// refreshDLQ looks the DLQ's stream up again, which may have been recreated, with
// another name or as one that would not keep letters.
func (b *letterBox) refreshDLQ() {
	r := b.route
	ctx, cancel := context.WithTimeout(r.env.closing, apiTimeout)
	defer cancel()
	names, err := r.env.api.streamNames(ctx, r.spec.route.dlq)
	if err != nil || len(names) != 1 {
		return
	}
	var fault error
	info, err := r.env.api.streamInfo(ctx, names[0])
	if err != nil && !errors.Is(err, ErrPermission) {
		return
	}
	if err == nil {
		if reason := letterFault(&info.Config, b.owner.source(), r.spec.route.dlq); reason != "" {
			fault = fmt.Errorf("%w: stream %q %s", ErrBadDLQ, names[0], reason)
		}
	}
	p := r.env.pool
	p.mu.Lock()
	b.target.stream, b.target.fault = names[0], fault
	p.mu.Unlock()
}

// maxHeader is the size of a message's headers from which on no stream stores it.
const maxHeader = math.MaxUint16

// letter makes the dead letter of w. One that would be too large loses its error
// and stack, then the original's headers, then the payload. It is at least as
// small as the form of w's letter, and sets that.
func (b *letterBox) letter(w *work) *nats.Msg {
	r := b.route
	l := w.letter
	core := nats.Header{
		nats.MsgIdHdr:      {b.stream + "/" + b.durable + "/" + w.life()},
		HeaderDLQSubject:   {w.raw.Subject},
		HeaderDLQStream:    {b.stream},
		HeaderDLQSequence:  {strconv.FormatUint(w.source.seq, 10)},
		HeaderDLQDurable:   {b.durable},
		HeaderDLQAttempts:  {strconv.Itoa(w.msg.Attempt())},
		HeaderDLQReason:    {string(w.reason)},
		HeaderDLQTime:      {time.Now().UTC().Format(time.RFC3339Nano)},
		HeaderDLQPublished: {time.Unix(0, w.source.time).UTC().Format(time.RFC3339Nano)},
		HeaderDLQHost:      {hostname},
	}
	maps.Copy(core, b.passer.redriveHeaders(w.raw))
	why := nats.Header{HeaderDLQError: {headerText(l.text, MaxLetterError)}}
	if panicked, ok := errors.AsType[*PanicError](w.err); ok && len(panicked.Stack) > 0 {
		why.Set(HeaderDLQStack, headerText(string(panicked.Stack), MaxLetterStack))
	}
	brief := nats.Header{HeaderDLQError: {headerText(l.text, 128)}}
	pointer := nats.Header{HeaderDLQPointer: {"true"}}
	original := originalHeaders(w.raw.Header, len(w.raw.Data) == 0)

	limit := r.env.api.nc.MaxPayload()
	if most := b.target.maxMsgSize; most > 0 {
		limit = min(limit, most)
	}
	forms := [letterForms]struct {
		headers []nats.Header
		data    []byte
	}{
		{[]nats.Header{original, why, core}, w.raw.Data},
		{[]nats.Header{original, brief, core}, w.raw.Data},
		{[]nats.Header{brief, core}, w.raw.Data},
		{[]nats.Header{original, why, core, pointer}, nil},
		{[]nats.Header{brief, core, pointer}, nil},
	}
	for ; ; l.form++ {
		letter := &nats.Msg{Subject: r.spec.route.dlq, Header: nats.Header{}, Data: forms[l.form].data}
		for _, h := range forms[l.form].headers {
			for k, v := range h {
				letter.Header[k] = v
			}
		}
		// The expected stream is added when it is published.
		size := messageSize(letter) + len(nats.ExpectedStreamHdr) + MaxNameLength + 4
		if l.form == letterForms-1 || size <= int(limit) && size-len(letter.Data) <= maxHeader {
			return letter
		}
	}
}

// letterForms is how many forms a letter has, from the whole to the smallest.
const letterForms = 5

// tooLarge reports that a smaller form of the letter may be stored where this one was
// not, as under a limit of the stream that the user may not ask for.
func tooLarge(err error) bool {
	return errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrBadHeaderMsg) ||
		hasCode(err, codeMessageTooLarge) || hasCode(err, codeHeaderTooLarge)
}

var hostname, _ = os.Hostname()
