package natsx

import (
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
	whole(t, nc, "S")
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
