package natsx

import (
	"math"
	"slices"
	"time"
)

const (
	// statusGrace is how late the status message about a pull's end may arrive.
	statusGrace = time.Second
	// refusalPause is the pause after a pull that the server refused.
	refusalPause = time.Second
	// movedPause is the pause after a pull that no server served. It doubles with each
	// one in a row, up to refusalPause.
	movedPause = 10 * time.Millisecond
	// starvedPause is the pause after a pull that the byte budget did not allow.
	starvedPause = int64(2 * time.Millisecond)
	// pinStay is how long a request waits at the server that keeps a pin.
	pinStay = time.Second
)

// puller is the client's side of the pull protocol for one consumer (ADR-13): which
// requests wait at the server, what they may still deliver, and the next one. It is a
// state machine without clock, lock or connection: its owner reports events under its
// own lock, and sends the requests that the puller returns. The owner's policy decides
// how much to ask for, and passes that as a demand.
//
// An idle pull is a request with max_bytes 1, which no message fits: the server ends it
// when there is a message to deliver, and delivers nothing. An idle consumer waits with
// such a pull, so that no message is in transit when it stops. All other requests are
// called real.
type puller struct {
	limits pullLimits // of the consumer
	budget *budget    // bytes of the connection, nil for no bound
	size   int64      // of a message in bytes, a moving mean
	short  bool       // leases are so short that the end of every pull is to be announced; see since

	open        bool // requests may be sent
	pulls       []pull
	outstanding int   // messages requested that have not arrived
	asked       int64 // bytes reserved in the budget for these
	carried     int64 // bytes received since the last report to the budget
	tokens      uint64
	heard       int64 // when the last message or status arrived
	unheard     int64 // when the oldest pull was sent whose end was not announced, 0 for none
	notBefore   int64 // no request before this time
	past        int64 // what the server delivered before this time has arrived
	unserved    int   // requests in a row that no server served
	single      bool  // the next real request is for one message of any size
	starved     bool  // the budget did not allow the last request

	// Of a consumer with a pinned client (ADR-42), the only one that receives messages. Other
	// clients wait with requests without a pin; the first message of one carries its pin. The
	// pin ends some time after the last request with it, whatever waits at the server.
	group   string
	pin     string // empty for none
	pinKeep int64  // how long after a request with the pin the next one is due
	pinSent int64  // when the last request with it was sent, 0 for none
}

// pull is a request at the server.
type pull struct {
	token     uint64
	batch     int
	idle      bool
	pin       string
	sent      int64
	expires   int64
	heartbeat int64 // 0 for none
}

// demand is what a policy wants from the puller.
type demand struct {
	messages  int           // that may be in transit, beyond those that have arrived
	refill    int           // the fewest messages that are worth a request
	idle      bool          // when messages is 0: an idle pull is to wait at the server
	stay      time.Duration // how long a request may wait at the server
	heartbeat time.Duration // of a request that waits longer than this, 0 for none
	again     int64         // when the demand grows even if nothing happens, 0 for never
}

// pullEvent is what a status means for the owner of the puller.
type pullEvent uint8

const (
	pullGoesOn     pullEvent = iota // plan the next request
	pullWoken                       // an idle pull ended: there are messages
	pullRefused                     // the server refuses such requests; the puller pauses
	pullMoved                       // no server serves the consumer at the moment
	pullUnpinned                    // the pin was lost: another client may get messages
	pullGone                        // the consumer was deleted
	pullStreamGone                  // its stream was deleted
)

// message takes a message of size bytes into account.
func (p *puller) message(now int64, size int) {
	p.heard, p.unserved = now, 0
	p.carried += int64(size)
	if p.size == 0 {
		p.size = int64(size)
	} else {
		p.size += (int64(size) - p.size) / 16
	}
	if p.outstanding == 0 {
		return // from a pull that was given up
	}
	p.release(p.asked / int64(p.outstanding))
	p.outstanding--
	p.clear()
}

