package natsxtest

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/kit"
)

// DefaultLimit is how long a wait takes at most, generous for a loaded machine.
const DefaultLimit = time.Minute

// The streams that [Run] makes for routes that name none, and for their dead letters.
const (
	StreamName    = "NATSXTEST"
	DLQStreamName = "NATSXTEST_DLQ"
)

// Runner is how routes are run. Its zero value is that of [Run].
type Runner struct {
	// Conn is the connection; default is one to a [Server] of its own.
	Conn *nats.Conn
	// Options are those of the broker. Default is a logger to the test's output.
	Options []natsx.Option
	// Streams are made before the routes start. Default are streams for the durables'
	// filters and the dead letters, where the server has none for them.
	Streams []natsx.StreamSpec
	// Limit is how long each wait takes at most; default is [DefaultLimit].
	Limit time.Duration
}

// Routes are routes that run. Their methods are for the goroutine of the test, which they
// end when a wait exceeds its limit or the routes have ended.
type Routes struct {
	Conn      *nats.Conn       // to the server, of the broker and the publisher
	Broker    *natsx.Broker    // that runs the routes
	Publisher *natsx.Publisher // for the test's own messages

	t      testing.TB
	limit  time.Duration
	cancel context.CancelFunc
	done   chan struct{} // closed when Run has returned
	err    error         // of Run, once done is closed
	told   bool          // the test knows err

	mu     sync.Mutex
	events []natsx.Event // that were not returned yet
	more   chan struct{} // told of an event; capacity 1
}

// Run runs specs at a server of their own, with the streams that they need, and returns
// once they receive. At the end of the test they drain, and an error of that fails it. What
// cannot start ends the test.
func Run(t testing.TB, specs ...natsx.Spec) *Routes {
	t.Helper()
	return Runner{}.Run(t, specs...)
}

// Run is the function [Run] with the settings of r.
func (r Runner) Run(t testing.TB, specs ...natsx.Spec) *Routes {
	t.Helper()
	if r.Conn == nil {
		r.Conn = Connect(t, Server(t))
	}
	if r.Limit <= 0 {
		r.Limit = DefaultLimit
	}
	rs := &Routes{
		Conn: r.Conn, Publisher: natsx.NewPublisher(r.Conn),
		t: t, limit: r.Limit, done: make(chan struct{}), more: make(chan struct{}, 1),
	}
	streams := r.Streams
	if streams == nil {
		streams = rs.streamsFor(specs)
	}
	options := []natsx.Option{
		natsx.WithLogger(slog.New(slog.NewTextHandler(t.Output(), nil))),
		natsx.WithStreams(streams...), natsx.WithObserver(observer{rs}),
	}
	rs.Broker = natsx.NewBroker(r.Conn, append(options, r.Options...)...)
	ctx, cancel := context.WithCancel(context.Background())
	rs.cancel = cancel
	t.Cleanup(func() {
		told := rs.told
		if err := rs.Stop(); err != nil && !told {
			t.Errorf("natsxtest: Run: %v", err)
		}
	})
	go func() {
		defer close(rs.done)
		rs.err = rs.Broker.Run(ctx, specs...)
	}()
	limit := time.NewTimer(r.Limit)
	defer limit.Stop()
	select {
	case <-rs.Broker.Ready():
	case <-rs.done:
		rs.told = true
		t.Fatalf("natsxtest: Run: %v", rs.err)
	case <-limit.C:
		t.Fatalf("natsxtest: routes not ready within %s: %v", r.Limit, rs.Broker.Health())
	}
	return rs
}

// streamsFor are the streams that the durables among specs lack.
func (r *Routes) streamsFor(specs []natsx.Spec) []natsx.StreamSpec {
	r.t.Helper()
	subjects := map[string][]string{}
	var letters []string
	for _, spec := range specs {
		s := kit.Describe(spec)
		if s.Durable == "" {
			continue
		}
		name := s.Stream
		if name == "" {
			name = StreamName
		}
		subjects[name] = append(subjects[name], s.Filters...)
		if s.DLQ != "" {
			letters = append(letters, s.DLQ)
		}
	}
	for _, dlq := range letters {
		if !slices.ContainsFunc(slices.Concat(values(subjects)...), func(filter string) bool { return server.SubjectMatchesFilter(dlq, filter) }) {
			subjects[DLQStreamName] = append(subjects[DLQStreamName], dlq)
		}
	}
	var specified []natsx.StreamSpec
	for name, all := range subjects {
		var lacking []string
		for _, subject := range all {
			if !r.captured(name, subject) {
				lacking = append(lacking, subject)
			}
		}
		if lacking = widest(lacking); len(lacking) > 0 {
			specified = append(specified, natsx.Stream(name).Subjects(lacking...))
		}
	}
	return specified
}

