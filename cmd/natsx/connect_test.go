package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"github.com/natsx/natsx/natsxtest"
)

// runProcess runs the tool in a process of its own, with an environment.
func runProcess(t *testing.T, env []string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), asTool+"=1"), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func write(t *testing.T, file string, text []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// must fails the test for an error.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestContexts(t *testing.T) {
	t.Parallel()
	s := natsxtest.Server(t, func(o *server.Options) { o.Username, o.Password = "me", "secret" })
	other := natsxtest.Server(t) // which takes anyone
	config := t.TempDir()
	home := "XDG_CONFIG_HOME=" + config
	file := write(t, filepath.Join(config, "nats", "context", "prod.json"), []byte(`{"url":"`+s.ClientURL()+`","user":"me","password":"secret"}`))
	write(t, filepath.Join(config, "nats", "context", "wrong.json"), []byte(`{"url":"`+s.ClientURL()+`","user":"me","password":"wrong"}`))
	url := "NATS_URL=" + s.ClientURL()
	for _, test := range []struct {
		name string
		env  []string
		args string
		code int
	}{
		{"flag", []string{home}, "-context prod", exitOK},
		{"file", nil, "--context " + file, exitOK},
		{"variable", []string{home, "NATS_CONTEXT=prod"}, "", exitOK},
		{"flag before variable", []string{home, "NATS_CONTEXT=prod"}, "-context wrong", exitFailed},
		{"flags before context", []string{home}, "-context wrong -password secret -user me", exitOK},
		{"server before context", []string{home}, "-context wrong -s " + other.ClientURL(), exitOK},
		{"variables", []string{url, "NATS_USER=me", "NATS_PASSWORD=secret"}, "", exitOK},
		{"flag before variable of a user", []string{url, "NATS_USER=me", "NATS_PASSWORD=secret"}, "-password wrong", exitFailed},
		{"nobody", []string{url}, "", exitFailed},
		{"unknown", []string{home}, "-context absent", exitFailed},
		{"bad variable", []string{url, "NATS_TIMEOUT=soon"}, "", exitUsage},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := runProcess(t, test.env, append([]string{"routes"}, strings.Fields(test.args)...)...)
			r.want(t, test.code)
			r.wantNot(t, "secret")
		})
	}
	t.Run("selected", func(t *testing.T) {
		t.Parallel()
		config := t.TempDir()
		home := "XDG_CONFIG_HOME=" + config
		write(t, filepath.Join(config, "nats", "context", "prod.json"), must[[]byte](t)(os.ReadFile(file)))
		write(t, filepath.Join(config, "nats", "context.txt"), []byte("prod\n"))
		runProcess(t, []string{home}, "routes").want(t, exitOK)
		runProcess(t, []string{home}, "routes", "-no-context", "-s", s.ClientURL()).want(t, exitFailed, "uthorization")
	})
	t.Run("secrets are not in the help", func(t *testing.T) {
		t.Parallel()
		r := runProcess(t, []string{"NATS_PASSWORD=secret", "NATS_TOKEN=secret", "NATS_SEED=secret"}, "routes", "-h")
		r.want(t, exitOK, "$NATS_PASSWORD")
		r.wantNot(t, "secret")
	})
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	t.Run("token", func(t *testing.T) {
		t.Parallel()
		s := natsxtest.Server(t, func(o *server.Options) { o.Authorization = "secret" })
		runTool(t, s, "routes").want(t, exitFailed, "uthorization")
		runTool(t, s, "routes", "-token", "secret").want(t, exitOK)
		runTool(t, s, "routes", "-user", "secret").want(t, exitOK) // as in the nats CLI
	})
	t.Run("nkey", func(t *testing.T) {
		t.Parallel()
		user := must[nkeys.KeyPair](t)(nkeys.CreateUser())
		s := natsxtest.Server(t, func(o *server.Options) {
			o.Nkeys = []*server.NkeyUser{{Nkey: must[string](t)(user.PublicKey())}}
		})
		file := write(t, filepath.Join(dir, "user.nk"), must[[]byte](t)(user.Seed()))
		runTool(t, s, "routes").want(t, exitFailed)
		runTool(t, s, "routes", "-nkey", file).want(t, exitOK)
	})
	t.Run("creds", func(t *testing.T) {
		t.Parallel()
		operator := must[nkeys.KeyPair](t)(nkeys.CreateOperator())
		account := must[nkeys.KeyPair](t)(nkeys.CreateAccount())
		system := must[nkeys.KeyPair](t)(nkeys.CreateAccount())
		user := must[nkeys.KeyPair](t)(nkeys.CreateUser())
		id := func(k nkeys.KeyPair) string { return must[string](t)(k.PublicKey()) }
		resolver := &server.MemAccResolver{}
		for _, key := range []nkeys.KeyPair{account, system} {
			claims := jwt.NewAccountClaims(id(key))
			if key == account {
				claims.Limits.JetStreamLimits = jwt.JetStreamLimits{MemoryStorage: -1, DiskStorage: -1, Streams: -1, Consumer: -1}
			}
			if err := resolver.Store(id(key), must[string](t)(claims.Encode(operator))); err != nil {
				t.Fatal(err)
			}
		}
		s := natsxtest.Server(t, func(o *server.Options) {
			o.TrustedKeys, o.SystemAccount, o.AccountResolver = []string{id(operator)}, id(system), resolver
		})
		token := must[string](t)(jwt.NewUserClaims(id(user)).Encode(account))
		seed := must[[]byte](t)(user.Seed())
		file := write(t, filepath.Join(dir, "user.creds"), must[[]byte](t)(jwt.FormatUserConfig(token, seed)))
		runTool(t, s, "routes").want(t, exitFailed, "uthorization")
		runTool(t, s, "routes", "-creds", file).want(t, exitOK)
		runTool(t, s, "routes", "-jwt", token, "-seed", string(seed)).want(t, exitOK)
	})
	t.Run("client certificate", func(t *testing.T) {
		t.Parallel()
		cert, key, pair := certificate(t, dir)
		pool := x509.NewCertPool()
		pool.AddCert(pair.Leaf)
		s := natsxtest.Server(t, func(o *server.Options) {
			o.TLS, o.TLSVerify, o.TLSTimeout = true, true, limit.Seconds()
			o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
		})
		runTool(t, s, "routes", "-tlsca", cert).want(t, exitFailed)
		runTool(t, s, "routes", "-tlsca", cert, "-tlscert", cert, "-tlskey", key).want(t, exitOK)
	})
}

// certificate is one for server, client and authority.
func certificate(t *testing.T, dir string) (certFile, keyFile string, pair tls.Certificate) {
	t.Helper()
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	secret := must[[]byte](t)(x509.MarshalECPrivateKey(key))
	certFile = write(t, filepath.Join(dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	keyFile = write(t, filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret}))
	return certFile, keyFile, must[tls.Certificate](t)(tls.LoadX509KeyPair(certFile, keyFile))
}

// With a domain everything happens in it.
func TestDomain(t *testing.T) {
	t.Parallel()
	s := natsxtest.Server(t, func(o *server.Options) { o.JetStreamDomain = "hub" })
	runTool(t, s, "letters", "ls", "dlq.x", "-js-domain", "leaf").want(t, exitFailed, "no JetStream answers on $JS.leaf.API.")
	runTool(t, s, "routes", "-js-domain", "hub").want(t, exitOK)
	runTool(t, s, "letters", "ls", "dlq.x", "-js-domain", "hub").want(t, exitFailed, "no stream")
	runTool(t, s, "lint", "ORDERS", "-js-domain", "hub").want(t, exitPartly, "does not exist")
}
