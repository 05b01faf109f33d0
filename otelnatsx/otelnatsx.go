// Package otelnatsx traces what natsx does with OpenTelemetry.
//
//	tracing := otelnatsx.New()
//	broker := natsx.NewBroker(nc, tracing.Broker())
//	pub := natsx.NewPublisher(nc, tracing.Publisher())
//
// Spans, their names, kinds and attributes follow the semantic conventions for messaging;
// the README lists them. The context of the span that is current goes out with what is
// published, in the W3C headers, and is the parent of the span that handles it.
package otelnatsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/natsx/natsx"
)

const scope = "github.com/natsx/natsx/otelnatsx"

// The attributes of natsx, for what the conventions have no name.
const (
	StreamKey    = attribute.Key("natsx.stream")    // of the message; on a publish the one that stored it
	SequenceKey  = attribute.Key("natsx.sequence")  // in the stream
	AttemptKey   = attribute.Key("natsx.attempt")   // 1 for the first run of the handler
	OutcomeKey   = attribute.Key("natsx.outcome")   // of an attempt of a durable, see [natsx.OutcomeOf]
	DuplicateKey = attribute.Key("natsx.duplicate") // the stream had the message already
)

// Option configures a [Tracing].
type Option func(*Tracing)

// WithTracerProvider sets who makes the spans. Default is [otel.GetTracerProvider].
func WithTracerProvider(p trace.TracerProvider) Option {
	return func(t *Tracing) { t.tracer = p.Tracer(scope) }
}

// WithPropagator sets how contexts go out and come in. Default is W3C trace context and
// baggage, whatever [otel.GetTextMapPropagator] is.
func WithPropagator(p propagation.TextMapPropagator) Option {
	return func(t *Tracing) { t.propagator = p }
}

// WithDestination sets what names a subject in the names of spans, as "orders.*" for
// "orders.4711": names with ids in them are too many. Default is the subject itself.
func WithDestination(fn func(subject string) string) Option {
	return func(t *Tracing) { t.destination = fn }
}

// WithoutReceive leaves out the spans of receiving.
func WithoutReceive() Option { return func(t *Tracing) { t.silent = true } }

// Tracing makes the spans of brokers and publishers. It is safe for concurrent use.
type Tracing struct {
	tracer      trace.Tracer
	propagator  propagation.TextMapPropagator
	destination func(subject string) string
	silent      bool // no receive spans
	firsts      firsts
}

// New returns a Tracing.
func New(opts ...Option) *Tracing {
	t := &Tracing{
		tracer:      otel.GetTracerProvider().Tracer(scope),
		propagator:  propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}),
		destination: func(subject string) string { return subject },
	}
	for _, opt := range opts {
		opt(t)
	}
	return t
}

// Broker is the option that traces what a broker handles: [Tracing.Middleware] and
// [Tracing.Observe].
func (t *Tracing) Broker() natsx.Option {
	return func(b *natsx.Broker) {
		natsx.WithMiddleware(t.Middleware)(b)
		natsx.WithObserver(t)(b)
	}
}

// Publisher is the option that traces what a publisher does: [Tracing.Publish].
func (t *Tracing) Publisher() natsx.PublisherOption { return natsx.WithPublishMiddleware(t.Publish) }

// Middleware makes a span of each run of a handler or responder, whose parent is the span
// that published the message. The handler's context has the new span and the message's
// baggage. The span of a retry is linked to that of the first attempt, as far as that ran
// in this process. Middleware that is to run inside of the span comes later.
func (t *Tracing) Middleware(next natsx.Handler) natsx.Handler {
	return func(ctx context.Context, m *natsx.Msg) error {
		p := t.process(ctx, m)
		defer p.span.End()
		err, returned := error(nil), false
		defer func() {
			if returned {
				p.end(natsx.OutcomeOf(err), err)
				return
			}
			// A panic, which span.End records and passes on.
			p.span.SetStatus(codes.Error, "panic")
			p.span.SetAttributes(semconv.ErrorTypeKey.String("panic"))
			p.end(natsx.OutcomeRetried, nil)
		}()
		err = next(context.WithValue(p.ctx, handledKey{}, t), m)
		returned = true
		return err
	}
}

type handledKey struct{}

// processing is the handling of one message.
type processing struct {
	t     *Tracing
	ctx   context.Context
	span  trace.Span
	m     *natsx.Msg
	first trace.SpanContext // of an earlier attempt, if one is known
}

