package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"farside/internal/dr"
)

// The roles that a certificate can name.
const (
	RoleAgent         = "agent"
	RoleProcessServer = "process-server"
	RoleMasterTarget  = "master-target"
	RoleConfigServer  = "config-server"
	RoleClient        = "client" // uses exports; not a node
)

// Roles lists every role.
func Roles() []string {
	return []string{RoleAgent, RoleProcessServer, RoleMasterTarget, RoleConfigServer, RoleClient}
}

// Peer is what a certificate says of its holder.
type Peer struct {
	Role    string
	Node    dr.NodeID
	Machine dr.MachineID // agents only
}

const uriScheme = "farside"

// String returns the URI that stands in the certificate, for example
// "farside://process-server/5b6c...".
func (p Peer) String() string {
	s := uriScheme + "://" + p.Role + "/" + p.Node.String()
	if !p.Machine.IsZero() {
		s += "/" + p.Machine.String()
	}
	return s
}

// check reports whether p is complete: an error wraps dr.ErrInvalid.
func (p Peer) check() error {
	switch {
	case !slices.Contains(Roles(), p.Role):
		return fmt.Errorf("role %q: %w", p.Role, dr.ErrInvalid)
	case p.Node.IsZero():
		return fmt.Errorf("%s without node id: %w", p.Role, dr.ErrInvalid)
	case p.Machine.IsZero() == (p.Role == RoleAgent):
		return fmt.Errorf("%s: an agent has a machine id, others have none: %w", p.Role, dr.ErrInvalid)
	}
	return nil
}

// ParsePeer reads the form that String writes, and no other.
func ParsePeer(s string) (Peer, error) {
	rest, ok := strings.CutPrefix(s, uriScheme+"://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) < 2 || len(parts) > 3 {
		return Peer{}, fmt.Errorf("parse identity %q: %w", s, dr.ErrInvalid)
	}
	p := Peer{Role: parts[0]}
	var err error
	if p.Node, err = dr.ParseNodeID(parts[1]); err != nil {
		return Peer{}, fmt.Errorf("parse identity %q: %w", s, err)
	}
	if len(parts) == 3 {
		if p.Machine, err = dr.ParseMachineID(parts[2]); err != nil {
			return Peer{}, fmt.Errorf("parse identity %q: %w", s, err)
		}
	}
	if err := p.check(); err != nil {
		return Peer{}, fmt.Errorf("parse identity %q: %w", s, err)
	}
	if p.String() != s {
		return Peer{}, fmt.Errorf("parse identity %q: not in canonical form: %w", s, dr.ErrInvalid)
	}
	return p, nil
}

// PeerOfCertificate returns whom a certificate names. It proves nothing: that is
// what verifying the chain is for.
func PeerOfCertificate(cert *x509.Certificate) (Peer, error) {
	var ours []*url.URL
	for _, u := range cert.URIs {
		if u.Scheme == uriScheme {
			ours = append(ours, u)
		}
	}
	if len(ours) != 1 {
		return Peer{}, fmt.Errorf("certificate names %d identities, not one: %w", len(ours), dr.ErrDenied)
	}
	p, err := ParsePeer(ours[0].String())
	if err != nil {
		return Peer{}, fmt.Errorf("certificate: %w: %w", dr.ErrDenied, err)
	}
	return p, nil
}

// handshakeTimeout bounds how long a peer may take to prove itself.
const handshakeTimeout = 10 * time.Second

// PeerOf returns who is at the other end of a connection that Dial, a Listener
// or Pipe made, or of a *tls.Conn with a configuration of this package, which it
// completes the handshake of if need be.
func PeerOf(c net.Conn) (Peer, error) {
	switch c := c.(type) {
	case interface{ Peer() Peer }:
		return c.Peer(), nil
	case *tls.Conn:
		ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
		defer cancel()
		if err := c.HandshakeContext(ctx); err != nil {
			return Peer{}, fmt.Errorf("handshake with %s: %w", c.RemoteAddr(), err)
		}
		state := c.ConnectionState()
		return PeerOfState(&state)
	}
	return Peer{}, fmt.Errorf("connection %T has no identity: %w", c, dr.ErrDenied)
}

// PeerOfState returns who proved itself in a TLS handshake; the error wraps
// dr.ErrDenied if nobody did. For a state that no configuration of this package
// verified, it proves nothing.
func PeerOfState(s *tls.ConnectionState) (Peer, error) {
	if s == nil || len(s.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("no certificate: %w", dr.ErrDenied)
	}
	return PeerOfCertificate(s.PeerCertificates[0])
}
