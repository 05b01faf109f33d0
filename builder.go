package natsx

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Defaults of a route.
const (
	DefaultAckWait    = 30 * time.Second
	DefaultBackoffMin = time.Second
	DefaultBackoffMax = time.Minute
	// DefaultMaxAckPending leaves room for large pulls and for tens of thousands of
	// messages that wait for their retry. A lower limit of the stream, the account or the
	// server takes precedence.
	DefaultMaxAckPending = 65536
)

// MaxBatch is the most messages in a batch.
const MaxBatch = 10_000

// option is one bit for each setter, to distinguish an option set to its zero value from
// one that was not set.
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
	optAlso
	optAdoptChanges
	optInactiveThreshold
	optTombstones
)

// RouteBuilder describes where messages come from and how they are handled. It is a small
// comparable value: each setter returns a changed copy, so a base route can be kept,
// shared between goroutines and forked. If a setter is called twice, the last call wins.
// Setters never fail; [Spec.Validate] reports every fault. A call whose result is dropped
// does nothing: staticcheck reports it with SA4017, except for [RouteBuilder.Also],
// [RouteBuilder.DeliverFromTime] and the terminals. A terminal
// ([RouteBuilder.Handle], [RouteBuilder.HandleBatch], [RouteBuilder.Reply]) ends the
// chain.
type RouteBuilder struct {
	set option

	filter  string
	also    string // filters of Also, each quoted
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
	inactive      time.Duration
}

// instant is a time.Time without a pointer.
type instant struct{ sec, nano int64 }

func instantOf(t time.Time) instant    { return instant{t.Unix(), int64(t.Nanosecond())} }
func (i instant) time() time.Time      { return time.Unix(i.sec, i.nano).UTC() }
func (i instant) after(o instant) bool { return i.time().After(o.time()) }

// Route starts a route for the messages whose subject matches filter, which may have the
// wildcards * and >. A filter that violates the grammar in the package documentation is
// [ErrInvalidSubject]. Without [RouteBuilder.Durable] it is a core NATS subscription: at
// most once. Options that need a durable, such as Retry, DLQ or DeliverNew, are then
// [ErrOptionConflict].
func Route(filter string) RouteBuilder { return RouteBuilder{filter: filter} }

// Also adds one more filter to a durable: its messages are those of all of them, in the
// order of the stream. Several calls add several. The grammar is that of [Route], and no
// two filters may overlap, as the server demands ([ErrOptionConflict]). All must be
// subjects of one stream.
//
// A route with several filters is named by that of [Route] in errors, logs and [Stats].
// The permission to create its durable is one for CONSUMER.CREATE.<stream>.<durable>,
// without a filter.
func (r RouteBuilder) Also(filter string) RouteBuilder {
	r.set |= optAlso
	r.also += strconv.Quote(filter)
	return r
}

// filters are that of Route and those of Also.
func (r RouteBuilder) filters() []string {
	list := []string{r.filter}
	for rest := r.also; rest != ""; {
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			panic(err) // Also writes nothing else
		}
		filter, _ := strconv.Unquote(quoted)
		list, rest = append(list, filter), rest[len(quoted):]
	}
	return list
}

// Queue makes a core subscription a member of a queue group: each message goes to one
// member. It excludes Durable ([ErrOptionConflict]). The name must not be empty or have
// white space, and has at most 255 bytes, else it is [ErrInvalidName]. The
// default is none: every subscription gets every message.
func (r RouteBuilder) Queue(group string) RouteBuilder {
	r.set |= optQueue
	r.queue = group
	return r
}

