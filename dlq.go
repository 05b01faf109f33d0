package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	letterTry   = 2 * time.Second        // timeout of one try to publish a letter
	letterPause = 250 * time.Millisecond // before the first retry, then doubled
	// lettersNight is the shortest MaxAge of a DLQ without a warning: an operator needs
	// time to see a letter.
	lettersNight = 24 * time.Hour
	// unsettledRest is the nak delay of a dead message that must stay unsettled, since its
	// payload is in no letter and its stream would delete it.
	unsettledRest = 10 * 365 * 24 * time.Hour
)

// letterBox moves the dead messages of one route to its DLQ. While its outbox is active,
// the route does not pull.
type letterBox struct {
	outbox
	owner   letterOwner
	stream  string // of the route
	durable string
	retries string // name of the retry stream, empty for none

	target letterTarget // guarded by the pool's mutex
}

func (b *letterBox) init(r *route, owner letterOwner) {
	b.owner = owner
	b.outbox = outbox{route: r, owner: owner, kind: "dlq", pause: letterPause, pass: b.moveLetter, again: b.refreshDLQ}
}

// letterOwner settles the messages whose letters are stored.
type letterOwner interface {
	outboxOwner
	// confirm settles a message, and reports whether the server has confirmed it.
	confirm(ctx context.Context, w *work, ack []byte) bool
	// lapse leaves a message for redelivery.
	lapse(w *work)
	// keepsTerminated reports whether terminated messages stay in the stream.
	keepsTerminated() bool
	// source is the configuration of the route's stream, nil if unknown.
	source() *jetstream.StreamConfig
	// consumerCreated is when the durable was created, as far as known. The pool is locked.
	consumerCreated() time.Time
}

// letterTarget is the stream that captures a route's DLQ subject, as far as the
// user may know it. Guarded by the pool's mutex once the route runs.
type letterTarget struct {
	stream     string        // empty without the permission to read it
	maxMsgSize int64         // 0 for unlimited
	window     time.Duration // its duplicate window, 0 if unknown
	fault      error         // why the recreated stream could not keep letters
}

// check verifies that letters can be kept, and sets the target.
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
		return r.spec.fault("dlq", strconv.Quote(subject), "no stream captures it; "+r.env.api.nearStreams(ctx, "", subject), failure("dead letters would not be kept: no stream", ErrBadDLQ, ErrNoStream))
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
	r.env.foundStream(info)
	c := info.Config
	warn := func(what string, args ...any) {
		r.env.log.Warn("natsx: the DLQ's stream "+what, r.names(append(args, "stream", c.Name)...)...)
	}
	if c.Discard == jetstream.DiscardOld && (c.MaxMsgs > 0 || c.MaxBytes > 0 || c.MaxMsgsPerSubject > 0) {
		warn("discards old letters when it is full; DiscardNew keeps them")
	}
	if c.MaxAge > 0 && c.MaxAge < lettersNight {
		warn("may delete letters before an operator has seen them", "max_age", c.MaxAge)
	}
	if c.Duplicates < 2*r.spec.route.lease() {
		warn("has a duplicate window shorter than two ack waits: a letter may be stored twice if the process crashes while it publishes it", "window", c.Duplicates)
	}
	if source := b.owner.source(); c.Storage == jetstream.MemoryStorage && source != nil && source.Storage == jetstream.FileStorage {
		warn("keeps letters in memory, so that they are lost when its server stops")
	}
	b.target = letterTarget{stream: names[0], maxMsgSize: max(int64(c.MaxMsgSize), 0), window: c.Duplicates}
	return nil
}

// letterFault returns why a stream cannot keep the letters of a source on a subject, or
// "". The source is nil if unknown.
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

// transformed is the subject under which a stream stores a message on subject, or the
// destination of a transform that it does not evaluate.
func transformed(c *jetstream.StreamConfig, subject string) string {
	t := c.SubjectTransform
	if t == nil || t.Source == t.Destination || t.Source != "" && !subjectMatches(t.Source, subject) {
		return subject
	}
	return t.Destination
}

// bury moves a dead message to the DLQ on the worker and returns true. If the DLQ does not
// accept it, bury returns false: the message waits in the outbox and the route stops
// pulling. An acknowledgement without a stored letter would lose the message.
func (b *letterBox) bury(w *work) bool {
	w.letter = &heldLetter{text: b.route.env.textOf(w.err)}
	w.letter.msg = b.letter(w)
	return b.send(w)
}

// moveLetter publishes the letter of w and settles w once it is stored. It also returns nil
// if the lease is lost or the route is over: the redelivery makes the same letter with the
// same id.
func (b *letterBox) moveLetter(ctx context.Context, w *work) error {
	r := b.route
	l := w.letter
	lapse := func() {
		b.owner.lapse(w)
		if l.stored && l.msg.Header.Get(HeaderDLQPointer) == "" { // else the original must stay
			w.late = OutcomeDead
		}
	}
	if processTime() >= w.ends.Load() || r.over.Load() {
		lapse()
		return nil
	}
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
		lapse()
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
	// A deleted durable of the same name may have published a letter with the same id,
	// which may be removed since. Without the permission to read the DLQ, assume that the
	// letter is this durable's.
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

// refreshDLQ looks up the DLQ's stream again: it may have been recreated with another
// name, or so that it cannot keep letters.
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

// maxHeader is the size of headers from which on no stream stores a message.
const maxHeader = math.MaxUint16

// letter makes the dead letter of w. If it would be too large, it leaves out error and
// stack, then the original's headers, then the payload. It starts with the form of w's
// letter, and sets that.
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
	if b.retries != "" {
		core.Set(HeaderDLQRetryStream, b.retries)
	}
	if c := w.redrive; c != nil {
		core[HeaderDLQRedrives], core[HeaderDLQOriginal] = []string{strconv.Itoa(c.count)}, []string{c.original.String()}
	}
	why := nats.Header{HeaderDLQError: {headerText(l.text, maxLetterError)}}
	if panicked, ok := errors.AsType[*PanicError](w.err); ok && len(panicked.Stack) > 0 {
		why.Set(HeaderDLQStack, headerText(string(panicked.Stack), maxLetterStack))
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
		size := messageSize(letter) + len(nats.ExpectedStreamHdr) + maxNameLength + 4
		if l.form == letterForms-1 || size <= int(limit) && size-len(letter.Data) <= maxHeader {
			return letter
		}
	}
}

// letterForms is how many forms a letter has, from the complete to the smallest one.
const letterForms = 5

// tooLarge reports that the letter was refused for its size and a smaller form may be
// stored, as with a limit of the stream that the user may not read.
func tooLarge(err error) bool {
	return errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrBadHeaderMsg) ||
		hasCode(err, codeMessageTooLarge) || hasCode(err, codeHeaderTooLarge)
}

var hostname, _ = os.Hostname()
