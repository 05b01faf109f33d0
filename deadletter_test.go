package natsx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// dying is a route on which every message is dead at once.
func dying(filter, durable, dlq string) RouteBuilder {
	return Route(filter).Durable(durable).DLQ(dlq).AckWait(time.Second)
}

// createServersHeadersStreams makes streams that accept what
// publishServersHeaders sends.
func createServersHeadersStreams(t testing.TB, nc *nats.Conn) {
	t.Helper()
	createStream(t, nc, jetstream.StreamConfig{
		Name: "SRC", Subjects: []string{"src.>"}, AllowRollup: true, AllowMsgTTL: true,
		AllowMsgSchedules: true, AllowAtomicPublish: true,
	})
	createStream(t, nc, jetstream.StreamConfig{Name: "COUNT", Subjects: []string{"count.>"}, AllowMsgCounter: true})
	createStream(t, nc, jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin.>"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "COPY", Sources: []*jetstream.StreamSource{
		{Name: "ORIGIN"},
		// Schedules are messages like others in a stream that does not act on them.
		{Name: "SRC", FilterSubject: "src.schedule.*"},
	}})
}

// publishServersHeaders stores messages that bear the headers which a server
// acts on or adds, and returns the names of those headers.
func publishServersHeaders(t testing.TB, nc *nats.Conn) []string {
	t.Helper()
	send := func(subject string, body string, header ...string) uint64 {
		t.Helper()
		h := nats.Header{}
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		return publish(t, nc, &nats.Msg{Subject: subject, Data: []byte(body), Header: h})
	}
	send("src.plain", "plain")
	last := send("src.id", "id", "Nats-Msg-Id", "first")
	send("src.lastid", "x", "Nats-Expected-Last-Msg-Id", "first", "Nats-Msg-Id", "second")
	send("src.lastseq", "x", "Nats-Expected-Last-Sequence", fmt.Sprint(last+1))
	send("src.stream", "x", "Nats-Expected-Stream", "SRC")
	send("src.subjseq", "x", "Nats-Expected-Last-Subject-Sequence", "0")
	send("src.subjseq.other", "x", "Nats-Expected-Last-Subject-Sequence", fmt.Sprint(last),
		"Nats-Expected-Last-Subject-Sequence-Subject", "src.id")
	send("src.ttl", "x", "Nats-TTL", "1h")
	send("src.rollup", "x", "Nats-Rollup", "sub")
	send("src.schedule.late", "late", "Nats-Schedule", "@at "+time.Now().Add(time.Hour).Format(time.RFC3339),
		"Nats-Schedule-Target", "src.late", "Nats-Schedule-TTL", "1h")
	send("src.schedule.soon", "soon", "Nats-Schedule", "@every 1s", "Nats-Schedule-Target", "src.fired",
		"Nats-Schedule-Rollup", "sub")
	send("src.batch", "x", "Nats-Batch-Id", "b", "Nats-Batch-Sequence", "1", "Nats-Batch-Commit", "1")
	send("src.marker", "", "Nats-Marker-Reason", "MaxAge")
	send("count.x", "", "Nats-Incr", "+3")
	send("origin.x", "copied")

	return []string{
		"Nats-Msg-Id", "Nats-Expected-Last-Msg-Id", "Nats-Expected-Last-Sequence", "Nats-Expected-Stream",
		"Nats-Expected-Last-Subject-Sequence", "Nats-Expected-Last-Subject-Sequence-Subject",
		"Nats-TTL", "Nats-Rollup", "Nats-Schedule", "Nats-Schedule-Target", "Nats-Schedule-TTL",
		"Nats-Schedule-Rollup", "Nats-Scheduler", "Nats-Schedule-Next",
		"Nats-Batch-Id", "Nats-Batch-Sequence", "Nats-Marker-Reason", "Nats-Incr", "Nats-Stream-Source",
	}
}

