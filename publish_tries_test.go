package natsx

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// answerLate answers each message on subject with body(m) after late(m), or not at
// all when body is empty, and counts them.
func answerLate(t *testing.T, nc *nats.Conn, subject string, body func(*nats.Msg) string, late func(*nats.Msg) time.Duration) *atomic.Int64 {
	t.Helper()
	var seen atomic.Int64
	_, err := nc.Subscribe(subject, func(m *nats.Msg) {
		seen.Add(1)
		if text := body(m); text != "" {
			time.AfterFunc(late(m), func() { m.Respond([]byte(text)) })
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return &seen
}

// storing are the ways to store an envelope, of which nobody needs the ack.
func storing(pub *Publisher) map[string]func(context.Context, Envelope) error {
	return map[string]func(context.Context, Envelope) error{
		"Publish": func(ctx context.Context, e Envelope) error {
			_, err := pub.Publish(ctx, e)
			return err
		},
		"PublishAll": func(ctx context.Context, e Envelope) error {
			_, err := pub.PublishAll(ctx, e, e)
			return err
		},
		"PublishAtomic": func(ctx context.Context, e Envelope) error {
			_, err := pub.PublishAtomic(ctx, e)
			return err
		},
	}
}

// asking are the ways to send a request, of which nobody needs the answer.
func asking(pub *Publisher) map[string]func(context.Context, Envelope) error {
	return map[string]func(context.Context, Envelope) error{
		"Request": func(ctx context.Context, e Envelope) error {
			_, err := pub.Request(ctx, e)
			return err
		},
		"RequestMany": func(ctx context.Context, e Envelope) error {
			for _, err := range pub.RequestMany(ctx, e) {
				return err
			}
			return errors.New("no answer")
		},
	}
}

const storedFirst = `{"stream":"S","seq":1}`

// A server that takes longer than the first try waits is not asked again and again,
// with no try that waits long enough.
func TestTriesWaitLongerAndLonger(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	pub := NewPublisher(nc)
	ack := func(*nats.Msg) string { return storedFirst }
	for _, tt := range []struct {
		name string
		body func(*nats.Msg) string
		late func(*nats.Msg) time.Duration
		do   func(ctx context.Context, subject string) (Ack, error)
		most int64 // messages that the slow server gets
	}{
		{
			"publish", ack, func(*nats.Msg) time.Duration { return 3 * ackWait / 2 },
			func(ctx context.Context, subject string) (Ack, error) { return pub.Publish(ctx, To(subject)) }, 3,
		},
		{
			"commit",
			func(m *nats.Msg) string {
				if m.Header.Get(batchCommitHeader) == "" {
					return ""
				}
				return storedFirst
			},
			func(*nats.Msg) time.Duration { return 3 * commitWait / 2 },
			func(ctx context.Context, subject string) (Ack, error) {
				return pub.PublishAtomic(ctx, To(subject), To(subject))
			}, 6,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			subject := "slow." + tt.name
			seen := answerLate(t, nc, subject, tt.body, tt.late)
			got, err := tt.do(testContext(t), subject)
			if err != nil || got.Sequence != 1 {
				t.Errorf("got %+v, %v, want the late ack", got, err)
			}
			if n := seen.Load(); n > tt.most {
				t.Errorf("the server got %d messages, want at most %d", n, tt.most)
			}
		})
	}
}

// knownJS takes every subject for a stream's, or asks ask.
type knownJS struct {
	jetstream.JetStream
	ask func(ctx context.Context) error
}

func (js knownJS) StreamNameBySubject(ctx context.Context, _ string) (string, error) {
	return "S", js.ask(ctx)
}

// Answers that nobody is there are no progress.
func TestPublishAllGivesUpOnSilence(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	pub := NewPublisher(nc, WithPublisherJetStream(knownJS{JetStream: jetStream(t, nc), ask: func(context.Context) error { return nil }}))
	eventually(t, "the errors say why", func() bool {
		_, err := pub.publishAll(context.Background(), 300*time.Millisecond, []Envelope{To("a"), To("b")})
		var failed *PublishError
		if !errors.As(err, &failed) || !errors.Is(failed.Errors[0], ErrTimeout) || !errors.Is(failed.Errors[1], ErrTimeout) {
			t.Fatalf("got %v, want ErrTimeout for both", err)
		}
		return strings.Contains(failed.Errors[1].Error(), "no leader")
	})
}

// What is acknowledged while the call asks for a stream and its context ends counts.
func TestPublishAllTakesTheLastAnswers(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	late := make(chan *nats.Msg, 1)
	if _, err := nc.ChanSubscribe("late", late); err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	pub := NewPublisher(nc, WithPublisherJetStream(knownJS{JetStream: jetStream(t, nc), ask: func(context.Context) error {
		second := asked.Add(1) == 2
		if second {
			receive(t, late, "the envelope").Respond([]byte(storedFirst))
			defer cancel()
		}
		// Until all answers are there; the second time only the ack is unread.
		if err := nc.FlushTimeout(testLimit); err != nil {
			t.Error(err)
		}
		return errors.New("unknown")
	}}))
	acks, err := pub.PublishAll(ctx, To("nowhere.1"), To("nowhere.2"), To("late"))
	var failed *PublishError
	if !errors.As(err, &failed) || !errors.Is(failed.Errors[0], context.Canceled) || !errors.Is(failed.Errors[1], context.Canceled) || failed.Errors[2] != nil || acks[2].Sequence != 1 {
		t.Errorf("got %+v, %v, want one acknowledged and the others cancelled", acks, err)
	}
}

// A JetStream API that does not answer is not waited for once for each subject.
func TestPublishAllAsksASilentAPIOnce(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var asked atomic.Int64
	pub := NewPublisher(nc, WithPublisherJetStream(knownJS{JetStream: jetStream(t, nc), ask: func(ctx context.Context) error {
		asked.Add(1)
		<-ctx.Done()
		return ctx.Err()
	}}))
	es := make([]Envelope, 100)
	for i := range es {
		es[i] = To(fmt.Sprintf("nowhere.%d", i))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		pub.PublishAll(ctx, append(es, To("s.x"))...)
	}()
	eventually(t, "what has a stream is stored", func() bool { return stored(t, nc, "S") == 1 })
	eventually(t, "nobody answers", func() bool { return asked.Load() > 0 })
	time.AfterFunc(2*lookupWait, cancel)
	receive(t, done, "the end of the call")
	if n := asked.Load(); n > 3 {
		t.Errorf("asked %d times, want one for all subjects", n)
	}
}

// A subject that somebody subscribes and no stream captures is never acknowledged,
// and the error says so. It is no reason to stop: the stream may be of another
// account.
func TestPublishSaysThatNoStreamListens(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	seen := answerLate(t, nc, "core", func(*nats.Msg) string { return "" }, nil)
	ctx, cancel := context.WithTimeout(testContext(t), ackWait+2*ackWait+2*time.Second)
	defer cancel()
	_, err := NewPublisher(nc).Publish(ctx, To("core"))
	if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "no stream of this account captures the subject") || seen.Load() < 3 {
		t.Errorf("got %v after %d tries", err, seen.Load())
	}
}

// Before the first connection nats.go refuses headers, as if no server had them.
func TestPublishBeforeTheFirstConnection(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	createStream(t, connect(t, p.url()), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowAtomicPublish: true})
	p.stop()
	nc, err := Connect(p.url(), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	pub := NewPublisher(nc)
	calls := storing(pub)
	maps.Copy(calls, asking(pub))
	e := To("s.x").Header("A", "b")
	for name, call := range calls {
		ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
		if err := call(ctx, e); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "never up") {
			t.Errorf("%s: got %v, want ErrTimeout that says why", name, err)
		}
		cancel()
	}
	var wg sync.WaitGroup
	for name, call := range calls {
		wg.Go(func() {
			if err := call(testContext(t), e); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	p.start(t) // the stream is there before a client is
	wg.Wait()
}

// A call whose context has ended sends nothing.
func TestEndedContextSendsNothing(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	sub, err := nc.SubscribeSync("x")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	pub := NewPublisher(nc)
	calls := storing(pub)
	maps.Copy(calls, asking(pub))
	calls["Send"] = pub.Send
	for name, call := range calls {
		err := call(ctx, To("x"))
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want context.Canceled", name, err)
		}
	}
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := sub.Pending(); n != 0 {
		t.Errorf("%d messages were sent", n)
	}
}

// A stream that is slower than a try waits, and loses nothing, gets nothing twice.
func TestPublishAllDoesNotFloodASlowStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	slow := connect(t, nc.ConnectedUrl())
	const n = 1_000
	_, err := slow.Subscribe("slow", func(m *nats.Msg) {
		time.Sleep(3 * ackWait / n) // it is this slow
		m.Respond([]byte(storedFirst))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := slow.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	es := make([]Envelope, n)
	for i := range es {
		es[i] = To("slow")
	}
	if _, err := NewPublisher(nc).PublishAll(testContext(t), es...); err != nil {
		t.Fatal(err)
	}
	if got := nc.Stats().OutMsgs; got > n+n/10 {
		t.Errorf("%d messages were sent, want %d", got, n)
	}
}

// What is lost is sent again once a later one is answered, though others wait.
func TestPublishAllRepeatsWhatIsLost(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	other := connect(t, nc.ConnectedUrl())
	var seen, asked, before atomic.Int64
	again, ended := make(chan struct{}), make(chan struct{})
	if _, err := nc.Subscribe("one", func(m *nats.Msg) {
		switch {
		case string(m.Data) != "lost":
		case seen.Add(1) == 1:
			return
		default:
			before.Store(asked.Load())
			close(again)
		}
		m.Respond([]byte(storedFirst))
	}); err != nil {
		t.Fatal(err)
	}
	// Of many others one is answered every now and then.
	if _, err := other.Subscribe("many", func(m *nats.Msg) {
		asked.Add(1)
		select {
		case <-again:
		case <-time.After(ackWait / 4):
		}
		m.Respond([]byte(storedFirst))
	}); err != nil {
		t.Fatal(err)
	}
	if err := other.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	es := []Envelope{To("one").Data([]byte("lost")), To("one")}
	for range 200 {
		es = append(es, To("many"))
	}
	go func() {
		defer close(ended)
		if _, err := NewPublisher(nc).PublishAll(testContext(t), es...); err != nil {
			t.Error(err)
		}
	}()
	receive(t, again, "the lost one once more")
	if n := before.Load(); n > 100 {
		t.Errorf("%d of the others came first", n)
	}
	receive(t, ended, "the end of the call")
}

func TestTryWait(t *testing.T) {
	t.Parallel()
	for unanswered, want := range []time.Duration{1, 2, 4, 8, 8, 8} {
		if got := tryWait(time.Second, unanswered); got != want*time.Second {
			t.Errorf("after %d: got %s, want %s", unanswered, got, want*time.Second)
		}
	}
}

// The server drops what comes while too much waits for a stream, and says so.
func TestPublishToAnOverloadedStream(t *testing.T) {
	t.Parallel()
	const tooMany = `{"error":{"code":429,"err_code":10167,"description":"too many requests"},"stream":"S","seq":0}`
	atOnce := func(*nats.Msg) time.Duration { return 0 }
	for name, opts := range map[string][]PublisherOption{"ids": nil, "no ids": {WithoutMessageIDs()}} {
		nc := connect(t, startServer(t).ClientURL())
		pub := NewPublisher(nc, opts...)
		for call, do := range storing(pub) {
			t.Run(call+" with "+name, func(t *testing.T) {
				t.Parallel()
				var answers atomic.Int64
				answerLate(t, nc, call, func(*nats.Msg) string {
					if answers.Add(1) <= 3 {
						return tooMany
					}
					return storedFirst
				}, atOnce)
				if err := do(testContext(t), To(call)); err != nil {
					t.Errorf("got %v, want it to be tried again", err)
				}
				always := call + ".always"
				answerLate(t, nc, always, func(*nats.Msg) string { return tooMany }, atOnce)
				eventually(t, "the error says why", func() bool {
					ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
					defer cancel()
					err := do(ctx, To(always))
					if !errors.Is(err, ErrTimeout) {
						t.Fatalf("got %v, want ErrTimeout", err)
					}
					return strings.Contains(err.Error(), "more than it can take")
				})
			})
		}
	}
	t.Run("in process", func(t *testing.T) {
		t.Parallel()
		const inUse = `{"error":{"code":409,"err_code":10158,"description":"duplicate message id is in process"},"stream":"S","seq":0}`
		nc := connect(t, startServer(t).ClientURL())
		seen := answerLate(t, nc, "kept", func(*nats.Msg) string { return inUse }, atOnce)
		ctx, cancel := context.WithTimeout(testContext(t), 2*time.Second)
		defer cancel()
		if _, err := NewPublisher(nc).Publish(ctx, To("kept")); !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "in process") {
			t.Errorf("got %v, want ErrTimeout that says why", err)
		}
		if n := seen.Load(); n > 20 {
			t.Errorf("asked %d times within 2 s, want longer and longer pauses", n)
		}
	})
	t.Run("for real", func(t *testing.T) {
		t.Parallel()
		for _, opts := range [][]PublisherOption{nil, {WithFastIngest()}} {
			nc := connect(t, startServer(t, func(o *server.Options) { o.StreamMaxBufferedMsgs = 100 }).ClientURL())
			createStream(t, nc, fastStreamConfig(1))
			const n = 2000
			if _, err := NewPublisher(nc, opts...).PublishAll(testContext(t), numberedEnvelopes(n)...); err != nil {
				t.Fatal(err)
			}
			wantStored(t, nc, allNumbers(n))
		}
	})
}

// What PublishAll has under way is bounded by bytes as well. Of one message that is
// larger nothing else is under way.
func TestPublishAllBoundsItsBytes(t *testing.T) {
	t.Parallel()
	s := startServer(t, withMaxPayload(maxBytesInFlight+1))
	nc, store := connect(t, s.ClientURL()), connect(t, s.ClientURL())
	sub, err := store.SubscribeSync("hole")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, maxBytesInFlight+1)
	var es []Envelope
	for _, size := range []int{len(body), maxBytesInFlight - 10, 10, 1, 1} {
		es = append(es, To("hole").Data(body[:size]))
	}
	ended := make(chan error, 1)
	go func() {
		_, err := NewPublisher(nc, WithoutMessageIDs()).PublishAll(testContext(t), es...)
		ended <- err
	}()
	sent := 0
	for _, together := range []int{1, 2, 2} {
		var batch []*nats.Msg
		for range together {
			m, err := sub.NextMsg(testLimit)
			if err != nil {
				t.Fatalf("envelope %d: %v", sent+len(batch), err)
			}
			batch = append(batch, m)
		}
		if m, err := sub.NextMsg(50 * time.Millisecond); err == nil {
			t.Fatalf("%d bytes were sent beside %d envelopes that have no ack", len(m.Data), together)
		}
		for _, m := range batch {
			sent++
			if err := m.Respond(fmt.Appendf(nil, `{"stream":"S","seq":%d}`, sent)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := receive(t, ended, "the end of PublishAll"); err != nil {
		t.Error(err)
	}
}
