package natsx

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// streamConfig is a stream's configuration without the metadata that the server
// adds itself.
func streamConfig(t testing.TB, nc *nats.Conn, name string) jetstream.StreamConfig {
	t.Helper()
	s := streamNow(t, nc, name)
	cfg := s.CachedInfo().Config
	for key := range cfg.Metadata {
		if strings.HasPrefix(key, "_nats.") {
			delete(cfg.Metadata, key)
		}
	}
	if len(cfg.Metadata) == 0 {
		cfg.Metadata = nil
	}
	return cfg
}

func TestEnsureCreates(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	defaults := jetstream.StreamConfig{
		Retention: jetstream.LimitsPolicy, Storage: jetstream.FileStorage, Discard: jetstream.DiscardOld,
		MaxConsumers: -1, MaxMsgs: -1, MaxBytes: -1, MaxMsgsPerSubject: -1, MaxMsgSize: -1,
		Replicas: 1, Duplicates: 2 * time.Minute,
	}
	plain := defaults
	plain.Name, plain.Subjects = "PLAIN", []string{"PLAIN"}
	short := defaults
	short.Name, short.Subjects = "SHORT", []string{"short.>"}
	short.MaxAge, short.Duplicates = time.Second, time.Second
	timed := defaults
	timed.Name, timed.Subjects = "TIMED", []string{"timed.>"}
	timed.AllowMsgSchedules, timed.AllowRollup = true, true
	kept := defaults
	kept.Name, kept.Subjects = "KEPT", []string{"kept.>"}
	kept.DenyDelete, kept.DenyPurge = true, true
	for _, tc := range []struct {
		spec StreamSpec
		want jetstream.StreamConfig
	}{
		{Stream("PLAIN"), plain},
		{Stream("SHORT").Subjects("short.>").MaxAge(time.Second), short},
		{Stream("TIMED").Subjects("timed.>").AllowMsgSchedules(), timed},
		{Stream("KEPT").Subjects("kept.>").DenyDelete().DenyPurge(), kept},
		{everyStreamOption(), jetstream.StreamConfig{
			Name: "EVERY", Subjects: []string{"every.>", "other"}, Description: "all of them",
			Retention: jetstream.InterestPolicy, Storage: jetstream.MemoryStorage, Discard: jetstream.DiscardNew,
			Compression: jetstream.S2Compression, MaxAge: time.Hour, MaxBytes: 1 << 20, MaxMsgs: 1000,
			MaxMsgsPerSubject: 10, MaxMsgSize: 1 << 10, Replicas: 1, Duplicates: time.Minute, MaxConsumers: -1,
			AllowMsgTTL: true, AllowAtomicPublish: true, AllowBatchPublish: true, AllowDirect: true, AllowRollup: true, DenyDelete: true,
		}},
	} {
		t.Run(tc.want.Name, func(t *testing.T) {
			updates, err := nc.SubscribeSync("$JS.API.STREAM.UPDATE." + tc.want.Name)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := tc.spec.Ensure(testContext(t), nc); err != nil {
					t.Fatalf("Ensure: %v", err)
				}
				if diff := cmp.Diff(tc.want, streamConfig(t, nc, tc.want.Name)); diff != "" {
					t.Errorf("config (-want +got):\n%s", diff)
				}
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			if n, _, _ := updates.Pending(); n != 0 {
				t.Errorf("%d updates of a stream that is as described, want 0", n)
			}
		})
	}
}

func TestEnsureIgnoresTheOrderOfSubjects(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"b", "a"}})
	if err := Stream("S").Subjects("a", "b").Ensure(testContext(t), nc); err != nil {
		t.Fatalf("Ensure: %v", err)
	}
	if diff := cmp.Diff([]string{"b", "a"}, streamConfig(t, nc, "S").Subjects); diff != "" {
		t.Errorf("subjects were updated (-want +got):\n%s", diff)
	}
}

