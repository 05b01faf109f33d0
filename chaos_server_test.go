package natsx

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func init() { childModes["server"] = serverChild }

// serverChild is a nats-server. The URL names its port and its store, and, of one in a
// cluster, its name, the port for the others, and theirs.
func serverChild() int {
	u, err := url.Parse(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	opts := &server.Options{
		Host: u.Hostname(), Port: port, JetStream: true, StoreDir: u.Query().Get("store"),
		NoLog: true, NoSigs: true,
	}
	if name := u.Query().Get("name"); name != "" {
		own, err := strconv.Atoi(u.Query().Get("cluster"))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		inCluster(name, own, u.Query().Get("routes"))(opts)
	}
	s, err := server.NewServer(opts)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s.Start()
	if !s.ReadyForConnections(testLimit) {
		fmt.Fprintln(os.Stderr, "server is not ready")
		return 1
	}
	fmt.Println("ready")
	select {}
}

// serverProcess gives a server the process and the port of its own that clients
// reach at the URL. start starts it, and again after it was killed.
func serverProcess(t testing.TB) (at string, start func() *child) {
	t.Helper()
	return serverProcessWith(t, url.Values{})
}

// serverProcessWith is serverProcess with more for the URL.
func serverProcessWith(t testing.TB, query url.Values) (at string, start func() *child) {
	t.Helper()
	query.Set("store", t.TempDir())
	u := url.URL{Scheme: "nats", Host: "127.0.0.1:" + strconv.Itoa(fixedPort(t)), RawQuery: query.Encode()}
	return "nats://" + u.Host, func() *child {
		t.Helper()
		c := startChild(t, "server", u.String(), nil)
		if !c.serves(t) {
			t.Fatalf("the server ended: %v", c.err)
		}
		return c
	}
}

// A server that is killed forgets acknowledgements that it had not written yet,
// so that messages may come again; none is lost, and no letter is doubled.
func TestRouteSurvivesAKilledServer(t *testing.T) {
	t.Parallel()
	messages, kills := 600, 3
	if *soak {
		messages, kills = 20000, 40
	}
	at, start := serverProcess(t)
	srv := start()
	admin := connect(t, at)
	createStream(t, admin, jetstream.StreamConfig{
		Name: "HARD", Subjects: []string{"hard.*"}, Retention: jetstream.WorkQueuePolicy,
	})
	createStream(t, admin, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.hard"}})
	publishMany(t, admin, messages, numbered("hard.x"))

	var seen tally
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, at), WithWorkers(4), WithLogger(log)),
		Route("hard.*").Durable("d").AckWait(2*time.Second).Retry(5).DLQ("dlq.hard").
			Handle(func(ctx context.Context, m *Msg) error {
				seen.add(string(m.Data))
				busyFor(ctx, 5*time.Millisecond)
				if n, err := strconv.Atoi(string(m.Data)); err != nil || n%10 == 0 {
					return Permanent(errors.New("never"))
				}
				return nil
			}))
	for i := range kills {
		eventually(t, "the work goes on", func() bool { return seen.keys() >= (i+1)*messages/(kills+2) })
		srv.kill()
		eventually(t, "Health tells", func() bool { return r.Health() != nil })
		srv = start()
	}
	eventually(t, "all are handled", func() bool { return seen.keys() >= messages })
	eventually(t, "all are settled", func() bool { return stored(t, admin, "HARD") == 0 })
	eventually(t, "Health is good again", func() bool { return r.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	var dead tally
	for _, m := range letters(t, admin, "DLQ") {
		dead.add(string(m.Data))
	}
	dead.wantOnce(t, messages/10)
	admin.Close()
	srv.kill()
}

func TestRouteSurvivesElections(t *testing.T) {
	t.Parallel()
	const messages, elections = 600, 4
	c := startCluster(t)
	admin := connect(t, c.url())
	createStream(t, admin, jetstream.StreamConfig{Name: "VOTE", Subjects: []string{"vote.*"}, Replicas: 3})
	publishMany(t, admin, messages, numbered("vote.x"))
	var seen tally
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, c.url()), WithWorkers(4), WithLogger(log)),
		Route("vote.*").Durable("d").AckWait(3*time.Second).Handle(func(ctx context.Context, m *Msg) error {
			seen.add(string(m.Data))
			return busyFor(ctx, 5*time.Millisecond)
		}))
	for i := range elections {
		eventually(t, "the work goes on", func() bool { return seen.keys() >= (i+1)*messages/(elections+2) })
		var err error
		if i%2 == 0 {
			err = c.leader(t, "VOTE", "d").srv.JetStreamStepdownConsumer("$G", "VOTE", "d")
		} else {
			err = c.leader(t, "VOTE", "").srv.JetStreamStepdownStream("$G", "VOTE")
		}
		if err != nil {
			t.Fatalf("step down: %v", err)
		}
	}
	eventually(t, "all are handled", func() bool { return seen.keys() >= messages })
	eventually(t, "all are settled", func() bool { return settled(t, admin, "VOTE", "d") })
	eventually(t, "Health is good", func() bool { return r.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// Somebody else has the message when a lease is lost. A result that comes after
// that must not touch the delivery of the other one.
func TestLateResultSettlesNothing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		late error // what the handler returns too late
	}{
		{"success", nil},
		{"failure", errors.New("not now")},
		{"death", Permanent(errors.New("never"))},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			admin := connect(t, s.ClientURL())
			createStream(t, admin, jetstream.StreamConfig{
				Name: "LATE", Subjects: []string{"late.*"}, Retention: jetstream.WorkQueuePolicy,
			})
			createStream(t, admin, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.late"}})
			p := startProxy(t, s.ClientURL())
			route := Route("late.*").Durable("d").AckWait(time.Second).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.late")
			_, log := newLogBook()

			firstHas, firstMay := make(chan struct{}, 10), make(chan struct{})
			first := runBroker(t, NewBroker(connect(t, p.url()), WithWorkers(1), WithLogger(log)),
				route.Handle(func(context.Context, *Msg) error {
					firstHas <- struct{}{}
					<-firstMay
					return c.late
				}))
			publish(t, admin, &nats.Msg{Subject: "late.x"})
			receive(t, firstHas, "the first broker's handler")
			p.freeze()

			secondHas, secondMay := make(chan int, 10), make(chan struct{})
			second := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithLogger(log)),
				route.Handle(func(_ context.Context, m *Msg) error {
					secondHas <- m.Attempt()
					<-secondMay
					return nil
				}))
			if got := receive(t, secondHas, "the second broker's handler"); got != 2 {
				t.Errorf("attempt %d, want 2", got)
			}
			p.thaw()
			// The late result comes when the network is back, or before: it must
			// make no difference.
			close(firstMay)
			eventually(t, "the lease is counted as lost", func() bool { return first.Stats().Routes[0].Lapsed == 1 })
			eventually(t, "the first broker is well", func() bool { return first.Health() == nil })
			if err := first.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			info := consumerInfo(t, admin, "LATE", "d")
			if stored(t, admin, "LATE") != 1 || info.NumAckPending != 1 || stored(t, admin, "DLQ") != 0 {
				t.Errorf("%d stored, %d pending, %d letters, want the message in the second broker's hands alone",
					stored(t, admin, "LATE"), info.NumAckPending, stored(t, admin, "DLQ"))
			}
			close(secondMay)
			eventually(t, "the message is settled", func() bool { return stored(t, admin, "LATE") == 0 })
			if err := second.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			if got := second.Stats().Routes[0]; got.Succeeded != 1 || got.Received != 1 || len(secondHas) != 0 {
				t.Errorf("the second broker got %+v, want its one delivery and no more", got)
			}
		})
	}
}

