package main

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// A router consumes by one durable for each of the subjects, until watch has
// returned, which it calls once they all receive.
type router func(j *job, subjects []string, watch func() error) error

func routeName(route int) string { return fmt.Sprint("route-", route) }

// consumeRoutes is Consume with its defaults, one after another.
func consumeRoutes(j *job, subjects []string, watch func() error) error {
	for i, subject := range subjects {
		c, err := j.js.CreateConsumer(j.ctx, benchStream, jetstream.ConsumerConfig{
			Durable: routeName(i), FilterSubject: subject, AckPolicy: jetstream.AckExplicitPolicy,
		})
		if err != nil {
			return err
		}
		cc, err := c.Consume(func(m jetstream.Msg) {
			_ = m.Ack()
			j.handleRoute(i, m.Data())
		})
		if err != nil {
			return err
		}
		defer cc.Stop()
	}
	if err := j.nc.Flush(); err != nil {
		return err
	}
	return watch()
}

// natsxRoutes is a broker with its defaults.
func natsxRoutes(j *job, subjects []string, watch func() error) error {
	routes := make([]natsx.Spec, len(subjects))
	for i, subject := range subjects {
		routes[i] = natsx.Route(subject).Stream(benchStream).Durable(routeName(i)).
			Handle(func(_ context.Context, m *natsx.Msg) error {
				j.handleRoute(i, m.Data)
				return nil
			})
	}
	return natsxRun(j, natsx.NewBroker(j.nc, quiet), watch, routes...)
}

// backlog has each of so many durables handle all of the stream.
func backlog(run router, routes int) func(*job) error {
	return func(j *job) error {
		for range routes - 1 {
			j.seen = append(j.seen, make([]atomic.Bool, j.n))
		}
		j.n *= routes
		subjects := make([]string, routes)
		for i := range subjects {
			subjects[i] = benchSubject
		}
		if err := j.start(); err != nil {
			return err
		}
		return run(j, subjects, j.finish)
	}
}
