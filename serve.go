package natsx

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// startReportEvery is how often [Serve] logs why the broker is not ready yet.
const startReportEvery = 10 * time.Second

// Serve runs specs on b for the lifetime of a process: until the process gets SIGINT
// or SIGTERM, ctx ends, or a route cannot continue. It returns what [Broker.Run]
// returns: nil after a clean drain, else an error for the exit status.
//
// The first signal starts the drain. It is logged, and from then on both signals have
// their default effect again, so that a second one ends the process at once. Until the
// broker is ready, the reason is logged every 10 s.
//
//	if err := natsx.Serve(ctx, broker, specs...); err != nil {
//		log.Fatal(err)
//	}
func Serve(ctx context.Context, b *Broker, specs ...Spec) error {
	return serve(ctx, b, startReportEvery, specs)
}

func serve(ctx context.Context, b *Broker, reportEvery time.Duration, specs []Spec) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)

	stopped := make(chan error, 1)
	go func() { stopped <- b.Run(ctx, specs...) }()
	report := time.NewTicker(reportEvery)
	defer report.Stop()
	ready := b.Ready()
	for {
		select {
		case err := <-stopped:
			return err
		case <-ready:
			ready = nil
			report.Stop()
		case <-report.C:
			select {
			case <-ready: // both were due
				ready = nil
				report.Stop()
				continue
			default:
			}
			b.log.Warn("natsx: broker is not ready yet", "error", b.Health())
		case s := <-signals:
			signal.Stop(signals)
			b.log.Info("natsx: draining; a second signal ends the process at once", "signal", s.String())
			ready = nil
			report.Stop()
			cancel()
		}
	}
}

// Handler serves the probes of an orchestrator such as Kubernetes:
//
//   - /healthz (liveness) answers 200, and 503 when only a restart can help: Run has
//     returned, or all workers hang in handlers beyond the Timeout of their routes. An
//     unreachable server or a full DLQ is no reason to restart.
//   - /readyz (readiness) answers 200 while [Broker.Health] returns nil, and else 503:
//     before the broker is ready, during the drain, and while a route is unhealthy.
//
// The body is "ok" or the text of the error, which may name subjects and servers: serve
// it on an internal port. Only GET and HEAD are allowed. No request asks the NATS
// server, so that probes may be as frequent as they like. The handler may be created
// and called before Run and after it.
func (b *Broker) Handler() http.Handler {
	mux := http.NewServeMux()
	probe := func(check func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("Cache-Control", "no-store")
			if err := check(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				fmt.Fprintln(w, err)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.Handle("GET /healthz", probe(b.dead))
	mux.Handle("GET /readyz", probe(b.Health))
	return mux
}

// dead is why only a restart of the process can help, or nil.
func (b *Broker) dead() error {
	e := b.ran.Load()
	if e == nil {
		return nil // not started yet
	}
	if e.stopped() {
		return errors.New("natsx: broker has stopped")
	}
	return e.hung.fault()
}
