package otelnatsx_test

import (
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/otelnatsx"
)

func Example() {
	trace := func(nc *nats.Conn) (*natsx.Broker, *natsx.Publisher) {
		tracing := otelnatsx.New() // spans by otel.GetTracerProvider

		broker := natsx.NewBroker(nc, tracing.Broker())
		pub := natsx.NewPublisher(nc, tracing.Publisher())
		return broker, pub
	}
	_ = trace
}

func ExampleWithDestination() {
	tracing := otelnatsx.New(otelnatsx.WithDestination(func(subject string) string {
		prefix, _, _ := strings.Cut(subject, ".")
		return prefix + ".*"
	}))
	_ = tracing
}
