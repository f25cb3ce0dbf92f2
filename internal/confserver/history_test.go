package confserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"farside/internal/catalog"
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/transport"

	farsidev1 "farside/internal/api/farside/v1"
)

// bare is a server without network, whose calls are made directly.
type bare struct {
	*server
	t testing.TB
}

func newBare(t testing.TB) bare {
	t.Helper()
	dir := t.TempDir()
	cat, err := catalog.Open(context.Background(), filepath.Join(dir, catalogFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cat.Close() })
	s, err := newServer(context.Background(), Config{DataDir: dir, ReportEvery: time.Second}, "127.0.0.1:1", cat, discard(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return bare{s, t}
}

// addNode adds a member and returns the context of its calls.
func (b bare) addNode(role, name string) (catalog.Node, context.Context) {
	b.t.Helper()
	n := catalog.Node{ID: dr.NewNodeID(), Role: role, Name: name}
	if role == transport.RoleAgent {
		n.Machine = dr.NewMachineID()
	}
	err := b.catalog.Write(context.Background(), func(tx *catalog.Tx) error { return errors.Join(tx.AddNode(n), addMachineOf(tx, n)) })
	if err != nil {
		b.t.Fatal(err)
	}
	return n, context.WithValue(context.Background(), callerKey{}, caller{node: n})
}

// history is a random history of calls with what must hold in it.
type history struct {
	bare
	rnd      *rand.Rand
	people   farsideService
	nodes    []catalog.Node
	contexts map[dr.NodeID]context.Context
	digests  map[dr.NodeID][]byte
	revision map[dr.NodeID]uint64
	disks    map[string]string // machine/id to path
	branches map[string]string // machine/timeline to view
	clock    int64
}

func newHistory(t *testing.T, seed int64) *history {
	h := &history{
		bare: newBare(t), rnd: rand.New(rand.NewSource(seed)), contexts: map[dr.NodeID]context.Context{}, digests: map[dr.NodeID][]byte{},
		revision: map[dr.NodeID]uint64{}, disks: map[string]string{}, branches: map[string]string{},
	}
	h.people = farsideService{h.server}
	for i, role := range []string{
		transport.RoleAgent, transport.RoleAgent, transport.RoleProcessServer, transport.RoleProcessServer, transport.RoleMasterTarget,
	} {
		n, ctx := h.addNode(role, fmt.Sprint("n", i))
		h.nodes = append(h.nodes, n)
		h.contexts[n.ID] = ctx
	}
	return h
}

func (h *history) any(role string) catalog.Node {
	for {
		if n := h.nodes[h.rnd.Intn(len(h.nodes))]; n.Role == role {
			return n
		}
	}
}

// step makes one random call. It may be refused: that must not harm.
func (h *history) step() string {
	ctx, machine := context.Background(), h.any(transport.RoleAgent).Machine.String()
	path := fmt.Sprint("/dev/", h.rnd.Intn(4))
	var what string
	var err error
	switch h.rnd.Intn(9) {
	case 0, 1:
		what = "protect"
		_, err = h.people.ProtectMachine(ctx, &farsidev1.ProtectMachineRequest{Machine: machine, DiskPaths: []string{path}, HistoryWindowSeconds: int64(h.rnd.Intn(3))})
	case 2:
		what = "remove disk"
		_, err = h.people.ProtectMachine(ctx, &farsidev1.ProtectMachineRequest{Machine: machine, RemoveDiskPaths: []string{path}})
	case 3:
		what = "unprotect"
		_, err = h.people.UnprotectMachine(ctx, &farsidev1.UnprotectMachineRequest{Machine: machine})
	case 4:
		what = "open"
		_, err = h.people.OpenView(ctx, &farsidev1.OpenViewRequest{Machine: machine, Writable: h.rnd.Intn(2) == 0})
	case 5:
		what = "close"
		var views *farsidev1.ListViewsResponse
		if views, err = h.people.ListViews(ctx, &farsidev1.ListViewsRequest{}); err == nil && len(views.GetViews()) > 0 {
			_, err = h.people.CloseView(ctx, &farsidev1.CloseViewRequest{View: views.GetViews()[h.rnd.Intn(len(views.GetViews()))].GetId()})
		}
	case 6:
		what = "tag"
		_, err = h.people.TagPoint(ctx, &farsidev1.TagPointRequest{Machine: machine, Name: "t", TimeoutMs: 1})
	default:
		n := h.nodes[h.rnd.Intn(len(h.nodes))]
		what = "report of " + n.Role
		err = h.report(n)
	}
	if err != nil {
		what += " (" + err.Error() + ")"
	}
	return what
}

// report sends a report that a node could send.
func (h *history) report(n catalog.Node) error {
	a, err := h.assignment(h.contexts[n.ID], n.ID)
	if err != nil {
		return err
	}
	h.clock++
	r := &farsidev1.Report{AssignmentRevision: a.GetRevision(), ClockNs: h.clock, Addresses: []string{fmt.Sprintf("a:%d", h.rnd.Intn(2))}}
	switch n.Role {
	case transport.RoleAgent:
		w := &farsidev1.AgentReport{}
		for i := range 4 {
			w.Discovered = append(w.Discovered, &farsidev1.DiscoveredDisk{Path: fmt.Sprint("/dev/", i), Size: 512, Protectable: true})
		}
		r.Work = &farsidev1.Report_Agent{Agent: w}
	case transport.RoleMasterTarget:
		w := &farsidev1.MasterTargetReport{}
		for _, v := range a.GetMasterTarget().GetViews() {
			w.Views = append(w.Views, &farsidev1.ViewStatus{
				ViewId: v.GetViewId(), State: farsidev1.ViewState_VIEW_STATE_OPEN, Position: &farsidev1.Position{Timeline: 1, Seq: uint64(h.rnd.Intn(9))},
			})
		}
		r.Work = &farsidev1.Report_MasterTarget{MasterTarget: w}
	}
	_, err = nodeService{h.server}.Report(h.contexts[n.ID], &farsidev1.ReportRequest{Report: r})
	return err
}

// check checks what must hold after every call.
func (h *history) check(what string) {
	h.t.Helper()
	for _, n := range h.nodes {
		a, err := h.assignment(context.Background(), n.ID)
		if err != nil {
			h.t.Fatalf("after %s: %v", what, err)
		}
		revision := a.GetRevision()
		a.Revision = 0
		digest, err := digestOf(a)
		if err != nil {
			h.t.Fatal(err)
		}
		same, last := bytes.Equal(digest, h.digests[n.ID]), h.revision[n.ID]
		if same && revision != last || !same && revision <= last {
			h.t.Fatalf("after %s: revision of %s is %d, was %d; same content: %v", what, n.Role, revision, last, same)
		}
		h.digests[n.ID], h.revision[n.ID] = digest, revision
		for _, d := range a.GetAgent().GetDisks() {
			h.unique(what, h.disks, fmt.Sprint(n.Machine, "/", d.GetId()), d.GetPath())
		}
		for _, v := range a.GetMasterTarget().GetViews() {
			if v.GetWritable() {
				h.unique(what, h.branches, fmt.Sprint(v.GetMachineId(), "/", v.GetBranchTimeline()), v.GetViewId())
			}
			if v.GetWritable() == (v.GetBranchTimeline() <= 1) {
				h.t.Fatalf("after %s: view %v", what, v)
			}
		}
	}
}

// unique checks that a key always means the same.
func (h *history) unique(what string, known map[string]string, key, value string) {
	h.t.Helper()
	if old, ok := known[key]; ok && old != value {
		h.t.Fatalf("after %s: %s means %s, meant %s", what, key, value, old)
	}
	known[key] = value
}

// TestHistories: in random histories, a revision changes exactly when the content
// does, and upwards; no disk id and no timeline ever means two things.
func TestHistories(t *testing.T) {
	for seed := range int64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			h := newHistory(t, seed)
			for range 150 {
				h.check(h.step())
			}
			if len(h.disks) == 0 || len(h.branches) == 0 {
				t.Errorf("history made %d disks, %d branches: it shows nothing", len(h.disks), len(h.branches))
			}
		})
	}
}

