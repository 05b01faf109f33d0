package natsx

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Defaults of a route.
const (
	DefaultAckWait    = 30 * time.Second
	DefaultBackoffMin = time.Second
	DefaultBackoffMax = time.Minute
	// DefaultMaxAckPending leaves room for deep pulls and for tens of thousands
	// of messages that wait for their retry. A lower limit of the stream's
	// consumers, of the account or of the server lowers it.
	DefaultMaxAckPending = 65536
)

// MaxBatch is how many messages a batch may have at most.
const MaxBatch = 10_000

// option is one bit for each setter, so that an option set to its zero value is
// told from one that was not set.
type option uint32

const (
	optQueue option = 1 << iota
	optDurable
	optStream
	optDeliver
	optRetry
	optBackoff
	optTimeout
	optAckWait
	optConcurrency
	optOrderedBy
	optBatch
	optRate
	optBreaker
	optMaxAckPending
	optConfirmAcks
	optDLQ
	optPinnedBy
)

// RouteBuilder describes where messages come from and what becomes of them. It
// is a small comparable value: each setter returns a changed copy, so a base
// route can be kept, shared between goroutines and forked. Setters never fail;
// [Spec.Validate] reports every fault. A terminal ([RouteBuilder.Handle],
// [RouteBuilder.HandleBatch], [RouteBuilder.Reply]) ends the chain.
type RouteBuilder struct {
	set option

	filter  string
	queue   string
	durable string
	stream  string
	dlq     string

	deliver  jetstream.DeliverPolicy
	startSeq uint64
	start    instant // of DeliverFromTime

	retry         int
	backoffMin    time.Duration
	backoffMax    time.Duration
	timeout       time.Duration
	ackWait       time.Duration
	concurrency   int
	order         OrderKey
	batch         int
	batchWait     time.Duration
	rate          float64
	breakerAfter  int
	breakerRest   time.Duration
	maxAckPending int
	group         string // of PinnedBy
}

// instant is a time.Time without its pointer.
type instant struct{ sec, nano int64 }

func instantOf(t time.Time) instant    { return instant{t.Unix(), int64(t.Nanosecond())} }
func (i instant) time() time.Time      { return time.Unix(i.sec, i.nano).UTC() }
func (i instant) after(o instant) bool { return i.time().After(o.time()) }

// Route starts a route for the messages whose subject matches filter, which may
// hold the wildcards * and >; one that breaks the grammar of the package documentation
// is [ErrInvalidSubject]. Without [RouteBuilder.Durable] it is a core NATS
// subscription: at most once. What only a durable can have, such as Retry, DLQ or
// DeliverNew, is then [ErrOptionConflict].
func Route(filter string) RouteBuilder { return RouteBuilder{filter: filter} }

// Queue makes a core subscription a member of a queue group: each message goes
// to one member. It excludes Durable ([ErrOptionConflict]). The name is not empty, has
// no white space and at most [MaxNameLength] bytes, else it is [ErrInvalidName].
// Default is none: every subscription gets every message.
func (r RouteBuilder) Queue(group string) RouteBuilder {
	r.set |= optQueue
	r.queue = group
	return r
}

// Durable consumes through a durable JetStream pull consumer of this name: at
// least once, shared by all processes that use the same name. A name is printable,
// without white space and any of . * > / \, and at most [MaxNameLength] bytes, else
// [ErrInvalidName]: the rules of the server, which go beyond ADR-6 with / and \ and
// take more than ASCII.
//
// It is created when it is missing, with an unlimited MaxDeliver. One that exists is
// adopted when it is a pull consumer with the route's filter and explicit
// acknowledgement, without BackOff, HeadersOnly and a priority policy, else it is
// [ErrConsumerConflict]. Its MaxDeliver, AckWait and MaxAckPending are then set to
// those of the route, defaults included. But AckWait is not lowered while somebody
// pulls or has unsettled messages: the route then uses the longer one, and logs that.
// A user who may bind but not create takes these three as they are, and is refused a
// limited MaxDeliver.
func (r RouteBuilder) Durable(name string) RouteBuilder {
	r.set |= optDurable
	r.durable = name
	return r
}

