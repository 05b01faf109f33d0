package natsx

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

const (
	headerPrefix = "Natsx-"
	letterPrefix = "Natsx-Dlq-"
	origPrefix   = "Natsx-Orig-"
	// redrivePrefix is the prefix of the headers of a redriven message.
	redrivePrefix = "Natsx-Redrive-"
)

// deliveryID names a message of a durable: <stream>/<durable>/<sequence>@<stored time>.
func deliveryID(stream, durable string, id messageID) string {
	return stream + "/" + durable + "/" + id.String()
}

// parseDeliveryID reads what deliveryID has written. The names are such as a server
// takes, which hold no slash.
func parseDeliveryID(text string) (stream, durable string, id messageID, ok bool) {
	parts := strings.Split(text, "/")
	if len(parts) != 3 || nameFault(parts[0]) != "" || nameFault(parts[1]) != "" {
		return "", "", messageID{}, false
	}
	id, ok = parseMessageID(parts[2])
	return parts[0], parts[1], id, ok
}

// Reason is why a message is dead.
type Reason string

// The reasons of a dead letter.
const (
	ReasonExhausted   Reason = "exhausted"   // the last retry failed
	ReasonPermanent   Reason = "permanent"   // the handler returned Permanent
	ReasonPanic       Reason = "panic"       // the last retry panicked
	ReasonUndecodable Reason = "undecodable" // the payload did not decode
	ReasonCrashed     Reason = "crashed"     // the process ended during each attempt
)

// allReasons are the reasons that a letter may have.
var allReasons = []Reason{ReasonExhausted, ReasonPermanent, ReasonPanic, ReasonUndecodable, ReasonCrashed}

// Headers of a dead letter. The original's headers are kept. Those of NATS (Nats-*) are
// renamed to Natsx-Orig-*, since they would expire, schedule or deduplicate the letter,
// and so are those with the names of a letter's own headers.
const (
	HeaderDLQSubject   = "Natsx-Dlq-Subject"   // the original's subject
	HeaderDLQStream    = "Natsx-Dlq-Stream"    // the original's stream
	HeaderDLQSequence  = "Natsx-Dlq-Sequence"  // the original's sequence in it
	HeaderDLQDurable   = "Natsx-Dlq-Durable"   // the durable that failed
	HeaderDLQAttempts  = "Natsx-Dlq-Attempts"  // number of attempts
	HeaderDLQReason    = "Natsx-Dlq-Reason"    // a Reason
	HeaderDLQError     = "Natsx-Dlq-Error"     // the last error's text, at most 4,096 bytes
	HeaderDLQStack     = "Natsx-Dlq-Stack"     // of a panic, at most 8,192 bytes, line feeds as \n
	HeaderDLQTime      = "Natsx-Dlq-Time"      // when it was dead, RFC 3339 with nanoseconds
	HeaderDLQPublished = "Natsx-Dlq-Published" // when the original was stored, in the same form
	HeaderDLQHost      = "Natsx-Dlq-Host"      // host of the process that failed
	// HeaderDLQRetryStream names the retry stream of the broker that gave the message up. It
	// is missing if that had none.
	HeaderDLQRetryStream = "Natsx-Dlq-Retry-Stream"
	// HeaderDLQPointer is "true" on a letter without the payload, which was too large for
	// a letter, and missing on others. The original is still in its stream, unless that
	// has deleted it. In a stream with work-queue or interest retention it is left
	// unsettled and counts against MaxAckPending, until a redrive or a purge of the letter
	// releases it.
	HeaderDLQPointer = "Natsx-Dlq-Pointer"
	// HeaderDLQRedrives is how often the message was redriven before it died again, and
	// HeaderDLQOriginal the <sequence>@<stored time in ns> that it had before its first
	// redrive. Both are missing on others.
	HeaderDLQRedrives = "Natsx-Dlq-Redrives"
	HeaderDLQOriginal = "Natsx-Dlq-Original"
)

// Limits of the error texts in a dead letter, in bytes.
const (
	maxLetterError = 4096
	maxLetterStack = 8192
)

// smallestLetter is room for the headers of a letter without its original's headers and
// payload, unless a name is extremely long.
const smallestLetter = 2048

// DeadLetter is a dead message of a durable, as stored in the DLQ.
type DeadLetter struct {
	Subject   string      // the original's subject
	Stream    string      // the original's stream
	Sequence  uint64      // the original's sequence in it
	Durable   string      // the durable that failed
	Attempts  int         // number of attempts
	Reason    Reason      // why it is dead
	Error     string      // the last error's text
	Stack     string      // of a panic
	Time      time.Time   // when it was dead, by the clock of Host
	Published time.Time   // when the original was stored
	Host      string      // host of the process that failed
	Header    nats.Header // of the original, if the letter had room for it
	Data      []byte      // the original's payload, none if Pointer is set
	// Pointer reports that the payload was too large for a letter. The original is still
	// in its stream.
	Pointer  bool
	Redrives int // how many times the message was redriven before

	DLQSubject  string    // the letter's subject
	DLQStream   string    // its stream
	DLQSequence uint64    // its sequence in it
	DLQTime     time.Time // when it was stored there

	header nats.Header // of the letter
}

