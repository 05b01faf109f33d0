// Package promnatsx exports what natsx does to Prometheus.
//
//	metrics := promnatsx.New()
//	prometheus.MustRegister(metrics)
//	broker := natsx.NewBroker(nc, natsx.WithObserver(metrics))
//	metrics.Watch(broker)
//	pub := natsx.NewPublisher(nc, natsx.WithPublishMiddleware(metrics.Publish))
//
// Metrics are labelled with the filter, the durable and the stream of a route, and never
// with a subject, of which there may be any number. The README lists them; dashboard.json
// and alerts.yml beside it are made of them.
package promnatsx

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/natsx/natsx"
)

// DefaultBuckets are the upper bounds of the histograms, in seconds: from a handler that
// does nothing to one that takes minutes.
var DefaultBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

// Option configures [Metrics].
type Option func(*Metrics)

// WithBuckets sets the upper bounds of the histograms, in seconds and rising. Default is
// [DefaultBuckets].
func WithBuckets(bounds ...float64) Option { return func(m *Metrics) { m.buckets = bounds } }

// Metrics are the metrics of brokers and publishers: a [prometheus.Collector] to be
// registered, and a [natsx.Observer] for the option [natsx.WithObserver]. They are safe for
// concurrent use. Constant labels are added by [prometheus.WrapRegistererWith].
type Metrics struct {
	buckets []float64

	handler   *prometheus.HistogramVec
	dead      *prometheus.CounterVec
	publish   *prometheus.HistogramVec
	published *prometheus.CounterVec
	unstored  *prometheus.CounterVec

	mu      sync.Mutex
	sources []source
}

// source is a broker.
type source interface {
	Stats() natsx.Stats
	Health() error
}

// routeLabels are the labels of what is counted by route.
var routeLabels = []string{"route", "durable", "stream"}

// New returns metrics without a broker.
func New(opts ...Option) *Metrics {
	m := &Metrics{buckets: DefaultBuckets}
	for _, opt := range opts {
		opt(m)
	}
	m.handler = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "natsx_handler_seconds", Help: "Time that handlers ran, by attempt; each message of a batch has its share.", Buckets: m.buckets,
	}, routeLabels)
	m.dead = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "natsx_dead_total", Help: "Dead messages: moved to the DLQ, or without one terminated or left unsettled.",
	}, append(routeLabels[:len(routeLabels):len(routeLabels)], "reason"))
	m.publish = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "natsx_publish_seconds", Help: "Time of a publisher's calls, with their retries.", Buckets: m.buckets,
	}, []string{"operation"})
	m.published = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "natsx_published_total", Help: "Envelopes sent, stored or answered.",
	}, []string{"operation"})
	m.unstored = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "natsx_publish_failures_total", Help: "Envelopes whose call has failed; an outcome that is unknown is a failure.",
	}, []string{"operation"})
	return m
}

// Watch adds a broker: its statistics are collected from now on. The counters of two routes
// with the same labels add up. Collecting asks no server. A broker that has stopped keeps its
// counters, and is not healthy.
func (m *Metrics) Watch(b *natsx.Broker) { m.watch(b) }

func (m *Metrics) watch(s source) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sources = append(m.sources, s)
}

// Observe counts a finished attempt; see [natsx.WithObserver].
func (m *Metrics) Observe(_ context.Context, e natsx.Event) {
	if e.Duration > 0 {
		share := e.Duration / time.Duration(max(e.Batch, 1))
		m.handler.WithLabelValues(e.Route, e.Durable, e.Msg.Stream()).Observe(share.Seconds())
	}
	if e.Outcome == natsx.OutcomeDead {
		m.dead.WithLabelValues(e.Route, e.Durable, e.Msg.Stream(), string(e.Reason)).Inc()
	}
}

// Publish measures what a publisher does; see [natsx.WithPublishMiddleware].
func (m *Metrics) Publish(next natsx.PublishFunc) natsx.PublishFunc {
	return func(ctx context.Context, c *natsx.PublishCall) error {
		begun := time.Now()
		err := next(ctx, c)
		op, failed := string(c.Operation), 0
		if err != nil {
			failed = len(c.Envelopes)
			if some, ok := errors.AsType[*natsx.PublishError](err); ok {
				failed = len(some.Unwrap())
			}
		}
		m.publish.WithLabelValues(op).Observe(time.Since(begun).Seconds())
		m.published.WithLabelValues(op).Add(float64(max(len(c.Envelopes)-failed, 0)))
		m.unstored.WithLabelValues(op).Add(float64(failed))
		return err
	}
}

// statistic is a metric that is made of the statistics of a route.
type statistic struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(natsx.RouteStats) float64
	most  bool // of routes with the same labels the largest counts, not the sum
}

func counter(name, help string, value func(natsx.RouteStats) uint64) statistic {
	return statistic{
		desc: prometheus.NewDesc(name, help, routeLabels, nil), kind: prometheus.CounterValue,
		value: func(st natsx.RouteStats) float64 { return float64(value(st)) },
	}
}

func gauge(name, help string, value func(natsx.RouteStats) float64) statistic {
	return statistic{desc: prometheus.NewDesc(name, help, routeLabels, nil), kind: prometheus.GaugeValue, value: value}
}

