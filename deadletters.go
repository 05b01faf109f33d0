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

// OnDeadLetter adapts a function to a [Handler] for a route on a DLQ subject, for
// alerts or repair. A message that is no dead letter is a permanent failure
// ([*DecodeError] with [ErrNotALetter]). A nil fn is a nil Handler, which
// validation refuses.
//
// The route's acknowledgements do not remove letters from a DLQ stream with limits
// retention, so that they can still be listed and redriven.
func OnDeadLetter(fn func(ctx context.Context, l DeadLetter) error) Handler {
	if fn == nil {
		return nil
	}
	return func(ctx context.Context, m *Msg) error {
		l, err := parseLetter(m.Stream(), &storedMsg{subject: m.Subject, seq: m.Sequence(), time: m.Time(), header: m.Header, data: m.Data})
		if err != nil {
			return &DecodeError{Subject: m.Subject, ContentType: "dead letter", Err: err}
		}
		return fn(ctx, l)
	}
}

// DefaultMaxRedrives is how often one message is redriven at most.
const DefaultMaxRedrives = 3

// letterOption is one bit for each setter, as option is for routes.
type letterOption uint32

const (
	optLetterDurable letterOption = 1 << iota
	optLetterReason
	optLetterSubject
	optLetterSince
	optLetterUntil
	optLetterLimit
	optLetterRate
	optLetterMaxRedrives
	optLetterDomain
	optLetterAPIPrefix
)

// DeadLetterQuery selects dead letters of one DLQ: all of them, and every filter
// narrows it. Like a route's builder it is a small comparable value whose setters
// return changed copies and never fail, and of a setter called twice the last call
// holds. The terminals ([DeadLetterQuery.List], [DeadLetterQuery.Count],
// [DeadLetterQuery.Redrive], [DeadLetterQuery.Purge]) report every fault before they
// ask the server anything: [ErrInvalidSubject], [ErrInvalidName], [ErrOutOfRange] or
// [ErrOptionConflict].
//
// They also return [ErrNoStream] and [ErrAmbiguousStream] when not exactly one stream
// has the DLQ subject, [ErrPermission], ctx's error, and errors of the server or the
// connection. What is transient is tried again for half a minute.
//
// A message that is no dead letter passes a filter only by what is known of it.
//
// A terminal sees what was stored when it began, in the order of the DLQ.
// Nothing is left at the server, but for what a killed process was reading with,
// which goes by itself within a minute.
type DeadLetterQuery struct {
	set letterOption

	subject  string
	durable  string
	reason   Reason
	original string
	since    instant
	until    instant
	limit    int

	rate        float64
	dryRun      bool
	maxRedrives int

	domain string
	prefix string
}

// DeadLetters starts a query for the letters on a DLQ subject, which may hold
// wildcards; exactly one stream must have it, else it is [ErrNoStream] or
// [ErrAmbiguousStream].
func DeadLetters(subject string) DeadLetterQuery { return DeadLetterQuery{subject: subject} }

// Durable selects the letters of one durable. Default is all.
func (q DeadLetterQuery) Durable(name string) DeadLetterQuery {
	q.set |= optLetterDurable
	q.durable = name
	return q
}

// Reason selects the letters with one reason, which is not empty. Default is all.
func (q DeadLetterQuery) Reason(r Reason) DeadLetterQuery {
	q.set |= optLetterReason
	q.reason = r
	return q
}

// Subject selects by the original's subject with a filter that may hold wildcards.
// Default is all.
func (q DeadLetterQuery) Subject(filter string) DeadLetterQuery {
	q.set |= optLetterSubject
	q.original = filter
	return q
}

// Since selects what died at t or later, by [DeadLetter.Time], the clock of the host
// where it died. The zero time is [ErrOutOfRange]; default is no bound.
func (q DeadLetterQuery) Since(t time.Time) DeadLetterQuery {
	q.set |= optLetterSince
	q.since = instantOf(t)
	return q
}

// Until selects what died before t, by the same clock as Since. The zero time is
// [ErrOutOfRange], and a t that is not after Since [ErrOptionConflict]; default is no
// bound.
func (q DeadLetterQuery) Until(t time.Time) DeadLetterQuery {
	q.set |= optLetterUntil
	q.until = instantOf(t)
	return q
}

// Limit ends the query after n selected letters, at least 1; messages that are no
// letters do not count. Default is all.
func (q DeadLetterQuery) Limit(n int) DeadLetterQuery {
	q.set |= optLetterLimit
	q.limit = n
	return q
}

// Rate limits Redrive and Purge to so many letters a second, above zero. Default
// is as fast as possible.
func (q DeadLetterQuery) Rate(perSecond float64) DeadLetterQuery {
	q.set |= optLetterRate
	q.rate = perSecond
	return q
}

// DryRun has Redrive and Purge report what they would do, at full speed, and change
// nothing. Default is to do it.
func (q DeadLetterQuery) DryRun() DeadLetterQuery {
	q.dryRun = true
	return q
}

// MaxRedrives is how often one message may be redriven, at least 1, so that one
// which cannot be handled does not go in circles. Default is [DefaultMaxRedrives].
func (q DeadLetterQuery) MaxRedrives(n int) DeadLetterQuery {
	q.set |= optLetterMaxRedrives
	q.maxRedrives = n
	return q
}

