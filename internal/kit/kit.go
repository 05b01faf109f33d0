// Package kit is what package natsxtest needs of natsx and no application should: natsx
// sets these functions when it is initialised. Where one takes any, it says which type of
// natsx that is; this package cannot import it.
package kit

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
)

// Facts are what a stream and a consumer know about a message.
type Facts struct {
	Route, Stream, Durable string
	Sequence               uint64
	Time                   time.Time
	Attempt                int
}

// Spec is what a natsx.Spec says about where messages come from and where dead ones go.
type Spec struct {
	Filters              []string
	Durable, Stream, DLQ string // empty for none
}

// Settlement is what becomes of a message: a natsx.Outcome and a natsx.Reason.
type Settlement struct {
	Outcome, Reason string
	After           time.Duration // before its retry
}

// NewMsg returns a *natsx.Msg.
var NewMsg func(subject string, data []byte, header nats.Header, f Facts) any

// Context returns a context that handles m, a *natsx.Msg.
var Context func(ctx context.Context, m any) context.Context

// Describe describes a natsx.Spec.
var Describe func(spec any) Spec

// Settle decides about an attempt of a natsx.Spec whose handler returned err.
var Settle func(spec any, err error, attempt int) Settlement
