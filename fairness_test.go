package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Routes with work take turns, so that the quiet one waits for a turn and not
// for the end of the flood. Turns are counted, not seconds.
func TestFloodedRouteDoesNotStarveAQuietOne(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name         string
		flood, quiet RouteBuilder
	}{
		{"durable and durable", Route("flood.*").Durable("flood"), Route("quiet.*").Durable("quiet")},
		{"core and durable", Route("flood.*"), Route("quiet.*").Durable("quiet")},
		{"durable and core", Route("flood.*").Durable("flood"), Route("quiet.*")},
		{"core and core", Route("flood.*"), Route("quiet.*").Queue("q")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const workers, floods, quiets = 2, 12_000, 10
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "FLOOD", Subjects: []string{"flood.*"}, Storage: jetstream.MemoryStorage})
			createStream(t, nc, jetstream.StreamConfig{Name: "QUIET", Subjects: []string{"quiet.*"}})
			var turns atomic.Int64
			handled := make(chan int64, quiets)
			stop := make(chan struct{})
			r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(workers)),
				c.flood.Handle(func(ctx context.Context, _ *Msg) error {
					turns.Add(1)
					select {
					case <-stop: // what is left ends fast
						return nil
					default:
						return busyFor(ctx, 3*time.Millisecond)
					}
				}),
				c.quiet.Handle(func(context.Context, *Msg) error {
					handled <- turns.Load()
					return nil
				}))
			publishMany(t, nc, floods, numbered("flood.x"))
			eventually(t, "the flood is on", func() bool { return turns.Load() > 2*workers })
			best := int64(floods)
			for range quiets {
				before := turns.Load()
				publish(t, nc, &nats.Msg{Subject: "quiet.x"})
				best = min(best, receive(t, handled, "the quiet route")-before)
			}
			if turns.Load() == floods {
				t.Fatal("the flood ended too early to tell")
			}
			// A message travels for a few turns; then it has one of the next.
			if best > 100 {
				t.Errorf("a quiet message waited for %d of %d flooding ones at best", best, floods)
			}
			close(stop)
			if err := r.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
}

func TestGoroutinesDoNotGrowWithMessages(t *testing.T) {
	t.Parallel()
	const workers, messages = 8, 2000
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "MANY", Subjects: []string{"many.*"}})
	var started atomic.Int64
	release := make(chan struct{})
	conn := connect(t, s.ClientURL())
	// The first request on a connection starts a goroutine that stays with it.
	if _, err := jetStream(t, conn).AccountInfo(testContext(t)); err != nil {
		t.Fatal(err)
	}
	b := NewBroker(conn, WithWorkers(workers))
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// Goroutines inherit the labels of the one that starts them: those of this
	// broker are told from those of the tests beside it.
	label := "goroutines of " + t.Name()
	go pprof.Do(ctx, pprof.Labels("test", label), func(ctx context.Context) {
		done <- b.Run(ctx,
			Route("core.*").Handle(func(context.Context, *Msg) error {
				started.Add(1)
				<-release
				return nil
			}),
			Route("many.*").Durable("d").Backoff(time.Hour, time.Hour).Handle(func(context.Context, *Msg) error {
				started.Add(1)
				return errors.New("not now")
			}))
	})
	receive(t, b.Ready(), "the broker")
	idle := labelled(t, label)
	if idle == 0 {
		t.Fatal("no goroutine has the label: the test cannot tell")
	}

	publishMany(t, nc, messages, numbered("many.x"))
	eventually(t, "all wait for their retry", func() bool { return b.Stats().Routes[1].Retried == messages })
	waiting := labelled(t, label)
	for i := range messages {
		if err := conn.Publish("core.x", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	// One worker is kept for the other route.
	eventually(t, "the pool is full", func() bool { return started.Load() == messages+workers-1 })
	full := labelled(t, label)
	if limit := idle + 2*workers; waiting > limit || full > limit {
		t.Errorf("%d goroutines idle, %d with %d retries waiting, %d with %d messages waiting",
			idle, waiting, messages, full, messages)
	}
	close(release)
	cancel()
	if err := receive(t, done, "Run"); err != nil {
		t.Errorf("Run: %v", err)
	}
	eventually(t, "no goroutine is left", func() bool { return labelled(t, label) == 0 })
	t.Logf("goroutines: %d idle, %d with retries waiting, %d with messages waiting", idle, waiting, full)
}

// labelled counts the goroutines with a label.
func labelled(t testing.TB, label string) int {
	t.Helper()
	var dump bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&dump, 1); err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, group := range strings.Split(dump.String(), "\n\n") {
		if !strings.Contains(group, strconv.Quote(label)) {
			continue
		}
		n, _, _ := strings.Cut(group, " @ ")
		fields := strings.Fields(n)
		size, err := strconv.Atoi(fields[len(fields)-1])
		if err != nil {
			t.Fatalf("goroutine profile: %v in %q", err, group)
		}
		count += size
	}
	return count
}

// TestAllRoutesAtOnce has every kind of route under load for 5 s, for the race
// detector and for the books, which must balance afterwards.
func TestAllRoutesAtOnce(t *testing.T) {
	t.Parallel()
	load := 5 * time.Second
	if *soak {
		load = 5 * time.Minute
	}
	undisturbed(t, time.Second, func(fault func(format string, args ...any)) { allRoutesAtOnce(t, load, fault) })
}