// status takes a pull status message into account.
func (p *puller) status(now int64, s pullStatus) pullEvent {
	p.heard = now
	i := slices.IndexFunc(p.pulls, func(q pull) bool { return q.token == s.token })
	if s.kind == statusHeartbeat {
		return pullGoesOn
	}
	var ended pull
	if i >= 0 {
		ended = p.pulls[i]
		p.end(i, s.left)
		p.past = max(p.past, ended.sent)
		if s.code == "408" && s.left > 0 { // it expired
			p.past = max(p.past, min(ended.expires, now))
		}
	}
	switch s.kind {
	case statusNoMessages, statusEnded:
		p.unserved = 0
		return pullGoesOn
	case statusTooLarge:
		p.unserved = 0
		if ended.idle {
			return pullWoken
		}
		// A pull that brought nothing for its size would bring nothing again.
		p.single = p.single || i >= 0 && s.left == ended.batch
		return pullGoesOn
	case statusLimit:
		if p.limits.learn(s.text) {
			return pullGoesOn
		}
	case statusUnpinned:
		p.unserved = 0
		if i < 0 || ended.pin == "" || ended.pin != p.pin {
			return pullGoesOn // the pull was sent before the current pin arrived
		}
		p.pin = ""
		return pullUnpinned
	case statusDeleted:
		return pullGone
	case statusStreamDeleted:
		return pullStreamGone
	case statusMoved:
		p.unserved++
		pause := refusalPause
		if p.unserved < 8 {
			pause = min(movedPause<<(p.unserved-1), refusalPause)
		}
		if p.unserved == 1 && s.code != "503" {
			pause = 0 // there is a new leader already
		}
		p.notBefore = max(p.notBefore, now+int64(pause))
		return pullMoved
	}
	p.notBefore = now + int64(refusalPause)
	return pullRefused
}

// pinned records the pin of a message, and reports whether it is a new one.
func (p *puller) pinned(pin string) (gained bool) {
	if pin == "" || pin == p.pin {
		return false
	}
	p.pin, p.pinSent = pin, 0
	return true
}

// keepPin returns the request that renews the pin, if one is due. Like an idle pull it
// takes no message.
func (p *puller) keepPin(now int64) (r pullRequest, ok bool) {
	if at := p.pinDue(); at == 0 || now < at {
		return r, false
	}
	return p.book(now, pullRequest{batch: 1, maxBytes: 1, expires: min(time.Duration(p.pinKeep), pinStay)}, true), true
}

// pinDue is when the next request with the pin is due, 0 without one.
func (p *puller) pinDue() int64 {
	switch {
	case p.pin == "":
		return 0
	case p.pinSent == 0:
		return 1
	}
	return p.pinSent + p.pinKeep
}

// end removes a pull that delivers left messages fewer than it asked for.
func (p *puller) end(i, left int) {
	ended := p.pulls[i]
	p.pulls = slices.Delete(p.pulls, i, i+1)
	if ended.idle {
		return
	}
	p.outstanding -= left
	// A pull may end without a count of what is left.
	most := 0
	for _, q := range p.pulls {
		if !q.idle {
			most += q.batch
		}
	}
	before := p.outstanding + left
	p.outstanding = min(max(p.outstanding, 0), most)
	if before > 0 {
		p.release(p.asked - p.asked*int64(p.outstanding)/int64(before))
	}
	p.clear()
}

// clear drops the real pulls when none of their messages is outstanding.
func (p *puller) clear() {
	if p.outstanding == 0 {
		p.pulls = slices.DeleteFunc(p.pulls, func(q pull) bool { return !q.idle })
		p.release(p.asked)
	}
}

// forget gives up every pull, since the server no longer knows them, and returns how
// many messages may have been lost in transit.
func (p *puller) forget() (lost int) {
	lost = p.outstanding
	p.pulls, p.outstanding, p.unheard = p.pulls[:0], 0, 0
	p.pinSent = 0
	p.release(p.asked)
	return lost
}

// expire gives up the pulls whose end the server should have announced, and reports
// whether it was silent since then. It does not announce the end of a pull for one
// message that was delivered.
func (p *puller) expire(now int64) (silent bool) {
	for i := 0; i < len(p.pulls); {
		q := p.pulls[i]
		over := q.expires+int64(statusGrace) < now
		missed := q.heartbeat > 0 && now-max(p.heard, q.sent) > 2*q.heartbeat+int64(statusGrace)/4
		if !over && !missed {
			i++
			continue
		}
		if missed || p.heard < q.expires {
			silent = true
			if p.unheard == 0 && !q.idle {
				p.unheard = q.sent
			}
		}
		p.end(i, q.batch)
		i = 0 // end may have removed others
	}
	return silent
}

