package natsxtest

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

func TestMsg(t *testing.T) {
	t.Parallel()
	at := time.Unix(1700000000, 5)
	m := Msg("orders.eu", []byte("x"), Route("orders.*"), Stream("ORDERS"), Durable("billing"), Sequence(7), Time(at), Attempt(3),
		Header("K", "a"), Header("K", "b"), Header("k", "c"))
	if m.Subject != "orders.eu" || string(m.Data) != "x" || m.Token(1) != "eu" {
		t.Errorf("subject %q, data %q, token %q", m.Subject, m.Data, m.Token(1))
	}
	if m.Route() != "orders.*" || m.Stream() != "ORDERS" || m.Durable() != "billing" || m.Sequence() != 7 || !m.Time().Equal(at) || m.Attempt() != 3 {
		t.Errorf("route %q, stream %q, durable %q, sequence %d, time %s, attempt %d", m.Route(), m.Stream(), m.Durable(), m.Sequence(), m.Time(), m.Attempt())
	}
	if diff := cmp.Diff(nats.Header{"K": {"a", "b"}, "k": {"c"}}, m.Header); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
}

// A message without facts, and none at all, is like one of core NATS.
func TestMessagesWithoutFacts(t *testing.T) {
	t.Parallel()
	handler := natsx.JSON(func(ctx context.Context, _ int) error {
		if n := natsx.MsgFrom(ctx).Attempt(); n != 1 {
			t.Errorf("attempt %d", n)
		}
		return nil
	})
	for name, m := range map[string]*natsx.Msg{
		"made": Msg("", nil), "attempt 0": Msg("", nil, Attempt(0)), "zero": {}, "nil": nil, "outside": natsx.MsgFrom(t.Context()),
	} {
		if m.Attempt() != 1 || m.Sequence() != 0 || !m.Time().IsZero() || m.Route()+m.Stream()+m.Durable()+m.Token(0) != "" {
			t.Errorf("%s: attempt %d, sequence %d, time %s, and %q", name, m.Attempt(), m.Sequence(), m.Time(), m.Route()+m.Stream()+m.Durable()+m.Token(0))
		}
		m.ReplyHeader().Set("K", "v")
		if got := natsx.MsgFrom(Context(t.Context(), m)); got != m {
			t.Errorf("%s: MsgFrom of its context is another one: %v", name, got)
		}
		if _, undecodable := errors.AsType[*natsx.DecodeError](handler(Context(t.Context(), m), m)); !undecodable {
			t.Errorf("%s: an empty payload is decoded", name)
		}
	}
	if err := handler(t.Context(), Msg("n", []byte("1"))); err != nil {
		t.Errorf("a handler called without a message's context: %v", err)
	}
}

// What is published with a message's context is what its handler would publish.
func TestContext(t *testing.T) {
	t.Parallel()
	nc := Connect(t, Server(t))
	if err := natsx.Stream("OUT").Subjects("out").Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	type key struct{}
	pub := natsx.NewPublisher(nc)
	m := Msg("in", nil, Stream("IN"), Durable("worker"), Sequence(7), Time(time.Unix(0, 42)), Header("Correlation-Id", "c"))
	for run := range 2 {
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "v"))
		in := Context(ctx, m)
		if in.Value(key{}) != "v" {
			t.Error("the parent's values are lost")
		}
		ack, err := pub.Publish(in, natsx.To("out").Data([]byte("x")))
		if err != nil || ack.Duplicate != (run > 0) {
			t.Errorf("run %d: got %+v, %v", run+1, ack, err)
		}
		if cancel(); in.Err() == nil {
			t.Error("it does not end with its parent")
		}
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "OUT")
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.GetMsg(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if id := got.Header.Get(nats.MsgIdHdr); !strings.HasPrefix(id, "IN/worker/7@42/") || got.Header.Get("Correlation-Id") != "c" {
		t.Errorf("headers %v", got.Header)
	}
}

func TestSettle(t *testing.T) {
	t.Parallel()
	handle := func(context.Context, *natsx.Msg) error { return nil }
	bill := natsx.Route("orders.*").Durable("billing").Retry(10).Backoff(time.Second, 10*time.Minute).DLQ("dlq.orders").Handle(handle)
	core := natsx.Route("orders.*").Handle(handle)
	reply := natsx.Route("ask").Reply(func(context.Context, *natsx.Msg) ([]byte, error) { return nil, nil })
	boom := errors.New("boom")
	retried := func(after time.Duration) Settlement { return Settlement{Outcome: natsx.OutcomeRetried, After: after} }
	dead := func(r natsx.Reason) Settlement { return Settlement{Outcome: natsx.OutcomeDead, Reason: r} }
	for _, tt := range []struct {
		name    string
		spec    natsx.Spec
		err     error
		attempt int
		want    Settlement
	}{
		{"success", bill, nil, 1, Settlement{Outcome: natsx.OutcomeSucceeded}},
		{"first failure", bill, boom, 1, retried(time.Second)},
		{"no attempt is the first", bill, boom, 0, retried(time.Second)},
		{"later failure", bill, boom, 9, retried(256 * time.Second)},
		{"longest backoff", bill, boom, 10, retried(512 * time.Second)},
		{"last failure", bill, boom, 11, dead(natsx.ReasonExhausted)},
		{"timeout", bill, context.DeadlineExceeded, 1, retried(time.Second)},
		{"later", bill, natsx.RetryAfter(time.Hour, boom), 3, retried(time.Hour)},
		{"permanent", bill, natsx.Permanent(boom), 1, dead(natsx.ReasonPermanent)},
		{"undecodable", bill, &natsx.DecodeError{Err: boom}, 1, dead(natsx.ReasonUndecodable)},
		{"last panic", bill, &natsx.PanicError{Value: "x"}, 11, dead(natsx.ReasonPanic)},
		{"discard", bill, natsx.Discard(boom), 1, Settlement{Outcome: natsx.OutcomeDiscarded}},
		{"core success", core, nil, 1, Settlement{Outcome: natsx.OutcomeSucceeded}},
		{"core failure", core, boom, 1, Settlement{Outcome: natsx.OutcomeFailed}},
		{"core discard", core, natsx.Discard(boom), 1, Settlement{Outcome: natsx.OutcomeDiscarded}},
		{"answer", reply, nil, 1, Settlement{Outcome: natsx.OutcomeSucceeded}},
		{"answered error", reply, natsx.Discard(boom), 1, Settlement{Outcome: natsx.OutcomeFailed}},
	} {
		if got := Settle(tt.spec, tt.err, tt.attempt); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// No program links nats-server, or package testing, for importing natsx.
func TestOnlyTestsLinkTheServer(t *testing.T) {
	t.Parallel()
	deps := func(pkg string) []string {
		out, err := exec.Command("go", "list", "-deps", pkg).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	linked := func(pkg string) (found []string) {
		for _, dep := range deps(pkg) {
			if dep == "testing" || strings.HasPrefix(dep, "github.com/nats-io/nats-server") || strings.HasSuffix(dep, "/natsxtest") {
				found = append(found, dep)
			}
		}
		return found
	}
	if got := linked("github.com/natsx/natsx"); got != nil {
		t.Errorf("natsx links %v", got)
	}
	if got := linked("github.com/natsx/natsx/natsxtest"); got == nil {
		t.Error("natsxtest links no server: the check sees nothing")
	}
}
