package natsx

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"
)

// Error codes of the JetStream API that nats.go does not name.
const (
	codeClusterNoPeers        jetstream.ErrorCode = 10005
	codeClusterNoLeader       jetstream.ErrorCode = 10008
	codeClusterNotLeader      jetstream.ErrorCode = 10009
	codeClusterRequired       jetstream.ErrorCode = 10010
	codeInvalidJSON           jetstream.ErrorCode = 10025
	codeConsumerNotFound      jetstream.ErrorCode = 10014
	codeInsufficientResources jetstream.ErrorCode = 10023
	codeMaximumConsumers      jetstream.ErrorCode = 10026
	codeNoAccount             jetstream.ErrorCode = 10035
	codeClusterUnsupported    jetstream.ErrorCode = 10036
	codeNoMessage             jetstream.ErrorCode = 10037
	codeNotEnabledOnAccount   jetstream.ErrorCode = 10039
	codeMessageTooLarge       jetstream.ErrorCode = 10054
	codeStreamNotFound        jetstream.ErrorCode = 10059
	codeSubjectOverlap        jetstream.ErrorCode = 10065
	codeNotEnabled            jetstream.ErrorCode = 10076
	codeHeaderTooLarge        jetstream.ErrorCode = 10097
	codeWorkQueueOneConsumer  jetstream.ErrorCode = 10099 // one has no filter
	codeWorkQueueOverlap      jetstream.ErrorCode = 10100
	codeStreamOffline         jetstream.ErrorCode = 10118 // its server is down
	codeConsumerOffline       jetstream.ErrorCode = 10119
	codeMaxAckPendingLimit    jetstream.ErrorCode = 10121
	codeConsumerExists        jetstream.ErrorCode = 10148
)

// hasCode reports whether err is an error of the JetStream API with this code.
func hasCode(err error, code jetstream.ErrorCode) bool {
	var js jetstream.JetStreamError
	return errors.As(err, &js) && js.APIError() != nil && js.APIError().ErrorCode == code
}

// ackInfo is the content of a delivered message's reply subject.
type ackInfo struct {
	stream      string
	consumer    string
	delivered   uint64
	sequence    uint64
	consumerSeq uint64
	time        int64  // Unix nanoseconds
	pending     uint64 // messages that were pending for the consumer
}

// parseDelivery parses an ack subject of either form (ADR-15, and the one with domain
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

func utoa(n uint64) string { return strconv.FormatUint(n, 10) }

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

// The bodies of acknowledgements (ADR-15 and docs.nats.io, Consumers).
var (
	ackAck        = []byte("+ACK")
	ackInProgress = []byte("+WPI")
)

// ackNak asks for redelivery after a delay, 0 for at once.
func ackNak(delay time.Duration) []byte {
	if delay <= 0 {
		return []byte("-NAK")
	}
	return append(strconv.AppendInt([]byte(`-NAK {"delay":`), int64(delay), 10), '}')
}

func ackTerm(reason string) []byte { return []byte("+TERM " + reason) }

// ackSubject is the reply subject of a first delivery.
func ackSubject(stream, consumer string, seq uint64, stored int64) string {
	return fmt.Sprintf("$JS.ACK.%s.%s.1.%d.1.%d.0", stream, consumer, seq, stored)
}

// Keys of a consumer's metadata: its identity, and the messages that ran in isolation.
const (
	metadataID    = "natsx-id"
	metadataAlone = "natsx-alone"
)

// pullRequest asks a pull consumer for messages (ADR-13). Its zero value asks for none.
type pullRequest struct {
	batch     int
	maxBytes  int64         // 0 for no bound
	expires   time.Duration // 0 for none
	heartbeat time.Duration // 0 for none; else at most half of expires
	noWait    bool
	group     string // priority group (ADR-42), empty for none
	pin       string // of the group's pinned client, empty for a client that is not pinned
	token     uint64 // last token of the reply subject
}

