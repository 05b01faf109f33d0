package main

import (
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// A section compares peers at one job. Each figure is one run of one peer.
type section struct {
	name  string  // what -run matches
	title string  // what the table is headed with
	share float64 // of -n: the messages of one run
	unit  string  // of the share, if not messages
	size  int     // of a message in bytes
	does  work
	sleep time.Duration // of the handler
	peers []peer        // ratios are to the first

	columns []column              // rateColumns when there are none
	burners int                   // goroutines of another process that burn CPU meanwhile
	window  time.Duration         // that an idle run is watched for
	storage jetstream.StorageType // of the stream
}

// work is what the runs of a section do with the stream: what it must hold
// before, and what is checked after each run.
type work int

const (
	consuming      work = iota // the stream holds the messages; each run settles all
	draining                   // the same, but a message may come again and a connection may be lost
	reading                    // the stream holds the messages; a run leaves them
	publishing                 // each run stores the messages
	fastPublishing             // the same, in a stream that allows batch ingest
	trickling                  // the stream is empty and takes routeSubjects; each run settles what it publishes
	passing                    // the stream is not used
)

// A peer is one way to do the job of a section.
type peer struct {
	name  string
	share float64 // of the section's messages, for the slow; 0 is all
	run   func(*job) error
}

var sections = []section{
	{name: "consume-128B", title: "Consuming, handler does nothing, 128 B", share: 1, size: 128, peers: consumers},
	{name: "consume-1KiB", title: "Consuming, handler does nothing, 1 KiB", share: 1, size: 1024, peers: consumers},
	{name: "consume-10KiB", title: "Consuming, handler does nothing, 10 KiB", share: 0.1, size: 10 << 10, does: draining, columns: drainColumns, peers: consumers},
	{name: "consume-100KiB", title: "Consuming, handler does nothing, 100 KiB", share: 0.02, size: 100 << 10, does: draining, columns: drainColumns, peers: consumers},
	{name: "backlog-10KiB", title: "A backlog of 10 KiB, one route, default settings", share: 0.24576, size: 10 << 10, does: draining, columns: drainColumns, peers: backlogs(1)},
	{name: "backlog-10KiB-2", title: "A backlog of 10 KiB, two routes, default settings", share: 0.24576, size: 10 << 10, does: draining, columns: drainColumns, peers: backlogs(2)},
	{name: "consume-sleep", title: "Consuming, handler sleeps 1 ms, 64 workers", share: 0.25, size: 128, sleep: time.Millisecond, peers: sleepers},
	{name: "batch", title: "Inserting rows, a transaction takes 1 ms and 1 µs a row, 128 B", share: 0.25, size: 128, sleep: time.Millisecond, peers: []peer{
		{name: natsxPrefix + ", a transaction a message, 64 workers", run: natsxConsume},
		{name: natsxPrefix + ", Batch(1000), one at a time", run: natsxBatch},
		{name: "nats.go Fetch(1000), one at a time", run: fetchBatch},
	}},
	{name: "push", title: "Consuming by push, handler does nothing, 128 B", share: 1, size: 128, peers: []peer{
		{name: "nats.go Consume, defaults", run: consumeDefaults},
		{name: "hand-written pull, 5,000 / 20,000", run: pull},
		{name: "push, flow control, MaxAckPending 20,000", run: push(false)},
		{name: "the same, one ack for 100 (AckAll)", run: push(true)},
		{name: natsxPrefix + ", Retry, DLQ, 64 workers", run: natsxConsume},
	}},
	{name: "busy-1", title: "Consuming, handler does nothing, 128 B, beside 1 goroutine that burns CPU", share: 1, size: 128, burners: 1, peers: besides},
	{name: "busy-2", title: "Consuming, handler does nothing, 128 B, beside 2 goroutines that burn CPU", share: 1, size: 128, burners: 2, peers: besides},
	{name: "idle", title: "Durable routes without messages, on one connection", share: 0.005, unit: "routes", does: trickling, window: 20 * time.Second, columns: idleColumns, peers: []peer{
		{name: "nats.go Consume, defaults", run: idle(consumeRoutes)},
		{name: natsxPrefix + ", defaults", run: idle(natsxRoutes)},
	}},
	{name: "trickle", title: "200 durable routes with 400 messages a second together, 128 B", share: 0.02, size: 128, does: trickling, columns: trickleColumns, peers: tricklers},
	{name: "trickle-memory", title: "200 durable routes with 400 messages a second together, 128 B, memory storage", share: 0.02, size: 128, does: trickling, storage: jetstream.MemoryStorage, columns: trickleColumns, peers: tricklers},
	{name: "publish-sync", title: "Publishing one at a time, 128 B", share: 0.05, size: 128, does: publishing, peers: []peer{
		{name: "nats.go Publish", run: publishSync},
		{name: "Publish with a message id", run: publishSyncID},
		{name: natsxPrefix + " Publish", run: natsxPublish},
	}},
	{name: "publish-async", title: "Publishing many at once, 128 B", share: 1, size: 128, does: publishing, peers: []peer{
		{name: "nats.go PublishAsync, 4,000 pending", run: publishAsync},
		{name: "the same with message ids", run: publishAsyncID},
		{name: natsxPrefix + " PublishAll", run: natsxPublishAll()},
		{name: natsxPrefix + " PublishAll without message ids", run: natsxPublishAll(natsx.WithoutMessageIDs())},
	}},
	{name: "publish-fast", title: "Publishing many at once, 128 B, the stream allows batch ingest", share: 1, size: 128, does: fastPublishing, peers: []peer{
		{name: "nats.go PublishAsync, 4,000 pending", run: publishAsync},
		{name: natsxPrefix + " PublishAll", run: natsxPublishAll()},
		{name: natsxPrefix + " PublishAll, WithFastIngest", run: natsxPublishAll(natsx.WithFastIngest())},
		{name: natsxPrefix + " PublishAll without message ids", run: natsxPublishAll(natsx.WithoutMessageIDs())},
		{name: natsxPrefix + " PublishAll, WithFastIngest, without message ids", run: natsxPublishAll(natsx.WithFastIngest(), natsx.WithoutMessageIDs())},
		{name: "orbit.go fast ingest, defaults", run: fastIngest(0, 0)},
		{name: "orbit.go fast ingest, flow 1,000 x 4", run: fastIngest(1000, 4)},
	}},
	{name: "request-1", title: "Request-reply, 1 requester, 128 B", share: 0.05, size: 128, does: passing, columns: requestColumns, peers: []peer{
		{name: "nats.go Request, micro", run: microRequests(1)},
		{name: natsxPrefix + " Reply, nats.go Request", run: natsxRequests(1, natsRequester)},
		{name: natsxPrefix + " Reply and Request", run: natsxRequests(1, natsxRequester)},
		{name: natsxPrefix + " Reply and Request, deadline told", run: natsxRequests(1, natsxDeadlineRequester)},
	}},
	{name: "request-64", title: "Request-reply, 64 requesters, 128 B", share: 0.5, size: 128, does: passing, columns: requestColumns, peers: []peer{
		{name: "nats.go Request, micro", run: microRequests(64)},
		{name: natsxPrefix + " Reply, nats.go Request", run: natsxRequests(64, natsRequester)},
		{name: natsxPrefix + " Reply and Request", run: natsxRequests(64, natsxRequester)},
		{name: natsxPrefix + " Reply and Request, deadline told", run: natsxRequests(64, natsxDeadlineRequester)},
	}},
	{name: "core", title: "Core subscription, handler does nothing, 128 B", share: 10, size: 128, does: passing, columns: coreColumns, peers: []peer{
		{name: "nats.go Subscribe", run: coreRun(coreSubscribe)},
		{name: "the same with 64 workers", run: coreRun(coreSubscribePool)},
		{name: natsxPrefix + ", 64 workers", run: coreRun(natsxCore)},
	}},
	{name: "replay", title: "Reading a stream in order, as fast as possible, 128 B", share: 1, size: 128, does: reading, peers: []peer{
		{name: "nats.go ordered consumer", run: orderedConsumer},
		{name: natsxPrefix + " Replay", run: natsxReplay(">")},
		{name: natsxPrefix + " Replay, by subject", run: natsxReplay(benchSubject)},
	}},
}

var consumers = []peer{
	{name: "nats.go Consume, defaults", run: consumeDefaults},
	{name: "Consume, 5,000 pulled, MaxAckPending 20,000", run: consumeDeep},
	{name: "hand-written pull, 5,000 / 20,000", run: pull},
	{name: "the same with 64 workers", run: pullPool},
	{name: natsxPrefix + ", Retry, DLQ, 64 workers", run: natsxConsume},
	{name: "watermill-nats jetstream, async acks", run: watermillJetStream(true), share: 0.5},
	{name: "watermill-nats nats, async acks", run: watermillNATS(true), share: 0.5},
	{name: "watermill-nats jetstream, its default", run: watermillJetStream(false), share: 0.03},
}

// backlogs have each of so many durables handle all of the stream.
func backlogs(routes int) []peer {
	return []peer{
		{name: "nats.go Consume, defaults", run: backlog(consumeRoutes, routes)},
		{name: natsxPrefix + ", defaults", run: backlog(natsxRoutes, routes)},
	}
}

var tricklers = []peer{
	{name: "nats.go Consume, defaults", run: trickle(consumeRoutes)},
	{name: natsxPrefix + ", defaults", run: trickle(natsxRoutes)},
}

var sleepers = []peer{
	{name: "hand-written pull, 64 workers", run: pullPool},
	{name: natsxPrefix + ", Retry, DLQ, 64 workers", run: natsxConsume},
}

// besides are for a machine that is busy with other things.
var besides = []peer{
	{name: "hand-written pull, 64 workers", run: pullPool},
	{name: "nats.go Consume, defaults", run: consumeDefaults},
	{name: natsxPrefix + ", Retry, DLQ, 64 workers", run: natsxConsume},
}

// natsxPrefix begins the names of the peers that -cpuprofile and -memprofile
// are for.
const natsxPrefix = "natsx"
