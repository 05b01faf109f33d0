package natsx

// leaseList holds the deliveries in hand by the time of their next renewal.
// Guarded by the pool's mutex.
type leaseList struct{ head, tail *delivery }

func (l *leaseList) push(d *delivery) {
	d.prev, d.next = l.tail, nil
	if l.tail == nil {
		l.head = d
	} else {
		l.tail.next = d
	}
	l.tail = d
}

func (l *leaseList) remove(d *delivery) {
	if d.prev == nil {
		l.head = d.next
	} else {
		d.prev.next = d.next
	}
	if d.next == nil {
		l.tail = d.prev
	} else {
		d.next.prev = d.prev
	}
	d.prev, d.next = nil, nil
}

// due appends what must be renewed now and puts it back for a period later.
func (l *leaseList) due(now, period int64, to []*delivery) []*delivery {
	for l.head != nil && l.head.renew <= now {
		d := l.head
		l.remove(d)
		d.renew = now + period
		l.push(d)
		to = append(to, d)
	}
	return to
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
