package otelnatsx

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/natsxtest"
)

// traced is a Tracing whose spans are recorded.
type traced struct {
	*Tracing
	t        *testing.T
	provider *sdk.TracerProvider
	spans    *tracetest.SpanRecorder
}

func newTraced(t *testing.T, opts ...Option) *traced {
	spans := tracetest.NewSpanRecorder()
	p := sdk.NewTracerProvider(sdk.WithSpanProcessor(spans))
	return &traced{New(append([]Option{WithTracerProvider(p)}, opts...)...), t, p, spans}
}

// named are the ended spans of a name, in the order of their start.
func (tr *traced) named(name string) (found []sdk.ReadOnlySpan) {
	for _, s := range tr.spans.Ended() {
		if s.Name() == name {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b sdk.ReadOnlySpan) int { return a.StartTime().Compare(b.StartTime()) })
	return found
}

// await is named, once there are so many.
func (tr *traced) await(name string, count int) []sdk.ReadOnlySpan {
	tr.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if found := tr.named(name); len(found) == count {
			return found
		} else if time.Now().After(deadline) {
			var names []string
			for _, s := range tr.spans.Ended() {
				names = append(names, s.Name())
			}
			tr.t.Fatalf("%d spans %q, want %d; all: %q", len(found), name, count, names)
		}
	}
}

