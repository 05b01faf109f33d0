package natsx

import (
	"context"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
)

// Operation is a method of a [Publisher].
type Operation string

// The operations of a publisher.
const (
	OperationSend          Operation = "send"
	OperationPublish       Operation = "publish"
	OperationPublishAll    Operation = "publish_all"
	OperationPublishAtomic Operation = "publish_atomic"
	OperationRequest       Operation = "request" // RequestJSON too
	OperationRequestMany   Operation = "request_many"
)

// PublishCall is one call of a publisher on its way through the middleware. It belongs to
// one goroutine.
type PublishCall struct {
	Operation Operation // the method that was called
	// Envelopes are what is sent, one unless the operation takes several. A middleware
	// may put changed copies in their places, and leaves their number as it is.
	Envelopes []Envelope
	// Carried are the headers that each envelope is sent with unless it has them itself:
	// those of the handled message (see [Publisher]), until a middleware sets or deletes
	// some. They are left out of a message that is too large with them, and do not count
	// for automatic message ids. It is never nil. Names keep their case.
	Carried nats.Header
	// Acks are set when the call has returned: of PublishAll one for each envelope, of
	// Publish and PublishAtomic one, the zero Ack when it failed.
	Acks []Ack
	// Reply is the answer to a Request, nil without one.
	Reply *Msg

	do func(ctx context.Context, c *PublishCall) error
}

// PublishFunc carries out a call and returns the error of the publisher's method.
type PublishFunc func(ctx context.Context, c *PublishCall) error

// PublishMiddleware wraps every call of a publisher; see [WithPublishMiddleware]. It is
// called once for each publisher; what it returns is called by many goroutines at once.
type PublishMiddleware func(next PublishFunc) PublishFunc

// WithPublishMiddleware wraps the calls of a publisher, as for metrics and traces. The
// first is the outermost, several calls of the option add up, and nil adds none. Default
// is none, which costs nothing.
//
// What the middleware returns is the error that the caller gets, and Acks and Reply of the
// call are its results. The context passed on must derive from the one it got, by which an
// automatic message id is made of the handled message. A call goes through the middleware
// once, however often it is tried. That of a RequestMany lasts until its sequence ends.
func WithPublishMiddleware(mw ...PublishMiddleware) PublisherOption {
	return func(p *Publisher) { p.middleware = append(p.middleware, mw...) }
}

// wrapPublish puts middleware around the calls of a publisher; nil without any.
func wrapPublish(middleware []PublishMiddleware) PublishFunc {
	var around PublishFunc
	for i := len(middleware) - 1; i >= 0; i-- {
		if middleware[i] == nil {
			continue
		}
		if around == nil {
			around = carryOutCall
		}
		around = middleware[i](around)
	}
	return around
}

// carryOutCall is the innermost of the middleware.
func carryOutCall(ctx context.Context, c *PublishCall) error {
	return c.do(context.WithValue(ctx, carriedKey{}, c.Carried), c)
}

// through has a call go through the middleware. do carries it out.
func (p *Publisher) through(ctx context.Context, op Operation, es []Envelope, do func(ctx context.Context, c *PublishCall) error) (*PublishCall, error) {
	carried := nats.Header{}
	for _, f := range carriedFrom(deliveryFrom(ctx)) {
		carried[f.name] = append(carried[f.name], f.value)
	}
	c := &PublishCall{Operation: op, Envelopes: es, Carried: carried, do: func(ctx context.Context, c *PublishCall) error {
		if len(c.Envelopes) != len(es) {
			return failure(fmt.Sprintf("%s: a middleware made %d envelopes of %d", op, len(c.Envelopes), len(es)), ErrOutOfRange)
		}
		return do(ctx, c)
	}}
	return c, p.around(ctx, c)
}

// ack is the one ack of a call.
func (c *PublishCall) ack() Ack {
	if len(c.Acks) == 0 {
		return Ack{}
	}
	return c.Acks[0]
}

type carriedKey struct{}

// carried are the headers that are carried over to what is published with ctx.
func (p *Publisher) carried(ctx context.Context) []field {
	if p.around == nil {
		return carriedFrom(deliveryFrom(ctx))
	}
	var carried []field
	h, _ := ctx.Value(carriedKey{}).(nats.Header)
	for name, values := range h {
		for _, v := range values {
			carried = append(carried, field{name, v})
		}
	}
	return carried
}

func carriedFrom(d *delivery) []field {
	if d == nil {
		return nil
	}
	var carried []field
	for name, values := range d.msg.Header {
		for _, c := range carriedHeaders {
			if strings.EqualFold(name, c) {
				for _, v := range values {
					carried = append(carried, field{name, v})
				}
			}
		}
	}
	return carried
}
