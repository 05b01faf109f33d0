package natsx

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// receiveAll takes what comes in, many at a time, until the replay is closed.
func (r *replay) receiveAll() {
	msgs := make([]*nats.Msg, 0, replayBurst)
	for {
		select {
		case m := <-r.msgs:
			msgs = append(msgs[:0], m)
		case <-r.closing:
			return
		}
		for more := true; more && len(msgs) < replayBurst; {
			select {
			case m := <-r.msgs:
				msgs = append(msgs, m)
			default:
				more = false
			}
		}
		r.receive(msgs)
		clear(msgs)
	}
}

// receive takes messages and words of the server in the order they came in.
func (r *replay) receive(msgs []*nats.Msg) {
	arrivals := r.arrivals[:0]
	for _, m := range msgs {
		// As for a durable, headers prove nothing: only a word of the server has no
		// reply.
		if m.Reply == "" {
			arrivals = append(arrivals, arrival{word: m})
			continue
		}
		info, ok := r.place.parse(m.Reply)
		if !ok || info.stream != r.stream {
			continue
		}
		arrivals = append(arrivals, arrival{info: info, size: m.Size(), d: &delivery{
			Context: r.serving,
			route:   &r.route,
			msg:     Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, from: r.from, seq: info.sequence, time: info.time},
		}})
	}
	p := r.eng.pool
	now := r.eng.now()
	p.mu.Lock()
	for i := range arrivals {
		if a := &arrivals[i]; a.d == nil {
			r.status(a.word, now)
		} else {
			r.arrive(a, now)
		}
	}
	next := r.plan(now)
	p.mu.Unlock()
	clear(arrivals)
	r.pull(next)
}

// placeParser is parseDelivery for many messages of one consumer, whose ack
// subjects differ in their last four numbers only.
type placeParser struct {
	prefix string // up to the first of these numbers
	info   ackInfo
}

func (p *placeParser) parse(reply string) (ackInfo, bool) {
	if n, ok := p.numbers(reply); ok {
		info := p.info
		info.sequence, info.consumerSeq, info.time, info.pending = n[0], n[1], int64(n[2]), n[3]
		return info, true
	}
	info, ok := parseDelivery(reply)
	if ok {
		before := 5 // $JS, ACK, stream, consumer, deliveries
		if strings.Count(reply, ".") > 8 {
			before = 7 // and domain, account
		}
		end := 0
		for range before {
			end += strings.IndexByte(reply[end:], '.') + 1
		}
		p.prefix, p.info = reply[:end], info
	}
	return info, ok
}

func (p *placeParser) numbers(reply string) (n [4]uint64, ok bool) {
	if p.prefix == "" || !strings.HasPrefix(reply, p.prefix) {
		return n, false
	}
	field, digits := 0, 0
	for i := len(p.prefix); i < len(reply); i++ {
		c := reply[i]
		switch {
		case '0' <= c && c <= '9' && digits < 19:
			n[field] = 10*n[field] + uint64(c-'0')
			digits++
		case c == '.' && digits == 0, c != '.':
			return n, false // parseDelivery judges
		case c == '.' && field == 3:
			return n, n[2] <= math.MaxInt64 // more may follow
		default:
			field, digits = field+1, 0
		}
	}
	return n, field == 3 && digits > 0 && n[2] <= math.MaxInt64
}

// arrival is something that came in: a message, or a word of the server.
type arrival struct {
	d    *delivery
	info ackInfo
	size int
	word *nats.Msg
}

// arrive takes a message. The pool is locked.
func (r *replay) arrive(a *arrival, now int64) {
	seq := a.info.sequence
	if r.stopping || a.info.consumer != r.consumer {
		return
	}
	r.heard = now
	waited := now - r.asking
	r.asking = now
	r.outstanding = max(r.outstanding-1, 0)
	if r.seqHere++; a.info.consumerSeq != r.seqHere {
		r.distrust()
		return
	}
	switch {
	case r.complete, seq <= r.received: // a replica that lags behind starts early
		return
	case seq > r.end:
		r.complete = true
		r.tell()
		return
	}
	r.received = seq
	// A replica that lags behind does not know yet where a time is.
	want := r.want.replay
	r.begun = r.begun || want.set&replayFromTime == 0 || !time.Unix(0, a.info.time).Before(want.from.time())
	taken := r.begun && !(r.schedules && len(a.d.msg.Header[headerSchedule]) > 0)
	if taken {
		r.taken++
		r.hand.push(seq, a.size)
		r.bytes += a.size
	}
	switch {
	case seq == r.end || r.limited():
		r.complete = true
	case a.info.pending == 0:
		r.verify = true
		r.tell()
	}
	if !taken {
		r.tell() // there may be nothing left to do
		return
	}
	if r.pace.speed == 0 {
		r.admit(a.d)
		return
	}
	a.d.due = r.pace.due(a.info.time, now, waited)
	if r.early.push(a.d); r.early.len() == 1 {
		notify(r.first)
	}
}

