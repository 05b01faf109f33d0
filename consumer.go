package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// streamLookEvery is how old what is known of a stream may be.
	streamLookEvery = 10 * time.Second
	// consumerMisses is how often in a row a consumer is not found before it counts as
	// deleted: a server that just started may not know it yet.
	consumerMisses = 2
)

// errCrowded is the trouble of a route whose waiting retries leave the server no
// room for new messages.
var errCrowded = errors.New("natsx: messages that wait for their retry fill MaxAckPending; raise it, shorten the backoff or use a retry stream")

// consumerTarget is the stream and consumer that a durable route found or made.
type consumerTarget struct {
	stream      string
	consumer    string
	nextSubject string // of pulls
	bells       bool   // a bell takes nothing from this consumer

	identity consumerIdentity                       // as last told; guarded by the pool's mutex once the route runs
	config   atomic.Pointer[jetstream.StreamConfig] // nil when it may not be asked for
}

// consumerIdentity is what tells a consumer from another one of the same name. A server
// may tell another creation time after a restart (nats-server#8470), so that it is no
// more than a part of it.
type consumerIdentity struct {
	id        string    // natsx's own, in the metadata; empty when there is none
	created   time.Time // two consumers never have the same one
	group     string    // of a cluster that keeps it; made with the consumer; may not be told
	server    string    // that the connection was to, which has another id after a restart; empty in a cluster
	delivered uint64    // deliveries so far
}

func identityOf(info *jetstream.ConsumerInfo, nc *nats.Conn) consumerIdentity {
	i := consumerIdentity{
		id: info.Config.Metadata[metadataID], created: info.Created,
		server: nc.ConnectedServerId(), delivered: info.Delivered.Consumer,
	}
	if info.Cluster != nil {
		i.group, i.server = info.Cluster.RaftGroup, ""
	}
	return i
}

// is reports whether now is the same consumer, from which a delivery with the number
// seen has come. Another creation time may be that of another consumer, with metadata
// that somebody has copied: then it must be of the same cluster group or, without one,
// come with another server, and it must not have begun anew.
func (i consumerIdentity) is(now consumerIdentity, seen uint64) bool {
	switch {
	case now.created.Equal(i.created):
		return true
	case now.id != i.id:
		return false // several processes that give it an id at once leave its creation time
	case i.group != "" && now.group != "":
		return now.group == i.group
	}
	const unsaved = 10_000 // deliveries that a killed server may not have saved
	return (now.server == "" || now.server != i.server) && (now.delivered > 0 || seen == 0) && now.delivered+unsaved >= seen
}

// keepsTerminated reports whether a message stays in the stream when it is terminated.
func (t *consumerTarget) keepsTerminated() bool {
	c := t.config.Load()
	return c != nil && c.Retention == jetstream.LimitsPolicy
}

// consumerChecks is what a route has last seen of its consumer, and what it is about to
// look at. Guarded by the pool's mutex.
type consumerChecks struct {
	looked    int64         // when the last look was begun
	least     time.Duration // between regular looks, by the number of routes
	spread    float64       // of the times between looks, 0.8 to 1.2
	looking   bool
	hurry     bool  // a look is wanted as soon as lookSoon allows
	again     bool  // a look is wanted behind the one under way
	suspended bool  // nothing is pulled until a look ends well
	lost      bool  // the pulls sent so far are gone
	gone      error // what the server said of the consumer's end

	maxAckPending int
	wanted        bool // another process asks for messages
	crowded       bool // retries fill MaxAckPending
}

// at is when the next look is due, for a route whose last message came at a time.
func (c *consumerChecks) at(arrived int64) int64 {
	every := lookIdle
	switch {
	case c.looking:
		return 0
	case c.hurry:
		return c.looked + int64(lookSoon)
	case arrived > c.looked || c.crowded:
		every = lookEvery
	}
	return c.looked + int64(c.spread*float64(max(every, c.least)))
}

func (c *consumerChecks) due(now, arrived int64) bool {
	at := c.at(arrived)
	return at != 0 && now >= at
}

