package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// orderedScript plays the owner of an ordered, with a clock of its own.
type orderedScript struct {
	o    ordered
	now  int64
	name int    // of the consumer
	here uint64 // its last consumer sequence
}

// orderedEvent is something that happens, and what is to be done about it: a verdict on a
// message, the pulls, and then one step.
type orderedEvent struct {
	what func(s *orderedScript) (verdict string)
	want string
}

const (
	scriptWindow = 4
	scriptRefill = 2
	// silentFor is how long a server may be silent while a pull waits.
	silentFor = 2*orderedBeat + statusGrace/4
)

// play makes the events of a script happen.
func (s *orderedScript) play(t *testing.T, events []orderedEvent) {
	t.Helper()
	s.o.pause.tries = 0
	s.o.session, s.o.up = 1, true
	for i, e := range events {
		s.now += int64(time.Millisecond)
		var did []string
		if verdict := e.what(s); verdict != "" {
			did = append(did, verdict)
		}
		for {
			next, ok := s.o.pull(s.now, demand{messages: scriptWindow, refill: scriptRefill, stay: orderedStay, heartbeat: orderedBeat})
			if !ok {
				break
			}
			did = append(did, fmt.Sprintf("pull %d", next.batch))
		}
		switch step := s.o.next(s.now); step.kind {
		case stepWait:
			did = append(did, "wait")
			if at := time.Duration(step.at - s.now); s.o.consumer == "" && s.o.up {
				did = append(did, at.String())
			}
		case stepCreate:
			from := fmt.Sprint("create ", step.start.seq)
			if step.start.seq == 0 {
				from = "create at " + step.start.time.UTC().Format(time.TimeOnly)
			}
			if s.o.doubtful {
				from += " carefully"
			}
			did = append(did, from)
		case stepAsk:
			did = append(did, fmt.Sprint("ask ", step.seq))
		case stepDone:
			did = append(did, "done")
		case stepFail:
			did = append(did, "fail: "+cause(step.err))
		}
		if got := strings.Join(did, ", "); got != e.want {
			t.Errorf("event %d: got %q, want %q", i+1, got, e.want)
		}
	}
}

// orderedEvents makes the events of a script.
type orderedEvents struct{}

var on orderedEvents

func (orderedEvents) begin(s *orderedScript) string { return "" }

// made is a consumer with so many messages ahead.
func (orderedEvents) made(pending int) func(*orderedScript) string {
	return on.madeWith(jetstream.ConsumerInfo{NumPending: uint64(pending)})
}

func (orderedEvents) madeWith(info jetstream.ConsumerInfo) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.name, s.here = s.name+1, 0
		info.Name = fmt.Sprint("C", s.name)
		s.o.created(s.now, &info)
		return ""
	}
}

func (orderedEvents) notMade(err error) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.o.notCreated(s.now, err)
		return ""
	}
}

// got is the next message of the consumer, which has so many left.
func (orderedEvents) got(seq uint64, pending int) func(*orderedScript) string {
	return on.gotAt(seq, pending, noon)
}

func (orderedEvents) gotAt(seq uint64, pending int, stored time.Time) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.here++
		return s.message(fmt.Sprint("C", s.name), seq, s.here, pending, stored)
	}
}

func (s *orderedScript) message(consumer string, seq, here uint64, pending int, stored time.Time) string {
	m := ackInfo{stream: "S", consumer: consumer, sequence: seq, consumerSeq: here, pending: uint64(pending), time: stored.UnixNano()}
	if s.o.message(s.now, m, 100) {
		return "take"
	}
	return "skip"
}

// gap is a message behind one that did not come.
func (orderedEvents) gap(seq uint64) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.here++
		return on.got(seq, 9)(s)
	}
}

// late is a message of the consumer before.
func (orderedEvents) late(seq, here uint64) func(*orderedScript) string {
	return func(s *orderedScript) string { return s.message(fmt.Sprint("C", s.name-1), seq, here, 9, noon) }
}

// told is a status of the last pull, or of the one so many before.
func (orderedEvents) told(code, text string, left int, before ...int) func(*orderedScript) string {
	return func(s *orderedScript) string {
		token := s.o.puller.tokens
		for _, n := range before {
			token -= uint64(n)
		}
		m := &nats.Msg{Subject: "_INBOX.x." + utoa(token), Header: nats.Header{"Status": {code}, "Description": {text}}}
		if left > 0 {
			m.Header.Set("Nats-Pending-Messages", fmt.Sprint(left))
		}
		s.o.status(s.now, parseStatus(m))
		return ""
	}
}

