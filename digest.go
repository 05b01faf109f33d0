package natsx

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
)

// digest covers what a stream stores of an envelope: subject, headers, payload, TTL and
// schedule, with After as its delay rather than as a time. It leaves out what may differ
// when the same envelope is published again: carried headers, the trace context, and
// expected streams and sequences.
func (e *Envelope) digest() digest {
	fields := make([]field, 0, len(e.headers)+1)
	for _, f := range e.headers {
		if !strings.EqualFold(f.name, "traceparent") && !strings.EqualFold(f.name, "tracestate") {
			fields = append(fields, f)
		}
	}
	if e.contentType != "" && !e.hasHeader("Content-Type") {
		fields = append(fields, field{"Content-Type", e.contentType})
	}
	// Only the order of values with the same name matters.
	slices.SortStableFunc(fields, func(a, b field) int { return strings.Compare(a.name, b.name) })
	var text []byte
	add := func(s string) { text = append(binary.AppendUvarint(text, uint64(len(s))), s...) }
	add(e.subject)
	text = binary.AppendUvarint(text, uint64(len(fields)))
	for _, f := range fields {
		add(f.name)
		add(f.value)
	}
	text = binary.AppendUvarint(text, uint64(e.set&(envTTL|envAt|envAfter)))
	if e.set&envTTL != 0 {
		add(e.ttlText())
	}
	if e.set&envAt != 0 {
		text = binary.AppendVarint(text, e.at.Unix())
		text = binary.AppendUvarint(text, uint64(e.at.Nanosecond()))
	}
	if e.set&envAfter != 0 {
		text = binary.AppendVarint(text, int64(e.after))
	}
	h := sha256.New()
	h.Write(text)
	h.Write(e.data)
	return digest(h.Sum(nil)[:len(digest{})])
}

// batchDigest covers the envelopes of an atomic batch in their order.
func batchDigest(es []Envelope) digest {
	h := sha256.New()
	h.Write([]byte{0}) // no envelope begins with it
	for i := range es {
		of := es[i].digest()
		h.Write(of[:])
		h.Write(binary.AppendUvarint(nil, uint64(len(es[i].msgID))))
		h.Write([]byte(es[i].msgID))
	}
	return digest(h.Sum(nil)[:len(digest{})])
}
