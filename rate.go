package natsx

import "time"

// rateAhead is how long before its start a message of a route with a rate is pulled:
// about the time that it takes to arrive.
const rateAhead = 20 * time.Millisecond

// bucket is the token bucket of a rate: each start takes a token. It holds a tenth of a
// second's worth, and at least one. Guarded by the pool's mutex.
type bucket struct {
	every  float64 // nanoseconds per token
	most   float64 // capacity
	tokens float64
	at     int64 // when tokens was computed
}

func newBucket(perSecond float64, now int64) *bucket {
	return &bucket{every: float64(time.Second) / perSecond, most: max(perSecond/10, 1), tokens: 1, at: now}
}

func (b *bucket) fill(now int64) {
	if now > b.at {
		b.tokens = min(b.tokens+float64(now-b.at)/b.every, b.most)
		b.at = now
	}
}

// take uses one token.
func (b *bucket) take(now int64) {
	b.fill(now)
	b.tokens--
}

// next is when a token is available, 0 for now.
func (b *bucket) next(now int64) int64 {
	b.fill(now)
	if b.tokens >= 1 {
		return 0
	}
	return now + int64((1-b.tokens)*b.every) + 1
}

// soon is how many tokens are available within rateAhead.
func (b *bucket) soon(now int64) int {
	b.fill(now)
	return int(max(b.tokens+float64(rateAhead)/b.every, 0))
}

// reach is when soon becomes n.
func (b *bucket) reach(now int64, n int) int64 {
	b.fill(now)
	return now + max(int64((float64(n)-b.tokens)*b.every)-int64(rateAhead), 0) + 1
}
