package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// shopFloor is a server with the users of docs/permissions.conf at work. Whatever they
// are refused, warned of or get as an error is a fault, and the first one ends the work.
type shopFloor struct {
	url    string
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	faults []string
	conns  []*nats.Conn
}

func (f *shopFloor) fault(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() == nil {
		f.faults = append(f.faults, fmt.Sprintf(format, args...))
	}
	f.cancel()
}

// as opens a connection of a user.
func (f *shopFloor) as(user string) *nats.Conn {
	nc, err := Connect(f.url, nats.UserInfo(user, "change-me"), nats.CustomInboxPrefix("_INBOX_"+user), nats.RetryOnFailedConnect(false),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if user != "killed" {
				f.fault("%s: %v", user, err)
			}
		}))
	if err != nil {
		f.fault("%s connects: %v", user, err)
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns = append(f.conns, nc)
	return nc
}

// Enabled, Handle, WithAttrs and WithGroup make warnings faults.
func (f *shopFloor) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (f *shopFloor) Handle(_ context.Context, r slog.Record) error {
	if !strings.Contains(r.Message, "attempt failed") && !strings.Contains(r.Message, "is dead") {
		var text strings.Builder
		r.Attrs(func(a slog.Attr) bool {
			fmt.Fprintf(&text, " %s", a)
			return true
		})
		f.fault("logged: %s%s", r.Message, &text)
	}
	return nil
}
func (f *shopFloor) WithAttrs([]slog.Attr) slog.Handler { return f }
func (f *shopFloor) WithGroup(string) slog.Handler      { return f }

// until polls cond while there is no fault.
func (f *shopFloor) until(what string, cond func() bool) {
	for !cond() {
		select {
		case <-f.ctx.Done():
			f.fault("%s: %v", what, f.ctx.Err())
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// do is a step, unless there was a fault before.
func (f *shopFloor) do(what string, step func() error) {
	if f.ctx.Err() != nil {
		return
	}
	if err := step(); err != nil {
		f.fault("%s: %v", what, err)
	}
}

// workWith has every user do their work on a server with these options, and returns the
// faults. With slow, a handler outlasts its lease.
func workWith(t *testing.T, opts *server.Options, slow bool) []string {
	t.Helper()
	s := startServer(t, func(o *server.Options) {
		o.Accounts, o.Users = opts.Accounts, slices.Clone(opts.Users)
		account := o.Users[0].Account
		o.Users = append(o.Users,
			&server.User{Username: "admin", Password: "change-me", Account: account},
			// Its redrive is as if killed between the copy and the end of the letter.
			&server.User{Username: "killed", Password: "change-me", Account: account, Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.MSG.DELETE.>"}},
			}})
	})
	f := &shopFloor{url: s.ClientURL()}
	f.ctx, f.cancel = context.WithTimeout(context.Background(), testLimit)
	defer f.cancel()
	f.work(t, slow)
	for _, nc := range f.conns {
		nc.Close()
	}
	return f.faults
}

func (f *shopFloor) work(t *testing.T, slow bool) {
	admin, deploy, web, billing, oncall, killed := f.as("admin"), f.as("deploy"), f.as("web"), f.as("billing"), f.as("oncall"), f.as("killed")
	if f.ctx.Err() != nil {
		return
	}
	for _, age := range []time.Duration{time.Hour, 2 * time.Hour} {
		for _, s := range []StreamSpec{Stream("ORDERS").Subjects("orders.*", "invoices.*"), Stream("DLQ").Subjects("dlq.*")} {
			f.do("ensure "+s.name, func() error { return s.MaxAge(24*age).Ensure(f.ctx, deploy) })
		}
	}
	logger := WithLogger(slog.New(f))

	const lease = 2 * time.Second
	var handled tally
	run := func(retry int) (b *Broker, stop func()) {
		b = NewBroker(billing, logger)
		ctx, cancel := context.WithCancel(f.ctx)
		done := make(chan struct{})
		pub := NewPublisher(billing)
		go func() {
			defer close(done)
			err := b.Run(ctx,
				Route("orders.*").Durable("billing").AckWait(lease).Retry(retry).DLQ("dlq.orders").Handle(func(ctx context.Context, m *Msg) error {
					if string(m.Data) == "bad" && m.Header.Get(HeaderRedriveTo) == "" {
						return Permanent(errors.New("the bank is closed"))
					}
					if string(m.Data) == "slow" {
						<-time.After(lease + lease/6)
					}
					if _, err := pub.Publish(ctx, To("invoices.created").Data(m.Data)); err != nil {
						f.fault("publish from a handler: %v", err)
					}
					handled.add(string(m.Data))
					return nil
				}),
				Route("prices.get").Queue("pricing").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("290"), nil }),
			)
			if err != nil {
				f.fault("Run: %v", err)
			}
		}()
		f.until("the broker is ready", func() bool { return b.isReady() })
		return b, func() {
			cancel()
			<-done
		}
	}
	dlq := func() int { return stored(t, admin, "DLQ") }
	publish := func(data string) {
		f.do("publish", func() error {
			_, err := NewPublisher(web).Publish(f.ctx, To("orders.created").Data([]byte(data)))
			return err
		})
	}

	b, stop := run(1)
	publish("good")
	publish("bad")
	if slow {
		publish("slow")
		f.until("the slow one is handled", func() bool { return handled.get("slow") == 1 })
	}
	f.do("request", func() error {
		_, err := NewPublisher(web).Request(f.ctx, To("prices.get"))
		return err
	})
	f.until("one is handled and one is dead", func() bool { return handled.get("good") == 1 && dlq() == 1 })
	f.do("pause", func() error { return b.Pause("billing") })
	f.do("a redrive is killed", func() error {
		if _, err := DeadLetters("dlq.orders").Redrive(f.ctx, killed); err == nil {
			return errors.New("it could delete the letter")
		}
		return nil
	})
	f.do("resume", func() error { return b.Resume("billing") })
	f.until("the route removes the letter", func() bool { return handled.get("bad") == 1 && dlq() == 0 })
	stop()

	b, stop = run(2) // finds its durable
	publish("bad")
	f.until("it is dead", func() bool { return dlq() == 1 })
	letters := DeadLetters("dlq.orders")
	f.do("count", func() error {
		n, err := letters.Count(f.ctx, oncall)
		if err == nil && n.Total != 1 {
			err = fmt.Errorf("%d letters, want 1", n.Total)
		}
		return err
	})
	f.do("pause", func() error { return b.Pause("billing") })
	f.do("another redrive is killed", func() error {
		if _, err := letters.Redrive(f.ctx, killed); err == nil {
			return errors.New("it could delete the letter")
		}
		return nil
	})
	f.do("redrive", func() error {
		r, err := letters.Redrive(f.ctx, oncall)
		if err == nil && r.Skips[SkipRedriven] != 1 {
			err = fmt.Errorf("redriven: %+v, want what the killed one began", r)
		}
		return err
	})
	f.do("resume", func() error { return b.Resume("billing") })
	f.until("it is handled", func() bool { return handled.get("bad") == 2 })
	publish("bad")
	f.until("another is dead", func() bool { return dlq() == 1 })
	f.do("redrive", func() error {
		r, err := letters.Redrive(f.ctx, oncall)
		if err == nil && r.Redriven != 1 {
			err = fmt.Errorf("redriven: %+v, want 1", r)
		}
		return err
	})
	f.until("it is handled", func() bool { return handled.get("bad") == 3 })
	publish("bad")
	f.until("one more is dead", func() bool { return dlq() == 1 })
	f.do("purge", func() error {
		_, err := letters.Purge(f.ctx, oncall)
		return err
	})
	f.do("replay", func() error {
		r, err := NewBroker(oncall, logger).Replay(f.ctx, Replay("orders.*").Handle(succeed))
		if err == nil && r.Handled == 0 {
			err = errors.New("nothing was replayed")
		}
		return err
	})
	stop()
}

