package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() {
	childModes["retrying"] = retryingChild
	childModes["retried bombs"] = retriedBombsChild
}

// retryingAttempts is how often retryingChild's route may handle a message.
const retryingAttempts = 3

// retryingChild runs a route whose messages say how they end: "good" at the first attempt,
// "late" at the last one, and "bad" never. It tells its parent of each run before that has
// a result.
func retryingChild() int {
	nc, err := nats.Connect(childURL(), nats.MaxReconnects(-1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := NewBroker(nc, WithWorkers(4), WithRetryStream("RETRY"))
	go func() {
		<-b.Ready()
		fmt.Println("ready")
	}()
	err = b.Run(context.Background(), Route("jobs.*").Durable("worker").AckWait(500*time.Millisecond).
		Retry(retryingAttempts-1).Backoff(10*time.Millisecond, 20*time.Millisecond).DLQ("dlq.jobs").
		Handle(func(ctx context.Context, m *Msg) error {
			if _, err := nc.Request("runs", fmt.Appendf(nil, "%s %d", m.Data, m.Attempt()), testLimit); err != nil {
				select {} // it ends with the parent
			}
			busyFor(ctx, rand.N(4*time.Millisecond))
			switch kind, _, _ := strings.Cut(string(m.Data), " "); {
			case kind == "good", kind == "late" && m.Attempt() == retryingAttempts:
				return nil
			}
			return errors.New("fails")
		}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// Whenever a process is killed: every message is handled or has one letter, no attempt is
// beyond the last, and none is left out.
func TestRetryStreamUnderKills(t *testing.T) {
	t.Parallel()
	messages, kills, fleet, kinds := 120, 6, 2, []string{"good", "late", "bad"}
	limit := time.After(testLimit)
	if *soak {
		messages, kills, limit = 6000, 200, nil
	}
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "JOBS", Subjects: []string{"jobs.*"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	runs := make(chan *nats.Msg, 10*messages)
	if _, err := nc.ChanSubscribe("runs", runs); err != nil {
		t.Fatal(err)
	}
	// What is told to the parent, and what is stored, are the moments around which a
	// process dies.
	moments := make(chan *nats.Msg, 100*messages)
	for _, subject := range []string{"RETRY.>", "dlq.jobs", "$JS.ACK.>"} {
		if _, err := nc.ChanSubscribe(subject, moments); err != nil {
			t.Fatal(err)
		}
	}
	var children []*child
	for range fleet {
		children = append(children, startChild(t, "retrying", s.ClientURL(), nil))
	}
	for _, c := range children {
		if !c.serves(t) {
			t.Fatalf("the child ended: %v", c.err)
		}
	}
	publishMany(t, nc, messages, func(i int) *nats.Msg {
		return &nats.Msg{Subject: "jobs.x", Data: fmt.Appendf(nil, "%s %d", kinds[i%len(kinds)], i)}
	})

	var seen tally // by message and attempt
	killed, next := 0, 10
	strike := func() {
		if next--; next > 0 || killed == kills {
			return
		}
		next = 1 + rand.N(8*messages/kills)
		c := children[rand.N(fleet)]
		select {
		case <-c.done: // and is not there again yet
		default:
			c.kill()
			killed++
		}
	}
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for done := false; !done; {
		select {
		case m := <-runs:
			seen.add(string(m.Data))
			m.Respond(nil)
			strike()
		case <-moments:
			strike()
		case <-poll.C:
			for i, c := range children {
				select {
				case <-c.done:
					children[i] = startChild(t, "retrying", s.ClientURL(), nil)
				default:
				}
			}
			done = stored(t, nc, "JOBS") == 0 && stored(t, nc, "RETRY") == 0
		case <-limit:
			t.Fatalf("after %d kills: %d left in the source, %d retries, %d letters",
				killed, stored(t, nc, "JOBS"), stored(t, nc, "RETRY"), stored(t, nc, "DLQ"))
		}
	}
	for _, c := range children {
		c.kill()
	}
	if killed < kills/2 { // the moments are random, and may be over before the last one
		t.Errorf("only %d kills of %d happened", killed, kills)
	}

	dead := map[string]int{}
	for _, l := range letters(t, nc, "DLQ") {
		dead[string(l.Data)]++
		if l.Header.Get(HeaderDLQReason) != "exhausted" || l.Header.Get(HeaderDLQAttempts) != strconv.Itoa(retryingAttempts) {
			t.Errorf("letter of %q: %v", l.Data, l.Header)
		}
	}
	for i := range messages {
		kind := kinds[i%len(kinds)]
		data := fmt.Sprintf("%s %d", kind, i)
		last, letters := retryingAttempts, 0
		switch kind {
		case "good":
			last = 1
		case "bad":
			letters = 1
		}
		if dead[data] != letters {
			t.Errorf("%q has %d letters, want %d", data, dead[data], letters)
		}
		for attempt := 1; attempt <= last; attempt++ {
			if seen.get(fmt.Sprint(data, " ", attempt)) == 0 {
				t.Errorf("%q has not run at attempt %d", data, attempt)
			}
		}
		for attempt := last + 1; attempt <= retryingAttempts+5; attempt++ {
			if seen.get(fmt.Sprint(data, " ", attempt)) > 0 {
				t.Errorf("%q ran at attempt %d, want at most %d", data, attempt, last)
			}
		}
	}
	least := messages * (1 + 2*retryingAttempts) / 3
	if repeated := seen.sum() - least; repeated > killed*16 {
		t.Errorf("%d runs were repeated, of %d kills", repeated, killed)
	}
	t.Logf("%d kills, %d runs of at least %d", killed, seen.sum(), least)
}

// retriedBombsChild is bombsChild with a retry stream.
func retriedBombsChild() int {
	nc, err := nats.Connect(childURL(), nats.MaxReconnects(-1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := NewBroker(nc, WithWorkers(16), WithRetryStream("RETRY"))
	go func() {
		<-b.Ready()
		fmt.Println("ready")
	}()
	err = b.Run(context.Background(), Route("jobs.*").Durable("worker").AckWait(500*time.Millisecond).
		Retry(bombAttempts-1).Backoff(10*time.Millisecond, 20*time.Millisecond).DLQ("dlq.jobs").
		Handle(func(ctx context.Context, m *Msg) error {
			busyFor(ctx, 5*time.Millisecond)
			if strings.HasPrefix(string(m.Data), "bomb") {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
			return nil
		}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}
