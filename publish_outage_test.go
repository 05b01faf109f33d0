package natsx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// wire is a client's connection on which a test changes what the server says.
type wire struct {
	edit func([]byte) []byte // of each piece, may be nil

	mu   sync.Mutex
	conn net.Conn
	read chan []byte // what comes from the server or from say
}

func (w *wire) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	read := make(chan []byte)
	w.mu.Lock()
	w.conn, w.read = c, read
	w.mu.Unlock()
	go func() {
		defer close(read)
		for {
			buf := make([]byte, 64<<10)
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			piece := buf[:n]
			if w.edit != nil {
				piece = w.edit(piece)
			}
			read <- piece
		}
	}()
	return &wireConn{Conn: c, read: read}, nil
}

// say has the client read a line that the server did not write. Nothing else may be on
// its way.
func (w *wire) say(line string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.read <- []byte(line + "\r\n")
}

type wireConn struct {
	net.Conn
	read chan []byte
	rest []byte
}

func (c *wireConn) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		piece, ok := <-c.read
		if !ok {
			return 0, net.ErrClosed
		}
		c.rest = piece
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Close lets the reader go, which may wait for somebody who takes its last piece.
func (c *wireConn) Close() error {
	err := c.Conn.Close()
	go func() {
		for range c.read {
		}
	}()
	return err
}

// sending are all methods that send an envelope.
func sending(pub *Publisher) map[string]func(context.Context, Envelope) error {
	all := storing(pub)
	maps.Copy(all, asking(pub))
	all["Send"] = pub.Send
	all["RequestJSON"] = func(ctx context.Context, e Envelope) error {
		_, err := RequestJSON[int](ctx, pub, e)
		return err
	}
	return all
}

// storingDelayed are the ways to store an envelope later.
func storingDelayed(pub *Publisher) map[string]func(context.Context, Envelope) error {
	all := map[string]func(context.Context, Envelope) error{}
	for name, store := range storing(pub) {
		if name != "PublishAtomic" {
			all[name+" later"] = func(ctx context.Context, e Envelope) error { return store(ctx, e.After(time.Millisecond)) }
		}
	}
	return all
}

// Two of three servers are down for longer than a publish used to believe in its stream.
func TestPublishWithoutAQuorum(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.servers[2].url())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>", "natsx-schedule.*.s.>"}, Replicas: 3,
		AllowMsgSchedules: true, AllowRollup: true, AllowAtomicPublish: true})
	c.whole(t, nc, "S")
	for _, p := range c.servers[:2] {
		p.stop()
	}
	pub := NewPublisher(nc)
	calls := storing(pub)
	maps.Copy(calls, storingDelayed(pub))
	var all sync.WaitGroup
	for name, store := range calls {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(testContext(t), 3500*time.Millisecond)
			defer cancel()
			if err := store(ctx, To("s.x")); !errors.Is(err, ErrTimeout) || errors.Is(err, ErrNoStream) {
				t.Errorf("%s without a quorum: got %v, want ErrTimeout", name, err)
			}
		})
	}
	all.Wait()
	for name, store := range calls {
		all.Go(func() {
			if err := store(testContext(t), To("s.x")); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	for _, p := range c.servers[:2] {
		p.start(t)
	}
	all.Wait()
}

// What a stream answers while its leader changes passes.
func TestPublishRepeatsWhatPasses(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	for bare, opts := range map[bool][]PublisherOption{false: nil, true: {WithoutMessageIDs()}} {
		for name, store := range storing(NewPublisher(nc, opts...)) {
			subject := fmt.Sprint(name, bare)
			var answers atomic.Int64
			answerLate(t, nc, subject, func(*nats.Msg) string {
				switch n := answers.Add(1); n {
				case 1, 2:
					return fmt.Sprintf(`{"error":{"code":503,"err_code":%d,"description":"for now"},"stream":"S","seq":0}`, 10007+n)
				}
				return storedFirst
			}, func(*nats.Msg) time.Duration { return 0 })
			if err := store(testContext(t), To(subject)); err != nil {
				t.Errorf("%s, bare %t: %v", name, bare, err)
			}
		}
	}
}

// A look-up that nobody answers is repeated, and once for all envelopes of a call.
func TestDelayedPublishRepeatsItsLookup(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowMsgSchedules: true, AllowRollup: true})
	unavailable := &jetstream.APIError{Code: 503, ErrorCode: 10008, Description: "JetStream system temporarily unavailable"}
	var asked atomic.Int64
	pub := NewPublisher(nc, WithPublisherJetStream(knownJS{JetStream: jetStream(t, nc), ask: func(ctx context.Context) error {
		switch asked.Add(1) {
		case 1:
			<-ctx.Done()
			return ctx.Err()
		case 2:
			return unavailable
		case 3:
			return nats.ErrNoResponders
		}
		return nil
	}}))
	es := make([]Envelope, 50)
	for i := range es {
		es[i] = To(fmt.Sprint("s.", i)).After(time.Hour)
	}
	if _, err := pub.PublishAll(testContext(t), append(es, To("s.now"))...); err != nil {
		t.Fatal(err)
	}
	if n := asked.Load(); n != 4 {
		t.Errorf("asked %d times, want 4", n)
	}
	if n := stored(t, nc, "S"); n != len(es)+1 {
		t.Errorf("%d are stored, want %d", n, len(es)+1)
	}
	asked.Store(0)
	if _, err := pub.Publish(testContext(t), es[0]); err != nil {
		t.Error(err)
	}
}

