package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() {
	childModes["poison"] = poisonChild
	childModes["replaying"] = replayingChild
}

// poisonAttempts is how often poisonChild's route may handle a message.
const poisonAttempts = 3

// poisonChild runs a route on which everything fails, and asks its parent before
// each attempt.
func poisonChild() int {
	nc, err := nats.Connect(childURL(), nats.MaxReconnects(-1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	b := NewBroker(nc, WithWorkers(4))
	go func() {
		<-b.Ready()
		fmt.Println("ready")
	}()
	err = b.Run(context.Background(), Route("jobs.*").Durable("worker").AckWait(time.Second).
		Retry(poisonAttempts-1).Backoff(20*time.Millisecond, 50*time.Millisecond).DLQ("dlq.jobs").
		Handle(func(ctx context.Context, m *Msg) error {
			if _, err := nc.Request("attempts", strconv.AppendInt(nil, int64(m.Attempt()), 10), testLimit); err != nil {
				return err
			}
			return fmt.Errorf("job %s always fails", m.Data)
		}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func TestKilledProcessesLoseNoDeadLetter(t *testing.T) {
	t.Parallel()
	poisonUnderKills(t, 0)
}

func TestKilledProcessesLoseNoDeadLetterWithoutTheDLQ(t *testing.T) {
	t.Parallel()
	poisonUnderKills(t, 3*time.Second)
}

// poisonUnderKills has processes fail every message of a work-queue stream,
// kills them within handlers, while they settle and in between, and expects one
// letter for each message. The stream of the DLQ is missing for gap at first.
func poisonUnderKills(t *testing.T, gap time.Duration) {
	messages, kills, fleet := 150, 25, 3
	if *soak {
		messages, kills = 3000, 400
	}
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	ctx := testContext(t)
	if *soak {
		ctx = t.Context()
	}
	js := jetStream(t, nc)
	createStream(t, nc, jetstream.StreamConfig{
		Name: "JOBS", Subjects: []string{"jobs.*"}, Retention: jetstream.WorkQueuePolicy,
	})
	dlq := jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}}
	createStream(t, nc, dlq)

	// A letter on its way is the moment between publishing it and settling the
	// original.
	attempts, written := make(chan *nats.Msg, 10*messages), make(chan *nats.Msg, 10*messages)
	for subject, ch := range map[string]chan *nats.Msg{"attempts": attempts, "dlq.jobs": written} {
		if _, err := nc.ChanSubscribe(subject, ch); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	children := make([]*child, fleet)
	for i := range children {
		children[i] = startChild(t, "poison", s.ClientURL(), nil)
	}
	for _, c := range children {
		if !c.serves(t) {
			t.Fatalf("the child ended: %v", c.err)
		}
	}

	back := make(<-chan time.Time)
	if gap > 0 {
		if err := js.DeleteStream(ctx, "DLQ"); err != nil {
			t.Fatal(err)
		}
		back = time.After(gap)
	}
	build := func(i int) *nats.Msg {
		m := numbered("jobs." + strconv.Itoa(i))(i)
		m.Header = nats.Header{"X-Order": {fmt.Sprintf("order %d", i)}, "X-Many": {"a", "b"}}
		return m
	}
	publishMany(t, nc, messages, build)

	killed, moved, next := 0, 0, 5
	strike := func() {
		if next--; next > 0 || killed == kills {
			return
		}
		for _, i := range rand.Perm(fleet) {
			select {
			case <-children[i].done:
				continue // and is not there again yet
			default:
			}
			children[i].kill()
			killed++
			// Soon enough for the others, of which each letter that is left has room for one.
			next = min(5+rand.N(15), (messages-moved)/max(kills-killed, 1))
			return
		}
	}
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for done := false; !done; {
		select {
		case m := <-attempts:
			if n, err := strconv.Atoi(string(m.Data)); err != nil || n < 1 || n > poisonAttempts {
				t.Errorf("a handler ran at attempt %q, want at most %d", m.Data, poisonAttempts)
			}
			if rand.N(2) == 0 {
				m.Respond(nil) // and is killed, if at all, while it settles
				strike()
			} else {
				strike()
				m.Respond(nil)
			}
		case <-written:
			moved = min(moved+1, messages)
			strike()
		case <-back:
			createStream(t, nc, dlq)
			gap = 0
		case <-poll.C:
			for i, c := range children {
				select {
				case <-c.done:
					children[i] = startChild(t, "poison", s.ClientURL(), nil)
				default:
				}
			}
			done = gap == 0 && stored(t, nc, "JOBS") == 0 && settled(t, nc, "JOBS", "worker")
		case <-ctx.Done():
			t.Fatalf("after %d kills: %d letters, %d left in the source, want %d and 0",
				killed, stored(t, nc, "DLQ"), stored(t, nc, "JOBS"), messages)
		}
	}
	for _, c := range children {
		c.kill()
	}
	if killed < kills {
		t.Errorf("only %d kills of %d happened", killed, kills)
	}

	var seen, reasons tally
	for _, m := range letters(t, nc, "DLQ") {
		seq := m.Header.Get("Natsx-Dlq-Sequence")
		seen.add(seq)
		n, err := strconv.Atoi(seq)
		if err != nil || n < 1 || n > messages {
			t.Fatalf("letter of sequence %q, want 1 to %d", seq, messages)
		}
		reasons.add(m.Header.Get("Natsx-Dlq-Reason"))
		original := build(n - 1)
		wantLetter(t, m, original, map[string]string{
			"Stream": "JOBS", "Sequence": seq, "Durable": "worker",
		}, "exhausted", "crashed")
		attempts, err := strconv.Atoi(m.Header.Get("Natsx-Dlq-Attempts"))
		if exhausted := m.Header.Get("Natsx-Dlq-Reason") == "exhausted"; err != nil || attempts < poisonAttempts || exhausted && attempts != poisonAttempts {
			t.Errorf("letter %s: %q attempts, want %d", seq, m.Header.Get("Natsx-Dlq-Attempts"), poisonAttempts)
		}
		if m.Header.Get("Natsx-Dlq-Reason") == "exhausted" && !strings.Contains(m.Header.Get("Natsx-Dlq-Error"), "always fails") {
			t.Errorf("letter %s: error %q, want the handler's", seq, m.Header.Get("Natsx-Dlq-Error"))
		}
	}
	seen.wantOnce(t, messages)
	t.Logf("%d kills, %d exhausted, %d crashed", killed, reasons.get("exhausted"), reasons.get("crashed"))
}

// wantLetter compares a letter with its original, and its facts, named without
// their prefix, with what is known of them. The reason must be one of reasons.
func wantLetter(t testing.TB, m *jetstream.RawStreamMsg, original *nats.Msg, facts map[string]string, reasons ...string) {
	t.Helper()
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("letter %d: %s\n%v", m.Sequence, fmt.Sprintf(format, args...), m.Header)
	}
	if string(m.Data) != string(original.Data) {
		fail("body %.100q, want %.100q", m.Data, original.Data)
	}
	for key, values := range original.Header {
		if strings.HasPrefix(key, "Nats-") {
			if m.Header.Get(key) == original.Header.Get(key) {
				fail("header %q would act on the letter", key)
			}
			key = "Natsx-Orig-" + strings.TrimPrefix(key, "Nats-")
		}
		if !slices.Equal(m.Header.Values(key), values) {
			fail("header %q is %q, want %q", key, m.Header.Values(key), values)
		}
	}
	fact := func(name string) string {
		values := m.Header.Values("Natsx-Dlq-" + name)
		if len(values) != 1 {
			fail("Natsx-Dlq-%s is %q, want one value", name, values)
			return ""
		}
		return values[0]
	}
	facts["Subject"] = original.Subject
	for name, want := range facts {
		if got := fact(name); got != want {
			fail("Natsx-Dlq-%s is %q, want %q", name, got, want)
		}
	}
	if got := fact("Reason"); !slices.Contains(reasons, got) {
		fail("reason %q, want one of %q", got, reasons)
	}
	for _, name := range []string{"Error", "Host"} {
		if fact(name) == "" {
			fail("no Natsx-Dlq-%s", name)
		}
	}
	if n, err := strconv.Atoi(fact("Attempts")); err != nil || n < 1 {
		fail("attempts %q", fact("Attempts"))
	}
	times := map[string]time.Time{}
	for _, name := range []string{"Time", "Published"} {
		at, err := time.Parse(time.RFC3339Nano, fact(name))
		if err != nil || time.Since(at).Abs() > time.Hour {
			fail("Natsx-Dlq-%s: %v %v", name, at, err)
		}
		times[name] = at
	}
	if times["Time"].Before(times["Published"]) {
		fail("it died at %v before it was published at %v", times["Time"], times["Published"])
	}
	if stack := m.Header.Values("Natsx-Dlq-Stack"); (len(stack) > 0) != (fact("Reason") == "panic") {
		fail("a stack belongs to panics alone")
	}
}

// What a panic leaves in its letter is told by wantLetter as well.
func TestLetterOfAPanicKeepsTheStack(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "P", Subjects: []string{"p.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.p"}})
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		Route("p.*").Durable("d").Retry(0).DLQ("dlq.p").Handle(func(context.Context, *Msg) error {
			panic(errors.New("poisoned"))
		}))
	original := &nats.Msg{Subject: "p.x", Data: []byte("body")}
	publish(t, nc, original)
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	m := letters(t, nc, "DLQ")[0]
	wantLetter(t, m, original, map[string]string{
		"Stream": "P", "Sequence": "1", "Durable": "d", "Attempts": "1",
	}, "panic")
	if got := m.Header.Get("Natsx-Dlq-Error"); !strings.Contains(got, "poisoned") {
		t.Errorf("error %q, want the panic's", got)
	}
	if got := m.Header.Get("Natsx-Dlq-Stack"); !strings.Contains(got, "TestLetterOfAPanicKeepsTheStack") {
		t.Errorf("stack %q, want the handler in it", got)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// replayingChild replays until it is killed, since its handler does not return.
func replayingChild() int {
	nc, err := nats.Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	_, err = NewBroker(nc).Replay(context.Background(), Replay("history.>").Handle(func(context.Context, *Msg) error {
		fmt.Println("ready")
		select {}
	}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// The server forgets the consumer of a replay that was killed, and sooner where the
// stream wants that.
func TestKilledReplayLeavesNoConsumer(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	const limit = time.Second
	history := createStream(t, nc, jetstream.StreamConfig{Name: "HISTORY", Subjects: []string{"history.>"},
		ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: limit}})
	publishMany(t, nc, 10, numbered("history.x"))
	c := startChild(t, "replaying", s.ClientURL(), nil)
	if !c.serves(t) {
		t.Fatalf("the child ended: %v", c.err)
	}
	// It is not forgotten before: the replay waits for more.
	var left []string
	for info := range history.ListConsumers(testContext(t)).Info() {
		left = append(left, info.Name)
		if c := info.Config; c.InactiveThreshold != limit || c.Durable != "" {
			t.Errorf("the server keeps the consumer %q for %s, want no durable and the stream's %s", c.Durable, c.InactiveThreshold, limit)
		}
	}
	if len(left) != 1 || !strings.HasPrefix(left[0], replayConsumer) {
		t.Fatalf("got the consumers %q, want the replay's", left)
	}
	c.kill()
	eventually(t, "the consumer is gone", func() bool { return consumers(t, nc, "HISTORY") == 0 })
}
