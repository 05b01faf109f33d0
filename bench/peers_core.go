package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx"
)

const (
	coreSubject = "core.msg"
	// coreHandled receives a message whenever coreStep more messages were handled.
	coreHandled = "core.handled"
	coreStep    = 1_024
	// coreLead is how many messages are on their way at most: far below the pending
	// limits of client and server, so that none is dropped.
	coreLead = 16 * coreStep
	// corePatience is how long the publisher waits for a step.
	corePatience = 20 * time.Second
)

// A core is a job whose messages another process publishes.
type core struct {
	*job
	handled *nats.Conn // to the publisher, apart from the peer's own
}

// coreRun gives run, which subscribes and has the messages published, what it needs.
func coreRun(run func(core) error) func(*job) error {
	return func(j *job) error {
		nc, err := connect(j.url)
		if err != nil {
			return err
		}
		defer nc.Close()
		return run(core{j, nc})
	}
}

// handle is the handler of every peer.
func (c core) handle(data []byte) {
	if n := c.job.handle(data); n%coreStep == 0 || n == int64(c.n) {
		_ = c.handled.Publish(coreHandled, nil)
	}
}

// publish has a helper publish what the peer then handles.
func (c core) publish() error {
	if err := c.nc.Flush(); err != nil {
		return err
	}
	if err := c.start(); err != nil {
		return err
	}
	h, err := c.startHelper(task{Kind: "publish-core", URL: c.url, N: c.n, Size: c.size})
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	return h.stop(&c.result.Waited)
}

// coreSubscribe is a subscription with the handler in its callback.
func coreSubscribe(c core) error {
	sub, err := c.nc.Subscribe(coreSubject, func(m *nats.Msg) { c.handle(m.Data) })
	if err != nil {
		return err
	}
	return errors.Join(c.publish(), sub.Unsubscribe())
}

// coreSubscribePool is the same with a pool of workers behind a buffered channel.
func coreSubscribePool(c core) error {
	queue := make(chan *nats.Msg, 1024)
	var pool sync.WaitGroup
	for range workers {
		pool.Go(func() {
			for m := range queue {
				c.handle(m.Data)
			}
		})
	}
	sub, err := c.nc.Subscribe(coreSubject, func(m *nats.Msg) { queue <- m })
	if err != nil {
		return err
	}
	if err := errors.Join(c.publish(), sub.Unsubscribe()); err != nil {
		return err
	}
	close(queue) // the last message was handled
	pool.Wait()
	return nil
}

func natsxCore(c core) error {
	return natsxRun(c.job, natsx.NewBroker(c.nc, natsx.WithWorkers(workers), quiet), c.publish,
		natsx.Route(coreSubject).Handle(func(_ context.Context, m *natsx.Msg) error {
			c.handle(m.Data)
			return nil
		}))
}

// publishCore publishes as fast as the client handles, and reports for what share
// of its time it waited for the client.
func publishCore(t task, stop <-chan struct{}) (any, error) {
	nc, err := connect(t.URL)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	steps, err := nc.SubscribeSync(coreHandled)
	if err != nil {
		return nil, err
	}
	payload := make([]byte, t.Size)
	handled := 0
	begun, waited := time.Now(), time.Duration(0)
	for sent := range t.N {
		if err := nc.Publish(coreSubject, payload); err != nil {
			return nil, err
		}
		for sent+1 == t.N && handled < t.N || sent+1-handled >= coreLead {
			from := time.Now()
			if _, err := steps.NextMsg(corePatience); err != nil {
				return nil, fmt.Errorf("%d messages sent, of which about %d were dropped: %w", sent+1, sent+1-handled, err)
			}
			waited += time.Since(from)
			handled += min(coreStep, t.N-handled)
		}
	}
	share := float64(waited) / float64(time.Since(begun))
	<-stop
	return share, nil
}
