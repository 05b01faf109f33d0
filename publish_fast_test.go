package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func fastStreamConfig(replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowBatchPublish: true, Replicas: replicas}
}

// numberedEnvelopes have their number as payload.
func numberedEnvelopes(n int) []Envelope {
	es := make([]Envelope, n)
	for i := range es {
		es[i] = To("s.x").Data(strconv.AppendInt(nil, int64(i), 10))
	}
	return es
}

// bodies reads what a stream holds, in order.
func bodies(t testing.TB, nc *nats.Conn, stream string) []string {
	t.Helper()
	all, err := answered(t, func(ctx context.Context) ([]string, error) {
		s, err := jetStream(t, nc).Stream(ctx, stream)
		if err != nil || s.CachedInfo().State.Msgs == 0 {
			return nil, err
		}
		c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
		if err != nil {
			return nil, err
		}
		it, err := c.Messages()
		if err != nil {
			return nil, err
		}
		defer it.Stop()
		var all []string
		for {
			m, err := it.Next(jetstream.NextContext(ctx))
			if err != nil {
				return nil, err
			}
			all = append(all, string(m.Data()))
			if meta, err := m.Metadata(); err != nil || meta.Sequence.Stream >= s.CachedInfo().State.LastSeq {
				return all, err
			}
		}
	})
	if err != nil {
		t.Fatalf("read %s: %v", stream, err)
	}
	return all
}

// wantStored fails the test unless the stream holds exactly these numbers, each
// once, in any order.
func wantStored(t testing.TB, nc *nats.Conn, want []string) {
	t.Helper()
	var count tally
	for _, body := range bodies(t, nc, "S") {
		count.add(body)
	}
	count.wantOnce(t, len(want))
	for _, body := range want {
		if count.get(body) == 0 {
			t.Fatalf("%q is not stored, and maybe others", body)
		}
	}
}

func allNumbers(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = strconv.Itoa(i)
	}
	return all
}

// inBatches counts the acks of messages that a batch stored.
func inBatches(acks []Ack) (n int) {
	for _, ack := range acks {
		if ack.Stream != "" && ack.Sequence == 0 {
			n++
		}
	}
	return n
}

func TestFastIngestStoresInOrder(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string][]PublisherOption{"with ids": nil, "without": {WithoutMessageIDs()}} {
		t.Run(name, func(t *testing.T) {
			n := 50_000
			if opts != nil {
				n = 10_000
			}
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, fastStreamConfig(1))
			acks, err := NewPublisher(nc, append(opts, WithFastIngest())...).PublishAll(testContext(t), numberedEnvelopes(n)...)
			if err != nil {
				t.Fatal(err)
			}
			for i, ack := range acks {
				if ack.Stream != "S" || ack.Sequence != 0 && ack.Sequence != uint64(i+1) {
					t.Fatalf("envelope %d: got %+v", i, ack)
				}
			}
			if last := acks[n-1]; last.Sequence != uint64(n) {
				t.Errorf("the last envelope: got %+v, want sequence %d", last, n)
			}
			if batched := inBatches(acks); batched < n*9/10 {
				t.Errorf("%d acks without sequence, want nearly all", batched)
			}
			if left := nc.NumSubscriptions(); left > 1 {
				t.Errorf("%d subscriptions are left", left)
			}
			if got := bodies(t, nc, "S"); !slices.Equal(got, allNumbers(n)) {
				t.Errorf("stored %d, or in another order", len(got))
			}
		})
	}
}

