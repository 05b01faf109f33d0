package natsx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"testing"
	"time"
)

func TestOutcomeErrors(t *testing.T) {
	t.Parallel()
	cause := fmt.Errorf("load order: %w", &fs.PathError{Op: "open", Path: "x", Err: io.ErrUnexpectedEOF})
	for _, tc := range []struct {
		name string
		wrap func(error) error
		none string // the text without a cause
	}{
		{"RetryAfter", func(err error) error { return RetryAfter(time.Second, err) }, "retry later"},
		{"Permanent", Permanent, "permanent failure"},
		{"Discard", Discard, "discarded"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := fmt.Errorf("handle: %w", tc.wrap(cause))
			if got, want := err.Error(), "handle: load order: open x: unexpected EOF"; got != want {
				t.Errorf("text = %q, want %q", got, want)
			}
			var path *fs.PathError
			if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.As(err, &path) {
				t.Errorf("the chain of %v is cut", err)
			}
			bare := tc.wrap(nil)
			if bare == nil || bare.Error() != tc.none {
				t.Errorf("without a cause = %v, want %q", bare, tc.none)
			}
			if errors.Unwrap(bare) != nil || errors.Is(bare, io.EOF) {
				t.Errorf("%v has a cause", bare)
			}
		})
	}
}

// TestOutcomeErrorsAreToldApart wraps them in each other as middleware may.
func TestOutcomeErrorsAreToldApart(t *testing.T) {
	t.Parallel()
	var (
		retry     *retryAfterError
		permanent *permanentError
		discard   *discardError
	)
	err := errors.Join(io.EOF, fmt.Errorf("x: %w", RetryAfter(time.Minute, Permanent(nil))))
	if !errors.As(err, &retry) || retry.delay != time.Minute || !errors.As(err, &permanent) || errors.As(err, &discard) {
		t.Errorf("%v: retry %v, permanent %v, discard %v, want the first two", err, retry, permanent, discard)
	}
	for d, want := range map[time.Duration]time.Duration{-1: 0, 0: 0, time.Hour: time.Hour} {
		if errors.As(RetryAfter(d, nil), &retry); retry.delay != want {
			t.Errorf("RetryAfter(%v) waits %v, want %v", d, retry.delay, want)
		}
	}
}

func TestErrorTexts(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err    error
		want   string
		unwrap error
	}{
		{&PanicError{Value: "boom", Stack: []byte("goroutine 1")}, "natsx: handler panicked: boom", nil},
		{&PanicError{Value: io.EOF}, "natsx: handler panicked: EOF", io.EOF},
		{&PanicError{}, "natsx: handler panicked: <nil>", nil},
		{&DecodeError{Subject: "a\nb", ContentType: "application/json", Err: io.EOF}, `natsx: decode application/json from "a\nb": EOF`, io.EOF},
		{&RouteError{Route: "a", Err: ErrNoHandler}, `natsx: route "a": no handler`, ErrNoHandler},
		{&RouteError{Route: "a", Durable: "d", Err: ErrNoStream}, `natsx: route "a" durable "d": no stream`, ErrNoStream},
		{&RouteError{Route: "a", Field: "confirmAcks", Reason: "needs a durable", Err: ErrOptionConflict}, `natsx: route "a": confirmAcks: needs a durable`, ErrOptionConflict},
		{&RouteError{Route: "orders.*", Durable: "billing", Field: "retry", Value: "-1", Reason: "must not be negative", Err: ErrOutOfRange},
			`natsx: route "orders.*" durable "billing": retry -1: must not be negative`, ErrOutOfRange},
		{&StreamError{Stream: "S", Field: "replicas", Value: "0", Reason: "must be 1 to 5", Err: ErrOutOfRange}, `natsx: stream "S": replicas 0: must be 1 to 5`, ErrOutOfRange},
	} {
		if got := tc.err.Error(); got != tc.want {
			t.Errorf("text = %s\nwant   %s", got, tc.want)
		}
		if got := errors.Unwrap(tc.err); got != tc.unwrap {
			t.Errorf("%v unwraps to %v, want %v", tc.err, got, tc.unwrap)
		}
		if strings.Count(tc.err.Error(), "natsx:") != 1 {
			t.Errorf("%v does not name natsx once", tc.err)
		}
	}
}

// An error that wraps another one of natsx names the package once.
func TestErrorsNameThePackageOnce(t *testing.T) {
	t.Parallel()
	expired, cancel := context.WithDeadline(context.Background(), time.Now())
	defer cancel()
	_, batch := batchResults(BatchError{7: ErrNoStream}, 2)
	nc := connect(t, startServer(t).ClientURL())
	for name, err := range map[string]error{
		"panic":        &PanicError{Value: ErrNoStream},
		"decode":       &DecodeError{Subject: "a", ContentType: "dead letter", Err: ErrNotALetter},
		"letter":       &LetterError{Stream: "DLQ", Sequence: 1, Err: failure("x", ErrNoStream)},
		"publish":      &PublishError{Errors: []error{ErrNoStream}},
		"replay":       &ReplayFailure{Replay: "a", Err: &PanicError{Value: "x"}},
		"late handler": lateness(expired, time.Second, &PanicError{Value: "x"}),
		"batch":        batch,
		"workers":      NewBroker(nc, WithWorkers(0)).Run(t.Context(), Route("a").Handle(func(context.Context, *Msg) error { return nil })),
		"service":      NewBroker(nc, WithService("a b", "1.0.0", "")).Run(t.Context(), Route("a").Handle(func(context.Context, *Msg) error { return nil })),
		"no stream":    NewBroker(nc).Run(t.Context(), Route("a").Durable("d").Handle(func(context.Context, *Msg) error { return nil })),
	} {
		if err == nil {
			t.Errorf("%s: got no error", name)
			continue
		}
		if n := strings.Count(err.Error(), "natsx:"); n != 1 {
			t.Errorf("%s: %q names natsx %d times, want once", name, err, n)
		}
	}
}
