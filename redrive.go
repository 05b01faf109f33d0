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

const (
	// redrivePatience is how long a redrive tries to store one copy.
	redrivePatience = 30 * time.Second
	// maxRedriveErrors is the most errors in a report.
	maxRedriveErrors = 100
	// maxRedriveCache bounds what a redrive caches of streams and subjects.
	maxRedriveCache = 1000
)

// SkipReason is why a redrive skipped a letter.
type SkipReason string

// The reasons of a skipped letter.
const (
	SkipForeign     SkipReason = "foreign"      // not a dead letter; it stays
	SkipMaxRedrives SkipReason = "max_redrives" // already redriven MaxRedrives times; it stays
	SkipRedriven    SkipReason = "redriven"     // an earlier or concurrent redrive stored the copy; the letter is removed, but not in a dry run
	SkipGone        SkipReason = "gone"         // removed meanwhile, by another redrive or a purge
)

// RedriveReport is the result of a redrive. Every selected message is in one of the three
// counts; those that are not letters are skipped.
type RedriveReport struct {
	Redriven int // copies stored and letters removed; in a dry run, those that would be
	Skipped  int // skipped, with a reason
	Failed   int // could not be redriven; the letter is still there
	// Skips are the skipped ones by reason, nil for none.
	Skips map[SkipReason]int
	// Errors are the first hundred failures, each a [*LetterError]; nil for none.
	Errors []error
}

// RedriveProgress is the progress of a redrive, after every selected message.
type RedriveProgress struct {
	Report RedriveReport // so far; must not be kept or changed
	Total  int           // selected messages at the start, including those that are not letters
	Letter DeadLetter    // the last one
	Skip   SkipReason    // why it was skipped, or empty
	Err    error         // why it failed, or nil
}

// Done is how many of Total are processed.
func (p RedriveProgress) Done() int { return p.Report.Redriven + p.Report.Skipped + p.Report.Failed }

// RedriveOption is an option of [DeadLetterQuery.Redrive].
type RedriveOption func(*redrive)

// WithRedriveProgress sets a function that is called after every selected message, one call
// at a time, on the goroutine of Redrive, which counts the messages first. The default,
// also for nil, is none.
func WithRedriveProgress(fn func(RedriveProgress)) RedriveOption {
	return func(r *redrive) { r.progress = fn }
}

// redrive is one run of Redrive.
type redrive struct {
	*deadLetters
	progress func(RedriveProgress)
	report   RedriveReport
	total    int
	sources  map[string]*redriveSource // by stream
	copies   map[[2]string]*copies     // by stream and subject
}

// redriveSource is a stream that letters came from.
type redriveSource struct {
	info     *jetstream.StreamInfo
	asked    time.Time
	durables map[string]*jetstream.ConsumerInfo
}

// copies are the redriven messages found on a subject.
type copies struct {
	searched uint64 // up to this sequence
	at       time.Time
	seqs     map[string]uint64 // by message id
}

// redriveFault is a failure of one letter, after which the redrive goes on.
type redriveFault struct{ error }

func (f redriveFault) Unwrap() error { return f.error }

func faultf(err error, format string, args ...any) error {
	return redriveFault{failure(fmt.Sprintf(format, args...), err)}
}