func TestEnsureKeepsWhatIsNotSet(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin.>"}})
	createStream(t, nc, jetstream.StreamConfig{
		Name: "S", Subjects: []string{"a.>"}, Description: "by hand", MaxConsumers: 7, MaxMsgs: 100, MaxAge: time.Hour,
		Discard: jetstream.DiscardNew, MaxMsgsPerSubject: 5, DiscardNewPerSubject: true, DenyDelete: true,
		Sources:          []*jetstream.StreamSource{{Name: "ORIGIN", FilterSubject: "origin.x"}},
		SubjectTransform: &jetstream.SubjectTransformConfig{Source: "a.*", Destination: "b.{{wildcard(1)}}"},
		RePublish:        &jetstream.RePublish{Source: ">", Destination: "copy.>"},
		ConsumerLimits:   jetstream.StreamConsumerLimits{MaxAckPending: 50, InactiveThreshold: time.Hour},
		Metadata:         map[string]string{"owner": "ops"}, AllowDirect: true, AllowRollup: true, FirstSeq: 10,
	})
	want := streamConfig(t, nc, "S")
	want.Subjects, want.MaxAge, want.MaxMsgs, want.AllowMsgTTL = []string{"a.>", "c"}, time.Minute, -1, true

	spec := Stream("S").Subjects("a.>", "c").MaxAge(time.Minute).AllowMsgTTL().MaxMsgs(-1)
	if err := spec.Ensure(testContext(t), nc); err != nil {
		t.Fatalf("Ensure: %v", err)
	}
	if diff := cmp.Diff(want, streamConfig(t, nc, "S")); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
}

func TestEnsureShortensTheDedupWindow(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Duplicates: time.Hour})
	if err := Stream("S").MaxAge(time.Minute).Ensure(testContext(t), nc); err != nil {
		t.Fatalf("Ensure: %v", err)
	}
	if cfg := streamConfig(t, nc, "S"); cfg.MaxAge != time.Minute || cfg.Duplicates != time.Minute {
		t.Errorf("max age %v, dedup window %v, want 1m for both", cfg.MaxAge, cfg.Duplicates)
	}
}

// TestEnsureLimits changes limits of streams that hold ten messages of 100
// bytes: two of s.0 and one of s.1 to s.8 each.
func TestEnsureLimits(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	js := jetStream(t, nc)
	const hour = time.Hour
	for i, tc := range []struct {
		name string
		have jetstream.StreamConfig
		spec func(StreamSpec) StreamSpec
		want []StreamDiff // the conflict, none when the change is made
	}{
		{"messages below", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.MaxMsgs(9) },
			[]StreamDiff{{"maxMsgs", "unlimited", "9", "would delete 1 of 10 messages"}}},
		{"messages exact", jetstream.StreamConfig{MaxMsgs: 50}, func(s StreamSpec) StreamSpec { return s.MaxMsgs(10) }, nil},
		{"messages below, new ones refused", jetstream.StreamConfig{Discard: jetstream.DiscardNew}, func(s StreamSpec) StreamSpec { return s.MaxMsgs(1) }, nil},
		{"messages below, from now on refused", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.MaxMsgs(1).Discard(jetstream.DiscardNew) }, nil},
		{"messages below, from now on deleted", jetstream.StreamConfig{Discard: jetstream.DiscardNew},
			func(s StreamSpec) StreamSpec { return s.MaxMsgs(4).Discard(jetstream.DiscardOld) },
			[]StreamDiff{
				{"discard", "DiscardNew", "DiscardOld", "would delete 6 of 10 messages"},
				{"maxMsgs", "unlimited", "4", "would delete 6 of 10 messages"},
			}},
		{"bytes below", jetstream.StreamConfig{MaxBytes: 1 << 20}, func(s StreamSpec) StreamSpec { return s.MaxBytes(999) },
			[]StreamDiff{{"maxBytes", "1048576", "999", "would delete messages: 1340 bytes are stored"}}},
		{"bytes above", jetstream.StreamConfig{MaxBytes: 1 << 20}, func(s StreamSpec) StreamSpec { return s.MaxBytes(1 << 12) }, nil},
		{"messages per subject below", jetstream.StreamConfig{MaxMsgsPerSubject: 5}, func(s StreamSpec) StreamSpec { return s.MaxMsgsPerSubject(1) },
			[]StreamDiff{{"maxMsgsPerSubject", "5", "1", "would delete 1 of 10 messages"}}},
		{"messages per subject exact", jetstream.StreamConfig{MaxMsgsPerSubject: 5}, func(s StreamSpec) StreamSpec { return s.MaxMsgsPerSubject(2) }, nil},
		{"messages per subject unlimited", jetstream.StreamConfig{MaxMsgsPerSubject: 5}, func(s StreamSpec) StreamSpec { return s.MaxMsgsPerSubject(-1) }, nil},
		{"age above", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.MaxAge(hour) }, nil},
		{"message size below", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.MaxMsgSize(1) }, nil},
		{"interest", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.Retention(jetstream.InterestPolicy) },
			[]StreamDiff{{"retention", "Limits", "Interest", "would delete those of 10 messages without interest"}}},
		{"other subjects", jetstream.StreamConfig{}, func(s StreamSpec) StreamSpec { return s.Subjects("moved." + s.name) }, nil},
		{"storage, retention and a limit", jetstream.StreamConfig{},
			func(s StreamSpec) StreamSpec {
				return s.Storage(jetstream.MemoryStorage).Retention(jetstream.WorkQueuePolicy).MaxMsgs(2).MaxAge(hour).Replicas(1)
			},
			[]StreamDiff{
				{"retention", "Limits", "WorkQueue", "the server cannot change it"},
				{"storage", "File", "Memory", "the server cannot change it"},
				{"maxMsgs", "unlimited", "2", "would delete 8 of 10 messages"},
			}},
		{"rollup of what may not be purged", jetstream.StreamConfig{DenyPurge: true},
			func(s StreamSpec) StreamSpec { return s.AllowRollup().AllowMsgSchedules() },
			[]StreamDiff{
				{"allowMsgSchedules", "false", "true", "the stream has DenyPurge, which cannot be disabled"},
				{"allowRollup", "false", "true", "the stream has DenyPurge, which cannot be disabled"},
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			name := fmt.Sprintf("S%d", i)
			cfg := tc.have
			cfg.Name, cfg.Subjects = name, []string{name + ".*"}
			stream := createStream(t, nc, cfg)
			for j := range 10 {
				if _, err := js.Publish(testContext(t), fmt.Sprintf("%s.%d", name, j%9), make([]byte, 100)); err != nil {
					t.Fatal(err)
				}
			}
			before := streamConfig(t, nc, name)
			err := tc.spec(Stream(name)).Ensure(testContext(t), nc)
			info, infoErr := stream.Info(testContext(t))
			if infoErr != nil {
				t.Fatal(infoErr)
			}
			if info.State.Msgs != 10 {
				t.Errorf("%d messages left, want 10", info.State.Msgs)
			}
			if tc.want == nil {
				if err != nil {
					t.Errorf("Ensure: %v", err)
				} else if cmp.Equal(before, streamConfig(t, nc, name)) {
					t.Error("Ensure changed nothing")
				}
				return
			}
			var conflict *StreamConflictError
			if !errors.As(err, &conflict) || !errors.Is(err, ErrStreamConflict) {
				t.Fatalf("Ensure = %v, want a *StreamConflictError", err)
			}
			if diff := cmp.Diff(&StreamConflictError{Stream: name, Diffs: tc.want}, conflict); diff != "" {
				t.Errorf("conflict (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before, streamConfig(t, nc, name)); diff != "" {
				t.Errorf("config changed (-before +after):\n%s", diff)
			}
		})
	}
}

