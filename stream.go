package natsx

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
)

// Limits of the server.
const (
	maxReplicas          = 5
	maxDescriptionLength = 4096                   // in bytes
	minStreamDuration    = 100 * time.Millisecond // of MaxAge and DedupWindow
)

// subjectSeparator joins subjects in one string. A control character is never in a valid
// subject.
const subjectSeparator = "\x00"

// streamOption is one bit for each setter, as option is for routes.
type streamOption uint32

const (
	optSubjects streamOption = 1 << iota
	optDescription
	optRetention
	optStorage
	optDiscard
	optCompression
	optMaxAge
	optMaxBytes
	optMaxMsgs
	optMaxMsgsPerSubject
	optMaxMsgSize
	optReplicas
	optDedupWindow
	optAllowMsgTTL
	optAllowMsgSchedules
	optAllowAtomicPublish
	optAllowBatchPublish
	optAllowDirect
	optAllowRollup
	optDenyDelete
	optDenyPurge
)

// StreamSpec describes a stream for [StreamSpec.Ensure] and [WithStreams]. It is a small
// comparable value: each setter returns a changed copy, so a base can be kept, shared
// between goroutines and forked. If a setter is called twice, the last call wins. Setters
// never fail; [StreamSpec.Validate] reports every fault: [ErrInvalidName],
// [ErrInvalidSubject], [ErrOutOfRange], or [ErrOptionConflict] for options that exclude
// each other.
//
// The Allow and Deny setters only enable options. Without them an option is off in a new
// stream and unchanged in an existing one. If the server is too old for an option,
// [StreamSpec.Ensure] returns a [*StreamConflictError].
type StreamSpec struct {
	set streamOption

	name         string
	subjects     string // joined by subjectSeparator
	subjectCount int    // to detect a separator inside a subject
	description  string

	retention   jetstream.RetentionPolicy
	storage     jetstream.StorageType
	discard     jetstream.DiscardPolicy
	compression jetstream.StoreCompression

	maxAge            time.Duration
	maxBytes          int64
	maxMsgs           int64
	maxMsgsPerSubject int64
	maxMsgSize        int32
	replicas          int
	dedupWindow       time.Duration

	js apiChoice

	letters bool // holds dead letters; see StreamSpec.forLetters
}

// Stream starts the description of the stream of this name. The rules for names are those
// of [RouteBuilder.Durable]. Options that are not set are unchanged in an existing stream;
// a new one gets the server's defaults: file storage, limits retention without any limit,
// [jetstream.DiscardOld], one replica, a duplicate window of 2 minutes, and its own name as
// its only subject.
func Stream(name string) StreamSpec { return StreamSpec{name: name} }

// RetryStream starts the description of a stream for [WithRetryStream]: its only subject is
// <name>.>, it allows message schedules, and a retry is gone once it was handled
// (work-queue retention). Set Replicas, 3 in production; no limit, since that would
// delete retries. It needs nats-server 2.12.
func RetryStream(name string) StreamSpec {
	return Stream(name).Subjects(name + ".>").Retention(jetstream.WorkQueuePolicy).AllowMsgSchedules()
}

// Subjects sets all subjects that the stream captures, at least one; wildcards are
// allowed, overlaps are not. They replace those of an existing stream: messages of a
// removed subject stay stored, but a publish to it finds no stream.
func (s StreamSpec) Subjects(subjects ...string) StreamSpec {
	s.set |= optSubjects
	s.subjects, s.subjectCount = strings.Join(subjects, subjectSeparator), len(subjects)
	return s
}

// Description sets a text of at most 4,096 bytes; an empty one removes it.
func (s StreamSpec) Description(text string) StreamSpec {
	s.set |= optDescription
	s.description = text
	return s
}

// Retention sets what removes messages. The default is [jetstream.LimitsPolicy]. An
// existing stream is changed only between limits and interest, and to interest only while
// it is empty, since messages without interest would be deleted.
func (s StreamSpec) Retention(p jetstream.RetentionPolicy) StreamSpec {
	s.set |= optRetention
	s.retention = p
	return s
}

// Storage sets where messages are stored. The default is [jetstream.FileStorage]. An
// existing stream cannot be changed.
func (s StreamSpec) Storage(t jetstream.StorageType) StreamSpec {
	s.set |= optStorage
	s.storage = t
	return s
}

// Discard sets what happens at MaxMsgs or MaxBytes. The default is [jetstream.DiscardOld],
// which deletes the oldest messages; [jetstream.DiscardNew] refuses new ones.
func (s StreamSpec) Discard(p jetstream.DiscardPolicy) StreamSpec {
	s.set |= optDiscard
	s.discard = p
	return s
}