// Stream names the stream of the durable. Without it the stream is looked up by
// the filter, and exactly one must match: else it is [ErrNoStream] or
// [ErrAmbiguousStream]. ErrNoStream is also a named one that does not exist or has
// none of the filter's subjects, unless it is a mirror, has sources or transforms
// subjects. The rules of durables' names hold.
func (r RouteBuilder) Stream(name string) RouteBuilder {
	r.set |= optStream
	r.stream = name
	return r
}

// DeliverNew starts a new durable after the last stored message. An existing
// durable goes on where it is, with this and every other deliver option. The
// last one called holds; default is all messages.
func (r RouteBuilder) DeliverNew() RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverNewPolicy
	return r
}

// DeliverLast starts a new durable with the last stored message of the filter.
func (r RouteBuilder) DeliverLast() RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverLastPolicy
	return r
}

// DeliverLastPerSubject starts a new durable with the last message of each subject.
func (r RouteBuilder) DeliverLastPerSubject() RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverLastPerSubjectPolicy
	return r
}

// DeliverFromSequence starts a new durable at a stream sequence, at least 1, else it
// is [ErrOutOfRange].
func (r RouteBuilder) DeliverFromSequence(seq uint64) RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverByStartSequencePolicy
	r.startSeq = seq
	return r
}

// DeliverFromTime starts a new durable with the first message stored at or after
// t; the zero time is [ErrOutOfRange].
func (r RouteBuilder) DeliverFromTime(t time.Time) RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverByStartTimePolicy
	r.start = instantOf(t)
	return r
}

// Retry allows n retries after the first attempt, so n+1 attempts; 0 is none, and
// a negative number [ErrOutOfRange]. Without it a failing message is retried until it
// succeeds. On a work-queue or interest stream a route with it needs a DLQ, else it
// is [ErrWouldLose].
func (r RouteBuilder) Retry(n int) RouteBuilder {
	r.set |= optRetry
	r.retry = n
	return r
}

// Backoff sets the delay before retry k to low*2^(k-1) spread by a random ±20 %,
// and at most high. Default is [DefaultBackoffMin] to [DefaultBackoffMax], 1 s to
// 1 min. Both are above zero, and low is not above high, else it is [ErrOutOfRange].
func (r RouteBuilder) Backoff(low, high time.Duration) RouteBuilder {
	r.set |= optBackoff
	r.backoffMin, r.backoffMax = low, high
	return r
}

// Timeout ends the handler's context d after it was started; the attempt then
// failed with an error that wraps [context.DeadlineExceeded], whatever the handler
// returns. A handler that does not return keeps its worker and its message. It is
// above zero, else [ErrOutOfRange]; default is none: a running handler keeps its
// message for as long as it takes.
func (r RouteBuilder) Timeout(d time.Duration) RouteBuilder {
	r.set |= optTimeout
	r.timeout = d
	return r
}

// AckWait is the server's lease on an unsettled message, after which another
// process gets it. natsx renews it while a message waits or runs, so it need not
// be longer than a handler takes: it is how soon a crashed process is noticed.
// Default is [DefaultAckWait], 30 s; at least [MinAckWait], 100 ms, else it is
// [ErrOutOfRange]. An existing durable may keep a longer one: see Durable.
func (r RouteBuilder) AckWait(d time.Duration) RouteBuilder {
	r.set |= optAckWait
	r.ackWait = d
	return r
}

// Concurrency limits the handlers of this route that run at once in this broker.
// Default is the pool's size, to which a larger number comes down; at least 1, else
// it is [ErrOutOfRange]. See [WithWorkers].
func (r RouteBuilder) Concurrency(n int) RouteBuilder {
	r.set |= optConcurrency
	r.concurrency = n
	return r
}

// OrderedBy runs messages with one key one after another in stream order. This
// version refuses it on a route with [ErrNotSupported]; see
// [ReplayBuilder.OrderedBy].
func (r RouteBuilder) OrderedBy(key OrderKey) RouteBuilder {
	r.set |= optOrderedBy
	r.order = key
	return r
}

// Batch gathers up to n messages, or what came within wait of the first of them, for one
// call of the function that [RouteBuilder.HandleBatch] takes. Attempts, retries and dead
// letters stay those of each message, and a retried message comes in a later batch. A batch
// takes one worker, and counts as one for Concurrency and Rate, and as one attempt for
// Breaker. The messages keep their leases while they wait. n is 1 to [MaxBatch] and wait
// above zero, else it is [ErrOutOfRange]; with OrderedBy, with Handle, or with n above
// MaxAckPending it is [ErrOptionConflict].
func (r RouteBuilder) Batch(n int, wait time.Duration) RouteBuilder {
	r.set |= optBatch
	r.batch, r.batchWait = n, wait
	return r
}