// startLeaf runs a leaf node of the hub, with a JetStream of its own when domain is set.
func startLeaf(t *testing.T, hub *phoenix, domain string) *server.Server {
	remote, err := url.Parse(fmt.Sprintf("nats://127.0.0.1:%d", hub.opts.LeafNode.Port))
	if err != nil {
		t.Fatal(err)
	}
	return startServer(t, func(o *server.Options) {
		o.JetStream, o.JetStreamDomain = domain != "", domain
		o.LeafNode = server.LeafNodeOpts{ReconnectInterval: 50 * time.Millisecond, Remotes: []*server.RemoteLeafOpts{{URLs: []*url.URL{remote}}}}
	})
}

// The application is at a leaf node, its stream in the hub, which restarts.
func TestPublishWhileTheHubIsAway(t *testing.T) {
	t.Parallel()
	for _, domain := range []string{"", "leaf"} {
		for _, explicit := range []bool{false, true} {
			t.Run(fmt.Sprintf("leaf's domain %q, hub's named %t", domain, explicit), func(t *testing.T) {
				t.Parallel()
				hub := startPhoenix(t, func(o *server.Options) {
					o.JetStreamDomain = "hub"
					o.LeafNode = server.LeafNodeOpts{Host: "127.0.0.1", Port: fixedPort(t)}
				})
				createStream(t, connect(t, hub.url()), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
				nc := connect(t, startLeaf(t, hub, domain).ClientURL())
				inHub, err := jetstream.NewWithDomain(nc, "hub")
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, "the hub is there", func() bool {
					_, err := inHub.StreamNameBySubject(testContext(t), "s.x")
					return err == nil
				})
				var opts []PublisherOption
				if explicit {
					opts = append(opts, WithPublisherJetStream(inHub))
				}
				pub := NewPublisher(nc, opts...)
				hub.stop()
				calls := map[string]func(context.Context, Envelope) error{"Publish": storing(pub)["Publish"], "PublishAll": storing(pub)["PublishAll"]}
				for name, store := range calls {
					ctx, cancel := context.WithTimeout(testContext(t), 300*time.Millisecond)
					if err := store(ctx, To("s.x")); !errors.Is(err, ErrTimeout) || errors.Is(err, ErrNoStream) {
						t.Errorf("%s: got %v, want ErrTimeout", name, err)
					}
					cancel()
				}
				var all sync.WaitGroup
				for name, store := range calls {
					all.Go(func() {
						if err := store(testContext(t), To("s.x")); err != nil {
							t.Errorf("%s: %v", name, err)
						}
					})
				}
				hub.start(t)
				all.Wait()
				if explicit {
					if err := calls["Publish"](testContext(t), To("nowhere")); !errors.Is(err, ErrNoStream) {
						t.Errorf("a subject without a stream: got %v, want ErrNoStream", err)
					}
				}
			})
		}
	}
}

