package otelnatsx

import (
	"sync"

	"go.opentelemetry.io/otel/trace"

	"github.com/natsx/natsx"
)

// maxFirsts is how many messages that wait for their retry have their first attempt kept.
const maxFirsts = 1 << 16

// key identifies a message of a durable.
type key struct {
	stream, durable string
	sequence        uint64
	stored          int64
}

func keyOf(m *natsx.Msg) key {
	return key{m.Stream(), m.Durable(), m.Sequence(), m.Time().UnixNano()}
}

// firsts are the spans of the first attempts of messages that wait for their retry. When
// there are too many the oldest are forgotten: it is rather a link less than no end of
// memory for messages that another process has handled.
type firsts struct {
	mu     sync.Mutex
	latest map[key]trace.SpanContext // at most maxFirsts/2
	before map[key]trace.SpanContext // as many, from before
}

func (f *firsts) put(k key, sc trace.SpanContext) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.latest) >= maxFirsts/2 {
		f.latest, f.before = nil, f.latest
	}
	if f.latest == nil {
		f.latest = map[key]trace.SpanContext{}
	}
	f.latest[k] = sc
}

func (f *firsts) get(k key) trace.SpanContext {
	f.mu.Lock()
	defer f.mu.Unlock()
	if sc, ok := f.latest[k]; ok {
		return sc
	}
	return f.before[k]
}

func (f *firsts) drop(k key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.latest, k)
	delete(f.before, k)
}
