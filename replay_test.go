package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// historyStream makes the stream of most replays: HISTORY for history.>.
func historyStream(t testing.TB, nc *nats.Conn) {
	t.Helper()
	createStream(t, nc, jetstream.StreamConfig{Name: "HISTORY", Subjects: []string{"history.>"}})
}

// handledSeqs is what a replay's handler saw.
type handledSeqs struct {
	mu   sync.Mutex
	seqs []uint64
}

func (h *handledSeqs) handle(_ context.Context, m *Msg) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seqs = append(h.seqs, m.Sequence())
	return nil
}

func (h *handledSeqs) seen() []uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]uint64(nil), h.seqs...)
}

// sequences is from, from+1, ..., to.
func sequences(from, to uint64) []uint64 {
	var seqs []uint64
	for ; from <= to; from++ {
		seqs = append(seqs, from)
	}
	return seqs
}

// noConsumers fails the test when the stream has a consumer.
func noConsumers(t testing.TB, nc *nats.Conn, stream string) {
	t.Helper()
	if n := consumers(t, nc, stream); n != 0 {
		t.Errorf("%d consumers left on %s, want none", n, stream)
	}
}

func TestReplayValidate(t *testing.T) {
	t.Parallel()
	handler := func(context.Context, *Msg) error { return nil }
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		spec ReplaySpec
		want []error  // sentinels
		text []string // parts of the message
	}{
		"sound": {spec: Replay("a.>").Stream("S").FromTime(noon).UntilTime(noon).UntilSequence(9).Limit(1).Speed(0.5).
			Concurrency(2).OrderedBy(SubjectToken(1)).Timeout(time.Second).ContinueOnError().Handle(handler)},
		"whole stream":     {spec: Replay(">").Handle(handler)},
		"subject":          {spec: Replay("a..b").Handle(handler), want: []error{ErrInvalidSubject}, text: []string{`natsx: replay "a..b": subject "a..b": has an empty token`}},
		"no handler":       {spec: Replay("a").Handle(nil), want: []error{ErrNoHandler}, text: []string{`handler nil`}},
		"stream":           {spec: Replay("a").Stream("").Handle(handler), want: []error{ErrInvalidName}, text: []string{`stream "": must not be empty`}},
		"sequences":        {spec: Replay("a").FromSequence(0).UntilSequence(0).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"fromSequence 0", "untilSequence 0"}},
		"turned sequences": {spec: Replay("a").FromSequence(7).UntilSequence(6).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"untilSequence 6: is before fromSequence 7"}},
		"zero times":       {spec: Replay("a").FromTime(time.Time{}).UntilTime(time.Time{}).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"fromTime: must not", "untilTime: must not"}},
		"turned times":     {spec: Replay("a").FromTime(noon).UntilTime(noon.Add(-1)).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"untilTime 2026-01-02T11:59:59.999999999Z: is before fromTime 2026-01-02T12:00:00Z"}},
		"two starts":       {spec: Replay("a").FromTime(noon).FromSequence(3).Handle(handler), want: []error{ErrOptionConflict}, text: []string{"a replay has one start"}},
		"numbers":          {spec: Replay("a").Limit(0).Speed(-1).Concurrency(0).Timeout(0).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"limit 0", "speed -1", "concurrency 0", "timeout 0s"}},
		"not a speed":      {spec: Replay("a").Speed(math.NaN()).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"speed NaN"}},
		"infinite speed":   {spec: Replay("a").Speed(math.Inf(1)).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"speed +Inf"}},
		"no order":         {spec: Replay("a").OrderedBy(OrderKey{}).Handle(handler), want: []error{ErrOutOfRange}, text: []string{"orderedBy OrderKey{}"}},
		"order by header":  {spec: Replay("a").OrderedBy(HeaderKey("a b")).Handle(handler), want: []error{ErrInvalidName}, text: []string{`orderedBy HeaderKey("a b")`}},
		"all at once":      {spec: Replay("").FromSequence(0).Speed(-1).Handle(nil), want: []error{ErrInvalidSubject, ErrOutOfRange, ErrNoHandler}, text: []string{"subject", "fromSequence", "speed", "handler"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := c.spec.Validate()
			if len(c.want) == 0 {
				if err != nil {
					t.Fatalf("got %v, want no fault", err)
				}
				return
			}
			for _, want := range c.want {
				if !errors.Is(err, want) {
					t.Errorf("got %v, want it to be %v", err, want)
				}
			}
			if _, ok := errors.AsType[*ReplayError](err); !ok {
				t.Errorf("got %T, want a *ReplayError inside", err)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(c.text) {
				t.Errorf("got %d faults, want %d:\n%v", len(lines), len(c.text), err)
			}
			for _, text := range c.text {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("got %q, want it to hold %q", err, text)
				}
			}
		})
	}
}

