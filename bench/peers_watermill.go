package main

import (
	"context"

	"github.com/ThreeDotsLabs/watermill"
	wmjs "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/jetstream"
	wmnats "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/nats"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// watermillJetStream is watermill-nats' newer package, over Consume. By default
// it confirms each ack.
func watermillJetStream(ackAsync bool) func(*job) error {
	return func(j *job) error {
		sub, err := wmjs.NewSubscriber(wmjs.SubscriberConfig{
			Conn: j.nc, Logger: watermill.NopLogger{}, AckAsync: ackAsync,
			ResourceInitializer: func(ctx context.Context, js jetstream.JetStream, _ string) (
				jetstream.Consumer, func(context.Context, watermill.LoggerAdapter), error) {
				c, err := js.CreateConsumer(ctx, benchStream, jetstream.ConsumerConfig{
					Durable: "watermill", AckPolicy: jetstream.AckExplicitPolicy,
				})
				return c, nil, err
			},
		})
		if err != nil {
			return err
		}
		return watermillRun(j, sub)
	}
}

// watermillNATS is its older package, over a push consumer.
func watermillNATS(ackAsync bool) func(*job) error {
	return func(j *job) error {
		sub, err := wmnats.NewSubscriberWithNatsConn(j.nc, wmnats.SubscriberSubscriptionConfig{
			QueueGroupPrefix: "watermill",
			JetStream: wmnats.JetStreamConfig{
				DurablePrefix: "watermill", AckAsync: ackAsync,
				SubscribeOptions: []nats.SubOpt{nats.ManualAck(), nats.AckExplicit(), nats.DeliverAll()},
			},
		}, watermill.NopLogger{})
		if err != nil {
			return err
		}
		return watermillRun(j, sub)
	}
}

// watermillRun leaves the subscription to the end of the process. Closing the
// subscriber would drain the connection that the figures are still read over, and
// the end of its context closes the channel that it may be sending to.
func watermillRun(j *job, sub message.Subscriber) error {
	if err := j.start(); err != nil {
		return err
	}
	messages, err := sub.Subscribe(context.WithoutCancel(j.ctx), benchSubject)
	if err != nil {
		return err
	}
	go func() {
		for m := range messages {
			m.Ack()
			j.handle(m.Payload)
		}
	}()
	return j.finish()
}
