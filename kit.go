package natsx

import (
	"context"

	"github.com/nats-io/nats.go"

	"github.com/natsx/natsx/internal/kit"
)

// natsxtest makes messages and asks for decisions without an engine.
func init() {
	kit.NewMsg = func(subject string, data []byte, header nats.Header, f kit.Facts) any {
		m := &Msg{
			Subject: subject, Data: data, Header: header, seq: f.Sequence, attempt: uint32(max(f.Attempt, 1)),
			from: &origin{filter: f.Route, stream: f.Stream, durable: f.Durable, ctx: context.Background()},
		}
		if !f.Time.IsZero() {
			m.time = f.Time.UnixNano()
		}
		return m
	}
	kit.Context = func(ctx context.Context, m any) context.Context { return contextOf(ctx, m.(*Msg)) }
	kit.Describe = func(spec any) kit.Spec {
		r := spec.(Spec).route
		return kit.Spec{Filters: []string{r.filter}, Durable: r.durable, Stream: r.stream, DLQ: r.dlq}
	}
	kit.Settle = func(spec any, err error, attempt int) kit.Settlement {
		s := spec.(Spec)
		j, _ := judge(err)
		if s.route.durable == "" {
			return kit.Settlement{Outcome: string(coreOutcome(s.kind, j))}
		}
		d := decide(s.route, j, circumstances{attempt: max(attempt, 1), spread: 0.5})
		return kit.Settlement{Outcome: string(d.outcome), Reason: string(d.reason), After: d.delay}
	}
}
