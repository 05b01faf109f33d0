package natsx

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// If a redrive is killed after it stored a copy and before it removed the letter, the next
// redrive must find that copy, which may be anywhere after the original. To avoid reading
// all of that, each redrive keeps a mark on the DLQ's stream while it runs: a consumer that
// nobody pulls from, whose metadata has, for each original stream, a sequence after which
// its copies are. A redrive that ends normally deletes its mark, and copies are searched
// for only as far as the marks of other redrives require.
const (
	markConsumer    = "natsx-redrive-"
	metadataRedrive = "natsx-redrive"

	markRenew = time.Minute         // how often a running redrive updates its mark
	markDead  = 10 * time.Minute    // after which a mark belongs to a killed redrive
	markKept  = 30 * 24 * time.Hour // how long the server keeps the mark of a killed redrive
)

// redriveMark is what a mark says.
type redriveMark struct {
	Subject string            `json:"subject"` // of the query
	At      int64             `json:"at"`      // when it was last updated, Unix seconds
	Behind  map[string]uint64 `json:"behind"`  // by stream
}

// redriveMarks are a redrive's own mark and those of others.
type redriveMarks struct {
	d         *deadLetters
	name      string // of the own
	own       redriveMark
	written   time.Time
	inherited bool // own includes the marks of killed redrives
	unmarked  bool // the DLQ's stream cannot have marks
}

func newRedriveMarks(d *deadLetters) *redriveMarks {
	c := &d.dlq.Config
	return &redriveMarks{
		d: d, name: markConsumer + rand.Text(), own: redriveMark{Subject: d.subject, Behind: map[string]uint64{}},
		unmarked: c.Retention != jetstream.LimitsPolicy || inactiveThreshold(c, markKept) < markKept,
	}
}

// put records that copies may be stored in a stream after its sequence last.
func (k *redriveMarks) put(ctx context.Context, stream string, last uint64) error {
	behind, known := k.own.Behind[stream]
	if known && behind <= last && time.Since(k.written) < markRenew || k.unmarked {
		return nil
	}
	if !known || last < behind { // the stream was recreated
		k.own.Behind[stream] = last
	}
	return k.write(ctx)
}

func (k *redriveMarks) write(ctx context.Context) error {
	k.own.At = time.Now().Unix()
	text, err := json.Marshal(k.own)
	if err != nil {
		return err
	}
	cfg := jetstream.ConsumerConfig{
		Name: k.name, Durable: k.name, Description: "a redrive that is running or was killed",
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverNewPolicy, InactiveThreshold: markKept,
		Metadata: map[string]string{metadataRedrive: string(text)},
	}
	if k.d.subject != ">" {
		cfg.FilterSubject = k.d.subject
	}
	err = retry{limit: readPatience}.do(ctx, func(ctx context.Context) error {
		_, err := k.d.api.putConsumer(ctx, k.d.dlq.Config.Name, cfg, k.d.api.js.CreateOrUpdateConsumer)
		return err
	})
	if k.refused(err) {
		return nil
	}
	if err == nil {
		k.written = time.Now()
	}
	return err
}

// refused reports whether marks are impossible, by err or an earlier error.
func (k *redriveMarks) refused(err error) bool {
	var api jetstream.JetStreamError
	k.unmarked = k.unmarked || errors.Is(err, ErrPermission) ||
		errors.As(err, &api) && api.APIError() != nil && !transient(err) && !hasCode(err, codeStreamNotFound)
	return k.unmarked
}

// others returns, by stream, the sequence after which copies of other redrives may be. The
// marks of killed redrives are merged into the own one, except in a dry run. all is true if
// copies may be anywhere.
func (k *redriveMarks) others(ctx context.Context) (behind map[string]uint64, all bool, err error) {
	if k.unmarked {
		return nil, true, nil
	}
	a, stream := k.d.api, k.d.dlq.Config.Name
	behind = map[string]uint64{}
	var dead []string
	for offset, more := 0, true; more; {
		var page struct {
			Total     int      `json:"total"`
			Consumers []string `json:"consumers"`
		}
		err := a.ask(ctx, "CONSUMER.NAMES."+stream, map[string]int{"offset": offset}, &page)
		if k.refused(err) {
			return nil, true, nil
		}
		if err != nil {
			return nil, false, err
		}
		for _, name := range page.Consumers {
			if name == k.name || !strings.HasPrefix(name, markConsumer) {
				continue
			}
			mark, err := k.read(ctx, name)
			if k.unmarked || err != nil {
				return nil, k.unmarked, err
			}
			if !subjectsOverlap(mark.Subject, k.d.subject) {
				continue
			}
			lower(behind, mark.Behind)
			if time.Since(time.Unix(mark.At, 0)) > markDead && subjectMatches(k.d.subject, mark.Subject) {
				dead = append(dead, name)
				lower(k.own.Behind, mark.Behind)
			}
		}
		offset += len(page.Consumers)
		more = len(page.Consumers) > 0 && offset < page.Total
	}
	if len(dead) == 0 || k.d.dryRun {
		return behind, false, nil
	}
	k.inherited = true
	if err := k.write(ctx); err != nil {
		return nil, false, err
	}
	for _, name := range dead {
		if err := a.deleteConsumer(ctx, stream, name); err != nil {
			break // the next redrive finds it
		}
	}
	return behind, false, nil
}

// read returns the mark of another redrive, which is empty if it was deleted.
func (k *redriveMarks) read(ctx context.Context, name string) (mark redriveMark, err error) {
	var info jetstream.ConsumerInfo
	err = k.d.api.ask(ctx, "CONSUMER.INFO."+k.d.dlq.Config.Name+"."+name, struct{}{}, &info)
	if hasCode(err, codeConsumerNotFound) {
		return mark, nil
	}
	if k.refused(err) {
		return mark, nil
	}
	if err == nil && json.Unmarshal([]byte(info.Config.Metadata[metadataRedrive]), &mark) != nil {
		mark = redriveMark{}
	}
	return mark, err
}

// lower lowers the sequences in have to those in with.
func lower(have, with map[string]uint64) {
	for stream, behind := range with {
		if known, ok := have[stream]; !ok || behind < known {
			have[stream] = behind
		}
	}
}

// end deletes the own mark. If that includes the marks of killed redrives, it is kept unless
// this redrive was whole, which means that it processed every letter.
func (k *redriveMarks) end(ctx context.Context, whole bool) {
	if k.written.IsZero() || k.inherited && !whole {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), apiTimeout)
	defer cancel()
	k.d.api.deleteConsumer(ctx, k.d.dlq.Config.Name, k.name) // if that fails, the next redrive searches once more
}
