package transport_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/transport/transporttest"
)

// echo serves l until it is closed: it answers each connection with its peer's name.
func echo(t *testing.T, l *transport.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p, err := transport.PeerOf(c)
			if err != nil {
				t.Error(err)
			}
			io.WriteString(c, p.String())
			c.Close()
		}
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
}

func listen(t *testing.T, id *transport.Identity, roles ...string) *transport.Listener {
	t.Helper()
	l, err := id.Listen("127.0.0.1:0", roles...)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, l)
	return l
}

// ask dials and returns what the server says; in TLS 1.3 a refusal may come as late as that.
func ask(id *transport.Identity, addr string, want transport.Peer) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := id.DialPeer(ctx, addr, want)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

func TestMutualTLS(t *testing.T) {
	site, foreign := transporttest.NewSite(t, nil), transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	l := listen(t, server, transport.RoleAgent, transport.RoleProcessServer)
	addr := l.Addr().String()
	agent := site.Identity(transport.RoleAgent)

	for _, tc := range []struct {
		name string
		id   *transport.Identity
		want transport.Peer
		err  error
	}{
		{"agent", agent, transport.Peer{Role: transport.RoleProcessServer}, nil},
		{"agent to the named node", agent, server.Peer(), nil},
		{"second role", site.Identity(transport.RoleProcessServer), server.Peer(), nil},
		{"wrong node expected", agent, transport.Peer{Role: transport.RoleProcessServer, Node: dr.NewNodeID()}, dr.ErrDenied},
		{"wrong role expected", agent, transport.Peer{Role: transport.RoleMasterTarget}, dr.ErrDenied},
		{"role not admitted", site.Identity(transport.RoleMasterTarget), server.Peer(), dr.ErrDenied},
		{"client role not admitted", site.Identity(transport.RoleClient), server.Peer(), dr.ErrDenied},
		{"foreign CA", foreign.Identity(transport.RoleAgent), server.Peer(), dr.ErrDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ask(tc.id, addr, tc.want)
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if tc.err == nil && got != tc.id.Peer().String() {
				t.Errorf("server saw %q, want %q", got, tc.id.Peer())
			}
		})
	}
	if l.Refused() == 0 {
		t.Error("no refusal was counted")
	}
	if _, err := ask(agent, "127.0.0.1:1", server.Peer()); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("nobody listens: %v", err)
	}
}

// TestForeignClientTrust: a client that trusts our CA but has a foreign certificate is refused by
// the server, not only by itself.
func TestForeignClientTrust(t *testing.T) {
	site, foreign := transporttest.NewSite(t, nil), transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleMasterTarget)
	addr := listen(t, server).Addr().String()
	spy := foreign.Identity(transport.RoleProcessServer)
	if err := spy.Trust(site.CA.Authorities()); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(spy, addr, server.Peer()); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("foreign certificate: %v", err)
	}
}

func TestExpired(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	site := transporttest.NewSite(t, func() time.Time { return now })
	server := site.Identity(transport.RoleProcessServer)
	addr := listen(t, server).Addr().String()
	short := site.Issue(transport.Peer{Role: transport.RoleClient, Node: dr.NewNodeID()}, time.Hour)
	if _, err := ask(short, addr, server.Peer()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	if _, err := ask(short, addr, server.Peer()); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("expired client: %v", err)
	}
	now = now.Add(91 * 24 * time.Hour)
	fresh := site.Identity(transport.RoleAgent)
	if _, err := ask(fresh, addr, server.Peer()); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("expired server: %v", err)
	}
}

func TestNoCertificateAndOldTLS(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	addr := listen(t, server).Addr().String()
	agent := site.Identity(transport.RoleAgent)
	for _, tc := range []struct {
		name   string
		change func(*tls.Config)
	}{
		{"TLS 1.2", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }},
		{"no certificate", func(c *tls.Config) { c.GetClientCertificate = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := agent.ClientConfig(transport.RoleProcessServer)
			tc.change(config)
			c, err := tls.Dial("tcp", addr, config)
			if err == nil {
				_, err = c.Read(make([]byte, 1))
				c.Close()
			}
			if err == nil || errors.Is(err, io.EOF) {
				t.Errorf("was let in: %v", err)
			}
		})
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if b, err := io.ReadAll(c); strings.Contains(string(b), "farside://") {
		t.Errorf("garbage was answered with %q, %v", b, err)
	}
}

