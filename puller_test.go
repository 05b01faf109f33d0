package natsx

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
)

// pullScript drives a puller through events at times in milliseconds.
type pullScript struct {
	t   *testing.T
	p   puller
	now int64
}

func newPullScript(t *testing.T, b *budget) *pullScript {
	s := &pullScript{t: t}
	s.p.open, s.p.budget = true, b
	return s
}

// ms is a time in milliseconds on the puller's clock, which is never 0.
func ms(n int) int64 { return int64(n)*int64(time.Millisecond) + 1 }

func (s *pullScript) at(n int) *pullScript { s.now = ms(n); return s }

// want plans for a demand and compares the request, "" for none.
func (s *pullScript) want(d demand, want string) *pullScript {
	s.t.Helper()
	r, ok := s.p.next(s.now, d)
	got := ""
	if ok {
		got = string(r.body())
	}
	if got != want {
		s.t.Errorf("at %d ms: demand %+v gives %s, want %s", s.now/int64(time.Millisecond), d, got, want)
	}
	return s
}

// keepPin compares the request that keeps the pin, "" for none.
func (s *pullScript) keepPin(want string) *pullScript {
	s.t.Helper()
	r, ok := s.p.keepPin(s.now)
	if got := string(r.body()); ok != (want != "") || ok && got != want {
		s.t.Errorf("at %d ms: the pin is kept by %s (%v), want %s", s.now/int64(time.Millisecond), got, ok, want)
	}
	return s
}

func (s *pullScript) messages(n, size int) *pullScript {
	for range n {
		s.p.message(s.now, size)
	}
	return s
}

// status is a status message for the latest pull.
func (s *pullScript) status(code, text string, left int, want pullEvent) *pullScript {
	s.t.Helper()
	m := &nats.Msg{Subject: fmt.Sprintf("_INBOX.x.%d", s.p.tokens), Header: nats.Header{"Status": {code}, "Description": {text}}}
	if left >= 0 {
		m.Header.Set("Nats-Pending-Messages", fmt.Sprint(left))
	}
	if got := s.p.status(s.now, parseStatus(m)); got != want {
		s.t.Errorf("status %s %s is event %d, want %d", code, text, got, want)
	}
	return s
}

func (s *pullScript) outstanding(n int) *pullScript {
	s.t.Helper()
	if s.p.outstanding != n {
		s.t.Errorf("at %d ms: %d messages are outstanding, want %d", s.now/int64(time.Millisecond), s.p.outstanding, n)
	}
	return s
}

