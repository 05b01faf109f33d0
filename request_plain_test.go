package natsx

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
)

// echo answers what it is asked.
func echo(_ context.Context, m *Msg) ([]byte, error) { return m.Data, nil }

// A request without headers tells its deadline, and stays one without headers.
func TestRequestTellsItsDeadlineWithoutAHeader(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	asked := make(chan *Msg, 1)
	left := make(chan time.Duration, 1)
	runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("ask").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		deadline, ok := ctx.Deadline()
		if !ok {
			left <- 0
		} else {
			left <- time.Until(deadline)
		}
		asked <- m
		return []byte("yes"), nil
	}))
	pub := NewPublisher(nc)
	for _, limit := range []time.Duration{0, time.Hour, 40 * time.Second} {
		ctx, cancel := context.Background(), func() {}
		if limit > 0 {
			ctx, cancel = context.WithTimeout(ctx, limit)
		}
		m, err := pub.Request(ctx, To("ask").Data([]byte("x")))
		cancel()
		if err != nil || string(m.Data) != "yes" {
			t.Fatalf("got %+v, %v", m, err)
		}
		if got := receive(t, left, "what is left"); got > limit || limit > 0 && got < limit-30*time.Second {
			t.Errorf("with %s the responder has %s", limit, got)
		}
		if m := receive(t, asked, "the request"); m.Header != nil {
			t.Errorf("got the headers %v, want none", m.Header)
		}
	}
}

func TestRequestTimeoutOfAReplySubject(t *testing.T) {
	t.Parallel()
	for reply, want := range map[string]time.Duration{
		"":                               0,
		"_INBOX.a.b":                     0,
		"_INBOX.a.0123456789abcdef":      0,
		"_INBOX.a.0123456789abcdef~1500": 1500 * time.Microsecond,
		"_INBOX.a.0123456789abcdef~0":    0,
		"_INBOX.a.0123456789abcdef~-1":   0,
		"_INBOX.a.0123456789abcdef~":     0,
		"_INBOX.a.0123456789abcdef~99999999999999999999":   0,
		"_INBOX.a.0123456789abcdef~9999999999999999999":    0,
		"_INBOX.a.short~1500":                              0,
		"_INBOX.0123456789abcdef~1500.x":                   0,
		string(appendReplyToken(nil, 1, time.Second)):      time.Second,
		string(appendReplyToken(nil, 1<<63, 1)):            time.Microsecond,
		string(appendReplyToken([]byte("a.b."), 7, 1<<62)): 1 << 62 / 1000 * 1000,
	} {
		if d, ok := requestTimeout(&nats.Msg{Reply: reply}); d != want || ok != (want > 0) {
			t.Errorf("%q: got %s, %t, want %s", reply, d, ok, want)
		}
	}
	m := &nats.Msg{Reply: "_INBOX.a.0123456789abcdef~1500", Header: nats.Header{timeoutHeader: {"3s"}}}
	if d, _ := requestTimeout(m); d != 3*time.Second {
		t.Errorf("got %s, want what the header says", d)
	}
}

// What a request costs both sides does not grow by a deadline.
func TestRequestAllocatesLittle(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates too")
	}
	url, start := serverProcess(t)
	start()
	runBroker(t, NewBroker(connect(t, url)), Route("ask").Reply(echo))
	pub := NewPublisher(connect(t, url))
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	payload := make([]byte, 128)
	allocs := testing.AllocsPerRun(2000, func() {
		if _, err := pub.Request(ctx, To("ask").Data(payload)); err != nil {
			t.Error(err)
		}
	})
	if allocs > 14 {
		t.Errorf("%.0f allocations a request, want at most 14", allocs)
	}
}

// An answer that comes after its requester has gone is nobody else's.
func TestRequestsGetTheirOwnAnswers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("ask").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		if strings.HasPrefix(string(m.Data), "slow") {
			<-ctx.Done()
		}
		return m.Data, nil
	}))
	pub := NewPublisher(connect(t, s.ClientURL()))
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			for j := range 50 {
				want := fmt.Sprint("quick", i, j)
				if j%5 == 0 {
					short, cancel := context.WithTimeout(context.Background(), time.Millisecond)
					if _, err := pub.Request(short, To("ask").Data([]byte("slow"))); !errors.Is(err, ErrTimeout) {
						t.Errorf("slow: got %v, want ErrTimeout", err)
					}
					cancel()
				}
				m, err := pub.Request(testContext(t), To("ask").Data([]byte(want)))
				if err != nil || string(m.Data) != want {
					t.Errorf("got %+v, %v, want %s", m, err, want)
					return
				}
			}
		})
	}
	all.Wait()
}

