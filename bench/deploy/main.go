// Command deploy measures what a deployment costs while the handler is slow: two replicas
// share one durable, the handler is fast at first and then gets slow, as when a database
// does, and both replicas are replaced one after the other.
//
//	go run ./deploy
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	wmjs "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/jetstream"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

const (
	stream     = "DEPLOY"
	subject    = "deploy.x"
	durable    = "worker"
	workers    = 16
	deliveries = 5 // and a message is given up
)

var (
	n       = flag.Int("n", 4000, "messages")
	fast    = flag.Int("fast", 1000, "of these are handled at once, the others slowly")
	slow    = flag.Duration("slow", 50*time.Millisecond, "how long a slow one takes")
	ackWait = flag.Duration("ackwait", time.Second, "lease of a message")
	after   = flag.Duration("deploy", time.Second, "when the replicas are replaced, from the start")
	limit   = flag.Duration("limit", 2*time.Minute, "when it is given up")
	peersRE = flag.String("peers", "", "regular expression that chooses peers by name")
)

// replica is a peer that runs: stop ends it cleanly and returns when nothing of it runs.
type replica struct{ stop func() error }

var peers = []struct {
	name  string
	start func(url string, handle func(data []byte)) (*replica, error)
}{
	{"natsx, 16 workers", startNatsx},
	{"hand-written: 16 workers that fetch one at a time", startFetch},
	{"nats.go Consume, 16 goroutines", startConsume(workers)},
	{"nats.go Consume, serial", startConsume(1)},
	{"watermill-nats, default", startWatermill},
}

func main() {
	flag.Parse()
	if err := measure(); err != nil {
		fmt.Fprintln(os.Stderr, "deploy:", err)
		os.Exit(1)
	}
}

func measure() error {
	match, err := regexp.Compile(*peersRE)
	if err != nil {
		return err
	}
	fmt.Printf("%d messages, the first %d handled at once, then %s each; lease %s, %d deliveries;\ntwo replicas, both replaced after %s\n\n",
		*n, *fast, *slow, *ackWait, deliveries, *after)
	fmt.Println("| | handler calls | of messages handled before | never handled | slowest stop | done in |")
	fmt.Println("|---|---:|---:|---:|---:|---:|")
	for _, p := range peers {
		if !match.MatchString(p.name) {
			continue
		}
		r, err := run(p.start)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		done := fmt.Sprintf("%.1f s", r.took.Seconds())
		if r.missing > 0 {
			done = fmt.Sprintf("not in %s", *limit)
		}
		fmt.Printf("| %s | %d | %d | %d | %.1f s | %s |\n", p.name, r.calls, r.calls-r.handled, r.missing, r.stop.Seconds(), done)
	}
	return nil
}

type result struct {
	calls, handled, missing int
	stop, took              time.Duration
}