func TestPuller(t *testing.T) {
	t.Parallel()
	const sec = 1_000_000_000
	ten := demand{messages: 10, stay: time.Second}
	pull := func(n int) string { return fmt.Sprintf(`{"batch":%d,"expires":%d}`, n, sec) }
	idle := demand{idle: true, stay: 30 * time.Second, heartbeat: 10 * time.Second}
	const idleBody = `{"batch":1,"expires":30000000000,"max_bytes":1,"idle_heartbeat":10000000000}`
	tests := []struct {
		name   string
		script func(s *pullScript)
	}{
		{"asks for what is missing", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).outstanding(10).want(ten, "")
			s.at(1).messages(4, 100).outstanding(6).want(ten, pull(4)).outstanding(10)
			s.at(2).messages(10, 100).outstanding(0)
			if len(s.p.pulls) != 0 {
				s.t.Errorf("%d pulls are left of none", len(s.p.pulls))
			}
		}},
		{"waits for as many as are worth a request", func(s *pullScript) {
			d := demand{messages: 10, refill: 5, stay: time.Second}
			s.at(0).want(d, pull(10)).messages(4, 100).want(d, "").messages(1, 100).want(d, pull(5))
		}},
		{"closed asks for nothing", func(s *pullScript) {
			s.p.open = false
			s.at(0).want(ten, "").want(idle, "")
		}},
		{"a full pull is no longer the oldest once a later one has expired", func(s *pullScript) {
			pull := func(n int) string { return fmt.Sprintf(`{"batch":%d,"expires":250000000}`, n) }
			two := demand{messages: 2, stay: 250 * time.Millisecond}
			s.at(0).want(two, pull(2)).at(100).messages(1, 100).want(two, pull(1)).messages(1, 100).at(200).want(two, pull(1))
			if got := s.p.since(s.now); got != ms(0) {
				s.t.Errorf("since %d, want the time of the first pull", got)
			}
			s.p.tokens-- // the second one
			s.at(360).status("408", "Request Timeout", 1, pullGoesOn)
			s.p.tokens++
			if got := s.p.since(s.now); got != ms(350) {
				s.t.Errorf("since %d, want the end of the second pull", got)
			}
			s.outstanding(1)
		}},
		{"with short leases the end of a pull for one message is announced too", func(s *pullScript) {
			s.p.short = true
			one := demand{messages: 1, stay: time.Second}
			two := demand{messages: 2, stay: time.Second}
			s.at(0).want(one, `{"batch":1,"expires":1000000000,"max_bytes":2147483647}`)
			s.at(50).want(two, `{"batch":1,"expires":1000000000,"max_bytes":2147483647}`)
			s.p.tokens--
			s.at(60).messages(1, 100).status("409", "Batch Completed", 0, pullGoesOn).outstanding(1)
			s.p.tokens++
			if got := s.p.since(s.now); got != ms(50) {
				s.t.Errorf("since %d, want the time of the second pull", got)
			}
			s.p.limits.bytes = 1000 // a larger message would not fit a pull within that
			s.at(70).want(two, `{"batch":1,"expires":1000000000}`)
		}},
		{"expired brings less", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).messages(3, 100)
			s.at(1000).status("408", "Request Timeout", 7, pullGoesOn).outstanding(0).want(ten, pull(10))
		}},
		{"no wait and nothing there", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("404", "No Messages", -1, pullGoesOn).outstanding(0)
		}},
		{"status of an unknown pull changes nothing", func(s *pullScript) {
			s.at(0).want(ten, pull(10))
			s.p.tokens += 7
			s.status("408", "Request Timeout", 10, pullGoesOn).outstanding(10)
		}},
		{"message of a pull that was given up", func(s *pullScript) {
			s.at(0).want(ten, pull(10))
			if lost := s.p.forget(); lost != 10 {
				s.t.Errorf("lost %d, want 10", lost)
			}
			s.messages(2, 100).outstanding(0).want(ten, pull(10))
		}},
		{"idle pull is woken", func(s *pullScript) {
			s.at(0).want(idle, idleBody).outstanding(0).want(idle, "")
			s.at(5).status("409", "Message Size Exceeds MaxBytes", 1, pullWoken).want(ten, pull(10))
		}},
		{"idle pull expires", func(s *pullScript) {
			s.at(0).want(idle, idleBody).at(30_000).status("408", "Request Timeout", 1, pullGoesOn).want(idle, idleBody)
		}},
		{"idle pull stays beside a real one", func(s *pullScript) {
			s.at(0).want(idle, idleBody).want(ten, pull(10)).messages(10, 100).outstanding(0)
			if len(s.p.pulls) != 1 || !s.p.pulls[0].idle {
				s.t.Errorf("pulls %+v, want the idle pull", s.p.pulls)
			}
		}},
		{"silence of an idle pull is found by its heartbeats", func(s *pullScript) {
			s.at(0).want(idle, idleBody)
			s.at(9_000).status("100", "Idle Heartbeat", -1, pullGoesOn)
			if s.p.expire(ms(9_000 + 20_250)) {
				s.t.Error("silent within two heartbeats")
			}
			if !s.p.expire(ms(9_000 + 20_251)) {
				s.t.Error("not silent after two heartbeats and a moment")
			}
		}},
		{"silence of a pull is found by its missing end", func(s *pullScript) {
			s.at(0).want(ten, pull(10))
			if s.p.expire(ms(1_900)) || s.p.outstanding != 10 {
				s.t.Error("given up within its grace")
			}
			if got, want := s.p.wake(ms(10)), ms(2_000)+1; got != want {
				s.t.Errorf("wakes at %d, want %d", got, want)
			}
			if !s.p.expire(ms(2_001)) || s.p.outstanding != 0 || s.p.wake(ms(2_001)) != 0 {
				s.t.Error("not given up after its grace")
			}
		}},
		{"a pull for one message is not announced to have ended", func(s *pullScript) {
			s.at(0).want(demand{messages: 1, stay: time.Second}, pull(1)).want(demand{messages: 2, stay: time.Second}, pull(1)).messages(1, 100)
			s.at(1000).status("408", "Request Timeout", 1, pullGoesOn).outstanding(0)
			if len(s.p.pulls) != 0 || s.p.expire(ms(3_000)) {
				s.t.Errorf("pulls %+v are left, or silent", s.p.pulls)
			}
		}},
		{"not silent while something is heard", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).at(1500).status("100", "", -1, pullGoesOn)
			if s.p.expire(ms(2_001)) || s.p.outstanding != 0 {
				s.t.Error("silent, or still waiting for a pull that was lost")
			}
		}},
		{"leader changes and says so", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("409", "Leadership Change", -1, pullMoved).outstanding(0).want(ten, pull(10))
		}},
		{"server shuts down and says so", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("409", "Server Shutdown", -1, pullMoved).want(ten, pull(10))
		}},
		{"nobody serves", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("503", "", -1, pullMoved).want(ten, "")
			s.at(10).want(ten, pull(10)).status("503", "", -1, pullMoved)
			s.at(29).want(ten, "").at(30).want(ten, pull(10))
			for range 10 {
				s.status("503", "", -1, pullMoved)
				s.now += int64(time.Second)
				s.want(ten, pull(10))
			}
			s.status("503", "", -1, pullMoved)
			s.now += int64(time.Second) - 1
			s.want(ten, "")
			s.messages(1, 100)
			if s.p.unserved != 0 {
				s.t.Error("a message does not count as served")
			}
		}},
		{"consumer deleted", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("409", "Consumer Deleted", -1, pullGone)
			s.want(demand{}, "").status("409", "Stream Deleted", -1, pullStreamGone)
		}},
		{"refused", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("409", "Consumer is push based", -1, pullRefused).at(999).want(ten, "").at(1000).want(ten, pull(10))
		}},
		{"limits are learned from refusals", func(s *pullScript) {
			s.at(0).want(ten, pull(10)).status("409", "Exceeded MaxRequestBatch of 3", -1, pullGoesOn).want(ten, pull(3)).outstanding(3)
			s.p.forget()
			s.want(idle, idleBody).status("409", "Exceeded MaxRequestExpires of 500ms", -1, pullGoesOn)
			s.want(idle, `{"batch":1,"expires":500000000,"max_bytes":1,"idle_heartbeat":250000000}`)
			s.status("409", "Exceeded MaxRequestMaxBytes of nothing", -1, pullRefused)
		}},
		{"waits to be pinned, and pulls with its pin", func(s *pullScript) {
			s.p.group, s.p.pinKeep = "g", int64(2*time.Second)
			s.at(0).want(ten, `{"batch":10,"expires":1000000000,"group":"g"}`).keepPin("")
			if !s.p.pinned("P") || s.p.pinned("P") {
				s.t.Error("a pin is not gained once")
			}
			s.messages(4, 100).want(ten, `{"batch":4,"expires":1000000000,"group":"g","id":"P"}`).keepPin("")
			if got, want := s.p.pinDue(), s.now+int64(2*time.Second); got != want {
				s.t.Errorf("the next is due at %d, want %d", got, want)
			}
		}},
		{"keeps its pin while it wants nothing", func(s *pullScript) {
			const keep = `{"batch":1,"expires":1000000000,"max_bytes":1,"group":"g","id":"P"}`
			s.p.group, s.p.pinKeep = "g", int64(2*time.Second)
			s.at(0).p.pinned("P")
			s.keepPin(keep).keepPin("").at(1999).keepPin("").at(2000).keepPin(keep).outstanding(0)
			s.at(2001).status("409", "Message Size Exceeds MaxBytes", 1, pullWoken)
			s.p.forget()
			s.keepPin(keep) // what was sent before may be lost
			s.p.open = false
			s.at(4001).want(ten, "").keepPin(keep)
		}},
		{"loses its pin", func(s *pullScript) {
			s.p.group, s.p.pinKeep = "g", int64(2*time.Second)
			s.at(0).p.pinned("P")
			s.want(ten, `{"batch":10,"expires":1000000000,"group":"g","id":"P"}`)
			s.status("423", "Nats-Wrong-Pin-Id", 10, pullUnpinned).outstanding(0).keepPin("")
			s.want(ten, `{"batch":10,"expires":1000000000,"group":"g"}`)
		}},
		{"refusals without a count, and of an earlier pin", func(s *pullScript) {
			s.p.group, s.p.pinKeep = "g", int64(2*time.Second)
			s.at(0).p.pinned("P")
			s.want(ten, `{"batch":10,"expires":1000000000,"group":"g","id":"P"}`)
			s.p.pinned("Q")
			s.status("423", "Nats-Pin-Id mismatch", -1, pullGoesOn).outstanding(0)
			s.want(ten, `{"batch":10,"expires":1000000000,"group":"g","id":"Q"}`)
			s.status("423", "Nats-Pin-Id mismatch", -1, pullUnpinned).want(ten, `{"batch":10,"expires":1000000000,"group":"g"}`)
		}},
		{"batch limit is raised by the consumer", func(s *pullScript) {
			s.p.limits.batch = 2
			s.at(0).want(ten, pull(2)).messages(2, 100)
			s.p.limits = pullLimits{}
			s.want(ten, pull(10))
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.script(newPullScript(t, nil))
		})
	}
}

