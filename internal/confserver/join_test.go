package confserver

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/catalog"
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/transport"
)

// stranger is a client without a certificate that trusts the site by a token.
func (s *site) stranger(token string) farsidev1connect.NodeServiceClient {
	s.t.Helper()
	tok, err := transport.ParseToken(token)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.nodeClient(tok.JoinConfig(s.clock.now))
}

func request(t *testing.T, names ...string) []byte {
	t.Helper()
	_, csr, err := transport.NewRequest(names...)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestJoin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	token := s.token(transport.RoleAgent, "")
	node := s.stranger(token)
	ask := func(change func(*farsidev1.JoinRequest)) (*farsidev1.JoinResponse, error) {
		r := &farsidev1.JoinRequest{Token: token, Csr: request(t), Role: farsidev1.Role_ROLE_AGENT, Hostname: "web"}
		change(r)
		return node.Join(t.Context(), r)
	}
	tok, err := transport.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	forged, unknown := tok, tok
	forged.Secret[0] ^= 1
	unknown.ID[0] ^= 1
	for _, tc := range []struct {
		name   string
		change func(*farsidev1.JoinRequest)
		kind   string
	}{
		{"no token", func(r *farsidev1.JoinRequest) { r.Token = "" }, api.KindDenied},
		{"garbage token", func(r *farsidev1.JoinRequest) { r.Token = "fs1.hello" }, api.KindDenied},
		{"wrong secret", func(r *farsidev1.JoinRequest) { r.Token = forged.Text() }, api.KindDenied},
		{"unknown token", func(r *farsidev1.JoinRequest) { r.Token = unknown.Text() }, api.KindDenied},
		{"wrong role", func(r *farsidev1.JoinRequest) { r.Role = farsidev1.Role_ROLE_MASTER_TARGET }, api.KindDenied},
		{"no role", func(r *farsidev1.JoinRequest) { r.Role = 0 }, api.KindDenied},
		{"unknown role", func(r *farsidev1.JoinRequest) { r.Role = 99 }, api.KindInvalid},
		{"no request", func(r *farsidev1.JoinRequest) { r.Csr = nil }, api.KindInvalid},
		{"bad host name", func(r *farsidev1.JoinRequest) { r.Hostname = "a\nb" }, api.KindInvalid},
	} {
		_, err := ask(tc.change)
		wantKind(t, tc.name, err, tc.kind)
	}
	// None of these has used the token up.
	csr := request(t)
	first, err := ask(func(r *farsidev1.JoinRequest) { r.Csr = csr })
	if err != nil {
		t.Fatal(err)
	}
	again, err := ask(func(r *farsidev1.JoinRequest) { r.Csr = csr })
	if err != nil || again.GetNodeId() != first.GetNodeId() || again.GetMachineId() != first.GetMachineId() {
		t.Errorf("the same request again: %v, %v", again, err)
	}
	_, err = ask(func(*farsidev1.JoinRequest) {})
	wantKind(t, "token used by another", err, api.KindDenied)
	cert, err := x509.ParseCertificate(first.GetCertificateChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	who, err := transport.PeerOfCertificate(cert)
	if err != nil || who.Role != transport.RoleAgent || who.Node.String() != first.GetNodeId() || who.Machine.String() != first.GetMachineId() {
		t.Errorf("certificate of %v, %v", who, err)
	}
	machines, err := s.ListMachines(t.Context(), &farsidev1.ListMachinesRequest{})
	if err != nil || len(machines.GetMachines()) != 1 || machines.GetMachines()[0].GetName() != "web" {
		t.Errorf("machines %v, %v", machines, err)
	}
}

func TestJoinTokenExpires(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	token := s.token(transport.RoleProcessServer, "")
	s.clock.advance(defaultTokenLife)
	_, err := s.stranger(token).Join(t.Context(), &farsidev1.JoinRequest{
		Token: token, Csr: request(t), Role: farsidev1.Role_ROLE_PROCESS_SERVER,
	})
	wantKind(t, "expired", err, api.KindDenied)
	if !strings.Contains(err.Error(), "expired") {
		t.Errorf("the error does not say why: %v", err)
	}
}

func TestCreateTokenRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for name, req := range map[string]*farsidev1.CreateTokenRequest{
		"no role":       {},
		"config server": {Role: farsidev1.Role_ROLE_CONFIG_SERVER},
		"client":        {Role: farsidev1.Role_ROLE_CLIENT},
		"negative life": {Role: farsidev1.Role_ROLE_AGENT, TtlSeconds: -1},
		"long life":     {Role: farsidev1.Role_ROLE_AGENT, TtlSeconds: 1 << 62},
		"long name":     {Role: farsidev1.Role_ROLE_AGENT, Name: strings.Repeat("x", maxName+1)},
		"control":       {Role: farsidev1.Role_ROLE_AGENT, Name: "a\x1bb"},
	} {
		_, err := s.CreateToken(t.Context(), req)
		wantKind(t, name, err, api.KindInvalid)
	}
}

