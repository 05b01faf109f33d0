package promnatsx

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"go.yaml.in/yaml/v3"

	"github.com/natsx/natsx"
	"github.com/natsx/natsx/natsxtest"
)

// scrape returns what a Prometheus server would get, without help and types.
func scrape(t *testing.T, c prometheus.Collector) (lines []string) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c); err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	defer web.Close()
	res, err := http.Get(web.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("scrape: %s, %v\n%s", res.Status, err, body)
	}
	for line := range strings.Lines(string(body)) {
		if !strings.HasPrefix(line, "#") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

func wantLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	for _, line := range want {
		if !slices.Contains(got, line) {
			name, _, _ := strings.Cut(line, "{")
			var like []string
			for _, l := range got {
				if strings.HasPrefix(l, name+"{") || strings.HasPrefix(l, name+" ") {
					like = append(like, l)
				}
			}
			t.Errorf("no line\n\t%s\nbut\n\t%s", line, strings.Join(like, "\n\t"))
		}
	}
}

// What handlers have done is in the scrape.
func TestScrapeOfAHandler(t *testing.T) {
	t.Parallel()
	m := New()
	nothing := func(context.Context, *natsx.Msg) error { return nil }
	hold, held := make(chan struct{}), make(chan struct{})
	r := natsxtest.Runner{Options: []natsx.Option{natsx.WithObserver(m)}}.Run(t,
		natsx.Route("orders.*").Durable("billing").Retry(1).Backoff(time.Millisecond, time.Millisecond).DLQ("dlq.orders").Breaker(100, time.Hour).
			Handle(func(_ context.Context, m *natsx.Msg) error {
				switch string(m.Data) {
				case "broken":
					return errors.New("broken")
				case "discard":
					return natsx.Discard(errors.New("not wanted"))
				case "hold":
					close(held)
					<-hold
				}
				return nil
			}),
		natsx.Route("audit").Queue("a").Handle(nothing),
		natsx.Route("audit").Queue("b").Handle(nothing),
		natsx.Route("ask").Reply(func(context.Context, *natsx.Msg) ([]byte, error) { return nil, natsx.Fail(404, "no") }))
	m.Watch(r.Broker)
	wantLines(t, scrape(t, m), `natsx_dead_total{durable="billing",reason="exhausted",route="orders.*",stream="NATSXTEST"} 0`)

	orders := natsx.To("orders.4711")
	for _, data := range []string{"ok", "ok", "discard"} {
		r.Publish(orders.Data([]byte(data)))
		r.Next()
	}
	r.Publish(orders.Data([]byte("broken")), natsx.To("audit"))
	for range 2 + 2 {
		r.Next()
	}
	if _, err := natsx.NewPublisher(r.Conn, natsx.WithPublishMiddleware(m.Publish)).Request(t.Context(), natsx.To("ask")); err == nil {
		t.Error("the request did not fail")
	}
	r.Next()
	r.Publish(orders.Data([]byte("hold")))
	<-held
	settled := func() bool { // what was observed is counted a moment later
		st := r.Broker.Stats().Routes
		return st[0].Received == 6 && st[0].Succeeded == 2 && st[0].Discarded == 1 && st[0].Dead == 1 &&
			st[1].Succeeded+st[2].Succeeded == 2 && st[3].Failed == 1 && st[0].OldestRunning > 0
	}
	for deadline := time.Now().Add(time.Minute); !settled() && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
	}
	got := scrape(t, m)
	close(hold)

	billing := `{durable="billing",route="orders.*",stream="NATSXTEST"} `
	wantLines(t, got,
		"natsx_received_total"+billing+"6",
		"natsx_succeeded_total"+billing+"2",
		"natsx_retried_total"+billing+"1",
		"natsx_discarded_total"+billing+"1",
		"natsx_returned_total"+billing+"0",
		"natsx_lapsed_total"+billing+"0",
		"natsx_running"+billing+"1",
		"natsx_waiting"+billing+"0",
		"natsx_delayed"+billing+"0",
		"natsx_consumer_pending"+billing+"0",
		"natsx_handler_seconds_count"+billing+"5",
		`natsx_dead_total{durable="billing",reason="exhausted",route="orders.*",stream="NATSXTEST"} 1`,
		`natsx_dead_total{durable="billing",reason="permanent",route="orders.*",stream="NATSXTEST"} 0`,
		`natsx_breaker_state{durable="billing",route="orders.*",state="closed",stream="NATSXTEST"} 1`,
		`natsx_breaker_state{durable="billing",route="orders.*",state="open",stream="NATSXTEST"} 0`,
		// Two routes with the same filter are one to Prometheus.
		`natsx_received_total{durable="",route="audit",stream=""} 2`,
		`natsx_succeeded_total{durable="",route="audit",stream=""} 2`,
		`natsx_dropped_total{durable="",route="audit",stream=""} 0`,
		`natsx_failed_total{durable="",route="ask",stream=""} 1`,
		`natsx_publish_failures_total{operation="request"} 1`,
		"natsx_healthy 1",
	)
	for _, line := range got {
		if strings.Contains(line, "4711") {
			t.Errorf("a subject is a label: %s", line)
		}
		if rest, ok := strings.CutPrefix(line, "natsx_oldest_running_seconds"+billing); ok && rest == "0" {
			t.Error("no handler is the oldest")
		}
		if strings.HasPrefix(line, "natsx_breaker_state") && !strings.Contains(line, "billing") {
			t.Errorf("a route without a breaker has the state of one: %s", line)
		}
	}
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	wantLines(t, scrape(t, m), "natsx_healthy 0", "natsx_running"+billing+"0")
}

