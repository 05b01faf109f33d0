package natsx

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ordersStream makes the streams of most tests: ORDERS for orders.> and DLQ for
// dlq.>.
func ordersStream(t testing.TB, nc *nats.Conn, retention jetstream.RetentionPolicy) {
	t.Helper()
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}, Retention: retention})
	createStream(t, nc, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dlq.>"}})
}

func publishN(t testing.TB, nc *nats.Conn, subject string, n int) {
	t.Helper()
	js := jetStream(t, nc)
	for i := range n {
		if _, err := js.PublishAsync(subject, []byte(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	receive(t, js.PublishAsyncComplete(), "publish acks")
}

func TestDurableEndToEnd(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ordersStream(t, nc, jetstream.WorkQueuePolicy)
	publishN(t, nc, "orders.new", 500)
	var handled atomic.Int64
	b := NewBroker(nc, WithWorkers(8))
	r := runBroker(t, b, Route("orders.*").Durable("billing").Retry(2).Backoff(10*time.Millisecond, 50*time.Millisecond).DLQ("dlq.orders").
		Handle(func(ctx context.Context, m *Msg) error {
			handled.Add(1)
			if string(m.Data) == "7" {
				return errors.New("never")
			}
			if string(m.Data) == "8" && m.Attempt() < 3 {
				return errors.New("twice")
			}
			return nil
		}))
	eventually(t, "all are settled", func() bool {
		s := b.Stats().Routes[0]
		return s.Succeeded == 499 && s.Dead == 1
	})
	if err := b.Health(); err != nil {
		t.Error("health:", err)
	}
	if err := r.stop(t); err != nil {
		t.Fatal(err)
	}
	if n := handled.Load(); n != 504 {
		t.Errorf("handled %d times, want 504", n)
	}
	s, err := jetStream(t, nc).Stream(testContext(t), "ORDERS")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "source is empty", func() bool {
		info, err := s.Info(testContext(t))
		return err == nil && info.State.Msgs == 0
	})
	letter, err := jetStream(t, nc).Stream(testContext(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	m, err := letter.GetMsg(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(m.Header)
}

func TestCoreEndToEnd(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	var handled atomic.Int64
	b := NewBroker(nc, WithWorkers(8))
	runBroker(t, b,
		Route("a.*").Handle(func(context.Context, *Msg) error { handled.Add(1); return nil }),
		Route("q").Queue("g").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
			switch string(m.Data) {
			case "fail":
				return nil, Fail(404, "no such thing")
			case "panic":
				panic("boom")
			}
			m.ReplyHeader().Set("X", "y")
			return []byte("re: " + string(m.Data)), nil
		}))
	for range 1000 {
		if err := nc.Publish("a.b", nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all handled", func() bool { return handled.Load() == 1000 })
	pub := NewPublisher(nc)
	m, err := pub.Request(testContext(t), To("q").Data([]byte("hi")))
	if err != nil || string(m.Data) != "re: hi" || m.Header.Get("X") != "y" {
		t.Fatalf("got %v, %v", m, err)
	}
	_, err = pub.Request(testContext(t), To("q").Data([]byte("fail")))
	var re *ReplyError
	if !errors.As(err, &re) || re.Code != 404 {
		t.Fatal(err)
	}
	_, err = pub.Request(testContext(t), To("q").Data([]byte("panic")))
	if !errors.As(err, &re) || re.Code != 500 {
		t.Fatal(err)
	}
}
