package natsx

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testJob is a lane's owner whose deliveries run a function.
type testJob struct {
	lane lane
	pool *pool
	does func(w *work)
	done atomic.Int64  // works that were booked
	fed  chan struct{} // told when the lane is fed, unless nil
}

func newTestJob(p *pool, limit int, does func(w *work)) *testJob {
	j := &testJob{pool: p, does: does}
	j.lane = lane{owner: j, limit: limit}
	return j
}

func (j *testJob) run(w *work) {
	defer func() { w.ended = processTime() }()
	j.does(w)
}
func (j *testJob) conclude(*work, error) {}
func (j *testJob) bookAll(done []*work) pullRequest {
	j.done.Add(int64(len(done)))
	return pullRequest{}
}
func (j *testJob) workerFree() {
	if j.fed != nil {
		j.fed <- struct{}{}
	}
}
func (j *testJob) send(pullRequest) {}

func (j *testJob) put(n int) {
	j.pool.mu.Lock()
	defer j.pool.mu.Unlock()
	for range n {
		j.pool.put(&j.lane, &work{})
	}
}

// startPool starts a pool that is watched.
func startPool(t *testing.T, size int) *pool {
	t.Helper()
	p := newPool(size)
	g := newAgenda()
	watch := &alarm{ring: func(int64) { p.watch() }}
	p.alarm = func(at int64) { g.set(watch, at) }
	ctx, cancel := context.WithCancel(context.Background())
	var joined sync.WaitGroup
	joined.Go(func() { g.run(ctx) })
	p.start()
	t.Cleanup(func() {
		p.close()
		<-p.gone
		cancel()
		joined.Wait()
	})
	return p
}

// enter makes the lanes of jobs open ones.
func (p *pool) enterAll(jobs ...*testJob) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, j := range jobs {
		p.enter(&j.lane)
	}
}

func TestPoolRunsEverythingOnItsWorkers(t *testing.T) {
	t.Parallel()
	p := startPool(t, 4)
	var mu sync.Mutex
	running, most, runs := 0, 0, 0
	does := func(*work) {
		mu.Lock()
		running++
		most = max(most, running)
		runs++
		mu.Unlock()
		time.Sleep(50 * time.Microsecond) // work, so that workers overlap
		mu.Lock()
		running--
		mu.Unlock()
	}
	jobs := make([]*testJob, 5)
	for i := range jobs {
		jobs[i] = newTestJob(p, 64, does)
	}
	for range 20 {
		for _, j := range jobs {
			j.put(10)
		}
	}
	receive(t, p.drained(), "the pool's rest")
	if runs != 1000 || most > 4 {
		t.Errorf("%d runs, at most %d at once, want 1000 and 4", runs, most)
	}
}

func TestPoolKeepsALanesLimit(t *testing.T) {
	t.Parallel()
	p := startPool(t, 8)
	var mu sync.Mutex
	running, most := 0, 0
	j := newTestJob(p, 2, func(*work) {
		mu.Lock()
		running++
		most = max(most, running)
		mu.Unlock()
		time.Sleep(50 * time.Microsecond)
		mu.Lock()
		running--
		mu.Unlock()
	})
	j.put(200)
	receive(t, p.drained(), "the pool's rest")
	if most > 2 {
		t.Errorf("%d at once, want at most 2", most)
	}
}

func TestPoolLanesTakeTurns(t *testing.T) {
	t.Parallel()
	p := newPool(1)
	var order []string
	flood := newTestJob(p, 1, func(*work) { order = append(order, "flood") })
	quiet := newTestJob(p, 1, func(*work) { order = append(order, "quiet") })
	flood.put(100)
	quiet.put(1)
	p.start()
	receive(t, p.drained(), "the pool's rest")
	p.close()
	<-p.gone
	if i := slices.Index(order, "quiet"); len(order) != 101 || i > 1 {
		t.Errorf("the quiet lane's turn was number %d of %d, want it among the first two", i+1, len(order))
	}
}