// TestFastIngestBesideOthers has in one call what goes into batches of two streams
// and what does not.
func TestFastIngestBesideOthers(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, fastStreamConfig(1))
	createStream(t, nc, jetstream.StreamConfig{Name: "T", Subjects: []string{"t.>"}, AllowBatchPublish: true, AllowMsgTTL: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "PLAIN", Subjects: []string{"plain.>"}})
	const n = 900
	var es []Envelope
	streams := map[string]int{}
	for i := range n {
		body := strconv.AppendInt(nil, int64(i), 10)
		switch {
		case i%10 == 3:
			es = append(es, To("plain.x").Data(body))
		case i%10 == 4:
			es = append(es, To("s.x").Data(body).ExpectStream("S"))
		case i%10 == 6:
			es = append(es, To("s.x").Data(body).Header("Nats-Expected-Last-Msg-Id", "other"))
		case i%100 > 60:
			es = append(es, To("t.y").Data(body).TTL(time.Hour).Header("K", "v"))
		default:
			es = append(es, To("s."+strconv.Itoa(i%7)).Data(body))
		}
	}
	acks, err := NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), es...)
	var failed *PublishError
	if !errors.As(err, &failed) {
		t.Fatalf("got %v, want a PublishError", err)
	}
	for i, ack := range acks {
		if wrongID := i%10 == 6; (failed.Errors[i] != nil) != wrongID {
			t.Fatalf("envelope %d: got %v", i, failed.Errors[i])
		} else if wrongID {
			continue
		}
		streams[ack.Stream]++
		if i%10 == 3 || i%10 == 4 {
			if ack.Sequence == 0 {
				t.Errorf("envelope %d: got %+v, want a sequence", i, ack)
			}
		}
	}
	if inBatches(acks) == 0 {
		t.Error("no batches")
	}
	for _, name := range []string{"S", "T", "PLAIN"} {
		got := bodies(t, nc, name)
		if len(got) != streams[name] {
			t.Errorf("stream %s: stored %d, acknowledged %d", name, len(got), streams[name])
		}
		if !slices.IsSortedFunc(got, func(a, b string) int {
			x, _ := strconv.Atoi(a)
			y, _ := strconv.Atoi(b)
			return x - y
		}) {
			t.Errorf("stream %s: stored in another order", name)
		}
	}
}

func TestFastIngestRefusals(t *testing.T) {
	t.Parallel()
	const n = 3_000
	large := make([]byte, 2_000)
	huge := make([]byte, 100_000)
	refused := map[int]Envelope{
		0:     To("s.x").Data(large),
		1:     To("s.*"),
		700:   To("s.x").Data(large),
		701:   To("s.x").Data(large),
		1_500: To("nowhere").Data(large),
		2_600: To("s.x").Data(huge), // never leaves
		n - 1: To("s.x").Data(large),
	}
	want := slices.DeleteFunc(allNumbers(n), func(s string) bool {
		i, _ := strconv.Atoi(s)
		_, bad := refused[i]
		return bad
	})
	for name, opts := range map[string][]PublisherOption{"with ids": nil, "without": {WithoutMessageIDs()}} {
		withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
			t.Run(name, func(t *testing.T) {
				cfg := fastStreamConfig(replicas)
				cfg.MaxMsgSize = 1_000
				createStream(t, nc, cfg)
				es := numberedEnvelopes(n)
				for i, e := range refused {
					es[i] = e
				}
				acks, err := NewPublisher(nc, append(opts, WithFastIngest())...).PublishAll(testContext(t), es...)
				var failed *PublishError
				if !errors.As(err, &failed) {
					t.Fatalf("got %v, want a PublishError", err)
				}
				for i, err := range failed.Errors {
					if _, bad := refused[i]; bad != (err != nil) || bad == (acks[i].Stream == "S") {
						t.Errorf("envelope %d: got %+v, %v", i, acks[i], err)
					}
				}
				var api *jetstream.APIError
				for i, as := range map[int]error{1: ErrInvalidSubject, 1_500: ErrNoStream} {
					if !errors.Is(failed.Errors[i], as) {
						t.Errorf("envelope %d: got %v, want %v", i, failed.Errors[i], as)
					}
				}
				if !errors.As(failed.Errors[700], &api) || !errors.As(failed.Errors[n-1], &api) {
					t.Errorf("got %v and %v, want the server's", failed.Errors[700], failed.Errors[n-1])
				}
				wantStored(t, nc, want)
			})
		})
	}
}