func run(start func(string, func([]byte)) (*replica, error)) (r result, err error) {
	dir, err := os.MkdirTemp("", "natsx-deploy-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true})
	if err != nil {
		return r, err
	}
	s.Start()
	defer s.WaitForShutdown()
	defer s.Shutdown()
	if !s.ReadyForConnections(time.Minute) {
		return r, errors.New("nats-server is not ready")
	}
	if err := prepare(s.ClientURL()); err != nil {
		return r, err
	}

	var mu sync.Mutex
	seen := make([]int, *n) // calls that have returned
	all := make(chan struct{})
	handle := func(data []byte) {
		i := int(binary.BigEndian.Uint32(data))
		if i >= *fast {
			time.Sleep(*slow)
		}
		mu.Lock()
		defer mu.Unlock()
		r.calls++
		if seen[i]++; seen[i] == 1 {
			if r.handled++; r.handled == *n {
				close(all)
			}
		}
	}
	begun := time.Now()
	var replicas [2]*replica
	for i := range replicas {
		if replicas[i], err = start(s.ClientURL(), handle); err != nil {
			return r, err
		}
	}
	stop := func(i int) error {
		before := time.Now()
		err := replicas[i].stop()
		r.stop = max(r.stop, time.Since(before))
		return err
	}
	time.Sleep(*after)
	for i := range replicas { // the deployment: one after the other
		if err := stop(i); err != nil {
			return r, err
		}
		if replicas[i], err = start(s.ClientURL(), handle); err != nil {
			return r, err
		}
	}
	select {
	case <-all:
		r.took = time.Since(begun)
		time.Sleep(2 * *ackWait) // for what comes again
	case <-time.After(*limit):
	}
	for i := range replicas {
		if err := stop(i); err != nil {
			return r, err
		}
	}
	mu.Lock()
	defer mu.Unlock()
	r.missing = *n - r.handled
	return r, nil
}

// prepare makes the streams and publishes the messages.
func prepare(url string) error {
	nc, err := natsx.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, spec := range []natsx.StreamSpec{natsx.Stream(stream).Subjects("deploy.*"), natsx.Stream("DLQ").Subjects("dlq.*")} {
		if err := spec.Ensure(ctx, nc); err != nil {
			return err
		}
	}
	es := make([]natsx.Envelope, *n)
	for i := range es {
		es[i] = natsx.To(subject).Data(binary.BigEndian.AppendUint32(nil, uint32(i)))
	}
	_, err = natsx.NewPublisher(nc).PublishAll(ctx, es...)
	return err
}

func startNatsx(url string, handle func([]byte)) (*replica, error) {
	nc, err := natsx.Connect(url)
	if err != nil {
		return nil, err
	}
	broker := natsx.NewBroker(nc, natsx.WithWorkers(workers), natsx.WithLogger(slog.New(slog.DiscardHandler)))
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("deploy.*").Durable(durable).AckWait(*ackWait).Retry(deliveries-1).DLQ("dlq.deploy").
			Handle(func(_ context.Context, m *natsx.Msg) error {
				handle(m.Data)
				return nil
			}))
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		cancel()
		return nil, err
	}
	return &replica{func() error {
		defer nc.Close()
		cancel()
		return <-stopped
	}}, nil
}

// consumer is the durable as a careful program with nats.go sets it up.
func consumer(url string) (*nats.Conn, jetstream.Consumer, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	c, err := js.CreateOrUpdateConsumer(context.Background(), stream, consumerConfig())
	return nc, c, err
}

func consumerConfig() jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{Durable: durable, FilterSubject: "deploy.*", AckPolicy: jetstream.AckExplicitPolicy, AckWait: *ackWait, MaxDeliver: deliveries}
}

func startFetch(url string, handle func([]byte)) (*replica, error) {
	nc, c, err := consumer(url)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	var pool sync.WaitGroup
	for range workers {
		pool.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				batch, err := c.Fetch(1, jetstream.FetchMaxWait(time.Second))
				if err != nil {
					continue
				}
				for m := range batch.Messages() {
					handle(m.Data())
					_ = m.Ack()
				}
			}
		})
	}
	return &replica{func() error {
		defer nc.Close()
		close(done)
		pool.Wait()
		return nc.FlushTimeout(10 * time.Second)
	}}, nil
}

func startConsume(goroutines int) func(string, func([]byte)) (*replica, error) {
	return func(url string, handle func([]byte)) (*replica, error) {
		nc, c, err := consumer(url)
		if err != nil {
			return nil, err
		}
		slots := make(chan struct{}, goroutines)
		var running sync.WaitGroup
		cc, err := c.Consume(func(m jetstream.Msg) {
			slots <- struct{}{}
			running.Go(func() {
				defer func() { <-slots }()
				handle(m.Data())
				_ = m.Ack()
			})
		})
		if err != nil {
			return nil, err
		}
		return &replica{func() error {
			defer nc.Close()
			cc.Drain()
			<-cc.Closed()
			running.Wait()
			return nc.FlushTimeout(10 * time.Second)
		}}, nil
	}
}

func startWatermill(url string, handle func([]byte)) (*replica, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	sub, err := wmjs.NewSubscriber(wmjs.SubscriberConfig{
		Conn: nc, Logger: watermill.NopLogger{},
		ResourceInitializer: func(ctx context.Context, js jetstream.JetStream, _ string) (
			jetstream.Consumer, func(context.Context, watermill.LoggerAdapter), error) {
			c, err := js.CreateOrUpdateConsumer(ctx, stream, consumerConfig())
			return c, nil, err
		},
	})
	if err != nil {
		return nil, err
	}
	messages, err := sub.Subscribe(context.Background(), subject)
	if err != nil {
		return nil, err
	}
	go func() {
		for m := range messages {
			handle(m.Payload)
			m.Ack()
		}
	}()
	return &replica{func() error {
		defer nc.Close()
		return sub.Close()
	}}, nil
}