func TestReplayBounds(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	historyStream(t, nc)
	// Sequences 1 to 20: odd ones on history.odd, even ones on history.even.
	times := map[uint64]time.Time{}
	for i := uint64(1); i <= 20; i++ {
		subject := "history.odd"
		if i%2 == 0 {
			subject = "history.even"
		}
		publish(t, nc, &nats.Msg{Subject: subject})
	}
	stream := streamNow(t, nc, "HISTORY")
	for _, m := range letters(t, nc, "HISTORY") {
		times[m.Sequence] = m.Time
	}
	// Holes at the start, in the middle and at the end.
	for _, seq := range []uint64{1, 2, 9, 10, 11, 19, 20} {
		if err := stream.DeleteMsg(testContext(t), seq); err != nil {
			t.Fatal(err)
		}
	}
	all := []uint64{3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18}
	even := []uint64{4, 6, 8, 12, 14, 16, 18}
	for name, c := range map[string]struct {
		replay ReplayBuilder
		want   []uint64
		next   uint64
	}{
		"all":                    {Replay(">").Stream("HISTORY"), all, 21},
		"all by filter":          {Replay("history.>"), all, 21},
		"one subject":            {Replay("history.even"), even, 21},
		"from a sequence":        {Replay("history.*").FromSequence(13), []uint64{13, 14, 15, 16, 17, 18}, 21},
		"from a deleted one":     {Replay("history.*").FromSequence(10), []uint64{12, 13, 14, 15, 16, 17, 18}, 21},
		"from a time":            {Replay("history.*").FromTime(times[16]), []uint64{16, 17, 18}, 21},
		"until a sequence":       {Replay("history.*").UntilSequence(5), []uint64{3, 4, 5}, 6},
		"until a deleted one":    {Replay("history.*").UntilSequence(10), []uint64{3, 4, 5, 6, 7, 8}, 11},
		"until a time":           {Replay("history.even").UntilTime(times[12]), []uint64{4, 6, 8, 12}, 13},
		"until before a time":    {Replay("history.even").UntilTime(times[12].Add(-1)), []uint64{4, 6, 8}, 12},
		"the earlier of both":    {Replay("history.*").UntilSequence(5).UntilTime(times[4]), []uint64{3, 4}, 5},
		"the earlier of them":    {Replay("history.*").UntilSequence(4).UntilTime(times[8]), []uint64{3, 4}, 5},
		"a part":                 {Replay("history.odd").FromSequence(5).UntilSequence(14), []uint64{5, 7, 13}, 15},
		"a limit":                {Replay("history.even").Limit(3), []uint64{4, 6, 8}, 9},
		"a limit beyond":         {Replay("history.even").Limit(100), even, 21},
		"nothing in the hole":    {Replay("history.*").FromSequence(9).UntilSequence(11), nil, 12},
		"nothing in the tail":    {Replay("history.*").FromSequence(19), nil, 21},
		"nothing behind":         {Replay("history.*").FromSequence(25), nil, 25},
		"nothing of a subject":   {Replay("history.none"), nil, 21},
		"nothing from a future":  {Replay("history.*").FromTime(time.Now().Add(time.Hour)), nil, 21},
		"nothing until long ago": {Replay("history.*").UntilTime(times[1].Add(-time.Hour)), nil, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var seen handledSeqs
			var last ReplayProgress
			report, err := NewBroker(nc).Replay(testContext(t), c.replay.Handle(seen.handle).
				Progress(func(p ReplayProgress) { last = p }))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, seen.seen()); diff != "" {
				t.Errorf("handled (-want +got):\n%s", diff)
			}
			want := ReplayReport{Stream: "HISTORY", Handled: uint64(len(c.want)), Next: c.next}
			if len(c.want) > 0 {
				want.First, want.Last = c.want[0], c.want[len(c.want)-1]
			}
			if report.Started.IsZero() || report.Took <= 0 {
				t.Errorf("got start %v and duration %v, want both", report.Started, report.Took)
			}
			report.Started, report.Took = time.Time{}, 0
			if diff := cmp.Diff(want, report); diff != "" {
				t.Errorf("report (-want +got):\n%s", diff)
			}
			if n := uint64(len(c.want)); last.Done != n || last.Total != n || last.Remaining != 0 {
				t.Errorf("last progress %+v, want %d of %d", last, n, n)
			}
		})
	}
	t.Cleanup(func() { noConsumers(t, nc, "HISTORY") })
}

