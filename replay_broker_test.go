package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// The consumer of a replay is one that the server forgets, also when the process
// is killed.
func TestReplayConsumerIsEphemeral(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 10, 2)
	var configs []jetstream.ConsumerConfig
	_, err := NewBroker(nc).Replay(testContext(t), Replay("history.1").Handle(func(ctx context.Context, m *Msg) error {
		if m.Durable() != "" || m.Attempt() != 1 || m.Stream() != "HISTORY" || m.Time().IsZero() || MsgFrom(ctx) != m {
			t.Errorf("got durable %q, attempt %d, stream %q, time %v", m.Durable(), m.Attempt(), m.Stream(), m.Time())
		}
		if m.Sequence() != 2 {
			return nil
		}
		s, err := jetStream(t, nc).Stream(ctx, "HISTORY")
		if err != nil {
			return err
		}
		for info := range s.ListConsumers(ctx).Info() {
			configs = append(configs, info.Config)
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	if len(configs) != 1 {
		t.Fatalf("got %d consumers, want 1", len(configs))
	}
	if c := configs[0]; c.Durable != "" || c.InactiveThreshold != replayInactive || c.AckPolicy != jetstream.AckNonePolicy ||
		!c.MemoryStorage || c.Replicas != 1 || c.FilterSubject != "history.1" || !strings.HasPrefix(c.Name, replayConsumer) {
		t.Errorf("got %+v", c)
	}
	noConsumers(t, nc, "HISTORY")
}

func TestReplayKeepsOrderByKey(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	const count, keys = 4000, 9
	historyStream(t, nc)
	publishMany(t, nc, count, func(i int) *nats.Msg {
		return &nats.Msg{Subject: fmt.Sprintf("history.a.%d", i%keys), Header: nats.Header{"Key": {fmt.Sprint("k", i%keys)}}}
	})
	for name, key := range map[string]OrderKey{
		"subject": SubjectKey(), "token": SubjectToken(2), "header": HeaderKey("Key"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			last := map[string]uint64{}
			running := map[string]bool{}
			most := 0
			var runs tally
			report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").OrderedBy(key).Handle(func(_ context.Context, m *Msg) error {
				k := m.Token(2)
				mu.Lock()
				if running[k] || last[k] > m.Sequence() {
					t.Errorf("key %s: message %d while another runs: %t, after %d", k, m.Sequence(), running[k], last[k])
				}
				running[k] = true
				most = max(most, len(running))
				mu.Unlock()
				runs.add(strconv.FormatUint(m.Sequence(), 10))
				for range rand.IntN(5) {
					runtime.Gosched()
				}
				m.Subject, m.Header = "", nil
				mu.Lock()
				delete(running, k)
				last[k] = m.Sequence()
				mu.Unlock()
				return nil
			}))
			if err != nil || report.Handled != count {
				t.Fatalf("got %+v, %v", report, err)
			}
			runs.wantOnce(t, count)
			if most < 2 {
				t.Error("keys did not run beside each other")
			}
		})
	}
}

// Without an order key the handlers run beside each other, as many as asked for.
func TestReplayConcurrency(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 200, 1)
	var running, most atomic.Int64
	met := make(chan struct{})
	var once sync.Once
	report, err := NewBroker(nc, WithWorkers(8)).Replay(testContext(t), Replay("history.>").Concurrency(3).Handle(func(ctx context.Context, m *Msg) error {
		n := running.Add(1)
		defer running.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		if n == 3 {
			once.Do(func() { close(met) })
		}
		if m.Sequence() <= 3 {
			<-met
		}
		return nil
	}))
	if err != nil || report.Handled != 200 {
		t.Fatalf("got %+v, %v", report, err)
	}
	if most.Load() != 3 {
		t.Errorf("%d ran at once, want 3", most.Load())
	}
}

// A slow handler does not hold up the others for ever, nor does what gets ahead
// of it grow without bound.
func TestReplayGoesOnBesideASlowHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	const count = 3 * replayWindow
	chronicle(t, nc, count, 3)
	var others atomic.Int64
	all := make(chan struct{})
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Concurrency(4).Handle(func(_ context.Context, m *Msg) error {
		if m.Sequence() == 1 {
			<-all
		} else if others.Add(1) == count-1 {
			close(all)
		}
		return nil
	}))
	if err != nil || report.Handled != count {
		t.Fatalf("got %+v, %v", report, err)
	}
}