// TestFastIngestLastDoesNotLeave has a message that the connection refuses where
// it should commit the batch.
func TestFastIngestLastDoesNotLeave(t *testing.T) {
	t.Parallel()
	s := startServer(t, withMaxPayload(2_000))
	for name, opts := range map[string][]PublisherOption{"with ids": nil, "without": {WithoutMessageIDs()}} {
		t.Run(name, func(t *testing.T) {
			nc := connect(t, s.ClientURL())
			js := jetStream(t, nc)
			js.DeleteStream(testContext(t), "S")
			createStream(t, nc, fastStreamConfig(1))
			es := append(numberedEnvelopes(100), To("s.x").Data(make([]byte, 3_000)))
			_, err := NewPublisher(nc, append(opts, WithFastIngest())...).PublishAll(testContext(t), es...)
			var failed *PublishError
			if !errors.As(err, &failed) || len(failed.Unwrap()) != 1 || !errors.Is(failed.Errors[100], nats.ErrMaxPayload) {
				t.Fatalf("got %v, want the last to be ErrMaxPayload", err)
			}
			wantStored(t, nc, allNumbers(100))
		})
	}
}

func TestFastIngestIntoAFullStream(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		cfg := fastStreamConfig(replicas)
		cfg.MaxMsgs, cfg.Discard = 1_500, jetstream.DiscardNew
		createStream(t, nc, cfg)
		acks, err := NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), numberedEnvelopes(4_000)...)
		var failed *PublishError
		if !errors.As(err, &failed) {
			t.Fatalf("got %v, want a PublishError", err)
		}
		var want []string
		for i, ack := range acks {
			if (ack.Stream == "S") == (failed.Errors[i] != nil) {
				t.Fatalf("envelope %d: got %+v, %v", i, ack, failed.Errors[i])
			}
			if ack.Stream == "S" {
				want = append(want, strconv.Itoa(i))
			}
		}
		if len(want) != 1_500 {
			t.Errorf("%d acks, want 1500", len(want))
		}
		wantStored(t, nc, want)
	})
}

func TestFastIngestOfWhatIsStored(t *testing.T) {
	t.Parallel()
	const n = 3_000
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, fastStreamConfig(replicas))
		pub := NewPublisher(nc, WithFastIngest())
		es := numberedEnvelopes(n)
		for i := range es {
			es[i] = es[i].MsgID("id-" + strconv.Itoa(i))
		}
		first := append(slices.Clone(es[:500]), es[1_000:1_001]...)
		first = append(first, es[1_023], es[n-1])
		if _, err := pub.PublishAll(testContext(t), first...); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			acks, err := pub.PublishAll(testContext(t), append(slices.Clone(es), es[7], es[n-2])...)
			if err != nil {
				t.Fatal(err)
			}
			if i := slices.IndexFunc(acks, func(a Ack) bool { return a.Stream != "S" }); i >= 0 {
				t.Errorf("envelope %d: got %+v", i, acks[i])
			}
		}
		wantStored(t, nc, allNumbers(n))
	})
}

