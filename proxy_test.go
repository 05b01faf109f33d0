package natsx

import (
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// proxy stands between clients and one server, and can turn into a black hole:
// the connections stay up in name, and nothing passes.
type proxy struct {
	t      testing.TB
	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu     sync.Mutex
	links  map[*pipe]bool
	frozen bool // new links are black holes too
	closed bool // new links are refused
}

// pipe is one proxied connection.
type pipe struct {
	client, server net.Conn
	deaf           atomic.Bool // what the server says is dropped

	mu   sync.Mutex
	thaw chan struct{} // closed when bytes pass; made anew when they stop
}

// startProxy forwards a free port to the server at url until the test ends.
func startProxy(t testing.TB, url string) *proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	p := &proxy{t: t, ln: ln, target: strings.TrimPrefix(url, "nats://"), links: map[*pipe]bool{}}
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		ln.Close()
		p.refuse()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url() string { return "nats://" + p.ln.Addr().String() }

func (p *proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		l := &pipe{client: client, thaw: make(chan struct{})}
		if !p.frozen {
			close(l.thaw)
		}
		refused := p.closed
		if !refused {
			l.server, err = net.Dial("tcp", p.target)
			refused = err != nil
		}
		if !refused {
			p.links[l] = true
			p.wg.Go(func() { p.copy(l, l.server, l.client) })
			p.wg.Go(func() { p.copy(l, l.client, l.server) })
		}
		p.mu.Unlock()
		if refused {
			client.Close()
		}
	}
}

func (p *proxy) copy(l *pipe, to, from net.Conn) {
	defer p.drop(l)
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		l.mu.Lock()
		thaw := l.thaw
		l.mu.Unlock()
		<-thaw
		if to == l.client && l.deaf.Load() {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// drop closes a pipe and frees its copiers, also those in a black hole.
func (p *proxy) drop(l *pipe) {
	l.client.Close()
	l.server.Close()
	l.open()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

func (l *pipe) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.thaw:
	default:
		close(l.thaw)
	}
}

func (l *pipe) freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.thaw:
		l.thaw = make(chan struct{})
	default:
	}
}

// freezeExisting makes a black hole of the present connections; new ones work.
func (p *proxy) freezeExisting() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.freeze()
	}
}

// deafen has the present connections drop what the server says; new ones work.
func (p *proxy) deafen() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.deaf.Store(true)
	}
}

// freeze makes a black hole of present and new connections until thaw.
func (p *proxy) freeze() {
	p.freezeExisting()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = true
}

// thaw lets everything pass again, what was held up first.
func (p *proxy) thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = false
	for l := range p.links {
		l.open()
	}
}

// refuse cuts all connections and lets none in until allow.
func (p *proxy) refuse() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cut()
}

func (p *proxy) allow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = false
}

// cut closes the present connections.
func (p *proxy) cut() {
	p.mu.Lock()
	var links []*pipe
	for l := range p.links {
		links = append(links, l)
	}
	p.mu.Unlock()
	for _, l := range links {
		p.drop(l)
	}
}

func TestProxyHoldsBack(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	p := startProxy(t, s.ClientURL())
	nc := connect(t, p.url())
	alive := func(nc *nats.Conn, within time.Duration) bool { return nc.FlushTimeout(within) == nil }
	const moment = 300 * time.Millisecond
	if !alive(nc, testLimit) {
		t.Fatal("nothing passes at first")
	}

	p.freezeExisting()
	if alive(nc, moment) || !nc.IsConnected() {
		t.Error("a frozen connection must hold everything back and stay up")
	}
	if other := connect(t, p.url()); !alive(other, testLimit) {
		t.Error("a new connection must pass while only the old ones are frozen")
	}

	p.freeze()
	if _, err := nats.Connect(p.url(), nats.Timeout(moment)); err == nil {
		t.Error("a new connection must hang while all are frozen")
	}
	p.thaw()
	if err := nc.FlushTimeout(testLimit); err != nil {
		t.Errorf("after the thaw: %v", err)
	}

	p.refuse()
	eventually(t, "the cut is noticed", func() bool { return !nc.IsConnected() })
	if _, err := nats.Connect(p.url()); err == nil {
		t.Error("a new connection must be refused")
	}
	p.allow()
	eventually(t, "the client is back", nc.IsConnected)
}