// jetStream is the server's JetStream, and a context for what is asked of it.
func (r *Routes) jetStream() (js jetstream.JetStream, ctx context.Context, cancel context.CancelFunc) {
	r.t.Helper()
	js, err := jetstream.New(r.Conn)
	if err != nil {
		r.t.Fatalf("natsxtest: %v", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), r.limit)
	return js, ctx, cancel
}

// captured reports whether the server has the stream already, or another for the subject.
func (r *Routes) captured(stream, subject string) bool {
	r.t.Helper()
	js, ctx, cancel := r.jetStream()
	defer cancel()
	names := js.StreamNames(ctx, jetstream.WithStreamListSubject(subject))
	found := false
	for range names.Name() {
		found = true
	}
	if err := names.Err(); err != nil {
		r.t.Fatalf("natsxtest: streams of %q: %v", subject, err)
	}
	if !found {
		_, err := js.Stream(ctx, stream)
		found = err == nil
	}
	return found
}

func values(m map[string][]string) (all [][]string) {
	for _, v := range m {
		all = append(all, v)
	}
	return all
}

// widest leaves out the subjects that others include: a stream may not have both.
func widest(subjects []string) (kept []string) {
	slices.Sort(subjects)
	subjects = slices.Compact(subjects)
	for _, s := range subjects {
		if !slices.ContainsFunc(subjects, func(other string) bool { return other != s && server.SubjectMatchesFilter(s, other) }) {
			kept = append(kept, s)
		}
	}
	return kept
}

// observer keeps the events.
type observer struct{ *Routes }

func (r observer) Observe(_ context.Context, e natsx.Event) {
	m := *e.Msg // the event's is the handler's
	e.Msg = &m
	r.mu.Lock()
	r.events = append(r.events, e)
	r.mu.Unlock()
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// Publish publishes each envelope: to the stream that captures its subject, or else on core
// NATS. What fails ends the test.
func (r *Routes) Publish(es ...natsx.Envelope) {
	r.t.Helper()
	js, ctx, cancel := r.jetStream()
	defer cancel()
	for _, e := range es {
		_, err := js.StreamNameBySubject(ctx, e.Subject())
		switch {
		case err == nil:
			_, err = r.Publisher.Publish(ctx, e)
		case errors.Is(err, jetstream.ErrStreamNotFound):
			err = r.Publisher.Send(ctx, e)
		}
		if err != nil {
			r.t.Fatalf("natsxtest: publish to %q: %v", e.Subject(), err)
		}
	}
}

// Next waits for the next finished attempt and returns it. Attempts are in the order in
// which they were settled; each is returned once. Its message is a copy that may be kept.
func (r *Routes) Next() natsx.Event {
	r.t.Helper()
	limit := time.NewTimer(r.limit)
	defer limit.Stop()
	for {
		r.mu.Lock()
		if len(r.events) > 0 {
			e := r.events[0]
			r.events = r.events[1:]
			r.mu.Unlock()
			return e
		}
		r.mu.Unlock()
		select {
		case <-r.more:
			continue
		default:
		}
		select {
		case <-r.more:
		case <-r.done:
			r.t.Fatalf("natsxtest: no further attempt: Run has returned: %v", r.err)
		case <-limit.C:
			r.t.Fatalf("natsxtest: no further attempt within %s; health: %v", r.limit, r.Broker.Health())
		}
	}
}

// Until is [Routes.Next] until an attempt has the outcome, and returns all those attempts.
func (r *Routes) Until(outcome natsx.Outcome) []natsx.Event {
	r.t.Helper()
	for events := []natsx.Event(nil); ; {
		e := r.Next()
		events = append(events, e)
		if e.Outcome == outcome {
			return events
		}
	}
}

// Stop ends the routes as the end of the context of [natsx.Broker.Run] does, and returns
// what that returned, which then does not fail the test. Stopping twice is harmless.
func (r *Routes) Stop() error {
	r.cancel()
	<-r.done
	r.told = true
	return r.err
}