// TestSilentClientHoldsUpNobody: a connection that never begins its handshake.
func TestSilentClientHoldsUpNobody(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	addr := listen(t, server).Addr().String()
	for range 5 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if _, err := ask(site.Identity(transport.RoleAgent), addr, server.Peer()); err != nil {
		t.Error(err)
	}
}

func TestOpenServer(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleConfigServer)
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	go func() {
		for {
			c, err := raw.Accept()
			if err != nil {
				return
			}
			s := tls.Server(c, server.OpenServerConfig(transport.RoleAgent))
			p, err := transport.PeerOf(s)
			if err == nil {
				io.WriteString(s, p.String())
			} else if s.ConnectionState().HandshakeComplete {
				io.WriteString(s, "nobody")
			}
			s.Close()
		}
	}()
	read := func(config *tls.Config) string {
		c, err := tls.Dial("tcp", raw.Addr().String(), config)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		return string(b)
	}
	if got := read(transport.PinnedConfig(site.CA.Fingerprint(), transport.RoleConfigServer, nil)); got != "nobody" {
		t.Errorf("without a certificate: %q", got)
	}
	agent := site.Identity(transport.RoleAgent)
	if got := read(agent.ClientConfig(transport.RoleConfigServer)); got != agent.Peer().String() {
		t.Errorf("with a certificate: %q", got)
	}
	if got := read(site.Identity(transport.RoleClient).ClientConfig(transport.RoleConfigServer)); got != "" {
		t.Errorf("with a certificate of the wrong role: %q", got)
	}
	other := transporttest.NewSite(t, nil)
	if got := read(transport.PinnedConfig(other.CA.Fingerprint(), transport.RoleConfigServer, nil)); !strings.Contains(got, "verify server") {
		t.Errorf("wrong fingerprint: %q", got)
	}
	if got := read(transport.PinnedConfig(site.CA.Fingerprint(), transport.RoleProcessServer, nil)); !strings.Contains(got, "wanted a process-server") {
		t.Errorf("wrong role: %q", got)
	}
}