// body is the request in JSON.
func (p pullRequest) body() []byte {
	b := strconv.AppendInt(append(make([]byte, 0, 128), `{"batch":`...), int64(p.batch), 10)
	if p.expires > 0 {
		b = strconv.AppendInt(append(b, `,"expires":`...), int64(p.expires), 10)
	}
	if p.maxBytes > 0 {
		b = strconv.AppendInt(append(b, `,"max_bytes":`...), p.maxBytes, 10)
	}
	if p.heartbeat > 0 {
		b = strconv.AppendInt(append(b, `,"idle_heartbeat":`...), int64(p.heartbeat), 10)
	}
	if p.noWait {
		b = append(b, `,"no_wait":true`...)
	}
	if p.group != "" {
		b = append(append(append(b, `,"group":"`...), p.group...), '"')
	}
	if p.pin != "" {
		b = append(append(append(b, `,"id":"`...), p.pin...), '"')
	}
	return append(b, '}')
}

// statusKind is what a pull status message means.
type statusKind uint8

const (
	statusHeartbeat     statusKind = iota // the pull still waits
	statusNoMessages                      // 404: there are no messages, and the pull did not wait
	statusEnded                           // the pull is over: expired, or its batch is complete
	statusTooLarge                        // the next message does not fit into the pull's bytes
	statusLimit                           // the consumer's limits do not allow such a pull
	statusMoved                           // no server serves the pull: a leader election, a shutdown
	statusUnpinned                        // 423: the pull's pin is not the current one of the consumer
	statusDeleted                         // the consumer was deleted
	statusStreamDeleted                   // its stream was deleted
	statusRefused                         // anything else
)

// pullStatus is a pull status message of the server about one pull.
type pullStatus struct {
	kind       statusKind
	token      uint64 // of the pull
	left       int    // messages that the pull did not deliver, 0 if not reported
	code, text string
}

// parseStatus parses a message without a reply subject. In the inbox of a pull these are
// always from the server: a message of a stream has an ack subject as its reply, whatever
// headers its publisher has set.
func parseStatus(m *nats.Msg) pullStatus {
	s := pullStatus{code: m.Header.Get("Status"), text: m.Header.Get("Description")}
	s.token, _ = strconv.ParseUint(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], 10, 64)
	s.left, _ = strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
	switch {
	case s.code == "100" || s.code == "":
		s.kind = statusHeartbeat
	case s.code == "404":
		s.kind = statusNoMessages
	case s.code == "408", strings.HasPrefix(s.text, "Batch Completed"):
		s.kind = statusEnded
	case strings.HasPrefix(s.text, "Message Size Exceeds MaxBytes"):
		s.kind = statusTooLarge
	case strings.HasPrefix(s.text, "Exceeded MaxRequest"):
		s.kind = statusLimit
	case s.code == "423":
		s.kind = statusUnpinned
	case s.code == "503", strings.HasPrefix(s.text, "Leadership Change"), strings.HasPrefix(s.text, "Server Shutdown"):
		s.kind = statusMoved
	case strings.HasPrefix(s.text, "Consumer Deleted"):
		s.kind = statusDeleted
	case strings.HasPrefix(s.text, "Stream Deleted"):
		s.kind = statusStreamDeleted
	default:
		s.kind = statusRefused
	}
	return s
}

// headerPinID is the header by which the server tells a client that it is pinned.
const headerPinID = "Nats-Pin-Id"

// takePin removes the pin from the headers of a message of a consumer with a pinned
// client, where the server has appended it to what the publisher wrote.
func takePin(m *nats.Msg) (pin string) {
	values := m.Header[headerPinID]
	switch n := len(values); {
	case n == 0:
		return ""
	case n > 1:
		pin, m.Header[headerPinID] = values[n-1], values[:n-1]
	default:
		pin = values[0]
		if delete(m.Header, headerPinID); len(m.Header) == 0 {
			m.Header = nil
		}
	}
	return pin
}

// pullLimits are a consumer's limits on pull requests, 0 for none.
type pullLimits struct {
	batch   int
	bytes   int64
	expires time.Duration
}

func pullLimitsOf(c jetstream.ConsumerConfig) pullLimits {
	return pullLimits{c.MaxRequestBatch, int64(c.MaxRequestMaxBytes), c.MaxRequestExpires}
}

