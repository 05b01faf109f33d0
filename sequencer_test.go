package natsx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// keyed is a work of a key, for tests of the sequencer without a server.
func keyed(seq uint64, key string) *work {
	w := &work{delivery: &delivery{msg: Msg{Subject: "orders." + key}}, id: messageID{seq, int64(seq)}}
	w.delivery.work = w
	return w
}

func TestSequencer(t *testing.T) {
	t.Parallel()
	s := newSequencer(SubjectKey())
	if s.arrived(1) || s.arrived(2) || !s.arrived(4) || s.arrived(5) {
		t.Error("gaps are not seen")
	}
	a1, a2, a3, b4 := keyed(1, "a"), keyed(2, "a"), keyed(3, "a"), keyed(4, "b")
	if !s.admit(a1) || s.admit(a2) || s.admit(a3) || !s.admit(b4) {
		t.Fatal("want the first of each key")
	}
	if n := s.waiting(); n != 2 {
		t.Errorf("%d wait, want 2", n)
	}
	// The first is retried: its key waits for it.
	s.retry(a1, 100)
	if s.ended(b4) != nil {
		t.Error("something follows the only one of its key")
	}
	if s.firstRetry() != 100 || len(s.overdue(100)) != 0 || len(s.overdue(101)) != 1 {
		t.Error("the retry is not known")
	}
	again := keyed(1, "a")
	if !s.admit(again) {
		t.Fatal("the retry is held up by its own key")
	}
	if next := s.ended(again); next != a2 {
		t.Errorf("then comes %v, want the second", next)
	}
	// One that was given back and deleted lets the next of its key run.
	s.retry(a2, 200)
	if next := s.gone(a2.id); next != a3 {
		t.Errorf("then comes %v, want the third", next)
	}
	if s.gone(a2.id) != nil {
		t.Error("it is gone twice")
	}
	s.ended(a3)
	if len(s.keys.busy) != 0 || s.waiting() != 0 || len(s.retries) != 0 {
		t.Errorf("something is left: %+v", s)
	}
}

// In doubt nothing starts, and afterwards everything does in the order of the stream.
func TestSequencerInDoubt(t *testing.T) {
	t.Parallel()
	s := newSequencer(SubjectKey())
	running, behind, unstarted, retried := keyed(1, "a"), keyed(5, "a"), keyed(6, "b"), keyed(2, "c")
	for _, w := range []*work{running, behind, unstarted, retried} {
		s.admit(w)
	}
	s.retry(retried, 50)
	s.doubt(0, []*work{unstarted})
	if s.waiting() != 2 || s.admit(keyed(4, "b")) || s.admit(keyed(2, "c")) || s.admit(keyed(3, "d")) {
		t.Error("something may start")
	}
	if next := s.ended(running); next != nil {
		t.Errorf("%v may start behind the running one", next)
	}
	var started []uint64
	for _, w := range s.sure() {
		if s.admit(w) {
			started = append(started, w.id.seq)
		}
	}
	if want := []uint64{2, 3, 4, 5}; !slices.Equal(started, want) {
		t.Errorf("then start %v, want %v", started, want)
	}
	if n := len(s.takeAll()); n != 1 {
		t.Errorf("%d wait, want the second of key b", n)
	}
	for _, key := range []string{"orders.a", "orders.b", "orders.c", "orders.d"} {
		s.keys.release(key)
	}
	if len(s.keys.busy) != 0 {
		t.Errorf("keys are left: %v", s.keys.busy)
	}
}

func TestSequencerDemand(t *testing.T) {
	t.Parallel()
	s := newSequencer(SubjectKey())
	want := demand{messages: 500, refill: 100}
	if d := s.limit(0, want, 0, 100, false); d.messages != 1 {
		t.Errorf("who is not pinned asks for %d, want 1", d.messages)
	}
	if d := s.limit(0, want, 100, 100, true); d != want {
		t.Errorf("got %+v, want what was wanted", d)
	}
	if d := s.limit(0, want, deepest-20, 100, true); d.messages != 20 {
		t.Errorf("close to the limit it asks for %d", d.messages)
	}
	if d := s.limit(0, want, 64, 1<<20, true); d.messages != 0 || d.again != 0 {
		t.Errorf("at the limit of bytes: %+v, want nothing", d)
	}
	s.admit(keyed(1, "a"))
	s.retry(keyed(1, "a"), 70)
	if d := s.limit(50, want, 64, 1<<20, true); d.messages != 0 || d.again != 70 {
		t.Errorf("got %+v, want to ask again for the retry at 70", d)
	}
	if d := s.limit(71, want, 64, 1<<20, true); d.messages != 1 {
		t.Errorf("got %+v, want the retry", d)
	}
	s.doubt(0, nil)
	if d := s.limit(71, want, 0, 100, true); d.messages != 0 {
		t.Errorf("got %+v, want nothing before it is known what is missing", d)
	}
	s.missing = 3
	if d := s.limit(80, want, 0, 100, true); d.messages != 3 {
		t.Errorf("got %+v, want the missing ones", d)
	}
}

