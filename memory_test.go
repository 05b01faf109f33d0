package natsx

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
)

func init() {
	childModes["replay"] = func() int { return readerChild(replayAll) }
	childModes["letters"] = func() int { return readerChild(listAll) }
}

// Many messages take no more memory than few. The heap is that of a process, so
// that reader and server have one each.
func TestReplayAndRouteInConstantMemory(t *testing.T) {
	t.Parallel()
	readInConstantMemory(t, "replay", 2*historySize)
}

func TestDeadLettersInConstantMemory(t *testing.T) {
	t.Parallel()
	readInConstantMemory(t, "letters", 100_000)
}

func readInConstantMemory(t *testing.T, mode string, count int) {
	t.Helper()
	url, start := serverProcess(t)
	start()
	lines := make(chan string, 1)
	c := startChild(t, mode, url, lines)
	if !c.serves(t) {
		t.Fatal(c.err)
	}
	receive(t, lines, "that it is ready")
	receive(t, c.done, "the reader's end")
	if c.err != nil {
		t.Fatal(c.err)
	}
	var read, grown int
	if _, err := fmt.Sscan(receive(t, lines, "the result"), &read, &grown); err != nil {
		t.Fatal(err)
	}
	if read != count || grown > 24 {
		t.Errorf("read %d of %d, the heap grew by %d MiB, want at most 24", read, count, grown)
	}
}

// readerChild prints how much read has read, and by how many MiB the heap grew
// meanwhile.
func readerChild(read func(nc *nats.Conn, look func()) (int, error)) int {
	nc, err := nats.Connect(childURL())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer nc.Close()
	var mu sync.Mutex
	var before, most uint64
	n, err := read(nc, func() {
		mu.Lock()
		defer mu.Unlock()
		if before == 0 {
			fmt.Println("ready")
		}
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		if before == 0 {
			before = m.HeapAlloc
		}
		most = max(most, m.HeapAlloc)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(n, (most-before)>>20)
	return 0
}

const historySize = 1_000_000

// replayAll replays a stream, and then has a durable handle what waits in it.
func replayAll(nc *nats.Conn, look func()) (int, error) {
	if err := fill(nc, "HISTORY", "history.>", historySize, func(i int) Envelope {
		return To("history." + strconv.Itoa(i%10)).Data(strconv.AppendInt(nil, int64(i), 10))
	}); err != nil {
		return 0, err
	}
	look()
	handle := func(_ context.Context, m *Msg) error {
		if m.Sequence()%50_000 == 0 {
			look()
		}
		return nil
	}
	report, err := NewBroker(nc).Replay(context.Background(), Replay("history.>").Handle(handle))
	if err != nil {
		return 0, err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var handled atomic.Int64
	b := NewBroker(nc)
	err = b.Run(ctx, Route("history.>").Durable("d").Retry(2).Handle(func(ctx context.Context, m *Msg) error {
		if handled.Add(1) == historySize {
			stop()
		}
		return handle(ctx, m)
	}))
	if st := b.Stats().Routes[0]; err == nil && (st.Lapsed != 0 || st.Succeeded != historySize || st.Received != historySize) {
		err = fmt.Errorf("the route's messages: %+v", st)
	}
	return int(report.Handled) + int(handled.Load()), err
}

func listAll(nc *nats.Conn, look func()) (read int, _ error) {
	body := make([]byte, 1024)
	if err := fill(nc, "DLQ", "dlq.>", 100_000, func(i int) Envelope {
		m := testLetter("billing", ReasonPanic, i)
		e := To(m.Subject).Data(body)
		for name, values := range m.Header {
			e = e.Header(name, values[0])
		}
		return e
	}); err != nil {
		return 0, err
	}
	look()
	for _, err := range DeadLetters("dlq.orders").List(context.Background(), nc) {
		if err != nil {
			return read, err
		}
		if read++; read%10_000 == 0 {
			look()
		}
	}
	return read, nil
}

// fill makes a stream with so many messages.
func fill(nc *nats.Conn, name, subject string, count int, build func(i int) Envelope) error {
	ctx := context.Background()
	if err := Stream(name).Subjects(subject).AllowBatchPublish().Ensure(ctx, nc); err != nil {
		return err
	}
	pub := NewPublisher(nc, WithoutMessageIDs(), WithFastIngest())
	const atOnce = 10_000
	for i := 0; i < count; i += atOnce {
		es := make([]Envelope, atOnce)
		for j := range es {
			es[j] = build(i + j)
		}
		if _, err := pub.PublishAll(ctx, es...); err != nil {
			return err
		}
	}
	return nil
}
