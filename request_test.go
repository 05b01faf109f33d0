package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

func TestRequest(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	requests := make(chan *nats.Msg, 16)
	if _, err := nc.Subscribe("echo", func(m *nats.Msg) {
		requests <- m
		m.RespondMsg(&nats.Msg{Data: m.Data, Header: nats.Header{"K": {"v"}}})
	}); err != nil {
		t.Fatal(err)
	}
	for subject, code := range map[string]string{"missing": "404", "odd": "E_ODD"} {
		if _, err := nc.Subscribe(subject, func(m *nats.Msg) {
			m.RespondMsg(&nats.Msg{Data: []byte("body"), Header: nats.Header{
				micro.ErrorCodeHeader: {code}, micro.ErrorHeader: {"not found"},
			}})
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := nc.SubscribeSync("hole"); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)

	t.Run("answer", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(handling(t.Context(), nats.Header{"traceparent": {"tp"}}), testLimit)
		defer cancel()
		m, err := pub.Request(ctx, To("echo").Data([]byte("hi")))
		if err != nil || string(m.Data) != "hi" || m.Header.Get("K") != "v" {
			t.Fatalf("got %+v, %v", m, err)
		}
		r := receive(t, requests, "the request")
		left, ok := requestTimeout(r)
		if !ok || left > testLimit || left < testLimit/2 || r.Header.Get("traceparent") != "tp" {
			t.Errorf("got headers %v, want a time limit below %s and the trace", r.Header, testLimit)
		}
	})
	t.Run("json", func(t *testing.T) {
		got, err := RequestJSON[[]int](t.Context(), pub, To("echo").JSON([]int{1, 2}))
		if err != nil || !slices.Equal(got, []int{1, 2}) {
			t.Errorf("got %v, %v", got, err)
		}
		r := receive(t, requests, "the request")
		if said, ok := r.Header[timeoutHeader]; ok {
			t.Errorf("got the time limit %q, want none without a deadline", said)
		}
		var undecodable *DecodeError
		if _, err := RequestJSON[int](t.Context(), pub, To("echo").JSON("x")); err == nil || errors.As(err, &undecodable) {
			t.Errorf("got %v, want an error that is no DecodeError", err)
		}
	})
	t.Run("errors", func(t *testing.T) {
		for subject, want := range map[string]*ReplyError{
			"missing": {Code: 404, Message: "not found", RawCode: "404"},
			"odd":     {Code: 0, Message: "not found", RawCode: "E_ODD"},
		} {
			m, err := pub.Request(t.Context(), To(subject))
			var got *ReplyError
			if !errors.As(err, &got) || m == nil || string(m.Data) != "body" {
				t.Errorf("%s: got %+v, %v, want a ReplyError and the body", subject, m, err)
				continue
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", subject, diff)
			}
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		if _, err := pub.Request(t.Context(), To("nobody")); !errors.Is(err, ErrNoResponders) {
			t.Errorf("got %v, want ErrNoResponders", err)
		}
	})
	t.Run("nobody done", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := pub.Request(ctx, To("hole")); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want ErrTimeout and DeadlineExceeded", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := pub.Request(ctx, To("hole")); !errors.Is(err, context.Canceled) || errors.Is(err, ErrTimeout) {
			t.Errorf("got %v, want Canceled", err)
		}
	})
	t.Run("refused before the network", func(t *testing.T) {
		if _, err := pub.Request(t.Context(), To("hole").At(time.Now())); !errors.Is(err, ErrOptionConflict) {
			t.Errorf("got %v, want ErrOptionConflict", err)
		}
	})
}

func TestRequestMany(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	for i := range 3 {
		if _, err := nc.Subscribe("all", func(m *nats.Msg) {
			reply := &nats.Msg{Data: fmt.Append(nil, i)}
			if i == 1 {
				reply.Header = nats.Header{micro.ErrorCodeHeader: {"500"}, micro.ErrorHeader: {"broken"}}
			}
			m.RespondMsg(reply)
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := nc.SubscribeSync("hole"); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)

	t.Run("break", func(t *testing.T) {
		before := nc.NumSubscriptions()
		answers, failed := map[string]bool{}, 0
		for m, err := range pub.RequestMany(testContext(t), To("all")) {
			var reply *ReplyError
			if errors.As(err, &reply) && reply.Code == 500 {
				failed++
			} else if err != nil {
				t.Fatal(err)
			}
			if answers[string(m.Data)] = true; len(answers) == 3 {
				break
			}
		}
		if failed != 1 {
			t.Errorf("got %d errors, want 1", failed)
		}
		if left := nc.NumSubscriptions(); left != before {
			t.Errorf("%d subscriptions are left, %d were there before", left, before)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		n := 0
		for m, err := range pub.RequestMany(ctx, To("all")) {
			if m == nil {
				t.Errorf("got %v, want the sequence to end without an error", err)
			}
			n++
		}
		if n != 3 {
			t.Errorf("got %d answers, want 3", n)
		}
	})
	for _, tt := range []struct {
		name, subject string
		limit         time.Duration
		cancel        bool
		want          error
	}{
		{"nobody there", "nobody", testLimit, false, ErrNoResponders},
		{"nobody done", "hole", 20 * time.Millisecond, false, ErrTimeout},
		{"cancelled", "hole", testLimit, true, context.Canceled},
		{"invalid", "a.*", testLimit, false, ErrInvalidSubject},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), tt.limit)
			defer cancel()
			if tt.cancel {
				cancel()
			}
			var errs []error
			for m, err := range pub.RequestMany(ctx, To(tt.subject)) {
				if m != nil {
					t.Errorf("got an answer %+v", m)
				}
				errs = append(errs, err)
			}
			if len(errs) != 1 || !errors.Is(errs[0], tt.want) {
				t.Errorf("got %v, want one %v", errs, tt.want)
			}
		})
	}
}

