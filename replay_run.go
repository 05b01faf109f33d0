package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// ReplayInactive is how long the server keeps the consumer of a replay whose
	// process is gone.
	ReplayInactive = time.Minute
	// replayBurst is how many messages are taken in at a time.
	replayBurst = 64
	// replayRun is how many messages a worker gets at once, and replayTurn when it
	// leaves what it did not start yet to the next turn.
	replayRun  = 32
	replayTurn = 200 * time.Microsecond
	// replayWindow is how many messages may be here or on their way.
	replayWindow = 2048
	// replayBytes is how much of a replay may be here before it asks for more, and
	// how much it asks for at once.
	replayBytes = 16 << 20
	// replayAhead is how far other messages may get ahead of the slowest handler.
	replayAhead = 1 << 16
	// replayBeat is how often the server tells that a pull has nothing to bring.
	replayBeat = time.Second
)

// replay is one replay under way.
//
// It reads through an ephemeral pull consumer that acknowledges nothing, in the
// manner of an ordered consumer: whatever casts doubt on it (a gap in its
// sequence, missed heartbeats, a reconnect, its end) has it replaced by one that
// starts behind the last message received. What was received waits in up to three
// places: early until it is due, keys while another message of its key is in hand,
// backlog for one of the replay's handlers. Only what may run is in the pool.
//
// The goroutine of the caller watches over it (supervise), one of its own releases
// what is due, and one tells the progress.
type replay struct {
	route
	want    ReplaySpec
	started time.Time

	// intake ends with the caller's context, the broker or the first failure;
	// serving is what handlers run under.
	intake    context.Context
	endIntake context.CancelFunc
	serving   context.Context
	abort     context.CancelCauseFunc
	wake      chan struct{} // tells supervise to look; capacity 1
	first     chan struct{} // tells the pacing that early is not empty any more; capacity 1

	// Fixed once located.
	stream   string
	created  time.Time
	inactive time.Duration // threshold of the consumers
	end      uint64        // last sequence of the replay
	endTime  int64         // Unix nanoseconds of the last message, 0 when unknown
	total    uint64        // as counted at the start
	inbox    string

	arrivals []arrival      // of receiveAll, kept for the next burst
	place    placeParser    // of receiveAll
	msgs     chan *nats.Msg // what comes in; never closed, has room for all that may be on its way
	closing  chan struct{}  // closed to end receiveAll
	joined   chan struct{}  // closed when it has ended; nil before it begins

	// Of the caller's goroutine.
	inlet *nats.Subscription
	owned []string // consumers that may exist

	cut     atomic.Uint64 // nothing above this sequence is started
	through atomic.Uint64 // the last sequence that a worker is done with

	// Guarded by the pool's mutex.
	consumer    string // empty while there is none to trust
	seqHere     uint64 // consumer sequence of the last message
	received    uint64 // stream sequence of the last message
	taken       int    // messages received
	pulling     bool
	pulls       []pull
	outstanding int
	tokens      uint64
	heard       int64 // engine time of the last word from the server
	limits      pullLimits
	doubt       bool // the consumer is to be replaced
	verify      bool // there may be nothing more
	complete    bool // everything was received
	stopping    bool
	cause       error // of stopping, nil for a failure alone
	failure     *ReplayFailure
	located     bool // received is where the replay is

	pace    tempo
	early   fifo[*delivery]
	keys    *keyedQueue // nil without an order
	backlog fifo[*delivery]
	fed     uint64    // highest sequence given to the pool
	atWork  *delivery // first of the run of messages given to the pool
	// Handlers are left running: what they do is not in the report any more.
	abandoned bool
	hand      ledger
	bytes     int   // of what is in hand
	current   int64 // stream time of the last message handled
	report    ReplayReport
}

// pullLimits are the server's on pulls of this consumer; 0 is none.
type pullLimits struct {
	batch, bytes int
	expires      time.Duration
}

