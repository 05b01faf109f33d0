package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Codes of JetStream's API errors that natsx acts on.
const (
	codeConsumerNotFound   jetstream.ErrorCode = 10014
	codeStreamNotFound     jetstream.ErrorCode = 10059
	codeConsumerExists     jetstream.ErrorCode = 10148
	codeMaxAckPendingLimit jetstream.ErrorCode = 10121
	codeMessageTooLarge    jetstream.ErrorCode = 10054
	codeHeaderTooLarge     jetstream.ErrorCode = 10097
)

const (
	// apiTimeout is the longest wait for an answer of JetStream's API.
	apiTimeout = 5 * time.Second
	// startPatience is how long a route that starts waits for a JetStream that
	// does not answer at all, which is how a server without JetStream looks.
	startPatience = 10 * time.Second
)

// consumerTarget is the stream and consumer that a durable route found or made.
type consumerTarget struct {
	stream   string
	consumer string

	nextSubject string // of pulls
	ackWait     time.Duration

	maxAckPending int
	maxBatch      int           // of one pull, 0 unlimited
	maxBytes      int           // of one pull, 0 unlimited
	maxExpires    time.Duration // of one pull, 0 unlimited

	consumerCreated time.Time
	streamCreated   int64                   // Unix nanoseconds; the consumer's when it may not be asked for
	config          *jetstream.StreamConfig // nil when it may not be asked for
}

// keepsTerminated tells that a message stays in the stream when it is terminated.
func (t *consumerTarget) keepsTerminated() bool {
	return t.config != nil && t.config.Retention == jetstream.LimitsPolicy
}

// locate finds the stream, checks that nothing can be lost, and creates or adopts
// the consumer. What passes by itself is retried until ctx ends.
func (r *durableRoute) locate(ctx context.Context) error {
	spec := r.spec.route
	r.target.stream = spec.stream
	if spec.stream == "" {
		names, err := r.streamNames(ctx, spec.filter)
		switch {
		case err != nil:
			return r.spec.fault("stream", "", fmt.Sprintf("could not be looked up by the filter: %v", err), err)
		case len(names) == 0:
			return r.spec.fault("stream", "", "no stream has the filter's subjects", ErrNoStream)
		case len(names) > 1:
			return r.spec.fault("stream", "", fmt.Sprintf("several have the filter's subjects: %q; name one with Stream", names), ErrAmbiguousStream)
		}
		r.target.stream = names[0]
	}
	r.target.consumer = spec.durable
	if err := r.eng.claim(r.target.stream, r.spec); err != nil {
		return err
	}
	info, err := r.streamInfo(ctx, r.target.stream)
	switch {
	case errors.Is(err, ErrPermission):
		r.log.Warn("natsx: stream cannot be checked", "stream", r.target.stream, "error", err)
	case hasCode(err, codeStreamNotFound):
		return r.spec.fault("stream", strconv.Quote(r.target.stream), "does not exist", fmt.Errorf("%w: %w", ErrNoStream, err))
	case err != nil:
		return r.spec.fault("stream", strconv.Quote(r.target.stream), cause(err), err)
	default:
		r.target.config = &info.Config
		r.target.streamCreated = info.Created.UnixNano()
	}
	if c := r.target.config; c != nil && c.Mirror == nil && len(c.Sources) == 0 && c.SubjectTransform == nil &&
		!slices.ContainsFunc(c.Subjects, func(s string) bool { return subjectsOverlap(s, spec.filter) }) {
		return r.spec.fault("stream", strconv.Quote(r.target.stream), fmt.Sprintf("has none of the filter's subjects, but %q", c.Subjects), ErrNoStream)
	}
	if c := r.target.config; c != nil && c.Retention != jetstream.LimitsPolicy && spec.set&optRetry != 0 && spec.dlq == "" {
		return r.spec.fault("dlq", "", fmt.Sprintf("is missing: on the %s stream %q a message whose retries are used up would be deleted",
			strings.ToLower(c.Retention.String()), r.target.stream), ErrWouldLose)
	}
	if spec.dlq != "" {
		if err := r.checkDLQ(ctx); err != nil {
			return err
		}
	}
	if err := r.ensureConsumer(ctx); err != nil {
		return err
	}
	r.located.Store(true)
	return nil
}

