package natsx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// StreamConflictError is an existing stream that cannot be changed to the description.
// Nothing was changed, unless a Reason says that the server did not apply an option. If it
// is too old for that, the error is also [ErrServerTooOld]. It matches
// [ErrStreamConflict].
type StreamConflictError struct {
	Stream string       // its name
	Diffs  []StreamDiff // every difference at fault, in the order of the setters' declaration
	Err    error        // the server's refusal, nil if natsx refused the change
}

// StreamDiff is one option of a stream that differs from the description.
type StreamDiff struct {
	Field  string // the option, by its setter's name in lower camel case
	Have   string // its value in the existing stream
	Want   string // its value as described
	Reason string // why it is not changed, empty if the server's refusal says so
}

// Error lists the differences on one line.
func (e *StreamConflictError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "natsx: stream %q exists with other settings: ", e.Stream)
	for i, d := range e.Diffs {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%s is %s, not %s", d.Field, d.Have, d.Want)
		if d.Reason != "" {
			b.WriteString(": " + d.Reason)
		}
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

// Unwrap returns [ErrStreamConflict] and the server's refusal.
func (e *StreamConflictError) Unwrap() []error {
	if e.Err == nil {
		return []error{ErrStreamConflict}
	}
	return []error{ErrStreamConflict, e.Err}
}

// Ensure creates the stream as described, or updates the options of an existing stream
// that are set and differ; all others are unchanged. [Stream] documents the defaults. It
// is idempotent, and several processes may call it at the same time.
//
// Processes that change a stream at the same time do so one after another, so that no
// change is lost. To that end Ensure creates a consumer named natsx-ensure on the stream,
// which receives no messages, and deletes it again. If that is not possible, as on a work
// queue or without the permission, it reads the stream again for a few tenths of a second
// and repeats a change that was lost.
//
// A change that the server does not allow, or a lower limit that would delete stored
// messages, is refused with a [*StreamConflictError], which matches [ErrStreamConflict];
// nothing is changed then.
//
// Every fault of the description is returned before the first request; see
// [StreamSpec.Validate]. Transient failures (a server restart, a leader election, a lost
// answer) are retried until ctx ends, whose error is then in the chain, and logged once to
// [slog.Default]. A server without JetStream cannot be distinguished from one that starts,
// so give ctx a deadline. The error is [ErrConnectionClosed] if the connection was closed,
// [ErrPermission] if a permission is missing; any other refusal of the server is returned
// at once with its [*jetstream.APIError]. The stream is logged at info level: found,
// created or changed.
//
// The stream is made in the JetStream of nc's account, unless [StreamSpec.Domain] or
// [StreamSpec.APIPrefix] names another one.
func (s StreamSpec) Ensure(ctx context.Context, nc *nats.Conn) error {
	if err := s.Validate(); err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("natsx: stream %q: %w", s.name, err)
	}
	return s.ensure(ctx, newAPI(nc, js), slog.Default())
}

// ensure is Ensure for a description that was validated, with another logger. a is used
// unless the description names another JetStream.
func (s StreamSpec) ensure(ctx context.Context, a *api, log *slog.Logger) error {
	return s.ensureBy(ctx, a, log, func(_ *api, policy retry) retry { return policy })
}

// ensureBy is ensure with its policy of retries changed by change.
func (s StreamSpec) ensureBy(ctx context.Context, a *api, log *slog.Logger, change func(*api, retry) retry) error {
	if s.js != (apiChoice{}) {
		js, err := s.js.jetStream(a.nc)
		if err != nil {
			return fmt.Errorf("natsx: stream %q: %w", s.name, err)
		}
		a = newAPI(a.nc, js)
	}
	e := &ensuring{StreamSpec: s, api: a, lock: streamLock{api: a, stream: s.name}}
	tries := 0
	policy := change(a, retry{told: func(err error) {
		if tries++; tries == 3 { // earlier failures may be caused by other processes that start
			log.Warn("natsx: stream cannot be ensured, trying again", "stream", s.name, "error", err)
		}
	}})
	for unchanged := 0; ; {
		e.changed = false
		err := e.once(ctx, policy)
		var overtaken *overtakenError
		if errors.As(err, &overtaken) {
			if err = overtaken.err; wait(ctx, rand.N(settlePause)) {
				continue
			}
		}
		if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			return fmt.Errorf("%w: %w", err, ctx.Err())
		}
		if err != nil {
			return err
		}
		if !e.unlocked {
			break
		}
		// Another process may write over it what it has read before: see that it stays.
		if unchanged++; e.changed {
			unchanged = 0
		}
		if unchanged == settledLooks || !wait(ctx, settlePause/2+rand.N(settlePause)) {
			break
		}
	}
	e.report.log(log)
	return nil
}

