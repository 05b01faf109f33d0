package natsx

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// leastPatience and mostPatience bound how long the server may take to answer a ping
	// before the connection counts as dead. In between it is a sixth of the lease.
	leastPatience = 500 * time.Millisecond
	mostPatience  = 4 * time.Second
	// reconnectPause is the shortest time between two forced reconnects.
	reconnectPause = 2 * time.Second
)

// link is the state of one connection, shared by all users of it in natsx: its status,
// the bytes that pulls may ask for, and the detection of a dead connection. It is safe
// for concurrent use. The status is read without the lock of nats.Conn, which nats.go
// holds while it writes: on a stalled network that may take long.
type link struct {
	nc     *nats.Conn
	budget budget

	status   atomic.Int32          // a nats.Status
	cause    atomic.Pointer[error] // why it is not connected, as far as known
	sessions atomic.Int64          // connections so far
	checking atomic.Bool           // a check of the connection runs

	// Guarded by links.
	users  int
	events chan nats.Status
	ended  chan struct{} // closed when the events are over

	mu         sync.Mutex
	watchers   map[*linkWatch]struct{}
	lastForced time.Time
}

// linkWatch is a callback for changes of a link's status, on the link's goroutine.
type linkWatch struct{ changed func(nats.Status) }

var links = struct {
	sync.Mutex
	of map[*nats.Conn]*link
}{of: map[*nats.Conn]*link{}}

// openLink returns the link of nc, which the caller closes.
func openLink(nc *nats.Conn) *link {
	links.Lock()
	defer links.Unlock()
	l := links.of[nc]
	if l == nil {
		l = &link{nc: nc, watchers: map[*linkWatch]struct{}{}, ended: make(chan struct{})}
		l.events = nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED, nats.DRAINING_SUBS, nats.DRAINING_PUBS)
		l.status.Store(int32(nc.Status()))
		links.of[nc] = l
		go l.follow()
	}
	l.users++
	return l
}

func (l *link) close() {
	links.Lock()
	l.users--
	last := l.users == 0
	if last {
		delete(links.of, l.nc)
	}
	links.Unlock()
	if last {
		l.nc.RemoveStatusListener(l.events)
		<-l.ended
	}
}

// follow keeps the status until the link is closed.
func (l *link) follow() {
	defer close(l.ended)
	for s := range l.events {
		switch s {
		case nats.CONNECTED:
			l.sessions.Add(1)
			l.cause.Store(nil)
		case nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED:
			l.budget.disconnected(processTime())
			// ErrNoServers says less than why the last server did not accept.
			if err := l.nc.LastError(); err != nil && (l.cause.Load() == nil || !errors.Is(err, nats.ErrNoServers)) {
				l.cause.Store(&err)
			}
		}
		l.status.Store(int32(s))
		l.mu.Lock()
		watchers := make([]*linkWatch, 0, len(l.watchers))
		for w := range l.watchers {
			watchers = append(watchers, w)
		}
		l.mu.Unlock()
		for _, w := range watchers {
			w.changed(s)
		}
	}
}

// setCause remembers why nc does not connect.
func setCause(nc *nats.Conn, err error) {
	links.Lock()
	defer links.Unlock()
	if l := links.of[nc]; l != nil && err != nil {
		l.cause.Store(&err)
	}
}

// watch calls changed for each change of the status until unwatch. It must not block.
func (l *link) watch(changed func(nats.Status)) *linkWatch {
	w := &linkWatch{changed}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watchers[w] = struct{}{}
	return w
}

func (l *link) unwatch(w *linkWatch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.watchers, w)
}

func (l *link) state() nats.Status { return nats.Status(l.status.Load()) }

// up reports whether messages can be sent now.
func (l *link) up() bool {
	switch l.state() {
	case nats.CONNECTED, nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		return true
	}
	return false
}

// lastCause is why the connection is not up, or nil.
func (l *link) lastCause() error {
	if err := l.cause.Load(); err != nil {
		return *err
	}
	return nil
}

// patienceFor is how long the server may take to answer a ping, given the shortest lease,
// 0 for none.
func patienceFor(term time.Duration) time.Duration {
	if term == 0 {
		return mostPatience
	}
	return min(max(term/6, leastPatience), mostPatience)
}

// ping makes a round trip to the server within limit, and reports whether it was
// answered. It gives up when nothing at all arrives from the server for as long as
// patience: then the connection is not alive, unless nats.go has reconnected meanwhile.
func (l *link) ping(ctx context.Context, patience, limit time.Duration) (answered, alive bool) {
	session := l.sessions.Load()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- l.nc.FlushWithContext(ctx) }()
	look := time.NewTicker(patience)
	defer look.Stop()
	for before := l.nc.Stats().InBytes; ; {
		select {
		case err := <-done:
			return err == nil, true
		case <-look.C:
			now := l.nc.Stats().InBytes
			if now == before {
				cancel()
				err := <-done
				return err == nil, err == nil || l.sessions.Load() != session
			}
			before = now
		}
	}
}

// check pings the server on a goroutine that spawn starts, unless a check runs already,
// and reconnects if the connection is dead.
func (l *link) check(ctx context.Context, patience time.Duration, log *slog.Logger, spawn func(func())) {
	if !l.up() || !l.checking.CompareAndSwap(false, true) {
		return
	}
	spawn(func() {
		defer l.checking.Store(false)
		if _, alive := l.ping(ctx, patience, 2*patience); !alive && ctx.Err() == nil {
			l.reconnect(log)
		}
	})
}

// reconnect forces a reconnect, at most one per reconnectPause. It reports whether the
// connection is being replaced.
func (l *link) reconnect(log *slog.Logger) bool {
	if !l.up() {
		return true
	}
	l.mu.Lock()
	early := time.Since(l.lastForced) < reconnectPause
	if !early {
		l.lastForced = time.Now()
	}
	l.mu.Unlock()
	if early {
		return false
	}
	log.Warn("natsx: connection does not answer, reconnecting", "server", l.nc.ConnectedUrlRedacted())
	if err := l.nc.ForceReconnect(); err != nil {
		log.Error("natsx: reconnect failed", "error", err)
		return false
	}
	return true
}
