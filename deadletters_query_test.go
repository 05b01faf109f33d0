package natsx

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A message that is no letter is a failure for good of the route that takes
// letters: its function does not see it, and it is not tried again.
func TestOnDeadLetterRefusesWhatIsNoLetter(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "MORGUE", Subjects: []string{"morgue.>"}})
	publish(t, nc, &nats.Msg{Subject: "dlq.orders", Data: []byte("foreign")})
	publish(t, nc, testLetter("billing", ReasonPanic, 0))
	events := make(chan Event, 10)
	seen := make(chan DeadLetter, 10)
	runBroker(t, NewBroker(nc, WithWorkers(1), WithObserver(observerFunc(func(e Event) { events <- e }))),
		Route("dlq.orders").Durable("alerts").Retry(5).Backoff(time.Millisecond, time.Millisecond).DLQ("morgue.alerts").
			Handle(OnDeadLetter(func(_ context.Context, l DeadLetter) error {
				seen <- l
				return nil
			})))
	var undecodable *DecodeError
	for range 2 { // in any order
		switch e := receive(t, events, "an attempt"); e.Msg.Sequence() {
		case 1:
			if e.Outcome != OutcomeDead || !errors.As(e.Err, &undecodable) || !errors.Is(e.Err, ErrNotALetter) {
				t.Errorf("got %s, %v, want a DecodeError for what is no letter", e.Outcome, e.Err)
			}
		case 2:
			if e.Outcome != OutcomeSucceeded {
				t.Errorf("got %s, %v for the letter behind it", e.Outcome, e.Err)
			}
		}
	}
	if l := receive(t, seen, "the letter"); l.DLQSequence != 2 || len(seen) != 0 {
		t.Errorf("the function was given %+v and %d more, want the letter alone", l, len(seen))
	}
	found, _ := listed(t, nc, DeadLetters("morgue.alerts"))
	if len(found) != 1 || found[0].Reason != ReasonUndecodable || found[0].Attempts != 1 || string(found[0].Data) != "foreign" {
		t.Errorf("got %+v, want one letter after one attempt", found)
	}
}

func TestDeadLetterPurgeKeepsItsRate(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, 9)
	began := time.Now()
	if n, err := DeadLetters("dlq.orders").Limit(6).Rate(50).Purge(testContext(t), nc); n != 6 || err != nil {
		t.Errorf("got %d, %v, want 6", n, err)
	}
	if took := time.Since(began); took < 100*time.Millisecond {
		t.Errorf("6 letters at 50 a second took %s, want at least 100 ms", took)
	}
	// A dry run deletes nothing that could be too fast.
	if n, err := DeadLetters("dlq.orders").Rate(0.001).DryRun().Purge(testContext(t), nc); n != 3 || err != nil {
		t.Errorf("dry run: got %d, %v, want 3", n, err)
	}
	// The end of the context ends the wait for the next one.
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	type result struct {
		purged int
		err    error
	}
	ended := make(chan result, 1)
	go func() {
		n, err := DeadLetters("dlq.orders").Rate(0.001).Purge(ctx, nc)
		ended <- result{n, err}
	}()
	eventually(t, "one is gone", func() bool { return streamNow(t, nc, "DLQ").CachedInfo().State.Msgs <= 2 })
	cancel()
	r := receive(t, ended, "the purge's end")
	var letter *LetterError
	unheard := r.purged == 0 && errors.As(r.err, &letter) // the server's answer came too late
	if r.purged != 1 && !unheard || !errors.Is(r.err, context.Canceled) {
		t.Errorf("got %d, %v, want one and the end of the context", r.purged, r.err)
	}
	if n := stored(t, nc, "DLQ"); n != 2 {
		t.Errorf("%d are left, want 2", n)
	}
}