// Durable consumes through a durable JetStream pull consumer of this name: at least once,
// shared by all processes that use the same name. A name must be printable, without white
// space and any of . * > / \, and has at most 255 bytes, else it is
// [ErrInvalidName]. These are the rules of the server, which differ from ADR-6: it also
// forbids / and \, and allows more than ASCII.
//
// It is created when it is missing, with an unlimited MaxDeliver. One that exists is
// used when it is what the route says: a pull consumer with the route's filters,
// explicit acknowledgement and PinnedBy group, without BackOff and HeadersOnly, and
// with the Deliver option, AckWait, MaxAckPending and InactiveThreshold of the route,
// where the route has these options. Each difference is an [ErrConsumerConflict] that
// names the option, both values and what to do; [RouteBuilder.AdoptChanges] changes the
// durable instead. What the route has no option for stays as the durable has it, but a
// limited MaxDeliver is lifted, or refused to a user who may not update the consumer.
//
// While the route runs it follows what somebody changes of AckWait, MaxAckPending,
// InactiveThreshold and the limits on pulls. Any other change with which it could not go
// on ends Run with ErrConsumerConflict.
func (r RouteBuilder) Durable(name string) RouteBuilder {
	r.set |= optDurable
	r.durable = name
	return r
}

// Stream names the stream of the durable. Without it the stream is looked up by the
// filter, and exactly one must match, else it is [ErrNoStream] or [ErrAmbiguousStream]. A
// named stream that does not exist is ErrNoStream too, and so is one without a subject
// that overlaps the filter, unless it is a mirror, has sources or transforms subjects. The
// rules for names are those of [RouteBuilder.Durable].
func (r RouteBuilder) Stream(name string) RouteBuilder {
	r.set |= optStream
	r.stream = name
	return r
}

// DeliverNew starts a new durable after the last stored message. The last deliver option
// called holds; default is all messages.
//
// An existing durable goes on where it is. It must have been created with this option: the
// server cannot change where a durable starts, so that another option, sequence or time
// is [ErrConsumerConflict]. A route without a deliver option takes the durable as it is.
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

// DeliverFromSequence starts a new durable at a stream sequence; 0 is [ErrOutOfRange].
func (r RouteBuilder) DeliverFromSequence(seq uint64) RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverByStartSequencePolicy
	r.startSeq = seq
	return r
}

// DeliverFromTime starts a new durable with the first message stored at or after
// t; the zero time is [ErrOutOfRange]. It must be the same at every start, as the durable
// keeps it: not one that is computed from the present.
func (r RouteBuilder) DeliverFromTime(t time.Time) RouteBuilder {
	r.set |= optDeliver
	r.deliver = jetstream.DeliverByStartTimePolicy
	r.start = instantOf(t)
	return r
}

// Retry allows n retries after the first attempt, so n+1 attempts; 0 is none, and a
// negative number is [ErrOutOfRange]. By default a failing message is retried until it
// succeeds. On a work-queue or interest stream Retry needs a DLQ, else it is
// [ErrWouldLose].
func (r RouteBuilder) Retry(n int) RouteBuilder {
	r.set |= optRetry
	r.retry = n
	return r
}

// Backoff sets the delay before retry k to low*2^(k-1), varied randomly by ±20 %, and at
// most high. The default is [DefaultBackoffMin] to [DefaultBackoffMax], 1 s to 1 min. Both
// must be above zero and low not above high, else it is [ErrOutOfRange].
func (r RouteBuilder) Backoff(low, high time.Duration) RouteBuilder {
	r.set |= optBackoff
	r.backoffMin, r.backoffMax = low, high
	return r
}

// Timeout ends the handler's context d after its start. The attempt has then failed with
// an error that wraps [context.DeadlineExceeded], whatever the handler returns. A handler
// that does not return still occupies its worker and keeps its message. d must be above
// zero, else it is [ErrOutOfRange]. The default is none: a handler may run for ever.
func (r RouteBuilder) Timeout(d time.Duration) RouteBuilder {
	r.set |= optTimeout
	r.timeout = d
	return r
}