// answer is the leader's: the first message that was not received, 0 for none.
func (orderedEvents) answer(seq uint64, err error) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.o.answered(s.now, seq, err, false)
		return ""
	}
}

// answerAfter is the leader's answer when something has come in meanwhile.
func (orderedEvents) answerAfter(seq uint64) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.o.answered(s.now, seq, nil, true)
		return ""
	}
}

func (orderedEvents) link(up bool, session int64) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.o.connection(s.now, up, session)
		return ""
	}
}

// after lets time pass.
func (orderedEvents) after(d time.Duration) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.now += int64(d) - int64(time.Millisecond)
		return ""
	}
}

// busy is the owner's time with what it received.
func (orderedEvents) busy(d time.Duration, then func(*orderedScript) string) func(*orderedScript) string {
	return func(s *orderedScript) string {
		s.now += int64(d)
		s.o.resume(s.now)
		return then(s)
	}
}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

var (
	errPasses   = fmt.Errorf("natsx: nobody answers: %w", nats.ErrTimeout)
	errNoStream = &jetstream.APIError{Code: 404, ErrorCode: codeStreamNotFound, Description: "stream not found"}
	errDenied   = &PermissionError{Operation: "publish", Subject: "x", Err: nats.ErrPermissionViolation}
)

func TestOrdered(t *testing.T) {
	t.Parallel()
	toFive := newOrdered(startPoint{seq: 1}, 5)
	fromNoon := newOrdered(startPoint{time: noon}, 50)
	tool := func(single bool) ordered {
		o := newOrdered(startPoint{seq: 1}, 50)
		o.lenient, o.single, o.patience = true, single, 30*time.Second
		return o
	}
	long := newOrdered(startPoint{seq: 1}, 50)
	middle := newOrdered(startPoint{seq: 20}, 50)
	for name, c := range map[string]struct {
		of     ordered
		events []orderedEvent
	}{
		"from the first to the last": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(5), "pull 4, wait"},
			{on.got(1, 4), "take, pull 1, wait"}, {on.got(2, 3), "take, wait"}, {on.got(3, 2), "take, wait"},
			{on.got(4, 1), "take, wait"}, {on.got(5, 0), "take, done"}, {on.got(6, 0), "skip, done"},
		}},
		"a window at a time": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"},
			{on.got(1, 49), "take, wait"}, {on.got(2, 48), "take, pull 2, wait"}, {on.got(3, 47), "take, wait"}, {on.got(4, 46), "take, pull 2, wait"},
		}},
		"it ends between two messages": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(9), "pull 4, wait"}, {on.got(3, 8), "take, wait"}, {on.got(7, 7), "skip, done"},
		}},
		"it begins behind its end": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.madeWith(jetstream.ConsumerInfo{Delivered: jetstream.SequenceInfo{Stream: 7}, NumPending: 3}), "done"},
		}},
		"there is nothing": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(0), "pull 4, ask 1"}, {on.answer(0, nil), "done"},
		}},
		"there is nothing but behind it": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(0), "pull 4, ask 1"}, {on.answer(6, nil), "done"},
		}},
		"its end is deleted": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(5), "pull 4, wait"}, {on.got(1, 1), "take, pull 1, wait"}, {on.got(2, 0), "take, ask 3"}, {on.answer(0, nil), "done"},
		}},
		"its end is deleted, which nobody has counted": {toFive, []orderedEvent{
			{on.begin, "create 1"}, {on.made(5), "pull 4, wait"}, {on.got(1, 4), "take, pull 1, wait"},
			{on.told("100", "Idle Heartbeat", 0), "ask 2"}, {on.answer(0, nil), "done"},
		}},
		"a replica lags behind": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(2), "pull 4, wait"}, {on.got(1, 1), "take, wait"}, {on.got(2, 0), "take, pull 2, ask 3"},
			{on.answer(3, nil), "create 3"}, {on.made(0), "pull 4, ask 3"},
			{on.answer(3, nil), "wait, 50ms"}, {on.after(50 * time.Millisecond), "create 3"}, {on.made(0), "pull 4, ask 3"},
			{on.answer(3, nil), "wait, 100ms"}, {on.after(100 * time.Millisecond), "create 3"}, {on.made(9), "pull 4, wait"},
			{on.got(3, 8), "take, wait"}, {on.got(9, 0), "take, pull 2, ask 10"}, {on.answer(10, nil), "create 10"},
		}},
		"a replica that lags behind starts too early": {middle, []orderedEvent{
			{on.begin, "create 20"}, {on.made(31), "pull 4, wait"}, {on.got(18, 30), "skip, wait"}, {on.got(19, 29), "skip, pull 2, wait"}, {on.got(20, 28), "take, wait"},
		}},
		"a replica that does not know the time": {fromNoon, []orderedEvent{
			{on.begin, "create at 12:00:00"}, {on.madeWith(jetstream.ConsumerInfo{Delivered: jetstream.SequenceInfo{Stream: 6}, NumPending: 9}), "pull 4, wait"},
			{on.gotAt(7, 8, noon.Add(-2)), "skip, wait"}, {on.gotAt(8, 7, noon.Add(-1)), "skip, pull 2, wait"},
			{on.gap(11), "skip, create 9"}, {on.made(9), "pull 4, wait"}, {on.gotAt(9, 8, noon.Add(-1)), "skip, wait"},
			{on.gotAt(10, 7, noon), "take, pull 2, wait"}, {on.gotAt(11, 6, noon.Add(-1)), "take, wait"}, // its clock was put back
		}},
		"a message is missing": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.got(3, 48), "take, pull 2, wait"}, // 2 is of another subject
			{on.gap(6), "skip, create 4"}, {on.late(7, 4), "skip, create 4"},
			{on.made(47), "pull 4, wait"}, {on.late(8, 5), "skip, wait"}, {on.told("408", "Request Timeout", 2, 1), "wait"},
			{on.got(4, 46), "take, wait"}, {on.got(5, 45), "take, pull 2, wait"},
		}},
		"the first message is missing, again and again": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.gap(2), "skip, wait, 50ms"}, {on.after(49 * time.Millisecond), "wait, 1ms"}, {on.after(time.Millisecond), "create 1"},
			{on.made(50), "pull 4, wait"}, {on.gap(2), "skip, wait, 100ms"}, {on.after(time.Second), "create 1"},
			{on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.gap(3), "skip, create 2"},
			{on.made(49), "pull 4, wait"}, {on.gap(3), "skip, wait, 50ms"},
		}},
		"a pull that finds nothing": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("404", "No Messages", 0), "pull 4, ask 1"}, {on.answer(51, nil), "done"},
		}},
		"a pull that expires": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"},
			{on.told("408", "Request Timeout", 3), "pull 4, ask 2"}, {on.answer(2, nil), "create 2"},
		}},
		"a pull that expires when it has brought all": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.got(2, 48), "take, pull 2, wait"},
			{on.told("409", "Batch Completed", 0, 1), "pull 2, wait"}, {on.got(3, 47), "take, wait"},
		}},
		"an expiry and a message together": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("100", "Idle Heartbeat", 0), "ask 1"}, {on.got(1, 49), "take, wait"},
		}},
		"a message comes while the leader is asked": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("100", "Idle Heartbeat", 0), "ask 1"},
			{on.answerAfter(1), "wait"}, {on.got(1, 49), "take, wait"}, {on.told("100", "Idle Heartbeat", 0), "ask 2"}, {on.answerAfter(0), "done"},
		}},
		"a pull is too small for a message": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("409", "Message Size Exceeds MaxBytes", 4), "pull 1, pull 3, wait"},
			{on.got(1, 49), "take, wait"}, {on.got(2, 48), "take, pull 2, wait"},
			{on.told("409", "Message Size Exceeds MaxBytes", 1), "wait"}, // one that has brought something
		}},
		"a limit of the consumer": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.madeWith(jetstream.ConsumerInfo{NumPending: 50, Config: jetstream.ConsumerConfig{MaxRequestBatch: 2}}), "pull 2, pull 2, wait"},
			{on.got(1, 49), "take, wait"}, {on.got(2, 48), "take, pull 2, wait"},
		}},
		"a limit that it is told of": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("409", "Exceeded MaxRequestBatch of 3", 0), "pull 3, wait"},
			{on.told("409", "Exceeded MaxRequestExpires of 10ms", 0), "pull 3, wait"},
			{on.told("409", "Exceeded MaxRequestWhatever of 10", 0), "wait, 50ms"},
		}},
		"its consumer is deleted": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.told("409", "Consumer Deleted", 0), "create 2"},
			{on.made(49), "pull 4, wait"}, {on.told("409", "Consumer Deleted", 0, 1), "wait"}, // the one before
		}},
		"its consumer was deleted while it was busy": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.busy(time.Hour, on.got(2, 48)), "take, pull 4, wait"},
			{on.told("503", "", 0), "create 3"},
		}},
		"nobody serves its pulls": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("503", "", 0), "wait, 50ms"}, {on.after(time.Second), "create 1"},
			{on.made(50), "pull 4, wait"}, {on.told("409", "Leadership Change", 0), "wait, 100ms"}, {on.after(time.Second), "create 1"},
			{on.made(50), "pull 4, wait"}, {on.told("409", "Server Shutdown", 0), "wait, 200ms"},
		}},
		"its pulls are refused": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.told("400", "Bad Request", 0), "wait, 50ms"},
		}},
		"the server falls silent": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"},
			{on.after(silentFor), "wait"}, {on.after(2 * time.Millisecond), "create 2 carefully"},
		}},
		"the server is not silent, but has nothing for a pull": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.got(2, 48), "take, pull 2, wait"},
			{on.after(2 * time.Second), "wait"}, {on.got(3, 47), "take, wait"}, {on.after(2 * time.Second), "wait"}, {on.got(4, 46), "take, pull 2, wait"},
		}},
		"the owner was busy for longer than the server may be silent": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"},
			{on.busy(10*time.Second, on.told("100", "Idle Heartbeat", 0)), "ask 2"},
		}},
		"it is cut off": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"},
			{on.link(false, 1), "wait"}, {on.after(time.Hour), "wait"}, {on.link(true, 2), "create 2"},
			{on.link(false, 2), "wait"}, {on.notMade(errPasses), "wait"}, {on.link(true, 3), "wait, 49ms"}, {on.after(time.Second), "create 2 carefully"},
		}},
		"it is cut off for no time": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.link(true, 2), "wait, 50ms"},
		}},
		"a leader is elected": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.notMade(errPasses), "wait, 50ms"}, {on.after(time.Second), "create 1 carefully"}, {on.notMade(errPasses), "wait, 100ms"},
			{on.after(time.Second), "create 1 carefully"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.gap(9), "skip, create 2"},
		}},
		"its stream is not known": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.told("409", "Stream Deleted", 0), "create 2"},
			{on.notMade(errNoStream), "wait, 50ms"}, {on.notMade(errNoStream), "wait, 100ms"}, {on.notMade(errNoStream), "wait, 200ms"},
			{on.notMade(errNoStream), "fail: stream deleted"}, {on.made(50), "fail: stream deleted"}, {on.got(2, 0), "skip, fail: stream deleted"},
		}},
		"its stream is not known for a moment": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.made(50), "pull 4, wait"}, {on.got(1, 49), "take, wait"}, {on.told("409", "Stream Deleted", 0), "create 2"},
			{on.notMade(errNoStream), "wait, 50ms"}, {on.notMade(errNoStream), "wait, 100ms"}, {on.notMade(errNoStream), "wait, 200ms"}, {on.notMade(errPasses), "wait, 400ms"},
			{on.notMade(errNoStream), "wait, 800ms"}, {on.notMade(errNoStream), "wait, 1.6s"}, {on.notMade(errNoStream), "wait, 2s"}, {on.after(2 * time.Second), "create 2 carefully"},
		}},
		"its stream is another one": {long, []orderedEvent{
			{on.begin, "create 1"}, {on.notMade(fmt.Errorf("%w and recreated", ErrStreamDeleted)), "fail: stream deleted and recreated"},
		}},
		"it may not make a consumer":   {long, []orderedEvent{{on.begin, "create 1"}, {on.notMade(errDenied), `fail: permission denied: publish "x"`}}},
		"it may not ask the leader":    {long, []orderedEvent{{on.begin, "create 1"}, {on.made(0), "pull 4, ask 1"}, {on.answer(0, errDenied), `fail: permission denied: publish "x"`}}},
		"the leader gives no answer":   {long, []orderedEvent{{on.begin, "create 1"}, {on.made(0), "pull 4, ask 1"}, {on.answer(0, errPasses), "wait, 50ms"}, {on.after(time.Second), "create 1 carefully"}}},
		"a tool may not ask":           {tool(false), []orderedEvent{{on.begin, "create 1"}, {on.made(0), "pull 4, ask 1"}, {on.answer(0, errDenied), "done"}}},
		"a tool need not ask":          {tool(true), []orderedEvent{{on.begin, "create 1"}, {on.made(2), "pull 4, wait"}, {on.got(1, 1), "take, wait"}, {on.got(9, 0), "take, done"}}},
		"a tool asks what is in doubt": {tool(true), []orderedEvent{{on.begin, "create 1"}, {on.made(2), "pull 4, wait"}, {on.told("100", "Idle Heartbeat", 0), "ask 1"}}},
		"a tool loses its patience": {tool(false), []orderedEvent{
			{on.begin, "create 1"}, {on.made(9), "pull 4, wait"}, {on.busy(time.Hour, on.got(1, 8)), "take, pull 4, wait"}, {on.gap(3), "skip, create 2"},
			{on.notMade(errPasses), "wait, 50ms"}, {on.after(29 * time.Second), "create 2 carefully"}, {on.after(time.Second), "fail: nobody answers: nats: timeout"},
		}},
		"a tool loses its patience with a connection": {tool(false), []orderedEvent{
			{on.begin, "create 1"}, {on.link(false, 1), "wait"}, {on.after(29 * time.Second), "wait"}, {on.after(2 * time.Second), "fail: the server does not answer"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &orderedScript{o: c.of, now: int64(time.Hour)}
			s.o.resume(s.now)
			s.play(t, c.events)
		})
	}
}