// A server acts on some headers. On a letter they would have it refused,
// expired, scheduled or deduplicated away.
func TestServersHeadersDoNotActOnLetters(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createServersHeadersStreams(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})

	var mu sync.Mutex
	originals := map[string]*nats.Msg{} // by stream and sequence
	carried := map[string]bool{}        // the server's headers that were seen
	fail := func(_ context.Context, m *Msg) error {
		mu.Lock()
		defer mu.Unlock()
		h := nats.Header{}
		for key, values := range m.Header {
			h[key] = slices.Clone(values)
			carried[key] = true
		}
		originals[fmt.Sprint(m.Stream(), m.Sequence())] = &nats.Msg{Subject: m.Subject, Header: h, Data: m.Data}
		return Permanent(errors.New("never"))
	}
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())),
		dying("src.>", "d", "dlq.src").Handle(fail),
		dying("count.>", "d", "dlq.count").Handle(fail),
		dying("origin.>", "d", "dlq.copy").Stream("COPY").Handle(fail),
		dying("src.schedule.*", "e", "dlq.copy").Stream("COPY").Handle(fail))

	want := publishServersHeaders(t, nc)
	missing := func() (names []string) {
		mu.Lock()
		defer mu.Unlock()
		for _, name := range want {
			if !carried[name] {
				names = append(names, name)
			}
		}
		return names
	}
	if deadline := time.Now().Add(20 * time.Second); true {
		eventually(t, "every header was seen", func() bool { return len(missing()) == 0 || time.Now().After(deadline) })
	}
	if got := missing(); len(got) != 0 {
		t.Fatalf("no message came with %q: the test asks the server for something else now", got)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}

	arrived := map[string]bool{}
	for _, m := range letters(t, nc, "DLQ") {
		stream, seq := m.Header.Get("Natsx-Dlq-Stream"), m.Header.Get("Natsx-Dlq-Sequence")
		original, ok := originals[stream+seq]
		if !ok || arrived[stream+seq] {
			t.Errorf("a letter of %s %s, which did not die or has one already", stream, seq)
			continue
		}
		arrived[stream+seq] = true
		durable := "d"
		if stream == "COPY" && strings.HasPrefix(original.Subject, "src.") {
			durable = "e"
		}
		wantLetter(t, m, original, map[string]string{"Stream": stream, "Sequence": seq, "Durable": durable}, "permanent")
		for key := range m.Header {
			if strings.HasPrefix(key, "Nats-") && key != "Nats-Msg-Id" && key != "Nats-Expected-Stream" {
				t.Errorf("letter of %s %s has the header %q, which would act on it", stream, seq, key)
			}
		}
	}
	for key, m := range originals {
		if !arrived[key] {
			t.Errorf("no letter of %s: %q %v", key, m.Subject, m.Header)
		}
	}
}