// locate finds the stream, checks that nothing can be lost, and creates or adopts
// the consumer. What is transient is tried again until ctx ends.
func (r *durableRoute) locate(ctx context.Context) error {
	spec := r.spec.route
	name, reason, err := locateStream(spec.stream, func() (names []string, err error) {
		err = r.tryOn(ctx, func(ctx context.Context) (err error) {
			names, err = r.env.api.streamNames(ctx, spec.filter)
			return err
		})
		return names, err
	})
	if err != nil {
		return r.spec.fault("stream", "", reason, err)
	}
	r.target.stream, r.target.consumer = name, spec.durable
	r.letters.stream, r.letters.durable = name, spec.durable
	r.passer.stream, r.passer.durable = name, spec.durable
	if err := r.env.claim(name, r.spec); err != nil {
		return err
	}
	info, err := r.streamInfo(ctx, name)
	switch {
	case errors.Is(err, ErrPermission):
		r.env.log.Warn("natsx: stream cannot be checked", r.names("stream", name, "error", err)...)
	case hasCode(err, codeStreamNotFound):
		return r.spec.fault("stream", strconv.Quote(name), "does not exist", fmt.Errorf("%w: %w", ErrNoStream, err))
	case err != nil:
		return r.spec.fault("stream", strconv.Quote(name), cause(err), err)
	default:
		r.target.config.Store(&info.Config)
		r.passer.created = info.Created.UnixNano()
		if n := info.State.Msgs; n > 0 {
			r.puller.size = int64(info.State.Bytes / n)
		}
	}
	c := r.target.config.Load()
	if c != nil && !takesSubject(c, spec.filter) {
		return r.spec.fault("stream", strconv.Quote(name), fmt.Sprintf("has none of the filter's subjects, but %q", c.Subjects), ErrNoStream)
	}
	if c != nil && c.Retention != jetstream.LimitsPolicy && spec.set&optRetry != 0 && spec.dlq == "" {
		return r.spec.fault("dlq", "", fmt.Sprintf("is missing: on the %s stream %q a message whose retries are used up would be deleted",
			strings.ToLower(c.Retention.String()), name), ErrWouldLose)
	}
	if spec.dlq != "" {
		if err := r.letters.check(ctx); err != nil {
			return err
		}
	}
	if r.mover == nil {
		r.warnOfMaxAge()
	}
	if err := r.ensureConsumer(ctx); err != nil {
		return err
	}
	r.located.Store(true)
	return nil
}

// takesSubject reports whether messages of a filter can be in a stream.
func takesSubject(c *jetstream.StreamConfig, filter string) bool {
	return c.Mirror != nil || len(c.Sources) > 0 || c.SubjectTransform != nil ||
		slices.ContainsFunc(c.Subjects, func(s string) bool { return subjectsOverlap(s, filter) })
}

// warnOfMaxAge warns where a message may be gone before its retries are used up.
func (r *durableRoute) warnOfMaxAge() {
	c := r.target.config.Load()
	if c == nil || c.MaxAge == 0 {
		return
	}
	spec := r.spec.route
	low, _ := spec.backoff()
	if longest := longestBackoff(spec); spec.attempts() > 0 && longest > c.MaxAge || spec.attempts() == 0 && low > c.MaxAge {
		r.env.log.Warn("natsx: retries may take longer than the stream keeps a message; it is dead then before its attempts are used up",
			r.names("stream", c.Name, "max_age", c.MaxAge, "retries_take", longest)...)
	}
}

