package natsx

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestDrainWaitsForRunningHandlers(t *testing.T) {
	t.Parallel()
	const handlers, messages = 50, 120
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "DRAIN", Subjects: []string{"drain.*"}})
	publishMany(t, nc, messages, numbered("drain.x"))

	var seen, finished tally
	started := make(chan struct{}, messages)
	release := make(chan struct{})
	spec := Route("drain.*").Durable("d").Retry(3).Handle(func(ctx context.Context, m *Msg) error {
		if m.Attempt() != 1 {
			t.Errorf("message %s is at attempt %d, want the first", m.Data, m.Attempt())
		}
		seen.add(string(m.Data))
		started <- struct{}{}
		<-release
		if ctx.Err() != nil {
			t.Errorf("the context of a handler ended in a clean drain: %v", ctx.Err())
		}
		finished.add(string(m.Data))
		return nil
	})
	const drainTimeout = testLimit
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(handlers), WithDrainTimeout(drainTimeout)), spec)
	for range handlers {
		receive(t, started, "a handler")
	}
	r.cancel()
	for range handlers - 1 {
		release <- struct{}{}
	}
	eventually(t, "all but one are finished", func() bool { return finished.sum() >= handlers-1 })
	select {
	case <-r.done:
		t.Fatalf("Run returned (%v) before its last handler", r.err)
	case <-time.After(200 * time.Millisecond):
	}
	close(release)
	began := time.Now()
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v, want a clean drain", err)
	}
	if took := time.Since(began); took > drainTimeout/2 {
		t.Errorf("Run returned %v after its last handler", took)
	}
	if seen.sum() != finished.sum() {
		t.Errorf("%d handlers started and %d finished before Run returned", seen.sum(), finished.sum())
	}
	// What was pulled was finished and acknowledged: nothing is naked. The server
	// answers the last flush before its consumer has worked off the acks.
	var info *jetstream.ConsumerInfo
	defer func() {
		if t.Failed() {
			t.Logf("%d finished, the consumer: %+v, the route: %+v", finished.sum(), info, r.Stats().Routes[0])
		}
	}()
	eventually(t, "the acks are booked", func() bool {
		info = consumerInfo(t, nc, "DRAIN", "d")
		return info.NumAckPending == 0
	})
	if got := finished.sum(); info.NumAckPending != 0 || info.Delivered.Consumer != uint64(got) {
		t.Errorf("%d delivered and %d not acknowledged, want %d and 0", info.Delivered.Consumer, info.NumAckPending, got)
	}

	r = runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(handlers)), spec)
	eventually(t, "the rest is finished", func() bool { return finished.sum() >= messages })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	finished.wantOnce(t, messages)
}

func TestDrainTimeoutCountsTheAbandoned(t *testing.T) {
	t.Parallel()
	const stubborn, drainTimeout = 3, 500 * time.Millisecond
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "STUB", Subjects: []string{"stub.*"}})
	publishMany(t, nc, stubborn, numbered("stub.x"))
	started := make(chan struct{}, stubborn)
	cancelled := make(chan time.Time, stubborn)
	release := make(chan struct{})
	var inside sync.WaitGroup
	t.Cleanup(func() { // so that they are gone before leaks are counted
		close(release)
		inside.Wait()
	})
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithDrainTimeout(drainTimeout), WithLogger(log)),
		Route("stub.*").Durable("d").Handle(func(ctx context.Context, _ *Msg) error {
			inside.Add(1)
			defer inside.Done()
			started <- struct{}{}
			<-ctx.Done()
			cancelled <- time.Now()
			<-release // a handler that ignores its context
			return nil
		}))
	for range stubborn {
		receive(t, started, "a handler")
	}
	began := time.Now()
	err := r.stop(t)
	took := time.Since(began)
	var drain *DrainError
	if !errors.Is(err, ErrDrainTimeout) || !errors.As(err, &drain) || drain.Abandoned != stubborn || drain.Running != stubborn {
		t.Errorf("got %v, want a DrainError that counts %d", err, stubborn)
	}
	if took < drainTimeout || took > drainTimeout+DrainGrace+10*time.Second {
		t.Errorf("Run returned after %v, want the drain timeout of %v and a grace", took, drainTimeout)
	}
	for range stubborn {
		if at := receive(t, cancelled, "the end of a context"); at.Sub(began) < drainTimeout {
			t.Errorf("a context ended %v after the stop, want not before %v", at.Sub(began), drainTimeout)
		}
	}
}

