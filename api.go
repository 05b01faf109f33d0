package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// apiTimeout is the longest wait for an answer of the JetStream API.
	apiTimeout = 5 * time.Second
	// readPatience is how long a tool waits for progress.
	readPatience = 30 * time.Second
)

var violation = regexp.MustCompile(`(?i)permissions violation for (publish|subscription) to "([^"]+)"`)

// permissionError parses an asynchronous error of the connection, and returns nil if it
// is not a permission violation.
func permissionError(err error) *PermissionError {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return nil
	}
	m := violation.FindStringSubmatch(err.Error())
	if m == nil {
		return nil
	}
	op := "publish"
	if m[1][0] == 'S' || m[1][0] == 's' {
		op = "subscribe"
	}
	return &PermissionError{Operation: op, Subject: m[2], Err: err}
}

// inboxPrefix is the prefix of every inbox of nc, with its last dot.
func inboxPrefix(nc *nats.Conn) string {
	if prefix := nc.Opts.InboxPrefix; prefix != "" {
		return prefix + "."
	}
	return nats.InboxPrefix
}

// asyncHub passes the asynchronous errors of one connection to all watchers and then to
// the connection's previous handler. That is restored when no watcher is left, unless
// the application has set another one meanwhile.
type asyncHub struct {
	nc       *nats.Conn
	previous nats.ErrHandler
	watchers map[*asyncWatch]struct{} // guarded by hubs.Mutex
}

type asyncWatch struct {
	hub *asyncHub // guarded by hubs.Mutex
	fn  func(*nats.Subscription, error)
}

var hubs = struct {
	sync.Mutex
	of map[*nats.Conn]*asyncHub
}{of: map[*nats.Conn]*asyncHub{}}

// watchAsync calls fn for every asynchronous error of nc until the watch is
// stopped. fn must not block.
func watchAsync(nc *nats.Conn, fn func(*nats.Subscription, error)) *asyncWatch {
	hubs.Lock()
	defer hubs.Unlock()
	h, current := hubs.of[nc], nc.ErrorHandler()
	if replaced := h; h == nil || !isHub(current) {
		h = &asyncHub{nc: nc, previous: current, watchers: map[*asyncWatch]struct{}{}}
		if replaced != nil {
			// The application has replaced the handler. Its own may call the replaced one.
			h.watchers, replaced.watchers = replaced.watchers, nil
			for w := range h.watchers {
				w.hub = h
			}
		}
		hubs.of[nc] = h
		nc.SetErrorHandler(h.handle)
	}
	w := &asyncWatch{hub: h, fn: fn}
	h.watchers[w] = struct{}{}
	return w
}

// stop ends the watch. A call of its function may still run.
func (w *asyncWatch) stop() {
	hubs.Lock()
	defer hubs.Unlock()
	delete(w.hub.watchers, w)
	if len(w.hub.watchers) == 0 && hubs.of[w.hub.nc] == w.hub {
		delete(hubs.of, w.hub.nc)
		if isHub(w.hub.nc.ErrorHandler()) {
			w.hub.nc.SetErrorHandler(w.hub.previous)
		}
	}
}

var hubHandler = reflect.ValueOf((*asyncHub)(nil).handle).Pointer()

// isHub reports whether fn is the handle method of a hub.
func isHub(fn nats.ErrHandler) bool { return reflect.ValueOf(fn).Pointer() == hubHandler }

func (h *asyncHub) handle(nc *nats.Conn, sub *nats.Subscription, err error) {
	hubs.Lock()
	watchers := make([]*asyncWatch, 0, len(h.watchers))
	for w := range h.watchers {
		watchers = append(watchers, w)
	}
	hubs.Unlock()
	for _, w := range watchers {
		w.fn(sub, err)
	}
	if h.previous != nil {
		h.previous(nc, sub, err)
	}
}

// patience is how long a try, counted from 0, waits for an answer of the JetStream API.
func patience(try int) time.Duration {
	return min(time.Second+time.Duration(min(try, 10))*time.Second/2, apiTimeout)
}

// apiPrefix is the prefix of every subject of the JetStream API, with its last dot.
func apiPrefix(js jetstream.JetStream) string {
	switch opts := js.Options(); {
	case opts.APIPrefix != "":
		return strings.TrimSuffix(opts.APIPrefix, ".") + "."
	case opts.Domain != "":
		return "$JS." + opts.Domain + ".API."
	}
	return "$JS.API."
}

// apiChoice is the JetStream that a stream or query names with Domain or APIPrefix. Its zero
// value is that of the connection's account.
type apiChoice struct {
	domain, prefix       string
	hasDomain, hasPrefix bool
}