// chronicle stores count numbered messages on history.<i%keys> and connects.
func chronicle(t testing.TB, nc *nats.Conn, count, keys int) {
	t.Helper()
	historyStream(t, nc)
	publishMany(t, nc, count, func(i int) *nats.Msg {
		return &nats.Msg{Subject: fmt.Sprintf("history.%d", i%keys), Data: strconv.AppendInt(nil, int64(i), 10)}
	})
}

func TestReplayStopsAtAnError(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 100, 1)
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		fail func() error
		want string
	}{
		"an error":     {func() error { return boom }, `natsx: replay "history.>": message 42 of stream "HISTORY" on "history.0": boom`},
		"a panic":      {func() error { panic(boom) }, `natsx: replay "history.>": message 42 of stream "HISTORY" on "history.0": handler panicked: boom`},
		"an early end": {func() error { runtime.Goexit(); return nil }, `natsx: replay "history.>": message 42 of stream "HISTORY" on "history.0": handler panicked: runtime.Goexit`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := NewBroker(nc)
			var seen handledSeqs
			mended := false
			spec := Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
				if m.Sequence() == 42 && !mended {
					return c.fail()
				}
				return seen.handle(ctx, m)
			})
			report, err := b.Replay(testContext(t), spec)
			failure, ok := errors.AsType[*ReplayFailure](err)
			if !ok || failure.Sequence != 42 || failure.Stream != "HISTORY" || failure.Subject != "history.0" || err.Error() != c.want {
				t.Fatalf("got error %v, want %s", err, c.want)
			}
			if name != "an early end" && !errors.Is(err, boom) {
				t.Errorf("got %v, want it to wrap the handler's error", err)
			}
			if report.Handled != 41 || report.Failed != 1 || report.First != 1 || report.Last != 42 || report.Next != 42 || len(report.Failures) != 1 {
				t.Errorf("got %+v", report)
			}
			mended = true
			spec.replay = spec.replay.FromSequence(report.Next)
			if report, err = b.Replay(testContext(t), spec); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(sequences(1, 100), seen.seen()); diff != "" {
				t.Errorf("both replays (-want +got):\n%s", diff)
			}
			if report.Next != 101 {
				t.Errorf("got %+v, want the second to be complete", report)
			}
		})
	}
	t.Cleanup(func() { noConsumers(t, nc, "HISTORY") })
}

