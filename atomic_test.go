package natsx

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() { childModes["atomic"] = atomicChild }

func TestPublishAtomic(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowAtomicPublish: true, MaxMsgSize: 2000})
	createStream(t, nc, jetstream.StreamConfig{Name: "T", Subjects: []string{"t.>"}, AllowAtomicPublish: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "PLAIN", Subjects: []string{"plain.>"}})
	pub := NewPublisher(nc)
	batch := func(n int) []Envelope {
		es := make([]Envelope, n)
		for i := range es {
			es[i] = To(fmt.Sprintf("s.%d", i)).Data(fmt.Append(nil, i))
		}
		return es
	}
	// One by one: each leaves the stream as its state says.
	tests := []struct {
		name string
		es   []Envelope
		want Ack
		err  error
		text string
	}{
		{"one", batch(1), Ack{Stream: "S", Sequence: 1}, nil, ""},
		{"three", batch(3), Ack{Stream: "S", Sequence: 4}, nil, ""},
		{"with ids", []Envelope{To("s.a").MsgID("a"), To("s.b").MsgID("b")}, Ack{Stream: "S", Sequence: 6}, nil, ""},
		{"the same again", []Envelope{To("s.a").MsgID("a"), To("s.b").MsgID("b")}, Ack{Stream: "S", Sequence: 6, Duplicate: true}, nil, ""},
		{"partly stored", []Envelope{To("s.c").MsgID("c"), To("s.b").MsgID("b")}, Ack{}, errors.ErrUnsupported, "duplicate message id"},
		{"expectations hold", []Envelope{To("s.d").ExpectLastSequence(6), To("s.a").ExpectLastSubjectSequence(5), To("s.new").ExpectLastSubjectSequence(0)},
			Ack{Stream: "S", Sequence: 9}, nil, ""},
		{"wrong last sequence", []Envelope{To("s.d").ExpectLastSequence(6), To("s.d")}, Ack{}, ErrWrongSequence, `publish to "s.d": expected last sequence 6, have 9`},
		{"wrong subject sequence", []Envelope{To("s.d"), To("s.a").ExpectLastSubjectSequence(5)}, Ack{}, ErrWrongSequence, `publish to "s.a": expected last sequence 5, have 8`},
		{"wrong subject sequence behind a right one", []Envelope{To("s.d").ExpectLastSequence(9), To("s.new").ExpectLastSubjectSequence(5)},
			Ack{}, ErrWrongSequence, `publish to "s.new": expected last sequence 5, have 9`},
		{"wrong stream", []Envelope{To("s.d"), To("s.a").ExpectStream("T")}, Ack{}, ErrWrongStream, ""},
		{"two streams", []Envelope{To("s.d"), To("t.a"), To("s.e")}, Ack{}, ErrOptionConflict, `"t.a" of stream "T"`},
		{"no stream", []Envelope{To("s.d"), To("nowhere"), To("s.e")}, Ack{}, ErrNoStream, `"nowhere"`},
		{"too large a message", []Envelope{To("s.d"), To("s.e").Data(make([]byte, 2001)), To("s.f")}, Ack{}, jetstream.ErrStreamMessageExceedsMaximum, `"s.e"`},
		{"above the server's maximum", []Envelope{To("s.d"), To("s.e").Data(make([]byte, 1<<20)), To("s.f")}, Ack{}, nats.ErrMaxPayload, `"s.e"`},
		{"not allowed", []Envelope{To("plain.a"), To("plain.b")}, Ack{}, ErrAtomicNotAllowed, ""},
		{"not allowed for one", []Envelope{To("plain.a")}, Ack{}, ErrAtomicNotAllowed, ""},
		{"none", nil, Ack{}, ErrOutOfRange, "0 envelopes: must be 1 to 1000"},
		{"too many", batch(1001), Ack{}, ErrOutOfRange, "1001 envelopes"},
		{"delayed", []Envelope{To("s.d").After(time.Second)}, Ack{}, ErrOptionConflict, "delay"},
		{"an id twice", []Envelope{To("s.d").MsgID("x"), To("s.e").MsgID("x")}, Ack{}, ErrOptionConflict, `msgID "x": occurs twice`},
		{"last sequence in the middle", []Envelope{To("s.d"), To("s.e").ExpectLastSequence(1)}, Ack{}, ErrOptionConflict, "first envelope"},
		{"subject sequence after its subject", []Envelope{To("s.d"), To("s.d").ExpectLastSubjectSequence(1)}, Ack{}, ErrOptionConflict, "first envelope with this subject"},
		{"invalid", []Envelope{To("s.d"), To("s.*")}, Ack{}, ErrInvalidSubject, ""},
		{"most", batch(1000), Ack{Stream: "S", Sequence: 1009}, nil, ""},
	}
	for _, tt := range tests {
		ack, err := pub.PublishAtomic(testContext(t), tt.es...)
		switch {
		case tt.err == nil:
			if err != nil || !sameAck(ack, tt.want) {
				t.Errorf("%s: got %+v, %v, want %+v", tt.name, ack, err, tt.want)
			}
		case err == nil, tt.err != errors.ErrUnsupported && !errors.Is(err, tt.err), !strings.Contains(err.Error(), tt.text), ack != Ack{}:
			t.Errorf("%s: got %+v, %v, want %v with %q", tt.name, ack, err, tt.err, tt.text)
		}
	}
	for stream, want := range map[string]int{"S": 1009, "T": 0, "PLAIN": 0} {
		if n := stored(t, nc, stream); n != want {
			t.Errorf("stream %s has %d messages, want %d", stream, n, want)
		}
	}
}