func newReplay(ctx context.Context, e *engine, want ReplaySpec) *replay {
	r := &replay{
		want: want, started: time.Now(),
		wake: make(chan struct{}, 1), first: make(chan struct{}, 1), closing: make(chan struct{}),
		arrivals: make([]arrival, 0, replayBurst),
	}
	r.init(e, Spec{route: RouteBuilder{filter: want.replay.filter}, handler: want.handler}, r)
	r.limit = want.replay.concurrency(e.workers)
	r.intake, r.endIntake = context.WithCancel(ctx)
	r.serving, r.abort = context.WithCancelCause(context.WithoutCancel(ctx))
	r.cut.Store(math.MaxUint64)
	r.pace.speed = want.replay.speed
	if want.replay.set&replayOrderedBy != 0 {
		r.keys = newKeyedQueue(want.replay.order)
	}
	if at := want.replay.start(); at.seq > 0 {
		r.received, r.located = at.seq-1, true
	}
	return r
}

// carryOut does the replay.
func (r *replay) carryOut(ctx context.Context) (ReplayReport, error) {
	defer r.endIntake()
	defer r.abort(context.Canceled)
	unlink := context.AfterFunc(r.eng.intake, func() {
		if ctx.Err() == nil {
			r.halt(ErrBrokerStopped)
		}
	})
	defer unlink()
	unserve := context.AfterFunc(r.eng.handlers, func() { r.abort(context.Cause(r.eng.handlers)) })
	defer unserve()
	watch := watchAsync(r.eng.nc, r.onAsyncError)
	defer watch.stop()
	status := r.eng.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer r.eng.nc.RemoveStatusListener(status)

	var helpers sync.WaitGroup
	if r.pace.speed > 0 {
		helpers.Go(r.releaseDue)
	}
	if r.want.progress != nil {
		helpers.Go(r.tellProgress)
	}
	if err := r.open(); err != nil {
		r.halt(err)
	}
	cut := r.supervise(ctx, status)
	r.endIntake()
	helpers.Wait()
	r.close()
	if r.want.progress != nil {
		r.want.progress(r.progress())
	}
	return r.result(cut)
}

// result is the report and the error of a replay that is over.
func (r *replay) result(cut error) (ReplayReport, error) {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	rep := r.report
	rep.Stream, rep.Started, rep.Took = r.stream, r.started, time.Since(r.started)
	if lowest, any := r.hand.lowest(); any {
		rep.Next = lowest
	} else if r.located {
		rep.Next = r.received + 1
		if r.complete && !r.limited() {
			rep.Next = max(r.received, r.end) + 1
		}
	}
	errs := []error{r.cause}
	if r.failure != nil {
		errs = append(errs, r.failure)
	}
	errs = append(errs, cut)
	return rep, joined(errs)
}

// joined is errors.Join that leaves a single error as it is.
func joined(errs []error) error {
	var only error
	for _, err := range errs {
		if err == nil {
			continue
		}
		if only != nil {
			return errors.Join(errs...)
		}
		only = err
	}
	return only
}

func (r *replay) limited() bool {
	return r.want.replay.set&replayLimit != 0 && r.taken >= r.want.replay.limit
}

// supervise returns when all is handled, or after a stop what was started. It
// returns a DrainError when handlers had to be cut off.
func (r *replay) supervise(ctx context.Context, status <-chan nats.Status) error {
	tick := time.NewTicker(replayBeat / 5)
	defer tick.Stop()
	ended := r.intake.Done()
	var late <-chan time.Time
	var cut *DrainError
	pause, mark := time.Duration(0), uint64(0) // a consumer that brings nothing is not replaced at once
	for {
		p := r.eng.pool
		p.mu.Lock()
		over, stopping, doubt, verify, received := r.over(), r.stopping, r.doubt, r.verify, r.received
		if !stopping && r.silent() {
			doubt = true
			r.distrust()
		}
		p.mu.Unlock()
		switch {
		case over:
			if cut != nil {
				return cut
			}
			return nil
		case stopping:
			ended = nil
			if late == nil {
				late = time.After(r.eng.drainTimeout)
			}
		case doubt:
			if received > mark {
				pause, mark = 0, received
			}
			if !wait(r.intake, pause) {
				break
			}
			pause = min(2*pause+50*time.Millisecond, 2*time.Second)
			if err := r.replace(); err != nil {
				r.halt(err)
			}
			continue
		case verify:
			if err := r.verifyEnd(received); err != nil {
				r.halt(err)
			}
			continue
		}
		select {
		case <-ended:
			ended = nil
			if err := ctx.Err(); err != nil {
				r.halt(err)
			}
		case s := <-status:
			switch s {
			case nats.CLOSED:
				r.halt(r.want.fault("", "", cause(ErrConnectionClosed), ErrConnectionClosed))
			case nats.CONNECTED:
				p.mu.Lock()
				r.distrust()
				p.mu.Unlock()
			}
		case <-r.wake:
		case <-tick.C:
		case <-late:
			p.mu.Lock()
			left := r.running + r.queue.len()
			p.mu.Unlock()
			if cut == nil {
				cut = &DrainError{Timeout: r.eng.drainTimeout, Abandoned: left}
				r.abort(ErrDrainTimeout)
				late = time.After(DrainGrace)
				continue
			}
			cut.Running = left
			r.leave()
			return cut
		}
	}
}