func TestReplayContinuesOnError(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	const count = 3*MaxReplayFailures + 10
	chronicle(t, nc, count, 1)
	odd := errors.New("odd")
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Concurrency(8).ContinueOnError().
		Handle(func(_ context.Context, m *Msg) error {
			switch {
			case m.Sequence()%2 == 1:
				return fmt.Errorf("%d is %w", m.Sequence(), odd)
			case m.Sequence() == 4:
				return Discard(odd)
			}
			return nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	if report.Handled != count/2 || report.Failed != count/2 || report.First != 1 || report.Last != count || report.Next != count+1 {
		t.Errorf("got %d handled, %d failed, %d to %d, next %d", report.Handled, report.Failed, report.First, report.Last, report.Next)
	}
	if n := len(report.Failures); n != MaxReplayFailures {
		t.Fatalf("got %d failures, want the first %d", n, MaxReplayFailures)
	}
	for _, f := range report.Failures {
		if f.Sequence%2 != 1 || !errors.Is(f, odd) || !strings.HasPrefix(f.Err.Error(), strconv.FormatUint(f.Sequence, 10)) {
			t.Fatalf("got failure %+v", f)
		}
	}
}

// Resumed from the report each time, interrupted replays handle every message once.
func TestReplayInterruptedGoesOn(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	const count = 5000
	chronicle(t, nc, count, 7)
	for name, replay := range map[string]ReplayBuilder{
		"in order":        Replay("history.>"),
		"with 8 handlers": Replay("history.>").Concurrency(8),
		"by key":          Replay("history.>").OrderedBy(SubjectKey()),
		"by speed":        Replay("history.>").Speed(1000),
		"one subject":     Replay("history.3"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := NewBroker(nc, WithWorkers(16))
			var runs tally
			next, rounds := uint64(1), 0
			for ; ; rounds++ {
				ctx, cancel := context.WithCancel(testContext(t))
				upTo := runs.sum() + 1 + rounds*100
				report, err := b.Replay(ctx, replay.FromSequence(next).Handle(func(ctx context.Context, m *Msg) error {
					if runs.add(strconv.FormatUint(m.Sequence(), 10)) >= upTo {
						cancel()
					}
					runtime.Gosched()
					return ctx.Err() // a handler that began is not interrupted
				}))
				cancel()
				if report.Next < next {
					t.Fatalf("next went from %d to %d", next, report.Next)
				}
				next = report.Next
				if err == nil {
					break
				}
				if !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
				if name == "in order" && runs.sum() != upTo {
					t.Errorf("%d handled, want no more to begin after the %d that came before the end of the context", runs.sum(), upTo)
				}
			}
			want := count
			if name == "one subject" {
				want = (count + 3) / 7
			}
			runs.wantOnce(t, want)
			if rounds < 3 {
				t.Errorf("interrupted %d times only", rounds)
			}
		})
	}
	t.Cleanup(func() { noConsumers(t, nc, "HISTORY") })
}

// A replica that lags behind knows neither where a time is nor where the end is.
func TestReplayOnALaggingReplica(t *testing.T) {
	t.Parallel()
	url := startServer(t).ClientURL()
	nc := connect(t, url)
	pulls := startLagging(t, connect(t, url))
	js, err := jetstream.NewWithAPIPrefix(nc, laggingPrefix)
	if err != nil {
		t.Fatal(err)
	}
	historyStream(t, nc)
	var at [21]time.Time // by sequence
	for i := range 20 {
		publish(t, nc, numbered("history.x")(i))
	}
	for _, m := range letters(t, nc, "HISTORY") {
		at[m.Sequence] = m.Time
	}
	for name, c := range map[string]struct {
		replay     ReplayBuilder
		from, last uint64
	}{
		"all":        {Replay("history.x"), 1, 20},
		"from time":  {Replay("history.x").FromTime(at[13]), 13, 20},
		"until time": {Replay("history.x").UntilTime(at[17]), 1, 17},
		"both":       {Replay("history.x").FromTime(at[8]).UntilTime(at[12].Add(-1)), 8, 11},
		"nothing":    {Replay("history.x").FromTime(at[20].Add(1)), 1, 0},
	} {
		var seen handledSeqs
		report, err := NewBroker(nc, WithJetStream(js)).Replay(testContext(t), c.replay.Handle(seen.handle))
		if err != nil || c.last > 0 && report.Next != c.last+1 {
			t.Errorf("%s: got %+v, %v", name, report, err)
		}
		if diff := cmp.Diff(sequences(c.from, c.last), seen.seen()); diff != "" {
			t.Errorf("%s: handled (-want +got):\n%s", name, diff)
		}
	}
	if pulls.sum() < 2 {
		t.Errorf("got %d pulls", pulls.sum())
	}
	noConsumers(t, nc, "HISTORY")
}

// A schedule is not a message that was published. On a stream without schedules
// its header means nothing.
func TestReplayPassesSchedulesOver(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "HISTORY", Subjects: []string{"history.>"}, AllowMsgSchedules: true})
	schedule := func() {
		publish(t, nc, &nats.Msg{Subject: fmt.Sprint("history.later.", stored(t, nc, "HISTORY")), Header: nats.Header{
			"Nats-Schedule": {"@at " + time.Now().Add(time.Hour).Format(time.RFC3339)}, "Nats-Schedule-Target": {"history.due"},
		}})
	}
	schedule()
	for i := range 3 {
		publish(t, nc, numbered("history.x")(i))
		schedule()
	}
	for name, c := range map[string]struct {
		replay ReplayBuilder
		want   []uint64
		next   uint64
	}{
		"all":           {Replay("history.>"), []uint64{2, 4, 6}, 8},
		"at a speed":    {Replay("history.>").Speed(1000), []uint64{2, 4, 6}, 8},
		"limited":       {Replay("history.>").Limit(2), []uint64{2, 4}, 5},
		"only one left": {Replay("history.>").FromSequence(7), nil, 8},
	} {
		var seen handledSeqs
		var last ReplayProgress
		report, err := NewBroker(nc).Replay(testContext(t), c.replay.Handle(seen.handle).Progress(func(p ReplayProgress) { last = p }))
		if err != nil || report.Next != c.next || report.Handled != uint64(len(c.want)) {
			t.Errorf("%s: got %+v, %v", name, report, err)
		}
		if diff := cmp.Diff(c.want, seen.seen()); diff != "" {
			t.Errorf("%s: handled (-want +got):\n%s", name, diff)
		}
		if last.Done != report.Handled || last.Total != last.Done {
			t.Errorf("%s: told of %d of %d at the end, want %d", name, last.Done, last.Total, report.Handled)
		}
	}
}

