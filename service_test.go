package natsx

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

func TestServiceIsJudgedBeforeTheNetwork(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, version string
		want          []string
	}{
		{"", "1.0.0", []string{`natsx: service name "": must be letters, digits, dashes and underscores`}},
		{"a.b", "1.0.0", []string{`natsx: service name "a.b": must be`}},
		{"a b", "", []string{`natsx: service name "a b": must be`, `natsx: service "a b": version "": must be a semantic version`}},
		{"prices", "v1.0.0", []string{`natsx: service "prices": version "v1.0.0": must be a semantic version`}},
		{"prices", "1.0", []string{`version "1.0": must be`}},
		{"prices", "01.0.0", []string{`version "01.0.0": must be`}},
		{"prices", "1.0.0-", []string{`version "1.0.0-": must be`}},
		{"prices_2-b", "1.0.0-rc.1+b.7", nil},
	}
	nc := connect(t, startServer(t).ClientURL())
	nc.Close()
	for _, tt := range tests {
		err := NewBroker(nc, WithService(tt.name, tt.version, "")).Run(t.Context(), Route("q").Reply(newBlocked(t).respond))
		if tt.want == nil {
			if !errors.Is(err, ErrConnectionClosed) {
				t.Errorf("%q %q: got %v, want it accepted", tt.name, tt.version, err)
			}
			continue
		}
		if !errors.Is(err, ErrInvalidName) || len(strings.Split(err.Error(), "\n")) != len(tt.want) {
			t.Errorf("%q %q: got %v, want %d faults that are ErrInvalidName", tt.name, tt.version, err, len(tt.want))
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q %q: got %v, want %q", tt.name, tt.version, err, want)
			}
		}
		// micro would refuse it as well, and for that reason.
		if _, err := micro.AddService(nc, micro.Config{Name: tt.name, Version: tt.version}); !errors.Is(err, micro.ErrConfigValidation) {
			t.Errorf("%q %q: micro says %v", tt.name, tt.version, err)
		}
	}
}

// discover asks the service verb and returns every answer as a T.
func discover[T any](t testing.TB, nc *nats.Conn, want int, verb micro.Verb, name, id string) []T {
	t.Helper()
	subject, err := micro.ControlSubject(verb, name, id)
	if err != nil {
		t.Fatal(err)
	}
	inbox, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	defer inbox.Unsubscribe()
	if err := nc.PublishRequest(subject, inbox.Subject, nil); err != nil {
		t.Fatal(err)
	}
	var found []T
	for range want {
		m, err := inbox.NextMsg(testLimit)
		if err != nil {
			t.Fatalf("answer of %s: %v", subject, err)
		}
		var v T
		if err := json.Unmarshal(m.Data, &v); err != nil {
			t.Fatalf("answer of %s: %v", subject, err)
		}
		found = append(found, v)
	}
	return found
}

// priceRoutes are the reply routes of the service tests, and one that is none.
func priceRoutes() []Spec {
	return []Spec{
		Route("prices.get").Queue("pricing").Reply(func(_ context.Context, m *Msg) ([]byte, error) {
			switch string(m.Data) {
			case "unknown":
				return []byte("payload"), Fail(404, "no such price")
			case "broken":
				return nil, errors.New("secret")
			case "slow":
				time.Sleep(20 * time.Millisecond) // a responder's work
			}
			return append([]byte("price of "), m.Data...), nil
		}),
		Route("prices.*.all").Reply(func(context.Context, *Msg) ([]byte, error) { return nil, nil }),
		Route("prices.log").Handle(func(context.Context, *Msg) error { return nil }),
	}
}

