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