// A consumer that gives one message a pull does not get pulls without end.
func TestOrderedBoundsItsPulls(t *testing.T) {
	t.Parallel()
	o := newOrdered(startPoint{seq: 1}, 1000)
	o.connection(1, true, 1)
	o.created(1, &jetstream.ConsumerInfo{Name: "C", NumPending: 1000, Config: jetstream.ConsumerConfig{MaxRequestBatch: 1}})
	pulls := 0
	pullAll := func(now int64) {
		for {
			if _, ok := o.pull(now, demand{messages: 500, refill: 1, stay: orderedStay, heartbeat: orderedBeat}); !ok {
				return
			}
			pulls++
		}
	}
	pullAll(1)
	if pulls != orderedPulls {
		t.Errorf("%d pulls, want %d", pulls, orderedPulls)
	}
	for seq := range uint64(1000) {
		if !o.message(2, ackInfo{consumer: "C", sequence: seq + 1, consumerSeq: seq + 1, pending: 1}, 1) {
			t.Fatalf("message %d is not taken", seq+1)
		}
		pullAll(2)
	}
	if !o.done || pulls != 1000 {
		t.Errorf("done %t after %d pulls, want 1000", o.done, pulls)
	}
}

// What the byte budget does not allow is asked for a moment later.
func TestOrderedKeepsTheByteBudget(t *testing.T) {
	t.Parallel()
	b := &budget{}
	o := newOrdered(startPoint{seq: 1}, 1000)
	o.puller.budget, o.puller.size = b, leastAskedBytes/4
	o.connection(1, true, 1)
	o.created(1, &jetstream.ConsumerInfo{Name: "C", NumPending: 1000})
	want := demand{messages: 100, refill: 50, stay: orderedStay, heartbeat: orderedBeat}
	if next, ok := o.pull(1, want); !ok || next.batch != 4 || next.maxBytes != 4*leastAskedBytes {
		t.Errorf("got %+v, want 4 messages", next)
	}
	if next, ok := o.pull(1, want); ok {
		t.Errorf("got %+v beyond the budget", next)
	}
	if step := o.next(1); step.kind != stepWait || step.at != 1+starvedPause {
		t.Errorf("got %+v, want a short wait", step)
	}
	o.abandonConsumer(2, errGap)
	if left := b.asked.Load(); left != 0 {
		t.Errorf("%d bytes are asked for without a consumer", left)
	}
}