func TestPullerWithinABudget(t *testing.T) {
	t.Parallel()
	const kib = 1 << 10
	many := demand{messages: 8192, stay: time.Second}
	t.Run("bytes of several pullers", func(t *testing.T) {
		t.Parallel()
		var b budget
		one, two := newPullScript(t, &b), newPullScript(t, &b)
		one.p.size, two.p.size = 10*kib, 10*kib
		one.at(0).want(many, `{"batch":12,"expires":1000000000,"max_bytes":491520}`)
		// One alone is allowed while anything is.
		two.at(0).want(many, `{"batch":1,"expires":1000000000}`).want(many, "")
		if !two.p.starved || two.p.wake(two.now) == 0 {
			t.Error("it does not know that it starves")
		}
		one.at(1).messages(12, 10*kib)
		two.at(1).want(many, `{"batch":11,"expires":1000000000,"max_bytes":450560}`)
		one.p.forget()
		two.p.forget()
		if got := b.asked.Load(); got != 0 {
			t.Errorf("%d bytes are asked for by nobody", got)
		}
	})
	t.Run("grows with what the link carries, up to a part of the send buffer", func(t *testing.T) {
		t.Parallel()
		var b budget
		s := newPullScript(t, &b)
		s.p.size = 10 * kib
		most := 0
		for at := range 40 {
			r, ok := s.at(at).p.next(s.now, many)
			if ok {
				most = max(most, r.batch)
				s.messages(r.batch, 10*kib)
				s.p.next(s.now, demand{})
			}
		}
		if want := mostAskedBytes / (10 * kib); most != want {
			t.Errorf("the largest pull was for %d, want %d", most, want)
		}
		s.at(1000).p.next(s.now, many)
		if got := s.p.outstanding; got != leastAskedBytes/(10*kib) {
			t.Errorf("after a quiet second it asks for %d, want %d", got, leastAskedBytes/(10*kib))
		}
	})
	t.Run("one message may be larger than all", func(t *testing.T) {
		t.Parallel()
		var b budget
		s := newPullScript(t, &b)
		s.p.size = 64 << 20
		s.at(0).want(many, `{"batch":1,"expires":1000000000}`).want(many, "")
	})
	t.Run("messages larger than the bound of a pull", func(t *testing.T) {
		t.Parallel()
		var b budget
		s := newPullScript(t, &b)
		s.p.size = 10
		d := demand{messages: 4, stay: time.Second}
		s.at(0).want(d, `{"batch":4,"expires":1000000000,"max_bytes":65536}`)
		s.status("409", "Message Size Exceeds MaxBytes", 4, pullGoesOn).want(d, `{"batch":1,"expires":1000000000}`)
		s.messages(1, 100*kib).want(d, `{"batch":4,"expires":1000000000,"max_bytes":102544}`)
	})
	t.Run("a disconnect makes it smaller for a while", func(t *testing.T) {
		t.Parallel()
		var b budget
		s := newPullScript(t, &b)
		s.p.size = kib
		s.at(0).p.next(s.now, many)
		b.disconnected(s.now)
		s.p.forget()
		s.want(many, `{"batch":64,"expires":1000000000,"max_bytes":262144}`)
		s.p.forget()
		b.disconnected(ms(1)) // with nothing on its way: no reason
		s.at(2).want(many, `{"batch":64,"expires":1000000000,"max_bytes":262144}`)
		s.p.forget()
		s.at(61_000).want(many, `{"batch":128,"expires":1000000000,"max_bytes":524288}`)
	})
}

