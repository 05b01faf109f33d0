package natsx

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
)

// rehearsal is a replay without a server: the test is the stream.
type rehearsal struct {
	*replay
	stopped chan struct{}
	last    uint64
}

// rehearse lets the replay's pool and pacing run; stop ends them.
func rehearse(t *testing.T, workers int, replay ReplayBuilder, h Handler) *rehearsal {
	t.Helper()
	e := &engine{Broker: &Broker{workers: workers, log: slog.New(slog.DiscardHandler)}, pool: newPool(workers), base: time.Now()}
	e.pool.start()
	r := &rehearsal{replay: newReplay(t.Context(), e, replay.Handle(h)), stopped: make(chan struct{})}
	r.stream, r.consumer, r.end = "S", "C", 1<<40
	r.from = &origin{stream: "S"}
	go func() {
		defer close(r.stopped)
		r.releaseDue()
	}()
	return r
}

// deliver is the arrival of the next message, stored at a time.
func (r *rehearsal) deliver(subject string, stored time.Time) {
	r.last++
	r.receive([]*nats.Msg{{
		Subject: subject,
		Reply:   fmt.Sprintf("$JS.ACK.S.C.1.%d.%d.%d.1000", r.last, r.last, stored.UnixNano()),
	}})
}

func (r *rehearsal) stop() {
	r.endIntake()
	<-r.stopped
	r.eng.pool.close()
	<-r.eng.pool.gone
}

func TestReplayKeepsTheGaps(t *testing.T) {
	t.Parallel()
	for _, speed := range []float64{0.5, 1, 10, 1000} {
		t.Run(fmt.Sprint(speed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var at []time.Duration
				r := rehearse(t, 2, Replay("s").Speed(speed), func(context.Context, *Msg) error {
					at = append(at, time.Since(began))
					time.Sleep(time.Millisecond) // which does not add up
					return nil
				})
				stored := time.Date(2001, 2, 3, 4, 5, 6, 7, time.UTC)
				random := rand.New(rand.NewPCG(1, 2))
				var want []time.Duration
				offset := time.Duration(0)
				for range 500 {
					r.deliver("s", stored.Add(offset))
					want = append(want, time.Duration(float64(offset)/speed))
					offset += time.Duration((2 + 100*random.Float64()) * speed * float64(time.Millisecond))
				}
				time.Sleep(time.Duration(float64(offset)/speed) + time.Second)
				r.stop()
				if len(at) != len(want) {
					t.Fatalf("handled %d, want %d", len(at), len(want))
				}
				for i := range at {
					if off := at[i] - want[i]; off < 0 || off > time.Microsecond {
						t.Fatalf("message %d was handled after %v, want %v", i, at[i], want[i])
					}
				}
			})
		})
	}
}

// While a message is not due its worker does something else.
func TestReplayWaitsWithoutAWorker(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := rehearse(t, 1, Replay("s").Speed(1), func(context.Context, *Msg) error { return nil })
		now := time.Now()
		r.deliver("s", now)
		r.deliver("s", now.Add(time.Hour))
		synctest.Wait()
		r.eng.pool.mu.Lock()
		busy, waiting, handled := r.eng.pool.busy, r.eng.pool.waiting, r.report.Handled
		r.eng.pool.mu.Unlock()
		if busy != 0 || waiting != 0 || handled != 1 {
			t.Errorf("%d busy, %d waiting, %d handled, want 0, 0 and 1", busy, waiting, handled)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if r.report.Handled != 2 {
			t.Error("the second message was not handled in time")
		}
		r.stop()
	})
}

// A message that is missing, or that came before, is noticed.
func TestReplayDistrustsItsConsumer(t *testing.T) {
	t.Parallel()
	var handled history
	r := rehearse(t, 1, Replay("s"), handled.handle)
	arrive := func(consumer string, seq, here int) {
		r.receive([]*nats.Msg{{Subject: "s", Reply: fmt.Sprintf("$JS.ACK.S.%s.1.%d.%d.1.9", consumer, seq, here)}})
	}
	arrive("C", 1, 1)
	arrive("C", 3, 2)     // 2 is deleted or of another subject
	arrive("OTHER", 4, 3) // of an earlier consumer
	if r.doubt {
		t.Error("doubted without a reason")
	}
	arrive("C", 6, 4) // the third is missing
	arrive("C", 7, 5)
	if !r.doubt || r.consumer != "" || r.received != 3 {
		t.Errorf("doubt %t of %q at %d, want it at 3", r.doubt, r.consumer, r.received)
	}
	r.consumer, r.seqHere, r.doubt = "D", 0, false // replaced
	arrive("D", 2, 1)                              // by one that starts too early
	arrive("D", 3, 2)
	arrive("D", 4, 3)
	eventually(t, "the last is handled", func() bool { return len(handled.seen()) == 3 })
	r.stop()
	if diff := cmp.Diff([]uint64{1, 3, 4}, handled.seen()); diff != "" {
		t.Errorf("handled (-want +got):\n%s", diff)
	}
}

