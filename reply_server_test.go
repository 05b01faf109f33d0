package natsx

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// answers collects replies on an inbox of its own, so that requests can be sent
// without waiting for each.
type answers struct {
	nc  *nats.Conn
	sub *nats.Subscription
}

func collectAnswers(t testing.TB, nc *nats.Conn) *answers {
	t.Helper()
	sub, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	return &answers{nc, sub}
}

// ask sends a request; timeout is its Natsx-Timeout header, or empty.
func (a *answers) ask(t testing.TB, subject, data, timeout string) {
	t.Helper()
	m := &nats.Msg{Subject: subject, Reply: a.sub.Subject, Data: []byte(data)}
	if timeout != "" {
		m.Header = nats.Header{timeoutHeader: {timeout}}
	}
	if err := a.nc.PublishMsg(m); err != nil {
		t.Fatal(err)
	}
}

// next returns an answer's payload, or the code and text of its error.
func (a *answers) next(t testing.TB) string {
	t.Helper()
	m, err := a.sub.NextMsg(testLimit)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	if e := replyError(m.Header); e != nil {
		return e.RawCode + " " + e.Message
	}
	return string(m.Data)
}

// none makes sure that nothing more was answered.
func (a *answers) none(t testing.TB) {
	t.Helper()
	if err := a.nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	if n, _, err := a.sub.Pending(); err != nil || n != 0 {
		t.Errorf("%d answers too many, %v", n, err)
	}
}

// blocked is a responder that answers with its request once released, whatever
// becomes of its context.
type blocked struct {
	entered chan string   // told of each request that it got
	release chan struct{} // closed to let all of them end
	once    sync.Once
}

func newBlocked(t testing.TB) *blocked {
	b := &blocked{entered: make(chan string, 1000), release: make(chan struct{})}
	t.Cleanup(b.free)
	return b
}

func (b *blocked) free() { b.once.Do(func() { close(b.release) }) }

func (b *blocked) respond(_ context.Context, m *Msg) ([]byte, error) {
	b.entered <- string(m.Data)
	<-b.release
	return m.Data, nil
}

func TestRequestersDeadlineBoundsTheResponder(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	left := make(chan time.Duration, 1)
	respond := func(ctx context.Context, m *Msg) ([]byte, error) {
		deadline, ok := ctx.Deadline()
		if !ok {
			left <- 0
		} else {
			left <- time.Until(deadline)
		}
		return nil, nil
	}
	runBroker(t, NewBroker(connect(t, s.ClientURL())),
		Route("free").Reply(respond), Route("limited").Timeout(time.Minute).Reply(respond))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	tests := []struct {
		subject, header string
		low, high       time.Duration // of what is left to the responder
	}{
		{"free", "", 0, 0},
		{"free", "30s", 1, 30 * time.Second},
		{"free", "soon", 0, 0},
		{"free", "-5s", 0, 0},
		{"free", "0s", 0, 0},
		{"free", "1e9999h", 0, 0},
		{"free", "2562047h47m16.854775807s", 1000 * time.Hour, 1<<63 - 1},
		{"limited", "", time.Second, time.Minute},
		{"limited", "30s", 1, 30 * time.Second},
		{"limited", "5m", 31 * time.Second, time.Minute},
		{"limited", "soon", 31 * time.Second, time.Minute},
	}
	for _, tt := range tests {
		a.ask(t, tt.subject, "", tt.header)
		if got := receive(t, left, "the responder"); got < tt.low || got > tt.high {
			t.Errorf("%s with %q: %s are left, want %s to %s", tt.subject, tt.header, got, tt.low, tt.high)
		}
		if got := a.next(t); got != "" {
			t.Errorf("%s with %q: answered %q", tt.subject, tt.header, got)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if _, err := NewPublisher(a.nc).Request(ctx, To("free")); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, left, "the responder"); got <= 0 || got > 40*time.Second {
		t.Errorf("%s are left of a request's 40s", got)
	}
}

func TestResponderIsCancelledWithItsRequester(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	ended := make(chan error, 1)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), Route("slow").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	}))
	// Long enough for a loaded machine to hand it to a worker, where the
	// responder would otherwise not run at all.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	// And there the answer may come before the requester sees the time.
	var reply *ReplyError
	_, err := NewPublisher(connect(t, s.ClientURL())).Request(ctx, To("slow"))
	if !errors.Is(err, context.DeadlineExceeded) && !(errors.As(err, &reply) && reply.Code == 504) {
		t.Errorf("got %v, want a timeout", err)
	}
	if err := receive(t, ended, "the responder's end"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the responder's context ended with %v", err)
	}
	eventually(t, "it counts as failed", func() bool { return r.Stats().Routes[0].Failed == 1 })
}