// isReady reports whether the broker is ready.
func (b *Broker) isReady() bool {
	select {
	case <-b.Ready():
		return true
	default:
		return false
	}
}

// docs/permissions.conf gives each user what their work needs, and no line too many.
func TestLeastPrivilegeConfig(t *testing.T) {
	t.Parallel()
	load := func() *server.Options {
		opts, err := server.ProcessConfigFile("docs/permissions.conf")
		if err != nil {
			t.Fatal(err)
		}
		return opts
	}
	opts := load()
	if faults := workWith(t, opts, true); len(faults) > 0 {
		t.Fatalf("with all of the file: %q", faults)
	}
	subjects := func(u *server.User) []*[]string {
		return []*[]string{&u.Permissions.Publish.Allow, &u.Permissions.Subscribe.Allow}
	}
	for i, u := range opts.Users {
		for kind, allowed := range subjects(u) {
			if len(*allowed) == 0 {
				t.Errorf("%s may do everything", u.Username)
			}
			for _, subject := range *allowed {
				t.Run(u.Username+" without "+subject, func(t *testing.T) {
					t.Parallel()
					less := load()
					allow := subjects(less.Users[i])[kind]
					*allow = slices.DeleteFunc(*allow, func(s string) bool { return s == subject })
					if len(*allow) == 0 {
						*allow = []string{"none"}
					}
					if faults := workWith(t, less, strings.HasPrefix(subject, "$JS.ACK.")); len(faults) == 0 {
						t.Errorf("%s works without %q, which can be left out", u.Username, subject)
					}
				})
			}
		}
		if u.Permissions.Response != nil {
			t.Run(u.Username+" without responses", func(t *testing.T) {
				t.Parallel()
				less := load()
				less.Users[i].Permissions.Response = nil
				if faults := workWith(t, less, false); len(faults) == 0 {
					t.Errorf("%s works without allow_responses", u.Username)
				}
			})
		}
	}
}