// Compression sets the compression of stored messages. The default is
// [jetstream.NoCompression]. In an existing stream it applies to new messages.
func (s StreamSpec) Compression(c jetstream.StoreCompression) StreamSpec {
	s.set |= optCompression
	s.compression = c
	return s
}

// MaxAge deletes messages older than d, at least 100 ms; 0, the default, keeps them for
// ever. Unless DedupWindow is set too, a longer duplicate window is shortened to d. An
// existing stream that holds older messages is not changed.
func (s StreamSpec) MaxAge(d time.Duration) StreamSpec {
	s.set |= optMaxAge
	s.maxAge = d
	return s
}

// MaxBytes limits the size of all stored messages, at least 1; -1, the default, is no
// limit. An existing stream with [jetstream.DiscardOld] that holds more is not changed.
func (s StreamSpec) MaxBytes(n int64) StreamSpec {
	s.set |= optMaxBytes
	s.maxBytes = n
	return s
}

// MaxMsgs limits the number of stored messages, at least 1; -1, the default, is no limit.
// An existing stream with [jetstream.DiscardOld] that holds more is not changed.
func (s StreamSpec) MaxMsgs(n int64) StreamSpec {
	s.set |= optMaxMsgs
	s.maxMsgs = n
	return s
}

// MaxMsgsPerSubject limits the stored messages of each subject, at least 1; -1, the
// default, is no limit. At the limit the oldest message of the subject is deleted. An
// existing stream with a subject that holds more is not changed.
func (s StreamSpec) MaxMsgsPerSubject(n int64) StreamSpec {
	s.set |= optMaxMsgsPerSubject
	s.maxMsgsPerSubject = n
	return s
}

// MaxMsgSize refuses new messages above n bytes, headers included; at least 1. With -1, the
// default, only the server's max payload applies.
func (s StreamSpec) MaxMsgSize(n int32) StreamSpec {
	s.set |= optMaxMsgSize
	s.maxMsgSize = n
	return s
}

// Replicas sets the number of servers that store a copy, 1 to 5. The default is 1; use 3 in
// production, so that the loss of one server loses no messages.
func (s StreamSpec) Replicas(n int) StreamSpec {
	s.set |= optReplicas
	s.replicas = n
	return s
}

// DedupWindow sets how long the stream remembers message ids, at least 100 ms and at most
// MaxAge. The default is 2 minutes, or MaxAge if that is shorter.
func (s StreamSpec) DedupWindow(d time.Duration) StreamSpec {
	s.set |= optDedupWindow
	s.dedupWindow = d
	return s
}

// AllowMsgTTL allows a TTL per message (ADR-43), for [Envelope.TTL]. It cannot be disabled
// again. It needs nats-server 2.11.
func (s StreamSpec) AllowMsgTTL() StreamSpec {
	s.set |= optAllowMsgTTL
	return s
}

// AllowMsgSchedules allows delayed messages (ADR-51), for [Envelope.At], which documents
// the subjects that the stream needs for them. It also allows rollups. It cannot be
// disabled again, and excludes DenyPurge and [jetstream.DiscardNew]. It needs nats-server
// 2.12.
func (s StreamSpec) AllowMsgSchedules() StreamSpec {
	s.set |= optAllowMsgSchedules
	return s
}

// AllowAtomicPublish allows atomic batches (ADR-50), for [Publisher.PublishAtomic]. It
// needs nats-server 2.12.
func (s StreamSpec) AllowAtomicPublish() StreamSpec {
	s.set |= optAllowAtomicPublish
	return s
}

// AllowBatchPublish allows the server's fast batch ingest (ADR-50), for
// [WithFastIngest]. It needs nats-server 2.14.
func (s StreamSpec) AllowBatchPublish() StreamSpec {
	s.set |= optAllowBatchPublish
	return s
}

// AllowDirect allows all replicas, not only the leader, to answer reads of single messages
// (ADR-31). Such a read may miss the latest messages. natsx does not use it.
func (s StreamSpec) AllowDirect() StreamSpec {
	s.set |= optAllowDirect
	return s
}

// AllowRollup allows a message to replace all earlier ones of its subject or stream, with
// the header Nats-Rollup "sub" or "all". It excludes DenyPurge.
func (s StreamSpec) AllowRollup() StreamSpec {
	s.set |= optAllowRollup
	return s
}

