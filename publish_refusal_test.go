package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Whatever fits without natsx's own headers is taken without them.
func TestPayloadOfExactlyTheMaximum(t *testing.T) {
	t.Parallel()
	const most = 4_000
	nc := connect(t, startServer(t, withMaxPayload(most)).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowBatchPublish: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "SMALL", Subjects: []string{"small.>"}, MaxMsgSize: most / 2})
	if _, err := nc.Subscribe("echo", func(m *nats.Msg) { m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	carried := nats.Header{"traceparent": {"tp"}, "Correlation-Id": {"c"}}
	for name, opts := range map[string][]PublisherOption{"plain": nil, "bare": {WithoutMessageIDs()}, "fast": {WithFastIngest()}} {
		pub := NewPublisher(nc, opts...)
		for where, ctx := range map[string]context.Context{"outside": testContext(t), "handler": handling(testContext(t), carried)} {
			for call, send := range sending(pub) {
				e := To("s.x").Data(bytes.Repeat([]byte("1"), most))
				switch {
				case call == "PublishAtomic":
					continue
				case strings.HasPrefix(call, "Request"):
					e.subject = "echo"
				}
				if err := send(ctx, e); err != nil && !strings.Contains(err.Error(), "decode the answer") {
					t.Errorf("%s, %s, %s: %v", name, where, call, err)
				}
				if err := send(ctx, e.Header("K", "v")); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("%s, %s, %s with a header: got %v, want ErrMaxPayload", name, where, call, err)
				}
				if strings.HasPrefix(call, "Publish") {
					e.subject, e.data = "small.x", e.data[:most/2]
					if err := send(ctx, e); err != nil {
						t.Errorf("%s, %s, %s to a stream with a MaxMsgSize: %v", name, where, call, err)
					}
				}
			}
			if err := pub.Send(ctx, To("s.x").JSON(string(make([]byte, 0))).JSON(strings.Repeat("x", most-2))); err != nil {
				t.Errorf("%s, %s: JSON: %v", name, where, err)
			}
		}
	}
	// No more is left out than has to be.
	id := "IN/worker/7@42/"
	for size, want := range map[int][]string{most - 200: {"Nats-Msg-Id", "Correlation-Id", "traceparent"}, most - 100: {"Nats-Msg-Id"}, most - 20: nil} {
		ack, err := NewPublisher(nc).Publish(handling(testContext(t), carried), To("s.y").Data(make([]byte, size)))
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.GetMsg(testContext(t), ack.Sequence)
		if err != nil {
			t.Fatal(err)
		}
		got := slices.Sorted(maps.Keys(m.Header))
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" || len(want) > 0 && !strings.HasPrefix(m.Header.Get("Nats-Msg-Id"), id) {
			t.Errorf("%d bytes (-want +got):\n%s", size, diff)
		}
	}
	_, err := NewPublisher(nc).PublishAtomic(testContext(t), To("s.x").Data(make([]byte, most)))
	if !errors.Is(err, nats.ErrMaxPayload) || !strings.Contains(err.Error(), "with those of an atomic batch") {
		t.Errorf("atomic: got %v, want ErrMaxPayload that says why", err)
	}
}

