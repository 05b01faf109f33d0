// Package natsx runs message handlers over NATS and JetStream.
//
// An application describes routes as chains and passes them to a [Broker], which runs
// their handlers on one shared pool of workers, retries messages that fail, moves those
// that keep failing to a dead letter queue, and drains at shutdown:
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
// A subject is one or more tokens separated by dots. A token is not empty and has neither
// white space nor control characters; a subject is valid UTF-8 of at most 1,024 bytes. In
// the filter of a route a token may be a wildcard: * matches exactly one token, and > as
// the last token matches one or more.
//
//	orders.*      matches orders.new        not orders, orders.eu.new
//	orders.*.new  matches orders.eu.new     not orders.new
//	orders.>      matches orders.eu.new     not orders
//	>             matches everything
//	orders.new*   is refused, as are orders..new, .orders and orders.>.new
//
// A subject to publish to, also that of a DLQ, has no wildcard and does not start with $,
// which is reserved for the server. Tokens, wildcards and $ are those of NATS
// (docs.nats.io, Subject-Based Messaging), and case-sensitive; the rules for control
// characters and length are those of natsx. [EscapeToken] returns a token for any text.
//
// # Outcomes
//
// The result of a durable route's handler decides how the message is settled:
//
//	nil                  it is acknowledged
//	an error             it is retried after the backoff while retries are left, then dead
//	RetryAfter(d, err)   it is retried after d, which counts as an attempt
//	Permanent(err)       it is dead at once, like a payload that does not decode
//	Discard(err)         it is terminated and logged, without a dead letter
//	a panic              is treated as an error, with its stack
//
// A handler that returns after the route's Timeout has failed with
// [context.DeadlineExceeded]. If an error wraps several outcomes, the first of Discard,
// Permanent and retry applies; see [OutcomeOf].
//
// Without Retry a message is retried until it succeeds. A dead message goes to the DLQ of
// its route. Without a DLQ it is logged and counted, and stays in its stream. In a stream
// with limits retention it is terminated. A work-queue or interest stream would then
// delete it, so there, and where the user may not read the retention, it is left unsettled
// and counts against MaxAckPending. On these streams a route with Retry and without DLQ is
// refused with [ErrWouldLose].
//
// A message of a core route is lost whatever its handler returns; a failure is logged and
// counted.
//
// # Delivery
//
// A durable route is at least once: a message is acknowledged after its handler returned
// nil, and redelivered if that acknowledgement does not reach the server before its ack
// wait ends. natsx extends the ack wait of messages that wait or run, so that a slow
// handler causes no duplicates, and settles nothing after it has ended. A route without
// Durable is at most once.
//
// Attempts are derived from the server's delivery count, so that they survive a crash.
// With Retry, a message that crashes its process each time is dead-lettered too, after
// further runs in isolation that prove it.
//
// A dead letter is stored, with a message id, before its original is settled. While the
// DLQ accepts none, the original stays and the route stops pulling. A letter that is
// published again after a crash is stored once within the duplicate window of the DLQ's
// stream. A DLQ whose stream could not keep letters, such as one with interest retention,
// is refused with [ErrBadDLQ].
//
// Handlers run concurrently and in no order, unless Concurrency is 1; a retry runs after
// later messages.
//
// [DeadLetters] lists, counts, redrives and purges letters; [OnDeadLetter] handles them in
// a route. [Broker.Replay] handles the messages of a stream again, and affects no durable.
//
// # Publishing and requests
//
// A [Publisher] sends envelopes, which [To] starts. [Publisher.Publish] adds a message id,
// so that its retries do not store a second copy. Inside a durable's handler the id is
// made of the handled message and the envelope, so that a redelivery does not publish
// equal envelopes twice, and different ones are never taken for duplicates.
//
// A route with [RouteBuilder.Reply] answers every request, even if its responder fails or
// panics. [Publisher.Request] and [RequestJSON] distinguish an error in the answer
// ([*ReplyError]), no responders ([ErrNoResponders]) and no answer in time
// ([ErrTimeout]). [WithService] lists a broker's reply routes as a NATS micro service.
//
// # JetStream domains
//
// By default natsx uses the JetStream of the connection's account. A long-lived client
// gets another one as an option: [WithJetStream] for a Broker with its durables, dead
// letters, replays and streams, [WithPublisherJetStream] for a Publisher. What is run on a
// connection by itself names another one with Domain or APIPrefix: a [StreamSpec] and a
// [DeadLetterQuery].
//
// # Shutdown
//
// When the context of [Broker.Run] ends, the routes stop receiving, while running handlers
// go on with a live context. Run returns when all of them have returned and their messages
// are settled; messages that wait are given back. At the drain timeout
// ([WithDrainTimeout]) the contexts of the handlers are cancelled; those that have not
// returned after [DrainGrace] are abandoned, and a [*DrainError] counts them. The
// connection stays open: it belongs to the caller.
//
// # Errors
//
// [Validate] and Run report all faults of all routes together, as [*RouteError]s, before
// the first network call. While routes run, transient failures (a reconnect, a leader
// election, a server restart) are retried and reported by [Broker.Health]; others, such
// as a deleted consumer or a missing permission, end Run with a typed error.
package natsx
