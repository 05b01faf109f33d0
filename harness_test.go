package natsx

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// soak has the tests of crashes and restarts run many times as long.
var soak = flag.Bool("soak", false, "run the long variants of the chaos tests")

// nextPort walks through ports below the ephemeral range, so that no outgoing
// connection takes the port of a server that is down between two runs.
var nextPort atomic.Int32

func init() { nextPort.Store(10000 + rand.Int32N(20000)) }

// fixedPort returns a port of the loopback that is free and stays so.
func fixedPort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 10000 + int(nextPort.Add(1)-10000)%22000
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

func withMaxPayload(n int32) func(*server.Options) {
	return func(o *server.Options) { o.MaxPayload = n }
}

// phoenix is a server that can be stopped and started again on the same port and
// store.
type phoenix struct {
	opts *server.Options
	srv  *server.Server
}

func startPhoenix(t testing.TB, edit ...func(*server.Options)) *phoenix {
	t.Helper()
	p := &phoenix{opts: &server.Options{
		Host: "127.0.0.1", Port: fixedPort(t),
		JetStream: true, StoreDir: t.TempDir(),
		NoLog: true, NoSigs: true,
	}}
	for _, fn := range edit {
		fn(p.opts)
	}
	p.start(t)
	t.Cleanup(p.stop)
	return p
}

func (p *phoenix) url() string { return fmt.Sprintf("nats://127.0.0.1:%d", p.opts.Port) }

func (p *phoenix) start(t testing.TB) {
	t.Helper()
	s, err := server.NewServer(p.opts.Clone())
	if err != nil {
		t.Fatalf("new server: %v", err)
	}
	s.Start()
	p.srv = s
	if !s.ReadyForConnections(testLimit) {
		t.Fatal("server is not ready")
	}
}

// stop is harmless when the server is down already.
func (p *phoenix) stop() {
	p.srv.Shutdown()
	p.srv.WaitForShutdown()
}

// cluster is three servers with JetStream in this process.
type cluster struct {
	servers []*phoenix
}

// startCluster returns once the cluster has a leader that sees all three.
func startCluster(t testing.TB) *cluster {
	t.Helper()
	ports, routes := clusterPorts(t)
	c := &cluster{}
	for i, port := range ports {
		c.servers = append(c.servers, startPhoenix(t, inCluster(memberName(i), port, routes)))
	}
	eventually(t, "the cluster has a leader", func() bool {
		return slices.ContainsFunc(c.servers, func(p *phoenix) bool {
			return p.srv.JetStreamIsLeader() && len(p.srv.JetStreamClusterPeers()) == clusterSize
		})
	})
	return c
}

const clusterSize = 3

// memberName is the name of a cluster's server, from 0.
func memberName(i int) string { return fmt.Sprintf("s%d", i+1) }

