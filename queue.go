package natsx

// fifo is a queue in a ring buffer that grows.
type fifo[T any] struct {
	ring  []T
	head  int
	count int
}

func (q *fifo[T]) len() int { return q.count }

func (q *fifo[T]) push(v T) {
	q.makeRoom()
	q.ring[(q.head+q.count)&(len(q.ring)-1)] = v
	q.count++
}

// pushFront makes v the oldest value.
func (q *fifo[T]) pushFront(v T) {
	q.makeRoom()
	q.head = (q.head - 1) & (len(q.ring) - 1)
	q.ring[q.head] = v
	q.count++
}

func (q *fifo[T]) makeRoom() {
	if q.count < len(q.ring) {
		return
	}
	ring := make([]T, max(16, 2*len(q.ring)))
	n := copy(ring, q.ring[q.head:])
	copy(ring[n:], q.ring[:q.head])
	q.ring, q.head = ring, 0
}

// at returns the i-th oldest value, counted from 0; there is one.
func (q *fifo[T]) at(i int) T { return q.ring[(q.head+i)&(len(q.ring)-1)] }

// peek returns the oldest value; the queue is not empty.
func (q *fifo[T]) peek() T { return q.ring[q.head] }

// pop removes and returns the oldest value; the queue is not empty.
func (q *fifo[T]) pop() T {
	var zero T
	v := q.ring[q.head]
	q.ring[q.head] = zero
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.count--
	return v
}

// timeHeap is a binary heap of times, the earliest first.
type timeHeap []int64

func (h *timeHeap) push(t int64) {
	s := append(*h, t)
	for i := len(s) - 1; i > 0; {
		up := (i - 1) / 2
		if s[up] <= s[i] {
			break
		}
		s[up], s[i] = s[i], s[up]
		i = up
	}
	*h = s
}

// after removes the times up to now and counts the rest.
func (h *timeHeap) after(now int64) int {
	for len(*h) > 0 && (*h)[0] <= now {
		h.pop()
	}
	return len(*h)
}

func (h *timeHeap) pop() {
	s := *h
	n := len(s) - 1
	s[0] = s[n]
	s = s[:n]
	for i := 0; ; {
		low := 2*i + 1
		if low >= n {
			break
		}
		if low+1 < n && s[low+1] < s[low] {
			low++
		}
		if s[i] <= s[low] {
			break
		}
		s[i], s[low] = s[low], s[i]
		i = low
	}
	*h = s
}
