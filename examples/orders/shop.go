package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/natsx/natsx"
)

// Cards that the customers pay with, and what billing does with them.
const (
	cardGood      = "good"
	cardBusy      = "busy"      // fails once
	cardDeclined  = "declined"  // fails always
	cardCursed    = "cursed"    // panics
	cardCancelled = "cancelled" // the order is cancelled: not charged
)

// customers order repeatedly, in this order. An empty item makes an order that does not
// decode.
var customers = []struct {
	item string
	card string
}{
	{"coffee", cardGood}, {"cake", cardGood}, {"tea", cardBusy}, {"coffee", cardGood},
	{"bread", cardDeclined}, {"cake", cardGood}, {"", ""}, {"tea", cardGood},
	{"coffee", cardBusy}, {"cake", cardCursed}, {"unicorn", cardGood}, {"bread", cardCancelled},
	{"coffee", cardGood},
}

// shop publishes orders and bills them. Its name is in its subjects, so that shops on one
// server do not count each other's orders.
type shop struct {
	name  string
	pub   *natsx.Publisher
	tally *tally
	say   *screen
}

func (s *shop) orders() string  { return "shop.orders." + s.name }
func (s *shop) dlq() string     { return "shop.dlq." + s.name }
func (s *shop) durable() string { return "billing-" + s.name }

// streams that the shop needs. Their messages expire after a day.
func (s *shop) streams() []natsx.StreamSpec {
	return []natsx.StreamSpec{
		natsx.Stream("SHOP_ORDERS").Subjects("shop.orders.*").MaxAge(24 * time.Hour),
		natsx.Stream("SHOP_DLQ").Subjects("shop.dlq.*").MaxAge(24 * time.Hour),
	}
}

// serve serves n customers, one per pause, or customers for ever if n is 0. It returns
// early when ctx ends. It prints an order that cannot be sent, and goes on.
func (s *shop) serve(ctx context.Context, n int, pause time.Duration) {
	opened := time.Now().UnixNano() // for message ids that differ from those of an earlier run
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := 0; n == 0 || i < n; i++ {
		if err := s.sell(ctx, i, opened); err != nil {
			s.tally.unsent.Add(1)
			s.say.line(red, "shop", orderID(i), "order not sent: "+err.Error())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// sell requests the price and publishes the order of customer i, even if the shop closes
// meanwhile.
func (s *shop) sell(ctx context.Context, i int, opened int64) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	c := customers[i%len(customers)]
	o := order{ID: orderID(i), Item: c.item, Count: 1 + i%3, Card: c.card}
	e := natsx.To(s.orders()).MsgID(fmt.Sprintf("%s/%d/%s", s.name, opened, o.ID))
	if c.item == "" {
		e = e.Data([]byte("1 coffee pls"))
	} else {
		cents, err := s.ask(ctx, o)
		if err != nil {
			return err
		}
		o.Cents = o.Count * cents
		e = e.JSON(o)
	}
	ack, err := s.pub.Publish(ctx, e)
	if err != nil {
		return err
	}
	s.tally.publish(ack.Sequence, o)
	if i%10 != 0 {
		return nil
	}
	// A caller that does not know the outcome sends its order again with the same id.
	again, err := s.pub.Publish(ctx, e)
	if err != nil {
		return fmt.Errorf("the second time: %w", err)
	}
	s.tally.repeats.Add(1)
	if again.Duplicate && again.Sequence == ack.Sequence {
		s.tally.duplicates.Add(1)
	}
	return nil
}

func orderID(i int) string { return fmt.Sprintf("o-%02d", i+1) }

// ask requests the price of an item, 0 if it has none.
func (s *shop) ask(ctx context.Context, o order) (cents int, err error) {
	p, err := natsx.RequestJSON[priceReply](ctx, s.pub, natsx.To("shop.prices.get").JSON(priceRequest{o.Item}))
	var refused *natsx.ReplyError
	switch {
	case errors.As(err, &refused):
		s.tally.refused.Add(1)
		s.say.line(yellow, "pricing", o.ID, fmt.Sprintf("? %s: %d %s", o.Item, refused.Code, refused.Message))
		return 0, nil
	case err != nil:
		return 0, err
	}
	s.tally.priced.Add(1)
	return p.Cents, nil
}