// Rate limits how many handlers of this route are started in a second in this process,
// smoothly: never more at once than a tenth of a second's worth, and one where that is
// less. A durable's messages are not even asked for before their turn is near, so that
// other processes can take them. A core route's messages wait here, within its limits.
// There is no limit over several processes: divide it by their number. It is above zero
// and finite, else [ErrOutOfRange]; default is no limit.
func (r RouteBuilder) Rate(perSecond float64) RouteBuilder {
	r.set |= optRate
	r.rate = perSecond
	return r
}

// Breaker has the route stop after so many failed attempts in a row, of any messages:
// it pulls nothing for cooldown, gives back what waits, and then tries one message. If
// that fails too, it rests again; if it succeeds, the route goes on as before. So an
// outage of what the handlers need neither uses up attempts nor fills the DLQ: what
// fails while the breaker is not closed is no attempt ([OutcomeReturned]).
//
// An error, a panic and a timeout are failures. A message that is dead at once
// ([Permanent]) or dropped ([Discard]) says nothing about others and does not count.
// A message that always fails and is the only one keeps it open until another succeeds.
// While it is open, [Broker.Health] says why and [RouteStats] shows it; a
// [BreakerObserver] is told. failures is at least 1 and cooldown above zero, else it is
// [ErrOutOfRange]; default is none. It needs a durable.
func (r RouteBuilder) Breaker(failures int, cooldown time.Duration) RouteBuilder {
	r.set |= optBreaker
	r.breakerAfter, r.breakerRest = failures, cooldown
	return r
}

// MaxAckPending is the server's cap on messages that are delivered to the
// durable and not settled, over all its processes and with those that wait for a
// retry. When they are that many, retries still come and new messages do not, until
// some are settled; [Broker.Health] tells it. Default is [DefaultMaxAckPending],
// 65,536. It is at least 1, else [ErrOutOfRange], and not below Concurrency, else
// [ErrOptionConflict]; above a limit of the server, [Broker.Run] returns the server's
// error.
func (r RouteBuilder) MaxAckPending(n int) RouteBuilder {
	r.set |= optMaxAckPending
	r.maxAckPending = n
	return r
}

// PinnedBy delivers the messages of the durable to one process at a time, the client that
// the server has pinned in this priority group (ADR-42). The other processes with the
// durable stand by, and each must name the same group. One of them takes over
//
//   - at once when the pinned one ends its Run;
//   - one and a half AckWaits after it was killed, lost its connection or paused its route
//     with nothing in hand. What it had in hand is delivered first then;
//   - at once when another server becomes the leader of the durable, or it restarts. What
//     the process before has in hand still runs there, beside what the next one receives.
//
// The name has letters, digits and any of / _ = - and at most 16 bytes, else it is
// [ErrInvalidName]. It needs nats-server 2.11, else [Broker.Run] returns
// [ErrServerTooOld]. To release its pin at the end of Run the user needs the permission
// for CONSUMER.UNPIN; without it the pin expires as that of a killed process.
func (r RouteBuilder) PinnedBy(group string) RouteBuilder {
	r.set |= optPinnedBy
	r.group = group
	return r
}

// ConfirmAcks has each acknowledgement acknowledged by the server before the
// worker goes on: a message that was handled is then not delivered again after a
// leader change. It costs a round trip a message. One that is not confirmed within
// the lease has lapsed: the message may be delivered again.
func (r RouteBuilder) ConfirmAcks() RouteBuilder {
	r.set |= optConfirmAcks
	return r
}

// DLQ sends dead messages to this subject, which a stream must capture and the
// route's own filter must not match ([ErrDLQLoop]). It has no wildcard and does
// not begin with $, else it is [ErrInvalidSubject].
//
// [Broker.Run] refuses with [ErrBadDLQ] one that no stream captures, or several, or
// one that could not keep letters: a stream with interest retention, whatever
// consumers it has, one that is a mirror or sealed, has NoAck or the async persist
// mode, has fewer replicas or a lower MaxMsgSize than the route's stream, or one below
// 2,048 bytes. It only logs a stream that discards old letters when it is full, that
// is kept in memory beside a route's stream on disk, whose duplicate window is shorter
// than two AckWaits, or that the user may not ask for.
func (r RouteBuilder) DLQ(subject string) RouteBuilder {
	r.set |= optDLQ
	r.dlq = subject
	return r
}

