package natsx

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/nats-io/nats.go"
)

type testOrder struct {
	ID    string
	Total int
}

// xmlCodec is a codec other than the built-in one.
type xmlCodec struct{}

func (xmlCodec) Marshal(v any) ([]byte, error)      { return xml.Marshal(v) }
func (xmlCodec) Unmarshal(data []byte, v any) error { return xml.Unmarshal(data, v) }
func (xmlCodec) ContentType() string                { return "application/xml" }

func TestTypedHandlers(t *testing.T) {
	t.Parallel()
	want := testOrder{ID: "o-1", Total: 7}
	for _, tc := range []struct {
		name  string
		codec Codec
		data  string
	}{
		{"JSON", JSONCodec{}, `{"ID":"o-1","Total":7}`},
		{"XML", xmlCodec{}, `<testOrder><ID>o-1</ID><Total>7</Total></testOrder>`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			d := deliveryUnder(t.Context(), Msg{Subject: "orders.new", Data: []byte(tc.data), Header: nats.Header{"K": {"v"}}})
			err := Decode(tc.codec, func(ctx context.Context, got testOrder) error {
				if got != want {
					t.Errorf("decoded %+v, want %+v", got, want)
				}
				if m := MsgFrom(ctx); m != &d.msg || m.Header.Get("K") != "v" {
					t.Errorf("MsgFrom = %+v, want the message", m)
				}
				return fmt.Errorf("handled: %w", io.EOF)
			})(d, &d.msg)
			if !errors.Is(err, io.EOF) || err.Error() != "handled: EOF" {
				t.Errorf("handler = %v, want the function's error as it is", err)
			}

			reply := DecodeReply(tc.codec, func(_ context.Context, got testOrder) (testOrder, error) { return got, nil })
			answer, err := reply(d, &d.msg)
			if err != nil || string(answer) != tc.data {
				t.Errorf("reply = %s, %v, want %s", answer, err, tc.data)
			}
			if got := d.msg.ReplyHeader().Get("Content-Type"); got != tc.codec.ContentType() {
				t.Errorf("content type = %q, want %q", got, tc.codec.ContentType())
			}
		})
	}
}

func TestUndecodable(t *testing.T) {
	t.Parallel()
	handler := JSON(func(context.Context, testOrder) error {
		t.Error("the function ran")
		return nil
	})
	responder := JSONReply(func(context.Context, testOrder) (int, error) {
		t.Error("the function ran")
		return 0, nil
	})
	for _, data := range []string{"", "{", `{"Total":"seven"}`, `[]`, "\xff"} {
		m := &Msg{Subject: "orders.new", Data: []byte(data)}
		_, replyErr := responder(t.Context(), m)
		for _, err := range []error{handler(t.Context(), m), replyErr} {
			var fault *DecodeError
			if !errors.As(err, &fault) || fault.Subject != "orders.new" || fault.ContentType != "application/json" {
				t.Errorf("%q: %v, want a *DecodeError", data, err)
			}
		}
	}
	var syntax *json.SyntaxError
	if err := handler(t.Context(), &Msg{Data: []byte("{")}); !errors.As(err, &syntax) {
		t.Errorf("%v hides the codec's error", err)
	}
}

func TestReplyFailures(t *testing.T) {
	t.Parallel()
	m := &Msg{Data: []byte("1")}
	refuse := JSONReply(func(context.Context, int) (int, error) { return 1, io.EOF })
	if answer, err := refuse(t.Context(), m); err != io.EOF || answer != nil {
		t.Errorf("reply = %q, %v, want the function's error alone", answer, err)
	}
	broken := JSONReply(func(context.Context, int) (chan int, error) { return make(chan int), nil })
	var unsupported *json.UnsupportedTypeError
	if answer, err := broken(t.Context(), m); !errors.As(err, &unsupported) || answer != nil {
		t.Errorf("reply = %q, %v, want the codec's error", answer, err)
	}
	if len(m.ReplyHeader()) != 0 {
		t.Errorf("failed replies left headers %v", m.ReplyHeader())
	}
}

func TestTypedHandlersWithoutAFunction(t *testing.T) {
	t.Parallel()
	if JSON[int](nil) != nil || Decode(nil, func(context.Context, int) error { return nil }) != nil {
		t.Error("a handler of nothing is not nil")
	}
	if JSONReply[int, int](nil) != nil || DecodeReply(nil, func(context.Context, int) (int, error) { return 0, nil }) != nil {
		t.Error("a responder of nothing is not nil")
	}
}

func TestLimitCodec(t *testing.T) {
	t.Parallel()
	limited := LimitCodec(JSONCodec{}, 5)
	if limited.ContentType() != "application/json" {
		t.Errorf("content type %q", limited.ContentType())
	}
	if data, err := limited.Marshal("more than five"); err != nil || string(data) != `"more than five"` {
		t.Errorf("marshal: got %s, %v, want no limit", data, err)
	}
	var handled []string
	h := Decode(limited, func(_ context.Context, s string) error {
		handled = append(handled, s)
		return nil
	})
	for data, want := range map[string]string{
		`"abc"`:  "",
		`"abcd"`: `natsx: decode application/json from "a": payload of 6 bytes is larger than the limit of 5`,
		`abcde`:  `natsx: decode application/json from "a": invalid character 'a' looking for beginning of value`,
	} {
		err := h(t.Context(), &Msg{Subject: "a", Data: []byte(data)})
		var undecodable *DecodeError
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: got %v", data, err)
		case want != "" && (!errors.As(err, &undecodable) || err.Error() != want):
			t.Errorf("%s: got %v, want %s", data, err, want)
		}
		if got := errors.Is(err, ErrTooLarge); got != (len(data) > 5) {
			t.Errorf("%s: ErrTooLarge is %t", data, got)
		}
	}
	if len(handled) != 1 || handled[0] != "abc" {
		t.Errorf("handled %q", handled)
	}
	if LimitCodec(nil, 5) != nil || LimitCodec(JSONCodec{}, 0) != nil {
		t.Error("a limit of nothing must be refused")
	}
	err := Validate(Route("a").Handle(Decode(LimitCodec(JSONCodec{}, -1), func(context.Context, string) error { return nil })))
	if !errors.Is(err, ErrNoHandler) {
		t.Errorf("got %v, want ErrNoHandler", err)
	}
}
