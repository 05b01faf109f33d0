package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// copyTry is for one try to store a copy, and copyPause before the first retry, then
	// doubled.
	copyTry   = 2 * time.Second
	copyPause = 100 * time.Millisecond
	// mostHeldCopies is how many messages a route holds which the retry stream does not
	// take, before it stops pulling.
	mostHeldCopies = 1000
	// returnersAtOnce is how many messages are moved at the same time at a stop.
	returnersAtOnce = 32
)

// retryStream is the stream that a broker keeps its retries in. Fixed once it is open.
type retryStream struct {
	name       string
	prefix     string // of its subjects
	maxMsgSize int64  // 0 unlimited
	maxAge     time.Duration
	keeps      bool // it keeps what is acknowledged, unless natsx deletes it
	config     *jetstream.StreamConfig
	undeleted  sync.Once // the user may not delete, which is logged
}

func (s *retryStream) fault(field, value, reason string, err error) error {
	return &StreamError{Stream: s.name, Field: field, Value: value, Reason: "the retry stream " + reason, Err: err}
}

// serverFault is an error if a server of this version keeps no schedules.
func (s *retryStream) serverFault(version string) error {
	if olderThan(version, 2, 12) {
		return s.fault("allowMsgSchedules", "", fmt.Sprintf("needs nats-server 2.12, this is %s", version), ErrServerTooOld)
	}
	return nil
}

// open finds the stream, or makes it, and judges whether it can keep the retries of
// sources, which are the streams of the routes.
func (s *retryStream) open(ctx context.Context, a *api, log *slog.Logger, sources []*jetstream.StreamConfig) error {
	var info *jetstream.StreamInfo
	look := func(ctx context.Context) (err error) {
		info, err = a.streamInfo(ctx, s.name)
		return err
	}
	absent := func(err error) bool { return hasCode(err, codeStreamNotFound) }
	err := retry{enough: absent}.do(ctx, look)
	if absent(err) {
		made := RetryStream(s.name)
		for _, c := range sources {
			made = made.Replicas(max(made.replicas, c.Replicas, 1))
		}
		if err = made.ensure(ctx, a, log); err == nil {
			log.Info("natsx: retry stream created", "stream", s.name, "replicas", max(made.replicas, 1))
			err = retry{}.do(ctx, look)
		}
	}
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		return s.fault("name", strconv.Quote(s.name), "is not there and could not be made: "+cause(err), err)
	}
	return s.judge(&info.Config, log, sources)
}

// judge takes over the stream's configuration, unless messages could be lost in it.
func (s *retryStream) judge(c *jetstream.StreamConfig, log *slog.Logger, sources []*jetstream.StreamConfig) error {
	bad := func(field, value, format string, args ...any) error {
		return s.fault(field, value, fmt.Sprintf(format, args...), ErrBadRetryStream)
	}
	switch {
	case retryPrefix(c) == "":
		return bad("subjects", fmt.Sprintf("%q", c.Subjects), "needs a subject such as %q", s.name+".>")
	case !c.AllowMsgSchedules:
		return bad("allowMsgSchedules", "false", "needs AllowMsgSchedules, which can be switched on")
	case c.Retention == jetstream.InterestPolicy:
		return bad("retention", c.Retention.String(), "must not have interest retention, which drops schedules; make it with RetryStream")
	case c.NoAck:
		return bad("noAck", "true", "must acknowledge what it stores")
	case c.Sealed:
		return bad("sealed", "true", "is sealed")
	case c.PersistMode == jetstream.AsyncPersistMode:
		return bad("persistMode", "async", "must not acknowledge before it stores")
	case c.SubjectTransform != nil:
		return bad("subjectTransform", "", "must not transform subjects")
	}
	for _, source := range sources {
		switch {
		case source.Name == s.name:
			return bad("name", strconv.Quote(s.name), "is the stream of a route, and needs to be one of its own")
		case c.Replicas < source.Replicas:
			return bad("replicas", strconv.Itoa(c.Replicas), "needs at least the %d replicas of stream %q", source.Replicas, source.Name)
		case c.MaxMsgSize > 0 && (source.MaxMsgSize <= 0 || c.MaxMsgSize < source.MaxMsgSize):
			return bad("maxMsgSize", strconv.Itoa(int(c.MaxMsgSize)), "must not have a smaller one than stream %q", source.Name)
		}
	}
	warn := func(what string, args ...any) {
		log.Warn("natsx: the retry stream "+what, append(args, "stream", s.name)...)
	}
	if c.MaxMsgs > 0 || c.MaxBytes > 0 {
		warn("deletes the oldest retries when it is full, which loses messages", "max_msgs", c.MaxMsgs, "max_bytes", c.MaxBytes)
	}
	if c.MaxAge > 0 {
		warn("deletes retries that nobody has handled in time, which loses messages", "max_age", c.MaxAge)
	}
	if c.Storage == jetstream.MemoryStorage && slices.ContainsFunc(sources, func(source *jetstream.StreamConfig) bool { return source.Storage == jetstream.FileStorage }) {
		warn("keeps retries in memory, which ends with its server")
	}
	s.prefix = retryPrefix(c)
	s.maxMsgSize, s.maxAge = max(int64(c.MaxMsgSize), 0), c.MaxAge
	s.keeps = c.Retention == jetstream.LimitsPolicy
	s.config = c
	return nil
}