// The server can name streams by domain and account in its ack subjects.
func TestAckSubjectsOfTheSecondForm(t *testing.T) {
	t.Parallel()
	const messages = 20
	s := startServer(t, func(o *server.Options) {
		o.JetStreamDomain = "hub"
		o.FeatureFlags = map[string]bool{"js_ack_fc_v2": true}
	})
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "V2", Subjects: []string{"v2.*"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.v2"}})
	publishMany(t, nc, messages, numbered("v2.x"))
	_, log := newLogBook()
	var seen tally
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		Route("v2.*").Durable("d").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.v2").
			Handle(func(_ context.Context, m *Msg) error {
				if !strings.HasPrefix(m.replyTo(), "$JS.ACK.hub.") {
					t.Errorf("the ack subject %q is of the first form", m.replyTo())
				}
				if m.Stream() != "V2" || m.Durable() != "d" || m.Sequence() == 0 || m.Time().IsZero() {
					t.Errorf("the message knows %q %q %d %v", m.Stream(), m.Durable(), m.Sequence(), m.Time())
				}
				seen.add(fmt.Sprintf("%s at %d", m.Data, m.Attempt()))
				return errors.New("never")
			}))
	eventually(t, "all are settled", func() bool { return stored(t, nc, "V2") == 0 })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, 2*messages)
	if got := stored(t, nc, "DLQ"); got != messages {
		t.Errorf("%d letters, want %d", got, messages)
	}
}