func TestTempo(t *testing.T) {
	t.Parallel()
	const ms = int64(time.Millisecond)
	type arrival struct{ stored, now, waited, due int64 }
	for name, c := range map[string]struct {
		speed    float64
		arrivals []arrival
	}{
		"as it happened": {1, []arrival{{1000 * ms, 7 * ms, 0, 7 * ms}, {1250 * ms, 8 * ms, 1 * ms, 257 * ms}, {1300 * ms, 8 * ms, 0, 307 * ms}}},
		"ten times":      {10, []arrival{{1000 * ms, 0, 0, 0}, {2000 * ms, 0, 0, 100 * ms}}},
		"a little late":  {1, []arrival{{0, 0, 0, 0}, {100 * ms, 150 * ms, 150 * ms, 100 * ms}, {200 * ms, 150 * ms, 0, 200 * ms}}},
		"the stream stood still": {1, []arrival{
			{0, 0, 0, 0}, {100 * ms, 5000 * ms, 5000 * ms, 5000 * ms}, {200 * ms, 5000 * ms, 0, 5100 * ms}}},
		"it was asked for late": {1, []arrival{
			{0, 0, 0, 0}, {100 * ms, 5000 * ms, 50 * ms, 100 * ms}, {200 * ms, 6000 * ms, 1000 * ms, 1200 * ms}}},
		"the stream's clock went back": {1, []arrival{
			{1000 * ms, 0, 0, 0}, {1500 * ms, 0, 0, 500 * ms}, {1400 * ms, 0, 0, 500 * ms}, {1600 * ms, 0, 0, 600 * ms}}},
		"an age": {1e-9, []arrival{{0, 0, 0, 0}, {int64(1 << 62), 0, 0, 1<<61 - 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := tempo{speed: c.speed}
			for i, a := range c.arrivals {
				got := p.due(a.stored, a.now, a.waited)
				if name == "an age" && i == 1 {
					if got < 1<<60 {
						t.Errorf("got %d, want the far future", got)
					}
				} else if got != a.due {
					t.Errorf("arrival %d: due %v, want %v", i, time.Duration(got), time.Duration(a.due))
				}
			}
		})
	}
}

// A replay whose handlers were busy catches up with what it then asks for; only
// what the stream does not bring for a while puts its clock back.
func TestReplayCatchesUp(t *testing.T) {
	t.Parallel()
	const ms = int64(time.Millisecond)
	e := &engine{Broker: &Broker{workers: 1, log: slog.New(slog.DiscardHandler)}, pool: newPool(1), base: time.Now()}
	r := newReplay(t.Context(), e, Replay("s").Speed(1).Handle(succeed))
	r.consumer, r.end, r.pulling = "C", 1<<40, true
	last := uint64(0)
	var due int64
	arrive := func(now int64) {
		last++
		d := &delivery{msg: Msg{seq: last}}
		r.arrive(&arrival{d: d, info: ackInfo{consumer: "C", sequence: last, consumerSeq: last, time: int64(last) * ms, pending: 1}}, now)
		due = d.due
	}
	asks := func(now int64, want int) {
		t.Helper()
		if got := r.plan(now).batch; got != want {
			t.Errorf("asks for %d at %s, want %d", got, time.Duration(now), want)
		}
	}
	e.pool.mu.Lock()
	defer e.pool.mu.Unlock()
	asks(0, replayWindow)
	for range replayWindow {
		arrive(0)
	}
	asks(0, 0)
	for range replayWindow / 2 { // ten seconds later half of them is handled
		r.early.pop()
	}
	asks(10_000*ms, replayWindow/2)
	arrive(10_001 * ms)
	if want := replayWindow * ms; due != want {
		t.Errorf("a message that was asked for late is due at %s, want %s", time.Duration(due), time.Duration(want))
	}
	arrive(15_001 * ms)
	if want := (replayWindow + 1 + 5_000) * ms; due != want {
		t.Errorf("a message that the stream was late with is due at %s, want %s", time.Duration(due), time.Duration(want))
	}
}

func TestLedger(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var l ledger
		next := uint64(1)
		open := map[uint64]int{}
		for range 300 {
			if len(open) == 0 || random.IntN(100) < 55 {
				next += 1 + uint64(random.IntN(3))
				size := random.IntN(100)
				l.push(next, size)
				open[next] = size
			} else {
				for seq, size := range open { // any
					if got := l.settle(seq); got != size {
						t.Fatalf("settle %d: size %d, want %d", seq, got, size)
					}
					delete(open, seq)
					break
				}
			}
			want := uint64(0)
			for seq := range open {
				if want == 0 || seq < want {
					want = seq
				}
			}
			got, any := l.lowest()
			if got != want || any != (want > 0) {
				t.Fatalf("lowest %d, want %d", got, want)
			}
		}
	}
}

