package main

import (
	"context"
	"time"

	"github.com/natsx/natsx"
)

// natsxConsume is a route as a service would have it, with retries, a dead
// letter queue and the pool.
func natsxConsume(j *job) error {
	broker := natsx.NewBroker(j.nc, natsx.WithWorkers(workers))
	route := natsx.Route(benchSubject).Stream(benchStream).Durable("natsx").
		Retry(5).Backoff(time.Second, time.Minute).DLQ(dlqSubject).
		Handle(func(context.Context, *natsx.Msg) error {
			j.handle()
			return nil
		})
	if err := j.start(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(j.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- broker.Run(ctx, route) }()
	select {
	case err := <-ended:
		return err
	case <-j.done:
	}
	if err := j.finish(); err != nil {
		return err
	}
	cancel()
	return <-ended
}
