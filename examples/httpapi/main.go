// Httpapi is an HTTP service that stores what it is asked to do in a stream, and answers
// at once: POST /orders publishes, a route does the work. A client that got no answer
// repeats the request with the same Idempotency-Key, and the order is stored once. The same
// server has the probes of the broker.
//
// It starts a nats-server of its own, or uses that of NATS_URL, sends itself some requests,
// and ends. With -serve it listens on :8080 until it is interrupted.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/internal/embedded"
)

type order struct {
	ID    string `json:"id"`
	Cents int    `json:"cents"`
}

// api publishes what comes over HTTP.
type api struct{ pub *natsx.Publisher }

func (a api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.Header.Get("Idempotency-Key")
	if key == "" || len(key) > 100 {
		http.Error(w, "an Idempotency-Key of 1 to 100 bytes is needed", http.StatusBadRequest)
		return
	}
	var o order
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 16<<10)).Decode(&o); err != nil || o.ID == "" || o.Cents <= 0 {
		http.Error(w, "not an order", http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
	defer cancel()
	ack, err := a.pub.Publish(ctx, natsx.To("httpapi.orders.placed").MsgID("http/"+key).JSON(o))
	switch {
	case errors.Is(err, natsx.ErrTooLarge):
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	case err != nil: // it may be stored or not: the client tries again with the same key
		slog.ErrorContext(ctx, "order not confirmed", "error", err)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "try again with the same key", http.StatusServiceUnavailable)
	case ack.Duplicate:
		fmt.Fprintf(w, "order %s was taken before\n", o.ID)
	default:
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprintf(w, "order %s is taken\n", o.ID)
	}
}

func main() {
	serve := flag.Bool("serve", false, "listen on :8080 until interrupted")
	flag.Parse()
	if err := run(*serve); err != nil {
		fmt.Fprintln(os.Stderr, "httpapi:", err)
		os.Exit(1)
	}
}

func run(serve bool) (err error) {
	url := os.Getenv("NATS_URL")
	if url == "" {
		var stop func()
		if url, stop, err = embedded.Run(); err != nil {
			return err
		}
		defer stop()
	}
	nc, err := natsx.Connect(url, nats.Name("natsx httpapi"))
	if err != nil {
		return err
	}
	defer nc.Close()
	broker := natsx.NewBroker(nc, natsx.WithLogger(slog.New(slog.DiscardHandler)), natsx.WithStreams(
		// Keys are remembered for as long as clients may repeat a request.
		natsx.Stream("HTTPAPI_ORDERS").Subjects("httpapi.orders.*").DedupWindow(time.Hour).MaxAge(24*time.Hour),
		natsx.Stream("HTTPAPI_DLQ").Subjects("httpapi.dlq"),
	))

	mux := http.NewServeMux()
	mux.Handle("POST /orders", api{natsx.NewPublisher(nc)})
	mux.Handle("/", broker.Handler()) // /healthz, /readyz
	address := "127.0.0.1:0"
	if serve {
		address = ":8080"
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	web := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go web.Serve(listener)

	handled := make(chan order, 10)
	bill := func(_ context.Context, o order) error {
		select {
		case handled <- o:
		default: // nobody reads with -serve
		}
		return nil
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var failed error
	talked := make(chan struct{})
	go func() {
		defer close(talked)
		<-broker.Ready()
		if !serve {
			failed = talk("http://"+listener.Addr().String(), handled)
			stop()
		}
	}()
	err = natsx.Serve(ctx, broker,
		natsx.Route("httpapi.orders.*").Durable("httpapi-billing").DeliverNew().Retry(5).DLQ("httpapi.dlq").
			Handle(natsx.JSON(bill)))
	if err != nil {
		return errors.Join(err, web.Close())
	}
	if !serve {
		<-talked
	}
	// The API goes on until the routes have drained; then it ends its own requests.
	closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return errors.Join(failed, web.Shutdown(closing))
}

// talk is a client that got no answer to its first request.
func talk(url string, handled <-chan order) error {
	id := fmt.Sprint("key-", time.Now().UnixNano())
	for _, r := range []struct{ key, body string }{
		{id, `{"id":"o-1","cents":990}`},
		{id, `{"id":"o-1","cents":990}`}, // once more
		{"", `{"id":"o-2","cents":450}`},
		{id + "-2", `{"id":"o-3"}`},
	} {
		request, err := http.NewRequest(http.MethodPost, url+"/orders", strings.NewReader(r.body))
		if err != nil {
			return err
		}
		request.Header.Set("Idempotency-Key", r.key)
		if err := show(http.DefaultClient.Do(request)); err != nil {
			return err
		}
	}
	select {
	case o := <-handled:
		fmt.Println("billed", o.ID)
	case <-time.After(20 * time.Second):
		return errors.New("the order was not billed")
	}
	return show(http.Get(url + "/readyz"))
}

func show(answer *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	fmt.Println(answer.StatusCode, strings.TrimSpace(string(body)))
	return err
}
