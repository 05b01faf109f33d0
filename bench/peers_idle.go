package main

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"
)

const (
	routeSubjects = "bench.route.*"
	// pullSubjects are what clients send to ask for messages of the stream.
	pullSubjects = "$JS.API.CONSUMER.MSG.NEXT." + benchStream + ".>"

	trickleRoutes = 200
	trickleRate   = 400 // messages a second of all routes together
)

func routeSubject(route int) string { return fmt.Sprint("bench.route.", route) }

func manySubjects(n int) []string {
	subjects := make([]string, n)
	for i := range subjects {
		subjects[i] = routeSubject(i)
	}
	return subjects
}

// idle times the start of j.n routes, and then watches them.
func idle(run router) func(*job) error {
	return func(j *job) error {
		goroutines := runtime.NumGoroutine()
		if err := j.start(); err != nil {
			return err
		}
		begun := time.Now()
		return run(j, manySubjects(j.n), func() error {
			if err := j.stop(time.Since(begun)); err != nil {
				return err
			}
			if err := j.watch(); err != nil {
				return err
			}
			j.result.Goroutines = runtime.NumGoroutine() - goroutines
			return nil
		})
	}
}

// watch adds to the figure what happens while nothing happens.
func (j *job) watch() error {
	before, err := j.read()
	if err != nil {
		return err
	}
	time.Sleep(j.window)
	after, err := j.read()
	if err != nil {
		return err
	}
	used, f := after.since(before), &j.result
	window := after.at.Sub(before.at)
	f.IdleClient = float64(used.ClientCPU) / float64(window)
	f.IdleServer = float64(used.ServerCPU) / float64(window)
	f.MaxRSS, f.Others = used.MaxRSS, max(f.Others, used.Others)
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	f.Heap = mem.HeapAlloc
	return nil
}

// trickle measures routes that get a message now and then.
func trickle(run router) func(*job) error {
	return func(j *job) error {
		return run(j, manySubjects(trickleRoutes), func() error {
			if err := j.start(); err != nil {
				return err
			}
			h, err := j.startHelper(task{Kind: "trickle", URL: j.url, N: j.n, Size: j.size})
			if err != nil {
				return err
			}
			if err := j.finish(); err != nil {
				return err
			}
			return h.stop(&j.result.Pulls)
		})
	}
}

// publishTrickle publishes at an even pace to routes in random order, the same in each
// run, and reports how many pulls there were meanwhile.
func publishTrickle(t task, stop <-chan struct{}) (any, error) {
	nc, err := connect(t.URL)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	pulls, err := nc.SubscribeSync(pullSubjects)
	if err != nil {
		return nil, err
	}
	if err := pulls.SetPendingLimits(-1, -1); err != nil {
		return nil, err
	}
	payload := make([]byte, t.Size)
	order := rand.New(rand.NewPCG(1, 2))
	begun := time.Now()
	for i := range t.N {
		time.Sleep(time.Until(begun.Add(time.Duration(i) * time.Second / trickleRate)))
		if err := nc.Publish(routeSubject(order.IntN(trickleRoutes)), payload); err != nil {
			return nil, err
		}
	}
	<-stop
	if err := nc.Flush(); err != nil {
		return nil, err
	}
	n, _, err := pulls.Pending()
	return n, err
}
