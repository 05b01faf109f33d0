package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/nats-io/jsm.go/natscontext"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/natsx/natsx"
)

// connection is where to connect and as whom: the flags, variables and context files of
// the nats CLI, with the same precedence (flag, variable, context).
type connection struct {
	server, user, password, token  string
	creds, nkey, jwt, seed         string
	tlsCert, tlsKey, tlsCA         string
	tlsFirst                       bool
	socksProxy, inboxPrefix        string
	domain, apiPrefix, contextName string
	noContext                      bool
	timeout                        time.Duration
}

// variables are the environment variables of flags that have one.
var variables = map[string]string{
	"server": "NATS_URL", "user": "NATS_USER", "password": "NATS_PASSWORD", "token": "NATS_TOKEN",
	"creds": "NATS_CREDS", "nkey": "NATS_NKEY", "jwt": "NATS_JWT", "seed": "NATS_SEED",
	"tlscert": "NATS_CERT", "tlskey": "NATS_KEY", "tlsca": "NATS_CA",
	"socks-proxy": "NATS_SOCKS_PROXY", "timeout": "NATS_TIMEOUT", "context": "NATS_CONTEXT",
}

func (c *connection) declare(fs *flag.FlagSet) {
	text := func(to *string, name, about string) {
		if v := variables[name]; v != "" {
			about += " [$" + v + "]"
		}
		fs.StringVar(to, name, "", about)
	}
	text(&c.server, "server", "`URL`s of the servers, separated by commas")
	text(&c.server, "s", "short for -server `URL`")
	text(&c.user, "user", "`NAME` of the user or, without a password, a token")
	text(&c.password, "password", "`PASSWORD` of the user")
	text(&c.token, "token", "`TOKEN`")
	text(&c.creds, "creds", "`FILE` with credentials")
	text(&c.nkey, "nkey", "`FILE` with the seed of an nkey")
	text(&c.jwt, "jwt", "`JWT` of the user")
	text(&c.seed, "seed", "`SEED` of the user, for -jwt")
	text(&c.tlsCert, "tlscert", "`FILE` with the client's certificate")
	text(&c.tlsKey, "tlskey", "`FILE` with the client's private key")
	text(&c.tlsCA, "tlsca", "`FILE` with the certificate authorities")
	fs.BoolVar(&c.tlsFirst, "tlsfirst", false, "begin with the TLS handshake")
	text(&c.socksProxy, "socks-proxy", "`URL` of a SOCKS5 proxy")
	text(&c.inboxPrefix, "inbox-prefix", "`PREFIX` of inboxes")
	text(&c.domain, "js-domain", "JetStream `DOMAIN`")
	text(&c.apiPrefix, "js-api-prefix", "`PREFIX` of the JetStream API")
	text(&c.contextName, "context", "`NAME` of a context of the nats CLI, or its file")
	fs.BoolVar(&c.noContext, "no-context", false, "ignore the selected context")
	fs.DurationVar(&c.timeout, "timeout", 5*time.Second, "how `LONG` to wait for the connection [$NATS_TIMEOUT]")
}

// fromEnv sets the flags that are not on the command line from their variables. They are
// no default values, so that a help text shows no secret.
func (c *connection) fromEnv(fs *flag.FlagSet) error {
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	given["server"] = given["server"] || given["s"]
	for name, variable := range variables {
		value := os.Getenv(variable)
		if value == "" || given[name] {
			continue
		}
		if err := fs.Lookup(name).Value.Set(value); err != nil {
			return usagef("$%s: %w", variable, err)
		}
	}
	return nil
}

