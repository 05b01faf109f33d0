package natsx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() { childModes["copier"] = copierChild }

// copierChild runs a route that publishes two messages for each that it handles,
// and asks its parent between and after them whether to go on.
func copierChild() int {
	nc, err := nats.Connect(childURL(), nats.MaxReconnects(-1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	pub := NewPublisher(nc)
	err = NewBroker(nc, WithWorkers(4)).Run(context.Background(),
		Route("in.*").Durable("copier").AckWait(time.Second).Handle(func(ctx context.Context, m *Msg) error {
			for i, subject := range []string{"out.first.", "out.second."} {
				if _, err := pub.Publish(ctx, To(subject+m.Token(1)).Data(m.Data)); err != nil {
					return err
				}
				if _, err := nc.Request(fmt.Sprintf("published.%d", i+1), m.Data, testLimit); err != nil {
					return err
				}
			}
			return nil
		}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// What a handler publishes is stored once, though its process is killed between
// publishing and the ack and the message is handled again: 200 times.
func TestKilledHandlersPublishOnce(t *testing.T) {
	t.Parallel()
	const messages = 200
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	in := createStream(t, nc, jetstream.StreamConfig{Name: "IN", Subjects: []string{"in.*"}, Retention: jetstream.WorkQueuePolicy})
	// 200 kills may take longer than the default window on a slow machine.
	out := createStream(t, nc, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out.>"}, Duplicates: time.Hour})
	publishMany(t, nc, messages, func(i int) *nats.Msg {
		return &nats.Msg{Subject: fmt.Sprint("in.", i), Data: fmt.Append(nil, i)}
	})
	asks := make(chan *nats.Msg, 10*messages)
	if _, err := nc.ChanSubscribe("published.*", asks); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}

	c := startChild(t, "copier", s.ClientURL(), nil)
	for doomed := map[string]bool{}; len(doomed) < messages; {
		m := receive(t, asks, "a handler that has published")
		body := string(m.Data)
		// Every second one dies between its two messages, the others after both.
		dies := "published.2"
		if body[len(body)-1]%2 == 0 {
			dies = "published.1"
		}
		if doomed[body] || m.Subject != dies {
			m.Respond(nil)
			continue
		}
		doomed[body] = true
		c.kill()
		for len(asks) > 0 {
			<-asks // of the dead
		}
		c = startChild(t, "copier", s.ClientURL(), nil)
	}
	ended := make(chan struct{})
	defer func() { close(ended) }()
	go func() {
		for {
			select {
			case m := <-asks:
				m.Respond(nil)
			case <-ended:
				return
			}
		}
	}()
	eventually(t, "every message is acknowledged", func() bool {
		info, err := in.Info(t.Context())
		return err == nil && info.State.Msgs == 0
	})

	info, err := out.Info(testContext(t), jetstream.WithSubjectFilter("out.>"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range messages {
		for _, subject := range []string{"out.first.", "out.second."} {
			if n := info.State.Subjects[fmt.Sprint(subject, i)]; n != 1 {
				t.Errorf("%s%d is stored %d times", subject, i, n)
			}
		}
	}
	if info.State.Msgs != 2*messages {
		t.Errorf("%d messages are stored, want %d", info.State.Msgs, 2*messages)
	}
}

// A handler that meets a wrong sequence, reads it anew and tries again does so with
// the same id: when it runs once more, its first try is known for what it stored.
func TestHandlerThatExpectsPublishesOnce(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "IN", Subjects: []string{"in.*"}})
		out := createStream(t, nc, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out.>"}, Replicas: replicas, AllowAtomicPublish: true})
		pub := NewPublisher(nc)
		kinds := map[string]func(ctx context.Context, subject string, last uint64) (Ack, error){
			"one": func(ctx context.Context, subject string, last uint64) (Ack, error) {
				return pub.Publish(ctx, To(subject).ExpectLastSubjectSequence(last))
			},
			"batch": func(ctx context.Context, subject string, last uint64) (Ack, error) {
				return pub.PublishAtomic(ctx, To(subject+".a"), To(subject).ExpectLastSubjectSequence(last))
			},
		}
		type try struct {
			stale bool // it begins with what it read before somebody else published
			ack   Ack
			err   error
		}
		results := make(chan try, 10)
		runBroker(t, NewBroker(nc), Route("in.*").Durable("d").Retry(3).Backoff(time.Millisecond, time.Millisecond).Handle(func(ctx context.Context, m *Msg) error {
			kind, subject := kinds[m.Token(1)], "out."+m.Token(1)
			// Something else that is published before and after does not matter.
			if _, err := pub.Publish(ctx, To("out.before."+m.Token(1))); err != nil {
				return err
			}
			r := try{stale: m.Attempt() == 1}
			for {
				last, err := out.GetLastMsgForSubject(ctx, subject)
				if err != nil {
					return err
				}
				seq := last.Sequence
				if r.stale {
					seq--
				}
				if r.ack, r.err = kind(ctx, subject, seq); !r.stale {
					break
				}
				if !errors.Is(r.err, ErrWrongSequence) {
					t.Errorf("got %v, want ErrWrongSequence", r.err)
				}
				r.stale = false
			}
			if _, err := pub.Publish(ctx, To("out.after."+m.Token(1))); err != nil {
				return err
			}
			results <- r
			if m.Attempt() == 1 {
				return errors.New("once more")
			}
			return nil
		}))
		for name, n := range map[string]uint64{"one": 3 + 1, "batch": 3 + 2} {
			before := stored(t, nc, "OUT")
			publish(t, nc, &nats.Msg{Subject: "out." + name})
			publish(t, nc, &nats.Msg{Subject: "in." + name})
			first, second := receive(t, results, "an attempt"), receive(t, results, "another")
			if first.err != nil || second.err != nil || !second.ack.Duplicate || first.ack.Sequence != second.ack.Sequence {
				t.Errorf("%s: got %+v and %+v, want the second to be the first", name, first, second)
			}
			if got := stored(t, nc, "OUT") - before; got != int(n) {
				t.Errorf("%s: stored %d messages, want %d", name, got, n)
			}
		}
	})
}

// Without replicas a server judges expectations before message ids. What an earlier
// attempt stored is no wrong sequence.
func TestNextAttemptFindsWhatWasExpected(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "IN", Subjects: []string{"in.*"}})
		createStream(t, nc, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out.>"}, Replicas: replicas})
		pub := NewPublisher(nc)
		acks := make(chan Ack, 2)
		runBroker(t, NewBroker(nc), Route("in.*").Durable("d").Retry(3).Backoff(time.Millisecond, time.Millisecond).Handle(func(ctx context.Context, m *Msg) error {
			ack, err := pub.Publish(ctx, To("out.x").ExpectLastSubjectSequence(0))
			if err != nil {
				t.Error(err)
			}
			// Nothing has it: the sequence is wrong.
			if _, err := pub.Publish(ctx, To("out.x").ExpectLastSubjectSequence(7)); !errors.Is(err, ErrWrongSequence) {
				t.Errorf("attempt %d: got %v, want ErrWrongSequence", m.Attempt(), err)
			}
			acks <- ack
			if m.Attempt() == 1 {
				return errors.New("once more")
			}
			return nil
		}))
		publish(t, nc, &nats.Msg{Subject: "in.x"})
		if first, second := receive(t, acks, "an attempt"), receive(t, acks, "another"); !sameAck(first, Ack{Stream: "OUT", Sequence: 1}) || second != (Ack{Stream: "OUT", Sequence: 1, Duplicate: true}) {
			t.Errorf("got %+v and %+v, want the second to be the first", first, second)
		}
	})
}