func TestEnsureKeepsOldMessages(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	stream := createStream(t, nc, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
	publish(t, nc, nats.NewMsg("s"))
	eventually(t, "the message is older than the shortest age", func() bool {
		info, err := stream.Info(testContext(t))
		return err == nil && info.TimeStamp.Sub(info.State.FirstTime) > minStreamDuration
	})
	err := Stream("S").MaxAge(minStreamDuration).Ensure(testContext(t), nc)
	var conflict *StreamConflictError
	if !errors.As(err, &conflict) || len(conflict.Diffs) != 1 || conflict.Diffs[0].Field != "maxAge" ||
		!strings.Contains(conflict.Diffs[0].Reason, "would delete messages: the oldest is ") {
		t.Errorf("Ensure = %v, want a conflict of maxAge", err)
	}
	if n := stored(t, nc, "S"); n != 1 {
		t.Errorf("%d messages left, want 1", n)
	}
}

// TestEnsureConflicts shows what an existing stream makes impossible whatever
// it holds.
func TestEnsureConflicts(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "MIRROR", Mirror: &jetstream.StreamSource{Name: "ORIGIN"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "TUNED", Mirror: &jetstream.StreamSource{Name: "ORIGIN"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "QUEUE", Subjects: []string{"queue"}, Retention: jetstream.WorkQueuePolicy})
	createStream(t, nc, jetstream.StreamConfig{Name: "AGED", Subjects: []string{"aged"}, MaxAge: time.Minute})
	createStream(t, nc, jetstream.StreamConfig{Name: "SEALED", Subjects: []string{"sealed"}})
	if _, err := jetStream(t, nc).UpdateStream(testContext(t), jetstream.StreamConfig{Name: "SEALED", Subjects: []string{"sealed"}, Sealed: true}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		spec StreamSpec
		want string
	}{
		{Stream("MIRROR").Subjects("mine").MaxMsgs(1),
			`natsx: stream "MIRROR" exists with other settings: subjects is [], not ["mine"]: the stream is a mirror of "ORIGIN"`},
		{Stream("QUEUE").Retention(jetstream.LimitsPolicy).Subjects("queue"),
			`natsx: stream "QUEUE" exists with other settings: retention is WorkQueue, not Limits: the server cannot change it`},
		{Stream("SEALED").MaxMsgs(1).Description("x"),
			`natsx: stream "SEALED" exists with other settings: description is "", not "x": the stream is sealed; maxMsgs is unlimited, not 1: the stream is sealed`},
		{Stream("AGED").DedupWindow(time.Hour),
			`natsx: stream "AGED" exists with other settings: dedupWindow is 1m0s, not 1h0m0s: nats: API error: code=500 err_code=10052 description=duplicates window can not be larger then max age`},
		{Stream("ORIGIN").Replicas(3),
			`natsx: stream "ORIGIN" exists with other settings: replicas is 1, not 3: nats: API error: code=500 err_code=10074 description=replicas > 1 not supported in non-clustered mode`},
	} {
		t.Run(tc.spec.name, func(t *testing.T) {
			t.Parallel()
			before := streamConfig(t, nc, tc.spec.name)
			err := tc.spec.Ensure(testContext(t), nc)
			if !errors.Is(err, ErrStreamConflict) || err.Error() != tc.want {
				t.Errorf("Ensure = %v\nwant    %s", err, tc.want)
			}
			if diff := cmp.Diff(before, streamConfig(t, nc, tc.spec.name)); diff != "" {
				t.Errorf("config changed (-before +after):\n%s", diff)
			}
		})
	}
	t.Run("mirror is tuned", func(t *testing.T) {
		t.Parallel()
		if err := Stream("TUNED").MaxAge(time.Hour).Ensure(testContext(t), nc); err != nil {
			t.Errorf("Ensure: %v", err)
		}
	})
	t.Run("new stream refused", func(t *testing.T) {
		t.Parallel()
		err := Stream("NEW").Subjects("origin").Ensure(testContext(t), nc)
		var refusal *jetstream.APIError
		if !errors.As(err, &refusal) || !strings.HasPrefix(err.Error(), `natsx: create stream "NEW": `) || errors.Is(err, ErrStreamConflict) {
			t.Errorf("Ensure = %v, want the server's refusal", err)
		}
	})
}

func TestEnsureByTenAtOnce(t *testing.T) {
	t.Parallel()
	const replicas = 10
	for _, tc := range []struct {
		name string
		url  func(t *testing.T) string
		base StreamSpec
	}{
		{"one server", func(t *testing.T) string { return startServer(t).ClientURL() }, Stream("S")},
		{"cluster", func(t *testing.T) string { return startCluster(t).url() }, Stream("S").Replicas(3)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			url := tc.url(t)
			var conns []*nats.Conn
			for range replicas {
				conns = append(conns, connect(t, url))
			}
			for _, spec := range []StreamSpec{
				tc.base.Subjects("a.>").MaxAge(time.Hour),
				tc.base.Subjects("a.>", "b").MaxAge(2 * time.Hour), // the update of a rollout
			} {
				start := make(chan struct{})
				errs := make([]error, replicas)
				var wg sync.WaitGroup
				for i, nc := range conns {
					wg.Go(func() {
						<-start
						errs[i] = spec.Ensure(testContext(t), nc)
					})
				}
				close(start)
				wg.Wait()
				if err := errors.Join(errs...); err != nil {
					t.Fatalf("Ensure of %v: %v", spec, err)
				}
				cfg := streamConfig(t, conns[0], "S")
				if diff := cmp.Diff(spec.subjectList(), cfg.Subjects); diff != "" || cfg.MaxAge != spec.maxAge {
					t.Errorf("max age %v, want %v; subjects (-want +got):\n%s", cfg.MaxAge, spec.maxAge, diff)
				}
			}
		})
	}
}