func TestReplaySpeedOnAServer(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	historyStream(t, nc)
	for _, gap := range []time.Duration{0, 60, 200, 20, 400, 120} {
		<-time.After(gap * time.Millisecond) // what is replayed later
		publish(t, nc, &nats.Msg{Subject: "history.x"})
	}
	for _, speed := range []float64{1, 10} {
		t.Run(fmt.Sprint(speed), func(t *testing.T) {
			t.Parallel()
			// The machine may be busy with something else, so each message must be
			// punctual in one of several tries.
			best := slices.Repeat([]time.Duration{time.Hour}, 6)
			for tries := 0; tries < 20 && slices.Max(best) > 10*time.Millisecond; tries++ {
				var began, first time.Time
				report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Speed(speed).Handle(func(_ context.Context, m *Msg) error {
					if began.IsZero() {
						began, first = time.Now(), m.Time()
					}
					off := time.Since(began) - time.Duration(float64(m.Time().Sub(first))/speed)
					i := m.Sequence() - 1
					best[i] = min(best[i], off.Abs())
					return nil
				}))
				if err != nil || report.Handled != 6 {
					t.Fatalf("got %+v, %v", report, err)
				}
			}
			if slices.Max(best) > 10*time.Millisecond {
				t.Errorf("speed %g: off by %v at best, want at most 10ms", speed, best)
			}
		})
	}
}

// A replay on a pool that a flood of messages keeps busy gets on, and so does a
// route while a replay has much to do.
func TestReplayBesideRoutes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}})
	chronicle(t, nc, 3000, 3)
	publishMany(t, nc, 3000, numbered("orders.flood"))
	var handled, live tally
	b := NewBroker(nc, WithWorkers(4))
	replayed, flooded := make(chan struct{}), make(chan struct{})
	work := func() { // some CPU time
		for i := range 2000 {
			runtime.KeepAlive(i)
		}
	}
	r := runBroker(t, b,
		Route("orders.*").Durable("flood").Handle(func(_ context.Context, m *Msg) error {
			work()
			if handled.add(strconv.FormatUint(m.Sequence(), 10)) == 3000 {
				close(flooded)
			}
			return nil
		}),
		Route("live").Handle(func(_ context.Context, m *Msg) error { live.add(string(m.Data)); return nil }))
	var seen handledSeqs
	go func() {
		defer close(replayed)
		report, err := b.Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
			work()
			if m.Sequence()%100 == 0 {
				if err := nc.Publish("live", []byte(fmt.Sprint(m.Sequence()))); err != nil {
					t.Error(err)
				}
			}
			return seen.handle(ctx, m)
		}))
		if err != nil || report.Handled != 3000 {
			t.Errorf("got %+v, %v", report, err)
		}
	}()
	receive(t, replayed, "the replay")
	receive(t, flooded, "the route")
	eventually(t, "the core route has its messages", func() bool { return live.sum() == 30 })
	seen.inOrderOnce(t, 3000)
	handled.wantOnce(t, 3000)
	if err := b.Health(); err != nil {
		t.Error(err)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	// And after the Run, on a pool of its own.
	report, err := b.Replay(testContext(t), Replay("history.>").Limit(10).Handle(seen.handle))
	if err != nil || report.Handled != 10 {
		t.Errorf("got %+v, %v", report, err)
	}
	noConsumers(t, nc, "HISTORY")
}