// Redrive sends the selected letters back to their original subjects, in the order of the
// DLQ. Each one becomes a new message for the durable that failed, whose attempts start at
// 1, with its original headers except Nats-*. A letter is removed once its copy is stored.
//
// The copy has [HeaderRedriveTo], with a token that a publisher cannot forge. Routes of
// natsx with other durables acknowledge it without handling it, and count it only as
// received; other consumers and core subscribers receive it. The durable must still exist
// and its filter match the subject.
//
// A letter is redriven once, even if the redrive is killed and repeated, or run by several
// processes at once: a copy is not stored again while an earlier one is in the stream or
// within the stream's duplicate window, and natsx removes the letter before it handles the
// copy. After that window this requires that the durable is a natsx route whose user may
// get and delete messages of the DLQ's stream ($JS.API.STREAM.MSG.GET and .DELETE).
//
// A letter that cannot be redriven stays and is a failure in the report: its stream is
// gone, does not capture the subject or transforms it ([ErrNoStream]); its durable is gone
// ([ErrConsumerDeleted]) or its filter does not match the subject ([ErrConsumerConflict]);
// natsx does not publish to the subject, such as one with a wildcard
// ([ErrInvalidSubject]); or the server refuses the copy, which is about 300 bytes larger
// than the original. An error that ends the redrive, such as the end of ctx or a missing
// permission ([ErrPermission]), is returned together with the report; the same call
// continues from there. If the DLQ stream has DenyDelete, the error is [ErrBadDLQ] and
// nothing is redriven.
func (q DeadLetterQuery) Redrive(ctx context.Context, nc *nats.Conn, opts ...RedriveOption) (RedriveReport, error) {
	r := &redrive{sources: map[string]*redriveSource{}, copies: map[[2]string]*copies{}}
	for _, opt := range opts {
		opt(r)
	}
	var err error
	if r.deadLetters, err = q.open(ctx, nc); err != nil {
		return r.report, err
	}
	if err := r.removable(); err != nil {
		return r.report, err
	}
	if r.progress != nil {
		counts, err := q.Count(ctx, nc)
		if err != nil {
			return r.report, err
		}
		r.total = counts.Total + counts.Foreign
	}
	pace := pacer{rate: q.rate}
	for l, err := range r.all(ctx, false) {
		if errors.Is(err, ErrNotALetter) {
			r.book(l, SkipForeign, nil)
			continue
		}
		if err == nil && !q.dryRun {
			err = pace.wait(ctx)
		}
		var skip SkipReason
		if err == nil {
			skip, err = r.one(ctx, &l)
		}
		var fault redriveFault
		switch {
		case errors.As(err, &fault):
			r.book(l, "", &LetterError{Subject: l.DLQSubject, Stream: l.DLQStream, Sequence: l.DLQSequence, Err: fault.error})
		case err != nil:
			return r.report, failure(fmt.Sprintf("redrive %q: %s", q.subject, cause(err)), err)
		default:
			r.book(l, skip, nil)
		}
	}
	return r.report, nil
}

// book records the outcome of a letter.
func (r *redrive) book(l DeadLetter, skip SkipReason, err error) {
	switch {
	case err != nil:
		r.report.Failed++
		if len(r.report.Errors) < maxRedriveErrors {
			r.report.Errors = append(r.report.Errors, err)
		}
	case skip != "":
		r.report.Skipped++
		if r.report.Skips == nil {
			r.report.Skips = map[SkipReason]int{}
		}
		r.report.Skips[skip]++
	default:
		r.report.Redriven++
	}
	if r.progress != nil {
		r.progress(RedriveProgress{Report: r.report, Total: r.total, Letter: l, Skip: skip, Err: err})
	}
}

// one redrives a letter. A redriveFault concerns only this one.
//
// Another process, or an earlier iteration, may have stored the copy: then it is in the
// stream or within its duplicate window, or it was handled and the letter is gone. So look
// for the copy first, then for the letter, and publish at once: a copy stored after the
// first look is within the window.
func (r *redrive) one(ctx context.Context, l *DeadLetter) (SkipReason, error) {
	src, err := r.source(ctx, l)
	if err != nil {
		return "", err
	}
	m, count, err := r.copyOf(ctx, l, src)
	if err != nil {
		return "", err
	}
	most := DefaultMaxRedrives
	if r.set&optLetterMaxRedrives != 0 {
		most = r.maxRedrives
	}
	if count > most {
		return SkipMaxRedrives, nil
	}
	begun := time.Now()
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for lost := false; ; {
		done := SkipReason("")
		if !lost {
			done = SkipRedriven
		}
		found, err := r.findCopy(ctx, l, src, m, lost)
		if err != nil {
			return "", err
		}
		if found {
			return done, r.removeLetter(ctx, l)
		}
		letter, err := r.api.get(ctx, l.DLQStream, getRequest{Seq: l.DLQSequence})
		if err != nil {
			return "", err
		}
		if letter == nil || !letter.time.Equal(l.DLQTime) {
			if lost {
				return "", nil // its copy was handled meanwhile
			}
			return SkipGone, nil
		}
		if r.dryRun {
			return "", nil
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
		// Without a connection nats.go would buffer the copy and send it at any later
		// time.
		err = nats.ErrDisconnected
		if r.api.nc.IsConnected() {
			var ack Ack
			ack, err = r.publish(ctx, m)
			if err == nil && ack.Duplicate && !lost {
				stored, err := r.api.get(ctx, l.Stream, getRequest{Seq: ack.Sequence})
				if err != nil {
					return "", err
				}
				if stored != nil && !src.isCopy(stored, m) {
					return "", faultf(ErrBadAck, "message %d of stream %q has the id %q and is no copy of the letter", stored.seq, l.Stream, redriveID(l))
				}
				return SkipRedriven, r.removeLetter(ctx, l)
			}
			if err == nil {
				return "", r.removeLetter(ctx, l)
			}
		}
		var api *jetstream.APIError
		switch {
		case errors.Is(err, ErrPermission), errors.Is(err, nats.ErrConnectionClosed):
			return "", err
		case errors.As(err, &api) && api.ErrorCode != codeIDInProcess && api.ErrorCode != codeTooManyRequests && api.ErrorCode != codeClusterNotLeader && api.ErrorCode != codeClusterNoLeader,
			errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck), isLocal(err):
			return "", faultf(err, "copy not stored in stream %q: %s", l.Stream, cause(err))
		case errors.Is(err, nats.ErrNoResponders):
			// The stream has no leader, is gone, or was recreated.
			delete(r.sources, l.Stream)
			if src, err = r.source(ctx, l); err != nil {
				return "", err
			}
			if m, _, err = r.copyOf(ctx, l, src); err != nil {
				return "", err
			}
		case api == nil:
			lost = true
		}
		if time.Since(begun) > redrivePatience {
			return "", failure(fmt.Sprintf("copy not stored in stream %q: %s", l.Stream, cause(err)), err)
		}
		pause.wait(ctx)
	}
}

