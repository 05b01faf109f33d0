package natsx

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var servers = flag.String("servers", "", `run against these nats-servers, such as "2.10.29,2.12.15" or paths of binaries; "all" for those of the README`)

// serverVersions are those of the table in the README.
var serverVersions = []string{"2.9.25", "2.10.29", "2.11.17", "2.12.15", "2.15.2"}

type feature struct {
	name    string
	refused error // what the error is where it does not work
	try     func(t *testing.T, nc *nats.Conn, restart func()) error
}

// features are what the table tells of each server. A feature that a server lacks is
// refused with an error that says so.
var features = []feature{
	{"durable routes, retries, dead letters, redrive", ErrServerTooOld, tryRoutes},
	{"a durable is recognised after restarts and updates", ErrServerTooOld, tryIdentity},
	{"publishing with deduplication, replay, core routes, request-reply", nil, tryBasics},
	{"`TTL` of a message", ErrTTLNotAllowed, tryTTL},
	{"`At` and `After`", ErrSchedulesNotAllowed, tryDelay},
	{"`OrderedBy`, `PinnedBy`", ErrServerTooOld, tryOrder},
	{"`WithRetryStream`", ErrServerTooOld, tryRetryStream},
	{"`PublishAtomic`", ErrAtomicNotAllowed, tryAtomic},
}

// TestServerVersions holds the table in the README against real servers.
func TestServerVersions(t *testing.T) {
	if *servers == "" {
		t.Skip("run with -servers all")
	}
	wanted := strings.Split(*servers, ",")
	if *servers == "all" {
		wanted = serverVersions
	}
	table := readVersionTable(t)
	for _, version := range wanted {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			binary, version := serverBinary(t, version)
			got := map[string]string{}
			for _, f := range features {
				err := tryOnServer(t, binary, f.try)
				switch {
				case err == nil:
					got[f.name] = "yes"
				case f.refused != nil && errors.Is(err, f.refused):
					got[f.name] = "no"
					t.Logf("%s: %v", f.name, err)
				default:
					got[f.name] = "broken"
					t.Errorf("%s: %v", f.name, err)
				}
			}
			minor := strings.Join(strings.Split(version, ".")[:2], ".")
			want, known := table[minor]
			if !known {
				t.Skipf("the README says nothing of %s; got %v", minor, got)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("nats-server %s (-README +got):\n%s", version, diff)
			}
		})
	}
}

// readVersionTable returns what the README says by server version and feature.
func readVersionTable(t *testing.T) map[string]map[string]string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	cells := func(line string) []string {
		list := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range list {
			list[i] = strings.TrimSpace(list[i])
		}
		return list
	}
	table := map[string]map[string]string{}
	var columns []string
	for line := range strings.Lines(string(readme)) {
		if strings.HasPrefix(line, "| nats-server |") {
			columns = cells(line)[1:]
			for _, c := range columns {
				table[c] = map[string]string{}
			}
			continue
		}
		row := cells(line)
		if columns == nil || !slices.ContainsFunc(features, func(f feature) bool { return f.name == row[0] }) {
			continue
		}
		for i, c := range columns {
			table[c][row[0]] = row[i+1]
		}
	}
	for version, rows := range table {
		if len(rows) != len(features) {
			t.Fatalf("the README's table has the rows %q for %s, want all features", slices.Sorted(maps.Keys(rows)), version)
		}
	}
	if len(table) == 0 {
		t.Fatal("the README has no table of server versions")
	}
	return table
}

// serverBinary returns the path of a nats-server, which it installs where it is given as
// a version, and its version.
func serverBinary(t *testing.T, wanted string) (path, version string) {
	t.Helper()
	path = wanted
	if !strings.Contains(wanted, "/") {
		dir := t.TempDir()
		install := exec.Command("go", "install", "github.com/nats-io/nats-server/v2@v"+wanted)
		install.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=-mod=mod", "CGO_ENABLED=0")
		if out, err := install.CombinedOutput(); err != nil {
			t.Fatalf("install nats-server %s: %v\n%s", wanted, err, out)
		}
		path = filepath.Join(dir, "nats-server")
	}
	out, err := exec.Command(path, "--version").CombinedOutput()
	found := regexp.MustCompile(`v(\d+\.\d+\.\d+)`).FindSubmatch(out)
	if err != nil || found == nil {
		t.Fatalf("%s --version: %v %s", path, err, out)
	}
	return path, string(found[1])
}

