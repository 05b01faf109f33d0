package natsx

import (
	"bytes"
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
	// maxRedriveCache bounds what a redrive caches of streams and durables.
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
	Total  int           // selected messages at the start, without the limit, including those that are not letters
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

// WithRedriveEdit has fn change a letter's Data and Header before it is redriven, such as
// to mend what made it die; the other fields are to be read. The letter is the caller's
// to change, and a pointer has its original's payload. It is called once for each letter,
// in a dry run too, on the goroutine of Redrive. A letter for which it returns an error
// stays and is a failure in the report, with that error. Default, also for nil, is to
// redrive letters as they are.
func WithRedriveEdit(fn func(*DeadLetter) error) RedriveOption {
	return func(r *redrive) { r.edit = fn }
}

// redrive is one run of Redrive.
type redrive struct {
	*deadLetters
	progress   func(RedriveProgress)
	edit       func(*DeadLetter) error
	report     RedriveReport
	total      int
	marks      *redriveMarks
	sources    map[string]*redriveSource // by stream
	copies     map[string]*copies        // by stream
	retries    map[[3]string]*retryRoute // by retry stream, stream and durable
	unfinished bool                      // a copy may be stored whose letter is not removed
}

// redriveSource is a stream that letters came from.
type redriveSource struct {
	info     *jetstream.StreamInfo
	asked    time.Time
	durables map[string]*jetstream.ConsumerInfo
}

// copies are the redriven messages found in a stream.
type copies struct {
	looked time.Time         // when the marks were last looked at
	behind uint64            // from here on the stream was searched
	upTo   uint64            // and up to here, 0 when it was not
	seqs   map[string]uint64 // by message id
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
// received, if they had the original: the stream still has it, or has interest retention.
// Otherwise they handle the copy. Other consumers and core subscribers receive it. The
// durable must still exist and its filter match the subject. What its handler publishes
// has the message ids that it had before the message was dead. The message id of the
// original is in [HeaderOriginalMsgID].
//
// A letter of a broker with [WithRetryStream] goes back by the retry stream, while brokers
// use that for the durable: then only the durable receives the copy, nothing is deleted for
// it, and mirrors and sourced subjects can have their letters redriven.
//
// A letter is redriven once, even if the redrive is killed and repeated, or run by several
// processes at once: a copy is not stored again while an earlier one is in the stream or
// within the stream's duplicate window, and natsx removes the letter before it handles the
// copy. After that window this requires that the durable is a natsx route whose user may
// get and delete messages of the DLQ's stream ($JS.API.STREAM.MSG.GET and .DELETE). While
// it runs, a redrive keeps a consumer named natsx-redrive-* on the DLQ's stream; that of a
// killed redrive stays for the next one, for 30 days. If there can be none (because of the
// retention, MaxConsumers or a permission), each redrive reads the original streams once.
//
// A letter that cannot be redriven stays and is a failure in the report: its stream is
// gone, does not capture the subject, which is so for mirrors and sourced subjects, or
// transforms it ([ErrNoStream]); its durable is gone
// ([ErrConsumerDeleted]) or its filter does not match the subject ([ErrConsumerConflict]);
// natsx does not publish to the subject, such as one with a wildcard
// ([ErrInvalidSubject]); the stream would delete a newer message because of
// MaxMsgsPerSubject, or, because of MaxMsgs or MaxBytes, one that the durable has not
// settled ([ErrWouldEvict]); or the server refuses the copy, which is about 400 bytes larger
// than the original. An error that ends the redrive, such as the end of ctx or a missing
// permission ([ErrPermission]), is returned together with the report; the same call
// continues from there. A DLQ stream that was recreated meanwhile is [ErrStreamDeleted].
// If the DLQ stream has DenyDelete, the error is [ErrBadDLQ] and
// nothing is redriven.
func (q DeadLetterQuery) Redrive(ctx context.Context, nc *nats.Conn, opts ...RedriveOption) (RedriveReport, error) {
	r := &redrive{sources: map[string]*redriveSource{}, copies: map[string]*copies{}}
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
		for _, err := range r.all(ctx, true) {
			if err != nil && !errors.Is(err, ErrNotALetter) {
				return r.report, err
			}
			r.total++
		}
	}
	r.marks = newRedriveMarks(r.deadLetters)
	whole, err := r.run(ctx)
	if !r.unfinished {
		const filters = optLetterDurable | optLetterReason | optLetterSubject | optLetterSequence | optLetterWhere | optLetterSince | optLetterUntil
		r.marks.end(ctx, whole && q.set&filters == 0 && r.report.Failed == 0)
	}
	if err != nil {
		return r.report, failure(fmt.Sprintf("redrive %q: %s", q.subject, cause(err)), err)
	}
	return r.report, nil
}

// run redrives the selected letters, and reports whether it came to their end.
func (r *redrive) run(ctx context.Context) (whole bool, _ error) {
	pace := pacer{rate: r.rate}
	for l, err := range r.all(ctx, false) {
		if errors.Is(err, ErrNotALetter) {
			r.book(l, SkipForeign, nil)
			continue
		}
		if err == nil && !r.dryRun {
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
			return false, err
		default:
			r.book(l, skip, nil)
		}
		if r.enough(r.report.Redriven) {
			return false, nil
		}
	}
	return true, nil
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
func (r *redrive) one(ctx context.Context, l *DeadLetter) (_ SkipReason, err error) {
	published := false // or may be
	defer func() { r.unfinished = r.unfinished || published && err != nil }()
	most := DefaultMaxRedrives
	if r.set&optLetterMaxRedrives != 0 {
		most = r.maxRedrives
	}
	v, err := r.retryRouteOf(ctx, l)
	if err != nil {
		return "", err
	}
	var src *redriveSource
	if v == nil {
		if src, err = r.source(ctx, l); err != nil {
			return "", err
		}
	}
	if l.Redrives >= most {
		return SkipMaxRedrives, nil
	}
	header, data, err := r.content(ctx, l)
	if err != nil {
		return "", err
	}
	if v != nil {
		if m := v.copyOf(r.api.nc, l, header, data); m != nil {
			return r.byRetries(ctx, l, v, m)
		}
		if src, err = r.source(ctx, l); err != nil {
			return "", err
		}
	}
	m := src.copyOf(l, header, data)
	begun := time.Now()
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for lost := false; ; {
		if !r.dryRun {
			if err := r.marks.put(ctx, l.Stream, src.info.State.LastSeq); err != nil {
				return "", err
			}
		}
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
		there, err := findLetter(ctx, r.api, l)
		if err != nil {
			return "", err
		}
		if !there {
			if lost {
				return "", nil // its copy was handled meanwhile
			}
			return SkipGone, nil
		}
		if err := r.keepNewer(ctx, l, src, m); err != nil {
			return "", err
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
			published = published || err == nil && !ack.Duplicate || err != nil && mayBeStored(err)
			if err == nil && ack.Duplicate && !lost {
				stored, err := r.api.get(ctx, l.Stream, getRequest{Seq: ack.Sequence})
				if err != nil {
					return "", err
				}
				if stored != nil && !src.isCopy(l, stored, m) {
					return "", faultf(ErrBadAck, "message %d of stream %q has the id %q and is no copy of the letter", stored.seq, l.Stream, redriveID(l))
				}
				published = true
				return SkipRedriven, r.removeLetter(ctx, l)
			}
			if err == nil {
				return "", r.removeLetter(ctx, l)
			}
		}
		var api *jetstream.APIError
		errors.As(err, &api)
		switch {
		case errors.Is(err, ErrPermission), errors.Is(err, nats.ErrConnectionClosed):
			return "", err
		case hasCode(err, jetstream.JSErrCodeStreamWrongLastSequence): // somebody published on the subject
			if time.Since(begun) > redrivePatience {
				return "", faultf(err, "copy not stored in stream %q, which keeps %d messages a subject: others are stored on %q all the time", l.Stream, src.info.Config.MaxMsgsPerSubject, l.Subject)
			}
		case api != nil && api.ErrorCode != codeIDInProcess && api.ErrorCode != codeTooManyRequests && api.ErrorCode != codeClusterNotLeader &&
			api.ErrorCode != codeClusterNoLeader && api.ErrorCode != jetstream.JSErrCodeStreamWrongLastSequenceConstant,
			errors.Is(err, ErrWrongStream), errors.Is(err, ErrBadAck), isLocal(err):
			return "", faultf(err, "copy not stored in stream %q: %s", l.Stream, cause(err))
		case errors.Is(err, nats.ErrNoResponders):
			// The stream has no leader, is gone, or was recreated.
			delete(r.sources, l.Stream)
			if src, err = r.source(ctx, l); err != nil {
				return "", err
			}
			m = src.copyOf(l, header, data)
		case mayBeStored(err):
			lost = true
		}
		if time.Since(begun) > redrivePatience {
			return "", failure(fmt.Sprintf("copy not stored in stream %q: %s", l.Stream, cause(err)), err)
		}
		pause.wait(ctx)
	}
}

// mayBeStored reports whether a message may be in its stream in spite of err.
func mayBeStored(err error) bool {
	var api *jetstream.APIError
	return !errors.As(err, &api) && !errors.Is(err, nats.ErrNoResponders) && !errors.Is(err, ErrPermission) &&
		!errors.Is(err, ErrWrongStream) && !errors.Is(err, nats.ErrDisconnected) && !isLocal(err)
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
	if _, err := discardLetter(ctx, r.api, l); err != nil {
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
	if why := takesNoCopy(&src.info.Config, l.Subject); why != "" {
		return nil, faultf(ErrNoStream, "original stream %q %s", l.Stream, why)
	}
	if !captures(src.info, l.Subject) {
		return nil, faultf(ErrNoStream, "original stream %q does not take the subject %q any more", l.Stream, l.Subject)
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

// content returns the headers and payload of a letter, as they are redriven.
func (r *redrive) content(ctx context.Context, l *DeadLetter) (nats.Header, []byte, error) {
	header, data := l.Header, l.Data
	if l.Pointer {
		original, err := r.api.get(ctx, l.Stream, getRequest{Seq: l.Sequence})
		if err != nil {
			return nil, nil, err
		}
		if original == nil || !l.pointsTo(original) {
			return nil, nil, faultf(nil, "the letter is a pointer, and its original, message %d of stream %q, is gone", l.Sequence, l.Stream)
		}
		header, data = original.header, original.data
	}
	if r.edit == nil {
		return header, data, nil
	}
	edited := *l
	edited.Header, edited.Data = nats.Header{}, slices.Clone(data)
	for k, v := range header {
		edited.Header[k] = slices.Clone(v)
	}
	if err := r.edit(&edited); err != nil {
		return nil, nil, faultf(err, "edit: %v", err)
	}
	return edited.Header, edited.Data, nil
}

// key is what proves the copies for a durable; see redriveToken.
func (s *redriveSource) key(durable string) string {
	return s.durables[durable].Config.Metadata[metadataID]
}

// copyOf makes the copy of a letter.
func (s *redriveSource) copyOf(l *DeadLetter, header nats.Header, data []byte) *nats.Msg {
	m := &nats.Msg{Subject: l.Subject, Header: nats.Header{}, Data: data}
	for k, v := range header {
		if !hasPrefixFold(k, "Nats-") && !hasPrefixFold(k, redrivePrefix) {
			m.Header[k] = v
		}
	}
	if id := header[nats.MsgIdHdr]; len(id) > 0 && l.Redrives == 0 {
		m.Header[HeaderOriginalMsgID] = id
	}
	m.Header.Set(nats.MsgIdHdr, redriveID(l))
	m.Header.Set(nats.ExpectedStreamHdr, l.Stream)
	m.Header.Set(HeaderRedriveTo, l.Durable)
	m.Header.Set(HeaderRedriveCount, strconv.Itoa(l.Redrives+1))
	m.Header.Set(HeaderRedriveOriginal, deliveryID(l.Stream, l.Durable, l.root()))
	m.Header.Set(HeaderRedriveToken, redriveToken(s.key(l.Durable), m.Subject, m.Header, data))
	return m
}

// isCopy reports whether a stored message is the copy m of l. A durable without an
// identity has no secret: then the payload decides.
func (s *redriveSource) isCopy(l *DeadLetter, stored *storedMsg, m *nats.Msg) bool {
	key := s.key(l.Durable)
	return stored.header.Get(nats.MsgIdHdr) == m.Header.Get(nats.MsgIdHdr) &&
		provenCopy(key, stored.subject, stored.header, stored.data) && (key != "" || bytes.Equal(stored.data, m.Data))
}

// findCopy looks for the copy of a letter in its original stream, where the marks of
// other redrives, or a lost ack of this one, say that there may be one. What may have
// come within half of the duplicate window need not be known, unless an ack was lost.
func (r *redrive) findCopy(ctx context.Context, l *DeadLetter, src *redriveSource, m *nats.Msg, lost bool) (bool, error) {
	known := r.copies[l.Stream]
	if known == nil {
		known = &copies{}
		r.copies[l.Stream] = known
	}
	if lost || time.Since(known.looked) > src.info.Config.Duplicates/2 {
		now := time.Now()
		behind, all, err := r.marks.others(ctx)
		if err != nil {
			return false, err
		}
		if lost && !all {
			lower(behind, r.marks.own.Behind)
		}
		from, marked := behind[l.Stream]
		if all || marked {
			if err := r.search(ctx, l.Stream, known, from); err != nil {
				return false, err
			}
		}
		known.looked = now
	}
	seq := known.seqs[redriveID(l)]
	if seq == 0 {
		return false, nil
	}
	stored, err := r.api.get(ctx, l.Stream, getRequest{Seq: seq})
	return err == nil && stored != nil && src.isCopy(l, stored, m), err
}

// search looks for copies of the DLQ's letters behind a sequence.
func (r *redrive) search(ctx context.Context, stream string, known *copies, behind uint64) error {
	info, err := r.api.askStreamInfo(ctx, stream)
	if err != nil {
		return err
	}
	last := info.State.LastSeq
	if known.upTo == 0 || behind < known.behind || last < known.upTo {
		known.behind, known.upTo, known.seqs = behind, min(behind, last), map[string]uint64{}
	}
	for stored, err := range readSpan(ctx, r.api, span{stream: info, filter: ">", first: known.upTo + 1, last: last, headersOnly: true}) {
		if err != nil {
			return err
		}
		if id := stored.header.Get(nats.MsgIdHdr); stored.header.Get(HeaderRedriveToken) != "" && strings.HasPrefix(id, "redrive/"+r.dlq.Config.Name+"@") {
			known.seqs[id] = stored.seq
		}
	}
	known.upTo = max(last, 1)
	return nil
}

// keepNewer refuses a copy for which the stream would delete a message that is newer
// than the letter's: on its subject, or the first of a full stream when the durable has
// not settled that. Where the copy's subject has room it is to be stored behind the
// message that is the last now.
func (r *redrive) keepNewer(ctx context.Context, l *DeadLetter, src *redriveSource, m *nats.Msg) error {
	c := &src.info.Config
	if c.Discard != jetstream.DiscardOld || c.MaxMsgsPerSubject <= 0 && c.MaxMsgs <= 0 && c.MaxBytes <= 0 {
		return nil
	}
	newest := uint64(0)
	if c.MaxMsgsPerSubject > 0 {
		last, err := r.api.get(ctx, l.Stream, getRequest{LastFor: l.Subject})
		if err != nil {
			return err
		}
		if last != nil {
			newest = last.seq
		}
		m.Header.Set(nats.ExpectedLastSubjSeqHdr, utoa(newest))
	}
	var now jetstream.StreamInfo
	if err := r.api.ask(ctx, "STREAM.INFO."+l.Stream, map[string]string{"subjects_filter": l.Subject}, &now); err != nil {
		return err
	}
	if most := c.MaxMsgsPerSubject; most > 0 && now.State.Subjects[l.Subject] >= uint64(most) {
		first, err := r.api.get(ctx, l.Stream, getRequest{Seq: 1, NextFor: l.Subject})
		if err != nil {
			return err
		}
		if first != nil && first.time.After(l.Published) {
			return faultf(ErrWouldEvict, "stream %q keeps %d messages a subject, and would delete the newer message %d of %q for the copy", l.Stream, most, first.seq, l.Subject)
		}
		return nil
	}
	st := now.State
	if full := c.MaxMsgs > 0 && st.Msgs >= uint64(c.MaxMsgs) || c.MaxBytes > 0 && st.Bytes+uint64(messageSize(m)) > uint64(c.MaxBytes); !full || !st.FirstTime.After(l.Published) {
		return nil
	}
	durable, err := r.api.consumerInfo(ctx, l.Stream, l.Durable)
	if err != nil {
		return err
	}
	if st.FirstSeq > durable.AckFloor.Stream {
		return faultf(ErrWouldEvict, "stream %q is full, and would delete message %d for the copy, which is newer than the letter's and which the durable has not settled", l.Stream, st.FirstSeq)
	}
	return nil
}
