package natsx

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Headers of a message in a retry stream, which is the copy of a message of a durable.
// Its payload is the original's header block, as it goes over the wire, and behind
// that the original's payload.
const (
	HeaderRetryStream   = "Natsx-Retry-Stream"   // the original's stream
	HeaderRetryDurable  = "Natsx-Retry-Durable"  // the durable that it is for
	HeaderRetrySequence = "Natsx-Retry-Sequence" // the original's sequence in its stream
	HeaderRetryTime     = "Natsx-Retry-Time"     // when the original was stored, RFC 3339 with nanoseconds
	HeaderRetrySubject  = "Natsx-Retry-Subject"  // the original's subject
	HeaderRetryAttempt  = "Natsx-Retry-Attempt"  // the attempt that comes next
	HeaderRetryError    = "Natsx-Retry-Error"    // why the last one failed, at most 256 bytes; missing when none did
	HeaderRetryLost     = "Natsx-Retry-Lost"     // deliveries since the last attempt of which nobody knows what they ran
	HeaderRetryFrom     = "Natsx-Retry-From"     // ack subject of the message that the copy was made of
)

// maxRetryError is how many bytes of an error's text a copy carries.
const maxRetryError = 256

// retryCopy is what a retry stream keeps of a message beside headers and payload.
//
// A message leaves its stream for copy 1, and each copy for the next one, and never
// comes back: so a copy with a number proves that the places before it are done with.
type retryCopy struct {
	stream, durable string
	subject         string
	id              messageID // in its stream
	life            string    // of the message, one token; see work.life
	number          uint64    // of the copy, from 1
	attempt         uint32    // that comes next
	lost            uint64    // deliveries since the last attempt that returned
	from            string    // ack subject of what it was made of
	text            string    // of the last error
}

// retryPlace names what copies of a durable are kept under, on a retry stream that
// captures prefix.>.
type retryPlace struct{ prefix, stream, durable string }

// retryPrefix is the prefix of the copies' subjects on a retry stream, empty if it has none.
func retryPrefix(c *jetstream.StreamConfig) string {
	for _, subject := range c.Subjects {
		if prefix, ok := strings.CutSuffix(subject, ".>"); ok && !strings.Contains(prefix, "*") {
			return prefix
		}
	}
	return ""
}

// due is the filter of all copies that are due.
func (p retryPlace) due() string { return p.prefix + ".due." + p.stream + "." + p.durable + ".>" }

// anyOf matches all copies of one message, waiting or due.
func (p retryPlace) anyOf(life string) string {
	return p.prefix + ".*." + p.stream + "." + p.durable + "." + life + ".*"
}

func (p retryPlace) subject(state, life string, number uint64) string {
	return p.prefix + "." + state + "." + p.stream + "." + p.durable + "." + life + "." + utoa(number)
}

// consumer is the name of the durable that delivers what is due. No two durables have
// the same one.
func (p retryPlace) consumer() string {
	sum := sha256.Sum256([]byte(p.stream + "." + p.durable))
	name := p.stream + "-" + p.durable
	if len(name) > 200 {
		name = "natsx"
	}
	return name + "-" + hex.EncodeToString(sum[:6])
}

// copyNumber is the number of the copy on a subject.
func copyNumber(subject string) uint64 {
	n, _ := parseUint(subject[strings.LastIndexByte(subject, '.')+1:])
	return n
}

// retryID is the message id of a copy: whoever makes it, it is stored once.
func (c *retryCopy) retryID() string {
	return c.stream + "/" + c.durable + "/" + c.life + "/" + utoa(c.number)
}

// message is the copy of original as it is published, for at, or the zero time when it
// is due at once.
func (p retryPlace) message(c *retryCopy, original *nats.Msg, at time.Time) *nats.Msg {
	due := p.subject("due", c.life, c.number)
	m := &nats.Msg{Subject: due, Data: joinMessage(original.Header, original.Data), Header: nats.Header{
		nats.MsgIdHdr:       {c.retryID()},
		HeaderRetryStream:   {c.stream},
		HeaderRetryDurable:  {c.durable},
		HeaderRetrySequence: {utoa(c.id.seq)},
		HeaderRetryTime:     {time.Unix(0, c.id.time).UTC().Format(time.RFC3339Nano)},
		HeaderRetrySubject:  {c.subject},
		HeaderRetryAttempt:  {strconv.Itoa(int(c.attempt))},
		HeaderRetryLost:     {utoa(c.lost)},
		HeaderRetryFrom:     {c.from},
	}}
	if c.text != "" {
		m.Header.Set(HeaderRetryError, headerText(c.text, maxRetryError))
	}
	if !at.IsZero() {
		m.Subject = p.subject("wait", c.life, c.number)
		m.Header.Set(jetstream.ScheduleHeader, "@at "+at.UTC().Format(time.RFC3339Nano))
		m.Header.Set(jetstream.ScheduleTargetHeader, due)
	}
	return m
}