// A stream that acknowledges nothing is told soon, and nothing is sent twice.
func TestPublishToAStreamWithoutAcks(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string][]PublisherOption{"ids": nil, "bare": {WithoutMessageIDs()}, "fast": {WithFastIngest()}} {
		nc := connect(t, startServer(t).ClientURL())
		pub := NewPublisher(nc, opts...)
		calls := storing(pub)
		maps.Copy(calls, storingDelayed(pub))
		calls["TTL"] = func(ctx context.Context, e Envelope) error { return calls["Publish"](ctx, e.TTL(time.Hour)) }
		for call, store := range calls {
			t.Run(name+", "+call, func(t *testing.T) {
				t.Parallel()
				subject := "s." + EscapeToken(call)
				cfg := jetstream.StreamConfig{Name: EscapeToken(call), Subjects: []string{subject}, NoAck: true, AllowMsgTTL: true}
				if call == "PublishAtomic" {
					cfg.AllowAtomicPublish = true
				}
				createStream(t, nc, cfg)
				began := time.Now()
				err := store(testContext(t), To(subject))
				if !errors.Is(err, ErrNoAck) || errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "NoAck") {
					t.Errorf("got %v, want ErrNoAck", err)
				}
				if took := time.Since(began); took > DefaultPublishTimeout/3 {
					t.Errorf("took %s", took)
				}
				n, sent := stored(t, nc, cfg.Name), map[string]int{"PublishAll": 2, "Publish": 1, "PublishAtomic": 1}[call] // else it is looked up first
				if strings.Contains(err.Error(), "was not sent") {
					sent = 0
				}
				if n != sent {
					t.Errorf("%d are stored, %d were sent: %v", n, sent, err)
				}
				// From then on nothing is sent.
				if err := store(testContext(t), To(subject)); !errors.Is(err, ErrNoAck) || !strings.Contains(err.Error(), "was not sent") {
					t.Errorf("got %v, want ErrNoAck before anything is sent", err)
				}
				if again := stored(t, nc, cfg.Name); again != n {
					t.Errorf("%d are stored, %d were before", again, n)
				}
			})
		}
	}
}