var statistics = []statistic{
	counter("natsx_received_total", "Messages delivered to this process, redeliveries included.",
		func(st natsx.RouteStats) uint64 { return st.Received }),
	counter("natsx_succeeded_total", "Messages acknowledged; of a core route handled, requests answered.",
		func(st natsx.RouteStats) uint64 { return st.Succeeded }),
	counter("natsx_retried_total", "Failed attempts that another one follows.",
		func(st natsx.RouteStats) uint64 { return st.Retried }),
	counter("natsx_discarded_total", "Messages terminated since the handler returned Discard.",
		func(st natsx.RouteStats) uint64 { return st.Discarded }),
	counter("natsx_returned_total", "Messages given back whose attempt does not count: at the drain timeout, or while a breaker was not closed.",
		func(st natsx.RouteStats) uint64 { return st.Returned }),
	counter("natsx_lapsed_total", "Leases lost before the message was settled.",
		func(st natsx.RouteStats) uint64 { return st.Lapsed }),
	counter("natsx_failed_total", "Failed messages of a core route, and errors answered to requests.",
		func(st natsx.RouteStats) uint64 { return st.Failed }),
	counter("natsx_dropped_total", "Messages of a core route dropped by the client as a slow consumer.",
		func(st natsx.RouteStats) uint64 { return st.Dropped }),
	gauge("natsx_running", "Handlers that run.",
		func(st natsx.RouteStats) float64 { return float64(st.Running) }),
	gauge("natsx_waiting", "Messages that this process has and that wait for a worker.",
		func(st natsx.RouteStats) float64 { return float64(st.Waiting) }),
	gauge("natsx_delayed", "Messages that this process gave back and that wait for their retry.",
		func(st natsx.RouteStats) float64 { return float64(st.Delayed) }),
	{
		desc: prometheus.NewDesc("natsx_oldest_running_seconds", "How long the handler that began first has been running, 0 when none runs.", routeLabels, nil),
		kind: prometheus.GaugeValue, value: func(st natsx.RouteStats) float64 { return st.OldestRunning.Seconds() }, most: true,
	},
}

var (
	pendingDesc = prometheus.NewDesc("natsx_consumer_pending",
		"Messages that the durable has yet to deliver (num_pending), over all processes; as last known.", routeLabels, nil)
	ackPendingDesc = prometheus.NewDesc("natsx_consumer_ack_pending",
		"Messages delivered and not settled, with those that wait for their retry, over all processes; as last known.", routeLabels, nil)
	breakerDesc = prometheus.NewDesc("natsx_breaker_state",
		"1 for the state of the route's breaker, 0 for the others; only for a route with one.", append(routeLabels[:len(routeLabels):len(routeLabels)], "state"), nil)
	healthyDesc = prometheus.NewDesc("natsx_healthy",
		"1 while every broker is healthy, else 0.", nil, nil)
)

var reasons = []natsx.Reason{
	natsx.ReasonExhausted, natsx.ReasonPermanent, natsx.ReasonPanic, natsx.ReasonUndecodable, natsx.ReasonCrashed,
}

var breakerStates = []natsx.BreakerState{natsx.BreakerClosed, natsx.BreakerOpen, natsx.BreakerHalfOpen}

// Describe implements [prometheus.Collector].
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, s := range statistics {
		ch <- s.desc
	}
	ch <- pendingDesc
	ch <- ackPendingDesc
	ch <- breakerDesc
	ch <- healthyDesc
	for _, c := range m.own() {
		c.Describe(ch)
	}
}

func (m *Metrics) own() []prometheus.Collector {
	return []prometheus.Collector{m.handler, m.dead, m.publish, m.published, m.unstored}
}

// Collect implements [prometheus.Collector].
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	sources := m.sources
	m.mu.Unlock()
	groups := grouped(sources)
	for labels := range groups {
		if labels[1] == "" {
			continue
		}
		// From the start, or the first dead message would be no increase.
		for _, reason := range reasons {
			m.dead.WithLabelValues(append(labels[:], string(reason))...)
		}
	}
	for _, c := range m.own() {
		c.Collect(ch)
	}
	if len(sources) == 0 {
		return
	}
	healthy := 1.0
	for _, s := range sources {
		if s.Health() != nil {
			healthy = 0
		}
	}
	ch <- prometheus.MustNewConstMetric(healthyDesc, prometheus.GaugeValue, healthy)
	for labels, routes := range groups {
		collectRoutes(ch, labels[:], routes)
	}
}

// grouped are the routes of all sources by their labels, without durables whose stream is
// not known yet: they have nothing to tell, and another name later.
func grouped(sources []source) map[[3]string][]natsx.RouteStats {
	groups := map[[3]string][]natsx.RouteStats{}
	for _, s := range sources {
		for _, st := range s.Stats().Routes {
			if st.Durable == "" || st.Stream != "" {
				labels := [3]string{st.Route, st.Durable, st.Stream}
				groups[labels] = append(groups[labels], st)
			}
		}
	}
	return groups
}

// collectRoutes collects what routes with the same labels have done. Those with one durable
// have one consumer and one breaker each, of which the last is told.
func collectRoutes(ch chan<- prometheus.Metric, labels []string, routes []natsx.RouteStats) {
	for _, s := range statistics {
		v := 0.0
		for _, st := range routes {
			if s.most {
				v = max(v, s.value(st))
			} else {
				v += s.value(st)
			}
		}
		ch <- prometheus.MustNewConstMetric(s.desc, s.kind, v, labels...)
	}
	last := natsx.RouteStats{}
	for _, st := range routes {
		if st.Consumer != nil {
			last.Consumer = st.Consumer
		}
		if st.Breaker != "" {
			last.Breaker = st.Breaker
		}
	}
	if c := last.Consumer; c != nil {
		ch <- prometheus.MustNewConstMetric(pendingDesc, prometheus.GaugeValue, float64(c.NumPending), labels...)
		ch <- prometheus.MustNewConstMetric(ackPendingDesc, prometheus.GaugeValue, float64(c.NumAckPending), labels...)
	}
	if last.Breaker == "" {
		return
	}
	for _, state := range breakerStates {
		v := 0.0
		if state == last.Breaker {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(breakerDesc, prometheus.GaugeValue, v, append(labels[:len(labels):len(labels)], string(state))...)
	}
}