// What is stored meanwhile is not replayed.
func TestReplayEndsWhereTheStreamWas(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		replay ReplayBuilder
		want   uint64
	}{
		"all":                          {Replay("history.>").FromSequence(11).UntilSequence(1000), 40},
		"one subject":                  {Replay("history.1"), 25},
		"a subject that goes on alone": {Replay("history.0"), 25},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			chronicle(t, nc, 50, 2)
			report, err := NewBroker(nc).Replay(testContext(t), c.replay.Handle(func(_ context.Context, m *Msg) error {
				publish(t, nc, &nats.Msg{Subject: "history.0"})
				if !strings.Contains(name, "alone") {
					publish(t, nc, &nats.Msg{Subject: "history.1"})
				}
				return nil
			}))
			if err != nil {
				t.Fatal(err)
			}
			if report.Handled != c.want || report.Last > 50 {
				t.Errorf("got %+v, want %d", report, c.want)
			}
		})
	}
}

// inOrderOnce fails the test unless 1 to count were seen in order.
func (h *handledSeqs) inOrderOnce(t testing.TB, count uint64) {
	t.Helper()
	if diff := cmp.Diff(sequences(1, count), h.seen()); diff != "" {
		t.Errorf("handled (-want +got):\n%s", diff[:min(len(diff), 2000)])
	}
}

