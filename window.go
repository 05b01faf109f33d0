package natsx

import "time"

const (
	// windowSlot is the resolution of a window, which is windowSlots long.
	windowSlot  = int64(10 * time.Millisecond)
	windowSlots = 10
	// deepest is the most messages that may wait locally.
	deepest = 8192
)

// window counts the messages that a route handled within the last tenth of a second: as
// many may wait locally beyond what workers can take. It grows with handled messages,
// like a congestion window, and empties soon after handlers become slow. Guarded by the
// pool's mutex.
type window struct {
	slots [windowSlots]int
	slot  int64 // number of the current slot
	sum   int
}

// add counts n handled messages.
func (w *window) add(now int64, n int) {
	w.turn(now)
	w.slots[w.slot%windowSlots] += n
	w.sum += n
}

// recent is how many messages were handled lately.
func (w *window) recent(now int64) int {
	w.turn(now)
	return w.sum
}

func (w *window) turn(now int64) {
	slot := now / windowSlot
	if slot-w.slot >= windowSlots {
		*w = window{slot: slot}
		return
	}
	for w.slot < slot {
		w.slot++
		w.sum -= w.slots[w.slot%windowSlots]
		w.slots[w.slot%windowSlots] = 0
	}
}