const (
	// settledLooks is how often a change that was made without a lock must be seen to
	// stay, after pauses of settlePause.
	settledLooks = 3
	settlePause  = 100 * time.Millisecond
)

// ensuring is one run of ensure.
type ensuring struct {
	StreamSpec
	api      *api
	lock     streamLock
	changed  bool                    // by the last attempt
	unlocked bool                    // a change was made without the lock
	before   *jetstream.StreamConfig // when a change was last refused
	report   streamReport            // of what was done
}

// overtakenError is a change that was refused or did not come out as it was made,
// perhaps since somebody else had changed the stream meanwhile.
type overtakenError struct{ err error }

func (e *overtakenError) Error() string { return e.err.Error() }

// judge is the end of a change of a stream that was as told before it. A failure counts
// when it is the same once more.
func (e *ensuring) judge(before *jetstream.StreamConfig, err error) error {
	known := e.before
	if e.before = before; err == nil || known != nil && reflect.DeepEqual(known, before) {
		return err
	}
	return &overtakenError{err}
}

// request makes one request about the stream.
func (e *ensuring) request(ctx context.Context, verb, operation string, do func(context.Context) (jetstream.Stream, error)) (stream jetstream.Stream, err error) {
	err = e.api.once(ctx, operation+"."+e.name, func(ctx context.Context) error {
		stream, err = do(ctx)
		return err
	})
	if err != nil {
		err = closedCause(err)
		return nil, failure(fmt.Sprintf("%s stream %q: %s", verb, e.name, cause(err)), err)
	}
	return stream, nil
}

func (e *ensuring) lookUp(ctx context.Context) (jetstream.Stream, error) {
	return e.request(ctx, "look up", "STREAM.INFO", func(ctx context.Context) (jetstream.Stream, error) {
		return e.api.js.Stream(ctx, e.name)
	})
}

// once brings the stream to what was described. What another process does between its
// requests ends in an error that passes, and the next attempt sees it.
func (e *ensuring) once(ctx context.Context, policy retry) error {
	var stream jetstream.Stream
	differs := false
	look := func(ctx context.Context) (err error) {
		stream, err = e.lookUp(ctx)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			differs = false
			return e.create(ctx)
		}
		if err == nil {
			differs, err = e.compare(ctx, stream)
		}
		return err
	}
	if err := policy.do(ctx, look); err != nil || !differs {
		return err
	}
	locked := e.lock.take(ctx, &stream.CachedInfo().Config)
	if locked {
		defer e.lock.release(ctx)
	}
	return policy.do(ctx, func(ctx context.Context) error {
		if err := look(ctx); err != nil || !differs {
			return err
		}
		return e.update(ctx, stream, locked && e.lock.valid())
	})
}

func (e *ensuring) create(ctx context.Context) error {
	cfg := jetstream.StreamConfig{Name: e.name}
	e.apply(&cfg)
	if e.letters {
		cfg.Discard = jetstream.DiscardNew
	}
	stream, err := e.request(ctx, "create", "STREAM.CREATE", func(ctx context.Context) (jetstream.Stream, error) {
		return e.api.js.CreateStream(ctx, cfg)
	})
	if hasCode(err, codeSubjectOverlap) {
		if taken := e.taken(ctx, cfg.Subjects); taken != "" {
			return failure(fmt.Sprintf("create stream %q: %s", e.name, taken), err)
		}
	}
	if old := e.tooOld(err, e.api.nc.ConnectedServerVersion()); old != nil {
		return old
	}
	if err != nil {
		return err
	}
	e.report = streamReport{did: "created", info: stream.CachedInfo()}
	return e.verify(stream.CachedInfo().Config, e.api.nc.ConnectedServerVersion())
}

// compare reports whether the stream is to be changed. What must not be changed is a
// [*StreamConflictError].
func (e *ensuring) compare(ctx context.Context, stream jetstream.Stream) (differs bool, err error) {
	info := stream.CachedInfo()
	next := info.Config
	e.apply(&next)
	diffs := e.differences(info.Config, next)
	if len(diffs) == 0 {
		if e.report.did == "" {
			e.report = streamReport{did: "found", info: info}
		}
		return false, nil
	}
	if next.MaxMsgsPerSubject > 0 && slices.ContainsFunc(diffs, func(d StreamDiff) bool { return d.Field == "maxMsgsPerSubject" }) {
		_, err := e.request(ctx, "look up", "STREAM.INFO", func(ctx context.Context) (jetstream.Stream, error) {
			info, err = stream.Info(ctx, jetstream.WithSubjectFilter(">"))
			return stream, err
		})
		if err != nil {
			return true, err
		}
	}
	if refused := refuse(diffs, info, next); len(refused) > 0 {
		return true, &StreamConflictError{Stream: e.name, Diffs: refused}
	}
	return true, nil
}

