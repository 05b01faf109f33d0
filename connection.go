package natsx

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
)

// PermissionError is a publish or a subscription that the server refused the
// connection's user. It is an [ErrPermission].
type PermissionError struct {
	Operation string // "publish" or "subscribe"
	Subject   string // as the server named it
	Err       error  // what nats.go reported
}

// Error names the operation and the subject.
func (e *PermissionError) Error() string {
	return fmt.Sprintf("natsx: permission denied: %s %q", e.Operation, e.Subject)
}

// Unwrap gives [ErrPermission] and the error of nats.go.
func (e *PermissionError) Unwrap() []error { return []error{ErrPermission, e.Err} }

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
// nobody watches any more, unless the application has set another meanwhile.
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
			// By the application, whose handler may call the one that it replaced.
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

// stop ends the watch. A call of its function may still be under way.
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

// isHub reports whether fn is the handle of a hub; a connection has one of them.
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