// Handle ends the chain with the function that handles each message; nil is
// [ErrNoHandler].
func (r RouteBuilder) Handle(fn Handler) Spec { return Spec{route: r, handler: fn} }

// HandleBatch ends a chain that has Batch, else it is [ErrOptionConflict]. Where a message
// must run by itself, as one that may have taken its process down, fn gets it alone. The
// middleware of [WithMiddleware] is for handlers of one message and not called. A nil fn
// is [ErrNoHandler].
func (r RouteBuilder) HandleBatch(fn BatchHandler) Spec {
	return Spec{route: r, kind: kindBatch, batch: fn}
}

// Reply ends the chain of a core route whose messages are requests. Each is
// answered: with the responder's result, at the end of Timeout with code 504
// whether the responder has returned or not, and with code 503 at once while
// [WaitingRequestsPerHandler] wait for each handler of the route, and at least
// [MinWaitingRequests], or when a shutdown passes its drain timeout.
//
// The deadline of a requester that tells it, as [Publisher.Request] does, ends the
// responder's context as well; a request that has waited beyond it is answered
// with 504 and not run. A result that comes after the answer is dropped and logged.
func (r RouteBuilder) Reply(fn Responder) Spec {
	return Spec{route: r, kind: kindReply, responder: fn}
}

type specKind uint8

const (
	kindHandle specKind = iota
	kindBatch
	kindReply
)

// Spec is a complete route: a builder's chain with its function. It is a value
// and safe to share; [Broker.Run] takes specs.
type Spec struct {
	route     RouteBuilder
	kind      specKind
	handler   Handler
	batch     BatchHandler
	responder Responder
}

// String names the route by its filter and, when it has one, its durable.
func (s Spec) String() string {
	if s.route.durable != "" {
		return fmt.Sprintf("route %q durable %q", s.route.filter, s.route.durable)
	}
	return fmt.Sprintf("route %q", s.route.filter)
}

// Validate reports every fault of the route as joined [*RouteError]s, without a
// server. [Validate] also compares routes with each other.
func (s Spec) Validate() error { return errors.Join(s.faults()...) }

// Validate reports every fault of every spec, and what does not fit between
// them, as joined [*RouteError]s, without a server: [errors.Is] finds each
// sentinel and [errors.As] the first fault. Without specs it returns
// [ErrNoRoutes].
//
// What only the server can tell (whether a stream exists, whether two filters
// belong to one stream) is judged by [Broker.Run].
func Validate(specs ...Spec) error {
	if len(specs) == 0 {
		return ErrNoRoutes
	}
	var faults []error
	for _, s := range specs {
		faults = append(faults, s.faults()...)
	}
	for i, s := range specs {
		for _, earlier := range specs[:i] {
			if s.sharesDurable(earlier) {
				faults = append(faults, s.duplicateOf(earlier))
				break
			}
		}
	}
	return errors.Join(faults...)
}

// sharesDurable tells whether both routes certainly use one durable of one
// stream: it is named the same, or looked up by filters that overlap. A stream
// that is named for one route alone may be a mirror of the other's.
func (s Spec) sharesDurable(o Spec) bool {
	a, b := s.route, o.route
	if a.durable == "" || a.durable != b.durable {
		return false
	}
	if a.stream != "" || b.stream != "" {
		return a.stream == b.stream
	}
	return subjectsOverlap(a.filter, b.filter)
}

func (s Spec) duplicateOf(earlier Spec) error {
	return s.fault("durable", strconv.Quote(s.route.durable),
		fmt.Sprintf("is already used by route %q of the same stream", earlier.route.filter), ErrDuplicateDurable)
}

func (s Spec) fault(field, value, reason string, err error) *RouteError {
	return &RouteError{Route: s.route.filter, Durable: s.route.durable, Field: field, Value: value, Reason: reason, Err: err}
}