func (t *Tracing) process(ctx context.Context, m *natsx.Msg, opts ...trace.SpanStartOption) *processing {
	ctx, links := t.creation(ctx, m)
	p := &processing{t: t, m: m}
	if m.Attempt() > 1 {
		p.first = t.firsts.get(keyOf(m))
		links = append(links, linksTo(p.first)...)
	}
	kind := trace.SpanKindConsumer
	if m.IsRequest() {
		kind = trace.SpanKindServer
	}
	p.ctx, p.span = t.tracer.Start(ctx, "process "+m.Route(), append(opts, trace.WithSpanKind(kind), trace.WithLinks(links...), trace.WithAttributes(
		append(received(m), semconv.MessagingOperationName("process"), semconv.MessagingOperationTypeProcess)...))...)
	return p
}

// end is all but the end of the span.
func (p *processing) end(outcome natsx.Outcome, err error) {
	if outcome != natsx.OutcomeDiscarded {
		fail(p.span, err)
	}
	if p.m.Durable() == "" {
		return
	}
	p.span.SetAttributes(OutcomeKey.String(string(outcome)))
	if outcome == natsx.OutcomeRetried && !p.first.IsValid() {
		p.t.firsts.put(keyOf(p.m), p.span.SpanContext())
	}
}

// creation is ctx with the context that published m, and a link to that. What is current
// where Run was called is not why m is handled.
func (t *Tracing) creation(ctx context.Context, m *natsx.Msg) (context.Context, []trace.Link) {
	ctx = trace.ContextWithSpanContext(ctx, trace.SpanContext{})
	ctx = t.propagator.Extract(ctx, carrier(m.Header))
	return ctx, linksTo(trace.SpanContextFromContext(ctx))
}

// Observe makes a span of each message of a durable for the time between its arrival in
// this process and the start of its handler. Of a message of a batch, which passes no
// middleware, it also makes the span of its handling, when that is over.
func (t *Tracing) Observe(ctx context.Context, e natsx.Event) {
	if e.Durable == "" || e.Started.IsZero() {
		return
	}
	if e.Batch > 0 && e.Duration > 0 {
		p := t.process(ctx, e.Msg, trace.WithTimestamp(e.Started))
		p.span.SetAttributes(semconv.MessagingBatchMessageCount(e.Batch))
		p.end(e.Outcome, e.Err)
		p.span.End(trace.WithTimestamp(e.Started.Add(e.Duration)))
	}
	switch e.Outcome {
	case natsx.OutcomeSucceeded, natsx.OutcomeDead, natsx.OutcomeDiscarded:
		t.firsts.drop(keyOf(e.Msg))
	}
	if t.silent {
		return
	}
	ctx, links := t.creation(ctx, e.Msg)
	_, span := t.tracer.Start(ctx, "receive "+e.Route, trace.WithSpanKind(trace.SpanKindClient), trace.WithLinks(links...),
		trace.WithTimestamp(e.Started.Add(-e.Waited)), trace.WithAttributes(
			append(received(e.Msg), semconv.MessagingOperationName("receive"), semconv.MessagingOperationTypeReceive)...))
	span.End(trace.WithTimestamp(e.Started))
}

// received are the attributes of a message that came.
func received(m *natsx.Msg) []attribute.KeyValue {
	as := []attribute.KeyValue{
		semconv.MessagingSystemKey.String("nats"),
		semconv.MessagingDestinationName(m.Subject),
		semconv.MessagingMessageBodySize(len(m.Data)),
	}
	if m.Route() != m.Subject {
		as = append(as, semconv.MessagingDestinationTemplate(m.Route()))
	}
	if id := m.Header.Get(nats.MsgIdHdr); id != "" {
		as = append(as, semconv.MessagingMessageID(id))
	}
	if id := m.Header.Get("Correlation-Id"); id != "" {
		as = append(as, semconv.MessagingMessageConversationID(id))
	}
	if m.Stream() != "" {
		as = append(as, StreamKey.String(m.Stream()), SequenceKey.Int64(int64(m.Sequence())))
	}
	if m.Durable() != "" {
		as = append(as, semconv.MessagingConsumerGroupName(m.Durable()), AttemptKey.Int(m.Attempt()))
	}
	return as
}

