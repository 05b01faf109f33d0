package natsx

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// parseAck reads a stream's answer to a publish: an ack, a refusal as
// [*jetstream.APIError] with an Ack that names the stream, or [ErrBadAck]. last is the
// stream of an earlier ack: the same name is not allocated again.
func parseAck(data []byte, last string) (Ack, error) {
	if ack, ok := parsePlainAck(data, last); ok {
		return ack, nil
	}
	var r struct {
		Error     *jetstream.APIError `json:"error"`
		Stream    string              `json:"stream"`
		Sequence  uint64              `json:"seq"`
		Duplicate bool                `json:"duplicate"`
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return Ack{}, failure(fmt.Sprintf("the answer %q is not an ack of a stream", cut(data, 64)), ErrBadAck)
	}
	if r.Error != nil {
		return Ack{Stream: r.Stream}, r.Error
	}
	if r.Stream == "" {
		return Ack{}, failure(fmt.Sprintf("the answer %q names no stream", cut(data, 64)), ErrBadAck)
	}
	return Ack{Stream: r.Stream, Sequence: r.Sequence, Duplicate: r.Duplicate}, nil
}

// parsePlainAck reads {"stream":"S","seq":1}, which almost every ack is, without
// a JSON decoder. Whatever else it leaves to that.
func parsePlainAck(data []byte, last string) (Ack, bool) {
	rest, ok := bytes.CutPrefix(data, []byte(`{"stream":"`))
	if !ok {
		return Ack{}, false
	}
	end := bytes.IndexByte(rest, '"')
	if end <= 0 {
		return Ack{}, false
	}
	name := rest[:end]
	for _, c := range name {
		if c == '\\' || c < ' ' || c >= 0x7f {
			return Ack{}, false
		}
	}
	rest, ok = bytes.CutPrefix(rest[end:], []byte(`","seq":`))
	if !ok || len(rest) < 2 || len(rest) > 20 || rest[len(rest)-1] != '}' || rest[0] == '0' && len(rest) > 2 {
		return Ack{}, false
	}
	var seq uint64
	for _, c := range rest[:len(rest)-1] {
		if c < '0' || c > '9' {
			return Ack{}, false
		}
		seq = seq*10 + uint64(c-'0')
	}
	if string(name) != last {
		last = string(name)
	}
	return Ack{Stream: last, Sequence: seq}, true
}

func cut(b []byte, n int) []byte { return b[:min(len(b), n)] }