// AckWait is how long the server waits for the settling of a message before it delivers
// it again: the lease of the process that has the message. natsx renews it while a
// message waits or runs, so it need not be longer than a handler takes: it decides how
// soon the messages of a crashed process are redelivered. The default is [DefaultAckWait],
// 30 s; below 100 ms it is [ErrOutOfRange]. An existing durable may have
// another one: see [RouteBuilder.Durable] and [RouteBuilder.AdoptChanges].
func (r RouteBuilder) AckWait(d time.Duration) RouteBuilder {
	r.set |= optAckWait
	r.ackWait = d
	return r
}

// Concurrency limits the handlers of this route that run at once in this broker. The
// default, and the highest effective value, is the pool's size (see [WithWorkers]); below
// 1 it is [ErrOutOfRange].
func (r RouteBuilder) Concurrency(n int) RouteBuilder {
	r.set |= optConcurrency
	r.concurrency = n
	return r
}

// OrderedBy runs messages with one key one after another in stream order, through their
// retries: one that fails holds up those of its key, whose leases are kept meanwhile, until
// it succeeds or is dead. Other keys use the whole pool. A key costs nothing while none of
// its messages is in hand.
//
// The order holds over several processes as well: the server delivers to one of them at a
// time, as with [RouteBuilder.PinnedBy], whose group it names unless that was called. One
// that takes over, or whose connection was lost, starts nothing until every message that
// was delivered and not settled has come to it; after a process was killed that takes an
// AckWait or two. So the processes beyond the first are for failover, not for more speed.
//
// Up to 8,192 messages, and 64 MiB, are in hand at once, those that wait for their key
// included; while they are all of keys that wait for a retry, other keys wait too. A message
// that is dead-lettered does not hold up its key, and one that is redriven comes at the end
// of its stream. A key that nothing can be ordered by is [ErrOutOfRange] or
// [ErrInvalidName]. It needs nats-server 2.11, else [Broker.Run] returns
// [ErrServerTooOld], and on a work-queue or interest stream a DLQ, else [ErrWouldLose].
func (r RouteBuilder) OrderedBy(key OrderKey) RouteBuilder {
	r.set |= optOrderedBy
	r.order = key
	return r
}

// Batch passes up to n messages, or those that arrived within wait of the first one, to
// one call of the function of [RouteBuilder.HandleBatch]. Attempts, retries and dead
// letters are still those of each message; a retried message is in a later batch. A batch
// occupies one worker, counts as one for Concurrency and Rate, and as one attempt for
// Breaker. The ack wait of its messages is extended while they wait. n must be 1 to
// [MaxBatch] and wait above zero, else it is [ErrOutOfRange]. With OrderedBy, with Handle,
// or with n above MaxAckPending it is [ErrOptionConflict].
func (r RouteBuilder) Batch(n int, wait time.Duration) RouteBuilder {
	r.set |= optBatch
	r.batch, r.batchWait = n, wait
	return r
}

// Rate limits how many handlers of this route start per second in this process. The limit
// is smooth: a burst is at most a tenth of a second's worth, and at least one. Messages of
// a durable are pulled only shortly before their start, so that other processes can take
// them; those of a core route wait in this process. The limit does not apply across
// processes: divide it by their number. It must be above zero and finite, else it is
// [ErrOutOfRange]. The default is no limit.
func (r RouteBuilder) Rate(perSecond float64) RouteBuilder {
	r.set |= optRate
	r.rate = perSecond
	return r
}

// Breaker stops the route after that many consecutive failed attempts, of any messages.
// The breaker is then open: the route gives back messages that wait and pulls none for
// cooldown. Then it tries one message. If that fails, the breaker stays open for another
// cooldown; if it succeeds, the breaker is closed and the route goes on. So an outage of a
// dependency neither uses up attempts nor fills the DLQ: a failure while the breaker is
// not closed is no attempt ([OutcomeReturned]).
//
// Errors, panics and timeouts are failures. [Permanent] and [Discard] do not count, since
// they concern only one message. If the only message always fails, the breaker stays open
// until another one succeeds. While it is open, [Broker.Health] and [RouteStats] report
// it; a [BreakerObserver] is called on each change. failures must be at least 1 and
// cooldown above zero, else it is [ErrOutOfRange]. The default is none. It needs a
// durable.
func (r RouteBuilder) Breaker(failures int, cooldown time.Duration) RouteBuilder {
	r.set |= optBreaker
	r.breakerAfter, r.breakerRest = failures, cooldown
	return r
}

