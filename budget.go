package natsx

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendBuffer is what a server holds for a connection before it closes that as a
	// slow consumer: the default of its option max_pending.
	sendBuffer = 64 << 20
	// mostAsked is the most bytes that the pulls of one connection ask for together, as
	// a part of sendBuffer: a pull may bring four times what it is expected to.
	mostAskedBytes = sendBuffer / 6
	// leastAsked is what they may ask for before the link has shown what it carries.
	leastAskedBytes = 128 << 10
	// leastCap is the lowest that disconnects bring the cap down to.
	leastCapBytes = 64 << 10
	// minPullBytes is the smallest bound on the bytes of a pull for several messages.
	minPullBytes = 64 << 10
	// carriedSlot is the resolution of what the link has carried lately, and
	// carriedSlots of them are its length.
	carriedSlot  = int64(20 * time.Millisecond)
	carriedSlots = 5
	// capRecovery is after how long without a disconnect the cap doubles again.
	capRecovery = time.Minute
)

// budget bounds the bytes that all pulls of one connection have asked for and that
// have not come: by a part of the server's send buffer, and by twice what the link
// carried within the last tenth of a second, so that nothing waits long in transit.
// It is safe for concurrent use. The zero value has no limit of its own yet; a nil
// budget has none at all.
type budget struct {
	asked atomic.Int64

	mu    sync.Mutex
	cap   int64 // 0 for mostAskedBytes
	cutAt int64 // when a disconnect lowered the cap
	slots [carriedSlots]int64
	slot  int64 // number of the current slot
}

// carry books bytes that came.
func (b *budget) carry(now, bytes int64) {
	if b == nil || bytes == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	b.slots[b.slot%carriedSlots] += bytes
}

// turn begins the slot of now. b is locked.
func (b *budget) turn(now int64) {
	slot := now / carriedSlot
	for ; b.slot < slot; b.slot++ {
		if slot-b.slot > carriedSlots {
			b.slot = slot - carriedSlots
		}
		b.slots[(b.slot+1)%carriedSlots] = 0
	}
}

// limit is how many bytes may be asked for. b is locked.
func (b *budget) limit(now int64) int64 {
	b.turn(now)
	var carried int64
	for _, n := range b.slots {
		carried += n
	}
	if b.cap > 0 && now-b.cutAt > int64(capRecovery) {
		if b.cap, b.cutAt = 2*b.cap, now; b.cap >= mostAskedBytes {
			b.cap = 0
		}
	}
	most := int64(mostAskedBytes)
	if b.cap > 0 {
		most = b.cap
	}
	return min(leastAskedBytes+2*carried, most)
}

// grant reserves room for up to n messages of size bytes each and returns for how
// many. One alone is allowed while anything is, so that no message is too large.
func (b *budget) grant(now int64, n int, size int64, first bool) int {
	if b == nil {
		return n
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	room := b.limit(now) - b.asked.Load()
	if most := room / size; int64(n) > most {
		n = int(max(most, 0))
		if n == 0 && first && room > 0 {
			n = 1
		}
	}
	b.asked.Add(int64(n) * size)
	return n
}

func (b *budget) release(bytes int64) {
	if b != nil && bytes != 0 {
		b.asked.Add(-bytes)
	}
}

// disconnected lowers the cap: a connection that ends while much is on its way may
// have ended because of that. The server closes a slow consumer without a word, and
// its max_pending is not known.
func (b *budget) disconnected(now int64) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.asked.Load() == 0 {
		return
	}
	b.cap, b.cutAt = max(min(b.limit(now), mostAskedBytes)/4, leastCapBytes), now
}
