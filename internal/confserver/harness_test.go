package confserver

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
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

// testClock is a clock that tests move.
type testClock struct {
	mu struct {
		sync.Mutex
		ahead time.Duration
	}
}

func (c *testClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.mu.ahead)
}

func (c *testClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.ahead += d
}

// site is a configuration server under test, with an administrator's client.
type site struct {
	*api.Client
	t      *testing.T
	config Config
	clock  *testClock
	stop   func()
	conns  []*http.Transport // of nodes; the server waits a second for those that are open
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, clock: &testClock{}}
	s.config = Config{DataDir: filepath.Join(t.TempDir(), "config"), Listen: freePort(t), ReportEvery: 100 * time.Millisecond}
	s.start()
	return s
}

// start runs the server and waits until it answers.
func (s *site) start() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, s.config, slog.New(slog.DiscardHandler), s.clock.now) }()
	s.stop = sync.OnceFunc(func() {
		if s.Client != nil {
			s.Client.Close()
		}
		for _, c := range s.conns {
			c.CloseIdleConnections()
		}
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("server ended with %v", err)
		}
	})
	s.t.Cleanup(s.stop)
	deadline := time.Now().Add(10 * time.Second)
	for {
		c, err := api.LoadContext(filepath.Join(s.config.DataDir, adminFile))
		if err == nil {
			if s.Client, err = api.NewClient(c); err == nil {
				_, err = s.GetServer(s.t.Context(), &farsidev1.GetServerRequest{})
			}
		}
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server does not come up: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// edit changes the catalog behind the back of the server, which must be stopped.
func (s *site) edit(fn func(*catalog.Tx) error) {
	s.t.Helper()
	c, err := catalog.Open(s.t.Context(), filepath.Join(s.config.DataDir, catalogFile))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := errors.Join(c.Write(s.t.Context(), fn), c.Close()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) token(role, name string) string {
	s.t.Helper()
	r, err := s.CreateToken(s.t.Context(), &farsidev1.CreateTokenRequest{Role: roleNumber(role), Name: name})
	if err != nil {
		s.t.Fatal(err)
	}
	return r.GetToken()
}

// testNode is a node that does what the test says.
type testNode struct {
	farsidev1connect.NodeServiceClient
	t       *testing.T
	id      *transport.Identity
	dir     string
	started int64
}

func (s *site) join(role, name string) *testNode {
	s.t.Helper()
	n := &testNode{t: s.t, dir: filepath.Join(s.t.TempDir(), "node"), started: 1}
	_, err := control.Join(s.t.Context(), control.JoinOptions{Token: s.token(role, name), Role: role, DataDir: n.dir, Now: s.clock.now})
	if err != nil {
		s.t.Fatal(err)
	}
	if n.id, err = transport.LoadIdentity(n.dir, s.clock.now); err != nil {
		s.t.Fatal(err)
	}
	n.NodeServiceClient = s.nodeClient(n.id.ClientConfig(transport.RoleConfigServer))
	return n
}

func (s *site) nodeClient(config *tls.Config) farsidev1connect.NodeServiceClient {
	tr := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	s.conns = append(s.conns, tr)
	return farsidev1connect.NewNodeServiceClient(&http.Client{Transport: tr}, "https://"+s.config.Listen)
}

func (n *testNode) String() string { return n.id.Peer().Node.String() }

// machine returns the id of an agent's machine.
func (n *testNode) machine() string { return n.id.Peer().Machine.String() }

// assignment returns the node's assignment now.
func (n *testNode) assignment() *farsidev1.Assignment {
	n.t.Helper()
	r, err := n.Watch(n.t.Context(), &farsidev1.WatchRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	return r.GetAssignment()
}

// report sends a report by the newest assignment.
func (n *testNode) report(r *farsidev1.Report) {
	n.t.Helper()
	if r.AssignmentRevision == 0 {
		r.AssignmentRevision = n.assignment().GetRevision()
	}
	if r.ClockNs == 0 {
		r.ClockNs = time.Now().UnixNano()
	}
	r.StartedNs = n.started
	if _, err := n.Report(n.t.Context(), &farsidev1.ReportRequest{Report: r}); err != nil {
		n.t.Fatal(err)
	}
}

func agentWork(r *farsidev1.AgentReport) *farsidev1.Report {
	return &farsidev1.Report{Work: &farsidev1.Report_Agent{Agent: r}}
}

func targetWork(r *farsidev1.MasterTargetReport) *farsidev1.Report {
	return &farsidev1.Report{Addresses: []string{"10.0.0.3:7442"}, Work: &farsidev1.Report_MasterTarget{MasterTarget: r}}
}

func processWork() *farsidev1.Report {
	return &farsidev1.Report{
		Addresses: []string{"10.0.0.2:7441"},
		Work:      &farsidev1.Report_ProcessServer{ProcessServer: &farsidev1.ProcessServerReport{}},
	}
}

// disks is what a test's agent discovers.
func disks() []*farsidev1.DiscoveredDisk {
	return []*farsidev1.DiscoveredDisk{
		{Path: "/dev/sda", Size: 1 << 30, Kind: "disk", Protectable: true},
		{Path: "/dev/sdb", Size: 1 << 20, Kind: "disk", Protectable: true},
		{Path: "/dev/sr0", Size: 1 << 20, Kind: "rom", Reason: "read-only"},
		{Path: "/dev/odd", Size: 1000, Kind: "disk", Protectable: true},
	}
}

// fleet is one node of each role that has reported.
type fleet struct{ agent, process, target *testNode }

func (s *site) fleet() fleet {
	s.t.Helper()
	f := fleet{s.join(transport.RoleAgent, "web"), s.join(transport.RoleProcessServer, "ps"), s.join(transport.RoleMasterTarget, "mt")}
	f.agent.report(agentWork(&farsidev1.AgentReport{Discovered: disks()}))
	f.process.report(processWork())
	f.target.report(targetWork(&farsidev1.MasterTargetReport{}))
	return f
}

// protected is a fleet whose machine is protected.
func (s *site) protected() fleet {
	s.t.Helper()
	f := s.fleet()
	_, err := s.ProtectMachine(s.t.Context(), &farsidev1.ProtectMachineRequest{Machine: "web", DiskPaths: []string{"/dev/sda"}})
	if err != nil {
		s.t.Fatal(err)
	}
	return f
}

// wantKind checks that an error of a call is of a kind.
func wantKind(t *testing.T, what string, err error, kind string) {
	t.Helper()
	if err == nil || api.ErrorKind(err) != kind {
		t.Errorf("%s: error %v of kind %q, want kind %q", what, err, api.ErrorKind(err), kind)
	}
	if err != nil && strings.TrimSpace(api.ErrorText(err)) == "" {
		t.Errorf("%s: an error without text", what)
	}
}

func newUUIDs(n int) []string {
	var ids []string
	for range n {
		ids = append(ids, dr.NewNodeID().String())
	}
	return ids
}