// settings are those of the context, with what the flags override.
func (c *connection) settings(ctx context.Context) (*natscontext.Context, error) {
	options := []natscontext.Option{
		natscontext.WithServerURL(c.server), natscontext.WithCreds(c.creds), natscontext.WithNKey(c.nkey),
		natscontext.WithUserJWT(c.jwt), natscontext.WithUserSeed(c.seed),
		natscontext.WithCertificate(c.tlsCert), natscontext.WithKey(c.tlsKey), natscontext.WithCA(c.tlsCA),
		natscontext.WithSocksProxy(c.socksProxy), natscontext.WithInboxPrefix(c.inboxPrefix),
		natscontext.WithJSDomain(c.domain), natscontext.WithJSAPIPrefix(c.apiPrefix),
	}
	if c.tlsFirst {
		options = append(options, natscontext.WithTLSHandshakeFirst())
	}
	if c.token != "" {
		options = append(options, natscontext.WithToken(c.token))
	}
	if c.user != "" && c.password == "" {
		options = append(options, natscontext.WithToken(c.user))
	} else {
		options = append(options, natscontext.WithUser(c.user), natscontext.WithPassword(c.password))
	}
	if c.noContext {
		return natscontext.New("", false, options...)
	}
	name := c.contextName
	var backend natscontext.Backend = natscontext.NewDefaultFileBackend()
	if strings.HasSuffix(name, ".json") {
		if _, err := os.Stat(name); err == nil {
			file := natscontext.NewSingleFileBackend(name)
			backend, name = file, file.Name()
		}
	}
	registry := natscontext.NewRegistry(backend, natscontext.WithDefaultResolvers(), natscontext.WithLocalSelector())
	return registry.Load(ctx, name, options...)
}

// open connects once: a person waits.
func (c *connection) open(ctx context.Context) (*nats.Conn, jetstream.JetStream, error) {
	if c.domain != "" && c.apiPrefix != "" {
		return nil, nil, usagef("-js-domain and -js-api-prefix exclude each other")
	}
	settings, err := c.settings(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("context %q: %w", c.contextName, err)
	}
	options, err := settings.NATSOptions()
	if err != nil {
		return nil, nil, fmt.Errorf("credentials: %w", err)
	}
	// What the context says holds for all that the tool does.
	c.domain, c.apiPrefix = settings.JSDomain(), settings.JSAPIPrefix()
	if c.domain != "" {
		c.apiPrefix = "" // as the nats CLI prefers it
	}
	url := settings.ServerURL()
	nc, err := natsx.Connect(url, append(options, nats.Name("natsx"), nats.RetryOnFailedConnect(false), nats.Timeout(c.timeout))...)
	if err != nil {
		if errors.Is(err, natsx.ErrInvalidURL) {
			return nil, nil, usageError{err}
		}
		return nil, nil, fmt.Errorf("cannot connect to %s: %w", redacted(cmp.Or(url, nats.DefaultURL)), err)
	}
	var js jetstream.JetStream
	switch {
	case c.domain != "":
		js, err = jetstream.NewWithDomain(nc, c.domain)
	case c.apiPrefix != "":
		js, err = jetstream.NewWithAPIPrefix(nc, strings.TrimSuffix(c.apiPrefix, "."))
	default:
		js, err = jetstream.New(nc)
	}
	if err != nil {
		nc.Close()
		return nil, nil, usageError{err}
	}
	// natsx waits long for a JetStream that may be starting; a person who has misspelt a
	// domain is told at once. With a prefix only some of the API may be there.
	if _, err := nc.Request(apiOf(js)+"INFO", nil, time.Second); c.apiPrefix == "" && errors.Is(err, nats.ErrNoResponders) {
		nc.Close()
		return nil, nil, fmt.Errorf("no JetStream answers on %s", apiOf(js))
	}
	return nc, js, nil
}

// apiOf is the prefix of the subjects of a JetStream API, with its last dot.
func apiOf(js jetstream.JetStream) string {
	switch o := js.Options(); {
	case o.APIPrefix != "":
		return strings.TrimSuffix(o.APIPrefix, ".") + "."
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	}
	return "$JS.API."
}

// redacted hides the users and passwords of URLs.
func redacted(urls string) string {
	list := strings.Split(urls, ",")
	for i, u := range list {
		scheme, rest, found := strings.Cut(u, "://")
		if !found {
			scheme, rest = "", u
		}
		if _, host, found := strings.Cut(rest, "@"); found {
			rest = "xxxxx@" + host
		}
		if list[i] = rest; scheme != "" {
			list[i] = scheme + "://" + rest
		}
	}
	return strings.Join(list, ",")
}
