package natsx

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// hostileHeaders are header blocks as a publisher may send them. A Status comes
// as a header of its own and, as the server itself writes it, on the first line.
func hostileHeaders() []string {
	var blocks []string
	for _, status := range []int{100, 400, 404, 408, 409, 503} {
		blocks = append(blocks,
			fmt.Sprintf("NATS/1.0\r\nStatus: %d\r\n", status),
			fmt.Sprintf("NATS/1.0\r\nStatus: %d\r\nDescription: Consumer Deleted\r\n", status),
			fmt.Sprintf("NATS/1.0 %d\r\n", status),
			fmt.Sprintf("NATS/1.0 %d Consumer Deleted\r\n", status),
			fmt.Sprintf("NATS/1.0 %d\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: 1\r\n", status),
		)
	}
	for _, forged := range []string{
		"Natsx-Redrive-To: other",
		"Natsx-Redrive-To: d",
		"Natsx-Redrive-To: *",
		"Natsx-Redrive-Count: 1000000",
		"Natsx-Redrive-Count: -1",
		"Natsx-Redrive-To: other\r\nNatsx-Redrive-Count: 99",
		"Natsx-Dlq-Attempts: 99",
		"Natsx-Dlq-Reason: crashed\r\nNatsx-Dlq-Durable: d\r\nNatsx-Dlq-Sequence: 1\r\nNatsx-Dlq-Stream: HOSTILE",
		"Natsx-Dlq-Subject: hostile.elsewhere",
		"Natsx-Orig-Msg-Id: 7\r\nNatsx-Orig-TTL: 1s",
		"Natsx-Attempt: 99",
		"Natsx-Anything: \xff\xfe",
	} {
		blocks = append(blocks, "NATS/1.0\r\n"+forged+"\r\n")
	}
	return blocks
}

// rawPublish sends header blocks byte by byte, as no client library would. Each
// message has an empty body and its number in X-Number.
func rawPublish(t testing.TB, url, subject string, blocks []string) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "nats://"), testLimit)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(testLimit))
	fmt.Fprint(conn, "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\n")
	for i, block := range blocks {
		block += fmt.Sprintf("X-Number: %d\r\n\r\n", i)
		fmt.Fprintf(conn, "HPUB %s %d %d\r\n%s\r\n", subject, len(block), len(block), block)
	}
	fmt.Fprint(conn, "PING\r\n")
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		switch line := lines.Text(); {
		case line == "PONG":
			return
		case strings.HasPrefix(line, "-ERR"):
			t.Fatalf("the server says %s", line)
		}
	}
	t.Fatal("the server hung up")
}

func TestPublishersCannotStopADurable(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "HOSTILE", Subjects: []string{"hostile.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.hostile"}})

	var mu sync.Mutex
	attempts := map[string][]int{}
	headers := map[string]nats.Header{}
	fine := make(chan int, 1)
	_, log := newLogBook()
	b := NewBroker(connect(t, s.ClientURL()), WithLogger(log))
	r := runBroker(t, b, Route("hostile.*").Durable("d").Retry(1).DLQ("dlq.hostile").
		Backoff(10*time.Millisecond, 10*time.Millisecond).
		Handle(func(_ context.Context, m *Msg) error {
			if m.Subject == "hostile.fine" {
				fine <- m.Attempt()
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			number := m.Header.Get("X-Number")
			attempts[number] = append(attempts[number], m.Attempt())
			headers[number] = m.Header
			if m.Attempt() == 1 {
				return errors.New("once more")
			}
			return nil
		}))

	blocks := hostileHeaders()
	rawPublish(t, s.ClientURL(), "hostile.x", blocks)
	eventually(t, "all are stored", func() bool { return stored(t, nc, "HOSTILE") == len(blocks) })
	eventually(t, "all are settled", func() bool { return settled(t, nc, "HOSTILE", "d") })
	publish(t, nc, &nats.Msg{Subject: "hostile.fine"})
	if got := receive(t, fine, "the message after them"); got != 1 {
		t.Errorf("attempt %d, want the first", got)
	}
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	sent := letters(t, nc, "HOSTILE")
	for i, block := range blocks {
		number := fmt.Sprint(i)
		if diff := cmp.Diff([]int{1, 2}, attempts[number]); diff != "" {
			t.Errorf("%q: attempts (-want +got):\n%s", block, diff)
		}
		// The server itself keeps no status of a first line.
		if diff := cmp.Diff(sent[i].Header, headers[number]); diff != "" {
			t.Errorf("%q: headers (-want +got):\n%s", block, diff)
		}
	}
	if got := stored(t, nc, "DLQ"); got != 0 {
		t.Errorf("%d dead letters, want none", got)
	}
	if got := r.Stats().Routes[0]; got.Succeeded != uint64(len(blocks))+1 || got.Retried != uint64(len(blocks)) {
		t.Errorf("got %+v, want every message retried once", got)
	}
}