func TestRequestThatWaitedTooLongIsNotRun(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	b := newBlocked(t)
	events := make(chan Event, 10)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log), WithObserver(observerFunc(func(e Event) { events <- e }))),
		Route("q").Concurrency(1).Reply(b.respond))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	a.ask(t, "q", "first", "")
	receive(t, b.entered, "the first request")
	a.ask(t, "q", "hasty", "1ns")
	a.ask(t, "q", "patient", "1h")
	eventually(t, "both wait", func() bool { return r.Stats().Routes[0].Waiting == 2 })
	b.free()
	for _, want := range []string{"first", "504 timeout", "patient"} {
		if got := a.next(t); got != want {
			t.Errorf("answered %q, want %q", got, want)
		}
	}
	if got := receive(t, b.entered, "the next request"); got != "patient" {
		t.Errorf("the responder got %q", got)
	}
	a.none(t)
	eventually(t, "all are counted", func() bool { s := r.Stats().Routes[0]; return s.Succeeded == 2 && s.Failed == 1 })
	for range 3 {
		e := receive(t, events, "an event")
		if string(e.Msg.Data) == "hasty" && (e.Outcome != OutcomeFailed || e.Duration != 0 || !errors.Is(e.Err, context.DeadlineExceeded)) {
			t.Errorf("got %+v, want one that failed without a run", e)
		}
	}
}

func TestRequestIsAnsweredAtTheTimeout(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	b := newBlocked(t)
	book, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), Route("q").Timeout(20*time.Millisecond).Reply(b.respond))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	a.ask(t, "q", "x", "")
	a.ask(t, "q", "y", "1h")
	for range 2 {
		if got, want := a.next(t), "504 no answer within 20ms"; got != want {
			t.Errorf("answered %q, want %q", got, want)
		}
	}
	if got := r.Stats().Routes[0]; got.Running != 2 {
		t.Errorf("got %+v, want 2 running", got)
	}
	b.free()
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	a.none(t)
	if got := r.Stats().Routes[0]; got.Failed != 2 || got.Succeeded != 0 {
		t.Errorf("got %+v, want 2 failed", got)
	}
	if got := book.alarms("result is dropped"); len(got) != 2 {
		t.Errorf("logged %q, want the 2 dropped results", got)
	}
}

func TestSaturatedRouteAnswersBusyAtOnce(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ handlers, waiting int }{
		{1, minWaitingRequests},
		{12, 12 * waitingRequestsPerHandler},
	} {
		t.Run(fmt.Sprint(tt.handlers), func(t *testing.T) {
			t.Parallel()
			const refused = 50
			s := startServer(t)
			b := newBlocked(t)
			r := runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("q").Concurrency(tt.handlers).Reply(b.respond))
			a := collectAnswers(t, connect(t, s.ClientURL()))
			for range tt.handlers {
				a.ask(t, "q", "fine", "")
				receive(t, b.entered, "a handler")
			}
			for range tt.waiting + refused {
				a.ask(t, "q", "fine", "")
			}
			for range refused {
				if got, want := a.next(t), "503 service is busy"; got != want {
					t.Fatalf("answered %q, want %q", got, want)
				}
			}
			a.none(t)
			if got := r.Stats().Routes[0]; got.Waiting != tt.waiting || got.Running != tt.handlers || got.Failed != refused {
				t.Errorf("got %+v, want %d waiting", got, tt.waiting)
			}
			b.free()
			for range tt.handlers + tt.waiting {
				if got := a.next(t); got != "fine" {
					t.Fatalf("answered %q", got)
				}
			}
			a.none(t)
		})
	}
}

