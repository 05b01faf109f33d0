package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func TestEnvelopeFaults(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		e    Envelope
		want error
		text string
	}{
		{"plain", To("a.b").Data([]byte("x")), nil, ""},
		{"everything", To("a.b").JSON(1).Header("K", "v").MsgID("i").TTL(time.Second).ExpectStream("S").ExpectLastSequence(0), nil, ""},
		{"empty subject", To(""), ErrInvalidSubject, `natsx: publish to "": the subject must not be empty`},
		{"wildcard", To("a.*"), ErrInvalidSubject, `natsx: publish to "a.*": the subject has a wildcard`},
		{"tail wildcard", To("a.>"), ErrInvalidSubject, "wildcard"},
		{"empty token", To("a..b"), ErrInvalidSubject, "empty token"},
		{"leading dot", To(".a"), ErrInvalidSubject, "empty token"},
		{"trailing dot", To("a."), ErrInvalidSubject, "empty token"},
		{"space", To("a b"), ErrInvalidSubject, "white space"},
		{"line end", To("a\r\nb"), ErrInvalidSubject, "white space"},
		{"control", To("a\x00b"), ErrInvalidSubject, "control character"},
		{"dollar", To("$JS.API.INFO"), ErrInvalidSubject, "starts with $"},
		{"json", To("a").JSON(math.NaN()), errors.ErrUnsupported, `natsx: publish to "a": encode: json: unsupported value: NaN`},
		{"no codec", To("a").Encode(nil, 1), errors.ErrUnsupported, "no codec"},
		{"header name", To("a").Header("a b", "x"), ErrInvalidName, `natsx: publish to "a": header "a b": the name must be`},
		{"message id header", To("a").Header("nats-msg-id", "x"), ErrOptionConflict, `header "nats-msg-id": is set by MsgID`},
		{"schedule header", To("a").Header("Nats-Schedule-Target", "x"), ErrOptionConflict, "At and After"},
		{"batch header", To("a").Header("Nats-Batch-Id", "x"), ErrOptionConflict, "PublishAtomic"},
		{"timeout header", To("a").Header("Natsx-Timeout", "1s"), ErrOptionConflict, "Request"},
		{"other server header", To("a").Header("Nats-Rollup", "sub"), nil, ""},
		{"status", To("a").Header("Status", "503"), ErrOptionConflict, `header "Status": without a payload`},
		{"status with payload", To("a").Header("Status", "503").Data([]byte("x")), nil, ""},
		{"empty id", To("a").MsgID(""), ErrOutOfRange, `natsx: publish to "a": msgID "": must not be empty`},
		{"id with a line end", To("a").MsgID("x\ny"), ErrOutOfRange, "line end"},
		{"short ttl", To("a").TTL(999 * time.Millisecond), ErrOutOfRange, `ttl 999ms: must be at least 1s`},
		{"zero time", To("a").At(time.Time{}), ErrOutOfRange, "zero time"},
		{"negative delay", To("a").After(-time.Second), ErrOutOfRange, "after -1s: must not be negative"},
		{"at and after", To("a").At(time.Now()).After(time.Second), ErrOptionConflict, "after 1s: does not fit with At"},
		{"delay and subject sequence", To("a").After(1).ExpectLastSubjectSequence(3), ErrOptionConflict, "expectLastSubjectSequence 3"},
		{"both sequences", To("a").ExpectLastSequence(1).ExpectLastSubjectSequence(3), ErrOptionConflict, "expectLastSubjectSequence 3"},
		{"stream name", To("a").ExpectStream("a.b"), ErrInvalidName, `expectStream "a.b"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := tt.e.check()
			if tt.want == nil {
				if err != nil {
					t.Fatalf("got %v, want no error", err)
				}
				return
			}
			var fault *EnvelopeError
			if !errors.As(err, &fault) || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v, want an EnvelopeError with %q", err, tt.text)
			}
			if tt.want != errors.ErrUnsupported && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want it to be %v", err, tt.want)
			}
		})
	}
}

func TestEnvelopeReportsAllFaultsBeforeTheNetwork(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	nc.Close()
	_, err := NewPublisher(nc).Publish(testContext(t), To("a.*").MsgID("").TTL(1).Header("", "x"))
	for _, want := range []string{"wildcard", "msgID", "ttl", "header"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name %q", err, want)
		}
	}
	err = NewPublisher(nc).Send(testContext(t), To("a").After(1).ExpectStream("S").ExpectLastSequence(1))
	for _, want := range []string{"after", "expectStream", "expectLastSequence"} {
		if !errors.Is(err, ErrOptionConflict) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name %q", err, want)
		}
	}
	if _, err := NewPublisher(nc).Publish(testContext(t), To("a")); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("publish on a closed connection: got %v, want ErrConnectionClosed", err)
	}
	if err := NewPublisher(nc).Send(testContext(t), To("a")); !errors.Is(err, ErrConnectionClosed) {
		t.Errorf("send on a closed connection: got %v, want ErrConnectionClosed", err)
	}
}

func TestEnvelopeForksDoNotShareHeaders(t *testing.T) {
	t.Parallel()
	base := To("a").Header("A", "1").Header("B", "2").Header("C", "3")
	var wg sync.WaitGroup
	forks := make([]Envelope, 8)
	for i := range forks {
		wg.Go(func() {
			forks[i] = base.Header("Fork", fmt.Sprint(i))
		})
	}
	wg.Wait()
	for i, e := range forks {
		h := nats.Header{}
		e.fill(h, nil)
		want := nats.Header{"A": {"1"}, "B": {"2"}, "C": {"3"}, "Fork": {fmt.Sprint(i)}}
		if diff := cmp.Diff(want, h); diff != "" {
			t.Errorf("fork %d (-want +got):\n%s", i, diff)
		}
	}
}

func TestSendReachesSubscribers(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	got := make(chan *nats.Msg, 1)
	if _, err := nc.ChanSubscribe("a.b", got); err != nil {
		t.Fatal(err)
	}
	e := To("a.b").JSON(map[string]int{"n": 1}).Header("K", "x\r\ny").Header("K", "z").MsgID("id")
	if err := NewPublisher(nc).Send(testContext(t), e); err != nil {
		t.Fatal(err)
	}
	m := receive(t, got, "the message")
	want := nats.Header{"Content-Type": {"application/json"}, "K": {"x  y", "z"}, "Nats-Msg-Id": {"id"}}
	if diff := cmp.Diff(want, m.Header); diff != "" || string(m.Data) != `{"n":1}` {
		t.Errorf("got %q, headers (-want +got):\n%s", m.Data, diff)
	}
}

func TestPublishStoresOnceUnderOneID(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	pub := NewPublisher(nc)
	ctx := testContext(t)
	publish := func(e Envelope, want Ack) {
		t.Helper()
		ack, err := pub.Publish(ctx, e)
		if err != nil || !sameAck(ack, want) {
			t.Errorf("got %+v, %v, want %+v", ack, err, want)
		}
	}
	publish(To("s.a").Data([]byte("x")), Ack{Stream: "S", Sequence: 1})
	publish(To("s.a").Data([]byte("x")), Ack{Stream: "S", Sequence: 2})
	publish(To("s.a").MsgID("one").ExpectStream("S"), Ack{Stream: "S", Sequence: 3})
	publish(To("s.b").MsgID("one"), Ack{Stream: "S", Sequence: 3, Duplicate: true})
}

func TestPublishRefusals(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, MaxMsgSize: 1024})
	if _, err := nc.Subscribe("core.talker", func(m *nats.Msg) { m.Respond([]byte("hello")) }); err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe("core.forger", func(m *nats.Msg) { m.Respond([]byte(`{"stream":"OTHER","seq":7}`)) }); err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe("core.nameless", func(m *nats.Msg) { m.Respond([]byte(`{"seq":7}`)) }); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)
	for range 3 {
		if _, err := pub.Publish(testContext(t), To("s.a")); err != nil {
			t.Fatal(err)
		}
	}
	big := make([]byte, nc.MaxPayload())
	tests := []struct {
		name string
		e    Envelope
		want error
		text string
	}{
		{"no stream", To("nowhere"), ErrNoStream, `natsx: publish to "nowhere": no stream captures the subject`},
		{"last sequence", To("s.a").ExpectLastSequence(1), ErrWrongSequence, `natsx: publish to "s.a": expected last sequence 1, have 3`},
		{"subject sequence", To("s.b").ExpectLastSubjectSequence(1), ErrWrongSequence, "expected last sequence 1, have 0"},
		{"stream", To("s.a").ExpectStream("T"), ErrWrongStream, "expected stream does not match"},
		{"ttl", To("s.a").TTL(time.Second), ErrTTLNotAllowed, `stream "S" does not have AllowMsgTTL`},
		{"schedule", To("s.a").After(time.Second), ErrSchedulesNotAllowed, "AllowMsgSchedules"},
		{"schedule to nowhere", To("nowhere").After(time.Second), ErrNoStream, "no stream"},
		{"stream's size", To("s.a").Data(make([]byte, 2000)), jetstream.ErrStreamMessageExceedsMaximum, "message size exceeds maximum"},
		{"server's size", To("s.a").Data(append(big, 'x')), nats.ErrMaxPayload, "1048577 bytes of payload and headers are above the server's maximum of 1048576"},
		{"talker", To("core.talker"), ErrBadAck, `"hello"`},
		{"nameless", To("core.nameless"), ErrBadAck, "names no stream"},
		{"forger", To("core.forger").ExpectStream("S"), ErrWrongStream, `expected stream "S", stored in "OTHER"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			_, err := pub.Publish(testContext(t), tt.e)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
			if took := time.Since(start); took > testLimit/2 {
				t.Errorf("took %s, want it at once", took)
			}
		})
	}
	var seq *SequenceError
	_, err := pub.Publish(testContext(t), To("s.a").ExpectLastSequence(9))
	var api *jetstream.APIError
	if !errors.As(err, &seq) || !errors.As(err, &api) || !seq.Known || seq.Have != 3 || seq.Want != 9 {
		t.Errorf("got %#v, want a SequenceError with 9 and 3 and the APIError", err)
	}
}

