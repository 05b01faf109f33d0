package natsx

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func TestConnect(t *testing.T) {
	t.Parallel()
	url := startServer(t).ClientURL()
	nc, err := Connect(url)
	if err != nil {
		t.Fatalf("Connect: %v", err)
	}
	defer nc.Close()
	o := nc.Opts
	if o.Name == "" || o.MaxReconnect != -1 || !o.RetryOnFailedConnect || o.ReconnectWait != 500*time.Millisecond ||
		o.ReconnectJitter != 500*time.Millisecond || o.ReconnectJitterTLS != 2*time.Second || o.DrainTimeout != 30*time.Second ||
		o.FlusherTimeout != 5*time.Second || !o.IgnoreAuthErrorAbort || o.AsyncErrorCB == nil {
		t.Errorf("options %+v are not the documented defaults", o)
	}
	own, err := Connect(url, nats.Name("mine"), nats.MaxReconnects(3), nats.DrainTimeout(time.Second))
	if err != nil {
		t.Fatalf("Connect: %v", err)
	}
	defer own.Close()
	if o := own.Opts; o.Name != "mine" || o.MaxReconnect != 3 || o.DrainTimeout != time.Second || !o.RetryOnFailedConnect {
		t.Errorf("options %+v do not hold the caller's", o)
	}
}

func TestConnectBeforeTheServer(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	p.stop()
	connected := make(chan struct{})
	nc, err := Connect(p.url(), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0),
		nats.ConnectHandler(func(*nats.Conn) { close(connected) }))
	if err != nil {
		t.Fatalf("Connect without a server: %v", err)
	}
	defer nc.Close()
	p.start(t)
	receive(t, connected, "the connection")
}

// What is wrong with a URL is an error at once, which names it without its secrets.
func TestConnectToABadURL(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ url, named string }{
		{"nats://127.0.0.1:99999", "99999"},
		{"nats://127.0.0.1:port", "port"},
		{"nats://127.0.0.1:0", "0"},
		{"http://127.0.0.1:4222", "http"},
		{"nats://", "host"},
		{"nats://user:secret@:4222", "host"},
		{"nats://user:se cret@127.0.0.1:4222 x", "url"},
		{"nats://127.0.0.1:4222,nats://user:secret@host:-1", "host:-1"},
		{"://", "url"},
		{"nats://tok%zzsecret@host", "url"},
	} {
		nc, err := Connect(tt.url)
		if nc != nil {
			nc.Close()
		}
		if !errors.Is(err, ErrInvalidURL) || !strings.Contains(err.Error(), tt.named) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "se cret") {
			t.Errorf("Connect(%q): %v, want an invalid URL that names %q and no secret", tt.url, err, tt.named)
		}
	}
}

