package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// lockConsumer is the name of the consumer that locks the configuration of its stream,
	// and lockFilter is its filter, a subject that no stream captures.
	lockConsumer = "natsx-ensure"
	lockFilter   = "$NATSX.ensure"
	// lockLife is when the server deletes the lock of a killed process, and lockPatience is
	// how long a process waits for the lock.
	lockLife     = 10 * time.Second
	lockPatience = 30 * time.Second
	// lockPause is the mean time between two tries.
	lockPause = 10 * time.Millisecond
)

// streamLock makes processes change the configuration of a stream one after another. An
// update writes the whole configuration, and the server has no compare-and-set: without the
// lock, a process could revert the change of another that it had not read.
//
// The lock is a consumer, which only one process can create. It receives no messages, and
// the server deletes it if the process was killed. If it cannot be created, the
// configuration is changed without a lock.
type streamLock struct {
	api    *api
	stream string
	wanted time.Time // when it was first tried
	taken  time.Time // zero when it is not held
}

// take waits for the lock and reports whether it is held. It is not if there can be none,
// if another process holds it for too long, or if ctx ends.
func (l *streamLock) take(ctx context.Context, c *jetstream.StreamConfig) bool {
	if c.Retention == jetstream.WorkQueuePolicy { // whose consumers exclude each other
		return false
	}
	if l.wanted.IsZero() {
		l.wanted = time.Now()
	}
	for time.Since(l.wanted) < lockPatience {
		err := l.try(ctx, c)
		var refused jetstream.JetStreamError
		switch {
		case err == nil:
			return true
		case hasCode(err, codeConsumerExists), hasCode(err, codeConsumerNotFound), transient(err):
		case errors.As(err, &refused), errors.Is(err, ErrPermission), ctx.Err() != nil:
			return false
		}
		if !wait(ctx, lockPause/2+mathrand.N(lockPause)) {
			break
		}
	}
	return false
}

// try takes the lock unless another process holds it.
func (l *streamLock) try(ctx context.Context, c *jetstream.StreamConfig) error {
	ctx, cancel := context.WithTimeout(ctx, patience(2))
	defer cancel()
	id, began := rand.Text(), time.Now()
	_, err := l.api.createConsumer(ctx, l.stream, jetstream.ConsumerConfig{
		Name: lockConsumer, Description: "the stream's configuration is being changed",
		AckPolicy: jetstream.AckNonePolicy, FilterSubject: lockFilter, Replicas: 1, MemoryStorage: true,
		InactiveThreshold: inactiveThreshold(c, lockLife), Metadata: map[string]string{metadataID: id},
	})
	if err != nil {
		return err
	}
	// A cluster may accept two creations at the same time: the last one counts.
	info, err := l.api.consumerInfo(ctx, l.stream, lockConsumer)
	if err != nil {
		l.taken = began
		l.release(ctx)
		return err
	}
	if info.Config.Metadata[metadataID] != id {
		return &jetstream.APIError{ErrorCode: codeConsumerExists}
	}
	l.taken = began
	return nil
}

// valid reports whether the lock is held for long enough to make a change.
func (l *streamLock) valid() bool { return time.Since(l.taken) < lockLife/2 }

// release deletes the lock.
func (l *streamLock) release(ctx context.Context) {
	if !l.valid() {
		return // by now it may belong to another process
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	l.api.deleteConsumer(ctx, l.stream, lockConsumer)
}