// A lane whose work is long must not get all workers while another waits.
func TestPoolSharesWorkersBetweenSlowAndFastLanes(t *testing.T) {
	t.Parallel()
	p := newPool(4)
	hold := make(chan struct{})
	entered := make(chan string, 100)
	slow := newTestJob(p, 4, func(*work) { entered <- "slow"; <-hold })
	other := newTestJob(p, 4, func(*work) { entered <- "other"; <-hold })
	slow.put(50)
	other.put(50)
	p.start()
	counts := map[string]int{}
	for range 4 {
		counts[receive(t, entered, "a worker")]++
	}
	close(hold)
	receive(t, p.drained(), "the pool's rest")
	p.close()
	<-p.gone
	if counts["slow"] != 2 || counts["other"] != 2 {
		t.Errorf("workers went %v, want two each", counts)
	}
}

func TestPoolReplacesAWorkerThatLeft(t *testing.T) {
	t.Parallel()
	p := startPool(t, 1)
	var mu sync.Mutex
	runs := 0
	j := newTestJob(p, 1, nil)
	j.does = func(*work) {
		mu.Lock()
		runs++
		leave := runs == 1
		mu.Unlock()
		if leave {
			runtime.Goexit()
		}
	}
	j.put(3)
	receive(t, p.drained(), "the pool's rest")
	if runs != 3 {
		t.Errorf("%d runs, want 3", runs)
	}
}

// No lane takes all workers while there are others, whatever waits in it.
func TestPoolKeepsWorkersForLanesWithoutOne(t *testing.T) {
	t.Parallel()
	p := startPool(t, 16)
	hold := make(chan struct{})
	entered := make(chan string, 200)
	flood := newTestJob(p, 16, func(*work) { entered <- "flood"; <-hold })
	second := newTestJob(p, 16, func(*work) { entered <- "second"; <-hold })
	third := newTestJob(p, 16, func(*work) { entered <- "third" })
	p.enterAll(flood, second, third)
	flood.put(50)
	for range 14 { // two are kept for the two others
		receive(t, entered, "the flood")
	}
	second.put(50)
	if got := receive(t, entered, "the second lane"); got != "second" {
		t.Errorf("the %s lane got a worker, want the second", got)
	}
	third.put(1)
	if got := receive(t, entered, "the third lane"); got != "third" {
		t.Errorf("the %s lane got a worker, want the third", got)
	}
	close(hold)
	receive(t, p.drained(), "the pool's rest")
}

// A request that comes while the one before it is not quite finished, and all workers are
// at messages that wait for its answer, gets a worker too.
func TestPoolServesARequestBehindAnother(t *testing.T) {
	t.Parallel()
	p := startPool(t, 1)
	answer, leave := make(chan struct{}), make(chan struct{})
	requests := newTestJob(p, 1, func(*work) { answer <- struct{}{}; <-leave })
	messages := newTestJob(p, 1, func(*work) {
		requests.put(1)
		<-answer
		requests.put(1)
		leave <- struct{}{}
		<-answer
		leave <- struct{}{}
	})
	requests.lane.requests = true
	p.enterAll(requests, messages)
	messages.put(1)
	receive(t, p.drained(), "the last answer")
}

// Works of messages may wait for the answers to requests: they do not take the last
// workers, and where there is no other, requests get one beyond the pool's size.
func TestPoolServesRequestsBesideMessages(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			p := startPool(t, size)
			var one, two *testJob
			ofOne, ofTwo := make(chan struct{}, 1000), make(chan struct{}, 1000) // answers
			two = newTestJob(p, size, func(*work) { ofTwo <- struct{}{} })
			one = newTestJob(p, size, func(*work) { two.put(1); <-ofTwo; ofOne <- struct{}{} })
			messages := newTestJob(p, size, func(*work) { one.put(1); <-ofOne })
			more := newTestJob(p, size, func(*work) { one.put(1); <-ofOne })
			one.lane.requests, two.lane.requests = true, true
			p.enterAll(one, two, messages, more)
			messages.put(20)
			more.put(20)
			receive(t, p.drained(), "the last answer")
			if got := []int64{messages.done.Load(), more.done.Load(), one.done.Load(), two.done.Load()}; !slices.Equal(got, []int64{20, 20, 40, 40}) {
				t.Errorf("%v were done", got)
			}
		})
	}
}

