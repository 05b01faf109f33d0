package natsx

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
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

const storedFirst = `{"stream":"S","seq":1}`

// A server that takes longer than the first try waits is not asked again and again,
// with no try that waits long enough.
func TestTriesWaitLongerAndLonger(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	pub := NewPublisher(nc)
	ack := func(*nats.Msg) string { return storedFirst }
	const wrong = `{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 9"},"stream":"S","seq":0}`
	var probed atomic.Int64
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
		{
			// The first try is not answered, the next ones meet a wrong sequence, and
			// whether it is their own is what takes long to tell.
			"probe",
			func() func(m *nats.Msg) string {
				var first atomic.Bool
				return func(m *nats.Msg) string {
					switch {
					case m.Header.Get("Nats-Rollup") != "":
						probed.Add(1)
						return `{"stream":"S","seq":1,"duplicate":true}`
					case first.CompareAndSwap(false, true):
						return ""
					}
					return wrong
				}
			}(),
			func(m *nats.Msg) time.Duration {
				if m.Header.Get("Nats-Rollup") != "" {
					return 5 * ackWait / 2
				}
				return 0
			},
			func(ctx context.Context, subject string) (Ack, error) {
				return pub.Publish(ctx, To(subject).ExpectLastSequence(0))
			}, 7,
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
		for call, do := range map[string]func(ctx context.Context, e Envelope) error{
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
		} {
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
				ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
				defer cancel()
				if err := do(ctx, To(always)); !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "more than it can take") {
					t.Errorf("got %v, want ErrTimeout that says why", err)
				}
			})
		}
	}
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
