// Cloudevents has handlers of CloudEvents (cloudevents.io), in the structured mode of the
// NATS binding: the payload is the event in JSON. It is a module of its own, so that natsx
// does not depend on the CloudEvents SDK.
//
// It starts a nats-server of its own, or uses that of NATS_URL, and ends by itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

// codec is a structured CloudEvent as a [natsx.Codec]. What is no valid event is refused
// in both directions: the handler never sees one, and its message is dead at once.
type codec struct{}

func (codec) Marshal(v any) ([]byte, error) {
	e, ok := v.(event.Event)
	if !ok {
		return nil, fmt.Errorf("%T is no CloudEvent", v)
	}
	if err := e.Validate(); err != nil {
		return nil, err
	}
	return json.Marshal(e)
}

func (codec) Unmarshal(data []byte, v any) error {
	e, ok := v.(*event.Event)
	if !ok {
		return fmt.Errorf("%T is no CloudEvent", v)
	}
	if err := json.Unmarshal(data, e); err != nil {
		return err
	}
	return e.Validate()
}

func (codec) ContentType() string { return event.ApplicationCloudEventsJSON }

// toEvent is an envelope of an event. Source and id identify it, so that they are the
// message id: publishing it again is harmless.
func toEvent(subject string, e event.Event) natsx.Envelope {
	return natsx.To(subject).MsgID(e.Source()+"#"+e.ID()).Encode(codec{}, e)
}

type order struct {
	ID    string `json:"id"`
	Cents int    `json:"cents"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "cloudevents:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	url := os.Getenv("NATS_URL")
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
	}
	nc, err := natsx.Connect(url, nats.Name("natsx cloudevents"))
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()

	handled := make(chan string, 1)
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		natsx.Stream("CLOUDEVENTS").Subjects("cloudevents.orders.*").MaxAge(time.Hour),
		natsx.Stream("CLOUDEVENTS_DLQ").Subjects("cloudevents.dlq").MaxAge(time.Hour),
	))
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running,
			natsx.Route("cloudevents.orders.*").Durable("cloudevents-billing").DeliverNew().DLQ("cloudevents.dlq").
				Handle(natsx.Decode(codec{}, func(_ context.Context, e event.Event) error {
					var o order
					if err := e.DataAs(&o); err != nil {
						return natsx.Permanent(err)
					}
					handled <- fmt.Sprintf("%s from %s: %s, %d cents", e.Type(), e.Source(), o.ID, o.Cents)
					return nil
				})),
			natsx.Route("cloudevents.dlq").Durable("cloudevents-alerts").DeliverNew().
				Handle(natsx.OnDeadLetter(func(_ context.Context, l natsx.DeadLetter) error {
					handled <- fmt.Sprintf("dead: %s", l.Reason)
					return nil
				})),
		)
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return err
	}
	err = talk(ctx, natsx.NewPublisher(nc), handled)
	stop()
	return errors.Join(err, <-stopped)
}

// talk publishes events and says what becomes of them.
func talk(ctx context.Context, pub *natsx.Publisher, handled <-chan string) error {
	next := func() error {
		select {
		case line := <-handled:
			fmt.Println(line)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	e := event.New()
	e.SetID(fmt.Sprint("e-", time.Now().UnixNano()))
	e.SetSource("/shop/berlin")
	e.SetType("com.example.order.placed")
	e.SetTime(time.Now())
	if err := e.SetData(event.ApplicationJSON, order{"o-1", 990}); err != nil {
		return err
	}
	for range 2 { // the second time it is stored already
		ack, err := pub.Publish(ctx, toEvent("cloudevents.orders.placed", e))
		if err != nil {
			return err
		}
		fmt.Println("published, stored before:", ack.Duplicate)
	}
	if err := next(); err != nil {
		return err
	}

	e.SetType("") // required
	_, err := pub.Publish(ctx, toEvent("cloudevents.orders.placed", e))
	fmt.Println("not published:", err != nil)
	if _, err := pub.Publish(ctx, natsx.To("cloudevents.orders.placed").JSON(order{"o-2", 450})); err != nil { // no event
		return err
	}
	return next()
}
