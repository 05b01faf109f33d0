package natsx_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/natsx/natsx"
)

// A service runs until it gets SIGINT or SIGTERM, and then drains. Here its context
// ends it.
func ExampleServe() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	go func() {
		<-broker.Ready()
		cancel()
	}()
	err := natsx.Serve(ctx, broker,
		natsx.Route("orders.*").Durable("billing").
			Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	fmt.Println("stopped:", err)

	// Output:
	// stopped: <nil>
}

// An orchestrator asks /healthz whether to restart the process, and /readyz whether it
// does its work. In a service: go http.ListenAndServe(":8080", broker.Handler()).
func ExampleBroker_Handler() {
	nc, stop := exampleServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	broker := natsx.NewBroker(nc, quiet, natsx.WithStreams(natsx.Stream("ORDERS").Subjects("orders.*")))
	ask := func(path string) {
		answer := httptest.NewRecorder()
		broker.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, path, nil))
		fmt.Println(path, answer.Code, strings.TrimSpace(answer.Body.String()))
	}
	ask("/healthz")
	ask("/readyz")

	stopped := make(chan error)
	go func() {
		stopped <- broker.Run(ctx, natsx.Route("orders.*").Durable("billing").
			Handle(func(ctx context.Context, m *natsx.Msg) error { return nil }))
	}()
	<-broker.Ready()
	ask("/readyz")
	cancel()
	fmt.Println("stopped:", <-stopped)
	ask("/healthz")

	// Output:
	// /healthz 200 ok
	// /readyz 503 natsx: broker is not running
	// /readyz 200 ok
	// stopped: <nil>
	// /healthz 503 natsx: broker has stopped
}
