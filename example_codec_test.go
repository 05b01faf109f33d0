package natsx_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"time"

	"github.com/natsx/natsx"
)

// gobCodec is a codec over another encoding. One over MessagePack is in
// examples/msgpack.
type gobCodec struct{}

func (gobCodec) Marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(v)
	return b.Bytes(), err
}

func (gobCodec) Unmarshal(data []byte, v any) error {
	return gob.NewDecoder(bytes.NewReader(data)).Decode(v)
}

func (gobCodec) ContentType() string { return "application/x-gob" }

// An own codec serves both directions, here with a limit of 1 KiB for decoding.
func ExampleCodec() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet)
	codec := natsx.LimitCodec(gobCodec{}, 1<<10)
	go func() {
		defer cancel()
		<-broker.Ready()
		pub := natsx.NewPublisher(nc)
		answer, err := pub.Request(ctx, natsx.To("price").Encode(codec, Order{ID: "o-1"}))
		if err != nil {
			fmt.Println(err)
			return
		}
		var priced Order
		err = codec.Unmarshal(answer.Data, &priced)
		fmt.Println(priced.Cents, answer.Header.Get("Content-Type"), err)

		_, err = pub.Request(ctx, natsx.To("price").Data(make([]byte, 2<<10)))
		var reply *natsx.ReplyError
		fmt.Println(errors.As(err, &reply), err)
	}()
	err := broker.Run(ctx, natsx.Route("price").Reply(natsx.DecodeReply(codec,
		func(ctx context.Context, o Order) (Order, error) {
			o.Cents = 990
			return o, nil
		})))
	fmt.Println("stopped:", err)

	// Output:
	// 990 application/x-gob <nil>
	// true natsx: reply error 413: request is larger than 1024 bytes
	// stopped: <nil>
}