// What publishers have done is in the scrape, by what they were asked for.
func TestScrapeOfAPublisher(t *testing.T) {
	t.Parallel()
	nc := natsxtest.Connect(t, natsxtest.Server(t))
	if err := natsx.Stream("S").Subjects("s.>").Ensure(t.Context(), nc); err != nil {
		t.Fatal(err)
	}
	m := New(WithBuckets(1e-9, 600))
	pub := natsx.NewPublisher(nc, natsx.WithPublishMiddleware(m.Publish))
	ctx := t.Context()
	pub.Publish(ctx, natsx.To("s.a"))
	pub.Publish(ctx, natsx.To("nowhere"))
	pub.PublishAll(ctx, natsx.To("s.a"), natsx.To("nowhere"), natsx.To("s.b"))
	pub.Send(ctx, natsx.To("core"))
	got := scrape(t, m)
	wantLines(t, got,
		`natsx_publish_seconds_count{operation="publish"} 2`,
		`natsx_publish_seconds_bucket{operation="publish",le="1e-09"} 0`,
		`natsx_publish_seconds_bucket{operation="publish",le="600"} 2`,
		`natsx_published_total{operation="publish"} 1`,
		`natsx_publish_failures_total{operation="publish"} 1`,
		`natsx_publish_seconds_count{operation="publish_all"} 1`,
		`natsx_published_total{operation="publish_all"} 2`,
		`natsx_publish_failures_total{operation="publish_all"} 1`,
		`natsx_published_total{operation="send"} 1`,
		`natsx_publish_failures_total{operation="send"} 0`,
	)
	for _, line := range got {
		if strings.HasPrefix(line, "natsx_healthy") {
			t.Errorf("health without a broker: %s", line)
		}
	}
}

// Each message of a batch has its share of the handler's time.
func TestHandlerTimeOfABatch(t *testing.T) {
	t.Parallel()
	m := New()
	for range 4 {
		m.Observe(t.Context(), natsx.Event{Route: "a", Durable: "d", Msg: &natsx.Msg{}, Duration: 8 * time.Second, Batch: 4})
	}
	wantLines(t, scrape(t, m), `natsx_handler_seconds_sum{durable="d",route="a",stream=""} 8`, `natsx_handler_seconds_count{durable="d",route="a",stream=""} 4`)
}