// An ack that is later than a try waits counts, and what is late is not sent again.
func TestPublishAtomicTakesALateAck(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	seen := answerLate(t, nc, "slow", func(m *nats.Msg) string {
		if m.Header.Get(batchCommitHeader) == "" {
			return ""
		}
		return storedFirst
	}, func(*nats.Msg) time.Duration { return 2 * commitWait })
	ack, err := NewPublisher(nc).PublishAtomic(testContext(t), To("slow"), To("slow"), To("slow"))
	if err != nil || ack != (Ack{Stream: "S", Sequence: 1}) {
		t.Errorf("got %+v, %v, want the late ack", ack, err)
	}
	if n := seen.Load(); n != 3 {
		t.Errorf("%d messages were sent, want 3", n)
	}
}

// A batch that was lost on its way is sent again as soon as the stream says that it has
// not come, and one whose ack was lost is not.
func TestPublishAtomicAsksBeforeItRepeats(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		for _, lost := range []string{"batch", "ack"} {
			t.Run(lost, func(t *testing.T) {
				createStream(t, nc, jetstream.StreamConfig{Name: lost, Subjects: []string{lost}, Replicas: replicas, AllowAtomicPublish: true})
				proxy := startProxy(t, nc.ConnectedUrl())
				through := connect(t, proxy.url())
				if err := through.FlushTimeout(testLimit); err != nil {
					t.Fatal(err)
				}
				watcher := make(chan *nats.Msg, 100)
				if _, err := nc.ChanSubscribe(lost, watcher); err != nil {
					t.Fatal(err)
				}
				if err := nc.FlushTimeout(testLimit); err != nil {
					t.Fatal(err)
				}
				if lost == "ack" {
					proxy.deafen()
				} else {
					proxy.freeze()
				}
				done := make(chan error, 1)
				go func() {
					ack, err := NewPublisher(through).PublishAtomic(testContext(t), To(lost), To(lost))
					if err == nil && ack.Sequence != 2 {
						err = fmt.Errorf("the ack is %+v", ack)
					}
					done <- err
				}()
				if lost == "ack" {
					receive(t, watcher, "the first message")
					receive(t, watcher, "the commit")
				} else {
					eventually(t, "the batch is in the link that is cut", func() bool {
						n, err := through.Buffered()
						return err == nil && n == 0 && through.Stats().OutMsgs >= 2
					})
				}
				proxy.refuse()
				proxy.thaw()
				proxy.allow()
				if err := receive(t, done, "the ack"); err != nil {
					t.Error(err)
				}
				if n := len(watcher); lost == "ack" && n > 0 {
					t.Errorf("%d messages were sent again", n)
				}
				if n := stored(t, nc, lost); n != 2 {
					t.Errorf("%d are stored, want 2", n)
				}
			})
		}
	})
}

// What the server refused before, or for another subject, is not blamed for a slow ack.
func TestSlowAckIsNoMissingPermission(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	violation := func(subject string) string {
		return fmt.Sprintf(`-ERR 'Permissions Violation for Publish to "%s"'`, subject)
	}
	for name := range sending(NewPublisher(connect(t, s.ClientURL()))) {
		if name == "Send" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			told := make(chan error, 10)
			w := &wire{}
			nc := connect(t, s.ClientURL(), nats.SetCustomDialer(w), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { told <- err }))
			if err := nc.FlushTimeout(testLimit); err != nil {
				t.Fatal(err)
			}
			slow := "slow." + EscapeToken(name)
			pub := NewPublisher(nc)
			if _, err := pub.Request(testContext(t), To("nobody")); !errors.Is(err, ErrNoResponders) {
				t.Fatal(err)
			}
			w.say(violation(slow))
			receive(t, told, "the old refusal")
			other := connect(t, s.ClientURL())
			if _, err := other.Subscribe(slow, func(m *nats.Msg) {
				w.say(violation("slow.other"))
				<-time.After(1200 * time.Millisecond) // longer than a try waits
				m.Respond([]byte(`{"stream":"S","seq":1}`))
			}); err != nil {
				t.Fatal(err)
			}
			if err := other.FlushTimeout(testLimit); err != nil {
				t.Fatal(err)
			}
			err := sending(pub)[name](testContext(t), To(slow))
			if name == "RequestJSON" && err != nil && strings.Contains(err.Error(), "decode") {
				err = nil
			}
			if err != nil {
				t.Errorf("got %v, want the slow ack", err)
			}
			receive(t, told, "the other refusal")
		})
	}
}