func (s Spec) faults() []error {
	r := s.route
	var faults []error
	add := func(field, value, reason string, err error) {
		faults = append(faults, s.fault(field, value, reason, err))
	}
	has := func(o option) bool { return r.set&o != 0 }

	if reason := filterFault(r.filter); reason != "" {
		add("subject", strconv.Quote(r.filter), reason, ErrInvalidSubject)
	}
	if s.handler == nil && s.batch == nil && s.responder == nil {
		add("handler", "nil", "a route needs a function", ErrNoHandler)
	}
	if has(optQueue) {
		if reason := groupFault(r.queue); reason != "" {
			add("queue", strconv.Quote(r.queue), reason, ErrInvalidName)
		}
		if has(optDurable) {
			add("queue", strconv.Quote(r.queue), "does not fit with a durable, whose processes share messages anyway", ErrOptionConflict)
		}
	}
	if has(optDurable) {
		if reason := nameFault(r.durable); reason != "" {
			add("durable", strconv.Quote(r.durable), reason, ErrInvalidName)
		}
		if s.kind == kindReply {
			add("reply", "", "does not fit with a durable: a requester waits on core NATS", ErrOptionConflict)
		}
	} else {
		for _, o := range durableOptions {
			if has(o.opt) {
				add(o.field, o.value(r), "needs a durable", ErrOptionConflict)
			}
		}
	}
	if has(optStream) {
		if reason := nameFault(r.stream); reason != "" {
			add("stream", strconv.Quote(r.stream), reason, ErrInvalidName)
		}
	}
	if has(optDeliver) {
		switch {
		case r.deliver == jetstream.DeliverByStartSequencePolicy && r.startSeq == 0:
			add("deliverFromSequence", "0", "sequences start at 1", ErrOutOfRange)
		case r.deliver == jetstream.DeliverByStartTimePolicy && r.start.time().IsZero():
			add("deliverFromTime", "", "must not be the zero time", ErrOutOfRange)
		}
	}
	if has(optRetry) && r.retry < 0 {
		add("retry", strconv.Itoa(r.retry), "must not be negative", ErrOutOfRange)
	}
	if has(optBackoff) {
		value := r.backoffMin.String() + " to " + r.backoffMax.String()
		switch {
		case r.backoffMin <= 0 || r.backoffMax <= 0:
			add("backoff", value, "both must be above zero", ErrOutOfRange)
		case r.backoffMax < r.backoffMin:
			add("backoff", value, "the maximum is below the minimum", ErrOutOfRange)
		}
	}
	if has(optTimeout) && r.timeout <= 0 {
		add("timeout", r.timeout.String(), "must be above zero", ErrOutOfRange)
	}
	if has(optAckWait) && r.ackWait < MinAckWait {
		add("ackWait", r.ackWait.String(), "must be at least "+MinAckWait.String(), ErrOutOfRange)
	}
	if has(optConcurrency) && r.concurrency < 1 {
		add("concurrency", strconv.Itoa(r.concurrency), "must be at least 1", ErrOutOfRange)
	}
	if has(optMaxAckPending) {
		switch {
		case r.maxAckPending < 1:
			add("maxAckPending", strconv.Itoa(r.maxAckPending), "must be at least 1", ErrOutOfRange)
		case has(optConcurrency) && r.concurrency > r.maxAckPending:
			add("maxAckPending", strconv.Itoa(r.maxAckPending),
				fmt.Sprintf("is below the concurrency of %d, which it would cap", r.concurrency), ErrOptionConflict)
		}
	}
	if has(optPinnedBy) {
		if reason := priorityGroupFault(r.group); reason != "" {
			add("pinnedBy", strconv.Quote(r.group), reason, ErrInvalidName)
		}
	}
	s.futureFaults(has, add)
	if has(optDLQ) {
		if reason := publishFault(r.dlq); reason != "" {
			add("dlq", strconv.Quote(r.dlq), reason, ErrInvalidSubject)
		} else if subjectMatches(r.filter, r.dlq) {
			add("dlq", strconv.Quote(r.dlq), "is matched by the route's own filter: dead letters would come back", ErrDLQLoop)
		}
	}
	return faults
}