// TestControlJoin joins as a node does, including what it checks by itself.
func TestControlJoin(t *testing.T) {
	t.Parallel()
	s, other := newSite(t), newSite(t)
	token := s.token(transport.RoleMasterTarget, "mt")
	dir := filepath.Join(t.TempDir(), "mt")
	join := func(token, role string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := control.Join(ctx, control.JoinOptions{Token: token, Role: role, DataDir: dir, Names: []string{"mt.example", "10.0.0.9"}})
		return err
	}
	tok, err := transport.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, silent := tok, tok
	elsewhere.ConfigAddrs = []string{other.config.Listen} // another deployment answers there
	silent.ConfigAddrs = []string{"127.0.0.1:1"}
	for _, tc := range []struct {
		name, token, role string
		want              error
	}{
		{"garbage", "hello", "", dr.ErrInvalid},
		{"role by flag", token, transport.RoleAgent, dr.ErrInvalid},
		{"another deployment", elsewhere.Text(), "", dr.ErrDenied},
		{"nobody there", silent.Text(), "", dr.ErrUnavailable},
	} {
		if err := join(tc.token, tc.role); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	both := tok
	both.ConfigAddrs = []string{"127.0.0.1:1", s.config.Listen}
	if err := join(both.Text(), transport.RoleMasterTarget); err != nil {
		t.Fatal(err)
	}
	if err := join(s.token(transport.RoleMasterTarget, ""), ""); !errors.Is(err, dr.ErrExists) {
		t.Errorf("joined twice: %v", err)
	}
	c, err := control.Open(control.Options{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if names := strings.Join(c.Identity().Names(), " "); names != "mt.example 10.0.0.9" {
		t.Errorf("names %q", names)
	}
}

// TestNamesOnlyForTargets: the certificates of other roles name no hosts, whatever they ask for.
func TestNamesOnlyForTargets(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	token := s.token(transport.RoleAgent, "")
	r, err := s.stranger(token).Join(t.Context(), &farsidev1.JoinRequest{
		Token: token, Csr: request(t, "config.example"), Role: farsidev1.Role_ROLE_AGENT,
	})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(r.GetCertificateChain()[0])
	if err != nil || len(cert.DNSNames) != 0 {
		t.Errorf("names %v, %v", cert.DNSNames, err)
	}
}

func TestRenew(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.join(transport.RoleAgent, "a")
	r, err := n.Renew(t.Context(), &farsidev1.RenewRequest{Csr: request(t)})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(r.GetCertificateChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if who, err := transport.PeerOfCertificate(cert); err != nil || who != n.id.Peer() {
		t.Errorf("renewed for %v, %v", who, err)
	}
	_, err = n.Renew(t.Context(), &farsidev1.RenewRequest{Csr: []byte("x")})
	wantKind(t, "garbage", err, api.KindInvalid)
}

func TestIssueClientCertificate(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	r, err := s.IssueClientCertificate(t.Context(), &farsidev1.IssueClientCertificateRequest{Csr: request(t, "evil.example"), TtlSeconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(r.GetCertificateChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	who, err := transport.PeerOfCertificate(cert)
	if err != nil || who.Role != transport.RoleClient || len(cert.DNSNames) != 0 {
		t.Errorf("certificate of %v for %v, %v", who, cert.DNSNames, err)
	}
	if left := time.Until(cert.NotAfter); left > time.Minute || left < 50*time.Second {
		t.Errorf("ends in %v", left)
	}
	_, err = s.IssueClientCertificate(t.Context(), &farsidev1.IssueClientCertificateRequest{Csr: request(t), TtlSeconds: 7 * 24 * 3600})
	wantKind(t, "too long", err, api.KindInvalid)
	_, err = s.IssueClientCertificate(t.Context(), &farsidev1.IssueClientCertificateRequest{})
	wantKind(t, "no request", err, api.KindInvalid)
}

func TestAdminFile(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	name := filepath.Join(s.config.DataDir, adminFile)
	first, err := api.LoadContext(name)
	if err != nil {
		t.Fatal(err)
	}
	old := s.Client
	s.stop()
	s.config.Advertise = []string{s.config.Listen, "127.0.0.1:1"}
	s.start()
	second, err := api.LoadContext(name)
	if err != nil || second.Token != first.Token || second.CA != first.CA || len(second.Servers) != 2 {
		t.Errorf("after a restart: %d servers, %v", len(second.Servers), err)
	}
	s.stop()
	if err := removeFile(name); err != nil {
		t.Fatal(err)
	}
	s.start()
	_, err = old.GetServer(t.Context(), &farsidev1.GetServerRequest{})
	wantKind(t, "token of the lost file", err, api.KindDenied)

	s.stop()
	if err := removeFile(filepath.Join(s.config.DataDir, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	err = Run(t.Context(), s.config, discard())
	if !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("a catalog without its CA: %v", err)
	}
}

func TestRunRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if err := Run(t.Context(), Config{}, discard()); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("empty configuration: %v", err)
	}
	busy := Config{DataDir: t.TempDir(), Listen: s.config.Listen}
	if err := Run(t.Context(), busy, discard()); err == nil {
		t.Error("listened where somebody does")
	}
	s.stop()
	s.edit(func(tx *catalog.Tx) error { return tx.SetSetting(settingNode, "garbage") })
	if err := Run(t.Context(), s.config, discard()); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("broken catalog: %v", err)
	}
}