// A purge that is cut off while the server is asked to delete a letter counts those
// before it.
func TestDeadLetterPurgeIsCancelled(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, 5)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var deletions tally
	sub, err := nc.Subscribe("CUT.API.>", func(m *nats.Msg) {
		operation := strings.TrimPrefix(m.Subject, "CUT.API.")
		if strings.HasPrefix(operation, "STREAM.MSG.DELETE.") && deletions.add("all") == 3 {
			cancel() // and nobody answers
			return
		}
		nc.PublishRequest("$JS.API."+operation, m.Reply, m.Data)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	n, err := DeadLetters("dlq.orders").APIPrefix("CUT.API").Purge(ctx, nc)
	var letter *LetterError
	if n != 2 || !errors.Is(err, context.Canceled) || !errors.As(err, &letter) || letter.Sequence != 3 {
		t.Errorf("got %d, %v, want 2 and the end of the context at the third", n, err)
	}
	var left []string
	for _, m := range letters(t, nc, "DLQ") {
		left = append(left, string(m.Data))
	}
	if diff := cmp.Diff([]string{"2", "3", "4"}, left); diff != "" {
		t.Errorf("what is left (-want +got):\n%s", diff)
	}
	noConsumers(t, nc, "DLQ")
}

func TestRedriveKeepsTheFirstErrors(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	letterStream(t, nc, maxRedriveErrors+5)
	report := redriveAll(t, nc, RedriveReport{Failed: maxRedriveErrors + 5}) // their stream is gone
	if len(report.Errors) != 100 {
		t.Fatalf("the report keeps %d errors, want the first hundred", len(report.Errors))
	}
	for i, err := range report.Errors {
		var letter *LetterError
		if !errors.As(err, &letter) || letter.Sequence != uint64(i+1) || !errors.Is(err, ErrNoStream) {
			t.Errorf("error %d: got %v, want that of letter %d", i, err, i+1)
		}
	}
}

// hubAndLeaf starts two servers with JetStream, each with a domain of its own, and returns
// a connection to each.
func hubAndLeaf(t *testing.T) (hub, leaf *nats.Conn) {
	port := fixedPort(t)
	h := startServer(t, func(o *server.Options) {
		o.JetStreamDomain = "hub"
		o.LeafNode.Host, o.LeafNode.Port = "127.0.0.1", port
	})
	l := startServer(t, func(o *server.Options) {
		o.JetStreamDomain = "leaf"
		o.LeafNode.Remotes = []*server.RemoteLeafOpts{{URLs: []*url.URL{{Scheme: "nats-leaf", Host: fmt.Sprintf("127.0.0.1:%d", port)}}}}
	})
	hub, leaf = connect(t, h.ClientURL()), connect(t, l.ClientURL())
	eventually(t, "the leaf is connected", func() bool { return h.NumLeafNodes() == 1 })
	return hub, leaf
}

// Letters of a JetStream that does not answer on $JS.API: of the domain that a leaf
// node belongs to, and of an account that exports it.
func TestDeadLettersOfAnotherJetStream(t *testing.T) {
	t.Parallel()
	account := func(t *testing.T) (owner, operator *nats.Conn) {
		file := filepath.Join(t.TempDir(), "accounts.conf")
		if err := os.WriteFile(file, []byte(`accounts {
			SHOP {
				jetstream: enabled
				users: [{user: owner, password: x}]
				exports: [{service: "$JS.API.>", response_type: stream}, {service: "orders.>"}]
			}
			OPS {
				users: [{user: operator, password: x}]
				imports: [
					{service: {account: SHOP, subject: "$JS.API.>"}, to: "JS.shop.API.>"}
					{service: {account: SHOP, subject: "orders.>"}}
				]
			}
		}`), 0o600); err != nil {
			t.Fatal(err)
		}
		s := startServer(t, func(o *server.Options) {
			if err := o.ProcessConfigFile(file); err != nil {
				t.Fatal(err)
			}
		})
		return connect(t, s.ClientURL(), nats.UserInfo("owner", "x")), connect(t, s.ClientURL(), nats.UserInfo("operator", "x"))
	}
	for name, c := range map[string]struct {
		start func(t *testing.T) (owner, operator *nats.Conn)
		query DeadLetterQuery
	}{
		"domain":  {hubAndLeaf, DeadLetters("dlq.orders").Domain("hub")},
		"account": {account, DeadLetters("dlq.orders").APIPrefix("JS.shop.API")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			owner, operator := c.start(t)
			orders(t, owner)
			if _, err := jetStream(t, owner).CreateConsumer(testContext(t), "ORDERS", jetstream.ConsumerConfig{Durable: "billing"}); err != nil {
				t.Fatal(err)
			}
			const count = 300 // more than one pull brings
			publishMany(t, owner, count, func(i int) *nats.Msg { return testLetter("billing", ReasonPanic, i) })
			found, foreign := listed(t, operator, c.query)
			if len(found) != count || len(foreign) != 0 || string(found[count-1].Data) != fmt.Sprint(count-1) {
				t.Fatalf("listed %d letters and %d others, want %d", len(found), len(foreign), count)
			}
			counts, err := c.query.Count(testContext(t), operator)
			want := LetterCounts{Total: count, Groups: []LetterGroup{{"billing", ReasonPanic, count}}}
			if diff := cmp.Diff(want, counts); diff != "" || err != nil {
				t.Errorf("counts (-want +got):\n%s%v", diff, err)
			}
			redriveQuery(t, operator, c.query.Limit(3), RedriveReport{Redriven: 3})
			copies := letters(t, owner, "ORDERS")
			if len(copies) != 3 || copies[2].Header.Get(HeaderRedriveTo) != "billing" || string(copies[2].Data) != "2" {
				t.Errorf("got the copies %v, want those of the first 3 letters", copies)
			}
			if n, err := c.query.Limit(2).Purge(testContext(t), operator); n != 2 || err != nil {
				t.Errorf("purged %d, %v, want 2", n, err)
			}
			if n := stored(t, owner, "DLQ"); n != count-5 {
				t.Errorf("%d letters are left, want %d", n, count-5)
			}
			noConsumers(t, owner, "DLQ")
		})
	}
}