// clusterPorts are the ports on which the servers of a cluster have each other, and the
// routes to them.
func clusterPorts(t testing.TB) (ports []int, routes string) {
	t.Helper()
	var urls []string
	for range clusterSize {
		port := fixedPort(t)
		ports = append(ports, port)
		urls = append(urls, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	return ports, strings.Join(urls, ",")
}

// inCluster makes a server the member of a cluster.
func inCluster(name string, port int, routes string) func(*server.Options) {
	return func(o *server.Options) {
		o.ServerName = name
		o.Cluster = server.ClusterOpts{Name: "chaos", Host: "127.0.0.1", Port: port, PoolSize: -1}
		o.Routes = server.RoutesFromStr(routes)
	}
}

// url names all servers.
func (c *cluster) url() string {
	var urls []string
	for _, p := range c.servers {
		urls = append(urls, p.url())
	}
	return strings.Join(urls, ",")
}

// leader waits for and returns the server that leads a stream, or a consumer of
// it when one is named.
func (c *cluster) leader(t testing.TB, stream, consumer string) *phoenix {
	t.Helper()
	var found *phoenix
	eventually(t, fmt.Sprintf("%s/%s has a leader", stream, consumer), func() bool {
		for _, p := range c.servers {
			if !p.srv.Running() {
				continue
			}
			leads := p.srv.JetStreamIsStreamLeader
			if consumer != "" {
				leads = func(account, stream string) bool {
					return p.srv.JetStreamIsConsumerLeader(account, stream, consumer)
				}
			}
			if leads("$G", stream) {
				found = p
				return true
			}
		}
		return false
	})
	return found
}

// whole waits until every replica of the streams has all that their leaders have:
// a server more may then stop without a long search for a leader.
func whole(t testing.TB, nc *nats.Conn, streams ...string) {
	t.Helper()
	for _, name := range streams {
		eventually(t, "the replicas of "+name+" are current", func() bool {
			ctx, cancel := context.WithTimeout(testContext(t), time.Second)
			defer cancel()
			s, err := jetStream(t, nc).Stream(ctx, name)
			if err != nil {
				return false
			}
			in := s.CachedInfo().Cluster
			return in != nil && in.Leader != "" && len(in.Replicas) == clusterSize-1 &&
				!slices.ContainsFunc(in.Replicas, func(p *jetstream.PeerInfo) bool { return !p.Current || p.Offline })
		})
	}
}

// onceWithin fails the test unless one of many tries takes at most limit: the
// machine may be busy with something else during the others.
func onceWithin(t testing.TB, limit time.Duration, try func() time.Duration) {
	t.Helper()
	var took []time.Duration
	for range 10 {
		d := try()
		if d <= limit {
			return
		}
		took = append(took, d)
	}
	t.Errorf("took %v, want at most %v once", took, limit)
}

// stalls begins to watch whether this process runs, and returns a function that
// ends the watch and tells the longest time for which it did not.
func stalls() (longest func() time.Duration) {
	const beat = 5 * time.Millisecond
	end, worst := make(chan struct{}), make(chan time.Duration)
	go func() {
		tick := time.NewTicker(beat)
		defer tick.Stop()
		last, gap := time.Now(), time.Duration(0)
		for {
			select {
			case <-tick.C:
				now := time.Now()
				gap, last = max(gap, now.Sub(last)-beat), now
			case <-end:
				worst <- gap
				return
			}
		}
	}()
	return func() time.Duration {
		close(end)
		return <-worst
	}
}

// undisturbed runs a try and reports its faults, unless this process stood still meanwhile
// for longer than a quarter of the lease that the try is about: then it is run again.
func undisturbed(t testing.TB, lease time.Duration, try func(fault func(format string, args ...any))) {
	t.Helper()
	for range 5 {
		var faults []string
		stalled := stalls()
		try(func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) })
		stood := stalled()
		if len(faults) == 0 {
			return
		}
		if stood <= lease/4 {
			t.Error(strings.Join(faults, "\n"))
			return
		}
		t.Logf("after the process stood still for %v: %q", stood, faults)
	}
	t.Skip("the machine stands still for too long, again and again")
}

// logBook is a slog handler that keeps what was logged.
type logBook struct {
	attrs []slog.Attr
	*logPages
}

type logPages struct {
	mu      sync.Mutex
	records []logRecord
}

type logRecord struct {
	level slog.Level
	text  string // message and attributes
}

func newLogBook() (*logBook, *slog.Logger) {
	b := &logBook{logPages: &logPages{}}
	return b, slog.New(b)
}

func (b *logBook) Enabled(context.Context, slog.Level) bool { return true }

func (b *logBook) Handle(_ context.Context, r slog.Record) error {
	var text strings.Builder
	text.WriteString(r.Message)
	write := func(a slog.Attr) bool {
		fmt.Fprintf(&text, " %s=%v", a.Key, a.Value)
		return true
	}
	for _, a := range b.attrs {
		write(a)
	}
	r.Attrs(write)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.records = append(b.records, logRecord{r.Level, text.String()})
	return nil
}

func (b *logBook) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logBook{slices.Concat(b.attrs, attrs), b.logPages}
}