func TestKeyedQueue(t *testing.T) {
	t.Parallel()
	msg := func(subject string, seq uint64, header string) *delivery {
		return &delivery{msg: Msg{Subject: subject, seq: seq, Header: nats.Header{"Key": {header}}}}
	}
	for _, c := range []struct {
		key  OrderKey
		same bool // whether a.x and a.y with headers k and l share it
	}{
		{SubjectKey(), false}, {SubjectToken(0), true}, {SubjectToken(1), false}, {SubjectToken(5), true},
		{HeaderKey("Key"), false}, {HeaderKey("Other"), true},
	} {
		q := newKeyedQueue(c.key)
		first, second := msg("a.x", 1, "k"), msg("a.y", 2, "l")
		if !q.admit(first) {
			t.Fatalf("%v: the first must run", c.key)
		}
		if got := !q.admit(second); got != c.same {
			t.Errorf("%v: shared %t, want %t", c.key, got, c.same)
		}
	}

	q := newKeyedQueue(SubjectKey())
	var ran []uint64
	held := map[uint64]*delivery{}
	for seq := uint64(1); seq <= 9; seq++ {
		d := msg(fmt.Sprint("a.", seq%3), seq, "")
		held[seq] = d
		if q.admit(d) {
			ran = append(ran, seq)
		}
	}
	for i := 0; i < len(ran); i++ {
		d := held[ran[i]]
		d.msg.Subject = "changed by the handler"
		if next := q.release(d); next != nil {
			ran = append(ran, next.msg.seq)
		}
	}
	if diff := cmp.Diff([]uint64{1, 2, 3, 4, 5, 6, 7, 8, 9}, ran); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
	if q.waiting != 0 || len(q.busy) != 0 {
		t.Errorf("%d waiting and %d keys left, want none", q.waiting, len(q.busy))
	}
}

func TestPlaceParser(t *testing.T) {
	t.Parallel()
	var p placeParser
	for _, reply := range []string{
		"$JS.ACK.S.C.1.42.7.1700000000000000001.5",
		"$JS.ACK.S.C.1.43.8.1700000000000000002.4",
		"$JS.ACK.S.C.1.43.8.1700000000000000002.", "$JS.ACK.S.C.1.43.8.1700000000000000002", "$JS.ACK.S.C.1..8.1.2",
		"$JS.ACK.S.C.1.x.8.1.2", "$JS.ACK.S.C.1.9223372036854775807.8.1.2",
		"$JS.ACK.S.C.2.44.9.1700000000000000003.3",
		"$JS.ACK.S.D.1.45.1.1700000000000000003.2",
		"$JS.ACK.1.1.1.45.1.1700000000000000003.2", "$JS.ACK.1.1.1.46.1.1700000000000000003.2",
		"$JS.ACK._.hash.S.C.1.46.7.1700000000000000004.1", "$JS.ACK._.hash.S.C.1.47.8.1700000000000000005.0",
		"$JS.ACK._.hash.S.C.1.48.9.1700000000000000006.0.more", "$JS.ACK._.hash.S.C.1.49.10.1700000000000000007.0.more.and",
		"", "_INBOX.a",
		"$JS.ACK.S.C.1.43.8.9223372036854775808.2", "$JS.ACK.S.C.1.43.8.9999999999999999999.2.x",
	} {
		want, wantOK := parseDelivery(reply)
		known, fast := p, false
		got, ok := p.parse(reply)
		if _, fast = known.numbers(reply); ok && !fast && known.prefix != "" && strings.HasPrefix(reply, known.prefix) {
			t.Errorf("%q: not read fast", reply)
		}
		if ok != wantOK || got != want {
			t.Errorf("%q: got %+v, %t, want %+v, %t", reply, got, ok, want, wantOK)
		}
	}
}
