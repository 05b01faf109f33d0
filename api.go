package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var violation = regexp.MustCompile(`(?i)permissions violation for (publish|subscription) to "([^"]+)"`)

// permissionError reads the subject out of an asynchronous error of the
// connection, and returns nil when it is another one.
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

// inboxPrefix begins every inbox of nc; it ends in a dot.
func inboxPrefix(nc *nats.Conn) string {
	if prefix := nc.Opts.InboxPrefix; prefix != "" {
		return prefix + "."
	}
	return nats.InboxPrefix
}

// asyncHub passes the asynchronous errors of one connection to everyone who
// watches it and then to the connection's own handler, which is put back when
// nobody watches any more.
type asyncHub struct {
	nc       *nats.Conn
	previous nats.ErrHandler
	watchers map[*asyncWatch]struct{} // guarded by hubs.Mutex
}

type asyncWatch struct {
	hub *asyncHub
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
	h := hubs.of[nc]
	if h == nil {
		h = &asyncHub{nc: nc, previous: nc.ErrorHandler(), watchers: map[*asyncWatch]struct{}{}}
		hubs.of[nc] = h
		nc.SetErrorHandler(h.handle)
	}
	w := &asyncWatch{hub: h, fn: fn}
	h.watchers[w] = struct{}{}
	return w
}

// stop ends the watch. A call of its function may still be under way.
func (w *asyncWatch) stop() {
	hubs.Lock()
	defer hubs.Unlock()
	delete(w.hub.watchers, w)
	if len(w.hub.watchers) == 0 && hubs.of[w.hub.nc] == w.hub {
		delete(hubs.of, w.hub.nc)
		w.hub.nc.SetErrorHandler(w.hub.previous)
	}
}

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

// patience is how long a try waits for an answer of JetStream's API, counted from
// 0. A request that meets an election is never answered, so the first tries are
// short; a loaded server needs longer ones.
func patience(try int) time.Duration {
	return min(time.Second+time.Duration(min(try, 10))*time.Second/2, apiTimeout)
}

// wait pauses and tells whether ctx still lives.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// apiPrefix begins every subject of JetStream's API; it ends in a dot.
func apiPrefix(js jetstream.JetStream) string {
	switch opts := js.Options(); {
	case opts.APIPrefix != "":
		return strings.TrimSuffix(opts.APIPrefix, ".") + "."
	case opts.Domain != "":
		return "$JS." + opts.Domain + ".API."
	}
	return "$JS.API."
}

// passes tells whether the cause of err goes away by itself.
func passes(err error) bool {
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
	const (
		clusterNoPeers     = 10005
		clusterNotLeader   = 10009
		clusterRequired    = 10010
		insufficient       = 10023
		noAccount          = 10035
		clusterUnsupported = 10036
	)
	switch api.ErrorCode {
	case clusterNotLeader:
		return true
	case clusterNoPeers: // for now, when servers are on their way back
		return strings.Contains(api.Description, "peer offline")
	case clusterRequired, insufficient, noAccount, clusterUnsupported, jetstream.JSErrCodeJetStreamNotEnabledForAccount:
		return false
	}
	return api.Code == 503
}

// streamsFor returns the names of all streams with a subject that overlaps
// subject, which may hold wildcards. Without any it returns none and no error.
func streamsFor(ctx context.Context, js jetstream.JetStream, subject string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	lister := js.StreamNames(ctx, jetstream.WithStreamListSubject(subject))
	var names []string
	for name := range lister.Name() {
		names = append(names, name)
	}
	if err := lister.Err(); err != nil {
		return nil, fmt.Errorf("natsx: look up the stream of %q: %w", subject, err)
	}
	return names, nil
}

// closedCause puts natsx's sentinel before the errors of a connection that is
// closed.
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

// store reads and deletes the messages of streams. Single messages come from the
// stream's leader, which no direct get from a replica that lags behind does.
type store struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	prefix string // of JetStream's API, with its last dot
}

// getRequest asks for one message: Seq alone, the first on NextFor from Seq or
// StartTime on, or the last on LastFor. A server before 2.11 takes no notice of
// StartTime.
type getRequest struct {
	Seq       uint64     `json:"seq,omitempty"`
	StartTime *time.Time `json:"start_time,omitempty"`
	NextFor   string     `json:"next_by_subj,omitempty"`
	LastFor   string     `json:"last_by_subj,omitempty"`
}

