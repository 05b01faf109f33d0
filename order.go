package natsx

import "fmt"

// keyedQueue lets deliveries with one key through one after another, in the order
// they came, while those of other keys go on. It holds a key only while a delivery
// of it is in hand, so it is no larger than what is in hand. It has no lock.
type keyedQueue struct {
	key     OrderKey
	busy    map[string]*fifo[*work] // what waits behind the one that was let through; nil for nothing
	waiting int
	spare   []*fifo[*work]
}

func newKeyedQueue(key OrderKey) *keyedQueue {
	return &keyedQueue{key: key, busy: map[string]*fifo[*work]{}}
}

// admit tells whether d may run now. If not, a release returns it later.
func (q *keyedQueue) admit(d *work) bool {
	d.key = q.key.of(&d.msg)
	behind, taken := q.busy[d.key]
	if !taken {
		q.busy[d.key] = nil
		return true
	}
	if behind == nil {
		if n := len(q.spare); n > 0 {
			behind, q.spare = q.spare[n-1], q.spare[:n-1]
		} else {
			behind = &fifo[*work]{}
		}
		q.busy[d.key] = behind
	}
	behind.push(d)
	q.waiting++
	return false
}

// release is told that the one of a key that was let through is finished, and returns the
// next of that key, if any.
func (q *keyedQueue) release(key string) *work {
	behind := q.busy[key]
	if behind == nil {
		delete(q.busy, key)
		return nil
	}
	next := behind.pop()
	q.waiting--
	if behind.len() == 0 {
		q.busy[key] = nil
		if len(q.spare) < 64 && len(behind.ring) <= 64 {
			q.spare = append(q.spare, behind)
		}
	}
	return next
}

// takeBehind appends all that waits to works. The keys stay busy.
func (q *keyedQueue) takeBehind(works []*work) []*work {
	for key, behind := range q.busy {
		if behind == nil {
			continue
		}
		for behind.len() > 0 {
			works = append(works, behind.pop())
		}
		q.busy[key] = nil
	}
	q.waiting = 0
	return works
}

// of is the key of a message.
func (k OrderKey) of(m *Msg) string {
	switch k.kind {
	case orderToken:
		return m.Token(k.index)
	case orderHeader:
		return m.Header.Get(k.name)
	}
	return m.Subject
}

// fault tells why nothing can be ordered by k, or nothing.
func (k OrderKey) fault() (reason string, err error) {
	switch {
	case k.kind == orderNone:
		return "needs SubjectKey, SubjectToken or HeaderKey", ErrOutOfRange
	case k.kind == orderToken && k.index < 0:
		return "tokens are counted from 0", ErrOutOfRange
	case k.kind == orderHeader && headerNameFault(k.name) != "":
		return headerNameFault(k.name), ErrInvalidName
	}
	return "", nil
}

// OrderKey tells which part of a message [ReplayBuilder.OrderedBy] compares.
type OrderKey struct {
	kind  orderKind
	index int
	name  string
}

type orderKind uint8

const (
	orderNone orderKind = iota
	orderSubject
	orderToken
	orderHeader
)

// SubjectKey orders by the whole subject.
func SubjectKey() OrderKey { return OrderKey{kind: orderSubject} }

// SubjectToken orders by the i-th token of the subject, counted from 0; below zero is
// [ErrOutOfRange]. Messages whose subject has no such token share a key.
func SubjectToken(i int) OrderKey { return OrderKey{kind: orderToken, index: i} }

// HeaderKey orders by the first value of a header, whose name is compared as it is
// written: case counts (ADR-4). Messages without it, or with an empty value, share a
// key. A name that is no HTTP token is [ErrInvalidName].
func HeaderKey(name string) OrderKey { return OrderKey{kind: orderHeader, name: name} }

// String gives the key as it was made, such as SubjectToken(1).
func (k OrderKey) String() string {
	switch k.kind {
	case orderSubject:
		return "SubjectKey()"
	case orderToken:
		return fmt.Sprintf("SubjectToken(%d)", k.index)
	case orderHeader:
		return fmt.Sprintf("HeaderKey(%q)", k.name)
	}
	return "OrderKey{}"
}
