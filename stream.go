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

// Bounds of what a stream accepts, those of the server.
const (
	// MaxReplicas is the most copies a stream can have.
	MaxReplicas = 5
	// MaxDescriptionLength is the longest description in bytes.
	MaxDescriptionLength = 4096
	// MinStreamDuration is the shortest MaxAge and DedupWindow.
	MinStreamDuration = 100 * time.Millisecond
)

// subjectSeparator joins subjects in a scalar. Being a control character, it is
// in no valid subject.
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

// StreamSpec describes a stream for [StreamSpec.Ensure] and [WithStreams]. It is
// a small comparable value: each setter returns a changed copy, so a base can be
// kept, shared between goroutines and forked. Setters never fail;
// [StreamSpec.Validate] reports every fault: a bad name is [ErrInvalidName], a bad
// subject [ErrInvalidSubject], a value out of its bounds [ErrOutOfRange], and options
// that do not fit together [ErrOptionConflict]. Of a setter called twice the last
// call holds.
//
// The Allow and Deny setters only switch on. Without them a new stream has the option
// off and an existing one keeps what it has. What a server is too old to know is a
// [*StreamConflictError] of [StreamSpec.Ensure].
type StreamSpec struct {
	set streamOption

	name         string
	subjects     string // joined by subjectSeparator
	subjectCount int    // tells a separator inside a subject from those between
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

	letters bool // holds dead letters, see StreamSpec.forLetters
}

// Stream starts the description of the stream of this name, for which the rules of
// durables' names hold (see [RouteBuilder.Durable]). What is not set keeps its value
// in a stream that exists. A new stream gets the server's defaults: file storage, kept
// by limits without any limit set, the oldest messages discarded at a limit, one
// replica, a dedup window of 2 minutes, and its own name as its only subject.
func Stream(name string) StreamSpec { return StreamSpec{name: name} }

// RetryStream starts the description of a stream for [WithRetryStream]: its only subject is
// <name>.>, it allows message schedules, and a retry is gone once it was handled
// (work-queue retention). Set Replicas, 3 in production; no limit, since that would
// delete retries. It needs nats-server 2.12.
func RetryStream(name string) StreamSpec {
	return Stream(name).Subjects(name + ".>").Retention(jetstream.WorkQueuePolicy).AllowMsgSchedules()
}

// Subjects are all subjects that the stream captures, at least one; wildcards
// are allowed, overlaps are not. The stream's subjects become these: messages of
// a subject that is no longer among them stay stored, but a publish to it finds
// no stream.
func (s StreamSpec) Subjects(subjects ...string) StreamSpec {
	s.set |= optSubjects
	s.subjects, s.subjectCount = strings.Join(subjects, subjectSeparator), len(subjects)
	return s
}

// Description is a text for people, at most [MaxDescriptionLength] bytes; the
// empty one removes it.
func (s StreamSpec) Description(text string) StreamSpec {
	s.set |= optDescription
	s.description = text
	return s
}

// Retention tells what removes messages. Default is [jetstream.LimitsPolicy].
// An existing stream is changed only between limits and interest; to interest
// only while it is empty, since messages without interest would be deleted.
func (s StreamSpec) Retention(p jetstream.RetentionPolicy) StreamSpec {
	s.set |= optRetention
	s.retention = p
	return s
}

// Storage is where messages are kept. Default is [jetstream.FileStorage]. An
// existing stream cannot be changed.
func (s StreamSpec) Storage(t jetstream.StorageType) StreamSpec {
	s.set |= optStorage
	s.storage = t
	return s
}

// Discard tells what happens at MaxMsgs or MaxBytes. Default is
// [jetstream.DiscardOld], which deletes the oldest messages;
// [jetstream.DiscardNew] refuses new ones.
func (s StreamSpec) Discard(p jetstream.DiscardPolicy) StreamSpec {
	s.set |= optDiscard
	s.discard = p
	return s
}

// Compression of stored messages. Default is [jetstream.NoCompression]. In an
// existing stream it holds for what is stored from then on.
func (s StreamSpec) Compression(c jetstream.StoreCompression) StreamSpec {
	s.set |= optCompression
	s.compression = c
	return s
}

// MaxAge deletes messages older than d, at least [MinStreamDuration]; 0 keeps
// them for ever, which is the default. It lowers a longer dedup window with it
// unless DedupWindow is set too. An existing stream that holds older messages is
// not changed.
func (s StreamSpec) MaxAge(d time.Duration) StreamSpec {
	s.set |= optMaxAge
	s.maxAge = d
	return s
}

// MaxBytes limits the size of all stored messages, at least 1; -1 is no limit,
// which is the default. An existing stream with [jetstream.DiscardOld] that
// holds more is not changed.
func (s StreamSpec) MaxBytes(n int64) StreamSpec {
	s.set |= optMaxBytes
	s.maxBytes = n
	return s
}

// MaxMsgs limits the number of stored messages, at least 1; -1 is no limit,
// which is the default. An existing stream with [jetstream.DiscardOld] that
// holds more is not changed.
func (s StreamSpec) MaxMsgs(n int64) StreamSpec {
	s.set |= optMaxMsgs
	s.maxMsgs = n
	return s
}

