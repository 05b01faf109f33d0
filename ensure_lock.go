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
	// lockConsumer is the name of the consumer that locks the configuration of its
	// stream, and lockFilter its filter, a subject that no stream has.
	lockConsumer = "natsx-ensure"
	lockFilter   = "$NATSX.ensure"
	// lockLife is when the server takes away the lock of a process that was killed, and
	// lockPatience for how long a lock is waited for in all.
	lockLife     = 10 * time.Second
	lockPatience = 30 * time.Second
	// lockPause is the mean time between two tries.
	lockPause = 10 * time.Millisecond
)

// streamLock has the processes that change the configuration of a stream do so one after
// the other. A change writes the whole configuration, and the server does not compare:
// without the lock, one that was read before another's change would take that back.
//
// The lock is a consumer, which the server makes once. It takes no message and ends by
// itself. Where there can be none, the configuration is changed without it.
type streamLock struct {
	api    *api
	stream string
	wanted time.Time // since when
	taken  time.Time // zero when it is not held
}

// take waits for the lock and reports whether it is held. It is not when there can be
// none, when somebody has it for too long, and at the end of ctx.
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

// try takes the lock if nobody has it.
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
	// Two that a cluster made at the same time are one in the end.
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

// release lets the next one take the lock.
func (l *streamLock) release(ctx context.Context) {
	if !l.valid() {
		return // it may be another's by now; the server takes it away
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	l.api.deleteConsumer(ctx, l.stream, lockConsumer)
}
