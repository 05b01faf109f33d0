package natsx

import (
	"context"

	"github.com/nats-io/nats.go/jetstream"
)

// retried reports whether the retries of a route can go through a retry stream: not those
// of an order, which hold up what is behind them, nor those that one process is pinned
// for.
func retried(spec Spec) bool {
	return spec.route.durable != "" && spec.route.set&(optOrderedBy|optPinnedBy) == 0
}

// moveTo has the retries of the route go through a retry stream. They are delivered by a
// route of their own, which is a part of this one: it has its handler, its limit and its
// turns, and it counts, fails and is paused with it.
func (r *durableRoute) moveTo(to *retryStream) {
	part := &durableRoute{gate: make(chan struct{}, 1), retryOf: r}
	part.handler = r.handler
	part.setUp(r.env, r.spec)
	r.retries, part.breaker, part.rate = part, r.breaker, r.rate
	r.lane.peer, part.lane.peer = &part.lane, &r.lane
	for _, d := range []*durableRoute{r, part} {
		d.mover, d.letters.retries = newMover(&d.route, d, to), to.name
	}
}

// locateRetries finds or creates the consumer of the retries. Their route and the retry stream are
// known.
func (r *durableRoute) locateRetries(ctx context.Context) error {
	own := r.retryOf
	place := retryPlace{r.mover.to.prefix, own.target.stream, own.target.consumer}
	own.mover.retryPlace, r.mover.retryPlace = place, place

	const kept = optDurable | optRetry | optBackoff | optTimeout | optAckWait | optConcurrency | optBatch |
		optRate | optBreaker | optMaxAckPending | optConfirmAcks | optDLQ
	spec := own.spec.route
	r.spec.route = RouteBuilder{
		set:    spec.set&kept | optAdoptChanges, // whatever the durable may have, its retries follow
		filter: place.due(), durable: place.consumer(), stream: r.mover.to.name, dlq: spec.dlq,
		retry: spec.retry, backoffMin: spec.backoffMin, backoffMax: spec.backoffMax, timeout: spec.timeout,
		ackWait: spec.ackWait, concurrency: spec.concurrency, maxAckPending: spec.maxAckPending,
		batch: spec.batch, batchWait: spec.batchWait, rate: spec.rate, breakerAfter: spec.breakerAfter, breakerRest: spec.breakerRest,
	}
	r.target.stream, r.target.consumer = r.mover.to.name, place.consumer()
	r.target.config.Store(r.mover.to.config)
	r.letters.stream, r.letters.durable = place.stream, place.durable
	r.letters.target = own.letters.target
	r.passer.stream, r.passer.durable, r.passer.key = own.passer.stream, own.passer.durable, own.passer.key
	if err := r.ensureConsumer(ctx); err != nil {
		return err
	}
	r.located.Store(true)
	return nil
}

// sources are the streams whose retries go through a retry stream, as far as known.
func sources(routes []*durableRoute) (configs []*jetstream.StreamConfig) {
	for _, r := range routes {
		if c := r.target.config.Load(); c != nil && r.retries != nil {
			configs = append(configs, c)
		}
	}
	return configs
}