// Ten processes that each set another option at the same time: no change is lost.
func TestEnsureOfOtherOptionsAtOnce(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		url    func(t *testing.T) string
		base   jetstream.StreamConfig
		rounds int
	}{
		{name: "one server", rounds: 3},
		{name: "cluster", url: func(t *testing.T) string { return startCluster(t).url() }, base: jetstream.StreamConfig{Replicas: 3}, rounds: 1},
		{name: "interest", base: jetstream.StreamConfig{Retention: jetstream.InterestPolicy}, rounds: 1},
		{name: "work queue", base: jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy}, rounds: 1},
		{name: "no room for a lock", base: jetstream.StreamConfig{MaxConsumers: 1}, rounds: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var url string
			if tc.url != nil {
				url = tc.url(t)
			} else {
				url = startServer(t).ClientURL()
			}
			var conns []*nats.Conn
			for range 10 {
				conns = append(conns, connect(t, url))
			}
			for round := range tc.rounds {
				cfg := tc.base
				cfg.Name = fmt.Sprint("S", round)
				s := createStream(t, conns[0], cfg)
				if cfg.MaxConsumers > 0 {
					if _, err := s.CreateConsumer(testContext(t), jetstream.ConsumerConfig{Durable: "only"}); err != nil {
						t.Fatal(err)
					}
				}
				base := Stream(cfg.Name)
				specs := []StreamSpec{
					base.MaxAge(time.Hour), base.MaxBytes(1 << 20), base.MaxMsgs(1000), base.MaxMsgsPerSubject(100), base.MaxMsgSize(1000),
					base.Description("x"), base.AllowMsgTTL(), base.AllowDirect(), base.DedupWindow(time.Minute), base.Compression(jetstream.S2Compression),
				}
				start := make(chan struct{})
				errs := make([]error, len(specs))
				var wg sync.WaitGroup
				for i, spec := range specs {
					wg.Go(func() {
						<-start
						errs[i] = spec.Ensure(testContext(t), conns[i])
					})
				}
				close(start)
				wg.Wait()
				if err := errors.Join(errs...); err != nil {
					t.Fatal(err)
				}
				got := streamConfig(t, conns[0], cfg.Name)
				for _, spec := range specs {
					if err := spec.verify(got, "2.15.2"); err != nil {
						t.Errorf("round %d: a change is gone: %v", round, err)
					}
				}
				want := 0
				if cfg.MaxConsumers > 0 {
					want = 1
				}
				if n := consumers(t, conns[0], cfg.Name); n != want {
					t.Errorf("%d consumers are left", n)
				}
			}
		})
	}
}

