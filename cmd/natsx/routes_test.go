package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

func TestRoutes(t *testing.T) {
	t.Parallel()
	s := newSite(t, natsx.Stream("ORDERS").Subjects("orders.>"))
	for _, subject := range []string{"orders.a", "orders.b", "orders.a"} {
		s.publish(t, natsx.To(subject).Data([]byte("x")))
	}
	s.runRoutes(t, 2, natsx.Route("orders.a").Durable("billing").Handle(func(context.Context, *natsx.Msg) error { return nil }))
	s.publish(t, natsx.To("orders.a").Data([]byte("y")))
	ctx := testContext(t)
	other, err := s.js.CreateConsumer(ctx, "ORDERS", jetstream.ConsumerConfig{Durable: "other", MaxAckPending: 2})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Fetch(2); err != nil {
		t.Fatal(err)
	}

	r := runTool(t, s.Server, "routes")
	r.want(t, exitOK, "STREAM\tDURABLE\tLAG", "ORDERS\tbilling\t1\t0/65536\t0\t0\t", "no reader\torders.a")
	r.wantNot(t, "other")

	r = runTool(t, s.Server, "routes", "ORDERS", "-all", "-json")
	r.want(t, exitOK)
	var got []durable
	for line := range strings.Lines(r.out) {
		var d durable
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		if d.LastActivity == nil || time.Since(*d.LastActivity) > limit {
			t.Errorf("last activity of %s: %v", d.Durable, d.LastActivity)
		}
		got = append(got, d)
	}
	want := []durable{
		{Stream: "ORDERS", Durable: "billing", Filters: []string{"orders.a"}, Lag: 1, MaxPending: 65536, Natsx: true},
		{Stream: "ORDERS", Durable: "other", Lag: 2, AckPending: 2, MaxPending: 2},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(durable{}, "LastActivity", "Pulls")); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}
	runTool(t, s.Server, "routes", "-all").want(t, exitOK, "ORDERS\tother\t2\t2/2\t0\t", "\tfull\t")
	runTool(t, s.Server, "routes", "ABSENT").want(t, exitFailed, `stream "ABSENT"`)
}
