package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
)

func nop(context.Context, *Msg) error               { return nil }
func nopBatch(context.Context, []*Msg) error        { return nil }
func noReply(context.Context, *Msg) ([]byte, error) { return nil, nil }

// TestValidate goes through every option: what it takes and what it refuses.
func TestValidate(t *testing.T) {
	t.Parallel()
	core := Route("orders.*")
	billing := core.Durable("billing")
	const (
		inCore    = `natsx: route "orders.*": `
		inBilling = `natsx: route "orders.*" durable "billing": `
	)
	long := strings.Repeat("x", maxNameLength+1)
	type fault struct {
		line string
		is   error
	}
	for _, tc := range []struct {
		name string
		spec Spec
		want []fault
	}{
		{"core", core.Handle(nop), nil},
		{"core with all that fits", core.Queue("g").Timeout(time.Second).Concurrency(1).Handle(nop), nil},
		{"reply", core.Queue("g").Reply(noReply), nil},
		{"durable", billing.Handle(nop), nil},
		{"durable with all that fits", billing.Stream("ORDERS").DeliverFromSequence(1).Retry(0).Backoff(time.Second, time.Second).
			Timeout(time.Minute).AckWait(minAckWait).Concurrency(8).MaxAckPending(8).ConfirmAcks().DLQ("dlq.orders").PinnedBy("a/B_=-9").
			Also("returns.*").Also("stock.>").InactiveThreshold(minInactiveThreshold).AdoptChanges().Handle(nop), nil},
		{"deliver new", billing.DeliverNew().Handle(nop), nil},
		{"deliver last", billing.DeliverLast().Handle(nop), nil},
		{"deliver last per subject", billing.DeliverLastPerSubject().Handle(nop), nil},
		{"deliver from time", billing.DeliverFromTime(time.Unix(0, 0)).Handle(nop), nil},
		{"the last deliver option holds", billing.DeliverFromSequence(0).DeliverNew().Handle(nop), nil},
		{"a DLQ beside the filter", billing.DLQ("orders.a.dead").Handle(nop), nil},
		{"the longest names", core.Durable(long[1:]).Stream(long[1:]).Handle(nop), nil},

		{"empty filter", Route("").Handle(nop), []fault{{`natsx: route "": subject "": must not be empty`, ErrInvalidSubject}}},
		{"filter with white space", Route("a b").Handle(nop), []fault{{`natsx: route "a b": subject "a b": has white space`, ErrInvalidSubject}}},
		{"filter with an empty token", Route("a..b").Handle(nop), []fault{{`natsx: route "a..b": subject "a..b": has an empty token`, ErrInvalidSubject}}},
		{"filter with a control character", Route("a.\x01").Handle(nop), []fault{{`natsx: route "a.\x01": subject "a.\x01": has a control character`, ErrInvalidSubject}}},
		{"filter that is not text", Route("a.\xff").Handle(nop), []fault{{`natsx: route "a.\xff": subject "a.\xff": is not valid UTF-8`, ErrInvalidSubject}}},
		{"filter with > inside", Route("a.>.b").Handle(nop), []fault{{`natsx: route "a.>.b": subject "a.>.b": has > before its last token`, ErrInvalidSubject}}},
		{"filter with a wildcard in a token", Route("a.b*").Handle(nop), []fault{{`natsx: route "a.b*": subject "a.b*": has a wildcard inside the token "b*"`, ErrInvalidSubject}}},

		{"no function", core.Handle(nil), []fault{{inCore + `handler nil: a route needs a function`, ErrNoHandler}}},
		{"no responder", core.Reply(nil), []fault{{inCore + `handler nil: a route needs a function`, ErrNoHandler}}},
		{"no spec", Spec{}, []fault{
			{`natsx: route "": subject "": must not be empty`, ErrInvalidSubject},
			{`natsx: route "": handler nil: a route needs a function`, ErrNoHandler},
		}},
		{"typed handler without a function", core.Handle(JSON[int](nil)), []fault{{inCore + `handler nil: a route needs a function`, ErrNoHandler}}},
		{"letter handler without a function", core.Handle(OnDeadLetter(nil)), []fault{{inCore + `handler nil: a route needs a function`, ErrNoHandler}}},

		{"empty queue", core.Queue("").Handle(nop), []fault{{inCore + `queue "": must not be empty`, ErrInvalidName}}},
		{"queue with white space", core.Queue("a b").Handle(nop), []fault{{inCore + `queue "a b": has white space`, ErrInvalidName}}},
		{"long queue", core.Queue(long).Handle(nop), []fault{{inCore + `queue "` + long + `": is longer than 255 bytes`, ErrInvalidName}}},
		{"queue with a durable", billing.Queue("g").Handle(nop), []fault{{inBilling + `queue "g": does not fit with a durable, whose processes share messages anyway`, ErrOptionConflict}}},

		{"empty durable", core.Durable("").Handle(nop), []fault{{inCore + `durable "": must not be empty`, ErrInvalidName}}},
		{"durable with a dot", core.Durable("a.b").Handle(nop), []fault{{`natsx: route "orders.*" durable "a.b": durable "a.b": must not contain any of . * > / \`, ErrInvalidName}}},
		{"durable that does not print", core.Durable("a\u200b").Handle(nop), []fault{{`natsx: route "orders.*" durable "a\u200b": durable "a\u200b": has a character that is not printable`, ErrInvalidName}}},
		{"reply with a durable", billing.Reply(noReply), []fault{{inBilling + `reply: does not fit with a durable: a requester waits on core NATS`, ErrOptionConflict}}},

		{"empty stream", billing.Stream("").Handle(nop), []fault{{inBilling + `stream "": must not be empty`, ErrInvalidName}}},
		{"stream with white space", billing.Stream("A B").Handle(nop), []fault{{inBilling + `stream "A B": has white space`, ErrInvalidName}}},

		{"sequence 0", billing.DeliverFromSequence(0).Handle(nop), []fault{{inBilling + `deliverFromSequence 0: sequences start at 1`, ErrOutOfRange}}},
		{"zero time", billing.DeliverFromTime(time.Time{}).Handle(nop), []fault{{inBilling + `deliverFromTime: must not be the zero time`, ErrOutOfRange}}},
		{"negative retry", billing.Retry(-1).Handle(nop), []fault{{inBilling + `retry -1: must not be negative`, ErrOutOfRange}}},
		{"no backoff", billing.Backoff(0, time.Second).Handle(nop), []fault{{inBilling + `backoff 0s to 1s: both must be above zero`, ErrOutOfRange}}},
		{"backoff that falls", billing.Backoff(time.Minute, time.Second).Handle(nop), []fault{{inBilling + `backoff 1m0s to 1s: the maximum is below the minimum`, ErrOutOfRange}}},
		{"no timeout", core.Timeout(0).Handle(nop), []fault{{inCore + `timeout 0s: must be above zero`, ErrOutOfRange}}},
		{"short lease", billing.AckWait(99 * time.Millisecond).Handle(nop), []fault{{inBilling + `ackWait 99ms: must be at least 100ms`, ErrOutOfRange}}},
		{"no concurrency", core.Concurrency(0).Handle(nop), []fault{{inCore + `concurrency 0: must be at least 1`, ErrOutOfRange}}},
		{"nothing pending", billing.MaxAckPending(0).Handle(nop), []fault{{inBilling + `maxAckPending 0: must be at least 1`, ErrOutOfRange}}},
		{"pending below the concurrency", billing.Concurrency(8).MaxAckPending(7).Handle(nop), []fault{
			{inBilling + `maxAckPending 7: is below the concurrency of 8, which it would limit`, ErrOptionConflict},
		}},

		{"empty further filter", billing.Also("").Handle(nop), []fault{{inBilling + `also "": must not be empty`, ErrInvalidSubject}}},
		{"two filters in one", billing.Also("a.* b.*").Handle(nop), []fault{{inBilling + `also "a.* b.*": has white space`, ErrInvalidSubject}}},
		{"filters that overlap", billing.Also("a.b").Also("orders.new").Also("*.b").Also("orders.>").Handle(nop), []fault{
			{inBilling + `also "orders.new": overlaps with "orders.*" of the same durable`, ErrOptionConflict},
			{inBilling + `also "*.b": overlaps with "orders.*" of the same durable`, ErrOptionConflict},
			{inBilling + `also "orders.>": overlaps with "orders.*" of the same durable`, ErrOptionConflict},
		}},
		{"filter twice", billing.Also("a.*").Also("a.*").Handle(nop), []fault{{inBilling + `also "a.*": overlaps with "a.*" of the same durable`, ErrOptionConflict}}},
		{"further filter of a core route", core.Also("a.*").Also("b.*").Handle(nop), []fault{{inCore + `also ["a.*" "b.*"]: needs a durable`, ErrOptionConflict}}},
		{"further filter of what is faulty", Route("a..b").Durable("d").Also("a.>").Handle(nop), []fault{{`natsx: route "a..b" durable "d": subject "a..b": has an empty token`, ErrInvalidSubject}}},
		{"DLQ that comes back on a further filter", billing.Also("dlq.*").DLQ("dlq.x").Handle(nop), []fault{{inBilling + `dlq "dlq.x": is matched by the route's own filter: dead letters would come back`, ErrDLQLoop}}},
		{"short inactive threshold", billing.InactiveThreshold(999 * time.Millisecond).Handle(nop), []fault{{inBilling + `inactiveThreshold 999ms: must be at least 1s`, ErrOutOfRange}}},
		{"negative inactive threshold", billing.InactiveThreshold(-1).Handle(nop), []fault{{inBilling + `inactiveThreshold -1ns: must be at least 1s`, ErrOutOfRange}}},
		{"options of a durable on a core route", core.InactiveThreshold(time.Hour).AdoptChanges().Handle(nop), []fault{
			{inCore + `inactiveThreshold 1h0m0s: needs a durable`, ErrOptionConflict},
			{inCore + `adoptChanges: needs a durable`, ErrOptionConflict},
		}},
		{"empty group", billing.PinnedBy("").Handle(nop), []fault{{inBilling + `pinnedBy "": must not be empty`, ErrInvalidName}}},
		{"long group", billing.PinnedBy("12345678901234567").Handle(nop), []fault{{inBilling + `pinnedBy "12345678901234567": is longer than 16 bytes`, ErrInvalidName}}},
		{"group with a dot", billing.PinnedBy("a.b").Handle(nop), []fault{{inBilling + `pinnedBy "a.b": must have only letters, digits and / _ = -`, ErrInvalidName}}},
		{"group of a core route", core.PinnedBy("g").Handle(nop), []fault{{inCore + `pinnedBy "g": needs a durable`, ErrOptionConflict}}},

		{"empty DLQ", billing.DLQ("").Handle(nop), []fault{{inBilling + `dlq "": must not be empty`, ErrInvalidSubject}}},
		{"DLQ with a wildcard", billing.DLQ("dlq.>").Handle(nop), []fault{{inBilling + `dlq "dlq.>": has a wildcard`, ErrInvalidSubject}}},
		{"DLQ of the server", billing.DLQ("$JS.dlq").Handle(nop), []fault{{inBilling + `dlq "$JS.dlq": starts with $, which belongs to the server`, ErrInvalidSubject}}},
		{"long DLQ", billing.DLQ(strings.Repeat("x", 1025)).Handle(nop), []fault{{inBilling + `dlq "` + strings.Repeat("x", 1025) + `": is longer than 1024 bytes`, ErrInvalidSubject}}},
		{"DLQ that comes back", billing.DLQ("orders.dead").Handle(nop), []fault{{inBilling + `dlq "orders.dead": is matched by the route's own filter: dead letters would come back`, ErrDLQLoop}}},

		{"durable options on a core route", core.Stream("S").DeliverNew().Retry(1).Backoff(1, 2).AckWait(time.Second).MaxAckPending(9).ConfirmAcks().DLQ("d").Handle(nop), []fault{
			{inCore + `stream "S": needs a durable`, ErrOptionConflict},
			{inCore + `deliver new: needs a durable`, ErrOptionConflict},
			{inCore + `retry 1: needs a durable`, ErrOptionConflict},
			{inCore + `backoff 1ns to 2ns: needs a durable`, ErrOptionConflict},
			{inCore + `ackWait 1s: needs a durable`, ErrOptionConflict},
			{inCore + `maxAckPending 9: needs a durable`, ErrOptionConflict},
			{inCore + `confirmAcks: needs a durable`, ErrOptionConflict},
			{inCore + `dlq "d": needs a durable`, ErrOptionConflict},
		}},
		{"durable options on a reply route", core.Retry(1).Reply(noReply), []fault{{inCore + `retry 1: needs a durable`, ErrOptionConflict}}},

		{"no order key", billing.OrderedBy(OrderKey{}).Handle(nop), []fault{{inBilling + `orderedBy OrderKey{}: needs SubjectKey, SubjectToken or HeaderKey`, ErrOutOfRange}}},
		{"order by a negative token", billing.OrderedBy(SubjectToken(-1)).Handle(nop), []fault{{inBilling + `orderedBy SubjectToken(-1): tokens are counted from 0`, ErrOutOfRange}}},
		{"order by no header", billing.OrderedBy(HeaderKey("")).Handle(nop), []fault{{inBilling + `orderedBy HeaderKey(""): must not be empty`, ErrInvalidName}}},
		{"order by a header with a colon", billing.OrderedBy(HeaderKey("a:b")).Handle(nop), []fault{{inBilling + `orderedBy HeaderKey("a:b"): must be an HTTP token of letters, digits and characters such as -`, ErrInvalidName}}},
		{"empty batch", billing.Batch(0, time.Second).HandleBatch(nopBatch), []fault{{inBilling + `batch 0 within 1s: needs at least 1 message`, ErrOutOfRange}}},
		{"batch that does not wait", billing.Batch(1, 0).HandleBatch(nopBatch), []fault{{inBilling + `batch 1 within 0s: the wait must be above zero`, ErrOutOfRange}}},
		{"batch for a single handler", billing.Batch(1, time.Second).Handle(nop), []fault{{inBilling + `batch 1 within 1s: needs HandleBatch`, ErrOptionConflict}}},
		{"batch handler without a batch", billing.HandleBatch(nopBatch), []fault{{inBilling + `handleBatch: needs Batch`, ErrOptionConflict}}},
		{"rate 0", billing.Rate(0).Handle(nop), []fault{{inBilling + `rate 0: must be above zero and finite`, ErrOutOfRange}}},
		{"rate that is no number", billing.Rate(math.NaN()).Handle(nop), []fault{{inBilling + `rate NaN: must be above zero and finite`, ErrOutOfRange}}},
		{"rate without end", billing.Rate(math.Inf(1)).Handle(nop), []fault{{inBilling + `rate +Inf: must be above zero and finite`, ErrOutOfRange}}},
		{"breaker without failures", billing.Breaker(0, time.Second).Handle(nop), []fault{{inBilling + `breaker 0 for 1s: needs at least 1 failure`, ErrOutOfRange}}},
		{"breaker without a cool-down", billing.Breaker(1, 0).Handle(nop), []fault{{inBilling + `breaker 1 for 0s: the cool-down must be above zero`, ErrOutOfRange}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := tc.spec.Validate()
			var want []string
			for _, f := range tc.want {
				want = append(want, f.line)
				if !errors.Is(err, f.is) {
					t.Errorf("errors.Is(%v, %v) = false", err, f.is)
				}
			}
			if diff := cmp.Diff(want, lines(err)); diff != "" {
				t.Errorf("faults (-want +got):\n%s", diff)
			}
			var first *RouteError
			if err != nil && (!errors.As(err, &first) || first.Route != tc.spec.route.filter || first.Err != tc.want[0].is) {
				t.Errorf("errors.As finds %#v, want the first fault", first)
			}
		})
	}
}

// Every option of a route is taken, alone and with the others that it fits with.
func TestValidateTakesEveryOption(t *testing.T) {
	t.Parallel()
	billing := Route("orders.*").Durable("billing")
	for _, spec := range []Spec{
		billing.OrderedBy(SubjectKey()).Handle(nop),
		billing.OrderedBy(SubjectToken(0)).Rate(0.5).Breaker(1, time.Second).PinnedBy("g").Handle(nop),
		billing.OrderedBy(HeaderKey("Customer")).Handle(nop),
		billing.Batch(1, time.Second).Rate(10).Breaker(1, time.Second).HandleBatch(nopBatch),
		billing.Batch(MaxBatch, time.Second).MaxAckPending(MaxBatch).HandleBatch(nopBatch),
		Route("orders.*").Rate(1e6).Handle(nop),
		Route("orders.*").Rate(1).Reply(func(context.Context, *Msg) ([]byte, error) { return nil, nil }),
	} {
		if err := spec.Validate(); err != nil {
			t.Errorf("Validate of %s: %v", spec, err)
		}
	}
}

func TestValidateAcrossRoutes(t *testing.T) {
	t.Parallel()
	route := func(filter, durable string) RouteBuilder { return Route(filter).Durable(durable) }
	for _, tc := range []struct {
		name  string
		specs []Spec
		want  []string
	}{
		{"nothing shared", []Spec{route("a.*", "one").Handle(nop), route("a.*", "two").Handle(nop), Route("a.*").Handle(nop), Route("a.*").Handle(nop)}, nil},
		{"one durable of two streams", []Spec{route("a.*", "d").Stream("A").Handle(nop), route("a.*", "d").Stream("B").Handle(nop)}, nil},
		{"one durable of a stream and of its mirror", []Spec{route("a.*", "d").Handle(nop), route("a.*", "d").Stream("MIRROR").Handle(nop)}, nil},
		{"one durable, filters apart", []Spec{route("a.*", "d").Handle(nop), route("b.*", "d").Handle(nop)}, nil},
		{"one filter", []Spec{route("a.*", "d").Handle(nop), route("a.*", "d").Handle(nop)},
			[]string{`natsx: route "a.*" durable "d": durable "d": is already used by route "a.*" of the same stream`}},
		{"overlapping filters", []Spec{route("a.*", "d").Handle(nop), route("*.b", "d").Handle(nop)},
			[]string{`natsx: route "*.b" durable "d": durable "d": is already used by route "a.*" of the same stream`}},
		{"one named stream", []Spec{route("a.*", "d").Stream("S").Handle(nop), route("b.*", "d").Stream("S").Handle(nop)},
			[]string{`natsx: route "b.*" durable "d": durable "d": is already used by route "a.*" of the same stream`}},
		{"overlap by a further filter", []Spec{route("a.*", "d").Also("b.*").Handle(nop), route("c", "d").Also("*.x").Handle(nop), route("c.x.y", "d").Handle(nop)},
			[]string{`natsx: route "c" durable "d": durable "d": is already used by route "a.*" of the same stream`}},
		{"three of one durable", []Spec{route("a", "d").Handle(nop), route(">", "d").Handle(nop), route("*", "d").Handle(nop)},
			[]string{
				`natsx: route ">" durable "d": durable "d": is already used by route "a" of the same stream`,
				`natsx: route "*" durable "d": durable "d": is already used by route "a" of the same stream`,
			}},
		{"faults first", []Spec{route("a", "d").Retry(-1).Handle(nop), route("a", "d").Timeout(-1).Handle(nop)},
			[]string{
				`natsx: route "a" durable "d": retry -1: must not be negative`,
				`natsx: route "a" durable "d": timeout -1ns: must be above zero`,
				`natsx: route "a" durable "d": durable "d": is already used by route "a" of the same stream`,
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := Validate(tc.specs...)
			if diff := cmp.Diff(tc.want, lines(err)); diff != "" {
				t.Errorf("faults (-want +got):\n%s", diff)
			}
			if err != nil && !errors.Is(err, ErrDuplicateDurable) {
				t.Errorf("Validate = %v, want ErrDuplicateDurable", err)
			}
		})
	}
	if err := Validate(); err != ErrNoRoutes {
		t.Errorf("Validate() = %v, want ErrNoRoutes", err)
	}
}

// faultySpecs are 25 routes with a fault each and what names it.
func faultySpecs() (specs []Spec, want []string) {
	d := func(i int) RouteBuilder { return Route(fmt.Sprintf("r%d.*", i)).Durable(fmt.Sprintf("d%d", i)) }
	c := func(i int) RouteBuilder { return Route(fmt.Sprintf("r%d.*", i)) }
	for i, tc := range []struct {
		spec Spec
		want string
	}{
		{Route("").Handle(nop), `natsx: route "": subject "": must not be empty`},
		{Route("a.b*").Handle(nop), `natsx: route "a.b*": subject "a.b*": has a wildcard inside the token "b*"`},
		{Route("a..b").Handle(nop), `natsx: route "a..b": subject "a..b": has an empty token`},
		{Route(">.a").Handle(nop), `natsx: route ">.a": subject ">.a": has > before its last token`},
		{c(4).Handle(nil), `natsx: route "r4.*": handler nil: a route needs a function`},
		{c(5).Queue("").Handle(nop), `natsx: route "r5.*": queue "": must not be empty`},
		{d(6).Queue("g").Handle(nop), `natsx: route "r6.*" durable "d6": queue "g": does not fit with a durable, whose processes share messages anyway`},
		{c(7).Durable("").Handle(nop), `natsx: route "r7.*": durable "": must not be empty`},
		{d(8).Reply(noReply), `natsx: route "r8.*" durable "d8": reply: does not fit with a durable: a requester waits on core NATS`},
		{d(9).Stream("").Handle(nop), `natsx: route "r9.*" durable "d9": stream "": must not be empty`},
		{d(10).DeliverFromSequence(0).Handle(nop), `natsx: route "r10.*" durable "d10": deliverFromSequence 0: sequences start at 1`},
		{d(11).DeliverFromTime(time.Time{}).Handle(nop), `natsx: route "r11.*" durable "d11": deliverFromTime: must not be the zero time`},
		{d(12).Retry(-1).Handle(nop), `natsx: route "r12.*" durable "d12": retry -1: must not be negative`},
		{c(13).Retry(1).Handle(nop), `natsx: route "r13.*": retry 1: needs a durable`},
		{d(14).Backoff(0, 0).Handle(nop), `natsx: route "r14.*" durable "d14": backoff 0s to 0s: both must be above zero`},
		{d(15).Timeout(-time.Second).Handle(nop), `natsx: route "r15.*" durable "d15": timeout -1s: must be above zero`},
		{d(16).AckWait(0).Handle(nop), `natsx: route "r16.*" durable "d16": ackWait 0s: must be at least 100ms`},
		{d(17).Concurrency(-1).Handle(nop), `natsx: route "r17.*" durable "d17": concurrency -1: must be at least 1`},
		{d(18).MaxAckPending(0).Handle(nop), `natsx: route "r18.*" durable "d18": maxAckPending 0: must be at least 1`},
		{d(19).DLQ("").Handle(nop), `natsx: route "r19.*" durable "d19": dlq "": must not be empty`},
		{d(20).DLQ("r20.x").Handle(nop), `natsx: route "r20.*" durable "d20": dlq "r20.x": is matched by the route's own filter: dead letters would come back`},
		{d(21).OrderedBy(OrderKey{}).Handle(nop), `natsx: route "r21.*" durable "d21": orderedBy OrderKey{}: needs SubjectKey, SubjectToken or HeaderKey`},
		{d(22).Batch(0, 0).HandleBatch(nopBatch), `natsx: route "r22.*" durable "d22": batch 0 within 0s: needs at least 1 message`},
		{d(23).Rate(-1).Handle(nop), `natsx: route "r23.*" durable "d23": rate -1: must be above zero and finite`},
		{Route("r20.b").Durable("d20").Handle(nop), `natsx: route "r20.b" durable "d20": durable "d20": is already used by route "r20.*" of the same stream`},
	} {
		if i >= 25 {
			panic("more than 25")
		}
		specs, want = append(specs, tc.spec), append(want, tc.want)
	}
	return specs, want
}

// TestRunReportsEveryFault runs 25 faulty routes on a dead connection: were it
// used, its own error would be seen.
func TestRunReportsEveryFault(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	nc.Close()
	specs, want := faultySpecs()
	if len(specs) != 25 {
		t.Fatalf("%d specs, want 25", len(specs))
	}
	want = append([]string{
		`natsx: stream "S": replicas 0: must be 1 to 5`,
		`natsx: stream "T": subjects "a.b": overlaps with "a.*" of stream "S"`,
	}, want...)
	b := NewBroker(nc, WithStreams(Stream("S").Subjects("a.*").Replicas(0), Stream("T").Subjects("a.b")))
	err := b.Run(testContext(t), specs...)
	if diff := cmp.Diff(want, lines(err)); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	for _, sentinel := range []error{
		ErrInvalidSubject, ErrInvalidName, ErrOutOfRange, ErrNoHandler, ErrOptionConflict, ErrDuplicateDurable, ErrDLQLoop,
	} {
		if !errors.Is(err, sentinel) {
			t.Errorf("errors.Is(err, %v) = false", sentinel)
		}
	}
}

// TestBuilderForks chains from one base on many goroutines; the race detector
// and the values tell whether they share anything.
func TestBuilderForks(t *testing.T) {
	t.Parallel()
	base := Route("orders.*").Durable("billing").Retry(3).DLQ("dlq.orders").DeliverFromTime(time.Unix(1, 2))
	kept := base
	const forks = 64
	got := make([]RouteBuilder, forks)
	var wg sync.WaitGroup
	for i := range forks {
		wg.Go(func() {
			got[i] = base.Retry(i).Timeout(time.Duration(i + 1)).OrderedBy(SubjectToken(i)).Queue(fmt.Sprint("q", i))
		})
	}
	wg.Wait()
	if base != kept {
		t.Errorf("the base became %+v, was %+v", base, kept)
	}
	for i, fork := range got {
		again := base.Queue(fmt.Sprint("q", i)).OrderedBy(SubjectToken(i)).Timeout(time.Duration(i + 1)).Retry(i)
		if fork != again {
			t.Errorf("fork %d is %+v, want %+v", i, fork, again)
		}
		if i > 0 && fork == got[i-1] {
			t.Errorf("forks %d and %d are equal", i-1, i)
		}
	}
	if Route("a") == Route("a").Durable("") {
		t.Error("a setter called with its zero value leaves no trace")
	}
}

// TestBuildersHoldScalars keeps builders free of what copies would share.
func TestBuildersHoldScalars(t *testing.T) {
	t.Parallel()
	var check func(t *testing.T, path string, typ reflect.Type)
	check = func(t *testing.T, path string, typ reflect.Type) {
		switch k := typ.Kind(); {
		case k == reflect.Struct:
			for i := range typ.NumField() {
				f := typ.Field(i)
				check(t, path+"."+f.Name, f.Type)
			}
		case k == reflect.String, reflect.Bool <= k && k <= reflect.Complex128 && k != reflect.Uintptr:
		default:
			t.Errorf("%s is a %s, not a scalar", path, typ)
		}
	}
	for _, builder := range []any{RouteBuilder{}, StreamSpec{}, OrderKey{}} {
		typ := reflect.TypeOf(builder)
		check(t, typ.Name(), typ)
	}
}

func TestSpecString(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ got, want string }{
		{Route("a.*").Handle(nop).String(), `route "a.*"`},
		{Route("a.*").Durable("d").Handle(nop).String(), `route "a.*" durable "d"`},
		{SubjectKey().String(), "SubjectKey()"},
		{SubjectToken(2).String(), "SubjectToken(2)"},
		{HeaderKey("a").String(), `HeaderKey("a")`},
		{OrderKey{}.String(), "OrderKey{}"},
	} {
		if tc.got != tc.want {
			t.Errorf("String = %s, want %s", tc.got, tc.want)
		}
	}
}

func TestRouteDefaults(t *testing.T) {
	t.Parallel()
	r := Route("a")
	if low, high := r.backoff(); low != time.Second || high != time.Minute {
		t.Errorf("backoff = %v, %v, want 1s, 1m", low, high)
	}
	if low, high := r.Backoff(2, 3).backoff(); low != 2 || high != 3 {
		t.Errorf("backoff = %v, %v, want 2ns, 3ns", low, high)
	}
	if got, set := r.lease(), r.AckWait(7).lease(); got != 30*time.Second || set != 7 {
		t.Errorf("lease = %v, set %v, want 30s, 7ns", got, set)
	}
	for retry, want := range map[int]int{0: 1, 5: 6, math.MaxInt: math.MaxInt} {
		if got := r.Retry(retry).attempts(); got != want {
			t.Errorf("Retry(%d) is %d attempts, want %d", retry, got, want)
		}
	}
	if got := r.attempts(); got != 0 {
		t.Errorf("without Retry %d attempts, want 0 for no limit", got)
	}
	at := time.Date(2026, 2, 3, 4, 5, 6, 789, time.FixedZone("", 3600))
	if got := r.DeliverFromTime(at).start.time(); !got.Equal(at) || got.Location() != time.UTC {
		t.Errorf("start time %v, want %v in UTC", got, at)
	}
}

// TestNamesAreTaken creates what nameFault allows on a real server.
func TestNamesAreTaken(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	js := jetStream(t, nc)
	for i, name := range []string{
		"a", "A-b_c", "ünïcode", "日本", "$x", `quo"te's`, "{}", "#1", "a:b", "%2e", strings.Repeat("x", maxNameLength),
	} {
		if reason := nameFault(name); reason != "" {
			t.Errorf("nameFault(%q) = %s, want none", name, reason)
		}
		s, err := js.CreateStream(testContext(t), jetstream.StreamConfig{Name: name, Subjects: []string{fmt.Sprint("s", i)}, Storage: jetstream.MemoryStorage})
		if err != nil {
			t.Errorf("stream %q: %v", name, err)
			continue
		}
		if _, err := s.CreateConsumer(testContext(t), jetstream.ConsumerConfig{Durable: name, AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
			t.Errorf("durable %q: %v", name, err)
		}
	}
}

// FuzzFilter holds the grammar against the server's: what natsx takes the server
// takes, and what it refuses beyond that is refused for a reason of its own.
func FuzzFilter(f *testing.F) {
	for _, seed := range []string{"a", "a.*.>", ">", "*", "a..b", ".a", "a.", "a.>.b", "a*", "a.b c", "a\tb", "a\x00", "\xff", "a.\u00a0", "$JS.API.>", ">a", "**"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, subject string) {
		filter, publish := filterFault(subject), publishFault(subject)
		if filter == "" && !server.IsValidSubject(subject) {
			t.Errorf("filterFault(%q) allows what the server refuses", subject)
		}
		if publish == "" && !server.IsValidPublishSubject(subject) {
			t.Errorf("publishFault(%q) allows what the server refuses", subject)
		}
		if publish == "" && filter != "" {
			t.Errorf("%q may be published to and not subscribed to: %s", subject, filter)
		}
		own := strings.Contains(filter, "white space") || strings.Contains(filter, "control character") ||
			strings.Contains(filter, "UTF-8") || strings.Contains(filter, "longer than") || strings.Contains(filter, "wildcard inside")
		if filter != "" && !own && server.IsValidSubject(subject) {
			t.Errorf("filterFault(%q) = %q, which the server takes", subject, filter)
		}
	})
}

// TestSubjectsLikeTheServer compares the matching of all filters of up to four
// tokens over a small alphabet with the server's.
func TestSubjectsLikeTheServer(t *testing.T) {
	t.Parallel()
	filters, longer := []string{">"}, []string{""}
	for range 4 {
		var next []string
		for _, prefix := range longer {
			for _, token := range []string{"a", "b", "*"} {
				next = append(next, prefix+token+".")
				filters = append(filters, prefix+token, prefix+token+".>")
			}
		}
		longer = next
	}
	for _, a := range filters {
		if reason := filterFault(a); reason != "" {
			t.Fatalf("filterFault(%q) = %s, want none", a, reason)
		}
		for _, b := range filters {
			if got, want := subjectMatches(a, b), server.SubjectMatchesFilter(b, a); got != want {
				t.Errorf("subjectMatches(%q, %q) = %v, the server says %v", a, b, got, want)
			}
			if got, want := subjectsOverlap(a, b), server.SubjectsCollide(a, b); got != want {
				t.Errorf("subjectsOverlap(%q, %q) = %v, the server says %v", a, b, got, want)
			}
		}
	}
}

// FuzzSubjectMatches holds natsx's matching against the server's.
func FuzzSubjectMatches(f *testing.F) {
	for _, seed := range [][2]string{
		{"a.*", "a.b"}, {"a.>", "a"}, {">", "*"}, {"*", ">"}, {"a.*.c", "a.b.>"}, {"*.b", "a.*"}, {"a.>", "a.b.c"}, {"a.b", "a.b"}, {"*.*", "a.>"}, {"a.*", "a.*.>"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if filterFault(a) != "" || filterFault(b) != "" {
			t.Skip()
		}
		if got, want := subjectMatches(a, b), server.SubjectMatchesFilter(b, a); got != want {
			t.Errorf("subjectMatches(%q, %q) = %v, the server says %v", a, b, got, want)
		}
		got, want := subjectsOverlap(a, b), server.SubjectsCollide(a, b)
		if got != want {
			t.Errorf("subjectsOverlap(%q, %q) = %v, the server says %v", a, b, got, want)
		}
		if subjectsOverlap(b, a) != got {
			t.Errorf("subjectsOverlap(%q, %q) is not symmetric", a, b)
		}
	})
}