// parseLetter parses a message of a DLQ. If it is not a letter, it returns an error and
// what could be parsed.
func parseLetter(stream string, m *storedMsg) (DeadLetter, error) {
	h := m.header
	l := DeadLetter{
		Subject:  h.Get(HeaderDLQSubject),
		Stream:   h.Get(HeaderDLQStream),
		Durable:  h.Get(HeaderDLQDurable),
		Reason:   Reason(h.Get(HeaderDLQReason)),
		Error:    h.Get(HeaderDLQError),
		Stack:    strings.ReplaceAll(h.Get(HeaderDLQStack), `\n`, "\n"),
		Host:     h.Get(HeaderDLQHost),
		Header:   restoredHeaders(h, len(m.data) == 0),
		Data:     m.data,
		Pointer:  h.Get(HeaderDLQPointer) != "",
		Redrives: redriveCount(h.Get(HeaderDLQRedrives)),

		DLQSubject: m.subject, DLQStream: stream, DLQSequence: m.seq, DLQTime: m.time,
		header: h,
	}
	var faults []string
	fault := func(name, reason string) {
		if reason != "" {
			faults = append(faults, fmt.Sprintf("%s %q %s", name, h.Get(name), reason))
		}
	}
	// Other clients may publish to subjects that natsx refuses: letters of such messages
	// are valid.
	if l.Subject == "" {
		fault(HeaderDLQSubject, "must not be empty")
	}
	fault(HeaderDLQStream, nameFault(l.Stream))
	fault(HeaderDLQDurable, nameFault(l.Durable))
	if l.Reason == "" {
		fault(HeaderDLQReason, "must not be empty")
	}
	var ok bool
	if l.Sequence, ok = parseUint(h.Get(HeaderDLQSequence)); !ok || l.Sequence == 0 {
		fault(HeaderDLQSequence, "is not a sequence")
	}
	var err error
	if l.Attempts, err = strconv.Atoi(h.Get(HeaderDLQAttempts)); err != nil || l.Attempts < 0 {
		fault(HeaderDLQAttempts, "is not a number of attempts")
	}
	if l.Time, err = time.Parse(time.RFC3339Nano, h.Get(HeaderDLQTime)); err != nil {
		fault(HeaderDLQTime, "is not a time")
	}
	if l.Published, err = time.Parse(time.RFC3339Nano, h.Get(HeaderDLQPublished)); err != nil {
		fault(HeaderDLQPublished, "is not a time")
	}
	if len(faults) > 0 {
		return l, &LetterError{Subject: m.subject, Stream: stream, Sequence: m.seq,
			Err: fmt.Errorf("%w: %s", ErrNotALetter, strings.Join(faults, ", "))}
	}
	return l, nil
}

// restoredHeaders undoes originalHeaders.
func restoredHeaders(h nats.Header, empty bool) nats.Header {
	restored := nats.Header{}
	for k, v := range h {
		switch {
		case hasPrefixFold(k, origPrefix):
			k = k[len(origPrefix):]
			if !hasPrefixFold(k, headerPrefix) && !(empty && strings.EqualFold(k, "Status")) {
				k = "Nats-" + k
			}
		case hasPrefixFold(k, letterPrefix), hasPrefixFold(k, "Nats-"):
			continue // the letter's own
		}
		restored[k] = append(restored[k], v...)
	}
	return restored
}

// originalHeaders returns the headers of a message as its letter keeps them. A Status
// header of a message without a payload is renamed too: clients would treat the letter as
// a status message of the server.
func originalHeaders(h nats.Header, empty bool) nats.Header {
	kept := make(nats.Header, len(h))
	for k, v := range h {
		switch {
		case hasPrefixFold(k, "Nats-"):
			k = origPrefix + k[len("Nats-"):]
		case hasPrefixFold(k, letterPrefix), hasPrefixFold(k, origPrefix):
			k = origPrefix + k
		case empty && strings.EqualFold(k, "Status"):
			k = origPrefix + k
		}
		k = sendableName(k)
		kept[k] = append(kept[k], v...)
	}
	return kept
}

