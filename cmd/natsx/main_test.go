package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/natsxtest"
)

// asTool has the test binary be the tool itself, for tests with a pseudo-terminal.
const asTool = "NATSX_TEST_AS_TOOL"

func TestMain(m *testing.M) {
	if os.Getenv(asTool) != "" {
		main()
		return
	}
	slog.SetDefault(slog.New(slog.DiscardHandler))
	// No context or variable of the person who runs the tests.
	home, err := os.MkdirTemp("", "natsx")
	if err != nil {
		panic(err)
	}
	os.Setenv("XDG_CONFIG_HOME", home)
	for _, variable := range variables {
		os.Unsetenv(variable)
	}
	code := m.Run()
	os.RemoveAll(home)
	os.Exit(code)
}

// limit is far above what anything takes.
const limit = time.Minute

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// result is what one run of the tool has printed.
type result struct {
	code      int
	out, errs string
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\nstdout:\n%sstderr:\n%s", r.code, r.out, r.errs)
}

// tool runs a command line without a terminal.
func runTool(t *testing.T, s *server.Server, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	if s != nil {
		args = append(args, "-server", s.ClientURL())
	}
	code := run(testContext(t), args, strings.NewReader(""), &out, &errs)
	return result{code, out.String(), errs.String()}
}

// want checks exit code and output.
func (r result) want(t *testing.T, code int, texts ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d: %v", r.code, code, r)
	}
	for _, text := range texts {
		if !strings.Contains(r.out+r.errs, text) {
			t.Errorf("no %q in: %v", text, r)
		}
	}
}

func (r result) wantNot(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if strings.Contains(r.out+r.errs, text) {
			t.Errorf("%q in: %v", text, r)
		}
	}
}

// site is a server with streams.
type site struct {
	*server.Server
	nc *nats.Conn
	js jetstream.JetStream
}

func newSite(t *testing.T, streams ...natsx.StreamSpec) *site {
	t.Helper()
	s := natsxtest.Server(t)
	nc := natsxtest.Connect(t, s)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for _, stream := range streams {
		if err := stream.Ensure(testContext(t), nc); err != nil {
			t.Fatal(err)
		}
	}
	return &site{s, nc, js}
}

func (s *site) publish(t *testing.T, es ...natsx.Envelope) {
	t.Helper()
	if _, err := natsx.NewPublisher(s.nc).PublishAll(testContext(t), es...); err != nil {
		t.Fatal(err)
	}
}

// runRoutes runs routes until each message was handled once.
func (s *site) runRoutes(t *testing.T, messages int, specs ...natsx.Spec) {
	t.Helper()
	ctx, stop := context.WithCancel(testContext(t))
	defer stop()
	seen := make(chan natsx.Event, messages)
	broker := natsx.NewBroker(s.nc, natsx.WithObserver(observer(func(e natsx.Event) { seen <- e })))
	ended := make(chan error, 1)
	go func() { ended <- broker.Run(ctx, specs...) }()
	select {
	case <-broker.Ready():
	case err := <-ended:
		t.Fatal(err)
	}
	for range messages {
		select {
		case <-seen:
		case <-ctx.Done():
			t.Fatal("a message was not handled in time")
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

type observer func(natsx.Event)

func (f observer) Observe(_ context.Context, e natsx.Event) { f(e) }

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		args string
		code int
		text string
	}{
		{"nothing", "", exitUsage, "which command"},
		{"help", "help", exitOK, "routes [STREAM...]"},
		{"-h", "-h", exitOK, "Exit codes: 0 done"},
		{"help of a command", "routes -h", exitOK, "-tlscert FILE"},
		{"unknown", "frobnicate", exitUsage, `no command "frobnicate"`},
		{"unknown flag", "routes -frobnicate", exitUsage, "not defined: -frobnicate"},
		{"bad value", "replay a.> -limit many", exitUsage, "invalid value"},
		{"bad limit", "replay a.> -limit 0", exitUsage, "must be at least 1"},
		{"no argument", "lint", exitUsage, "needs one argument, a stream"},
		{"two arguments", "replay a b", exitUsage, `has ["a" "b"]`},
		{"domain and prefix", "routes -js-domain a -js-api-prefix b", exitUsage, "exclude each other"},
		{"bad url", "routes -server ://", exitUsage, `natsx: url "://"`},
		{"nobody there", "routes -server nats://127.0.0.1:1", exitFailed, "cannot connect to nats://127.0.0.1:1"},
		{"no password in an error", "routes -server nats://me:secret@127.0.0.1:1", exitFailed, "nats://xxxxx@127.0.0.1:1"},
		{"no context", "routes -context absent", exitFailed, `"absent"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := runTool(t, nil, strings.Fields(test.args)...)
			r.want(t, test.code, test.text)
			r.wantNot(t, "secret")
		})
	}
}
