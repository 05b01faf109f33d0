package natsx

import (
	"context"
	"encoding/json"
)

// Codec turns values into payloads and back. A codec is used by many goroutines
// at once and must be safe for that.
type Codec interface {
	// Marshal encodes v.
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, which is a pointer.
	Unmarshal(data []byte, v any) error
	// ContentType is the media type that a publisher puts into the
	// Content-Type header, such as "application/json".
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

// JSON adapts a typed function to a [Handler]. A payload that is not JSON of T
// is a permanent failure ([*DecodeError]): retrying cannot mend it. The message
// itself is found with [MsgFrom].
func JSON[T any](fn func(context.Context, T) error) Handler {
	return Decode(JSONCodec{}, fn)
}

// Decode is [JSON] with another codec. It returns nil, which a route's
// validation refuses as [ErrNoHandler], when codec or fn is nil.
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

// JSONReply adapts a typed function to a [Responder]. A request that is not JSON
// of Req is answered with code 400.
func JSONReply[Req, Resp any](fn func(context.Context, Req) (Resp, error)) Responder {
	return DecodeReply(JSONCodec{}, fn)
}

// DecodeReply is [JSONReply] with another codec, used for both directions.
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
	if err := codec.Unmarshal(m.Data, &v); err != nil {
		return v, &DecodeError{Subject: m.Subject, ContentType: codec.ContentType(), Err: err}
	}
	return v, nil
}
