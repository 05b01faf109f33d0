package main

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

const (
	// batchSize is how many rows a batch inserts, and rowCost what each adds to the time
	// of a transaction.
	batchSize = 1000
	rowCost   = time.Microsecond
)

// insert is a transaction of some rows: it takes the handler's time once and a little for
// each row.
func (j *job) insert(rows int) {
	time.Sleep(j.sleep + time.Duration(rows)*rowCost)
}

// handleRow is the handler without its time, which insert has taken.
func (j *job) handleRow(data []byte) {
	sleep := j.sleep
	j.sleep = 0
	j.handle(data)
	j.sleep = sleep
}

// natsxBatch inserts the messages of a batch in one transaction, one batch at a time.
func natsxBatch(j *job) error {
	broker := natsx.NewBroker(j.nc, natsx.WithWorkers(workers), quiet)
	route := natsx.Route(benchSubject).Stream(benchStream).Durable("natsx").Concurrency(1).
		Retry(5).Backoff(time.Second, time.Minute).DLQ(dlqSubject).
		Batch(batchSize, 50*time.Millisecond).
		HandleBatch(func(_ context.Context, ms []*natsx.Msg) error {
			j.insert(len(ms))
			for _, m := range ms {
				j.handleRow(m.Data)
			}
			return nil
		})
	if err := j.start(); err != nil {
		return err
	}
	return natsxRun(j, broker, j.finish, route)
}

// fetchBatch is the same by hand with Fetch, one batch after another.
func fetchBatch(j *job) error {
	c, err := j.js.CreateConsumer(j.ctx, benchStream, jetstream.ConsumerConfig{
		Durable: "raw", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: deepAckPending,
	})
	if err != nil {
		return err
	}
	if err := j.start(); err != nil {
		return err
	}
	for left := j.n; left > 0; {
		batch, err := c.Fetch(batchSize, jetstream.FetchMaxWait(50*time.Millisecond))
		if err != nil {
			return err
		}
		var ms []jetstream.Msg
		for m := range batch.Messages() {
			ms = append(ms, m)
		}
		if len(ms) == 0 {
			continue
		}
		j.insert(len(ms))
		for _, m := range ms {
			_ = m.Ack() // before the last row, which ends the run
			j.handleRow(m.Data())
		}
		left -= len(ms)
	}
	return j.finish()
}

// push consumes by a push consumer with flow control, in place of pulls: the most that a
// client can get out of the server. With ackAll one acknowledgement settles all before it.
func push(ackAll bool) func(*job) error {
	return func(j *job) error {
		cfg := jetstream.ConsumerConfig{
			Durable: "push", DeliverSubject: j.nc.NewInbox(), AckPolicy: jetstream.AckExplicitPolicy,
			MaxAckPending: deepAckPending, FlowControl: true, IdleHeartbeat: 5 * time.Second,
		}
		if ackAll {
			cfg.AckPolicy = jetstream.AckAllPolicy
		}
		if err := j.start(); err != nil {
			return err
		}
		handled := 0
		sub, err := j.nc.Subscribe(cfg.DeliverSubject, func(m *nats.Msg) {
			switch {
			case m.Header.Get("Status") != "" && m.Reply != "": // flow control
				_ = m.Respond(nil)
			case m.Header.Get("Status") != "":
			default:
				if handled++; !ackAll || handled%100 == 0 || handled == j.n {
					_ = j.nc.Publish(m.Reply, ackBody)
				}
				j.handle(m.Data)
			}
		})
		if err != nil {
			return err
		}
		if err := sub.SetPendingLimits(-1, -1); err != nil {
			return err
		}
		if _, err := j.js.CreatePushConsumer(j.ctx, benchStream, cfg); err != nil {
			return err
		}
		if err := j.finish(); err != nil {
			return err
		}
		return sub.Unsubscribe()
	}
}