// sendableName replaces characters in the name of a header that nats.go does not send. It
// receives such names from other clients.
func sendableName(name string) string {
	if headerNameFault(name) == "" {
		return name
	}
	b := []byte(cmp.Or(name, "_"))
	for i := range b {
		if !headerNameByte(b[i]) {
			b[i] = '_'
		}
	}
	return string(b)
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// headerText returns text as a header value of at most most bytes: on one line, with line
// feeds as \n and without other control characters.
func headerText(text string, most int) string {
	text = strings.ToValidUTF8(text, "\uFFFD")
	text = strings.NewReplacer("\r\n", `\n`, "\n", `\n`, "\t", " ").Replace(text)
	text = strings.Map(func(c rune) rune {
		if unicode.IsControl(c) {
			return ' '
		}
		return c
	}, text)
	text = strings.TrimSpace(text)
	if len(text) <= most {
		return text
	}
	cut := most - len("...")
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "..."
}

// root is the message that the letter's was before its first redrive.
func (l *DeadLetter) root() messageID {
	if id, ok := parseMessageID(l.header.Get(HeaderDLQOriginal)); ok && l.Redrives > 0 {
		return id
	}
	return messageID{l.Sequence, l.Published.UnixNano()}
}

// Headers of a redriven message, beside its original ones.
const (
	HeaderRedriveTo    = "Natsx-Redrive-To"    // the durable that it is for
	HeaderRedriveCount = "Natsx-Redrive-Count" // how often it was redriven
	// HeaderRedriveOriginal is the message that died first, as
	// <stream>/<durable>/<sequence>@<stored time in ns>.
	HeaderRedriveOriginal = "Natsx-Redrive-Original"
	HeaderRedriveToken    = "Natsx-Redrive-Token" // proves the others
	// HeaderOriginalMsgID is the Nats-Msg-Id that the message was published with. Its own
	// is that of the redrive.
	HeaderOriginalMsgID = "Natsx-Orig-Nats-Msg-Id"
)

// redriveCopy is what the headers of a redriven message say. Its token proves it.
type redriveCopy struct {
	stream, durable string    // that it is for
	original        messageID // in the stream, before the first redrive
	count           int       // redrives so far
	letter          messageID // in the DLQ
	dlq             string    // the DLQ's stream
}

// readCopy reads the headers of a redrive, which anybody may write.
func readCopy(h nats.Header) (c redriveCopy, ok bool) {
	c.count = redriveCount(h.Get(HeaderRedriveCount))
	if c.stream, c.durable, c.original, ok = parseDeliveryID(h.Get(HeaderRedriveOriginal)); !ok || c.durable != h.Get(HeaderRedriveTo) {
		return c, false
	}
	id, redriven := strings.CutPrefix(h.Get(nats.MsgIdHdr), "redrive/")
	name, stored, found := strings.Cut(id, "@")
	nanos, seq, _ := strings.Cut(stored, "/")
	c.dlq = name
	c.letter, ok = parseMessageID(seq + "@" + nanos)
	return c, ok && redriven && found && nameFault(name) == ""
}

// redriveID is the message id of a letter's copy. The time distinguishes the letter from
// one with the same sequence in a recreated stream.
func redriveID(l *DeadLetter) string {
	return fmt.Sprintf("redrive/%s@%d/%d", l.DLQStream, l.DLQTime.UnixNano(), l.DLQSequence)
}

// redriveToken authenticates a copy. The key is the id that natsx gave the durable: it
// is told by the JetStream API alone, which a mere publisher may not ask, and is the
// same after a restart of the server. The token covers subject, payload, message id and
// all headers that a server leaves alone, so that it fits no other message.
func redriveToken(key, subject string, h nats.Header, data []byte) string {
	mac := hmac.New(sha256.New, []byte("natsx redrive "+key))
	add := func(s string) { fmt.Fprintf(mac, "%d:%s", len(s), s) }
	add(subject)
	add(h.Get(nats.MsgIdHdr))
	names := make([]string, 0, len(h))
	for name := range h {
		if !hasPrefixFold(name, "Nats-") && name != HeaderRedriveToken {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		for _, v := range h[name] {
			add(name)
			add(sentValue.Replace(textproto.TrimString(v)))
		}
	}
	body := sha256.Sum256(data)
	mac.Write(body[:])
	return hex.EncodeToString(mac.Sum(nil))
}

// sentValue makes of a header's value what nats.go sends.
var sentValue = strings.NewReplacer("\r", " ", "\n", " ")

// provenCopy reports whether a message bears the token of a key.
func provenCopy(key, subject string, h nats.Header, data []byte) bool {
	token := h.Get(HeaderRedriveToken)
	return token != "" && hmac.Equal([]byte(token), []byte(redriveToken(key, subject, h, data)))
}

// redriveCount reads a number of redrives, 0 for none.
func redriveCount(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// pointsTo reports whether m is the original of l, and not a message of a recreated
// stream.
func (l *DeadLetter) pointsTo(m *storedMsg) bool {
	return m.seq == l.Sequence && m.subject == l.Subject && m.time.Equal(l.Published)
}

// heldLetter is the letter of a dead message that is being moved to the DLQ.
type heldLetter struct {
	msg    *nats.Msg
	form   uint8  // see letterBox.letter
	text   string // of the error, from one call of users' code
	stored bool   // the DLQ has it
}

// messageID identifies a message: a stream may reuse a sequence, as after the restore of a
// backup, but not with the same time.
type messageID struct {
	seq  uint64
	time int64 // when it was stored, Unix nanoseconds
}

func (id messageID) String() string { return utoa(id.seq) + "@" + strconv.FormatInt(id.time, 10) }

// parseMessageID reads what String has written.
func parseMessageID(text string) (id messageID, ok bool) {
	seq, nanos, found := strings.Cut(text, "@")
	var at uint64
	var okSeq, okTime bool
	id.seq, okSeq = parseUint(seq)
	at, okTime = parseUint(nanos)
	id.time = int64(at)
	return id, found && okSeq && okTime && at <= math.MaxInt64
}