// What a worker has taken of a fast lane does not wait behind a work that turns slow.
func TestPoolGivesAwayWhatWaitsInABurst(t *testing.T) {
	t.Parallel()
	p := startPool(t, 4)
	hold := make(chan struct{})
	var runs atomic.Int64
	j := newTestJob(p, 4, func(w *work) {
		if runs.Add(1) == 3 {
			<-hold
		}
	})
	j.lane.burst = maxBurst
	j.put(100)
	eventually(t, "all others are done and booked", func() bool { return j.done.Load() == 99 })
	close(hold)
	receive(t, p.drained(), "the pool's rest")
	if runs.Load() != 100 || j.done.Load() != 100 {
		t.Errorf("%d runs and %d booked, want 100", runs.Load(), j.done.Load())
	}
}

func TestPoolReplacesAWorkerThatLeftItsBurst(t *testing.T) {
	t.Parallel()
	p := startPool(t, 2)
	var runs atomic.Int64
	j := newTestJob(p, 2, func(*work) {
		if runs.Add(1)%7 == 0 {
			runtime.Goexit()
		}
	})
	j.lane.burst = maxBurst
	j.put(500)
	receive(t, p.drained(), "the pool's rest")
	if runs.Load() != 500 || j.done.Load() != 500 {
		t.Errorf("%d runs and %d booked, want 500", runs.Load(), j.done.Load())
	}
}

// A worker that becomes free is left to a lane that has less than its share and whose
// messages are not here yet.
func TestPoolFeedsHungryLanes(t *testing.T) {
	t.Parallel()
	p := startPool(t, 4)
	step, entered := make(chan struct{}), make(chan string, 100)
	flood := newTestJob(p, 4, func(*work) { entered <- "flood"; <-step })
	other := newTestJob(p, 4, func(*work) { entered <- "other"; <-step })
	other.fed = make(chan struct{}, 10)
	p.enterAll(flood, other)
	other.put(1)
	receive(t, entered, "the other lane")
	flood.put(50)
	for range 3 {
		receive(t, entered, "the flood")
	}
	p.mu.Lock()
	p.waitForWorker(&other.lane)
	p.mu.Unlock()
	step <- struct{}{}
	receive(t, other.fed, "the hungry lane is told of the free worker")
	close(step)
	receive(t, p.drained(), "the pool's rest")
}

func TestFifoAgainstASlice(t *testing.T) {
	t.Parallel()
	var q fifo[int]
	var want []int
	for i := range 20_000 {
		if rand.IntN(5) < 3 {
			q.push(i)
			want = append(want, i)
		} else if len(want) > 0 {
			if got := q.pop(); got != want[0] {
				t.Fatalf("pop %d, want %d", got, want[0])
			}
			want = want[1:]
		}
		if q.len() != len(want) {
			t.Fatalf("len %d, want %d", q.len(), len(want))
		}
	}
}

func TestTimeHeapGivesTheEarliest(t *testing.T) {
	t.Parallel()
	var h timeHeap
	var want []int64
	for range 2000 {
		v := rand.Int64N(1000)
		h.push(v)
		want = append(want, v)
	}
	slices.Sort(want)
	for i, w := range want {
		if h[0] != w {
			t.Fatalf("value %d is %d, want %d", i, h[0], w)
		}
		h.pop()
	}
	if len(h) != 0 {
		t.Errorf("%d left", len(h))
	}
}