// The replay goes on behind the last message it got after whatever happens to its
// connection, server or consumer.
func TestReplaySurvives(t *testing.T) {
	t.Parallel()
	const count = 4000
	for name, disturb := range map[string]func(t *testing.T, p *phoenix, nc *nats.Conn){
		"a restart": func(t *testing.T, p *phoenix, nc *nats.Conn) {
			p.stop()
			eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
			p.start(t)
		},
		"a reconnect": func(t *testing.T, p *phoenix, nc *nats.Conn) {
			if err := nc.ForceReconnect(); err != nil {
				t.Error(err)
			}
		},
		"the end of its consumer": func(t *testing.T, p *phoenix, nc *nats.Conn) {
			s, err := jetStream(t, nc).Stream(testContext(t), "HISTORY")
			if err != nil {
				t.Error(err)
				return
			}
			deleteConsumers(t, s)
		},
	} {
		for how, replay := range map[string]ReplayBuilder{
			"as fast as possible": Replay("history.>"),
			"by key":              Replay("history.>").OrderedBy(SubjectKey()).Concurrency(4),
			"at a speed":          Replay("history.>").Speed(5),
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				t.Parallel()
				p := startPhoenix(t)
				nc := connect(t, p.url())
				chronicle(t, nc, count, 5)
				control := connect(t, p.url())
				var seen handledSeqs
				var runs tally
				var once, twice sync.Once
				report, err := NewBroker(nc).Replay(testContext(t), replay.Handle(func(ctx context.Context, m *Msg) error {
					runs.add(strconv.FormatUint(m.Sequence(), 10))
					switch m.Sequence() {
					case count / 4:
						once.Do(func() { disturb(t, p, control) })
					case count / 2:
						twice.Do(func() { disturb(t, p, nc) })
					}
					return seen.handle(ctx, m)
				}))
				if err != nil {
					t.Fatal(err)
				}
				if report.Handled != count || report.Next != count+1 {
					t.Errorf("got %+v", report)
				}
				if how == "by key" {
					runs.wantOnce(t, count)
				} else {
					seen.inOrderOnce(t, count)
				}
				noConsumers(t, nc, "HISTORY")
			})
		}
	}
}

// Of the consumers that a replay loses none is left to the server for long.
func TestReplayKeepsOneConsumer(t *testing.T) {
	t.Parallel()
	const count = 4 * replayWindow
	url := startServer(t).ClientURL()
	nc, admin := connect(t, url), connect(t, url)
	chronicle(t, admin, count, 1)
	var seen handledSeqs
	_, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
		switch m.Sequence() {
		case 1, replayWindow, 2 * replayWindow:
			reconnects := nc.Stats().Reconnects
			if err := nc.ForceReconnect(); err != nil {
				return err
			}
			eventually(t, "it is connected again", func() bool { return nc.Stats().Reconnects > reconnects })
		case 3*replayWindow - replayWindow/2:
			began := time.Now()
			eventually(t, "one consumer is left", func() bool { return consumers(t, admin, "HISTORY") == 1 })
			if took := time.Since(began); took > replayInactive/2 {
				t.Errorf("the others were left for %s", took)
			}
		}
		return seen.handle(ctx, m)
	}))
	if err != nil {
		t.Fatal(err)
	}
	seen.inOrderOnce(t, count)
}

// The total is counted at the start: what lies within the bounds, whatever else the
// stream has.
func TestReplayCountsItsTotal(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	historyStream(t, nc)
	var at [101]time.Time // by sequence
	for i := range 100 {
		publish(t, nc, &nats.Msg{Subject: fmt.Sprint("history.", i%4)})
	}
	for _, m := range letters(t, nc, "HISTORY") {
		at[m.Sequence] = m.Time
	}
	for name, c := range map[string]struct {
		replay ReplayBuilder
		want   uint64
	}{
		"all":             {Replay("history.>"), 100},
		"a subject":       {Replay("history.0"), 25},
		"from a sequence": {Replay("history.>").FromSequence(41), 60},
		"from a time":     {Replay("history.>").FromTime(at[71]), 30},
		"until sequence":  {Replay("history.>").UntilSequence(20), 20},
		"until time":      {Replay("history.0").UntilTime(at[40]), 10},
		"both ends":       {Replay("history.>").FromTime(at[11]).UntilTime(at[40]).UntilSequence(30), 20},
		"a limit":         {Replay("history.>").Limit(7), 7},
		"a limit beyond":  {Replay("history.0").Limit(70), 25},
		"nothing":         {Replay("history.>").FromSequence(101), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := NewBroker(nc)
			e := newEnv(testContext(t), &b.settings, nc, jetStream(t, nc), 1)
			defer e.close()
			r := newReplay(testContext(t), e, c.replay.Handle(succeed))
			defer r.endIntake()
			if err := r.openSource(); err != nil {
				t.Fatal(err)
			}
			defer r.reader.close()
			if r.total != c.want {
				t.Errorf("got a total of %d, want %d", r.total, c.want)
			}
		})
	}
}

