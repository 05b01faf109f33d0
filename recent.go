package natsx

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// lookupWait is the longest wait for one answer of the JetStream API.
	lookupWait = time.Second
	// lookupPause is how long the stream of a subject is not looked up again.
	lookupPause = 200 * time.Millisecond
	// streamTrust is how long a publisher reuses stream information where that is safe.
	streamTrust = 10 * time.Second
)

// finding is the result of looking up the stream of a subject.
type finding struct {
	stream string // its name, empty if no stream captures the subject
	err    error  // why the lookup failed
	at     time.Time
}

// recentStreams are the streams that a publisher has looked up lately.
type recentStreams struct {
	noAck atomic.Bool // one of them did not acknowledge

	mu      sync.Mutex
	list    []seenStream
	denials map[string]finding // by operation; nil until the first
}

type seenStream struct {
	info *jetstream.StreamInfo
	at   time.Time
}

// denied returns the recent permission error of an operation, or nil.
func (r *recentStreams) denied(operation string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.denials[operation]; time.Since(f.at) < streamTrust {
		return f.err
	}
	return nil
}

func (r *recentStreams) deny(operation string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.denials == nil {
		r.denials = make(map[string]finding)
	}
	r.denials[operation] = finding{err: err, at: time.Now()}
}

func (r *recentStreams) add(info *jetstream.StreamInfo) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = slices.DeleteFunc(r.list, func(s seenStream) bool {
		return s.info.Config.Name == info.Config.Name || time.Since(s.at) > streamTrust
	})
	r.list = append(r.list, seenStream{info, time.Now()})
	if info.Config.NoAck {
		r.noAck.Store(true)
	}
}

// find returns a stream that captures subject and for which wanted reports true, or nil.
func (r *recentStreams) find(subject string, wanted func(*jetstream.StreamConfig) bool) *jetstream.StreamInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.list {
		if time.Since(s.at) < streamTrust && captures(s.info, subject) && wanted(&s.info.Config) {
			return s.info
		}
	}
	return nil
}
