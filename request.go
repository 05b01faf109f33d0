package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// DefaultRequestTimeout ends a request whose context has no deadline.
const DefaultRequestTimeout = 5 * time.Second

// Request sends an envelope on core NATS and returns the answer. It waits, for the
// first connection too, until ctx ends or, when ctx has no deadline, for
// [DefaultRequestTimeout]. A deadline of ctx is told to a responder of natsx as the time
// that is left, and ends its context in time: in the header Natsx-Timeout, or for an
// envelope without headers in the reply subject, which costs less. An import of a service
// from another account has a reply subject of its own, and passes on the header only.
//
// An error that the responder answered with is a [*ReplyError]; the message comes
// with it, since it may have a payload. Nobody there is [ErrNoResponders] at
// once, nobody done in time [ErrTimeout] with [context.DeadlineExceeded], a
// cancelled ctx [context.Canceled], a subject that the user may not publish to
// [ErrPermission], a connection that is closed or draining [ErrConnectionClosed]. An
// envelope with a schedule or an expectation is [ErrOptionConflict].
func (p *Publisher) Request(ctx context.Context, e Envelope) (*Msg, error) {
	if err := e.checkCore(); err != nil {
		return nil, err
	}
	mark, up := p.denials.mark(), p.nc.IsConnected()
	handled := deliveryFrom(ctx)
	// A handler's request goes the way of nats.go, which lets it end when the application
	// drains the connection.
	if up && handled == nil && e.plain() {
		if r := p.inbox(); r != nil {
			return p.askPlain(ctx, &e, r, mark)
		}
	}
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return nil, err
	}
	_, bounded := ctx.Deadline()
	ctx, cancel := withLimit(ctx, DefaultRequestTimeout)
	defer cancel()
	if err := p.ready(ctx, m, up); err != nil {
		return nil, err
	}
	if bounded {
		if m.Header == nil {
			m.Header = make(nats.Header, 1)
		}
		m.Header[timeoutHeader] = []string{timeoutLeft(ctx)}
	}
	return p.ask(m, &e, mark, func() (*nats.Msg, error) { return p.nc.RequestMsgWithContext(ctx, m) })
}

// inbox is where the answers to plain requests come, or nil when there can be none.
func (p *Publisher) inbox() *replies {
	if r := p.replies.Load(); r != nil {
		return r
	}
	if p.nc.Opts.UseOldRequestStyle {
		return nil
	}
	r, err := repliesOf(p.nc)
	if err != nil {
		return nil
	}
	p.replies.Store(r)
	return r
}