// learn parses the limit in the text of a statusLimit, such as "Exceeded MaxRequestBatch
// of 10", and reports whether it could.
func (l *pullLimits) learn(text string) bool {
	name, value, _ := strings.Cut(text, " of ")
	switch strings.TrimPrefix(name, "Exceeded ") {
	case "MaxRequestBatch":
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 {
			return false
		}
		l.batch = n
	case "MaxRequestMaxBytes":
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n < 1 {
			return false
		}
		l.bytes = n
	case "MaxRequestExpires":
		d, err := time.ParseDuration(value)
		if err != nil || d <= 0 {
			return false
		}
		l.expires = d
	default:
		return false
	}
	return true
}

// apply returns p within the limits.
func (l pullLimits) apply(p pullRequest) pullRequest {
	if l.batch > 0 {
		p.batch = min(p.batch, l.batch)
	}
	if l.bytes > 0 && p.maxBytes > 0 {
		p.maxBytes = min(p.maxBytes, l.bytes)
	}
	if l.expires > 0 && p.expires > l.expires {
		// The server applies the limit to the time from its receipt of the request.
		p.expires = l.expires
	}
	p.heartbeat = min(p.heartbeat, p.expires/2)
	return p
}

// pullError is a pull that the server refused.
type pullError struct{ code, text string }

func (e *pullError) Error() string { return fmt.Sprintf("natsx: pull refused: %s %s", e.code, e.text) }

// trailingNumber is the number at the end of s, 0 for none.
func trailingNumber(s string) int {
	i := len(s)
	for i > 0 && s[i-1] >= '0' && s[i-1] <= '9' {
		i--
	}
	n, _ := strconv.Atoi(s[i:])
	return n
}

// messageSize is the size of a message to be sent that counts against the server's max
// payload: encoded headers and data.
func messageSize(m *nats.Msg) int { return m.Size() - len(m.Subject) - len(m.Reply) }

// timeoutHeader is how long the requester still waits, as a Go duration from the arrival
// of the request. A duration, unlike a time, needs no synchronised clocks.
const timeoutHeader = "Natsx-Timeout"

// replyError returns the error in the headers of a reply, or nil.
func replyError(h nats.Header) *ReplyError {
	code, message := h.Get(micro.ErrorCodeHeader), h.Get(micro.ErrorHeader)
	if code == "" && message == "" {
		return nil
	}
	e := &ReplyError{Message: message, RawCode: code}
	e.Code, _ = strconv.Atoi(code)
	return e
}

// requestTimeout returns how long the requester waits, from the arrival of the request: by
// its header or, without one, by its reply subject. ok is false if that is missing or
// invalid.
func requestTimeout(m *nats.Msg) (d time.Duration, ok bool) {
	if text := m.Header.Get(timeoutHeader); text != "" { // avoid the cost of a parse error
		d, err := time.ParseDuration(text)
		return d, err == nil && d > 0
	}
	key, text, ok := strings.Cut(m.Reply[strings.LastIndexByte(m.Reply, '.')+1:], "~")
	if !ok || len(key) != replyKey {
		return 0, false
	}
	n, ok := parseUint(text)
	if !ok || n == 0 || n > math.MaxInt64/uint64(time.Microsecond) {
		return 0, false
	}
	return time.Duration(n) * time.Microsecond, true
}

// replyKey is the length of the key in the last token of a reply subject, in hexadecimal.
const replyKey = 16

// appendReplyToken writes the last token of a reply subject: the key and, when there is
// a limit, ~ and how long the requester waits in microseconds.
func appendReplyToken(b []byte, key uint64, left time.Duration) []byte {
	start := len(b)
	for range replyKey {
		b = append(b, '0')
	}
	for i := len(b) - 1; i >= start; i-- {
		b[i] = "0123456789abcdef"[key&15]
		key >>= 4
	}
	if left > 0 {
		b = strconv.AppendInt(append(b, '~'), max(left.Microseconds(), 1), 10)
	}
	return b
}

// withMetadata returns a copy of m with one more value, without those of the server.
func withMetadata(m map[string]string, key, value string) map[string]string {
	next := map[string]string{key: value}
	for k, v := range m {
		if k != key && !strings.HasPrefix(k, "_nats.") { // set by the server
			next[k] = v
		}
	}
	return next
}
