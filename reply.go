package natsx

import (
	"context"
	"errors"
	"net/http"
	"strconv"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

// replyFor returns the error to send for err, which is not nil. internal reports that it
// does not contain err's text, so that err must be logged.
func replyFor(err error) (reply *ReplyError, internal bool) {
	if reply, ok := errors.AsType[*ReplyError](err); ok {
		return reply, false
	}
	if undecodable, ok := errors.AsType[*DecodeError](err); ok {
		if large, ok := errors.AsType[*tooLargeError](undecodable); ok {
			return &ReplyError{Code: http.StatusRequestEntityTooLarge, Message: "request is larger than " + strconv.Itoa(large.most) + " bytes"}, false
		}
		return &ReplyError{Code: http.StatusBadRequest, Message: "request does not decode as " + undecodable.ContentType}, false
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &ReplyError{Code: http.StatusGatewayTimeout, Message: "timeout"}, true
	}
	return &ReplyError{Code: http.StatusInternalServerError, Message: "internal error"}, true
}

// answer returns the reply for a responder's result. With an internal error it leaves out
// the responder's payload and headers.
func answer(data []byte, hdr nats.Header, err error) (payload []byte, header nats.Header, internal bool) {
	if err == nil {
		// Clients treat a Status header without a payload as a status message of the
		// server, such as 503 for no responders.
		if len(data) == 0 && len(hdr["Status"]) > 0 {
			hdr = cloneHeader(hdr)
			delete(hdr, "Status")
		}
		return data, hdr, false
	}
	reply, internal := replyFor(err)
	if is[*ReplyError](err) {
		header = cloneHeader(hdr)
		for name, values := range reply.Header {
			header[name] = values
		}
		if reply.Data != nil {
			data = reply.Data
		}
		delete(header, "Status")
	} else {
		data, header = nil, make(nats.Header, 2)
	}
	message := reply.Message
	if message == "" {
		message = "error"
	}
	header[micro.ErrorCodeHeader] = []string{reply.code()}
	header[micro.ErrorHeader] = []string{message}
	return data, header, internal
}

func cloneHeader(h nats.Header) nats.Header {
	c := make(nats.Header, len(h)+2)
	for k, v := range h {
		c[k] = v
	}
	return c
}
