package natsx

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// OnDeadLetter adapts a function to a [Handler] for a route on a DLQ subject, for alerts
// or repair. A message that is not a dead letter is a permanent failure ([*DecodeError]
// with [ErrNotALetter]). If fn is nil, it returns nil, which validation reports as
// [ErrNoHandler].
//
// The route's acknowledgements do not remove letters from a DLQ stream with limits
// retention, so that they can still be listed and redriven.
func OnDeadLetter(fn func(ctx context.Context, l DeadLetter) error) Handler {
	if fn == nil {
		return nil
	}
	return func(ctx context.Context, m *Msg) error {
		if m == nil { // as in a unit test
			m = &Msg{}
		}
		l, err := parseLetter(m.Stream(), &storedMsg{subject: m.Subject, seq: m.Sequence(), time: m.Time(), header: m.Header, data: m.Data})
		if err != nil {
			return &DecodeError{Subject: m.Subject, ContentType: "dead letter", Err: err}
		}
		return fn(ctx, l)
	}
}

// DefaultMaxRedrives is the default of [DeadLetterQuery.MaxRedrives].
const DefaultMaxRedrives = 3

// letterOption is one bit for each setter, as option is for routes.
type letterOption uint32

const (
	optLetterDurable letterOption = 1 << iota
	optLetterReason
	optLetterSubject
	optLetterSequence
	optLetterWhere
	optLetterSince
	optLetterUntil
	optLetterLimit
	optLetterRate
	optLetterMaxRedrives
)

// DeadLetterQuery selects dead letters of one DLQ: by default all, and every filter narrows
// it. Like [RouteBuilder] it is a small comparable value whose setters return changed
// copies and never fail; if a setter is called twice, the last call wins. The terminals
// ([DeadLetterQuery.List], [DeadLetterQuery.Count], [DeadLetterQuery.Redrive],
// [DeadLetterQuery.Purge]) report every fault before the first request:
// [ErrInvalidSubject], [ErrInvalidName], [ErrOutOfRange] or [ErrOptionConflict].
//
// They also return [ErrNoStream] or [ErrAmbiguousStream] if not exactly one stream captures
// the DLQ subject, [ErrPermission], ctx's error, and errors of the server or the
// connection. Transient failures are retried for 30 s.
//
// A filter selects a message that is not a dead letter only if the message has the field
// that it compares.
//
// A terminal processes the messages that were stored when it began, in the order of the
// DLQ. It leaves nothing at the server; the server removes the consumer of a killed process
// within a minute.
type DeadLetterQuery struct {
	set letterOption

	subject  string
	durable  string
	reason   Reason
	original string
	since    instant
	until    instant
	limit    int

	sequences string // such as [7 12], in order
	where     *func(DeadLetter) bool

	rate        float64
	dryRun      bool
	maxRedrives int

	js apiChoice
}

// DeadLetters starts a query for the letters on a DLQ subject, which may have wildcards.
// Exactly one stream must capture it, else it is [ErrNoStream] or [ErrAmbiguousStream].
func DeadLetters(subject string) DeadLetterQuery { return DeadLetterQuery{subject: subject} }

// Durable selects the letters of one durable. The default is all.
func (q DeadLetterQuery) Durable(name string) DeadLetterQuery {
	q.set |= optLetterDurable
	q.durable = name
	return q
}

// Reason selects the letters with one reason. One that is not among the Reason constants is
// [ErrOutOfRange]. The default is all.
func (q DeadLetterQuery) Reason(r Reason) DeadLetterQuery {
	q.set |= optLetterReason
	q.reason = r
	return q
}

// Subject selects by the original's subject, with a filter that may have wildcards. The
// default is all.
func (q DeadLetterQuery) Subject(filter string) DeadLetterQuery {
	q.set |= optLetterSubject
	q.original = filter
	return q
}

// Sequence selects the letters with these sequences in the DLQ's stream
// ([DeadLetter.DLQSequence]), and reads no others. No sequence, and 0, are
// [ErrOutOfRange]. The default is all.
func (q DeadLetterQuery) Sequence(n ...uint64) DeadLetterQuery {
	q.set |= optLetterSequence
	seqs := slices.Compact(slices.Sorted(slices.Values(n)))
	q.sequences = fmt.Sprint(seqs) // a slice would not compare
	return q
}

// Where selects the letters for which fn returns true, after all other filters. It is
// called on the goroutine that reads; for what is no letter it is called with what is
// known of it. A query with it equals its own copies only. A nil fn is
// [ErrOutOfRange]. Default is all.
func (q DeadLetterQuery) Where(fn func(DeadLetter) bool) DeadLetterQuery {
	q.set |= optLetterWhere
	q.where = &fn
	return q
}