func (c apiChoice) faults(add func(field, value, reason string, err error)) {
	if reason := groupFault(c.domain); c.hasDomain && reason != "" {
		add("domain", strconv.Quote(c.domain), reason, ErrInvalidName)
	}
	if reason := subjectFault(strings.TrimSuffix(c.prefix, ".")); c.hasPrefix && reason != "" {
		add("apiPrefix", strconv.Quote(c.prefix), reason, ErrInvalidName)
	}
	if c.hasDomain && c.hasPrefix {
		add("apiPrefix", strconv.Quote(c.prefix), "does not fit with a domain", ErrOptionConflict)
	}
}

func (c apiChoice) jetStream(nc *nats.Conn) (jetstream.JetStream, error) {
	switch {
	case c.hasDomain:
		return jetstream.NewWithDomain(nc, c.domain)
	case c.hasPrefix:
		return jetstream.NewWithAPIPrefix(nc, strings.TrimSuffix(c.prefix, "."))
	}
	return jetstream.New(nc)
}

// transient reports whether err is expected to go away without intervention.
func transient(err error) bool {
	for _, refusal := range []error{ErrPermission, ErrConnectionClosed} {
		if errors.Is(err, refusal) {
			return false
		}
	}
	for _, passing := range []error{
		nats.ErrNoResponders, nats.ErrTimeout, context.DeadlineExceeded,
		nats.ErrDisconnected, nats.ErrStaleConnection, nats.ErrReconnectBufExceeded,
		jetstream.ErrStreamNameAlreadyInUse, jetstream.ErrStreamNotFound, // another process was faster
	} {
		if errors.Is(err, passing) {
			return true
		}
	}
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	switch api.ErrorCode {
	case codeClusterNotLeader, codeClusterNoLeader, codeStreamOffline, codeConsumerOffline:
		return true
	case codeClusterNoPeers: // transient while servers restart
		return strings.Contains(api.Description, "peer offline")
	case codeClusterRequired, codeInsufficientResources, codeNoAccount, codeClusterUnsupported, codeNotEnabledOnAccount, codeNotEnabled:
		return false
	}
	return api.Code == 503
}

// closedCause wraps the errors of a closed connection with ErrConnectionClosed.
func closedCause(err error) error {
	for _, closed := range []error{nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrInvalidConnection} {
		if errors.Is(err, closed) {
			return fmt.Errorf("%w: %w", ErrConnectionClosed, err)
		}
	}
	return err
}

// storedMsg is a message as its stream keeps it.
type storedMsg struct {
	subject string
	seq     uint64
	time    time.Time
	header  nats.Header
	data    []byte
}

// api is the client of the JetStream API of one account, domain or prefix. It owns
// waiting and retrying. It reads single messages from the stream's leader, since a
// direct get may be answered by a replica that lags behind. It is safe for concurrent
// use.
type api struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	prefix string        // of all subjects, with its last dot
	turns  chan struct{} // semaphore of inTurn

	mu     sync.Mutex
	recent map[string]recentStream // by name
}

// recentStream is the last information about a stream.
type recentStream struct {
	info *jetstream.StreamInfo
	at   time.Time
}

// askAtOnce is how many routes may send requests at the same time.
const askAtOnce = 16

func newAPI(nc *nats.Conn, js jetstream.JetStream) *api {
	return &api{nc: nc, js: js, prefix: apiPrefix(js), turns: make(chan struct{}, askAtOnce), recent: map[string]recentStream{}}
}

// retry is a policy for retrying transient failures.
type retry struct {
	limit   time.Duration         // in total, 0 for until the context ends
	told    func(error)           // called before every further try, may be nil
	enough  func(err error) bool  // reports whether to give up on a transient failure, may be nil
	explain func(err error) error // adds to what is told and returned, may be nil
}

// do calls try until it succeeds or its failure is not transient. A request during a
// leader election is never answered, so the first tries are short; a loaded server needs
// longer ones.
func (r retry) do(ctx context.Context, try func(context.Context) error) error {
	begun := time.Now()
	pause := backoff{first: 50 * time.Millisecond, most: 2 * time.Second}
	for tries := 0; ; tries++ {
		limited, cancel := context.WithTimeout(ctx, patience(tries))
		err := try(limited)
		cancel()
		if err != nil && r.explain != nil {
			err = r.explain(err)
		}
		if err == nil || ctx.Err() != nil || !transient(err) || r.enough != nil && r.enough(err) ||
			r.limit > 0 && time.Since(begun) > r.limit {
			return err
		}
		if r.told != nil {
			r.told(err)
		}
		if !pause.wait(ctx) {
			return err
		}
	}
}

// once makes one call of the API, on prefix and operation, within apiTimeout. A
// permission that the user lacks ends it at once: the server refuses such a request
// with an asynchronous error only.
func (a *api) once(ctx context.Context, operation string, fn func(context.Context) error) error {
	return requestWith(ctx, a.nc, a.prefix+operation, fn)
}