// TestManyNodesMissNothing: however changes, calls and failures interleave, each
// node ends with the newest assignment.
func TestManyNodesMissNothing(t *testing.T) {
	t.Parallel()
	const agents = 12
	s := newSite(t)
	s.join(transport.RoleProcessServer, "ps").report(processWork())
	s.join(transport.RoleMasterTarget, "mt").report(targetWork(&farsidev1.MasterTargetReport{}))
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer wg.Wait()
	defer cancel()
	var mu sync.Mutex
	windows := make(map[int]int) // of the newest assignment: how many disks
	for i := range agents {
		n := s.join(transport.RoleAgent, fmt.Sprint("m", i))
		c, err := control.Open(control.Options{DataDir: n.dir})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		wg.Add(2)
		go func() {
			defer wg.Done()
			c.Watch(ctx, func(a *farsidev1.Assignment) {
				mu.Lock()
				defer mu.Unlock()
				windows[i] = len(a.GetAgent().GetDisks())
			})
		}()
		go func() {
			defer wg.Done()
			c.Report(ctx, func() *farsidev1.Report { return agentWork(&farsidev1.AgentReport{Discovered: disks()}) }, time.Second)
		}()
	}
	change := func(i int, req *farsidev1.ProtectMachineRequest) {
		req.Machine = fmt.Sprint("m", i)
		eventually(t, "protecting", func() bool {
			_, err := s.ProtectMachine(t.Context(), req)
			return err == nil
		})
	}
	for i := range agents {
		change(i, &farsidev1.ProtectMachineRequest{DiskPaths: []string{"/dev/sda"}})
	}
	s.Client.Close()
	s.stop()
	s.start()
	for i := range agents {
		change(i, &farsidev1.ProtectMachineRequest{DiskPaths: []string{"/dev/sdb"}})
	}
	eventually(t, "the newest assignment everywhere", func() bool {
		mu.Lock()
		defer mu.Unlock()
		for i := range agents {
			if windows[i] != 2 {
				return false
			}
		}
		return true
	})
}

func BenchmarkReport(b *testing.B) {
	s := newBare(b)
	_, ctx := s.addNode(transport.RoleAgent, "a")
	r := agentWork(&farsidev1.AgentReport{Discovered: disks()})
	for b.Loop() {
		r.ClockNs++
		if _, err := (nodeService{s.server}).Report(ctx, &farsidev1.ReportRequest{Report: r}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAssignment(b *testing.B) {
	s := newBare(b)
	n, _ := s.addNode(transport.RoleAgent, "a")
	for b.Loop() {
		if _, err := s.assignment(context.Background(), n.ID); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkList2000Machines(b *testing.B) {
	s := newBare(b)
	for i := range 2000 {
		s.addNode(transport.RoleAgent, fmt.Sprint("m", i))
	}
	for b.Loop() {
		r, err := farsideService{s.server}.ListMachines(context.Background(), &farsidev1.ListMachinesRequest{PageSize: 2000})
		if err != nil || len(r.GetMachines()) != 2000 {
			b.Fatal(len(r.GetMachines()), err)
		}
	}
}
