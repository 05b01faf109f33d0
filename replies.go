package natsx

import (
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// replies receives the answers to the requests of one connection that have no headers.
// nats.go does so too, but chooses the reply subject itself; here it has the time that the
// requester waits in it, which costs neither side a header. It is safe for concurrent use,
// and ends with its connection.
type replies struct {
	nc     *nats.Conn
	prefix string           // of the reply subjects
	events chan nats.Status // closed at the end

	mu      sync.Mutex
	waiting map[uint64]*waiter
	closed  bool
}

// waiter waits for one answer.
type waiter struct {
	answer chan *nats.Msg // nil for a lost connection; capacity 1, never closed
}

var waiters = sync.Pool{New: func() any { return &waiter{make(chan *nats.Msg, 1)} }}

// inboxes has the replies of every connection that asked for them.
var inboxes = struct {
	sync.Mutex
	of map[*nats.Conn]*replies
}{of: map[*nats.Conn]*replies{}}

// repliesOf returns the replies of a connection.
func repliesOf(nc *nats.Conn) (*replies, error) {
	inboxes.Lock()
	defer inboxes.Unlock()
	if r := inboxes.of[nc]; r != nil {
		return r, nil
	}
	r := &replies{nc: nc, prefix: nc.NewInbox() + ".", waiting: map[uint64]*waiter{}}
	sub, err := nc.Subscribe(r.prefix+"*", r.receive)
	if err != nil {
		return nil, err
	}
	r.events = nc.StatusChanged(nats.RECONNECTING)
	sub.SetClosedHandler(func(string) { r.close() })
	go r.watch()
	inboxes.of[nc] = r
	return r, nil
}

// expect has somebody wait for an answer; of left, unless it is 0, the responder is told.
func (r *replies) expect(left time.Duration) (key uint64, reply string, w *waiter, ok bool) {
	w = waiters.Get().(*waiter)
	key = rand.Uint64()
	r.mu.Lock()
	for r.waiting[key] != nil {
		key = rand.Uint64()
	}
	if ok = !r.closed; ok {
		r.waiting[key] = w
	}
	r.mu.Unlock()
	b := append(make([]byte, 0, 96), r.prefix...)
	return key, string(appendReplyToken(b, key, left)), w, ok
}

// forget takes back expect, and returns false when the answer has come.
func (r *replies) forget(key uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, waits := r.waiting[key]
	delete(r.waiting, key)
	return waits
}

// receive is the subscription's callback.
func (r *replies) receive(m *nats.Msg) {
	token, ok := strings.CutPrefix(m.Subject, r.prefix)
	if !ok || len(token) < replyKey {
		return
	}
	key, err := strconv.ParseUint(token[:replyKey], 16, 64)
	if err != nil {
		return
	}
	r.mu.Lock()
	w := r.waiting[key]
	delete(r.waiting, key)
	r.mu.Unlock()
	if w != nil {
		w.answer <- m
	}
}

// watch ends, when the connection is lost, the requests that were sent on it.
func (r *replies) watch() {
	for range r.events {
		if r.nc.IsReconnecting() {
			r.lose(false)
		}
	}
}

// lose ends all that wait.
func (r *replies) lose(closed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = r.closed || closed
	for key, w := range r.waiting {
		delete(r.waiting, key)
		w.answer <- nil
	}
}

func (r *replies) close() {
	inboxes.Lock()
	if inboxes.of[r.nc] == r {
		delete(inboxes.of, r.nc)
	}
	inboxes.Unlock()
	r.nc.RemoveStatusListener(r.events)
	r.lose(true)
}
