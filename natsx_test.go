package natsx

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// testLimit bounds whatever a test waits for, generous for a loaded machine.
const testLimit = 2 * time.Minute

// defaultLog has what is logged where nobody gave a logger.
var defaultLog, _ = newLogBook()

func TestMain(m *testing.M) {
	if mode := os.Getenv(childEnv); mode != "" {
		os.Exit(runChild(mode))
	}
	flag.Parse()
	if flag.Lookup("test.parallel").Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		// Most tests wait for leases and servers: more of them than cores fit.
		flag.Set("test.parallel", "8")
	}
	slog.SetDefault(slog.New(defaultLog))
	code := m.Run()
	os.RemoveAll(childDir) // an empty path is no file
	if code == 0 {
		if leaked := leakedGoroutines(); leaked != "" {
			fmt.Fprintf(os.Stderr, "goroutines left after all tests:\n%s\n", leaked)
			code = 1
		}
	}
	os.Exit(code)
}

// leakedGoroutines waits for goroutines of natsx and of nats.go to end and
// returns the stacks of those that do not.
func leakedGoroutines() string {
	buf := make([]byte, 16<<20)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var leaked []string
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "natsx.TestMain(") {
				continue
			}
			if strings.Contains(g, "natsx/natsx.") || strings.Contains(g, "nats-io/nats.go.") {
				leaked = append(leaked, g)
			}
		}
		if len(leaked) == 0 || time.Now().After(deadline) {
			return strings.Join(leaked, "\n\n")
		}
	}
}

// startServer runs an embedded nats-server with JetStream on a free port of the
// loopback until the test ends. edit may change its options first.
func startServer(t testing.TB, edit ...func(*server.Options)) *server.Server {
	t.Helper()
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: t.TempDir(),
		NoLog: true, NoSigs: true,
	}
	for _, fn := range edit {
		fn(opts)
	}
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatalf("new server: %v", err)
	}
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(testLimit) {
		t.Fatal("server is not ready")
	}
	return s
}

// connect opens a connection that closes before the server does.
func connect(t testing.TB, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	quiet := []nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}
	nc, err := nats.Connect(url, append(quiet, opts...)...)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func jetStream(t testing.TB, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatalf("jetstream: %v", err)
	}
	return js
}

// testContext ends with the test, and at the latest after testLimit.
func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	t.Cleanup(cancel)
	return ctx
}

// codeStoreFailed is the server's code for files that it could not create.
const codeStoreFailed = 10049

// createStream makes a stream with plain nats.go.
func createStream(t testing.TB, nc *nats.Conn, cfg jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	var s jetstream.Stream
	eventually(t, "stream "+cfg.Name+" is created", func() bool {
		var err error
		s, err = answered(t, func(ctx context.Context) (jetstream.Stream, error) { return jetStream(t, nc).CreateStream(ctx, cfg) })
		// A server that removes the files of another one of that name may fail once.
		if err != nil && !hasCode(err, codeStoreFailed) {
			t.Fatalf("create stream %s: %v", cfg.Name, err)
		}
		return err == nil
	})
	return s
}

// running is a broker whose Run goes on in the background.
type running struct {
	*Broker
	cancel context.CancelFunc
	done   chan struct{} // closed when Run has returned
	err    error         // of Run, once done is closed
}

// runBroker starts specs on b and waits until they receive. The test's end stops
// it and joins Run.
func runBroker(t testing.TB, b *Broker, specs ...Spec) *running {
	t.Helper()
	r := startBroker(t, b, specs...)
	select {
	case <-b.Ready():
	case <-r.done:
		t.Fatalf("Run returned before it was ready: %v", r.err)
	case <-time.After(testLimit):
		t.Fatal("broker is not ready")
	}
	return r
}

// startBroker is runBroker without the wait.
func startBroker(t testing.TB, b *Broker, specs ...Spec) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Broker: b, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = b.Run(ctx, specs...)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// stop ends Run and returns its error.
func (r *running) stop(t testing.TB) error {
	t.Helper()
	r.cancel()
	return r.wait(t)
}

// wait returns Run's error once it has returned by itself.
func (r *running) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-r.done:
		return r.err
	case <-time.After(testLimit):
		t.Fatal("Run does not return")
		return errors.New("unreachable")
	}
}

// receive takes one value from ch or fails the test.
func receive[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testLimit):
		t.Fatalf("timed out waiting for %s", what)
		panic("unreachable")
	}
}

// eventually polls cond, for what a server does in its own time.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	wait := 2 * time.Millisecond
	for deadline := time.Now().Add(testLimit); !cond(); time.Sleep(wait) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		wait = min(wait*5/4, 20*time.Millisecond) // asking a server costs others time
	}
}

// deliveryUnder is a delivery of m whose handler runs under ctx.
func deliveryUnder(ctx context.Context, m Msg) *delivery {
	m.from = &origin{ctx: ctx}
	return &delivery{msg: m}
}

func TestMsg(t *testing.T) {
	t.Parallel()
	core := &Msg{Subject: "orders.eu.new"}
	if core.Attempt() != 1 || !core.Time().IsZero() || core.Stream() != "" || core.Durable() != "" || core.Sequence() != 0 {
		t.Errorf("core message: attempt %d, time %v, stream %q, durable %q, sequence %d, want 1 and nothing",
			core.Attempt(), core.Time(), core.Stream(), core.Durable(), core.Sequence())
	}
	for i, want := range []string{"orders", "eu", "new", ""} {
		if got := core.Token(i); got != want {
			t.Errorf("Token(%d) = %q, want %q", i, got, want)
		}
	}
	at := time.Unix(1, 500)
	m := &Msg{from: &origin{stream: "S", durable: "D", ctx: context.Background()}, seq: 9, attempt: 3, time: at.UnixNano()}
	if m.Attempt() != 3 || !m.Time().Equal(at) || m.Stream() != "S" || m.Durable() != "D" || m.Sequence() != 9 {
		t.Errorf("message of a durable: attempt %d, time %v, stream %q, durable %q, sequence %d", m.Attempt(), m.Time(), m.Stream(), m.Durable(), m.Sequence())
	}
	m.ReplyHeader().Set("K", "v")
	if got := m.ReplyHeader().Get("K"); got != "v" {
		t.Errorf("reply header K = %q, want v", got)
	}
}

func TestMsgFrom(t *testing.T) {
	t.Parallel()
	type key struct{}
	type other struct{}
	parent, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
	d := deliveryUnder(parent, Msg{Subject: "a"})
	child, stop := context.WithTimeout(context.WithValue(d, other{}, 1), time.Hour)
	defer stop()
	if m := MsgFrom(child); m != &d.msg {
		t.Errorf("MsgFrom of a derived context = %v, want the message", m)
	}
	if got := child.Value(key{}); got != "value" {
		t.Errorf("the parent's value is %v, want value", got)
	}
	if m := MsgFrom(parent); m != nil {
		t.Errorf("MsgFrom of the parent = %v, want nil", m)
	}
	cancel()
	if !errors.Is(child.Err(), context.Canceled) {
		t.Errorf("child ended with %v, want the parent's end", child.Err())
	}
}

// FuzzToken holds Token against a split of the whole subject.
func FuzzToken(f *testing.F) {
	f.Add("a.b.c", 1)
	f.Fuzz(func(t *testing.T, subject string, i int) {
		want := ""
		if tokens := strings.Split(subject, "."); i >= 0 && i < len(tokens) {
			want = tokens[i]
		}
		if got := (&Msg{Subject: subject}).Token(i); got != want {
			t.Errorf("Token(%d) of %q = %q, want %q", i, subject, got, want)
		}
	})
}
