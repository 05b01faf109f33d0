package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestLoweredPullLimitsAreFollowed lowers the limits on pulls under a running route,
// which goes on within them.
func TestLoweredPullLimitsAreFollowed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		lower func(*jetstream.ConsumerConfig)
	}{
		{"expires", func(c *jetstream.ConsumerConfig) { c.MaxRequestExpires = 100 * time.Millisecond }},
		{"batch", func(c *jetstream.ConsumerConfig) { c.MaxRequestBatch = 1 }},
		{"bytes", func(c *jetstream.ConsumerConfig) { c.MaxRequestMaxBytes = 200 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			orders(t, nc)
			var handled tally
			b := NewBroker(nc)
			runBroker(t, b, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
				handled.add(string(m.Data))
				return nil
			}))
			cfg := consumerInfo(t, nc, "ORDERS", "d").Config
			tt.lower(&cfg)
			if _, err := jetStream(t, nc).UpdateConsumer(testContext(t), "ORDERS", cfg); err != nil {
				t.Fatal(err)
			}
			// More than the pulls that wait already bring.
			const count = 2 * DefaultWorkers
			publishMany(t, nc, count, numbered("orders.x"))
			eventually(t, "all are handled", func() bool { return handled.sum() == count })
			handled.wantOnce(t, count)
			if err := b.Health(); err != nil {
				t.Errorf("Health: %v", err)
			}
		})
	}
}

// TestMessageLargerThanAPullMayBring has a consumer whose pulls are limited to
// fewer bytes than one of its messages has.
func TestMessageLargerThanAPullMayBring(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	if _, err := jetStream(t, nc).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "d", FilterSubject: "orders.*", AckPolicy: jetstream.AckExplicitPolicy, MaxRequestMaxBytes: 1000,
	}); err != nil {
		t.Fatal(err)
	}
	const count = 50
	publishMany(t, nc, count, func(i int) *nats.Msg {
		size := 10
		if i%10 == 5 {
			size = 5000
		}
		return &nats.Msg{Subject: "orders.x", Data: make([]byte, size)}
	})
	var handled tally
	// So many workers that a pull for all of them is bound in bytes.
	runBroker(t, NewBroker(nc, WithWorkers(200)), Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled.add(strconv.FormatUint(m.Sequence(), 10))
		return nil
	}))
	eventually(t, "all are handled", func() bool { return handled.sum() == count })
	handled.wantOnce(t, count)
}

// TestDeletedConsumerDoesNotHoldRunUp deletes the consumer while a handler runs
// whose result must be confirmed: nobody is left to do so.
func TestDeletedConsumerDoesNotHoldRunUp(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	tests := []struct {
		name   string
		route  RouteBuilder
		result error
	}{
		{"ack", Route("orders.ack").Durable("ack").ConfirmAcks(), nil},
		{"letter", Route("orders.letter").Durable("letter").DLQ("dlq.x"), Permanent(errors.New("broken"))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			publishAcked(t, nc, "orders."+tt.name, "x")
			handling, ended := make(chan struct{}, 1), make(chan struct{})
			r := runBroker(t, NewBroker(nc), tt.route.Handle(func(context.Context, *Msg) error {
				handling <- struct{}{}
				<-ended
				return tt.result
			}))
			receive(t, handling, "the handler")
			if err := jetStream(t, nc).DeleteConsumer(testContext(t), "ORDERS", tt.name); err != nil {
				t.Fatal(err)
			}
			eventually(t, "Run drains", func() bool { return r.ran.Load().failed() })
			close(ended)
			if err := r.wait(t); !errors.Is(err, ErrConsumerDeleted) || errors.Is(err, ErrDrainTimeout) {
				t.Errorf("got %v, want ErrConsumerDeleted alone", err)
			}
		})
	}
}

