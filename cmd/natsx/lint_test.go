package main

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// lintJSON returns what lint finds.
func lintJSON(t *testing.T, s *site, code int, args ...string) (found []finding) {
	t.Helper()
	r := runTool(t, s.Server, append([]string{"lint", "-json"}, args...)...)
	r.want(t, code)
	for line := range strings.Lines(r.out) {
		var f finding
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		found = append(found, f)
	}
	return found
}

func TestLint(t *testing.T) {
	t.Parallel()
	orders := natsx.Stream("ORDERS").Subjects("orders.>")
	dlq := natsx.Stream("DLQ").Subjects("dlq.>").Discard(jetstream.DiscardNew)
	for _, test := range []struct {
		name    string
		streams []natsx.StreamSpec
		args    string
		level   string
		text    string
	}{
		{"nothing", []natsx.StreamSpec{orders, dlq}, "ORDERS -dlq dlq.orders", "", ""},
		{"no stream", nil, "ORDERS", levelRefused, "does not exist"},
		{"work queue without a DLQ", []natsx.StreamSpec{orders.Retention(jetstream.WorkQueuePolicy)}, "ORDERS", levelRefused, "would be deleted"},
		{"no DLQ stream", []natsx.StreamSpec{orders}, "ORDERS -dlq dlq.orders", levelRefused, "no stream captures it"},
		{"DLQ with interest", []natsx.StreamSpec{orders, dlq.Retention(jetstream.InterestPolicy)}, "ORDERS -dlq dlq.orders", levelRefused, "interest retention"},
		{"small letters", []natsx.StreamSpec{orders, dlq.MaxMsgSize(100)}, "ORDERS -dlq dlq.orders", levelRefused, "MaxMsgSize"},
		{"filter that the stream lacks", []natsx.StreamSpec{orders}, "ORDERS -filter prices.*", levelRefused, "none of the filter's subjects"},
		{"DLQ that discards", []natsx.StreamSpec{orders, dlq.Discard(jetstream.DiscardOld).MaxMsgs(10)}, "ORDERS -dlq dlq.orders", levelWarning, "discards old letters"},
		{"DLQ that ages", []natsx.StreamSpec{orders, dlq.MaxAge(time.Hour)}, "ORDERS -dlq dlq.orders", levelWarning, "before an operator has seen them"},
		{"DLQ in memory", []natsx.StreamSpec{orders, dlq.Storage(jetstream.MemoryStorage)}, "ORDERS -dlq dlq.orders", levelWarning, "in memory"},
		{"short duplicate window", []natsx.StreamSpec{orders, dlq}, "ORDERS -dlq dlq.orders -ack-wait 5m", levelWarning, "duplicate window"},
		{"retries above MaxAge", []natsx.StreamSpec{orders.MaxAge(time.Minute)}, "ORDERS -retry 20", levelWarning, "MaxAge"},
		{"no retry stream yet", []natsx.StreamSpec{orders}, "ORDERS -retry-stream RETRIES", "", ""},
		{"retry stream without schedules", []natsx.StreamSpec{orders, natsx.Stream("RETRIES").Subjects("RETRIES.>")}, "ORDERS -retry-stream RETRIES", levelRefused, "AllowMsgSchedules"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, test.streams...)
			code := exitOK
			if test.level == levelRefused {
				code = exitPartly
			}
			args := strings.Fields(test.args)
			found := lintJSON(t, s, code, args...)
			if test.level == "" && len(found) > 0 {
				t.Errorf("found %v, want nothing", found)
			}
			if test.level != "" && !slices.ContainsFunc(found, func(f finding) bool { return f.Level == test.level && strings.Contains(f.Text, test.text) }) {
				t.Errorf("found %v, want %s: %s", found, test.level, test.text)
			}
			// What natsx says of a durable that would be new names none.
			if slices.ContainsFunc(found, func(f finding) bool { return strings.Contains(f.Text+f.Durable, lintDurable) }) {
				t.Errorf("found %v, which names the stand-in", found)
			}
			if test.level == levelWarning {
				lintJSON(t, s, exitPartly, append(args, "-strict")...)
			}
			s.wantOnly(t, test.streams)
		})
	}
}

// wantOnly checks that the server has no streams and consumers but those.
func (s *site) wantOnly(t *testing.T, streams []natsx.StreamSpec) {
	t.Helper()
	names := s.js.StreamNames(testContext(t))
	count := 0
	for name := range names.Name() {
		count++
		stream, err := s.js.Stream(testContext(t), name)
		if err != nil {
			t.Fatal(err)
		}
		if n := stream.CachedInfo().State.Consumers; n != 0 {
			t.Errorf("stream %s has %d consumers after lint", name, n)
		}
	}
	if err := names.Err(); err != nil {
		t.Fatal(err)
	}
	if count != len(streams) {
		t.Errorf("%d streams after lint, want %d", count, len(streams))
	}
}