// DenyDelete denies the deletion of single messages by request; limits still delete. It
// cannot be disabled again. Letters in such a stream can be listed, but neither redriven
// nor purged ([ErrBadDLQ]).
func (s StreamSpec) DenyDelete() StreamSpec {
	s.set |= optDenyDelete
	return s
}

// DenyPurge denies purging the stream, as a whole or by subject. It cannot be disabled
// again, and excludes AllowRollup and AllowMsgSchedules.
func (s StreamSpec) DenyPurge() StreamSpec {
	s.set |= optDenyPurge
	return s
}

// Domain makes the stream in the JetStream of this domain. It excludes APIPrefix. The
// default is the JetStream of the connection's account or, with [WithStreams], that of
// [WithJetStream].
func (s StreamSpec) Domain(name string) StreamSpec {
	s.js.hasDomain, s.js.domain = true, name
	return s
}

// APIPrefix makes the stream in a JetStream whose API another account exports with a
// prefix, such as "JS.ops.API". It excludes Domain.
func (s StreamSpec) APIPrefix(prefix string) StreamSpec {
	s.js.hasPrefix, s.js.prefix = true, prefix
	return s
}

// Validate reports every fault of the description as joined [*StreamError]s,
// without a server.
func (s StreamSpec) Validate() error {
	var faults []error
	add := func(field, value, reason string, err error) {
		faults = append(faults, &StreamError{Stream: s.name, Field: field, Value: value, Reason: reason, Err: err})
	}
	has := func(o streamOption) bool { return s.set&o != 0 }

	if reason := nameFault(s.name); reason != "" {
		add("name", strconv.Quote(s.name), reason, ErrInvalidName)
	}
	if has(optSubjects) {
		s.subjectFaults(add)
	}
	if has(optDescription) {
		switch {
		case len(s.description) > maxDescriptionLength:
			add("description", fmt.Sprintf("of %d bytes", len(s.description)), fmt.Sprintf("is longer than %d bytes", maxDescriptionLength), ErrOutOfRange)
		case !utf8.ValidString(s.description):
			add("description", strconv.Quote(s.description), "is not valid UTF-8", ErrOutOfRange)
		}
	}
	if r := s.retention; has(optRetention) && r != jetstream.LimitsPolicy && r != jetstream.InterestPolicy && r != jetstream.WorkQueuePolicy {
		add("retention", strconv.Itoa(int(r)), "is not a retention policy", ErrOutOfRange)
	}
	if t := s.storage; has(optStorage) && t != jetstream.FileStorage && t != jetstream.MemoryStorage {
		add("storage", strconv.Itoa(int(t)), "is not a storage type", ErrOutOfRange)
	}
	if d := s.discard; has(optDiscard) && d != jetstream.DiscardOld && d != jetstream.DiscardNew {
		add("discard", strconv.Itoa(int(d)), "is not a discard policy", ErrOutOfRange)
	}
	if c := s.compression; has(optCompression) && c != jetstream.NoCompression && c != jetstream.S2Compression {
		add("compression", strconv.Itoa(int(c)), "is not a compression", ErrOutOfRange)
	}
	if has(optMaxAge) && s.maxAge != 0 && s.maxAge < minStreamDuration {
		add("maxAge", s.maxAge.String(), "must be at least "+minStreamDuration.String()+", or 0 for no limit", ErrOutOfRange)
	}
	for _, limit := range []struct {
		opt   streamOption
		field string
		n     int64
	}{
		{optMaxBytes, "maxBytes", s.maxBytes},
		{optMaxMsgs, "maxMsgs", s.maxMsgs},
		{optMaxMsgsPerSubject, "maxMsgsPerSubject", s.maxMsgsPerSubject},
		{optMaxMsgSize, "maxMsgSize", int64(s.maxMsgSize)},
	} {
		if has(limit.opt) && limit.n < 1 && limit.n != -1 {
			add(limit.field, strconv.FormatInt(limit.n, 10), "must be at least 1, or -1 for no limit", ErrOutOfRange)
		}
	}
	if has(optReplicas) && (s.replicas < 1 || s.replicas > maxReplicas) {
		add("replicas", strconv.Itoa(s.replicas), fmt.Sprintf("must be 1 to %d", maxReplicas), ErrOutOfRange)
	}
	if has(optDedupWindow) {
		switch {
		case s.dedupWindow < minStreamDuration:
			add("dedupWindow", s.dedupWindow.String(), "must be at least "+minStreamDuration.String(), ErrOutOfRange)
		case s.maxAge > 0 && s.dedupWindow > s.maxAge:
			add("dedupWindow", s.dedupWindow.String(), "is longer than the maxAge of "+s.maxAge.String(), ErrOptionConflict)
		}
	}
	s.js.faults(add)
	if has(optDenyPurge) && has(optAllowRollup) {
		add("denyPurge", "", "does not fit with allowRollup: a rollup purges", ErrOptionConflict)
	}
	if has(optDenyPurge) && has(optAllowMsgSchedules) {
		add("denyPurge", "", "does not fit with allowMsgSchedules: a fired schedule is rolled up", ErrOptionConflict)
	}
	if has(optAllowMsgSchedules) && has(optDiscard) && s.discard == jetstream.DiscardNew {
		add("allowMsgSchedules", "", "does not fit with DiscardNew", ErrOptionConflict)
	}
	return errors.Join(faults...)
}

