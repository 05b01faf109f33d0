package natsx

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
	name string // of the handled message

	mu    sync.Mutex
	taken map[digest]uint32   // the highest number given out
	free  map[digest][]uint32 // of those below, what was given back, in order
	// Beyond maxExactNumbers envelopes that fall in one bucket count as equal. Their
	// numbers stay different, and the same as long as they come in the same order.
	beyond []uint32
}

// output is what d's handler has stored, for it to be added to.
func (d *delivery) output() *made {
	if m := d.made.Load(); m != nil {
		return m
	}
	d.made.CompareAndSwap(nil, &made{name: letterID(d), taken: make(map[digest]uint32)})
	return d.made.Load()
}

// letterID names the handled message: <stream>/<durable>/<sequence>@<stored time in
// Unix nanoseconds>.
func letterID(d *delivery) string {
	from := d.msg.origin()
	return fmt.Sprintf("%s/%s/%d@%d", from.stream, from.durable, d.msg.seq, d.msg.time)
}

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

// digest covers what a stream stores of an envelope: subject, headers, payload, TTL
// and schedule, the delay of After rather than the time that it makes. It leaves out
// what is not of the envelope, or differs when the same is published again: carried
// headers, the trace context, and expected streams and sequences.
func (e *Envelope) digest() digest {
	fields := make([]field, 0, len(e.headers)+1)
	for _, f := range e.headers {
		if !strings.EqualFold(f.name, "traceparent") && !strings.EqualFold(f.name, "tracestate") {
			fields = append(fields, f)
		}
	}
	if e.contentType != "" && !e.hasHeader("Content-Type") {
		fields = append(fields, field{"Content-Type", e.contentType})
	}
	// They are stored by name, the values of one name in order.
	slices.SortStableFunc(fields, func(a, b field) int { return strings.Compare(a.name, b.name) })
	var text []byte
	add := func(s string) { text = append(binary.AppendUvarint(text, uint64(len(s))), s...) }
	add(e.subject)
	text = binary.AppendUvarint(text, uint64(len(fields)))
	for _, f := range fields {
		add(f.name)
		add(f.value)
	}
	text = binary.AppendUvarint(text, uint64(e.set&(envTTL|envAt|envAfter)))
	if e.set&envTTL != 0 {
		add(e.ttlText())
	}
	if e.set&envAt != 0 {
		text = binary.AppendVarint(text, e.at.Unix())
		text = binary.AppendUvarint(text, uint64(e.at.Nanosecond()))
	}
	if e.set&envAfter != 0 {
		text = binary.AppendVarint(text, int64(e.after))
	}
	h := sha256.New()
	h.Write(text)
	h.Write(e.data)
	return digest(h.Sum(nil)[:len(digest{})])
}

// batchDigest covers the envelopes of an atomic batch in their order.
func batchDigest(es []Envelope) digest {
	h := sha256.New()
	h.Write([]byte{0}) // which no envelope begins with
	for i := range es {
		of := es[i].digest()
		h.Write(of[:])
		h.Write(binary.AppendUvarint(nil, uint64(len(es[i].msgID))))
		h.Write([]byte(es[i].msgID))
	}
	return digest(h.Sum(nil)[:len(digest{})])
}