// A connection that does not come up says why, in the log, in Health and, when it is
// given up, in the error of Run; when the cause is gone it comes up.
func TestConnectionThatDoesNotComeUp(t *testing.T) {
	t.Parallel()
	quick := []nats.Option{nats.ReconnectWait(10 * time.Millisecond), nats.ReconnectJitter(0, 0)}
	withPassword := func(password string) func(*server.Options) {
		return func(o *server.Options) { o.Username, o.Password = "ann", password }
	}
	wrong := startPhoenix(t, withPassword("other"))
	refused := startPhoenix(t)
	refused.stop()
	for _, tt := range []struct {
		name, url, shown, cause string
		mend                    func(t *testing.T)
	}{
		{"a wrong password", strings.Replace(wrong.url(), "//", "//ann:secret@", 1), strings.Replace(wrong.url(), "//", "//ann:xxxxx@", 1), "authorization violation", func(t *testing.T) {
			wrong.stop()
			withPassword("secret")(wrong.opts)
			wrong.start(t)
		}},
		{"an unknown host", "nats://no-such-host.invalid:4222", "no-such-host.invalid", "no-such-host.invalid", nil},
		{"a refused port", refused.url(), refused.url(), "refused", func(t *testing.T) { refused.start(t) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			name := "connection of " + tt.name
			nc, err := Connect(tt.url, append(quick, nats.Name(name))...)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			book, log := newLogBook()
			b := NewBroker(nc, WithLogger(log))
			r := startBroker(t, b, Route("core").Handle(succeed))
			lines := func() (of []string) {
				for _, line := range defaultLog.alarms("cannot connect") {
					if strings.Contains(line, name) {
						of = append(of, line)
					}
				}
				return of
			}
			eventually(t, "it is logged", func() bool { return len(lines()) > 0 })
			if line := lines()[0]; !strings.Contains(line, tt.shown) || !strings.Contains(strings.ToLower(line), tt.cause) || strings.Contains(line, "secret") {
				t.Errorf("logged %q, want %q and %q in it", line, tt.shown, tt.cause)
			}
			eventually(t, "Health tells the cause", func() bool {
				err := b.Health()
				return err != nil && strings.Contains(strings.ToLower(err.Error()), tt.cause)
			})
			<-time.After(time.Second) // many failures later
			if nc.IsClosed() {
				t.Fatal("the connection is closed")
			}
			if said := book.alarms("connection lost"); len(said) > 5 {
				t.Errorf("the broker said %d times that the connection is lost: %q", len(said), said)
			}
			if tt.mend == nil {
				return
			}
			tt.mend(t)
			receive(t, b.Ready(), "the broker")
			if err := r.stop(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// Run names what closed the connection.
func TestRunNamesWhatClosedTheConnection(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc, err := Connect(p.url(), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0), nats.MaxReconnects(5))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(nc, WithLogger(log)), Route("core").Handle(succeed))
	p.stop()
	if err := r.wait(t); !errors.Is(err, ErrConnectionClosed) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("Run: %v, want a closed connection and that it was refused", err)
	}
}

// An application that drains its connection gets the drain of the broker: what was
// handled is acknowledged.
func TestApplicationDrainsItsConnection(t *testing.T) {
	t.Parallel()
	const messages = 200
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	orders(t, admin)
	publishMany(t, admin, messages, numbered("orders.x"))
	nc := connect(t, s.ClientURL(), nats.DrainTimeout(testLimit))
	var seen tally
	_, log := newLogBook()
	r := runBroker(t, NewBroker(nc, WithWorkers(8), WithLogger(log)),
		Route("orders.*").Durable("d").Handle(func(ctx context.Context, m *Msg) error {
			defer seen.add(string(m.Data))
			return busyFor(ctx, 20*time.Millisecond)
		}),
		Route("ask").Queue("q").Reply(func(ctx context.Context, _ *Msg) ([]byte, error) {
			return []byte("answer"), busyFor(ctx, 300*time.Millisecond)
		}))
	answered := make(chan error, 1)
	go func() {
		m, err := admin.Request("ask", nil, testLimit)
		if err == nil && string(m.Data) != "answer" {
			err = fmt.Errorf("answered %q %v", m.Data, m.Header)
		}
		answered <- err
	}()
	eventually(t, "a part is handled", func() bool { return seen.sum() > messages/10 })
	if err := nc.Drain(); err != nil {
		t.Fatal(err)
	}
	if err := r.wait(t); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("Run: %v, want that the connection is closed", err)
	}
	if err := receive(t, answered, "the answer"); err != nil {
		t.Error(err)
	}
	handled := seen.sum()
	eventually(t, "what was handled is acknowledged", func() bool {
		return consumerInfo(t, admin, "ORDERS", "d").AckFloor.Consumer >= uint64(handled) || streamAcked(t, admin) >= handled
	})
	if handled == messages {
		t.Error("all was handled: the drain waited for the backlog")
	}
	eventually(t, "the connection is closed", nc.IsClosed)
}

// streamAcked is how many messages of ORDERS the durable d has settled.
func streamAcked(t testing.TB, nc *nats.Conn) int {
	ci := consumerInfo(t, nc, "ORDERS", "d")
	return int(ci.Delivered.Stream) - ci.NumAckPending
}
