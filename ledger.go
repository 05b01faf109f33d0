package natsx

import "sort"

// ledger holds the sequences in hand, in stream order, to tell the lowest of
// them.
type ledger struct {
	ring  []entry // its length is a power of two
	head  int
	count int
}

type entry struct {
	seq  uint64
	size int
	done bool
}

func (l *ledger) len() int { return l.count }

func (l *ledger) at(i int) *entry { return &l.ring[(l.head+i)&(len(l.ring)-1)] }

// push adds a sequence above all others.
func (l *ledger) push(seq uint64, size int) {
	if l.count == len(l.ring) {
		ring := make([]entry, max(64, 2*len(l.ring)))
		for i := range l.count {
			ring[i] = *l.at(i)
		}
		l.ring, l.head = ring, 0
	}
	l.count++
	*l.at(l.count - 1) = entry{seq: seq, size: size}
}

// settle marks a sequence as done and returns its size.
func (l *ledger) settle(seq uint64) int {
	i := 0
	if l.at(0).seq != seq {
		i = sort.Search(l.count, func(i int) bool { return l.at(i).seq >= seq })
	}
	e := l.at(i)
	e.done = true
	size := e.size
	for l.count > 0 && l.at(0).done {
		l.head = (l.head + 1) & (len(l.ring) - 1)
		l.count--
	}
	return size
}

// lowest is the lowest sequence that is not done.
func (l *ledger) lowest() (seq uint64, any bool) {
	if l.count == 0 {
		return 0, false
	}
	return l.at(0).seq, true
}