// A letter has more headers than its original, so an original that fills the
// server's limit does not fit. It must neither vanish nor block the route.
func TestLettersOfTheLargestMessagesArrive(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	s := startServer(t, withMaxPayload(limit))
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{
		Name: "BIG", Subjects: []string{"big.*"}, Retention: jetstream.WorkQueuePolicy,
	})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.big"}})
	fine := make(chan struct{}, 1)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		dying("big.*", "d", "dlq.big").Retry(0).Handle(func(_ context.Context, m *Msg) error {
			switch m.Subject {
			case "big.fine":
				fine <- struct{}{}
				return nil
			case "big.panic":
				panic(strings.Repeat("p", 2*limit))
			}
			return Permanent(errors.New(strings.Repeat("ünïcödé\r\nX-Injected: yes\r\n", limit/16)))
		}))

	headerSize := func(h nats.Header) int {
		n := len("NATS/1.0\r\n\r\n")
		for key, values := range h {
			for _, v := range values {
				n += len(key) + len(": ") + len(v) + len("\r\n")
			}
		}
		return n
	}
	fill := func(subject string, h nats.Header, total int) *nats.Msg {
		m := &nats.Msg{Subject: subject, Header: h, Data: make([]byte, total)}
		if h != nil {
			m.Data = m.Data[:total-headerSize(h)]
		}
		return m
	}
	originals := []*nats.Msg{
		fill("big.body", nil, limit),
		fill("big.headers", nats.Header{"X-Big": {"v"}}, limit),
		fill("big.allheader", nats.Header{"X-Big": {strings.Repeat("h", limit-100)}}, limit),
		fill("big.almost", nats.Header{"X-Big": {strings.Repeat("h", 1000)}}, limit-700),
		fill("big.panic", nil, limit-1000),
		fill("big.small", nats.Header{"X-Big": {"v"}}, 100),
	}
	for _, m := range originals {
		publish(t, nc, m)
	}
	eventually(t, "every letter is stored", func() bool { return stored(t, nc, "DLQ") >= len(originals) })
	publish(t, nc, &nats.Msg{Subject: "big.fine"})
	receive(t, fine, "the message after them")

	var seen tally
	for _, m := range letters(t, nc, "DLQ") {
		seen.add(m.Header.Get("Natsx-Dlq-Subject"))
		if m.Header.Get("X-Injected") != "" {
			t.Errorf("letter %d: the error's text became a header", m.Sequence)
		}
		i := slices.IndexFunc(originals, func(o *nats.Msg) bool { return o.Subject == m.Header.Get("Natsx-Dlq-Subject") })
		if i < 0 || m.Header.Get("Natsx-Dlq-Sequence") != fmt.Sprint(i+1) || m.Header.Get("Natsx-Dlq-Stream") != "BIG" {
			t.Fatalf("a letter of nothing that was published: %v", m.Header)
		}
		// What does not fit goes in the order of text, headers, payload.
		pointer, noHeaders := false, false
		switch originals[i].Subject {
		case "big.body", "big.headers":
			pointer = true
		case "big.allheader", "big.almost":
			noHeaders = true
		}
		if got := m.Header.Get(HeaderDLQPointer) != ""; got != pointer || got != (string(m.Data) != string(originals[i].Data)) {
			t.Errorf("%q: the letter has %d bytes of %d, a pointer %t, want %t",
				originals[i].Subject, len(m.Data), len(originals[i].Data), got, pointer)
		}
		if got := m.Header.Get("X-Big") == "" && originals[i].Header != nil; got != noHeaders {
			t.Errorf("%q: without the original's headers %t, want %t", originals[i].Subject, got, noHeaders)
		}
		if !pointer {
			continue
		}
		src := streamNow(t, nc, "BIG")
		if original, err := src.GetMsg(testContext(t), uint64(i+1)); err != nil || len(original.Data) != len(originals[i].Data) {
			t.Errorf("%q: the letter has %d bytes of %d, and the original is gone: %v",
				originals[i].Subject, len(m.Data), len(originals[i].Data), err)
		}
	}
	seen.wantOnce(t, len(originals))
	if got := letters(t, nc, "DLQ")[len(originals)-1]; string(got.Data) == "" {
		t.Error("a small message must keep its body")
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestMissingDLQHoldsMessagesBack(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	js := jetStream(t, nc)
	createStream(t, nc, jetstream.StreamConfig{
		Name: "HELD", Subjects: []string{"held.*"}, Retention: jetstream.WorkQueuePolicy,
	})
	dlq := jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.held"}}
	createStream(t, nc, dlq)
	book, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
		dying("held.*", "d", "dlq.held").Handle(func(context.Context, *Msg) error {
			return Permanent(errors.New("never"))
		}))
	if err := r.Health(); err != nil {
		t.Errorf("Health: %v, want none at first", err)
	}

	if err := js.DeleteStream(testContext(t), "DLQ"); err != nil {
		t.Fatal(err)
	}
	publish(t, nc, &nats.Msg{Subject: "held.x", Data: []byte("first")})
	eventually(t, "Health tells of the DLQ", func() bool {
		err := r.Health()
		return err != nil && strings.Contains(err.Error(), "dlq.held")
	})
	// The route pauses, so that more failing messages pile up where they are safe.
	// A pull that was sent before may yet be served.
	received := func() uint64 { return r.Stats().Routes[0].Received }
	const most = 10
	for n, before := 0, uint64(0); before != received() && n < most; n++ {
		before = received()
		publish(t, nc, &nats.Msg{Subject: "held.y"})
		select {
		case <-r.done:
			t.Fatalf("Run returned: %v", r.err)
		case <-time.After(mostStay + 500*time.Millisecond):
		}
	}
	const more = 2 * most
	publishMany(t, nc, more-stored(t, nc, "HELD")+1, numbered("held.y"))
	paused := received()
	select {
	case <-r.done:
		t.Fatalf("Run returned: %v", r.err)
	case <-time.After(2 * time.Second):
	}
	if got := received(); got != paused {
		t.Errorf("%d messages were pulled while the DLQ is missing", got-paused)
	}
	if got := stored(t, nc, "HELD"); got != 1+more {
		t.Fatalf("%d messages left while the DLQ is missing, want all %d", got, 1+more)
	}
	createStream(t, nc, dlq)
	eventually(t, "the letters are stored", func() bool { return stored(t, nc, "DLQ") >= 1+more })
	eventually(t, "the originals are settled", func() bool { return stored(t, nc, "HELD") == 0 })
	eventually(t, "Health is good again", func() bool { return r.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := stored(t, nc, "DLQ"); got != 1+more {
		t.Errorf("%d letters, want %d", got, 1+more)
	}
	if got := book.alarms("dlq.held"); len(got) == 0 || len(got) > 3 {
		t.Errorf("an outage of the DLQ made %d log lines, want one: %q", len(got), got)
	}
}

// Whoever subscribes to the DLQ's subject may answer a publish before the stream
// does, or in its stead.
func TestForgedAckDoesNotSettle(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"other stream": `{"stream":"OTHER","seq":7}`,
		"no stream":    `{"seq":7}`,
		"no json":      `+OK`,
		"empty":        ``,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startServer(t)
			nc := connect(t, s.ClientURL())
			createStream(t, nc, jetstream.StreamConfig{
				Name: "FA", Subjects: []string{"fa.*"}, Retention: jetstream.WorkQueuePolicy,
			})
			dlq := jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.fa"}}
			createStream(t, nc, dlq)
			forger := connect(t, s.ClientURL())
			forged := make(chan struct{}, 1000)
			sub, err := forger.Subscribe("dlq.fa", func(m *nats.Msg) {
				m.Respond([]byte(answer))
				select {
				case forged <- struct{}{}:
				default:
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := forger.FlushTimeout(testLimit); err != nil {
				t.Fatal(err)
			}
			_, log := newLogBook()
			r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)),
				dying("fa.*", "d", "dlq.fa").Handle(func(context.Context, *Msg) error {
					return Permanent(errors.New("never"))
				}))
			if err := jetStream(t, nc).DeleteStream(testContext(t), "DLQ"); err != nil {
				t.Fatal(err)
			}
			publish(t, nc, &nats.Msg{Subject: "fa.x", Data: []byte("body")})
			for range 3 {
				receive(t, forged, "an attempt to publish the letter")
			}
			if got := stored(t, nc, "FA"); got != 1 {
				t.Fatalf("%d messages in the source after a forged ack, want 1", got)
			}
			createStream(t, nc, dlq)
			eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
			if err := sub.Unsubscribe(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the original is settled", func() bool { return stored(t, nc, "FA") == 0 })
			if err := r.stop(t); err != nil {
				t.Errorf("Run: %v", err)
			}
			if got := stored(t, nc, "DLQ"); got != 1 {
				t.Errorf("%d letters, want 1", got)
			}
		})
	}
}

