package natsx

import (
	"runtime"
	"sync"
)

// acker sends plain acknowledgements for all workers.
//
// A worker that published its own would hand the connection's flusher one ack at
// a time, and pay a system call for each. The acker lets the workers that became
// ready together finish first and publishes all their acks in one go; an ack
// waits microseconds for it.
type acker struct {
	send func(replies []string)
	done chan struct{} // closed when run has returned
	wake chan struct{} // told that replies has its first entry; capacity 1, closed by stop

	mu      sync.Mutex
	replies []string
	stopped bool
}

func newAcker(send func(replies []string)) *acker {
	return &acker{send: send, done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// push has reply acknowledged soon, or at once when the acker was stopped.
func (a *acker) push(reply string) {
	a.mu.Lock()
	if a.stopped {
		a.mu.Unlock()
		a.send([]string{reply})
		return
	}
	a.replies = append(a.replies, reply)
	if len(a.replies) == 1 {
		select {
		case a.wake <- struct{}{}:
		default:
		}
	}
	a.mu.Unlock()
}

// run sends what is pushed until stop.
func (a *acker) run() {
	defer close(a.done)
	var spare []string
	for range a.wake {
		runtime.Gosched()
		spare = a.flush(spare)
	}
	a.flush(spare)
}

func (a *acker) flush(spare []string) []string {
	a.mu.Lock()
	replies := a.replies
	a.replies = spare[:0]
	a.mu.Unlock()
	if len(replies) > 0 {
		a.send(replies)
	}
	clear(replies)
	return replies
}

// stop sends the rest and ends run.
func (a *acker) stop() {
	a.mu.Lock()
	a.stopped = true
	close(a.wake)
	a.mu.Unlock()
	<-a.done
}
