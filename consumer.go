package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// streamCheckEvery is the longest time that stream information is reused.
	streamCheckEvery = 10 * time.Second
	// consumerMisses is how many times in a row a consumer must be unknown to the server
	// before it counts as deleted: a server that has just started may not know it yet.
	consumerMisses = 2
	// pinRenewals is how many times a pin is renewed within its length.
	pinRenewals = 4
	// unpinPatience bounds how long a drain waits for the release of its pin.
	unpinPatience = 2 * time.Second
)

// errAckPendingFull is the trouble of a route whose waiting retries keep the server from
// delivering new messages.
var errAckPendingFull = errors.New("natsx: messages that wait for their retry fill MaxAckPending; raise it, shorten the backoff or use a retry stream")

// errOrderStalls is the trouble of an ordered route that may not start anything.
var errOrderStalls = errors.New("natsx: nothing is started, since messages that were delivered before are neither settled nor delivered again: another process may still handle them")

// consumerTarget is the stream and consumer that a durable route found or made.
type consumerTarget struct {
	stream      string
	consumer    string
	nextSubject string // of pulls
	canIdle     bool   // an idle pull takes nothing from this consumer

	identity consumerIdentity                       // as last reported; guarded by the pool's mutex once the route runs
	config   atomic.Pointer[jetstream.StreamConfig] // nil without the permission to read it
}

