package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// startGuarded runs a server with an admin and a user with these permissions,
// and returns a connection of each.
func startGuarded(t testing.TB, p *server.Permissions, opts ...nats.Option) (admin, user *nats.Conn) {
	t.Helper()
	s := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "admin", Password: "a"},
			{Username: "user", Password: "u", Permissions: p},
		}
	})
	return connect(t, s.ClientURL(), nats.UserInfo("admin", "a")),
		connect(t, s.ClientURL(), append(opts, nats.UserInfo("user", "u"))...)
}

// A user who may not ask for the consumer hears of its end from its pulls, or sees
// that nobody answers them.
func TestDeletedConsumerThatMayNotBeAskedFor(t *testing.T) {
	t.Parallel()
	for _, idle := range []bool{false, true} {
		t.Run(fmt.Sprint("idle ", idle), func(t *testing.T) {
			t.Parallel()
			admin, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: []string{
				"$JS.API.CONSUMER.CREATE.ORDERS.d.>", "$JS.API.CONSUMER.MSG.NEXT.ORDERS.d", "$JS.ACK.ORDERS.d.>",
			}}})
			orders(t, admin)
			_, log := newLogBook()
			b := NewBroker(user, WithLogger(log))
			r := runBroker(t, b, Route("orders.*").Stream("ORDERS").Durable("d").Handle(succeed))
			if idle {
				if err := b.Pause("d"); err != nil {
					t.Fatal(err)
				}
			} else {
				route := b.ran.Load().durables[0]
				eventually(t, "a request waits for long", func() bool {
					route.env.pool.mu.Lock()
					defer route.env.pool.mu.Unlock()
					return len(route.puller.pulls) == 1 && route.puller.pulls[0].idle
				})
				consumerInfo(t, admin, "ORDERS", "d") // the server has it by now
			}
			if err := jetStream(t, admin).DeleteConsumer(testContext(t), "ORDERS", "d"); err != nil {
				t.Fatal(err)
			}
			if !idle {
				if err := r.wait(t); !errors.Is(err, ErrConsumerDeleted) {
					t.Errorf("got %v, want ErrConsumerDeleted", err)
				}
				return
			}
			if err := b.Resume("d"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "Health tells", func() bool { return b.Health() != nil })
			before := user.Stats().OutMsgs
			<-time.After(time.Second)
			if sent := user.Stats().OutMsgs - before; sent > 100 {
				t.Errorf("%d messages were sent in a second, want a pull now and then", sent)
			}
		})
	}
}

func TestMissingPermissionEndsRun(t *testing.T) {
	t.Parallel()
	handler := func(context.Context, *Msg) error { return nil }
	failing := func(context.Context, *Msg) error { return Permanent(errors.New("never")) }
	durable := Route("orders.*").Stream("ORDERS").Durable("billing")
	for _, c := range []struct {
		name    string
		publish []string // denied
		listen  []string // denied
		spec    Spec
		subject string // named in the error
	}{
		{"pull", []string{"$JS.API.CONSUMER.MSG.NEXT.>"}, nil, durable.Handle(handler), "MSG.NEXT"},
		{"ack", []string{"$JS.ACK.>"}, nil, durable.Handle(handler), "$JS.ACK"},
		{"confirmed ack", []string{"$JS.ACK.>"}, nil, durable.ConfirmAcks().Handle(handler), "$JS.ACK"},
		{"dead letter", []string{"dlq.orders"}, nil, durable.DLQ("dlq.orders").Handle(failing), "dlq.orders"},
		{"core", nil, []string{"orders.*"}, Route("orders.*").Handle(handler), "orders.*"},
		{"queue", nil, []string{"orders.*"}, Route("orders.*").Queue("g").Handle(handler), "orders.*"},
		{"create", []string{"$JS.API.CONSUMER.CREATE.>", "$JS.API.CONSUMER.DURABLE.>"}, nil, durable.Handle(handler), "CONSUMER.CREATE"},
		{"create and info", []string{"$JS.API.CONSUMER.>"}, nil, durable.Handle(handler), "CONSUMER"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var told atomic.Int32
			admin, user := startGuarded(t, &server.Permissions{
				Publish:   &server.SubjectPermission{Deny: c.publish},
				Subscribe: &server.SubjectPermission{Deny: c.listen},
			}, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) { told.Add(1) }))
			createStream(t, admin, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}})
			createStream(t, admin, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.*"}})
			publish(t, admin, &nats.Msg{Subject: "orders.x"})
			_, log := newLogBook()
			r := startBroker(t, NewBroker(user, WithLogger(log)), c.spec)
			err := r.wait(t)
			if !errors.Is(err, ErrPermission) || !strings.Contains(err.Error(), c.subject) {
				t.Errorf("got %v, want ErrPermission that names %q", err, c.subject)
			}
			if got := stored(t, admin, "DLQ"); got != 0 {
				t.Errorf("%d letters, want none", got)
			}
			if told.Load() == 0 {
				t.Error("the application's own error handler was not called")
			}
		})
	}
}