// wake is when expire or next is to be called even if nothing happens, 0 for never.
func (p *puller) wake(now int64) int64 {
	at := int64(0)
	soonest := func(t int64) {
		if at == 0 || t < at {
			at = t
		}
	}
	for _, q := range p.pulls {
		soonest(q.expires + int64(statusGrace) + 1)
		if q.heartbeat > 0 {
			soonest(max(p.heard, q.sent) + 2*q.heartbeat + int64(statusGrace)/4 + 1)
		}
	}
	if p.open && p.notBefore > now {
		soonest(p.notBefore)
	}
	return at
}

// next returns the request that meets a demand, if there is one to send.
func (p *puller) next(now int64, d demand) (r pullRequest, ok bool) {
	if !p.open || now < p.notBefore {
		return r, false
	}
	p.budget.carry(now, p.carried)
	p.carried = 0
	real := d.messages > 0
	if !real {
		if !d.idle || len(p.pulls) > 0 {
			return r, false
		}
		r = pullRequest{batch: 1, maxBytes: 1, expires: d.stay, heartbeat: d.heartbeat}
	} else {
		n := d.messages - p.outstanding
		if n < max(d.refill, 1) {
			return r, false
		}
		if p.single {
			n = 1
		}
		if p.limits.batch > 0 {
			n = min(n, p.limits.batch)
		}
		per, most := max(p.size, 1), n
		// When bytes are short, wait for more rather than send many small requests.
		if n = p.budget.grant(now, n, per, p.outstanding == 0); n == 0 || n < most && n < min(p.outstanding, d.messages-p.outstanding)/2 {
			p.budget.release(int64(n) * per)
			p.starved = true
			return r, false
		}
		r = pullRequest{batch: n, expires: d.stay, heartbeat: d.heartbeat}
		switch {
		case p.budget != nil && n > 1:
			// The next messages may be larger than the last ones. A pull for one message
			// needs no bound, and without one no status message about its end.
			r.maxBytes = max(4*int64(n)*per, minPullBytes)
		case p.short && !p.single && p.limits.bytes == 0:
			r.maxBytes = math.MaxInt32 // any message fits
		}
		p.starved, p.single = false, false
		p.outstanding += n
		p.asked += int64(n) * per
	}
	return p.book(now, r, !real), true
}

// book applies the consumer's limits to r, and records the pull.
func (p *puller) book(now int64, r pullRequest, idle bool) pullRequest {
	if r.heartbeat > 0 && r.expires <= r.heartbeat {
		r.heartbeat = 0 // its end is announced before a heartbeat would be due
	}
	r = p.limits.apply(r)
	p.tokens++
	r.token, r.group, r.pin = p.tokens, p.group, p.pin
	if r.pin != "" {
		p.pinSent = now
	}
	p.pulls = append(p.pulls, pull{
		token: r.token, batch: r.batch, idle: idle, pin: r.pin,
		sent: now, expires: now + int64(r.expires), heartbeat: int64(r.heartbeat),
	})
	return r
}

// waitsUntil is when the last real pull ends at the server, 0 for none.
func (p *puller) waitsUntil() (at int64) {
	for _, q := range p.pulls {
		if !q.idle {
			at = max(at, q.expires)
		}
	}
	return at
}

// since is when the oldest real pull was sent that may still deliver messages, or now if
// there is none. The server delivered no message that arrives now before that time, nor
// before it announced the end of another pull. The server does not announce the end of an
// unbounded pull that has delivered all: that one stays for statusGrace longer.
func (p *puller) since(now int64) int64 {
	if p.unheard != 0 {
		return p.unheard
	}
	for _, q := range p.pulls {
		if !q.idle {
			return max(q.sent, p.past)
		}
	}
	return now
}

// release gives bytes back to the budget.
func (p *puller) release(bytes int64) {
	p.asked -= bytes
	p.budget.release(bytes)
}