// tryOnServer runs try against a new server, which restart stops and starts again.
func tryOnServer(t *testing.T, binary string, try func(*testing.T, *nats.Conn, func()) error) error {
	t.Helper()
	port, store := strconv.Itoa(fixedPort(t)), t.TempDir()
	var cmd *exec.Cmd
	start := func() {
		cmd = exec.Command(binary, "-js", "-a", "127.0.0.1", "-p", port, "-sd", store)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ready := make(chan struct{})
		go func() {
			lines := bufio.NewScanner(stderr)
			for once := true; lines.Scan(); {
				if once && strings.Contains(lines.Text(), "Server is ready") {
					once = false
					close(ready)
				}
			}
		}()
		receive(t, ready, "the server")
	}
	stop := func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
	start()
	defer func() { stop() }()
	nc, err := nats.Connect("nats://127.0.0.1:"+port, nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	return try(t, nc, func() {
		stop()
		start()
		eventually(t, "the client is back", nc.IsConnected)
	})
}

// within runs specs until fn returns, and joins what both say.
func within(nc *nats.Conn, fn func(b *Broker) error, specs ...Spec) error {
	_, log := newLogBook()
	return withinBroker(NewBroker(nc, WithLogger(log)), fn, specs...)
}

func withinBroker(b *Broker, fn func(b *Broker) error, specs ...Spec) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, specs...) }()
	select {
	case <-b.Ready():
	case err := <-done:
		return err
	}
	err := fn(b)
	cancel()
	return errors.Join(err, <-done)
}

func ensured(t *testing.T, nc *nats.Conn, list ...StreamSpec) error {
	for _, s := range list {
		if err := s.Ensure(testContext(t), nc); err != nil {
			return err
		}
	}
	return nil
}

// until waits for cond and is its error when that does not come true.
func until(what string, cond func() bool) error {
	for end := time.Now().Add(testLimit / 2); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return errors.New("timed out waiting until " + what)
		}
	}
	return nil
}

func tryRoutes(t *testing.T, nc *nats.Conn, _ func()) error {
	if err := ensured(t, nc, Stream("ORDERS").Subjects("orders.*"), Stream("DLQ").Subjects("dlq.*")); err != nil {
		return err
	}
	pub := NewPublisher(nc)
	for i := range 20 {
		if _, err := pub.Publish(testContext(t), To("orders.x").Data(fmt.Append(nil, i))); err != nil {
			return err
		}
	}
	var seen tally
	var mended bool
	return within(nc, func(b *Broker) error {
		stats := func() RouteStats { return b.Stats().Routes[0] }
		if err := until("all are settled", func() bool { s := stats(); return s.Succeeded == 19 && s.Dead == 1 }); err != nil {
			return err
		}
		if n := seen.get("7"); n != 3 {
			return fmt.Errorf("the bad message ran %d times, want 3", n)
		}
		mended = true
		report, err := DeadLetters("dlq.x").Redrive(testContext(t), nc)
		if err != nil || report.Redriven != 1 {
			return fmt.Errorf("redrive: %+v %w", report, err)
		}
		return until("the redriven one is handled", func() bool { return stats().Succeeded == 20 })
	}, Route("orders.*").Durable("d").Retry(2).Backoff(10*time.Millisecond, 10*time.Millisecond).DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		if seen.add(string(m.Data)); string(m.Data) == "7" && !mended {
			return errors.New("bad")
		}
		return nil
	}))
}

// tryIdentity restarts the server, changes the consumer, and restarts it again, below a
// route that goes on.
func tryIdentity(t *testing.T, nc *nats.Conn, restart func()) error {
	if err := ensured(t, nc, Stream("ORDERS").Subjects("orders.*")); err != nil {
		return err
	}
	var seen tally
	pub := NewPublisher(nc)
	return within(nc, func(*Broker) error {
		for round := range 4 {
			if _, err := pub.Publish(testContext(t), To("orders.x").Data(fmt.Append(nil, round))); err != nil {
				return err
			}
			if err := until("it is handled", func() bool { return seen.keys() == round+1 }); err != nil {
				return err
			}
			if round == 1 {
				changeConsumer(t, nc, "ORDERS", "d", func(c *jetstream.ConsumerConfig) { c.Description = "changed" })
			}
			if round < 3 {
				restart()
			}
		}
		return nil
	}, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		seen.add(string(m.Data))
		return nil
	}))
}

func tryBasics(t *testing.T, nc *nats.Conn, restart func()) error {
	if err := ensured(t, nc, Stream("ORDERS").Subjects("orders.*")); err != nil {
		return err
	}
	pub := NewPublisher(nc)
	for range 2 {
		if _, err := pub.Publish(testContext(t), To("orders.x").MsgID("one")); err != nil {
			return err
		}
	}
	report, err := NewBroker(nc).Replay(testContext(t), Replay("orders.*").Handle(succeed))
	if err != nil || report.Handled != 1 {
		return fmt.Errorf("replay: %+v %w", report, err)
	}
	return within(nc, func(*Broker) error {
		restart()
		m, err := pub.Request(testContext(t), To("ask"))
		if err == nil && string(m.Data) != "answer" {
			err = fmt.Errorf("answered %q", m.Data)
		}
		return err
	}, Route("ask").Reply(func(context.Context, *Msg) ([]byte, error) { return []byte("answer"), nil }))
}