// Since selects what died at t or later, by [DeadLetter.Time], the clock of the host
// where it died. The zero time is [ErrOutOfRange]; default is no bound.
func (q DeadLetterQuery) Since(t time.Time) DeadLetterQuery {
	q.set |= optLetterSince
	q.since = instantOf(t)
	return q
}

// Until selects letters with a [DeadLetter.Time] before t. The zero time is
// [ErrOutOfRange], and a t that is not after Since is [ErrOptionConflict]; the default is
// no bound.
func (q DeadLetterQuery) Until(t time.Time) DeadLetterQuery {
	q.set |= optLetterUntil
	q.until = instantOf(t)
	return q
}

// Limit ends the query after n selected letters, at least 1; messages that are not letters
// do not count. Redrive and Purge count the letters that they redrive or delete: skipped
// letters and failures do not count. The default is no limit.
func (q DeadLetterQuery) Limit(n int) DeadLetterQuery {
	q.set |= optLetterLimit
	q.limit = n
	return q
}

// Rate limits Redrive and Purge to this number of letters per second, above zero. The
// default is no limit.
func (q DeadLetterQuery) Rate(perSecond float64) DeadLetterQuery {
	q.set |= optLetterRate
	q.rate = perSecond
	return q
}

// DryRun makes Redrive and Purge report what they would do, at full speed, without changing
// anything.
func (q DeadLetterQuery) DryRun() DeadLetterQuery {
	q.dryRun = true
	return q
}

// MaxRedrives limits how many times one message is redriven, at least 1, so that a message
// which always fails is not redriven for ever. The default is [DefaultMaxRedrives], 3.
func (q DeadLetterQuery) MaxRedrives(n int) DeadLetterQuery {
	q.set |= optLetterMaxRedrives
	q.maxRedrives = n
	return q
}

// Domain queries the JetStream of this domain. It excludes APIPrefix. The default is the
// JetStream of the connection's account.
func (q DeadLetterQuery) Domain(name string) DeadLetterQuery {
	q.js.hasDomain, q.js.domain = true, name
	return q
}

// APIPrefix queries a JetStream whose API another account exports with a prefix, such as
// "JS.ops.API". It excludes Domain.
func (q DeadLetterQuery) APIPrefix(prefix string) DeadLetterQuery {
	q.js.hasPrefix, q.js.prefix = true, prefix
	return q
}

func (q DeadLetterQuery) validate() error {
	var faults []error
	add := func(field, value, reason string, err error) {
		faults = append(faults, failure(fmt.Sprintf("dead letters of %q: %s %s: %s", q.subject, field, value, reason), err))
	}
	has := func(o letterOption) bool { return q.set&o != 0 }
	if reason := filterFault(q.subject); reason != "" {
		add("subject", strconv.Quote(q.subject), reason, ErrInvalidSubject)
	}
	if reason := nameFault(q.durable); has(optLetterDurable) && reason != "" {
		add("durable", strconv.Quote(q.durable), reason, ErrInvalidName)
	}
	if has(optLetterReason) && !slices.Contains(allReasons, q.reason) {
		add("reason", strconv.Quote(string(q.reason)), fmt.Sprintf("is none of %q", allReasons), ErrOutOfRange)
	}
	if has(optLetterSequence) && (q.sequences == "[]" || q.sequences == "[0]" || strings.HasPrefix(q.sequences, "[0 ")) {
		add("sequence", q.sequences, "needs sequences, which start at 1", ErrOutOfRange)
	}
	if has(optLetterWhere) && *q.where == nil {
		add("where", "nil", "needs a function", ErrOutOfRange)
	}
	if reason := filterFault(q.original); has(optLetterSubject) && reason != "" {
		add("original subject", strconv.Quote(q.original), reason, ErrInvalidSubject)
	}
	if has(optLetterSince) && q.since.time().IsZero() {
		add("since", "", "must not be the zero time", ErrOutOfRange)
	}
	if has(optLetterUntil) && q.until.time().IsZero() {
		add("until", "", "must not be the zero time", ErrOutOfRange)
	} else if has(optLetterSince) && has(optLetterUntil) && !q.since.time().Before(q.until.time()) {
		add("until", q.until.time().Format(time.RFC3339Nano), "is not after since", ErrOptionConflict)
	}
	if has(optLetterLimit) && q.limit < 1 {
		add("limit", strconv.Itoa(q.limit), "must be at least 1", ErrOutOfRange)
	}
	if has(optLetterRate) && (!(q.rate > 0) || math.IsInf(q.rate, 0)) {
		add("rate", strconv.FormatFloat(q.rate, 'g', -1, 64), "must be above zero and finite", ErrOutOfRange)
	}
	if has(optLetterMaxRedrives) && q.maxRedrives < 1 {
		add("maxRedrives", strconv.Itoa(q.maxRedrives), "must be at least 1", ErrOutOfRange)
	}
	q.js.faults(add)
	return errors.Join(faults...)
}