// MaxAckPending is the server's limit on delivered messages of the durable that are not
// settled, over all its processes and including those that wait for a retry. At the limit
// the server still redelivers but delivers no new messages; [Broker.Health] reports it if
// retries are the cause. The default of a new
// durable is [DefaultMaxAckPending], 65,536. Below 1 it is
// [ErrOutOfRange], and below Concurrency [ErrOptionConflict]; above a limit of the server,
// [Broker.Run] returns the server's error.
func (r RouteBuilder) MaxAckPending(n int) RouteBuilder {
	r.set |= optMaxAckPending
	r.maxAckPending = n
	return r
}

// PinnedBy delivers the messages of the durable to one process at a time: the client that
// the server has pinned in this priority group (ADR-42). All processes with the durable
// must name the same group; the others stand by. One of them takes over
//
//   - at once when the pinned one ends its Run;
//   - two AckWaits after the pinned one was killed, lost its connection or
//     paused its route with nothing in hand. The messages that it had in hand are
//     delivered first then;
//   - at once when another server becomes the leader of the durable, or its leader
//     restarts. Messages in hand still run in the previous process, at the same time as
//     those that the next one receives.
//
// The name may have letters, digits and any of / _ = -, and has 1 to 16 bytes, else it is
// [ErrInvalidName]. It needs nats-server 2.11, else [Broker.Run] returns
// [ErrServerTooOld]. To release its pin at the end of Run the user needs the permission
// for CONSUMER.UNPIN; without it the pin expires like that of a killed process.
func (r RouteBuilder) PinnedBy(group string) RouteBuilder {
	r.set |= optPinnedBy
	r.group = group
	return r
}

// InactiveThreshold has the server remove the durable when no process has pulled from it
// for d, a second more or less: for a durable that belongs to one replica and is to go with
// it. Default is never. It is at least 1 s, else
// [ErrOutOfRange]; above a limit of the stream, [Broker.Run] returns the server's error.
//
// While Run is under way the durable stays, also through a [Broker.Pause] and handlers
// that take longer than d. A connection that is lost for longer than d ends Run with
// [ErrConsumerDeleted]. What the durable had not settled when it was removed is not
// delivered again: a new durable of that name starts where the Deliver option says.
func (r RouteBuilder) InactiveThreshold(d time.Duration) RouteBuilder {
	r.set |= optInactiveThreshold
	r.inactive = d
	return r
}

// AdoptChanges has [Broker.Run] change an existing durable to what the route says, where
// the server can, and log the changes. That is the filters, AckWait, MaxAckPending,
// InactiveThreshold and PinnedBy, and that there is no BackOff, HeadersOnly or other
// priority policy. Without it each difference is [ErrConsumerConflict], as it is with it
// for what the server cannot change, such as a Deliver option; then nothing is changed.
// Options that the route does not have are left as the durable has them.
//
// A filter that is added selects from where the durable is: what is stored before that is
// not delivered. What was delivered on a filter that is removed, and not settled, is still
// delivered again. AckWait is not lowered while other processes pull or have unsettled
// messages: the longer one stays, and that is logged.
//
// Processes that run with the durable follow other limits. Those with other filters or
// another PinnedBy end their Run with ErrConsumerConflict, since their handlers are not
// made for what the durable delivers now: change these only when all are replaced.
func (r RouteBuilder) AdoptChanges() RouteBuilder {
	r.set |= optAdoptChanges
	return r
}

