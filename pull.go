package natsx

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// status handles a word of the server about a pull: a heartbeat, its end or a
// refusal.
func (r *durableRoute) status(m *nats.Msg, now int64) {
	code, text := m.Header.Get("Status"), m.Header.Get("Description")
	if code == "100" || code == "" {
		return
	}
	token, _ := strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 10, 64)
	left, _ := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
	var refused error
	doubt := false

	p := r.eng.pool
	p.mu.Lock()
	asked := r.ended(token, left)
	switch {
	case code == "404" || code == "408",
		strings.HasPrefix(text, "Batch Completed"):
		r.doubts = 0
	case strings.HasPrefix(text, "Message Size Exceeds MaxBytes"):
		// When it brought nothing, the next one like it would not either.
		r.single = r.single || left == asked
	case strings.HasPrefix(text, "Exceeded MaxRequestBatch of "):
		if n, err := strconv.Atoi(strings.TrimPrefix(text, "Exceeded MaxRequestBatch of ")); err == nil && n > 0 {
			r.target.maxBatch = n
		}
	case strings.HasPrefix(text, "Exceeded"):
		r.notBefore = now + int64(pullPause)
		refused = &pullError{code, text}
	default:
		// The consumer's or the stream's end, a new leader, a server that shuts
		// down, nobody there: only the consumer's info tells which, where it may be
		// asked for. Where that is well again and again, pulls are not.
		doubt = true
		switch text {
		case "Consumer Deleted":
			r.gone = ErrConsumerDeleted
		case "Stream Deleted":
			r.gone = ErrStreamDeleted
		}
		if r.doubts++; r.doubts > 2 {
			r.notBefore = now + int64(pullPause)
			refused = &pullError{code, text}
		}
	}
	var next pull
	if !doubt {
		next = r.plan(now)
	}
	p.mu.Unlock()
	if refused != nil {
		r.trouble("pull", refused)
	}
	if doubt {
		r.verify(true)
		return
	}
	r.pull(next)
}

// errCrowded is the trouble of a route whose waiting retries leave the server no
// room for new messages.
var errCrowded = errors.New("natsx: messages that wait for their retry fill MaxAckPending")

func (e *pullError) Error() string { return "natsx: pull refused: " + e.code + " " + e.text }

// ended removes the pull with this token, which brings left messages less than
// it asked for, and returns what that was. The pool is locked.
func (r *durableRoute) ended(token uint64, left int) (asked int) {
	for i := range r.pulls {
		if r.pulls[i].token == token {
			asked = r.pulls[i].batch
			r.pulls = append(r.pulls[:i], r.pulls[i+1:]...)
			r.outstanding -= left
			r.boundOutstanding()
			break
		}
	}
	return asked
}

// boundOutstanding mends the count after a pull ended without saying how much of
// it was left. The pool is locked.
func (r *durableRoute) boundOutstanding() {
	most := 0
	for _, p := range r.pulls {
		most += p.batch
	}
	r.outstanding = min(max(r.outstanding, 0), most)
}

// plan decides on the next pull and books it. The pool is locked.
//
// In hand and asked for may be as many messages as the route gets workers, its
// allowance, plus what it gets done within the lookahead. An idle route asks for
// its part of the pool, since all idle routes may be hit at once; a busy one for
// what is free, at least its share. A slow handler's lookahead is nothing: then
// the pull is exact. A fast handler's is deep, and is refilled at half.
//
// While nothing comes, each pull stays for as long as nothing came before it, and
// one message is enough to tell that this is over.
func (r *durableRoute) plan(now int64) pull {
	if !r.pulling || r.letters.down || now < r.notBefore {
		return pull{}
	}
	p := r.eng.pool
	inHand := r.running + r.queue.len()
	allowance := max(p.size/max(r.eng.durables, 1), 1)
	if inHand > 0 {
		allowance = max(p.share(), inHand+p.free())
	}
	allowance = min(allowance, r.limit)
	ahead := 0
	if r.mean > 0 {
		within := float64(min(lookahead, r.target.ackWait/50))
		ahead = int(min(float64(allowance)*within/r.mean, deepest))
	}
	want := allowance + ahead - inHand - r.outstanding
	// Small pulls add up: the next one doubles what is asked for, so that a few
	// requests are at the server and not one for each worker.
	if want < max(1, ahead/2, min(r.outstanding, allowance-1)) {
		return pull{}
	}
	stay := min(max(time.Duration(now-r.arrived), briefPull), pullExpires)
	if stay > briefPull {
		if r.outstanding > 0 {
			return pull{}
		}
		want = 1
	}
	if most := r.target.maxExpires; most > 0 {
		stay = min(stay, most)
	}
	if r.target.maxBatch > 0 {
		want = min(want, r.target.maxBatch)
	}
	if r.single {
		want, r.single = 1, false
	}
	r.tokens++
	next := pull{batch: want, token: r.tokens, sent: now, expires: now + int64(stay)}
	r.pulls = append(r.pulls, next)
	r.outstanding += want
	return next
}

// pull sends a planned pull (the pull protocol of ADR-13). A failure to send is
// found by the missing heartbeats.
func (r *durableRoute) pull(next pull) {
	// A pull that waited for a reconnect would come on top of the new ones.
	if next.batch == 0 || !r.eng.nc.IsConnected() {
		return
	}
	expires := time.Duration(next.expires - next.sent)
	b := make([]byte, 0, 128)
	b = strconv.AppendInt(append(b, `{"expires":`...), int64(expires), 10)
	b = strconv.AppendInt(append(b, `,"batch":`...), int64(next.batch), 10)
	if expires > r.heartbeat { // else its end comes in time for one
		b = strconv.AppendInt(append(b, `,"idle_heartbeat":`...), int64(min(r.heartbeat, expires/3)), 10)
	}
	// A pull that cannot bring too much needs no bound, and then no word from
	// the server about its end either.
	biggest := r.eng.nc.MaxPayload() + 4096
	if bytes := max(pullBytes, biggest); int64(next.batch)*biggest > bytes {
		if most := r.target.maxBytes; most > 0 {
			bytes = min(bytes, int64(most))
		}
		b = strconv.AppendInt(append(b, `,"max_bytes":`...), bytes, 10)
	}
	b = append(b, '}')
	reply := *r.inbox.Load() + "." + strconv.FormatUint(next.token, 10)
	if err := r.eng.nc.PublishRequest(r.target.nextSubject, reply, b); err != nil {
		r.log.Debug("natsx: pull not sent", "error", err)
	}
}
