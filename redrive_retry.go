package natsx

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// retryRoute is how letters of a durable go back to it by its broker's retry stream.
type retryRoute struct {
	place  retryPlace
	stream string         // the retry stream
	source *redriveSource // with the durable alone; nil if there is no such way
	asked  time.Time

	maxMsgSize int64 // of the retry stream, 0 for no limit
}

// retryRouteOf returns how a letter goes back by the retry stream that it names. It returns
// nil if the letter names none or is a pointer, or if no broker uses that for the durable
// any more: then the letter goes back by its own stream.
func (r *redrive) retryRouteOf(ctx context.Context, l *DeadLetter) (*retryRoute, error) {
	name := l.header.Get(HeaderDLQRetryStream)
	if nameFault(name) != "" || l.Pointer {
		return nil, nil
	}
	key := [3]string{name, l.Stream, l.Durable}
	if v, known := r.retries[key]; known && time.Since(v.asked) < apiTimeout {
		if v.source == nil {
			return nil, nil
		}
		return v, nil
	}
	v := &retryRoute{stream: name, asked: time.Now()}
	source, err := r.findRetryRoute(ctx, l, v)
	if err != nil {
		return nil, err
	}
	if r.retries == nil || len(r.retries) >= maxRedriveCache {
		r.retries = map[[3]string]*retryRoute{}
	}
	v.source = source
	r.retries[key] = v
	if source == nil {
		return nil, nil
	}
	return v, nil
}

func (r *redrive) findRetryRoute(ctx context.Context, l *DeadLetter, v *retryRoute) (*redriveSource, error) {
	absent := func(err error) bool {
		return hasCode(err, codeStreamNotFound) || hasCode(err, codeConsumerNotFound) || errors.Is(err, ErrPermission)
	}
	info, err := r.api.askStreamInfo(ctx, v.stream)
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v.maxMsgSize = max(int64(info.Config.MaxMsgSize), 0)
	v.place = retryPlace{retryPrefix(&info.Config), l.Stream, l.Durable}
	if v.place.prefix == "" {
		return nil, nil
	}
	for _, c := range [][2]string{{v.stream, v.place.consumer()}, {l.Stream, l.Durable}} {
		var durable jetstream.ConsumerInfo
		err := r.api.ask(ctx, "CONSUMER.INFO."+c[0]+"."+c[1], struct{}{}, &durable)
		if absent(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if c[0] == l.Stream {
			return &redriveSource{durables: map[string]*jetstream.ConsumerInfo{l.Durable: &durable}}, nil
		}
	}
	return nil, nil
}

// copyOf makes the copy of a letter for the retry stream, nil if that would be too large.
func (v *retryRoute) copyOf(nc *nats.Conn, l *DeadLetter, header nats.Header, data []byte) *nats.Msg {
	m := v.place.redriven(l, v.source.copyOf(l, header, data))
	m.Header.Set(nats.ExpectedStreamHdr, v.stream)
	if size := int64(messageSize(m)); size > nc.MaxPayload() || v.maxMsgSize > 0 && size > v.maxMsgSize {
		return nil
	}
	return m
}

// byRetries redrives a letter by the retry stream, as one does by its own stream: look for
// the copy, then for the letter, and publish at once. All copies of a life share a subject,
// so that one look finds them.
func (r *redrive) byRetries(ctx context.Context, l *DeadLetter, v *retryRoute, m *nats.Msg) (SkipReason, error) {
	begun := time.Now()
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for lost := false; ; {
		done := SkipReason("")
		if !lost {
			done = SkipRedriven
		}
		stored, err := r.api.get(ctx, v.stream, getRequest{LastFor: v.place.anyOf(redrivenLife(l))})
		if err != nil && !errors.Is(err, ErrPermission) {
			return "", err
		}
		if stored != nil {
			return done, r.removeLetter(ctx, l)
		}
		there, err := findLetter(ctx, r.api, l)
		switch {
		case err != nil:
			return "", err
		case !there && lost:
			return "", nil // its copy was handled meanwhile
		case !there:
			return SkipGone, nil
		case r.dryRun:
			return "", nil
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
		err = nats.ErrDisconnected
		if r.api.nc.IsConnected() {
			var ack Ack
			if ack, err = r.publish(ctx, m); err == nil {
				if !ack.Duplicate {
					done = ""
				}
				return done, r.removeLetter(ctx, l)
			}
		}
		switch {
		case errors.Is(err, ErrPermission), errors.Is(err, nats.ErrConnectionClosed):
			return "", err
		case mayBeStored(err):
			lost = true
		case !transient(err):
			return "", faultf(err, "copy not stored in retry stream %q: %s", v.stream, cause(err))
		}
		if time.Since(begun) > redrivePatience {
			return "", failure("copy not stored in retry stream: "+cause(err), err)
		}
		pause.wait(ctx)
	}
}