// ensureConsumer creates the durable, or adopts the one that exists.
func (r *durableRoute) ensureConsumer(ctx context.Context) error {
	cfg := r.consumerConfig()
	t := &r.target
	fail := func(err error) error {
		return r.spec.fault("durable", strconv.Quote(t.consumer), cause(err), err)
	}
	create := func() (info *jetstream.ConsumerInfo, err error) {
		err = r.api(ctx, "CONSUMER.CREATE."+t.stream+"."+t.consumer+"."+cfg.FilterSubject, func(ctx context.Context) error {
			c, err := r.eng.js.CreateConsumer(ctx, t.stream, cfg)
			if err == nil {
				info = c.CachedInfo()
			}
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
	// Creating is idempotent for equal settings; for others, and for a user who
	// may only bind, it is refused, and the existing consumer decides.
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
		var route *RouteError
		if errors.As(err, &route) {
			return err
		}
		return fail(err)
	}
	c := info.Config
	t.consumerCreated = info.Created
	if t.streamCreated == 0 {
		t.streamCreated = info.Created.UnixNano()
	}
	t.ackWait, t.maxAckPending = c.AckWait, c.MaxAckPending
	t.maxBatch, t.maxBytes, t.maxExpires = c.MaxRequestBatch, c.MaxRequestMaxBytes, c.MaxRequestExpires
	if t.maxAckPending <= 0 {
		t.maxAckPending = DefaultMaxAckPending
	}
	t.nextSubject = r.eng.apiPrefix + "CONSUMER.MSG.NEXT." + t.stream + "." + t.consumer
	if c.InactiveThreshold > 0 {
		r.log.Warn("natsx: the server deletes the durable when nobody pulls for a while, and it then begins anew",
			"stream", t.stream, "durable", t.consumer, "inactive_threshold", c.InactiveThreshold)
	}
	r.inform(info)
	return nil
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
		if c := r.target.config; c != nil && c.ConsumerLimits.MaxAckPending > 0 {
			cfg.MaxAckPending = min(cfg.MaxAckPending, c.ConsumerLimits.MaxAckPending)
		}
	}
	return cfg
}

// adopt takes an existing consumer: it refuses what would change the meaning of
// the route or of the consumer, and updates what may be updated. A user who may
// only bind takes the settings as they are.
func (r *durableRoute) adopt(ctx context.Context, info *jetstream.ConsumerInfo, want jetstream.ConsumerConfig, bindOnly bool) (*jetstream.ConsumerInfo, error) {
	have := info.Config
	filters := have.FilterSubjects
	if have.FilterSubject != "" {
		filters = []string{have.FilterSubject}
	}
	var diffs []string
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
	if len(diffs) > 0 {
		return nil, r.unfit(diffs...)
	}
	if want.AckWait < have.AckWait && (info.NumWaiting > 0 || info.NumAckPending > 0) {
		r.log.Warn("natsx: the durable keeps its longer ack wait, by which others may still renew their leases",
			"stream", r.target.stream, "durable", r.target.consumer, "ack_wait", have.AckWait, "wanted", want.AckWait)
		want.AckWait = have.AckWait
	}
	if bindOnly || have.AckWait == want.AckWait && have.MaxDeliver == want.MaxDeliver && have.MaxAckPending == want.MaxAckPending {
		return info, nil
	}
	have.AckWait, have.MaxDeliver, have.MaxAckPending = want.AckWait, want.MaxDeliver, want.MaxAckPending
	err := r.api(ctx, "CONSUMER.CREATE."+r.target.stream+"."+r.target.consumer+"."+want.FilterSubject, func(ctx context.Context) error {
		c, err := r.eng.js.UpdateConsumer(ctx, r.target.stream, have)
		if err == nil {
			info = c.CachedInfo()
		}
		return err
	})
	return info, err
}

// unfit is the fault of a durable that exists and cannot be adopted.
func (r *durableRoute) unfit(reasons ...string) error {
	return r.spec.fault("durable", strconv.Quote(r.target.consumer), "exists and cannot be adopted: "+strings.Join(reasons, "; "), ErrConsumerConflict)
}

// verify makes sure that the consumer is still the one the route began with, and
// lets pulling go on. With lost set the pulls sent so far are gone with what caused
// the doubt. It runs beside everything else, one at a time.
func (r *durableRoute) verify(lost bool) {
	p := r.eng.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if !r.open {
		return
	}
	r.pulling = false
	r.pullsLost = r.pullsLost || lost
	if r.verifying {
		r.verifyAgain = true
		return
	}
	r.verifying = true
	r.eng.background.Go(func() {
		for r.verifyOnce() {
		}
	})
}

// verifyOnce returns true when it must be done again.
func (r *durableRoute) verifyOnce() (again bool) {
	ok := r.verified()
	p := r.eng.pool
	p.mu.Lock()
	if r.verifyAgain && r.open {
		r.verifyAgain = false
		p.mu.Unlock()
		return true
	}
	r.verifying = false
	var next pull
	if ok && r.open {
		if r.pullsLost {
			r.pulls, r.outstanding, r.pullsLost = r.pulls[:0], 0, false
		}
		r.pulling = true
		r.heard.Store(r.eng.now())
		next = r.plan(r.eng.now())
	}
	p.mu.Unlock()
	r.pull(next)
	return false
}

// verified asks for the consumer until there is an answer. It returns false when
// pulling must not go on: the end of the route, or of the connection, whose
// return verifies again.
func (r *durableRoute) verified() bool {
	ctx := r.eng.intake
	missing := 0
	pause := 100 * time.Millisecond
	for tries := 0; ; pause = min(2*pause, 2*time.Second) {
		if ctx.Err() != nil || !r.eng.nc.IsConnected() {
			return false
		}
		if !r.eng.alive() && r.eng.reconnect() {
			return false
		}
		if r.slept(r.eng.now()) {
			if !wait(ctx, 10*time.Millisecond) {
				return false
			}
			continue
		}
		r.eng.asking <- struct{}{}
		try, cancel := context.WithTimeout(ctx, patience(tries))
		info, err := r.consumerInfoOnce(try)
		cancel()
		tries++
		<-r.eng.asking
		gone := error(nil)
		switch {
		case err == nil && info.Created.Equal(r.target.consumerCreated):
			r.inform(info)
			r.clear("consumer")
			return true
		case errors.Is(err, ErrPermission):
			r.eng.pool.mu.Lock()
			gone = r.gone
			r.eng.pool.mu.Unlock()
			if gone != nil {
				r.fail(r.spec.fault("durable", strconv.Quote(r.target.consumer), cause(gone), gone))
				return false
			}
			r.clear("consumer")
			return true
		case err == nil:
			r.fail(r.spec.fault("durable", strconv.Quote(r.target.consumer), "was deleted and created again by somebody else", ErrConsumerDeleted))
			return false
		case hasCode(err, codeConsumerNotFound):
			gone = ErrConsumerDeleted
		case hasCode(err, codeStreamNotFound):
			gone = ErrStreamDeleted
		}
		// A server that just started may not know its assets yet.
		if gone != nil {
			if missing++; missing > 1 {
				r.fail(r.spec.fault("durable", strconv.Quote(r.target.consumer), cause(gone), gone))
				return false
			}
		} else {
			missing = 0
		}
		if ctx.Err() == nil {
			r.trouble("consumer", err)
		}
		if !wait(ctx, pause) {
			return false
		}
	}
}

func (r *durableRoute) consumerInfo(ctx context.Context) (info *jetstream.ConsumerInfo, err error) {
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		info, err = r.consumerInfoOnce(ctx)
		return err
	})
	return info, err
}