// The lock of a process that was killed is waited for until it ends.
func TestEnsureAfterAKilledOne(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	s := createStream(t, nc, jetstream.StreamConfig{Name: "S", ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: time.Second}})
	lock := streamLock{api: newAPI(nc, jetStream(t, nc)), stream: "S"}
	if !lock.take(testContext(t), &s.CachedInfo().Config) {
		t.Fatal("a free lock is not taken")
	}
	again := streamLock{api: lock.api, stream: "S"}
	short, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if again.take(short, &s.CachedInfo().Config) {
		t.Error("two hold the lock")
	}
	if err := Stream("S").MaxMsgs(5).Ensure(testContext(t), nc); err != nil {
		t.Error(err)
	}
	if got := streamConfig(t, nc, "S").MaxMsgs; got != 5 {
		t.Errorf("max messages %d, want 5", got)
	}
}

// A subject of another stream is named, and so is the stream.
func TestEnsureNamesTheOtherStream(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"other", "orders.*"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "BILLS", Subjects: []string{"bills"}})
	const want = `subject "orders.>" overlaps with stream "ORDERS", which has "orders.*"`
	err := Stream("NEW").Subjects("new", "orders.>").Ensure(testContext(t), nc)
	if !hasCode(err, codeSubjectOverlap) || !strings.Contains(err.Error(), `natsx: create stream "NEW": `+want) || errors.Is(err, ErrStreamConflict) {
		t.Errorf("create: got %v, want %s", err, want)
	}
	err = Stream("BILLS").Subjects("bills", "orders.>").Ensure(testContext(t), nc)
	if !hasCode(err, codeSubjectOverlap) || !strings.Contains(err.Error(), want) || !errors.Is(err, ErrStreamConflict) {
		t.Errorf("update: got %v, want %s", err, want)
	}
}

// tracedJetStream reports each request sent.
func tracedJetStream(t *testing.T, nc *nats.Conn) (jetstream.JetStream, <-chan string) {
	t.Helper()
	sent := make(chan string, 1000)
	js, err := jetstream.New(nc, jetstream.WithClientTrace(&jetstream.ClientTrace{
		RequestSent: func(subject string, _ []byte) { sent <- subject },
	}))
	if err != nil {
		t.Fatal(err)
	}
	return js, sent
}

func TestEnsureWaitsForJetStream(t *testing.T) {
	t.Parallel()
	p := startPhoenix(t, func(o *server.Options) { o.JetStream = false })
	nc := connect(t, p.url())
	js, sent := tracedJetStream(t, nc)
	done := make(chan error, 1)
	book, log := newLogBook()
	go func() { done <- Stream("S").ensure(testContext(t), newAPI(js.Conn(), js), log) }()
	for range 5 {
		receive(t, sent, "a request")
	}
	p.stop()
	p.opts.JetStream = true
	p.start(t)
	if err := receive(t, done, "ensure"); err != nil {
		t.Errorf("ensure: %v", err)
	}
	streamConfig(t, nc, "S")
	if got := book.alarms("stream cannot be ensured, trying again"); len(got) != 1 {
		t.Errorf("%d alarms %q, want 1", len(got), got)
	}
}

