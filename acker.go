package natsx

import (
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// acker writes acknowledgements. The plain ones of all workers it writes together.
//
// A worker that published its own would hand the connection's flusher one ack at
// a time, and pay a system call for each. The acker lets the workers that became
// ready together finish first and publishes all their acks in one go; an ack
// waits microseconds for it.
type acker struct {
	nc   *nats.Conn
	link *link
	log  *slog.Logger
	done chan struct{} // closed when run has returned
	wake chan struct{} // told that replies has its first entry; capacity 1, closed by stop

	unsent atomic.Bool // an acknowledgement waits for a reconnect

	mu      sync.Mutex
	replies []string
	stopped bool
}

func newAcker(nc *nats.Conn, l *link, log *slog.Logger) *acker {
	return &acker{nc: nc, link: l, log: log, done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// push has reply acknowledged soon, or at once when the acker was stopped.
func (a *acker) push(reply string) {
	a.mu.Lock()
	if a.stopped {
		a.mu.Unlock()
		a.write(reply, ackAck)
		return
	}
	a.replies = append(a.replies, reply)
	if len(a.replies) == 1 {
		notify(a.wake)
	}
	a.mu.Unlock()
}

// write writes one acknowledgement of any kind.
func (a *acker) write(reply string, ack []byte) {
	if err := a.nc.Publish(reply, ack); err != nil {
		a.log.Warn("natsx: acknowledgement not sent", "reply", reply, "error", err)
	}
	a.written()
}

func (a *acker) written() {
	if !a.link.up() {
		a.unsent.Store(true)
	}
}

// connected is called when the connection is back: nats.go has sent what waited.
func (a *acker) connected() { a.unsent.Store(false) }

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
	for _, reply := range replies {
		if err := a.nc.Publish(reply, ackAck); err != nil {
			a.log.Warn("natsx: acknowledgement not sent", "reply", reply, "error", err)
		}
	}
	if len(replies) > 0 {
		a.written()
	}
	clear(replies)
	return replies
}

// stop sends the rest and ends run.
func (a *acker) stop() {
	a.mu.Lock()
	stopped := a.stopped
	a.stopped = true
	if !stopped {
		close(a.wake)
	}
	a.mu.Unlock()
	<-a.done
}
