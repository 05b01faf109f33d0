package main

import (
	"github.com/nats-io/nats.go/jetstream"
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
	cc, err := c.Consume(func(jetstream.Msg) { j.handle() })
	if err != nil {
		return err
	}
	defer cc.Stop()
	return j.finish()
}