func TestPublishWithoutPermissions(t *testing.T) {
	t.Parallel()
	s := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "admin", Password: "p"},
			{Username: "app", Password: "p", Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Allow: []string{"s.>", "nowhere"}},
			}},
		}
	})
	createStream(t, connect(t, s.ClientURL(), nats.UserInfo("admin", "p")), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	var asked atomic.Int64
	pub := NewPublisher(connect(t, s.ClientURL(), nats.UserInfo("app", "p"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if strings.Contains(err.Error(), "STREAM.NAMES") {
			asked.Add(1)
		}
	})))
	if _, err := pub.Publish(testContext(t), To("s.a")); err != nil {
		t.Errorf("allowed subject: %v", err)
	}
	_, err := pub.Publish(testContext(t), To("forbidden"))
	if denied, ok := errors.AsType[*PermissionError](err); !ok || !errors.Is(err, ErrPermission) || denied.Subject != "forbidden" {
		t.Errorf("forbidden subject: got %v, want a PermissionError for it", err)
	}
	// Nobody says that there is none.
	ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
	defer cancel()
	if _, err := pub.Publish(ctx, To("nowhere")); !errors.Is(err, ErrTimeout) || errors.Is(err, ErrNoStream) || !strings.Contains(err.Error(), "STREAM.NAMES") {
		t.Errorf("subject without a stream that cannot be looked up: got %v, want ErrTimeout that says why", err)
	}
	if _, err := pub.Publish(testContext(t), To("s.a").After(time.Second)); !errors.Is(err, ErrPermission) {
		t.Errorf("delayed: got %v, want ErrPermission", err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times for what may not be asked, want once", n)
	}
}