func wantAttributes(t *testing.T, s sdk.ReadOnlySpan, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, a := range s.Attributes() {
		got[string(a.Key)] = a.Value.String()
	}
	for name, v := range want {
		if got[name] != v {
			t.Errorf("span %q: %s is %q, want %q", s.Name(), name, got[name], v)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("span %q: further attributes %v", s.Name(), got)
	}
}

func wantKind(t *testing.T, s sdk.ReadOnlySpan, kind trace.SpanKind) {
	t.Helper()
	if s.SpanKind() != kind {
		t.Errorf("span %q is of kind %s, want %s", s.Name(), s.SpanKind(), kind)
	}
}

func wantParent(t *testing.T, s, parent sdk.ReadOnlySpan) {
	t.Helper()
	if s.Parent().SpanID() != parent.SpanContext().SpanID() || s.SpanContext().TraceID() != parent.SpanContext().TraceID() {
		t.Errorf("span %q is not a child of %q", s.Name(), parent.Name())
	}
}

func linked(s, to sdk.ReadOnlySpan) bool {
	return slices.ContainsFunc(s.Links(), func(l sdk.Link) bool {
		return l.SpanContext.SpanID() == to.SpanContext().SpanID() && l.SpanContext.TraceID() == to.SpanContext().TraceID()
	})
}

// One trace goes from the caller through the stream, the attempts and what they publish.
func TestOneTrace(t *testing.T) {
	t.Parallel()
	tr := newTraced(t)
	var pub *natsx.Publisher
	ready := make(chan struct{})
	r := natsxtest.Runner{Options: []natsx.Option{tr.Broker()}}.Run(t,
		natsx.Route("orders.*").Durable("billing").Retry(3).Backoff(time.Millisecond, time.Millisecond).
			Handle(func(ctx context.Context, m *natsx.Msg) error {
				<-ready
				if m.Attempt() < 3 {
					return fmt.Errorf("attempt %d", m.Attempt())
				}
				ctx, span := tr.provider.Tracer("app").Start(ctx, "charge")
				defer span.End()
				if v := baggage.FromContext(ctx).Member("tenant").Value(); v != "acme" {
					t.Errorf("the tenant is %q", v)
				}
				return pub.Send(ctx, natsx.To("paid"))
			}),
		natsx.Route("paid").Handle(func(context.Context, *natsx.Msg) error { return nil }))
	pub = natsx.NewPublisher(r.Conn, tr.Publisher())
	close(ready)

	tenant, err := baggage.Parse("tenant=acme")
	if err != nil {
		t.Fatal(err)
	}
	ctx, caller := tr.provider.Tracer("app").Start(baggage.ContextWithBaggage(t.Context(), tenant), "caller")
	if _, err := pub.Publish(ctx, natsx.To("orders.4711").Data([]byte("four")).MsgID("o-4711").Header("Correlation-Id", "c-1")); err != nil {
		t.Fatal(err)
	}
	caller.End()
	for range 3 + 1 {
		r.Next()
	}
	root := tr.await("caller", 1)[0]
	published, charge := tr.await("publish orders.4711", 1)[0], tr.await("charge", 1)[0]
	attempts, received := tr.await("process orders.*", 3), tr.await("receive orders.*", 3)
	sent, paid := tr.await("send paid", 1)[0], tr.await("process paid", 1)[0]

	wantParent(t, published, root)
	wantKind(t, published, trace.SpanKindProducer)
	wantAttributes(t, published, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "publish", "messaging.operation.type": "send",
		"messaging.destination.name": "orders.4711", "messaging.message.id": "o-4711", "messaging.message.body.size": "4",
		"natsx.stream": "NATSXTEST", "natsx.sequence": "1", "natsx.duplicate": "false",
	})
	message := map[string]string{
		"messaging.system": "nats", "messaging.destination.name": "orders.4711", "messaging.destination.template": "orders.*",
		"messaging.consumer.group.name": "billing", "messaging.message.id": "o-4711", "messaging.message.body.size": "4",
		"messaging.message.conversation_id": "c-1", "natsx.stream": "NATSXTEST", "natsx.sequence": "1",
	}
	for i, s := range attempts {
		wantParent(t, s, published)
		wantKind(t, s, trace.SpanKindConsumer)
		want := maps.Clone(message)
		want["messaging.operation.name"], want["messaging.operation.type"] = "process", "process"
		want["natsx.attempt"] = fmt.Sprint(i + 1)
		want["natsx.outcome"] = "succeeded"
		if i < 2 {
			want["natsx.outcome"], want["error.type"] = "retried", "*errors.errorString"
			if s.Status().Code != codes.Error || s.Status().Description != fmt.Sprintf("attempt %d", i+1) {
				t.Errorf("attempt %d has the status %v", i+1, s.Status())
			}
		} else if s.Status().Code != codes.Unset {
			t.Errorf("the last attempt has the status %v", s.Status())
		}
		wantAttributes(t, s, want)
		if !linked(s, published) || linked(s, attempts[0]) != (i > 0) {
			t.Errorf("attempt %d has the links %v", i+1, s.Links())
		}
	}
	for i, s := range received {
		wantParent(t, s, published)
		wantKind(t, s, trace.SpanKindClient)
		want := maps.Clone(message)
		want["messaging.operation.name"], want["messaging.operation.type"] = "receive", "receive"
		want["natsx.attempt"] = fmt.Sprint(i + 1)
		wantAttributes(t, s, want)
		if !s.StartTime().Before(s.EndTime()) || s.EndTime().After(attempts[i].StartTime().Add(time.Millisecond)) {
			t.Errorf("message %d was received from %s to %s, and handled from %s", i+1, s.StartTime(), s.EndTime(), attempts[i].StartTime())
		}
	}
	// The current span goes out, and not the handled message's.
	wantParent(t, charge, attempts[2])
	wantParent(t, sent, charge)
	wantParent(t, paid, sent)
	wantAttributes(t, paid, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "process", "messaging.operation.type": "process",
		"messaging.destination.name": "paid", "messaging.message.body.size": "0",
		"messaging.message.conversation_id": "c-1", // carried over from the order
	})
	tr.firsts.mu.Lock()
	defer tr.firsts.mu.Unlock()
	if n := len(tr.firsts.latest); n > 0 {
		t.Errorf("the first attempts of %d settled messages are kept", n)
	}
}

