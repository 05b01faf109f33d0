// Outbox publishes from a database without losing an event and without inventing one: an
// order and its event are committed in one transaction, and a relay publishes what is in
// the outbox. The relay is killed between the publish and its note of it; the message id
// makes the second publish of the same row harmless.
//
// The database is SQLite, embedded in this process; the module of its own keeps it away
// from natsx. The program starts a nats-server of its own, or uses that of NATS_URL, and
// ends by itself.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	_ "modernc.org/sqlite"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

type order struct {
	ID    string `json:"id"`
	Cents int    `json:"cents"`
}

const schema = `
CREATE TABLE orders (id TEXT PRIMARY KEY, cents INTEGER NOT NULL CHECK (cents > 0));
CREATE TABLE outbox (
	id      INTEGER PRIMARY KEY AUTOINCREMENT,
	subject TEXT NOT NULL,
	payload BLOB NOT NULL,
	sent    INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX outbox_unsent ON outbox (id) WHERE sent = 0;`

// place stores an order and its event, both or none.
func place(ctx context.Context, db *sql.DB, o order) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	payload, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO outbox (subject, payload) VALUES ('outbox.orders.placed', ?)`, payload); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO orders (id, cents) VALUES (?, ?)`, o.ID, o.Cents); err != nil {
		return err
	}
	return tx.Commit()
}

// relay publishes what the outbox of a database holds.
type relay struct {
	db   *sql.DB
	pub  *natsx.Publisher
	name string // of the database: its row numbers begin at 1, as those of others do
	dies func() bool
}

var errKilled = errors.New("the relay is killed before it notes what it has published")

// pass publishes the unsent rows, in their order, and notes which are sent. It reports how
// many were stored, and how many of them the stream had already.
func (r *relay) pass(ctx context.Context) (stored, again int, err error) {
	rows, err := r.db.QueryContext(ctx, `SELECT id, subject, payload FROM outbox WHERE sent = 0 ORDER BY id LIMIT 1000`)
	if err != nil {
		return 0, 0, err
	}
	defer rows.Close()
	var ids []int64
	var events []natsx.Envelope
	for rows.Next() {
		var id int64
		var subject string
		var payload []byte
		if err := rows.Scan(&id, &subject, &payload); err != nil {
			return 0, 0, err
		}
		ids = append(ids, id)
		events = append(events, natsx.To(subject).Data(payload).
			Header("Content-Type", "application/json").
			MsgID(r.name+"/"+strconv.FormatInt(id, 10)))
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return 0, 0, err
	}
	acks, failed := r.pub.PublishAll(ctx, events...) // those that failed stay in the outbox
	if r.dies() {
		return 0, 0, errKilled
	}
	for i, ack := range acks {
		if ack.Sequence == 0 {
			continue
		}
		if _, err := r.db.ExecContext(ctx, `UPDATE outbox SET sent = 1 WHERE id = ?`, ids[i]); err != nil {
			return stored, again, err
		}
		stored++
		if ack.Duplicate {
			again++
		}
	}
	return stored, again, failed
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "outbox:", err)
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
	nc, err := natsx.Connect(url, nats.Name("natsx outbox"))
	if err != nil {
		return err
	}
	defer nc.Close()
	dir, err := os.MkdirTemp("", "natsx-outbox-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	db, err := sql.Open("sqlite", filepath.Join(dir, "shop.db"))
	if err != nil {
		return err
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := db.ExecContext(ctx, schema); err != nil {
		return err
	}

	billed := make(chan order, 10)
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		// The window in which a row may be published again and is stored once.
		natsx.Stream("OUTBOX_ORDERS").Subjects("outbox.orders.*").DedupWindow(time.Hour).MaxAge(time.Hour),
	))
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() {
		stopped <- broker.Run(running, natsx.Route("outbox.orders.placed").Durable("outbox-billing").DeliverNew().Concurrency(1).
			Handle(natsx.JSON(func(_ context.Context, o order) error {
				billed <- o
				return nil
			})))
	}()
	select {
	case <-broker.Ready():
	case err := <-stopped:
		return err
	}
	err = shop(ctx, db, natsx.NewPublisher(nc), billed)
	stop()
	return errors.Join(err, <-stopped)
}

// shop places orders and relays their events.
func shop(ctx context.Context, db *sql.DB, pub *natsx.Publisher, billed <-chan order) error {
	for _, o := range []order{{"o-1", 990}, {"o-2", 0}, {"o-3", 450}} {
		if err := place(ctx, db, o); err != nil {
			fmt.Printf("%s is not placed, and has no event\n", o.ID)
			continue
		}
		fmt.Println(o.ID, "is placed")
	}

	killed := false
	r := &relay{db: db, pub: pub, name: "shop-" + strconv.FormatInt(time.Now().UnixNano(), 36), dies: func() bool {
		before := killed
		killed = true
		return !before
	}}
	_, _, err := r.pass(ctx)
	fmt.Println(err)
	stored, again, err := r.pass(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("the next relay publishes %d, of which the stream has %d already\n", stored, again)
	stored, _, err = r.pass(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("and then %d\n", stored)

	for range 2 {
		select {
		case o := <-billed:
			fmt.Printf("%s is billed once: %d cents\n", o.ID, o.Cents)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if len(billed) > 0 {
		return fmt.Errorf("%d orders were billed twice", len(billed))
	}
	return nil
}