// mover moves the messages of one durable to its broker's retry stream.
//
// A message is moved in two steps, each of which is confirmed: the copy is stored, then
// the message is settled where it was. Whoever dies between the two leaves both. The copy
// settles what it was made of before it is handled, so that this is never delivered
// again afterwards. And what is delivered again is not handled where it is: it is moved,
// unless a copy of it is in the retry stream, and by the copy's message id that happens
// once. So of all places that hold a message, one is handled.
type mover struct {
	outbox
	owner moverOwner
	to    *retryStream
	retryPlace
	floors [2]atomic.Uint64 // up to where the durable, and that of the copies, have settled all
}

func newMover(r *route, owner moverOwner, to *retryStream) *mover {
	v := &mover{owner: owner, to: to}
	v.outbox = outbox{route: r, owner: owner, kind: "retryStream", pause: copyPause, pass: v.moveCopy}
	return v
}

// moverOwner settles the messages that are moved.
type moverOwner interface {
	outboxOwner
	// confirm settles a message until the server confirms that, and reports whether it did.
	confirm(ctx context.Context, w *work, ack []byte) bool
	// lapse leaves a message to its next delivery.
	lapse(w *work)
}

// takes reports whether a message can be moved. One that is nearly as large as the server
// takes cannot, since neither a copy with its headers nor a letter made of that would.
func (v *mover) takes(w *work) bool {
	if v == nil {
		return false
	}
	limit := v.route.env.api.nc.MaxPayload()
	if v.to.maxMsgSize > 0 {
		limit = min(limit, v.to.maxMsgSize)
	}
	return int64(messageSize(w.raw)+smallestLetter) <= limit
}

// writes reports whether the mover stores copies on a subject.
func (v *mover) writes(subject string) bool {
	of := "." + v.stream + "." + v.durable + "."
	return strings.HasPrefix(subject, v.prefix+".wait"+of) || strings.HasPrefix(subject, v.prefix+".due"+of)
}

// copyOf is what the next copy of w says.
func (v *mover) copyOf(w *work, attempt uint32, lost uint64) retryCopy {
	c := retryCopy{
		stream: v.stream, durable: v.durable, subject: w.raw.Subject, id: w.source, life: w.life(), number: w.number + 1,
		attempt: attempt, lost: lost, from: w.raw.Reply,
	}
	if w.err != nil {
		c.text = v.route.env.textOf(w.err)
	}
	return c
}

// move moves w, on the worker while the retry stream accepts copies, and returns true. If
// it does not, w waits in the outbox.
func (v *mover) move(w *work, delay time.Duration, attempt uint32, lost uint64) bool {
	c := v.copyOf(w, attempt, lost)
	at := time.Time{}
	w.due = w.ended + int64(delay)
	if delay > 0 {
		at = time.Now().Add(delay)
	}
	w.copy = &heldCopy{msg: v.message(&c, w.raw, at)}
	return v.send(w)
}

// full reports that as much waits as the route may hold. The pool is locked.
func (v *mover) full() bool { return v != nil && v.queue.len() >= mostHeldCopies }

// moveCopy stores the copy of w and then settles w. Nil means that nothing is left to do,
// also since the lease is lost or the route is over: the next delivery is moved in its
// place.
func (v *mover) moveCopy(ctx context.Context, w *work) error {
	if processTime() >= w.ends.Load() || v.route.over.Load() {
		v.owner.lapse(w)
		return nil
	}
	if !w.copy.stored {
		if err := v.store(ctx, w); err != nil {
			return failure(fmt.Sprintf("retry not stored in stream %q: %s", v.to.name, cause(err)), err)
		}
		w.copy.stored = true
	}
	w.claim()
	if w.confirmed = v.owner.confirm(ctx, w, ackAck); !w.confirmed {
		if err := ctx.Err(); err != nil {
			return err
		}
		v.owner.lapse(w)
	} else {
		v.forget(ctx, w)
	}
	return nil
}