// A request and its answer are one trace, and an answered error is that of both spans.
func TestRequest(t *testing.T) {
	t.Parallel()
	tr := newTraced(t, WithDestination(func(subject string) string {
		prefix, _, _ := strings.Cut(subject, ".")
		return prefix + ".*"
	}))
	r := natsxtest.Runner{Options: []natsx.Option{tr.Broker()}}.Run(t,
		natsx.Route("prices.*").Reply(func(context.Context, *natsx.Msg) ([]byte, error) { return nil, natsx.Fail(404, "none") }))
	pub := natsx.NewPublisher(r.Conn, tr.Publisher())
	if _, err := pub.Request(t.Context(), natsx.To("prices.tea")); err == nil {
		t.Fatal("no error")
	}
	for range pub.RequestMany(t.Context(), natsx.To("prices.tea")) {
		break
	}
	pub.Request(t.Context(), natsx.To("nobody.there"))
	asked, many, nobody := tr.await("request prices.*", 1)[0], tr.await("request_many prices.*", 1)[0], tr.await("request nobody.*", 1)[0]
	answered := tr.await("process prices.*", 2)
	wantParent(t, answered[0], asked)
	wantParent(t, answered[1], many)
	for _, s := range answered {
		wantKind(t, s, trace.SpanKindServer)
		wantAttributes(t, s, map[string]string{
			"messaging.system": "nats", "messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.destination.name": "prices.tea", "messaging.destination.template": "prices.*", "messaging.message.body.size": "0",
			"error.type": "404",
		})
	}
	wantKind(t, asked, trace.SpanKindClient)
	wantKind(t, many, trace.SpanKindClient)
	wantAttributes(t, asked, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "request", "messaging.operation.type": "send",
		"messaging.destination.name": "prices.tea", "messaging.destination.template": "prices.*", "messaging.message.body.size": "0",
		"error.type": "404",
	})
	if !slices.Contains(nobody.Attributes(), attribute.String("error.type", "no_responders")) {
		t.Errorf("a request of nobody has the attributes %v", nobody.Attributes())
	}
	if len(tr.named("receive prices.*")) > 0 {
		t.Error("a request was received by a pull")
	}
}

// Batches are one span each, with what they have in common.
func TestBatches(t *testing.T) {
	t.Parallel()
	tr := newTraced(t)
	nc := natsxtest.Connect(t, natsxtest.Server(t))
	if err := natsx.Stream("S").Subjects("s.>").AllowAtomicPublish().Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	pub := natsx.NewPublisher(nc, tr.Publisher())
	if _, err := pub.PublishAtomic(t.Context(), natsx.To("s.a"), natsx.To("s.a")); err != nil {
		t.Fatal(err)
	}
	pub.PublishAll(t.Context(), natsx.To("s.a"), natsx.To("nowhere"))
	wantAttributes(t, tr.await("publish_atomic s.a", 1)[0], map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "publish_atomic", "messaging.operation.type": "send",
		"messaging.destination.name": "s.a", "messaging.batch.message_count": "2",
		"natsx.stream": "S", "natsx.sequence": "2", "natsx.duplicate": "false",
	})
	all := tr.await("publish_all", 1)[0]
	wantAttributes(t, all, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "publish_all", "messaging.operation.type": "send",
		"messaging.batch.message_count": "2", "error.type": "no_stream",
	})
	if all.Status().Code != codes.Error {
		t.Errorf("a batch of which one failed has the status %v", all.Status())
	}
}

// Each message of a batch has a span, in the trace that it is of.
func TestMessagesOfABatch(t *testing.T) {
	t.Parallel()
	tr := newTraced(t)
	r := natsxtest.Runner{Options: []natsx.Option{tr.Broker()}}.Run(t,
		natsx.Route("orders.*").Durable("billing").Retry(1).Backoff(time.Millisecond, time.Millisecond).Batch(2, time.Minute).
			HandleBatch(func(context.Context, []*natsx.Msg) error { return errors.New("no") }))
	pub := natsx.NewPublisher(r.Conn, tr.Publisher())
	for _, name := range []string{"a", "b"} {
		if _, err := pub.Publish(t.Context(), natsx.To("orders."+name)); err != nil {
			t.Fatal(err)
		}
	}
	spans := tr.await("process orders.*", 4)
	first := map[string]sdk.ReadOnlySpan{}
	for _, s := range spans {
		attributes := map[attribute.Key]string{}
		for _, a := range s.Attributes() {
			attributes[a.Key] = a.Value.String()
		}
		subject := attributes["messaging.destination.name"]
		wantParent(t, s, tr.await("publish "+subject, 1)[0])
		if attributes["messaging.batch.message_count"] != "2" || s.Status().Code != codes.Error || !s.StartTime().Before(s.EndTime()) {
			t.Errorf("%s: attributes %v, status %v, from %s to %s", subject, attributes, s.Status(), s.StartTime(), s.EndTime())
		}
		want := "retried"
		if earlier := first[subject]; earlier != nil {
			want = "dead"
			if !linked(s, earlier) {
				t.Errorf("%s: the retry has the links %v", subject, s.Links())
			}
		}
		first[subject] = s
		if attributes[OutcomeKey] != want {
			t.Errorf("%s: outcome %s, want %s", subject, attributes[OutcomeKey], want)
		}
	}
}