// What does not fit is noticed before the server has staged what comes before it.
func TestPublishAtomicSizesFirst(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, withMaxPayload(2_000)).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowAtomicPublish: true})
	sub, err := nc.SubscribeSync("s.>")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []Envelope{To("s.b").Data(make([]byte, 2_000)), To("s.b").Header("Long", strings.Repeat("x", 2_000))} {
		if _, err := NewPublisher(nc).PublishAtomic(testContext(t), To("s.a"), e); !errors.Is(err, nats.ErrMaxPayload) || !strings.Contains(err.Error(), `"s.b"`) {
			t.Errorf("got %v, want ErrMaxPayload for the second", err)
		}
	}
	if _, err := NewPublisher(nc).PublishAtomic(testContext(t), To("s.a"), To("s.b").Data(make([]byte, 1_500))); err != nil {
		t.Errorf("what fits: %v", err)
	}
	if n, _, _ := sub.Pending(); n != 2 {
		t.Errorf("%d messages were sent, want the 2 that fit", n)
	}
}

func TestPublishAtomicRetriesALostCommit(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		for _, tt := range []struct {
			name      string
			committed bool // whether the commit whose ack is lost reaches the stream
		}{
			{"committed", true},
			{"lost", false},
		} {
			t.Run(tt.name, func(t *testing.T) {
				in, out := "in."+tt.name, "s."+tt.name
				createStream(t, nc, jetstream.StreamConfig{Name: tt.name, Subjects: []string{out}, Replicas: replicas, AllowAtomicPublish: true})
				var once sync.Once
				_, err := nc.Subscribe(in, func(m *nats.Msg) {
					forward := &nats.Msg{Subject: out, Header: m.Header, Data: m.Data, Reply: m.Reply}
					keep := true
					if m.Header.Get(batchCommitHeader) != "" {
						once.Do(func() { forward.Reply, keep = "", tt.committed })
					}
					if keep {
						nc.PublishMsg(forward)
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				ack, err := NewPublisher(nc).PublishAtomic(testContext(t), To(in).ExpectLastSequence(0), To(in), To(in))
				if err != nil || !sameAck(ack, Ack{Stream: tt.name, Sequence: 3, Duplicate: tt.committed}) {
					t.Errorf("got %+v, %v", ack, err)
				}
				if n := stored(t, nc, tt.name); n != 3 {
					t.Errorf("stored %d messages, want 3", n)
				}
			})
		}
	})
}

func TestPublishAtomicThroughALeaderElection(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: 3, AllowAtomicPublish: true})
	pub := NewPublisher(nc)
	const batches, size = 100, 10
	for i := range batches {
		if i == batches/2 {
			c.leader(t, "S", "").stop()
		}
		es := make([]Envelope, size)
		for k := range es {
			es[k] = To("s.x")
		}
		if _, err := pub.PublishAtomic(testContext(t), es...); err != nil {
			t.Fatalf("batch %d: %v", i, err)
		}
	}
	if n := stored(t, nc, "S"); n != batches*size {
		t.Errorf("stored %d messages, want %d", n, batches*size)
	}
}