// A connection that is up in name only is found, also while the replay has enough to do.
func TestReplaySurvivesABlackHole(t *testing.T) {
	t.Parallel()
	const count = 3 * replayWindow
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	chronicle(t, admin, count, 5)
	p := startProxy(t, s.ClientURL())
	nc := connect(t, p.url())
	var seen handledSeqs
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
		if m.Sequence() == 100 {
			p.freezeExisting()
		}
		return seen.handle(ctx, m)
	}))
	if err != nil || report.Handled != count || report.Took > testLimit/4 {
		t.Errorf("got %+v, %v", report, err)
	}
	seen.inOrderOnce(t, count)
	if nc.Stats().Reconnects == 0 {
		t.Error("the connection was not replaced")
	}
	noConsumers(t, admin, "HISTORY")
}

// A connection that is closed for good ends a replay: what was handled is in its report.
func TestReplayOfAClosedConnection(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	chronicle(t, nc, 3*replayWindow, 5)
	var seen handledSeqs
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
		if m.Sequence() == 100 {
			nc.Close()
		}
		return seen.handle(ctx, m)
	}))
	if _, ok := errors.AsType[*ReplayError](err); !ok || !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("got %v, want ErrConnectionClosed in a *ReplayError", err)
	}
	n := uint64(len(seen.seen()))
	if n < 100 || n >= 3*replayWindow || report.Handled != n || report.Next != n+1 {
		t.Errorf("got %+v after %d", report, n)
	}
}

func TestReplaySurvivesLeaderChanges(t *testing.T) {
	t.Parallel()
	const count = 8000
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "HISTORY", Subjects: []string{"history.>"}, Replicas: 3})
	publishMany(t, nc, count, numbered("history.x"))
	// consumers asks once, with an answer or not: an election may lose the question.
	consumers := func() (names []string, answered bool) {
		ctx, cancel := context.WithTimeout(testContext(t), 2*time.Second)
		defer cancel()
		s, err := jetStream(t, nc).Stream(ctx, "HISTORY")
		if err != nil {
			return nil, false
		}
		list := s.ConsumerNames(ctx)
		for n := range list.Name() {
			names = append(names, n)
		}
		return names, list.Err() == nil
	}
	var seen handledSeqs
	report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
		switch m.Sequence() {
		case count / 4:
			old := c.leader(t, "HISTORY", "")
			old.srv.JetStreamStepdownStream("$G", "HISTORY")
		case count / 2:
			// It is named before its server is stopped, so that the replay loses it.
			var names []string
			eventually(t, "the replay's consumer is known", func() bool {
				names, _ = consumers()
				return len(names) > 0
			})
			p := c.leader(t, "HISTORY", names[len(names)-1])
			p.stop()
			c.leader(t, "HISTORY", "")
			p.start(t)
		}
		return seen.handle(ctx, m)
	}))
	if err != nil {
		t.Fatal(err)
	}
	if report.Handled != count {
		t.Errorf("got %+v", report)
	}
	seen.inOrderOnce(t, count)
	eventually(t, "no consumer is left", func() bool {
		names, answered := consumers()
		return answered && len(names) == 0
	})
}

