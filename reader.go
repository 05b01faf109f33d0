package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// readBurst is how many messages a reader returns at a time.
	readBurst = 64
	// toolWindow is how many messages may be in transit to a tool.
	toolWindow = 512
	// toolInactive is when the server removes the consumer of a killed tool. A slow tool
	// makes a new one.
	toolInactive = 30 * time.Second
	// toolConsumer is the prefix of the names of tools' consumers.
	toolConsumer = "natsx-reader-"
)

// reader executes the steps of an ordered: it makes and deletes consumers, subscribes,
// pulls, and asks the stream's leader. It is for one goroutine.
type reader struct {
	readerOptions
	o      ordered
	api    *api
	link   *link
	log    *slog.Logger
	stream streamMark

	inbox string         // pulls reply to inbox.<token>
	msgs  chan *nats.Msg // never closed; has room for all messages in transit
	timer *time.Timer
	sub   *nats.Subscription
	watch *linkWatch
	async *asyncWatch
	pulls atomic.Pointer[string]          // subject of the pulls
	deny  atomic.Pointer[PermissionError] // what the server does not permit

	name  string   // of the next consumer, empty for a new name
	owned []string // consumers that may exist
	burst []arrival
}

// readerOptions are what a reader reads, and how.
type readerOptions struct {
	filter      string
	headersOnly bool
	consumers   string        // prefix of its consumers' names
	inactive    time.Duration // inactive threshold of its consumers
	window      int           // the most messages in transit
	// want is the policy of the pulls, called on the reader's goroutine.
	want func(now int64, p *puller) demand
	wake chan struct{} // notified when want may have changed; capacity 1
}

// arrival is a message of a stream.
type arrival struct {
	ackInfo
	msg  *nats.Msg
	size int
}

// openReader makes a reader of a stream, which begin starts and close ends.
func openReader(a *api, l *link, log *slog.Logger, stream *jetstream.StreamInfo, opts readerOptions) (*reader, error) {
	r := &reader{
		readerOptions: opts, api: a, link: l, log: log, stream: markOf(stream),
		inbox: a.nc.NewInbox(),
		// Twice the window, since an earlier consumer's messages may still arrive, and
		// room for status messages.
		msgs:  make(chan *nats.Msg, 2*opts.window+8*orderedPulls),
		timer: time.NewTimer(time.Hour),
		burst: make([]arrival, 0, readBurst),
	}
	r.inactive = inactiveThreshold(&stream.Config, opts.inactive)
	var err error
	if r.sub, err = a.nc.ChanSubscribe(r.inbox+".*", r.msgs); err != nil {
		return nil, closedCause(err)
	}
	r.async = watchAsync(a.nc, r.onAsyncError)
	r.watch = l.watch(func(nats.Status) { notify(r.wake) })
	r.o.puller.budget = &l.budget
	if n := stream.State.Msgs; n > 0 {
		r.o.puller.size = int64(stream.State.Bytes / n)
	}
	return r, nil
}

// begin makes the first consumer.
func (r *reader) begin(ctx context.Context, o ordered) error {
	o.puller = r.o.puller
	r.o = o
	r.o.session = r.link.sessions.Load()
	r.o.resume(processTime())
	for !r.o.made && !r.o.over() {
		r.updateConnection()
		if err := r.do(ctx, r.o.next(processTime())); err != nil {
			return err
		}
	}
	return r.o.fault
}

// next returns the next messages, which are valid until the next call. It returns none
// at the end.
func (r *reader) next(ctx context.Context) ([]arrival, error) {
	clear(r.burst)
	r.burst = r.burst[:0]
	r.o.resume(processTime())
	for {
		r.updateConnection()
		r.takeIn(nil)
		if r.pullAll(); len(r.burst) > 0 {
			return r.burst, nil
		}
		step := r.o.next(processTime())
		switch step.kind {
		case stepDone:
			return nil, nil
		case stepFail:
			return nil, step.err
		}
		if err := r.do(ctx, step); err != nil {
			return nil, err
		}
	}
}