func TestServiceAnswersPingInfoAndStats(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	_, log := newLogBook()
	begin := time.Now()
	broker := func() *running {
		b := NewBroker(connect(t, s.ClientURL()), WithLogger(log), WithService("prices", "1.2.3", "what things cost"))
		return runBroker(t, b, priceRoutes()...)
	}
	first, second := broker(), broker()
	nc := connect(t, s.ClientURL())
	pings := discover[micro.Ping](t, nc, 2, micro.PingVerb, "", "")
	if pings[0].ID == pings[1].ID {
		t.Errorf("both have the id %q", pings[0].ID)
	}
	for _, p := range pings {
		want := micro.ServiceIdentity{Name: "prices", Version: "1.2.3", ID: p.ID, Metadata: map[string]string{}}
		if diff := cmp.Diff(micro.Ping{ServiceIdentity: want, Type: micro.PingResponseType}, p); diff != "" || p.ID == "" {
			t.Errorf("ping (-want +got):\n%s", diff)
		}
		got := discover[micro.Info](t, nc, 1, micro.InfoVerb, "prices", p.ID)[0]
		if diff := cmp.Diff(micro.Info{
			ServiceIdentity: want, Type: micro.InfoResponseType, Description: "what things cost",
			Endpoints: []micro.EndpointInfo{
				{Name: "prices-get", Subject: "prices.get", QueueGroup: "pricing", Metadata: map[string]string{}},
				{Name: "prices-_-all", Subject: "prices.*.all", Metadata: map[string]string{}},
			},
		}, got); diff != "" {
			t.Errorf("info (-want +got):\n%s", diff)
		}
	}
	if got := discover[micro.Info](t, nc, 2, micro.InfoVerb, "prices", ""); got[0].ID == got[1].ID {
		t.Error("one instance answered twice")
	}

	if err := second.stop(t); err != nil {
		t.Error(err)
	}
	a := collectAnswers(t, nc)
	for _, request := range []string{"bread", "slow", "unknown", "broken", "slow"} {
		a.ask(t, "prices.get", request, "")
		a.next(t)
	}
	eventually(t, "all are counted", func() bool { s := first.Stats().Routes[0]; return s.Succeeded == 3 && s.Failed == 2 })
	got := discover[micro.Stats](t, nc, 1, micro.StatsVerb, "", "")[0]
	if got.Started.Before(begin.Add(-time.Second)) || got.Started.After(time.Now().Add(time.Second)) || got.Type != micro.StatsResponseType {
		t.Errorf("got %+v, want when it started", got)
	}
	if diff := cmp.Diff([]*micro.EndpointStats{
		{Name: "prices-get", Subject: "prices.get", QueueGroup: "pricing", NumRequests: 5, NumErrors: 2, LastError: "500:internal error"},
		{Name: "prices-_-all", Subject: "prices.*.all"},
	}, got.Endpoints, cmpopts.IgnoreFields(micro.EndpointStats{}, "ProcessingTime", "AverageProcessingTime")); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
	if e := got.Endpoints[0]; e.ProcessingTime < 40*time.Millisecond || e.ProcessingTime != first.Stats().Routes[0].HandlerTime ||
		e.AverageProcessingTime != e.ProcessingTime/5 {
		t.Errorf("got %+v, want at least 40ms of processing, shared by 5", e)
	}

	if err := first.stop(t); err != nil {
		t.Error(err)
	}
	if _, err := nc.Request("$SRV.PING", nil, testLimit); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("got %v, want no service after the shutdown", err)
	}
}

// Discovery tells of a service whose workers are all busy, and nobody is listed who
// drains.
func TestServiceIsFoundWhileBusyAndGoneWhileDraining(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	b := newBlocked(t)
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithWorkers(1), WithService("busy", "1.0.0", ""), WithDrainTimeout(testLimit)),
		Route("q").Reply(b.respond))
	nc := connect(t, s.ClientURL())
	a := collectAnswers(t, nc)
	a.ask(t, "q", "x", "")
	receive(t, b.entered, "the handler")
	discover[micro.Ping](t, nc, 1, micro.PingVerb, "busy", "")
	if got := discover[micro.Stats](t, nc, 1, micro.StatsVerb, "busy", "")[0].Endpoints[0]; got.NumRequests != 0 {
		t.Errorf("got %+v, want nothing counted that is not done", got)
	}
	r.cancel()
	eventually(t, "it is not listed", func() bool {
		_, err := nc.Request("$SRV.PING.busy", nil, 100*time.Millisecond)
		return errors.Is(err, nats.ErrNoResponders)
	})
	b.free()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	if got := a.next(t); got != "x" {
		t.Errorf("answered %q", got)
	}
}