// ackThief swallows the first acks of a subject: a subscriber in the middle gets
// the publishes and hands them to the stream with or without their reply.
func ackThief(t *testing.T, nc *nats.Conn, from, to string, steal int64) *atomic.Int64 {
	t.Helper()
	var seen atomic.Int64
	_, err := nc.Subscribe(from, func(m *nats.Msg) {
		n := seen.Add(1)
		forward := &nats.Msg{Subject: to, Header: m.Header, Data: m.Data, Reply: m.Reply}
		if n <= steal {
			forward.Reply = ""
		}
		nc.PublishMsg(forward)
	})
	if err != nil {
		t.Fatal(err)
	}
	return &seen
}

// withAndWithoutReplicas runs a test against a server and a cluster, whose streams
// check a publish in another order.
func withAndWithoutReplicas(t *testing.T, run func(t *testing.T, nc *nats.Conn, replicas int)) {
	t.Run("one server", func(t *testing.T) {
		t.Parallel()
		run(t, connect(t, startServer(t).ClientURL()), 1)
	})
	t.Run("three replicas", func(t *testing.T) {
		t.Parallel()
		run(t, connect(t, startCluster(t).url()), 3)
	})
}

func TestPublishRetriesALostAckUnderOneID(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		e      Envelope
		want   error
		stored int
	}{
		{"automatic", To("in.automatic"), nil, 1},
		{"own", To("in.own").MsgID("mine"), nil, 1},
		// The retry meets a wrong sequence, of its own first try.
		{"sequence", To("in.sequence").ExpectLastSequence(0), nil, 1},
		{"subject", To("in.subject").ExpectLastSubjectSequence(0), nil, 1},
		// The retry meets one that was wrong from the start.
		{"wrong", To("in.wrong").ExpectLastSequence(5), ErrWrongSequence, 0},
	}
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				createStream(t, nc, jetstream.StreamConfig{Name: tt.name, Subjects: []string{"s." + tt.name}, Replicas: replicas})
				seen := ackThief(t, nc, "in."+tt.name, "s."+tt.name, 1)
				ack, err := NewPublisher(nc).Publish(testContext(t), tt.e)
				if !errors.Is(err, tt.want) || tt.want == nil && ack != (Ack{Stream: tt.name, Sequence: 1, Duplicate: true}) {
					t.Errorf("got %+v, %v, want the first try's ack or %v", ack, err, tt.want)
				}
				if n := stored(t, nc, tt.name); n != tt.stored || seen.Load() < 2 {
					t.Errorf("stream has %d messages of %d tries, want %d of several", n, seen.Load(), tt.stored)
				}
			})
		}
	})
}