// consumerIdentity distinguishes a consumer from another one of the same name. The
// creation time alone is not enough: a server may report a different one after a
// restart (nats-server#8470).
type consumerIdentity struct {
	id        string    // set by natsx in the metadata; empty if there is none
	created   time.Time // never the same for two consumers
	group     string    // Raft group in a cluster, made with the consumer; may not be reported
	server    string    // id of the connected server, new after its restart; empty in a cluster
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

// is reports whether now is the same consumer, whose highest delivery received has the
// consumer sequence seen. If the creation time differs, it may be another consumer with
// copied metadata. Then the same Raft group proves that it is the same one or, without
// a group, another server and a delivery count that did not restart.
func (i consumerIdentity) is(now consumerIdentity, seen uint64) bool {
	switch {
	case now.created.Equal(i.created):
		return true
	case now.id != i.id:
		return false // processes that set the id at the same time do not change the creation time
	case i.group != "" && now.group != "":
		return now.group == i.group
	}
	const unsaved = 10_000 // deliveries that a killed server may not have saved
	return (now.server == "" || now.server != i.server) && (now.delivered > 0 || seen == 0) && now.delivered+unsaved >= seen
}

// keepsTerminated reports whether terminated messages stay in the stream.
func (t *consumerTarget) keepsTerminated() bool {
	c := t.config.Load()
	return c != nil && c.Retention == jetstream.LimitsPolicy
}

// consumerChecks is what a route last saw of its consumer, and the state of the checks.
// Guarded by the pool's mutex.
type consumerChecks struct {
	lastCheck int64         // when the last check was begun
	least     time.Duration // between regular checks, by the number of routes
	spread    float64       // random factor of that time, 0.8 to 1.2
	running   bool
	soon      bool  // check as soon as minCheckGap allows
	again     bool  // check again after the one that runs
	suspended bool  // nothing is pulled until a check succeeds
	lost      bool  // the pulls sent so far are lost
	gone      error // the deletion that the server reported, or nil

	maxAckPending  int
	pending        uint64    // not delivered yet
	ackPending     int       // delivered and not settled
	reported       time.Time // when the server last reported these
	othersPull     bool      // another process pulls too
	ackPendingFull bool      // retries fill MaxAckPending
}

// at is when the next check is due, 0 while one runs. arrived is when the last message
// arrived.
func (c *consumerChecks) at(arrived int64) int64 {
	every := checkIdleEvery
	switch {
	case c.running:
		return 0
	case c.soon:
		return c.lastCheck + int64(minCheckGap)
	case arrived > c.lastCheck || c.ackPendingFull:
		every = checkBusyEvery
	}
	return c.lastCheck + int64(c.spread*float64(max(every, c.least)))
}

func (c *consumerChecks) due(now, arrived int64) bool {
	at := c.at(arrived)
	return at != 0 && now >= at
}

// locate finds the stream, checks that nothing can be lost, and creates or adopts
// the consumer. It retries transient failures until ctx ends.
func (r *durableRoute) locate(ctx context.Context) error {
	spec := r.spec.route
	name, reason, err := locateStream(spec.stream, func() (names []string, err error) {
		for _, filter := range spec.filters() {
			var found []string
			err = r.tryOn(ctx, func(ctx context.Context) (err error) {
				found, err = r.env.api.streamNames(ctx, filter)
				return err
			})
			if err != nil {
				return nil, err
			}
			names = append(names, found...)
		}
		slices.Sort(names)
		return slices.Compact(names), nil
	}, func() string { return r.env.api.nearStreams(ctx, "", spec.filter) })
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
		return r.spec.fault("stream", strconv.Quote(name), "does not exist; "+r.env.api.nearStreams(ctx, name, spec.filter), fmt.Errorf("%w: %w", ErrNoStream, err))
	case err != nil:
		return r.spec.fault("stream", strconv.Quote(name), cause(err), err)
	default:
		r.env.foundStream(info)
		r.target.config.Store(&info.Config)
		if n := info.State.Msgs; n > 0 {
			r.puller.size = int64(info.State.Bytes / n)
		}
	}
	c := r.target.config.Load()
	if c != nil {
		if filter, ok := takesSubjects(c, spec.filters()); !ok {
			return r.spec.fault("stream", strconv.Quote(name), fmt.Sprintf("has none of the filter's subjects (%q), but %q", filter, c.Subjects), ErrNoStream)
		}
	}
	if c != nil && c.Retention == jetstream.WorkQueuePolicy {
		if err := r.env.claimFilter(name, r.spec); err != nil {
			return err
		}
	}
	if c != nil && c.Retention != jetstream.LimitsPolicy && spec.set&optOrderedBy != 0 && spec.dlq == "" {
		return r.spec.fault("dlq", "", fmt.Sprintf("is missing: on the %s stream %q a dead message would stay unsettled, and hold up the order of a process that takes over",
			strings.ToLower(c.Retention.String()), name), ErrWouldLose)
	}
	if c != nil && c.Retention != jetstream.LimitsPolicy && spec.set&optRetry != 0 && spec.dlq == "" {
		return r.spec.fault("dlq", "", fmt.Sprintf("is missing: on the %s stream %q a message whose retries are used up would be deleted",
			strings.ToLower(c.Retention.String()), name), ErrWouldLose)
	}
	if spec.dlq != "" {
		if err := r.letters.check(ctx); err != nil {
			return err
		}
		r.warnOfRedrives()
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

// takesSubjects reports whether a stream can hold messages that match each of the
// filters, and returns the first that it cannot hold any of.
func takesSubjects(c *jetstream.StreamConfig, filters []string) (missing string, ok bool) {
	if c.Mirror != nil || len(c.Sources) > 0 || c.SubjectTransform != nil {
		return "", true
	}
	for _, filter := range filters {
		if !slices.ContainsFunc(c.Subjects, func(s string) bool { return subjectsOverlap(s, filter) }) {
			return filter, false
		}
	}
	return "", true
}

// warnOfMaxAge logs a warning if the stream may delete a message before its retries are
// used up.
func (r *durableRoute) warnOfMaxAge() {
	c := r.target.config.Load()
	if c == nil || c.MaxAge == 0 {
		return
	}
	spec := r.spec.route
	low, _ := spec.backoff()
	if longest := longestBackoff(spec); spec.attempts() > 0 && longest > c.MaxAge || spec.attempts() == 0 && low > c.MaxAge {
		r.env.log.Warn("natsx: retries may take longer than the stream's MaxAge; a message is then dead before its attempts are used up",
			r.names("stream", c.Name, "max_age", c.MaxAge, "retries_take", longest)...)
	}
}

// warnOfRedrives warns where letters could not be redriven.
func (r *durableRoute) warnOfRedrives() {
	c := r.target.config.Load()
	if c == nil || r.mover != nil {
		return
	}
	why := takesNoCopy(c, r.spec.route.filter)
	if why == "" && c.MaxMsgsPerSubject > 0 && c.Discard == jetstream.DiscardOld {
		why = fmt.Sprintf("keeps %d messages a subject; a letter is not redriven when a newer one would be deleted for it", c.MaxMsgsPerSubject)
	}
	if why != "" {
		r.env.log.Warn("natsx: dead letters may not be redriven", r.names("stream", c.Name, "reason", why)...)
	}
}

// ensureConsumer creates the durable, or adopts an existing one.
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
	tooOld := func() error {
		version := r.env.api.nc.ConnectedServerVersion()
		if r.spec.route.set&optPinnedBy == 0 {
			return r.spec.fault("orderedBy", r.spec.route.order.String(), "needs nats-server 2.11, this is "+version, ErrServerTooOld)
		}
		return r.spec.fault("pinnedBy", strconv.Quote(r.spec.route.group), "needs nats-server 2.11, this is "+version, ErrServerTooOld)
	}
	pinned := r.spec.route.pinGroup() != ""
	if pinned && olderThan(r.env.api.nc.ConnectedServerVersion(), 2, 11) {
		return tooOld()
	}
	create := func() (info *jetstream.ConsumerInfo, err error) {
		err = r.tryOn(ctx, func(ctx context.Context) (err error) {
			info, err = r.env.api.createConsumer(ctx, t.stream, cfg)
			return err
		})
		return info, err
	}
	did, changes := "created", ""
	info, err := create()
	if hasCode(err, codeMaxAckPendingLimit) && r.spec.route.set&optMaxAckPending == 0 {
		// Lower the default to the limit of the server or of the account.
		if limit := trailingNumber(err.Error()); limit > 0 {
			cfg.MaxAckPending = limit
			info, err = create()
		}
	}
	// The server refuses to create a durable that exists with another id in its
	// metadata, and any creation by a user who may only bind.
	if hasCode(err, codeConsumerExists) || errors.Is(err, ErrPermission) {
		denied := err
		info, err = r.consumerInfo(ctx)
		if hasCode(err, codeConsumerNotFound) && errors.Is(denied, ErrPermission) {
			return fail(denied)
		}
		did = "found"
		switch {
		case err == nil:
			info, changes, err = r.adopt(ctx, info, cfg, errors.Is(denied, ErrPermission))
		case errors.Is(err, jetstream.ErrNotPullConsumer):
			err = r.cannotAdopt("it is a push consumer")
		}
	}
	if did == "created" && (hasCode(err, codeWorkQueueOverlap) || hasCode(err, codeWorkQueueOneConsumer)) {
		return r.overlap(ctx, err)
	}
	if err != nil {
		return fail(err)
	}
	r.created = did == "created"
	r.logDurable(did, info, changes)
	c := info.Config
	if pinned && c.PriorityPolicy != jetstream.PriorityPolicyPinned {
		return tooOld() // the one that has the stream, in place of the one connected to
	}
	t.identity = identityOf(info, r.env.api.nc)
	t.nextSubject = r.env.api.prefix + "CONSUMER.MSG.NEXT." + t.stream + "." + t.consumer
	// The server could pin an idle pull, which gets no message. With DeliverLastPerSubject the server forgets a message that it could not deliver
	// to an idle pull. A rate limit or the original replay pace would delay the wake-up.
	t.canIdle = !pinned && c.DeliverPolicy != jetstream.DeliverLastPerSubjectPolicy && c.ReplayPolicy == jetstream.ReplayInstantPolicy && c.RateLimit == 0
	if c.InactiveThreshold > 0 && r.spec.route.set&optInactiveThreshold == 0 {
		r.env.log.Warn("natsx: the server deletes the durable when nobody pulls for its inactive threshold",
			r.names("stream", t.stream, "inactive_threshold", c.InactiveThreshold)...)
	}
	r.env.pool.mu.Lock()
	r.checks.spread = 0.8 + 0.4*mathrand.Float64()
	r.checks.least = time.Duration(r.env.durables) * checkShare
	report := r.follow(info)
	r.pending = info.NumPending > 0
	r.env.pool.mu.Unlock()
	report()
	return nil
}

// logDurable logs the durable that the route found, created or changed.
func (r *durableRoute) logDurable(did string, info *jetstream.ConsumerInfo, changes string) {
	c := info.Config
	args := r.names("stream", r.target.stream, "ack_wait", c.AckWait, "max_ack_pending", c.MaxAckPending,
		"deliver", startText(c), "pending", info.NumPending, "ack_pending", info.NumAckPending)
	if changes != "" {
		did, args = "changed to match the route", append(args, "changes", changes)
	}
	r.env.log.Info("natsx: durable "+did, args...)
}

// overlap is the fault of a work-queue stream that has a consumer with an overlapping
// filter already.
func (r *durableRoute) overlap(ctx context.Context, refusal error) error {
	reason := "is refused: " + cause(refusal)
	list, err := r.env.api.consumerList(ctx, r.target.stream)
	for _, c := range list {
		for _, filter := range filtersOf(c.Config) {
			overlaps := func(own string) bool { return subjectsOverlap(filter, own) }
			if err == nil && slices.ContainsFunc(r.spec.route.filters(), overlaps) {
				reason = fmt.Sprintf("overlaps with %q of the durable %q, and the work-queue stream %q gives each message to one durable", filter, c.Name, r.target.stream)
			}
		}
	}
	return r.spec.fault("subject", strconv.Quote(r.spec.route.filter), reason, fmt.Errorf("%w: %w", ErrOptionConflict, refusal))
}

// refuseOldServer is the fault of a server before 2.10, which keeps no metadata and
// treats the creation of an existing consumer as an update.
func (r *durableRoute) refuseOldServer(ctx context.Context, cfg jetstream.ConsumerConfig, version string) error {
	reason := fmt.Sprintf("needs nats-server 2.10, this is %s", version)
	err := ErrServerTooOld
	if info, failed := r.consumerInfo(ctx); failed == nil {
		if differs := incompatible(info.Config, cfg); len(differs) > 0 {
			reason += "; it exists: " + diffText(differs, durableDiff.state)
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
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       spec.lease(),
		MaxDeliver:    -1,
		MaxAckPending: spec.maxAckPending,

		InactiveThreshold: spec.inactive,
		DeliverPolicy:     spec.deliver,
		Metadata:          map[string]string{metadataID: rand.Text()},
	}
	if filters := spec.filters(); len(filters) == 1 {
		cfg.FilterSubject = spec.filter
	} else {
		cfg.FilterSubjects = filters
	}
	if group := spec.pinGroup(); group != "" {
		cfg.PriorityPolicy, cfg.PriorityGroups, cfg.PinnedTTL = jetstream.PriorityPolicyPinned, []string{group}, pinFor(cfg.AckWait)
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

// adopt uses an existing consumer. Each difference from the route is a fault, or is
// changed where the route has AdoptChanges; changes says what was. A limited MaxDeliver is always lifted, unless
// the user may only bind.
func (r *durableRoute) adopt(ctx context.Context, info *jetstream.ConsumerInfo, want jetstream.ConsumerConfig, bindOnly bool) (now *jetstream.ConsumerInfo, changes string, err error) {
	set, have := r.spec.route.set, info.Config
	adopts := set&optAdoptChanges != 0
	diffs := slices.Concat(incompatible(have, want), optionDiffs(set, have, want))
	if !adopts || slices.ContainsFunc(diffs, func(d durableDiff) bool { return d.fixed }) {
		var faults []error
		for _, d := range diffs {
			faults = append(faults, r.spec.fault(d.field, d.want, d.conflict(adopts), ErrConsumerConflict))
		}
		if len(faults) > 0 {
			return nil, "", errors.Join(faults...)
		}
	}
	if bindOnly && have.MaxDeliver > 0 {
		return nil, "", r.cannotAdopt(fmt.Sprintf("its MaxDeliver is %d, not unlimited", have.MaxDeliver))
	}
	if bindOnly && len(diffs) == 0 {
		return info, "", nil
	}
	next := have
	if adopts {
		next = changed(set, have, want)
	}
	next.Name, next.MaxDeliver, next.AckWait = r.target.consumer, want.MaxDeliver, max(next.AckWait, minAckWait)
	if next.AckWait < have.AckWait && (info.NumWaiting > 0 || info.NumAckPending > 0) {
		r.env.log.Warn("natsx: the durable keeps its longer ack wait, since other processes may rely on it",
			r.names("stream", r.target.stream, "ack_wait", have.AckWait, "wanted", want.AckWait)...)
		next.AckWait = have.AckWait
	}
	if next.PriorityPolicy == jetstream.PriorityPolicyPinned {
		next.PinnedTTL = pinFor(next.AckWait)
	}
	if have.Metadata[metadataID] == "" {
		next.Metadata = withMetadata(have.Metadata, metadataID, want.Metadata[metadataID])
	}
	if reflect.DeepEqual(next, have) {
		return info, "", nil
	}
	err = r.tryOn(ctx, func(ctx context.Context) (err error) {
		info, err = r.env.api.updateConsumer(ctx, r.target.stream, next)
		return err
	})
	var refused *jetstream.APIError
	switch {
	case err == nil:
		changes = changesOf(have, info.Config, diffs, slices.Concat(incompatible(info.Config, want), optionDiffs(set, info.Config, want)))
	case errors.As(err, &refused) && len(diffs) > 0:
		reason := fmt.Sprintf("exists, and the server refuses to change it (%s): %s", diffText(diffs, durableDiff.change), cause(err))
		err = r.spec.fault("durable", strconv.Quote(r.target.consumer), reason, fmt.Errorf("%w: %w", ErrConsumerConflict, err))
	}
	return info, changes, err
}

// cannotAdopt is the fault of an existing durable that the route cannot use.
func (r *durableRoute) cannotAdopt(reasons ...string) error {
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), "exists and cannot be adopted: "+strings.Join(reasons, "; "), ErrConsumerConflict)
}

// unpin releases the pin, so that another client is pinned at once. All messages of this
// one must be settled.
func (r *durableRoute) unpin(ctx context.Context) {
	r.env.pool.mu.Lock()
	pin := r.puller.pin
	r.env.pool.mu.Unlock()
	if pin == "" || !r.env.link.up() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, unpinPatience)
	defer cancel()
	info, err := r.env.api.consumerInfo(ctx, r.target.stream, r.target.consumer)
	if err == nil && (len(info.PriorityGroups) == 0 || info.PriorityGroups[0].PinnedClientID != pin) {
		return // another client is pinned already
	}
	if err == nil {
		err = r.env.api.ask(ctx, "CONSUMER.UNPIN."+r.target.stream+"."+r.target.consumer, struct {
			Group string `json:"group"`
		}{r.spec.route.pinGroup()}, &struct{}{})
	}
	if err != nil {
		r.env.log.Info("natsx: pin not released, it will expire", r.names("error", err)...)
	}
}

// requestCheck checks the consumer in the background, now or, soon after the last check,
// when minCheckGap has passed. With reason set, a check that runs already is repeated.
// The pool is locked.
func (r *durableRoute) requestCheck(now int64, reason bool) {
	c := &r.checks
	switch {
	case c.running:
		c.again = c.again || reason
	case r.stopped:
	case now-c.lastCheck < int64(minCheckGap):
		c.soon = true
	default:
		c.running, c.soon, c.lastCheck = true, false, now
		r.env.spawn(r.runCheck)
	}
}

// checkAfterFailure checks the consumer after a failed attempt: if its MaxDeliver was
// limited, the server would give up on the message.
func (r *durableRoute) checkAfterFailure() {
	now := processTime()
	r.env.pool.mu.Lock()
	defer r.env.pool.mu.Unlock()
	r.requestCheck(now, true)
	r.setAlarm(now)
}

// verify checks that the consumer is still the one the route started with. With lost
// set, the pulls sent so far count as lost and nothing is pulled until the check
// succeeds. gone is the deletion that the server reported, or nil.
func (r *durableRoute) verify(lost bool, gone error) {
	p := r.env.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if !r.open {
		return
	}
	c := &r.checks
	if lost && !c.lost {
		r.history.doubt(processTime(), r.ackWait)
	}
	c.lost = c.lost || lost
	c.suspended = c.suspended || lost
	if gone != nil {
		c.gone = gone
	}
	if c.running {
		c.again = true
		return
	}
	c.running, c.soon, c.lastCheck = true, false, processTime()
	r.env.spawn(r.runCheck)
}

// runCheck checks the consumer, and again if that is requested meanwhile.
func (r *durableRoute) runCheck() {
	p := r.env.pool
	for {
		p.mu.Lock()
		still, received := r.orderIsStill(), r.stats.Received
		p.mu.Unlock()
		info, ok := r.inspect()
		r.awaitCallbacks()
		p.mu.Lock()
		now := processTime()
		c := &r.checks
		if c.again && !r.stopped {
			c.again, c.lastCheck = false, now
			p.mu.Unlock()
			continue
		}
		c.running, c.again = false, false
		report := func() {}
		if ok {
			if info != nil {
				report = r.follow(info)
			}
			if c.lost {
				r.history.addLost(r.puller.forget())
			}
			c.lost, c.suspended, c.gone = false, false, nil
			if info != nil {
				r.judgeOrder(info, still && received == r.stats.Received, now)
			}
			r.releaseHeld(now)
		}
		r.release(now)
		next := r.plan(now)
		due := r.leases.due(now, r.ackWait, nil)
		stalls := r.orderStalls(now)
		p.mu.Unlock()
		report()
		if r.order != nil {
			r.troubleIf(stalls, "order", errOrderStalls)
		}
		r.send(next)
		r.env.keeper.renew(due)
		return
	}
}

// awaitCallbacks waits until all messages that arrived before the server's answer are
// processed, if the pulls sent so far count as lost.
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

// inspect requests the consumer's info until there is an answer, and reports whether the
// route may continue. It gives up when the route ends or the connection is lost: the
// reconnect verifies again. Without the permission to ask it returns no info.
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
				r.fail(r.deletedFault(gone))
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
				r.fail(r.deletedFault(gone))
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

func (r *durableRoute) deletedFault(gone error) error {
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), cause(gone), gone)
}

