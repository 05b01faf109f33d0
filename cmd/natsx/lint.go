package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

const (
	lintPatience = 30 * time.Second      // of one start
	lintGrace    = time.Second / 2       // for what natsx says of a new durable after its start
	lintDrain    = 50 * time.Millisecond // nothing is in hand; pulls that nobody answers are not waited for
	lintDurable  = "natsx-lint"          // stands for a durable that is to be made
)

// finding is one thing that lint reports.
type finding struct {
	Level   string `json:"level"` // refused, warning or change
	Durable string `json:"durable,omitempty"`
	Text    string `json:"text"`
}

// Levels of a finding.
const (
	levelRefused = "refused" // natsx does not start
	levelWarning = "warning" // it starts, and logs this
	levelChange  = "change"  // it starts, and makes or changes this at the server
)

func prepareLint(t *tool) func(context.Context) error {
	dlq := t.flags.String("dlq", "", "`SUBJECT` of the dead letters; without it a DLQ is not checked")
	names := t.flags.String("durable", "", "`NAMES` of the durables, separated by commas (default those of natsx on the stream, or a new one)")
	filter := t.flags.String("filter", "", "`SUBJECT` filter of the routes (default that of each durable, or the stream's subjects)")
	retries := t.flags.Int("retry", 5, "the routes' `NUMBER` of retries, -1 for no limit")
	low := t.flags.Duration("backoff-min", time.Second, "`DELAY` before the first retry")
	high := t.flags.Duration("backoff-max", time.Minute, "longest `DELAY` before a retry")
	ackWait := t.flags.Duration("ack-wait", 0, "AckWait of the routes (default that of each durable)")
	retryStream := t.flags.String("retry-stream", "", "`NAME` of the retry stream of the broker")
	strict := t.flags.Bool("strict", false, "exit with 4 for warnings, too")
	return func(ctx context.Context) error {
		stream, err := t.oneArg("a stream")
		if err != nil {
			return err
		}
		if err := t.connect(ctx); err != nil {
			return err
		}
		configs, err := t.lintedDurables(ctx, stream, *names)
		if err != nil {
			return err
		}
		var found []finding
		seen := map[finding]bool{}
		for _, c := range configs {
			filters := filtersOf(c)
			if *filter != "" {
				filters = []string{*filter}
			}
			route := natsx.Route(filters[0]).Stream(stream).Durable(c.Name).Backoff(*low, *high)
			for _, more := range filters[1:] {
				route = route.Also(more)
			}
			if *retries >= 0 {
				route = route.Retry(*retries)
			}
			if t.isSet("dlq") {
				route = route.DLQ(*dlq)
			}
			if *ackWait != 0 {
				route = route.AckWait(*ackWait)
			}
			if c.PriorityPolicy == jetstream.PriorityPolicyPinned && len(c.PriorityGroups) == 1 {
				route = route.PinnedBy(c.PriorityGroups[0])
			}
			var options []natsx.Option
			if t.isSet("retry-stream") {
				options = append(options, natsx.WithRetryStream(*retryStream))
			}
			spec := route.Handle(func(context.Context, *natsx.Msg) error { return errors.New("lint handles nothing") })
			if err := natsx.NewBroker(t.nc, options...).Validate(spec); err != nil {
				return usageError{err}
			}
			said, err := lint(ctx, t.nc, t.js, spec, c.Name, options...)
			if err != nil {
				return err
			}
			for _, f := range said {
				if !seen[f] {
					seen[f] = true
					found = append(found, f)
				}
			}
		}
		return t.reportFindings(stream, found, *strict)
	}
}

func (t *tool) reportFindings(stream string, found []finding, strict bool) error {
	bad := false
	for _, f := range found {
		bad = bad || f.Level == levelRefused || strict && f.Level == levelWarning
		if t.json {
			if err := t.printJSON(f); err != nil {
				return err
			}
			continue
		}
		about := ""
		if f.Durable != "" {
			about = "durable " + f.Durable + ": "
		}
		fmt.Fprintf(t.out, "%s: %s\n", f.Level, clean(about+f.Text))
	}
	if len(found) == 0 && !t.json {
		fmt.Fprintf(t.out, "natsx starts on stream %s without a warning\n", clean(stream))
	}
	if bad {
		return errPartly
	}
	return nil
}

