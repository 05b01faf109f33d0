package natsx

import "time"

const (
	// windowSlot is the resolution of a window, and windowSlots of them its length.
	windowSlot  = int64(10 * time.Millisecond)
	windowSlots = 10
	// deepest is how many messages may wait locally, however much work was done.
	deepest = 8192
)

// window counts what a route got done within the last tenth of a second: so much may
// wait locally beyond what workers can take. It grows as messages get done, like a
// congestion window, and is empty again a moment after handlers have become slow.
// Guarded by the pool's mutex.
type window struct {
	slots [windowSlots]int
	slot  int64 // number of the current slot
	sum   int
}

// done books n messages.
func (w *window) done(now int64, n int) {
	w.turn(now)
	w.slots[w.slot%windowSlots] += n
	w.sum += n
}

// recent is how many were done lately.
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