// A TTL that would be ignored is refused before anything is sent.
func TestIgnoredTTLIsRefused(t *testing.T) {
	t.Parallel()
	admin, _ := startGuarded(t, &server.Permissions{})
	createStream(t, admin, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowMsgTTL: true, AllowAtomicPublish: true, AllowBatchPublish: true})
	createStream(t, admin, jetstream.StreamConfig{Name: "N", Subjects: []string{"n.>"}, AllowAtomicPublish: true, AllowMsgSchedules: true, AllowBatchPublish: true})
	// A server before 2.11 knows neither TTL nor AllowMsgTTL.
	version := func(v string) nats.Option {
		return nats.SetCustomDialer(&wire{edit: func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"version":"`+server.VERSION+`"`), []byte(`"version":"`+v+`"`), 1)
		}})
	}
	for _, tt := range []struct {
		name, version, subject string
		lookup                 bool // whether the stream may be looked up
		want                   error
	}{
		{"allowed", server.VERSION, "s.x", true, nil},
		{"not allowed", server.VERSION, "n.x", true, ErrTTLNotAllowed},
		{"allowed, no look-up", server.VERSION, "s.x", false, nil},
		{"not allowed, no look-up", server.VERSION, "n.x", false, ErrTTLNotAllowed},
		{"old server before a new one", "2.10.29", "s.x", true, nil},
		{"old server, not allowed", "2.10.29", "n.x", true, ErrTTLNotAllowed},
		{"old server, no look-up", "2.10.29", "s.x", false, ErrTTLNotAllowed},
	} {
		for _, opts := range [][]PublisherOption{nil, {WithFastIngest()}} {
			t.Run(fmt.Sprintf("%s, %d options", tt.name, len(opts)), func(t *testing.T) {
				user := nats.UserInfo("admin", "a")
				js := jetStream(t, admin)
				if !tt.lookup {
					js = deniedJS{js}
				}
				nc := connect(t, admin.ConnectedUrl(), user, version(tt.version))
				pub := NewPublisher(nc, append(opts, WithPublisherJetStream(js))...)
				calls := storing(pub)
				if tt.lookup && tt.want != nil {
					maps.Copy(calls, storingDelayed(pub))
				}
				for name, store := range calls {
					if name == "PublishAtomic" && tt.version != server.VERSION {
						continue
					}
					before := stored(t, admin, "S") + stored(t, admin, "N")
					err := store(testContext(t), To(tt.subject).TTL(time.Hour))
					if !errors.Is(err, tt.want) {
						t.Errorf("%s: got %v, want %v", name, err, tt.want)
					}
					if after := stored(t, admin, "S") + stored(t, admin, "N"); tt.want != nil && after != before {
						t.Errorf("%s: %d were stored", name, after-before)
					}
				}
			})
		}
	}
}

// deniedJS may not be asked.
type deniedJS struct{ jetstream.JetStream }

func (deniedJS) StreamNameBySubject(context.Context, string) (string, error) {
	return "", &PermissionError{Operation: "publish", Subject: "$JS.API.STREAM.NAMES"}
}

// What natsx asks the stream is not seen by those who listen to the subject.
func TestQuestionsAreNotSeenBySubscribers(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: replicas, AllowRollup: true, AllowAtomicPublish: true, MaxMsgsPerSubject: 1})
		listener := connect(t, nc.ConnectedUrl())
		seen := make(chan *nats.Msg, 100)
		if _, err := listener.ChanSubscribe("s.>", seen); err != nil {
			t.Fatal(err)
		}
		if err := listener.FlushTimeout(testLimit); err != nil {
			t.Fatal(err)
		}
		pub := NewPublisher(nc)
		e := To("s.x").Data([]byte("x"))
		for run := range 2 {
			ctx := handling(testContext(t), nil)
			ack, err := pub.Publish(ctx, e.ExpectLastSubjectSequence(0))
			if want := (Ack{Stream: "S", Sequence: 1, Duplicate: run > 0}); err != nil || !sameAck(ack, want) {
				t.Errorf("run %d: got %+v, %v, want %+v", run+1, ack, err, want)
			}
			if _, err := pub.PublishAll(ctx, e.ExpectLastSubjectSequence(77)); !errors.Is(err, ErrWrongSequence) {
				t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
			}
			if _, err := pub.Publish(testContext(t), e.MsgID("own").ExpectLastSubjectSequence(77)); !errors.Is(err, ErrWrongSequence) {
				t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
			}
			batch := []Envelope{To("s.a").Data([]byte("x")).MsgID("a"), To("s.b").Data([]byte("x")).MsgID("b")}
			if ack, err := pub.PublishAtomic(ctx, batch...); err != nil || ack.Duplicate != (run > 0) {
				t.Errorf("run %d: got %+v, %v", run+1, ack, err)
			}
			if run == 0 { // the message is gone by then, and its id is known
				if _, err := pub.Publish(testContext(t), To("s.x").Data([]byte("y"))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := nc.FlushTimeout(testLimit); err != nil {
			t.Fatal(err)
		}
		if err := nc.Publish("s.end", []byte("end")); err != nil {
			t.Fatal(err)
		}
		for {
			m := receive(t, seen, "a message")
			if string(m.Data) == "end" {
				return
			}
			if len(m.Data) == 0 || m.Header.Get("Nats-Rollup") != "" || m.Header.Get("Nats-Trace-Only") != "" {
				t.Errorf("subscribers see %q with %v", m.Data, m.Header)
			}
		}
	})
}

// Where the server does not trace for the user, the stream is read; and where that may
// not be, the error says that the outcome is unknown.
func TestWrongSequenceWithoutTracing(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		allow []string
		known bool
	}{
		{"read", []string{"s.>", "$JS.API.STREAM.MSG.GET.S"}, true},
		{"neither", []string{"s.>"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			admin, nc := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: tt.allow}})
			createStream(t, admin, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
			pub := NewPublisher(nc)
			for run := range 2 {
				for subject, e := range map[string]Envelope{
					"s.x": To("s.x").ExpectLastSubjectSequence(0),
				} {
					ctx := handling(testContext(t), nil)
					ack, err := pub.Publish(ctx, e)
					switch {
					case run == 0 || tt.known:
						if err != nil || ack.Sequence != 1 {
							t.Errorf("run %d, %s: got %+v, %v, want the first ack", run+1, subject, ack, err)
						}
					case !errors.Is(err, ErrWrongSequence) || !strings.Contains(err.Error(), "unknown") || strings.Count(err.Error(), "natsx:") != 1:
						t.Errorf("run %d, %s: got %v, want ErrWrongSequence that says what is unknown", run+1, subject, err)
					}
					if tt.known { // one that was never stored
						if _, err := pub.Publish(ctx, e.Data([]byte("other"))); !errors.Is(err, ErrWrongSequence) || strings.Contains(err.Error(), "unknown") {
							t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
						}
					}
				}
			}
		})
	}
}
