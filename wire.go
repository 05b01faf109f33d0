package natsx

import (
	"errors"
	"math"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// ackInfo is what the reply subject of a delivered message tells.
type ackInfo struct {
	stream      string
	consumer    string
	delivered   uint64
	sequence    uint64
	consumerSeq uint64
	time        int64  // Unix nanoseconds
	pending     uint64 // messages that the consumer had left
}

// parseDelivery reads an ack subject of either form (ADR-15, and the form with domain
// and account hash of the server's js_ack_fc_v2):
//
//	$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>
//	$JS.ACK.<domain>.<hash>.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>[.<more>]
func parseDelivery(reply string) (a ackInfo, ok bool) {
	const prefix = "$JS.ACK."
	if len(reply) <= len(prefix) || reply[:len(prefix)] != prefix {
		return a, false
	}
	var dots [12]int
	n := 0
	for i := len(prefix); i < len(reply); i++ {
		if reply[i] == '.' {
			if n == len(dots) {
				return a, false
			}
			dots[n] = i
			n++
		}
	}
	first := 0 // index of the dot that ends the stream's token
	start := len(prefix)
	switch {
	case n == 6:
	case n >= 8:
		first = 2
		start = dots[1] + 1
	default:
		return a, false
	}
	a.stream = reply[start:dots[first]]
	a.consumer = reply[dots[first]+1 : dots[first+1]]
	var okDelivered, okSeq, okHere, okTime, okPending bool
	a.delivered, okDelivered = parseUint(reply[dots[first+1]+1 : dots[first+2]])
	a.sequence, okSeq = parseUint(reply[dots[first+2]+1 : dots[first+3]])
	a.consumerSeq, okHere = parseUint(reply[dots[first+3]+1 : dots[first+4]])
	var nanos uint64
	nanos, okTime = parseUint(reply[dots[first+4]+1 : dots[first+5]])
	a.time = int64(nanos)
	end := len(reply)
	if n > first+6 {
		end = dots[first+6]
	}
	a.pending, okPending = parseUint(reply[dots[first+5]+1 : end])
	return a, okDelivered && okSeq && okHere && okTime && okPending && a.stream != "" && a.consumer != "" && nanos <= math.MaxInt64
}

func parseUint(s string) (v uint64, ok bool) {
	if s == "" || len(s) > 19 {
		return 0, false
	}
	for i := range len(s) {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		v = v*10 + uint64(c)
	}
	return v, true
}

var (
	ackAck        = []byte("+ACK")
	ackInProgress = []byte("+WPI")
)

func ackNak(delay time.Duration) []byte {
	return append(strconv.AppendInt([]byte(`-NAK {"delay":`), int64(delay), 10), '}')
}

func ackTerm(reason string) []byte { return []byte("+TERM " + reason) }

// pull is a request for a batch of messages; an empty one is none.
type pull struct {
	batch   int
	token   uint64 // last token of its reply subject, to tell its status messages
	sent    int64  // engine time
	expires int64  // engine time
}

// pullError is a pull that the server did not take.
type pullError struct{ code, text string }

func hasCode(err error, code jetstream.ErrorCode) bool {
	var js jetstream.JetStreamError
	return errors.As(err, &js) && js.APIError() != nil && js.APIError().ErrorCode == code
}

func trailingNumber(s string) int {
	i := len(s)
	for i > 0 && s[i-1] >= '0' && s[i-1] <= '9' {
		i--
	}
	n, _ := strconv.Atoi(s[i:])
	return n
}

// pullLimits are the server's on pulls of this consumer; 0 is none.
type pullLimits struct {
	batch, bytes int
	expires      time.Duration
}