// futureFaults judges the options whose engine does not exist yet, and refuses
// those that are sound.
func (s Spec) futureFaults(has func(option) bool, add func(field, value, reason string, err error)) {
	r := s.route
	const later = "is not supported by this version"
	if has(optOrderedBy) {
		switch {
		case r.order.kind == orderNone:
			add("orderedBy", r.order.String(), "needs SubjectKey, SubjectToken or HeaderKey", ErrOutOfRange)
		case r.order.kind == orderToken && r.order.index < 0:
			add("orderedBy", r.order.String(), "tokens are counted from 0", ErrOutOfRange)
		case r.order.kind == orderHeader && headerNameFault(r.order.name) != "":
			add("orderedBy", r.order.String(), headerNameFault(r.order.name), ErrInvalidName)
		default:
			add("orderedBy", r.order.String(), later, ErrNotSupported)
		}
	}
	if has(optBatch) {
		value := fmt.Sprintf("%d within %s", r.batch, r.batchWait)
		switch {
		case r.batch < 1:
			add("batch", value, "needs at least 1 message", ErrOutOfRange)
		case r.batch > MaxBatch:
			add("batch", value, fmt.Sprintf("takes at most %d messages", MaxBatch), ErrOutOfRange)
		case r.batchWait <= 0:
			add("batch", value, "the wait must be above zero", ErrOutOfRange)
		case s.kind != kindBatch:
			add("batch", value, "needs HandleBatch", ErrOptionConflict)
		case has(optOrderedBy):
			add("batch", value, "does not fit with an order key", ErrOptionConflict)
		case has(optMaxAckPending) && r.maxAckPending >= 1 && r.batch > r.maxAckPending:
			add("batch", value, fmt.Sprintf("is above MaxAckPending, %d: it could never be full", r.maxAckPending), ErrOptionConflict)
		}
	} else if s.kind == kindBatch {
		add("handleBatch", "", "needs Batch", ErrOptionConflict)
	}
	if has(optRate) {
		value := strconv.FormatFloat(r.rate, 'g', -1, 64)
		if !(r.rate > 0) || math.IsInf(r.rate, 0) {
			add("rate", value, "must be above zero and finite", ErrOutOfRange)
		}
	}
	if has(optBreaker) {
		value := fmt.Sprintf("%d for %s", r.breakerAfter, r.breakerRest)
		switch {
		case r.breakerAfter < 1:
			add("breaker", value, "needs at least 1 failure", ErrOutOfRange)
		case r.breakerRest <= 0:
			add("breaker", value, "the cool-down must be above zero", ErrOutOfRange)
		}
	}
}

// durableOptions are those that mean nothing on a core subscription.
var durableOptions = []struct {
	opt   option
	field string
	value func(RouteBuilder) string
}{
	{optStream, "stream", func(r RouteBuilder) string { return strconv.Quote(r.stream) }},
	{optDeliver, "deliver", func(r RouteBuilder) string { return r.deliver.String() }},
	{optRetry, "retry", func(r RouteBuilder) string { return strconv.Itoa(r.retry) }},
	{optBackoff, "backoff", func(r RouteBuilder) string { return r.backoffMin.String() + " to " + r.backoffMax.String() }},
	{optAckWait, "ackWait", func(r RouteBuilder) string { return r.ackWait.String() }},
	{optOrderedBy, "orderedBy", func(r RouteBuilder) string { return r.order.String() }},
	{optBatch, "batch", func(r RouteBuilder) string { return strconv.Itoa(r.batch) }},
	{optBreaker, "breaker", func(r RouteBuilder) string { return strconv.Itoa(r.breakerAfter) }},
	{optMaxAckPending, "maxAckPending", func(r RouteBuilder) string { return strconv.Itoa(r.maxAckPending) }},
	{optPinnedBy, "pinnedBy", func(r RouteBuilder) string { return strconv.Quote(r.group) }},
	{optConfirmAcks, "confirmAcks", func(RouteBuilder) string { return "" }},
	{optDLQ, "dlq", func(r RouteBuilder) string { return strconv.Quote(r.dlq) }},
}

// attempts is the number of times a message may be handled, 0 for no limit.
func (r RouteBuilder) attempts() int {
	if r.set&optRetry == 0 {
		return 0
	}
	return max(r.retry, r.retry+1) // Retry(math.MaxInt) does not wrap around
}

func (r RouteBuilder) backoff() (low, high time.Duration) {
	if r.set&optBackoff == 0 {
		return DefaultBackoffMin, DefaultBackoffMax
	}
	return r.backoffMin, r.backoffMax
}

func (r RouteBuilder) lease() time.Duration {
	if r.set&optAckWait == 0 {
		return DefaultAckWait
	}
	return r.ackWait
}
