package natsx

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// maxDenials bounds how many refused subjects are remembered.
const maxDenials = 1000

// denials records the permission violations of a connection. The server reports them
// asynchronously with the subject, but without the message. It is safe for concurrent
// use, and watches the connection from its first use until stop.
type denials struct {
	nc       *nats.Conn
	watching atomic.Bool
	count    atomic.Uint64 // of violations

	mu      sync.Mutex
	watch   *asyncWatch
	publish map[string]denial // by subject
	inbox   denial            // of a subscription for answers
}

type denial struct {
	err    *PermissionError
	number uint64 // value of count after it
}

// mark returns the argument of a later call of since, for violations from now on.
func (d *denials) mark() uint64 {
	if !d.watching.Load() {
		d.start()
	}
	return d.count.Load()
}

// renew restarts the watch if the application has set another error handler since start.
// It is called after a missing answer.
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
	d.count.Store(number) // last, so that since finds the entry
}

// since returns the violation since mark that prevents a publish to subject, or its
// answer, or nil.
func (d *denials) since(subject string, mark uint64) error {
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

// stop ends the watch, if there is one.
func (d *denials) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watch != nil {
		d.watch.stop()
	}
}
