package natsx

import (
	"context"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"
)

func TestCoreRouteHandlesEachMessageOnce(t *testing.T) {
	t.Parallel()
	const messages, workers = 1000, 8
	s := startServer(t)
	var seen tally
	var busy gauge
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(workers))
	r := runBroker(t, b, Route("work.*").Handle(func(_ context.Context, m *Msg) error {
		defer busy.enter()()
		if m.Attempt() != 1 || m.Stream() != "" || m.Durable() != "" || m.Sequence() != 0 || !m.Time().IsZero() {
			t.Errorf("a core message must know nothing of streams: %+v", m)
		}
		seen.add(m.Subject + " " + string(m.Data))
		return nil
	}))

	pub := connect(t, s.ClientURL())
	for i := range messages {
		if err := pub.Publish(fmt.Sprintf("work.%d", i%7), fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are handled", func() bool { return seen.sum() >= messages })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, messages)
	if got := busy.highest(); got > workers {
		t.Errorf("%d handlers ran at once, want at most %d", got, workers)
	}
	got := r.Stats().Routes[0]
	if got.Received != messages || got.Succeeded != messages || got.Dropped != 0 || got.Running != 0 {
		t.Errorf("got %+v, want all received and succeeded", got)
	}
}

func TestQueueGroupSharesMessages(t *testing.T) {
	t.Parallel()
	const messages = 1000
	s := startServer(t)
	var seen tally
	var brokers []*running
	for range 2 {
		brokers = append(brokers, runBroker(t, NewBroker(connect(t, s.ClientURL())),
			Route("jobs").Queue("g").Handle(func(_ context.Context, m *Msg) error {
				seen.add(string(m.Data))
				return nil
			})))
	}
	pub := connect(t, s.ClientURL())
	for i := range messages {
		if err := pub.Publish("jobs", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are handled", func() bool { return seen.sum() >= messages })
	for i, r := range brokers {
		if err := r.stop(t); err != nil {
			t.Errorf("Run: %v", err)
		}
		if got := r.Stats().Routes[0].Received; got < messages/5 {
			t.Errorf("broker %d received %d of %d, want a fair share", i, got, messages)
		}
	}
	seen.wantOnce(t, messages)
}

// A core subscription cannot hold back its publishers. What does not fit into
// its pending limits is lost by design; natsx must say so.
func TestCoreRouteReportsWhatWasDropped(t *testing.T) {
	t.Parallel()
	const small, large, size = 3000, 200, 512 << 10 // beyond the default limit of 64 MiB
	const messages = small + large
	s := startServer(t)
	release := make(chan struct{})
	book, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log))
	r := runBroker(t, b, Route("flood").Handle(func(context.Context, *Msg) error {
		<-release
		return nil
	}))
	pub := connect(t, s.ClientURL())
	body := make([]byte, size)
	for i := range messages {
		if err := pub.Publish("flood", body[:min(i/small, 1)*size]); err != nil {
			t.Fatal(err)
		}
	}
	if err := pub.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	route := func() RouteStats { return r.Stats().Routes[0] }
	eventually(t, "the loss is counted", func() bool { return route().Dropped > 0 })
	close(release)
	eventually(t, "every message is accounted for", func() bool {
		return route().Succeeded+route().Dropped == messages
	})
	eventually(t, "the loss is logged", func() bool { return len(book.alarms("flood")) > 0 })
	if got := book.alarms("flood"); len(got) > 50 {
		t.Errorf("%d dropped messages made %d log lines, want few: %q", route().Dropped, len(got), got[:5])
	}
}

func TestCoreRouteSurvivesFailures(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	handled := make(chan string, 10)
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log))
	r := runBroker(t, b, Route("core").Handle(func(_ context.Context, m *Msg) error {
		switch string(m.Data) {
		case "panic":
			panic("on purpose")
		case "error":
			return nats.ErrBadHeaderMsg
		}
		handled <- string(m.Data)
		return nil
	}))
	pub := connect(t, s.ClientURL())
	for _, body := range []string{"panic", "error", "fine"} {
		if err := pub.Publish("core", []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if got := receive(t, handled, "the message after the failures"); got != "fine" {
		t.Errorf("got %q", got)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := r.Stats().Routes[0]; got.Failed != 2 || got.Succeeded != 1 {
		t.Errorf("got %+v, want 2 failed and 1 succeeded", got)
	}
}