// TestProbeStoresNothing looks for an id that is not there, and then stores it.
func TestProbeStoresNothing(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: replicas, AllowRollup: true})
		pub := NewPublisher(nc)
		ctx := testContext(t)
		for range 2 {
			if ack, found, err := pub.probe(ctx, &outgoing{subject: "s.a", id: "id"}); found || err != nil {
				t.Errorf("before: got %+v, %t, %v, want nothing", ack, found, err)
			}
		}
		want := Ack{Stream: "S", Sequence: 1}
		if ack, err := pub.Publish(ctx, To("s.a").MsgID("id")); err != nil || !sameAck(ack, want) {
			t.Errorf("publish: got %+v, %v, want %+v", ack, err, want)
		}
		want.Duplicate = true
		if ack, found, err := pub.probe(ctx, &outgoing{subject: "s.a", id: "id"}); !found || err != nil || ack != want {
			t.Errorf("after: got %+v, %t, %v, want %+v", ack, found, err, want)
		}
	})
}

func TestPublishWithoutMessageIDsSendsOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.x"}})
	// It has to meet the wait for an ack, which it does not cut short.
	seen := ackThief(t, nc, "in.x", "s.x", 2)
	pub := NewPublisher(nc, WithoutMessageIDs())
	ctx, cancel := context.WithTimeout(testContext(t), 3*ackWait/2)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := pub.Publish(ctx, To("in.x")); !errors.Is(err, ErrTimeout) {
			t.Errorf("publish: got %v, want ErrTimeout", err)
		}
	})
	wg.Go(func() {
		if _, err := pub.PublishAll(ctx, To("in.x")); !errors.Is(err, ErrTimeout) {
			t.Errorf("publish all: got %v, want ErrTimeout", err)
		}
	})
	wg.Wait()
	if n := stored(t, nc, "S"); n != 2 || seen.Load() != 2 {
		t.Errorf("stored %d of %d tries, want 2 of 2", n, seen.Load())
	}
	if acks, err := pub.PublishAll(testContext(t), To("in.x").MsgID("i"), To("in.x")); err != nil || acks[1].Sequence != 4 {
		t.Errorf("got %v, %v", acks, err)
	}
	for seq, want := range map[uint64]nats.Header{3: {"Nats-Msg-Id": {"i"}}, 4: nil} {
		m, err := s.GetMsg(testContext(t), seq)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, m.Header); diff != "" {
			t.Errorf("message %d (-want +got):\n%s", seq, diff)
		}
	}
}

func TestPublishEndsWithItsContext(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	if _, err := nc.SubscribeSync("hole"); err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := pub.Publish(ctx, To("hole")); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrTimeout and DeadlineExceeded", err)
	}
	ctx, stop := context.WithCancel(testContext(t))
	stop()
	if _, err := pub.Publish(ctx, To("hole")); !errors.Is(err, context.Canceled) || errors.Is(err, ErrTimeout) {
		t.Errorf("got %v, want Canceled", err)
	}
}

