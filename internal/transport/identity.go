package transport

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"farside/internal/dr"
)

// IdentityFile is the name of the file, in a node's data directory, that holds
// its key, its certificate chain and the authorities it trusts.
const IdentityFile = "identity.pem"

// The types of PEM blocks in an identity file.
const (
	blockKey         = "PRIVATE KEY"
	blockCertificate = "CERTIFICATE"       // the chain, the node's own first
	blockAuthority   = "FARSIDE AUTHORITY" // certificates to trust
)

// Identity is a node's key, certificate and trust. It can be replaced while
// connections run: later handshakes use the new one.
type Identity struct {
	now func() time.Time
	cur atomic.Pointer[material]
}

// material is one state of an identity. Immutable.
type material struct {
	key         *ecdsa.PrivateKey
	chain       [][]byte // DER
	authorities [][]byte // DER
	leaf        *x509.Certificate
	pool        *x509.CertPool
	peer        Peer
}

// NewIdentity makes an identity from a key, its certificate chain and the
// authorities to trust, all in DER. now tells the time; nil means time.Now.
func NewIdentity(key *ecdsa.PrivateKey, chain, authorities [][]byte, now func() time.Time) (*Identity, error) {
	m := &material{key: key, chain: chain, authorities: authorities}
	if err := m.complete(); err != nil {
		return nil, fmt.Errorf("make identity: %w", err)
	}
	id := &Identity{now: clock(now)}
	id.cur.Store(m)
	return id, nil
}

// LoadIdentity reads the identity that Save wrote into dir. The error wraps
// dr.ErrNotFound if the node has none yet: it has to join first.
func LoadIdentity(dir string, now func() time.Time) (*Identity, error) {
	name := filepath.Join(dir, IdentityFile)
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load identity: %w: %w", dr.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load identity: %w", err)
	}
	m, err := parseMaterial(text)
	if err == nil {
		err = m.complete()
	}
	if err != nil {
		return nil, fmt.Errorf("load identity from %s: %w", name, err)
	}
	id := &Identity{now: clock(now)}
	id.cur.Store(m)
	return id, nil
}

// Save writes the identity into dir, replacing an older one as a whole; only
// the owner may read it.
func (id *Identity) Save(dir string) error {
	text, err := id.cur.Load().marshal()
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	if err := WriteFile(filepath.Join(dir, IdentityFile), text); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	return nil
}

// Replace exchanges key, chain and authorities. The new certificate must name
// the same peer; the error wraps dr.ErrDenied if it doesn't.
func (id *Identity) Replace(key *ecdsa.PrivateKey, chain, authorities [][]byte) error {
	m := &material{key: key, chain: chain, authorities: authorities}
	if err := m.complete(); err != nil {
		return fmt.Errorf("replace identity: %w", err)
	}
	if old := id.Peer(); m.peer != old {
		return fmt.Errorf("replace identity %s by %s: %w", old, m.peer, dr.ErrDenied)
	}
	id.cur.Store(m)
	return nil
}

// Trust exchanges the authorities and keeps the rest.
func (id *Identity) Trust(authorities [][]byte) error {
	m := id.cur.Load()
	return id.Replace(m.key, m.chain, authorities)
}

// Peer returns whom the identity names.
func (id *Identity) Peer() Peer { return id.cur.Load().peer }

// Authorities returns the certificates, in DER, that the identity trusts.
func (id *Identity) Authorities() [][]byte { return id.cur.Load().authorities }

// Names returns the host names and addresses in the certificate.
func (id *Identity) Names() []string {
	leaf := id.cur.Load().leaf
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	return names
}

// Issued returns when the certificate was issued.
func (id *Identity) Issued() time.Time { return id.cur.Load().leaf.NotBefore.Add(backdate) }

// Expires returns when the certificate ends.
func (id *Identity) Expires() time.Time { return id.cur.Load().leaf.NotAfter }

// RenewAt returns when the certificate should be renewed: after two thirds of
// its life.
func (id *Identity) RenewAt() time.Time {
	issued := id.Issued()
	return issued.Add(id.Expires().Sub(issued) * 2 / 3)
}

func (id *Identity) certificate() *tls.Certificate {
	m := id.cur.Load()
	return &tls.Certificate{Certificate: m.chain, PrivateKey: m.key, Leaf: m.leaf}
}

// complete derives and checks what follows from key, chain and authorities.
func (m *material) complete() error {
	if m.key == nil || len(m.chain) == 0 || len(m.authorities) == 0 {
		return fmt.Errorf("key, certificate or authorities missing: %w", dr.ErrInvalid)
	}
	leaf, err := x509.ParseCertificate(m.chain[0])
	if err != nil {
		return fmt.Errorf("parse certificate: %w: %w", dr.ErrInvalid, err)
	}
	if !m.key.PublicKey.Equal(leaf.PublicKey) {
		return fmt.Errorf("certificate is not of this key: %w", dr.ErrInvalid)
	}
	m.leaf, m.pool = leaf, x509.NewCertPool()
	for _, der := range m.authorities {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("parse authority: %w: %w", dr.ErrInvalid, err)
		}
		m.pool.AddCert(cert)
	}
	m.peer, err = PeerOfCertificate(leaf)
	return err
}

func (m *material) marshal() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		return nil, fmt.Errorf("marshal key: %w", err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der})
	for _, c := range m.chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: blockCertificate, Bytes: c})...)
	}
	for _, c := range m.authorities {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: blockAuthority, Bytes: c})...)
	}
	return text, nil
}

// parseMaterial reads what marshal wrote; errors wrap dr.ErrCorrupt.
func parseMaterial(text []byte) (*material, error) {
	m := &material{}
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			break
		}
		switch b.Type {
		case blockKey:
			key, err := x509.ParsePKCS8PrivateKey(b.Bytes)
			if err != nil {
				return nil, fmt.Errorf("parse key: %w: %w", dr.ErrCorrupt, err)
			}
			k, ok := key.(*ecdsa.PrivateKey)
			if !ok {
				return nil, fmt.Errorf("key is a %T: %w", key, dr.ErrCorrupt)
			}
			m.key = k
		case blockCertificate:
			m.chain = append(m.chain, b.Bytes)
		case blockAuthority:
			m.authorities = append(m.authorities, b.Bytes)
		default:
			return nil, fmt.Errorf("unknown PEM block %q: %w", b.Type, dr.ErrCorrupt)
		}
	}
	if m.key == nil || len(m.chain) == 0 {
		return nil, fmt.Errorf("key or certificate missing: %w", dr.ErrCorrupt)
	}
	leaf, err := x509.ParseCertificate(m.chain[0])
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w: %w", dr.ErrCorrupt, err)
	}
	if !m.key.PublicKey.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("certificate is not of this key: %w", dr.ErrCorrupt)
	}
	m.leaf = leaf
	return m, nil
}

// WriteFile replaces a private file as a whole: mode 0600, on the disk when it
// returns. It makes the directory if need be. For the small files of a node's identity and
// control state.
func WriteFile(name string, content []byte) error {
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+".*") // made with mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, errors.Join(err, os.Remove(f.Name())))
	}
	return syncDir(dir)
}