// Messages that are deleted before they are delivered do not hold the end up.
func TestReplayOfAStreamThatShrinks(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		replay ReplayBuilder
		shrink func(context.Context, jetstream.Stream) error
		want   uint64
	}{
		"its end is deleted": {Replay("history.>"), func(ctx context.Context, s jetstream.Stream) error {
			for seq := uint64(9990); seq <= 10000; seq++ {
				if err := s.DeleteMsg(ctx, seq); err != nil {
					return err
				}
			}
			return nil
		}, 9989},
		"the rest of its subject is deleted": {Replay("history.1"), func(ctx context.Context, s jetstream.Stream) error {
			return s.Purge(ctx, jetstream.WithPurgeSubject("history.1"))
		}, 0},
		"it is purged": {Replay("history.>"), func(ctx context.Context, s jetstream.Stream) error {
			return s.Purge(ctx)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			chronicle(t, nc, 10000, 2)
			s := streamNow(t, nc, "HISTORY")
			var once sync.Once
			report, err := NewBroker(nc).Replay(testContext(t), c.replay.Handle(func(ctx context.Context, m *Msg) error {
				once.Do(func() {
					if err := c.shrink(ctx, s); err != nil {
						t.Error(err)
					}
				})
				return nil
			}))
			if err != nil {
				t.Fatal(err)
			}
			if c.want > 0 && report.Handled != c.want || report.Handled > 9999 || report.Next != 10001 {
				t.Errorf("got %+v, want %d", report, c.want)
			}
			noConsumers(t, nc, "HISTORY")
		})
	}
}

func TestReplayOfAStreamThatIsDeleted(t *testing.T) {
	t.Parallel()
	for name, again := range map[string]bool{"for good": false, "and made again": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			chronicle(t, nc, 10000, 1)
			report, err := NewBroker(nc).Replay(testContext(t), Replay("history.>").Handle(func(ctx context.Context, m *Msg) error {
				if m.Sequence() != 100 {
					return nil
				}
				if err := jetStream(t, nc).DeleteStream(ctx, "HISTORY"); err != nil || !again {
					return err
				}
				_, err := jetStream(t, nc).CreateStream(ctx, jetstream.StreamConfig{Name: "HISTORY", Subjects: []string{"history.>"}})
				return err
			}))
			if _, ok := errors.AsType[*ReplayError](err); !ok || !errors.Is(err, ErrStreamDeleted) {
				t.Errorf("got %v, want ErrStreamDeleted", err)
			}
			if report.Next < 100 || report.Next != report.Last+1 {
				t.Errorf("got %+v", report)
			}
		})
	}
}

func TestReplayRefuses(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	historyStream(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "WORK", Subjects: []string{"work.>"}, Retention: jetstream.WorkQueuePolicy})
	publish(t, nc, &nats.Msg{Subject: "work.x"})
	closed := connect(t, nc.ConnectedUrl())
	closed.Close()
	handler := func(context.Context, *Msg) error { return errors.New("must not run") }
	for name, c := range map[string]struct {
		nc     *nats.Conn
		replay ReplayBuilder
		want   error
	}{
		"a faulty replay":     {nc, Replay("a..b"), ErrInvalidSubject},
		"no stream":           {nc, Replay("nobody.*"), ErrNoStream},
		"a stream not there":  {nc, Replay("history.>").Stream("NONE").FromSequence(7), ErrNoStream},
		"several streams":     {nc, Replay("*.x"), ErrAmbiguousStream},
		"a work queue":        {nc, Replay("work.>"), ErrNotReplayable},
		"a closed connection": {closed, Replay("history.>"), ErrConnectionClosed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := NewBroker(c.nc).Replay(testContext(t), c.replay.Handle(handler))
			if _, ok := errors.AsType[*ReplayError](err); !ok || !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v in a *ReplayError", err, c.want)
			}
			if report.Handled+report.Failed != 0 || report.Next != 0 {
				t.Errorf("got %+v", report)
			}
		})
	}
	t.Cleanup(func() { noConsumers(t, nc, "HISTORY"); noConsumers(t, nc, "WORK") })
}