// handled calls a handler as a route would.
func handled(t *testing.T, tr *traced, m *natsx.Msg, h natsx.Handler) (err error) {
	t.Helper()
	defer func() {
		if v := recover(); v != nil {
			err = &natsx.PanicError{Value: v}
		}
	}()
	return tr.Middleware(h)(natsxtest.Context(t.Context(), m), m)
}

// What a handler does with its message is what its span says.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	var null *natsx.ReplyError
	for _, tt := range []struct {
		name    string
		handler natsx.Handler
		code    codes.Code
		outcome string
		kind    string // error.type
	}{
		{"success", func(context.Context, *natsx.Msg) error { return nil }, codes.Unset, "succeeded", ""},
		{"discard", func(context.Context, *natsx.Msg) error { return natsx.Discard(errors.New("no")) }, codes.Unset, "discarded", ""},
		{"permanent", func(context.Context, *natsx.Msg) error { return natsx.Permanent(errors.New("no")) }, codes.Error, "dead", "*errors.errorString"},
		{"timeout", func(context.Context, *natsx.Msg) error { return context.DeadlineExceeded }, codes.Error, "retried", "timeout"},
		{"panic", func(context.Context, *natsx.Msg) error { panic("oops") }, codes.Error, "retried", "panic"},
		{"an error without a text", func(context.Context, *natsx.Msg) error { return null }, codes.Error, "retried", ""},
	} {
		tr := newTraced(t)
		err := handled(t, tr, natsxtest.Msg("a", nil, natsxtest.Route("a"), natsxtest.Durable("d")), tt.handler)
		s := tr.await("process a", 1)[0]
		if s.Status().Code != tt.code {
			t.Errorf("%s: status %v", tt.name, s.Status())
		}
		for name, want := range map[string]string{"natsx.outcome": tt.outcome, "error.type": tt.kind} {
			got := ""
			for _, a := range s.Attributes() {
				if string(a.Key) == name {
					got = a.Value.String()
				}
			}
			if got != want {
				t.Errorf("%s: %s is %q, want %q", tt.name, name, got, want)
			}
		}
		if panicked, ok := errors.AsType[*natsx.PanicError](err); (tt.name == "panic") != ok || ok && panicked.Value != "oops" {
			t.Errorf("%s: the handler's end is %v", tt.name, err)
		}
	}
}

// A handler's message starts a trace of its own unless its headers are of one: the span
// that is current where the broker was started has nothing to do with it.
func TestAmbientSpanIsNoParent(t *testing.T) {
	t.Parallel()
	tr := newTraced(t, WithoutReceive())
	ctx, ambient := tr.provider.Tracer("app").Start(t.Context(), "main")
	defer ambient.End()
	m := natsxtest.Msg("a", nil, natsxtest.Route("a"), natsxtest.Durable("d"))
	if err := tr.Middleware(func(context.Context, *natsx.Msg) error { return nil })(natsxtest.Context(ctx, m), m); err != nil {
		t.Fatal(err)
	}
	tr.Observe(ctx, natsx.Event{Route: "a", Durable: "d", Msg: m, Started: time.Now(), Waited: 1, Outcome: natsx.OutcomeSucceeded})
	s := tr.await("process a", 1)[0]
	if s.Parent().IsValid() || len(s.Links()) > 0 {
		t.Errorf("it has the parent %v and the links %v", s.Parent(), s.Links())
	}
	if len(tr.named("receive a")) > 0 {
		t.Error("receiving has a span, which was not wanted")
	}
}

const (
	remote = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	header = "traceparent"
)

