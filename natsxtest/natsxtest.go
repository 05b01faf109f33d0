// Package natsxtest tests what uses natsx: handlers without a server, what a route does
// with their errors, and whole routes at a server inside the process.
//
// A unit test calls a handler with a message of its own:
//
//	m := natsxtest.Msg("orders.created", data, natsxtest.Durable("billing"), natsxtest.Attempt(3))
//	err := bill(natsxtest.Context(t.Context(), m), m)
//
// [Settle] reports what a route would do with that error, so that a policy of minutes is
// tested in microseconds, and [Run] runs routes and waits for what becomes of messages.
//
// The package links nats-server: it belongs into tests alone.
package natsxtest

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
	"github.com/natsx/natsx/internal/kit"
)

// Server runs a nats-server with JetStream on a free port of the loopback until the test
// ends; its ClientURL is where to connect. Its files are removed with it. edit may change
// its options before it starts. What fails ends the test.
func Server(t testing.TB, edit ...func(*server.Options)) *server.Server {
	t.Helper()
	s, stop, err := embedded.Start(edit...)
	if err != nil {
		t.Fatalf("natsxtest: %v", err)
	}
	t.Cleanup(stop)
	return s
}

// Connect connects to s until the test ends. What fails ends the test.
func Connect(t testing.TB, s *server.Server, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(s.ClientURL(), opts...)
	if err != nil {
		t.Fatalf("natsxtest: connect: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// MsgOption is a property of a message; see [Msg].
type MsgOption func(*message)

type message struct {
	header nats.Header
	facts  kit.Facts
}

// Msg returns a message as a route would receive it. Without options it is one of core
// NATS without headers.
func Msg(subject string, data []byte, opts ...MsgOption) *natsx.Msg {
	var m message
	for _, opt := range opts {
		opt(&m)
	}
	return kit.NewMsg(subject, data, m.header, m.facts).(*natsx.Msg)
}

// Header adds a header; of one name there may be several.
func Header(name, value string) MsgOption {
	return func(m *message) {
		if m.header == nil {
			m.header = nats.Header{}
		}
		m.header[name] = append(m.header[name], value)
	}
}

// Route sets the filter of the route; default is none.
func Route(filter string) MsgOption { return func(m *message) { m.facts.Route = filter } }

// Stream sets the stream that the message is from; default is none, as for core NATS.
func Stream(name string) MsgOption { return func(m *message) { m.facts.Stream = name } }

// Durable sets the durable that received the message; default is none, as for core NATS.
func Durable(name string) MsgOption { return func(m *message) { m.facts.Durable = name } }

// Sequence sets the sequence in the stream; default is 0, as for core NATS.
func Sequence(n uint64) MsgOption { return func(m *message) { m.facts.Sequence = n } }

// Time sets when the stream stored the message; default is the zero time, as for core NATS.
func Time(at time.Time) MsgOption { return func(m *message) { m.facts.Time = at } }

// Attempt sets which run of the handler this is; default is 1, and less is 1.
func Attempt(n int) MsgOption { return func(m *message) { m.facts.Attempt = n } }

// Context returns a context as the handler of m has it: [natsx.MsgFrom] finds m, and what a
// [natsx.Publisher] publishes with it carries m's trace headers over and, for a message of
// a durable, has the message ids that are made of m. A context made anew for m is a
// redelivery: what is published the same again has the same ids. It ends with ctx. m is
// any message; its headers and facts count as they are now.
func Context(ctx context.Context, m *natsx.Msg) context.Context { return kit.Context(ctx, m) }

// Settlement is what a route does with a message after an attempt.
type Settlement struct {
	Outcome natsx.Outcome // what becomes of the message
	After   time.Duration // of [natsx.OutcomeRetried]: before the next attempt, without the random ±20 % of a backoff
	Reason  natsx.Reason  // of [natsx.OutcomeDead]
}

// Settle reports what the route of spec does with a message whose handler returned err on
// an attempt, 1 for the first, as [natsx.Broker.Run] does. What only a server knows is left
// out: a stream that deletes the message before its next attempt, or a shutdown. A timeout
// is an error with [context.DeadlineExceeded] in its chain, a panic a [*natsx.PanicError].
func Settle(spec natsx.Spec, err error, attempt int) Settlement {
	s := kit.Settle(spec, err, attempt)
	return Settlement{natsx.Outcome(s.Outcome), s.After, natsx.Reason(s.Reason)}
}