func TestPublishersCannotStopACoreRoute(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	var seen tally
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())),
		Route("hostile.*").Handle(func(_ context.Context, m *Msg) error {
			seen.add(m.Header.Get("X-Number"))
			return nil
		}))
	blocks := hostileHeaders()
	rawPublish(t, s.ClientURL(), "hostile.x", blocks)
	eventually(t, "all are handled", func() bool { return seen.sum() >= len(blocks) })
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
	seen.wantOnce(t, len(blocks))
}

// A letter tells what natsx knows, not what a publisher claimed.
func TestForgedLetterHeadersAreReplaced(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "F", Subjects: []string{"f.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.f"}})
	r := runBroker(t, NewBroker(connect(t, s.ClientURL())),
		Route("f.*").Durable("d").DLQ("dlq.f").Handle(func(context.Context, *Msg) error {
			return Permanent(errors.New("never"))
		}))
	forged := nats.Header{"X-Kept": {"yes"}}
	for _, name := range []string{"Subject", "Stream", "Sequence", "Durable", "Attempts", "Reason", "Error", "Stack", "Time", "Published", "Host"} {
		forged["Natsx-Dlq-"+name] = []string{"forged", "twice"}
		forged["natsx-dlq-"+strings.ToLower(name)] = []string{"forged"}
	}
	publish(t, nc, &nats.Msg{Subject: "f.x", Header: forged})
	eventually(t, "the letter is stored", func() bool { return stored(t, nc, "DLQ") == 1 })
	wantLetter(t, letters(t, nc, "DLQ")[0], &nats.Msg{Subject: "f.x", Header: nats.Header{"X-Kept": {"yes"}}},
		map[string]string{"Stream": "F", "Sequence": "1", "Durable": "d", "Attempts": "1", "Error": "never"}, "permanent")
	if err := r.stop(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// A publisher's header names may be such that nats.go reads them and does not send
// them: the letter has them nearly so.
func TestHeaderNamesThatAreNotSentMakeLetters(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	nc := connect(t, s.ClientURL())
	orders(t, nc)
	runBroker(t, NewBroker(nc), Route("orders.*").Durable("d").Retry(0).DLQ("dlq.x").Handle(func(context.Context, *Msg) error {
		return errors.New("broken")
	}))
	var blocks []string
	names := map[string]string{"Bad Name": "Bad_Name", "Bad(Name)": "Bad_Name_", "Schl\u00fcssel": "Schl__ssel", "a\x01": "a_", "a/b": "a_b"}
	for name := range names {
		blocks = append(blocks, "NATS/1.0\r\n"+name+": "+name+"\r\n")
	}
	rawPublish(t, s.ClientURL(), "orders.x", blocks)
	eventually(t, "every letter is stored", func() bool { return stored(t, nc, "DLQ") == len(names) })
	for _, m := range letters(t, nc, "DLQ") {
		found := false
		for name, kept := range names {
			found = found || m.Header.Get(kept) == name
		}
		if !found {
			t.Errorf("a letter without the original's header: %v", m.Header)
		}
	}
}