// ConfirmAcks makes each worker wait until the server has confirmed its acknowledgement,
// so that a handled message is not redelivered after a leader election. It costs a round
// trip per message. A message whose acknowledgement is not confirmed within AckWait has
// lapsed ([OutcomeLapsed]): it may be redelivered.
func (r RouteBuilder) ConfirmAcks() RouteBuilder {
	r.set |= optConfirmAcks
	return r
}

// DLQ sends dead messages to this subject. A stream must capture it, and the route's own
// filter must not match it ([ErrDLQLoop]). A subject with a wildcard or a leading $ is
// [ErrInvalidSubject].
//
// [Broker.Run] returns [ErrBadDLQ] if no stream captures the subject, or several do, or if
// the stream could not keep letters: it has interest retention, is a mirror or sealed, has
// NoAck or the async persist mode, has fewer replicas or a lower MaxMsgSize than the
// route's stream, or a MaxMsgSize below 2,048 bytes. Run only logs a warning for a stream
// that discards old letters when it is full, that is in memory while the route's stream is
// on disk, whose duplicate window is shorter than two AckWaits, or whose settings the user
// may not read.
func (r RouteBuilder) DLQ(subject string) RouteBuilder {
	r.set |= optDLQ
	r.dlq = subject
	return r
}

// Tombstones hands the handler the markers too that the server puts in the place of a
// subject's last message when that has expired or was deleted, on a stream with
// SubjectDeleteMarkerTTL: they have no payload, and MaxAge, Purge or Remove in the header
// Nats-Marker-Reason. Default is to acknowledge them unhandled.
func (r RouteBuilder) Tombstones() RouteBuilder {
	r.set |= optTombstones
	return r
}

// Handle ends the chain with the function that handles each message; nil is
// [ErrNoHandler].
func (r RouteBuilder) Handle(fn Handler) Spec { return Spec{route: r, handler: fn} }

// HandleBatch ends a chain with Batch; without Batch it is [ErrOptionConflict]. A message
// that must run in isolation, such as one that may have crashed its process, is passed to
// fn alone. The middleware of [WithMiddleware] is not called, since it is for handlers of
// one message. A nil fn is [ErrNoHandler].
func (r RouteBuilder) HandleBatch(fn BatchHandler) Spec {
	return Spec{route: r, kind: kindBatch, batch: fn}
}

// Reply ends the chain of a core route whose messages are requests. Each request is
// answered with the responder's result; with code 504 at the end of Timeout, even if the
// responder has not returned; or with code 503 at once if too many requests wait (16 for
// each handler that may run at once, and at least 128), or when a shutdown exceeds its
// drain timeout.
//
// If the request carries the requester's deadline, as those of [Publisher.Request] do,
// that ends the responder's context too; a request that has waited longer is answered
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

// String names the route by its filter and its durable, if it has one.
func (s Spec) String() string {
	if s.route.durable != "" {
		return fmt.Sprintf("route %q durable %q", s.route.filter, s.route.durable)
	}
	return fmt.Sprintf("route %q", s.route.filter)
}

// Validate reports every fault of the route as joined [*RouteError]s, without a
// server. [Validate] also compares routes with each other.
func (s Spec) Validate() error { return errors.Join(s.faults()...) }

// Validate reports every fault of every spec, and conflicts between them, as joined
// [*RouteError]s, without a server: [errors.Is] finds each sentinel and [errors.As] the
// first fault. Without specs it returns [ErrNoRoutes].
//
// [Broker.Run] checks what only the server knows: whether a stream exists, and whether
// two filters belong to one stream.
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

// sharesDurable reports whether both routes certainly use one durable of one stream: both
// name the same stream, or neither does and their filters overlap. If only one names its
// stream, that may be a mirror of the other's.
func (s Spec) sharesDurable(o Spec) bool {
	a, b := s.route, o.route
	if a.durable == "" || a.durable != b.durable {
		return false
	}
	if a.stream != "" || b.stream != "" {
		return a.stream == b.stream
	}
	return filtersOverlap(a.filters(), b.filters())
}

