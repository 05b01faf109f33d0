package promnatsx_test

import (
	"net/http"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/promnatsx"
)

func Example() {
	serve := func(nc *nats.Conn) (*natsx.Broker, *natsx.Publisher) {
		metrics := promnatsx.New()
		prometheus.MustRegister(metrics)

		broker := natsx.NewBroker(nc, natsx.WithObserver(metrics))
		metrics.Watch(broker)
		pub := natsx.NewPublisher(nc, natsx.WithPublishMiddleware(metrics.Publish))

		http.Handle("/metrics", promhttp.Handler())
		return broker, pub
	}
	_ = serve
}
