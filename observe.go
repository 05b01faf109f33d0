package natsx

import (
	"context"
	"time"
)

// Outcome is what became of one attempt.
type Outcome string

// The outcomes of an attempt.
const (
	OutcomeSucceeded Outcome = "succeeded" // acknowledged, or answered
	OutcomeRetried   Outcome = "retried"   // to be delivered again
	OutcomeDead      Outcome = "dead"      // moved to the DLQ, or without one terminated or left unsettled
	OutcomeDiscarded Outcome = "discarded" // terminated on the handler's word
	OutcomeReturned  Outcome = "returned"  // given back at the drain timeout or for an open breaker, which is no attempt
	OutcomeLapsed    Outcome = "lapsed"    // the lease was lost: nothing was settled
	OutcomeFailed    Outcome = "failed"    // of a core message that is gone, or an error answered to a request
)

// Event is one finished attempt, as an [Observer] sees it.
type Event struct {
	Route    string        // the filter of the route or replay
	Durable  string        // empty for a core route and a replay
	Msg      *Msg          // owned by the handler: not to be kept or changed
	Outcome  Outcome       // what became of it
	Err      error         // what the handler returned, nil for Succeeded
	Duration time.Duration // how long the handler ran, 0 when it did not
}

// Observer is told of every finished attempt once it is settled, and of every message
// that a replay handled. It mostly runs on the worker, so it must be fast, and is called
// by many at once. A panic of it is logged and changes nothing. The context is the
// handler's.
type Observer interface {
	Observe(ctx context.Context, e Event)
}

// BreakerState is the state of a route's [RouteBuilder.Breaker].
type BreakerState string

// The states of a breaker.
const (
	BreakerNone     BreakerState = ""          // the route has none
	BreakerClosed   BreakerState = "closed"    // messages are handled
	BreakerOpen     BreakerState = "open"      // nothing is pulled for the cool-down
	BreakerHalfOpen BreakerState = "half-open" // one message is tried
)

// BreakerEvent is a breaker that has opened, or closed again.
type BreakerEvent struct {
	Route   string // the filter of the route
	Durable string
	State   BreakerState // BreakerOpen or BreakerClosed
	Err     error        // the failure that opened it, nil when it has closed
}

// BreakerObserver is an [Observer] that is also told of the breakers of the routes, when
// one opens and when it closes again. What holds for Observe holds for it.
type BreakerObserver interface {
	Observer
	ObserveBreaker(e BreakerEvent)
}

// Stats are the counters of a broker since its start.
type Stats struct {
	Routes []RouteStats // in the order given to Run
}

// RouteStats are the counters of one route since its start.
type RouteStats struct {
	Route   string // the filter
	Durable string // empty for a core route
	Stream  string // empty for a core route, and until it is known

	Received  uint64 // messages delivered to this process, redeliveries included
	Succeeded uint64 // acknowledged; for a core route handled, for a request answered
	Retried   uint64 // failed attempts that another follows
	Dead      uint64 // moved to the DLQ, or without one terminated or left unsettled
	Discarded uint64 // terminated by Discard
	Returned  uint64 // given back at the drain timeout or for an open breaker, which is no attempt
	Lapsed    uint64 // leases lost before the message was settled: it is delivered again
	Failed    uint64 // failed messages of a core route, errors answered to requests
	Dropped   uint64 // dropped by the client as a slow consumer of a core route

	Running int // handlers running now
	Waiting int // messages pulled and waiting for a worker now
	Delayed int // messages that this process gave back and that wait for their retry now

	Breaker BreakerState // of a route with one

	HandlerTime time.Duration // time spent in handlers, all together
}

// add adds the counters of a part of the route.
func (s *RouteStats) add(part RouteStats) {
	s.Received += part.Received
	s.Succeeded += part.Succeeded
	s.Retried += part.Retried
	s.Dead += part.Dead
	s.Discarded += part.Discarded
	s.Returned += part.Returned
	s.Lapsed += part.Lapsed
	s.Running += part.Running
	s.Waiting += part.Waiting
	s.Delayed += part.Delayed
	s.HandlerTime += part.HandlerTime
}
