package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/dr"
	"farside/internal/transport"
)

// joinPatience is how long Join tries to reach a configuration server.
const joinPatience = 30 * time.Second

// JoinOptions say how a node joins.
type JoinOptions struct {
	Token   string // the text that a configuration server made
	Role    string // that the node is to have; "" = whatever the token says
	DataDir string
	Version string // of the program; "" = what its build says
	// Names are host names and addresses to put into the certificate, for programs
	// of others that use the node's exports over TLS. Farside does not look at them.
	Names []string
	Now   func() time.Time // nil = time.Now
}

// Join makes the data directory of a node: it exchanges a token for an identity.
// The configuration server is known to be the right one by the token. The error wraps
// dr.ErrExists if the directory is a node's already, dr.ErrInvalid for a malformed token
// or one of another role, dr.ErrDenied if the server refuses it, and dr.ErrUnavailable if
// no server answers.
func Join(ctx context.Context, o JoinOptions) (transport.Peer, error) {
	token, err := transport.ParseToken(o.Token)
	if err != nil {
		return transport.Peer{}, fmt.Errorf("join: %w", err)
	}
	if o.Role != "" && o.Role != token.Role {
		return transport.Peer{}, fmt.Errorf("join: the token is for a %s, not for a %s: %w", token.Role, o.Role, dr.ErrInvalid)
	}
	if _, err := os.Lstat(filepath.Join(o.DataDir, transport.IdentityFile)); err == nil {
		return transport.Peer{}, fmt.Errorf("join: %s holds a node's identity: %w", o.DataDir, dr.ErrExists)
	}
	key, csr, err := transport.NewRequest(o.Names...)
	if err != nil {
		return transport.Peer{}, fmt.Errorf("join: %w", err)
	}
	r, err := askToJoin(ctx, o, token, csr)
	if err != nil {
		return transport.Peer{}, fmt.Errorf("join: %w", err)
	}
	id, err := transport.NewIdentity(key, r.GetCertificateChain(), r.GetAuthorities(), o.Now)
	if err != nil {
		return transport.Peer{}, fmt.Errorf("join: server's answer: %w", err)
	}
	if got := id.Peer(); got.Role != token.Role {
		return transport.Peer{}, fmt.Errorf("join: server made a %s of this %s: %w", got.Role, token.Role, dr.ErrDenied)
	}
	servers := r.GetConfigServers()
	if len(servers) == 0 {
		servers = token.ConfigAddrs
	}
	first := &farsidev1.Assignment{NodeId: id.Peer().Node.String(), ConfigServers: servers, Authorities: r.GetAuthorities()}
	// The identity comes last: with it, the directory is a node's.
	if err := saveAssignment(o.DataDir, first); err != nil {
		return transport.Peer{}, fmt.Errorf("join: %w", err)
	}
	if err := id.Save(o.DataDir); err != nil {
		return transport.Peer{}, fmt.Errorf("join: %w", err)
	}
	return id.Peer(), nil
}

// askToJoin sends the request until a server answers. Asking again is safe: the
// server knows a repeated request by its key.
func askToJoin(ctx context.Context, o JoinOptions, token transport.Token, csr []byte) (*farsidev1.JoinResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, joinPatience)
	defer cancel()
	t := baseTransport(api.NewDialer(token.ConfigAddrs...))
	t.TLSClientConfig = token.JoinConfig(o.Now)
	defer t.CloseIdleConnections()
	node := farsidev1connect.NewNodeServiceClient(&http.Client{Transport: t}, api.BaseURL, connect.WithReadMaxBytes(maxMessage))
	host := Host()
	version := o.Version
	if version == "" {
		version = buildVersion()
	}
	var b backoff
	for {
		r, err := node.Join(ctx, &farsidev1.JoinRequest{
			Token: o.Token, Csr: csr, Role: roleNumber(token.Role), Hostname: host.GetHostname(), Version: version, Host: host,
		})
		if err = explain(err); err == nil {
			return r, nil
		}
		if !errors.Is(err, dr.ErrUnavailable) {
			return nil, err
		}
		wait := b.next()
		if deadline, ok := ctx.Deadline(); ctx.Err() != nil || ok && time.Until(deadline) < wait {
			return nil, err
		}
		sleep(ctx, wait)
	}
}

func roleNumber(role string) farsidev1.Role {
	return map[string]farsidev1.Role{
		transport.RoleAgent:         farsidev1.Role_ROLE_AGENT,
		transport.RoleProcessServer: farsidev1.Role_ROLE_PROCESS_SERVER,
		transport.RoleMasterTarget:  farsidev1.Role_ROLE_MASTER_TARGET,
	}[role]
}
