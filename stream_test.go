package natsx

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
)

func TestStreamValidate(t *testing.T) {
	t.Parallel()
	s := Stream("S")
	for _, tc := range []struct {
		name string
		spec StreamSpec
		want []string // the lines of the error, none when the stream is sound
		is   error
	}{
		{"name alone", s, nil, nil},
		{"every option", everyStreamOption(), nil, nil},
		{"no limits", s.MaxAge(0).MaxBytes(-1).MaxMsgs(-1).MaxMsgsPerSubject(-1).MaxMsgSize(-1), nil, nil},
		{"the last call holds", s.Replicas(0).Replicas(3).Subjects().Subjects("a"), nil, nil},
		{"disjoint subjects", s.Subjects("a", "a.>", "b.*", "b.*.c"), nil, nil},
		{"advisories", s.Subjects("$JS.EVENT.ADVISORY.>", "$SYS.ACCOUNT.*.CONNECT"), nil, nil},
		{"dedup window as long as the age", s.MaxAge(time.Minute).DedupWindow(time.Minute), nil, nil},
		{"dedup window without an age", s.MaxAge(0).DedupWindow(time.Hour), nil, nil},

		{"a domain", s.Domain("hub"), nil, nil},
		{"an API prefix", s.APIPrefix("JS.ops.API."), nil, nil},

		{"domain with a space", s.Domain("a b"), []string{`natsx: stream "S": domain "a b": has white space`}, ErrInvalidName},
		{"empty API prefix", s.APIPrefix(""), []string{`natsx: stream "S": apiPrefix "": must not be empty`}, ErrInvalidName},
		{"domain and prefix", s.Domain("hub").APIPrefix("JS.ops.API"), []string{`natsx: stream "S": apiPrefix "JS.ops.API": does not fit with a domain`}, ErrOptionConflict},
		{"empty name", Stream(""), []string{`natsx: stream "": name "": must not be empty`}, ErrInvalidName},
		{"name with a dot", Stream("a.b"), []string{`natsx: stream "a.b": name "a.b": must not contain any of . * > / \`}, ErrInvalidName},
		{"no subjects", s.Subjects(), []string{`natsx: stream "S": subjects: needs at least one subject`}, ErrInvalidSubject},
		{"empty subject", s.Subjects("a", ""), []string{`natsx: stream "S": subjects "": must not be empty`}, ErrInvalidSubject},
		{"separator in a subject", s.Subjects("a\x00b"), []string{`natsx: stream "S": subjects "a\x00b": has a control character`}, ErrInvalidSubject},
		{"wildcard inside a token", s.Subjects("a*"), []string{`natsx: stream "S": subjects "a*": has a wildcard inside the token "a*"`}, ErrInvalidSubject},
		{"everything", s.Subjects(">"), []string{`natsx: stream "S": subjects ">": captures everything, also the acknowledgements`}, ErrInvalidSubject},
		{"the server's API", s.Subjects("$JS.API.>"), []string{`natsx: stream "S": subjects "$JS.API.>": overlaps with "$JS.>", which belongs to the server`}, ErrInvalidSubject},
		{"the API by a wildcard", s.Subjects("*.API.x"), []string{
			`natsx: stream "S": subjects "*.API.x": overlaps with "$JS.>", which belongs to the server`,
		}, ErrInvalidSubject},
		{"the same subject twice", s.Subjects("a", "a"), []string{`natsx: stream "S": subjects "a": overlaps with "a"`}, ErrOptionConflict},
		{"overlapping subjects", s.Subjects("a.>", "x", "a.*.b"), []string{`natsx: stream "S": subjects "a.*.b": overlaps with "a.>"`}, ErrOptionConflict},
		{"long description", s.Description(strings.Repeat("x", 4097)), []string{`natsx: stream "S": description of 4097 bytes: is longer than 4096 bytes`}, ErrOutOfRange},
		{"description of bytes", s.Description("\xff"), []string{`natsx: stream "S": description "\xff": is not valid UTF-8`}, ErrOutOfRange},
		{"unknown retention", s.Retention(7), []string{`natsx: stream "S": retention 7: is not a retention policy`}, ErrOutOfRange},
		{"unknown storage", s.Storage(-1), []string{`natsx: stream "S": storage -1: is not a storage type`}, ErrOutOfRange},
		{"unknown discard", s.Discard(2), []string{`natsx: stream "S": discard 2: is not a discard policy`}, ErrOutOfRange},
		{"unknown compression", s.Compression(9), []string{`natsx: stream "S": compression 9: is not a compression`}, ErrOutOfRange},
		{"negative age", s.MaxAge(-1), []string{`natsx: stream "S": maxAge -1ns: must be at least 100ms, or 0 for no limit`}, ErrOutOfRange},
		{"short age", s.MaxAge(99 * time.Millisecond), []string{`natsx: stream "S": maxAge 99ms: must be at least 100ms, or 0 for no limit`}, ErrOutOfRange},
		{"no bytes", s.MaxBytes(0), []string{`natsx: stream "S": maxBytes 0: must be at least 1, or -1 for no limit`}, ErrOutOfRange},
		{"no messages", s.MaxMsgs(-2), []string{`natsx: stream "S": maxMsgs -2: must be at least 1, or -1 for no limit`}, ErrOutOfRange},
		{"no messages per subject", s.MaxMsgsPerSubject(0), []string{`natsx: stream "S": maxMsgsPerSubject 0: must be at least 1, or -1 for no limit`}, ErrOutOfRange},
		{"no size", s.MaxMsgSize(0), []string{`natsx: stream "S": maxMsgSize 0: must be at least 1, or -1 for no limit`}, ErrOutOfRange},
		{"no replicas", s.Replicas(0), []string{`natsx: stream "S": replicas 0: must be 1 to 5`}, ErrOutOfRange},
		{"six replicas", s.Replicas(6), []string{`natsx: stream "S": replicas 6: must be 1 to 5`}, ErrOutOfRange},
		{"no dedup window", s.DedupWindow(0), []string{`natsx: stream "S": dedupWindow 0s: must be at least 100ms`}, ErrOutOfRange},
		{"dedup window beyond the age", s.MaxAge(time.Minute).DedupWindow(time.Hour), []string{`natsx: stream "S": dedupWindow 1h0m0s: is longer than the maxAge of 1m0s`}, ErrOptionConflict},
		{"rollup that may not purge", s.AllowRollup().DenyPurge(), []string{`natsx: stream "S": denyPurge: does not fit with allowRollup: a rollup purges`}, ErrOptionConflict},
		{"schedules that may not purge", s.AllowMsgSchedules().DenyPurge(), []string{`natsx: stream "S": denyPurge: does not fit with allowMsgSchedules: a fired schedule is rolled up`}, ErrOptionConflict},
		{"schedules that discard new", s.AllowMsgSchedules().Discard(jetstream.DiscardNew), []string{`natsx: stream "S": allowMsgSchedules: does not fit with DiscardNew`}, ErrOptionConflict},
		{"all at once", Stream("").Subjects().MaxMsgs(0).Replicas(9), []string{
			`natsx: stream "": name "": must not be empty`,
			`natsx: stream "": subjects: needs at least one subject`,
			`natsx: stream "": maxMsgs 0: must be at least 1, or -1 for no limit`,
			`natsx: stream "": replicas 9: must be 1 to 5`,
		}, ErrOutOfRange},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := tc.spec.Validate()
			if diff := cmp.Diff(tc.want, lines(err)); diff != "" {
				t.Errorf("Validate (-want +got):\n%s", diff)
			}
			if !errors.Is(err, tc.is) {
				t.Errorf("Validate = %v, want a %v", err, tc.is)
			}
			var fault *StreamError
			if err != nil && (!errors.As(err, &fault) || fault.Stream != tc.spec.name) {
				t.Errorf("Validate = %#v, want a *StreamError of %q", err, tc.spec.name)
			}
		})
	}
}

// everyStreamOption calls every setter with a value that is not its default.
func everyStreamOption() StreamSpec {
	return Stream("EVERY").Subjects("every.>", "other").Description("all of them").
		Retention(jetstream.InterestPolicy).Storage(jetstream.MemoryStorage).Discard(jetstream.DiscardNew).
		Compression(jetstream.S2Compression).MaxAge(time.Hour).MaxBytes(1 << 20).MaxMsgs(1000).
		MaxMsgsPerSubject(10).MaxMsgSize(1 << 10).Replicas(1).DedupWindow(time.Minute).
		AllowMsgTTL().AllowAtomicPublish().AllowBatchPublish().AllowDirect().AllowRollup().DenyDelete()
}

// lines are the faults of a joined error, one a line.
func lines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

func TestStreamSpecForks(t *testing.T) {
	t.Parallel()
	base := Stream("S").Subjects("a", "b").MaxAge(time.Hour)
	fork := base.Replicas(3)
	if base == fork {
		t.Error("a setter changed its receiver, or nothing")
	}
	if again := Stream("S").Subjects("a", "b").MaxAge(time.Hour); base != again {
		t.Errorf("equal chains differ: %+v and %+v", base, again)
	}
	if base == Stream("S").Subjects("a").MaxAge(time.Hour) {
		t.Error("chains of other subjects are equal")
	}
	if Stream("S") == Stream("S").Description("") {
		t.Error("an option set to its zero value is as if it were not set")
	}
}

func TestValidateStreams(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		specs []StreamSpec
		want  []string
	}{
		{"none", nil, nil},
		{"disjoint", []StreamSpec{Stream("A").Subjects("a.>"), Stream("B").Subjects("b.>"), Stream("C")}, nil},
		{"faults of each", []StreamSpec{Stream("A").Replicas(0), Stream("B").MaxMsgs(0)}, []string{
			`natsx: stream "A": replicas 0: must be 1 to 5`,
			`natsx: stream "B": maxMsgs 0: must be at least 1, or -1 for no limit`,
		}},
		{"one name twice", []StreamSpec{Stream("A").Subjects("a"), Stream("A").Subjects("a")}, []string{
			`natsx: stream "A": name "A": is already used by another stream of this broker`,
		}},
		{"overlap", []StreamSpec{Stream("A").Subjects("a.*", "x"), Stream("B").Subjects("y", "a.b")}, []string{
			`natsx: stream "B": subjects "a.b": overlaps with "a.*" of stream "A"`,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tc.want, lines(validateStreams(tc.specs))); diff != "" {
				t.Errorf("validateStreams (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWithStreams(t *testing.T) {
	t.Parallel()
	a, b, c := Stream("A"), Stream("B"), Stream("C")
	got := NewBroker(nil, WithStreams(a, b), WithStreams(c)).streams
	if want := []StreamSpec{a, b, c}; !slices.Equal(got, want) {
		t.Errorf("streams = %v, want %v", got, want)
	}
}

func FuzzStreamSubjects(f *testing.F) {
	f.Add("orders.>", "orders.*")
	f.Add("a\x00b", "c")
	f.Add("", "\x00")
	f.Fuzz(func(t *testing.T, a, b string) {
		want := []string{a, b}
		spec := Stream("S").Subjects(want...)
		if got := spec.subjectList(); !slices.Equal(got, want) && spec.Validate() == nil {
			t.Errorf("Subjects(%q) became %q without a fault", want, got)
		}
	})
}
