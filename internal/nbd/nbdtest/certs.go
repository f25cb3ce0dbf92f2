package nbdtest

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
	"testing"
	"time"
)

// Certs are throw-away certificates of one authority, for a server on this
// machine and its clients.
type Certs struct {
	// Dir holds ca-cert.pem, client-cert.pem and client-key.pem, as NBD tools
	// want them (tls-certificates of libnbd, dir of QEMU's tls-creds-x509).
	Dir            string
	Server, Client *tls.Config
}

// NewCerts makes certificates; the server asks for the client's.
func NewCerts(t testing.TB) *Certs {
	t.Helper()
	ca, caKey := certificate(t, nil, nil, "test authority")
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	c := &Certs{Dir: t.TempDir()}
	pair := func(name string) tls.Certificate {
		cert, key := certificate(t, ca, caKey, name)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		c.file(t, name+"-cert.pem", "CERTIFICATE", cert.Raw)
		c.file(t, name+"-key.pem", "PRIVATE KEY", der)
		return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	}
	c.file(t, "ca-cert.pem", "CERTIFICATE", ca.Raw)
	c.Server = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair("server")},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}
	c.Client = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair("client")}, RootCAs: pool}
	return c
}

func (c *Certs) file(t testing.TB, name, kind string, der []byte) {
	t.Helper()
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(filepath.Join(c.Dir, name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// certificate makes one that parent signed, or an authority if parent is nil.
func certificate(t testing.TB, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage |= x509.KeyUsageCertSign
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}