// Neither a replay with all the workers nor a busy route takes all turns.
func TestReplaySharesTheWorkers(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}})
	chronicle(t, nc, 100, 1)
	publishMany(t, nc, 100, numbered("orders.x"))
	const workers = 4
	b := NewBroker(nc, WithWorkers(workers))
	// Every handler waits until both kinds have run together.
	together := make(chan struct{})
	var once sync.Once
	var mu sync.Mutex
	running := map[string]int{}
	meet := func(kind string) error {
		mu.Lock()
		running[kind]++
		if running["route"] > 0 && running["replay"] > 0 {
			once.Do(func() { close(together) })
		}
		mu.Unlock()
		defer func() {
			mu.Lock()
			running[kind]--
			mu.Unlock()
		}()
		select {
		case <-together:
			return nil
		case <-time.After(time.Second):
			return nil // a worker for somebody else
		}
	}
	ctx, cancel := context.WithCancel(testContext(t))
	runBroker(t, b, Route("orders.*").Durable("d").Handle(func(context.Context, *Msg) error { return meet("route") }))
	done := make(chan error, 1)
	go func() {
		_, err := b.Replay(ctx, Replay("history.>").Concurrency(workers).Handle(func(context.Context, *Msg) error { return meet("replay") }))
		done <- err
	}()
	receive(t, together, "both to run")
	if err := receive(t, done, "the replay"); err != nil {
		t.Error(err)
	}
	cancel()
}

func TestRunEndsItsReplays(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 1000, 1)
	b := NewBroker(nc)
	r := runBroker(t, b, Route("live").Handle(func(context.Context, *Msg) error { return nil }))
	type result struct {
		report ReplayReport
		err    error
	}
	begun, goOn, done := make(chan struct{}), make(chan struct{}), make(chan result, 1)
	var alive error
	go func() {
		report, err := b.Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
			if m.Sequence() == 5 {
				close(begun)
				<-goOn
				alive = ctx.Err()
			}
			return nil
		}))
		done <- result{report, err}
	}()
	receive(t, begun, "the replay")
	r.cancel()
	eventually(t, "the drain has begun", func() bool { return b.Health() != nil })
	select {
	case <-r.done:
		t.Error("Run returned while a replay's handler was running")
	default:
	}
	close(goOn)
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	got := receive(t, done, "the replay's end")
	if !errors.Is(got.err, ErrBrokerStopped) || got.report.Handled != 5 || got.report.Next != 6 {
		t.Errorf("got %+v, %v", got.report, got.err)
	}
	if alive != nil {
		t.Errorf("the handler's context ended: %v", alive)
	}
	noConsumers(t, nc, "HISTORY")
}

// A handler that does not return is cancelled at the drain timeout and then left.
func TestReplayGivesUpOnAHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 10, 1)
	for name, stubborn := range map[string]bool{"obedient": false, "stubborn": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(testContext(t))
			end := make(chan struct{})
			t.Cleanup(func() { close(end) })
			report, err := NewBroker(nc, WithDrainTimeout(50*time.Millisecond)).Replay(ctx, Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
				if m.Sequence() < 3 {
					return nil
				}
				cancel()
				if stubborn {
					<-end
				}
				<-ctx.Done()
				return context.Cause(ctx)
			}))
			drain, ok := errors.AsType[*DrainError](err)
			if !ok || !errors.Is(err, context.Canceled) || drain.Abandoned != 1 || (drain.Running == 1) != stubborn {
				t.Errorf("got %v", err)
			}
			if report.Handled != 2 || report.Next != 3 {
				t.Errorf("got %+v", report)
			}
			if named := strings.Contains(err.Error(), `handler of replay "history.>"`); named != stubborn {
				t.Errorf("got %v, want the handler that hangs and no other", err)
			}
			if !stubborn && !errors.Is(err, ErrDrainTimeout) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// At the drain timeout nothing is started any more, and Next is what was cut off,
// also of a replay that goes on after errors.
func TestReplayGoesOnWhereItWasCutOff(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	historyStream(t, nc)
	for i := range 6 {
		publish(t, nc, &nats.Msg{Subject: "history." + []string{"slow", "fast"}[i/5]})
	}
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var seen handledSeqs
	b := NewBroker(nc, WithWorkers(4), WithDrainTimeout(50*time.Millisecond))
	report, err := b.Replay(ctx, Replay("history.>").OrderedBy(SubjectKey()).ContinueOnError().Handle(func(ctx context.Context, m *Msg) error {
		seen.handle(ctx, m)
		if m.Subject == "history.fast" {
			cancel()
			return nil
		}
		<-ctx.Done()
		return context.Cause(ctx)
	}))
	if _, ok := errors.AsType[*DrainError](err); !ok {
		t.Errorf("got %v, want a DrainError", err)
	}
	got := seen.seen()
	slices.Sort(got)
	if diff := cmp.Diff([]uint64{1, 6}, got); diff != "" {
		t.Errorf("started (-want +got):\n%s", diff)
	}
	if report.Next != 1 || report.Handled != 1 || report.Failed != 1 {
		t.Errorf("got %+v, want it to go on with 1", report)
	}
}