// publish is one try, which the end of ctx does not cancel.
func (r *redrive) publish(ctx context.Context, m *nats.Msg) (ack Ack, _ error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), letterTry)
	defer cancel()
	err := requestWith(ctx, r.api.nc, m.Subject, func(ctx context.Context) (err error) {
		ack, err = publishOnce(ctx, r.api.nc, m)
		return err
	})
	return ack, err
}

// removeLetter removes the letter of a stored copy, even if ctx has ended.
func (r *redrive) removeLetter(ctx context.Context, l *DeadLetter) error {
	if r.dryRun {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), redrivePatience)
	defer cancel()
	if err := discardLetter(ctx, r.api, l); err != nil {
		return failure(fmt.Sprintf("copy of letter %d is stored, but the letter was not removed: %s", l.DLQSequence, cause(err)), err)
	}
	return nil
}

// source finds the stream that a letter came from, and checks that the durable would
// receive the copy.
func (r *redrive) source(ctx context.Context, l *DeadLetter) (*redriveSource, error) {
	if reason := publishFault(l.Subject); reason != "" {
		return nil, faultf(ErrInvalidSubject, "original subject %q cannot be published to: %s", l.Subject, reason)
	}
	src := r.sources[l.Stream]
	if src == nil || time.Since(src.asked) > apiTimeout {
		info, err := r.api.askStreamInfo(ctx, l.Stream)
		if hasCode(err, codeStreamNotFound) {
			return nil, faultf(ErrNoStream, "original stream %q is gone", l.Stream)
		}
		if err != nil {
			return nil, err
		}
		if len(r.sources) >= maxRedriveCache {
			clear(r.sources)
		}
		src = &redriveSource{info: info, asked: time.Now(), durables: map[string]*jetstream.ConsumerInfo{}}
		r.sources[l.Stream] = src
	}
	if !captures(src.info, l.Subject) {
		return nil, faultf(ErrNoStream, "original stream %q does not take the subject %q any more", l.Stream, l.Subject)
	}
	if t := src.info.Config.SubjectTransform; t != nil && t.Source != t.Destination && (t.Source == "" || subjectMatches(t.Source, l.Subject)) {
		return nil, faultf(ErrNoStream, "original stream %q would store the copy on another subject than %q: it transforms %q to %q", l.Stream, l.Subject, t.Source, t.Destination)
	}
	c := src.durables[l.Durable]
	if c == nil {
		c = new(jetstream.ConsumerInfo)
		err := r.api.ask(ctx, "CONSUMER.INFO."+l.Stream+"."+l.Durable, struct{}{}, c)
		if hasCode(err, codeConsumerNotFound) {
			return nil, faultf(ErrConsumerDeleted, "durable %q of stream %q is gone", l.Durable, l.Stream)
		}
		if err != nil {
			return nil, err
		}
		if len(src.durables) >= maxRedriveCache {
			clear(src.durables)
		}
		src.durables[l.Durable] = c
	}
	filters := c.Config.FilterSubjects
	if c.Config.FilterSubject != "" {
		filters = []string{c.Config.FilterSubject}
	}
	if len(filters) > 0 && !slices.ContainsFunc(filters, func(f string) bool { return subjectMatches(f, l.Subject) }) {
		return nil, faultf(ErrConsumerConflict, "durable %q of stream %q does not take the subject %q any more", l.Durable, l.Stream, l.Subject)
	}
	return src, nil
}