// A permission that is missing is told by all methods that wait for an answer.
func TestMissingPermissionIsTold(t *testing.T) {
	t.Parallel()
	var told atomic.Int64
	_, nc := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"forbidden"}}},
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) { told.Add(1) }))
	for bare, opts := range map[bool][]PublisherOption{false: nil, true: {WithoutMessageIDs()}} {
		for name, send := range sending(NewPublisher(nc, opts...)) {
			if name == "Send" {
				continue
			}
			t.Run(fmt.Sprintf("%s, bare %t", name, bare), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(testContext(t), 5*time.Second)
				defer cancel()
				err := send(ctx, To("forbidden"))
				if denied, ok := errors.AsType[*PermissionError](err); !ok || denied.Subject != "forbidden" {
					t.Errorf("got %v, want a PermissionError", err)
				}
			})
		}
	}
	t.Cleanup(func() {
		if told.Load() == 0 {
			t.Error("the application's own error handler was not called")
		}
	})
}

// An error handler that the application sets while somebody watches stays, and so do
// the watches.
func TestErrorHandlerOfTheApplicationStays(t *testing.T) {
	t.Parallel()
	w := &wire{}
	nc := connect(t, startServer(t).ClientURL(), nats.SetCustomDialer(w))
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Fatal(err)
	}
	events := make(chan string, 10)
	watch := func(name string) *asyncWatch {
		return watchAsync(nc, func(*nats.Subscription, error) { events <- name })
	}
	heard := func(want ...string) {
		t.Helper()
		w.say("-ERR 'Permissions Violation for Publish to \"x\"'")
		got := make([]string, len(want))
		for i := range got {
			got[i] = receive(t, events, "an event")
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" || len(events) > 0 {
			t.Errorf("%d more than (-want +got):\n%s", len(events), diff)
		}
	}
	first := watch("first")
	inner := nc.ErrorHandler()
	nc.SetErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
		events <- "application"
		inner(nc, sub, err)
	})
	heard("application", "first")
	second := watch("second")
	heard("application", "first", "second")
	first.stop()
	heard("application", "second")
	nc.SetErrorHandler(func(*nats.Conn, *nats.Subscription, error) { events <- "another" })
	second.stop()
	heard("another")
	third := watch("third")
	heard("another", "third")
	third.stop()
	heard("another")
}

// An envelope without an id does not wait in the buffer of a connection that is down:
// whoever gives up on it knows that it is not sent.
func TestBareEnvelopeWaitsForTheConnection(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]nats.Option{"buffer": nats.ReconnectBufSize(nats.DefaultReconnectBufSize), "no buffer": nats.ReconnectBufSize(-1)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startPhoenix(t)
			nc := connect(t, p.url(), opt)
			createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
			pub := NewPublisher(nc, WithoutMessageIDs())
			p.stop()
			eventually(t, "the connection is down", func() bool { return !nc.IsConnected() })
			calls := map[string]func(context.Context, Envelope) error{"Publish": storing(pub)["Publish"], "PublishAll": storing(pub)["PublishAll"]}
			for call, store := range calls {
				ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
				err := store(ctx, To("s.x"))
				if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "not sent, the connection is down") || strings.Contains(err.Error(), "may be stored") {
					t.Errorf("%s: got %v, want ErrTimeout that says that it was not sent", call, err)
				}
				cancel()
			}
			var all sync.WaitGroup
			for call, store := range calls {
				all.Go(func() {
					if err := store(testContext(t), To("s.x")); err != nil {
						t.Errorf("%s: %v", call, err)
					}
				})
			}
			p.start(t)
			all.Wait()
			if n := stored(t, nc, "S"); n != 3 {
				t.Errorf("%d are stored, want 3", n)
			}
		})
	}
}

