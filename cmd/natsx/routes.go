package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// natsxID is the metadata by which natsx knows its durables.
const natsxID = "natsx-id"

// durable is what routes reports about one durable.
type durable struct {
	Stream       string     `json:"stream"`
	Durable      string     `json:"durable"`
	Filters      []string   `json:"filters,omitempty"`
	Lag          uint64     `json:"lag"`         // stored and not delivered yet
	AckPending   int        `json:"ack_pending"` // delivered and not settled
	MaxPending   int        `json:"max_ack_pending"`
	Redelivered  int        `json:"redelivered"` // of ack pending, delivered more than once
	Pulls        int        `json:"pulls"`       // that wait at the server
	LastActivity *time.Time `json:"last_activity,omitempty"`
	Paused       bool       `json:"paused"`
	Natsx        bool       `json:"natsx"` // made or adopted by natsx
}

func prepareRoutes(t *tool) func(context.Context) error {
	all := t.flags.Bool("all", false, "show consumers that no natsx route has used, too")
	return func(ctx context.Context) error {
		if err := t.connect(ctx); err != nil {
			return err
		}
		found, err := durables(ctx, t.js, t.args, *all)
		if err != nil {
			return err
		}
		if t.json {
			for _, d := range found {
				if err := t.printJSON(d); err != nil {
					return err
				}
			}
			return nil
		}
		tab := t.table("stream", "durable", "lag", "ack pending", "redelivered", "pulls", "last activity", "state", "filter")
		for _, d := range found {
			at := time.Time{}
			if d.LastActivity != nil {
				at = *d.LastActivity
			}
			tab.row(d.Stream, d.Durable, strconv.FormatUint(d.Lag, 10), fmt.Sprintf("%d/%d", d.AckPending, d.MaxPending), strconv.Itoa(d.Redelivered),
				strconv.Itoa(d.Pulls), since(at), d.state(), strings.Join(d.Filters, " "))
		}
		return tab.end()
	}
}

// state is what a person on call should look at first.
func (d durable) state() string {
	switch {
	case d.Paused:
		return "paused"
	case d.MaxPending > 0 && d.AckPending >= d.MaxPending:
		return "full" // the server delivers nothing new
	case d.Pulls == 0 && d.Lag > 0 && d.AckPending == 0:
		return "no reader"
	}
	return "ok"
}

// durables returns the durables of the streams with these names, or of all.
func durables(ctx context.Context, js jetstream.JetStream, streams []string, all bool) (found []durable, _ error) {
	if len(streams) == 0 {
		names := js.StreamNames(ctx)
		for name := range names.Name() {
			streams = append(streams, name)
		}
		if err := names.Err(); err != nil {
			return nil, fmt.Errorf("streams cannot be listed: %w", err)
		}
	}
	for _, name := range streams {
		s, err := js.Stream(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("stream %q: %w", name, err)
		}
		list := s.ListConsumers(ctx)
		for info := range list.Info() {
			c := info.Config
			d := durable{
				Stream: name, Durable: info.Name, Filters: c.FilterSubjects, Lag: info.NumPending, AckPending: info.NumAckPending,
				MaxPending: c.MaxAckPending, Redelivered: info.NumRedelivered, Pulls: info.NumWaiting, Paused: info.Paused, Natsx: c.Metadata[natsxID] != "",
			}
			if c.FilterSubject != "" {
				d.Filters = []string{c.FilterSubject}
			}
			for _, at := range []*time.Time{info.Delivered.Last, info.AckFloor.Last} {
				if at != nil && (d.LastActivity == nil || at.After(*d.LastActivity)) {
					d.LastActivity = at
				}
			}
			if all || d.Natsx {
				found = append(found, d)
			}
		}
		if err := list.Err(); err != nil {
			return nil, fmt.Errorf("consumers of stream %q cannot be listed: %w", name, err)
		}
	}
	slices.SortFunc(found, func(a, b durable) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Durable, b.Durable))
	})
	return found, nil
}
