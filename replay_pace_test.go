package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
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
	t    *testing.T
	join func() // ends the pool and the agenda
	last uint64
}

// rehearse lets the replay's pool and pacing run; stop ends them.
func rehearse(t *testing.T, workers int, replay ReplayBuilder, h Handler) *rehearsal {
	t.Helper()
	e := &env{
		settings: &settings{workers: workers, log: slog.New(slog.DiscardHandler), drainTimeout: time.Minute},
		pool:     newPool(workers), agenda: newAgenda(), userCalls: map[*userCall]struct{}{},
	}
	watch := &alarm{ring: func(int64) { e.pool.watch() }}
	e.pool.alarm = func(at int64) { e.agenda.set(watch, at) }
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		e.agenda.run(ctx)
	}()
	e.pool.start()
	r := &rehearsal{replay: newReplay(ctx, e, replay.Handle(h)), t: t, join: func() {
		cancel()
		<-ended
		e.pool.close()
		<-e.pool.gone
	}}
	r.stream, r.end = "S", 1<<40
	r.from = &origin{stream: "S", ctx: r.serving}
	return r
}

// arrival is a message of a sequence, stored at a time.
func (r *rehearsal) arrival(seq uint64, subject string, stored time.Time) arrival {
	return arrival{ackInfo{stream: "S", sequence: seq, time: stored.UnixNano(), pending: 1000}, &nats.Msg{Subject: subject}, 10}
}

// deliver is the arrival of the next message, stored at a time.
func (r *rehearsal) deliver(subject string, stored time.Time) {
	r.last++
	r.arrive([]arrival{r.arrival(r.last, subject, stored)})
}

// deliverMany is the arrival of the next messages, all stored at once.
func (r *rehearsal) deliverMany(count int) {
	var burst []arrival
	for range count {
		r.last++
		burst = append(burst, r.arrival(r.last, "s", time.Unix(1, 0)))
	}
	r.arrive(burst)
}

func (r *rehearsal) stop() {
	r.t.Helper()
	r.endIntake()
	r.join()
	r.abort(context.Canceled)
}

// booked is the report so far.
func (r *rehearsal) booked() ReplayReport {
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	return r.report
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
		handled := r.booked().Handled
		r.env.pool.mu.Lock()
		busy, waiting := r.env.pool.busy, r.env.pool.waiting
		r.env.pool.mu.Unlock()
		if busy != 0 || waiting != 0 || handled != 1 {
			t.Errorf("%d busy, %d waiting, %d handled, want 0, 0 and 1", busy, waiting, handled)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if r.booked().Handled != 2 {
			t.Error("the second message was not handled in time")
		}
		r.stop()
	})
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
	r := rehearse(t, 1, Replay("s").Speed(1), succeed)
	p := r.env.pool
	pl := &puller{size: 1, open: true}
	take := func(now int64) (due int64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		r.last++
		r.take(&delivery{}, r.arrival(r.last, "s", time.Unix(0, int64(r.last)*ms)), now)
		pl.outstanding--
		return r.early.at(r.early.len() - 1).due
	}
	asks := func(now int64, want int) {
		t.Helper()
		next, _ := pl.next(now, r.demand(now, pl))
		if next.batch != want {
			t.Errorf("asks for %d at %s, want %d", next.batch, time.Duration(now), want)
		}
	}
	begun := processTime() + int64(time.Hour) // so that nothing comes due
	asks(begun, replayWindow)
	for range replayWindow {
		take(begun)
	}
	asks(begun, 0)
	p.mu.Lock()
	for range replayWindow / 2 { // ten seconds later half of them is handled
		r.early.pop()
	}
	p.mu.Unlock()
	asks(begun+10_000*ms, replayWindow/2)
	if due, want := take(begun+10_001*ms)-begun, replayWindow*ms; due != want {
		t.Errorf("a message that was asked for late is due at %s, want %s", time.Duration(due), time.Duration(want))
	}
	if due, want := take(begun+15_001*ms)-begun, (replayWindow+1+5_000)*ms; due != want {
		t.Errorf("a message that the stream was late with is due at %s, want %s", time.Duration(due), time.Duration(want))
	}
	r.stop()
}

