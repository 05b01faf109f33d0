package main

import (
	"encoding/json"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	deepPull       = 5_000
	deepPullBytes  = 32 << 20 // half of what the server lets wait for a client
	deepAckPending = 20_000
	workers        = 64
)

// deep is how many messages a deep pull asks for.
func (j *job) deep() int { return min(deepPull, deepPullBytes/j.size) }

// consumeDefaults is what most programs do: Consume with its defaults.
func consumeDefaults(j *job) error {
	return consume(j, jetstream.ConsumerConfig{Durable: "raw", AckPolicy: jetstream.AckExplicitPolicy})
}

func consumeDeep(j *job) error {
	return consume(j, jetstream.ConsumerConfig{
		Durable: "raw", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: deepAckPending,
	}, jetstream.PullMaxMessages(j.deep()))
}

func consume(j *job, cfg jetstream.ConsumerConfig, opts ...jetstream.PullConsumeOpt) error {
	c, err := j.js.CreateConsumer(j.ctx, benchStream, cfg)
	if err != nil {
		return err
	}
	if err := j.start(); err != nil {
		return err
	}
	cc, err := c.Consume(func(m jetstream.Msg) {
		// Acked first: the handler of the last message ends the run.
		_ = m.Ack()
		j.handle(m.Data())
	}, opts...)
	if err != nil {
		return err
	}
	defer cc.Stop()
	return j.finish()
}

// pull is the best pull loop that one writes by hand on the pull protocol, with
// the handler on the subscription's goroutine.
func pull(j *job) error {
	return pullInto(j, func(m *nats.Msg) { j.settle(m) })
}

// pullPool is the same with a pool of workers behind a buffered channel.
func pullPool(j *job) error {
	queue := make(chan *nats.Msg, 1024)
	var pool sync.WaitGroup
	for range workers {
		pool.Go(func() {
			for m := range queue {
				j.settle(m)
			}
		})
	}
	// pullInto has waited for the last message: nothing sends any more.
	defer pool.Wait()
	defer close(queue)
	return pullInto(j, func(m *nats.Msg) { queue <- m })
}

var ackBody = []byte("+ACK")

func (j *job) settle(m *nats.Msg) {
	if j.sleep > 0 {
		j.handle(m.Data)
		_ = j.nc.Publish(m.Reply, ackBody)
		return
	}
	_ = j.nc.Publish(m.Reply, ackBody)
	j.handle(m.Data)
}

func pullInto(j *job, deliver func(*nats.Msg)) error {
	if _, err := j.js.CreateConsumer(j.ctx, benchStream, jetstream.ConsumerConfig{
		Durable: "pull", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: deepAckPending,
	}); err != nil {
		return err
	}
	next := "$JS.API.CONSUMER.MSG.NEXT." + benchStream + ".pull"
	inbox := j.nc.NewInbox()
	deep := int64(j.deep())
	var wanted atomic.Int64 // asked for and not yet received
	ask := func(n int64) error {
		body, err := json.Marshal(struct {
			Batch   int64 `json:"batch"`
			Expires int64 `json:"expires"`
		}{n, int64(30 * time.Second)})
		if err != nil {
			return err
		}
		wanted.Add(n)
		return j.nc.PublishRequest(next, inbox, body)
	}
	sub, err := j.nc.Subscribe(inbox, func(m *nats.Msg) {
		left := int64(0)
		if m.Reply == "" { // a status: the pull ended with so many outstanding
			n, _ := strconv.ParseInt(m.Header.Get("Nats-Pending-Messages"), 10, 64)
			left = wanted.Add(-n)
		} else {
			deliver(m)
			left = wanted.Add(-1)
		}
		if left <= deep/2 {
			_ = ask(deep - left)
		}
	})
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	if err := j.start(); err != nil {
		return err
	}
	if err := ask(deep); err != nil {
		return err
	}
	if err := j.finish(); err != nil {
		return err
	}
	return sub.Unsubscribe()
}