// A request whose connection is lost ends then, one whose connection is closed too, and
// the next one on a connection that is back is answered.
func TestRequestOverALostConnection(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	p := startProxy(t, s.ClientURL())
	nc := connect(t, p.url())
	server := connect(t, s.ClientURL())
	asked := make(chan *nats.Msg, 10)
	if _, err := server.ChanSubscribe("hole", asked); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Subscribe("ask", func(m *nats.Msg) { m.Respond([]byte("yes")) }); err != nil {
		t.Fatal(err)
	}
	if err := server.Flush(); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)
	ended := make(chan error, 1)
	ask := func() {
		go func() {
			_, err := pub.Request(testContext(t), To("hole"))
			ended <- err
		}()
		receive(t, asked, "the request")
	}
	ask()
	p.refuse()
	p.cut()
	if err := receive(t, ended, "the request's end"); !errors.Is(err, nats.ErrDisconnected) {
		t.Errorf("got %v, want a lost connection", err)
	}
	p.allow()
	eventually(t, "the connection is back", nc.IsConnected)
	if m, err := pub.Request(testContext(t), To("ask")); err != nil || string(m.Data) != "yes" {
		t.Errorf("got %+v, %v", m, err)
	}
	if _, err := pub.Request(testContext(t), To("nobody")); !errors.Is(err, ErrNoResponders) {
		t.Errorf("got %v, want ErrNoResponders", err)
	}
	ask()
	nc.Close()
	if err := receive(t, ended, "the request's end"); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("got %v, want a closed connection", err)
	}
	if _, err := pub.Request(testContext(t), To("ask")); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("got %v, want a closed connection", err)
	}
}

// A responder that is not done in time is a timeout for its requester too.
func TestRequestTimeoutOfTheResponder(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	b := newBlocked(t)
	runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("slow").Timeout(20*time.Millisecond).Reply(b.respond),
		Route("fails").Reply(func(context.Context, *Msg) ([]byte, error) { return nil, Fail(500, "x") }))
	pub := NewPublisher(connect(t, s.ClientURL()))
	_, err := pub.Request(testContext(t), To("slow"))
	if reply, ok := errors.AsType[*ReplyError](err); !ok || reply.Code != 504 || !errors.Is(err, ErrTimeout) {
		t.Errorf("got %v, want a ReplyError of code 504 that is ErrTimeout", err)
	}
	if _, err := pub.Request(testContext(t), To("fails")); errors.Is(err, ErrTimeout) {
		t.Errorf("got %v, want no ErrTimeout", err)
	}
	b.free()
}

// A refusal has a body and headers of its own, for every client and from every kind of
// responder, and is no error line in the log of the one who refuses.
func TestReplyErrorsWithDetails(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	book, log := newLogBook()
	taken := func() error {
		return &ReplyError{Code: 409, Message: "taken", Data: []byte(`{"by":7}`), Header: nats.Header{"Retry-After": {"3"}}}
	}
	runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		Route("typed").Reply(JSONReply(func(context.Context, int) (int, error) { return 0, taken() })),
		Route("wrapped").Reply(JSONReply(func(context.Context, int) (int, error) { return 0, fmt.Errorf("secret: %w", taken()) })),
		Route("plain").Reply(func(_ context.Context, m *Msg) ([]byte, error) {
			m.ReplyHeader().Set("Retry-After", "3")
			return []byte(`{"by":7}`), Fail(409, "taken")
		}),
		Route("missing").Reply(func(context.Context, *Msg) ([]byte, error) { return nil, Fail(404, "no such thing") }))
	nc := connect(t, s.ClientURL())
	pub := NewPublisher(nc)
	for _, subject := range []string{"typed", "wrapped", "plain"} {
		m, err := pub.Request(testContext(t), To(subject).JSON(1))
		if diff := cmp.Diff(error(&ReplyError{Code: 409, Message: "taken", RawCode: "409"}), err); diff != "" {
			t.Errorf("%s: (-want +got):\n%s", subject, diff)
		}
		if m == nil || string(m.Data) != `{"by":7}` || m.Header.Get("Retry-After") != "3" {
			t.Errorf("%s: got %+v, want the details", subject, m)
		}
		_, err = RequestJSON[int](testContext(t), pub, To(subject).JSON(1))
		if reply, ok := errors.AsType[*ReplyError](err); !ok || reply.Code != 409 || string(reply.Data) != `{"by":7}` || reply.Header.Get("Retry-After") != "3" {
			t.Errorf("%s: got %v, want the details", subject, err)
		}
	}
	if _, err := pub.Request(testContext(t), To("missing")); err == nil {
		t.Error("got no error")
	}
	if got := book.alarms(""); len(got) != 0 {
		t.Errorf("logged %q", got)
	}
}

// Two endpoints have two names, whatever their subjects and the order of their routes.
func TestEndpointNamesDiffer(t *testing.T) {
	t.Parallel()
	names := func(routes ...RouteBuilder) map[RouteBuilder]string {
		var all []*coreRoute
		for _, r := range routes {
			all = append(all, &coreRoute{route: route{spec: r.Reply(echo)}})
		}
		got := map[RouteBuilder]string{}
		for i, name := range endpointNames(all) {
			if !serviceName.MatchString(name) {
				t.Errorf("%q is no name of an endpoint", name)
			}
			got[routes[i]] = name
		}
		return got
	}
	routes := []RouteBuilder{Route("a.b"), Route("a-b"), Route("a.*"), Route("a._"), Route("a.>"), Route("c.d"), Route("a.b").Queue("q")}
	got := names(routes...)
	seen := map[string]bool{}
	for _, name := range got {
		seen[name] = true
	}
	if len(seen) != len(routes) || got[Route("a-b")] != "a-b" || got[Route("c.d")] != "c-d" {
		t.Errorf("got %v, want different names, and those of before where nothing else has them", got)
	}
	reversed := make([]RouteBuilder, len(routes))
	for i, r := range routes {
		reversed[len(routes)-1-i] = r
	}
	if diff := cmp.Diff(fmt.Sprint(got), fmt.Sprint(names(reversed...))); diff != "" {
		t.Errorf("in another order:\n%s", diff)
	}
}