// copyOf returns the copy of a letter and the number of its redrives, including this one.
func (r *redrive) copyOf(ctx context.Context, l *DeadLetter, src *redriveSource) (*nats.Msg, int, error) {
	header, data := l.Header, l.Data
	if l.Pointer {
		original, err := r.api.get(ctx, l.Stream, getRequest{Seq: l.Sequence})
		if err != nil {
			return nil, 0, err
		}
		if original == nil || !l.pointsTo(original) {
			return nil, 0, faultf(nil, "the letter is a pointer, and its original, message %d of stream %q, is gone", l.Sequence, l.Stream)
		}
		header, data = original.header, original.data
	}
	created := src.info.Created.UnixNano()
	count := 1
	if proof, ok := proveRedrive(l.Stream, created, l.Subject, header, data); ok {
		count += proof.count
	}
	m := &nats.Msg{Subject: l.Subject, Header: nats.Header{}, Data: data}
	for k, v := range header {
		if !hasPrefixFold(k, "Nats-") && !hasPrefixFold(k, redrivePrefix) {
			m.Header[k] = v
		}
	}
	id := redriveID(l)
	m.Header.Set(nats.MsgIdHdr, id)
	m.Header.Set(nats.ExpectedStreamHdr, l.Stream)
	m.Header.Set(HeaderRedriveTo, l.Durable)
	m.Header.Set(HeaderRedriveCount, strconv.Itoa(count))
	m.Header.Set(HeaderRedriveToken, redriveToken(l.Stream, created, l.Durable, l.Subject, id, strconv.Itoa(count), data))
	return m, count, nil
}

// isCopy reports whether a stored message is the copy m.
func (s *redriveSource) isCopy(stored *storedMsg, m *nats.Msg) bool {
	_, ok := proveRedrive(s.info.Config.Name, s.info.Created.UnixNano(), stored.subject, stored.header, stored.data)
	return ok && stored.header.Get(nats.MsgIdHdr) == m.Header.Get(nats.MsgIdHdr) && stored.header.Get(HeaderRedriveTo) == m.Header.Get(HeaderRedriveTo)
}

// findCopy looks for the copy of a letter in its original stream. Usually nothing was
// stored on the subject since the original, which one request shows. Otherwise the subject
// is searched once, and then only new messages. Unless fresh is set, messages of half the
// duplicate window may be missed.
func (r *redrive) findCopy(ctx context.Context, l *DeadLetter, src *redriveSource, m *nats.Msg, fresh bool) (bool, error) {
	key := [2]string{l.Stream, l.Subject}
	known := r.copies[key]
	if known == nil || fresh || time.Since(known.at) > src.info.Config.Duplicates/2 {
		now := time.Now()
		last, err := r.api.get(ctx, l.Stream, getRequest{LastFor: l.Subject})
		if err != nil {
			return false, err
		}
		behind := uint64(0) // in a stream that was recreated the original's sequence means nothing
		if !src.info.Created.After(l.Published) {
			behind = l.Sequence
		}
		if last == nil || known == nil && last.seq <= behind {
			return false, nil
		}
		if known == nil {
			if len(r.copies) >= maxRedriveCache {
				clear(r.copies)
			}
			known = &copies{seqs: map[string]uint64{}}
			r.copies[key] = known
		}
		part := span{stream: src.info, filter: l.Subject, first: max(behind, known.searched) + 1, last: last.seq, headersOnly: true}
		for stored, err := range readSpan(ctx, r.api, part) {
			if err != nil {
				return false, err
			}
			if id := stored.header.Get(nats.MsgIdHdr); stored.header.Get(HeaderRedriveToken) != "" && strings.HasPrefix(id, "redrive/"+l.DLQStream+"@") {
				known.seqs[id] = stored.seq
			}
		}
		known.searched, known.at = max(last.seq, known.searched), now
	}
	seq := known.seqs[redriveID(l)]
	if seq == 0 {
		return false, nil
	}
	stored, err := r.api.get(ctx, l.Stream, getRequest{Seq: seq})
	return err == nil && stored != nil && src.isCopy(stored, m), err
}
