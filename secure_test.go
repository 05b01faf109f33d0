package natsx

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
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

// issuer is an operator with one account, whose users have credentials files. It writes
// keys and tokens itself: the server's packages for that are no dependency of natsx.
type issuer struct {
	t       *testing.T
	account identityKey
	opts    func(*server.Options)
}

// identityKey is a key of an operator, an account or a user.
type identityKey struct {
	kind   byte // of the public key
	secret ed25519.PrivateKey
}

const (
	operatorKey = 14 << 3
	accountKey  = 0
	userKey     = 20 << 3
	seedKey     = 18 << 3
)

func newIdentity(t *testing.T, kind byte) identityKey {
	t.Helper()
	_, secret, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return identityKey{kind, secret}
}

func (k identityKey) public() string {
	return keyText(append([]byte{k.kind}, k.secret.Public().(ed25519.PublicKey)...))
}

func (k identityKey) seed() string {
	return keyText(append([]byte{seedKey | k.kind>>5, k.kind & 31 << 3}, k.secret.Seed()...))
}

// keyText writes a key as NATS does: with a checksum, in base 32.
func keyText(key []byte) string {
	var sum uint16
	for _, b := range key {
		sum ^= uint16(b) << 8
		for range 8 {
			if sum&0x8000 != 0 {
				sum = sum<<1 ^ 0x1021
			} else {
				sum <<= 1
			}
		}
	}
	return base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(binary.LittleEndian.AppendUint16(key, sum))
}

// token is a JSON web token about a key, signed by this one.
func (k identityKey) token(t *testing.T, subject string, expires time.Time, claims map[string]any) string {
	t.Helper()
	body := map[string]any{"jti": rand.Text(), "iat": time.Now().Unix(), "iss": k.public(), "sub": subject, "name": "test", "nats": claims}
	if !expires.IsZero() {
		body["exp"] = expires.Unix()
	}
	var parts []string
	for _, part := range []map[string]any{{"typ": "JWT", "alg": "ed25519-nkey"}, body} {
		text, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(text))
	}
	signed := strings.Join(parts, ".")
	return signed + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(k.secret, []byte(signed)))
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	operator, system, account := newIdentity(t, operatorKey), newIdentity(t, accountKey), newIdentity(t, accountKey)
	resolver := &server.MemAccResolver{}
	for _, k := range []identityKey{system, account} {
		limits := map[string]any{"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1}
		if k.public() == account.public() {
			for _, name := range []string{"mem_storage", "disk_storage", "streams", "consumer"} {
				limits[name] = -1
			}
		}
		token := operator.token(t, k.public(), time.Time{}, map[string]any{"type": "account", "version": 2, "limits": limits})
		if err := resolver.Store(k.public(), token); err != nil {
			t.Fatal(err)
		}
	}
	return &issuer{t, account, func(o *server.Options) {
		o.TrustedKeys, o.SystemAccount, o.AccountResolver = []string{operator.public()}, system.public(), resolver
	}}
}

// issue writes the credentials of a new user into a file.
func (i *issuer) issue(file string, expires time.Time) {
	i.t.Helper()
	user := newIdentity(i.t, userKey)
	token := i.account.token(i.t, user.public(), expires, map[string]any{"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1})
	creds := "-----BEGIN NATS USER JWT-----\n" + token + "\n------END NATS USER JWT------\n\n" +
		"-----BEGIN USER NKEY SEED-----\n" + user.seed() + "\n------END USER NKEY SEED------\n"
	temporary := file + ".new"
	if err := os.WriteFile(temporary, []byte(creds), 0o600); err != nil {
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