// An outage that opens the breaker of an ordered route ends without a message out of order,
// and soon, however many wait for their keys; a retry at once comes back before its key.
func TestOrderThroughAnOutage(t *testing.T) {
	t.Parallel()
	const keys, each = 20, 20
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, keys*each, func(i int) *nats.Msg { return numbered("orders." + strconv.Itoa(i%keys))(i) })
	j := newJournal()
	var out atomic.Bool
	out.Store(true)
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(8))
	r := runBroker(t, b, Route("orders.*").Durable("d").OrderedBy(SubjectToken(1)).Breaker(3, 50*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			key := m.Token(1)
			j.begin(t, key)
			fails := out.Load() || m.Attempt() == 1 && m.Sequence()%10 == 0
			j.end(key, m.Sequence(), !fails)
			if fails {
				return RetryAfter(0, errors.New("not yet"))
			}
			return nil
		}))
	eventually(t, "the breaker is open", func() bool { return b.Stats().Routes[0].Breaker == BreakerOpen })
	eventually(t, "it has probed", func() bool { return b.Stats().Routes[0].Returned > 3 })
	out.Store(false)
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	j.check(t, keys, each)
	began := time.Now()
	if err := r.stop(t); err != nil || time.Since(began) > testLimit/4 {
		t.Errorf("Run: %v after %v", err, time.Since(began))
	}
}

// Keys that have no message in hand cost nothing.
func TestSequencerForgetsIdleKeys(t *testing.T) {
	t.Parallel()
	s := newSequencer(SubjectKey())
	for i := range 100_000 {
		w := keyed(uint64(i+1), strconv.Itoa(i))
		if !s.admit(w) {
			t.Fatalf("key %d is not the only one of its kind", i)
		}
		if i%100 == 0 {
			s.retry(w, int64(i))
			again := keyed(uint64(i+1), strconv.Itoa(i))
			if !s.admit(again) {
				t.Fatalf("the retry of key %d does not run", i)
			}
			w = again
		}
		if next := s.ended(w); next != nil {
			t.Fatalf("something follows key %d", i)
		}
		if n := len(s.keys.busy) + len(s.retries) + s.waiting(); n != 0 {
			t.Fatalf("%d things are kept after key %d", n, i)
		}
	}
}

// What fails while its route drains holds up its key all the same.
func TestOrderOfAFailureInADrain(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 3, numbered("orders.x"))
	began := make(chan struct{}, 10)
	b := NewBroker(connect(t, s.ClientURL()))
	spec := Route("orders.*").Durable("d").OrderedBy(SubjectKey()).AckWait(2*time.Second).Retry(1).Backoff(time.Hour, time.Hour).DLQ("dlq.x")
	r := runBroker(t, b, spec.Handle(func(_ context.Context, m *Msg) error {
		if m.Sequence() != 1 {
			t.Errorf("message %d runs behind a failure", m.Sequence())
		}
		began <- struct{}{}
		<-b.ran.Load().intake.Done()
		return errors.New("not yet")
	}))
	receive(t, began, "the first")
	eventually(t, "the others wait for it", func() bool { return b.Stats().Routes[0].Waiting == 2 })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	j := newJournal()
	runBroker(t, NewBroker(connect(t, s.ClientURL())), spec.Handle(func(_ context.Context, m *Msg) error {
		j.begin(t, "x")
		j.end("x", m.Sequence(), true)
		return nil
	}))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	j.check(t, 1, 3)
	if n := len(began); n != 0 {
		t.Errorf("it ran %d times more while the route drained", n)
	}
}

