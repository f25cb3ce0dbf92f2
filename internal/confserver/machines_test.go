package confserver

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func removeFile(name string) error { return os.Remove(name) }

// TestPointSchedule: a field that a request leaves out stays as it is, and so do the
// other settings; the agent is told.
func TestPointSchedule(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	for _, step := range []struct {
		points           *farsidev1.PointSchedule
		fs, app, longest int64
	}{
		{&farsidev1.PointSchedule{FilesystemEveryMs: new(int64(60_000))}, 60_000, 0, 0},
		{&farsidev1.PointSchedule{ApplicationEveryMs: new(int64(3_600_000)), FreezeLimitMs: new(int64(500))}, 60_000, 3_600_000, 500},
		{nil, 60_000, 3_600_000, 500},
		{&farsidev1.PointSchedule{FilesystemEveryMs: new(int64(0))}, 0, 3_600_000, 500},
	} {
		r, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{Machine: "web", Points: step.points})
		if err != nil {
			t.Fatal(err)
		}
		for who, p := range map[string]*farsidev1.PointSchedule{
			"the machine": r.GetMachine().GetSettings().GetPoints(), "the agent": f.agent.assignment().GetAgent().GetSettings().GetPoints(),
		} {
			if p.GetFilesystemEveryMs() != step.fs || p.GetApplicationEveryMs() != step.app || p.GetFreezeLimitMs() != step.longest {
				t.Errorf("after %v, %s has %v", step.points, who, p)
			}
		}
	}
}