// Publish makes a span of each call of a publisher, and has its context go out in place
// of that of the handled message. Its parent is the span that is current, or else the one
// that published the handled message.
func (t *Tracing) Publish(next natsx.PublishFunc) natsx.PublishFunc {
	return func(ctx context.Context, c *natsx.PublishCall) error {
		kind := trace.SpanKindProducer
		if c.Operation == natsx.OperationRequest || c.Operation == natsx.OperationRequestMany {
			kind = trace.SpanKindClient
		}
		name := string(c.Operation)
		as := []attribute.KeyValue{
			semconv.MessagingSystemKey.String("nats"), semconv.MessagingOperationName(name), semconv.MessagingOperationTypeSend,
		}
		if subject := one(c.Envelopes); subject != "" {
			name += " " + t.destination(subject)
			as = append(as, semconv.MessagingDestinationName(subject))
			if template := t.destination(subject); template != subject {
				as = append(as, semconv.MessagingDestinationTemplate(template))
			}
		}
		if len(c.Envelopes) == 1 {
			e := c.Envelopes[0]
			as = append(as, semconv.MessagingMessageBodySize(e.Size()))
			if e.ID() != "" {
				as = append(as, semconv.MessagingMessageID(e.ID()))
			}
		} else {
			as = append(as, semconv.MessagingBatchMessageCount(len(c.Envelopes)))
		}
		ctx, span := t.tracer.Start(t.parent(ctx, c), name, trace.WithSpanKind(kind), trace.WithAttributes(as...))
		defer span.End()
		for _, field := range t.propagator.Fields() {
			for have := range c.Carried {
				if strings.EqualFold(have, field) {
					delete(c.Carried, have)
				}
			}
		}
		t.propagator.Inject(ctx, carrier(c.Carried))
		err := next(ctx, c)
		if len(c.Acks) == 1 && err == nil {
			ack := c.Acks[0]
			span.SetAttributes(StreamKey.String(ack.Stream), SequenceKey.Int64(int64(ack.Sequence)), DuplicateKey.Bool(ack.Duplicate))
		}
		fail(span, err)
		return err
	}
}

// parent is the context that a call is made in. In a handler that is not traced, what the
// application has not set is that of the handled message.
func (t *Tracing) parent(ctx context.Context, c *natsx.PublishCall) context.Context {
	if ctx.Value(handledKey{}) == t {
		return ctx
	}
	parent := t.propagator.Extract(ctx, carrier(c.Carried))
	if span := trace.SpanFromContext(ctx); span.SpanContext().IsValid() {
		parent = trace.ContextWithSpan(parent, span)
	}
	if b := baggage.FromContext(ctx); b.Len() > 0 {
		parent = baggage.ContextWithBaggage(parent, b)
	}
	return parent
}

// one is the subject that all envelopes have, empty when they have several.
func one(es []natsx.Envelope) string {
	if len(es) == 0 || slices.ContainsFunc(es, func(e natsx.Envelope) bool { return e.Subject() != es[0].Subject() }) {
		return ""
	}
	return es[0].Subject()
}

// fail gives a span the error of what it was for.
func fail(span trace.Span, err error) {
	if err == nil || !span.IsRecording() {
		return
	}
	defer func() {
		if recover() != nil { // of an error that has no text
			span.SetStatus(codes.Error, "")
		}
	}()
	span.RecordError(err)
	span.SetStatus(codes.Error, err.Error())
	span.SetAttributes(semconv.ErrorTypeKey.String(errorType(err)))
}

// errorType is a name of what went wrong of which there are few.
func errorType(err error) string {
	if reply, ok := errors.AsType[*natsx.ReplyError](err); ok {
		return strconv.Itoa(reply.Code)
	}
	for _, known := range []struct {
		err  error
		name string
	}{
		{natsx.ErrNoResponders, "no_responders"}, {natsx.ErrNoStream, "no_stream"}, {natsx.ErrPermission, "permission"},
		{natsx.ErrWrongSequence, "wrong_sequence"}, {natsx.ErrConnectionClosed, "connection_closed"},
		{natsx.ErrTimeout, "timeout"}, {context.DeadlineExceeded, "timeout"}, {context.Canceled, "canceled"},
	} {
		if errors.Is(err, known.err) {
			return known.name
		}
	}
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return fmt.Sprintf("%T", err)
		}
		err = inner
	}
}

func linksTo(sc trace.SpanContext) []trace.Link {
	if !sc.IsValid() {
		return nil
	}
	return []trace.Link{{SpanContext: sc}}
}

// carrier has headers as propagators want them: NATS keeps the case of names, and those of
// W3C have any.
type carrier nats.Header

func (c carrier) Get(key string) string {
	if v := c[key]; len(v) > 0 {
		return v[0]
	}
	for name, v := range c {
		if strings.EqualFold(name, key) && len(v) > 0 {
			return v[0]
		}
	}
	return ""
}

func (c carrier) Set(key, value string) { c[key] = []string{value} }

func (c carrier) Keys() (keys []string) {
	for name := range c {
		keys = append(keys, name)
	}
	return keys
}