// status takes a word of the server about a pull. The pool is locked.
func (r *replay) status(m *nats.Msg, now int64) {
	token, _ := strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 10, 64)
	i := slices.IndexFunc(r.pulls, func(p pull) bool { return p.token == token })
	if i < 0 {
		return // of an earlier consumer
	}
	r.heard = now
	code, text := m.Header.Get("Status"), m.Header.Get("Description")
	switch {
	case code == "100" || code == "":
		// Nothing came for a while, though more is expected.
		r.verify = !r.complete
		r.tell()
	case code == "404", code == "408", strings.HasPrefix(text, "Batch Completed"), strings.HasPrefix(text, "Message Size Exceeds MaxBytes"):
		left, _ := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
		r.pulls = slices.Delete(r.pulls, i, i+1)
		most := 0
		for _, p := range r.pulls {
			most += p.batch
		}
		r.outstanding = min(max(r.outstanding-left, 0), most)
	default:
		r.distrust()
	}
}

// distrust has the consumer replaced. The pool is locked.
func (r *replay) distrust() {
	if r.complete || r.stopping {
		return
	}
	r.doubt, r.pulling, r.verify, r.consumer = true, false, false, ""
	r.tell()
}

// silent tells that the server owes a word. The pool is locked.
func (r *replay) silent() bool {
	return r.pulling && !r.complete && r.outstanding > 0 && r.eng.now()-r.heard > int64(replayBeat*5/2)
}

// plan decides on the next pull and books it: half a window at a time. The pool
// is locked.
func (r *replay) plan(now int64) pull {
	if !r.pulling || r.complete || r.stopping {
		return pull{}
	}
	if r.bytes > replayBytes || r.hand.len()+r.outstanding > replayAhead {
		r.heldOff = r.heldOff || r.outstanding == 0
		return pull{}
	}
	inHand := r.early.len() + r.backlog.len() + r.queue.len() + r.running
	if r.keys != nil {
		inHand += r.keys.waiting
	}
	want := replayWindow - inHand - r.outstanding
	if want < replayWindow/2 {
		r.heldOff = r.heldOff || r.outstanding == 0
		return pull{}
	}
	if r.heldOff {
		r.heldOff, r.asking = false, now
	}
	if r.want.replay.set&replayLimit != 0 {
		if want = min(want, r.want.replay.limit-r.taken-r.outstanding); want <= 0 {
			return pull{}
		}
	}
	if r.limits.batch > 0 {
		want = min(want, r.limits.batch)
	}
	if r.outstanding == 0 {
		r.pulls, r.heard = r.pulls[:0], now
	}
	r.tokens++
	next := pull{batch: want, token: r.tokens}
	r.pulls = append(r.pulls, next)
	r.outstanding += want
	return next
}

// pull sends a planned pull.
func (r *replay) pull(next pull) {
	if next.batch == 0 {
		return
	}
	p := r.eng.pool
	p.mu.Lock()
	consumer, limits := r.consumer, r.limits
	p.mu.Unlock()
	expires := pullExpires
	if limits.expires > 0 {
		expires = min(expires, limits.expires)
	}
	bytes := max(replayBytes, r.eng.nc.MaxPayload()+4096)
	if limits.bytes > 0 {
		bytes = min(bytes, int64(limits.bytes))
	}
	body := fmt.Appendf(nil, `{"batch":%d,"expires":%d,"max_bytes":%d,"idle_heartbeat":%d}`,
		next.batch, int64(expires), bytes, int64(min(replayBeat, expires/3)))
	// A failure to send is found by the missing heartbeats.
	r.eng.nc.PublishRequest(r.eng.apiPrefix+"CONSUMER.MSG.NEXT."+r.stream+"."+consumer, r.inbox+"."+strconv.FormatUint(next.token, 10), body)
}