// TestConsumerRecreatedDuringAPause has somebody delete and create the durable
// while its route is paused: its progress is gone, and going on would handle
// everything again.
func TestConsumerRecreatedDuringAPause(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	publishAcked(t, nc, "orders.x", "1", "2", "3")
	var handled tally
	r := runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled.add(string(m.Data))
		return nil
	}))
	eventually(t, "all are handled", func() bool { return handled.sum() == 3 && settled(t, nc, "ORDERS", "d") })
	if err := r.Pause("d"); err != nil {
		t.Fatal(err)
	}
	js := jetStream(t, nc)
	cfg := consumerInfo(t, nc, "ORDERS", "d").Config
	if err := js.DeleteConsumer(testContext(t), "ORDERS", "d"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateConsumer(testContext(t), "ORDERS", cfg); err != nil {
		t.Fatal(err)
	}
	if err := r.Resume("d"); !errors.Is(err, ErrConsumerDeleted) {
		t.Errorf("Resume: %v, want ErrConsumerDeleted", err)
	}
	if err := r.wait(t); !errors.Is(err, ErrConsumerDeleted) {
		t.Errorf("Run: %v, want ErrConsumerDeleted", err)
	}
	handled.wantOnce(t, 3)
}

// TestLetterIsOfTheMessageAsItCame has a handler that makes its message its own.
func TestLetterIsOfTheMessageAsItCame(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").DLQ("dlq.x").Handle(func(_ context.Context, m *Msg) error {
		m.Subject, m.Data = "changed", []byte("changed")
		m.Header.Set("Key", "changed")
		m.Header.Set("Added", "changed")
		return Permanent(errors.New("broken"))
	}))
	publish(t, nc, &nats.Msg{Subject: "orders.x", Data: []byte("payload"), Header: nats.Header{"Key": {"value"}}})
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	letter := letters(t, nc, "DLQ")[0]
	if got := letter.Header.Get(HeaderDLQSubject); got != "orders.x" {
		t.Errorf("subject %q, want orders.x", got)
	}
	if string(letter.Data) != "payload" || letter.Header.Get("Key") != "value" || letter.Header.Get("Added") != "" {
		t.Errorf("got %q with %v, want the message as it came", letter.Data, letter.Header)
	}
}

// TestDLQMadeAnewMustKeepLetters has the DLQ's stream come back as one that
// acknowledges what it does not store.
func TestDLQMadeAnewMustKeepLetters(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, workQueue)
	js := jetStream(t, nc)
	b := NewBroker(nc)
	runBroker(t, b, Route("orders.*").Durable("d").DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		return Permanent(errors.New("broken"))
	}))
	health := func(text string) func() bool {
		return func() bool {
			err := b.Health()
			return err != nil && strings.Contains(err.Error(), text)
		}
	}
	if err := js.DeleteStream(testContext(t), "DLQ"); err != nil {
		t.Fatal(err)
	}
	publishAcked(t, nc, "orders.x", "1", "2")
	eventually(t, "Health tells that the DLQ takes no letter", health("not stored"))
	createStream(t, nc, jetstream.StreamConfig{Name: "LETTERS", Subjects: []string{"dlq.>"}, Retention: jetstream.InterestPolicy})
	eventually(t, "Health tells what is wrong with the DLQ", health("interest retention"))
	if got := stored(t, nc, "ORDERS"); got != 2 {
		t.Errorf("%d originals are left, want both", got)
	}
	if err := js.DeleteStream(testContext(t), "LETTERS"); err != nil {
		t.Fatal(err)
	}
	createStream(t, nc, jetstream.StreamConfig{Name: "KEPT", Subjects: []string{"dlq.>"}})
	eventually(t, "both letters are stored", func() bool { return stored(t, nc, "KEPT") == 2 && stored(t, nc, "ORDERS") == 0 })
	eventually(t, "Health is well again", func() bool { return b.Health() == nil })
}

