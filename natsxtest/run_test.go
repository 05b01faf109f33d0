package natsxtest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// Routes of all kinds run with the streams that they need, and what becomes of each
// attempt is what Settle says.
func TestRun(t *testing.T) {
	t.Parallel()
	fast := natsx.Route("orders.*").Durable("billing").Retry(2).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.orders")
	errs := map[string]error{
		"bad": natsx.Permanent(errors.New("bad")), "broken": errors.New("broken"), "no": natsx.Discard(errors.New("no")),
		"undecodable": &natsx.DecodeError{Err: errors.New("no json")}, "later": natsx.RetryAfter(2*time.Millisecond, nil),
	}
	bill := fast.Handle(func(_ context.Context, m *natsx.Msg) error {
		if string(m.Data) == "once" && m.Attempt() > 1 {
			return nil
		}
		if string(m.Data) == "once" {
			return errors.New("once")
		}
		return errs[string(m.Data)]
	})
	r := Run(t, bill,
		natsx.Route("eu.orders").Durable("europe").Stream("EUROPE").Handle(func(context.Context, *natsx.Msg) error { return nil }),
		natsx.Route("dlq.>").Durable("alerts").Handle(natsx.OnDeadLetter(func(context.Context, natsx.DeadLetter) error { return nil })),
		natsx.Route("news").Handle(func(context.Context, *natsx.Msg) error { return nil }),
		natsx.Route("ask").Reply(func(context.Context, *natsx.Msg) ([]byte, error) { return []byte("yes"), nil }))

	for data, want := range map[string][]natsx.Outcome{
		"ok":          {natsx.OutcomeSucceeded},
		"once":        {natsx.OutcomeRetried, natsx.OutcomeSucceeded},
		"no":          {natsx.OutcomeDiscarded},
		"bad":         {natsx.OutcomeDead},
		"undecodable": {natsx.OutcomeDead},
		"broken":      {natsx.OutcomeRetried, natsx.OutcomeRetried, natsx.OutcomeDead},
		"later":       {natsx.OutcomeRetried, natsx.OutcomeRetried, natsx.OutcomeDead},
	} {
		r.Publish(natsx.To("orders.new").Data([]byte(data)))
		n := len(want)
		if want[n-1] == natsx.OutcomeDead {
			n++ // its letter, which may be handled before its own end is observed
		}
		var got []natsx.Outcome
		for range n {
			e := r.Next()
			if e.Durable == "alerts" {
				if e.Outcome != natsx.OutcomeSucceeded || e.Msg.Subject != "dlq.orders" {
					t.Errorf("%s: the letter's event is %+v", data, e)
				}
				continue
			}
			got = append(got, e.Outcome)
			s := Settle(bill, e.Err, e.Msg.Attempt())
			if s.Outcome != e.Outcome || s.Reason != e.Reason || s.After/2 > e.Delay || e.Delay > 2*s.After {
				t.Errorf("%s: Settle says %+v, the route did %s, %q after %s", data, s, e.Outcome, e.Reason, e.Delay)
			}
			if string(e.Msg.Data) != data || e.Durable != "billing" {
				t.Errorf("%s: an event of %q of %q", data, e.Msg.Data, e.Durable)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", data, got, want)
		}
	}
	r.Publish(natsx.To("news"), natsx.To("news"))
	if got := r.Until(natsx.OutcomeSucceeded); len(got) != 1 || got[0].Route != "news" {
		t.Errorf("news: got %+v", got)
	}
	r.Until(natsx.OutcomeSucceeded)
	if m, err := r.Publisher.Request(t.Context(), natsx.To("ask")); err != nil || string(m.Data) != "yes" {
		t.Errorf("request: %v, %v", m, err)
	}
	if e := r.Next(); e.Route != "ask" || e.Outcome != natsx.OutcomeSucceeded {
		t.Errorf("ask: got %+v", e)
	}
	if err := errors.Join(r.Stop(), r.Stop()); err != nil {
		t.Errorf("Stop: %v", err)
	}
}

// A runner takes a connection with streams of its own, and options.
func TestRunnerAtAServerOfItsOwn(t *testing.T) {
	t.Parallel()
	nc := Connect(t, Server(t))
	if err := natsx.Stream("WORK").Subjects("work.>").Retention(jetstream.WorkQueuePolicy).Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	wrapped := false
	r := Runner{Conn: nc, Options: []natsx.Option{natsx.WithMiddleware(func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			wrapped = true
			return next(ctx, m)
		}
	})}}.Run(t, natsx.Route("work.a").Durable("a").Handle(func(context.Context, *natsx.Msg) error { return nil }))
	r.Publish(natsx.To("work.a"))
	if e := r.Next(); e.Msg.Stream() != "WORK" || !wrapped {
		t.Errorf("got a message of %q, through the middleware: %v", e.Msg.Stream(), wrapped)
	}
}

// recorder is a test that notes its failures instead of failing.
type recorder struct {
	testing.TB
	mu   sync.Mutex
	said []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

// ended runs fn as a test and returns how it failed.
func ended(t *testing.T, fn func(t testing.TB)) string {
	t.Helper()
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(r)
	}()
	<-done
	return strings.Join(r.said, "\n")
}

// A test that waits for what does not come fails, and says why.
func TestWaitsEnd(t *testing.T) {
	t.Parallel()
	nothing := func(context.Context, *natsx.Msg) error { return nil }
	for _, tt := range []struct {
		name, want string
		run        func(t testing.TB)
	}{
		{"no event", "no further attempt within 1ms", func(t testing.TB) {
			r := Run(t, natsx.Route("a").Handle(nothing))
			r.limit = time.Millisecond
			r.Until(natsx.OutcomeDead)
		}},
		{"stopped", "Run has returned", func(t testing.TB) {
			r := Run(t, natsx.Route("a").Handle(nothing))
			r.Stop()
			r.Next()
		}},
		{"faulty routes", "must not be negative", func(t testing.TB) { Run(t, natsx.Route("a").Durable("d").Retry(-1).Handle(nothing)) }},
		{"not published", "publish to", func(t testing.TB) { Run(t, natsx.Route("a").Handle(nothing)).Publish(natsx.To("a b")) }},
	} {
		if got := ended(t, tt.run); !strings.Contains(got, tt.want) {
			t.Errorf("%s: it said %q, want %q", tt.name, got, tt.want)
		}
	}
}
