package natsx_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// runUntil runs routes on a stream of orders until done is called, after it has published
// each of the messages.
func runUntil(messages []natsx.Envelope, opts []natsx.Option, routes func(nc *nats.Conn, done func()) []natsx.Spec) {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	opts = append(opts, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*"), natsx.Stream("DLQ").Subjects("dlq.*")))
	broker := natsx.NewBroker(nc, opts...)
	go func() {
		<-broker.Ready()
		if _, err := natsx.NewPublisher(nc).PublishAll(ctx, messages...); err != nil {
			fmt.Println(err)
		}
	}()
	if err := broker.Run(ctx, routes(nc, cancel)...); err != nil {
		fmt.Println(err)
	}
}

// within ends a handler's context after d; the handler returns what it makes of that.
func within(d time.Duration) natsx.Middleware {
	return func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			ctx, cancel := context.WithTimeout(ctx, d)
			defer cancel()
			return next(ctx, m)
		}
	}
}

// A time limit of a part of the work. For the whole attempt there is the route's Timeout,
// which also counts an attempt as failed whose handler takes no notice of its context.
func ExampleMiddleware_timeout() {
	ask := func(ctx context.Context, m *natsx.Msg) error {
		<-ctx.Done() // somebody who does not answer
		return natsx.Permanent(ctx.Err())
	}
	runUntil([]natsx.Envelope{natsx.To("orders.created")}, nil, func(_ *nats.Conn, done func()) []natsx.Spec {
		handle := func(ctx context.Context, m *natsx.Msg) error {
			defer done()
			err := within(20*time.Millisecond)(ask)(ctx, m)
			fmt.Println(errors.Is(err, context.DeadlineExceeded), ctx.Err())
			return err
		}
		return []natsx.Spec{natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").Handle(handle)}
	})

	// Output:
	// true <nil>
}

type correlationKey struct{}

// correlated puts the message's correlation id into the context. A message that has none
// gets one by which it is found in its stream.
func correlated(next natsx.Handler) natsx.Handler {
	return func(ctx context.Context, m *natsx.Msg) error {
		id := m.Header.Get("Correlation-Id")
		if id == "" {
			id = m.Stream() + "-" + strconv.FormatUint(m.Sequence(), 10)
		}
		return next(context.WithValue(ctx, correlationKey{}, id), m)
	}
}

// A correlation id for logs and calls of others. To envelopes that are published with the
// handler's context the header is carried over without it.
func ExampleMiddleware_correlation() {
	messages := []natsx.Envelope{
		natsx.To("orders.created").Header("Correlation-Id", "checkout-7"),
		natsx.To("orders.created"),
	}
	runUntil(messages, nil, func(_ *nats.Conn, done func()) []natsx.Spec {
		bill := func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println("billing for", ctx.Value(correlationKey{}))
			if m.Sequence() == 2 {
				done()
			}
			return nil
		}
		return []natsx.Spec{natsx.Route("orders.*").Durable("billing").Concurrency(1).Handle(correlated(bill))}
	})

	// Output:
	// billing for checkout-7
	// billing for ORDERS-2
}

// logged logs every attempt, with what becomes of the message while it has retries left.
func logged(log *slog.Logger) natsx.Middleware {
	return func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			begun := time.Now()
			err := next(ctx, m)
			log.InfoContext(ctx, "handled", "route", m.Route(), "durable", m.Durable(), "subject", m.Subject, "sequence", m.Sequence(),
				"attempt", m.Attempt(), "outcome", string(natsx.OutcomeOf(err)), "took", time.Since(begun), "error", err)
			return err
		}
	}
}

// An access log. Failures are logged by the broker too.
func ExampleMiddleware_logging() {
	log := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "took" {
			return slog.Attr{} // which differ from run to run
		}
		return a
	}}))
	runUntil([]natsx.Envelope{natsx.To("orders.created")}, nil, func(_ *nats.Conn, done func()) []natsx.Spec {
		bill := func(ctx context.Context, m *natsx.Msg) error {
			if m.Attempt() == 1 {
				return errors.New("the bank is closed")
			}
			done()
			return nil
		}
		return []natsx.Spec{natsx.Route("orders.*").Durable("billing").Backoff(time.Millisecond, time.Millisecond).Handle(logged(log)(bill))}
	})

	// Output:
	// level=INFO msg=handled route=orders.* durable=billing subject=orders.created sequence=1 attempt=1 outcome=retried error="the bank is closed"
	// level=INFO msg=handled route=orders.* durable=billing subject=orders.created sequence=1 attempt=2 outcome=succeeded error=<nil>
}