// atomicSize is how many messages a batch of the child has.
const atomicSize = 12

// atomicChild publishes batches from several goroutines until it is killed. Each
// message says which batch it is of and its number in it.
func atomicChild() int {
	nc, err := nats.Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer nc.Close()
	pub := NewPublisher(nc)
	failed := make(chan error)
	for g := range 4 {
		go func() {
			for i := 0; ; i++ {
				es := make([]Envelope, atomicSize)
				for k := range es {
					es[k] = To("s.x").Data(fmt.Appendf(nil, "%d-%d-%d %d", os.Getpid(), g, i, k))
				}
				if _, err := pub.PublishAtomic(context.Background(), es...); err != nil {
					failed <- err
				}
			}
		}()
	}
	fmt.Println("ready")
	fmt.Fprintln(os.Stderr, <-failed)
	return 1
}

func TestPublishAtomicIsNeverSeenInParts(t *testing.T) {
	t.Parallel()
	const batches = 1000
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	stream := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.x"}, AllowAtomicPublish: true})
	kills := 0
	for stored(t, nc, "S") < batches*atomicSize {
		c := startChild(t, "atomic", s.ClientURL(), nil)
		if !c.serves(t) {
			t.Fatalf("the child ended: %v", c.err)
		}
		select {
		case <-time.After(50*time.Millisecond + rand.N(400*time.Millisecond)):
		case <-c.done:
			t.Fatalf("the child ended: %v", c.err)
		}
		c.kill()
		kills++
		// Whatever is the last readable message ends a batch.
		m, err := stream.GetLastMsgForSubject(testContext(t), "s.x")
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil || !strings.HasSuffix(string(m.Data), fmt.Sprintf(" %d", atomicSize-1)) {
			t.Fatalf("the last message is %q, %v, want the end of a batch", m.Data, err)
		}
	}
	if kills < 3 {
		t.Errorf("killed %d times, want several", kills)
	}
	c, err := jetStream(t, nc).OrderedConsumer(testContext(t), "S", jetstream.OrderedConsumerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	it, err := c.Messages()
	if err != nil {
		t.Fatal(err)
	}
	defer it.Stop()
	batch := ""
	for i := range stored(t, nc, "S") {
		m, err := it.Next()
		if err != nil {
			t.Fatal(err)
		}
		id, number, _ := strings.Cut(string(m.Data()), " ")
		if i%atomicSize == 0 {
			batch = id
		}
		if id != batch || number != fmt.Sprint(i%atomicSize) {
			t.Fatalf("message %d is %q, want number %d of batch %s", i, m.Data(), i%atomicSize, batch)
		}
	}
}

func TestServerBefore(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]bool{
		"2.15.2": false, "2.12.0": false, "2.12.0-RC.1": false, "3.0.0": false, "": false, "x": false,
		"2.11.9": true, "2.9.1": true, "1.4.0": true,
	} {
		if got := olderThan(version, 2, 12); got != want {
			t.Errorf("olderThan(%q, 2, 12) = %t, want %t", version, got, want)
		}
	}
}