func TestAnswer(t *testing.T) {
	t.Parallel()
	errorHeader := func(code, message string) nats.Header {
		return nats.Header{micro.ErrorCodeHeader: {code}, micro.ErrorHeader: {message}}
	}
	tests := []struct {
		name     string
		data     string
		hdr      nats.Header
		err      error
		payload  string
		header   nats.Header
		internal bool
	}{
		{"success", "x", nats.Header{"K": {"v"}}, nil, "x", nats.Header{"K": {"v"}}, false},
		{"success without headers", "x", nil, nil, "x", nil, false},
		{"status without payload", "", nats.Header{"Status": {"503"}, "K": {"v"}}, nil, "", nats.Header{"K": {"v"}}, false},
		{"status with payload", "x", nats.Header{"Status": {"503"}}, nil, "x", nats.Header{"Status": {"503"}}, false},
		{"fail", "", nil, Fail(404, "no such price"), "", errorHeader("404", "no such price"), false},
		{"wrapped fail", "", nil, fmt.Errorf("secret: %w", Permanent(Fail(409, "taken"))), "", errorHeader("409", "taken"), false},
		{"fail with details", "x", nats.Header{"Status": {"503"}}, Fail(422, ""), "x", errorHeader("422", "error"), false},
		{"passed on", "", nil, &ReplyError{Message: "odd", RawCode: "E_ODD"}, "", errorHeader("E_ODD", "odd"), false},
		{"undecodable", "x", nil, &DecodeError{ContentType: "application/json", Err: errors.New("secret")}, "",
			errorHeader("400", "request does not decode as application/json"), false},
		{"timeout", "x", nil, fmt.Errorf("secret: %w", context.DeadlineExceeded), "", errorHeader("504", "timeout"), true},
		{"other", "x", nats.Header{"K": {"v"}}, errors.New("secret"), "", errorHeader("500", "internal error"), true},
		{"panic", "", nil, &PanicError{Value: "secret"}, "", errorHeader("500", "internal error"), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			payload, header, internal := answer([]byte(tt.data), tt.hdr, tt.err)
			if string(payload) != tt.payload || internal != tt.internal {
				t.Errorf("got %q, internal %t, want %q, %t", payload, internal, tt.payload, tt.internal)
			}
			if diff := cmp.Diff(tt.header, header); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReplyErrorText(t *testing.T) {
	t.Parallel()
	if got := Fail(404, "gone").Error(); got != "natsx: reply error 404: gone" {
		t.Errorf("got %q", got)
	}
}

func FuzzReplyHeaders(f *testing.F) {
	f.Add("404", "not found", "1.5s")
	f.Add("", "", "")
	f.Add("-1", "x", "-1s")
	f.Add("E", strings.Repeat("x", 100), "99999h")
	f.Fuzz(func(t *testing.T, code, message, timeout string) {
		h := nats.Header{micro.ErrorCodeHeader: {code}, micro.ErrorHeader: {message}, timeoutHeader: {timeout}}
		if e := replyError(h); (e == nil) != (code == "" && message == "") || e != nil && (e.RawCode != code || e.Message != message) {
			t.Fatalf("got %+v of %q, %q", e, code, message)
		}
		if d, ok := requestTimeout(&nats.Msg{Header: h}); ok && d <= 0 {
			t.Fatalf("got %s of %q", d, timeout)
		}
	})
}

// A request whose context has no deadline ends by itself, whether the context can be
// cancelled or not.
func TestRequestEndsWithoutADeadline(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	if _, err := nc.SubscribeSync("hole"); err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe("one", func(m *nats.Msg) { m.Respond([]byte("yes")) }); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asks := map[string]func() error{
		"no end": func() error {
			_, err := pub.Request(context.Background(), To("hole"))
			return err
		},
		"a cancel function": func() error {
			_, err := pub.Request(ctx, To("hole"))
			return err
		},
		"many": func() error {
			var last error
			for _, last = range pub.RequestMany(ctx, To("hole")) {
			}
			return last
		},
		"many and an answer": func() error {
			answers := 0
			for _, err := range pub.RequestMany(ctx, To("one")) {
				if answers++; err != nil {
					return err
				}
			}
			if answers != 1 {
				return fmt.Errorf("%d answers", answers)
			}
			return nil
		},
	}
	type end struct {
		name string
		took time.Duration
		err  error
	}
	ends := make(chan end, len(asks))
	for name, ask := range asks {
		go func() {
			began := time.Now()
			err := ask()
			ends <- end{name, time.Since(began), err}
		}()
	}
	for range asks {
		e := receive(t, ends, "the end of a request")
		if e.took < DefaultRequestTimeout {
			t.Errorf("%s: ended after %s, want %s", e.name, e.took, DefaultRequestTimeout)
		}
		if e.name == "many and an answer" {
			if e.err != nil {
				t.Errorf("%s: %v", e.name, e.err)
			}
		} else if !errors.Is(e.err, ErrTimeout) || !errors.Is(e.err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want ErrTimeout and DeadlineExceeded", e.name, e.err)
		}
	}
}