// Of a message that no traced handler handles, what it came with goes on, unless the
// application has something newer. So does it where nothing is recorded.
func TestWhatGoesOut(t *testing.T) {
	t.Parallel()
	nc := natsxtest.Connect(t, natsxtest.Server(t))
	sub, err := nc.SubscribeSync("out")
	if err != nil {
		t.Fatal(err)
	}
	next := func() nats.Header {
		t.Helper()
		m, err := sub.NextMsg(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return m.Header
	}
	in := natsxtest.Msg("in", nil, natsxtest.Header("Traceparent", remote), natsxtest.Header("tracestate", "k=v"), natsxtest.Header("baggage", "tenant=acme"))
	ctx := natsxtest.Context(t.Context(), in)

	tr := newTraced(t)
	pub := natsx.NewPublisher(nc, tr.Publisher())
	send := func(ctx context.Context, e natsx.Envelope) nats.Header {
		t.Helper()
		if err := pub.Send(ctx, e); err != nil {
			t.Fatal(err)
		}
		return next()
	}
	h := send(ctx, natsx.To("out"))
	sent := tr.await("send out", 1)[0]
	if want := fmt.Sprintf("00-%s-%s-01", "0af7651916cd43dd8448eb211c80319c", sent.SpanContext().SpanID()); h.Get(header) != want || h.Get("baggage") != "tenant=acme" || len(h["Traceparent"]) > 0 {
		t.Errorf("from a handler that is not traced: got %v, want %s", h, want)
	}
	app, span := tr.provider.Tracer("app").Start(t.Context(), "app")
	span.End()
	h = send(trace.ContextWithSpan(ctx, trace.SpanFromContext(app)), natsx.To("out"))
	if got := h.Get(header); !strings.Contains(got, span.SpanContext().TraceID().String()) || h.Get("tracestate") != "" || h.Get("baggage") != "tenant=acme" {
		t.Errorf("with a span of the application: got %v", h)
	}
	if h = send(ctx, natsx.To("out").Header(header, "mine")); h.Get(header) != "mine" {
		t.Errorf("with a header of its own: got %v", h)
	}
	// What a traced handler takes out of its baggage does not go on.
	err = tr.Middleware(func(ctx context.Context, _ *natsx.Msg) error {
		return pub.Send(baggage.ContextWithoutBaggage(ctx), natsx.To("out"))
	})(ctx, in)
	if h = next(); err != nil || h.Get("baggage") != "" || h.Get("tracestate") != "k=v" {
		t.Errorf("without baggage: got %v, %v", h, err)
	}

	tr = newTraced(t, WithTracerProvider(noop.NewTracerProvider()), WithPropagator(propagation.TraceContext{}))
	pub = natsx.NewPublisher(nc, tr.Publisher())
	if h = send(ctx, natsx.To("out")); h.Get(header) != remote || h.Get("baggage") != "tenant=acme" {
		t.Errorf("where nothing is recorded: got %v", h)
	}
}

// The first attempts that are kept are no more than a bound, and the latest.
func TestFirstsAreBounded(t *testing.T) {
	t.Parallel()
	var f firsts
	of := func(i int) trace.SpanContext {
		return trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{byte(i), byte(i >> 8), byte(i >> 16), 1}})
	}
	const n = 3 * maxFirsts
	for i := range n {
		f.put(key{sequence: uint64(i)}, of(i))
	}
	if kept := len(f.latest) + len(f.before); kept > maxFirsts {
		t.Errorf("%d are kept, want %d at most", kept, maxFirsts)
	}
	for i := n - maxFirsts/2; i < n; i++ {
		if !f.get(key{sequence: uint64(i)}).Equal(of(i)) {
			t.Fatalf("number %d is forgotten", i)
		}
	}
	if f.get(key{}).IsValid() {
		t.Error("the oldest is kept")
	}
	f.drop(key{sequence: n - 1})
	if f.get(key{sequence: n - 1}).IsValid() {
		t.Error("one that is settled is kept")
	}
}

// The README shows code of the examples.
func TestReadmeShowsExamples(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	flat := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	blocks := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) == 0 {
		t.Error("README.md shows no code")
	}
	for _, block := range blocks {
		if !strings.Contains(flat(string(examples)), flat(block[1])) {
			t.Errorf("no example has this block of README.md:\n%s", block[1])
		}
	}
}