func TestIdentityFiles(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	site := transporttest.NewSite(t, clock)
	dir := filepath.Join(t.TempDir(), "data")
	if _, err := transport.LoadIdentity(dir, clock); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("no identity yet: %v", err)
	}
	id := site.Identity(transport.RoleAgent)
	if err := id.Save(dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, transport.IdentityFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	again, err := transport.LoadIdentity(dir, clock)
	if err != nil {
		t.Fatal(err)
	}
	if again.Peer() != id.Peer() || !again.Expires().Equal(id.Expires()) || len(again.Authorities()) != 1 {
		t.Errorf("loaded %v until %v", again.Peer(), again.Expires())
	}
	if got, want := again.RenewAt(), now.Add(60*24*time.Hour); !got.Equal(want) {
		t.Errorf("renewal at %v, want %v", got, want)
	}
	if !again.Issued().Equal(now) {
		t.Errorf("issued %v", again.Issued())
	}
	good, err := os.ReadFile(filepath.Join(dir, transport.IdentityFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty":         "",
		"garbage":       "hello",
		"truncated":     string(good[:len(good)/3]),
		"unknown block": strings.ReplaceAll(string(good), "FARSIDE AUTHORITY", "OTHER"),
		"flipped":       strings.Replace(string(good), "MI", "MJ", 1),
	} {
		if err := os.WriteFile(filepath.Join(dir, transport.IdentityFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := transport.LoadIdentity(dir, clock); !errors.Is(err, dr.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCAFiles(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	dir := t.TempDir()
	if _, err := transport.LoadCA(dir, nil); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("no CA yet: %v", err)
	}
	if err := site.CA.Save(dir); err != nil {
		t.Fatal(err)
	}
	ca, err := transport.LoadCA(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Fingerprint() != site.CA.Fingerprint() {
		t.Error("another CA was loaded")
	}
	server, err := ca.Identity(transport.Peer{Role: transport.RoleConfigServer, Node: dr.NewNodeID()}, "127.0.0.1", "far.example")
	if err != nil {
		t.Fatal(err)
	}
	addr := listen(t, server).Addr().String()
	if _, err := ask(site.Identity(transport.RoleAgent), addr, server.Peer()); err != nil {
		t.Errorf("identity of the loaded CA: %v", err)
	}
	if err := server.Save(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, transport.IdentityFile), filepath.Join(dir, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := transport.LoadCA(dir, nil); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("a node's identity as CA: %v", err)
	}
}

func TestReplace(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	server := site.Identity(transport.RoleProcessServer)
	addr := listen(t, server).Addr().String()
	agent := site.Identity(transport.RoleAgent)
	key, csr, err := transport.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := site.CA.Issue(csr, agent.Peer(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Replace(key, chain, site.CA.Authorities()); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(agent, addr, server.Peer()); err != nil {
		t.Errorf("after renewal: %v", err)
	}
	foreign, err := site.CA.Issue(csr, transport.Peer{Role: transport.RoleClient, Node: dr.NewNodeID()}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Replace(key, foreign, site.CA.Authorities()); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("another name: %v", err)
	}
	other, _, err := transport.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Replace(other, chain, site.CA.Authorities()); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("another key: %v", err)
	}
}

func TestIssueRefuses(t *testing.T) {
	site := transporttest.NewSite(t, nil)
	_, csr, err := transport.NewRequest("a.example", "10.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	node, machine := dr.NewNodeID(), dr.NewMachineID()
	broken := append([]byte(nil), csr...)
	broken[len(broken)-1] ^= 1
	for name, issue := range map[string]func() error{
		"garbage": func() error {
			return issueErr(site, []byte("x"), transport.Peer{Role: "client", Node: node}, time.Hour)
		},
		"signature":          func() error { return issueErr(site, broken, transport.Peer{Role: "client", Node: node}, time.Hour) },
		"unknown role":       func() error { return issueErr(site, csr, transport.Peer{Role: "king", Node: node}, time.Hour) },
		"no node":            func() error { return issueErr(site, csr, transport.Peer{Role: "client"}, time.Hour) },
		"agent, no machine":  func() error { return issueErr(site, csr, transport.Peer{Role: "agent", Node: node}, time.Hour) },
		"client and machine": func() error { return issueErr(site, csr, transport.Peer{"client", node, machine}, time.Hour) },
		"no time":            func() error { return issueErr(site, csr, transport.Peer{Role: "client", Node: node}, 0) },
		"huge": func() error {
			return issueErr(site, make([]byte, 1<<20), transport.Peer{Role: "client", Node: node}, 1)
		},
	} {
		if err := issue(); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	names, err := transport.RequestedNames(csr)
	if err != nil || strings.Join(names, " ") != "a.example 10.0.0.1" {
		t.Errorf("requested names %q, %v", names, err)
	}
	if _, err := transport.RequestedNames([]byte("x")); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("names of garbage: %v", err)
	}
}

func issueErr(s *transporttest.Site, csr []byte, who transport.Peer, ttl time.Duration) error {
	_, err := s.CA.Issue(csr, who, ttl)
	return err
}

func TestParsePeer(t *testing.T) {
	node, machine := dr.NewNodeID(), dr.NewMachineID()
	for _, p := range []transport.Peer{
		{Role: transport.RoleAgent, Node: node, Machine: machine},
		{Role: transport.RoleMasterTarget, Node: node},
	} {
		if got, err := transport.ParsePeer(p.String()); err != nil || got != p {
			t.Errorf("%s: %v, %v", p, got, err)
		}
	}
	for _, s := range []string{
		"", "farside://", "http://agent/x", "farside://agent/" + node.String(),
		"farside://master-target/" + node.String() + "/" + machine.String(),
		"farside://king/" + node.String(), "farside://client/" + strings.ToUpper(node.String()),
		"farside://client/" + node.String() + "/", "farside://client/" + strings.ReplaceAll(node.String(), "-", ""),
	} {
		if p, err := transport.ParsePeer(s); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%q: %v, %v", s, p, err)
		}
	}
}

func TestPeerOfStranger(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := transport.PeerOf(a); !errors.Is(err, dr.ErrDenied) {
		t.Error(err)
	}
	if _, err := transport.PeerOfState(nil); !errors.Is(err, dr.ErrDenied) {
		t.Error(err)
	}
}