// A stream made anew counts from 1: its letters must not be taken for copies of
// those of the old one.
func TestRecreatedStreamKeepsItsLetters(t *testing.T) {
	t.Parallel()
	const messages = 3
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.again"}, Duplicates: time.Hour})
	for round := 1; round <= 2; round++ {
		createStream(t, nc, jetstream.StreamConfig{Name: "AGAIN", Subjects: []string{"again.*"}})
		publishMany(t, nc, messages, numbered("again.x"))
		r := runBroker(t, NewBroker(connect(t, s.ClientURL())),
			dying("again.*", "d", "dlq.again").Handle(func(context.Context, *Msg) error {
				return Permanent(errors.New("never"))
			}))
		eventually(t, "all are settled", func() bool { return settled(t, nc, "AGAIN", "d") })
		if err := r.stop(t); err != nil {
			t.Errorf("Run: %v", err)
		}
		if got := stored(t, nc, "DLQ"); got != round*messages {
			t.Errorf("round %d: %d letters, want %d", round, got, round*messages)
		}
		if err := jetStream(t, nc).DeleteStream(testContext(t), "AGAIN"); err != nil {
			t.Fatal(err)
		}
	}
}

// A volume that is restored from a backup uses sequences again, inside the duplicate window
// of a DLQ that was not restored: the letter of the next message is not taken for that of
// the one that had its sequence.
func TestRestoredStreamKeepsItsLetters(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t)
	nc := connect(t, p.url())
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.x"}, Duplicates: time.Hour})
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}})
	_, log := newLogBook()
	start := func() *running {
		return runBroker(t, NewBroker(connect(t, p.url()), WithLogger(log)), dying("orders.*", "d", "dlq.x").Handle(func(context.Context, *Msg) error {
			return Permanent(errors.New("never"))
		}))
	}
	r := start()
	publishAcked(t, nc, "orders.x", "in the backup")
	eventually(t, "the first letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 && settled(t, nc, "ORDERS", "d") })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	p.stop()
	volume, backup := filepath.Join(p.opts.StoreDir, "jetstream", "$G", "streams", "ORDERS"), filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(volume)); err != nil {
		t.Fatal(err)
	}
	p.start(t)
	running := start()
	publishAcked(t, nc, "orders.x", "behind the backup")
	eventually(t, "the second letter is stored", func() bool { return stored(t, nc, "DLQ") == 2 && settled(t, nc, "ORDERS", "d") })
	p.stop()
	if err := os.RemoveAll(volume); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(volume, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	p.start(t)
	eventually(t, "all are connected", func() bool { return nc.IsConnected() && running.Health() == nil })
	if seq := publish(t, nc, &nats.Msg{Subject: "orders.x", Data: []byte("with the same sequence")}); seq != 2 {
		t.Fatalf("stored as %d, want the sequence that was used", seq)
	}
	eventually(t, "the third letter is stored", func() bool { return stored(t, nc, "DLQ") == 3 && settled(t, nc, "ORDERS", "d") })
	var bodies []string
	for _, l := range letters(t, nc, "DLQ") {
		bodies = append(bodies, string(l.Data))
	}
	if want := []string{"in the backup", "behind the backup", "with the same sequence"}; !slices.Equal(bodies, want) {
		t.Errorf("letters of %q, want %q", bodies, want)
	}
}

