package natsx

import (
	"context"
	"errors"
	"flag"
	"fmt"
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
const testLimit = 60 * time.Second

func TestMain(m *testing.M) {
	if mode := os.Getenv(childEnv); mode != "" {
		os.Exit(runChild(mode))
	}
	flag.Parse()
	if flag.Lookup("test.parallel").Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		// Most tests wait for leases and servers: more of them than cores fit.
		flag.Set("test.parallel", "8")
	}
	code := m.Run()
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

// createStream makes a stream with plain nats.go.
func createStream(t testing.TB, nc *nats.Conn, cfg jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	s, err := jetStream(t, nc).CreateStream(testContext(t), cfg)
	if err != nil {
		t.Fatalf("create stream %s: %v", cfg.Name, err)
	}
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
	for deadline := time.Now().Add(testLimit); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}
