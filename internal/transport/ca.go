package transport

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"farside/internal/dr"
)

// Lifetimes of certificates. A node renews after two thirds.
const (
	NodeLifetime   = 90 * 24 * time.Hour
	rootLifetime   = 30 * 365 * 24 * time.Hour
	backdate       = 24 * time.Hour // for peers whose clock is behind
	caFile         = "ca.pem"
	maxNames       = 16
	maxCertificate = 64 << 10 // bytes of one certificate or request that we parse
)

// CA is the certificate authority of a deployment: one root, which signs the
// certificates of nodes.
type CA struct {
	key  *ecdsa.PrivateKey
	root *x509.Certificate
	now  func() time.Time
}

// NewCA makes a new authority. now tells the time; nil means time.Now.
func NewCA(now func() time.Time) (*CA, error) {
	now = clock(now)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of the CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Farside CA", Organization: []string{"Farside"}},
		NotBefore:             t.Add(-backdate),
		NotAfter:              t.Add(rootLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("sign root certificate: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse root certificate: %w", err)
	}
	return &CA{key: key, root: root, now: now}, nil
}

// LoadCA reads the authority that Save wrote into dir. The error wraps
// dr.ErrNotFound if there is none.
func LoadCA(dir string, now func() time.Time) (*CA, error) {
	name := filepath.Join(dir, caFile)
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load CA: %w: %w", dr.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	m, err := parseMaterial(text)
	if err != nil {
		return nil, fmt.Errorf("load CA from %s: %w", name, err)
	}
	if len(m.chain) != 1 || !m.leaf.IsCA {
		return nil, fmt.Errorf("load CA from %s: want one CA certificate: %w", name, dr.ErrCorrupt)
	}
	return &CA{key: m.key, root: m.leaf, now: clock(now)}, nil
}

// Save writes the authority, with its key, into dir; only the owner may read it.
func (ca *CA) Save(dir string) error {
	text, err := (&material{key: ca.key, chain: [][]byte{ca.root.Raw}}).marshal()
	if err != nil {
		return fmt.Errorf("save CA: %w", err)
	}
	if err := WriteFile(filepath.Join(dir, caFile), text); err != nil {
		return fmt.Errorf("save CA: %w", err)
	}
	return nil
}

// Authorities returns the certificates, in DER, that peers must trust.
func (ca *CA) Authorities() [][]byte { return [][]byte{ca.root.Raw} }

// Fingerprint returns the fingerprint of the root's public key.
func (ca *CA) Fingerprint() [32]byte { return Fingerprint(ca.root) }

// Fingerprint returns the SHA-256 of a certificate's public key: it stays the
// same when the certificate is made anew with the same key.
func Fingerprint(cert *x509.Certificate) [32]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

// Issue signs a certificate that names who and holds the public key of csr
// (PKCS #10, DER; everything else in it is ignored), valid for ttl from now. It
// returns the chain in DER, the new certificate first, the root last. Names are
// host names and IP addresses for programs that can't do without: Farside itself
// never looks at them. The error wraps dr.ErrInvalid for a bad request.
func (ca *CA) Issue(csr []byte, who Peer, ttl time.Duration, names ...string) ([][]byte, error) {
	pub, err := publicKeyOf(csr)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	return ca.issue(pub, who, ttl, names)
}

func (ca *CA) issue(pub crypto.PublicKey, who Peer, ttl time.Duration, names []string) ([][]byte, error) {
	if err := who.check(); err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	if ttl <= 0 || len(names) > maxNames {
		return nil, fmt.Errorf("issue certificate for %s with %d names: %w", ttl, len(names), dr.ErrInvalid)
	}
	uri, err := url.Parse(who.String())
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := ca.now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: who.Role + " " + who.Node.String(), Organization: []string{"Farside"}},
		NotBefore:             t.Add(-backdate),
		NotAfter:              t.Add(ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{uri},
	}
	if who.Role != RoleClient {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.root, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w: %w", dr.ErrInvalid, err)
	}
	return [][]byte{der, ca.root.Raw}, nil
}

// Identity makes an identity for a node that has the authority at hand: the
// configuration server's own.
func (ca *CA) Identity(who Peer, names ...string) (*Identity, error) {
	key, csr, err := NewRequest()
	if err != nil {
		return nil, err
	}
	chain, err := ca.Issue(csr, who, NodeLifetime, names...)
	if err != nil {
		return nil, err
	}
	return NewIdentity(key, chain, ca.Authorities(), ca.now)
}

// NewRequest makes a key and a request for a certificate with it (PKCS #10,
// DER) that asks for the given host names and IP addresses.
func NewRequest(names ...string) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	template := &x509.CertificateRequest{}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	return key, csr, nil
}

// RequestedNames returns the host names and IP addresses that a request asks
// for. Errors wrap dr.ErrInvalid.
func RequestedNames(csr []byte) ([]string, error) {
	r, err := parseRequest(csr)
	if err != nil {
		return nil, err
	}
	names := r.DNSNames
	for _, ip := range r.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) > maxNames {
		return nil, fmt.Errorf("certificate request asks for %d names, at most %d: %w", len(names), maxNames, dr.ErrInvalid)
	}
	return names, nil
}

// RequestedKey returns the public key, in DER, of a request whose sender has
// proved to own it. Errors wrap dr.ErrInvalid.
func RequestedKey(csr []byte) ([]byte, error) {
	if _, err := publicKeyOf(csr); err != nil {
		return nil, err
	}
	r, err := parseRequest(csr)
	if err != nil {
		return nil, err
	}
	return r.RawSubjectPublicKeyInfo, nil
}

func parseRequest(csr []byte) (*x509.CertificateRequest, error) {
	if len(csr) > maxCertificate {
		return nil, fmt.Errorf("certificate request of %d bytes: %w", len(csr), dr.ErrInvalid)
	}
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w: %w", dr.ErrInvalid, err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request is not signed by its key: %w: %w", dr.ErrInvalid, err)
	}
	return r, nil
}

// publicKeyOf returns the key of a request whose sender has proved to own it.
func publicKeyOf(csr []byte) (*ecdsa.PublicKey, error) {
	r, err := parseRequest(csr)
	if err != nil {
		return nil, err
	}
	pub, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("certificate request: want an ECDSA P-256 key: %w", dr.ErrInvalid)
	}
	return pub, nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func clock(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}
