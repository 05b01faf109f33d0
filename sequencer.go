package natsx

import (
	"cmp"
	"slices"
	"time"
)

const (
	// mostOrderedBytes bounds the size of the messages in hand of an ordered route, most of
	// which may wait behind one of their key that is retried.
	mostOrderedBytes = 64 << 20
	// leastOrdered is how many messages it may have in hand whatever their size.
	leastOrdered = 64
	// missingStay is how long a pull for missing messages waits at the server.
	missingStay = 200 * time.Millisecond
)

// sequencer lets the messages of each key of a durable run one after another, in the order
// of the stream. Guarded by the pool's mutex.
//
// The server delivers to one process at a time, in order, so a message may run when nothing
// of its key is in hand and nothing is waiting for its retry. That holds while this process
// has every unsettled message of the consumer. It is in doubt when the consumer's sequence
// shows that others received some, when the connection may have lost some, or a lease was
// lost: then nothing is started until the server says that the unsettled messages are no
// more than those in hand here, and those are sorted.
type sequencer struct {
	keys    *keyedQueue
	resting []*work                  // failed, kept with their leases until their retry is due, in that order
	retries map[messageID]retriedKey // given back to the server; their keys wait for them
	last    uint64                   // consumer sequence of the last delivery, 0 for none
	since   int64                    // when the doubt began
	unsure  bool
	held    []*work // while it is unsure
	missing int     // messages that are unsettled and not here, and not asked for since that is known
}

type retriedKey struct {
	key string
	due int64
}

func newSequencer(key OrderKey) *sequencer {
	return &sequencer{keys: newKeyedQueue(key), retries: map[messageID]retriedKey{}}
}

// arrived takes the consumer sequence of a delivery into account, and reports whether
// deliveries before it did not come here.
func (s *sequencer) arrived(seq uint64) (gap bool) {
	gap = seq != s.last+1
	s.last = seq
	return gap
}

// admit reports whether w may be started now. If not, it is returned later.
func (s *sequencer) admit(w *work) bool {
	if r, ok := s.retries[w.id]; ok {
		delete(s.retries, w.id)
		w.key, w.first = r.key, true
	}
	if s.unsure {
		s.held = append(s.held, w)
		return false
	}
	if w.first || s.keys.admit(w) {
		w.first = true
		return true
	}
	return false
}

// retry is told that w was given back to be delivered again at a time.
func (s *sequencer) retry(w *work, due int64) { s.retries[w.id] = retriedKey{w.key, due} }

// rest keeps a failed message until its retry is due. If the server delayed it, a process
// that takes over would have to wait for it as long; so it is there within an ack wait.
func (s *sequencer) rest(w *work) {
	i, _ := slices.BinarySearchFunc(s.resting, w.due, func(v *work, due int64) int { return cmp.Compare(v.due, due) })
	s.resting = slices.Insert(s.resting, i, w)
}

// wake is when the first retry is due, 0 for none.
func (s *sequencer) wake() int64 {
	if len(s.resting) == 0 {
		return 0
	}
	return s.resting[0].due
}

// rested removes the messages whose retry is due. They are to be given back to the server,
// which counts the attempts.
func (s *sequencer) rested(now int64) (due []*work) {
	n := 0
	for n < len(s.resting) && s.resting[n].due <= now {
		s.retry(s.resting[n], now)
		n++
	}
	due = slices.Clone(s.resting[:n])
	s.resting = slices.Delete(s.resting, 0, n)
	return due
}

// ended is told that w is settled, and returns the next message of its key, if any.
func (s *sequencer) ended(w *work) (next *work) {
	if !w.first {
		return nil
	}
	w.first = false
	return s.next(w.key)
}

// gone is told that a message that was given back does not exist any more.
func (s *sequencer) gone(id messageID) (next *work) {
	r, ok := s.retries[id]
	if !ok {
		return nil
	}
	delete(s.retries, id)
	return s.next(r.key)
}

// forgetRetries is told that what was given back is delivered to others.
func (s *sequencer) forgetRetries() {
	for _, r := range s.retries {
		s.keys.release(r.key)
	}
	clear(s.retries)
}

func (s *sequencer) next(key string) *work {
	next := s.keys.release(key)
	if next != nil {
		next.first = true
	}
	return next
}

// doubt holds everything that was not started: the given works, which may start, and what
// waits behind them and others.
func (s *sequencer) doubt(now int64, unstarted []*work) {
	s.unsure, s.since, s.missing = true, now, 0
	s.held = append(s.held, unstarted...)
	s.held = s.keys.takeBehind(s.held)
	for _, w := range unstarted {
		w.first = false
		s.keys.release(w.key)
	}
}

// sure ends the doubt and returns what was held in the order of the stream. Each is to be
// admitted again.
func (s *sequencer) sure() (held []*work) {
	held, s.held, s.unsure = s.held, nil, false
	slices.SortFunc(held, func(a, b *work) int { return cmp.Compare(a.id.seq, b.id.seq) })
	return held
}

// takeAll removes and returns all that may not start.
func (s *sequencer) takeAll() (all []*work) {
	all = append(s.keys.takeBehind(s.held), s.resting...)
	s.held, s.resting = nil, nil
	for _, w := range all {
		if w.first { // a retry that came back
			w.first = false
			s.keys.release(w.key)
		}
	}
	return all
}

// waiting is how many messages are in hand that may not start.
func (s *sequencer) waiting() int { return s.keys.waiting + len(s.held) }

// firstRetry is when the first retry is due, 0 for none.
func (s *sequencer) firstRetry() (due int64) {
	for _, r := range s.retries {
		if due == 0 || r.due < due {
			due = r.due
		}
	}
	return due
}

// overdue are the retries that were due before a time, at most a few.
func (s *sequencer) overdue(before int64) (ids []messageID) {
	for id, r := range s.retries {
		if r.due < before && len(ids) < 16 {
			ids = append(ids, id)
		}
	}
	return ids
}

// limit bounds the demand of a route that has so many messages of a size in hand.
func (s *sequencer) limit(now int64, d demand, inHand int, size int64, pinned bool) demand {
	if !pinned {
		d.messages, d.refill = max(min(d.messages, 1), 0), 0 // to become the pinned one
		return d
	}
	if s.unsure {
		// Nothing new should come, so it is no use to wait for long.
		d.refill, d.stay = 0, min(d.stay, missingStay)
		d.messages = min(s.missing, leastOrdered)
		return d
	}
	most := max(min(deepest, int(mostOrderedBytes/max(size, 1))), leastOrdered) - inHand
	if most > 0 {
		d.messages = min(d.messages, most)
		d.refill = min(d.refill, most/4)
		return d
	}
	d.messages, d.refill = 0, 0
	if due := s.firstRetry(); due > now {
		d.again = due
	} else if due > 0 {
		d.messages = 1
	}
	return d
}