// A handler may wait for a replay: that does not wait for the handler's worker.
func TestReplayInsideAHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 10, 1)
	b := NewBroker(nc, WithWorkers(1))
	type result struct {
		report ReplayReport
		err    error
	}
	done := make(chan result, 1)
	runBroker(t, b, Route("rebuild").Handle(func(ctx context.Context, _ *Msg) error {
		ctx, cancel := context.WithTimeout(ctx, testLimit/2)
		defer cancel()
		report, err := b.Replay(ctx, Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
			if inner := MsgFrom(ctx); inner != m {
				return fmt.Errorf("the context is of %q", inner.Subject)
			}
			return nil
		}))
		done <- result{report, err}
		return err
	}))
	if err := nc.Publish("rebuild", nil); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, done, "the replay's end"); got.err != nil || got.report.Handled != 10 {
		t.Errorf("got %+v, %v", got.report, got.err)
	}
}

func TestReplayTimeout(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 3, 1)
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Timeout(20*time.Millisecond).Handle(func(ctx context.Context, m *Msg) error {
		<-ctx.Done()
		return nil
	}))
	if !errors.Is(err, context.DeadlineExceeded) || report.Next != 1 || report.Failed != 1 {
		t.Errorf("got %+v, %v", report, err)
	}
}

// While a handler takes its time the server sends no more than a window.
func TestReplayHoldsBack(t *testing.T) {
	t.Parallel()
	const count, most = 10_000, 3_000
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, count, 1)
	before := nc.Stats().InMsgs
	_, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(_ context.Context, m *Msg) error {
		if m.Sequence() > 1 {
			return nil
		}
		eventually(t, "more is here", func() bool { return nc.Stats().InMsgs-before >= 1000 })
		came := uint64(0)
		for now := nc.Stats().InMsgs - before; now != came && now <= most; now = nc.Stats().InMsgs - before {
			came = now
			for range 100 {
				if err := nc.Flush(); err != nil {
					return err
				}
			}
		}
		if now := nc.Stats().InMsgs - before; now > most {
			t.Errorf("%d messages came while the first was handled, want %d at most", now, most)
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
}

func TestReplayTellsItsProgress(t *testing.T) {
	t.Parallel()
	const count = 20_000
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, count, 10)
	var last ReplayProgress
	calls := 0
	var inCall atomic.Int32
	began := time.Now()
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(succeed).Progress(func(p ReplayProgress) {
		if inCall.Add(1) != 1 {
			t.Error("the progress function was called twice at once")
		}
		defer inCall.Add(-1)
		if p.Done < last.Done || p.Done > p.Total || p.Total != count {
			t.Errorf("got %+v after %+v", p, last)
		}
		if p.Done < p.Total && p.Done > 0 && p.Remaining <= 0 {
			t.Errorf("no estimate: %+v", p)
		}
		last = p
		calls++
	}))
	if err != nil || report.Handled != count {
		t.Fatalf("got %+v, %v", report, err)
	}
	if limit := int(time.Since(began)/(100*time.Millisecond)) + 2; last.Done != count || calls > limit {
		t.Errorf("told %d times up to %+v, want at most %d times up to the end", calls, last, limit)
	}
}

