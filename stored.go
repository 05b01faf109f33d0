package natsx

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// readBatch and readBytes bound what one pull of a reader brings.
	readBatch = 256
	readBytes = 8 << 20
	// readPatience is how long a reader goes on without an answer.
	readPatience = 30 * time.Second
	// readerThreshold is when the server removes the consumer of a reader that
	// was killed. One that is only slow makes itself another.
	readerThreshold = 30 * time.Second

	codeMaximumConsumers jetstream.ErrorCode = 10026
	codeNoMessage        jetstream.ErrorCode = 10037
)

// store is the one that the engine's routes and replays read.
func (e *engine) store() *store {
	return &store{nc: e.nc, js: e.js, prefix: e.apiPrefix}
}

// span is a part of a stream: the messages on a filter, up to a last sequence.
type span struct {
	stream      *jetstream.StreamInfo
	filter      string
	first       uint64 // 0 for the first there is
	last        uint64
	headersOnly bool
}

// read yields the messages of a span in order and leaves no trace: on a stream
// with limits retention by an ephemeral consumer that acknowledges nothing; on
// others, where a consumer counts, one by one. An error is the last thing yielded.
func (s *store) read(ctx context.Context, p span) iter.Seq2[*storedMsg, error] {
	return func(yield func(*storedMsg, error) bool) {
		if p.last == 0 || p.first > p.last {
			return
		}
		if p.stream.Config.Retention != jetstream.LimitsPolicy {
			s.step(ctx, p, yield)
			return
		}
		r := &reader{store: s, span: p, next: max(p.first, 1)}
		defer r.close(ctx)
		if err := r.run(ctx, yield); hasCode(err, codeMaximumConsumers) {
			p.first = r.next
			s.step(ctx, p, yield)
		} else if err != nil {
			yield(nil, err)
		}
	}
}

// step reads message by message.
func (s *store) step(ctx context.Context, p span, yield func(*storedMsg, error) bool) {
	for next := max(p.first, 1); next <= p.last; {
		m, err := s.get(ctx, p.stream.Config.Name, getRequest{Seq: next, NextFor: p.filter})
		if err != nil {
			yield(nil, err)
			return
		}
		if m == nil || m.seq > p.last {
			return
		}
		next = m.seq + 1
		if !yield(m, nil) {
			return
		}
	}
}

// reader reads a span with an ephemeral consumer, which it makes anew from where
// it is when one is lost: by a restart, a leader change, a gap.
//
// It speaks the pull protocol itself: a message with no payload and a Status
// header, which anybody can publish and which every message is that comes without
// its payload, ends a fetch of nats.go.
type reader struct {
	*store
	span
	next     uint64 // to be read
	consumer string
	most     int    // messages that one pull may ask for
	expected uint64 // consumer sequence of the next message
	sub      *nats.Subscription
	msgs     chan *nats.Msg // never closed; has room for a whole pull
	inbox    string
	pulls    int
}

// run returns nil at the end of the span, and when yield wants no more.
func (r *reader) run(ctx context.Context, yield func(*storedMsg, error) bool) error {
	progress := time.Now()
	pause := 50 * time.Millisecond
	for tries := 0; ; pause = min(2*pause, time.Second) {
		limited, cancel := context.WithTimeout(ctx, patience(tries))
		err := r.open(limited)
		cancel()
		for err == nil {
			var done bool
			before := r.next
			done, err = r.batch(ctx, patience(tries), yield)
			if done {
				return nil
			}
			if r.next != before {
				progress, tries, pause = time.Now(), 0, 50*time.Millisecond
			}
		}
		tries++
		r.close(ctx)
		var api *jetstream.APIError
		refused := errors.Is(err, ErrPermission) || errors.As(err, &api) && !passes(err)
		if ctx.Err() != nil || refused || errors.Is(err, nats.ErrConnectionClosed) || time.Since(progress) > readPatience {
			return fmt.Errorf("natsx: read stream %q: %w", r.stream.Config.Name, err)
		}
		wait(ctx, pause)
	}
}

