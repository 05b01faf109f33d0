package natsx

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// authority signs certificates of a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key = newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue writes a certificate and its key into dir, in the place of those before.
func (a *authority) issue(dir, name string, expires time.Time) (certFile, keyFile string) {
	a.t.Helper()
	key := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: expires, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
	a.write(certFile, "CERTIFICATE", der)
	a.write(keyFile, "EC PRIVATE KEY", secret)
	return certFile, keyFile
}

func (a *authority) write(file, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// file is the authority's own certificate, for clients.
func (a *authority) file(dir string) string {
	file := filepath.Join(dir, "ca.pem")
	a.write(file, "CERTIFICATE", a.cert.Raw)
	return file
}

// secured adds to an application's options what makes a test quick.
func secured(name string, opts ...nats.Option) []nats.Option {
	return append(opts, nats.Name(name), nats.ReconnectWait(10*time.Millisecond), nats.ReconnectJitter(0, 10*time.Millisecond))
}

// wantWork runs a durable route over a connection of Connect, and expects it to handle a
// message.
func wantWork(t *testing.T, nc *nats.Conn) *running {
	t.Helper()
	_, log := newLogBook()
	r := startBroker(t, NewBroker(nc, WithLogger(log), WithStreams(Stream("ORDERS").Subjects("orders.*"))),
		Route("orders.*").Durable("d").Handle(succeed))
	receive(t, r.Ready(), "the broker")
	if _, err := NewPublisher(nc).Publish(testContext(t), To("orders.x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the message is handled", func() bool { return r.Stats().Routes[0].Succeeded == 1 })
	return r
}

// wantCause expects a connection of Connect to stay down, and Health and the log to say
// why.
func wantCause(t *testing.T, nc *nats.Conn, cause string) {
	t.Helper()
	book, log := newLogBook()
	b := NewBroker(nc, WithLogger(log))
	r := startBroker(t, b, Route("core").Handle(succeed))
	eventually(t, "Health names the cause", func() bool {
		err := b.Health()
		return err != nil && strings.Contains(err.Error(), cause)
	})
	eventually(t, "the log names the cause", func() bool { return len(book.alarms(cause)) > 0 })
	if nc.IsConnected() {
		t.Error("it is connected")
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	if said := len(book.alarms("connection lost")); said > 5 {
		t.Errorf("it was said %d times that the connection is lost: %q", said, book.alarms("connection lost"))
	}
}

// Connect takes the certificates of nats.go's options. What is wrong with them is
// named, and one that was renewed is used at the next try.
func TestConnectWithClientCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	caFile := ca.file(dir)
	serverCert, serverKey := ca.issue(dir, "server", time.Now().Add(time.Hour))
	pair, err := tls.LoadX509KeyPair(serverCert, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	s := startServer(t, func(o *server.Options) {
		o.TLS, o.TLSVerify, o.TLSMap = true, true, true
		o.TLSTimeout = testLimit.Seconds()
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
		o.Users = []*server.User{{Username: "CN=billing"}} // a user by the certificate's subject
	})
	url := strings.Replace(s.ClientURL(), "nats://", "tls://", 1)
	dial := func(name string, opts ...nats.Option) *nats.Conn {
		t.Helper()
		nc, err := Connect(url, secured(t.Name()+" "+name, opts...)...)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Cleanup(nc.Close)
		return nc
	}

	certFile, keyFile := ca.issue(dir, "billing", time.Now().Add(-time.Minute))
	billing := dial("billing", nats.RootCAs(caFile), nats.ClientCert(certFile, keyFile))
	wantCause(t, billing, "expired certificate")
	ca.issue(dir, "billing", time.Now().Add(time.Hour))
	r := wantWork(t, billing)
	if state, err := billing.TLSConnectionState(); err != nil || !state.HandshakeComplete {
		t.Errorf("TLS state %v, %v", state, err)
	}
	if err := r.stop(t); err != nil {
		t.Error(err)
	}

	wantCause(t, dial("no certificate", nats.RootCAs(caFile)), "certificate required")
	wantCause(t, dial("unknown authority", nats.ClientCert(certFile, keyFile)), "unknown authority")
	otherCert, otherKey := ca.issue(dir, "shipping", time.Now().Add(time.Hour))
	wantCause(t, dial("no user", nats.RootCAs(caFile), nats.ClientCert(otherCert, otherKey)), "uthorization")

	// A file that is not there is an error at once.
	if nc, err := Connect(url, nats.RootCAs(caFile), nats.ClientCert(filepath.Join(dir, "none.pem"), keyFile)); err == nil || !strings.Contains(err.Error(), "none.pem") {
		t.Errorf("without the file: %v, %v", nc, err)
	}
}

// issuer is an operator with one account, whose users have credentials files.
type issuer struct {
	t       *testing.T
	account nkeys.KeyPair
	opts    func(*server.Options)
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{t: t}
	must := func(key nkeys.KeyPair, err error) (nkeys.KeyPair, string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		public, err := key.PublicKey()
		if err != nil {
			t.Fatal(err)
		}
		return key, public
	}
	operator, operatorID := must(nkeys.CreateOperator())
	system, systemID := must(nkeys.CreateAccount())
	account, accountID := must(nkeys.CreateAccount())
	_ = system
	i.account = account
	resolver := &server.MemAccResolver{}
	for _, id := range []string{systemID, accountID} {
		claims := jwt.NewAccountClaims(id)
		if id == accountID {
			claims.Limits.JetStreamLimits = jwt.JetStreamLimits{MemoryStorage: -1, DiskStorage: -1, Streams: -1, Consumer: -1}
		}
		token, err := claims.Encode(operator)
		if err != nil {
			t.Fatal(err)
		}
		if err := resolver.Store(id, token); err != nil {
			t.Fatal(err)
		}
	}
	i.opts = func(o *server.Options) {
		o.TrustedKeys, o.SystemAccount, o.AccountResolver = []string{operatorID}, systemID, resolver
	}
	return i
}

// issue writes the credentials of a new user into a file.
func (i *issuer) issue(file string, expires time.Time) {
	i.t.Helper()
	user, err := nkeys.CreateUser()
	if err != nil {
		i.t.Fatal(err)
	}
	public, err := user.PublicKey()
	if err != nil {
		i.t.Fatal(err)
	}
	claims := jwt.NewUserClaims(public)
	claims.Expires = expires.Unix()
	token, err := claims.Encode(i.account)
	if err != nil {
		i.t.Fatal(err)
	}
	seed, err := user.Seed()
	if err != nil {
		i.t.Fatal(err)
	}
	creds, err := jwt.FormatUserConfig(token, seed)
	if err != nil {
		i.t.Fatal(err)
	}
	temporary := file + ".new"
	if err := os.WriteFile(temporary, creds, 0o600); err != nil {
		i.t.Fatal(err)
	}
	if err := os.Rename(temporary, file); err != nil {
		i.t.Fatal(err)
	}
}

// Connect takes a credentials file, and reads it anew for each connect: expired
// credentials are replaced by renewed ones while routes go on.
func TestConnectWithACredentialsFile(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	s := startServer(t, i.opts)
	file := filepath.Join(t.TempDir(), "billing.creds")

	name := t.Name()
	dial := func() (*nats.Conn, error) {
		return Connect(s.ClientURL(), secured(name, nats.UserCredentials(file))...)
	}
	if nc, err := dial(); err == nil || !strings.Contains(err.Error(), "billing.creds") {
		t.Errorf("without the file: %v, %v", nc, err)
	}
	i.issue(file, time.Now().Add(-time.Minute))
	nc, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	wantCause(t, nc, "uthorization")

	i.issue(file, time.Now().Add(4*time.Second))
	r := wantWork(t, nc)
	i.issue(file, time.Now().Add(time.Hour))
	before := nc.Stats().Reconnects
	eventually(t, "the first credentials have expired", func() bool { return nc.Stats().Reconnects > before && nc.IsConnected() })
	if _, err := NewPublisher(nc).Publish(testContext(t), To("orders.x")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the route works with the new ones", func() bool { return r.Stats().Routes[0].Succeeded == 2 && r.Health() == nil })
	if err := r.stop(t); err != nil {
		t.Error(err)
	}
	for _, line := range defaultLog.alarms("") {
		if strings.Contains(line, "SUA") || strings.Contains(line, "eyJ") {
			t.Errorf("a secret was logged: %s", line)
		}
	}
}