// inTurn calls fn, at most askAtOnce at the same time.
func (a *api) inTurn(ctx context.Context, fn func() error) error {
	select {
	case a.turns <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-a.turns }()
	return fn()
}

// recentStreamInfo is streamInfo whose result may be as old as age, for many routes of
// one stream.
func (a *api) recentStreamInfo(ctx context.Context, name string, age time.Duration) (*jetstream.StreamInfo, error) {
	a.mu.Lock()
	known := a.recent[name]
	if time.Since(known.at) < age && known.info != nil {
		a.mu.Unlock()
		return known.info, nil
	}
	// Meanwhile others get the known information.
	known.at = time.Now()
	a.recent[name] = known
	a.mu.Unlock()
	info, err := a.streamInfo(ctx, name)
	if err == nil {
		a.mu.Lock()
		a.recent[name] = recentStream{info, time.Now()}
		a.mu.Unlock()
	}
	return info, err
}

// streamNames returns the names of all streams with a subject that overlaps subject,
// which may have wildcards. If there is none it returns no names and no error.
func (a *api) streamNames(ctx context.Context, subject string) (names []string, err error) {
	err = a.once(ctx, "STREAM.NAMES", func(ctx context.Context) error {
		names = nil
		lister := a.js.StreamNames(ctx, jetstream.WithStreamListSubject(subject))
		for name := range lister.Name() {
			names = append(names, name)
		}
		return lister.Err()
	})
	return names, err
}

func (a *api) streamInfo(ctx context.Context, name string) (info *jetstream.StreamInfo, err error) {
	err = a.once(ctx, "STREAM.INFO."+name, func(ctx context.Context) error {
		s, err := a.js.Stream(ctx, name)
		if err == nil {
			info = s.CachedInfo()
		}
		return err
	})
	return info, err
}

func (a *api) consumerInfo(ctx context.Context, stream, name string) (info *jetstream.ConsumerInfo, err error) {
	err = a.once(ctx, "CONSUMER.INFO."+stream+"."+name, func(ctx context.Context) error {
		c, err := a.js.Consumer(ctx, stream, name)
		if err == nil {
			info = c.CachedInfo()
		}
		return err
	})
	return info, err
}

// createConsumer creates a consumer, or returns an existing one with the same settings.
func (a *api) createConsumer(ctx context.Context, stream string, cfg jetstream.ConsumerConfig) (*jetstream.ConsumerInfo, error) {
	return a.putConsumer(ctx, stream, cfg, a.js.CreateConsumer)
}

// updateConsumer changes an existing consumer.
func (a *api) updateConsumer(ctx context.Context, stream string, cfg jetstream.ConsumerConfig) (*jetstream.ConsumerInfo, error) {
	return a.putConsumer(ctx, stream, cfg, a.js.UpdateConsumer)
}

func (a *api) putConsumer(ctx context.Context, stream string, cfg jetstream.ConsumerConfig,
	put func(context.Context, string, jetstream.ConsumerConfig) (jetstream.Consumer, error)) (info *jetstream.ConsumerInfo, err error) {
	operation := "CONSUMER.CREATE." + stream + "." + cfg.Name
	if cfg.FilterSubject != "" {
		operation += "." + cfg.FilterSubject
	}
	err = a.once(ctx, operation, func(ctx context.Context) error {
		c, err := put(ctx, stream, cfg)
		if err == nil {
			info = c.CachedInfo()
		}
		return err
	})
	return info, err
}

func (a *api) deleteConsumer(ctx context.Context, stream, name string) error {
	return a.once(ctx, "CONSUMER.DELETE."+stream+"."+name, func(ctx context.Context) error {
		return a.js.DeleteConsumer(ctx, stream, name)
	})
}

// getRequest asks for one message: the one at Seq, the first that matches NextFor from
// Seq or StartTime on, or the last that matches LastFor. A server before 2.11 ignores
// StartTime.
type getRequest struct {
	Seq       uint64     `json:"seq,omitempty"`
	StartTime *time.Time `json:"start_time,omitempty"`
	NextFor   string     `json:"next_by_subj,omitempty"`
	LastFor   string     `json:"last_by_subj,omitempty"`
}

// get returns nil without an error if there is no such message.
func (a *api) get(ctx context.Context, stream string, req getRequest) (*storedMsg, error) {
	var r struct {
		Message *struct {
			Subject string    `json:"subject"`
			Seq     uint64    `json:"seq"`
			Header  []byte    `json:"hdrs"`
			Data    []byte    `json:"data"`
			Time    time.Time `json:"time"`
		} `json:"message"`
	}
	switch err := a.ask(ctx, "STREAM.MSG.GET."+stream, req, &r); {
	case hasCode(err, codeNoMessage):
		return nil, nil
	case err != nil:
		return nil, err
	case r.Message == nil:
		return nil, errors.New("natsx: the server's answer has no message")
	}
	m := &storedMsg{subject: r.Message.Subject, seq: r.Message.Seq, time: r.Message.Time, data: r.Message.Data}
	if len(r.Message.Header) > 0 {
		// The server stores any header block. One that cannot be parsed is ignored, as
		// nats.go does on delivery.
		m.header, _ = nats.DecodeHeadersMsg(r.Message.Header)
	}
	return m, nil
}

