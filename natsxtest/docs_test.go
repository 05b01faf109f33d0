package natsxtest_test

import (
	"context"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/natsxtest"
)

// What docs/testing.md shows runs here.

type Order struct {
	ID    string
	Cents int
}

func pay(ctx context.Context, o Order) error {
	if natsx.MsgFrom(ctx).Attempt() >= 3 {
		return natsx.Permanent(errors.New("the bank has refused it three times"))
	}
	return errors.New("the bank does not answer")
}

func TestPayGivesUp(t *testing.T) {
	m := natsxtest.Msg("orders.created", []byte(`{"ID": "o-1"}`), natsxtest.Durable("billing"), natsxtest.Attempt(3))
	err := natsx.JSON(pay)(natsxtest.Context(t.Context(), m), m)
	if got := natsx.OutcomeOf(err); got != natsx.OutcomeDead {
		t.Errorf("got %s: %v", got, err)
	}
}

func TestBillingIsPatient(t *testing.T) {
	billing := natsx.Route("orders.*").Durable("billing").
		Retry(7).Backoff(30*time.Second, 20*time.Minute).DLQ("dlq.orders").
		Handle(natsx.JSON(pay))
	down := errors.New("the bank does not answer")

	var patience time.Duration
	for attempt := 1; ; attempt++ {
		s := natsxtest.Settle(billing, down, attempt)
		if s.Outcome == natsx.OutcomeDead {
			break
		}
		patience += s.After
	}
	if patience < 45*time.Minute {
		t.Errorf("gives up after %s", patience)
	}
	if s := natsxtest.Settle(billing, natsx.Permanent(down), 1); s.Reason != natsx.ReasonPermanent {
		t.Errorf("got %+v", s)
	}
}

func routes() []natsx.Spec {
	return []natsx.Spec{
		natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").Handle(natsx.JSON(pay)),
	}
}

func TestRoutesAreSound(t *testing.T) {
	if err := natsx.Validate(routes()...); err != nil {
		t.Error(err)
	}
}

func TestABadOrderIsDead(t *testing.T) {
	r := natsxtest.Run(t, natsx.Route("orders.*").Durable("billing").
		Retry(1).Backoff(time.Millisecond, time.Second).DLQ("dlq.orders").
		Handle(natsx.JSON(func(ctx context.Context, o Order) error {
			return errors.New("no such customer")
		})))
	r.Publish(natsx.To("orders.created").JSON(Order{ID: "o-1"}))

	attempts := r.Until(natsx.OutcomeDead)
	if len(attempts) != 2 {
		t.Errorf("%d attempts, want 2", len(attempts))
	}
}

func TestWithAServer(t *testing.T) {
	s := natsxtest.Server(t)
	nc := natsxtest.Connect(t, s)
	if err := natsx.Stream("ORDERS").Subjects("orders.*").Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
}

func TestTheDocumentShowsWhatRuns(t *testing.T) {
	document, err := os.ReadFile("../docs/testing.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("docs_test.go")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllSubmatch(document, -1)
	if len(blocks) == 0 {
		t.Fatal("docs/testing.md has no Go block")
	}
	for _, block := range blocks {
		if !strings.Contains(string(source), string(block[1])) {
			t.Errorf("nothing runs this block of docs/testing.md:\n%s", block[1])
		}
	}
}
