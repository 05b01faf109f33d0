package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func init() { childModes["serve"] = serveChild }

// serveChild serves one route. Its handler says that it runs, and returns when a
// message comes on "go on".
func serveChild() int {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stdout, nil)))
	nc, err := Connect(childURL())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer nc.Close()
	goOn := make(chan struct{})
	sub, err := nc.SubscribeSync("go.on")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	go func() {
		if _, err := sub.NextMsg(testLimit); err == nil {
			close(goOn)
		}
	}()
	err = Serve(context.Background(), NewBroker(nc, WithDrainTimeout(testLimit)),
		Route("orders.*").Durable("d").Handle(func(ctx context.Context, m *Msg) error {
			fmt.Println("handling")
			<-goOn
			fmt.Println("context:", ctx.Err())
			return nil
		}))
	fmt.Println("served:", err)
	return 0
}

// line waits for a line that holds text.
func line(t *testing.T, lines <-chan string, text string) {
	t.Helper()
	for {
		if strings.Contains(receive(t, lines, fmt.Sprintf("a line with %q", text)), text) {
			return
		}
	}
}

func TestServeDrainsOnTheFirstSignal(t *testing.T) {
	t.Parallel()
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			server := startServer(t)
			nc := connect(t, server.ClientURL())
			orders(t, nc)
			publishAcked(t, nc, "orders.x", "1")
			lines := make(chan string, 100)
			c := startChild(t, "serve", server.ClientURL(), lines)
			line(t, lines, "handling")
			if err := c.cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			line(t, lines, s.String())
			if err := nc.Publish("go.on", nil); err != nil {
				t.Fatal(err)
			}
			line(t, lines, "context: <nil>")
			line(t, lines, "served: <nil>")
			receive(t, c.done, "the end of the child")
			if c.err != nil {
				t.Errorf("the child ended with %v, want success", c.err)
			}
			if !settled(t, nc, "ORDERS", "d") {
				t.Error("the message was not acknowledged")
			}
		})
	}
}

func TestServeEndsAtOnceOnTheSecondSignal(t *testing.T) {
	t.Parallel()
	server := startServer(t)
	nc := connect(t, server.ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.x", "1")
	lines := make(chan string, 100)
	c := startChild(t, "serve", server.ClientURL(), lines)
	line(t, lines, "handling")
	signal := func() {
		t.Helper()
		if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	signal()
	line(t, lines, "a second signal ends the process")
	signal()
	receive(t, c.done, "the end of the child")
	var exit *exec.ExitError
	if !errors.As(c.err, &exit) || exit.ExitCode() != -1 {
		t.Errorf("the child ended with %v, want the signal", c.err)
	}
}

func TestServeReturnsWhatRunDoes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	_, log := newLogBook()
	spec := Route("orders.*").Durable("d").Handle(succeed)
	if err := Serve(t.Context(), NewBroker(nc, WithLogger(log)), spec); !errors.Is(err, ErrNoStream) {
		t.Errorf("without a stream: %v, want ErrNoStream", err)
	}
	orders(t, nc)
	ctx, cancel := context.WithCancel(t.Context())
	b := NewBroker(nc, WithLogger(log))
	go func() {
		<-b.Ready()
		cancel()
	}()
	if err := Serve(ctx, b, spec); err != nil {
		t.Errorf("when its context ends: %v, want nil", err)
	}
}

func TestServeSaysWhyItIsNotReady(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	p.stop()
	eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
	book, log := newLogBook()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b := NewBroker(nc, WithLogger(log))
	done := make(chan error, 1)
	go func() { done <- serve(ctx, b, 10*time.Millisecond, []Spec{Route("core").Handle(succeed)}) }()
	eventually(t, "it is said more than once", func() bool { return len(book.alarms("not ready yet error=natsx: broker is starting")) > 2 })
	p.start(t)
	receive(t, b.Ready(), "the broker")
	said := len(book.alarms("not ready yet"))
	<-time.After(100 * time.Millisecond)
	if more := len(book.alarms("not ready yet")) - said; more > 1 { // one may have been due
		t.Errorf("it was said %d times more once the broker was ready", more)
	}
	cancel()
	if err := receive(t, done, "the end"); err != nil {
		t.Error(err)
	}
}

// probe asks a broker's probes and compares their answers.
func probe(t *testing.T, b *Broker, when string, healthz, readyz int, why string) {
	t.Helper()
	for path, want := range map[string]int{"/healthz": healthz, "/readyz": readyz} {
		w := httptest.NewRecorder()
		b.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		body := w.Body.String()
		if w.Code != want {
			t.Errorf("%s: %s answers %d %q, want %d", when, path, w.Code, body, want)
		}
		if w.Code == http.StatusOK && body != "ok\n" || w.Code != http.StatusOK && !strings.Contains(body, why) {
			t.Errorf("%s: %s says %q, want ok or %q", when, path, body, why)
		}
	}
}

func TestProbes(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	_, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	probe(t, b, "before Run", 200, 503, "is not running")

	handling, goOn := make(chan struct{}), make(chan struct{})
	r := runBroker(t, b, Route("core").Handle(func(context.Context, *Msg) error {
		close(handling)
		<-goOn
		return nil
	}))
	probe(t, b, "while it runs", 200, 200, "")
	p.stop()
	eventually(t, "the stop is noticed", func() bool { return b.Health() != nil })
	probe(t, b, "without a server", 200, 503, "connection is")
	p.start(t)
	eventually(t, "it is healthy again", func() bool { return b.Health() == nil })

	if err := nc.Publish("core", nil); err != nil {
		t.Fatal(err)
	}
	receive(t, handling, "the handler")
	r.cancel()
	eventually(t, "it drains", func() bool { return b.Health() != nil })
	probe(t, b, "while it drains", 200, 503, "is draining")
	close(goOn)
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	probe(t, b, "after Run", 503, 503, "has stopped")

	for _, c := range []struct {
		method, path string
		want         int
	}{
		{http.MethodHead, "/healthz", 503}, {http.MethodPost, "/healthz", 405}, {http.MethodGet, "/", 404},
	} {
		w := httptest.NewRecorder()
		b.Handler().ServeHTTP(w, httptest.NewRequest(c.method, c.path, nil))
		if w.Code != c.want {
			t.Errorf("%s %s answers %d, want %d", c.method, c.path, w.Code, c.want)
		}
	}
}

func TestHungWorkersAreNotAlive(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	_, log := newLogBook()
	b := NewBroker(nc, WithLogger(log), WithWorkers(1))
	goOn := make(chan struct{})
	r := runBroker(t, b, Route("core").Timeout(10*time.Millisecond).Handle(func(context.Context, *Msg) error {
		<-goOn
		return nil
	}))
	if err := nc.Publish("core", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "that is noticed", func() bool { return b.Health() != nil })
	probe(t, b, "while all workers hang", 503, 503, "all workers")
	close(goOn)
	eventually(t, "it is over", func() bool { return b.Health() == nil })
	probe(t, b, "when they are free again", 200, 200, "")
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
}