func (b *logBook) WithGroup(string) slog.Handler { return b }

// alarms returns what was logged at warning level or above and holds text.
func (b *logBook) alarms(text string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []string
	for _, r := range b.records {
		if r.level >= slog.LevelWarn && strings.Contains(r.text, text) {
			found = append(found, r.text)
		}
	}
	return found
}

// publish stores one message and returns its sequence.
func publish(t testing.TB, nc *nats.Conn, m *nats.Msg) uint64 {
	t.Helper()
	ack, err := answered(t, func(ctx context.Context) (*jetstream.PubAck, error) { return jetStream(t, nc).PublishMsg(ctx, m) })
	if err != nil {
		t.Fatalf("publish to %q: %v", m.Subject, err)
	}
	return ack.Sequence
}

// sameAck tells whether got is want. Where a machine is so slow that an ack comes
// later than a try waits, that of the next try says that the stream has it already.
func sameAck(got, want Ack) bool {
	got.Duplicate = got.Duplicate && want.Duplicate
	return got == want
}

// publishMany stores count messages, the i-th of which is build(i), from 0.
func publishMany(t testing.TB, nc *nats.Conn, count int, build func(i int) *nats.Msg) {
	t.Helper()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(256))
	if err != nil {
		t.Fatalf("jetstream: %v", err)
	}
	futures := make([]jetstream.PubAckFuture, count)
	for i := range futures {
		if futures[i], err = js.PublishMsgAsync(build(i), jetstream.WithStallWait(testLimit)); err != nil {
			t.Fatalf("publish message %d: %v", i, err)
		}
	}
	for i, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			t.Fatalf("publish message %d: %v", i, err)
		case <-time.After(testLimit):
			t.Fatalf("publish message %d: no answer", i)
		}
	}
}

// numbered is a message whose body is its number.
func numbered(subject string) func(i int) *nats.Msg {
	return func(i int) *nats.Msg {
		return &nats.Msg{Subject: subject, Data: strconv.AppendInt(nil, int64(i), 10)}
	}
}

// tally counts by key, for many goroutines.
type tally struct {
	mu     sync.Mutex
	counts map[string]int
	total  int
}

// add counts key once more and returns the sum over all keys.
func (c *tally) add(key string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = map[string]int{}
	}
	c.counts[key]++
	c.total++
	return c.total
}

func (c *tally) get(key string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[key]
}

// keys is how many different keys were counted.
func (c *tally) keys() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.counts)
}

// sum is how often anything was counted.
func (c *tally) sum() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total
}

// wantOnce fails the test unless count keys were counted, each of them once.
func (c *tally) wantOnce(t testing.TB, count int) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var repeated []string
	for key, n := range c.counts {
		if n != 1 {
			repeated = append(repeated, fmt.Sprintf("%s: %d times", key, n))
		}
	}
	if len(c.counts) != count || len(repeated) != 0 {
		t.Errorf("got %d different and %d repeated, such as %q, want %d and none",
			len(c.counts), len(repeated), repeated[:min(len(repeated), 5)], count)
	}
}

// gauge follows how many are inside at once.
type gauge struct {
	mu        sync.Mutex
	now, peak int
}

// enter counts the caller in until it calls the result.
func (g *gauge) enter() (leave func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now++
	g.peak = max(g.peak, g.now)
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.now--
	}
}

func (g *gauge) highest() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.peak
}

// busyFor is a handler busy for d, or until its context ends.
func busyFor(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// answered asks again while nobody answers: a server that goes down, or leads no
// more, takes the questions with it that it has.
func answered[T any](t testing.TB, ask func(ctx context.Context) (T, error)) (T, error) {
	t.Helper()
	for ctx := testContext(t); ; {
		limited, cancel := context.WithTimeout(ctx, 20*time.Second)
		answer, err := ask(limited)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return answer, err
		}
	}
}