// A reader that ends gives back what it had asked for of the connection's bytes.
func TestReaderReturnsItsBytes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, 4*toolWindow)
	l := openLink(nc)
	defer l.close()
	for range DeadLetters("dlq.orders").List(testContext(t), nc) {
		if l.budget.asked.Load() == 0 {
			t.Error("nothing is asked for of the connection's budget")
		}
		break
	}
	if left := l.budget.asked.Load(); left != 0 {
		t.Errorf("%d bytes are asked for after the end", left)
	}
}

// A stream is told from another of its name, though its server may say another creation
// time after a restart.
func TestStreamMark(t *testing.T) {
	t.Parallel()
	at := func(minute int) time.Time { return noon.Add(time.Duration(minute) * time.Minute) }
	// A stream with messages from first to last, stored at the minute of their sequence.
	stream := func(created int, first, last uint64, shift int) *jetstream.StreamInfo {
		info := &jetstream.StreamInfo{Created: at(created)}
		info.State = jetstream.StreamState{FirstSeq: first, LastSeq: last, LastTime: at(int(last) + shift)}
		if first <= last {
			info.State.Msgs, info.State.FirstTime = last-first+1, at(int(first)+shift)
		}
		return info
	}
	read := func(seq uint64) messageID { return messageID{seq, at(int(seq)).UnixNano()} }
	had := func(seq uint64, shift int) *storedMsg { return &storedMsg{seq: seq, time: at(int(seq) + shift)} }
	known := stream(0, 10, 100, 0)
	for name, c := range map[string]struct {
		before, now *jetstream.StreamInfo
		read        messageID
		stored      *storedMsg // of the message read
		want        streamMatch
		asked       bool // the message read had to decide
	}{
		"nothing happened":                            {known, known, read(50), nil, streamSame, false},
		"it went on":                                  {known, stream(0, 60, 300, 0), read(50), nil, streamSame, false},
		"it lost all, but not its creation time":      {known, stream(0, 1, 0, 0), read(50), nil, streamSame, false},
		"another time":                                {known, stream(500, 10, 100, 0), read(50), nil, streamSame, false},
		"another time, it went on":                    {known, stream(500, 10, 300, 0), read(50), nil, streamSame, false},
		"another time, its beginning is gone":         {known, stream(500, 30, 100, 0), read(50), nil, streamSame, false},
		"another time, both":                          {known, stream(500, 30, 300, 0), read(50), had(50, 0), streamSame, true},
		"another time, and what was read is deleted":  {known, stream(500, 30, 300, 0), read(50), nil, streamSame, true},
		"another time, and what was read has expired": {known, stream(500, 60, 300, 0), read(50), nil, streamSame, false},
		"another time, all has expired":               {known, stream(500, 301, 300, 0), read(50), nil, streamSame, false},
		"another time, nothing was read":              {known, stream(500, 30, 300, 0), messageID{}, nil, streamSame, false},
		"another time, it has lost its end":           {known, stream(500, 10, 90, 0), read(95), nil, streamSame, false},
		"recreated":                                   {known, stream(500, 1, 0, 0), read(50), nil, streamOther, false},
		"recreated, nothing was read":                 {known, stream(500, 1, 0, 0), messageID{}, nil, streamOther, false},
		"recreated, it has a few messages":            {known, stream(500, 1, 20, 500), read(50), nil, streamOther, false},
		"recreated, it has as many":                   {known, stream(500, 1, 100, 500), read(50), nil, streamOther, false},
		"recreated, it has more":                      {known, stream(500, 1, 300, 500), read(50), nil, streamOther, false},
		"recreated, it begins where the first did":    {known, stream(500, 10, 300, 500), read(50), nil, streamOther, false},
		"recreated, it begins behind that":            {known, stream(500, 30, 300, 500), read(50), had(50, 500), streamOther, true},
		"recreated, the message is missing in it":     {known, stream(500, 30, 300, 500), read(50), nil, streamOther, true},
		"an empty one, and it has something now":      {stream(0, 1, 0, 0), stream(0, 1, 3, 0), messageID{}, nil, streamSame, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mark := markOf(c.before)
			got := mark.compare(c.now, c.read)
			asked := got == streamUnsure
			if asked {
				got = mark.decide(c.now, c.read, c.stored)
			}
			if got != c.want || asked != c.asked {
				t.Errorf("got %d, asked %t, want %d and %t", got, asked, c.want, c.asked)
			}
		})
	}
}