// A replay asks for what there is room for: in messages, in bytes, and in front of the
// slowest handler. It looks again once there is.
func TestReplayDemand(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		size              int64 // of a message
		onTheWay          int
		waiting           int // messages that wait here
		bytes, hand       int
		want, refill      int
		short             int // to be finished before it asks
		limit, acceptedNo int
	}{
		"at the start":             {size: 100, want: replayWindow, refill: replayWindow / 2},
		"half is here":             {size: 100, waiting: replayWindow / 2, want: replayWindow / 2, refill: replayWindow / 2},
		"a little more is here":    {size: 100, waiting: replayWindow/2 + 7, want: replayWindow/2 - 7, refill: replayWindow / 2, short: 7},
		"it is on its way":         {size: 100, waiting: 50, onTheWay: replayWindow - 50, want: replayWindow - 50, refill: replayWindow / 2, short: replayWindow / 2},
		"large messages":           {size: replayBytes / 4, want: 4, refill: 2},
		"larger than all":          {size: 2 * replayBytes, want: 1, refill: 1},
		"too much is here":         {size: 100, bytes: replayBytes + 1, want: 0, refill: replayWindow / 2, short: 1},
		"too far ahead":            {size: 100, hand: replayAhead + 1, want: 0, refill: replayWindow / 2, short: 1},
		"no more than its limit":   {size: 100, limit: 10, acceptedNo: 3, want: 7, refill: replayWindow / 2},
		"an unknown size is small": {size: 0, want: replayWindow, refill: replayWindow / 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := Replay("s")
			if c.limit > 0 {
				b = b.Limit(c.limit)
			}
			r := rehearse(t, 1, b, succeed)
			for range c.waiting {
				r.backlog.push(&work{})
			}
			for i := range c.hand {
				r.hand.push(uint64(i+1), 0)
			}
			r.bytes, r.accepted = c.bytes, c.acceptedNo
			d := r.demand(1, &puller{size: c.size, outstanding: c.onTheWay})
			if d.messages != c.want || d.refill != c.refill || r.short != c.short {
				t.Errorf("wants %d, in steps of %d, after %d more, want %d, %d and %d", d.messages, d.refill, r.short, c.want, c.refill, c.short)
			}
			r.backlog = fifo[*work]{}
			if r.short > 0 {
				r.env.pool.mu.Lock()
				for range r.short {
					if len(r.more) > 0 {
						t.Error("looks again before there is room")
					}
					r.bookAll([]*work{{delivery: &delivery{}}})
				}
				r.env.pool.mu.Unlock()
				receive(t, r.more, "a look at the demand")
			}
			r.stop()
		})
	}
}

// What a burst has done before a handler that hangs is in the report, and what lies
// nextStart it was not started when the replay is stopped.
func TestReplayStopsInABurst(t *testing.T) {
	t.Parallel()
	for name, hanging := range map[string]uint64{"the first": 1, "in the middle": 9, "the last of it": readBurst / 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun, goOn := make(chan struct{}), make(chan struct{})
			var seen handledSeqs
			r := rehearse(t, 1, Replay("s"), func(ctx context.Context, m *Msg) error {
				if m.Sequence() == hanging {
					close(begun)
					<-goOn
				}
				return seen.handle(ctx, m)
			})
			r.deliverMany(readBurst)
			receive(t, begun, "the handler that hangs")
			r.halt(context.Canceled)
			if got := r.booked(); got.Handled != hanging-1 {
				t.Errorf("got %d handled while one hangs, want the %d ahead of it", got.Handled, hanging-1)
			}
			if running := r.cutOff(false); running != 1 {
				t.Errorf("%d run, want 1", running)
			}
			close(goOn)
			receive(t, r.wake, "the end")
			r.stop()
			report, err := r.result(nil)
			if !errors.Is(err, context.Canceled) || report.Handled != hanging || report.Next != hanging+1 {
				t.Errorf("got %+v, %v", report, err)
			}
			if diff := cmp.Diff(sequences(1, hanging), seen.seen()); diff != "" {
				t.Errorf("handled (-want +got):\n%s", diff)
			}
		})
	}
}

// Once the intake has ended nothing new is started, though the replay was not halted yet.
func TestReplayStartsNothingBehindItsIntake(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			var r *rehearsal
			var seen handledSeqs
			r = rehearse(t, limit, Replay("s").Concurrency(limit), func(ctx context.Context, m *Msg) error {
				if m.Sequence() == 5 {
					r.endIntake()
				}
				return seen.handle(ctx, m)
			})
			r.deliverMany(readBurst)
			synctest.Wait()
			if n, most := len(seen.seen()), 5+2*(limit-1); n < 5 || n > most {
				t.Errorf("%d of %d at once were handled, want at most %d", n, limit, most)
			}
			r.halt(context.Canceled)
			r.stop()
			if report, _ := r.result(nil); report.Next != uint64(len(seen.seen()))+1 {
				t.Errorf("got %+v after %v", report, seen.seen())
			}
		})
	}
}

// A replay with a limit takes no message beyond it, whatever comes.
func TestReplayTakesNoMoreThanItsLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var seen handledSeqs
		r := rehearse(t, 1, Replay("s").Limit(3), seen.handle)
		r.deliverMany(readBurst)
		synctest.Wait()
		r.stop()
		report, err := r.result(nil)
		if err != nil || report.Handled != 3 || report.Next != 4 || !r.complete {
			t.Errorf("got %+v, %v", report, err)
		}
		if diff := cmp.Diff(sequences(1, 3), seen.seen()); diff != "" {
			t.Errorf("handled (-want +got):\n%s", diff)
		}
	})
}

