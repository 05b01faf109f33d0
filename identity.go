package natsx

import (
	"encoding/base64"
	"encoding/binary"
	"slices"
	"strconv"
	"sync"
)

const (
	// maxExactNumbers is how many different envelopes of one handler call are counted
	// exactly, which takes about 5 MB.
	maxExactNumbers = 1 << 17
	// numberBuckets is how many counters further envelopes share.
	numberBuckets = 1 << 16
)

// digest identifies the content of an envelope or an atomic batch.
type digest [18]byte

func (d digest) String() string { return base64.RawURLEncoding.EncodeToString(d[:]) }

// number distinguishes equal envelopes, or batches, of one handler call. n is 0 for an
// envelope that needs no number.
type number struct {
	of digest
	n  uint32
}

// numbering counts what a handler call has stored: for each envelope how many equal ones,
// so that they get the same message ids when the message is handled again. It is safe for
// concurrent use.
//
// A number is given out once, unless it is given back. An envelope that was stored keeps
// its number, so two stored envelopes never share one. One that was not stored, or may
// have been, gives it back, and the lowest is given out first: the next try has the same
// id.
type numbering struct {
	name string // of the handled message, or of the original of a redriven one

	mu    sync.Mutex
	taken map[digest]uint32   // the highest number given out
	free  map[digest][]uint32 // lower numbers that were given back, in order
	// After maxExactNumbers, envelopes in the same bucket count as equal. They get the
	// same numbers in each run only if they are published in the same order.
	beyond []uint32
}

func newNumbering(name string) *numbering {
	return &numbering{name: name, taken: make(map[digest]uint32)}
}

// take returns the next number.
func (m *numbering) take(of digest) number {
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

// giveBack frees the number of an envelope that was not stored, as far as is known.
func (m *numbering) giveBack(number number) {
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
func (m *numbering) id(number number) string {
	return m.name + "/" + number.of.String() + "/" + strconv.FormatUint(uint64(number.n), 10)
}
