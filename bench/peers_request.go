package main

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/micro"
)

const requestSubject = "echo"

// microRequests is nats.go on both sides: a micro endpoint that echoes, on a
// connection of its own, and Conn.Request.
func microRequests(requesters int) func(*job) error {
	return func(j *job) error {
		nc, err := connect(j.url)
		if err != nil {
			return err
		}
		defer nc.Close()
		if _, err := micro.AddService(nc, micro.Config{
			Name: "bench", Version: "1.0.0",
			Endpoint: &micro.EndpointConfig{
				Subject: requestSubject,
				// A lost answer shows as the requester's timeout.
				Handler: micro.HandlerFunc(func(r micro.Request) { _ = r.Respond(r.Data()) }),
			},
		}); err != nil {
			return err
		}
		if err := nc.Flush(); err != nil {
			return err
		}
		return j.requests(requesters, j.natsRequest)
	}
}

func (j *job) natsRequest(payload []byte) ([]byte, error) {
	m, err := j.nc.Request(requestSubject, payload, 10*time.Second)
	if err != nil {
		return nil, err
	}
	return m.Data, nil
}

// requests sends j.n requests from so many goroutines, one at a time each.
func (j *job) requests(requesters int, request func([]byte) ([]byte, error)) error {
	payload := make([]byte, j.size)
	latencies := make([]time.Duration, j.n)
	var next atomic.Int64
	var failed atomic.Pointer[error]
	if err := j.start(); err != nil {
		return err
	}
	start := time.Now()
	var all sync.WaitGroup
	for range requesters {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(j.n) && failed.Load() == nil; i = next.Add(1) - 1 {
				sent := time.Now()
				answer, err := request(payload)
				latencies[i] = time.Since(sent)
				if err == nil && len(answer) != len(payload) {
					err = fmt.Errorf("answered %d bytes to %d", len(answer), len(payload))
				}
				if err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	all.Wait()
	elapsed := time.Since(start)
	if err := failed.Load(); err != nil {
		return *err
	}
	slices.Sort(latencies)
	j.result.P50, j.result.P99 = latencies[j.n/2], latencies[j.n*99/100]
	return j.stop(elapsed)
}
