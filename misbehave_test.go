package natsx

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// evilError misbehaves wherever the engine asks an error something.
type evilError struct {
	as, is, text, unwrap func()
}

func callIf(fn func()) {
	if fn != nil {
		fn()
	}
}

func (e *evilError) Error() string    { callIf(e.text); return "bad" }
func (e *evilError) As(any) bool      { callIf(e.as); return false }
func (e *evilError) Is(error) bool    { callIf(e.is); return false }
func (e *evilError) Unwrap() []error  { callIf(e.unwrap); return nil }
func (e *evilError) GoString() string { return "bad error" }

func panics() { panic("an error that panics") }

// Whatever the code of users does, the other routes go on, and the message that met it
// is settled.
func TestUsersCodeThatPanicsStopsNothing(t *testing.T) {
	t.Parallel()
	fails := func(err error) func(context.Context, *Msg) error {
		return func(context.Context, *Msg) error { return err }
	}
	exits := func(context.Context, *Msg) error { runtime.Goexit(); return nil }
	for _, tt := range []struct {
		name string
		opts []Option
		fn   Handler
	}{
		{"an error whose As panics", nil, fails(&evilError{as: panics})},
		{"an error whose Is panics", nil, fails(&evilError{is: panics})},
		{"an error whose text panics", nil, fails(&evilError{text: panics})},
		{"an error whose Unwrap panics", nil, fails(&evilError{unwrap: panics})},
		{"an error whose As ends the goroutine", nil, fails(&evilError{as: runtime.Goexit})},
		{"a wrapped error whose As panics", nil, fails(fmt.Errorf("wrapped: %w", &evilError{as: panics}))},
		{"a panic with such an error", nil, func(context.Context, *Msg) error { panic(&evilError{as: panics, text: panics}) }},
		{"a handler that ends its goroutine", nil, exits},
		{"an error text that panics", []Option{WithErrorText(func(error) string { panic("no text") })}, fails(errors.New("x"))},
		{"an error text that ends the goroutine", []Option{WithErrorText(func(error) string { runtime.Goexit(); return "" })}, fails(errors.New("x"))},
		{"an observer that panics", []Option{WithObserver(observerFunc(func(Event) { panic("observer") }))}, fails(errors.New("x"))},
		{"an observer that ends the goroutine", []Option{WithObserver(observerFunc(func(Event) { runtime.Goexit() }))}, fails(errors.New("x"))},
		{"a middleware that panics", []Option{WithMiddleware(func(next Handler) Handler {
			return func(ctx context.Context, m *Msg) error {
				if m.Subject == "orders.bad" {
					panic("middleware")
				}
				return next(ctx, m)
			}
		})}, fails(errors.New("x"))},
		{"a codec that panics", nil, Decode(panickingCodec{}, func(context.Context, string) error { return nil })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc)
			good := make(chan struct{}, 100)
			_, log := newLogBook()
			b := NewBroker(nc, append(tt.opts, WithLogger(log), WithWorkers(2))...)
			r := runBroker(t, b,
				Route("orders.bad").Durable("bad").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").Handle(tt.fn),
				Route("orders.good").Durable("good").Handle(func(context.Context, *Msg) error {
					good <- struct{}{}
					return nil
				}))
			for range 5 {
				publishAcked(t, nc, "orders.bad", "bad")
			}
			eventually(t, "the bad ones are dead", func() bool { return stored(t, nc, "DLQ") == 5 })
			for range 5 {
				publishAcked(t, nc, "orders.good", "good")
				receive(t, good, "a good one")
			}
			if err := r.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
}

type panickingCodec struct{}

func (panickingCodec) Marshal(any) ([]byte, error) { panic("codec") }
func (panickingCodec) Unmarshal([]byte, any) error { panic("codec") }
func (panickingCodec) ContentType() string         { return "text/x" }

// Code of users that does not return is named by Run, which returns in time.
func TestUsersCodeThatBlocksIsNamed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		spec  func(block func()) (Spec, []Option)
		send  func(t *testing.T, nc *nats.Conn)
		named string
	}{
		{"a handler", func(block func()) (Spec, []Option) {
			return Route("orders.*").Durable("d").Handle(func(context.Context, *Msg) error { block(); return nil }), nil
		}, nil, `handler of route "orders.*" durable "d"`},
		{"an observer", func(block func()) (Spec, []Option) {
			return Route("orders.*").Durable("d").Handle(succeed), []Option{WithObserver(observerFunc(func(Event) { block() }))}
		}, nil, `observer of route "orders.*" durable "d"`},
		{"an observer of a letter that was held", func(block func()) (Spec, []Option) {
			dead := func(context.Context, *Msg) error { return Permanent(errors.New("dead")) }
			return Route("orders.*").Durable("d").DLQ("dlq.x").Handle(dead),
				[]Option{WithObserver(observerFunc(func(Event) { block() }))}
		}, func(t *testing.T, nc *nats.Conn) {
			// Without its stream a letter is held; made anew, that takes it.
			dlq := streamNow(t, nc, "DLQ").CachedInfo().Config
			if err := jetStream(t, nc).DeleteStream(testContext(t), "DLQ"); err != nil {
				t.Fatal(err)
			}
			publishAcked(t, nc, "orders.x", "1")
			<-time.After(300 * time.Millisecond)
			createStream(t, nc, dlq)
		}, `observer of route "orders.*" durable "d"`},
		{"an observer of a responder", func(block func()) (Spec, []Option) {
			return Route("ask").Queue("q").Reply(func(context.Context, *Msg) ([]byte, error) { return nil, nil }),
				[]Option{WithObserver(observerFunc(func(Event) { block() }))}
		}, func(t *testing.T, nc *nats.Conn) {
			if _, err := nc.Request("ask", nil, testLimit); err != nil {
				t.Fatal(err)
			}
		}, `observer of route "ask"`},
		{"an observer of a core route", func(block func()) (Spec, []Option) {
			return Route("core").Handle(succeed), []Option{WithObserver(observerFunc(func(Event) { block() }))}
		}, func(t *testing.T, nc *nats.Conn) {
			if err := nc.Publish("core", nil); err != nil {
				t.Fatal(err)
			}
		}, `observer of route "core"`},
		{"an error", func(block func()) (Spec, []Option) {
			return Route("orders.*").Durable("d").Handle(func(context.Context, *Msg) error { return &evilError{as: block} }), nil
		}, nil, `handler of route "orders.*" durable "d"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			const drain = 300 * time.Millisecond
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			orders(t, nc)
			release, inside := make(chan struct{}), make(chan struct{}, 100)
			var running atomic.Int64
			t.Cleanup(func() { // so that it is gone before leaks are counted
				close(release)
				eventually(t, "the calls have returned", func() bool { return running.Load() == 0 })
			})
			spec, opts := tt.spec(func() {
				running.Add(1)
				defer running.Add(-1)
				inside <- struct{}{}
				<-release
			})
			_, log := newLogBook()
			b := NewBroker(connect(t, s.ClientURL()), append(opts, WithLogger(log), WithDrainTimeout(drain))...)
			r := runBroker(t, b, spec)
			if tt.send == nil {
				publishAcked(t, nc, "orders.x", "1")
			} else {
				tt.send(t, nc)
			}
			receive(t, inside, "the call")
			began := time.Now()
			err := r.stop(t)
			if took := time.Since(began); took > drain+DrainGrace+10*time.Second {
				t.Errorf("Run returned after %v", took)
			}
			var cut *DrainError
			if !errors.As(err, &cut) || !strings.Contains(strings.Join(cut.Stuck, "\n"), tt.named) || !strings.Contains(err.Error(), tt.named) {
				t.Errorf("Run: %v, want a drain error that names %s", err, tt.named)
			}
		})
	}
}

// All workers that hang are told by Health, and so is their return.
func TestHungWorkersAreTold(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	release := make(chan struct{})
	book, log := newLogBook()
	b := NewBroker(nc, WithWorkers(2), WithLogger(log))
	r := runBroker(t, b, Route("orders.*").Durable("d").Timeout(50*time.Millisecond).Handle(func(context.Context, *Msg) error {
		<-release
		return nil
	}))
	publishMany(t, nc, 10, numbered("orders.x"))
	eventually(t, "it is told", func() bool { return errors.Is(b.Health(), errHung) && len(book.alarms("all workers hang")) > 0 })
	if n := len(book.alarms("all workers hang")); n != 1 {
		t.Errorf("it was logged %d times, want once", n)
	}
	close(release)
	eventually(t, "it is well again", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
