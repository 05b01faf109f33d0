package natsx

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// testJob is a lane's owner whose deliveries run a function.
type testJob struct {
	lane lane
	pool *pool
	work func(d *delivery)
}

func newTestJob(p *pool, limit int, work func(d *delivery)) *testJob {
	j := &testJob{pool: p, work: work}
	j.lane = lane{owner: j, limit: limit}
	return j
}

func (j *testJob) run(d *delivery)           { j.work(d) }
func (j *testJob) conclude(*delivery, error) {}
func (j *testJob) finish(*delivery) pull     { return pull{} }
func (j *testJob) pull(pull)                 {}

func (j *testJob) put(n int) {
	j.pool.mu.Lock()
	defer j.pool.mu.Unlock()
	for range n {
		j.pool.put(&j.lane, &delivery{})
	}
}

func startPool(t *testing.T, size int) *pool {
	t.Helper()
	p := newPool(size)
	p.start()
	t.Cleanup(func() {
		p.close()
		<-p.gone
	})
	return p
}

func TestPoolRunsEverythingOnItsWorkers(t *testing.T) {
	t.Parallel()
	p := startPool(t, 4)
	var mu sync.Mutex
	running, most, runs := 0, 0, 0
	work := func(*delivery) {
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
		jobs[i] = newTestJob(p, 64, work)
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
	j := newTestJob(p, 2, func(*delivery) {
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
	flood := newTestJob(p, 1, func(*delivery) { order = append(order, "flood") })
	quiet := newTestJob(p, 1, func(*delivery) { order = append(order, "quiet") })
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
	slow := newTestJob(p, 4, func(*delivery) { entered <- "slow"; <-hold })
	other := newTestJob(p, 4, func(*delivery) { entered <- "other"; <-hold })
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
	j.work = func(*delivery) {
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

func TestLeaseList(t *testing.T) {
	t.Parallel()
	var l leaseList
	ds := make([]*delivery, 5)
	for i := range ds {
		ds[i] = &delivery{renew: int64(10 * i)}
		l.push(ds[i])
	}
	l.remove(ds[0])
	l.remove(ds[2])
	l.remove(ds[4])
	due := l.due(15, 100, nil)
	if len(due) != 1 || due[0] != ds[1] || ds[1].renew != 115 {
		t.Fatalf("due %v", due)
	}
	if due = l.due(30, 100, nil); len(due) != 1 || due[0] != ds[3] {
		t.Fatalf("due %v", due)
	}
	l.remove(ds[1])
	l.remove(ds[3])
	if l.head != nil || l.tail != nil {
		t.Error("list is not empty")
	}
}
