package natsx

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

// WithService lists the broker's reply routes as one NATS micro service (ADR-32), with one
// endpoint for each, so that tools such as the nats CLI find it and show the requests,
// errors and handler times of every route. The name may have letters, digits, dashes and
// underscores, the version is a semantic version ("1.4.0"), else [Broker.Run] and
// [Broker.Replay] return [ErrInvalidName]; the description is free text. The default is no
// service.
//
// An endpoint is named after its route, with a dash for each dot and an underscore for
// every other character that a name may not have. If several routes would get the same
// name, a hash of the subject is appended for those whose subject differs from it. It reports
// the route's own queue group:
// without [RouteBuilder.Queue] every replica answers every request. Refused requests count
// as requests and as errors. The service is listed from when the broker is ready until its
// shutdown begins. The user also needs the permission to subscribe to $SRV.>.
func WithService(name, version, description string) Option {
	return func(b *Broker) { b.service = &service{name, version, description} }
}

// service is the arguments of WithService.
type service struct{ name, version, description string }

var (
	serviceName     = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	semanticVersion = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)` +
		`(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?` +
		`(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?$`)
)

func (s *service) faults() []error {
	var faults []error
	if !serviceName.MatchString(s.name) {
		faults = append(faults, failure(fmt.Sprintf("service name %q: must be letters, digits, dashes and underscores", s.name), ErrInvalidName))
	}
	if !semanticVersion.MatchString(s.version) {
		faults = append(faults, failure(fmt.Sprintf("service %q: version %q: must be a semantic version such as 1.0.0", s.name, s.version), ErrInvalidName))
	}
	return faults
}

// denied reports whether the service needs the permission that the server refused.
func (s *service) denied(e *PermissionError) bool {
	return e.Operation == "subscribe" && strings.HasPrefix(e.Subject, micro.APIPrefix+".")
}

func (s *service) failure(err error) error {
	return failure(fmt.Sprintf("service %q: %s", s.name, cause(err)), err)
}

// discovery answers discovery requests of NATS micro for the service. It does not use
// [micro.AddService], which would run the handlers in its own subscriptions instead of in
// the pool.
type discovery struct {
	*service
	eng      *engine
	identity micro.ServiceIdentity
	started  time.Time
	subs     []*nats.Subscription
	asked    chan *nats.Msg // nats.go sends; never closed
	stopped  chan struct{}
	answers  sync.WaitGroup
}

// mostAsked is the most requests that may wait; nats.go drops further ones.
const mostAsked = 256

// startDiscovery begins to answer. The caller must stop the result, even if there is an
// error.
func startDiscovery(e *engine) (*discovery, error) {
	s := e.service
	inbox := e.api.nc.NewInbox()
	d := &discovery{
		service: s, eng: e, started: time.Now().UTC(),
		identity: micro.ServiceIdentity{
			Name: s.name, Version: s.version, Metadata: map[string]string{},
			ID: inbox[strings.LastIndexByte(inbox, '.')+1:],
		},
		asked: make(chan *nats.Msg, mostAsked), stopped: make(chan struct{}),
	}
	d.answers.Go(d.serve)
	for _, verb := range []micro.Verb{micro.PingVerb, micro.InfoVerb, micro.StatsVerb} {
		for _, of := range [][2]string{{}, {s.name}, {s.name, d.identity.ID}} {
			subject, err := micro.ControlSubject(verb, of[0], of[1])
			if err != nil {
				return d, s.failure(err)
			}
			sub, err := e.api.nc.ChanSubscribe(subject, d.asked)
			if err != nil {
				return d, s.failure(err)
			}
			d.subs = append(d.subs, sub)
		}
	}
	return d, nil
}

func (d *discovery) stop() {
	for _, sub := range d.subs {
		sub.Unsubscribe() // an error means that the connection is closed
	}
	close(d.stopped)
	d.answers.Wait()
}

func (d *discovery) serve() {
	for {
		select {
		case m := <-d.asked:
			if m.Reply == "" {
				continue
			}
			if err := d.answer(m); err != nil {
				d.eng.log.Warn("natsx: service request not answered", "subject", m.Subject, "error", err)
			}
		case <-d.stopped:
			return
		}
	}
}

func (d *discovery) answer(m *nats.Msg) error {
	var v any
	switch subjectToken(m.Subject, 1) {
	case micro.InfoVerb.String():
		v = d.info()
	case micro.StatsVerb.String():
		v = d.stats()
	default:
		v = micro.Ping{ServiceIdentity: d.identity, Type: micro.PingResponseType}
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return m.Respond(data)
}

func (d *discovery) info() micro.Info {
	info := micro.Info{
		ServiceIdentity: d.identity, Type: micro.InfoResponseType,
		Description: d.description, Endpoints: []micro.EndpointInfo{},
	}
	responders := d.eng.responders()
	names := endpointNames(responders)
	for i, r := range responders {
		info.Endpoints = append(info.Endpoints, micro.EndpointInfo{
			Name: names[i], Subject: r.spec.route.filter,
			QueueGroup: r.spec.route.queue, Metadata: map[string]string{},
		})
	}
	return info
}

func (d *discovery) stats() micro.Stats {
	stats := micro.Stats{
		ServiceIdentity: d.identity, Type: micro.StatsResponseType,
		Started: d.started, Endpoints: []*micro.EndpointStats{},
	}
	responders := d.eng.responders()
	names := endpointNames(responders)
	for i, r := range responders {
		d.eng.pool.mu.Lock()
		counted, last := r.stats, r.lastError
		d.eng.pool.mu.Unlock()
		s := &micro.EndpointStats{
			Name: names[i], Subject: r.spec.route.filter, QueueGroup: r.spec.route.queue,
			NumRequests:    int(counted.Succeeded + counted.Failed),
			NumErrors:      int(counted.Failed),
			ProcessingTime: counted.HandlerTime,
		}
		if s.NumRequests > 0 {
			s.AverageProcessingTime = s.ProcessingTime / time.Duration(s.NumRequests)
		}
		if last != nil {
			// Report only what the requester received, since this leaves the process.
			reply, _ := replyFor(last)
			s.LastError = reply.code() + ":" + reply.Message
		}
		stats.Endpoints = append(stats.Endpoints, s)
	}
	return stats
}

// responders are the engine's reply routes, in the order given to Run.
func (e *engine) responders() []*coreRoute {
	var found []*coreRoute
	for _, c := range e.cores {
		if c.isReply() {
			found = append(found, c)
		}
	}
	return found
}

// endpointNames are the names of the routes' endpoints, each another. They do not depend
// on the order of the routes, but for two with the same subject and queue group.
func endpointNames(routes []*coreRoute) []string {
	names := make([]string, len(routes))
	uses := map[string]int{}
	for i, r := range routes {
		names[i] = endpointName(r.spec.route.filter)
		uses[names[i]]++
	}
	taken := map[string]bool{}
	for i, r := range routes {
		spec := r.spec.route
		if uses[names[i]] > 1 && (names[i] != spec.filter || taken[names[i]]) {
			hash := sha256.Sum256([]byte(spec.filter + " " + spec.queue))
			names[i] += "-" + hex.EncodeToString(hash[:4])
		}
		for n, name := 2, names[i]; taken[names[i]]; n++ {
			names[i] = name + "-" + strconv.Itoa(n)
		}
		taken[names[i]] = true
	}
	return names
}

// endpointName returns a valid endpoint name for a route's subject.
func endpointName(subject string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '.':
			return '-'
		case r < 0x80 && serviceName.MatchString(string(r)):
			return r
		}
		return '_'
	}, subject)
}