// A handler that obeys its context ends in the grace: none is left running, and
// the message that was not finished comes again.
func TestHandlersThatObeyAreNotLeftRunning(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "OBEY", Subjects: []string{"obey.*"}})
	publishMany(t, nc, 1, numbered("obey.x"))
	attempts := make(chan int, 10)
	spec := func(obey bool) Spec {
		return Route("obey.*").Durable("d").AckWait(time.Second).Handle(func(ctx context.Context, m *Msg) error {
			attempts <- m.Attempt()
			if obey {
				<-ctx.Done()
			}
			return ctx.Err()
		})
	}
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithDrainTimeout(300*time.Millisecond), WithLogger(log)), spec(true))
	receive(t, attempts, "the first attempt")
	err := r.stop(t)
	var drain *DrainError
	if !errors.As(err, &drain) || drain.Abandoned != 1 || drain.Running != 0 {
		t.Errorf("got %v, want one message abandoned and no handler left", err)
	}
	r = runBroker(t, NewBroker(connect(t, s.ClientURL())), spec(false))
	if got := receive(t, attempts, "the message again"); got < 2 {
		t.Errorf("attempt %d, want a later one", got)
	}
	eventually(t, "it is settled", func() bool { return settled(t, nc, "OBEY", "d") })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// A core message that the client has received is not thrown away by a drain.
func TestDrainFinishesWaitingCoreMessages(t *testing.T) {
	t.Parallel()
	const messages = 200
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	var seen tally
	started := make(chan struct{}, messages)
	release := make(chan struct{})
	r := runBroker(t, NewBroker(nc, WithWorkers(2)), Route("core").Handle(func(_ context.Context, m *Msg) error {
		started <- struct{}{}
		<-release
		seen.add(string(m.Data))
		return nil
	}))
	for i := range messages { // on the same connection: in order before the drain
		if err := nc.Publish("core", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	receive(t, started, "a handler")
	r.cancel()
	close(release)
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, messages)
}

// Retries that wait are the server's: a drain neither waits for them nor burns
// their attempts.
func TestDrainDoesNotWaitForRetries(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "LATER", Subjects: []string{"later.*"}})
	publishMany(t, nc, 1, numbered("later.x"))
	attempts := make(chan int, 10)
	spec := Route("later.*").Durable("d").Retry(5).Backoff(3*time.Second, 3*time.Second).
		Handle(func(_ context.Context, m *Msg) error {
			attempts <- m.Attempt()
			if m.Attempt() == 1 {
				return errors.New("not now")
			}
			return nil
		})
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())), spec)
	receive(t, attempts, "the first attempt")
	began := time.Now()
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if len(attempts) > 0 {
		t.Error("Run has waited for the retry")
	}
	if got := consumerInfo(t, nc, "LATER", "d").NumAckPending; got != 1 {
		t.Errorf("%d messages wait for their retry, want 1", got)
	}
	for range 3 {
		runBroker(t, NewBroker(connect(t, s.ClientURL())), spec).stop(t)
	}
	r = runBroker(t, NewBroker(connect(t, s.ClientURL())), spec)
	if got := receive(t, attempts, "the retry"); got != 2 {
		t.Errorf("the retry is attempt %d, want 2", got)
	}
	eventually(t, "it is settled", func() bool { return settled(t, nc, "LATER", "d") })
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("the retry came after %v, want its backoff of 3 s", took)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// A worker that only waits for the server's confirmation is no handler that runs.
func TestDrainDoesNotCountWhoWaitsForTheServer(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	orders(t, nc)
	started, end := make(chan struct{}), make(chan struct{})
	_, log := newLogBook()
	r := runBroker(t, NewBroker(nc, WithDrainTimeout(500*time.Millisecond), WithLogger(log)),
		Route("orders.*").Durable("d").ConfirmAcks().Handle(func(context.Context, *Msg) error {
			close(started)
			<-end
			return nil
		}))
	publishAcked(t, nc, "orders.x", "payload")
	receive(t, started, "the handler")
	p.stop()
	eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
	close(end)
	var cut *DrainError
	if err := r.stop(t); !errors.As(err, &cut) || cut.Abandoned != 1 || cut.Running != 0 {
		t.Errorf("got %v, want one abandoned and none running", err)
	}
}

