package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"farside/internal/dr"
)

// ClientConfig returns a TLS configuration that proves this identity and takes
// only a server of the wanted role. Host names play no part.
func (id *Identity) ClientConfig(wantRole string) *tls.Config {
	return id.clientConfig(Peer{Role: wantRole})
}

// clientConfig is ClientConfig for one node, if want names one.
func (id *Identity) clientConfig(want Peer) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return id.certificate(), nil
		},
		// Chain and role are verified below: the usual check of host names is not wanted.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			peer, err := id.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth)
			if err != nil {
				return fmt.Errorf("verify server: %w", err)
			}
			if peer.Role != want.Role || !want.Node.IsZero() && peer.Node != want.Node {
				return fmt.Errorf("server is %s, wanted %s: %w", peer, want, dr.ErrDenied)
			}
			return nil
		},
	}
}

// ServerConfig returns a TLS configuration that takes only clients with a
// certificate of one of the roles; none means any role.
func (id *Identity) ServerConfig(roles ...string) *tls.Config {
	return id.serverConfig(tls.RequireAnyClientCert, roles)
}

// OpenServerConfig is ServerConfig that takes clients without a certificate
// too, who must prove themselves otherwise. A certificate that is shown must be valid.
func (id *Identity) OpenServerConfig(roles ...string) *tls.Config {
	return id.serverConfig(tls.RequestClientCert, roles)
}

func (id *Identity) serverConfig(auth tls.ClientAuthType, roles []string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: auth,
		// A resumed session would outlive a change of trust.
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return id.certificate(), nil
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 && auth == tls.RequestClientCert {
				return nil
			}
			peer, err := id.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth)
			if err != nil {
				return fmt.Errorf("verify client: %w", err)
			}
			if len(roles) > 0 && !slices.Contains(roles, peer.Role) {
				return fmt.Errorf("client is %s, not one of %v: %w", peer, roles, dr.ErrDenied)
			}
			return nil
		},
	}
}

// verify checks a chain against the trusted authorities, now.
func (id *Identity) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (Peer, error) {
	return verifyChain(chain, id.cur.Load().pool, id.now(), usage)
}

func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, usage x509.ExtKeyUsage) (Peer, error) {
	if len(chain) == 0 {
		return Peer{}, fmt.Errorf("no certificate: %w", dr.ErrDenied)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return Peer{}, fmt.Errorf("certificate: %w: %w", dr.ErrDenied, err)
	}
	return PeerOfCertificate(chain[0])
}

// Conn is a TLS connection whose peer has proved who it is.
type Conn struct {
	*tls.Conn
	peer Peer
}

// Peer returns who is at the other end.
func (c *Conn) Peer() Peer { return c.peer }

// Read reads like tls.Conn. In TLS 1.3 a client learns only by reading that the
// server did not take its certificate: that error wraps dr.ErrDenied.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, ExplainAlert(err)
}

// ExplainAlert has the alert by which a peer refuses this node's certificate wrap
// dr.ErrDenied; it returns any other error as it is.
func ExplainAlert(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return fmt.Errorf("peer refuses this node's certificate: %w: %w", dr.ErrDenied, err)
	}
	return err
}

// Dial connects to addr ("host:port") and returns when the server has proved to
// have the wanted role. The error wraps dr.ErrUnavailable if nobody answers, and
// dr.ErrDenied if the wrong one does.
func (id *Identity) Dial(ctx context.Context, addr, wantRole string) (net.Conn, error) {
	return id.DialPeer(ctx, addr, Peer{Role: wantRole})
}

// DialPeer is Dial for one node: want has a role and, unless zero, a node id.
func (id *Identity) DialPeer(ctx context.Context, addr string, want Peer) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	raw, err := (&net.Dialer{KeepAliveConfig: keepAlive()}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w: %w", addr, dr.ErrUnavailable, err)
	}
	c := tls.Client(raw, id.clientConfig(want))
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		if !errors.Is(err, dr.ErrDenied) {
			err = fmt.Errorf("%w: %w", dr.ErrUnavailable, err)
		}
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	state := c.ConnectionState()
	peer, err := PeerOfState(&state)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, errors.Join(err, c.Close()))
	}
	return &Conn{Conn: c, peer: peer}, nil
}

// keepAlive finds a dead peer within about half a minute.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}
}