// handling is a context as a durable's handler has it.
func handling(parent context.Context, h nats.Header) context.Context {
	return &delivery{msg: Msg{Subject: "in", Header: h, from: &origin{stream: "IN", durable: "worker", ctx: parent}, seq: 7, time: 42}}
}

func TestPublishFromAHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	pub := NewPublisher(nc)
	in := nats.Header{"traceparent": {"tp"}, "tracestate": {"ts"}, "baggage": {"b"}, "Correlation-Id": {"c"}, "Other": {"o"}}
	for attempt := range 2 {
		ctx, cancel := context.WithCancel(handling(testContext(t), in))
		for i, e := range []Envelope{To("s.a"), To("s.b").Header("Traceparent", "own"), To("s.c").MsgID("own")} {
			ack, err := pub.Publish(ctx, e)
			want := Ack{Stream: "S", Sequence: uint64(i + 1), Duplicate: attempt > 0}
			if err != nil || !sameAck(ack, want) {
				t.Errorf("attempt %d: got %+v, %v, want %+v", attempt+1, ack, err, want)
			}
		}
		cancel()
	}
	id := func(e Envelope) string { return "IN/worker/7@42/" + e.digest().String() + "/1" }
	want := []nats.Header{
		{"Nats-Msg-Id": {id(To("s.a"))}, "traceparent": {"tp"}, "tracestate": {"ts"}, "baggage": {"b"}, "Correlation-Id": {"c"}},
		{"Nats-Msg-Id": {id(To("s.b"))}, "Traceparent": {"own"}, "tracestate": {"ts"}, "baggage": {"b"}, "Correlation-Id": {"c"}},
		{"Nats-Msg-Id": {"own"}, "traceparent": {"tp"}, "tracestate": {"ts"}, "baggage": {"b"}, "Correlation-Id": {"c"}},
	}
	for i, h := range want {
		m, err := s.GetMsg(testContext(t), uint64(i+1))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(h, m.Header); diff != "" {
			t.Errorf("message %d (-want +got):\n%s", i+1, diff)
		}
	}
}

func TestPublishTTL(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowMsgTTL: true})
	if _, err := NewPublisher(nc).Publish(testContext(t), To("s.a").TTL(1200*time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	m, err := s.GetMsg(testContext(t), 1)
	if err != nil || m.Header.Get("Nats-TTL") != "2s" {
		t.Errorf("got headers %v, %v, want a TTL of 2s", m.Header, err)
	}
	eventually(t, "the message has expired", func() bool {
		_, err := s.GetMsg(testContext(t), 1)
		return errors.Is(err, jetstream.ErrMsgNotFound)
	})
}

func TestPublishDelayed(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		subjects []string
		policy   jetstream.RetentionPolicy
		want     error
	}{
		{"own subjects", []string{"s.>", "natsx-schedule.*.s.>"}, jetstream.LimitsPolicy, nil},
		{"own subjects, work queue", []string{"s.>", "natsx-schedule.*.s.>"}, jetstream.WorkQueuePolicy, nil},
		{"below the target", []string{"s.>"}, jetstream.LimitsPolicy, nil},
		{"beside the target", []string{"s.*"}, jetstream.LimitsPolicy, nil},
		{"beside the target, work queue", []string{"s.*"}, jetstream.WorkQueuePolicy, ErrSchedulesNotAllowed},
		{"nowhere", []string{"s.x"}, jetstream.LimitsPolicy, ErrSchedulesNotAllowed},
		{"below the target, work queue", []string{"s.>"}, jetstream.WorkQueuePolicy, ErrSchedulesNotAllowed},
		{"interest", []string{"s.>", "natsx-schedule.*.s.>"}, jetstream.InterestPolicy, ErrSchedulesNotAllowed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: tt.subjects, Retention: tt.policy,
				AllowMsgSchedules: true, AllowMsgTTL: true})
			pub := NewPublisher(nc)
			const delay = 350 * time.Millisecond
			due := time.Now().Add(delay)
			_, err := pub.Publish(testContext(t), To("s.x").At(due).TTL(time.Hour).MsgID("i").Header("K", "v").Data([]byte("late")))
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if tt.want != nil {
				return
			}
			// A second one on the same target does not replace the first.
			if _, err := pub.Publish(testContext(t), To("s.x").After(2*delay)); err != nil {
				t.Fatal(err)
			}
			c, err := jetStream(t, nc).CreateConsumer(testContext(t), "S", jetstream.ConsumerConfig{FilterSubject: "s.x", AckPolicy: jetstream.AckExplicitPolicy})
			if err != nil {
				t.Fatal(err)
			}
			m, err := c.Next(jetstream.FetchMaxWait(testLimit))
			if err != nil {
				t.Fatal(err)
			}
			meta, err := m.Metadata()
			if err != nil {
				t.Fatal(err)
			}
			if early := due.Sub(meta.Timestamp); early > 0 || early < -testLimit {
				t.Errorf("stored at %s, want it at %s", meta.Timestamp, due)
			}
			h := m.Headers()
			if string(m.Data()) != "late" || h.Get("K") != "v" || h.Get("Nats-Msg-Id") != "" || h.Get("Nats-TTL") != "3600s" && h.Get("Nats-TTL") != "3600" {
				t.Errorf("got %q with headers %v", m.Data(), h)
			}
			if _, err := c.Next(jetstream.FetchMaxWait(testLimit)); err != nil {
				t.Errorf("the second delayed message: %v", err)
			}
		})
	}
}

