package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// noting is a middleware that notes in trail what it sees.
func noting(trail *[]string, name string) PublishMiddleware {
	return func(next PublishFunc) PublishFunc {
		return func(ctx context.Context, c *PublishCall) error {
			*trail = append(*trail, fmt.Sprintf("%s %s %d", name, c.Operation, len(c.Envelopes)))
			err := next(ctx, c)
			reply := ""
			if c.Reply != nil {
				reply = string(c.Reply.Data)
			}
			*trail = append(*trail, fmt.Sprintf("%s %d acks %q %v", name, len(c.Acks), reply, err != nil))
			return err
		}
	}
}

// Each call goes through the middleware once, from the first to the last and back, with
// its results.
func TestPublishMiddleware(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowAtomicPublish: true})
	runBroker(t, NewBroker(nc), Route("ask").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("yes"), nil }))
	ctx := testContext(t)
	var trail []string
	pub := NewPublisher(nc, WithPublishMiddleware(noting(&trail, "outer"), nil), WithPublishMiddleware(noting(&trail, "inner")))
	around := func(op Operation, envelopes int, results string) []string {
		call := fmt.Sprintf(" %s %d", op, envelopes)
		return []string{"outer" + call, "inner" + call, "inner " + results, "outer " + results}
	}
	for _, tt := range []struct {
		name string
		call func() error
		want []string
	}{
		{"send", func() error { return pub.Send(ctx, To("core")) }, around(OperationSend, 1, `0 acks "" false`)},
		{"publish", func() error {
			ack, err := pub.Publish(ctx, To("s.a"))
			if ack.Sequence != 1 {
				return fmt.Errorf("ack %+v, %w", ack, err)
			}
			return err
		}, around(OperationPublish, 1, `1 acks "" false`)},
		{"publish what no stream captures", func() error {
			if ack, err := pub.Publish(ctx, To("nowhere")); !errors.Is(err, ErrNoStream) || (ack != Ack{}) {
				return fmt.Errorf("ack %+v, %w", ack, err)
			}
			return nil
		}, around(OperationPublish, 1, `1 acks "" true`)},
		{"publish all", func() error {
			acks, err := pub.PublishAll(ctx, To("s.a"), To("nowhere"), To("s.b"))
			failed, ok := errors.AsType[*PublishError](err)
			if !ok || failed.Errors[1] == nil || len(acks) != 3 || acks[2].Sequence != 3 {
				return fmt.Errorf("acks %+v, %w", acks, err)
			}
			return nil
		}, around(OperationPublishAll, 3, `3 acks "" true`)},
		{"publish atomically", func() error {
			ack, err := pub.PublishAtomic(ctx, To("s.a"), To("s.b"))
			if ack.Sequence != 5 {
				return fmt.Errorf("ack %+v, %w", ack, err)
			}
			return err
		}, around(OperationPublishAtomic, 2, `1 acks "" false`)},
		{"request", func() error {
			m, err := pub.Request(ctx, To("ask"))
			if err == nil && string(m.Data) != "yes" {
				return fmt.Errorf("answer %q", m.Data)
			}
			return err
		}, around(OperationRequest, 1, `0 acks "yes" false`)},
		{"request of many", func() error {
			for m, err := range pub.RequestMany(ctx, To("ask")) {
				if err != nil || string(m.Data) != "yes" {
					return fmt.Errorf("answer %v: %w", m, err)
				}
				break
			}
			return nil
		}, around(OperationRequestMany, 1, `0 acks "" false`)},
		{"request of many that nobody answers", func() error {
			for m, err := range pub.RequestMany(ctx, To("nobody")) {
				if m != nil || !errors.Is(err, ErrNoResponders) {
					return fmt.Errorf("answer %v: %w", m, err)
				}
			}
			return nil
		}, around(OperationRequestMany, 1, `0 acks "" true`)},
	} {
		trail = nil
		if err := tt.call(); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if diff := cmp.Diff(tt.want, trail); diff != "" {
			t.Errorf("%s: calls differ (-want +got):\n%s", tt.name, diff)
		}
	}
}

// A middleware decides what is sent, and what its caller is told.
func TestPublishMiddlewareDecides(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	refused := errors.New("refused")
	refuse := NewPublisher(nc, WithPublishMiddleware(func(PublishFunc) PublishFunc {
		return func(context.Context, *PublishCall) error { return refused }
	}))
	ctx := testContext(t)
	_, published := refuse.Publish(ctx, To("a"))
	_, all := refuse.PublishAll(ctx, To("a"), To("b"))
	_, asked := refuse.Request(ctx, To("a"))
	errs := []error{refuse.Send(ctx, To("a")), published, all, asked}
	for _, err := range refuse.RequestMany(ctx, To("a")) {
		errs = append(errs, err)
	}
	if want := slices.Repeat([]error{refused}, 5); !slices.Equal(errs, want) {
		t.Errorf("got %v, want %v", errs, want)
	}

	sub, err := nc.SubscribeSync("b")
	if err != nil {
		t.Fatal(err)
	}
	es := []Envelope{To("a").Data([]byte("x"))}
	redirect := NewPublisher(nc, WithPublishMiddleware(func(next PublishFunc) PublishFunc {
		return func(ctx context.Context, c *PublishCall) error {
			c.Envelopes[0] = To("b").Data([]byte(c.Envelopes[0].Subject()))
			return next(ctx, c)
		}
	}))
	if err := redirect.Send(ctx, es[0]); err != nil {
		t.Fatal(err)
	}
	if m, err := sub.NextMsgWithContext(ctx); err != nil || string(m.Data) != "a" {
		t.Errorf("got %v, %v", m, err)
	}
	if err := errors.Join(sub.Unsubscribe(), nc.Flush()); err != nil { // it would not acknowledge
		t.Fatal(err)
	}
	redirect.PublishAll(ctx, es...)
	if es[0].Subject() != "a" || es[0].Size() != 1 {
		t.Errorf("the caller's envelope has become one to %q", es[0].Subject())
	}

	fewer := NewPublisher(nc, WithPublishMiddleware(func(next PublishFunc) PublishFunc {
		return func(ctx context.Context, c *PublishCall) error {
			c.Envelopes = nil
			return next(ctx, c)
		}
	}))
	if err := fewer.Send(ctx, To("a")); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("without an envelope: got %v, want ErrOutOfRange", err)
	}
}