func TestTakePin(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		header, left nats.Header
		pin          string
	}{
		{nil, nil, ""},
		{nats.Header{"A": {"1"}}, nats.Header{"A": {"1"}}, ""},
		{nats.Header{"Nats-Pin-Id": {"P"}}, nil, "P"},
		{nats.Header{"A": {"1"}, "Nats-Pin-Id": {"P"}}, nats.Header{"A": {"1"}}, "P"},
		{nats.Header{"Nats-Pin-Id": {"of a publisher", "P"}}, nats.Header{"Nats-Pin-Id": {"of a publisher"}}, "P"},
	} {
		m := &nats.Msg{Header: c.header}
		if pin := takePin(m); pin != c.pin || !cmp.Equal(m.Header, c.left) {
			t.Errorf("got pin %q and %v, want %q and %v", pin, m.Header, c.pin, c.left)
		}
	}
}

func TestWindow(t *testing.T) {
	t.Parallel()
	var w window
	steps := []struct {
		at, done, want int
	}{
		{0, 0, 0}, {1, 5, 5}, {9, 5, 10}, {50, 10, 20}, {99, 0, 20}, {102, 0, 10}, {149, 0, 10}, {151, 0, 0}, {5_000, 7, 7}, {5_099, 0, 7}, {5_101, 0, 0},
	}
	for _, s := range steps {
		w.add(ms(s.at), s.done)
		if got := w.recent(ms(s.at)); got != s.want {
			t.Errorf("at %d ms: %d recently, want %d", s.at, got, s.want)
		}
	}
}