// TestEnsureWaitsForALeader starts on the one server of three that is up.
func TestEnsureWaitsForALeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	for _, p := range c.servers[1:] {
		p.stop()
	}
	nc := connect(t, c.servers[0].url())
	js, sent := tracedJetStream(t, nc)
	done := make(chan error, 1)
	_, log := newLogBook()
	go func() { done <- Stream("S").Replicas(3).ensure(testContext(t), newAPI(js.Conn(), js), log) }()
	receive(t, sent, "the first request")
	receive(t, sent, "the second request")
	for _, p := range c.servers[1:] {
		p.start(t)
	}
	if err := receive(t, done, "ensure"); err != nil {
		t.Errorf("ensure: %v", err)
	}
	if got := streamConfig(t, nc, "S").Replicas; got != 3 {
		t.Errorf("%d replicas, want 3", got)
	}
}

func TestEnsureEndsWithItsContext(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, func(o *server.Options) { o.JetStream = false }).ClientURL())
	js, sent := tracedJetStream(t, nc)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- Stream("S").ensure(ctx, newAPI(js.Conn(), js), slog.New(slog.DiscardHandler)) }()
	receive(t, sent, "the first request")
	receive(t, sent, "the second request")
	cancel()
	err := receive(t, done, "ensure")
	if !errors.Is(err, context.Canceled) || !strings.HasPrefix(fmt.Sprint(err), `natsx: look up stream "S": `) {
		t.Errorf("ensure = %v, want the end of its context", err)
	}
}

func TestEnsureAfterItsDeadline(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	ctx, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	err := Stream("S").Ensure(ctx, nc)
	if want := `natsx: look up stream "S": context deadline exceeded`; !errors.Is(err, context.DeadlineExceeded) || err.Error() != want {
		t.Errorf("Ensure = %v, want %s", err, want)
	}
}

func TestEnsureOnADeadConnection(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	nc.Close()
	err := Stream("a b").Subjects("x..y", "").Replicas(0).Ensure(testContext(t), nc)
	want := []string{
		`natsx: stream "a b": name "a b": has white space`,
		`natsx: stream "a b": subjects "x..y": has an empty token`,
		`natsx: stream "a b": subjects "": must not be empty`,
		`natsx: stream "a b": replicas 0: must be 1 to 5`,
	}
	if diff := cmp.Diff(want, lines(err)); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	if err := Stream("S").Ensure(testContext(t), nc); !errors.Is(err, ErrConnectionClosed) || !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("Ensure = %v, want ErrConnectionClosed", err)
	}
}

func TestEnsureWithoutPermission(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "publisher", Password: "p", Permissions: &server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.CREATE.>"}}}},
			{Username: "deaf", Password: "p", Permissions: &server.Permissions{Subscribe: &server.SubjectPermission{Deny: []string{"_INBOX.>"}}}},
		}
	})
	for _, user := range []string{"publisher", "deaf"} {
		t.Run(user, func(t *testing.T) {
			t.Parallel()
			nc := connect(t, srv.ClientURL(), nats.UserInfo(user, "p"))
			err := Stream("S").Ensure(testContext(t), nc)
			if !errors.Is(err, ErrPermission) || !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("Ensure = %v, want ErrPermission", err)
			}
		})
	}
}

// What the user was refused before says nothing of a request without an answer.
func TestEnsureAfterARefusal(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "user", Password: "p", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.DELETE.>"}},
		}}}
	})
	p := startProxy(t, srv.ClientURL())
	nc := connect(t, p.url(), nats.UserInfo("user", "p"))
	if err := nc.Publish("$JS.API.STREAM.DELETE.S", nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is refused", func() bool { return errors.Is(nc.LastError(), nats.ErrPermissionViolation) })
	p.freeze()
	ctx, cancel := context.WithTimeout(testContext(t), 3*time.Second)
	defer cancel()
	if err := Stream("S").Ensure(ctx, nc); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrPermission) {
		t.Errorf("Ensure = %v, want the end of its context", err)
	}
}