func TestLintDurables(t *testing.T) {
	t.Parallel()
	s := newSite(t, natsx.Stream("ORDERS").Subjects("orders.>"))
	ctx := testContext(t)
	made := func(c jetstream.ConsumerConfig) {
		t.Helper()
		if _, err := s.js.CreateConsumer(ctx, "ORDERS", c); err != nil {
			t.Fatal(err)
		}
	}
	known := map[string]string{natsxID: "x"}
	made(jetstream.ConsumerConfig{Durable: "billing", FilterSubjects: []string{"orders.a", "orders.b"}, AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 4, Metadata: known})
	made(jetstream.ConsumerConfig{Durable: "noacks", FilterSubject: "orders.c", AckPolicy: jetstream.AckNonePolicy, Metadata: known})
	made(jetstream.ConsumerConfig{Durable: "foreign", AckPolicy: jetstream.AckNonePolicy})
	if _, err := s.js.CreatePushConsumer(ctx, "ORDERS", jetstream.ConsumerConfig{Durable: "push", AckPolicy: jetstream.AckExplicitPolicy, DeliverSubject: "to.me"}); err != nil {
		t.Fatal(err)
	}
	s.publish(t, natsx.To("orders.a").Data([]byte("x")))
	s.runRoutes(t, 1, natsx.Route("orders.*").Durable("ordered").OrderedBy(natsx.SubjectKey()).Handle(func(context.Context, *natsx.Msg) error { return nil }))
	before := s.durables(t)

	found := lintJSON(t, s, exitPartly, "ORDERS")
	if i := slices.IndexFunc(found, func(f finding) bool { return f.Durable == "noacks" }); i < 0 || found[i].Level != levelRefused || !strings.Contains(found[i].Text, "ack policy") {
		t.Errorf("found %v, want noacks to be refused for its ack policy", found)
	}
	if i := slices.IndexFunc(found, func(f finding) bool { return f.Durable == "billing" }); i < 0 || found[i].Level != levelChange || !strings.Contains(strings.ToLower(found[i].Text), "maxdeliver") {
		t.Errorf("found %v, want a change of billing's MaxDeliver", found)
	}
	if len(found) != 2 {
		t.Errorf("found %v, want two", found)
	}
	found = lintJSON(t, s, exitPartly, "ORDERS", "-durable", "push")
	if len(found) != 1 || !strings.Contains(found[0].Text, "push consumer") {
		t.Errorf("found %v, want a push consumer", found)
	}
	found = lintJSON(t, s, exitOK, "ORDERS", "-durable", "biling")
	if len(found) != 1 || found[0].Level != levelWarning || !strings.Contains(found[0].Text, "existing=billing") {
		t.Errorf("found %v, want a warning of a name like billing", found)
	}
	runTool(t, s.Server, "lint", "ORDERS", "-durable", "billing").want(t, exitOK, "change: durable billing: ")
	runTool(t, s.Server, "lint", "ORDERS", "-durable", "new").want(t, exitOK, "natsx starts on stream ORDERS without a warning")
	runTool(t, s.Server, "lint", "ORDERS", "-durable", "b.c").want(t, exitUsage, `"b.c"`)
	if diff := cmp.Diff(before, s.durables(t)); diff != "" {
		t.Errorf("lint has changed the durables (-before +after):\n%s", diff)
	}
}

// durables are the configurations and states of the durables of ORDERS.
func (s *site) durables(t *testing.T) (all []jetstream.ConsumerInfo) {
	t.Helper()
	stream, err := s.js.Stream(testContext(t), "ORDERS")
	if err != nil {
		t.Fatal(err)
	}
	list := stream.ListConsumers(testContext(t))
	for info := range list.Info() {
		info.TimeStamp = time.Time{}
		all = append(all, *info)
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b jetstream.ConsumerInfo) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// What lint refuses, natsx refuses.
func TestLintSaysWhatRunSays(t *testing.T) {
	t.Parallel()
	s := newSite(t, natsx.Stream("ORDERS").Subjects("orders.>"), natsx.Stream("DLQ").Subjects("dlq.>").MaxMsgSize(100))
	spec := natsx.Route("orders.>").Durable("billing").Retry(5).DLQ("dlq.orders").Handle(func(context.Context, *natsx.Msg) error { return nil })
	err := natsx.NewBroker(s.nc).Run(testContext(t), spec)
	found := lintJSON(t, s, exitPartly, "ORDERS", "-dlq", "dlq.orders", "-durable", "billing")
	if len(found) != 1 || err == nil || !strings.HasSuffix(err.Error(), found[0].Text) {
		t.Errorf("lint found %v, Run returned %v", found, err)
	}
}
