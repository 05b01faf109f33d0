package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	undecoded := &DecodeError{Subject: "a", ContentType: "application/json", Err: boom}
	panicked := &PanicError{Value: "boom"}
	forever := Route("a").Durable("d").Backoff(time.Second, time.Minute)
	limited := forever.Retry(2)
	once := forever.Retry(0)
	const half = 0.5 // no spread
	tests := []struct {
		name    string
		route   RouteBuilder
		attempt int
		err     error
		want    settlement
	}{
		{"success", limited, 1, nil, settlement{action: actAck, outcome: Succeeded}},
		{"success on the last attempt", limited, 3, nil, settlement{action: actAck, outcome: Succeeded}},
		{"first failure", limited, 1, boom, settlement{action: actNak, delay: time.Second, outcome: Retried}},
		{"second failure", limited, 2, boom, settlement{action: actNak, delay: 2 * time.Second, outcome: Retried}},
		{"last failure, no DLQ", limited, 3, boom, settlement{action: actTerm, reason: ReasonExhausted, outcome: Dead}},
		{"last failure, DLQ", limited.DLQ("dlq"), 3, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: Dead}},
		{"past the last", limited.DLQ("dlq"), 9, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: Dead}},
		{"no retries", once.DLQ("dlq"), 1, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: Dead}},
		{"unlimited retries", forever.DLQ("dlq"), 1000, boom, settlement{action: actNak, delay: time.Minute, outcome: Retried}},
		{"retry after", limited, 1, RetryAfter(7*time.Second, boom), settlement{action: actNak, delay: 7 * time.Second, outcome: Retried}},
		{"retry after counts", limited.DLQ("dlq"), 3, RetryAfter(time.Second, boom), settlement{action: actBury, reason: ReasonExhausted, outcome: Dead}},
		{"wrapped retry after", limited, 1, fmt.Errorf("wrapped: %w", RetryAfter(time.Hour, nil)), settlement{action: actNak, delay: time.Hour, outcome: Retried}},
		{"permanent", forever.DLQ("dlq"), 1, Permanent(boom), settlement{action: actBury, reason: ReasonPermanent, outcome: Dead}},
		{"permanent, no DLQ", forever, 1, fmt.Errorf("wrapped: %w", Permanent(boom)), settlement{action: actTerm, reason: ReasonPermanent, outcome: Dead}},
		{"discard", limited.DLQ("dlq"), 1, Discard(boom), settlement{action: actTerm, outcome: Discarded}},
		{"discard beats permanent", limited.DLQ("dlq"), 1, Discard(Permanent(boom)), settlement{action: actTerm, outcome: Discarded}},
		{"undecodable", limited.DLQ("dlq"), 1, undecoded, settlement{action: actBury, reason: ReasonUndecodable, outcome: Dead}},
		{"panic", limited.DLQ("dlq"), 1, panicked, settlement{action: actNak, delay: time.Second, outcome: Retried}},
		{"last panic", limited.DLQ("dlq"), 3, panicked, settlement{action: actBury, reason: ReasonPanic, outcome: Dead}},
		{"timeout", limited.DLQ("dlq"), 3, context.DeadlineExceeded, settlement{action: actBury, reason: ReasonExhausted, outcome: Dead}},
		{"crashed", limited.DLQ("dlq"), 4, errCrashed, settlement{action: actBury, reason: ReasonCrashed, outcome: Dead}},
		{"crashed, no DLQ", limited, 4, errCrashed, settlement{action: actTerm, reason: ReasonCrashed, outcome: Dead}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got := decide(tt.route, tt.attempt, tt.err, half)
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(settlement{})); diff != "" {
				t.Errorf("decide differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBackoffDelay(t *testing.T) {
	t.Parallel()
	tests := []struct {
		low, high time.Duration
		k         int
		spread    float64
		want      time.Duration
	}{
		{time.Second, time.Minute, 1, 0.5, time.Second},
		{time.Second, time.Minute, 4, 0.5, 8 * time.Second},
		{time.Second, time.Minute, 1, 0, 800 * time.Millisecond},
		{time.Second, time.Minute, 2, 1, 2400 * time.Millisecond},
		{time.Second, time.Minute, 7, 0.5, time.Minute},
		{time.Second, time.Minute, 1 << 30, 1, time.Minute},
		{time.Second, time.Minute, 100, 0, 48 * time.Second},
		{1, math.MaxInt64, 1 << 20, 0.5, math.MaxInt64 / 2},
	}
	for _, tt := range tests {
		// The factor 0.8 + 0.4*spread is not exact in binary.
		got := backoffDelay(tt.low, tt.high, tt.k, tt.spread).Round(time.Microsecond)
		if want := tt.want.Round(time.Microsecond); got != want {
			t.Errorf("backoffDelay(%s, %s, %d, %g) = %s, want %s", tt.low, tt.high, tt.k, tt.spread, got, want)
		}
	}
}

func TestParseDelivery(t *testing.T) {
	t.Parallel()
	want := ackInfo{stream: "S", consumer: "D", delivered: 3, sequence: 42, consumerSeq: 7, time: 1700000000000000001, pending: 5}
	for _, reply := range []string{
		"$JS.ACK.S.D.3.42.7.1700000000000000001.5",
		"$JS.ACK._.hash.S.D.3.42.7.1700000000000000001.5",
		"$JS.ACK.domain.hash.S.D.3.42.7.1700000000000000001.5.more",
		"$JS.ACK.domain.hash.S.D.3.42.7.1700000000000000001.5.more.and",
	} {
		got, ok := parseDelivery(reply)
		if !ok || got != want {
			t.Errorf("parseDelivery(%q) = %+v, %v, want %+v", reply, got, ok, want)
		}
	}
	for _, reply := range []string{
		"", "$JS.ACK.", "_INBOX.a.b", "$JS.ACK.S.D.3.42.7.1700000000000000001",
		"$JS.ACK.S.D.x.42.7.1700000000000000001.0", "$JS.ACK.S.D.3.-2.7.1.0", "$JS.ACK.S.D.3.4.7..0",
		"$JS.ACK.S.D.3.4.x.1.0", "$JS.ACK.S.D.3.4.7.1.x", "$JS.ACK.S.D.3.4.7.1.",
		"$JS.ACK..D.3.42.7.1.0", "$JS.ACK.S..3.42.7.1.0", "$JS.ACK.a.S.D.3.42.7.1.0",
		"$JS.ACK.S.D.99999999999999999999.42.7.1.0", "$JS.ACK." + strings.Repeat("a.", 40),
	} {
		if got, ok := parseDelivery(reply); ok {
			t.Errorf("parseDelivery(%q) = %+v, want none", reply, got)
		}
	}
}

func FuzzParseDelivery(f *testing.F) {
	f.Add("$JS.ACK.S.D.3.42.7.1700000000000000001.0")
	f.Add("$JS.ACK.domain.hash.S.D.3.42.7.1700000000000000001.0.more")
	f.Fuzz(func(t *testing.T, reply string) {
		a, ok := parseDelivery(reply)
		if !ok {
			return
		}
		if a.stream == "" || a.consumer == "" || a.time < 0 || strings.Contains(a.stream+a.consumer, ".") {
			t.Errorf("parseDelivery(%q) = %+v", reply, a)
		}
		canonical := fmt.Sprintf("$JS.ACK.%s.%s.%d.%d.%d.%d.%d",
			a.stream, a.consumer, a.delivered, a.sequence, a.consumerSeq, a.time, a.pending)
		if again, ok := parseDelivery(canonical); !ok || again != a {
			t.Errorf("parseDelivery(%q) = %+v, and its canonical form %+v", reply, a, again)
		}
	})
}

func TestHeaderText(t *testing.T) {
	t.Parallel()
	tests := []struct {
		text string
		most int
		want string
	}{
		{"plain", 10, "plain"},
		{"two\nlines\r\nthree", 100, `two\nlines\nthree`},
		{"tab\there \x00\x1b[0m", 100, "tab here   [0m"},
		{"bad \xff byte", 100, "bad \uFFFD byte"},
		{strings.Repeat("x", 20), 10, "xxxxxxx..."},
		{strings.Repeat("ä", 20), 10, "äää..."},
	}
	for _, tt := range tests {
		if got := headerText(tt.text, tt.most); got != tt.want {
			t.Errorf("headerText(%q, %d) = %q, want %q", tt.text, tt.most, got, tt.want)
		}
	}
}

func TestInvokeWithinFailsWhatReturnsLate(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	for _, result := range []error{nil, boom, context.DeadlineExceeded, Permanent(boom)} {
		d := &delivery{Context: context.Background()}
		err := invokeWithin(time.Millisecond, func(ctx context.Context, _ *Msg) error {
			<-ctx.Done()
			return result
		}, d)
		if !errors.Is(err, context.DeadlineExceeded) || result != nil && !errors.Is(err, result) {
			t.Errorf("handler returned %v late: got %v", result, err)
		}
	}
	d := &delivery{Context: context.Background()}
	if err := invokeWithin(time.Hour, func(context.Context, *Msg) error { return boom }, d); err != boom {
		t.Errorf("in time: got %v, want %v", err, boom)
	}
}