func TestStreamPasses(t *testing.T) {
	t.Parallel()
	api := func(http int, code jetstream.ErrorCode) error {
		return fmt.Errorf("natsx: %w", &jetstream.APIError{Code: http, ErrorCode: code})
	}
	for _, tc := range []struct {
		name string
		err  error
		want bool
	}{
		{"JetStream starts", nats.ErrNoResponders, true},
		{"timeout", fmt.Errorf("x: %w", nats.ErrTimeout), true},
		{"request deadline", context.DeadlineExceeded, true},
		{"no meta leader", api(503, 10008), true},
		{"not the leader", api(500, 10009), true},
		{"a server that is away", &jetstream.APIError{Code: 400, ErrorCode: 10005, Description: "no suitable peers for placement, peer offline"}, true},
		{"too few servers", &jetstream.APIError{Code: 400, ErrorCode: 10005, Description: "no suitable peers for placement"}, false},
		{"created by another", jetstream.ErrStreamNameAlreadyInUse, true},
		{"deleted by another", jetstream.ErrStreamNotFound, true},
		{"no JetStream for the account", jetstream.ErrJetStreamNotEnabledForAccount, false},
		{"no resources", api(503, 10023), false},
		{"invalid configuration", api(500, 10052), false},
		{"subjects of another stream", api(400, 10065), false},
		{"closed", fmt.Errorf("%w: %w", ErrConnectionClosed, nats.ErrConnectionClosed), false},
		{"permission", fmt.Errorf("%w: %w", ErrPermission, nats.ErrTimeout), false},
		{"unknown", errors.New("x"), false},
	} {
		if got := transient(tc.err); got != tc.want {
			t.Errorf("%s: transient(%v) = %v, want %v", tc.name, tc.err, got, tc.want)
		}
	}
}

// TestStreamVerify stands for a server of an older version, which ignores what
// it does not know.
func TestStreamVerify(t *testing.T) {
	t.Parallel()
	spec := Stream("S").AllowMsgTTL().AllowBatchPublish().AllowDirect().MaxMsgs(5)
	got := jetstream.StreamConfig{Name: "S", AllowDirect: true, MaxMsgs: 5}
	for version, want := range map[string]string{
		"2.12.15": `natsx: stream "S": allowMsgTTL needs nats-server 2.11, this is 2.12.15, and that of the stream seems to be older; allowBatchPublish needs nats-server 2.14, this is 2.12.15`,
		"2.10.29": `natsx: stream "S": allowMsgTTL needs nats-server 2.11, this is 2.10.29; allowBatchPublish needs nats-server 2.14, this is 2.10.29`,
	} {
		err := spec.verify(got, version)
		var conflict *StreamConflictError
		if !errors.Is(err, ErrServerTooOld) || !errors.Is(err, ErrStreamConflict) || !errors.As(err, &conflict) || len(conflict.Diffs) != 2 || err.Error() != want {
			t.Errorf("verify = %v, want %s", err, want)
		}
	}
	got.AllowMsgTTL, got.AllowBatchPublish, got.MaxMsgs = true, true, 4
	const want = `natsx: stream "S" exists with other settings: maxMsgs is 4, not 5: the server did not apply it`
	if err := spec.verify(got, "2.15.2"); !errors.Is(err, ErrStreamConflict) || errors.Is(err, ErrServerTooOld) || err.Error() != want {
		t.Errorf("verify = %v, want %s", err, want)
	}
	got.MaxMsgs = 5
	if err := spec.verify(got, "2.15.2"); err != nil {
		t.Errorf("verify = %v, want nil", err)
	}
}