// filtersOverlap reports whether some subject is selected by a filter of both.
func filtersOverlap(a, b []string) bool {
	return slices.ContainsFunc(a, func(f string) bool {
		return slices.ContainsFunc(b, func(g string) bool { return subjectsOverlap(f, g) })
	})
}

// overlaps reports whether two different durables want the same messages.
func (s Spec) overlaps(o Spec) bool {
	a, b := s.route, o.route
	return a.durable != "" && b.durable != "" && a.durable != b.durable && filtersOverlap(a.filters(), b.filters())
}

// overlapWith is the fault of two durables that want the same messages of a work-queue
// stream.
func (s Spec) overlapWith(o Spec, stream string) error {
	return s.fault("subject", strconv.Quote(s.route.filter),
		fmt.Sprintf("overlaps with %q of the durable %q, and the work-queue stream %q gives each message to one durable",
			o.route.filter, o.route.durable, stream), ErrOptionConflict)
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
	filters := r.filters()
	for i, filter := range filters[1:] {
		if reason := filterFault(filter); reason != "" {
			add("also", strconv.Quote(filter), reason, ErrInvalidSubject)
			continue
		}
		for _, earlier := range filters[:i+1] {
			if filterFault(earlier) == "" && subjectsOverlap(filter, earlier) {
				add("also", strconv.Quote(filter), fmt.Sprintf("overlaps with %q of the same durable", earlier), ErrOptionConflict)
				break
			}
		}
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
	if has(optAckWait) && r.ackWait < minAckWait {
		add("ackWait", r.ackWait.String(), "must be at least "+minAckWait.String(), ErrOutOfRange)
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
				fmt.Sprintf("is below the concurrency of %d, which it would limit", r.concurrency), ErrOptionConflict)
		}
	}
	if has(optInactiveThreshold) && r.inactive < minInactiveThreshold {
		add("inactiveThreshold", r.inactive.String(), "must be at least "+minInactiveThreshold.String(), ErrOutOfRange)
	}
	if has(optPinnedBy) {
		if reason := priorityGroupFault(r.group); reason != "" {
			add("pinnedBy", strconv.Quote(r.group), reason, ErrInvalidName)
		}
	}
	s.policyFaults(has, add)
	if has(optDLQ) {
		if reason := publishFault(r.dlq); reason != "" {
			add("dlq", strconv.Quote(r.dlq), reason, ErrInvalidSubject)
		} else if slices.ContainsFunc(filters, func(f string) bool { return subjectMatches(f, r.dlq) }) {
			add("dlq", strconv.Quote(r.dlq), "is matched by the route's own filter: dead letters would come back", ErrDLQLoop)
		}
	}
	return faults
}

// policyFaults checks the options that decide when a message may run.
func (s Spec) policyFaults(has func(option) bool, add func(field, value, reason string, err error)) {
	r := s.route
	if has(optOrderedBy) {
		if reason, err := r.order.fault(); err != nil {
			add("orderedBy", r.order.String(), reason, err)
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

// durableOptions are the options that need a durable.
var durableOptions = []struct {
	opt   option
	field string
	value func(RouteBuilder) string
}{
	{optAlso, "also", func(r RouteBuilder) string { return fmt.Sprintf("%q", r.filters()[1:]) }},
	{optInactiveThreshold, "inactiveThreshold", func(r RouteBuilder) string { return r.inactive.String() }},
	{optAdoptChanges, "adoptChanges", func(RouteBuilder) string { return "" }},
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
	{optTombstones, "tombstones", func(RouteBuilder) string { return "" }},
}

// orderGroup is the priority group of a durable whose messages are ordered by key.
const orderGroup = "natsx-order"

// pinGroup is the priority group of the durable's pinned client, empty for none.
func (r RouteBuilder) pinGroup() string {
	if r.set&optPinnedBy == 0 && r.set&optOrderedBy != 0 {
		return orderGroup
	}
	return r.group
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
