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
// [DefaultRequestTimeout]. A deadline of ctx is told to the responder as the time that
// is left, in the header Natsx-Timeout, and ends its context in time.
//
// An error that the responder answered with is a [*ReplyError]; the message comes
// with it, since it may have a payload. Nobody there is [ErrNoResponders] at
// once, nobody done in time [ErrTimeout] with [context.DeadlineExceeded], a
// cancelled ctx [context.Canceled], a subject that the user may not publish to
// [ErrPermission], a connection that is closed or draining [ErrConnectionClosed]. An
// envelope with a schedule or an expectation is [ErrOptionConflict].
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
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return nil, err
	}
	mark, up := p.denials.mark(), p.nc.IsConnected()
	if up && ctx.Done() == nil {
		// Nothing but the time can end it, which costs nats.go less than a context.
		return p.ask(m, &e, mark, func() (*nats.Msg, error) {
			r, err := p.nc.RequestMsg(m, DefaultRequestTimeout)
			if errors.Is(err, nats.ErrTimeout) {
				err = context.DeadlineExceeded
			}
			return r, err
		})
	}
	_, bounded := ctx.Deadline()
	ctx, cancel := withLimit(ctx, DefaultRequestTimeout)
	defer cancel()
	if err := p.ready(ctx, m, up); err != nil {
		return nil, err
	}
	switch {
	case !bounded:
	case m.Header == nil:
		// The usual case: the header is written out before the request is sent.
		h := timeoutHeaders.Get().(nats.Header)
		defer timeoutHeaders.Put(h)
		m.Header = h
		h[timeoutHeader][0] = timeoutLeft(ctx)
	default:
		m.Header[timeoutHeader] = []string{timeoutLeft(ctx)}
	}
	return p.ask(m, &e, mark, func() (*nats.Msg, error) { return p.nc.RequestMsgWithContext(ctx, m) })
}

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
// JSON of T is an error that wraps what [json.Unmarshal] said.
func RequestJSON[T any](ctx context.Context, p *Publisher, e Envelope) (T, error) {
	var v T
	m, err := p.Request(ctx, e)
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

// timeoutHeaders holds headers of nothing but timeoutHeader.
var timeoutHeaders = sync.Pool{New: func() any { return nats.Header{timeoutHeader: {""}} }}

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