// leave gives up on handlers that do not return. What a worker has done before it
// came upon such a one counts.
func (r *replay) leave() {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	r.abandoned = true
	through := r.through.Load()
	for d := r.atWork; d != nil && d.msg.seq <= through; d = d.next {
		r.book(d)
	}
}

// over tells whether nothing is left to do. The pool is locked.
func (r *replay) over() bool {
	if r.stopping {
		return r.running == 0 && r.queue.len() == 0 && r.backlog.len() == 0
	}
	return r.complete && r.hand.len() == 0
}

// halt stops the replay: what was given to the pool is finished, nothing more.
func (r *replay) halt(err error) {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.stopping || r.complete && r.hand.len() == 0 {
		return
	}
	r.cause = err
	r.stopAt(r.fed)
	r.feed(p.put)
}

// stopAt stops the replay behind a sequence. The pool is locked.
func (r *replay) stopAt(seq uint64) {
	r.stopping, r.pulling = true, false
	r.cut.Store(min(r.cut.Load(), seq))
	r.early = fifo[*delivery]{}
	r.endIntake()
	r.tell()
}

// tell has supervise look.
func (r *replay) tell() { notify(r.wake) }

func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

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
			msg:     Msg{Subject: m.Subject, Data: m.Data, Header: m.Header, stream: r.stream, seq: info.sequence, time: info.time},
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
	r.taken++
	r.hand.push(seq, a.size)
	r.bytes += a.size
	switch {
	case seq == r.end || r.limited():
		r.complete = true
	case a.info.pending == 0:
		r.verify = true
		r.tell()
	}
	if r.pace.speed == 0 {
		r.admit(a.d)
		return
	}
	a.d.due = r.pace.due(a.info.time, now)
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
	if !r.pulling || r.complete || r.stopping || r.bytes > replayBytes || r.hand.len()+r.outstanding > replayAhead {
		return pull{}
	}
	inHand := r.early.len() + r.backlog.len() + r.queue.len() + r.running
	if r.keys != nil {
		inHand += r.keys.waiting
	}
	want := replayWindow - inHand - r.outstanding
	if want < replayWindow/2 {
		return pull{}
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

// admit passes a message that is due towards the pool. The pool is locked.
func (r *replay) admit(d *delivery) {
	if r.keys != nil && !r.keys.admit(d) {
		return
	}
	r.backlog.push(d)
	r.feed(r.eng.pool.put)
}

// feed gives the pool what may run. The pool is locked.
//
// A replay with one handler hands over a run of messages at a time, linked by
// next: a fast handler then costs the pool little. What the worker leaves of it
// comes back with finish.
func (r *replay) feed(put func(*lane, *delivery)) {
	if !r.stopping && r.intake.Err() != nil {
		return // about to be halted, which feeds what is to be finished
	}
	for r.backlog.len() > 0 && r.running+r.queue.len() < r.limit {
		d := r.backlog.pop()
		if d.msg.seq > r.cut.Load() {
			continue
		}
		r.fed = max(r.fed, d.msg.seq)
		if r.limit == 1 && r.keys == nil {
			for last, n := d, 1; n < replayRun && r.backlog.len() > 0; n++ {
				last.next = r.backlog.pop()
				last = last.next
			}
			r.atWork = d
		}
		put(&r.lane, d)
	}
}

// run handles a message on a worker, and those linked to it for as long as that
// is no long time.
func (r *replay) run(d *delivery) {
	end := r.eng.now() + int64(replayTurn)
	for began := end - int64(replayTurn); d != nil && d.msg.seq <= r.cut.Load() && began < end; d = d.next {
		d.began = began
		r.attempt(d, r.want.replay.timeout)
		r.through.Store(d.msg.seq)
		if began = d.ended; d.outcome == Failed && !r.want.replay.continuing || r.intake.Err() != nil {
			return
		}
	}
}

// conclude takes the result of a handler.
func (r *replay) conclude(d *delivery, err error) {
	d.err, d.outcome = err, Succeeded
	if err != nil {
		d.outcome = Failed
		if _, ok := errors.AsType[*discardError](err); ok {
			d.outcome = Discarded
		}
	}
	r.observe(d)
}

// finish books what a worker is done with. The pool is locked.
func (r *replay) finish(d *delivery) pull {
	if r.abandoned {
		return pull{}
	}
	r.atWork = nil
	for d != nil && d.outcome != "" {
		next := d.next
		d.next = nil
		r.book(d)
		d = next
	}
	if d != nil && !r.stopping {
		r.returned(d)
	}
	r.feed(r.eng.pool.refill)
	if r.over() {
		r.tell()
	}
	return r.plan(r.eng.now())
}

// returned puts back what a worker left of a run of messages.
func (r *replay) returned(d *delivery) {
	var run [replayRun]*delivery
	n := 0
	for ; d != nil; n++ {
		run[n] = d
		d, d.next = d.next, nil
	}
	for n--; n >= 0; n-- {
		r.backlog.pushFront(run[n])
	}
}

// book takes a handled message into account. The pool is locked.
func (r *replay) book(d *delivery) {
	seq := d.msg.seq
	rep := &r.report
	if rep.First == 0 || seq < rep.First {
		rep.First = seq
	}
	rep.Last = max(rep.Last, seq)
	r.current = d.msg.time
	settled := true
	if d.outcome == Failed {
		rep.Failed++
		failure := &ReplayFailure{Replay: r.want.replay.filter, Stream: r.stream, Sequence: seq, Subject: d.msg.Subject, Err: d.err}
		if len(rep.Failures) < MaxReplayFailures {
			rep.Failures = append(rep.Failures, failure)
		}
		if !r.want.replay.continuing {
			settled = false
			if r.failure == nil || seq < r.failure.Sequence {
				r.failure = failure
			}
			r.stopAt(seq)
		}
	} else {
		rep.Handled++
	}
	if settled {
		r.bytes -= r.hand.settle(seq)
	}
	if r.keys != nil {
		if next := r.keys.release(d); next != nil {
			r.backlog.push(next)
		}
	}
}

// releaseDue passes on what waits for its time.
func (r *replay) releaseDue() {
	p := r.eng.pool
	for {
		p.mu.Lock()
		now, pause := r.eng.now(), time.Duration(-1)
		for r.early.len() > 0 {
			if due := r.early.peek().due; due > now {
				pause = time.Duration(due - now)
				break
			}
			r.admit(r.early.pop())
		}
		p.mu.Unlock()
		if pause < 0 {
			select {
			case <-r.first:
			case <-r.intake.Done():
				return
			}
		} else if !wait(r.intake, pause) {
			return
		}
	}
}

// tellProgress calls the progress function while the replay moves.
func (r *replay) tellProgress() {
	told := uint64(0)
	for wait(r.intake, progressEvery) {
		if now := r.progress(); now.Done != told && r.intake.Err() == nil {
			told = now.Done
			r.want.progress(now)
		}
	}
}

func (r *replay) progress() ReplayProgress {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	g := ReplayProgress{Done: r.report.Handled + r.report.Failed, Total: r.total, Elapsed: time.Since(r.started)}
	g.Total = max(g.Total, g.Done)
	switch left := g.Total - g.Done; {
	case left == 0 || g.Done == 0:
	case r.pace.speed > 0 && r.endTime > 0:
		g.Remaining = time.Duration(max(float64(r.endTime-r.current)/r.pace.speed, 0))
	default:
		g.Remaining = time.Duration(float64(g.Elapsed) / float64(g.Done) * float64(left))
	}
	return g
}

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