func TestDrainAnswersWhatWasReceived(t *testing.T) {
	t.Parallel()
	const waiting = 100
	s := startServer(t)
	b := newBlocked(t)
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithDrainTimeout(testLimit)), Route("q").Concurrency(1).Reply(b.respond))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	for range 1 + waiting {
		a.ask(t, "q", "x", "")
	}
	eventually(t, "all are received", func() bool { return r.Stats().Routes[0].Waiting == waiting })
	r.cancel()
	pub := NewPublisher(a.nc)
	eventually(t, "nothing more is taken", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := pub.Request(ctx, To("q"))
		return errors.Is(err, ErrNoResponders)
	})
	b.free()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	for range 1 + waiting {
		if got := a.next(t); got != "x" {
			t.Fatalf("answered %q", got)
		}
	}
}

func TestDrainTimeoutAnswersTheRest(t *testing.T) {
	t.Parallel()
	const waiting = 100
	s := startServer(t)
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithDrainTimeout(20*time.Millisecond), WithLogger(log))
	r := runBroker(t, b, Route("q").Concurrency(1).Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	for range 1 + waiting {
		a.ask(t, "q", "x", "")
	}
	eventually(t, "all are received", func() bool { return r.Stats().Routes[0].Waiting == waiting })
	var cut *DrainError
	if err := r.stop(t); !errors.As(err, &cut) || cut.Abandoned != 1+waiting || cut.Running != 0 {
		t.Errorf("got %v, want a drain that was cut off", err)
	}
	for range 1 + waiting {
		if got, want := a.next(t), "503 service is shutting down"; got != want {
			t.Fatalf("answered %q, want %q", got, want)
		}
	}
	a.none(t)
	if got := r.Stats().Routes[0]; got.Failed != 1+waiting || got.Waiting != 0 {
		t.Errorf("got %+v, want all failed", got)
	}
}

func TestResponderThatNeverReturnsIsAnsweredFor(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	b := newBlocked(t)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithDrainTimeout(20*time.Millisecond), WithLogger(log)), Route("q").Reply(b.respond))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	a.ask(t, "q", "x", "")
	receive(t, b.entered, "the responder")
	var cut *DrainError
	if err := r.stop(t); !errors.As(err, &cut) || cut.Running != 1 {
		t.Errorf("got %v, want a drain that left a handler running", err)
	}
	if got, want := a.next(t), "503 service is shutting down"; got != want {
		t.Errorf("answered %q, want %q", got, want)
	}
	b.free()
	eventually(t, "the late result is booked", func() bool { return r.Stats().Routes[0].Failed == 1 })
	a.none(t)
}

