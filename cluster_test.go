package natsx

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// member is a server of a cluster that can be taken down and started again.
type member struct {
	at   string // its URL
	down func()
	up   func()
}

// A leader that stops hands over what it leads.
func TestClusterWhoseLeadersStop(t *testing.T) {
	t.Parallel()
	members := map[string]member{}
	for i, p := range startCluster(t).servers {
		members[memberName(i)] = member{p.url(), p.stop, func() { p.start(t) }}
	}
	leadersGo(t, members, 3)
}

// The followers of a leader that is killed notice that after four to nine seconds.
func TestClusterWhoseLeadersAreKilled(t *testing.T) {
	t.Parallel()
	if !*soak {
		t.Skip("takes minutes: with -soak")
	}
	members := map[string]member{}
	ports, routes := clusterPorts(t)
	for i, port := range ports {
		at, start := serverProcessWith(t, url.Values{
			"name": {memberName(i)}, "cluster": {strconv.Itoa(port)}, "routes": {routes},
		})
		var c *child
		members[memberName(i)] = member{at, func() { c.kill() }, func() { c = start() }}
	}
	var all sync.WaitGroup
	for _, m := range members {
		all.Go(m.up)
	}
	all.Wait()
	leadersGo(t, members, 20)
}

// leadersGo takes down leaders of a cluster under load, one after the other, with three
// replicas of everything. Nothing that was acknowledged to a publisher is lost, what was
// not in flight is not repeated, letters are exactly once, and publishers wait little
// longer than the cluster has no leader.
func leadersGo(t *testing.T, members map[string]member, times int) {
	const publishers, retries = 4, 2
	var urls []string
	for _, m := range members {
		urls = append(urls, m.at)
	}
	at := strings.Join(urls, ",")
	admin := connect(t, at)
	for _, c := range []jetstream.StreamConfig{
		{Name: "LOAD", Subjects: []string{"load.*"}},
		{Name: "DLQ", Subjects: []string{"dlq.load"}},
		{Name: "RETRY", Subjects: []string{"RETRY.>"}, Retention: jetstream.WorkQueuePolicy, AllowMsgSchedules: true},
	} {
		c.Replicas = clusterSize
		eventually(t, "the stream "+c.Name+" is made", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := jetStream(t, admin).CreateOrUpdateStream(ctx, c)
			return err == nil
		})
	}

	var runs tally // by message and attempt
	_, log := newLogBook()
	b := NewBroker(connect(t, at), WithWorkers(8), WithRetryStream("RETRY"), WithLogger(log))
	r := runBroker(t, b, Route("load.job").Durable("d").ConfirmAcks().AckWait(5*time.Second).
		Retry(retries).Backoff(20*time.Millisecond, 50*time.Millisecond).DLQ("dlq.load").
		Handle(func(ctx context.Context, m *Msg) error {
			runs.add(fmt.Sprintf("%s at %d", m.Data, m.Attempt()))
			if attempts(string(m.Data)) > m.Attempt() || dies(string(m.Data)) {
				return errors.New("not now")
			}
			return busyFor(ctx, time.Millisecond)
		}))
	// inFlight is what was delivered and is not settled: with ConfirmAcks, what no quorum
	// has as settled.
	inFlight := func() int {
		st := b.Stats().Routes[0]
		return int(st.Received - st.Succeeded - st.Retried - st.Dead - st.Returned - st.Lapsed)
	}

	var last atomic.Int64
	var over atomic.Bool
	var load sync.WaitGroup
	var mu sync.Mutex
	var gap, dark time.Duration // without an ack: of any publisher, and of who only asks
	longest := func(most *time.Duration, since time.Time) {
		mu.Lock()
		defer mu.Unlock()
		*most = max(*most, time.Since(since))
	}
	for range publishers {
		pub := NewPublisher(connect(t, at))
		load.Go(func() {
			for !over.Load() {
				i := last.Add(1)
				began := time.Now()
				if _, err := pub.Publish(t.Context(), To("load.job").Data(strconv.AppendInt(nil, i, 10))); err != nil {
					t.Errorf("message %d: %v", i, err)
					return
				}
				longest(&gap, began)
				busyFor(t.Context(), 5*time.Millisecond)
			}
		})
	}
	ask := connect(t, at)
	load.Go(func() {
		for began := time.Now(); !over.Load(); busyFor(t.Context(), 10*time.Millisecond) {
			ack, err := ask.Request("load.probe", nil, 200*time.Millisecond)
			if err == nil && strings.Contains(string(ack.Data), `"seq"`) {
				longest(&dark, began)
				began = time.Now()
			}
		}
	})

	var exposed int
	for i := range times {
		stream := []string{"LOAD", "RETRY", "DLQ"}[i%3]
		before := runs.keys()
		eventually(t, "the work goes on", func() bool { return runs.keys() > before+100 })
		whole(t, admin, "LOAD", "RETRY", "DLQ")
		leader := streamNow(t, admin, stream).CachedInfo().Cluster.Leader
		members[leader].down()
		exposed += inFlight()
		before = runs.keys()
		eventually(t, "the work goes on without "+leader, func() bool { return runs.keys() > before+100 })
		members[leader].up()
	}
	over.Store(true)
	load.Wait()

	messages, want, letterCount := int(last.Load()), 0, 0
	for i := range messages {
		want += attempts(strconv.Itoa(i + 1))
		if dies(strconv.Itoa(i + 1)) {
			letterCount++
		}
	}
	eventually(t, "all are handled", func() bool { return runs.keys() >= want })
	eventually(t, "all are settled", func() bool { return idle(t, admin, "LOAD", "d") })
	eventually(t, "Health is good", func() bool { return b.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if runs.keys() != want {
		t.Errorf("%d attempts ran, want %d of %d messages", runs.keys(), want, messages)
	}
	repeated := runs.sum() - runs.keys()
	if repeated > exposed {
		t.Errorf("%d runs were repeated, want at most the %d in flight at the ends", repeated, exposed)
	}
	if gap > dark+5*time.Second {
		t.Errorf("a publisher waited for %v, want less than 5 s more than the %v without a leader", gap, dark)
	}
	var dead tally
	for l, err := range DeadLetters("dlq.load").List(t.Context(), admin) {
		if err != nil {
			t.Fatal(err)
		}
		if !dies(string(l.Data)) {
			t.Errorf("a letter of message %s", l.Data)
		}
		dead.add(string(l.Data))
	}
	dead.wantOnce(t, letterCount)
	t.Logf("%d messages, %d runs repeated of %d in flight, longest wait %v with %v without a leader",
		messages, repeated, exposed, gap, dark)
}

// attempts is how many attempts leadersGo's route has to make with a message.
func attempts(data string) int {
	switch {
	case dies(data):
		return 3
	case strings.HasSuffix(data, "5"):
		return 2
	}
	return 1
}

func dies(data string) bool { return strings.HasSuffix(data, "0") }
