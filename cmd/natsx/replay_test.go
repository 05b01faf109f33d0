package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natsx/natsx"
)

func TestReplay(t *testing.T) {
	t.Parallel()
	s := newSite(t, natsx.Stream("ORDERS").Subjects("orders.>"), natsx.Stream("COPIES").Subjects("copy.>"))
	for i := range 5 {
		s.publish(t, natsx.To(fmt.Sprintf("orders.%d", i%2)).Header("X-Number", fmt.Sprint(i)).MsgID(fmt.Sprint(i)).Data(fmt.Appendf(nil, "\x1b[2J%d", i)))
	}

	t.Run("print", func(t *testing.T) {
		t.Parallel()
		r := runTool(t, s.Server, "replay", "orders.*", "-from-sequence", "2", "-until-sequence", "3")
		r.want(t, exitOK, "\torders.1\t\\x1b[2J1\n3\t", "2 of 2 read")
		r.wantNot(t, "\x1b", "orders.0\t\\x1b[2J0")
	})
	t.Run("json", func(t *testing.T) {
		t.Parallel()
		r := runTool(t, s.Server, "replay", "orders.1", "-json", "-limit", "1")
		r.want(t, exitOK)
		var got replayed
		if err := json.Unmarshal([]byte(r.out), &got); err != nil {
			t.Fatal(err)
		}
		if got.Stream != "ORDERS" || got.Sequence != 2 || got.Subject != "orders.1" || got.Text != "\x1b[2J1" || got.Header.Get("X-Number") != "1" || got.Time.IsZero() {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("count", func(t *testing.T) {
		t.Parallel()
		r := runTool(t, s.Server, "replay", "orders.>", "-count", "-since", "1h")
		r.want(t, exitOK, "3\torders.0\n2\torders.1\n5\ttotal\n")
		runTool(t, s.Server, "replay", "orders.>", "-count", "-json", "-until", "2020-01-01").want(t, exitOK, `{"total":0,"subjects":null}`)
	})
	t.Run("copy", func(t *testing.T) {
		t.Parallel()
		runTool(t, s.Server, "replay", "orders.>", "-to", "copy").want(t, exitUnconfirmed, "-yes")
		for range 2 { // done twice it copies once
			runTool(t, s.Server, "replay", "orders.>", "-to", "copy", "-yes").want(t, exitOK, "copied 5 messages of stream ORDERS", "5 of 5 copied")
		}
		stream, err := s.js.Stream(testContext(t), "COPIES")
		if err != nil {
			t.Fatal(err)
		}
		if n := stream.CachedInfo().State.Msgs; n != 5 {
			t.Errorf("%d copies, want 5", n)
		}
		m, err := stream.GetMsg(testContext(t), 2)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"copy.orders.1", "\x1b[2J1", "1"}, []string{m.Subject, string(m.Data), m.Header.Get("X-Number")}); diff != "" {
			t.Errorf("copy (-want +got):\n%s", diff)
		}
	})
	t.Run("copy to itself", func(t *testing.T) {
		t.Parallel()
		runTool(t, s.Server, "replay", "orders.>", "-to", "orders", "-yes").want(t, exitFailed, "copies must go to another stream", "-from-sequence 1")
		runTool(t, s.Server, "replay", "orders.>", "-to", "nowhere", "-yes").want(t, exitFailed, "no stream has nowhere.>")
	})
	t.Run("no stream", func(t *testing.T) {
		t.Parallel()
		r := runTool(t, s.Server, "replay", "prices.>")
		r.want(t, exitFailed, "prices.>")
		if n := strings.Count(r.errs, "natsx: natsx:"); n > 0 {
			t.Errorf("prefix repeated: %v", r)
		}
	})
}
