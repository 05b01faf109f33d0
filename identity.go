package natsx

import (
	"encoding/base64"
	"encoding/binary"
	"slices"
	"strconv"
	"sync"
)

const (
	// maxExactNumbers is how many different envelopes of one handler have their
	// equals counted one by one, in about 5 MB.
	maxExactNumbers = 1 << 17
	// numberBuckets is how many counters the further ones share.
	numberBuckets = 1 << 16
)

// digest identifies what an envelope or an atomic batch says.
type digest [18]byte

func (d digest) String() string { return base64.RawURLEncoding.EncodeToString(d[:]) }

// number tells an envelope, or a batch, from its equals in one handler; n is 0 for
// one that needs no number.
type number struct {
	of digest
	n  uint32
}

// made is what a handler has stored: for each envelope how many equal ones, so that
// when its message is handled again they get the same message ids. It is safe for
// concurrent use.
//
// A number is given out once, unless it is given back. What was stored keeps its
// number, so two envelopes that are both stored never share one. What was not stored,
// or may have been, gives it back, and the lowest is given out first: the next try has
// the id of the one before.
type made struct {
	name string // of the handled message; of a redriven one, of its original

	mu    sync.Mutex
	taken map[digest]uint32   // the highest number given out
	free  map[digest][]uint32 // of those below, what was given back, in order
	// Beyond maxExactNumbers envelopes that fall in one bucket count as equal. Their
	// numbers stay different, and the same as long as they come in the same order.
	beyond []uint32
}

func newMade(name string) *made { return &made{name: name, taken: make(map[digest]uint32)} }

// take gives out a number.
func (m *made) take(of digest) number {
	m.mu.Lock()
	defer m.mu.Unlock()
	if free := m.free[of]; len(free) > 0 {
		if len(free) == 1 {
			delete(m.free, of)
		} else {
			m.free[of] = free[1:]
		}
		return number{of, free[0]}
	}
	if n, ok := m.taken[of]; ok || m.beyond == nil && len(m.taken) < maxExactNumbers {
		m.taken[of] = n + 1
		return number{of, n + 1}
	}
	if m.beyond == nil {
		m.beyond = make([]uint32, numberBuckets)
	}
	n := &m.beyond[binary.LittleEndian.Uint16(of[:])]
	*n++
	return number{of, *n}
}

// giveBack takes back the number of what was not stored, as far as anybody knows.
func (m *made) giveBack(number number) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.taken[number.of] == number.n {
		m.taken[number.of]--
		return
	}
	free := m.free[number.of]
	if len(free) == 0 && len(m.free) >= maxExactNumbers {
		return
	}
	if m.free == nil {
		m.free = make(map[digest][]uint32)
	}
	at, _ := slices.BinarySearch(free, number.n)
	m.free[number.of] = slices.Insert(free, at, number.n)
}

// id is the message id of a numbered envelope.
func (m *made) id(number number) string {
	return m.name + "/" + number.of.String() + "/" + strconv.FormatUint(uint64(number.n), 10)
}