func (r *reader) open(ctx context.Context) error {
	name := "natsx-reader-" + rand.Text()
	cfg := jetstream.ConsumerConfig{
		Name:              name,
		FilterSubject:     r.filter,
		AckPolicy:         jetstream.AckNonePolicy,
		MemoryStorage:     true,
		Replicas:          1,
		InactiveThreshold: inactiveThreshold(&r.stream.Config, readerThreshold),
		HeadersOnly:       r.headersOnly,
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       r.next,
	}
	stream := r.stream.Config.Name
	err := requestWith(ctx, r.nc, r.prefix+"CONSUMER.CREATE."+stream+"."+name+"."+r.filter, func(ctx context.Context) error {
		c, err := r.js.CreateConsumer(ctx, stream, cfg)
		if err == nil {
			r.most = readBatch
			if most := c.CachedInfo().Config.MaxRequestBatch; most > 0 { // the server's limit
				r.most = min(r.most, most)
			}
		}
		return err
	})
	if err == nil || passes(err) { // it may exist
		r.consumer, r.expected = name, 1
	}
	if err != nil {
		return err
	}
	r.inbox = r.nc.NewInbox()
	r.msgs = make(chan *nats.Msg, readBatch+8)
	r.sub, err = r.nc.ChanSubscribe(r.inbox+".*", r.msgs)
	return err
}

func (r *reader) close(ctx context.Context) {
	if r.sub != nil {
		r.sub.Unsubscribe()
		r.sub = nil
	}
	if r.consumer != "" {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		r.js.DeleteConsumer(ctx, r.stream.Config.Name, r.consumer)
		r.consumer = ""
	}
}

var (
	errReaderSilent = errors.New("natsx: nothing came")
	errReaderLags   = errors.New("natsx: the server that was read from lags behind the stream's leader")
)

// batch makes one pull. It returns true when the reading is over, and an error
// when the consumer is not to be trusted any more, as when it says nothing
// within limit.
func (r *reader) batch(ctx context.Context, limit time.Duration, yield func(*storedMsg, error) bool) (done bool, _ error) {
	r.pulls++
	token := strconv.Itoa(r.pulls)
	pull := fmt.Sprintf(`{"batch":%d,"no_wait":true,"max_bytes":%d}`, r.most, max(readBytes, r.nc.MaxPayload()+8192))
	subject := r.prefix + "CONSUMER.MSG.NEXT." + r.stream.Config.Name + "." + r.consumer
	if err := r.nc.PublishRequest(subject, r.inbox+"."+token, []byte(pull)); err != nil {
		return false, err
	}
	silence := time.NewTimer(limit)
	defer silence.Stop()
	for got := 0; got < r.most; {
		var m *nats.Msg
		select {
		case m = <-r.msgs:
		case <-silence.C:
			return false, errReaderSilent
		case <-ctx.Done():
			return false, ctx.Err()
		}
		// As in a route's inbox, only what has no reply is from the server.
		if m.Reply == "" {
			if !strings.HasSuffix(m.Subject, "."+token) {
				continue
			}
			switch code := m.Header.Get("Status"); {
			case code == "100":
				continue
			case code == "404":
				return r.atEnd(ctx)
			case got > 0 && (code == "408" || code == "409" && !strings.Contains(m.Header.Get("Description"), "Consumer")):
				return false, nil
			default:
				return false, &pullError{code, m.Header.Get("Description")}
			}
		}
		info, ok := parseDelivery(m.Reply)
		if !ok || info.consumer != r.consumer {
			continue
		}
		if n := consumerSequence(m.Reply); n != r.expected {
			return false, fmt.Errorf("natsx: message %d came in place of %d", n, r.expected)
		}
		if info.sequence > r.last {
			return true, nil
		}
		got++
		r.expected++
		r.next = info.sequence + 1
		if !yield(&storedMsg{subject: m.Subject, seq: info.sequence, time: time.Unix(0, info.time), header: m.Header, data: m.Data}, nil) || r.next > r.last {
			return true, nil
		}
		// The time that yield took is not silence.
		silence.Reset(limit)
	}
	return false, nil
}

// atEnd tells whether nothing is left to read. The consumer of a replicated stream
// may be on a server that lags behind: its word is not the end, but that of the
// stream's leader is. A user who may not ask the leader takes it for the end.
func (r *reader) atEnd(ctx context.Context) (bool, error) {
	if r.stream.Config.Replicas <= 1 {
		return true, nil
	}
	m, err := r.get(ctx, r.stream.Config.Name, getRequest{Seq: r.next, NextFor: r.filter})
	switch {
	case errors.Is(err, ErrPermission):
		return true, nil
	case err != nil:
		return false, err
	case m != nil && m.seq <= r.last:
		return false, errReaderLags
	}
	return true, nil
}

// consumerSequence reads the consumer's count of messages out of an ack subject;
// see parseDelivery for its forms.
func consumerSequence(reply string) uint64 {
	tokens := strings.Split(reply, ".")
	i := 6
	if len(tokens) > 9 {
		i = 8
	}
	if i >= len(tokens) {
		return 0
	}
	n, _ := parseUint(tokens[i])
	return n
}
