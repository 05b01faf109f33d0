package natsx

import "time"

const (
	// mostRemembered bounds what a history remembers of deliveries, and leastRemembered
	// is how many handled messages it remembers in any case.
	mostRemembered  = 1 << 16
	leastRemembered = 256
	// ackFlight is for how long an acknowledgement may be on its way to the server while
	// nothing casts doubt on the connection.
	ackFlight = int64(time.Second)
	// doubtWaits is for how many ack waits the messages are remembered that were handled
	// before something did.
	doubtWaits = 3
	// indexFor is for how many handled messages an index outlives the last question.
	indexFor = 1 << 14
)

// history is what a route of this process knows of deliveries that are over: which
// messages were handled, though the acknowledgement may have been lost, and which
// deliveries ran nothing. The server counts deliveries; attempts are those of them
// that ran. Guarded by the pool's mutex.
type history struct {
	// Handled within the last moment and the one before.
	recent, earlier handled
	since           int64 // when recent was begun

	kept      map[messageID]struct{} // handled before something cast doubt on their acknowledgements
	keptUntil int64

	idle  map[messageID]uint32 // deliveries that ran nothing
	order fifo[messageID]      // of idle, the oldest first

	lost int // messages asked for that never came, whose deliveries are not known
}

// handled is a set of messages that is searched only when something went wrong.
type handled struct {
	ids     []messageID
	index   map[messageID]struct{} // nil while nobody asks
	unasked int                    // messages added since somebody asked
}

func (s *handled) add(id messageID) {
	s.ids = append(s.ids, id)
	if s.index == nil {
		return
	}
	if s.unasked++; s.unasked > indexFor {
		s.index = nil
		return
	}
	s.index[id] = struct{}{}
}

func (s *handled) has(id messageID) bool {
	if s.index == nil {
		s.index = make(map[messageID]struct{}, len(s.ids))
		for _, known := range s.ids {
			s.index[known] = struct{}{}
		}
	}
	s.unasked = 0
	_, yes := s.index[id]
	return yes
}

// addHandled remembers a handled message, for as long as the acknowledgement may be on its
// way.
func (h *history) addHandled(now int64, id messageID) {
	if n := len(h.recent.ids); n >= mostRemembered/2 || n >= leastRemembered && now-h.since > ackFlight {
		spare := h.earlier.ids[:0]
		if cap(spare) > 4*n {
			spare = nil
		}
		h.earlier, h.recent = h.recent, handled{ids: spare}
		h.since = now
		if now > h.keptUntil {
			h.kept = nil
		}
	}
	h.recent.add(id)
}

// doubt keeps what was handled so far for longer: acknowledgements of it may be lost,
// and the messages come again after ackWait.
func (h *history) doubt(now int64, ackWait time.Duration) {
	if h.kept == nil || now > h.keptUntil {
		h.kept = make(map[messageID]struct{}, len(h.recent.ids)+len(h.earlier.ids))
	}
	h.keptUntil = now + doubtWaits*int64(ackWait)
	for _, set := range [][]messageID{h.earlier.ids, h.recent.ids} {
		for _, id := range set {
			if len(h.kept) < mostRemembered {
				h.kept[id] = struct{}{}
			}
		}
	}
}

// wasHandled reports whether a message was handled here.
func (h *history) wasHandled(id messageID) bool {
	if _, yes := h.kept[id]; yes {
		return true
	}
	return h.recent.has(id) || h.earlier.has(id)
}

// ranNothing remembers that a delivery of the message was no attempt.
func (h *history) ranNothing(id messageID) {
	if h.idle == nil {
		h.idle = map[messageID]uint32{}
	}
	if h.idle[id]++; h.idle[id] > 1 {
		return
	}
	h.order.push(id)
	for h.order.len() > mostRemembered {
		delete(h.idle, h.order.pop())
	}
}

// addLost remembers that n messages were asked for and may have been lost on their way.
func (h *history) addLost(n int) { h.lost = min(h.lost+n, mostRemembered) }

// attempt is which attempt a delivery is, when the server has counted so many: 1 for
// the first. Deliveries that are known to have run nothing do not count, and one that
// is not known here is taken for one of those that were lost.
func (h *history) attempt(id messageID, delivered uint64) uint64 {
	if delivered <= 1 {
		return 1
	}
	idle, known := h.idle[id]
	if !known && h.lost > 0 {
		h.lost--
		h.ranNothing(id)
		idle = 1
	}
	return max(delivered-min(uint64(idle), delivered), 1)
}