// ensureConsumer creates the durable, or adopts the one that exists.
func (r *durableRoute) ensureConsumer(ctx context.Context) error {
	cfg := r.consumerConfig()
	t := &r.target
	fail := func(err error) error {
		var route *RouteError
		if errors.As(err, &route) {
			return err
		}
		return r.spec.fault("durable", strconv.Quote(t.consumer), cause(err), err)
	}
	if old := r.env.api.nc.ConnectedServerVersion(); olderThan(old, 2, 10) {
		return r.refuseOldServer(ctx, cfg, old)
	}
	create := func() (info *jetstream.ConsumerInfo, err error) {
		err = r.tryOn(ctx, func(ctx context.Context) (err error) {
			info, err = r.env.api.createConsumer(ctx, t.stream, cfg)
			return err
		})
		return info, err
	}
	info, err := create()
	if hasCode(err, codeMaxAckPendingLimit) && r.spec.route.set&optMaxAckPending == 0 {
		// The default gives way to a limit of the server or of the account.
		if limit := trailingNumber(err.Error()); limit > 0 {
			cfg.MaxAckPending = limit
			info, err = create()
		}
	}
	// A durable that exists has an identity of its own, so that the creation is refused,
	// as it is for a user who may only bind: the existing consumer decides.
	if hasCode(err, codeConsumerExists) || errors.Is(err, ErrPermission) {
		denied := err
		info, err = r.consumerInfo(ctx)
		if hasCode(err, codeConsumerNotFound) && errors.Is(denied, ErrPermission) {
			return fail(denied)
		}
		switch {
		case err == nil:
			info, err = r.adopt(ctx, info, cfg, errors.Is(denied, ErrPermission))
		case errors.Is(err, jetstream.ErrNotPullConsumer):
			err = r.unfit("it is a push consumer")
		}
	}
	if err != nil {
		return fail(err)
	}
	c := info.Config
	t.identity = identityOf(info, r.env.api.nc)
	t.nextSubject = r.env.api.prefix + "CONSUMER.MSG.NEXT." + t.stream + "." + t.consumer
	// The server forgets a message of a skip list that it could not deliver, and a rate
	// limit or a replay of the original pace would hold up whoever rings.
	t.bells = c.DeliverPolicy != jetstream.DeliverLastPerSubjectPolicy && c.ReplayPolicy == jetstream.ReplayInstantPolicy && c.RateLimit == 0
	if c.InactiveThreshold > 0 {
		r.env.log.Warn("natsx: the server deletes the durable when nobody pulls for a while, and it then begins anew",
			r.names("stream", t.stream, "inactive_threshold", c.InactiveThreshold)...)
	}
	r.env.pool.mu.Lock()
	r.checks.spread = 0.8 + 0.4*mathrand.Float64()
	r.checks.least = time.Duration(r.env.routesLooking) * lookShare
	tell := r.follow(info)
	r.rang = info.NumPending > 0
	r.env.pool.mu.Unlock()
	tell()
	return nil
}

// refuseOldServer is the fault of a server that takes the creation of a consumer for an
// update of the one that exists, and keeps no metadata.
func (r *durableRoute) refuseOldServer(ctx context.Context, cfg jetstream.ConsumerConfig, version string) error {
	reason := fmt.Sprintf("needs nats-server 2.10, this is %s", version)
	err := ErrServerTooOld
	if info, failed := r.consumerInfo(ctx); failed == nil {
		if differs := differences(info.Config, cfg, false); len(differs) > 0 {
			reason += "; it exists: " + strings.Join(differs, "; ")
			err = fmt.Errorf("%w: %w", ErrServerTooOld, ErrConsumerConflict)
		}
	}
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), reason, err)
}

func (r *durableRoute) consumerConfig() jetstream.ConsumerConfig {
	spec := r.spec.route
	cfg := jetstream.ConsumerConfig{
		Name:          spec.durable,
		Durable:       spec.durable,
		FilterSubject: spec.filter,
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       spec.lease(),
		MaxDeliver:    -1,
		MaxAckPending: spec.maxAckPending,
		DeliverPolicy: spec.deliver,
		Metadata:      map[string]string{metadataID: rand.Text()},
	}
	switch spec.deliver {
	case jetstream.DeliverByStartSequencePolicy:
		cfg.OptStartSeq = spec.startSeq
	case jetstream.DeliverByStartTimePolicy:
		t := spec.start.time()
		cfg.OptStartTime = &t
	}
	if spec.set&optMaxAckPending == 0 {
		cfg.MaxAckPending = DefaultMaxAckPending
		if c := r.target.config.Load(); c != nil && c.ConsumerLimits.MaxAckPending > 0 {
			cfg.MaxAckPending = min(cfg.MaxAckPending, c.ConsumerLimits.MaxAckPending)
		}
	}
	return cfg
}