func TestHistory(t *testing.T) {
	t.Parallel()
	id := func(seq int) messageID { return messageID{seq: uint64(seq), time: int64(1000 + seq)} }
	t.Run("what was handled is known", func(t *testing.T) {
		t.Parallel()
		var h history
		now := int64(0)
		knows := func(seq int, want bool) {
			t.Helper()
			if got := h.wasHandled(id(seq)); got != want {
				t.Errorf("message %d was handled: %v, want %v", seq, got, want)
			}
		}
		for seq := range leastRemembered {
			h.addHandled(now, id(seq))
			now += ackFlight // few are remembered for long
		}
		knows(0, true)
		knows(leastRemembered-1, true)
		knows(leastRemembered, false)
		h.addHandled(now, id(leastRemembered))
		knows(leastRemembered, true)
		if h.wasHandled(messageID{seq: 1, time: 5}) {
			t.Error("a message of another time is taken for the handled one")
		}
		for seq := leastRemembered + 1; seq <= 2*leastRemembered+1; seq++ {
			now += ackFlight
			h.addHandled(now, id(seq))
		}
		knows(0, false)
		knows(leastRemembered, true)
		knows(2*leastRemembered+1, true)
	})
	t.Run("what was handled before a doubt is known for longer", func(t *testing.T) {
		t.Parallel()
		var h history
		h.addHandled(0, id(0))
		h.doubt(0, time.Minute)
		flood := func(now time.Duration) {
			for seq := range 3 * mostRemembered {
				h.addHandled(int64(now), id(1000+seq))
			}
		}
		flood(time.Minute)
		if !h.wasHandled(id(0)) {
			t.Error("it is forgotten before its message can come again")
		}
		flood(doubtWaits*time.Minute + 1)
		if h.wasHandled(id(0)) || h.kept != nil {
			t.Error("it is remembered for ever")
		}
	})
	t.Run("memory is bounded", func(t *testing.T) {
		t.Parallel()
		var h history
		for seq := range 5 * mostRemembered {
			h.addHandled(1, id(seq))
			h.ranNothing(id(seq))
			if seq%mostRemembered == 10 {
				h.doubt(1, time.Hour)
			}
		}
		h.wasHandled(id(0))
		got := []int{len(h.recent.ids), len(h.earlier.ids), len(h.kept), len(h.idle), h.order.len()}
		const half = mostRemembered / 2
		if diff := cmp.Diff([]int{half, half, mostRemembered, mostRemembered, mostRemembered}, got); diff != "" {
			t.Errorf("sizes differ (-want +got):\n%s", diff)
		}
		for seq := range indexFor + 1 {
			h.recent.add(id(seq))
		}
		if h.recent.index != nil {
			t.Error("the index is kept though nobody asks")
		}
	})
	t.Run("deliveries that ran nothing are no attempts", func(t *testing.T) {
		t.Parallel()
		var h history
		attempt := func(seq, delivered int, want uint64) {
			t.Helper()
			if got := h.attempt(id(seq), uint64(delivered)); got != want {
				t.Errorf("delivery %d of message %d is attempt %d, want %d", delivered, seq, got, want)
			}
		}
		attempt(1, 1, 1)
		attempt(1, 3, 3)
		h.ranNothing(id(1))
		attempt(1, 3, 2)
		h.ranNothing(id(1))
		attempt(1, 4, 2)
		attempt(1, 2, 1)
		h.addLost(2)
		attempt(2, 2, 1)
		attempt(2, 3, 2)
		attempt(3, 2, 1)
		attempt(4, 2, 2)
	})
}