func TestFastIngestFallsBack(t *testing.T) {
	t.Parallel()
	const n = 3_000
	wantSequences := func(t *testing.T, acks []Ack, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for i, ack := range acks {
			if ack.Stream != "S" || ack.Sequence == 0 {
				t.Fatalf("envelope %d: got %+v", i, ack)
			}
		}
	}
	t.Run("not allowed", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t).ClientURL())
		cfg := fastStreamConfig(1)
		cfg.AllowBatchPublish = false
		createStream(t, nc, cfg)
		acks, err := NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), numberedEnvelopes(n)...)
		wantSequences(t, acks, err)
		wantStored(t, nc, allNumbers(n))
	})
	t.Run("not allowed any more", func(t *testing.T) {
		t.Parallel()
		for _, opt := range []PublisherOption{func(*Publisher) {}, WithoutMessageIDs()} {
			nc := connect(t, startServer(t).ClientURL())
			cfg := fastStreamConfig(1)
			cfg.AllowBatchPublish = false
			createStream(t, nc, cfg)
			pub := NewPublisher(nc, WithFastIngest(), WithPublisherJetStream(staleJS{jetStream(t, nc)}), opt)
			acks, err := pub.PublishAll(testContext(t), numberedEnvelopes(n)...)
			wantSequences(t, acks, err)
			wantStored(t, nc, allNumbers(n))
		}
	})
	t.Run("too many batches", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, func(o *server.Options) { o.JetStreamLimits.MaxBatchInflightPerStream = 1 }).ClientURL())
		createStream(t, nc, fastStreamConfig(1))
		// Somebody else's, which stays open.
		reply := nc.NewInbox() + ".other.10.fail.1.0.$FI"
		sub, err := nc.SubscribeSync(reply)
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.PublishRequest("s.x", reply, []byte("other")); err != nil {
			t.Fatal(err)
		}
		if m, err := sub.NextMsg(testLimit); err != nil || !bytes.Contains(m.Data, []byte(`"ack"`)) {
			t.Fatalf("the other batch: %v, %v", m, err)
		}
		acks, err := NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), numberedEnvelopes(n)...)
		wantSequences(t, acks, err)
		wantStored(t, nc, append(allNumbers(n), "other"))
	})
	t.Run("no lookup", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t).ClientURL())
		createStream(t, nc, fastStreamConfig(1))
		js, err := jetstream.NewWithAPIPrefix(nc, "nobody")
		if err != nil {
			t.Fatal(err)
		}
		acks, err := NewPublisher(nc, WithFastIngest(), WithPublisherJetStream(js)).PublishAll(testContext(t), numberedEnvelopes(n)...)
		wantSequences(t, acks, err)
		wantStored(t, nc, allNumbers(n))
	})
}

// staleJS takes every stream for one that allows batches and captures in.> too.
type staleJS struct{ jetstream.JetStream }

type staleStream struct{ jetstream.Stream }

func (js staleJS) StreamNameBySubject(context.Context, string) (string, error) { return "S", nil }

func (js staleJS) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	s, err := js.JetStream.Stream(ctx, name)
	return staleStream{s}, err
}

func (s staleStream) CachedInfo() *jetstream.StreamInfo {
	info := *s.Stream.CachedInfo()
	info.Config.AllowBatchPublish = true
	info.Config.Subjects = append(slices.Clone(info.Config.Subjects), "in.>")
	return &info
}

// relay stands between a publisher and its stream: it hands what comes to in.x on
// to s.x, and the answers back, and loses what it is told to. It returns a
// publisher that sends through it.
func relay(t *testing.T, nc *nats.Conn, lose func(m *nats.Msg) bool, loseAnswer func(m *nats.Msg) bool, opts ...PublisherOption) *Publisher {
	t.Helper()
	between := connect(t, nc.ConnectedUrl())
	for _, sub := range []struct {
		subject string
		handle  nats.MsgHandler
	}{
		{"in.x", func(m *nats.Msg) {
			if !lose(m) {
				between.PublishMsg(&nats.Msg{Subject: "s.x", Reply: "relay." + m.Reply, Header: m.Header, Data: m.Data})
			}
		}},
		{"relay.>", func(m *nats.Msg) {
			if !loseAnswer(m) {
				between.PublishMsg(&nats.Msg{Subject: strings.TrimPrefix(m.Subject, "relay."), Header: m.Header, Data: m.Data})
			}
		}},
	} {
		if _, err := between.Subscribe(sub.subject, sub.handle); err != nil {
			t.Fatal(err)
		}
	}
	if err := between.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	return NewPublisher(nc, append(opts, WithFastIngest(), WithPublisherJetStream(staleJS{jetStream(t, nc)}))...)
}