// differences are what of an existing consumer would change the meaning of a route that
// wants another one.
func differences(have, want jetstream.ConsumerConfig, bindOnly bool) (diffs []string) {
	filters := have.FilterSubjects
	if have.FilterSubject != "" {
		filters = []string{have.FilterSubject}
	}
	differs := func(bad bool, format string, args ...any) {
		if bad {
			diffs = append(diffs, fmt.Sprintf(format, args...))
		}
	}
	differs(have.AckPolicy != jetstream.AckExplicitPolicy, "its ack policy is %s, not explicit", have.AckPolicy)
	differs(len(have.BackOff) > 0, "it has a BackOff, which the server mixes with the delays of natsx")
	differs(have.HeadersOnly, "it delivers headers only")
	differs(have.PriorityPolicy != jetstream.PriorityPolicyNone, "it has a priority policy")
	differs(!(len(filters) == 1 && filters[0] == want.FilterSubject) && !(len(filters) == 0 && want.FilterSubject == ">"),
		"its filter is %q", filters)
	differs(bindOnly && have.MaxDeliver > 0, "its MaxDeliver is %d, not unlimited", have.MaxDeliver)
	return diffs
}

// adopt takes an existing consumer: it refuses what would change the meaning of
// the route or of the consumer, and updates what may be updated. A user who may
// only bind takes the settings as they are.
func (r *durableRoute) adopt(ctx context.Context, info *jetstream.ConsumerInfo, want jetstream.ConsumerConfig, bindOnly bool) (*jetstream.ConsumerInfo, error) {
	have := info.Config
	if diffs := differences(have, want, bindOnly); len(diffs) > 0 {
		return nil, r.unfit(diffs...)
	}
	if want.AckWait < have.AckWait && (info.NumWaiting > 0 || info.NumAckPending > 0) {
		r.env.log.Warn("natsx: the durable keeps its longer ack wait, by which others may still renew their leases",
			r.names("stream", r.target.stream, "ack_wait", have.AckWait, "wanted", want.AckWait)...)
		want.AckWait = have.AckWait
	}
	known := have.Metadata[metadataID] != ""
	if bindOnly || known && have.AckWait == want.AckWait && have.MaxDeliver == want.MaxDeliver && have.MaxAckPending == want.MaxAckPending {
		return info, nil
	}
	next := have
	next.Name = r.target.consumer
	next.AckWait, next.MaxDeliver, next.MaxAckPending = want.AckWait, want.MaxDeliver, want.MaxAckPending
	if !known {
		next.Metadata = withMetadata(have.Metadata, metadataID, want.Metadata[metadataID])
	}
	err := r.tryOn(ctx, func(ctx context.Context) (err error) {
		info, err = r.env.api.updateConsumer(ctx, r.target.stream, next)
		return err
	})
	return info, err
}

// unfit is the fault of a durable that exists and cannot be adopted.
func (r *durableRoute) unfit(reasons ...string) error {
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), "exists and cannot be adopted: "+strings.Join(reasons, "; "), ErrConsumerConflict)
}

// look looks at the consumer in the background, at once or, when the last look is not
// long ago, a little later: one that is wanted for a reason, or a regular one. The pool
// is locked.
func (r *durableRoute) look(now int64, reason bool) {
	c := &r.checks
	switch {
	case c.looking:
		c.again = c.again || reason
	case r.stopped:
	case now-c.looked < int64(lookSoon):
		c.hurry = true
	default:
		c.looking, c.hurry, c.looked = true, false, now
		r.env.spawn(r.lookNow)
	}
}

// lookSoonAfterFailure has a failing route look at its consumer: should somebody have
// limited its deliveries, the server would give up on the message.
func (r *durableRoute) lookSoonAfterFailure() {
	now := processTime()
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	r.look(now, true)
	r.setAlarm(now)
}

// verify makes sure that the consumer is still the one the route began with. With lost
// set the pulls sent so far are gone and nothing is pulled until then; gone is what the
// server said of the consumer's end.
func (r *durableRoute) verify(lost bool, gone error) {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if !r.open {
		return
	}
	c := &r.checks
	if lost && !c.lost {
		r.known.doubt(processTime(), r.ackWait)
	}
	c.lost = c.lost || lost
	c.suspended = c.suspended || lost
	if gone != nil {
		c.gone = gone
	}
	if c.looking {
		c.again = true
		return
	}
	c.looking, c.hurry, c.looked = true, false, processTime()
	r.env.spawn(r.lookNow)
}

