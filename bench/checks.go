package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// pollEvery is the pause between two looks at what the server has to get done.
const pollEvery = 10 * time.Millisecond

// settled checks that the run did its work, and leaves the stream as it was:
// when all of the stream was consumed, nothing waits for an ack, nothing came
// twice, and the last ack arrives without help.
func (j *job) settled() error {
	st, err := j.js.Stream(j.ctx, benchStream)
	if err != nil {
		return err
	}
	for open := j.all; open; {
		open = false
		consumers := st.ListConsumers(j.ctx)
		for info := range consumers.Info() {
			if got := j.count.Load(); got != int64(j.n) || info.NumPending > 0 {
				return fmt.Errorf("handled %d of %d messages, %d never delivered", got, j.n, info.NumPending)
			}
			open = open || info.NumAckPending > 0
		}
		if err := consumers.Err(); err != nil {
			return err
		}
		if open {
			time.Sleep(pollEvery)
		}
	}
	names := st.ConsumerNames(j.ctx)
	for name := range names.Name() {
		if err := st.DeleteConsumer(j.ctx, name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return err
		}
	}
	return names.Err()
}

// emptied checks that the run settled what was published, and recreates the stream,
// without messages and consumers.
func (j *job) emptied() error {
	for {
		pending, err := j.ackPending()
		if err != nil {
			return err
		}
		if got := j.count.Load(); got > int64(j.n) {
			return fmt.Errorf("handled %d messages, of which %d were published", got, j.n)
		}
		if pending == 0 {
			break
		}
		time.Sleep(pollEvery)
	}
	st, err := j.js.Stream(j.ctx, benchStream)
	if err != nil {
		return err
	}
	if err := j.js.DeleteStream(j.ctx, benchStream); err != nil {
		return err
	}
	_, err = j.js.CreateStream(j.ctx, st.CachedInfo().Config)
	return err
}

// stored checks that the run stored its messages, once each, and removes them.
func (j *job) stored() error {
	st, err := j.js.Stream(j.ctx, benchStream)
	if err != nil {
		return err
	}
	if got := st.CachedInfo().State.Msgs; got != uint64(j.n) {
		return fmt.Errorf("the stream holds %d of %d messages", got, j.n)
	}
	return st.Purge(j.ctx)
}

// finishRepeats lets the peer handle what comes again since its ack was lost.
func (j *job) finishRepeats() error {
	for {
		switch pending, err := j.ackPending(); {
		case j.ctx.Err() != nil:
			return fmt.Errorf("%d messages wait for an ack: %w", pending, context.Cause(j.ctx))
		case err == nil && pending == 0:
			j.result.Repeats, j.result.Settled = j.repeats.Load(), j.elapsed()
			return nil
		}
		time.Sleep(pollEvery)
	}
}

// ackPending counts what the consumers of the stream have not settled.
func (j *job) ackPending() (pending int, err error) {
	ctx, cancel := context.WithTimeout(j.ctx, 5*time.Second) // the answer may be lost
	defer cancel()
	st, err := j.js.Stream(ctx, benchStream)
	if err != nil {
		return 0, err
	}
	consumers := st.ListConsumers(ctx)
	for info := range consumers.Info() {
		pending += info.NumAckPending
	}
	return pending, consumers.Err()
}