func TestFastIngestOverGaps(t *testing.T) {
	t.Parallel()
	const n = 6_000
	for name, opts := range map[string][]PublisherOption{"with ids": nil, "without": {WithoutMessageIDs()}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, fastStreamConfig(1))
			lost := map[string]bool{"10": true, "1500": true, "3000": true, "3001": true}
			if opts == nil {
				lost["4096"] = true // the first of a batch, of which nobody tells what became of it
			}
			pub := relay(t, nc, func(m *nats.Msg) bool {
				defer delete(lost, string(m.Data))
				return lost[string(m.Data)]
			}, func(*nats.Msg) bool { return false }, opts...)
			es := numberedEnvelopes(n)
			for i := range es {
				es[i].subject = "in.x"
			}
			acks, err := pub.PublishAll(testContext(t), es...)
			if err != nil {
				t.Fatal(err)
			}
			if batched := inBatches(acks); batched == 0 || batched == n {
				t.Errorf("%d acks without sequence, want some", batched)
			}
			wantStored(t, nc, allNumbers(n))
		})
	}
}

// TestFastIngestWithoutAnswers loses acks of batches, and answers of all kinds at
// random.
func TestFastIngestWithoutAnswers(t *testing.T) {
	t.Parallel()
	const n = 6_000
	tests := map[string]func(m *nats.Msg, answers int64) bool{
		"batch acks": func(m *nats.Msg, _ int64) bool { return bytes.Contains(m.Data, []byte(`"batch"`)) },
		"the first":  func(_ *nats.Msg, answers int64) bool { return answers < 40 },
		"a third":    func(_ *nats.Msg, answers int64) bool { return answers < 300 && answers%3 == 0 },
	}
	for name, lose := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, fastStreamConfig(1))
			var answers atomic.Int64
			pub := relay(t, nc, func(*nats.Msg) bool { return false }, func(m *nats.Msg) bool { return lose(m, answers.Add(1)) })
			es := numberedEnvelopes(n)
			for i := range es {
				es[i].subject = "in.x"
			}
			if _, err := pub.PublishAll(testContext(t), es...); err != nil {
				t.Fatal(err)
			}
			wantStored(t, nc, allNumbers(n))
		})
	}
}

func TestFastIngestThroughARestart(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc, watcher := connect(t, p.url()), connect(t, p.url())
	createStream(t, nc, fastStreamConfig(1))
	const n = 20_000
	var acks []Ack
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		acks, err = NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), numberedEnvelopes(n)...)
	}()
	for _, mark := range []int{3_000, 10_000} {
		eventually(t, "some are stored", func() bool { return stored(t, watcher, "S") > mark })
		p.stop()
		p.start(t)
		eventually(t, "the clients are back", func() bool { return nc.IsConnected() && watcher.IsConnected() })
	}
	receive(t, done, "the end of the call")
	if err != nil {
		t.Fatal(err)
	}
	if batched := inBatches(acks); batched == 0 || batched == n {
		t.Errorf("%d acks without sequence, want some", batched)
	}
	wantStored(t, nc, allNumbers(n))
}

func TestFastIngestThroughElections(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc, watcher := connect(t, c.url()), connect(t, c.url())
	cfg := fastStreamConfig(3)
	// A leader that steps down may keep the ids of what was on its way, as of
	// nats-server 2.15, and refuses them until the window is over when it leads again.
	cfg.Duplicates = 30 * time.Second
	createStream(t, nc, cfg)
	const n = 20_000
	var acks []Ack
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		acks, err = NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), numberedEnvelopes(n)...)
	}()
	atLeast := func(mark int) {
		eventually(t, "some are stored", func() bool { return stored(t, watcher, "S") > mark })
	}
	atLeast(2_000)
	if _, err := watcher.Request("$JS.API.STREAM.LEADER.STEPDOWN.S", nil, testLimit); err != nil {
		t.Error(err)
	}
	atLeast(6_000)
	c.leader(t, "S", "").stop()
	receive(t, done, "the end of the call")
	if err != nil {
		t.Fatal(err)
	}
	if inBatches(acks) == 0 {
		t.Error("no batches")
	}
	eventually(t, "the stream has a leader", func() bool { return stored(t, watcher, "S") > 0 })
	wantStored(t, watcher, allNumbers(n))
}