func TestEveryRequestIsAnswered(t *testing.T) {
	t.Parallel()
	s := startServer(t, func(o *server.Options) { o.MaxPayload = 8 << 10 })
	tests := []struct {
		request string
		respond Responder
		want    string
		outcome Outcome
		logged  string // and the requester is not told
	}{
		{"success", func(context.Context, *Msg) ([]byte, error) { return []byte("yes"), nil }, "yes", OutcomeSucceeded, ""},
		{"fail", func(context.Context, *Msg) ([]byte, error) { return nil, Fail(404, "no such") }, "404 no such", OutcomeFailed, ""},
		{"permanent", func(context.Context, *Msg) ([]byte, error) { return nil, Permanent(Fail(410, "gone")) }, "410 gone", OutcomeFailed, ""},
		{"error", func(context.Context, *Msg) ([]byte, error) { return nil, errors.New("secret") }, "500 internal error", OutcomeFailed, "secret"},
		{"discard", func(context.Context, *Msg) ([]byte, error) { return nil, Discard(errors.New("secret")) }, "500 internal error", OutcomeFailed, "secret"},
		{"panic", func(context.Context, *Msg) ([]byte, error) { panic("secret") }, "500 internal error", OutcomeFailed, "stack=goroutine"},
		{"exit", func(context.Context, *Msg) ([]byte, error) { runtime.Goexit(); return nil, nil }, "500 internal error", OutcomeFailed, "runtime.Goexit"},
		{"timeout", func(context.Context, *Msg) ([]byte, error) { return nil, context.DeadlineExceeded }, "504 timeout", OutcomeFailed, "context deadline exceeded"},
		{"undecodable", JSONReply(func(context.Context, int) (int, error) { return 0, nil }), "400 request does not decode as application/json", OutcomeFailed, ""},
		{"beyond the limit", DecodeReply(LimitCodec(JSONCodec{}, 8), func(context.Context, int) (int, error) { return 0, nil }), "413 request is larger than 8 bytes", OutcomeFailed, ""},
		{"unencodable", DecodeReply(textCodec{}, func(context.Context, string) (chan int, error) { return nil, nil }), "500 internal error", OutcomeFailed, "no text"},
		{"too large", func(context.Context, *Msg) ([]byte, error) { return make([]byte, 8<<10+1), nil }, "500 answer is larger than 8192 bytes", OutcomeFailed, ""},
		{"header too large", func(_ context.Context, m *Msg) ([]byte, error) {
			m.ReplyHeader().Set("K", strings.Repeat("v", 8<<10))
			return nil, Fail(404, "no such")
		}, "500 answer is larger than 8192 bytes", OutcomeFailed, ""},
		{"bad header", func(_ context.Context, m *Msg) ([]byte, error) {
			m.ReplyHeader()["a b"] = []string{"v"}
			return nil, nil
		}, "500 answer has an invalid header", OutcomeFailed, "invalid header"},
	}
	book, log := newLogBook()
	events := make(chan Event, len(tests))
	var passed sync.Map
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log), WithObserver(observerFunc(func(e Event) { events <- e })),
		WithMiddleware(func(next Handler) Handler {
			return func(ctx context.Context, m *Msg) error {
				err := next(ctx, m)
				passed.Store(string(m.Data), err)
				return err
			}
		}))
	r := runBroker(t, b, Route("q").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		for _, tt := range tests {
			if tt.request == string(m.Data) {
				return tt.respond(ctx, m)
			}
		}
		return nil, nil
	}))
	a := collectAnswers(t, connect(t, s.ClientURL()))
	failed := uint64(0)
	for _, tt := range tests {
		a.ask(t, "q", tt.request, "")
		if got := a.next(t); got != tt.want {
			t.Errorf("%s: answered %.100q, want %q", tt.request, got, tt.want)
		}
		e := receive(t, events, "the event")
		if e.Outcome != tt.outcome || (e.Err == nil) != (tt.outcome == OutcomeSucceeded) || e.Duration <= 0 || e.Route != "q" {
			t.Errorf("%s: got %+v, want %s", tt.request, e, tt.outcome)
		}
		if tt.logged != "" && len(book.alarms(tt.logged)) == 0 {
			t.Errorf("%s: nothing logged of %q", tt.request, tt.logged)
		}
		if _, ok := passed.Load(tt.request); !ok && tt.request != "panic" && tt.request != "exit" {
			t.Errorf("%s: the middleware did not see it", tt.request)
		}
		if tt.outcome == OutcomeFailed {
			failed++
		}
	}
	a.none(t)
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if r.ran.Load().responders()[0].open.head != nil {
		t.Error("a request is kept after its answer")
	}
	if got := r.Stats().Routes[0]; got.Failed != failed || got.Succeeded != 1 || got.Discarded != 0 || got.Received != failed+1 || got.HandlerTime <= 0 {
		t.Errorf("got %+v, want %d failed and 1 succeeded", got, failed)
	}
}

// textCodec knows strings only.
type textCodec struct{}

func (textCodec) Marshal(v any) ([]byte, error) {
	s, ok := v.(string)
	if !ok {
		return nil, fmt.Errorf("no text: %T", v)
	}
	return []byte(s), nil
}

func (textCodec) Unmarshal(data []byte, v any) error {
	*v.(*string) = string(data)
	return nil
}

func (textCodec) ContentType() string { return "text/plain" }
