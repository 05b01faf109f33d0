package natsx

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// agenda calls functions at set times, all on one goroutine.
type agenda struct {
	wake chan struct{} // notified when the earliest time has changed; capacity 1

	mu     sync.Mutex
	alarms alarmHeap
}

// alarm is a function and the time to call it. The function must not block.
type alarm struct {
	ring func(now int64)

	// Guarded by the agenda's mutex.
	at    int64 // 0 if it is not set
	index int   // in the heap
}

func newAgenda() *agenda { return &agenda{wake: make(chan struct{}, 1)} }

// set schedules one call of a at a time of processTime, unless an earlier one is set.
func (g *agenda) set(a *alarm, at int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a.at != 0 && a.at <= at {
		return
	}
	if a.at == 0 {
		a.at = at
		heap.Push(&g.alarms, a)
	} else {
		a.at = at
		heap.Fix(&g.alarms, a.index)
	}
	if a.index == 0 {
		notify(g.wake)
	}
}

// run calls the functions that are due until ctx ends.
func (g *agenda) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		g.mu.Lock()
		var due *alarm
		pause := time.Hour
		now := processTime()
		if len(g.alarms) > 0 {
			if pause = time.Duration(g.alarms[0].at - now); pause <= 0 {
				due = heap.Pop(&g.alarms).(*alarm)
				due.at = 0
			}
		}
		g.mu.Unlock()
		if due != nil {
			due.ring(now)
			if ctx.Err() != nil {
				return
			}
			continue
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-g.wake:
		case <-ctx.Done():
			return
		}
	}
}

// alarmHeap implements heap.Interface, the earliest alarm first.
type alarmHeap []*alarm

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].at < h[j].at }
func (h alarmHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *alarmHeap) Push(a any) {
	a.(*alarm).index = len(*h)
	*h = append(*h, a.(*alarm))
}
func (h *alarmHeap) Pop() any {
	last := len(*h) - 1
	a := (*h)[last]
	*h, (*h)[last] = (*h)[:last], nil
	return a
}