func (r *durableRoute) consumerInfoOnce(ctx context.Context) (info *jetstream.ConsumerInfo, err error) {
	err = r.eng.call(ctx, "CONSUMER.INFO."+r.target.stream+"."+r.target.consumer, func(ctx context.Context) error {
		c, err := r.eng.js.Consumer(ctx, r.target.stream, r.target.consumer)
		if err == nil {
			info = c.CachedInfo()
		}
		return err
	})
	return info, err
}

func (r *route) streamInfo(ctx context.Context, name string) (info *jetstream.StreamInfo, err error) {
	err = r.api(ctx, "STREAM.INFO."+name, func(ctx context.Context) error {
		s, err := r.eng.js.Stream(ctx, name)
		if err == nil {
			info = s.CachedInfo()
		}
		return err
	})
	return info, err
}

func (r *route) streamNames(ctx context.Context, filter string) (names []string, err error) {
	err = r.api(ctx, "STREAM.NAMES", func(ctx context.Context) error {
		names, err = streamsFor(ctx, r.eng.js, filter)
		return err
	})
	return names, err
}

// api calls JetStream's API, again and again while the failure passes by itself.
func (r *route) api(ctx context.Context, subject string, fn func(context.Context) error) error {
	return r.retry(ctx, func(ctx context.Context) error { return r.eng.call(ctx, subject, fn) })
}

func (r *route) retry(ctx context.Context, try func(context.Context) error) error {
	begun := time.Now()
	pause := 100 * time.Millisecond
	for tries := 0; ; pause = min(2*pause, 2*time.Second) {
		limited, cancel := context.WithTimeout(ctx, patience(tries))
		err := try(limited)
		cancel()
		tries++
		if err == nil || ctx.Err() != nil || !passes(err) || hasCode(err, codeStreamNotFound) || r.eng.failed() {
			r.clear("start")
			return err
		}
		if errors.Is(err, nats.ErrNoResponders) && r.eng.nc.IsConnected() && time.Since(begun) > startPatience {
			return fmt.Errorf("natsx: JetStream does not answer: %w", err)
		}
		r.trouble("start", err)
		if !wait(ctx, pause) {
			return err
		}
	}
}