func TestEscapeToken(t *testing.T) {
	t.Parallel()
	tests := []struct{ text, want string }{
		{"", "="},
		{"plain-Text_09", "plain-Text_09"},
		{"a.b", "a=2Eb"},
		{"=", "=3D"},
		{"a b*>", "a=20b=2A=3E"},
		{"$x", "=24x"},
		{"ä", "=C3=A4"},
		{"\xff\x00", "=FF=00"},
	}
	for _, tt := range tests {
		if got := EscapeToken(tt.text); got != tt.want {
			t.Errorf("EscapeToken(%q) = %q, want %q", tt.text, got, tt.want)
		}
	}
	for _, bad := range []string{"", "=2e", "=41", "a=", "=4", "a.b", "=G0", "=2+1"} {
		if got, err := UnescapeToken(bad); !errors.Is(err, ErrInvalidSubject) {
			t.Errorf("UnescapeToken(%q) = %q, %v, want ErrInvalidSubject", bad, got, err)
		}
	}
}

func FuzzEscapeToken(f *testing.F) {
	for _, s := range []string{"", "a", "a.b", "=", "==", "=2E", "ä\x00*>$ \t", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		token := EscapeToken(s)
		if strings.Contains(token, ".") || len(token) <= maxSubjectLength && publishFault(token) != "" {
			t.Fatalf("EscapeToken(%q) = %q is no token", s, token)
		}
		// What can be turned back is different for different texts.
		if back, err := UnescapeToken(token); err != nil || back != s {
			t.Fatalf("UnescapeToken(%q) = %q, %v, want %q", token, back, err, s)
		}
	})
}