func TestFastIngestEndsWithItsContext(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, fastStreamConfig(1))
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	watcher := connect(t, nc.ConnectedUrl())
	go func() {
		defer cancel()
		// What is stored above the bound in flight was sent after an ack.
		for ctx.Err() == nil && stored(t, watcher, "S") < 2*maxPublishesInFlight {
			pause(ctx, time.Millisecond)
		}
	}()
	acks, err := NewPublisher(nc, WithFastIngest()).PublishAll(ctx, numberedEnvelopes(150_000)...)
	var failed *PublishError
	if !errors.As(err, &failed) || !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want context.Canceled", err)
	}
	there := map[string]bool{}
	for _, body := range bodies(t, nc, "S") {
		there[body] = true
	}
	confirmed := 0
	for i, ack := range acks {
		err, body := failed.Errors[i], strconv.Itoa(i)
		switch {
		case (err == nil) != (ack.Stream == "S"):
			t.Fatalf("envelope %d: got %+v, %v", i, ack, err)
		case err == nil && !there[body]:
			t.Fatalf("envelope %d is acknowledged and not stored", i)
		case err != nil && there[body] && strings.Contains(err.Error(), "not sent"):
			t.Fatalf("envelope %d is stored: %v", i, err)
		case err == nil:
			confirmed++
		}
	}
	if confirmed == 0 || confirmed == len(acks) {
		t.Errorf("%d of %d are confirmed, want some", confirmed, len(acks))
	}
}

func TestFastIngestIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, fastStreamConfig(replicas))
		pub := NewPublisher(nc, WithFastIngest())
		const calls, n = 4, 1_500
		var want []string
		var wg sync.WaitGroup
		for c := range calls {
			es := make([]Envelope, n)
			for i := range es {
				body := fmt.Sprintf("%d/%d", c, i)
				want = append(want, body)
				es[i] = To("s.x").Data([]byte(body))
			}
			wg.Go(func() {
				if _, err := pub.PublishAll(testContext(t), es...); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		wantStored(t, nc, want)
	})
}

// TestFastIngestBoundsBytes has few messages fill what may be in flight.
func TestFastIngestBoundsBytes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, withMaxPayload(8<<20)).ClientURL())
	createStream(t, nc, fastStreamConfig(1))
	es := numberedEnvelopes(24)
	for i := range es {
		es[i] = es[i].Data(make([]byte, []int{100, 1 << 20, 3 << 20, 7 << 20}[i%4]))
	}
	if _, err := NewPublisher(nc, WithFastIngest()).PublishAll(testContext(t), es...); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, nc, "S"); got != len(es) {
		t.Errorf("stored %d, want %d", got, len(es))
	}
}

func TestFastIngestFromAHandler(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, fastStreamConfig(1))
	pub := NewPublisher(nc, WithFastIngest())
	for range 2 {
		ctx := handling(testContext(t), nats.Header{"Traceparent": {"tp"}})
		if _, err := pub.PublishAll(ctx, numberedEnvelopes(1_500)...); err != nil {
			t.Fatal(err)
		}
	}
	wantStored(t, nc, allNumbers(1_500))
	m := streamNow(t, nc, "S")
	if raw, err := m.GetMsg(testContext(t), 1_200); err != nil || raw.Header.Get("Traceparent") != "tp" {
		t.Errorf("got %v, %v, want the carried header", raw, err)
	}
}
