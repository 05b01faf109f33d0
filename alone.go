package natsx

import (
	"context"
	"fmt"
	"strings"
	"time"
)

const (
	// aloneProof is how often a message has to take its process down while it runs by
	// itself before that is its fault: a process may be killed for other reasons.
	aloneProof = 3
	// aloneDeliveries is how many deliveries beyond its attempts prove it where nothing
	// can be written down, and floodOfSuspects how many at once are run without that
	// first: so many are not all to blame.
	aloneDeliveries = 10
	floodOfSuspects = 64
	// mostMarks and marksFor bound what is written down.
	mostMarks = 32
	marksFor  = 6 * time.Hour
)

// A message whose deliveries exceed its attempts, without a failure that is known, is
// under suspicion: it may have taken its process down each time, or have been beside
// one that did, or never have run. It is run once more, by itself: nothing else of the
// route runs or is asked for. Before that it is written down in the consumer's metadata,
// where the next process finds it should this one end: what has ended aloneProof
// processes that way is dead. A result of any kind takes the mark back.

// aloneMark says that a message was started by itself so many times.
type aloneMark struct {
	id    messageID
	count int
	at    int64 // of the last time, Unix seconds
}

// aloneMarks are the marks of a consumer, the oldest first.
type aloneMarks []aloneMark

// parseAloneMarks reads what String has written. What it cannot read it leaves out.
func parseAloneMarks(text string) (marks aloneMarks) {
	for part := range strings.SplitSeq(text, " ") {
		var m aloneMark
		if n, _ := fmt.Sscanf(part, "%d@%d:%d:%d", &m.id.seq, &m.id.time, &m.count, &m.at); n == 4 {
			marks = append(marks, m)
		}
	}
	return marks
}

// String gives one <sequence>@<stored time>:<count>:<time> for each mark.
func (s aloneMarks) String() string {
	var parts []string
	for _, m := range s {
		parts = append(parts, fmt.Sprintf("%d@%d:%d:%d", m.id.seq, m.id.time, m.count, m.at))
	}
	return strings.Join(parts, " ")
}

// count is how often a message was started by itself.
func (s aloneMarks) count(id messageID) int {
	for _, m := range s {
		if m.id == id {
			return m.count
		}
	}
	return 0
}

// with is s with a message marked count times, 0 for not at all, and without what is
// too old at now.
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

// mark counts in the consumer's metadata that a message was started by itself, once
// more or, with add 0, not at all any more, unless that proves it already. It returns
// how often it was before.
func (n aloneNotes) mark(ctx context.Context, id messageID, add int) (before int, err error) {
	err = retry{limit: apiTimeout}.do(ctx, func(ctx context.Context) error {
		info, err := n.api.consumerInfo(ctx, n.stream, n.consumer)
		if err != nil {
			return err
		}
		cfg := info.Config
		marks := parseAloneMarks(cfg.Metadata[metadataAlone])
		before = marks.count(id)
		next := 0
		if add > 0 {
			if before >= aloneProof {
				return nil
			}
			next = before + add
		} else if before == 0 {
			return nil
		}
		cfg.Name = n.consumer
		cfg.Metadata = withMetadata(cfg.Metadata, metadataAlone, marks.with(id, next, time.Now().Unix()).String())
		_, err = n.api.updateConsumer(ctx, n.stream, cfg)
		return err
	})
	return before, err
}