// lintedDurables are the configurations of the named durables, or of those that natsx has
// on the stream. What does not exist has the stream's subjects as filters.
func (t *tool) lintedDurables(ctx context.Context, stream, names string) (configs []jetstream.ConsumerConfig, _ error) {
	s, err := t.js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrInvalidStreamName) {
		// natsx says it better.
		return []jetstream.ConsumerConfig{{Name: lintDurable}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("stream %q: %w", stream, err)
	}
	known := map[string]jetstream.ConsumerConfig{}
	list := s.ListConsumers(ctx)
	for info := range list.Info() {
		c := info.Config
		c.Name = info.Name
		if known[c.Name] = c; names == "" && c.Metadata[natsxID] != "" {
			configs = append(configs, c)
		}
	}
	if err := list.Err(); err != nil {
		return nil, fmt.Errorf("consumers of stream %q cannot be listed: %w", stream, err)
	}
	if names == "" && len(configs) == 0 {
		names = lintDurable
	}
	if names != "" {
		for name := range strings.SplitSeq(names, ",") {
			c, found := known[name]
			if !found {
				c = jetstream.ConsumerConfig{Name: name, FilterSubjects: s.CachedInfo().Config.Subjects}
			}
			configs = append(configs, c)
		}
	}
	return configs, nil
}

// filtersOf are the filters of a consumer, at least one.
func filtersOf(c jetstream.ConsumerConfig) []string {
	switch {
	case c.FilterSubject != "":
		return []string{c.FilterSubject}
	case len(c.FilterSubjects) > 0:
		return c.FilterSubjects
	}
	return []string{">"}
}

// lint has a broker start with a route, and returns what it says. The broker is kept from
// the server by an understudy of the JetStream API, so it changes and receives nothing.
func lint(ctx context.Context, nc *nats.Conn, js jetstream.JetStream, spec natsx.Spec, durable string, options ...natsx.Option) ([]finding, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lintPatience, fmt.Errorf("natsx did not start within %s; does the user have the permissions to ask about streams and consumers, and to publish to its own inbox?", lintPatience))
	defer cancel()
	u, err := newUnderstudy(nc, js)
	if err != nil {
		return nil, err
	}
	defer u.close()
	log := &findings{durable: durable, warned: make(chan struct{}, 1)}
	broker := natsx.NewBroker(nc, append(options, natsx.WithJetStream(u.js), natsx.WithLogger(slog.New(log)), natsx.WithDrainTimeout(lintDrain))...)
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- broker.Run(running, spec) }()
	var fault error
	select {
	case <-broker.Ready():
		if u.made(durable) && durable != lintDurable {
			select { // natsx compares the names of durables in the background
			case <-log.warned:
			case <-time.After(lintGrace):
			case <-ctx.Done():
			}
		}
		log.close()
		stop()
		<-ended // of the end that was asked for
	case fault = <-ended:
		stop()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	return append(refusals(fault, durable), log.found...), nil
}

// refusals are the faults that are joined in err.
func refusals(err error, durable string) (found []finding) {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		if _, typed := errors.AsType[*natsx.RouteError](err); typed || len(joined.Unwrap()) > 1 {
			for _, err := range joined.Unwrap() {
				found = append(found, refusals(err, durable)...)
			}
			return found
		}
	}
	text := strings.TrimPrefix(err.Error(), "natsx: ")
	if route, ok := err.(*natsx.RouteError); ok {
		// lint's own route and durable need no mention.
		text = strings.TrimSpace(route.Field+" "+cmp.Or(route.Value, "")) + ": " + route.Reason
		return []finding{{levelRefused, durableName(route.Durable), text}}
	}
	return []finding{{levelRefused, durableName(durable), text}}
}

// durableName is empty for the durable that only stands for others.
func durableName(name string) string {
	if name == lintDurable {
		return ""
	}
	return name
}

// findings collects what a broker logs while it starts.
type findings struct {
	durable string
	warned  chan struct{} // gets a value for a warning

	mu    sync.Mutex
	found []finding
	done  bool
}

func (f *findings) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }
func (f *findings) WithAttrs([]slog.Attr) slog.Handler               { return f }
func (f *findings) WithGroup(string) slog.Handler                    { return f }

func (f *findings) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done = true
}

func (f *findings) Handle(_ context.Context, r slog.Record) error {
	level := levelWarning
	if r.Level < slog.LevelWarn {
		if level = levelChange; !strings.Contains(r.Message, "changed") {
			return nil
		}
	}
	text := strings.TrimPrefix(r.Message, "natsx: ")
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "route" && a.Key != "durable" {
			text += fmt.Sprintf(" %s=%s", a.Key, a.Value)
		}
		return true
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.done {
		f.found = append(f.found, finding{level, durableName(f.durable), text})
	}
	if level == levelWarning {
		select {
		case f.warned <- struct{}{}:
		default:
		}
	}
	return nil
}

