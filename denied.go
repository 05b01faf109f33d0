package natsx

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// maxDenials bounds how many refused subjects are remembered.
const maxDenials = 1000

// denials are the permissions that the server refused a connection's user. The server
// tells the connection, and names the subject, but not the message. It is safe for
// concurrent use, and watches the connection from its first use until stop.
type denials struct {
	nc       *nats.Conn
	watching atomic.Bool
	count    atomic.Uint64 // of refusals

	mu      sync.Mutex
	watch   *asyncWatch
	publish map[string]denial // by subject
	inbox   denial            // where answers would come
}

type denial struct {
	err    *PermissionError
	number uint64 // it was the count then
}

// mark is what of is told later, for what is refused from now on.
func (d *denials) mark() uint64 {
	if !d.watching.Load() {
		d.start()
	}
	return d.count.Load()
}

// renew is for who got no answer: the application may have set another error handler
// since start.
func (d *denials) renew() {
	if !isHub(d.nc.ErrorHandler()) {
		d.start()
	}
}

func (d *denials) start() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watch != nil {
		d.watch.stop()
	}
	d.watch = watchAsync(d.nc, d.note)
	d.watching.Store(true)
}

func (d *denials) note(_ *nats.Subscription, err error) {
	e := permissionError(err)
	if e == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	number := d.count.Load() + 1
	switch {
	case e.Operation == "publish":
		if d.publish == nil || len(d.publish) >= maxDenials {
			d.publish = make(map[string]denial)
		}
		d.publish[e.Subject] = denial{e, number}
	case strings.HasPrefix(e.Subject, inboxPrefix(d.nc)):
		d.inbox = denial{e, number}
	}
	d.count.Store(number) // when of finds it
}

// of is the refusal since mark that keeps subject from being published to, or the
// answer from coming, or nil.
func (d *denials) of(subject string, mark uint64) error {
	if d.count.Load() == mark {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, denied := range [...]denial{d.publish[subject], d.inbox} {
		if denied.number > mark {
			return denied.err
		}
	}
	return nil
}

// stop is harmless when nothing was watched.
func (d *denials) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watch != nil {
		d.watch.stop()
	}
}
