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

// Request sends an envelope on core NATS and returns the answer. It waits, also for the
// first connection, until ctx ends or, if ctx has no deadline, for
// [DefaultRequestTimeout]. A deadline of ctx is sent to a responder of natsx as the remaining
// time, and ends the responder's context too: in the header Natsx-Timeout or, for an
// envelope without headers, in the reply subject, which costs less. A service import of
// another account replaces the reply subject, and passes on only the header.
//
// An error in the answer is a [*ReplyError]; the message is returned too, since it may
// have a payload. Without subscribers the error is [ErrNoResponders] at once; without an
// answer in time it is [ErrTimeout] and [context.DeadlineExceeded]; [context.Canceled] if
// ctx was cancelled; [ErrPermission] for a subject that the user may not publish to;
// [ErrConnectionClosed] if the connection is closed or draining; and [ErrOptionConflict]
// for an envelope with a schedule or an expectation.
func (p *Publisher) Request(ctx context.Context, e Envelope) (*Msg, error) {
	if p.around == nil {
		return p.request(ctx, e)
	}
	c, err := p.through(ctx, OperationRequest, []Envelope{e}, func(ctx context.Context, c *PublishCall) (err error) {
		c.Reply, err = p.request(ctx, c.Envelopes[0])
		return err
	})
	return c.Reply, err
}

func (p *Publisher) request(ctx context.Context, e Envelope) (*Msg, error) {
	if err := e.checkCore(); err != nil {
		return nil, err
	}
	mark, up := p.denials.mark(), p.nc.IsConnected()
	// A handler's request uses nats.go, so that it is still answered when the application
	// drains the connection.
	if up && e.plain() && deliveryFrom(ctx) == nil && (p.around == nil || len(p.carried(ctx)) == 0) {
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

// ask sends a request, without the headers that natsx adds if it is too large with them.
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

// RequestJSON is [Publisher.Request] for an answer in JSON. If it cannot be decoded into a
// T, the error wraps that of [json.Unmarshal]. The [*ReplyError] of an answer that is an
// error has its body and headers.
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
		// Not a DecodeError: a responder that returned it would answer its own requester
		// with code 400.
		return v, failure(fmt.Sprintf("request %q: decode the answer: %v", e.subject, err), err)
	}
	return v, nil
}

// RequestMany sends an envelope to all subscribers and yields the answers as they arrive,
// until ctx ends or, if ctx has no deadline, for [DefaultRequestTimeout]: it cannot know
// how many will answer. The caller breaks when it has enough.
//
// An answer with an error is yielded with its [*ReplyError], and the sequence goes on. Any
// other error is yielded last, without a message: [ErrNoResponders], [context.Canceled],
// or [ErrTimeout] if there was no answer at all. A deadline after the first answer ends
// the sequence without an error. Each use of the sequence sends the request again.
func (p *Publisher) RequestMany(ctx context.Context, e Envelope) iter.Seq2[*Msg, error] {
	return func(yield func(*Msg, error) bool) {
		if p.around == nil {
			p.requestMany(ctx, e, yield)
			return
		}
		asked := false
		_, err := p.through(ctx, OperationRequestMany, []Envelope{e}, func(ctx context.Context, c *PublishCall) error {
			asked = true
			return p.requestMany(ctx, c.Envelopes[0], yield)
		})
		if err != nil && !asked {
			yield(nil, err)
		}
	}
}

// requestMany returns the error that it yields last, if it does.
func (p *Publisher) requestMany(ctx context.Context, e Envelope, yield func(*Msg, error) bool) error {
	fail := func(err error) error {
		yield(nil, err)
		return err
	}
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return fail(err)
	}
	mark, up := p.denials.mark(), p.nc.IsConnected()
	_, bounded := ctx.Deadline()
	ctx, cancel := withLimit(ctx, DefaultRequestTimeout)
	defer cancel()
	if err := p.ready(ctx, m, up); err != nil {
		return fail(err)
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
		return fail(p.requestFailure(m, mark, err))
	}
	defer sub.Unsubscribe()
	err = p.nc.PublishMsg(m)
	for errors.Is(err, nats.ErrMaxPayload) && slimCore(m, &e) {
		err = p.nc.PublishMsg(m)
	}
	if err != nil {
		return fail(p.requestFailure(m, mark, err))
	}
	for answered := false; ; answered = true {
		r, err := sub.NextMsgWithContext(ctx)
		switch {
		case err == nil:
			if !yield(received(r)) {
				return nil
			}
		case answered && errors.Is(err, context.DeadlineExceeded):
			return nil
		default:
			return fail(p.requestFailure(m, mark, err))
		}
	}
}

// ready waits until a request can be sent: the connection is up, or was up and
// reconnects. It returns an error if ctx or the connection has ended.
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

// timeoutLeft is the value of timeoutHeader for ctx.
func timeoutLeft(ctx context.Context) string {
	deadline, _ := ctx.Deadline()
	return time.Until(deadline).String()
}

// received returns a reply and the error that it carries.
func received(r *nats.Msg) (*Msg, error) {
	m := &Msg{Subject: r.Subject, Data: r.Data, Header: r.Header, reply: r}
	if e := replyError(r.Header); e != nil {
		return m, e
	}
	return m, nil
}

func (p *Publisher) requestFailure(m *nats.Msg, mark uint64, err error) error {
	if denied := p.denials.since(m.Subject, mark); denied != nil {
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