// On a connection that is closed or draining every method ends at once, in the same way.
func TestClosedConnectionEndsAllMethods(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	closed := connect(t, s.ClientURL())
	closed.Close()
	draining := connect(t, s.ClientURL())
	busy, release := make(chan struct{}), make(chan struct{})
	if _, err := draining.Subscribe("busy", func(*nats.Msg) {
		close(busy)
		<-release
	}); err != nil {
		t.Fatal(err)
	}
	if err := draining.Publish("busy", nil); err != nil {
		t.Fatal(err)
	}
	receive(t, busy, "a subscription that takes long to drain")
	if err := draining.Drain(); err != nil {
		t.Fatal(err)
	}
	defer close(release)
	never := connect(t, "nats://127.0.0.1:1", nats.RetryOnFailedConnect(true))
	never.Close()
	for state, nc := range map[string]*nats.Conn{"closed": closed, "draining": draining, "never up": never} {
		for _, opts := range [][]PublisherOption{nil, {WithoutMessageIDs()}, {WithFastIngest()}} {
			pub := NewPublisher(nc, opts...)
			calls := sending(pub)
			maps.Copy(calls, storingDelayed(pub))
			for name, call := range calls {
				began := time.Now()
				if err := call(testContext(t), To("x")); !errors.Is(err, ErrConnectionClosed) {
					t.Errorf("%s, %s: got %v, want ErrConnectionClosed", state, name, err)
				} else if strings.Count(err.Error(), "natsx:") > 2 {
					t.Errorf("%s, %s: %q", state, name, err)
				}
				if took := time.Since(began); took > testLimit/4 {
					t.Errorf("%s, %s: took %s, want it at once", state, name, took)
				}
			}
		}
	}
}

// A connection that is closed while an ack is awaited ends the wait.
func TestClosingEndsWhatWaits(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	watcher := connect(t, s.ClientURL())
	for _, drain := range []bool{false, true} {
		for name := range storing(NewPublisher(watcher)) {
			t.Run(fmt.Sprintf("%s, drain %t", name, drain), func(t *testing.T) {
				t.Parallel()
				hole := "hole." + EscapeToken(t.Name())
				sub, err := watcher.SubscribeSync(hole)
				if err != nil {
					t.Fatal(err)
				}
				if err := watcher.FlushTimeout(testLimit); err != nil {
					t.Fatal(err)
				}
				nc := connect(t, s.ClientURL())
				go func() {
					sub.NextMsg(testLimit)
					if drain {
						nc.Drain()
					} else {
						nc.Close()
					}
				}()
				if err := storing(NewPublisher(nc))[name](testContext(t), To(hole)); !errors.Is(err, ErrConnectionClosed) {
					t.Errorf("got %v, want ErrConnectionClosed", err)
				}
			})
		}
	}
}