func TestProtect(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.fleet()
	r, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{
		Machine: "web", DiskPaths: []string{"/dev/sda", "/dev/sdb"}, HistoryWindowSeconds: 3600,
		Settings: &farsidev1.AgentSettings{Codec: farsidev1.Codec_CODEC_S2, RingBytes: 1 << 20, CaptureDriver: "tap"},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := r.GetMachine()
	if len(m.GetDisks()) != 2 || m.GetProcessServerId() != f.process.String() || m.GetMasterTargetId() != f.target.String() {
		t.Errorf("machine %v", m)
	}
	a := f.agent.assignment().GetAgent()
	if a.GetMachineId() != f.agent.machine() || a.GetTimeline() != 1 || len(a.GetDisks()) != 2 || a.GetDisks()[0].GetSize() != 1<<30 ||
		a.GetSettings().GetCodec() != farsidev1.Codec_CODEC_S2 || a.GetProcessServer().GetAddresses()[0] != "10.0.0.2:7441" {
		t.Errorf("agent is to do %v", a)
	}
	p := f.process.assignment().GetProcessServer()
	if len(p.GetStreams()) != 1 || p.GetStreams()[0].GetAgentNodeId() != f.agent.String() || p.GetStreams()[0].GetMasterTarget().GetAddresses()[0] != "10.0.0.3:7442" {
		t.Errorf("process server is to do %v", p)
	}
	g := f.target.assignment().GetMasterTarget()
	if len(g.GetMachines()) != 1 || g.GetMachines()[0].GetWriters()[0] != f.process.String() || g.GetMachines()[0].GetHistoryWindowSeconds() != 3600 {
		t.Errorf("master target is to do %v", g)
	}

	// Again changes nothing; a disk that goes and comes back is another disk.
	revision := f.agent.assignment().GetRevision()
	protect := func(req *farsidev1.ProtectMachineRequest) {
		t.Helper()
		req.Machine = f.agent.machine()
		if _, err := s.ProtectMachine(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	protect(&farsidev1.ProtectMachineRequest{DiskPaths: []string{"/dev/sda"}})
	if got := f.agent.assignment().GetRevision(); got != revision {
		t.Errorf("revision %d after nothing changed, was %d", got, revision)
	}
	protect(&farsidev1.ProtectMachineRequest{RemoveDiskPaths: []string{"/dev/sda"}})
	protect(&farsidev1.ProtectMachineRequest{DiskPaths: []string{"/dev/sda"}})
	after := f.agent.assignment()
	if d := after.GetAgent().GetDisks(); len(d) != 2 || d[0].GetId() != 2 || d[1].GetId() != 3 {
		t.Errorf("disks %v", d)
	}
	if after.GetRevision() <= revision {
		t.Errorf("revision %d, was %d", after.GetRevision(), revision)
	}
}

func TestProtectRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	agent := s.join(transport.RoleAgent, "web")
	protect := func(change func(*farsidev1.ProtectMachineRequest)) error {
		r := &farsidev1.ProtectMachineRequest{Machine: "web", DiskPaths: []string{"/dev/sda"}}
		change(r)
		_, err := s.ProtectMachine(t.Context(), r)
		return err
	}
	none := func(*farsidev1.ProtectMachineRequest) {}
	wantKind(t, "no process server", protect(none), api.KindUnavailable)
	process := s.join(transport.RoleProcessServer, "ps")
	wantKind(t, "no master target", protect(none), api.KindUnavailable)
	target := s.join(transport.RoleMasterTarget, "mt")
	wantKind(t, "agent not heard of", protect(none), api.KindUnavailable)
	agent.report(agentWork(&farsidev1.AgentReport{Discovered: disks()}))
	s.join(transport.RoleAgent, "twin")
	s.join(transport.RoleAgent, "twin")

	for _, tc := range []struct {
		name   string
		change func(*farsidev1.ProtectMachineRequest)
		kind   string
	}{
		{"unknown disk", func(r *farsidev1.ProtectMachineRequest) { r.DiskPaths = []string{"/dev/sdz"} }, api.KindNotFound},
		{"unfit disk", func(r *farsidev1.ProtectMachineRequest) { r.DiskPaths = []string{"/dev/sr0"} }, api.KindInvalid},
		{"odd size", func(r *farsidev1.ProtectMachineRequest) { r.DiskPaths = []string{"/dev/odd"} }, api.KindInvalid},
		{"no disk", func(r *farsidev1.ProtectMachineRequest) { r.DiskPaths = nil }, api.KindInvalid},
		{"disk to remove", func(r *farsidev1.ProtectMachineRequest) { r.RemoveDiskPaths = []string{"/dev/sda"} }, api.KindNotFound},
		{"unknown machine", func(r *farsidev1.ProtectMachineRequest) { r.Machine = "nix" }, api.KindNotFound},
		{"unknown machine id", func(r *farsidev1.ProtectMachineRequest) { r.Machine = dr.NewMachineID().String() }, api.KindNotFound},
		{"no machine", func(r *farsidev1.ProtectMachineRequest) { r.Machine = "" }, api.KindInvalid},
		{"two of that name", func(r *farsidev1.ProtectMachineRequest) { r.Machine = "twin" }, api.KindInvalid},
		{"unknown process server", func(r *farsidev1.ProtectMachineRequest) { r.ProcessServer = "nix" }, api.KindNotFound},
		{"master target as process server", func(r *farsidev1.ProtectMachineRequest) { r.ProcessServer = target.String() }, api.KindInvalid},
		{"negative window", func(r *farsidev1.ProtectMachineRequest) { r.HistoryWindowSeconds = -1 }, api.KindInvalid},
		{"endless window", func(r *farsidev1.ProtectMachineRequest) { r.HistoryWindowSeconds = 1 << 60 }, api.KindInvalid},
		{"codec", func(r *farsidev1.ProtectMachineRequest) { r.Settings = &farsidev1.AgentSettings{Codec: 77} }, api.KindInvalid},
		{"points every second", func(r *farsidev1.ProtectMachineRequest) {
			r.Points = &farsidev1.PointSchedule{FilesystemEveryMs: new(int64(1000))}
		}, api.KindInvalid},
		{"points in the past", func(r *farsidev1.ProtectMachineRequest) {
			r.Points = &farsidev1.PointSchedule{ApplicationEveryMs: new(int64(-1))}
		}, api.KindInvalid},
		{"endless freeze", func(r *farsidev1.ProtectMachineRequest) {
			r.Points = &farsidev1.PointSchedule{FreezeLimitMs: new(int64(3_600_000))}
		}, api.KindInvalid},
		{"ring", func(r *farsidev1.ProtectMachineRequest) { r.Settings = &farsidev1.AgentSettings{RingBytes: -1} }, api.KindInvalid},
	} {
		wantKind(t, tc.name, protect(tc.change), tc.kind)
	}
	if d := agent.assignment().GetAgent().GetDisks(); len(d) != 0 {
		t.Errorf("a refused request left %v", d)
	}
	if len(process.assignment().GetProcessServer().GetStreams()) != 0 {
		t.Error("a refused request left a stream")
	}
	if err := protect(none); err != nil {
		t.Fatal(err)
	}
	s.join(transport.RoleMasterTarget, "second")
	wantKind(t, "moving the history", protect(func(r *farsidev1.ProtectMachineRequest) { r.MasterTarget = "second" }), api.KindUnsupported)
}

func TestPlacement(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	busy, idle := s.join(transport.RoleProcessServer, "busy"), s.join(transport.RoleProcessServer, "idle")
	dead := s.join(transport.RoleProcessServer, "dead")
	target := s.join(transport.RoleMasterTarget, "mt")
	for _, n := range []*testNode{busy, idle} {
		n.report(processWork())
	}
	target.report(targetWork(&farsidev1.MasterTargetReport{}))
	protect := func(name, server string) string {
		t.Helper()
		s.join(transport.RoleAgent, name).report(agentWork(&farsidev1.AgentReport{Discovered: disks()}))
		r, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{Machine: name, DiskPaths: []string{"/dev/sda"}, ProcessServer: server})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetMachine().GetProcessServerId()
	}
	if got := protect("a", "busy"); got != busy.String() {
		t.Errorf("asked for busy, got %s", got)
	}
	if got := protect("b", ""); got != idle.String() {
		t.Errorf("placed at %s, want %s (busy %s, dead %s)", got, idle, busy, dead)
	}
	if got := protect("c", dead.String()); got != dead.String() {
		t.Errorf("asked for dead, got %s", got)
	}
}

func TestUnprotect(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	r, err := s.UnprotectMachine(t.Context(), &farsidev1.UnprotectMachineRequest{Machine: "web"})
	if err != nil || r.GetMachine().GetState() != farsidev1.MachineState_MACHINE_STATE_UNPROTECTED {
		t.Errorf("%v, %v", r, err)
	}
	if len(f.agent.assignment().GetAgent().GetDisks()) != 0 || len(f.process.assignment().GetProcessServer().GetStreams()) != 0 {
		t.Error("replication goes on")
	}
	if m := f.target.assignment().GetMasterTarget().GetMachines(); len(m) != 1 || !m[0].GetRetired() || len(m[0].GetWriters()) != 0 {
		t.Errorf("master target is to do %v", m)
	}
	_, err = s.UnprotectMachine(t.Context(), &farsidev1.UnprotectMachineRequest{Machine: "nix"})
	wantKind(t, "unknown", err, api.KindNotFound)
}

// TestRestart: everything is as before when the server comes back on the same data.
func TestRestart(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	before := []*farsidev1.Assignment{f.agent.assignment(), f.process.assignment(), f.target.assignment()}
	nodes, err := s.ListNodes(t.Context(), &farsidev1.ListNodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	for i, n := range []*testNode{f.agent, f.process, f.target} {
		if got := n.assignment(); !proto.Equal(got, before[i]) {
			t.Errorf("assignment was\n%v, is\n%v", before[i], got)
		}
	}
	again, err := s.ListNodes(t.Context(), &farsidev1.ListNodesRequest{})
	if err != nil || !proto.Equal(nodes, again) {
		t.Errorf("nodes were\n%v, are\n%v, %v", nodes, again, err)
	}
	if len(nodes.GetNodes()) != 3 || nodes.GetNodes()[0].GetAddresses()[0] != "10.0.0.3:7442" {
		t.Errorf("nodes %v", nodes)
	}
}

func TestHostileNames(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, name := range []string{strings.Repeat("ß", 300), "日本語サーバー", "<script>alert(1)</script>", "'; DROP TABLE nodes; --", "\u202egnp.exe", "a/b\\c%00?#"} {
		agent := s.join(transport.RoleAgent, name)
		r, err := s.GetMachine(t.Context(), &farsidev1.GetMachineRequest{Machine: name})
		if err != nil || r.GetMachine().GetName() != name || r.GetMachine().GetId() != agent.machine() {
			t.Errorf("%q: %v, %v", name, r, err)
		}
		agent.report(agentWork(&farsidev1.AgentReport{Discovered: []*farsidev1.DiscoveredDisk{{Path: name, Size: 512, Protectable: true}}}))
	}
	seen := 0
	for token := ""; ; {
		r, err := s.ListMachines(t.Context(), &farsidev1.ListMachinesRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		seen += len(r.GetMachines())
		if token = r.GetNextPageToken(); token == "" {
			break
		}
	}
	if seen != 6 {
		t.Errorf("pages showed %d machines", seen)
	}
	_, err := s.ListMachines(t.Context(), &farsidev1.ListMachinesRequest{PageToken: "?"})
	wantKind(t, "page token", err, api.KindInvalid)
	_, err = s.ListNodes(t.Context(), &farsidev1.ListNodesRequest{PageSize: -1})
	wantKind(t, "page size", err, api.KindInvalid)
}

func TestWatchWakesUp(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.fleet()
	revision := f.agent.assignment().GetRevision()
	start := time.Now()
	r, err := f.agent.Watch(t.Context(), &farsidev1.WatchRequest{Revision: revision, WaitMs: 50})
	if err != nil || r.GetAssignment() != nil || time.Since(start) < 50*time.Millisecond {
		t.Errorf("nothing changed: %v, %v after %v", r, err, time.Since(start))
	}
	got := make(chan *farsidev1.Assignment, 1)
	go func() {
		r, err := f.agent.Watch(t.Context(), &farsidev1.WatchRequest{Revision: revision})
		if err != nil {
			t.Error(err)
		}
		got <- r.GetAssignment()
	}()
	time.Sleep(50 * time.Millisecond)
	if _, err := s.ProtectMachine(t.Context(), &farsidev1.ProtectMachineRequest{Machine: "web", DiskPaths: []string{"/dev/sda"}}); err != nil {
		t.Fatal(err)
	}
	select {
	case a := <-got:
		if len(a.GetAgent().GetDisks()) != 1 || a.GetRevision() <= revision {
			t.Errorf("woken with %v", a)
		}
	case <-time.After(5 * time.Second):
		t.Error("was not woken")
	}
	// A new address of the process server reaches its agents.
	next := f.agent.assignment().GetRevision()
	w := processWork()
	w.Addresses = []string{"10.9.9.9:1"}
	f.process.report(w)
	if a := f.agent.assignment(); a.GetRevision() == next || a.GetAgent().GetProcessServer().GetAddresses()[0] != "10.9.9.9:1" {
		t.Errorf("address did not arrive: %v", a)
	}
	_, err = f.agent.Watch(t.Context(), &farsidev1.WatchRequest{WaitMs: -1})
	wantKind(t, "negative wait", err, api.KindInvalid)
}

// TestStopEndsLongPolls: the server does not wait for those who wait.
func TestStopEndsLongPolls(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	n := s.join(transport.RoleProcessServer, "p")
	revision := n.assignment().GetRevision()
	ended := make(chan error, 1)
	go func() {
		_, err := n.Watch(context.Background(), &farsidev1.WatchRequest{Revision: revision})
		ended <- err
	}()
	time.Sleep(50 * time.Millisecond)
	start := time.Now()
	s.stop()
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("stopping took %v", d)
	}
	wantKind(t, "watch", <-ended, api.KindUnavailable)
}

// TestDiskGrows: a disk that its agent reports to be larger is larger for agent and master
// target; nothing else changes what is protected.
func TestDiskGrows(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	f := s.protected()
	disk := f.agent.assignment().GetAgent().GetDisks()[0]
	say := func(d *farsidev1.DiscoveredDisk, more ...*farsidev1.DiscoveredDisk) {
		t.Helper()
		d.Path, d.Kind = disk.GetPath(), "disk"
		f.agent.report(&farsidev1.Report{Work: &farsidev1.Report_Agent{Agent: &farsidev1.AgentReport{Discovered: append(more, d)}}})
	}
	size := disk.GetSize()
	for name, step := range map[string]*farsidev1.DiscoveredDisk{
		"shrunk": {Size: size - 512, Protectable: true}, "refused": {Size: size * 2}, "odd": {Size: size + 1, Protectable: true},
		"huge": {Size: 1 << 60, Protectable: true},
	} {
		say(step)
		if got := f.agent.assignment().GetAgent().GetDisks()[0].GetSize(); got != size {
			t.Errorf("%s: %d bytes", name, got)
		}
	}
	say(&farsidev1.DiscoveredDisk{Size: size + 4096, Protectable: true})
	if got := f.agent.assignment().GetAgent().GetDisks()[0].GetSize(); got != size+4096 {
		t.Errorf("agent is told of %d bytes", got)
	}
	if got := f.target.assignment().GetMasterTarget().GetMachines()[0].GetDisks()[0].GetSize(); got != size+4096 {
		t.Errorf("master target is told of %d bytes", got)
	}
}

func TestSizeNow(t *testing.T) {
	x := func(path, identity string, size int64) *farsidev1.DiscoveredDisk {
		return &farsidev1.DiscoveredDisk{Path: path, Identity: identity, Size: size, Protectable: true}
	}
	d := catalog.Disk{Path: "/dev/sda", Identity: "wwid:1", Size: 512}
	for name, c := range map[string]struct {
		seen []*farsidev1.DiscoveredDisk
		want int64
	}{
		"the same":             {[]*farsidev1.DiscoveredDisk{x("/dev/sda", "wwid:1", 1024)}, 1024},
		"at another path":      {[]*farsidev1.DiscoveredDisk{x("/dev/sda", "wwid:2", 4096), x("/dev/sdb", "wwid:1", 1024)}, 1024},
		"another at that path": {[]*farsidev1.DiscoveredDisk{x("/dev/sda", "wwid:2", 1024)}, 0},
		"twins":                {[]*farsidev1.DiscoveredDisk{x("/dev/sda", "wwid:1", 1024), x("/dev/sdb", "wwid:1", 2048)}, 0},
		"nothing":              {nil, 0},
	} {
		if got := sizeNow(d, c.seen); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}
