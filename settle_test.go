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
		{"success", limited, 1, nil, settlement{action: actAck, outcome: OutcomeSucceeded}},
		{"success on the last attempt", limited, 3, nil, settlement{action: actAck, outcome: OutcomeSucceeded}},
		{"first failure", limited, 1, boom, settlement{action: actNak, delay: time.Second, outcome: OutcomeRetried}},
		{"second failure", limited, 2, boom, settlement{action: actNak, delay: 2 * time.Second, outcome: OutcomeRetried}},
		{"last failure, no DLQ", limited, 3, boom, settlement{action: actTerm, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"last failure, DLQ", limited.DLQ("dlq"), 3, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"past the last", limited.DLQ("dlq"), 9, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"no retries", once.DLQ("dlq"), 1, boom, settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"unlimited retries", forever.DLQ("dlq"), 1000, boom, settlement{action: actNak, delay: time.Minute, outcome: OutcomeRetried}},
		{"retry after", limited, 1, RetryAfter(7*time.Second, boom), settlement{action: actNak, delay: 7 * time.Second, outcome: OutcomeRetried}},
		{"retry after counts", limited.DLQ("dlq"), 3, RetryAfter(time.Second, boom), settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"wrapped retry after", limited, 1, fmt.Errorf("wrapped: %w", RetryAfter(time.Hour, nil)), settlement{action: actNak, delay: time.Hour, outcome: OutcomeRetried}},
		{"permanent", forever.DLQ("dlq"), 1, Permanent(boom), settlement{action: actBury, reason: ReasonPermanent, outcome: OutcomeDead}},
		{"permanent, no DLQ", forever, 1, fmt.Errorf("wrapped: %w", Permanent(boom)), settlement{action: actTerm, reason: ReasonPermanent, outcome: OutcomeDead}},
		{"discard", limited.DLQ("dlq"), 1, Discard(boom), settlement{action: actTerm, outcome: OutcomeDiscarded}},
		{"discard beats permanent", limited.DLQ("dlq"), 1, Discard(Permanent(boom)), settlement{action: actTerm, outcome: OutcomeDiscarded}},
		{"undecodable", limited.DLQ("dlq"), 1, undecoded, settlement{action: actBury, reason: ReasonUndecodable, outcome: OutcomeDead}},
		{"panic", limited.DLQ("dlq"), 1, panicked, settlement{action: actNak, delay: time.Second, outcome: OutcomeRetried}},
		{"last panic", limited.DLQ("dlq"), 3, panicked, settlement{action: actBury, reason: ReasonPanic, outcome: OutcomeDead}},
		{"timeout", limited.DLQ("dlq"), 3, context.DeadlineExceeded, settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead}},
		{"crashed", limited.DLQ("dlq"), 4, errCrashed, settlement{action: actBury, reason: ReasonCrashed, outcome: OutcomeDead}},
		{"crashed, no DLQ", limited, 4, errCrashed, settlement{action: actTerm, reason: ReasonCrashed, outcome: OutcomeDead}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			j, _ := judge(tt.err)
			got := decide(tt.route, j, circumstances{attempt: tt.attempt, spread: half})
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(settlement{})); diff != "" {
				t.Errorf("decide differs (-want +got):\n%s", diff)
			}
		})
	}
}

// What a shutdown cuts off has not failed, and what its stream deletes before the next
// attempt is dead before.
func TestDecideUnderCircumstances(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	route := Route("a").Durable("d").Backoff(time.Second, time.Minute).Retry(2).DLQ("dlq")
	returned := settlement{action: actReturn, outcome: OutcomeReturned}
	dead := settlement{action: actBury, reason: ReasonExhausted, outcome: OutcomeDead, expires: true}
	tests := []struct {
		name string
		err  error
		c    circumstances
		want settlement
	}{
		{"cut on the last attempt", boom, circumstances{attempt: 3, cut: true}, returned},
		{"cut panic", &PanicError{Value: "boom"}, circumstances{attempt: 3, cut: true}, returned},
		{"cut and done", nil, circumstances{attempt: 3, cut: true}, settlement{action: actAck, outcome: OutcomeSucceeded}},
		{"cut and permanent", Permanent(boom), circumstances{attempt: 1, cut: true}, settlement{action: actBury, reason: ReasonPermanent, outcome: OutcomeDead}},
		{"lives long enough", boom, circumstances{attempt: 1, spread: 0.5, life: 10 * time.Second}, settlement{action: actNak, delay: time.Second, outcome: OutcomeRetried}},
		{"expires before the retry", boom, circumstances{attempt: 2, spread: 0.5, life: 2 * time.Second}, dead},
		{"expires before RetryAfter", RetryAfter(time.Hour, boom), circumstances{attempt: 1, life: time.Minute}, dead},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			j, _ := judge(tt.err)
			if diff := cmp.Diff(tt.want, decide(route, j, tt.c), cmp.AllowUnexported(settlement{})); diff != "" {
				t.Errorf("decide differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLongestBackoff(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		route RouteBuilder
		want  time.Duration
	}{
		{Route("a"), 0},
		{Route("a").Retry(0), 0},
		{Route("a").Retry(1).Backoff(time.Second, time.Minute), 1200 * time.Millisecond},
		{Route("a").Retry(3).Backoff(time.Second, 2*time.Second), 1200*time.Millisecond + 4*time.Second},
		{Route("a").Retry(1e9).Backoff(time.Second, time.Second), 1e9 * time.Second},
	} {
		if got := longestBackoff(tt.route); got != tt.want {
			t.Errorf("longest backoff of %+v is %v, want %v", tt.route, got, tt.want)
		}
	}
}

// badError panics when it is asked for its chain.
type badError struct{}

func (badError) Error() string { return "bad" }
func (badError) As(any) bool   { panic("asked") }

func TestOutcomeOf(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want Outcome
	}{
		{nil, OutcomeSucceeded},
		{errors.New("x"), OutcomeRetried},
		{RetryAfter(time.Second, nil), OutcomeRetried},
		{&PanicError{}, OutcomeRetried},
		{badError{}, OutcomeRetried},
		{Permanent(nil), OutcomeDead},
		{&DecodeError{}, OutcomeDead},
		{Discard(Permanent(nil)), OutcomeDiscarded},
	} {
		if got := OutcomeOf(tt.err); got != tt.want {
			t.Errorf("OutcomeOf(%#v) = %s, want %s", tt.err, got, tt.want)
		}
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
		w := &work{delivery: &delivery{}, began: processTime()}
		err := invokeWithin(time.Millisecond, func(ctx context.Context, _ *Msg) error {
			<-ctx.Done()
			return result
		}, w)
		if !errors.Is(err, context.DeadlineExceeded) || result != nil && !errors.Is(err, result) {
			t.Errorf("handler returned %v late: got %v", result, err)
		}
	}
	w := &work{delivery: &delivery{}, began: processTime()}
	if err := invokeWithin(time.Hour, func(context.Context, *Msg) error { return boom }, w); err != boom {
		t.Errorf("in time: got %v, want %v", err, boom)
	}
}