// Whatever fits without natsx's own headers is taken without them.
func TestPayloadOfExactlyTheMaximum(t *testing.T) {
	t.Parallel()
	const most = 4_000
	nc := connect(t, startServer(t, withMaxPayload(most)).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowBatchPublish: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "SMALL", Subjects: []string{"small.>"}, MaxMsgSize: most / 2})
	if _, err := nc.Subscribe("echo", func(m *nats.Msg) { m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	carried := nats.Header{"traceparent": {"tp"}, "Correlation-Id": {"c"}}
	for name, opts := range map[string][]PublisherOption{"plain": nil, "bare": {WithoutMessageIDs()}, "fast": {WithFastIngest()}} {
		pub := NewPublisher(nc, opts...)
		for where, ctx := range map[string]context.Context{"outside": testContext(t), "handler": handling(testContext(t), carried)} {
			for call, send := range sending(pub) {
				e := To("s.x").Data(bytes.Repeat([]byte("1"), most))
				switch {
				case call == "PublishAtomic":
					continue
				case strings.HasPrefix(call, "Request"):
					e.subject = "echo"
				}
				if err := send(ctx, e); err != nil && !strings.Contains(err.Error(), "decode the answer") {
					t.Errorf("%s, %s, %s: %v", name, where, call, err)
				}
				if err := send(ctx, e.Header("K", "v")); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("%s, %s, %s with a header: got %v, want ErrMaxPayload", name, where, call, err)
				}
				if strings.HasPrefix(call, "Publish") {
					e.subject, e.data = "small.x", e.data[:most/2]
					if err := send(ctx, e); err != nil {
						t.Errorf("%s, %s, %s to a stream with a MaxMsgSize: %v", name, where, call, err)
					}
				}
			}
			if err := pub.Send(ctx, To("s.x").JSON(string(make([]byte, 0))).JSON(strings.Repeat("x", most-2))); err != nil {
				t.Errorf("%s, %s: JSON: %v", name, where, err)
			}
		}
	}
	// No more is left out than has to be.
	id := "IN/worker/7@42/"
	for size, want := range map[int][]string{most - 200: {"Nats-Msg-Id", "Correlation-Id", "traceparent"}, most - 100: {"Nats-Msg-Id"}, most - 20: nil} {
		ack, err := NewPublisher(nc).Publish(handling(testContext(t), carried), To("s.y").Data(make([]byte, size)))
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.GetMsg(testContext(t), ack.Sequence)
		if err != nil {
			t.Fatal(err)
		}
		got := slices.Sorted(maps.Keys(m.Header))
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" || len(want) > 0 && !strings.HasPrefix(m.Header.Get("Nats-Msg-Id"), id) {
			t.Errorf("%d bytes (-want +got):\n%s", size, diff)
		}
	}
	_, err := NewPublisher(nc).PublishAtomic(testContext(t), To("s.x").Data(make([]byte, most)))
	if !errors.Is(err, nats.ErrMaxPayload) || !strings.Contains(err.Error(), "with those of an atomic batch") {
		t.Errorf("atomic: got %v, want ErrMaxPayload that says why", err)
	}
}

// A stream that acknowledges nothing is told soon, and nothing is sent twice.
func TestPublishToAStreamWithoutAcks(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string][]PublisherOption{"ids": nil, "bare": {WithoutMessageIDs()}, "fast": {WithFastIngest()}} {
		nc := connect(t, startServer(t).ClientURL())
		pub := NewPublisher(nc, opts...)
		calls := storing(pub)
		maps.Copy(calls, storingDelayed(pub))
		calls["TTL"] = func(ctx context.Context, e Envelope) error { return calls["Publish"](ctx, e.TTL(time.Hour)) }
		for call, store := range calls {
			t.Run(name+", "+call, func(t *testing.T) {
				t.Parallel()
				subject := "s." + EscapeToken(call)
				cfg := jetstream.StreamConfig{Name: EscapeToken(call), Subjects: []string{subject}, NoAck: true, AllowMsgTTL: true}
				if call == "PublishAtomic" {
					cfg.AllowAtomicPublish = true
				}
				createStream(t, nc, cfg)
				began := time.Now()
				err := store(testContext(t), To(subject))
				if !errors.Is(err, ErrNoAck) || errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "NoAck") {
					t.Errorf("got %v, want ErrNoAck", err)
				}
				if took := time.Since(began); took > DefaultPublishTimeout/3 {
					t.Errorf("took %s", took)
				}
				n, sent := stored(t, nc, cfg.Name), map[string]int{"PublishAll": 2, "Publish": 1, "PublishAtomic": 1}[call] // else it is looked up first
				if strings.Contains(err.Error(), "was not sent") {
					sent = 0
				}
				if n != sent {
					t.Errorf("%d are stored, %d were sent: %v", n, sent, err)
				}
				// From then on nothing is sent.
				if err := store(testContext(t), To(subject)); !errors.Is(err, ErrNoAck) || !strings.Contains(err.Error(), "was not sent") {
					t.Errorf("got %v, want ErrNoAck before anything is sent", err)
				}
				if again := stored(t, nc, cfg.Name); again != n {
					t.Errorf("%d are stored, %d were before", again, n)
				}
			})
		}
	}
}

