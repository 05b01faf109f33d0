package natsx

import (
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// acker publishes acknowledgements, those of push in batches: if each worker published
// its own, most would cost a system call. An ack waits microseconds for its batch.
type acker struct {
	nc   *nats.Conn
	link *link
	log  *slog.Logger
	done chan struct{} // closed when run has returned
	wake chan struct{} // notified when replies gets its first entry; capacity 1, closed by stop

	unsent atomic.Bool // acknowledgements wait for a reconnect

	mu      sync.Mutex
	replies []string
	stopped bool
}

func newAcker(nc *nats.Conn, l *link, log *slog.Logger) *acker {
	return &acker{nc: nc, link: l, log: log, done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// push acknowledges reply with the next batch, or at once after stop.
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

// write publishes one acknowledgement of any kind.
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

// connected is called after a reconnect: nats.go has sent what it buffered.
func (a *acker) connected() { a.unsent.Store(false) }

// run publishes what is pushed until stop.
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

// stop publishes the rest and ends run.
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