// startForgetful passes JetStream's API on under the prefix OLD.API, as a server that
// says another creation time of a stream each time it is asked.
func startForgetful(t testing.TB, nc *nats.Conn) (looks *tally) {
	t.Helper()
	looks = new(tally)
	sub, err := nc.Subscribe("OLD.API.>", func(m *nats.Msg) {
		operation := strings.TrimPrefix(m.Subject, "OLD.API.")
		if !strings.HasPrefix(operation, "STREAM.INFO.") {
			nc.PublishRequest("$JS.API."+operation, m.Reply, m.Data)
			return
		}
		answer, err := nc.Request("$JS.API."+operation, m.Data, testLimit)
		if err != nil {
			t.Error(err)
			return
		}
		i := strings.Index(string(answer.Data), `"created":"`) + len(`"created":"`)
		j := i + strings.Index(string(answer.Data[i:]), `"`)
		created := time.Now().Add(time.Duration(looks.add("all")) * time.Hour).Format(time.RFC3339Nano)
		m.Respond(slices.Concat(answer.Data[:i], []byte(created), answer.Data[j:]))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sub.Unsubscribe() })
	return looks
}

// What a server says of the creation of a stream does not end a replay of it, nor the
// reading of letters; another stream of that name does.
func TestOrderedGoesByTheMessages(t *testing.T) {
	t.Parallel()
	const count = 3 * replayWindow
	for name, c := range map[string]struct {
		disturb func(t *testing.T, nc *nats.Conn)
		want    error
	}{
		"another creation time": {func(t *testing.T, nc *nats.Conn) { deleteConsumers(t, streamNow(t, nc, "DLQ")) }, nil},
		"another stream": {func(t *testing.T, nc *nats.Conn) {
			if err := jetStream(t, nc).DeleteStream(testContext(t), "DLQ"); err != nil {
				t.Error(err)
			}
			letterStream(t, nc, count+1)
		}, ErrStreamDeleted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := startServer(t).ClientURL()
			nc := connect(t, url)
			looks := startForgetful(t, connect(t, url))
			letterStream(t, nc, count)
			js, err := jetstream.NewWithAPIPrefix(nc, "OLD.API")
			if err != nil {
				t.Fatal(err)
			}
			replayed := uint64(0)
			_, err = NewBroker(nc, WithJetStream(js)).Replay(testContext(t), Replay("dlq.>").Handle(func(context.Context, *Msg) error {
				if replayed++; replayed == 10 {
					c.disturb(t, nc)
				}
				return nil
			}))
			if !errors.Is(err, c.want) || c.want == nil && replayed != count {
				t.Errorf("replayed %d, %v, want %d, %v", replayed, err, count, c.want)
			}
			listed, err := 0, error(nil)
			for _, err = range DeadLetters("dlq.orders").APIPrefix("OLD.API").List(testContext(t), nc) {
				if listed++; listed == 10 {
					c.disturb(t, nc)
				}
			}
			if !errors.Is(err, c.want) || c.want == nil && listed != count {
				t.Errorf("listed %d, %v, want %d, %v", listed, err, count, c.want)
			}
			if looks.sum() < 3 {
				t.Errorf("looked at the stream %d times, want it to be compared", looks.sum())
			}
			noConsumers(t, nc, "DLQ")
		})
	}
}