func TestReplayNeedsPermissions(t *testing.T) {
	t.Parallel()
	allowed := []string{
		"$JS.API.STREAM.INFO.HISTORY", "$JS.API.CONSUMER.CREATE.HISTORY.*.history.>", "$JS.API.CONSUMER.MSG.NEXT.HISTORY.*",
		"$JS.API.CONSUMER.DELETE.HISTORY.*", "$JS.API.STREAM.MSG.GET.HISTORY",
	}
	for i := range len(allowed) + 1 {
		allow, lacking := allowed, ""
		if i < len(allowed) {
			lacking = allowed[i]
			allow = slices.Concat(allowed[:i], allowed[i+1:])
		}
		t.Run("without "+lacking, func(t *testing.T) {
			t.Parallel()
			admin, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: allow}})
			chronicle(t, admin, 10, 1)
			s := streamNow(t, admin, "HISTORY")
			if err := s.DeleteMsg(testContext(t), 10); err != nil { // so that the end is to be verified
				t.Fatal(err)
			}
			_, log := newLogBook()
			report, err := NewBroker(user, WithLogger(log)).Replay(testContext(t),
				Replay("history.>").Stream("HISTORY").Handle(func(context.Context, *Msg) error { return nil }))
			switch {
			case lacking == "" || strings.Contains(lacking, "DELETE"): // what cannot be deleted expires
				if err != nil || report.Handled != 9 {
					t.Errorf("got %+v, %v", report, err)
				}
			default:
				verb := strings.TrimSuffix(strings.TrimPrefix(lacking, "$JS.API."), "HISTORY")
				verb = strings.TrimSuffix(strings.Split(verb, "HISTORY")[0], ".")
				if _, ok := errors.AsType[*ReplayError](err); !ok || !errors.Is(err, ErrPermission) || !strings.Contains(err.Error(), verb) {
					t.Errorf("got %v, want ErrPermission that names %s", err, verb)
				}
			}
		})
	}
}

// The broker's middleware is around the handler of a replay too, and its observer
// is told of each message once.
func TestMiddlewareAndObserverSeeReplays(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 5, 1)
	for name, serving := range map[string]bool{"alone": false, "beside Run": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var trail []string // one handler at a time runs
			note := func(who string, m *Msg) { trail = append(trail, fmt.Sprintf("%s %s", who, m.Data)) }
			around := func(who string) Middleware {
				return func(next Handler) Handler {
					return func(ctx context.Context, m *Msg) error {
						note(who, m)
						defer note("end of "+who, m)
						return next(ctx, m)
					}
				}
			}
			// What the innermost makes of an error counts.
			forgiving := func(next Handler) Handler {
				return func(ctx context.Context, m *Msg) error {
					if err := next(ctx, m); err == nil || err.Error() != "forgiven" {
						return err
					}
					return nil
				}
			}
			o := &observed{}
			b := NewBroker(nc, WithWorkers(4), WithMiddleware(around("outer"), around("inner"), forgiving), WithObserver(o))
			if serving {
				runBroker(t, b, Route("core").Handle(succeed))
			}
			report, err := b.Replay(testContext(t), Replay("history.>").ContinueOnError().Handle(func(_ context.Context, m *Msg) error {
				switch string(m.Data) {
				case "1":
					return errors.New("boom")
				case "2":
					return Discard(errors.New("no"))
				case "3":
					panic("ouch")
				case "4":
					return errors.New("forgiven")
				}
				return nil
			}))
			if err != nil || report.Handled != 3 || report.Failed != 2 {
				t.Fatalf("got %+v, %v", report, err)
			}
			var wantTrail []string
			for i := range 5 {
				for _, who := range []string{"outer", "inner", "end of inner", "end of outer"} {
					wantTrail = append(wantTrail, fmt.Sprintf("%s %d", who, i))
				}
			}
			if diff := cmp.Diff(wantTrail, trail); diff != "" {
				t.Errorf("middleware (-want +got):\n%s", diff)
			}
			got := o.lines(func(e Event) string {
				return fmt.Sprintf("%s%s %d %s %v", e.Route, e.Durable, e.Msg.Sequence(), e.Outcome, e.Err)
			})
			want := []string{
				"history.> 1 succeeded <nil>",
				"history.> 2 failed boom",
				"history.> 3 discarded no",
				"history.> 4 failed natsx: handler panicked: ouch",
				"history.> 5 succeeded <nil>",
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
		})
	}
}
