// Pipeline has two stages. The first needs the readings of each sensor in their order,
// also when one of them fails for a while: it computes how much a value has changed, and
// publishes that. The second writes the changes to a table, many at once.
//
// A publish of the first stage is stored once, however often its reading is handled: its
// message id is made of the handled message. It starts a nats-server of its own, or uses
// that of NATS_URL, ends by itself, and checks that every change is in the table once and
// in order.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

const (
	sensors  = 5
	readings = 40 // of each sensor
)

type reading struct {
	Sensor string `json:"sensor"`
	Number int    `json:"number"`
	Value  int    `json:"value"`
}

type change struct {
	Sensor string `json:"sensor"`
	Number int    `json:"number"`
	By     int    `json:"by"`
}

// differ is the first stage. It remembers the last value of each sensor, which is only
// right when no reading overtakes another.
type differ struct {
	pub *natsx.Publisher

	mu     sync.Mutex
	last   map[string]reading
	failed int
}

func (d *differ) handle(ctx context.Context, r reading) error {
	d.mu.Lock()
	before := d.last[r.Sensor]
	if r.Number%10 == 7 && natsx.MsgFrom(ctx).Attempt() == 1 {
		d.failed++
		d.mu.Unlock()
		return errors.New("the calibration of the sensor is not loaded") // for this once
	}
	d.mu.Unlock()
	if r.Number != before.Number && r.Number != before.Number+1 {
		return natsx.Permanent(fmt.Errorf("reading %d of %s comes after %d", r.Number, r.Sensor, before.Number))
	}
	c := change{r.Sensor, r.Number, r.Value - before.Value}
	if _, err := d.pub.Publish(ctx, natsx.To("pipeline.changes."+r.Sensor).JSON(c)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last[r.Sensor] = r
	return nil
}

// table is what the second stage writes. Its key is unique, as that of a database, since a
// batch may come again.
type table struct {
	mu      sync.Mutex
	rows    map[string]map[int]change // by sensor and number
	count   int
	inserts int
	refused bool          // the change that is none has come
	full    chan struct{} // closed when all has come
}

func (t *table) insert(_ context.Context, changes []change) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inserts++
	refused := natsx.BatchError{}
	for i, c := range changes {
		if c.By < 0 {
			t.refused = true
			refused[i] = natsx.Permanent(errors.New("a meter does not run backwards")) // the others are written
			continue
		}
		if t.rows[c.Sensor] == nil {
			t.rows[c.Sensor] = map[int]change{}
		}
		if _, known := t.rows[c.Sensor][c.Number]; !known {
			t.rows[c.Sensor][c.Number] = c
			t.count++
		}
	}
	if t.count == sensors*readings && t.refused {
		select {
		case <-t.full:
		default:
			close(t.full)
		}
	}
	return refused
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pipeline:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	url := os.Getenv("NATS_URL")
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
	}
	nc, err := natsx.Connect(url, nats.Name("natsx pipeline"))
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	pub := natsx.NewPublisher(nc)
	first := &differ{pub: pub, last: map[string]reading{}}
	second := &table{rows: map[string]map[int]change{}, full: make(chan struct{})}
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		natsx.Stream("PIPELINE_READINGS").Subjects("pipeline.readings.*").MaxAge(time.Hour),
		natsx.Stream("PIPELINE_CHANGES").Subjects("pipeline.changes.*").MaxAge(time.Hour),
		natsx.Stream("PIPELINE_DLQ").Subjects("pipeline.dlq.*"),
	))
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running,
			natsx.Route("pipeline.readings.*").Durable("pipeline-differ").DeliverNew().
				OrderedBy(natsx.SubjectToken(2)). // the sensor
				Retry(5).Backoff(20*time.Millisecond, time.Second).DLQ("pipeline.dlq.readings").
				Handle(natsx.JSON(first.handle)),
			natsx.Route("pipeline.changes.*").Durable("pipeline-table").DeliverNew().
				Batch(50, 100*time.Millisecond).
				Retry(5).DLQ("pipeline.dlq.changes").
				HandleBatch(natsx.JSONBatch(second.insert)),
		)
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return err
	}
	err = measure(ctx, pub, second)
	stop()
	if err := errors.Join(err, <-stopped); err != nil {
		return err
	}
	return check(first, second, broker.Stats())
}

// measure publishes the readings of all sensors, one sensor after another in turn, and
// waits until the table has the changes.
func measure(ctx context.Context, pub *natsx.Publisher, t *table) error {
	var es []natsx.Envelope
	for number := 1; number <= readings; number++ {
		for s := range sensors {
			r := reading{fmt.Sprint("s", s+1), number, number * number}
			es = append(es, natsx.To("pipeline.readings."+r.Sensor).JSON(r))
		}
	}
	if _, err := pub.PublishAll(ctx, es...); err != nil {
		return err
	}
	backwards, err := json.Marshal(change{"s1", readings + 1, -1})
	if err != nil {
		return err
	}
	if _, err := pub.Publish(ctx, natsx.To("pipeline.changes.s1").Data(backwards)); err != nil {
		return err
	}
	select {
	case <-t.full:
		return nil
	case <-ctx.Done():
		t.mu.Lock()
		defer t.mu.Unlock()
		return fmt.Errorf("%d of %d changes are written: %w", t.count, sensors*readings, ctx.Err())
	}
}

// check holds the table against what was published.
func check(d *differ, t *table, stats natsx.Stats) error {
	for sensor, rows := range t.rows {
		for number := 1; number <= readings; number++ {
			if want := 2*number - 1; rows[number].By != want {
				return fmt.Errorf("change %d of %s is by %d, want %d", number, sensor, rows[number].By, want)
			}
		}
	}
	differ, changes := stats.Routes[0], stats.Routes[1]
	if differ.Dead != 0 || changes.Dead != 1 || t.inserts >= t.count {
		return fmt.Errorf("%d readings and %d changes are dead, want 0 and 1; %d inserts for %d changes", differ.Dead, changes.Dead, t.inserts, t.count)
	}
	fmt.Printf("%d readings of %d sensors, %d of them retried in their order\n", differ.Succeeded, sensors, d.failed)
	fmt.Printf("%d changes written, many at once; %d refused alone\n", t.count, changes.Dead)
	return nil
}