// checkOnce checks the consumer once before a paused route resumes.
func (r *durableRoute) checkOnce() error {
	info, err := r.consumerInfo(r.env.intake)
	switch {
	case err == nil:
		if fault := r.judge(info); fault != nil {
			r.fail(fault)
			return fault
		}
		p := r.env.pool
		p.mu.Lock()
		report := r.follow(info)
		p.mu.Unlock()
		report()
	case hasCode(err, codeConsumerNotFound), hasCode(err, codeStreamNotFound):
		gone := ErrConsumerDeleted
		if hasCode(err, codeStreamNotFound) {
			gone = ErrStreamDeleted
		}
		r.fail(r.deletedFault(gone))
		return r.deletedFault(gone)
	}
	return nil
}

// judge returns a fault if the consumer is not the one the route started with, or was
// changed so that it has another meaning.
func (r *durableRoute) judge(info *jetstream.ConsumerInfo) error {
	t := &r.target
	r.env.pool.mu.Lock()
	same := t.identity.is(identityOf(info, r.env.api.nc), r.seen)
	r.env.pool.mu.Unlock()
	if !same {
		return r.spec.fault("durable", strconv.Quote(t.consumer), "was deleted and recreated", ErrConsumerDeleted)
	}
	if n := info.Config.MaxDeliver; n > 0 {
		return r.spec.fault("maxDeliver", strconv.Itoa(n), "was set while the route runs: the server would give up on messages; it must be unlimited", ErrConsumerConflict)
	}
	if diffs := incompatible(info.Config, r.consumerConfig()); len(diffs) > 0 {
		return r.spec.fault("durable", strconv.Quote(t.consumer), "was changed while the route runs: "+diffText(diffs, durableDiff.state), ErrConsumerConflict)
	}
	return nil
}