// A TTL that would be ignored is refused before anything is sent.
func TestIgnoredTTLIsRefused(t *testing.T) {
	t.Parallel()
	admin, _ := startGuarded(t, &server.Permissions{})
	createStream(t, admin, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, AllowMsgTTL: true, AllowAtomicPublish: true, AllowBatchPublish: true})
	createStream(t, admin, jetstream.StreamConfig{Name: "N", Subjects: []string{"n.>"}, AllowAtomicPublish: true, AllowMsgSchedules: true, AllowBatchPublish: true})
	// A server before 2.11 knows neither TTL nor AllowMsgTTL.
	version := func(v string) nats.Option {
		return nats.SetCustomDialer(&wire{edit: func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"version":"`+server.VERSION+`"`), []byte(`"version":"`+v+`"`), 1)
		}})
	}
	for _, tt := range []struct {
		name, version, subject string
		lookup                 bool // whether the stream may be looked up
		want                   error
	}{
		{"allowed", server.VERSION, "s.x", true, nil},
		{"not allowed", server.VERSION, "n.x", true, ErrTTLNotAllowed},
		{"allowed, no look-up", server.VERSION, "s.x", false, nil},
		{"not allowed, no look-up", server.VERSION, "n.x", false, ErrTTLNotAllowed},
		{"old server before a new one", "2.10.29", "s.x", true, nil},
		{"old server, not allowed", "2.10.29", "n.x", true, ErrTTLNotAllowed},
		{"old server, no look-up", "2.10.29", "s.x", false, ErrTTLNotAllowed},
	} {
		for _, opts := range [][]PublisherOption{nil, {WithFastIngest()}} {
			t.Run(fmt.Sprintf("%s, %d options", tt.name, len(opts)), func(t *testing.T) {
				user := nats.UserInfo("admin", "a")
				js := jetStream(t, admin)
				if !tt.lookup {
					js = deniedJS{js}
				}
				nc := connect(t, admin.ConnectedUrl(), user, version(tt.version))
				pub := NewPublisher(nc, append(opts, WithPublisherJetStream(js))...)
				calls := storing(pub)
				if tt.lookup && tt.want != nil {
					maps.Copy(calls, storingDelayed(pub))
				}
				for name, store := range calls {
					if name == "PublishAtomic" && tt.version != server.VERSION {
						continue
					}
					before := stored(t, admin, "S") + stored(t, admin, "N")
					err := store(testContext(t), To(tt.subject).TTL(time.Hour))
					if !errors.Is(err, tt.want) {
						t.Errorf("%s: got %v, want %v", name, err, tt.want)
					}
					if after := stored(t, admin, "S") + stored(t, admin, "N"); tt.want != nil && after != before {
						t.Errorf("%s: %d were stored", name, after-before)
					}
				}
			})
		}
	}
}

// deniedJS may not be asked.
type deniedJS struct{ jetstream.JetStream }

func (deniedJS) StreamNameBySubject(context.Context, string) (string, error) {
	return "", &PermissionError{Operation: "publish", Subject: "$JS.API.STREAM.NAMES"}
}

// What natsx asks the stream is not seen by those who listen to the subject.
func TestQuestionsAreNotSeenBySubscribers(t *testing.T) {
	t.Parallel()
	withAndWithoutReplicas(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: replicas, AllowRollup: true, AllowAtomicPublish: true, MaxMsgsPerSubject: 1})
		listener := connect(t, nc.ConnectedUrl())
		seen := make(chan *nats.Msg, 100)
		if _, err := listener.ChanSubscribe("s.>", seen); err != nil {
			t.Fatal(err)
		}
		if err := listener.FlushTimeout(testLimit); err != nil {
			t.Fatal(err)
		}
		pub := NewPublisher(nc)
		e := To("s.x").Data([]byte("x"))
		for run := range 2 {
			ctx := handling(testContext(t), nil)
			ack, err := pub.Publish(ctx, e.ExpectLastSubjectSequence(0))
			if want := (Ack{Stream: "S", Sequence: 1, Duplicate: run > 0}); err != nil || !sameAck(ack, want) {
				t.Errorf("run %d: got %+v, %v, want %+v", run+1, ack, err, want)
			}
			if _, err := pub.PublishAll(ctx, e.ExpectLastSubjectSequence(77)); !errors.Is(err, ErrWrongSequence) {
				t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
			}
			if _, err := pub.Publish(testContext(t), e.MsgID("own").ExpectLastSubjectSequence(77)); !errors.Is(err, ErrWrongSequence) {
				t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
			}
			batch := []Envelope{To("s.a").Data([]byte("x")).MsgID("a"), To("s.b").Data([]byte("x")).MsgID("b")}
			if ack, err := pub.PublishAtomic(ctx, batch...); err != nil || ack.Duplicate != (run > 0) {
				t.Errorf("run %d: got %+v, %v", run+1, ack, err)
			}
			if run == 0 { // the message is gone by then, and its id is known
				if _, err := pub.Publish(testContext(t), To("s.x").Data([]byte("y"))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := nc.FlushTimeout(testLimit); err != nil {
			t.Fatal(err)
		}
		if err := nc.Publish("s.end", []byte("end")); err != nil {
			t.Fatal(err)
		}
		for {
			m := receive(t, seen, "a message")
			if string(m.Data) == "end" {
				return
			}
			if len(m.Data) == 0 || m.Header.Get("Nats-Rollup") != "" || m.Header.Get("Nats-Trace-Only") != "" {
				t.Errorf("subscribers see %q with %v", m.Data, m.Header)
			}
		}
	})
}

// Where the server does not trace for the user, the stream is read; and where that may
// not be, the error says that the outcome is unknown.
func TestWrongSequenceWithoutTracing(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		allow []string
		known bool
	}{
		{"read", []string{"s.>", "$JS.API.STREAM.MSG.GET.S"}, true},
		{"neither", []string{"s.>"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			admin, nc := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: tt.allow}})
			createStream(t, admin, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
			pub := NewPublisher(nc)
			for run := range 2 {
				for subject, e := range map[string]Envelope{
					"s.x": To("s.x").ExpectLastSubjectSequence(0),
				} {
					ctx := handling(testContext(t), nil)
					ack, err := pub.Publish(ctx, e)
					switch {
					case run == 0 || tt.known:
						if err != nil || ack.Sequence != 1 {
							t.Errorf("run %d, %s: got %+v, %v, want the first ack", run+1, subject, ack, err)
						}
					case !errors.Is(err, ErrWrongSequence) || !strings.Contains(err.Error(), "unknown") || strings.Count(err.Error(), "natsx:") != 1:
						t.Errorf("run %d, %s: got %v, want ErrWrongSequence that says what is unknown", run+1, subject, err)
					}
					if tt.known { // one that was never stored
						if _, err := pub.Publish(ctx, e.Data([]byte("other"))); !errors.Is(err, ErrWrongSequence) || strings.Contains(err.Error(), "unknown") {
							t.Errorf("run %d: got %v, want ErrWrongSequence", run+1, err)
						}
					}
				}
			}
		})
	}
}

// While the stream takes no more batches, no batch is sent to it but for its first
// message.
func TestPublishAtomicHoldsBackWhenRefused(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	const size, refusals = 50, 5
	var begun, seen atomic.Int64
	if _, err := nc.Subscribe("busy", func(m *nats.Msg) {
		seen.Add(1)
		switch {
		case m.Header.Get(batchSequenceHeader) == "1" && begun.Add(1) <= refusals:
			m.Respond([]byte(`{"error":{"code":429,"err_code":10210,"description":"atomic publish too many inflight"},"stream":"S","seq":0}`))
		case begun.Load() <= refusals:
		case m.Header.Get(batchCommitHeader) != "":
			m.Respond([]byte(storedFirst))
		default:
			m.Respond(nil)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := NewPublisher(nc).PublishAtomic(testContext(t), slices.Repeat([]Envelope{To("busy")}, size)...); err != nil {
		t.Fatal(err)
	}
	if n := seen.Load(); n != size+refusals-1+size {
		t.Errorf("%d messages were sent, want %d", n, size+refusals-1+size)
	}
}
