// Package natsx runs message handlers over NATS and JetStream.
//
// An application chains routes and hands them to a [Broker], which runs their
// handlers on one shared pool, retries what fails, keeps what stays broken in a
// dead letter queue, and drains when it is told to stop:
//
//	nc, err := natsx.Connect(os.Getenv("NATS_URL"))
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer nc.Close()
//
//	broker := natsx.NewBroker(nc, natsx.WithStreams(
//		natsx.Stream("ORDERS").Subjects("orders.*"),
//		natsx.Stream("DLQ").Subjects("dlq.*"),
//	))
//	err = broker.Run(ctx,
//		natsx.Route("orders.*").Durable("billing").Retry(5).DLQ("dlq.orders").Handle(natsx.JSON(charge)),
//		natsx.Route("prices.get").Queue("pricing").Reply(natsx.JSONReply(price)),
//		natsx.Route("orders.>").Handle(audit),
//	)
//
// # Subjects
//
// A subject is one or more tokens with dots between them. A token is not empty and
// has neither white space nor control characters; a subject is valid UTF-8 of at
// most [MaxSubjectLength] bytes. In the filter of a route a token may be a
// wildcard: * stands for exactly one token, and > as the last token for one or
// more.
//
//	orders.*      matches orders.new        not orders, orders.eu.new
//	orders.*.new  matches orders.eu.new     not orders.new
//	orders.>      matches orders.eu.new     not orders
//	>             matches everything
//	orders.new*   matches nothing: refused, as are orders..new, .orders, orders.>.new
//
// What is published to, dead letters included, has no wildcard and does not begin
// with $, which belongs to the server. Tokens, wildcards and $ are as NATS has them
// (docs.nats.io, Subject-Based Messaging), where case counts; that there are no
// control characters, and the length, are natsx's own. [EscapeToken] makes a token of
// any text.
//
// # Outcomes
//
// What the handler of a durable route returns decides what becomes of the message:
//
//	nil                  it is acknowledged
//	an error             it is retried after the backoff, then dead
//	RetryAfter(d, err)   it is retried after d, which counts as an attempt
//	Permanent(err)       it is dead at once, and so is what does not decode
//	Discard(err)         it is dropped on purpose, without a dead letter
//	a panic              as an error, with the stack kept
//
// What returns after the route's Timeout has failed with
// [context.DeadlineExceeded]. An error in which several outcomes are wrapped is
// judged in the order Discard, Permanent, retry.
//
// Without Retry a message is tried until it succeeds. A dead message goes to the DLQ
// of its route. Without one it is logged, counted, not tried again, and stays in its
// stream: one with limits retention has it terminated. A work-queue or interest stream
// would delete it then, so that there, and where the retention may not be asked for,
// it is left unsettled and counts against MaxAckPending. On these streams a route with
// Retry and without DLQ is refused with [ErrWouldLose].
//
// A message of a core route is gone whatever its handler returns; a failure is
// logged and counted.
//
// # Delivery
//
// A durable route is at least once: a message is acknowledged after its handler
// returned nil, and delivered again when that acknowledgement does not reach the
// server before the lease ends (AckWait). natsx renews the lease of what waits and
// what runs, so that a slow handler is no cause of duplicates, and settles nothing
// when a lease was lost. A route without Durable is at most once.
//
// Attempts are counted by the server, so that they survive a crash. With Retry, a
// message that took its process down each time is dead without running again.
//
// A dead letter is stored, under an id of its own, before its original is settled.
// While the DLQ takes none, the original stays and the route stops pulling. A
// letter written twice because a process died in between is stored once within the
// duplicate window of the DLQ's stream. A DLQ whose stream could not keep letters, such
// as one with interest retention, is refused with [ErrBadDLQ].
//
// Handlers run at once and in no order, unless Concurrency is 1; a retry comes
// later than what follows it.
//
// [DeadLetters] lists, counts, redrives and purges letters; [OnDeadLetter] handles
// them in a route. [Broker.Replay] handles once more what a stream holds, and
// touches no durable.
//
// # Publishing and requests
//
// A [Publisher] sends envelopes, which [To] starts. What [Publisher.Publish] stores
// bears a message id, so that no retry of its own is a second copy. Inside a durable's
// handler the id is made of the handled message and of the envelope, so that a
// redelivery does not publish twice what is the same, and loses nothing that is not.
//
// A route with [RouteBuilder.Reply] answers every request, also when its responder
// fails or panics. [Publisher.Request] and [RequestJSON] tell an error that was
// answered ([*ReplyError]) from nobody there ([ErrNoResponders]) and from nobody
// done in time ([ErrTimeout]). [WithService] lists a broker's reply routes as a NATS
// micro service.
//
// # Shutdown
//
// When the context of [Broker.Run] ends, the routes stop receiving, while the
// handlers go on with a live context. Run returns when every message in hand is
// settled. At the drain timeout ([WithDrainTimeout]) the contexts of the handlers
// end; those that have not returned after [DrainGrace] are abandoned. A
// [*DrainError] then counts what was not finished. The connection stays open: it
// belongs to the caller.
//
// # Errors
//
// [Validate] and Run report all faults of all routes at once, as [*RouteError]s,
// before the first network call. While routes run, what passes by itself (a
// reconnect, an election, a server that starts) is retried and shown by
// [Broker.Health]; what does not, such as a deleted consumer or a missing
// permission, ends Run with a typed error.
package natsx