// remove deletes a message and reports whether this call did it. It is no error if the
// message does not exist.
func (a *api) remove(ctx context.Context, stream string, seq uint64) (bool, error) {
	body, err := json.Marshal(struct {
		Seq     uint64 `json:"seq"`
		NoErase bool   `json:"no_erase"`
	}{seq, true})
	if err != nil {
		return false, err
	}
	unanswered := false
	err = retry{limit: readPatience, enough: isStreamNotFound}.do(ctx, func(ctx context.Context) error {
		err := a.askOnce(ctx, "STREAM.MSG.DELETE."+stream, body, &struct{}{})
		var refused *jetstream.APIError
		unanswered = unanswered || err != nil && !errors.As(err, &refused) && !errors.Is(err, nats.ErrNoResponders)
		return err
	})
	if err == nil || isStreamNotFound(err) {
		return err == nil, err
	}
	// The server has several errors for a message that does not exist.
	if m, gone := a.get(ctx, stream, getRequest{Seq: seq}); m == nil && gone == nil {
		return unanswered, nil
	}
	return false, err
}

func isStreamNotFound(err error) bool { return hasCode(err, codeStreamNotFound) }

// ask makes one request to the API, and retries transient failures for readPatience.
func (a *api) ask(ctx context.Context, operation string, request, response any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	return retry{limit: readPatience, enough: isStreamNotFound}.do(ctx, func(ctx context.Context) error { return a.askOnce(ctx, operation, body, response) })
}

// askStreamInfo is streamInfo with the retries of ask.
func (a *api) askStreamInfo(ctx context.Context, name string) (*jetstream.StreamInfo, error) {
	var info jetstream.StreamInfo
	if err := a.ask(ctx, "STREAM.INFO."+name, struct{}{}, &info); err != nil {
		return nil, err
	}
	return &info, nil
}

func (a *api) askOnce(ctx context.Context, operation string, body []byte, response any) error {
	var m *nats.Msg
	err := a.once(ctx, operation, func(ctx context.Context) (err error) {
		m, err = a.nc.RequestWithContext(ctx, a.prefix+operation, body)
		return err
	})
	var refused struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err == nil {
		err = json.Unmarshal(m.Data, &refused)
	}
	if err == nil && refused.Error != nil {
		err = refused.Error
	}
	if err == nil {
		err = json.Unmarshal(m.Data, response)
	}
	if err != nil {
		return failure(operation+": "+cause(err), err)
	}
	return nil
}

// inactiveThreshold is want, or the stream's limit if that is lower.
func inactiveThreshold(stream *jetstream.StreamConfig, want time.Duration) time.Duration {
	if most := stream.ConsumerLimits.InactiveThreshold; most > 0 {
		return min(want, most)
	}
	return want
}

// acknowledge acknowledges the message of an ack subject until the server confirms it. It
// gives up after limit, 0 for none, or when ctx ends.
func (a *api) acknowledge(ctx context.Context, subject string, limit time.Duration) error {
	return retry{limit: limit}.do(ctx, func(ctx context.Context) error {
		return requestWith(ctx, a.nc, subject, func(ctx context.Context) error {
			_, err := a.nc.RequestWithContext(ctx, subject, ackAck)
			return err
		})
	})
}

// requestWith runs fn, which makes a request on subject, within apiTimeout. A
// permission that the user lacks ends it at once: the server refuses such a
// request with an asynchronous error only.
func requestWith(ctx context.Context, nc *nats.Conn, subject string, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	ctx, refuse := context.WithCancelCause(ctx)
	defer refuse(nil)
	w := watchAsync(nc, func(_ *nats.Subscription, err error) {
		denied := permissionError(err)
		if denied != nil && (denied.Subject == subject || denied.Operation == "subscribe" && strings.HasPrefix(denied.Subject, inboxPrefix(nc))) {
			refuse(denied)
		}
	})
	defer w.stop()
	err := fn(ctx)
	if err != nil && errors.Is(context.Cause(ctx), ErrPermission) {
		return context.Cause(ctx)
	}
	return err
}

// olderThan reports whether a server version is below major.minor. It is false for a
// version that cannot be parsed.
func olderThan(version string, major, minor int) bool {
	var have, part int
	if n, _ := fmt.Sscanf(version, "%d.%d", &have, &part); n < 2 {
		return false
	}
	return have < major || have == major && part < minor
}
