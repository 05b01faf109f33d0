package main

import (
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/synadia-io/orbit.go/jetstreamext"
)

// asyncPending bounds PublishAsync's messages in flight.
const asyncPending = 4_000

// publish times fn, which stores j.n messages, each acknowledged.
func (j *job) publish(fn func(payload []byte) error) error {
	payload := make([]byte, j.size)
	if err := j.start(); err != nil {
		return err
	}
	start := time.Now()
	if err := fn(payload); err != nil {
		return err
	}
	return j.stop(time.Since(start))
}

func publishSync(j *job) error {
	return j.publish(func(payload []byte) error {
		for range j.n {
			if _, err := j.js.Publish(j.ctx, benchSubject, payload); err != nil {
				return err
			}
		}
		return nil
	})
}

// publishSyncID sends the message ids that natsx makes by itself.
func publishSyncID(j *job) error {
	return j.publish(func(payload []byte) error {
		for range j.n {
			if _, err := j.js.Publish(j.ctx, benchSubject, payload, jetstream.WithMsgID(nuid.Next())); err != nil {
				return err
			}
		}
		return nil
	})
}

func publishAsync(j *job) error {
	return j.publish(func(payload []byte) error {
		return publishAsyncAll(j, payload, func() []jetstream.PublishOpt { return nil })
	})
}

// publishAsyncID gives each message an id, which has the server keep it for the
// deduplication window.
func publishAsyncID(j *job) error {
	return j.publish(func(payload []byte) error {
		return publishAsyncAll(j, payload, func() []jetstream.PublishOpt {
			return []jetstream.PublishOpt{jetstream.WithMsgID(nuid.Next())}
		})
	})
}

func publishAsyncAll(j *job, payload []byte, opts func() []jetstream.PublishOpt) error {
	futures := make([]jetstream.PubAckFuture, j.n)
	for i := range futures {
		f, err := j.js.PublishAsync(benchSubject, payload, opts()...)
		for errors.Is(err, jetstream.ErrTooManyStalledMsgs) {
			// No room for 200 ms, as happens on a busy machine; nothing was sent.
			f, err = j.js.PublishAsync(benchSubject, payload, opts()...)
		}
		if err != nil {
			return err
		}
		futures[i] = f
	}
	for _, f := range futures {
		select {
		case <-f.Ok():
		case err := <-f.Err():
			return err
		case <-j.ctx.Done():
			return j.ctx.Err()
		}
	}
	return nil
}

// fastIngest is the server's fast batch ingest as orbit.go speaks it.
func fastIngest(flow, outstanding uint16) func(*job) error {
	return func(j *job) error {
		return j.publish(func(payload []byte) error {
			p, err := jetstreamext.NewFastPublisher(j.js, jetstreamext.FastPublishFlowControl{
				Flow: flow, MaxOutstandingAcks: outstanding,
			})
			if err != nil {
				return err
			}
			for range j.n - 1 {
				if _, err := p.Add(benchSubject, payload); err != nil {
					return err
				}
			}
			_, err = p.Commit(j.ctx, benchSubject, payload)
			return err
		})
	}
}