// once handles one of the messages with the same key, which it claims in a bucket for its
// stream sequence, and passes over those that come later. While that one runs the others
// wait. The TTL of the bucket is how long a key counts.
func once(kv jetstream.KeyValue, key func(*natsx.Msg) string) natsx.Middleware {
	return func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			k, mine := natsx.EscapeToken(key(m)), strconv.FormatUint(m.Sequence(), 10)
			if _, err := kv.Create(ctx, k, []byte(mine)); err != nil {
				claim, getErr := kv.Get(ctx, k)
				switch {
				case !errors.Is(err, jetstream.ErrKeyExists):
					return err
				case getErr != nil:
					return getErr
				case string(claim.Value()) == "done":
					return nil
				case string(claim.Value()) != mine:
					return natsx.RetryAfter(time.Second, errors.New("another message with the key is under way"))
				}
			}
			if err := next(ctx, m); err != nil {
				return errors.Join(err, kv.Delete(context.WithoutCancel(ctx), k)) // whichever comes next is handled
			}
			_, err := kv.Put(ctx, k, []byte("done"))
			return err
		}
	}
}

// Deduplication of a message that its publisher stores twice, beyond the stream's
// duplicate window. It does not make the handler run exactly once: a process that dies
// between the end of the handler and the note in the bucket runs it again.
func ExampleMiddleware_deduplication() {
	orderID := func(m *natsx.Msg) string { return m.Header.Get("Order") }

	order := natsx.To("orders.created")
	messages := []natsx.Envelope{
		order.Header("Order", "o 1"), order.Header("Order", "o 2"), order.Header("Order", "o 1").Header("Again", "yes"), order.Header("Order", "end"),
	}
	runUntil(messages, nil, func(nc *nats.Conn, done func()) []natsx.Spec {
		js, err := jetstream.New(nc)
		if err != nil {
			panic(err)
		}
		kv, err := js.CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "billed", TTL: 24 * time.Hour})
		if err != nil {
			panic(err)
		}
		bill := func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println("billed", orderID(m))
			if orderID(m) == "end" {
				done()
			}
			return nil
		}
		return []natsx.Spec{natsx.Route("orders.*").Durable("billing").Concurrency(1).Handle(once(kv, orderID)(bill))}
	})

	// Output:
	// billed o 1
	// billed o 2
	// billed end
}

// alarmed calls alert when an attempt beyond the tolerated ones fails, and when a message
// is dead at once.
func alarmed(tolerated int, alert func(m *natsx.Msg, err error)) natsx.Middleware {
	return func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			err := errors.New("panic") // unless the handler returns
			defer func() {
				if err != nil && (m.Attempt() > tolerated || natsx.OutcomeOf(err) == natsx.OutcomeDead) {
					alert(m, err)
				}
			}()
			err = next(ctx, m)
			return err
		}
	}
}

// An alert of messages that fail again and again, before they are in the dead letter
// queue; letters themselves are handled with OnDeadLetter.
func ExampleMiddleware_poison() {
	messages := []natsx.Envelope{natsx.To("orders.broken"), natsx.To("orders.created")}
	runUntil(messages, nil, func(_ *nats.Conn, done func()) []natsx.Spec {
		bill := func(ctx context.Context, m *natsx.Msg) error {
			switch {
			case m.Token(1) == "broken":
				return natsx.Permanent(errors.New("no such customer"))
			case m.Attempt() < 4:
				panic("the bank is closed")
			}
			done()
			return nil
		}
		alert := func(m *natsx.Msg, err error) { fmt.Println("alert:", m.Subject, "attempt", m.Attempt(), err) }
		return []natsx.Spec{natsx.Route("orders.*").Durable("billing").DLQ("dlq.orders").Concurrency(1).
			Backoff(time.Millisecond, time.Millisecond).Handle(alarmed(2, alert)(bill))}
	})

	// Output:
	// alert: orders.broken attempt 1 no such customer
	// alert: orders.created attempt 3 panic
}

// A middleware of the broker that is for one route only.
func ExampleMiddleware_route() {
	only := func(route string, mw natsx.Middleware) natsx.Middleware {
		return func(next natsx.Handler) natsx.Handler {
			wrapped := mw(next)
			return func(ctx context.Context, m *natsx.Msg) error {
				if m.Route() == route {
					return wrapped(ctx, m)
				}
				return next(ctx, m)
			}
		}
	}
	told := func(next natsx.Handler) natsx.Handler {
		return func(ctx context.Context, m *natsx.Msg) error {
			fmt.Println("wrapped:", m.Route())
			return next(ctx, m)
		}
	}
	messages := []natsx.Envelope{natsx.To("orders.created"), natsx.To("orders.paid")}
	runUntil(messages, []natsx.Option{natsx.WithMiddleware(only("orders.paid", told))}, func(_ *nats.Conn, done func()) []natsx.Spec {
		first := make(chan struct{})
		return []natsx.Spec{
			natsx.Route("orders.created").Durable("billing").Handle(func(ctx context.Context, m *natsx.Msg) error {
				close(first)
				return nil
			}),
			natsx.Route("orders.paid").Durable("shipping").Handle(func(ctx context.Context, m *natsx.Msg) error {
				<-first
				done()
				return nil
			}),
		}
	})

	// Output:
	// wrapped: orders.paid
}