// lookNow looks at the consumer, and again when that is wanted meanwhile.
func (r *durableRoute) lookNow() {
	p := r.env.pool
	for {
		info, ok := r.inspect()
		r.awaitCallbacks()
		p.mu.Lock()
		now := processTime()
		c := &r.checks
		if c.again && !r.stopped {
			c.again, c.looked = false, now
			p.mu.Unlock()
			continue
		}
		c.looking, c.again = false, false
		tell := func() {}
		if ok {
			if info != nil {
				tell = r.follow(info)
			}
			if c.lost {
				r.known.lose(r.puller.forget())
			}
			c.lost, c.suspended, c.gone = false, false, nil
			r.unhold(now)
		}
		r.release(now)
		next := r.plan(now)
		due := r.leases.due(now, r.ackWait, nil)
		p.mu.Unlock()
		tell()
		r.send(next)
		r.env.keeper.renew(due)
		return
	}
}

// awaitCallbacks lets what came before an answer of the server be taken in before it,
// where the pulls that brought it count as lost.
func (r *durableRoute) awaitCallbacks() {
	p := r.env.pool
	for {
		p.mu.Lock()
		lost, sub := r.checks.lost, r.sub
		p.mu.Unlock()
		if !lost || sub == nil || !wait(r.env.intake, time.Millisecond) {
			return
		}
		if n, _, err := sub.Pending(); n == 0 || err != nil {
			return
		}
	}
}

// inspect asks for the consumer until there is an answer, and reports whether the route
// may go on: not at its end, nor at that of the connection, whose return verifies again.
// Without the permission to ask it returns no info.
func (r *durableRoute) inspect() (info *jetstream.ConsumerInfo, ok bool) {
	ctx := r.env.intake
	misses := 0
	pause := backoff{first: 50 * time.Millisecond, most: 2 * time.Second}
	for tries := 0; ; tries++ {
		if ctx.Err() != nil || !r.env.link.up() {
			return nil, false
		}
		if tries > 0 {
			if _, alive := r.env.link.ping(ctx, patienceFor(r.ackWaitNow()), mostPatience); !alive && r.env.link.reconnect(r.env.log) {
				return nil, false
			}
		}
		err := r.env.api.inTurn(ctx, func() (err error) {
			try, cancel := context.WithTimeout(ctx, patience(tries))
			defer cancel()
			info, err = r.env.api.consumerInfo(try, r.target.stream, r.target.consumer)
			return err
		})
		switch {
		case err == nil:
			r.clear("consumer")
			if fault := r.judge(info); fault != nil {
				r.fail(fault)
				return nil, false
			}
			r.checkStream(ctx)
			return info, true
		case errors.Is(err, ErrPermission):
			r.env.pool.mu.Lock()
			gone := r.checks.gone
			r.env.pool.mu.Unlock()
			if gone != nil {
				r.fail(r.goneFault(gone))
				return nil, false
			}
			r.clear("consumer")
			return nil, true
		case hasCode(err, codeConsumerNotFound), hasCode(err, codeStreamNotFound):
			gone := ErrConsumerDeleted
			if hasCode(err, codeStreamNotFound) {
				gone = ErrStreamDeleted
			}
			if misses++; misses >= consumerMisses {
				r.fail(r.goneFault(gone))
				return nil, false
			}
		default:
			misses = 0
		}
		if ctx.Err() == nil {
			r.trouble("consumer", err)
		}
		if !pause.wait(ctx) {
			return nil, false
		}
	}
}

func (r *durableRoute) goneFault(gone error) error {
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), cause(gone), gone)
}

// unchanged asks once whether the consumer is still there, before a route goes on after
// a pause.
func (r *durableRoute) unchanged() error {
	info, err := r.consumerInfo(r.env.intake)
	switch {
	case err == nil:
		if fault := r.judge(info); fault != nil {
			r.fail(fault)
			return fault
		}
		p := r.env.pool
		p.mu.Lock()
		tell := r.follow(info)
		p.mu.Unlock()
		tell()
	case hasCode(err, codeConsumerNotFound), hasCode(err, codeStreamNotFound):
		gone := ErrConsumerDeleted
		if hasCode(err, codeStreamNotFound) {
			gone = ErrStreamDeleted
		}
		r.fail(r.goneFault(gone))
		return r.goneFault(gone)
	}
	return nil
}

