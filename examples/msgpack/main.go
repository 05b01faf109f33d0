// Msgpack has handlers and requests with MessagePack payloads. It is a separate module, so
// that natsx does not depend on the encoding; a codec for Protocol Buffers looks the same.
//
// It starts a nats-server, or uses that of NATS_URL, and ends by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

// codec is MessagePack as a [natsx.Codec]. It decodes up to 64 KiB, since this service
// needs no larger messages.
var codec = natsx.LimitCodec(msgpackCodec{}, 64<<10)

type msgpackCodec struct{}

func (msgpackCodec) Marshal(v any) ([]byte, error)      { return msgpack.Marshal(v) }
func (msgpackCodec) Unmarshal(data []byte, v any) error { return msgpack.Unmarshal(data, v) }
func (msgpackCodec) ContentType() string                { return "application/vnd.msgpack" }

type reading struct {
	Sensor  string    `msgpack:"sensor"`
	Celsius float64   `msgpack:"celsius"`
	At      time.Time `msgpack:"at"`
}

type query struct {
	Sensor string `msgpack:"sensor"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "msgpack:", err)
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
	nc, err := natsx.Connect(url, nats.Name("natsx msgpack"))
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()

	stored := make(chan reading, 1)
	broker := natsx.NewBroker(nc,
		natsx.WithLogger(slog.New(slog.DiscardHandler)),
		natsx.WithStreams(
			natsx.Stream("MSGPACK_READINGS").Subjects("msgpack.readings.*").MaxAge(time.Hour),
			natsx.Stream("MSGPACK_DLQ").Subjects("msgpack.dlq").MaxAge(time.Hour),
		))
	letters := make(chan natsx.DeadLetter, 1)
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running,
			natsx.Route("msgpack.readings.*").Durable("msgpack-store").DLQ("msgpack.dlq").
				Handle(natsx.Decode(codec, func(_ context.Context, r reading) error {
					stored <- r
					return nil
				})),
			natsx.Route("msgpack.latest").Queue("latest").
				Reply(natsx.DecodeReply(codec, func(_ context.Context, q query) (reading, error) {
					if q.Sensor != "roof" {
						return reading{}, natsx.Fail(404, "no such sensor")
					}
					return reading{Sensor: q.Sensor, Celsius: -3.5, At: time.Unix(1700000000, 0)}, nil
				})),
			natsx.Route("msgpack.dlq").Durable("msgpack-alerts").
				Handle(natsx.OnDeadLetter(func(_ context.Context, l natsx.DeadLetter) error {
					letters <- l
					return nil
				})),
		)
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return err
	}
	err = talk(ctx, natsx.NewPublisher(nc), stored, letters)
	stop()
	return errors.Join(err, <-stopped)
}

// talk publishes and requests, and prints the results.
func talk(ctx context.Context, pub *natsx.Publisher, stored <-chan reading, letters <-chan natsx.DeadLetter) error {
	at := time.Unix(1700000000, 0).UTC()
	if _, err := pub.Publish(ctx, natsx.To("msgpack.readings.roof").Encode(codec, reading{"roof", -3.5, at})); err != nil {
		return err
	}
	select {
	case r := <-stored:
		fmt.Printf("stored   %s %.1f °C at %s\n", r.Sensor, r.Celsius, r.At.UTC().Format(time.DateTime))
	case <-ctx.Done():
		return ctx.Err()
	}

	if _, err := pub.Publish(ctx, natsx.To("msgpack.readings.roof").JSON("not MessagePack")); err != nil {
		return err
	}
	select {
	case l := <-letters:
		fmt.Printf("dead     %s after %d attempt\n", l.Reason, l.Attempts)
	case <-ctx.Done():
		return ctx.Err()
	}

	for _, sensor := range []string{"roof", "cellar"} {
		answer, err := pub.Request(ctx, natsx.To("msgpack.latest").Encode(codec, query{sensor}))
		var refused *natsx.ReplyError
		if errors.As(err, &refused) {
			fmt.Printf("answer   %d %s\n", refused.Code, refused.Message)
			continue
		}
		if err != nil {
			return err
		}
		var r reading
		if err := codec.Unmarshal(answer.Data, &r); err != nil {
			return err
		}
		fmt.Printf("answer   %s %.1f °C as %s\n", r.Sensor, r.Celsius, answer.Header.Get("Content-Type"))
	}
	return nil
}
