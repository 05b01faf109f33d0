package main

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/natsx/natsx"
)

// quiet logs only warnings and errors.
var quiet = natsx.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))

// natsxConsume is a route as a service would have it, with retries, a dead
// letter queue and the pool.
func natsxConsume(j *job) error {
	broker := natsx.NewBroker(j.nc, natsx.WithWorkers(workers), quiet)
	route := natsx.Route(benchSubject).Stream(benchStream).Durable("natsx").
		Retry(5).Backoff(time.Second, time.Minute).DLQ(dlqSubject).
		Handle(func(_ context.Context, m *natsx.Msg) error {
			j.handle(m.Data)
			return nil
		})
	if err := j.start(); err != nil {
		return err
	}
	return natsxRun(j, broker, j.finish, route)
}

// natsxRun runs the routes until fn has returned, which it calls once they
// receive.
func natsxRun(j *job, broker *natsx.Broker, fn func() error, routes ...natsx.Spec) error {
	ctx, cancel := context.WithCancel(j.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		err := broker.Run(ctx, routes...)
		if err != nil {
			j.fail(err)
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		return err
	case <-broker.Ready():
	}
	if err := fn(); err != nil {
		return err
	}
	cancel()
	return <-ended
}

func natsxPublish(j *job) error {
	pub := natsx.NewPublisher(j.nc)
	return j.publish(func(payload []byte) error {
		for range j.n {
			if _, err := pub.Publish(j.ctx, natsx.To(benchSubject).Data(payload)); err != nil {
				return err
			}
		}
		return nil
	})
}

// natsxPublishAll publishes 10,000 envelopes per call, and makes them within the measured
// time.
func natsxPublishAll(opts ...natsx.PublisherOption) func(*job) error {
	return func(j *job) error {
		pub := natsx.NewPublisher(j.nc, opts...)
		return j.publish(func(payload []byte) error {
			es := make([]natsx.Envelope, 0, 10_000)
			for left := j.n; left > 0; left -= len(es) {
				es = es[:0]
				for range min(left, cap(es)) {
					es = append(es, natsx.To(benchSubject).Data(payload))
				}
				if _, err := pub.PublishAll(j.ctx, es...); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// natsxRequests has a natsx route answer, on a connection of its own, what
// nats.go or natsx requests.
func natsxRequests(requesters int, request func(*job) func([]byte) ([]byte, error)) func(*job) error {
	return func(j *job) error {
		nc, err := connect(j.url)
		if err != nil {
			return err
		}
		defer nc.Close()
		return natsxRun(j, natsx.NewBroker(nc, natsx.WithWorkers(workers), quiet),
			func() error { return j.requests(requesters, request(j)) },
			natsx.Route(requestSubject).Queue("q").Reply(
				func(_ context.Context, m *natsx.Msg) ([]byte, error) { return m.Data, nil }))
	}
}

func natsRequester(j *job) func([]byte) ([]byte, error) { return j.natsRequest }

// natsxRequester requests without a deadline of its own, which then is not told.
func natsxRequester(j *job) func([]byte) ([]byte, error) {
	return natsxRequest(j, context.WithoutCancel(j.ctx))
}

// natsxDeadlineRequester tells the responder a deadline, in a header.
func natsxDeadlineRequester(j *job) func([]byte) ([]byte, error) {
	return natsxRequest(j, j.ctx)
}

func natsxRequest(j *job, ctx context.Context) func([]byte) ([]byte, error) {
	pub := natsx.NewPublisher(j.nc)
	return func(payload []byte) ([]byte, error) {
		m, err := pub.Request(ctx, natsx.To(requestSubject).Data(payload))
		if err != nil {
			return nil, err
		}
		return m.Data, nil
	}
}
