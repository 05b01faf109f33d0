package natsx

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// replayConsumer begins the name of every consumer of a replay.
	replayConsumer = "natsx-replay-"
	// replayMisses is how often in a row a stream is not found before it counts as
	// deleted: a server that just started may not know it yet.
	replayMisses = 4
)

// open finds the stream and the bounds and makes the first consumer.
func (r *replay) open() error {
	if err := r.awaitConnection(); err != nil || r.intake.Err() != nil {
		return err
	}
	info, err := r.locate()
	if err != nil {
		return r.unlessEnded(err)
	}
	if info.Config.Retention == jetstream.WorkQueuePolicy {
		return r.want.fault("stream", strconv.Quote(info.Config.Name), "is a work queue: reading it takes messages from its consumers", ErrNotReplayable)
	}
	inbox := r.eng.nc.NewInbox()
	r.eng.pool.mu.Lock()
	r.stream, r.created, r.inbox = info.Config.Name, info.Created, inbox
	r.from = &origin{stream: r.stream, created: r.created.UnixNano()}
	r.replicas, r.schedules = info.Config.Replicas, info.Config.AllowMsgSchedules
	r.inactive = inactiveThreshold(&info.Config, ReplayInactive)
	r.eng.pool.mu.Unlock()
	// Twice the window, since what an earlier consumer sent may still come in.
	r.msgs = make(chan *nats.Msg, 2*replayWindow+replayBurst)
	sub, err := r.eng.nc.ChanSubscribe(inbox+".*", r.msgs)
	if err != nil {
		return r.want.fault("", "", "could not subscribe: "+cause(err), err)
	}
	r.inlet, r.joined = sub, make(chan struct{})
	go func() {
		defer close(r.joined)
		r.receiveAll()
	}()
	return r.unlessEnded(r.begin(info.State))
}

// locate looks the stream up.
func (r *replay) locate() (*jetstream.StreamInfo, error) {
	want := r.want.replay
	name := want.stream
	if want.set&replayStream == 0 {
		names, err := r.streamNames(r.intake, want.filter)
		switch {
		case err != nil:
			return nil, r.want.fault("stream", "", fmt.Sprintf("could not be looked up by the filter: %v", err), err)
		case len(names) == 0:
			return nil, r.want.fault("stream", "", "no stream has the filter's subjects", ErrNoStream)
		case len(names) > 1:
			return nil, r.want.fault("stream", "", fmt.Sprintf("several have the filter's subjects: %q; name one with Stream", names), ErrAmbiguousStream)
		}
		name = names[0]
	}
	info, err := r.streamInfo(r.intake, name)
	if hasCode(err, codeStreamNotFound) {
		return nil, r.want.fault("stream", strconv.Quote(name), "does not exist", ErrNoStream)
	}
	if err != nil {
		return nil, r.want.fault("stream", strconv.Quote(name), cause(err), err)
	}
	return info, nil
}

