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

// A redrive that is killed after a copy was stored and before its letter is removed
// leaves no trace at the letter, and the copy may be anywhere behind the original: the
// next redrive would have to read all of that. So each redrive keeps a mark at the DLQ
// for as long as it runs. It is a consumer that nobody reads, whose metadata says behind
// which sequence of which stream the copies are. A redrive that ends well takes its mark
// away; copies are searched for only where the mark of another one says so.
const (
	markConsumer    = "natsx-redrive-"
	metadataRedrive = "natsx-redrive"

	markRenew = time.Minute         // how often a redrive shows that it lives
	markDead  = 10 * time.Minute    // after which its mark is that of a killed one
	markKept  = 30 * 24 * time.Hour // by the server, for the next redrive to find
)

// redriveMark is what a mark says.
type redriveMark struct {
	Subject string            `json:"subject"` // of the query
	At      int64             `json:"at"`      // last sign of life, Unix seconds
	Behind  map[string]uint64 `json:"behind"`  // by stream
}

// redriveMarks are a redrive's own mark and those of others.
type redriveMarks struct {
	d         *deadLetters
	name      string // of the own
	own       redriveMark
	written   time.Time
	inherited bool // the own stands for killed redrives too
	homeless  bool // the DLQ's stream keeps no marks
}

func newRedriveMarks(d *deadLetters) *redriveMarks {
	c := &d.dlq.Config
	return &redriveMarks{
		d: d, name: markConsumer + rand.Text(), own: redriveMark{Subject: d.subject, Behind: map[string]uint64{}},
		homeless: c.Retention != jetstream.LimitsPolicy || inactiveThreshold(c, markKept) < markKept,
	}
}

// put has the mark say that copies may be stored in a stream from now on, which has got
// to last.
func (k *redriveMarks) put(ctx context.Context, stream string, last uint64) error {
	behind, known := k.own.Behind[stream]
	if known && behind <= last && time.Since(k.written) < markRenew || k.homeless {
		return nil
	}
	if !known || last < behind { // it was recreated
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
		Name: k.name, Durable: k.name, Description: "a redrive that is under way or was killed",
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

// refused reports whether err means that there can be no marks.
func (k *redriveMarks) refused(err error) bool {
	var api jetstream.JetStreamError
	k.homeless = k.homeless || errors.Is(err, ErrPermission) ||
		errors.As(err, &api) && api.APIError() != nil && !transient(err) && !hasCode(err, codeStreamNotFound)
	return k.homeless
}

// others is where, by stream, the copies of other redrives may be. The own mark takes
// over those of killed ones, unless nothing is to be changed. All is true when that is
// unknown, so that they may be anywhere.
func (k *redriveMarks) others(ctx context.Context) (behind map[string]uint64, all bool, err error) {
	if k.homeless {
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
			if k.homeless || err != nil {
				return nil, k.homeless, err
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
			break // it is found again
		}
	}
	return behind, false, nil
}

// read reads the mark of another redrive, which is empty when it is gone.
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

// lower makes each of have no higher than in with.
func lower(have, with map[string]uint64) {
	for stream, behind := range with {
		if known, ok := have[stream]; !ok || behind < known {
			have[stream] = behind
		}
	}
}

// end takes the own mark away once no copy has a letter left. Whole means that the
// redrive has dealt with every letter.
func (k *redriveMarks) end(ctx context.Context, whole bool) {
	if k.written.IsZero() || k.inherited && !whole {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), apiTimeout)
	defer cancel()
	k.d.api.deleteConsumer(ctx, k.d.dlq.Config.Name, k.name) // what stays costs the next redrive a search
}
