package natsx

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/micro"
)

const natsCLI = "github.com/nats-io/natscli/nats"

// natsCLIVersion is the nats CLI that the service is tried with.
const natsCLIVersion = "v0.5.1"

// buildNatsCLI returns the path of the nats CLI. The first call on a machine builds
// it, which takes a minute, into the user's cache directory.
func buildNatsCLI(t testing.TB) string {
	t.Helper()
	if testing.Short() {
		t.Skip("the nats CLI is not built with -short")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no place to keep the nats CLI: %v", err)
	}
	cache = filepath.Join(cache, "natsx-test")
	cli := filepath.Join(cache, "nats-"+natsCLIVersion)
	if _, err := os.Stat(cli); err == nil {
		return cli
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Skipf("no place to keep the nats CLI: %v", err)
	}
	// Built aside and renamed, since other test processes may do the same.
	bin, err := os.MkdirTemp(cache, "build-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(bin)
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = bin // of no module
		cmd.Env = append(os.Environ(), "GOBIN="+bin, "GOFLAGS=", "GOWORK=off")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("mod", "download", strings.TrimSuffix(natsCLI, "/nats")+"@"+natsCLIVersion); err != nil {
		t.Skipf("the module proxy does not serve the nats CLI: %v: %s", err, out)
	}
	if out, err := run("install", natsCLI+"@"+natsCLIVersion); err != nil {
		t.Fatalf("build the nats CLI: %v: %s", err, out)
	}
	if err := os.Rename(filepath.Join(bin, "nats"), cli); err != nil {
		t.Fatal(err)
	}
	return cli
}

func TestServiceIsSeenByTheNatsCLI(t *testing.T) {
	t.Parallel()
	cli := buildNatsCLI(t)
	s := startServer(t)
	_, log := newLogBook()
	r := runBroker(t, NewBroker(connect(t, s.ClientURL()), WithLogger(log), WithService("prices", "1.2.3", "what things cost")), priceRoutes()...)
	home := t.TempDir()
	nats := func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testLimit)
		defer cancel()
		cmd := exec.CommandContext(ctx, cli, append([]string{"--server", s.ClientURL()}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("nats %s: %v:\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	wants := func(out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("%q is not in\n%s", w, out)
			}
		}
	}

	wants(nats("request", "prices.get", "bread"), "price of bread")
	wants(nats("request", "prices.get", "unknown"), micro.ErrorCodeHeader+": 404", micro.ErrorHeader+": no such price", "payload")
	wants(nats("request", "prices.get", "broken"), micro.ErrorCodeHeader+": 500", "internal error")
	eventually(t, "all are counted", func() bool { s := r.Stats().Routes[0]; return s.Succeeded == 1 && s.Failed == 2 })

	wants(nats("micro", "ls"), "prices", "1.2.3", "what things cost")
	wants(nats("micro", "stats", "prices"), "prices Service Statistics", "prices-get", "prices-_-all")

	var got struct {
		Info  micro.Info
		Stats micro.Stats
	}
	if out := nats("micro", "info", "prices", "--json"); json.Unmarshal([]byte(out), &got) != nil {
		t.Fatalf("not JSON: %s", out)
	}
	if i := got.Info; i.Name != "prices" || i.Version != "1.2.3" || i.Description != "what things cost" || len(i.Endpoints) != 2 {
		t.Errorf("got %+v", i)
	}
	if len(got.Stats.Endpoints) != 2 {
		t.Fatalf("got %+v, want two endpoints", got.Stats)
	}
	if e := got.Stats.Endpoints[0]; e.Name != "prices-get" || e.Subject != "prices.get" || e.QueueGroup != "pricing" ||
		e.NumRequests != 3 || e.NumErrors != 2 || e.ProcessingTime <= 0 || e.LastError != "500:internal error" {
		t.Errorf("got %+v, want 3 requests and 2 errors", e)
	}
}
