package natsx

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
)

// bookkeeper is the owner of a test's outbox.
type bookkeeper struct {
	booked chan *work
	flowed chan struct{}
}

func (b bookkeeper) book(w *work) { b.booked <- w }
func (b bookkeeper) flow()        { close(b.flowed) }

// What could not be passed on stays its worker's until that has left it: only then does
// the outbox try again, and book it.
func TestOutboxWaitsForTheWorker(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	_, log := newLogBook()
	e := newEnv(t.Context(), &settings{log: log}, nc, jetStream(t, nc), 1)
	e.start()
	t.Cleanup(func() {
		e.pool.close()
		<-e.pool.gone
		e.acks.stop()
		e.background.Wait()
		e.close()
	})
	r := &route{env: e, troubles: map[string]error{}}
	var tries atomic.Int64
	accepts := make(chan struct{})
	owner := bookkeeper{make(chan *work, 10), make(chan struct{})}
	o := &outbox{route: r, owner: owner, kind: "dlq", pause: letterPause, pass: func(context.Context, *work) error {
		tries.Add(1)
		select {
		case <-accepts:
			return nil
		default:
			return errors.New("not now")
		}
	}}
	first, second := &work{}, &work{}
	if o.send(first) || first.outbox != o {
		t.Fatal("it was passed on")
	}
	close(accepts)
	if tries.Load() != 1 || len(owner.booked) != 0 || len(r.health()) != 1 {
		t.Errorf("%d tries and %d booked while a worker has it, want 1 and none; %v", tries.Load(), len(owner.booked), r.health())
	}
	e.pool.mu.Lock()
	o.take(first)
	held := e.pool.held
	e.pool.mu.Unlock()
	if held != 1 {
		t.Errorf("%d are held, want 1", held)
	}
	if got := receive(t, owner.booked, "the first"); got != first {
		t.Error("another one was booked")
	}
	receive(t, owner.flowed, "the end")
	if n := tries.Load(); n != 2 || len(r.health()) != 0 {
		t.Errorf("%d tries, want 2, and no trouble: %v", n, r.health())
	}
	if !o.send(second) {
		t.Error("the second was not passed on")
	}
}

// While the goroutine runs, nothing overtakes what waits.
func TestOutboxKeepsTheOrder(t *testing.T) {
	t.Parallel()
	o := &outbox{route: &route{env: &env{pool: newPool(1)}}, active: true, pass: func(context.Context, *work) error {
		t.Error("it was tried on the worker")
		return nil
	}}
	a, b := &work{}, &work{}
	for _, w := range []*work{a, b} {
		if o.send(w) {
			t.Error("it was passed on")
		}
		o.take(w)
	}
	if o.queue.pop() != a || o.queue.pop() != b || o.route.env.pool.held != 2 {
		t.Error("they do not wait in order")
	}
}