func FuzzParseAck(f *testing.F) {
	for _, s := range []string{
		`{"stream":"S","seq":1}`, `{"stream":"S","seq":12,"duplicate": true}`, `{"stream":"S","domain":"d","seq":3}`,
		`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"S","seq":0}`,
		`{"stream":"S\u0041","seq":1}`, `{"stream":"","seq":1}`, `{"stream":"S","seq":01}`, `{"stream":"S","seq":}`, `{}`, ``, `null`,
		`{"stream":"S","seq":18446744073709551615}`, `{"stream":"S","seq":99999999999999999999}`, `{"stream":"S","seq":-1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		ack, err := parseAck(data, "S")
		var api *jetstream.APIError
		if err != nil && !errors.Is(err, ErrBadAck) && !errors.As(err, &api) {
			t.Fatalf("got %v, want an ack, ErrBadAck or an APIError", err)
		}
		if err == nil && ack.Stream == "" {
			t.Fatal("an ack without a stream")
		}
		plain, ok := parsePlainAck(data, "")
		if !ok {
			return
		}
		var slow struct {
			Stream string `json:"stream"`
			Seq    uint64 `json:"seq"`
		}
		if err := json.Unmarshal(data, &slow); err != nil || plain != (Ack{Stream: slow.Stream, Sequence: slow.Seq}) {
			t.Fatalf("%q: got %+v, a JSON decoder has %+v, %v", data, plain, slow, err)
		}
	})
}

func TestPublishAllKeepsOrderAndResults(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	pub := NewPublisher(nc)
	if acks, err := pub.PublishAll(testContext(t)); acks != nil || err != nil {
		t.Errorf("nothing: got %v, %v", acks, err)
	}
	// More than may be in flight, with faults of all kinds among them.
	const n = 3 * maxPublishesInFlight / 2
	es := make([]Envelope, n)
	wantErr := map[int]error{}
	for i := range es {
		es[i] = To("s.x").Data(fmt.Append(nil, i)).Header("N", fmt.Sprint(i))
		switch i {
		case 0, n - 1:
			es[i], wantErr[i] = To("nowhere"), ErrNoStream
		case 7:
			es[i], wantErr[i] = To("s.*"), ErrInvalidSubject
		case 8:
			es[i], wantErr[i] = es[i].ExpectLastSequence(12345678), ErrWrongSequence
		case 9:
			es[i], wantErr[i] = es[i].Data(make([]byte, nc.MaxPayload())), nats.ErrMaxPayload
		case 10:
			es[i], wantErr[i] = es[i].TTL(time.Hour), ErrTTLNotAllowed
		case 4000:
			es[i], wantErr[i] = To("nowhere.else"), ErrNoStream
		}
	}
	es[20], es[21] = es[20].MsgID("same"), es[21].MsgID("same")
	acks, err := pub.PublishAll(testContext(t), es...)
	var failed *PublishError
	if !errors.As(err, &failed) || len(failed.Errors) != n || len(failed.Unwrap()) != len(wantErr) || !errors.Is(err, ErrNoStream) {
		t.Fatalf("got %v, want a PublishError of %d failures", err, len(wantErr))
	}
	if want := fmt.Sprintf("natsx: 7 of %d envelopes failed, the first is number 0: publish to \"nowhere\"", n); !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %q, want it to start with %q", err, want)
	}
	seq := uint64(0)
	for i, ack := range acks {
		if want := wantErr[i]; want != nil {
			if !errors.Is(failed.Errors[i], want) || ack != (Ack{}) {
				t.Errorf("envelope %d: got %+v, %v, want %v", i, ack, failed.Errors[i], want)
			}
			continue
		}
		if i != 21 {
			seq++
		}
		if want := (Ack{Stream: "S", Sequence: seq, Duplicate: i == 21}); !sameAck(ack, want) || failed.Errors[i] != nil {
			t.Fatalf("envelope %d: got %+v, %v, want %+v", i, ack, failed.Errors[i], want)
		}
	}
	m, err := s.GetLastMsgForSubject(testContext(t), "s.x")
	if err != nil || string(m.Data) != fmt.Sprint(n-2) || m.Header.Get("N") != fmt.Sprint(n-2) || m.Sequence != seq {
		t.Errorf("the last message is %d %q with %v, %v", m.Sequence, m.Data, m.Header, err)
	}
	if left := nc.NumSubscriptions(); left > 1 {
		t.Errorf("%d subscriptions are left", left)
	}
}

func TestPublishAllIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	pub := NewPublisher(nc)
	es := make([]Envelope, 500)
	for i := range es {
		es[i] = To("s.x").Data(make([]byte, 100))
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := pub.PublishAll(testContext(t), es...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := stored(t, nc, "S"); n != 8*len(es) {
		t.Errorf("stored %d, want %d", n, 8*len(es))
	}
}

func TestPublishAllRetriesLostAcks(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.x"}})
	seen := ackThief(t, nc, "in.x", "s.x", 50)
	es := make([]Envelope, 100)
	for i := range es {
		es[i] = To("in.x")
		if i == 3 {
			es[i] = es[i].ExpectLastSequence(3)
		}
	}
	acks, err := NewPublisher(nc).PublishAll(testContext(t), es...)
	if err != nil {
		t.Fatal(err)
	}
	for i, ack := range acks {
		if want := (Ack{Stream: "S", Sequence: uint64(i + 1), Duplicate: i < 50}); !sameAck(ack, want) {
			t.Errorf("envelope %d: got %+v, want %+v", i, ack, want)
		}
	}
	if n := stored(t, nc, "S"); n != 100 || seen.Load() < 150 {
		t.Errorf("stored %d of %d tries, want 100 of at least 150", n, seen.Load())
	}
}

func TestPublishAllEndsWithItsContext(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	sub, err := nc.SubscribeSync("hole")
	if err != nil {
		t.Fatal(err)
	}
	pub := NewPublisher(nc)
	es := make([]Envelope, maxPublishesInFlight+10)
	for i := range es {
		es[i] = To("hole")
	}
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		sub.NextMsg(testLimit)
		cancel()
	}()
	acks, err := pub.PublishAll(ctx, es...)
	var failed *PublishError
	if !errors.As(err, &failed) || !errors.Is(err, context.Canceled) || len(acks) != len(es) || len(failed.Unwrap()) != len(es) {
		t.Fatalf("got %d acks, %v", len(acks), err)
	}
	if last := failed.Errors[len(es)-1]; !strings.Contains(last.Error(), "not sent") {
		t.Errorf("the last envelope: got %v, want it not sent", last)
	}
	ctx, cancel = context.WithTimeout(testContext(t), 20*time.Millisecond)
	defer cancel()
	if _, err := pub.PublishAll(ctx, es...); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %.200v, want ErrTimeout and DeadlineExceeded", err)
	}
}

func TestPublishAllEndsWithItsConnection(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	for name, opts := range map[string][]PublisherOption{"with ids": nil, "without": {WithoutMessageIDs()}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			watcher, nc := connect(t, s.ClientURL()), connect(t, s.ClientURL())
			hole := "hole." + EscapeToken(name)
			sub, err := watcher.SubscribeSync(hole)
			if err != nil {
				t.Fatal(err)
			}
			if err := watcher.FlushTimeout(testLimit); err != nil {
				t.Fatal(err)
			}
			go func() {
				sub.NextMsg(testLimit)
				nc.Close()
			}()
			if _, err := NewPublisher(nc, opts...).PublishAll(testContext(t), To(hole), To(hole)); !errors.Is(err, ErrConnectionClosed) {
				t.Errorf("got %v, want ErrConnectionClosed", err)
			}
		})
	}
}

// TestPublishThroughALeaderElection stops the leader of the stream while
// messages are published one by one and many at once.
func TestPublishThroughALeaderElection(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: 3})
	pub := NewPublisher(nc)
	const n = 300
	leader := c.leader(t, "S", "")
	started := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range n {
			if i == n/10 {
				close(started)
			}
			if _, err := pub.Publish(testContext(t), To("s.one").Data(fmt.Append(nil, i))); err != nil {
				t.Errorf("publish %d: %v", i, err)
			}
		}
	})
	wg.Go(func() {
		<-started
		for range 5 {
			es := make([]Envelope, n/5)
			for i := range es {
				es[i] = To("s.all")
			}
			if _, err := pub.PublishAll(testContext(t), es...); err != nil {
				t.Errorf("publish all: %v", err)
			}
		}
	})
	<-started
	leader.stop()
	wg.Wait()
	// In the two that are left, each message is there once.
	if got := stored(t, nc, "S"); got != 2*n {
		t.Errorf("stored %d, want %d", got, 2*n)
	}
}

// TestPublishWaitsForAStreamWithoutALeader stops the only server of a stream.
func TestPublishWaitsForAStreamWithoutALeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: 1, AllowAtomicPublish: true})
	pub := NewPublisher(nc)
	publish := map[string]func(context.Context) error{
		"Publish": func(ctx context.Context) error {
			_, err := pub.Publish(ctx, To("s.a"))
			return err
		},
		"PublishAll": func(ctx context.Context) error {
			_, err := pub.PublishAll(ctx, To("s.a"), To("s.b"))
			return err
		},
		"PublishAtomic": func(ctx context.Context) error {
			_, err := pub.PublishAtomic(ctx, To("s.a"), To("s.b"))
			return err
		},
	}
	home := c.leader(t, "S", "")
	home.stop()
	// The others have to learn that it is gone, and may have to agree on another
	// leader of their own before they can tell that the stream exists.
	for name, fn := range publish {
		eventually(t, name+" says that there is no leader", func() bool {
			ctx, cancel := context.WithTimeout(testContext(t), 500*time.Millisecond)
			defer cancel()
			err := fn(ctx)
			if !errors.Is(err, ErrTimeout) {
				t.Fatalf("%s without a leader: got %v, want ErrTimeout", name, err)
			}
			return strings.Contains(err.Error(), "no leader")
		})
	}
	var wg sync.WaitGroup
	for name, fn := range publish {
		wg.Go(func() {
			if err := fn(testContext(t)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	home.start(t)
	wg.Wait()
	if n := stored(t, nc, "S"); n != 5 {
		t.Errorf("stored %d messages, want 5", n)
	}
}