// get returns nil without an error when there is no such message.
func (s *store) get(ctx context.Context, stream string, req getRequest) (*storedMsg, error) {
	var r struct {
		Message *struct {
			Subject string    `json:"subject"`
			Seq     uint64    `json:"seq"`
			Header  []byte    `json:"hdrs"`
			Data    []byte    `json:"data"`
			Time    time.Time `json:"time"`
		} `json:"message"`
	}
	switch err := s.ask(ctx, "STREAM.MSG.GET."+stream, req, &r); {
	case hasCode(err, codeNoMessage):
		return nil, nil
	case err != nil:
		return nil, err
	case r.Message == nil:
		return nil, errors.New("natsx: the server answered without a message")
	}
	m := &storedMsg{subject: r.Message.Subject, seq: r.Message.Seq, time: r.Message.Time, data: r.Message.Data}
	if len(r.Message.Header) > 0 {
		// The server stores any header block. One that cannot be read is none, as in
		// a message that nats.go delivers.
		m.header, _ = nats.DecodeHeadersMsg(r.Message.Header)
	}
	return m, nil
}

func (s *store) streamInfo(ctx context.Context, name string) (*jetstream.StreamInfo, error) {
	var info jetstream.StreamInfo
	if err := s.ask(ctx, "STREAM.INFO."+name, struct{}{}, &info); err != nil {
		return nil, err
	}
	return &info, nil
}

// remove deletes a message. One that is gone already is no error.
func (s *store) remove(ctx context.Context, stream string, seq uint64) error {
	err := s.ask(ctx, "STREAM.MSG.DELETE."+stream, struct {
		Seq     uint64 `json:"seq"`
		NoErase bool   `json:"no_erase"`
	}{seq, true}, &struct{}{})
	if err == nil || hasCode(err, codeStreamNotFound) {
		return err
	}
	// The server has several ways to say that it was not there.
	if m, gone := s.get(ctx, stream, getRequest{Seq: seq}); m == nil && gone == nil {
		return nil
	}
	return err
}

// ask makes one request of JetStream's API, again while the failure passes by
// itself.
func (s *store) ask(ctx context.Context, operation string, request, response any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	return again(ctx, func(ctx context.Context) error { return s.askOnce(ctx, operation, body, response) })
}

// again calls fn until its failure does not pass by itself, ctx ends or
// readPatience is over.
func again(ctx context.Context, fn func(context.Context) error) error {
	begun := time.Now()
	pause := 50 * time.Millisecond
	for tries := 0; ; pause = min(2*pause, time.Second) {
		limited, cancel := context.WithTimeout(ctx, patience(tries))
		err := fn(limited)
		cancel()
		tries++
		if err == nil || ctx.Err() != nil || !passes(err) || hasCode(err, codeStreamNotFound) || time.Since(begun) > readPatience {
			return err
		}
		if !wait(ctx, pause) {
			return err
		}
	}
}

func (s *store) askOnce(ctx context.Context, operation string, body []byte, response any) error {
	var m *nats.Msg
	err := requestWith(ctx, s.nc, s.prefix+operation, func(ctx context.Context) (err error) {
		m, err = s.nc.RequestWithContext(ctx, s.prefix+operation, body)
		return err
	})
	if err != nil {
		return fmt.Errorf("natsx: %s: %w", operation, err)
	}
	var refused struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &refused); err != nil {
		return fmt.Errorf("natsx: %s: %w", operation, err)
	}
	if refused.Error != nil {
		return fmt.Errorf("natsx: %s: %w", operation, refused.Error)
	}
	if err := json.Unmarshal(m.Data, response); err != nil {
		return fmt.Errorf("natsx: %s: %w", operation, err)
	}
	return nil
}

// inactiveThreshold is that of a consumer which is to have want, or what the stream
// allows, when that is less.
func inactiveThreshold(stream *jetstream.StreamConfig, want time.Duration) time.Duration {
	if most := stream.ConsumerLimits.InactiveThreshold; most > 0 {
		return min(want, most)
	}
	return want
}