// selects reports whether the filters match l. An unset field of a message that is not a
// letter matches no filter.
func (q DeadLetterQuery) selects(l *DeadLetter) bool {
	has := func(o letterOption) bool { return q.set&o != 0 }
	switch {
	case has(optLetterDurable) && l.Durable != q.durable,
		has(optLetterReason) && l.Reason != q.reason,
		has(optLetterSubject) && (l.Subject == "" || !subjectMatches(q.original, l.Subject)),
		has(optLetterSince|optLetterUntil) && l.Time.IsZero(),
		has(optLetterSince) && l.Time.Before(q.since.time()),
		has(optLetterUntil) && !l.Time.Before(q.until.time()),
		has(optLetterWhere) && !(*q.where)(*l):
		return false
	}
	return true
}

// deadLetters is one run of a query.
type deadLetters struct {
	DeadLetterQuery
	api *api
	dlq *jetstream.StreamInfo
}

// open validates the query and finds the DLQ's stream.
func (q DeadLetterQuery) open(ctx context.Context, nc *nats.Conn) (*deadLetters, error) {
	if err := q.validate(); err != nil {
		return nil, err
	}
	js, err := q.js.jetStream(nc)
	fail := func(what string, causes ...error) (*deadLetters, error) {
		return nil, failure(fmt.Sprintf("dead letters of %q: %s", q.subject, what), causes...)
	}
	if err != nil {
		return fail(err.Error(), err)
	}
	d := &deadLetters{DeadLetterQuery: q, api: newAPI(nc, js)}
	var names []string
	err = retry{limit: readPatience}.do(ctx, func(ctx context.Context) (err error) {
		names, err = d.api.streamNames(ctx, q.subject)
		return err
	})
	switch {
	case err != nil:
		return fail(cause(err), err)
	case len(names) == 0:
		return fail("no stream has the subject", ErrNoStream)
	case len(names) > 1:
		return fail(fmt.Sprintf("several streams have the subject: %q", names), ErrAmbiguousStream)
	}
	if d.dlq, err = d.api.askStreamInfo(ctx, names[0]); err != nil {
		return fail(fmt.Sprintf("stream %q: %s", names[0], cause(err)), err)
	}
	return d, nil
}

// all yields the selected messages, without the limit. A [*LetterError] concerns one
// message; any other error is yielded last.
func (d *deadLetters) all(ctx context.Context, headersOnly bool) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		messages := d.named(ctx)
		if d.set&optLetterSequence == 0 {
			headersOnly = headersOnly && d.where == nil
			messages = readSpan(ctx, d.api, span{stream: d.dlq, filter: d.subject, last: d.dlq.State.LastSeq, headersOnly: headersOnly})
		}
		for m, err := range messages {
			if err != nil {
				yield(DeadLetter{}, err)
				return
			}
			l, err := parseLetter(d.dlq.Config.Name, m)
			if d.selects(&l) && !yield(l, err) {
				return
			}
		}
	}
}

// named yields the messages of the sequences that the query names.
func (d *deadLetters) named(ctx context.Context) iter.Seq2[*storedMsg, error] {
	return func(yield func(*storedMsg, error) bool) {
		for text := range strings.FieldsSeq(strings.Trim(d.sequences, "[]")) {
			seq, _ := strconv.ParseUint(text, 10, 64)
			m, err := d.api.get(ctx, d.dlq.Config.Name, getRequest{Seq: seq})
			if err != nil {
				yield(nil, err)
				return
			}
			if m != nil && seq <= d.dlq.State.LastSeq && subjectMatches(d.subject, m.subject) && !yield(m, nil) {
				return
			}
		}
	}
}

// limited yields what the query selects, until its limit of letters.
func (d *deadLetters) limited(ctx context.Context, headersOnly bool) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		letters := 0
		for l, err := range d.all(ctx, headersOnly) {
			if !yield(l, err) {
				return
			}
			if err == nil {
				letters++
			}
			if d.enough(letters) {
				return
			}
		}
	}
}

// enough reports whether so many letters are the limit.
func (d *deadLetters) enough(letters int) bool { return d.limit > 0 && letters >= d.limit }