func TestServiceNeedsItsPermission(t *testing.T) {
	t.Parallel()
	s := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "u", Password: "p", Permissions: &server.Permissions{
			Subscribe: &server.SubjectPermission{Deny: []string{"$SRV.>"}},
		}}}
	})
	b := NewBroker(connect(t, s.ClientURL(), nats.UserInfo("u", "p")), WithService("prices", "1.0.0", ""))
	err := startBroker(t, b, priceRoutes()...).wait(t)
	if !errors.Is(err, ErrPermission) || !strings.Contains(err.Error(), `natsx: service "prices": permission denied: subscribe "$SRV.`) {
		t.Errorf("got %v, want the permission that the service lacks", err)
	}
}

func TestEndpointName(t *testing.T) {
	t.Parallel()
	for subject, want := range map[string]string{
		"a": "a", "prices.get": "prices-get", "a.*.>": "a-_-_", "a_b-c.D9": "a_b-c-D9", "größe.$x": "gr__e-_x",
	} {
		if got := endpointName(subject); got != want {
			t.Errorf("%q: got %q, want %q", subject, got, want)
		}
	}
}

// A micro client reads the answers of a natsx responder, and a natsx client those
// of a micro service.
func TestErrorsAreUnderstoodInBothDirections(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	_, log := newLogBook()
	runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log)), priceRoutes()...)
	nc := connect(t, s.ClientURL())

	// As a micro client reads them: by the two headers.
	for request, want := range map[string][]string{
		"bread":   {"", "", "price of bread"},
		"unknown": {"404", "no such price", "payload"},
		"broken":  {"500", "internal error", ""},
	} {
		m, err := nc.Request("prices.get", []byte(request), testLimit)
		if err != nil {
			t.Fatal(err)
		}
		got := []string{m.Header.Get(micro.ErrorCodeHeader), m.Header.Get(micro.ErrorHeader), string(m.Data)}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", request, got, want)
		}
	}

	service, err := micro.AddService(nc, micro.Config{Name: "foreign", Version: "1.0.0", Endpoint: &micro.EndpointConfig{
		Subject: "foreign",
		Handler: micro.HandlerFunc(func(r micro.Request) {
			switch string(r.Data()) {
			case "fail":
				r.Error("409", "taken", []byte("payload"))
			case "odd":
				r.Error("E_ODD", "odd", nil)
			default:
				r.RespondJSON(map[string]string{"got": string(r.Data())})
			}
		}),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer service.Stop()
	pub := NewPublisher(nc)
	ctx := testContext(t)
	got, err := RequestJSON[map[string]string](ctx, pub, To("foreign").Data([]byte("x")))
	if err != nil || got["got"] != "x" {
		t.Errorf("got %v, %v", got, err)
	}
	for request, want := range map[string]struct {
		err  *ReplyError
		data string
	}{
		"fail": {&ReplyError{Code: 409, Message: "taken", RawCode: "409"}, "payload"},
		"odd":  {&ReplyError{Message: "odd", RawCode: "E_ODD"}, ""},
	} {
		m, err := pub.Request(ctx, To("foreign").Data([]byte(request)))
		var reply *ReplyError
		if !errors.As(err, &reply) || m == nil || string(m.Data) != want.data {
			t.Errorf("%s: got %v, %v", request, m, err)
			continue
		}
		if diff := cmp.Diff(want.err, reply); diff != "" {
			t.Errorf("%s (-want +got):\n%s", request, diff)
		}
	}

	// A responder that asks a micro service hands its error on.
	runBroker(t, NewBroker(nc, WithLogger(log)), Route("relay").Reply(func(ctx context.Context, m *Msg) ([]byte, error) {
		answer, err := pub.Request(ctx, To("foreign").Data(m.Data))
		if err != nil {
			return nil, fmt.Errorf("ask the foreign service: %w", err)
		}
		return answer.Data, nil
	}))
	var reply *ReplyError
	if _, err := pub.Request(ctx, To("relay").Data([]byte("odd"))); !errors.As(err, &reply) || reply.RawCode != "E_ODD" || reply.Message != "odd" {
		t.Errorf("got %v, want the foreign service's error", err)
	}
}
