package natsx

import (
	"context"
	"time"
)

// Outcome is the outcome of one attempt.
type Outcome string

// The outcomes of an attempt.
const (
	OutcomeSucceeded Outcome = "succeeded" // acknowledged, or answered
	OutcomeRetried   Outcome = "retried"   // will be redelivered
	OutcomeDead      Outcome = "dead"      // moved to the DLQ, or without one terminated or left unsettled
	OutcomeDiscarded Outcome = "discarded" // terminated by Discard
	OutcomeReturned  Outcome = "returned"  // given back at the drain timeout or for an open breaker, which is no attempt
	OutcomeLapsed    Outcome = "lapsed"    // the ack wait ended before the message was settled: it may be redelivered
	OutcomeFailed    Outcome = "failed"    // failure of a core message, which is lost, or an error answered to a request
)

// Event is one finished attempt, as an [Observer] sees it.
type Event struct {
	Route    string        // the filter of the route or replay
	Durable  string        // empty for a core route and a replay
	Msg      *Msg          // owned by the handler: not to be kept or changed
	Outcome  Outcome       // what became of it
	Reason   Reason        // why it is dead, empty unless it is
	Delay    time.Duration // before the next attempt, 0 unless it is Retried
	Err      error         // what the handler returned, nil for Succeeded
	Started  time.Time     // when a worker took the message, the zero time when none did
	Waited   time.Duration // how long it had waited in this process by then; 0 for a replay
	Duration time.Duration // how long the handler ran, 0 when it did not
	Batch    int           // of a route with HandleBatch: how many messages the handler was called with
}

// Observer is told of every finished attempt once it is settled, and of every message
// that a replay handled. It mostly runs on the worker, so it must be fast, and is called
// by many at once. A panic of it is logged and changes nothing. The context is the one
// that the broker's first middleware gets.
type Observer interface {
	// Observe is called for each attempt.
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

// BreakerEvent is a change of a breaker: it has opened or closed.
type BreakerEvent struct {
	Route   string       // the filter of the route
	Durable string       // the name of its durable
	State   BreakerState // BreakerOpen or BreakerClosed
	Err     error        // the failure that opened it, nil if it has closed
}

// BreakerObserver is an [Observer] that is also called when a route's breaker opens or
// closes. The rules for Observe apply.
type BreakerObserver interface {
	Observer
	// ObserveBreaker is called for each change.
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
	Lapsed    uint64 // ack wait ended before the message was settled: it may be redelivered
	Failed    uint64 // failed messages of a core route, errors answered to requests
	Dropped   uint64 // dropped by the client because a core route is a slow consumer

	Running int // handlers running now
	Waiting int // messages pulled and waiting for a worker now
	Delayed int // messages that this process gave back and that wait for their retry now

	Breaker BreakerState // of a route with one

	HandlerTime   time.Duration // time spent in handlers, all together
	OldestRunning time.Duration // how long the oldest running handler has been running, 0 when none runs

	Consumer *ConsumerStats // nil for a core route, until the server has reported, and once the route has stopped
}

// ConsumerStats are what the server last reported of a durable, over all its processes.
// A busy route asks about every 8 seconds, an idle one about every 15.
type ConsumerStats struct {
	NumPending    uint64    // messages not delivered yet; also updated by each delivery
	NumAckPending int       // messages delivered and not settled, including those that wait for a retry
	At            time.Time // when the server last reported
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
	s.OldestRunning = max(s.OldestRunning, part.OldestRunning)
}
