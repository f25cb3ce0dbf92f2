package transport

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"net"
	"slices"
	"strings"
	"time"

	"farside/internal/dr"
)

// Token lets one node join. Whoever holds its text can find the configuration
// server, be sure that it is the right one, and prove to be invited. docs/security.md
// has the layout of the text.
type Token struct {
	ID          [16]byte
	Secret      [32]byte // the server keeps only its hash
	Authority   [32]byte // fingerprint of the CA's public key
	Role        string   // that the node will have
	ConfigAddrs []string // host:port of the configuration servers, in the order to try
}

const (
	tokenPrefix   = "fs1."
	maxTokenText  = 4096
	maxTokenAddrs = 16
	tokenFixed    = 16 + 32 + 32 + 1 + 1
)

// tokenRoles maps roles to their number in the text; only nodes join.
func tokenRoles() []string {
	return []string{"", RoleAgent, RoleProcessServer, RoleMasterTarget}
}

// NewToken makes a token with a fresh id and secret. The error wraps
// dr.ErrInvalid for a role that can't join or bad addresses.
func NewToken(authority [32]byte, role string, addrs []string) (Token, error) {
	t := Token{Authority: authority, Role: role, ConfigAddrs: addrs}
	rand.Read(t.ID[:])
	rand.Read(t.Secret[:])
	return t, t.check()
}

func (t Token) check() error {
	if t.Role == "" || !slices.Contains(tokenRoles(), t.Role) {
		return fmt.Errorf("join token: role %q can't join: %w", t.Role, dr.ErrInvalid)
	}
	if len(t.ConfigAddrs) > maxTokenAddrs {
		return fmt.Errorf("join token: %d addresses: %w", len(t.ConfigAddrs), dr.ErrInvalid)
	}
	for _, a := range t.ConfigAddrs {
		if err := checkAddr(a); err != nil {
			return fmt.Errorf("join token: %w", err)
		}
	}
	return nil
}

func checkAddr(a string) error {
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" || port == "" || len(a) > 255 {
		return fmt.Errorf("address %q: want host:port: %w", a, dr.ErrInvalid)
	}
	return nil
}

// Hash returns what a server keeps of the secret.
func (t Token) Hash() [32]byte { return sha256.Sum256(t.Secret[:]) }

// Text returns the token as it is given to a node: secret.
func (t Token) Text() string {
	b := slices.Concat(t.ID[:], t.Secret[:], t.Authority[:])
	b = append(b, byte(max(0, slices.Index(tokenRoles(), t.Role))), byte(len(t.ConfigAddrs)))
	for _, a := range t.ConfigAddrs {
		b = append(b, byte(len(a)))
		b = append(b, a...)
	}
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	b = append(b, byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

// String names the token without its secret, so that logs don't tell it.
func (t Token) String() string { return fmt.Sprintf("join token %x for a %s", t.ID, t.Role) }

// GoString is String.
func (t Token) GoString() string { return t.String() }

// ParseToken reads the text of a token. Errors wrap dr.ErrInvalid, or
// dr.ErrVersion for a token of a later version; they never contain the text.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	switch {
	case !ok && strings.HasPrefix(s, "fs") && strings.Contains(s[:min(len(s), 6)], "."):
		return Token{}, fmt.Errorf("parse join token: %w", dr.ErrVersion)
	case !ok:
		return Token{}, fmt.Errorf("parse join token: does not begin with %q: %w", tokenPrefix, dr.ErrInvalid)
	case len(rest) > maxTokenText:
		return Token{}, fmt.Errorf("parse join token: %d characters: %w", len(rest), dr.ErrInvalid)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || strings.ContainsAny(rest, "\r\n") || len(b) < tokenFixed+4 { // the decoder skips line ends
		return Token{}, fmt.Errorf("parse join token: cut or altered: %w", dr.ErrInvalid)
	}
	body, tail := b[:len(b)-4], b[len(b)-4:]
	sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
	if !bytes.Equal(tail, []byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)}) {
		return Token{}, fmt.Errorf("parse join token: cut or altered: %w", dr.ErrInvalid)
	}
	return parseTokenBody(body)
}

func parseTokenBody(b []byte) (Token, error) {
	var t Token
	b = b[copy(t.ID[:], b):]
	b = b[copy(t.Secret[:], b):]
	b = b[copy(t.Authority[:], b):]
	role, n := int(b[0]), int(b[1])
	b = b[2:]
	if role >= len(tokenRoles()) {
		return Token{}, fmt.Errorf("parse join token: role %d: %w", role, dr.ErrVersion)
	}
	t.Role = tokenRoles()[role]
	for range n {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return Token{}, fmt.Errorf("parse join token: addresses cut: %w", dr.ErrInvalid)
		}
		t.ConfigAddrs = append(t.ConfigAddrs, string(b[1:1+int(b[0])]))
		b = b[1+int(b[0]):]
	}
	if len(b) != 0 {
		return Token{}, fmt.Errorf("parse join token: %d bytes too many: %w", len(b), dr.ErrInvalid)
	}
	return t, t.check()
}

// JoinConfig returns a TLS configuration for the first contact: it takes only a
// configuration server whose certificate comes from the authority of the token. now tells the
// time; nil means time.Now.
func (t Token) JoinConfig(now func() time.Time) *tls.Config {
	return PinnedConfig(t.Authority, RoleConfigServer, now)
}

// PinnedConfig returns a TLS configuration of a client without a certificate
// that takes only a server of the role whose chain ends in the authority with the given
// fingerprint; the server must show that authority in its chain.
func PinnedConfig(authority [32]byte, wantRole string, now func() time.Time) *tls.Config {
	now = clock(now)
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // verified below, by the pinned authority
		VerifyConnection: func(s tls.ConnectionState) error {
			roots := x509.NewCertPool()
			for _, c := range s.PeerCertificates {
				if c.IsCA && Fingerprint(c) == authority {
					roots.AddCert(c)
				}
			}
			peer, err := verifyChain(s.PeerCertificates, roots, now(), x509.ExtKeyUsageServerAuth)
			if err != nil {
				return fmt.Errorf("verify server: %w", err)
			}
			if peer.Role != wantRole {
				return fmt.Errorf("server is %s, wanted a %s: %w", peer, wantRole, dr.ErrDenied)
			}
			return nil
		},
	}
}

// DialContext returns a dial function for http.Transport that uses config and
// explains refusals.
func DialContext(config *tls.Config) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		raw, err := (&net.Dialer{KeepAliveConfig: keepAlive()}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w: %w", addr, dr.ErrUnavailable, err)
		}
		c := tls.Client(raw, config)
		if err := c.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, fmt.Errorf("dial %s: %w", addr, err)
		}
		return c, nil
	}
}
