package natsx

import (
	"context"
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
	out := createStream(t, nc, jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out.>"}})
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
