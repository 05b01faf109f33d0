package natsx

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendBuffer is how many bytes a server buffers for a connection before it closes it
	// as a slow consumer: the default of its option max_pending.
	sendBuffer = 64 << 20
	// mostAskedBytes is the most bytes that all pulls of one connection ask for. It is
	// well below sendBuffer, since a pull may deliver four times what is expected.
	mostAskedBytes = sendBuffer / 6
	// leastAskedBytes is how many they may ask for on a link that has carried nothing yet.
	leastAskedBytes = 128 << 10
	// leastCapBytes is the lowest cap after disconnects.
	leastCapBytes = 64 << 10
	// minPullBytes is the lowest max_bytes of a pull for several messages.
	minPullBytes = 64 << 10
	// carriedSlot is the resolution of the count of bytes received, which covers
	// carriedSlots of them.
	carriedSlot  = int64(20 * time.Millisecond)
	carriedSlots = 5
	// capRecovery is the time without a disconnect after which the cap doubles.
	capRecovery = time.Minute
)

// budget bounds the bytes that all pulls of one connection have asked for and not
// received: by a part of the server's send buffer, and by twice what the link carried
// within the last tenth of a second, so that nothing stays long in transit. It is safe
// for concurrent use. The zero value is ready to use; a nil budget has no bound.
type budget struct {
	asked atomic.Int64

	mu    sync.Mutex
	cap   int64 // 0 for mostAskedBytes
	cutAt int64 // when a disconnect lowered the cap
	slots [carriedSlots]int64
	slot  int64 // number of the current slot
}

// carry counts bytes received.
func (b *budget) carry(now, bytes int64) {
	if b == nil || bytes == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(now)
	b.slots[b.slot%carriedSlots] += bytes
}

// turn advances to the slot of now. b is locked.
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

// grant reserves bytes for up to n messages of size bytes each and returns how many are
// granted. The first one is granted while any byte is left, so that no message is too
// large.
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

// disconnected lowers the cap if bytes were in transit, since they may be the cause: the
// server closes a slow consumer without a reason, and its max_pending is not known.
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