// streamNow is the server's view of a stream.
func streamNow(t testing.TB, nc *nats.Conn, name string) jetstream.Stream {
	t.Helper()
	s, err := answered(t, func(ctx context.Context) (jetstream.Stream, error) { return jetStream(t, nc).Stream(ctx, name) })
	if err != nil {
		t.Fatalf("stream %s: %v", name, err)
	}
	return s
}

// letters reads every message of a stream, in order.
func letters(t testing.TB, nc *nats.Conn, stream string) []*jetstream.RawStreamMsg {
	t.Helper()
	ctx, s := testContext(t), streamNow(t, nc, stream)
	state := s.CachedInfo().State
	var found []*jetstream.RawStreamMsg
	for seq := max(state.FirstSeq, 1); seq <= state.LastSeq; seq++ {
		m, err := s.GetMsg(ctx, seq)
		if err != nil {
			continue // deleted, or expired meanwhile
		}
		found = append(found, m)
	}
	return found
}

// stored is how many messages a stream holds, 0 when there is none.
func stored(t testing.TB, nc *nats.Conn, stream string) int {
	t.Helper()
	// A question that a server took with it when it went down has no answer.
	ctx, cancel := context.WithTimeout(testContext(t), 5*time.Second)
	defer cancel()
	s, err := jetStream(t, nc).Stream(ctx, stream)
	if err != nil {
		return 0
	}
	return int(s.CachedInfo().State.Msgs)
}

// consumerInfo is the server's view of a durable.
func consumerInfo(t testing.TB, nc *nats.Conn, stream, durable string) *jetstream.ConsumerInfo {
	t.Helper()
	c, err := answered(t, func(ctx context.Context) (jetstream.Consumer, error) {
		return jetStream(t, nc).Consumer(ctx, stream, durable)
	})
	if err != nil {
		t.Fatalf("consumer %s/%s: %v", stream, durable, err)
	}
	return c.CachedInfo()
}

// deleteConsumers deletes every consumer that the stream has.
func deleteConsumers(t testing.TB, s jetstream.Stream) {
	t.Helper()
	for name := range s.ConsumerNames(testContext(t)).Name() {
		if err := s.DeleteConsumer(testContext(t), name); err != nil {
			t.Error(err)
		}
	}
}

// settled tells whether the durable has seen all of its messages and none is
// left unacknowledged.
func settled(t testing.TB, nc *nats.Conn, stream, durable string) bool {
	t.Helper()
	info := consumerInfo(t, nc, stream, durable)
	return info.NumPending == 0 && info.NumAckPending == 0
}
func TestPhoenixKeepsItsStore(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "KEPT", Subjects: []string{"kept.*"}})
	publishMany(t, nc, 3, numbered("kept.x"))
	p.stop()
	eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
	p.start(t)
	eventually(t, "the client is back", nc.IsConnected)
	if got := len(letters(t, nc, "KEPT")); got != 3 {
		t.Errorf("got %d messages, want the 3 stored before", got)
	}
}

func TestClusterFindsANewLeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "R3", Subjects: []string{"r3.*"}, Replicas: 3})
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "R3", jetstream.ConsumerConfig{Durable: "d"}); err != nil {
		t.Fatal(err)
	}
	publish(t, nc, &nats.Msg{Subject: "r3.x"})
	old := c.leader(t, "R3", "d")
	old.stop()
	if c.leader(t, "R3", "") == old || c.leader(t, "R3", "d") == old {
		t.Error("the stopped server still leads")
	}
	publish(t, nc, &nats.Msg{Subject: "r3.x"})
}

func TestLogBookKeepsAlarms(t *testing.T) {
	t.Parallel()
	book, log := newLogBook()
	log.With("route", "a.*").Warn("lost", "error", "x")
	log.Info("lost again")
	log.LogAttrs(t.Context(), slog.LevelError, "worse")
	if got := book.alarms("lost"); len(got) != 1 || got[0] != "lost route=a.* error=x" {
		t.Errorf("got %q", got)
	}
	if got := book.alarms(""); len(got) != 2 {
		t.Errorf("got %q", got)
	}
}
