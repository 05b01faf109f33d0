package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// timeLimit bounds one run, so that a peer that loses a message fails the
// benchmark instead of hanging it.
const timeLimit = 5 * time.Minute

// A figure is what one run of one peer measured.
type figure struct {
	N         int
	Elapsed   time.Duration // from the first message handled to the last one settled, or of a start
	ClientCPU time.Duration
	ServerCPU time.Duration
	Mallocs   uint64        // heap objects that the client allocated
	Bytes     uint64        // heap bytes that the client allocated
	MaxRSS    int64         // of the client, in bytes
	P50, P99  time.Duration // of requests
	Others    float64       // share of the cores that other processes took meanwhile

	Settled       time.Duration // from the first message handled until none waits for an ack
	Repeats       int64         // messages handled again
	SlowConsumers int64         // connections that the server closed since they fell behind
	Goroutines    int           // that the peer added
	Heap          uint64        // bytes in use after a collection, while idle
	IdleClient    float64       // cores that the client used while idle
	IdleServer    float64       // cores that the server used meanwhile
	Pulls         int           // requests for messages
	Waited        float64       // share of its time that the publisher waited for the client
}

// A job is a run in progress: what a peer is given to do its work with.
type job struct {
	ctx    context.Context
	fail   context.CancelCauseFunc // ends ctx
	nc     *nats.Conn
	js     jetstream.JetStream
	url    string
	n      int  // messages to handle
	all    bool // of the stream
	size   int
	sleep  time.Duration
	window time.Duration

	count atomic.Int64
	began atomic.Int64  // Unix nanoseconds of the first message
	done  chan struct{} // closed at the n-th message

	seen    [][]atomic.Bool // by route and number; nil when each message must come once
	repeats atomic.Int64

	helpers []*helper
	before  usage // when the measured time began
	result  figure
}

// runClient is the client process: it runs one figure and prints it.
func runClient(arg string) (err error) {
	var o order
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	s := sections[o.Section]
	p := s.peers[o.Peer]
	isNatsx := strings.HasPrefix(p.name, natsxPrefix)
	if isNatsx && o.MemProfile != "" {
		runtime.MemProfileRate = 1024
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeLimit)
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	nc, err := connect(o.URL)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(asyncPending))
	if err != nil {
		return err
	}
	j := &job{
		ctx: ctx, fail: fail, nc: nc, js: js, url: o.URL,
		n: o.N, all: p.share == 0, size: s.size, sleep: s.sleep, window: o.Window, done: make(chan struct{}),
	}
	if !j.all {
		j.n = max(int(p.share*float64(o.N)), 1)
	}
	if s.does == draining {
		j.seen = [][]atomic.Bool{make([]atomic.Bool, o.N)}
	}
	if isNatsx && o.CPUProfile != "" {
		file, err := os.Create(o.CPUProfile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer func() {
			pprof.StopCPUProfile()
			err = errors.Join(err, file.Close())
		}()
	}
	if err := j.besideBurners(s.burners, p.run); err != nil {
		return err
	}
	if isNatsx && o.MemProfile != "" {
		if err := writeAllocs(o.MemProfile); err != nil {
			return err
		}
	}
	switch s.does {
	case consuming, draining:
		err = j.settled()
	case trickling:
		err = j.emptied()
	case publishing, fastPublishing:
		err = j.stored()
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(j.result)
}

// connect is patient, for a machine that is busy with other things.
func connect(url string) (*nats.Conn, error) {
	return nats.Connect(url, nats.Timeout(30*time.Second))
}

func writeAllocs(name string) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("allocs").WriteTo(file, 0), file.Close())
}

// start begins to measure what the run costs. The clock itself starts with the
// first message, which keeps a peer's set-up out of its rate.
func (j *job) start() (err error) {
	j.before, err = j.read()
	return err
}

// handle is the handler of every consuming peer. It returns which of the messages it
// was, or 0 for one that came again.
func (j *job) handle(data []byte) int64 { return j.handleRoute(0, data) }

// handleRoute is the handler of a peer that has several consumers of the stream.
func (j *job) handleRoute(route int, data []byte) int64 {
	if j.sleep > 0 {
		time.Sleep(j.sleep)
	}
	if j.seen != nil && !j.seen[route][binary.BigEndian.Uint64(data)].CompareAndSwap(false, true) {
		j.repeats.Add(1)
		return 0
	}
	count := j.count.Add(1)
	if count == 1 {
		j.began.Store(time.Now().UnixNano())
	}
	if count == int64(j.n) {
		close(j.done)
	}
	return count
}

// finish waits for the n-th message, has the server read the last settlement,
// and takes the figure.
func (j *job) finish() error {
	select {
	case <-j.done:
	case <-j.ctx.Done():
		return fmt.Errorf("%d of %d messages: %w", j.count.Load(), j.n, context.Cause(j.ctx))
	}
	if err := j.flush(); err != nil {
		return err
	}
	if err := j.stop(j.elapsed()); err != nil || j.seen == nil || !j.all {
		return err
	}
	return j.finishRepeats()
}

// elapsed is the time since the first message.
func (j *job) elapsed() time.Duration { return time.Since(time.Unix(0, j.began.Load())) }

// flush tries again where a connection may be lost.
func (j *job) flush() error {
	for {
		err := j.nc.Flush()
		if err == nil || j.seen == nil || j.ctx.Err() != nil {
			return err
		}
		time.Sleep(pollEvery)
	}
}

// stop takes the figure of a run that took its own time.
func (j *job) stop(elapsed time.Duration) error {
	end, err := j.read()
	if err != nil {
		return err
	}
	f := end.since(j.before)
	f.N, f.Elapsed = j.n, elapsed
	f.P50, f.P99 = j.result.P50, j.result.P99
	j.result = f
	return nil
}