// A permission that somebody else on the connection lacks ends no route.
func TestForeignPermissionErrorEndsNothing(t *testing.T) {
	t.Parallel()
	violated := make(chan struct{}, 10)
	admin, user := startGuarded(t, &server.Permissions{
		Publish:   &server.SubjectPermission{Deny: []string{"foreign", "$JS.ACK.OTHER.>"}},
		Subscribe: &server.SubjectPermission{Deny: []string{"foreign"}},
	}, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) { violated <- struct{}{} }))
	createStream(t, admin, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}})
	handled := make(chan struct{}, 1)
	r := runBroker(t, NewBroker(user), Route("orders.*").Durable("billing").Handle(func(context.Context, *Msg) error {
		handled <- struct{}{}
		return nil
	}))
	if err := user.Publish("foreign", nil); err != nil {
		t.Fatal(err)
	}
	if err := user.Publish("$JS.ACK.OTHER.billing.1.1.1.1.0", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := user.SubscribeSync("foreign"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, violated, "the violation")
	}
	publish(t, admin, &nats.Msg{Subject: "orders.x"})
	receive(t, handled, "a message")
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestLeastPermissionsSuffice(t *testing.T) {
	t.Parallel()
	always := []string{
		"$JS.API.CONSUMER.MSG.NEXT.ORDERS.billing",
		"$JS.ACK.ORDERS.billing.>",
		"$JS.ACK.*.*.ORDERS.billing.>",
		"dlq.orders",
	}
	for _, c := range []struct {
		name  string
		allow string
		bind  bool // the durable is there before
	}{
		{"create", "$JS.API.CONSUMER.CREATE.ORDERS.billing.orders.*", false},
		{"bind", "$JS.API.CONSUMER.INFO.ORDERS.billing", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			admin, user := startGuarded(t, &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: slices.Concat(always, []string{c.allow})},
				Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>"}},
			})
			createStream(t, admin, jetstream.StreamConfig{
				Name: "ORDERS", Subjects: []string{"orders.*"}, Retention: jetstream.WorkQueuePolicy,
			})
			createStream(t, admin, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.*"}})
			if c.bind {
				if _, err := jetStream(t, admin).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
					Durable: "billing", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy,
					AckWait: DefaultAckWait, MaxAckPending: DefaultMaxAckPending,
				}); err != nil {
					t.Fatal(err)
				}
			}
			_, log := newLogBook()
			var seen tally
			r := runBroker(t, NewBroker(user, WithLogger(log)),
				Route("orders.*").Stream("ORDERS").Durable("billing").Retry(1).DLQ("dlq.orders").
					Handle(func(_ context.Context, m *Msg) error {
						seen.add(m.Subject)
						if m.Subject == "orders.bad" {
							return Permanent(errors.New("never"))
						}
						return nil
					}))
			publish(t, admin, &nats.Msg{Subject: "orders.good"})
			publish(t, admin, &nats.Msg{Subject: "orders.bad"})
			eventually(t, "both are settled", func() bool { return stored(t, admin, "ORDERS") == 0 })
			if err := r.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			seen.wantOnce(t, 2)
			if got := stored(t, admin, "DLQ"); got != 1 {
				t.Errorf("%d letters, want 1", got)
			}
		})
	}
}
