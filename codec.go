package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// Codec encodes values as payloads and decodes them. It must be safe for concurrent use.
//
// A typed handler decodes every message, even if its Content-Type header is missing or
// different: nats.go and most other clients send none. A handler that accepts several
// types reads the header of [MsgFrom].
type Codec interface {
	// Marshal encodes v.
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, which is a pointer.
	Unmarshal(data []byte, v any) error
	// ContentType returns the media type for the Content-Type header, such as
	// "application/json".
	ContentType() string
}

// JSONCodec is encoding/json as a [Codec].
type JSONCodec struct{}

// Marshal is [json.Marshal].
func (JSONCodec) Marshal(v any) ([]byte, error) { return json.Marshal(v) }

// Unmarshal is [json.Unmarshal].
func (JSONCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// ContentType is "application/json".
func (JSONCodec) ContentType() string { return "application/json" }

// LimitCodec returns codec with a limit of most bytes for payloads to decode. A larger
// one is a [*DecodeError] that wraps [ErrTooLarge], and a request with it is answered with
// code 413. Without LimitCodec the limit is the server's max payload, 1 MiB by default.
// Encoding is not limited. It returns nil, which a route's validation reports as
// [ErrNoHandler], if codec is nil or most is below 1.
func LimitCodec(codec Codec, most int) Codec {
	if codec == nil || most < 1 {
		return nil
	}
	return limitedCodec{codec, most}
}

type limitedCodec struct {
	Codec
	most int
}

func (c limitedCodec) Unmarshal(data []byte, v any) error {
	if len(data) > c.most {
		return &tooLargeError{size: len(data), most: c.most}
	}
	return c.Codec.Unmarshal(data, v)
}

// JSON adapts a typed function to a [Handler]. A payload that [json.Unmarshal] cannot
// decode into a T, also an empty one, is a permanent failure ([*DecodeError]); unknown
// fields are ignored. fn's error is the handler's. [MsgFrom] returns the message. If fn is
// nil, JSON returns nil; see [Decode].
func JSON[T any](fn func(context.Context, T) error) Handler {
	return Decode(JSONCodec{}, fn)
}

// Decode is [JSON] with another codec: an error of its Unmarshal becomes a
// [*DecodeError]. It returns nil, which the validation of a route or replay reports as
// [ErrNoHandler], if codec or fn is nil.
func Decode[T any](codec Codec, fn func(context.Context, T) error) Handler {
	if codec == nil || fn == nil {
		return nil
	}
	return func(ctx context.Context, m *Msg) error {
		v, err := decode[T](codec, m)
		if err != nil {
			return err
		}
		return fn(ctx, v)
	}
}

// JSONBatch adapts a typed function to a [BatchHandler]. A payload that [json.Unmarshal]
// cannot decode into a T is a permanent failure of its message only. The function gets the
// other values in order, and is not called if there are none. The indexes of its
// [BatchError] are those of the values that it got. If fn is nil, JSONBatch returns nil;
// see [DecodeBatch].
func JSONBatch[T any](fn func(context.Context, []T) error) BatchHandler {
	return DecodeBatch(JSONCodec{}, fn)
}

// DecodeBatch is [JSONBatch] with another codec. It returns nil, which a route's
// validation reports as [ErrNoHandler], if codec or fn is nil.
func DecodeBatch[T any](codec Codec, fn func(context.Context, []T) error) BatchHandler {
	if codec == nil || fn == nil {
		return nil
	}
	return func(ctx context.Context, ms []*Msg) error {
		results := BatchError{}
		values := make([]T, 0, len(ms))
		from := make([]int, 0, len(ms)) // of each value: the index of its message
		for i, m := range ms {
			v, err := decode[T](codec, m)
			if err != nil {
				results[i] = err
				continue
			}
			values, from = append(values, v), append(from, i)
		}
		if len(values) == 0 {
			return results
		}
		err := fn(ctx, values)
		if len(results) == 0 {
			return err
		}
		each, _ := batchResults(err, len(values))
		for k, err := range each {
			results[from[k]] = err
		}
		return results
	}
}

// JSONReply adapts a typed function to a [Responder]. A request that [json.Unmarshal]
// cannot decode into a Req, also an empty one, is answered with code 400, and a result
// that cannot be encoded with 500. fn's error is the responder's: see [Fail]. An answer
// has the Content-Type application/json. If fn is nil, JSONReply returns nil; see
// [DecodeReply].
func JSONReply[Req, Resp any](fn func(context.Context, Req) (Resp, error)) Responder {
	return DecodeReply(JSONCodec{}, fn)
}

// DecodeReply is [JSONReply] with another codec for both directions; the answer's
// Content-Type header is the codec's. A request above the limit of a [LimitCodec] is
// answered with code 413. It returns nil, which a route's validation reports as
// [ErrNoHandler], if codec or fn is nil.
func DecodeReply[Req, Resp any](codec Codec, fn func(context.Context, Req) (Resp, error)) Responder {
	if codec == nil || fn == nil {
		return nil
	}
	return func(ctx context.Context, m *Msg) ([]byte, error) {
		req, err := decode[Req](codec, m)
		if err != nil {
			return nil, err
		}
		resp, err := fn(ctx, req)
		if err != nil {
			return nil, err
		}
		data, err := codec.Marshal(resp)
		if err != nil {
			return nil, err
		}
		m.ReplyHeader().Set("Content-Type", codec.ContentType())
		return data, nil
	}
}

func decode[T any](codec Codec, m *Msg) (T, error) {
	var v T
	if m == nil { // as in a unit test
		m = &Msg{}
	}
	if err := codec.Unmarshal(m.Data, &v); err != nil {
		return v, &DecodeError{Subject: m.Subject, ContentType: codec.ContentType(), Err: err}
	}
	return v, nil
}

// batchResults is the result of each of n messages of a batch whose handler returned err,
// nil when all succeeded, and the result of the whole: nil when any succeeded.
func batchResults(err error, n int) (each []error, whole error) {
	if err == nil {
		return nil, nil
	}
	each = make([]error, n)
	one, ok := errors.AsType[BatchError](err)
	for i := range one {
		if i < 0 || i >= n {
			err = failure(fmt.Sprintf("BatchError has an index %d in a batch of %d: %s", i, n, cause(err)), err)
			ok = false
			break
		}
	}
	if !ok {
		for i := range each {
			each[i] = err
		}
		return each, err
	}
	failed := 0
	for i, err := range one {
		if each[i] = err; err != nil {
			failed++
		}
	}
	if failed < n {
		err = nil
	}
	return each, err
}