// follow adopts the current settings and state of the consumer. The pool is locked. The
// caller runs the result without the lock: it logs and updates the health.
func (r *durableRoute) follow(info *jetstream.ConsumerInfo) (report func()) {
	c, t := info.Config, &r.target
	t.identity = identityOf(info, r.env.api.nc)
	if id, known := t.identity.id, r.passer.key.Load(); r.retryOf == nil && (known == nil || *known != id) {
		r.passer.key.Store(&id)
	}
	before := r.ackWait
	if c.AckWait < before {
		for w := r.leases.head; w != nil; w = w.next {
			w.renew = 0
		}
	}
	r.ackWait = c.AckWait
	r.puller.short = c.AckWait/4 < mostStay+statusGrace
	r.puller.limits, r.puller.group, r.puller.pinKeep = pullLimitsOf(c), r.spec.route.pinGroup(), int64(c.PinnedTTL/pinRenewals)
	r.inactive = c.InactiveThreshold
	checks := &r.checks
	checks.maxAckPending = c.MaxAckPending
	if checks.maxAckPending <= 0 {
		checks.maxAckPending = math.MaxInt
	}
	checks.pending, checks.ackPending, checks.reported = info.NumPending, info.NumAckPending, time.Now()
	checks.othersPull = info.NumWaiting > len(r.puller.pulls)
	standsBy := r.puller.group != "" && r.puller.pin == ""
	checks.ackPendingFull = info.NumPending > 0 && info.NumAckPending >= checks.maxAckPending && !standsBy &&
		r.lane.inHand() < min(r.limit, checks.maxAckPending)
	// What this process gave back may have been deleted, or handled elsewhere.
	for r.mover == nil && r.delayed.after(processTime()) > info.NumAckPending {
		r.delayed.pop()
	}
	full := checks.ackPendingFull
	return func() {
		if before != 0 && c.AckWait != before {
			r.env.log.Warn("natsx: the consumer's AckWait was changed", r.names("ack_wait", c.AckWait, "before", before)...)
		}
		r.troubleIf(full, "retries", errAckPendingFull)
		r.troubleIf(info.Paused, "paused", fmt.Errorf("natsx: the consumer is paused at the server for %s more", info.PauseRemaining.Round(time.Second)))
	}
}

// checkStream checks now and then whether the stream still captures the route's
// subject, and how long it keeps a message.
func (r *durableRoute) checkStream(ctx context.Context) {
	info, err := r.env.api.recentStreamInfo(ctx, r.target.stream, streamCheckEvery)
	if err != nil {
		return // the consumer has answered, and is what counts
	}
	missing, ok := takesSubjects(&info.Config, r.spec.route.filters())
	r.troubleIf(!ok, "subject",
		fmt.Errorf("%w: stream %q has none of the filter's subjects (%q) any more, but %q", ErrNoStream, r.target.stream, missing, info.Config.Subjects))
	config := info.Config
	r.target.config.Store(&config)
}

// headersOnly reports whether w looks as if it was delivered without its payload. A
// publisher can make a message look so; a check of the consumer decides. The pool is
// locked.
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
