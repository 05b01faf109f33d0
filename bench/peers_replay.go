package main

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// orderedConsumer reads the stream once, in order, with nats.go.
func orderedConsumer(j *job) error {
	c, err := j.js.OrderedConsumer(j.ctx, benchStream, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	if err := j.start(); err != nil {
		return err
	}
	cc, err := c.Consume(func(m jetstream.Msg) { j.handle(m.Data()) })
	if err != nil {
		return err
	}
	defer cc.Stop()
	return j.finish()
}

// natsxReplay replays the stream once, with the pool and a progress function.
func natsxReplay(filter string) func(*job) error {
	return func(j *job) error {
		broker := natsx.NewBroker(j.nc, natsx.WithWorkers(workers))
		var told natsx.ReplayProgress
		replay := natsx.Replay(filter).Stream(benchStream).Handle(func(_ context.Context, m *natsx.Msg) error {
			j.handle(m.Data)
			return nil
		}).Progress(func(p natsx.ReplayProgress) { told = p })
		if err := j.start(); err != nil {
			return err
		}
		report, err := broker.Replay(j.ctx, replay)
		if err != nil {
			return err
		}
		if n := uint64(j.n); report.Handled != n || told.Done != n || told.Total != n {
			return fmt.Errorf("replayed %d of %d messages, told %d of %d", report.Handled, n, told.Done, told.Total)
		}
		return j.finish()
	}
}