// fake is a broker with any statistics.
type fake struct {
	routes []natsx.RouteStats
	err    error
}

func (f fake) Stats() natsx.Stats { return natsx.Stats{Routes: f.routes} }
func (f fake) Health() error      { return f.err }

func TestScrapeOfRoutesThatAddUp(t *testing.T) {
	t.Parallel()
	m := New()
	m.watch(everything())
	wantLines(t, scrape(t, m),
		`natsx_received_total{durable="d",route="a",stream="S"} 3`,
		`natsx_running{durable="d",route="a",stream="S"} 3`,
		`natsx_oldest_running_seconds{durable="d",route="a",stream="S"} 60`,
		`natsx_consumer_pending{durable="d",route="a",stream="S"} 7`,
		`natsx_consumer_ack_pending{durable="d",route="a",stream="S"} 8`,
		`natsx_breaker_state{durable="d",route="a",state="closed",stream="S"} 0`,
		`natsx_breaker_state{durable="d",route="a",state="open",stream="S"} 1`,
		`natsx_breaker_state{durable="d",route="a",state="half-open",stream="S"} 0`,
		"natsx_healthy 0")
}

// everything is a broker of which there is everything to tell.
func everything() fake {
	return fake{err: errors.New("ill"), routes: []natsx.RouteStats{
		{Route: "a", Durable: "d", Stream: "S", Received: 1, Running: 1, OldestRunning: time.Minute, Breaker: natsx.BreakerOpen,
			Consumer: &natsx.ConsumerStats{NumPending: 7, NumAckPending: 8}},
		{Route: "a", Durable: "d", Stream: "S", Received: 2, Running: 2, OldestRunning: time.Second},
		{Route: "a", Durable: "not located yet"},
	}}
}

// metricLabels are the names of all metrics, as queries use them, with their labels.
func metricLabels(t *testing.T) map[string][]string {
	t.Helper()
	m := New()
	m.watch(everything())
	m.Observe(t.Context(), natsx.Event{Msg: &natsx.Msg{}, Duration: 1})
	m.Publish(func(context.Context, *natsx.PublishCall) error { return nil })(t.Context(), &natsx.PublishCall{})
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(m)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for _, f := range families {
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		if f.GetType() == dto.MetricType_HISTOGRAM {
			all[f.GetName()+"_count"], all[f.GetName()+"_sum"] = labels, labels
			all[f.GetName()+"_bucket"] = append(labels[:len(labels):len(labels)], "le")
			continue
		}
		all[f.GetName()] = labels
	}
	return all
}

