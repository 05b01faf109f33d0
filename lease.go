package natsx

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// renewals is how many times a lease is renewed within its length, so that most of it is
// left for delays.
const renewals = 4

// renewal is a lease to be renewed. Its work may be settled and reused before that.
type renewal struct {
	work  *work
	use   uint64 // state while the lease is held
	reply string
	ends  int64
	term  time.Duration // of the lease
}

// write calls send to publish an in-progress ack, unless settling has begun.
func (r *renewal) write(send func(reply string)) bool {
	if !r.work.state.CompareAndSwap(r.use, r.use+leaseRenewed) {
		return false
	}
	send(r.reply)
	r.work.state.Store(r.use)
	return true
}

// leases are the messages that a route has in hand, ordered by their next renewal and
// indexed by sequence. Guarded by the pool's mutex.
type leases struct {
	head, tail *work
	count      int
	index      []*work // chains by hash of the sequence; its length is a power of two
}

func (l *leases) push(w *work) {
	l.append(w)
	w.listed = true
	l.count++
	if l.count > len(l.index) {
		l.index = make([]*work, max(64, 2*len(l.index)))
		for v := l.head; v != nil; v = v.next {
			l.link(v)
		}
		return
	}
	l.link(w)
}

func (l *leases) append(w *work) {
	w.prev, w.next = l.tail, nil
	if l.tail == nil {
		l.head = w
	} else {
		l.tail.next = w
	}
	l.tail = w
}

func (l *leases) unlist(w *work) {
	if w.prev == nil {
		l.head = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		l.tail = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.prev, w.next = nil, nil
}

func (l *leases) link(w *work) {
	at := l.slot(w.id.seq)
	w.chain, *at = *at, w
}

func (l *leases) slot(seq uint64) **work {
	return &l.index[(seq*0x9E3779B97F4A7C15>>32)&uint64(len(l.index)-1)]
}

// remove removes w if it is listed.
func (l *leases) remove(w *work) {
	if !w.listed {
		return
	}
	w.listed = false
	l.unlist(w)
	l.count--
	for at := l.slot(w.id.seq); *at != nil; at = &(*at).chain {
		if *at == w {
			*at, w.chain = w.chain, nil
			break
		}
	}
}

// find returns the work of a sequence, or nil.
func (l *leases) find(seq uint64) *work {
	if l.count == 0 {
		return nil
	}
	for w := *l.slot(seq); w != nil; w = w.chain {
		if w.id.seq == seq {
			return w
		}
	}
	return nil
}

// due appends the leases that must be renewed now for another term, and schedules their
// next renewal.
func (l *leases) due(now int64, term time.Duration, to []renewal) []renewal {
	for l.head != nil && l.head.renew <= now {
		w := l.head
		l.unlist(w)
		w.renew = now + int64(term)/renewals
		l.append(w)
		if s := w.state.Load(); s%leaseStates == leaseHeld && now < w.ends.Load() {
			to = append(to, renewal{work: w, use: s, reply: w.raw.Reply, ends: w.ends.Load(), term: term})
		}
	}
	return to
}

// wake is when the next renewal is due, 0 for never.
func (l *leases) wake() int64 {
	if l.head == nil {
		return 0
	}
	return l.head.renew
}

// keeper renews leases with in-progress acks. A renewal counts only when the server has
// answered a ping sent after it, so a lease is never longer for the client than for the
// server. While a ping is in transit, further renewals wait.
type keeper struct {
	link *link
	pool *pool
	log  *slog.Logger
	wake chan struct{} // notified when due is not empty; capacity 1

	mu  sync.Mutex
	due []renewal
}

func newKeeper(l *link, p *pool, log *slog.Logger) *keeper {
	return &keeper{link: l, pool: p, log: log, wake: make(chan struct{}, 1)}
}

// renew queues renewals.
func (k *keeper) renew(due []renewal) {
	if len(due) == 0 {
		return
	}
	k.mu.Lock()
	k.due = append(k.due, due...)
	k.mu.Unlock()
	notify(k.wake)
}

// run makes the queued renewals until ctx ends.
func (k *keeper) run(ctx context.Context) {
	for {
		select {
		case <-k.wake:
		case <-ctx.Done():
			return
		}
		k.mu.Lock()
		due := k.due
		k.due = nil
		k.mu.Unlock()
		if k.link.up() {
			k.renewAll(ctx, due)
		}
	}
}

func (k *keeper) renewAll(ctx context.Context, due []renewal) {
	sent := processTime()
	written := due[:0]
	shortest := time.Duration(0)
	for _, r := range due {
		if sent < r.ends && r.write(func(reply string) { k.link.nc.Publish(reply, ackInProgress) }) {
			written = append(written, r)
			if shortest == 0 || r.term < shortest {
				shortest = r.term
			}
		}
	}
	if len(written) == 0 {
		return
	}
	answered, alive := k.link.ping(ctx, patienceFor(shortest), shortest/2)
	if !answered {
		if !alive && ctx.Err() == nil {
			k.link.reconnect(k.log)
		}
		return
	}
	// The network may have stalled meanwhile. The answer only proves that the server has
	// the acks now: a lease that has ended by now may have ended before they arrived.
	confirmed := processTime()
	k.pool.mu.Lock()
	defer k.pool.mu.Unlock()
	for _, r := range written {
		if w := r.work; w.state.Load() == r.use && confirmed < w.ends.Load() {
			w.ends.Store(sent + int64(r.term))
		}
	}
}