// requestCheck takes over the state of the connection.
func (r *reader) updateConnection() {
	r.o.connection(processTime(), r.link.up(), r.link.sessions.Load())
	if r.link.state() == nats.CLOSED {
		err := ErrConnectionClosed
		if why := r.link.lastCause(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		r.o.fail(err)
	}
	if e := r.deny.Load(); e != nil {
		r.o.fail(e)
	}
}

// pullAll sends the pulls that are due.
func (r *reader) pullAll() {
	for {
		now := processTime()
		next, ok := r.o.pull(now, r.want(now, &r.o.puller))
		if !ok {
			return
		}
		// A failure to send is found by the missing heartbeats.
		r.api.nc.PublishRequest(*r.pulls.Load(), r.inbox+"."+utoa(next.token), next.body())
	}
}

// takeIn processes m and what has arrived after it, up to a burst.
func (r *reader) takeIn(m *nats.Msg) {
	now := processTime()
	for ; len(r.burst) < readBurst; m = nil {
		if m == nil {
			select {
			case m = <-r.msgs:
			default:
				return
			}
		}
		// Headers prove nothing, since publishers write them; only a status message has
		// no reply subject.
		if m.Reply == "" {
			r.o.status(now, parseStatus(m))
		} else if info, ok := parseDelivery(m.Reply); ok && info.stream == r.stream.name {
			size := m.Size()
			if r.o.message(now, info, size) {
				r.burst = append(r.burst, arrival{info, m, size})
			}
		}
	}
}

// do executes a step that does not end the reading. It returns the error of ctx.
func (r *reader) do(ctx context.Context, step orderedStep) error {
	switch step.kind {
	case stepWait:
		return r.waitFor(ctx, step.at)
	case stepCreate:
		r.replace(ctx, step.start)
	case stepAsk:
		limited, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		m, err := r.api.get(limited, r.stream.name, getRequest{Seq: step.seq, NextFor: r.filter})
		if ctx.Err() != nil {
			break
		}
		seq := uint64(0)
		if m != nil {
			seq = m.seq
		}
		r.o.answered(processTime(), seq, err, len(r.msgs) > 0)
	}
	return ctx.Err()
}

// waitFor waits for a message, a change, or a time.
func (r *reader) waitFor(ctx context.Context, at int64) error {
	pause := time.Hour
	if at != 0 {
		pause = time.Duration(at - processTime())
	}
	r.timer.Reset(pause)
	select {
	case m := <-r.msgs:
		r.takeIn(m)
	case <-r.wake:
	case <-r.timer.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// replace makes a consumer and then deletes the previous one.
func (r *reader) replace(ctx context.Context, at startPoint) {
	trouble, doubtful := r.o.trouble, r.o.doubtful
	if trouble != nil && r.o.tries == 0 {
		r.log.Debug("natsx: stream reader continues with a new consumer", "stream", r.stream.name, "cause", trouble)
	}
	if doubtful {
		if _, alive := r.link.ping(ctx, patienceFor(0), mostPatience); !alive && ctx.Err() == nil {
			r.link.reconnect(r.log)
		}
	}
	limited, cancel := context.WithTimeout(ctx, patience(r.o.tries))
	defer cancel()
	info, err := r.replaceOnce(limited, at)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		if r.o.tries == 0 && transient(err) {
			r.log.Warn("natsx: stream cannot be read, trying again", "stream", r.stream.name, "error", err)
		}
		r.o.notCreated(processTime(), err)
	default:
		if r.o.tries > 0 {
			r.log.Info("natsx: stream can be read again", "stream", r.stream.name)
		}
		pulls := r.api.prefix + "CONSUMER.MSG.NEXT." + r.stream.name + "." + info.Name
		r.pulls.Store(&pulls)
		r.o.created(processTime(), info)
		r.name = ""
		r.clean(ctx, info.Name)
	}
}

func (r *reader) replaceOnce(ctx context.Context, at startPoint) (*jetstream.ConsumerInfo, error) {
	if r.o.made {
		if err := r.verifyStream(ctx); err != nil {
			return nil, err
		}
	}
	return r.create(ctx, at)
}

// create makes a consumer. After a failure it uses the same name, since the consumer may
// exist.
func (r *reader) create(ctx context.Context, at startPoint) (*jetstream.ConsumerInfo, error) {
	if r.name == "" {
		r.name = r.consumers + rand.Text()
		r.owned = append(r.owned, r.name)
	}
	cfg := jetstream.ConsumerConfig{
		Name:              r.name,
		AckPolicy:         jetstream.AckNonePolicy,
		MemoryStorage:     true,
		Replicas:          1,
		InactiveThreshold: r.inactive,
		HeadersOnly:       r.headersOnly,
	}
	if r.filter != ">" {
		cfg.FilterSubject = r.filter
	}
	at.apply(&cfg)
	return r.api.createConsumer(ctx, r.stream.name, cfg)
}

// peek makes a consumer only to see where it starts and how much is pending.
func (r *reader) peek(ctx context.Context, at startPoint) (*jetstream.ConsumerInfo, error) {
	info, err := r.create(ctx, at)
	if err == nil {
		r.name = ""
		r.clean(ctx, "")
	}
	return info, err
}

// verifyStream checks that the stream is the one that the reading started with.
func (r *reader) verifyStream(ctx context.Context) error {
	info, err := r.api.streamInfo(ctx, r.stream.name)
	if err != nil {
		return err
	}
	kin := r.stream.compare(info, r.o.read)
	if kin == streamUnsure {
		m, err := r.api.get(ctx, r.stream.name, getRequest{Seq: r.o.read.seq})
		if err != nil && !errors.Is(err, ErrPermission) {
			return err
		}
		kin = r.stream.decide(info, r.o.read, m)
	}
	if kin == streamOther {
		return fmt.Errorf("%w and recreated", ErrStreamDeleted)
	}
	r.stream = markOf(info)
	return nil
}

// close ends the subscription and deletes the consumers.
func (r *reader) close() {
	r.sub.Unsubscribe()
	r.link.unwatch(r.watch)
	r.async.stop()
	r.timer.Stop()
	r.o.puller.forget()
	ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
	defer cancel()
	r.clean(ctx, "")
}

// clean deletes the reader's consumers except keep. The inactive threshold removes those
// that cannot be deleted.
func (r *reader) clean(ctx context.Context, keep string) {
	var left []string
	for _, name := range r.owned {
		if name == keep || !r.link.up() {
			left = append(left, name)
			continue
		}
		err := retry{enough: func(err error) bool {
			return keep != "" || !r.link.up() || hasCode(err, codeStreamNotFound)
		}}.do(ctx, func(ctx context.Context) error { return r.api.deleteConsumer(ctx, r.stream.name, name) })
		if err != nil && !hasCode(err, codeConsumerNotFound) && !hasCode(err, codeStreamNotFound) {
			left = append(left, name)
		}
	}
	r.owned = left
}

// onAsyncError ends the reading when it lacks a permission.
func (r *reader) onAsyncError(_ *nats.Subscription, err error) {
	denied := permissionError(err)
	if denied == nil {
		return
	}
	if pulls := r.pulls.Load(); denied.Subject == r.inbox+".*" || pulls != nil && denied.Subject == *pulls {
		r.deny.Store(denied)
		notify(r.wake)
	}
}

// span is a part of a stream: the messages that match a filter, from a first to a last
// sequence.
type span struct {
	stream      *jetstream.StreamInfo
	filter      string
	first       uint64 // 0 for the first of the stream
	last        uint64
	headersOnly bool
}

// readSpan yields the messages of a span in order: through a reader if the stream has
// limits retention, else one by one, since a consumer would affect what the stream
// keeps. An error is yielded last.
func readSpan(ctx context.Context, a *api, s span) iter.Seq2[*storedMsg, error] {
	return func(yield func(*storedMsg, error) bool) {
		if s.first = max(s.first, 1); s.first > s.last {
			return
		}
		each := func(m *storedMsg) (more bool) {
			s.first = m.seq + 1
			return yield(m, nil) && s.first <= s.last
		}
		var err error
		byStep := s.stream.Config.Retention != jetstream.LimitsPolicy
		if !byStep {
			err = streamSpan(ctx, a, s, each)
			byStep = hasCode(err, codeMaximumConsumers)
		}
		if byStep {
			err = stepSpan(ctx, a, s, each)
		}
		if err != nil {
			yield(nil, failure(fmt.Sprintf("read stream %q: %s", s.stream.Config.Name, cause(err)), err))
		}
	}
}

// stepSpan reads message by message, for as long as each reports true.
func stepSpan(ctx context.Context, a *api, s span, each func(*storedMsg) bool) error {
	for next := s.first; ; {
		m, err := a.get(ctx, s.stream.Config.Name, getRequest{Seq: next, NextFor: s.filter})
		if err != nil || m == nil || m.seq > s.last || !each(m) {
			return err
		}
		next = m.seq + 1
	}
}

// streamSpan reads through a reader, for as long as each reports true.
func streamSpan(ctx context.Context, a *api, s span, each func(*storedMsg) bool) error {
	l := openLink(a.nc)
	defer l.close()
	r, err := openReader(a, l, slog.New(slog.DiscardHandler), s.stream, readerOptions{
		filter: s.filter, headersOnly: s.headersOnly, consumers: toolConsumer, inactive: toolInactive, window: toolWindow,
		wake: make(chan struct{}, 1),
		want: func(int64, *puller) demand {
			return demand{messages: toolWindow, refill: toolWindow / 2, stay: orderedStay, heartbeat: orderedBeat}
		},
	})
	if err != nil {
		return err
	}
	defer r.close()
	o := newOrdered(startPoint{seq: s.first}, s.last)
	o.lenient, o.single, o.patience = true, s.stream.Config.Replicas <= 1, readPatience
	if err := r.begin(ctx, o); err != nil {
		return err
	}
	for {
		burst, err := r.next(ctx)
		if err != nil || len(burst) == 0 {
			return err
		}
		for _, m := range burst {
			if !each(&storedMsg{subject: m.msg.Subject, seq: m.sequence, time: time.Unix(0, m.time), header: m.msg.Header, data: m.msg.Data}) {
				return nil
			}
		}
	}
}
