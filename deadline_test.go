package natsx

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// newDeadline makes a handler's context that ends in a second.
func newDeadline(t *testing.T) (c *deadlineContext, abort context.CancelCauseFunc) {
	parent, abort := context.WithCancelCause(context.Background())
	t.Cleanup(func() { abort(nil) })
	return withDeadline(nil, deliveryUnder(parent, Msg{Subject: "a"}), time.Now().Add(time.Second)), abort
}

func closed(c context.Context) bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}

func TestDeadlineContext(t *testing.T) {
	t.Parallel()
	aborted := errors.New("aborted")
	tests := []struct {
		name string
		ends func(c *deadlineContext, abort context.CancelCauseFunc)
		want error
	}{
		{"deadline", func(*deadlineContext, context.CancelCauseFunc) { time.Sleep(time.Second) }, context.DeadlineExceeded},
		{"abort", func(_ *deadlineContext, abort context.CancelCauseFunc) { abort(aborted) }, context.Canceled},
		{"end", func(c *deadlineContext, _ context.CancelCauseFunc) { c.end() }, context.Canceled},
		{"abort, then deadline", func(c *deadlineContext, abort context.CancelCauseFunc) {
			abort(aborted)
			c.Err()
			time.Sleep(time.Second)
		}, context.Canceled},
		{"deadline, then abort", func(c *deadlineContext, abort context.CancelCauseFunc) {
			time.Sleep(time.Second)
			c.Err()
			abort(aborted)
			c.end()
		}, context.DeadlineExceeded},
	}
	for _, tt := range tests {
		for _, asked := range []string{"late", "early"} {
			t.Run(tt.name+", asked "+asked, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					c, abort := newDeadline(t)
					if at, ok := c.Deadline(); !ok || time.Until(at) != time.Second {
						t.Errorf("deadline %v, %t", at, ok)
					}
					if c.Err() != nil || c.timed != nil {
						t.Error("must not have ended, nor have a timer")
					}
					if asked == "early" && closed(c) {
						t.Error("ended at once")
					}
					time.Sleep(time.Second - 1)
					if c.Err() != nil {
						t.Error("ended before its deadline")
					}
					tt.ends(c, abort)
					synctest.Wait()
					if err := c.Err(); err != tt.want {
						t.Errorf("ended with %v, want %v", err, tt.want)
					}
					if !closed(c) || c.Err() != tt.want {
						t.Errorf("once its channel is closed: %v, want %v", c.Err(), tt.want)
					}
					cause := tt.want
					if strings.HasPrefix(tt.name, "abort") {
						cause = aborted
					}
					if got := context.Cause(c); got != cause {
						t.Errorf("cause %v, want %v", got, cause)
					}
				})
			})
		}
	}
}

func TestContextsDerivedFromADeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, _ := newDeadline(t)
		derived, cancel := context.WithCancel(c)
		defer cancel()
		if m := MsgFrom(derived); m == nil || m.Subject != "a" || deliveryFrom(c) != c.delivery {
			t.Errorf("the message is not found: %v", m)
		}
		<-derived.Done()
		if err := derived.Err(); err != context.DeadlineExceeded {
			t.Errorf("derived context ended with %v", err)
		}
		c.end()

		alone, _ := newDeadline(t)
		if MsgFrom(alone) == nil {
			t.Error("the message is not found without a timer")
		}
	})
}
