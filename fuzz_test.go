package natsx

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// FuzzPullStatus reads what a server may say about a pull, and has the limits that it
// tells applied to the next one.
func FuzzPullStatus(f *testing.F) {
	for _, seed := range []struct{ code, text, pending, token string }{
		{"100", "Idle Heartbeat", "", "7"}, {"404", "No Messages", "10", "1"}, {"408", "Request Timeout", "3", "2"},
		{"409", "Batch Completed", "0", "18446744073709551615"}, {"409", "Message Size Exceeds MaxBytes", "5", "3"},
		{"409", "Exceeded MaxRequestBatch of 10", "", "4"}, {"409", "Exceeded MaxRequestMaxBytes of 0", "", "4"},
		{"409", "Exceeded MaxRequestExpires of 1ns", "-1", "x"}, {"409", "Leadership Change", "", ""}, {"409", "Consumer Deleted", "", "5"},
		{"503", "", "", "6"}, {"", "", "99999999999999999999", "-1"},
	} {
		f.Add(seed.code, seed.text, seed.pending, seed.token)
	}
	f.Fuzz(func(t *testing.T, code, text, pending, token string) {
		s := parseStatus(&nats.Msg{Subject: "_INBOX.x." + token, Header: nats.Header{
			"Status": {code}, "Description": {text}, "Nats-Pending-Messages": {pending},
		}})
		if n, err := strconv.ParseUint(token, 10, 64); err == nil && s.token != n {
			t.Errorf("token %q is read as %d", token, s.token)
		}
		if (s.kind == statusDeleted || s.kind == statusStreamDeleted) && !strings.Contains(s.text, "Deleted") {
			t.Errorf("status %q %q ends the route", code, text)
		}
		if s.kind == statusHeartbeat && code != "100" && code != "" {
			t.Errorf("status %q %q is taken for a heartbeat", code, text)
		}
		var l pullLimits
		if !l.learn(s.text) {
			if l != (pullLimits{}) {
				t.Errorf("%q is not understood, and changes the limits to %+v", text, l)
			}
			return
		}
		if l.batch < 0 || l.bytes < 0 || l.expires < 0 || l == (pullLimits{}) {
			t.Fatalf("%q is understood as %+v", text, l)
		}
		p := l.apply(pullRequest{batch: 256, maxBytes: 1 << 20, expires: 30 * time.Second, heartbeat: 5 * time.Second})
		if p.batch < 1 || p.maxBytes < 1 || p.expires < 1 || p.heartbeat > p.expires/2 ||
			l.batch > 0 && p.batch > l.batch || l.bytes > 0 && p.maxBytes > l.bytes || l.expires > 0 && p.expires > l.expires {
			t.Errorf("%q gives the request %s", text, p.body())
		}
	})
}

// FuzzLetter reads a header block as that of a letter: what anybody may publish to a DLQ.
func FuzzLetter(f *testing.F) {
	add := func(m *nats.Msg) {
		var block strings.Builder
		block.WriteString("NATS/1.0\r\n")
		for name, values := range m.Header {
			for _, v := range values {
				block.WriteString(name + ": " + v + "\r\n")
			}
		}
		f.Add([]byte(block.String()+"\r\n"), m.Data)
	}
	letter := testLetter("billing", ReasonPanic, 0)
	add(letter)
	letter.Header[HeaderDLQPointer] = []string{"true"}
	letter.Header["Natsx-Orig-Nats-Msg-Id"] = []string{"o-1", "o-2"}
	letter.Header[HeaderDLQStack] = []string{`goroutine 1\nmain.main()`}
	letter.Data = nil
	add(letter)
	letter.Header[HeaderDLQSequence] = []string{"-1"}
	letter.Header[HeaderDLQAttempts] = []string{"99999999999999999999"}
	letter.Header[HeaderDLQTime] = []string{"yesterday"}
	add(letter)
	add(&nats.Msg{Header: nats.Header{"Status": {"503"}, "nats-ttl": {"1s"}}, Data: []byte("x")})
	f.Fuzz(func(t *testing.T, block, data []byte) {
		h, err := nats.DecodeHeadersMsg(block)
		if err != nil {
			h = nil // as when it is read from a stream
		}
		stored := &storedMsg{subject: "dlq.orders", seq: 7, header: h, data: data}
		l, err := parseLetter("DLQ", stored)
		if l.DLQStream != "DLQ" || l.DLQSequence != 7 || string(l.Data) != string(data) {
			t.Errorf("the letter is said to lie at %s/%d with %q", l.DLQStream, l.DLQSequence, l.Data)
		}
		for name := range l.Header {
			if hasPrefixFold(name, letterPrefix) && h[name] != nil && h[origPrefix+name] == nil {
				t.Errorf("the letter's own %q becomes a header of the original", name)
			}
		}
		if err != nil {
			var fault *LetterError
			if !errors.Is(err, ErrNotALetter) || !errors.As(err, &fault) || fault.Sequence != 7 {
				t.Errorf("got %#v, want a *LetterError", err)
			}
			return
		}
		if l.Subject == "" || nameFault(l.Stream) != "" || nameFault(l.Durable) != "" || l.Reason == "" ||
			l.Sequence == 0 || l.Sequence > math.MaxInt64 || l.Attempts < 0 || l.Redrives < 0 {
			t.Errorf("not a letter: %+v", l)
		}
		if id := redriveID(&l); strings.ContainsAny(id, "\r\n") {
			t.Errorf("the id of its copy is %q", id)
		}
		if readCopy(h); provenCopy("key", l.Subject, h, data) {
			t.Error("it proves a redrive that never was")
		}
	})
}