// No stream stores headers of 64 KiB, whatever a message may have.
func TestLetterOfLargeHeadersArrives(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		return errors.New(strings.Repeat("e", 4000))
	}))
	publish(t, nc, &nats.Msg{Subject: "orders.x", Data: []byte("payload"), Header: nats.Header{"Big": {strings.Repeat("h", 63_000)}}})
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	if got := letters(t, nc, "DLQ")[0]; string(got.Data) != "payload" {
		t.Errorf("the letter has the body %q", got.Data)
	}
}

// A user who may not ask for the DLQ's limits finds them out.
func TestLetterFitsAnUnknownLimit(t *testing.T) {
	t.Parallel()
	admin, user := startGuarded(t, &server.Permissions{Publish: &server.SubjectPermission{Allow: []string{
		"$JS.API.CONSUMER.CREATE.ORDERS.d.>", "$JS.API.CONSUMER.INFO.ORDERS.d", "$JS.API.CONSUMER.MSG.NEXT.ORDERS.d", "$JS.ACK.ORDERS.d.>", "dlq.x",
	}}})
	orders(t, admin)
	small := streamNow(t, admin, "DLQ")
	cfg := small.CachedInfo().Config
	cfg.MaxMsgSize = 10_000
	if _, err := jetStream(t, admin).UpdateStream(testContext(t), cfg); err != nil {
		t.Fatal(err)
	}
	_, log := newLogBook()
	runBroker(t, NewBroker(user, WithLogger(log)), Route("orders.*").Stream("ORDERS").Durable("d").Retry(0).DLQ("dlq.x").
		Handle(func(context.Context, *Msg) error { return errors.New("broken") }))
	publishAcked(t, admin, "orders.x", strings.Repeat("p", 20_000))
	eventually(t, "the letter is stored", func() bool { return stored(t, admin, "DLQ") == 1 })
	if got := letters(t, admin, "DLQ")[0]; got.Header.Get(HeaderDLQPointer) == "" {
		t.Errorf("the letter of %d bytes is no pointer", len(got.Data))
	}
}

// The letter of a durable that was deleted, with the letter gone since, does not
// stand for that of a new durable of the same name.
func TestLetterOfARecreatedDurable(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	orders(t, nc)
	spec := Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		return errors.New("broken")
	})
	publishAcked(t, nc, "orders.x", "payload")
	for _, again := range []bool{false, true} {
		r := runBroker(t, NewBroker(nc), spec)
		eventually(t, fmt.Sprintf("the letter is stored, again %t", again), func() bool { return stored(t, nc, "DLQ") == 1 })
		if err := r.stop(t); err != nil {
			t.Fatal(err)
		}
		if n, err := DeadLetters("dlq.x").Purge(testContext(t), nc); n != 1 || err != nil {
			t.Fatalf("purged %d, %v", n, err)
		}
		if err := jetStream(t, nc).DeleteConsumer(testContext(t), "ORDERS", "d"); err != nil {
			t.Fatal(err)
		}
	}
}