// askPlain makes a request without headers.
func (p *Publisher) askPlain(ctx context.Context, e *Envelope, r *replies, mark uint64) (*Msg, error) {
	fail := func(err error) (*Msg, error) {
		return nil, p.requestFailure(&nats.Msg{Subject: e.subject, Data: e.data}, mark, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, requestError(e.subject, err)
	}
	var left time.Duration
	var limit <-chan time.Time
	if deadline, bounded := ctx.Deadline(); bounded {
		if left = time.Until(deadline); left <= 0 {
			return nil, requestError(e.subject, context.DeadlineExceeded)
		}
	} else {
		t := timers.Get().(*time.Timer)
		t.Reset(DefaultRequestTimeout)
		defer func() {
			t.Stop()
			timers.Put(t)
		}()
		limit = t.C
	}
	key, reply, w, ok := r.expect(left)
	defer waiters.Put(w)
	if !ok {
		return fail(nats.ErrConnectionClosed)
	}
	if err := p.nc.PublishRequest(e.subject, reply, e.data); err != nil {
		if !r.forget(key) {
			<-w.answer
		}
		return fail(err)
	}
	var m *nats.Msg
	var end error
	select {
	case m = <-w.answer:
	case <-ctx.Done():
		end = ctx.Err()
	case <-limit:
		end = context.DeadlineExceeded
	}
	if end != nil {
		if r.forget(key) {
			return fail(end)
		}
		m = <-w.answer
	}
	switch {
	case m == nil && p.nc.IsClosed():
		return fail(nats.ErrConnectionClosed)
	case m == nil:
		return fail(nats.ErrDisconnected)
	case len(m.Data) == 0 && m.Header.Get("Status") == "503":
		return fail(nats.ErrNoResponders)
	}
	return received(m)
}

// timers are stopped.
var timers = sync.Pool{New: func() any {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}}

// ask sends a request, without headers of natsx's own if it is too large with them.
func (p *Publisher) ask(m *nats.Msg, e *Envelope, mark uint64, send func() (*nats.Msg, error)) (*Msg, error) {
	r, err := send()
	for errors.Is(err, nats.ErrMaxPayload) && slimCore(m, e) {
		r, err = send()
	}
	if err != nil {
		return nil, p.requestFailure(m, mark, err)
	}
	return received(r)
}

// RequestJSON is [Publisher.Request] for an answer in JSON. An answer that is not
// JSON of T is an error that wraps what [json.Unmarshal] said. The body and headers of an
// answer that is an error are in its [*ReplyError].
func RequestJSON[T any](ctx context.Context, p *Publisher, e Envelope) (T, error) {
	var v T
	m, err := p.Request(ctx, e)
	if refusal, ok := err.(*ReplyError); ok {
		refusal.Data, refusal.Header = m.Data, m.Header
	}
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(m.Data, &v); err != nil {
		// Not a DecodeError: a responder that returned it would blame its own
		// requester.
		return v, failure(fmt.Sprintf("request %q: decode the answer: %v", e.subject, err), err)
	}
	return v, nil
}

// RequestMany sends an envelope to everybody who listens and yields the answers as
// they come, until ctx ends or, when ctx has no deadline, for
// [DefaultRequestTimeout]: it cannot know how many will answer. The caller breaks
// when it has enough.
//
// An answer that is an error is yielded with its [*ReplyError] and the rest goes
// on. Any other error is the last thing yielded and has no message:
// [ErrNoResponders], [context.Canceled], or [ErrTimeout] when nobody answered at
// all. A deadline after the first answer ends the sequence without an error.
// Each use of the sequence sends the request anew.
func (p *Publisher) RequestMany(ctx context.Context, e Envelope) iter.Seq2[*Msg, error] {
	return func(yield func(*Msg, error) bool) {
		m, err := p.coreMessage(ctx, e)
		if err != nil {
			yield(nil, err)
			return
		}
		mark, up := p.denials.mark(), p.nc.IsConnected()
		_, bounded := ctx.Deadline()
		ctx, cancel := withLimit(ctx, DefaultRequestTimeout)
		defer cancel()
		if err := p.ready(ctx, m, up); err != nil {
			yield(nil, err)
			return
		}
		if bounded {
			if m.Header == nil {
				m.Header = make(nats.Header, 1)
			}
			m.Header[timeoutHeader] = []string{timeoutLeft(ctx)}
		}
		m.Reply = p.nc.NewInbox()
		sub, err := p.nc.SubscribeSync(m.Reply)
		if err != nil {
			yield(nil, p.requestFailure(m, mark, err))
			return
		}
		defer sub.Unsubscribe()
		err = p.nc.PublishMsg(m)
		for errors.Is(err, nats.ErrMaxPayload) && slimCore(m, &e) {
			err = p.nc.PublishMsg(m)
		}
		if err != nil {
			yield(nil, p.requestFailure(m, mark, err))
			return
		}
		for answered := false; ; answered = true {
			r, err := sub.NextMsgWithContext(ctx)
			switch {
			case err == nil:
				if !yield(received(r)) {
					return
				}
			case answered && errors.Is(err, context.DeadlineExceeded):
				return
			default:
				yield(nil, p.requestFailure(m, mark, err))
				return
			}
		}
	}
}

// ready lets a request be sent: the connection is up, or was once and will be, and ctx
// has not ended.
func (p *Publisher) ready(ctx context.Context, m *nats.Msg, up bool) error {
	if !up {
		if err := p.closed(); err != nil {
			return p.localFailure("request", m, err)
		}
		if err := p.online(ctx); err != nil {
			return endFailure(fmt.Sprintf("request %q: %s: %v", m.Subject, offline, err), err)
		}
	}
	if err := ctx.Err(); err != nil {
		return requestError(m.Subject, err)
	}
	return nil
}

// timeoutLeft tells the responder how long ctx still runs.
func timeoutLeft(ctx context.Context) string {
	deadline, _ := ctx.Deadline()
	return time.Until(deadline).String()
}

// received is a reply, with the error that it carries.
func received(r *nats.Msg) (*Msg, error) {
	m := &Msg{Subject: r.Subject, Data: r.Data, Header: r.Header, reply: r}
	if e := replyError(r.Header); e != nil {
		return m, e
	}
	return m, nil
}

func (p *Publisher) requestFailure(m *nats.Msg, mark uint64, err error) error {
	if denied := p.denials.of(m.Subject, mark); denied != nil {
		return denied
	}
	p.denials.renew()
	if closed := p.closed(); closed != nil {
		return p.localFailure("request", m, closed)
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return requestError(m.Subject, err)
	case errors.Is(err, nats.ErrNoResponders):
		return failure(fmt.Sprintf("request %q: no responders", m.Subject), ErrNoResponders, err)
	}
	return p.localFailure("request", m, err)
}

func requestError(subject string, err error) error {
	why := err.Error()
	if errors.Is(err, context.DeadlineExceeded) {
		why = "timeout"
	}
	return endFailure(fmt.Sprintf("request %q: %s", subject, why), err)
}
