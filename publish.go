package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Send publishes on core NATS: at most once, without an ack. The connection sends the
// message in the background, and buffers it while it reconnects. Before the first connect
// it accepts no headers ([nats.ErrHeadersNotSupported]). An envelope with a schedule or an
// expectation is [ErrOptionConflict], since these need a stream; a message id and a TTL
// are sent, for a stream that captures the subject. Other errors are that of an ended ctx,
// [ErrConnectionClosed] if the connection is closed or draining, and [nats.ErrMaxPayload]
// for a message above the server's maximum.
func (p *Publisher) Send(ctx context.Context, e Envelope) error {
	if p.around == nil {
		return p.send(ctx, e)
	}
	_, err := p.through(ctx, OperationSend, []Envelope{e}, func(ctx context.Context, c *PublishCall) error {
		return p.send(ctx, c.Envelopes[0])
	})
	return err
}

func (p *Publisher) send(ctx context.Context, e Envelope) error {
	m, err := p.coreMessage(ctx, e)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return failure(fmt.Sprintf("send to %q", m.Subject), err)
	}
	if err := p.closed(); err != nil {
		return p.localFailure("send to", m, err)
	}
	err = p.nc.PublishMsg(m)
	for errors.Is(err, nats.ErrMaxPayload) && slimCore(m, &e) {
		err = p.nc.PublishMsg(m)
	}
	if err != nil {
		return p.localFailure("send to", m, err)
	}
	return nil
}

// Publish stores an envelope in a stream and returns its ack.
//
// All tries have the same message id, by default an automatic one, so that a retry within
// the stream's duplicate window does not store a second copy. Without an ack Publish
// retries after 1 s, then after 2 s, 4 s and every 8 s. It goes on while the stream has no
// leader or no quorum or too many messages wait for it, the JetStream API does not answer,
// or the connection is down, until ctx ends or, if ctx has no deadline, for
// [DefaultPublishTimeout]. The error is then [ErrTimeout] and [context.DeadlineExceeded],
// or [context.Canceled], and names the obstacle. The message may still be stored, unless
// the error says that it was not sent. A new call has a new id, unless the envelope has
// one or a handler publishes it (see [Publisher]).
//
// If no stream captures the subject, the error is [ErrNoStream] at once. On a server with
// a JetStream domain that is not certain, since the server may be a leaf node and the
// stream in another domain: there Publish goes on, unless [WithPublisherJetStream] names
// the domain. If the subject has subscribers but no stream, the error is [ErrTimeout].
// Refusals of the server are returned at once with its [*jetstream.APIError] in the chain,
// such as [ErrWrongSequence], [ErrWrongStream], [ErrTTLNotAllowed] and
// [ErrSchedulesNotAllowed]. The error is also [ErrTTLNotAllowed], before anything is sent,
// if the stream would ignore a TTL; [ErrNoAck] after a second if the stream does not
// acknowledge; [nats.ErrMaxPayload] for a message above the server's maximum;
// [ErrPermission] for a subject that the user may not publish to; and
// [ErrConnectionClosed] if the connection is closed or draining.
//
// A delayed envelope (At, After) is stored as a schedule (see [Envelope.At]), and the ack
// is of the schedule.
func (p *Publisher) Publish(ctx context.Context, e Envelope) (Ack, error) {
	if p.around == nil {
		return p.publish(ctx, e)
	}
	c, err := p.through(ctx, OperationPublish, []Envelope{e}, func(ctx context.Context, c *PublishCall) error {
		ack, err := p.publish(ctx, c.Envelopes[0])
		c.Acks = []Ack{ack}
		return err
	})
	return c.ack(), err
}

func (p *Publisher) publish(ctx context.Context, e Envelope) (Ack, error) {
	ctx, cancel := withLimit(ctx, DefaultPublishTimeout)
	defer cancel()
	c := p.newCall(ctx)
	o, err := c.prepare(&e, p.bare)
	if err != nil {
		return Ack{}, err
	}
	ack, err := c.publish(ctx, &o)
	if err != nil {
		c.giveBack(o.number)
		return Ack{}, err
	}
	return ack, nil
}

// publish uses nats.go's own reply subscription for the first try, which costs the server
// less than another one. Retries are made by a bulk of one envelope.
func (c *call) publish(ctx context.Context, o *outgoing) (Ack, error) {
	if ctx.Err() != nil || !c.p.nc.IsConnected() {
		if err := c.ending(ctx, o.subject); err != nil {
			return Ack{}, o.ended(err)
		}
		return c.goOn(ctx, o, 0)
	}
	var ack Ack
	err := c.locate(ctx, o)
	if err == nil {
		ack, err = c.try(ctx, o)
		for errors.Is(err, nats.ErrMaxPayload) && o.slim(false) {
			ack, err = c.try(ctx, o)
		}
		if err == nil {
			return ack, nil
		}
	}
	ack, wait, err := c.after(ctx, o, ack, err)
	if wait < 0 {
		return ack, err
	}
	return c.goOn(ctx, o, wait)
}

// try publishes once. Without an id it is the only try: it waits until ctx ends, or until
// it is known that there will be no ack.
func (c *call) try(ctx context.Context, o *outgoing) (Ack, error) {
	m := &nats.Msg{Subject: o.subject, Data: o.e.data, Header: make(nats.Header, len(o.e.headers)+4)}
	o.fill(m.Header)
	if o.id != "" {
		ctx, cancel := context.WithTimeout(ctx, ackWait)
		defer cancel()
		return publishOnce(ctx, c.p.nc, m)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	looked := make(chan struct{})
	late := time.AfterFunc(ackWait, func() {
		defer close(looked)
		o.unanswered++
		if err := c.unacknowledged(ctx, o); err != nil {
			cancel(err)
		}
	})
	ack, err := publishOnce(ctx, c.p.nc, m)
	cancel(nil)
	if !late.Stop() {
		<-looked
	}
	if why := context.Cause(ctx); err != nil && (errors.Is(why, ErrNoAck) || errors.Is(why, ErrPermission)) {
		return Ack{}, why
	}
	return ack, err
}

// coreMessage makes the message of Send and Request.
func (p *Publisher) coreMessage(ctx context.Context, e Envelope) (*nats.Msg, error) {
	if err := e.checkCore(); err != nil {
		return nil, err
	}
	m := &nats.Msg{Subject: e.subject, Data: e.data}
	carried := p.carried(ctx)
	if len(carried) > 0 || !e.plain() {
		m.Header = make(nats.Header, len(e.headers)+3)
		e.fill(m.Header, carried)
	}
	if e.set&envMsgID != 0 {
		m.Header.Set(jetstream.MsgIDHeader, e.msgID)
	}
	if e.set&envTTL != 0 {
		m.Header.Set(jetstream.MsgTTLHeader, e.ttlText())
	}
	return m, nil
}

// slimCore removes one of the headers that natsx adds, the least needed first, from a
// message that is too large with them. It returns false if none is left.
func slimCore(m *nats.Msg, e *Envelope) bool {
	added := slices.Concat([]string{timeoutHeader}, carriedHeaders)
	for name := range m.Header { // what a middleware has carried over
		if name != jetstream.MsgIDHeader && name != jetstream.MsgTTLHeader && name != "Content-Type" {
			added = append(added, name)
		}
	}
	for _, name := range append(added, "Content-Type") {
		for have := range m.Header {
			if !strings.EqualFold(have, name) || e.hasHeader(have) {
				continue
			}
			delete(m.Header, have)
			if len(m.Header) == 0 {
				m.Header = nil
			}
			return true
		}
	}
	return false
}