// begin fixes the end and makes the first consumer, whose pending messages less
// those behind the end are the total.
func (r *replay) begin(state jetstream.StreamState) error {
	want := r.want.replay
	end, endTime := state.LastSeq, state.LastTime
	var behind uint64
	if until := want.until.time(); want.set&replayUntilTime != 0 && until.Before(endTime) {
		info, err := r.glance(startAt{time: until.Add(1)})
		if err != nil {
			return err
		}
		last, err := r.lastUntil(until, info.Delivered.Stream)
		if err != nil {
			return err
		}
		end, endTime, behind = min(end, last), until, info.NumPending
	}
	if want.set&replayUntilSequence != 0 && want.untilSeq < end {
		info, err := r.glance(startAt{seq: want.untilSeq + 1})
		if err != nil {
			return err
		}
		end, endTime, behind = want.untilSeq, time.Time{}, info.NumPending
	}
	name, info, err := r.create(want.start())
	if err != nil {
		return err
	}
	p := r.eng.pool
	p.mu.Lock()
	r.received, r.located = max(r.received, info.Delivered.Stream), true
	r.end = end
	if !endTime.IsZero() && want.set&replayLimit == 0 {
		r.endTime = endTime.UnixNano()
	}
	r.total = info.NumPending - min(behind, info.NumPending)
	if want.set&replayLimit != 0 {
		r.total = min(r.total, uint64(want.limit))
	}
	if r.received >= end {
		r.complete, r.total = true, 0
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	r.install(name, info)
	return nil
}

// glance makes a consumer only to see where it starts and what it has ahead.
func (r *replay) glance(at startAt) (*jetstream.ConsumerInfo, error) {
	_, info, err := r.create(at)
	if err != nil {
		return nil, err
	}
	r.clean("")
	return info, nil
}

// lastUntil is the sequence that a replay until a time ends with, told being what
// a consumer says. That may be too low, when its server lags behind: so the
// leader of a replicated stream is asked, if it may be.
func (r *replay) lastUntil(until time.Time, told uint64) (uint64, error) {
	if r.replicas <= 1 {
		return told, nil
	}
	after := until.Add(1)
	m, err := r.fromLeader(getRequest{StartTime: &after, NextFor: r.want.replay.filter})
	switch {
	case errors.Is(err, ErrPermission):
		return told, nil
	case err != nil:
		return 0, r.want.fault("stream", strconv.Quote(r.stream), "could not be read: "+cause(err), err)
	case m == nil:
		return math.MaxUint64, nil
	case !m.time.After(until): // an older server's answer
		return told, nil
	}
	return max(told, m.seq-1), nil
}

// fromLeader gets a message, or nil, from the stream's leader.
func (r *replay) fromLeader(req getRequest) (m *storedMsg, err error) {
	err = r.eng.call(r.intake, "STREAM.MSG.GET."+r.stream, func(ctx context.Context) (err error) {
		m, err = r.eng.store().get(ctx, r.stream, req)
		return err
	})
	return m, err
}

// create makes a consumer, again and again while the failure passes by itself.
func (r *replay) create(at startAt) (name string, info *jetstream.ConsumerInfo, err error) {
	name = r.newName()
	err = r.retry(r.intake, func(ctx context.Context) (err error) {
		info, err = r.createOnce(ctx, name, at)
		return err
	})
	if err != nil {
		return "", nil, r.want.fault("stream", strconv.Quote(r.stream), "could not be read: "+cause(err), err)
	}
	return name, info, nil
}

func (r *replay) newName() string {
	inbox := r.eng.nc.NewInbox()
	name := replayConsumer + inbox[strings.LastIndexByte(inbox, '.')+1:]
	r.owned = append(r.owned, name)
	return name
}

func (r *replay) createOnce(ctx context.Context, name string, at startAt) (info *jetstream.ConsumerInfo, err error) {
	cfg := jetstream.ConsumerConfig{
		Name:              name,
		AckPolicy:         jetstream.AckNonePolicy,
		InactiveThreshold: r.inactive,
		MemoryStorage:     true,
		Replicas:          1,
	}
	subject := "CONSUMER.CREATE." + r.stream + "." + name
	if filter := r.want.replay.filter; filter != ">" {
		cfg.FilterSubject = filter
		subject += "." + filter
	}
	at.apply(&cfg)
	err = r.eng.call(ctx, subject, func(ctx context.Context) error {
		c, err := r.eng.js.CreateConsumer(ctx, r.stream, cfg)
		if err == nil {
			info = c.CachedInfo()
		}
		return err
	})
	return info, err
}

// install goes on with a new consumer.
func (r *replay) install(name string, info *jetstream.ConsumerInfo) {
	p := r.eng.pool
	p.mu.Lock()
	r.consumer, r.seqHere = name, 0
	r.limits = pullLimits{info.Config.MaxRequestBatch, info.Config.MaxRequestMaxBytes, info.Config.MaxRequestExpires}
	r.pulls, r.outstanding = r.pulls[:0], 0
	r.doubt, r.verify, r.pulling = false, false, !r.stopping
	r.heard = r.eng.now()
	next := r.plan(r.heard)
	p.mu.Unlock()
	r.pull(next)
}

// replace makes a consumer that goes on behind the last message received, however
// long that takes. It returns what does not pass by itself.
func (r *replay) replace() error {
	missing := 0
	pause := 100 * time.Millisecond
	for tries := 0; ; pause = min(2*pause, 2*time.Second) {
		if err := r.awaitConnection(); err != nil || r.intake.Err() != nil {
			return err
		}
		if !r.eng.alive() {
			r.eng.reconnect()
			if !wait(r.intake, pause) {
				return nil
			}
			continue
		}
		limited, cancel := context.WithTimeout(r.intake, patience(tries))
		err := r.replaceOnce(limited)
		cancel()
		tries++
		switch {
		case err == nil || r.intake.Err() != nil:
			r.clear("replay")
			return nil
		case errors.Is(err, ErrStreamDeleted), errors.Is(err, ErrPermission):
			return r.want.fault("stream", strconv.Quote(r.stream), cause(err), err)
		case hasCode(err, codeStreamNotFound):
			if missing++; missing == replayMisses {
				return r.want.fault("stream", strconv.Quote(r.stream), cause(ErrStreamDeleted), ErrStreamDeleted)
			}
		case !passes(err):
			return r.want.fault("stream", strconv.Quote(r.stream), "could not be read: "+cause(err), err)
		default:
			missing = 0
		}
		r.trouble("replay", err)
		if !wait(r.intake, pause) {
			return nil
		}
	}
}

func (r *replay) replaceOnce(ctx context.Context) error {
	var created time.Time
	err := r.eng.call(ctx, "STREAM.INFO."+r.stream, func(ctx context.Context) error {
		s, err := r.eng.js.Stream(ctx, r.stream)
		if err == nil {
			created = s.CachedInfo().Created
		}
		return err
	})
	if err != nil {
		return err
	}
	if !created.Equal(r.created) {
		return fmt.Errorf("%w and created again", ErrStreamDeleted)
	}
	p := r.eng.pool
	p.mu.Lock()
	next := r.received + 1
	p.mu.Unlock()
	name := r.newName()
	info, err := r.createOnce(ctx, name, startAt{seq: next})
	if err != nil {
		return err
	}
	r.install(name, info)
	r.clean(name)
	return nil
}

// verifyEnd asks the stream's leader whether there is more up to the end, behind
// the last message received. What a consumer says of it may be wrong: its server
// may lag behind the leader, and what it counted may be deleted.
func (r *replay) verifyEnd(received uint64) error {
	p := r.eng.pool
	p.mu.Lock()
	r.verify = false
	p.mu.Unlock()
	m, err := r.fromLeader(getRequest{Seq: received + 1, NextFor: r.want.replay.filter})
	if errors.Is(err, ErrPermission) {
		return r.want.fault("stream", strconv.Quote(r.stream), cause(err), err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case r.received != received:
	case err != nil:
		r.distrust() // the connection or the leader is in trouble
	case m == nil || m.seq > r.end:
		r.complete = true
	default:
		r.distrust()
	}
	return nil
}

// close ends the subscription and deletes the consumers.
func (r *replay) close() {
	p := r.eng.pool
	p.mu.Lock()
	r.pulling, r.consumer = false, ""
	p.mu.Unlock()
	if r.joined != nil {
		r.inlet.Unsubscribe()
		close(r.closing)
		<-r.joined
	}
	r.clean("")
}

// clean deletes the replay's consumers but one. What cannot be deleted in time
// expires by itself.
func (r *replay) clean(keep string) {
	ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
	defer cancel()
	var left []string
	for _, name := range r.owned {
		if name == keep {
			left = append(left, name)
			continue
		}
		for tries := 0; ; tries++ {
			if !r.eng.nc.IsConnected() {
				left = append(left, name)
				break
			}
			limited, cancel := context.WithTimeout(ctx, patience(tries))
			err := r.eng.call(limited, "CONSUMER.DELETE."+r.stream+"."+name, func(ctx context.Context) error {
				return r.eng.js.DeleteConsumer(ctx, r.stream, name)
			})
			cancel()
			if err == nil || hasCode(err, codeConsumerNotFound) || hasCode(err, codeStreamNotFound) {
				break
			}
			if !passes(err) || keep != "" || !wait(ctx, 100*time.Millisecond) {
				left = append(left, name)
				break
			}
		}
	}
	r.owned = left
}

// awaitConnection waits until the connection is up or the intake has ended.
func (r *replay) awaitConnection() error {
	for !r.eng.nc.IsConnected() {
		if r.eng.nc.IsClosed() {
			return r.want.fault("", "", cause(ErrConnectionClosed), ErrConnectionClosed)
		}
		if !wait(r.intake, 50*time.Millisecond) {
			return nil
		}
	}
	return nil
}

// unlessEnded leaves out what only says that the intake has ended.
func (r *replay) unlessEnded(err error) error {
	if r.intake.Err() != nil {
		return nil
	}
	return err
}

// onAsyncError ends the replay when it lacks a permission.
func (r *replay) onAsyncError(_ *nats.Subscription, err error) {
	denied := permissionError(err)
	if denied == nil {
		return
	}
	p := r.eng.pool
	p.mu.Lock()
	pulls := r.eng.apiPrefix + "CONSUMER.MSG.NEXT." + r.stream + "." + r.consumer
	mine := r.inbox != "" && (denied.Subject == r.inbox+".*" || denied.Subject == pulls)
	p.mu.Unlock()
	if mine {
		r.halt(r.want.fault(denied.Operation, strconv.Quote(denied.Subject), "permission denied by the server", denied))
	}
}