var (
	selector = regexp.MustCompile(`\b(natsx_\w+)(?:\{([^}]*)\})?`)
	matcher  = regexp.MustCompile(`(\w+)\s*(?:=~|!~|!=|=)\s*"`)
	grouping = regexp.MustCompile(`\bby\s*\(([^)]*)\)`)
	template = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}`)
)

// faults are what is wrong with a query, and with a text that names its labels.
func faults(metrics map[string][]string, query, text string) (wrong []string) {
	known := []string{"job", "instance"}
	for _, s := range selector.FindAllStringSubmatch(query, -1) {
		labels, ok := metrics[s[1]]
		if !ok {
			wrong = append(wrong, "no metric "+s[1])
			continue
		}
		known = append(known, labels...)
		for _, l := range matcher.FindAllStringSubmatch(s[2], -1) {
			if !slices.Contains(labels, l[1]) {
				wrong = append(wrong, s[1]+" has no label "+l[1])
			}
		}
	}
	left := known
	if groups := grouping.FindAllStringSubmatch(query, -1); groups != nil {
		left = nil
		for _, g := range groups {
			for _, l := range strings.Split(g[1], ",") {
				l = strings.TrimSpace(l)
				left = append(left, l)
				if !slices.Contains(known, l) {
					wrong = append(wrong, "by an unknown label "+l)
				}
			}
		}
	}
	for _, l := range template.FindAllStringSubmatch(text, -1) {
		if !slices.Contains(left, l[1]) {
			wrong = append(wrong, "the text names "+l[1]+", which the result has not")
		}
	}
	return wrong
}

// The check of queries finds what is wrong with one.
func TestFaultsOfQueries(t *testing.T) {
	t.Parallel()
	metrics := metricLabels(t)
	for query, want := range map[string]string{
		`sum by (route) (rate(natsx_received_total{durable="d"}[5m]))`: "",
		`natsx_recieved_total`:                                   "no metric",
		`natsx_handler_seconds`:                                  "no metric",
		`natsx_received_total{subject="x"}`:                      "no label subject",
		`sum by (subject) (natsx_received_total)`:                "unknown label subject",
		`sum by (le, route) (natsx_handler_seconds_sum)`:         "unknown label le",
		`sum by (durable) (natsx_received_total{stream!~"a|b"})`: "names route",
	} {
		got := strings.Join(faults(metrics, query, "{{route}}"), "; ")
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %q", query, got, want)
		}
	}
}

// The dashboard and the alert rules ask for metrics and labels that there are, and the
// dashboard for all of them.
func TestDashboardAndAlerts(t *testing.T) {
	t.Parallel()
	metrics := metricLabels(t)
	var dashboard struct {
		Templating struct {
			List []struct{ Type, Definition string }
		}
		Panels []struct {
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	text, err := os.ReadFile("dashboard.json")
	if err == nil {
		err = json.Unmarshal(text, &dashboard)
	}
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	use := func(query string) {
		for _, s := range selector.FindAllStringSubmatch(query, -1) {
			used[s[1]] = true
		}
	}
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		for _, q := range p.Targets {
			use(q.Expr)
			for _, wrong := range faults(metrics, q.Expr, q.LegendFormat) {
				t.Errorf("panel %q: %s: %s", p.Title, q.Expr, wrong)
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		for _, wrong := range faults(metrics, v.Definition, "") {
			t.Errorf("variable %s: %s", v.Definition, wrong)
		}
	}
	for name := range metrics {
		base := strings.TrimSuffix(strings.TrimSuffix(name, "_count"), "_sum")
		if !used[name] && (base == name || !used[base+"_bucket"]) {
			t.Errorf("no panel shows %s", name)
		}
	}

	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr string
				Labels      map[string]string
				Annotations map[string]string
			}
		}
	}
	text, err = os.ReadFile("alerts.yml")
	if err == nil {
		err = yaml.Unmarshal(text, &rules)
	}
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			count++
			if r.Alert == "" || r.Labels["severity"] == "" || r.Annotations["summary"] == "" {
				t.Errorf("rule %q lacks a name, a severity or a summary", r.Alert)
			}
			if !selector.MatchString(r.Expr) {
				t.Errorf("rule %s asks for no metric", r.Alert)
			}
			for _, wrong := range faults(metrics, r.Expr, r.Annotations["summary"]+r.Annotations["description"]) {
				t.Errorf("rule %s: %s", r.Alert, wrong)
			}
		}
	}
	if count == 0 {
		t.Error("no rule was read")
	}
}

// The README lists every metric.
func TestReadmeListsTheMetrics(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range metricLabels(t) {
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		if !strings.Contains(string(readme), "`"+name+"`") {
			t.Errorf("README.md does not name %s", name)
		}
	}
}

// The README shows code of the examples.
func TestReadmeShowsExamples(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	flat := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	blocks := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) == 0 {
		t.Error("README.md shows no code")
	}
	for _, block := range blocks {
		if !strings.Contains(flat(string(examples)), flat(block[1])) {
			t.Errorf("no example has this block of README.md:\n%s", block[1])
		}
	}
}
