// Package dropped calls the setters of a route and drops what they return, which does
// nothing. .ci/run makes sure that staticcheck reports the marked lines, with SA4017.
package dropped

import (
	"time"

	"github.com/natsx/natsx"
)

func Drop(r natsx.RouteBuilder) {
	r.AckWait(time.Minute)              // dropped
	r.AdoptChanges()                    // dropped
	r.Backoff(time.Second, time.Minute) // dropped
	r.Batch(10, time.Second)            // dropped
	r.Breaker(5, time.Minute)           // dropped
	r.Concurrency(4)                    // dropped
	r.ConfirmAcks()                     // dropped
	r.DLQ("dlq.orders")                 // dropped
	r.DeliverFromSequence(7)            // dropped
	r.DeliverLast()                     // dropped
	r.DeliverLastPerSubject()           // dropped
	r.DeliverNew()                      // dropped
	r.Durable("billing")                // dropped
	r.InactiveThreshold(time.Hour)      // dropped
	r.MaxAckPending(100)                // dropped
	r.OrderedBy(natsx.SubjectKey())     // dropped
	r.PinnedBy("main")                  // dropped
	r.Queue("pricing")                  // dropped
	r.Rate(50)                          // dropped
	r.Retry(5)                          // dropped
	r.Stream("ORDERS")                  // dropped
	r.Timeout(time.Minute)              // dropped
	r.Tombstones()                      // dropped
}

// Unseen is what staticcheck does not report: it does not see that they only return.
func Unseen(r natsx.RouteBuilder) {
	r.Also("returns.*")
	r.DeliverFromTime(time.Now())
	r.Handle(nil)
	r.HandleBatch(nil)
	r.Reply(nil)
}
