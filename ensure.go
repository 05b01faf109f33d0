package natsx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// StreamConflictError is an existing stream that cannot be changed to the description.
// Nothing was changed, unless a Reason says that the server did not apply an option, since
// it is too old. It matches [ErrStreamConflict].
type StreamConflictError struct {
	Stream string
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
// at once with its [*jetstream.APIError].
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
	return s.ensureBy(ctx, a, log, func(_ *api, r retry, ctx context.Context, try func(context.Context) error) error {
		return r.do(ctx, try)
	})
}

// ensureBy is ensure with do in place of retry.do.
func (s StreamSpec) ensureBy(ctx context.Context, a *api, log *slog.Logger, do func(*api, retry, context.Context, func(context.Context) error) error) error {
	if s.js != (apiChoice{}) {
		js, err := s.js.jetStream(a.nc)
		if err != nil {
			return fmt.Errorf("natsx: stream %q: %w", s.name, err)
		}
		a = newAPI(a.nc, js)
	}
	tries := 0
	told := func(err error) {
		if tries++; tries == 3 { // earlier failures may be caused by other processes that start
			log.Warn("natsx: stream cannot be ensured, trying again", "stream", s.name, "error", err)
		}
	}
	err := do(a, retry{told: told}, ctx, func(ctx context.Context) error { return s.ensureOnce(ctx, a) })
	if err != nil && ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		return fmt.Errorf("%w: %w", err, ctx.Err())
	}
	return err
}

// ensureOnce is one attempt of ensure. If another process interferes between its requests,
// the error is transient, and the next attempt sees the result.
func (s StreamSpec) ensureOnce(ctx context.Context, a *api) error {
	js := a.js
	var stream jetstream.Stream
	request := func(verb, operation string, do func(context.Context) (jetstream.Stream, error)) error {
		err := a.once(ctx, operation+"."+s.name, func(ctx context.Context) error {
			got, err := do(ctx)
			if err == nil {
				stream = got
			}
			return err
		})
		if err == nil {
			return nil
		}
		err = closedCause(err)
		return failure(fmt.Sprintf("%s stream %q: %s", verb, s.name, cause(err)), err)
	}

	err := request("look up", "STREAM.INFO", func(ctx context.Context) (jetstream.Stream, error) {
		return js.Stream(ctx, s.name)
	})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		cfg := jetstream.StreamConfig{Name: s.name}
		s.apply(&cfg)
		if s.letters {
			cfg.Discard = jetstream.DiscardNew
		}
		err = request("create", "STREAM.CREATE", func(ctx context.Context) (jetstream.Stream, error) {
			return js.CreateStream(ctx, cfg)
		})
		if err != nil {
			return err
		}
		return s.verify(stream.CachedInfo().Config)
	}
	if err != nil {
		return err
	}

	info := stream.CachedInfo()
	next := info.Config
	s.apply(&next)
	diffs := s.differences(info.Config, next)
	if len(diffs) == 0 {
		return nil
	}
	if next.MaxMsgsPerSubject > 0 && slices.ContainsFunc(diffs, func(d StreamDiff) bool { return d.Field == "maxMsgsPerSubject" }) {
		existing := stream
		err := request("look up", "STREAM.INFO", func(ctx context.Context) (jetstream.Stream, error) {
			info, err = existing.Info(ctx, jetstream.WithSubjectFilter(">"))
			return existing, err
		})
		if err != nil {
			return err
		}
	}
	if refused := refuse(diffs, info, next); len(refused) > 0 {
		return &StreamConflictError{Stream: s.name, Diffs: refused}
	}
	err = request("update", "STREAM.UPDATE", func(ctx context.Context) (jetstream.Stream, error) {
		return js.UpdateStream(ctx, next)
	})
	var refusal *jetstream.APIError
	if errors.As(err, &refusal) && !transient(err) {
		return &StreamConflictError{Stream: s.name, Diffs: diffs, Err: refusal}
	}
	if err != nil {
		return err
	}
	return s.verify(stream.CachedInfo().Config)
}

// verify compares the server's result with the description: an older server ignores
// options that it does not know.
func (s StreamSpec) verify(got jetstream.StreamConfig) error {
	next := got
	s.apply(&next)
	diffs := s.differences(got, next)
	if len(diffs) == 0 {
		return nil
	}
	for i := range diffs {
		diffs[i].Reason = "the server did not apply it"
	}
	return &StreamConflictError{Stream: s.name, Diffs: diffs}
}

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