func (s StreamSpec) subjectFaults(add func(field, value, reason string, err error)) {
	subjects := s.subjectList()
	if len(subjects) == 0 {
		add("subjects", "", "needs at least one subject", ErrInvalidSubject)
	}
	for i, subject := range subjects {
		reason := filterFault(subject)
		if reason == "" {
			reason = captureFault(subject)
		}
		if reason != "" {
			add("subjects", strconv.Quote(subject), reason, ErrInvalidSubject)
			continue
		}
		for _, earlier := range subjects[:i] {
			if subjectsOverlap(subject, earlier) {
				add("subjects", strconv.Quote(subject), fmt.Sprintf("overlaps with %q", earlier), ErrOptionConflict)
			}
		}
	}
}

// captureFault returns why a stream that acknowledges may not capture a valid subject, or
// "".
func captureFault(subject string) string {
	if subject == ">" {
		return "captures everything, also the acknowledgements"
	}
	for _, own := range []struct{ reserved, except string }{
		{"$JS.>", "$JS.EVENT.>"}, {"$JSC.>", ""}, {"$NRG.>", ""}, {"$SYS.>", "$SYS.ACCOUNT.>"},
	} {
		if subjectsOverlap(subject, own.reserved) && (own.except == "" || !subjectMatches(own.except, subject)) {
			return fmt.Sprintf("overlaps with %q, which belongs to the server", own.reserved)
		}
	}
	return ""
}

// forLetters returns the description with DiscardNew for a new stream, if it captures a
// DLQ subject of specs and neither Discard nor AllowMsgSchedules is set.
func (s StreamSpec) forLetters(specs []Spec) StreamSpec {
	subjects := s.subjectList()
	if s.set&optSubjects == 0 {
		subjects = []string{s.name} // the server's default
	}
	for _, spec := range specs {
		dlq := spec.route.dlq
		if dlq != "" && slices.ContainsFunc(subjects, func(subject string) bool { return subjectMatches(subject, dlq) }) {
			s.letters = s.set&(optDiscard|optAllowMsgSchedules) == 0
		}
	}
	return s
}

// has reports whether the durable of a route is one of this stream: it is named, or
// looked up by the subjects.
func (s StreamSpec) has(route Spec) bool {
	if named := route.route.stream; named != "" {
		return named == s.name
	}
	subjects := s.subjectList()
	if s.set&optSubjects == 0 {
		subjects = []string{s.name}
	}
	return filtersOverlap(subjects, route.route.filters())
}

func (s StreamSpec) subjectList() []string {
	if s.subjectCount == 0 {
		return nil
	}
	list := strings.Split(s.subjects, subjectSeparator)
	if len(list) != s.subjectCount { // a separator inside a subject: one faulty subject
		return []string{s.subjects}
	}
	return list
}

// validateStreams reports every fault of specs, and conflicts between those in the same
// JetStream, without a server.
func validateStreams(specs []StreamSpec) error {
	var faults []error
	for i, s := range specs {
		faults = append(faults, s.Validate())
		for _, earlier := range specs[:i] {
			if s.js != earlier.js {
				continue
			}
			if s.name == earlier.name {
				faults = append(faults, &StreamError{Stream: s.name, Field: "name", Value: strconv.Quote(s.name),
					Reason: "is already used by another stream of this broker", Err: ErrOptionConflict})
				continue
			}
			for _, a := range s.subjectList() {
				for _, b := range earlier.subjectList() {
					if subjectsOverlap(a, b) {
						faults = append(faults, &StreamError{Stream: s.name, Field: "subjects", Value: strconv.Quote(a),
							Reason: fmt.Sprintf("overlaps with %q of stream %q", b, earlier.name), Err: ErrOptionConflict})
					}
				}
			}
		}
	}
	return errors.Join(faults...)
}