// update changes a stream that was compared, and reads back what became of it.
func (e *ensuring) update(ctx context.Context, stream jetstream.Stream, locked bool) error {
	have := stream.CachedInfo().Config
	next := have
	e.apply(&next)
	stream, err := e.request(ctx, "update", "STREAM.UPDATE", func(ctx context.Context) (jetstream.Stream, error) {
		return e.api.js.UpdateStream(ctx, next)
	})
	if old := e.tooOld(err, e.api.nc.ConnectedServerVersion()); old != nil {
		return old
	}
	var refusal *jetstream.APIError
	if errors.As(err, &refusal) && !transient(err) {
		diffs := e.differences(have, next)
		if hasCode(err, codeSubjectOverlap) {
			for i := range diffs {
				if diffs[i].Field == "subjects" {
					diffs[i].Reason = e.taken(ctx, next.Subjects)
				}
			}
		}
		return e.judge(&have, &StreamConflictError{Stream: e.name, Diffs: diffs, Err: refusal})
	}
	if err != nil {
		return err
	}
	e.changed, e.unlocked = true, e.unlocked || !locked
	e.report = streamReport{did: "changed", info: stream.CachedInfo(), diffs: e.differences(have, next)}
	return e.judge(&have, e.verify(stream.CachedInfo().Config, e.api.nc.ConnectedServerVersion()))
}

// tooOld is the error of a server that refused a configuration, since it does not know
// an option that was set, or nil. An older one drops what it does not know.
func (s StreamSpec) tooOld(refusal error, version string) error {
	if !hasCode(refusal, codeInvalidJSON) {
		return nil
	}
	var old []string
	for _, f := range streamFields {
		if minor := neededMinor[f.name]; s.set&f.opt != 0 && minor > 0 && olderThan(version, 2, minor) {
			old = append(old, f.name+" "+needs(minor, version))
		}
	}
	if len(old) == 0 {
		return nil
	}
	return failure(fmt.Sprintf("stream %q: %s", s.name, strings.Join(old, "; ")), ErrServerTooOld, ErrStreamConflict, refusal)
}

func needs(minor int, version string) string {
	return fmt.Sprintf("needs nats-server 2.%d, this is %s", minor, version)
}

// taken names the other stream that has one of the subjects, or nothing when it cannot
// be found out.
func (e *ensuring) taken(ctx context.Context, subjects []string) string {
	for _, subject := range subjects {
		names, _ := e.api.streamNames(ctx, subject)
		for _, name := range names {
			if name == e.name {
				continue
			}
			its := ""
			if info, err := e.api.streamInfo(ctx, name); err == nil {
				for _, s := range info.Config.Subjects {
					if subjectsOverlap(s, subject) {
						its = fmt.Sprintf(", which has %q", s)
						break
					}
				}
			}
			return fmt.Sprintf("subject %q overlaps with stream %q%s: a subject belongs to one stream, so take it from one of the two", subject, name, its)
		}
	}
	return ""
}

// streamReport is what was done with a stream, for the log.
type streamReport struct {
	did   string
	info  *jetstream.StreamInfo
	diffs []StreamDiff // of one that was changed
}

func (r streamReport) log(log *slog.Logger) {
	args := streamAttrs(&r.info.Config, "messages", r.info.State.Msgs)
	if len(r.diffs) > 0 {
		args = append(args, "changes", changes(r.diffs))
	}
	log.Info("natsx: stream "+r.did, args...)
}

// verify compares the server's result with the description: an older server ignores
// options that it does not know.
func (s StreamSpec) verify(got jetstream.StreamConfig, version string) error {
	next := got
	s.apply(&next)
	diffs := s.differences(got, next)
	if len(diffs) == 0 {
		return nil
	}
	var tooOld []string
	for i := range diffs {
		d := &diffs[i]
		d.Reason = "the server did not apply it"
		minor := neededMinor[d.Field]
		if minor == 0 {
			continue
		}
		d.Reason = needs(minor, version)
		if !olderThan(version, 2, minor) {
			d.Reason += ", and that of the stream seems to be older"
		}
		tooOld = append(tooOld, d.Field+" "+d.Reason)
	}
	conflict := &StreamConflictError{Stream: s.name, Diffs: diffs}
	if len(tooOld) == 0 {
		return conflict
	}
	return failure(fmt.Sprintf("stream %q: %s", s.name, strings.Join(tooOld, "; ")), ErrServerTooOld, conflict)
}