// List yields the selected letters in the order of the DLQ, in constant memory. Each use
// of the sequence reads the DLQ again; a break ends it at once.
//
// A message that is not a dead letter is yielded with the known fields and a
// [*LetterError], which matches [ErrNotALetter], and the sequence goes on. Any other error
// is yielded last.
func (q DeadLetterQuery) List(ctx context.Context, nc *nats.Conn) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		d, err := q.open(ctx, nc)
		if err != nil {
			yield(DeadLetter{}, err)
			return
		}
		d.limited(ctx, false)(yield)
	}
}

// LetterCounts is the result of [DeadLetterQuery.Count].
type LetterCounts struct {
	Total   int           // letters
	Foreign int           // messages that are not letters, not in Total
	Groups  []LetterGroup // ordered by durable, then reason
}

// LetterGroup is the letters of one durable with one reason.
type LetterGroup struct {
	Durable string // that gave them up
	Reason  Reason // why
	Count   int    // how many letters
}

// Count counts the selected letters by durable and reason, without their payloads.
func (q DeadLetterQuery) Count(ctx context.Context, nc *nats.Conn) (LetterCounts, error) {
	var counts LetterCounts
	d, err := q.open(ctx, nc)
	if err != nil {
		return counts, err
	}
	groups := map[LetterGroup]int{}
	for l, err := range d.limited(ctx, true) {
		switch {
		case errors.Is(err, ErrNotALetter):
			counts.Foreign++
		case err != nil:
			return counts, err
		default:
			counts.Total++
			groups[LetterGroup{Durable: l.Durable, Reason: l.Reason}]++
		}
	}
	for g, n := range groups {
		g.Count = n
		counts.Groups = append(counts.Groups, g)
	}
	slices.SortFunc(counts.Groups, func(a, b LetterGroup) int {
		return cmp.Or(cmp.Compare(a.Durable, b.Durable), cmp.Compare(a.Reason, b.Reason))
	})
	return counts, nil
}

// Purge deletes the selected letters and returns how many it deleted. Letters that another
// purge or a redrive removes do not count. Messages that are not letters
// stay. For a pointer letter it also releases the original, if that was left unsettled for
// the letter: on a work queue it is deleted; on a stream with interest retention it is
// acknowledged for the durable that failed, so that it stays while another durable needs
// it. That needs the permission to publish to $JS.ACK.<stream>.<durable>.>.
//
// If it ends early, by ctx or an error, the letters deleted until then are gone. If the DLQ
// stream was recreated meanwhile, the error is [ErrStreamDeleted], and none of its letters
// are deleted. A DLQ stream with DenyDelete is [ErrBadDLQ].
func (q DeadLetterQuery) Purge(ctx context.Context, nc *nats.Conn) (int, error) {
	d, err := q.open(ctx, nc)
	if err != nil {
		return 0, err
	}
	if err := d.removable(); err != nil {
		return 0, err
	}
	pace := pacer{rate: d.rate}
	purged := 0
	for l, err := range d.all(ctx, true) {
		if errors.Is(err, ErrNotALetter) {
			continue
		}
		if err != nil {
			return purged, err
		}
		if !d.dryRun {
			if err := pace.wait(ctx); err != nil {
				return purged, failure(fmt.Sprintf("dead letters of %q: purge: %s", q.subject, cause(err)), err)
			}
			deleted, err := discardLetter(ctx, d.api, &l)
			if err != nil {
				return purged, &LetterError{Subject: l.DLQSubject, Stream: l.DLQStream, Sequence: l.DLQSequence, Err: err}
			}
			if !deleted {
				continue
			}
		}
		if purged++; d.enough(purged) {
			break
		}
	}
	return purged, nil
}

// removable returns an error if the DLQ denies deletion.
func (d *deadLetters) removable() error {
	c := d.dlq.Config
	if c.DenyDelete || c.Sealed || c.Mirror != nil {
		return failure(fmt.Sprintf("dead letters of %q: stream %q denies the deletion of messages", d.subject, c.Name), ErrBadDLQ)
	}
	return nil
}

// pacer spaces events evenly at a rate per second, 0 for no limit.
type pacer struct {
	rate float64
	next time.Time
}

func (p *pacer) wait(ctx context.Context) error {
	if p.rate > 0 {
		now := time.Now()
		if p.next.After(now) {
			wait(ctx, p.next.Sub(now))
			now = p.next
		}
		p.next = now.Add(time.Duration(min(float64(time.Second)/p.rate, float64(math.MaxInt64/2))))
	}
	return ctx.Err()
}
