package natsx

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
)

// A durable whose filter matches schedules handles what they bring, and not the
// schedules; on a work-queue stream it must not delete them either.
func TestDurablePassesSchedulesOver(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		subjects []string
		policy   jetstream.RetentionPolicy
		filter   string
	}{
		{"below", []string{"s.>"}, jetstream.LimitsPolicy, "s.>"},
		{"beside", []string{"s.*"}, jetstream.LimitsPolicy, "s.*"},
		{"work queue", []string{"s.>", "natsx-schedule.*.s.>"}, jetstream.WorkQueuePolicy, ">"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, startServer(t).ClientURL())
			createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: tt.subjects, Retention: tt.policy, AllowMsgSchedules: true})
			handled := make(chan string, 10)
			b := NewBroker(nc)
			runBroker(t, b, Route(tt.filter).Stream("S").Durable("d").Handle(func(_ context.Context, m *Msg) error {
				handled <- m.Subject + " " + string(m.Data)
				return nil
			}))
			pub := NewPublisher(nc)
			if _, err := pub.Publish(testContext(t), To("s.x").After(time.Second).Data([]byte("late"))); err != nil {
				t.Fatal(err)
			}
			if _, err := pub.Publish(testContext(t), To("s.y").Data([]byte("now"))); err != nil {
				t.Fatal(err)
			}
			got := []string{receive(t, handled, "a message"), receive(t, handled, "a message")}
			slices.Sort(got)
			if diff := cmp.Diff([]string{"s.x late", "s.y now"}, got); diff != "" {
				t.Errorf("handled (-want +got):\n%s", diff)
			}
			if received := b.Stats().Routes[0].Received; received != 3 {
				t.Errorf("received %d, want the schedule too", received)
			}
		})
	}
}

func TestUntilDue(t *testing.T) {
	t.Parallel()
	soon := untilDue("@at " + time.Now().Add(time.Hour).Format(time.RFC3339Nano))
	if soon < 59*time.Minute || soon > time.Hour+5*time.Second {
		t.Errorf("in an hour: %s", soon)
	}
	if past := untilDue("@at " + time.Now().Add(-time.Hour).Format(time.RFC3339Nano)); past != 5*time.Second {
		t.Errorf("an hour ago: %s, want 5s", past)
	}
	if every := untilDue("@every 1h"); every != time.Minute {
		t.Errorf("repeated: %s, want 1m", every)
	}
}

// A delayed message that is alone in its stream is punctual to less than a second,
// which nats.go's own helper is not. The machine may be slow, so one of several
// must be.
func TestDelayedMessageIsPunctual(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	pub := NewPublisher(nc)
	var late []time.Duration
	for i := range 40 {
		name := fmt.Sprint("S", i)
		s := createStream(t, nc, jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}, AllowMsgSchedules: true})
		due := time.Now().Add(350 * time.Millisecond)
		if _, err := pub.Publish(testContext(t), To(name+".x").At(due)); err != nil {
			t.Fatal(err)
		}
		var m *jetstream.RawStreamMsg
		eventually(t, "the message comes", func() (ok bool) {
			var err error
			m, err = s.GetLastMsgForSubject(testContext(t), name+".x")
			return err == nil
		})
		late = append(late, m.Time.Sub(due))
		if late[i] < 0 {
			t.Fatalf("early by %v", -late[i])
		}
		if late[i] <= 100*time.Millisecond {
			return
		}
	}
	t.Errorf("late by %v, want at least one by at most 100ms", late)
}