// neededMinor is the first version of the server, 2.x, that knows an option, where not
// all do that natsx works with.
var neededMinor = map[string]int{"allowMsgTTL": 11, "allowMsgSchedules": 12, "allowAtomicPublish": 12, "allowBatchPublish": 14}

// refuse returns the diffs that the server does not allow, or that would delete messages,
// each with its reason.
func refuse(diffs []StreamDiff, info *jetstream.StreamInfo, next jetstream.StreamConfig) []StreamDiff {
	have, state := info.Config, info.State
	const fixed = "the server cannot change it"
	var overMsgs, overBytes string
	if next.Discard == jetstream.DiscardOld {
		if next.MaxMsgs > 0 && state.Msgs > uint64(next.MaxMsgs) {
			overMsgs = fmt.Sprintf("would delete %d of %d messages", state.Msgs-uint64(next.MaxMsgs), state.Msgs)
		}
		if next.MaxBytes > 0 && state.Bytes > uint64(next.MaxBytes) {
			overBytes = fmt.Sprintf("would delete messages: %d bytes are stored", state.Bytes)
		}
	}
	reason := func(field string) string {
		switch field {
		case "subjects":
			if have.Mirror != nil {
				return fmt.Sprintf("the stream is a mirror of %q", have.Mirror.Name)
			}
		case "storage":
			return fixed
		case "retention":
			if have.Retention == jetstream.WorkQueuePolicy || next.Retention == jetstream.WorkQueuePolicy {
				return fixed
			}
			if next.Retention == jetstream.InterestPolicy && state.Msgs > 0 {
				return fmt.Sprintf("would delete those of %d messages without interest", state.Msgs)
			}
		case "maxMsgs":
			return overMsgs
		case "maxBytes":
			return overBytes
		case "discard":
			// With DiscardNew the stream may be above a limit that was lowered.
			return cmp.Or(overMsgs, overBytes)
		case "maxMsgsPerSubject":
			if next.MaxMsgsPerSubject <= 0 {
				break
			}
			var delete uint64
			for _, n := range state.Subjects {
				delete += n - min(n, uint64(next.MaxMsgsPerSubject))
			}
			if delete > 0 {
				return fmt.Sprintf("would delete %d of %d messages", delete, state.Msgs)
			}
		case "maxAge":
			if age := info.TimeStamp.Sub(state.FirstTime); next.MaxAge > 0 && state.Msgs > 0 && age > next.MaxAge {
				return fmt.Sprintf("would delete messages: the oldest is %s old", age.Round(time.Millisecond))
			}
		case "allowRollup", "allowMsgSchedules":
			if have.DenyPurge {
				return "the stream has DenyPurge, which cannot be disabled"
			}
		}
		return ""
	}
	var refused []StreamDiff
	for _, d := range diffs {
		if d.Reason = reason(d.Field); have.Sealed {
			d.Reason = "the stream is sealed"
		}
		if d.Reason != "" {
			refused = append(refused, d)
		}
	}
	return refused
}

// apply writes the options that were set into cfg.
func (s StreamSpec) apply(cfg *jetstream.StreamConfig) {
	for _, f := range streamFields {
		if s.set&f.opt != 0 {
			f.write(s, cfg)
		}
	}
	// The server shortens the default duplicate window to the MaxAge of a new stream, but
	// refuses an update that leaves it longer.
	if s.set&optMaxAge != 0 && s.set&optDedupWindow == 0 && s.maxAge > 0 {
		cfg.Duplicates = min(cfg.Duplicates, s.maxAge)
	}
}

// differences lists the options that are set and differ.
func (s StreamSpec) differences(have, want jetstream.StreamConfig) []StreamDiff {
	var diffs []StreamDiff
	for _, f := range streamFields {
		if s.set&f.opt == 0 {
			continue
		}
		if h, w := f.text(have), f.text(want); h != w {
			diffs = append(diffs, StreamDiff{Field: f.name, Have: h, Want: w})
		}
	}
	return diffs
}

// streamField sets an option in a configuration, and formats its value. Equivalent values
// have the same format.
type streamField struct {
	opt   streamOption
	name  string
	write func(StreamSpec, *jetstream.StreamConfig)
	text  func(jetstream.StreamConfig) string
}