// What rests is given back when it is due, the first first, and with all else at a stop.
func TestSequencerRests(t *testing.T) {
	t.Parallel()
	s := newSequencer(SubjectKey())
	a, b, c := keyed(1, "a"), keyed(2, "b"), keyed(3, "c")
	for i, w := range []*work{a, b, c} {
		s.admit(w)
		w.due = []int64{300, 100, 200}[i]
		s.rest(w)
	}
	if s.wake() != 100 || len(s.rested(99)) != 0 {
		t.Error("something is due before its time")
	}
	if due := s.rested(200); len(due) != 2 || due[0] != b || due[1] != c || len(s.retries) != 2 || s.wake() != 300 {
		t.Errorf("due are %v, want b and c", due)
	}
	if s.admit(keyed(4, "b")) || !s.admit(keyed(2, "b")) {
		t.Error("the key does not wait for its retry")
	}
	if all := s.takeAll(); len(all) != 2 || len(s.resting) != 0 {
		t.Errorf("a stop gives back %d, want the one that rests and the one behind", len(all))
	}
}

// journal is what handlers of all processes did, in order.
type journal struct {
	mu   sync.Mutex
	done map[string][]uint64 // by key
	runs map[string]int      // that run now
}

func newJournal() *journal { return &journal{done: map[string][]uint64{}, runs: map[string]int{}} }

func (j *journal) begin(t *testing.T, key string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.runs[key]++; j.runs[key] > 1 {
		t.Errorf("two of key %s run at once", key)
	}
}

func (j *journal) end(key string, seq uint64, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.runs[key]--
	if ok {
		j.done[key] = append(j.done[key], seq)
	}
}

// check fails where a key's messages were not handled in order, or not all once.
func (j *journal) check(t *testing.T, keys, each int) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.done) != keys {
		t.Errorf("%d keys were handled, want %d", len(j.done), keys)
	}
	for key, seqs := range j.done {
		var first []uint64 // each at its first time: a process that dies may leave repetitions
		for _, seq := range seqs {
			if !slices.Contains(first, seq) {
				first = append(first, seq)
			}
		}
		if !slices.IsSorted(first) {
			t.Errorf("key %s: %v is not the order of the stream", key, seqs)
		}
		if len(first) != each {
			t.Errorf("key %s: %d messages were handled, want %d", key, len(first), each)
		}
	}
}

// Each key runs in order through its retries, the others go on meanwhile.
func TestOrderedByKey(t *testing.T) {
	t.Parallel()
	const keys, each = 50, 20
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, keys*each, func(i int) *nats.Msg { return numbered("orders." + strconv.Itoa(i%keys))(i) })
	j := newJournal()
	var stuck sync.WaitGroup
	stuck.Add(1)
	var others sync.Once
	var count tally
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(8))
	r := runBroker(t, b, Route("orders.*").Durable("d").OrderedBy(SubjectToken(1)).Backoff(time.Millisecond, 5*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			key := m.Token(1)
			j.begin(t, key)
			fails := m.Sequence()%5 == 0 && m.Attempt() < 3
			defer func() { j.end(key, m.Sequence(), !fails) }()
			if key == "0" && m.Sequence() == 1 {
				stuck.Wait() // until all others are done
			}
			if fails {
				return errors.New("not yet")
			}
			if key != "0" && count.add("others") == (keys-1)*each {
				others.Do(stuck.Done)
			}
			return nil
		}))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	j.check(t, keys, each)
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	st := b.Stats().Routes[0]
	if st.Succeeded != keys*each || st.Lapsed != 0 {
		t.Errorf("got %+v, want %d succeeded", st, keys*each)
	}
}

// A dead message lets the next of its key run.
func TestOrderGoesOnBehindALetter(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 5, numbered("orders.x"))
	j := newJournal()
	runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("orders.*").Durable("d").OrderedBy(SubjectKey()).Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.x").
		Handle(func(_ context.Context, m *Msg) error {
			j.begin(t, "x")
			j.end("x", m.Sequence(), m.Sequence() != 2)
			if m.Sequence() == 2 {
				return errors.New("broken")
			}
			return nil
		}))
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") && stored(t, nc, "DLQ") == 1 })
	j.check(t, 1, 4)
}

// One that is deleted while its retry is due does not hold up its key for ever.
func TestOrderGoesOnBehindADeletedMessage(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 3, numbered("orders.x"))
	j := newJournal()
	failed := make(chan struct{}, 10)
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())), Route("orders.*").Durable("d").OrderedBy(SubjectKey()).AckWait(200*time.Millisecond).Backoff(300*time.Millisecond, 300*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			if m.Sequence() == 1 {
				failed <- struct{}{}
				return errors.New("not yet")
			}
			j.begin(t, "x")
			j.end("x", m.Sequence(), true)
			return nil
		}))
	receive(t, failed, "the first one's failure")
	if err := streamNow(t, nc, "ORDERS").DeleteMsg(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	d := r.ran.Load().durables[0]
	eventually(t, "the others are settled", func() bool {
		d.checkAfterFailure() // else the next regular one is for it
		return settled(t, nc, "ORDERS", "d")
	})
	j.check(t, 1, 2)
}

