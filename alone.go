package natsx

import (
	"context"
	"fmt"
	"strings"
	"time"
)

const (
	// aloneProof is how many isolated runs must end with the process before the message
	// counts as the cause: a process may be killed for other reasons.
	aloneProof = 3
	// aloneDeliveries is how many deliveries beyond its attempts prove the same if isolated
	// runs cannot be recorded. With floodOfSuspects at once they are not recorded until
	// then, since most of them cannot be the cause.
	aloneDeliveries = 10
	floodOfSuspects = 64
	// mostMarks and marksFor bound the marks of a consumer.
	mostMarks = 32
	marksFor  = 6 * time.Hour
)

// A message whose deliveries exceed its attempts without a known failure is a suspect: it
// may have crashed its process each time, or have been in hand when another message did,
// or never have run. It is run once more in isolation: the route runs and pulls nothing
// else. Before that a mark is stored in the consumer's metadata, where the next process
// finds it if this one crashes. After aloneProof such crashes the message is dead. Any
// result removes the mark.

// aloneMark is how many times a message was started in isolation.
type aloneMark struct {
	id    messageID
	count int
	at    int64 // when it was last started, Unix seconds
}

// aloneMarks are the marks of a consumer, the oldest first.
type aloneMarks []aloneMark

// parseAloneMarks parses the result of String. It skips what it cannot parse.
func parseAloneMarks(text string) (marks aloneMarks) {
	for part := range strings.SplitSeq(text, " ") {
		var m aloneMark
		if n, _ := fmt.Sscanf(part, "%d@%d:%d:%d", &m.id.seq, &m.id.time, &m.count, &m.at); n == 4 {
			marks = append(marks, m)
		}
	}
	return marks
}

// String returns <sequence>@<stored time>:<count>:<time> for each mark, separated by
// spaces.
func (s aloneMarks) String() string {
	var parts []string
	for _, m := range s {
		parts = append(parts, fmt.Sprintf("%d@%d:%d:%d", m.id.seq, m.id.time, m.count, m.at))
	}
	return strings.Join(parts, " ")
}

// count is how many times a message was started in isolation.
func (s aloneMarks) count(id messageID) int {
	for _, m := range s {
		if m.id == id {
			return m.count
		}
	}
	return 0
}

// with returns s with the count of a message set, or removed if 0, and without the marks
// that are too old.
func (s aloneMarks) with(id messageID, count int, now int64) aloneMarks {
	next := make(aloneMarks, 0, len(s)+1)
	for _, m := range s {
		if m.id != id && now-m.at < int64(marksFor/time.Second) {
			next = append(next, m)
		}
	}
	if count > 0 {
		next = append(next, aloneMark{id, count, now})
	}
	return next[max(len(next)-mostMarks, 0):]
}

// aloneNotes are the marks in the metadata of one consumer.
type aloneNotes struct {
	api              *api
	stream, consumer string
}

// mark changes the count of a message in the consumer's metadata by add, but does not raise
// one that has reached aloneProof; with add 0 it removes the mark. It returns the count
// before.
func (n aloneNotes) mark(ctx context.Context, id messageID, add int) (before int, err error) {
	err = retry{limit: apiTimeout}.do(ctx, func(ctx context.Context) error {
		info, err := n.api.consumerInfo(ctx, n.stream, n.consumer)
		if err != nil {
			return err
		}
		cfg := info.Config
		marks := parseAloneMarks(cfg.Metadata[metadataAlone])
		before = marks.count(id)
		if add > 0 && before >= aloneProof || add <= 0 && before == 0 {
			return nil
		}
		next := 0
		if add != 0 {
			next = before + add
		}
		cfg.Name = n.consumer
		cfg.Metadata = withMetadata(cfg.Metadata, metadataAlone, marks.with(id, next, time.Now().Unix()).String())
		_, err = n.api.updateConsumer(ctx, n.stream, cfg)
		return err
	})
	return before, err
}