// streamFields are all options, in the order of the setters.
var streamFields = []streamField{
	{optSubjects, "subjects", func(s StreamSpec, c *jetstream.StreamConfig) { c.Subjects = s.subjectList() },
		func(c jetstream.StreamConfig) string {
			return fmt.Sprintf("%q", slices.Sorted(slices.Values(c.Subjects)))
		}},
	{optDescription, "description", func(s StreamSpec, c *jetstream.StreamConfig) { c.Description = s.description },
		func(c jetstream.StreamConfig) string { return strconv.Quote(c.Description) }},
	{optRetention, "retention", func(s StreamSpec, c *jetstream.StreamConfig) { c.Retention = s.retention },
		func(c jetstream.StreamConfig) string { return c.Retention.String() }},
	{optStorage, "storage", func(s StreamSpec, c *jetstream.StreamConfig) { c.Storage = s.storage },
		func(c jetstream.StreamConfig) string { return c.Storage.String() }},
	{optDiscard, "discard", func(s StreamSpec, c *jetstream.StreamConfig) { c.Discard = s.discard },
		func(c jetstream.StreamConfig) string { return c.Discard.String() }},
	{optCompression, "compression", func(s StreamSpec, c *jetstream.StreamConfig) { c.Compression = s.compression },
		func(c jetstream.StreamConfig) string { return c.Compression.String() }},
	{optMaxAge, "maxAge", func(s StreamSpec, c *jetstream.StreamConfig) { c.MaxAge = s.maxAge },
		func(c jetstream.StreamConfig) string {
			if c.MaxAge == 0 {
				return unlimited
			}
			return c.MaxAge.String()
		}},
	{optMaxBytes, "maxBytes", func(s StreamSpec, c *jetstream.StreamConfig) { c.MaxBytes = s.maxBytes },
		func(c jetstream.StreamConfig) string { return limitText(c.MaxBytes) }},
	{optMaxMsgs, "maxMsgs", func(s StreamSpec, c *jetstream.StreamConfig) { c.MaxMsgs = s.maxMsgs },
		func(c jetstream.StreamConfig) string { return limitText(c.MaxMsgs) }},
	{optMaxMsgsPerSubject, "maxMsgsPerSubject", func(s StreamSpec, c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = s.maxMsgsPerSubject },
		func(c jetstream.StreamConfig) string { return limitText(c.MaxMsgsPerSubject) }},
	{optMaxMsgSize, "maxMsgSize", func(s StreamSpec, c *jetstream.StreamConfig) { c.MaxMsgSize = s.maxMsgSize },
		func(c jetstream.StreamConfig) string { return limitText(int64(c.MaxMsgSize)) }},
	{optReplicas, "replicas", func(s StreamSpec, c *jetstream.StreamConfig) { c.Replicas = s.replicas },
		func(c jetstream.StreamConfig) string { return strconv.Itoa(c.Replicas) }},
	{optDedupWindow, "dedupWindow", func(s StreamSpec, c *jetstream.StreamConfig) { c.Duplicates = s.dedupWindow },
		func(c jetstream.StreamConfig) string { return c.Duplicates.String() }},
	streamFlag(optAllowMsgTTL, "allowMsgTTL", func(c *jetstream.StreamConfig) *bool { return &c.AllowMsgTTL }),
	streamFlag(optAllowMsgSchedules, "allowMsgSchedules", func(c *jetstream.StreamConfig) *bool { return &c.AllowMsgSchedules }),
	streamFlag(optAllowAtomicPublish, "allowAtomicPublish", func(c *jetstream.StreamConfig) *bool { return &c.AllowAtomicPublish }),
	streamFlag(optAllowBatchPublish, "allowBatchPublish", func(c *jetstream.StreamConfig) *bool { return &c.AllowBatchPublish }),
	streamFlag(optAllowDirect, "allowDirect", func(c *jetstream.StreamConfig) *bool { return &c.AllowDirect }),
	streamFlag(optAllowRollup, "allowRollup", func(c *jetstream.StreamConfig) *bool { return &c.AllowRollup }),
	streamFlag(optDenyDelete, "denyDelete", func(c *jetstream.StreamConfig) *bool { return &c.DenyDelete }),
	streamFlag(optDenyPurge, "denyPurge", func(c *jetstream.StreamConfig) *bool { return &c.DenyPurge }),
}

// streamFlag is an option that can only be enabled.
func streamFlag(opt streamOption, name string, at func(*jetstream.StreamConfig) *bool) streamField {
	return streamField{opt, name, func(_ StreamSpec, c *jetstream.StreamConfig) { *at(c) = true },
		func(c jetstream.StreamConfig) string { return strconv.FormatBool(*at(&c)) }}
}

const unlimited = "unlimited"

func limitText(n int64) string {
	if n <= 0 {
		return unlimited
	}
	return strconv.FormatInt(n, 10)
}