func tryTTL(t *testing.T, nc *nats.Conn, _ func()) error {
	config := jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}, AllowMsgTTL: true}
	if _, err := jetStream(t, nc).CreateStream(testContext(t), config); err != nil {
		return err
	}
	if _, err := NewPublisher(nc).Publish(testContext(t), To("orders.x").TTL(time.Second)); err != nil {
		return err
	}
	return until("it is gone", func() bool { return stored(t, nc, "ORDERS") == 0 })
}

func tryDelay(t *testing.T, nc *nats.Conn, _ func()) error {
	config := jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*", "natsx-schedule.*.orders.*"}, AllowMsgSchedules: true}
	if _, err := jetStream(t, nc).CreateStream(testContext(t), config); err != nil {
		return err
	}
	if _, err := NewPublisher(nc).Publish(testContext(t), To("orders.x").After(time.Second)); err != nil {
		return err
	}
	return until("it has come", func() bool {
		info, err := streamNow(t, nc, "ORDERS").Info(testContext(t), jetstream.WithSubjectFilter("orders.*"))
		return err == nil && info.State.Subjects["orders.x"] == 1
	})
}

func tryRetryStream(t *testing.T, nc *nats.Conn, restart func()) error {
	if err := ensured(t, nc, Stream("ORDERS").Subjects("orders.*").Retention(jetstream.WorkQueuePolicy)); err != nil {
		return err
	}
	if _, err := NewPublisher(nc).Publish(testContext(t), To("orders.x").Header("X", "y")); err != nil {
		return err
	}
	_, log := newLogBook()
	b := NewBroker(nc, WithLogger(log), WithRetryStream("RETRY"), WithStreams(RetryStream("RETRY")))
	return withinBroker(b, func(*Broker) error {
		stats := func() RouteStats { return b.Stats().Routes[0] }
		if err := until("it has failed", func() bool { return stats().Retried == 1 }); err != nil {
			return err
		}
		if stored(t, nc, "ORDERS") != 0 || stored(t, nc, "RETRY") != 1 {
			return errors.New("the retry is not in the retry stream alone")
		}
		restart()
		if err := until("it is handled", func() bool { return stats().Succeeded == 1 }); err != nil {
			return err
		}
		return until("nothing is left", func() bool { return stored(t, nc, "RETRY") == 0 })
	}, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		if m.Attempt() == 1 {
			return RetryAfter(2*time.Second, errors.New("not yet"))
		}
		if m.Attempt() != 2 || m.Header.Get("X") != "y" {
			return Permanent(errors.New("another message"))
		}
		return nil
	}))
}

// tryOrder handles what is ordered by key through a retry and a restart of the server.
func tryOrder(t *testing.T, nc *nats.Conn, restart func()) error {
	if err := Stream("ORDERS").Subjects("orders.*").Ensure(t.Context(), nc); err != nil {
		return err
	}
	var order []uint64
	_, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	return withinBroker(b, func(*Broker) error {
		for i := range 4 {
			if i == 2 {
				restart()
			}
			if _, err := NewPublisher(nc).Publish(t.Context(), To("orders.x").Data([]byte{byte(i)})); err != nil {
				return err
			}
		}
		if err := until("all are handled", func() bool { return b.Stats().Routes[0].Succeeded == 4 }); err != nil {
			return err
		}
		if !slices.IsSorted(order) {
			return fmt.Errorf("handled in the order %v", order)
		}
		return nil
	}, Route("orders.*").Durable("d").OrderedBy(SubjectKey()).AckWait(time.Second).Backoff(time.Millisecond, 10*time.Millisecond).Handle(func(_ context.Context, m *Msg) error {
		if m.Attempt() == 1 && m.Sequence()%2 == 1 {
			return errors.New("not yet")
		}
		order = append(order, m.Sequence())
		return nil
	}))
}

func tryAtomic(t *testing.T, nc *nats.Conn, _ func()) error {
	config := jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}, AllowAtomicPublish: true}
	if _, err := jetStream(t, nc).CreateStream(testContext(t), config); err != nil {
		return err
	}
	_, err := NewPublisher(nc).PublishAtomic(testContext(t), To("orders.a"), To("orders.b"))
	if err == nil && stored(t, nc, "ORDERS") != 2 {
		err = errors.New("not all are stored")
	}
	return err
}