// TestPausesBurnNoAttempt pauses and resumes two brokers again and again while they
// share a backlog: what the server sends meanwhile is handled, once.
func TestPausesBurnNoAttempt(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	const count = 2000
	var handled tally
	all := make(chan struct{})
	var pausing sync.WaitGroup
	for range 2 {
		b := NewBroker(connect(t, s.ClientURL()), WithWorkers(8))
		runBroker(t, b, Route("orders.*").Durable("d").Handle(func(ctx context.Context, m *Msg) error {
			if m.Attempt() != 1 {
				t.Errorf("message %s: attempt %d, want 1", m.Data, m.Attempt())
			}
			if handled.add(string(m.Data)) == count {
				close(all)
			}
			return busyFor(ctx, time.Millisecond)
		}))
		pausing.Go(func() {
			for range 30 {
				if err := errors.Join(b.Pause("d"), b.Resume("d")); err != nil {
					t.Error(err)
				}
				select {
				case <-all:
					return
				case <-time.After(20 * time.Millisecond): // of work between two pauses
				}
			}
		})
	}
	publishMany(t, nc, count, numbered("orders.x"))
	receive(t, all, "the last message")
	pausing.Wait()
	eventually(t, "all are settled", func() bool { return settled(t, nc, "ORDERS", "d") })
	handled.wantOnce(t, count)
}

// nilError cannot say anything when it is a nil pointer in an error.
type nilError struct{ text string }

func (e *nilError) Error() string { return e.text }

// TestErrorWithoutATextMakesALetter has a handler return what handlers should
// not, and must not take the process down with.
func TestErrorWithoutATextMakesALetter(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		var err *nilError
		return err
	}))
	publishAcked(t, nc, "orders.x", "payload")
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	if got := letters(t, nc, "DLQ")[0].Header.Get(HeaderDLQError); !strings.HasPrefix(got, "*natsx.nilError without a text: ") {
		t.Errorf("error %q, want its type", got)
	}
}

// TestNoPullOutlivesAPause listens on the route's inbox as well, so that the server
// would serve a pull that is still there.
func TestNoPullOutlivesAPause(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc, own := connect(t, s.ClientURL()), connect(t, s.ClientURL(), nats.CustomInboxPrefix("_ROUTE"))
	orders(t, nc)
	delivered := make(chan string, 16)
	if _, err := nc.Subscribe("_ROUTE.>", func(m *nats.Msg) {
		if strings.HasPrefix(m.Reply, "$JS.ACK.") {
			delivered <- string(m.Data)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushWithContext(testContext(t)); err != nil {
		t.Fatal(err)
	}
	handled := make(chan string, 16)
	b := NewBroker(own)
	runBroker(t, b, Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled <- string(m.Data)
		return nil
	}))
	for i := range 3 {
		data := strconv.Itoa(i)
		if err := b.Pause("d"); err != nil {
			t.Fatal(err)
		}
		publishAcked(t, nc, "orders.x", data)
		var info *jetstream.ConsumerInfo
		eventually(t, "the consumer has the message", func() bool {
			info = consumerInfo(t, nc, "ORDERS", "d")
			return info.NumPending == 1 || info.Delivered.Consumer > uint64(i)
		})
		if info.Delivered.Consumer != uint64(i) {
			t.Errorf("%d delivered, want %d", info.Delivered.Consumer, i)
		}
		if err := b.Resume("d"); err != nil {
			t.Fatal(err)
		}
		if got := receive(t, handled, "the message"); got != data || receive(t, delivered, "its delivery") != data {
			t.Errorf("got %q, want %q", got, data)
		}
	}
}

// TestPullsOfAnIdleRoute reads the pulls that a route sends: brief ones for as many
// messages as it has workers while messages may come, and else a long one that no
// message fits, which the server ends when there is one.
func TestPullsOfAnIdleRoute(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	type request struct {
		Batch    int
		MaxBytes int `json:"max_bytes"`
		Expires  time.Duration
	}
	pulls := make(chan request, 64)
	if _, err := nc.Subscribe("$JS.API.CONSUMER.MSG.NEXT.ORDERS.d", func(m *nats.Msg) {
		var r request
		if err := json.Unmarshal(m.Data, &r); err != nil {
			t.Errorf("pull %q: %v", m.Data, err)
		}
		pulls <- r
	}); err != nil {
		t.Fatal(err)
	}
	handled := make(chan int, 1)
	runBroker(t, NewBroker(nc, WithWorkers(8)), Route("orders.*").Durable("d").Handle(func(_ context.Context, m *Msg) error {
		handled <- m.Attempt()
		return nil
	}))
	idle := request{Batch: 1, MaxBytes: 1, Expires: idleStay}
	for range 2 {
		brief := 0
		for p := receive(t, pulls, "a pull"); p != idle; p = receive(t, pulls, "a pull") {
			if p.Expires == time.Millisecond {
				continue // the anchor
			}
			if brief++; p.Batch != 8 && p.Batch != 7 || p.Expires < leastStay || p.Expires > mostStay {
				t.Errorf("got the pull %+v, want one for the workers that stays for a moment", p)
			}
		}
		if brief == 0 {
			t.Error("no pull for messages was sent")
		}
		publishAcked(t, nc, "orders.x", "1")
		if got := receive(t, handled, "the message"); got != 1 {
			t.Errorf("it was attempt %d, want 1", got)
		}
	}
}

// Many idle routes that start together do not check their consumers together.
func TestChecksOfIdleRoutesAreSpread(t *testing.T) {
	t.Parallel()
	const routes = 200
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc, inMemory)
	var asked atomic.Int64
	if _, err := nc.Subscribe("$JS.API.CONSUMER.INFO.>", func(*nats.Msg) { asked.Add(1) }); err != nil {
		t.Fatal(err)
	}
	var specs []Spec
	for i := range routes {
		specs = append(specs, Route("orders.*").Durable(fmt.Sprintf("d%d", i)).Handle(succeed))
	}
	b := NewBroker(nc)
	runBroker(t, b, specs...)
	started := asked.Load()
	var due []int64
	for _, r := range b.ran.Load().durables {
		r.env.pool.mu.Lock()
		due = append(due, r.checks.at(r.arrived))
		r.env.pool.mu.Unlock()
	}
	slices.Sort(due)
	const together = routes / 10
	for i := range routes - together {
		if took := time.Duration(due[i+together] - due[i]); took < 100*time.Millisecond {
			t.Fatalf("%d checks are due within %v", together, took)
		}
	}
	// They are made when they are due.
	eventually(t, "the first ones are made", func() bool { return asked.Load() > started })
	if now := processTime(); now < due[0] {
		t.Errorf("the first check came %v before it was due", time.Duration(due[0]-now))
	}
	if n := asked.Load() - started; n > routes/2 {
		t.Errorf("%d checks came with the first", n)
	}
}