// What a middleware carries over takes the place of the handled message's headers, leaves
// those of an envelope alone, and is none of the message's id or needed for its delivery.
func TestPublishMiddlewareCarries(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, withMaxPayload(1024)).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	core, err := nc.SubscribeSync("core")
	if err != nil {
		t.Fatal(err)
	}
	run := 0
	pub := NewPublisher(nc, WithPublishMiddleware(func(next PublishFunc) PublishFunc {
		return func(ctx context.Context, c *PublishCall) error {
			run++
			delete(c.Carried, "tracestate")
			c.Carried["traceparent"] = []string{fmt.Sprint("span ", run)}
			c.Carried["x-more"] = []string{"m"}
			return next(ctx, c)
		}
	}))
	in := nats.Header{"traceparent": {"tp"}, "tracestate": {"ts"}, "baggage": {"b"}}
	for attempt := range 2 {
		ctx := handling(testContext(t), in)
		for _, e := range []Envelope{To("s.a"), To("s.b").Header("traceparent", "own")} {
			if ack, err := pub.Publish(ctx, e); err != nil || ack.Duplicate != (attempt > 0) {
				t.Errorf("attempt %d: got %+v, %v", attempt+1, ack, err)
			}
		}
	}
	want := []nats.Header{
		{"traceparent": {"span 1"}, "baggage": {"b"}, "x-more": {"m"}},
		{"traceparent": {"own"}, "baggage": {"b"}, "x-more": {"m"}},
	}
	for i, h := range want {
		m, err := s.GetMsg(testContext(t), uint64(i+1))
		if err != nil {
			t.Fatal(err)
		}
		m.Header.Del(nats.MsgIdHdr)
		if diff := cmp.Diff(h, m.Header); diff != "" {
			t.Errorf("headers of message %d differ (-want +got):\n%s", i+1, diff)
		}
	}
	// So does a request from outside of a handler, which has no headers otherwise.
	runBroker(t, NewBroker(nc), Route("ask").Reply(func(_ context.Context, m *Msg) ([]byte, error) { return []byte(m.Header.Get("x-more")), nil }))
	if m, err := pub.Request(testContext(t), To("ask")); err != nil || string(m.Data) != "m" {
		t.Errorf("request: got %v, %v", m, err)
	}
	large := []byte(strings.Repeat("x", 1024))
	if err := pub.Send(handling(testContext(t), in), To("core").Data(large)); err != nil {
		t.Fatal(err)
	}
	if m, err := core.NextMsgWithContext(testContext(t)); err != nil || len(m.Data) != len(large) || len(m.Header) > 0 {
		t.Errorf("a message of the largest size: %v, %v", m, err)
	}
	if _, err := pub.Publish(handling(testContext(t), in), To("s.a").Data(large)); err != nil {
		t.Errorf("a stored message of the largest size: %v", err)
	}
}

// A publisher without middleware allocates what its work allocates.
func TestNoPublishMiddlewareCostsNothing(t *testing.T) {
	nc := connect(t, startServer(t).ClientURL())
	pub, e, ctx := NewPublisher(nc), To("core"), context.Background()
	least := func(send func(context.Context, Envelope) error) float64 {
		n := 1e9
		for range 5 { // the connection's own goroutines allocate now and then
			n = min(n, testing.AllocsPerRun(100, func() {
				if err := send(ctx, e); err != nil {
					t.Fatal(err)
				}
			}))
		}
		return n
	}
	if direct, got := least(pub.send), least(pub.Send); got > direct {
		t.Errorf("Send allocates %v times, the work alone %v", got, direct)
	}
}

// BenchmarkSend is what the middleware of a publisher costs, and none costs.
func BenchmarkSend(b *testing.B) {
	nc := connect(b, startServer(b).ClientURL())
	pass := func(next PublishFunc) PublishFunc { return next }
	for _, bm := range []struct {
		name string
		send func(context.Context, Envelope) error
	}{
		{"work", NewPublisher(nc).send},
		{"none", NewPublisher(nc).Send},
		{"one", NewPublisher(nc, WithPublishMiddleware(pass)).Send},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := bm.send(b.Context(), To("core")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
