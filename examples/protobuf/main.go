// Protobuf has handlers and requests whose payloads are Protocol Buffers. It is a module
// of its own, so that natsx does not depend on them. order.pb.go is generated from
// order.proto.
//
// It starts a nats-server of its own, or uses that of NATS_URL, and ends by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

// codec is Protocol Buffers as a [natsx.Codec], for the generated pointer types: a handler
// is func(context.Context, *Order) error.
type codec struct{}

func (codec) Marshal(v any) ([]byte, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no Protocol Buffers message", v)
	}
	return proto.Marshal(m)
}

// Unmarshal decodes into a message, or into a pointer to one, which it then makes.
func (codec) Unmarshal(data []byte, v any) error {
	if m, ok := v.(proto.Message); ok {
		return proto.Unmarshal(data, m)
	}
	if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer && p.Elem().Kind() == reflect.Pointer {
		p.Elem().Set(reflect.New(p.Type().Elem().Elem()))
		if m, ok := p.Elem().Interface().(proto.Message); ok {
			return proto.Unmarshal(data, m)
		}
	}
	return fmt.Errorf("%T is no Protocol Buffers message", v)
}

func (codec) ContentType() string { return "application/protobuf" }

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "protobuf:", err)
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
	nc, err := natsx.Connect(url, nats.Name("natsx protobuf"))
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()

	handled := make(chan string, 1)
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		natsx.Stream("PROTOBUF_ORDERS").Subjects("protobuf.orders.*").MaxAge(time.Hour),
		natsx.Stream("PROTOBUF_DLQ").Subjects("protobuf.dlq").MaxAge(time.Hour),
	))
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running,
			natsx.Route("protobuf.orders.*").Durable("protobuf-billing").DeliverNew().DLQ("protobuf.dlq").
				Handle(natsx.Decode(codec{}, func(_ context.Context, o *Order) error {
					handled <- fmt.Sprintf("handled  %s %d cents", o.GetId(), o.GetCents())
					return nil
				})),
			natsx.Route("protobuf.prices").Queue("pricing").
				Reply(natsx.DecodeReply(codec{}, func(_ context.Context, q *PriceRequest) (*Price, error) {
					if q.GetItem() != "coffee" {
						return nil, natsx.Fail(404, "no such item")
					}
					return &Price{Cents: 290}, nil
				})),
			natsx.Route("protobuf.dlq").Durable("protobuf-alerts").DeliverNew().
				Handle(natsx.OnDeadLetter(func(_ context.Context, l natsx.DeadLetter) error {
					handled <- fmt.Sprintf("dead     %s", l.Reason)
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

// talk publishes and requests, and says what it gets.
func talk(ctx context.Context, pub *natsx.Publisher, handled <-chan string) error {
	for _, e := range []natsx.Envelope{
		natsx.To("protobuf.orders.placed").Encode(codec{}, &Order{Id: "o-1", Cents: 990}),
		natsx.To("protobuf.orders.placed").JSON("no Protocol Buffers"),
	} {
		if _, err := pub.Publish(ctx, e); err != nil {
			return err
		}
		select {
		case line := <-handled:
			fmt.Println(line)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for _, item := range []string{"coffee", "unicorn"} {
		answer, err := pub.Request(ctx, natsx.To("protobuf.prices").Encode(codec{}, &PriceRequest{Item: item}))
		var refused *natsx.ReplyError
		if errors.As(err, &refused) {
			fmt.Printf("answer   %d %s\n", refused.Code, refused.Message)
			continue
		}
		if err != nil {
			return err
		}
		var p Price
		if err := (codec{}).Unmarshal(answer.Data, &p); err != nil {
			return err
		}
		fmt.Printf("answer   %d cents as %s\n", p.GetCents(), answer.Header.Get("Content-Type"))
	}
	return nil
}