// Several handlers that are stopped leave no hole below what they have started.
func TestReplayStopsWithoutAHole(t *testing.T) {
	t.Parallel()
	for _, key := range []OrderKey{{}, SubjectKey()} {
		for tries := range 50 {
			b := Replay("s").Concurrency(4)
			if key != (OrderKey{}) {
				b = b.OrderedBy(key)
			}
			var seen handledSeqs
			started := make(chan struct{}, 1000)
			r := rehearse(t, 4, b, func(ctx context.Context, m *Msg) error {
				started <- struct{}{}
				runtime.Gosched()
				return seen.handle(ctx, m)
			})
			var burst []arrival
			for seq := range uint64(readBurst) {
				burst = append(burst, r.arrival(seq+1, fmt.Sprint("s.", seq/3%5), time.Unix(1, 0)))
			}
			r.arrive(burst)
			for range tries {
				<-started
			}
			r.halt(context.Canceled)
			eventually(t, "it is over", func() bool {
				r.env.pool.mu.Lock()
				defer r.env.pool.mu.Unlock()
				return r.over()
			})
			r.stop()
			report, _ := r.result(nil)
			got := seen.seen()
			slices.Sort(got)
			if diff := cmp.Diff(sequences(1, uint64(len(got))), got); diff != "" || report.Next != uint64(len(got))+1 || report.Handled != uint64(len(got)) {
				t.Fatalf("%v: report %+v, handled (-want +got):\n%s", key, report, diff)
			}
		}
	}
}

// Behind a failure nothing is started, and what lies below it is finished.
func TestReplayFailsWithoutAHole(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	const failing = 20
	for _, workers := range []int{1, 4} {
		const rounds = 50
		var late tally // starts behind the failure, by round
		for round := range rounds {
			var seen handledSeqs
			failed := make(chan struct{})
			r := rehearse(t, workers, Replay("s").Concurrency(workers), func(ctx context.Context, m *Msg) error {
				select {
				case <-failed:
					// Another handler may have been about to start.
					if m.Sequence() > failing+uint64(workers) {
						late.add(fmt.Sprint(round))
					}
				default:
				}
				if m.Sequence() == failing {
					defer close(failed)
					return boom
				}
				return seen.handle(ctx, m)
			})
			r.deliverMany(readBurst)
			receive(t, r.wake, "the end")
			eventually(t, "it is over", func() bool {
				r.env.pool.mu.Lock()
				defer r.env.pool.mu.Unlock()
				return r.over()
			})
			r.stop()
			report, err := r.result(nil)
			got := seen.seen()
			slices.Sort(got)
			if !errors.Is(err, boom) || report.Next != failing || report.Failed != 1 || len(got) < failing-1 ||
				cmp.Diff(sequences(1, failing-1), got[:failing-1]) != "" {
				t.Fatalf("got %+v, %v after %v", report, err, got)
			}
		}
		// The goroutine that fails may be held up before anybody can know of it.
		if n := late.keys(); n > rounds/5 {
			t.Errorf("%d workers: in %d of %d rounds messages were started behind the failure", workers, n, rounds)
		}
	}
}

// A progress function that panics, ends its goroutine or blocks neither ends the replay
// nor holds it up.
func TestReplayProgressIsUsersCode(t *testing.T) {
	t.Parallel()
	for name, fn := range map[string]func(){
		"a panic":      func() { panic("ouch") },
		"an early end": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				r := rehearse(t, 1, Replay("s"), succeed)
				r.want = r.want.Progress(func(ReplayProgress) {
					calls++
					fn()
				})
				end := r.reportProgress()
				for range 3 {
					r.deliverMany(1)
					time.Sleep(progressEvery * 3 / 2)
				}
				end()
				r.stop()
				if calls != 4 {
					t.Errorf("called %d times, want 3 times and at the end", calls)
				}
			})
		})
	}
	t.Run("a block", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			block := make(chan struct{})
			calls := 0
			r := rehearse(t, 1, Replay("s"), succeed)
			r.want = r.want.Progress(func(ReplayProgress) {
				calls++
				<-block
			})
			end := r.reportProgress()
			r.deliverMany(1)
			time.Sleep(time.Minute)
			if r.booked().Handled != 1 {
				t.Error("the replay is held up")
			}
			began := time.Now()
			end()
			if took := time.Since(began); took > progressPatience {
				t.Errorf("the end took %s, want at most %s", took, progressPatience)
			}
			if inside := r.env.openUserCalls(); len(inside) != 1 || !strings.Contains(inside[0], `progress function of replay "s"`) {
				t.Errorf("got %q, want the progress function", inside)
			}
			close(block)
			synctest.Wait()
			r.stop()
			if calls != 1 {
				t.Errorf("called %d times, want no call beside another", calls)
			}
		})
	})
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
	msg := func(subject string, seq uint64, header string) *work {
		return &work{delivery: &delivery{msg: Msg{Subject: subject, seq: seq, Header: nats.Header{"Key": {header}}}}}
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
	held := map[uint64]*work{}
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
		if next := q.release(d.key); next != nil {
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
