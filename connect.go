package natsx

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// flusherTimeout is how long nats.go may hold the connection's lock for a write.
const flusherTimeout = 5 * time.Second

// Connect is [nats.Connect] with defaults for production before opts: the
// executable's name as connection name, reconnecting for ever with a wait of
// 500 ms and a jitter of up to 500 ms (TLS: 2 s), a retry when the first connect
// fails, a drain timeout of 30 s, a write timeout of 5 s, and asynchronous errors,
// disconnects, reconnects and failures to connect logged to [slog.Default]. Every
// default can be overridden by opts. url may be several URLs separated by commas, which
// are tried in random order; an empty one is [nats.DefaultURL], nats://127.0.0.1:4222.
//
// A failed first connect is retried in the background, so Connect may return before the
// connection is up; [Broker.Run] waits for it. Wrong or expired credentials are retried
// too, since they may be corrected: the log, [Broker.Health] and Run report the cause. An
// invalid url is [ErrInvalidURL], with a text without the password. The caller closes the
// connection.
func Connect(url string, opts ...nats.Option) (*nats.Conn, error) {
	if err := checkURLs(url); err != nil {
		return nil, err
	}
	var failures connectLog
	defaults := []nats.Option{
		nats.Name(filepath.Base(os.Args[0])),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500 * time.Millisecond),
		nats.ReconnectJitter(500*time.Millisecond, 2*time.Second),
		nats.RetryOnFailedConnect(true),
		nats.IgnoreAuthErrorAbort(),
		nats.DrainTimeout(30 * time.Second),
		nats.FlusherTimeout(flusherTimeout),
		nats.ErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
			args := []any{"error", err, "connection", nc.Opts.Name}
			if sub != nil {
				args = append(args, "subject", sub.Subject)
			}
			slog.Error("natsx: asynchronous error of the connection", args...)
		}),
		nats.DisconnectErrHandler(func(nc *nats.Conn, err error) {
			if err != nil {
				slog.Warn("natsx: disconnected", "error", err, "connection", nc.Opts.Name)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			failures.end()
			slog.Info("natsx: reconnected", "url", nc.ConnectedUrlRedacted(), "connection", nc.Opts.Name)
		}),
		nats.ReconnectErrHandler(func(nc *nats.Conn, err error) {
			setCause(nc, err)
			if failures.worth(err) {
				slog.Warn("natsx: cannot connect, trying again", "url", redacted(strings.Join(nc.Opts.Servers, ",")), "error", err, "connection", nc.Opts.Name)
			}
		}),
	}
	return nats.Connect(url, append(defaults, opts...)...)
}

// connectLogEvery is how often the same failure to connect is logged.
const connectLogEvery = time.Minute

// connectLog decides which failures to connect are logged: each cause once a minute.
// Causes that differ by numbers, such as ports, are the same.
type connectLog struct {
	mu sync.Mutex
	at map[string]time.Time // when a cause was logged
}

func (l *connectLog) worth(err error) bool {
	cause := ""
	if err != nil {
		cause = strings.Map(func(c rune) rune {
			if '0' <= c && c <= '9' {
				return -1
			}
			return c
		}, err.Error())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, logged := l.at[cause]; logged && time.Since(at) < connectLogEvery {
		return false
	}
	if l.at == nil || len(l.at) >= mostCauses {
		l.at = map[string]time.Time{}
	}
	l.at[cause] = time.Now()
	return true
}

// mostCauses bounds what a connectLog remembers.
const mostCauses = 100

func (l *connectLog) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at = nil
}

// checkURLs reports invalid URLs that nats.go would accept and retry for ever.
func checkURLs(urls string) error {
	var faults []error
	for one := range strings.SplitSeq(cmp.Or(urls, nats.DefaultURL), ",") {
		one = strings.TrimSpace(one)
		bad := func(reason string) {
			faults = append(faults, failure(fmt.Sprintf("url %q: %s", redacted(one), reason), ErrInvalidURL))
		}
		full := one
		if !strings.Contains(full, "://") {
			full = "nats://" + full
		}
		u, err := url.Parse(full)
		if err != nil {
			var parse *url.Error
			reason := "cannot be parsed"
			if errors.As(err, &parse) && !strings.Contains(parse.Err.Error(), one) {
				reason = parse.Err.Error()
			}
			bad(reason)
			continue
		}
		switch u.Scheme {
		case "nats", "tls", "ws", "wss":
		default:
			bad(fmt.Sprintf("its scheme %q is not nats, tls, ws or wss", u.Scheme))
			continue
		}
		if u.Hostname() == "" {
			bad("has no host")
		}
		if port := u.Port(); port != "" {
			if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
				bad(fmt.Sprintf("its port %s is not between 1 and 65535", port))
			}
		}
	}
	return errors.Join(faults...)
}

// redacted returns a list of URLs without passwords and tokens.
func redacted(urls string) string {
	var list []string
	for one := range strings.SplitSeq(urls, ",") {
		prefix, rest, full := strings.Cut(one, "://")
		if !full {
			prefix, rest = "", one
		} else {
			prefix += "://"
		}
		if at := strings.LastIndexByte(rest, '@'); at >= 0 {
			user, _, password := strings.Cut(rest[:at], ":")
			if !password {
				user = "xxxxx" // a token
			} else {
				user += ":xxxxx"
			}
			rest = user + rest[at:]
		}
		list = append(list, prefix+rest)
	}
	return strings.Join(list, ",")
}