// understudy answers a broker in the place of the JetStream API, on a prefix of its own.
// What only reads it passes on. Streams and consumers that the broker makes or changes
// exist in its answers alone, and pulls get no answer.
type understudy struct {
	js     jetstream.JetStream // that the broker is to have
	nc     *nats.Conn
	prefix string // of the broker's requests, with its last dot
	real   string // of the API
	sub    *nats.Subscription

	mu    sync.Mutex
	plays map[string]json.RawMessage // answers of STREAM.INFO.* and CONSUMER.INFO.*, by operation
}

func newUnderstudy(nc *nats.Conn, js jetstream.JetStream) (*understudy, error) {
	prefix := nc.NewInbox() + ".API"
	u := &understudy{nc: nc, prefix: prefix + ".", real: apiOf(js), plays: map[string]json.RawMessage{}}
	var err error
	if u.js, err = jetstream.NewWithAPIPrefix(nc, prefix); err != nil {
		return nil, err
	}
	u.sub, err = nc.Subscribe(u.prefix+">", u.answer)
	return u, err
}

func (u *understudy) close() { u.sub.Unsubscribe() }

// made reports whether the broker has made a consumer of that name.
func (u *understudy) made(consumer string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for operation := range u.plays {
		if strings.HasPrefix(operation, "CONSUMER.INFO.") && strings.HasSuffix(operation, "."+consumer) {
			return true
		}
	}
	return false
}

func (u *understudy) answer(m *nats.Msg) {
	operation := strings.TrimPrefix(m.Subject, u.prefix)
	words := strings.SplitN(operation, ".", 3)
	if len(words) < 2 {
		return
	}
	u.mu.Lock()
	played := u.plays[operation]
	u.mu.Unlock()
	switch verb := words[0] + "." + words[1]; verb {
	case "STREAM.INFO", "CONSUMER.INFO":
		if played != nil {
			m.Respond(played)
			return
		}
		u.pass(operation, m)
	case "STREAM.NAMES", "STREAM.LIST", "CONSUMER.NAMES", "CONSUMER.LIST", "STREAM.MSG":
		if strings.HasPrefix(operation, "STREAM.MSG.DELETE") {
			return
		}
		u.pass(operation, m)
	case "STREAM.CREATE":
		u.play("STREAM.INFO."+words[2], "io.nats.jetstream.api.v1.stream_create_response", map[string]any{
			"config": json.RawMessage(m.Data), "created": time.Now().UTC(), "state": map[string]any{},
		}, m)
	case "CONSUMER.CREATE", "CONSUMER.DURABLE":
		go u.createConsumer(m) // it asks the server
	}
}

// pass has the server answer the broker.
func (u *understudy) pass(operation string, m *nats.Msg) {
	u.nc.PublishMsg(&nats.Msg{Subject: u.real + operation, Reply: m.Reply, Header: m.Header, Data: m.Data})
}

// play answers with an object, now and when the operation is asked for.
func (u *understudy) play(operation, kind string, v map[string]any, m *nats.Msg) {
	v["type"] = kind
	data, err := json.Marshal(v)
	if err != nil {
		return
	}
	u.mu.Lock()
	u.plays[operation] = data
	u.mu.Unlock()
	m.Respond(data)
}

// createConsumer answers as the server would: a consumer is made or changed, or exists.
func (u *understudy) createConsumer(m *nats.Msg) {
	var req struct {
		Stream string          `json:"stream_name"`
		Action string          `json:"action"`
		Config json.RawMessage `json:"config"`
	}
	var named struct {
		Name    string `json:"name"`
		Durable string `json:"durable_name"`
	}
	if json.Unmarshal(m.Data, &req) != nil || json.Unmarshal(req.Config, &named) != nil {
		return
	}
	name := cmp.Or(named.Name, named.Durable)
	operation := "CONSUMER.INFO." + req.Stream + "." + name
	answer, err := u.nc.Request(u.real+operation, nil, 5*time.Second)
	if err != nil {
		return
	}
	var info map[string]any
	if json.Unmarshal(answer.Data, &info) != nil {
		return
	}
	_, absent := info["error"]
	switch {
	case absent: // or the stream is one of the broker's own
		info = map[string]any{"stream_name": req.Stream, "name": name, "created": time.Now().UTC(),
			"delivered": map[string]any{}, "ack_floor": map[string]any{}}
	case req.Action != "update":
		m.Respond([]byte(`{"type":"io.nats.jetstream.api.v1.consumer_create_response","error":{"code":400,"err_code":10148,"description":"consumer already exists"}}`))
		return
	}
	info["config"] = req.Config
	u.play(operation, "io.nats.jetstream.api.v1.consumer_create_response", info, m)
}
