package natsx

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// detour is the way of a letter to its durable alone, through the retry stream of the broker
// that gave the message up. It is for letters that cannot be published on their subject.
type detour struct {
	stream string
	place  retryPlace
}

// detourOf returns the detour of a letter, or nil if it has none.
func (r *redrive) detourOf(ctx context.Context, l *DeadLetter) (*detour, error) {
	name := l.header.Get(HeaderDLQRetryStream)
	if nameFault(name) != "" {
		return nil, nil
	}
	if way, known := r.detours[name]; known {
		return way.of(l), nil
	}
	info, err := r.api.askStreamInfo(ctx, name)
	if err != nil && !isStreamNotFound(err) {
		return nil, err
	}
	var way *detour
	if prefix, ok := "", false; err == nil {
		if prefix, ok = retryPrefix(&info.Config); ok {
			way = &detour{stream: name, place: retryPlace{prefix: prefix}}
		}
	}
	if r.detours == nil || len(r.detours) >= maxRedriveCache {
		r.detours = map[string]*detour{}
	}
	r.detours[name] = way
	return way.of(l), nil
}

// of is a detour for a letter.
func (d *detour) of(l *DeadLetter) *detour {
	if d == nil {
		return nil
	}
	return &detour{stream: d.stream, place: retryPlace{d.place.prefix, l.Stream, l.Durable}}
}

// through redrives a letter by a detour. The copy is in the retry stream until it is
// settled, on a subject of its own, so that one request finds it.
func (r *redrive) through(ctx context.Context, l *DeadLetter, direct *nats.Msg, way *detour) (SkipReason, error) {
	m := way.place.redriven(l, direct, l.Redrives+1)
	m.Header.Set(nats.ExpectedStreamHdr, way.stream)
	tokens := strings.Split(m.Subject, ".")
	life := tokens[len(tokens)-2]
	begun := time.Now()
	pause := backoff{first: 50 * time.Millisecond, most: time.Second}
	for lost := false; ; {
		done := SkipReason("")
		if !lost {
			done = SkipRedriven
		}
		last, err := r.api.get(ctx, way.stream, getRequest{LastFor: way.place.anyOf(life)})
		if err != nil {
			return "", err
		}
		if last != nil {
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
		case ctx.Err() != nil:
			return "", ctx.Err()
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
		case refusesCopy(err):
			return "", faultf(err, "copy not stored in retry stream %q: %s", way.stream, cause(err))
		case mayBeStored(err):
			lost = true
		}
		if time.Since(begun) > redrivePatience {
			return "", failure(fmt.Sprintf("copy not stored in retry stream %q: %s", way.stream, cause(err)), err)
		}
		pause.wait(ctx)
	}
}

// refusesCopy reports whether err is a refusal of a copy that another try does not change.
func refusesCopy(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return !slices.Contains([]jetstream.ErrorCode{
			codeIDInProcess, codeTooManyRequests, codeClusterNotLeader, codeClusterNoLeader, jetstream.JSErrCodeStreamWrongLastSequenceConstant,
		}, api.ErrorCode)
	}
	return errors.Is(err, ErrWrongStream) || errors.Is(err, ErrBadAck) || isLocal(err)
}
