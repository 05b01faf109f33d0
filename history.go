package natsx

import "time"

const (
	// mostRemembered is the most messages that a history remembers, and leastRemembered
	// how many handled ones it remembers in any case.
	mostRemembered  = 1 << 16
	leastRemembered = 256
	// ackFlight is how long an acknowledgement may be in transit on a healthy connection.
	ackFlight = int64(time.Second)
	// doubtWaits is for how many ack waits messages are remembered whose acknowledgements
	// may be lost.
	doubtWaits = 3
	// indexFor is for how many handled messages an unused index is kept.
	indexFor = 1 << 14
)

// history is what a route of this process remembers of past deliveries: which messages
// were handled, in case their acknowledgement was lost, and which deliveries ran nothing.
// The server counts deliveries; attempts are only those that ran. Guarded by the pool's
// mutex.
type history struct {
	// Handled lately, in two generations.
	recent, earlier handled
	since           int64 // when recent was begun

	kept      map[messageID]struct{} // handled, but their acknowledgements may be lost
	keptUntil int64

	late map[messageID]Outcome // handled and lapsed; counted once they are acknowledged

	idle  map[messageID]uint32 // how many deliveries ran nothing
	order fifo[messageID]      // of idle, the oldest first

	lost int // messages requested that never arrived; which ones is unknown
}

// handled is a set of messages, optimised for adding: it is rarely searched.
type handled struct {
	ids     []messageID
	index   map[messageID]struct{} // nil while it is not searched
	unasked int                    // messages added since the last search
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

// addHandled remembers a handled message while its acknowledgement may be in transit.
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

// addLate remembers a message that was done, with its outcome, and lapsed because its
// acknowledgement was late or not confirmed.
func (h *history) addLate(id messageID, o Outcome) {
	if h.late == nil || len(h.late) >= mostRemembered {
		h.late = map[messageID]Outcome{}
	}
	h.late[id] = o
}

// settledLate returns the outcome of addLate once, else "": the message is acknowledged
// again.
func (h *history) settledLate(now int64, id messageID) Outcome {
	o, late := h.late[id]
	if late {
		delete(h.late, id)
		h.addHandled(now, id)
	}
	return o
}

// doubt remembers for longer what was handled lately: if the acknowledgements were lost,
// the messages are redelivered after ackWait.
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

// wasHandled reports whether this process has handled a message.
func (h *history) wasHandled(id messageID) bool {
	if _, yes := h.kept[id]; yes {
		return true
	}
	if _, yes := h.late[id]; yes {
		return true
	}
	return h.recent.has(id) || h.earlier.has(id)
}

// ranNothing records that a delivery of the message was no attempt.
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

// addLost records that n messages were requested and may have been lost in transit.
func (h *history) addLost(n int) { h.lost = min(h.lost+n, mostRemembered) }

// attempt is the number of an attempt, from 1, given the server's delivery count.
// Deliveries that ran nothing do not count. A message that is not remembered is assumed
// to be one of the lost ones.
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