func allRoutesAtOnce(t *testing.T, load time.Duration, fault func(format string, args ...any)) {
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	for _, name := range []string{"a", "b", "c", "e"} {
		createStream(t, nc, jetstream.StreamConfig{Name: strings.ToUpper(name), Subjects: []string{name + ".*"}})
	}
	createStream(t, nc, jetstream.StreamConfig{Name: "W", Subjects: []string{"w.*"}, Retention: jetstream.WorkQueuePolicy, Storage: jetstream.MemoryStorage})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}, Storage: jetstream.MemoryStorage})

	steady := func(context.Context, *Msg) error { return nil }
	moody := func(ctx context.Context, m *Msg) error {
		if got := MsgFrom(ctx); got != m {
			t.Errorf("MsgFrom gives %p, want %p", got, m)
		}
		switch rand.N(20) {
		case 0:
			return errors.New("on purpose")
		case 1:
			panic("on purpose")
		case 2:
			return Permanent(errors.New("on purpose"))
		case 3:
			return Discard(errors.New("on purpose"))
		case 4:
			return RetryAfter(time.Millisecond, nil)
		case 5:
			return busyFor(ctx, 30*time.Millisecond)
		}
		return nil
	}
	quick := func(r RouteBuilder) RouteBuilder { return r.Backoff(time.Millisecond, 50*time.Millisecond) }
	specs := []Spec{
		Route("core.*").Handle(moody),
		Route("jobs.*").Queue("g").Handle(moody),
		Route("ask.*").Reply(func(ctx context.Context, m *Msg) ([]byte, error) { return m.Data, moody(ctx, m) }),
		Route("a.*").Durable("plain").Handle(steady),
		quick(Route("b.*").Durable("retried")).Retry(2).Handle(moody),
		quick(Route("c.*").Durable("confirmed")).Retry(2).DLQ("dlq.c").ConfirmAcks().Handle(moody),
		quick(Route("e.*").Durable("timed")).Timeout(10 * time.Millisecond).Concurrency(3).DLQ("dlq.e").Retry(1).Handle(moody),
		quick(Route("w.*").Durable("worker")).AckWait(time.Second).DLQ("dlq.w").Retry(1).MaxAckPending(50).Handle(moody),
	}
	_, log := newLogBook()
	var observed tally
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(16), WithLogger(log), WithObserver(observerFunc(func(e Event) {
		observed.add(e.Route + " " + string(e.Outcome))
	}))), specs...)

	published := map[string]uint64{}
	end := time.Now().Add(load)
	for i := 0; time.Now().Before(end); i++ {
		for _, name := range []string{"a", "b", "c", "e", "w"} {
			const burst = 20
			publishMany(t, nc, burst, numbered(name+"."+fmt.Sprint(i%5)))
			published[name+".*"] += burst
		}
		for _, name := range []string{"core", "jobs"} {
			if err := nc.Publish(name+".x", fmt.Append(nil, i)); err != nil {
				t.Fatal(err)
			}
			published[name+".*"]++
		}
		answer, err := nc.Request("ask.x", fmt.Append(nil, i), testLimit)
		if err != nil {
			t.Fatalf("request: %v", err)
		}
		published["ask.*"]++
		if failed := answer.Header.Get("Nats-Service-Error-Code") != ""; !failed && string(answer.Data) != fmt.Sprint(i) {
			t.Fatalf("got the answer %q %v to request %d", answer.Data, answer.Header, i)
		}
		if err := r.Health(); err != nil {
			t.Fatalf("Health: %v", err)
		}
		r.Stats()
	}

	ends := func(s RouteStats) uint64 { return s.Succeeded + s.Dead + s.Discarded + s.Failed + s.Dropped }
	eventually(t, "every message has met its end", func() bool {
		for _, route := range r.Stats().Routes {
			// A lapsed one may be settled though nobody confirmed it.
			if ends(route)+route.Lapsed < published[route.Route] || route.Running+route.Waiting+route.Delayed != 0 ||
				route.Durable != "" && !settled(t, nc, route.Stream, route.Durable) {
				return false
			}
		}
		return true
	})
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	var dead uint64
	for _, route := range r.Stats().Routes {
		if ends(route) != published[route.Route] || route.Running+route.Waiting+route.Delayed != 0 || route.Lapsed != 0 {
			fault("%d published, got %+v", published[route.Route], route)
		}
		if route.Durable != "" && route.Received != ends(route)+route.Retried {
			fault("what was received does not add up: %+v", route)
		}
		if route.Durable == "confirmed" || route.Durable == "timed" || route.Durable == "worker" {
			dead += route.Dead
		}
	}
	if got := stored(t, nc, "DLQ"); uint64(got) != dead {
		fault("%d letters, want the %d counted dead", got, dead)
	}
	if got := stored(t, nc, "W"); got != 0 {
		t.Errorf("%d left in the work queue", got)
	}
	if observed.sum() == 0 {
		t.Error("the observer saw nothing")
	}
}