// redriven is the copy that sends the message of a letter back to its durable alone, also
// if its stream takes no publishes: due at once, with its attempts starting anew. m is the
// message with the headers of a redrive. Like every copy it is stored once, and anyOf its
// life finds it until it is settled.
func (p retryPlace) redriven(l *DeadLetter, m *nats.Msg) *nats.Msg {
	c := retryCopy{
		stream: l.Stream, durable: l.Durable, subject: l.Subject, number: 1, attempt: 1,
		id: messageID{l.Sequence, l.Published.UnixNano()},
	}
	c.life = redrivenLife(l)
	return p.message(&c, m, time.Time{})
}

// redrivenLife is the life that the redrive of a letter begins.
func redrivenLife(l *DeadLetter) string {
	return fmt.Sprintf("%d@%d-%d@%d", l.Sequence, l.Published.UnixNano(), l.DLQSequence, l.DLQTime.UnixNano())
}

// openCopy reads a message of a retry stream: the original, with the copy's reply
// subject, and what the copy says of it. The error tells what is wrong with it.
func (p retryPlace) openCopy(m *nats.Msg) (original *nats.Msg, c retryCopy, err error) {
	h := m.Header
	c = retryCopy{
		stream: h.Get(HeaderRetryStream), durable: h.Get(HeaderRetryDurable), subject: h.Get(HeaderRetrySubject),
		from: h.Get(HeaderRetryFrom), text: h.Get(HeaderRetryError), number: copyNumber(m.Subject),
	}
	bad := func(what string) (*nats.Msg, retryCopy, error) {
		return nil, c, fmt.Errorf("natsx: not a copy of a retry: %s", what)
	}
	tokens := strings.Split(m.Subject, ".")
	if len(tokens) < 3 || c.number == 0 {
		return bad("subject")
	}
	c.life = tokens[len(tokens)-2]
	if c.stream != p.stream || c.durable != p.durable || m.Subject != p.subject("due", c.life, c.number) {
		return bad("of another durable")
	}
	seq, ok1 := parseUint(h.Get(HeaderRetrySequence))
	attempt, ok2 := parseUint(h.Get(HeaderRetryAttempt))
	lost, ok3 := parseUint(h.Get(HeaderRetryLost))
	stored, err := time.Parse(time.RFC3339Nano, h.Get(HeaderRetryTime))
	if !ok1 || !ok2 || !ok3 || err != nil || seq == 0 || attempt == 0 || c.subject == "" {
		return bad("headers")
	}
	c.id = messageID{seq, stored.UnixNano()}
	c.attempt, c.lost = uint32(min(attempt, 1<<31)), lost
	header, data, err := splitMessage(m.Data)
	if err != nil {
		return bad("payload")
	}
	return &nats.Msg{Subject: c.subject, Reply: m.Reply, Header: header, Data: data}, c, nil
}

const headerBlock = "NATS/1.0\r\n"

// joinMessage is a header block with a payload behind it, as on the wire (ADR-4). Names
// and values were read from one, so that nothing has to be escaped.
func joinMessage(h nats.Header, data []byte) []byte {
	var b bytes.Buffer
	b.WriteString(headerBlock)
	for k, values := range h {
		for _, v := range values {
			b.WriteString(k + ": " + v + "\r\n")
		}
	}
	b.WriteString("\r\n")
	b.Write(data)
	return b.Bytes()
}

// splitMessage undoes joinMessage. Without headers they are nil.
func splitMessage(joined []byte) (nats.Header, []byte, error) {
	const end = "\r\n\r\n"
	at := bytes.Index(joined, []byte(end))
	if at < 0 {
		return nil, nil, nats.ErrBadHeaderMsg
	}
	at += len(end)
	h, err := nats.DecodeHeadersMsg(joined[:at])
	if err != nil {
		return nil, nil, err
	}
	if len(h) == 0 {
		h = nil
	}
	return h, joined[at:], nil
}

// heldCopy is the copy of a message on its way to the retry stream.
type heldCopy struct {
	msg    *nats.Msg
	stored bool // the retry stream has it
}
