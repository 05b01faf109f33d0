package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/natsx/natsx"
)

// retries of an order that billing cannot charge.
const retries = 2

type order struct {
	ID    string `json:"id"`
	Item  string `json:"item"`
	Count int    `json:"count"`
	Card  string `json:"card"`
	Cents int    `json:"cents"` // 0 when the item has no price
}

type (
	priceRequest struct {
		Item string `json:"item"`
	}
	priceReply struct {
		Cents int `json:"cents"`
	}
)

// routes are the whole service.
func (s *shop) routes() []natsx.Spec {
	return []natsx.Spec{
		natsx.Route(s.orders()).Durable(s.durable()).
			Retry(retries).Backoff(200*time.Millisecond, time.Second).
			Timeout(5 * time.Second).
			DLQ(s.dlq()).
			Handle(natsx.JSON(s.bill)),
		natsx.Route("shop.prices.get").Queue("pricing").Reply(natsx.JSONReply(price)),
		natsx.Route(s.orders()).Handle(s.audit),
	}
}

// bill charges an order. Its result decides how the message is settled.
func (s *shop) bill(ctx context.Context, o order) error {
	select { // a slow bank
	case <-time.After(30 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	switch {
	case o.Card == cardCancelled:
		return natsx.Discard(errors.New("the customer cancelled"))
	case o.Cents == 0:
		return natsx.Permanent(fmt.Errorf("%s has no price", o.Item))
	case o.Card == cardBusy && natsx.MsgFrom(ctx).Attempt() == 1:
		return errors.New("the bank is busy")
	case o.Card == cardDeclined:
		return errors.New("the card is declined")
	case o.Card == cardCursed:
		panic("the till is on fire")
	}
	return nil
}

var prices = map[string]int{"coffee": 290, "tea": 240, "cake": 380, "bread": 450}

func price(_ context.Context, q priceRequest) (priceReply, error) {
	cents, ok := prices[q.Item]
	if !ok {
		return priceReply{}, natsx.Fail(404, "no such item")
	}
	return priceReply{Cents: cents}, nil
}

// audit receives every order, even if billing cannot decode it.
func (s *shop) audit(context.Context, *natsx.Msg) error {
	s.tally.audited.Add(1)
	return nil
}