// A server of 2.12 refuses what it does not know.
func TestStreamOfAnUnknownOption(t *testing.T) {
	t.Parallel()
	spec := Stream("S").AllowMsgTTL().AllowBatchPublish()
	refusal := error(&jetstream.APIError{Code: 400, ErrorCode: codeInvalidJSON})
	err := spec.tooOld(refusal, "2.12.15")
	if want := `natsx: stream "S": allowBatchPublish needs nats-server 2.14, this is 2.12.15`; err == nil || err.Error() != want ||
		!errors.Is(err, ErrServerTooOld) || !errors.Is(err, ErrStreamConflict) || !hasCode(err, codeInvalidJSON) {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := spec.tooOld(refusal, "2.15.2"); err != nil {
		t.Errorf("got %v of a server that knows all", err)
	}
	if err := spec.tooOld(&jetstream.APIError{Code: 500, ErrorCode: 10052}, "2.12.15"); err != nil {
		t.Errorf("got %v for another refusal", err)
	}
}

// TestRunEnsuresStreams starts a route whose stream does not exist before.
func TestRunEnsuresStreams(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	got := make(chan string, 1)
	handle := func(_ context.Context, m *Msg) error {
		got <- m.Stream()
		return nil
	}
	b := NewBroker(nc, WithStreams(Stream("ORDERS").Subjects("orders.*"), Stream("DLQ").Subjects("dlq.>")))
	runBroker(t, b, Route("orders.*").Durable("billing").Retry(1).DLQ("dlq.orders").Handle(handle))
	publish(t, nc, nats.NewMsg("orders.new"))
	if stream := receive(t, got, "the message"); stream != "ORDERS" {
		t.Errorf("message of stream %q, want ORDERS", stream)
	}
}

func TestRunReportsStreamConflicts(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	createStream(t, nc, jetstream.StreamConfig{Name: "A", Subjects: []string{"a"}})
	createStream(t, nc, jetstream.StreamConfig{Name: "B", Subjects: []string{"b"}})
	b := NewBroker(nc, WithStreams(Stream("A").Storage(jetstream.MemoryStorage), Stream("B").Storage(jetstream.MemoryStorage)))
	err := b.Run(testContext(t), Route("a").Durable("d").Handle(nop))
	want := []string{
		`natsx: stream "A" exists with other settings: storage is File, not Memory: the server cannot change it`,
		`natsx: stream "B" exists with other settings: storage is File, not Memory: the server cannot change it`,
	}
	if diff := cmp.Diff(want, lines(err)); diff != "" || !errors.Is(err, ErrStreamConflict) {
		t.Errorf("Run (-want +got):\n%s", diff)
	}
}

func TestStreamsFor(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	js := jetStream(t, nc)
	createStream(t, nc, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*", "bills"}, Storage: jetstream.MemoryStorage})
	createStream(t, nc, jetstream.StreamConfig{Name: "AUDIT", Subjects: []string{"audit.>", "orders.*.log"}, Storage: jetstream.MemoryStorage})
	for _, tc := range []struct {
		subject string
		want    []string
	}{
		{"orders.new", []string{"ORDERS"}},
		{"orders.>", []string{"AUDIT", "ORDERS"}},
		{"*.*.log", []string{"AUDIT"}},
		{"bills", []string{"ORDERS"}},
		{"nothing", nil},
	} {
		got, err := newAPI(js.Conn(), js).streamNames(testContext(t), tc.subject)
		if diff := cmp.Diff(tc.want, got); err != nil || diff != "" {
			t.Errorf("streamNames(%q): %v (-want +got):\n%s", tc.subject, err, diff)
		}
	}
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if names, err := newAPI(js.Conn(), js).streamNames(ctx, "bills"); !errors.Is(err, context.Canceled) {
		t.Errorf("streamNames of a cancelled context = %q, %v", names, err)
	}
}

func TestStreamNamesPages(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t).ClientURL())
	js := jetStream(t, nc)
	const count = server.JSApiNamesLimit + 5
	for i := range count {
		if _, err := js.CreateStream(testContext(t), jetstream.StreamConfig{
			Name: fmt.Sprintf("S%04d", i), Subjects: []string{fmt.Sprintf("many.%d", i)}, Storage: jetstream.MemoryStorage,
		}); err != nil {
			t.Fatal(err)
		}
	}
	names, err := newAPI(js.Conn(), js).streamNames(testContext(t), "many.*")
	if err != nil || len(names) != count {
		t.Fatalf("streamNames = %d names, %v, want %d", len(names), err, count)
	}
	if names[0] != "S0000" || names[count-1] != fmt.Sprintf("S%04d", count-1) {
		t.Errorf("streamNames = %s to %s, want all in order", names[0], names[count-1])
	}
}

// A stream is made in the JetStream that its description names, also by a broker whose
// other streams are in its own.
func TestEnsureInAnotherJetStream(t *testing.T) {
	t.Parallel()
	hub, leaf := hubAndLeaf(t)
	if err := Stream("FAR").Domain("hub").Ensure(testContext(t), leaf); err != nil {
		t.Fatalf("Ensure with a domain: %v", err)
	}
	if err := Stream("PREFIXED").APIPrefix("$JS.hub.API.").Ensure(testContext(t), leaf); err != nil {
		t.Fatalf("Ensure with a prefix: %v", err)
	}
	b := NewBroker(leaf, WithStreams(Stream("S").Subjects("far.>").Domain("hub"), Stream("S").Subjects("near.>")))
	runBroker(t, b, Route("near.a").Durable("d").Handle(func(context.Context, *Msg) error { return nil }))
	for _, name := range []string{"FAR", "PREFIXED"} {
		if _, err := jetStream(t, leaf).Stream(testContext(t), name); !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Errorf("stream %s in the leaf's JetStream: got %v, want ErrStreamNotFound", name, err)
		}
		streamConfig(t, hub, name)
	}
	for nc, want := range map[*nats.Conn]string{hub: "far.>", leaf: "near.>"} {
		if diff := cmp.Diff([]string{want}, streamConfig(t, nc, "S").Subjects); diff != "" {
			t.Errorf("subjects of S (-want +got):\n%s", diff)
		}
	}
}