// MaxMsgsPerSubject limits the stored messages of each subject, at least 1; -1
// is no limit, which is the default. Beyond it the oldest of the subject is
// deleted. An existing stream with a subject that holds more is not changed.
func (s StreamSpec) MaxMsgsPerSubject(n int64) StreamSpec {
	s.set |= optMaxMsgsPerSubject
	s.maxMsgsPerSubject = n
	return s
}

// MaxMsgSize refuses new messages of more bytes, headers included; at least 1;
// -1 is no limit but the server's max payload, which is the default.
func (s StreamSpec) MaxMsgSize(n int32) StreamSpec {
	s.set |= optMaxMsgSize
	s.maxMsgSize = n
	return s
}

// Replicas is the number of servers that keep a copy, 1 to [MaxReplicas].
// Default is 1, which loses what the one server loses: 3 in production.
func (s StreamSpec) Replicas(n int) StreamSpec {
	s.set |= optReplicas
	s.replicas = n
	return s
}

// DedupWindow is how long the stream remembers message ids, at least
// [MinStreamDuration] and at most MaxAge. Default is 2 minutes, or MaxAge when
// that is shorter.
func (s StreamSpec) DedupWindow(d time.Duration) StreamSpec {
	s.set |= optDedupWindow
	s.dedupWindow = d
	return s
}

// AllowMsgTTL lets messages expire one by one (ADR-43), for [Envelope.TTL]. It cannot
// be taken back. It needs nats-server 2.11.
func (s StreamSpec) AllowMsgTTL() StreamSpec {
	s.set |= optAllowMsgTTL
	return s
}

// AllowMsgSchedules lets messages be published for later (ADR-51), for
// [Envelope.At], which tells the subjects that the stream then needs; with that it
// allows rollups. It cannot be taken back, and fits neither DenyPurge nor
// [jetstream.DiscardNew]. It needs nats-server 2.12.
func (s StreamSpec) AllowMsgSchedules() StreamSpec {
	s.set |= optAllowMsgSchedules
	return s
}

// AllowAtomicPublish lets a batch be stored whole or not at all (ADR-50), for
// [Publisher.PublishAtomic]. It needs nats-server 2.12.
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

// AllowDirect lets every replica, not the leader alone, answer reads of single
// messages (ADR-31). Such a read may miss what was stored just before. natsx does not
// use it.
func (s StreamSpec) AllowDirect() StreamSpec {
	s.set |= optAllowDirect
	return s
}

// AllowRollup lets a message replace all earlier ones of its subject or stream, with
// the header Nats-Rollup "sub" or "all". It does not fit DenyPurge.
func (s StreamSpec) AllowRollup() StreamSpec {
	s.set |= optAllowRollup
	return s
}

// DenyDelete refuses the deletion of single messages by request; limits still delete.
// It cannot be taken back. Letters in such a stream can be listed, and neither
// redriven nor purged ([ErrBadDLQ]).
func (s StreamSpec) DenyDelete() StreamSpec {
	s.set |= optDenyDelete
	return s
}

// DenyPurge refuses to purge the stream, as a whole or by subject. It cannot be taken
// back, and fits neither AllowRollup nor AllowMsgSchedules.
func (s StreamSpec) DenyPurge() StreamSpec {
	s.set |= optDenyPurge
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
		case len(s.description) > MaxDescriptionLength:
			add("description", fmt.Sprintf("of %d bytes", len(s.description)), fmt.Sprintf("is longer than %d bytes", MaxDescriptionLength), ErrOutOfRange)
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
	if has(optMaxAge) && s.maxAge != 0 && s.maxAge < MinStreamDuration {
		add("maxAge", s.maxAge.String(), "must be at least "+MinStreamDuration.String()+", or 0 for no limit", ErrOutOfRange)
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
	if has(optReplicas) && (s.replicas < 1 || s.replicas > MaxReplicas) {
		add("replicas", strconv.Itoa(s.replicas), fmt.Sprintf("must be 1 to %d", MaxReplicas), ErrOutOfRange)
	}
	if has(optDedupWindow) {
		switch {
		case s.dedupWindow < MinStreamDuration:
			add("dedupWindow", s.dedupWindow.String(), "must be at least "+MinStreamDuration.String(), ErrOutOfRange)
		case s.maxAge > 0 && s.dedupWindow > s.maxAge:
			add("dedupWindow", s.dedupWindow.String(), "is longer than the maxAge of "+s.maxAge.String(), ErrOptionConflict)
		}
	}
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

// captureFault tells why a stream that acknowledges may not capture a valid
// subject, or nothing.
func captureFault(subject string) string {
	if subject == ">" {
		return "captures everything, the acknowledgements too"
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

// forLetters describes the same stream with DiscardNew for a new one, when it
// captures a dead letter subject of specs and says nothing that excludes it.
func (s StreamSpec) forLetters(specs []Spec) StreamSpec {
	subjects := s.subjectList()
	if s.set&optSubjects == 0 {
		subjects = []string{s.name} // what the server gives a new one
	}
	for _, spec := range specs {
		dlq := spec.route.dlq
		if dlq != "" && slices.ContainsFunc(subjects, func(subject string) bool { return subjectMatches(subject, dlq) }) {
			s.letters = s.set&(optDiscard|optAllowMsgSchedules) == 0
		}
	}
	return s
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

// validateStreams reports every fault of specs, and what does not fit between
// them, without a server.
func validateStreams(specs []StreamSpec) error {
	var faults []error
	for i, s := range specs {
		faults = append(faults, s.Validate())
		for _, earlier := range specs[:i] {
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