// The server takes a nak for any delivery of its message: one that is not confirmed
// is not said again after its delay.
func TestConfirmedNakIsNotRepeatedAfterItsDelay(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	orders(t, admin)
	p := startProxy(t, s.ClientURL())
	spec := Route("orders.*").Durable("d").ConfirmAcks()
	started, end := make(chan struct{}, 10), make(chan struct{})
	_, log := newLogBook()
	runBroker(t, NewBroker(connect(t, p.url(), nats.ReconnectWait(10*time.Millisecond)), WithWorkers(1), WithLogger(log)),
		spec.Handle(func(context.Context, *Msg) error {
			started <- struct{}{}
			<-end
			return RetryAfter(100*time.Millisecond, errors.New("not now"))
		}))
	publishAcked(t, admin, "orders.x", "payload")
	receive(t, started, "the first run")
	again, done := make(chan int, 10), make(chan struct{})
	runBroker(t, NewBroker(connect(t, s.ClientURL())), spec.Handle(func(_ context.Context, m *Msg) error {
		again <- m.Attempt()
		<-done
		return nil
	}))
	p.deafen()
	close(end)
	if got := receive(t, again, "the second run"); got != 2 {
		t.Errorf("attempt %d, want 2", got)
	}
	// The nak would be said again two seconds after it was said first.
	select {
	case got := <-again:
		t.Errorf("attempt %d runs beside the second", got)
	case <-started:
		t.Error("the first broker runs it beside the second")
	case <-time.After(4 * time.Second):
	}
	close(done)
	eventually(t, "it is settled", func() bool { return settled(t, admin, "ORDERS", "d") })
	if got := consumerInfo(t, admin, "ORDERS", "d").Delivered.Consumer; got != 2 {
		t.Errorf("%d deliveries, want 2", got)
	}
}