// Domain asks the JetStream of another domain. It excludes APIPrefix; default is the
// one that the connection's account has.
func (q DeadLetterQuery) Domain(name string) DeadLetterQuery {
	q.set |= optLetterDomain
	q.domain = name
	return q
}

// APIPrefix asks a JetStream whose API another account exports under a prefix,
// such as "JS.ops.API". It excludes Domain.
func (q DeadLetterQuery) APIPrefix(prefix string) DeadLetterQuery {
	q.set |= optLetterAPIPrefix
	q.prefix = prefix
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
	if has(optLetterReason) && q.reason == "" {
		add("reason", `""`, "must not be empty", ErrOutOfRange)
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
	if reason := groupFault(q.domain); has(optLetterDomain) && reason != "" {
		add("domain", strconv.Quote(q.domain), reason, ErrInvalidName)
	}
	if reason := subjectFault(strings.TrimSuffix(q.prefix, ".")); has(optLetterAPIPrefix) && reason != "" {
		add("apiPrefix", strconv.Quote(q.prefix), reason, ErrInvalidName)
	}
	if has(optLetterDomain) && has(optLetterAPIPrefix) {
		add("apiPrefix", strconv.Quote(q.prefix), "does not fit with a domain", ErrOptionConflict)
	}
	return errors.Join(faults...)
}

// selects reports whether the filters take l. Of what is no letter, nothing is known
// that a filter could take.
func (q DeadLetterQuery) selects(l *DeadLetter) bool {
	has := func(o letterOption) bool { return q.set&o != 0 }
	switch {
	case has(optLetterDurable) && l.Durable != q.durable,
		has(optLetterReason) && l.Reason != q.reason,
		has(optLetterSubject) && (l.Subject == "" || !subjectMatches(q.original, l.Subject)),
		has(optLetterSince|optLetterUntil) && l.Time.IsZero(),
		has(optLetterSince) && l.Time.Before(q.since.time()),
		has(optLetterUntil) && !l.Time.Before(q.until.time()):
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

// open judges the query and finds the DLQ's stream.
func (q DeadLetterQuery) open(ctx context.Context, nc *nats.Conn) (*deadLetters, error) {
	if err := q.validate(); err != nil {
		return nil, err
	}
	var js jetstream.JetStream
	var err error
	switch {
	case q.set&optLetterDomain != 0:
		js, err = jetstream.NewWithDomain(nc, q.domain)
	case q.set&optLetterAPIPrefix != 0:
		js, err = jetstream.NewWithAPIPrefix(nc, strings.TrimSuffix(q.prefix, "."))
	default:
		js, err = jetstream.New(nc)
	}
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

// all yields what the query selects. A [*LetterError] concerns one message; any
// other error is the last thing yielded.
func (d *deadLetters) all(ctx context.Context, headersOnly bool) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		left := d.limit
		part := span{stream: d.dlq, filter: d.subject, last: d.dlq.State.LastSeq, headersOnly: headersOnly}
		for m, err := range readSpan(ctx, d.api, part) {
			if err != nil {
				yield(DeadLetter{}, err)
				return
			}
			l, err := parseLetter(d.dlq.Config.Name, m)
			if !d.selects(&l) {
				continue
			}
			if !yield(l, err) {
				return
			}
			if err == nil {
				left--
			}
			if left == 0 && d.limit > 0 {
				return
			}
		}
	}
}

// List yields the selected letters in the order of the DLQ, in constant memory.
// Each use of the sequence reads anew; a break ends it at once.
//
// A message that is no dead letter is yielded with what is known of it and a
// [*LetterError], which is [ErrNotALetter], and the sequence goes on. Any other
// error is the last thing yielded.
func (q DeadLetterQuery) List(ctx context.Context, nc *nats.Conn) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		d, err := q.open(ctx, nc)
		if err != nil {
			yield(DeadLetter{}, err)
			return
		}
		d.all(ctx, false)(yield)
	}
}

// LetterCounts is what [DeadLetterQuery.Count] found.
type LetterCounts struct {
	Total   int           // letters
	Foreign int           // messages that are no letters, not in Total
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
	for l, err := range d.all(ctx, true) {
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

// Purge deletes the selected letters and returns how many. Messages that are no
// letters stay. With a letter that is a pointer goes its original, when that only
// waits in its stream for the letter's sake: on a work queue it is deleted, on a
// stream with interest retention settled for the durable that failed, so that it
// stays for as long as another durable needs it. The latter asks for the permission
// to publish to $JS.ACK.<stream>.<durable>.>.
//
// When it ends early, by ctx or an error, what it deleted is gone, and the rest
// untouched. A DLQ stream that refuses deletion is [ErrBadDLQ].
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
				return purged, failure(fmt.Sprintf("dead letters of %q: purge: %v", q.subject, err), err)
			}
			if err := discardLetter(ctx, d.api, &l); err != nil {
				return purged, &LetterError{Subject: l.DLQSubject, Stream: l.DLQStream, Sequence: l.DLQSequence, Err: err}
			}
		}
		purged++
	}
	return purged, nil
}

// removable refuses a DLQ that keeps its letters for ever.
func (d *deadLetters) removable() error {
	c := d.dlq.Config
	if c.DenyDelete || c.Sealed || c.Mirror != nil {
		return failure(fmt.Sprintf("dead letters of %q: stream %q does not allow to delete messages", d.subject, c.Name), ErrBadDLQ)
	}
	return nil
}

// pacer spaces events evenly at a rate a second, 0 for no limit.
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