// What the application sends without a connection is not the broker's to wait for.
func TestIdleDrainWithoutAConnection(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	orders(t, nc)
	r := runBroker(t, NewBroker(nc, WithDrainTimeout(3*time.Second)), Route("orders.*").Durable("d").Handle(succeed))
	p.stop()
	eventually(t, "the stop is noticed", func() bool { return !nc.IsConnected() })
	if err := nc.Publish("other", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// An acknowledgement that the server did not take in time is told.
func TestDrainWaitsForTheLastAcks(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	admin := connect(t, s.ClientURL())
	orders(t, admin)
	for _, comesBack := range []bool{true, false} {
		t.Run(fmt.Sprint("comes back ", comesBack), func(t *testing.T) {
			t.Parallel()
			subject := fmt.Sprint("orders.", comesBack)
			timeout := testLimit
			if !comesBack {
				timeout = time.Second
			}
			p := startProxy(t, s.ClientURL())
			nc := connect(t, p.url())
			started, end := make(chan struct{}), make(chan struct{})
			_, log := newLogBook()
			r := runBroker(t, NewBroker(nc, WithDrainTimeout(timeout), WithLogger(log)),
				Route(subject).Durable(fmt.Sprint(comesBack)).Handle(func(context.Context, *Msg) error {
					close(started)
					<-end
					return nil
				}))
			publishAcked(t, admin, subject, "payload")
			receive(t, started, "the handler")
			p.refuse()
			eventually(t, "the client is away", func() bool { return !nc.IsConnected() })
			close(end)
			r.cancel()
			if !comesBack {
				if err := r.wait(t); !errors.Is(err, ErrDrainTimeout) {
					t.Errorf("got %v, want ErrDrainTimeout", err)
				}
				return
			}
			select {
			case <-r.done:
				t.Fatalf("Run returned (%v) with an ack to be sent", r.err)
			case <-time.After(200 * time.Millisecond):
			}
			p.allow()
			if err := r.wait(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			eventually(t, "the ack is booked", func() bool { return consumerInfo(t, admin, "ORDERS", "true").NumAckPending == 0 })
		})
	}
}

// A pause that waits for a server which does not answer holds no drain up.
func TestDrainDoesNotWaitForAPause(t *testing.T) {
	t.Parallel()
	onceWithin(t, 3*time.Second, func() time.Duration {
		s := startServer(t)
		nc := connect(t, s.ClientURL())
		orders(t, nc)
		p := startProxy(t, s.ClientURL())
		_, log := newLogBook()
		b := NewBroker(connect(t, p.url()), WithDrainTimeout(500*time.Millisecond), WithLogger(log))
		r := runBroker(t, b, Route("orders.*").Durable("d").Handle(succeed))
		publishAcked(t, nc, "orders.x", "payload")
		routeStats(t, b, "it is handled", func(s RouteStats) bool { return s.Succeeded == 1 })
		d := r.ran.Load().durables[0]
		p.freeze()
		paused := make(chan struct{})
		go func() {
			defer close(paused)
			b.Pause("d")
		}()
		eventually(t, "the pause is at work", func() bool { return len(d.gate) == 1 })
		began := time.Now()
		r.stop(t) // which may tell of a flush that failed
		took := time.Since(began)
		p.thaw()
		receive(t, paused, "the pause")
		return took
	})
}