// A stop hands over to the next process in order.
func TestOrderThroughDeploys(t *testing.T) {
	t.Parallel()
	const keys, each = 20, 50
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, keys*each, func(i int) *nats.Msg { return numbered("orders." + strconv.Itoa(i%keys))(i) })
	j := newJournal()
	var count tally
	spec := Route("orders.*").Durable("d").OrderedBy(SubjectToken(1)).AckWait(time.Second).Backoff(time.Millisecond, 20*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			key := m.Token(1)
			j.begin(t, key)
			time.Sleep(time.Millisecond)
			fails := count.add(fmt.Sprint(m.Sequence())) == 1 && m.Sequence()%7 == 0
			j.end(key, m.Sequence(), !fails)
			count.add("runs")
			if fails {
				return errors.New("not yet")
			}
			return nil
		})
	standby := runBroker(t, NewBroker(connect(t, s.ClientURL())), spec)
	for deploy := 1; deploy <= 3; deploy++ {
		next := runBroker(t, NewBroker(connect(t, s.ClientURL())), spec)
		eventually(t, "some are handled", func() bool { return count.get("runs") > deploy*keys*each/5 })
		if err := standby.stop(t); err != nil {
			t.Error(err)
		}
		standby = next
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	j.check(t, keys, each)
}

// A key that waits for a retry of much later holds up no other, also when a process takes
// over from one that was killed meanwhile.
func TestOrderIsTakenOverBesideALongRetry(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	publishMany(t, nc, 1, numbered("orders.late"))
	publishMany(t, nc, 3, numbered("orders.x"))
	lines := make(chan string, 100)
	c := startChild(t, "ordered", s.ClientURL(), lines)
	for range 3 {
		receive(t, lines, "a run of the first process")
	}
	c.kill()
	publishMany(t, nc, 3, numbered("orders.x"))
	var done tally
	runBroker(t, NewBroker(connect(t, s.ClientURL())), orderedSpec(func(line string) { done.add("run") }))
	eventually(t, "the other key goes on", func() bool { return done.sum() >= 3 })
}

func init() { childModes["ordered"] = orderedChild }

// orderedChild handles what is ordered by key and prints each run that succeeds.
func orderedChild() int {
	nc, err := Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	err = NewBroker(nc).Run(context.Background(), orderedSpec(func(line string) { fmt.Println(line) }))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func orderedSpec(done func(line string)) Spec {
	return Route("orders.*").Durable("d").OrderedBy(SubjectToken(1)).AckWait(time.Second).Backoff(time.Millisecond, 10*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			time.Sleep(time.Millisecond)
			if m.Token(1) == "late" {
				return RetryAfter(time.Hour, errors.New("much later"))
			}
			if m.Attempt() == 1 && m.Sequence()%5 == 0 {
				return errors.New("not yet")
			}
			done(fmt.Sprintln(m.Token(1), m.Sequence()))
			return nil
		})
}

// Two processes, the one that works is killed midway, a fifth of the attempts fails: never
// out of order for a key, nothing lost.
func TestOrderSurvivesAKill(t *testing.T) {
	t.Parallel()
	const keys, each = 100, 20
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc, inMemory)
	publishMany(t, nc, keys*each, func(i int) *nats.Msg { return numbered("orders." + strconv.Itoa(i%keys))(i) })
	j := newJournal()
	note := func(line string) {
		var key string
		var seq uint64
		if n, _ := fmt.Sscan(line, &key, &seq); n == 2 {
			j.begin(t, key)
			j.end(key, seq, true)
		}
	}
	lines := make(chan string, 10*keys*each)
	c := startChild(t, "ordered", s.ClientURL(), lines)
	for range keys * each / 3 {
		note(receive(t, lines, "a run of the first process"))
	}
	var survived atomic.Int64
	runBroker(t, NewBroker(connect(t, s.ClientURL())), orderedSpec(func(line string) {
		survived.Add(1)
		note(line)
	}))
	if survived.Load() != 0 {
		t.Error("both processes get messages")
	}
	c.kill()
	for len(lines) > 0 {
		note(<-lines)
	}
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	j.check(t, keys, each)
	if survived.Load() == 0 {
		t.Error("the second process did nothing")
	}
}