// store makes sure that the copy of w is in the stream.
func (v *mover) store(ctx context.Context, w *work) error {
	a := v.route.env.api
	if w.again {
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		last, err := a.get(ctx, v.to.name, getRequest{LastFor: v.anyOf(w.life())})
		if err != nil && !errors.Is(err, ErrPermission) {
			return err
		}
		if last != nil && copyNumber(last.subject) > w.number {
			return nil // it was moved before
		}
	}
	w.copy.msg.Header.Set(nats.ExpectedStreamHdr, v.to.name)
	ctx, cancel := context.WithTimeout(ctx, copyTry)
	defer cancel()
	return requestWith(ctx, a.nc, w.copy.msg.Subject, func(ctx context.Context) error {
		_, err := publishOnce(ctx, a.nc, w.copy.msg)
		return err
	})
}

// forget deletes a copy that was acknowledged from a stream that keeps it.
func (v *mover) forget(ctx context.Context, w *work) {
	if w.number == 0 || !v.to.keeps {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	if _, err := v.route.env.api.remove(ctx, v.to.name, w.id.seq); err != nil {
		v.to.undeleted.Do(func() {
			v.route.env.log.Warn("natsx: handled retries stay in the retry stream, which has limits retention", v.route.names("stream", v.to.name, "error", err)...)
		})
	}
}

// giveBack moves messages that were not started, and are no longer in hand, to be delivered
// at once. It returns those that it did not move: all others once one cannot be moved.
func (v *mover) giveBack(back []*work) (left []*work) {
	ctx, cancel := context.WithTimeout(v.route.env.closing, apiTimeout)
	defer cancel()
	var failed atomic.Bool
	var mu sync.Mutex
	var wg sync.WaitGroup
	turns := make(chan struct{}, returnersAtOnce)
	for _, w := range back {
		if !v.takes(w) || !v.route.env.link.up() || failed.Load() || w.number == 0 && len(w.raw.Header[HeaderRedriveTo])+len(w.raw.Header[headerSchedule]) > 0 {
			mu.Lock()
			left = append(left, w) // a redriven message may be for another route
			mu.Unlock()
			continue
		}
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			c := v.copyOf(w, w.msg.attempt, w.lost)
			w.copy = &heldCopy{msg: v.message(&c, w.raw, time.Time{})}
			if err := v.moveCopy(ctx, w); err != nil {
				if !failed.Swap(true) {
					v.route.env.log.Warn("natsx: messages given back to their stream, since the retry stream does not take them", v.route.names("error", err)...)
				}
				mu.Lock()
				left = append(left, w)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return left
}

// settleBefore makes sure that what a copy was made of is settled, so that it is not
// delivered again, and reports whether it is.
func (v *mover) settleBefore(ctx context.Context, w *work) bool {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	if err := v.settleAt(ctx, w.from); err != nil {
		v.route.env.log.Warn("natsx: retry left to its next delivery, since the message before it could not be settled", v.route.about(w, "error", err)...)
		return false
	}
	return true
}

func (v *mover) settleAt(ctx context.Context, reply string) error {
	info, ok := parseDelivery(reply)
	floor := &v.floors[0]
	switch {
	case !ok:
		return nil
	case info.stream == v.stream && info.consumer == v.durable:
	case info.stream == v.to.name && info.consumer == v.consumer():
		floor = &v.floors[1]
	default: // nothing that this durable could have had
		return nil
	}
	if info.sequence <= floor.Load() {
		return nil
	}
	a := v.route.env.api
	consumer, err := a.consumerInfo(ctx, info.stream, info.consumer)
	switch {
	case hasCode(err, codeConsumerNotFound), hasCode(err, codeStreamNotFound):
		return nil
	case err != nil && !errors.Is(err, ErrPermission):
		return err
	case err == nil:
		floor.Store(consumer.AckFloor.Stream)
		if info.sequence <= consumer.AckFloor.Stream || info.sequence > consumer.Delivered.Stream {
			return nil
		}
	}
	// The server goes by the sequence alone, which a stream that was made anew, or
	// restored, uses again.
	m, err := a.get(ctx, info.stream, getRequest{Seq: info.sequence})
	if err == nil && (m == nil || m.time.UnixNano() != info.time) {
		return nil
	}
	if err != nil && !errors.Is(err, ErrPermission) {
		return err
	}
	return a.acknowledge(ctx, reply, 0)
}