// Who lists letters needs as little as before: on a stream with one replica neither the
// leader's answer nor the deletion of consumers.
func TestDeadLettersNeedPermissions(t *testing.T) {
	t.Parallel()
	allowed := []string{
		"$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.DLQ", "$JS.API.CONSUMER.CREATE.DLQ.*.dlq.orders", "$JS.API.CONSUMER.MSG.NEXT.DLQ.*",
	}
	for i := range len(allowed) + 1 {
		allow, lacking := allowed, ""
		if i < len(allowed) {
			lacking = allowed[i]
			allow = slices.Concat(allowed[:i], allowed[i+1:])
		}
		t.Run("without "+lacking, func(t *testing.T) {
			t.Parallel()
			admin, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: allow}})
			letterStream(t, admin, 10)
			publish(t, admin, &nats.Msg{Subject: "dlq.other"}) // so that the end is not the last letter
			n := 0
			err := error(nil)
			for _, err = range DeadLetters("dlq.orders").List(testContext(t), user) {
				n++
			}
			switch denied, _ := errors.AsType[*PermissionError](err); {
			case lacking == "":
				if err != nil || n != 10 {
					t.Errorf("got %d letters, %v, want 10", n, err)
				}
			case denied == nil || strings.TrimSuffix(lacking, "*") != denied.Subject[:len(strings.TrimSuffix(lacking, "*"))] && !strings.Contains(lacking, ".*."):
				t.Errorf("got %v, want a permission error for %s", err, lacking)
			}
		})
	}
}