// judge returns what of the consumer the route cannot follow: that it is another one
// than it began with, or that it has been given another meaning.
func (r *durableRoute) judge(info *jetstream.ConsumerInfo) error {
	t := &r.target
	r.env.pool.mu.Lock()
	same := t.identity.is(identityOf(info, r.env.api.nc), r.seen)
	r.env.pool.mu.Unlock()
	if !same {
		return r.spec.fault("durable", strconv.Quote(t.consumer), "was deleted and created again by somebody else", ErrConsumerDeleted)
	}
	if n := info.Config.MaxDeliver; n > 0 {
		return r.spec.fault("maxDeliver", strconv.Itoa(n), "was set by somebody: the server would give up on messages; it must be unlimited", ErrConsumerConflict)
	}
	if diffs := differences(info.Config, r.consumerConfig(), false); len(diffs) > 0 {
		return r.spec.fault("durable", strconv.Quote(t.consumer), "was changed by somebody: "+strings.Join(diffs, "; "), ErrConsumerConflict)
	}
	return nil
}

// follow takes over what the consumer says now. The pool is locked; what is to be told is
// told by the result, without the lock.
func (r *durableRoute) follow(info *jetstream.ConsumerInfo) (tell func()) {
	c, t := info.Config, &r.target
	t.identity = identityOf(info, r.env.api.nc)
	before := r.ackWait
	if c.AckWait < before {
		for w := r.leases.head; w != nil; w = w.next {
			w.renew = 0
		}
	}
	r.ackWait = c.AckWait
	r.puller.limits = pullLimitsOf(c)
	r.inactive = c.InactiveThreshold
	checks := &r.checks
	checks.maxAckPending = c.MaxAckPending
	if checks.maxAckPending <= 0 {
		checks.maxAckPending = math.MaxInt
	}
	checks.wanted = info.NumWaiting > len(r.puller.pulls)
	checks.crowded = info.NumPending > 0 && info.NumAckPending >= checks.maxAckPending &&
		r.lane.inHand() < min(r.limit, checks.maxAckPending)
	// What this process gave back may have been deleted, or been handled by others.
	for r.mover == nil && r.delayed.after(processTime()) > info.NumAckPending {
		r.delayed.pop()
	}
	crowded := checks.crowded
	return func() {
		if before != 0 && c.AckWait != before {
			r.env.log.Warn("natsx: somebody changed the consumer's AckWait", r.names("ack_wait", c.AckWait, "before", before)...)
		}
		r.troubleIf(crowded, "retries", errCrowded)
		r.troubleIf(info.Paused, "paused", fmt.Errorf("natsx: the consumer is paused at the server for %s more", info.PauseRemaining.Round(time.Second)))
	}
}

// checkStream looks at the stream now and then: whether it still takes the route's
// subject, and for how long it keeps a message.
func (r *durableRoute) checkStream(ctx context.Context) {
	info, err := r.env.api.recentStreamInfo(ctx, r.target.stream, streamLookEvery)
	if err != nil {
		return // the consumer is what counts, and it answered
	}
	r.troubleIf(!takesSubject(&info.Config, r.spec.route.filter), "subject",
		fmt.Errorf("%w: stream %q has none of the filter's subjects any more, but %q", ErrNoStream, r.target.stream, info.Config.Subjects))
	config := info.Config
	r.target.config.Store(&config)
}

// headersOnly reports whether w came without its payload. A publisher can make a
// message look so: the consumer says whether it is. The pool is locked.
func (r *durableRoute) headersOnly(w *work) bool {
	return len(w.raw.Data) == 0 && w.raw.Header[headerMsgSize] != nil
}

const headerMsgSize = "Nats-Msg-Size"

func (r *durableRoute) consumerInfo(ctx context.Context) (info *jetstream.ConsumerInfo, err error) {
	err = r.tryOn(ctx, func(ctx context.Context) (err error) {
		info, err = r.env.api.consumerInfo(ctx, r.target.stream, r.target.consumer)
		return err
	})
	return info, err
}