func TestConsumerIdentity(t *testing.T) {
	t.Parallel()
	then, later := time.Unix(1, 0), time.Unix(2, 0)
	was := consumerIdentity{id: "a", created: then, server: "s1", delivered: 100}
	clustered := consumerIdentity{id: "a", created: then, group: "g1"}
	tests := []struct {
		name string
		was  consumerIdentity
		now  consumerIdentity
		seen uint64
		want bool
	}{
		{"the same", was, was, 100, true},
		{"got an identity from two processes at once", was, consumerIdentity{id: "b", created: then, server: "s1"}, 100, true},
		{"restarted server tells another time", was, consumerIdentity{id: "a", created: later, server: "s2", delivered: 100}, 100, true},
		{"killed server lost a little", was, consumerIdentity{id: "a", created: later, server: "s2", delivered: 90}, 100, true},
		{"created again", was, consumerIdentity{id: "b", created: later, server: "s1"}, 100, false},
		{"created again with copied metadata", was, consumerIdentity{id: "a", created: later, server: "s1", delivered: 100}, 100, false},
		{"created again behind a restart", was, consumerIdentity{id: "a", created: later, server: "s2"}, 100, false},
		{"without an identity, restarted", consumerIdentity{created: then, server: "s1"}, consumerIdentity{created: later, server: "s2", delivered: 5}, 5, true},
		{"without an identity, created again", consumerIdentity{created: then, server: "s1"}, consumerIdentity{created: later, server: "s1", delivered: 5}, 5, false},
		{"cluster restarted", clustered, consumerIdentity{id: "a", created: later, group: "g1"}, 100, true},
		{"created again in a cluster", clustered, consumerIdentity{id: "a", created: later, group: "g2", delivered: 100}, 100, false},
	}
	for _, tt := range tests {
		if got := tt.was.is(tt.now, tt.seen); got != tt.want {
			t.Errorf("%s: the same is %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestAloneMarks(t *testing.T) {
	t.Parallel()
	a, b := messageID{1, 10}, messageID{2, 20}
	s := aloneMarks(nil).with(a, 1, 100).with(b, 2, 101).with(a, 2, 102)
	if got, want := s.String(), "2@20:2:101 1@10:2:102"; got != want {
		t.Errorf("marks are %q, want %q", got, want)
	}
	if diff := cmp.Diff(s, parseAloneMarks(s.String()), cmp.AllowUnexported(aloneMark{}, messageID{})); diff != "" {
		t.Errorf("parsed marks differ (-want +got):\n%s", diff)
	}
	if s.count(a) != 2 || s.count(messageID{1, 11}) != 0 {
		t.Errorf("message 1 has %d, one of its sequence %d", s.count(a), s.count(messageID{1, 11}))
	}
	if got := s.with(a, 0, 103).String(); got != "2@20:2:101" {
		t.Errorf("without message 1 they are %q", got)
	}
	if got := s.with(a, 3, 101+int64(marksFor/time.Second)).String(); !cmp.Equal(got, fmt.Sprintf("1@10:3:%d", 101+int64(marksFor/time.Second))) {
		t.Errorf("with old ones they are %q", got)
	}
	for i := range 100 {
		s = s.with(messageID{uint64(i), 1}, 1, 200)
	}
	if len(s) != mostMarks || s.count(messageID{99, 1}) != 1 || s.count(messageID{0, 1}) != 0 {
		t.Errorf("%d marks are kept, want the latest %d", len(s), mostMarks)
	}
	if got := parseAloneMarks("x 1@2 1@2:3 9@9:1:1 "); len(got) != 1 {
		t.Errorf("of garbage it reads %v", got)
	}
}
