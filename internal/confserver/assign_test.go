package confserver

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

func TestAssign(t *testing.T) {
	agent, process, target, other := dr.NodeID{1}, dr.NodeID{2}, dr.NodeID{3}, dr.NodeID{4}
	machine := machineRows{
		Machine: catalog.Machine{
			ID: dr.MachineID{9}, Name: "wéb", Node: agent, Protected: true, Retired: true, Timeline: 2, ProcessServer: process, MasterTarget: target,
			HistoryWindow: 60, Codec: "zstd", RingBytes: 1, MemoryBytes: 2, CaptureDriver: "tap",
		},
		disks: []catalog.Disk{{ID: 3, Path: "/dev/sda", Size: 512}},
		tags:  []catalog.Tag{{ID: "t", Name: "n", Consistency: dr.FileSystem, Deadline: 7, Group: "g"}},
	}
	with := func(change func(*machineRows)) machineRows {
		m := machine
		change(&m)
		return m
	}
	ended := with(func(m *machineRows) { m.Protected, m.disks, m.tags = false, nil, nil })
	view := catalog.View{
		ID: "v", Machine: machine.ID, MasterTarget: target, Name: "drill", Writable: true, Branch: 5, Disks: []dr.DiskID{3},
		Selector: catalog.Selector{Kind: catalog.SelectTag, Tag: "n"}, Resolved: true, Position: dr.Position{Timeline: 2, Seq: 8},
	}
	closing := view
	closing.Closing = true
	elsewhere := view
	elsewhere.MasterTarget = other

	addresses := map[dr.NodeID][]string{process: {"p:1"}, target: {"t:1", "t:2"}}
	settings := &farsidev1.AgentSettings{Codec: farsidev1.Codec_CODEC_ZSTD, RingBytes: 1, MemoryBytes: 2, CaptureDriver: "tap"}
	disk := []*farsidev1.Disk{{Id: 3, Path: "/dev/sda", Size: 512}}
	agentOf := func(a *farsidev1.AgentAssignment) *farsidev1.Assignment {
		return &farsidev1.Assignment{Role: farsidev1.Role_ROLE_AGENT, Work: &farsidev1.Assignment_Agent{Agent: a}}
	}
	processOf := func(s ...*farsidev1.Stream) *farsidev1.Assignment {
		return &farsidev1.Assignment{Role: farsidev1.Role_ROLE_PROCESS_SERVER, Work: &farsidev1.Assignment_ProcessServer{
			ProcessServer: &farsidev1.ProcessServerAssignment{Streams: s, Limits: &farsidev1.SpoolLimits{}},
		}}
	}
	targetOf := func(m []*farsidev1.TargetMachine, v ...*farsidev1.ViewAssignment) *farsidev1.Assignment {
		return &farsidev1.Assignment{Role: farsidev1.Role_ROLE_MASTER_TARGET, Work: &farsidev1.Assignment_MasterTarget{
			MasterTarget: &farsidev1.MasterTargetAssignment{Machines: m, Views: v},
		}}
	}
	targetMachine := &farsidev1.TargetMachine{
		MachineId: machine.ID.String(), MachineName: "wéb", Timeline: 2, Disks: disk, Writers: []string{process.String()}, HistoryWindowSeconds: 60,
	}
	stream := &farsidev1.Stream{
		MachineId: machine.ID.String(), MachineName: "wéb", AgentNodeId: agent.String(), Timeline: 2, Codec: farsidev1.Codec_CODEC_ZSTD,
		MasterTarget: &farsidev1.Peer{NodeId: target.String(), Addresses: []string{"t:1", "t:2"}},
	}

	for _, tc := range []struct {
		name     string
		node     catalog.Node
		machines []machineRows
		views    []catalog.View
		want     *farsidev1.Assignment
	}{
		{
			"agent",
			catalog.Node{ID: agent, Role: transport.RoleAgent, Machine: machine.ID},
			[]machineRows{machine},
			nil, agentOf(&farsidev1.AgentAssignment{
				MachineId: machine.ID.String(), MachineName: "wéb", Timeline: 2, Disks: disk, Settings: settings,
				ProcessServer: &farsidev1.Peer{NodeId: process.String(), Addresses: []string{"p:1"}},
				Tags:          []*farsidev1.TagRequest{{Id: "t", Name: "n", Consistency: farsidev1.Consistency_CONSISTENCY_FILESYSTEM, DeadlineNs: 7, GroupId: "g"}},
			}),
		},
		{
			"agent of an unprotected machine",
			catalog.Node{ID: agent, Role: transport.RoleAgent, Machine: machine.ID},
			[]machineRows{ended},
			nil, agentOf(&farsidev1.AgentAssignment{
				MachineId: machine.ID.String(), MachineName: "wéb", Timeline: 2, Settings: settings,
			}),
		},
		{
			"agent that was replaced",
			catalog.Node{ID: other, Role: transport.RoleAgent, Machine: machine.ID},
			[]machineRows{machine},
			nil, agentOf(&farsidev1.AgentAssignment{MachineId: machine.ID.String()}),
		},
		{
			"process server not heard of yet",
			catalog.Node{ID: agent, Role: transport.RoleAgent, Machine: machine.ID},
			[]machineRows{with(func(m *machineRows) { m.ProcessServer, m.tags = other, nil })},
			nil, agentOf(&farsidev1.AgentAssignment{
				MachineId: machine.ID.String(), MachineName: "wéb", Timeline: 2, Disks: disk, Settings: settings,
				ProcessServer: &farsidev1.Peer{NodeId: other.String()},
			}),
		},
		{"process server", catalog.Node{ID: process, Role: transport.RoleProcessServer}, []machineRows{machine}, nil, processOf(stream)},
		{"process server, unprotected", catalog.Node{ID: process, Role: transport.RoleProcessServer}, []machineRows{ended}, nil, processOf()},
		{"process server, of another", catalog.Node{ID: other, Role: transport.RoleProcessServer}, []machineRows{machine}, nil, processOf()},
		{
			"master target",
			catalog.Node{ID: target, Role: transport.RoleMasterTarget},
			[]machineRows{machine},
			[]catalog.View{view, closing, elsewhere},
			targetOf([]*farsidev1.TargetMachine{targetMachine}, &farsidev1.ViewAssignment{
				ViewId: "v", MachineId: machine.ID.String(), Writable: true, Name: "drill", DiskIds: []uint32{3}, BranchTimeline: 5,
				Selector: &farsidev1.Selector{Point: &farsidev1.Selector_Tag{Tag: "n"}}, Resolved: &farsidev1.Position{Timeline: 2, Seq: 8},
			}),
		},
		{
			"master target keeps what was protected",
			catalog.Node{ID: target, Role: transport.RoleMasterTarget},
			[]machineRows{ended},
			nil,
			targetOf([]*farsidev1.TargetMachine{{MachineId: machine.ID.String(), MachineName: "wéb", Timeline: 2, HistoryWindowSeconds: 60, Retired: true}}),
		},
		{
			"master target, never protected",
			catalog.Node{ID: target, Role: transport.RoleMasterTarget},
			[]machineRows{with(func(m *machineRows) { m.Protected, m.Retired = false, false })},
			nil, targetOf(nil),
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := assign(plan{
				node: tc.node, configServers: []string{"c:1"}, authorities: [][]byte{{1}}, reportEvery: time.Second,
				machines: tc.machines, views: tc.views, addresses: addresses,
			})
			tc.want.NodeId, tc.want.ConfigServers, tc.want.Authorities = tc.node.ID.String(), []string{"c:1"}, [][]byte{{1}}
			tc.want.ReportEveryMs = 1000
			if !proto.Equal(got, tc.want) {
				t.Errorf("got\n%v\nwant\n%v", got, tc.want)
			}
		})
	}
}

func TestSelectors(t *testing.T) {
	for _, s := range []catalog.Selector{
		{Kind: catalog.SelectLatest},
		{Kind: catalog.SelectPosition, Position: dr.Position{Timeline: 1, Seq: 1 << 63}},
		{Kind: catalog.SelectTime, Time: 5},
		{Kind: catalog.SelectTag, Tag: "ü"},
	} {
		if got, err := selectorOf(selectorMessage(s)); err != nil || got != s {
			t.Errorf("%+v: got %+v, %v", s, got, err)
		}
	}
	for name, m := range map[string]*farsidev1.Selector{
		"position without timeline": {Point: &farsidev1.Selector_Position{Position: &farsidev1.Position{Seq: 1}}},
		"no position":               {Point: &farsidev1.Selector_Position{}},
		"time before time":          {Point: &farsidev1.Selector_TimeNs{TimeNs: -1}},
		"empty tag":                 {Point: &farsidev1.Selector_Tag{}},
	} {
		if s, err := selectorOf(m); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestHub(t *testing.T) {
	h := newHub()
	a, b := dr.NodeID{1}, dr.NodeID{2}
	isOpen := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return false
		default:
			return true
		}
	}
	ca, cb, any := h.node(a), h.node(b), h.anything()
	h.wake(a, dr.NodeID{3})
	if isOpen(ca) || !isOpen(cb) || isOpen(any) {
		t.Error("wrong ones were woken")
	}
	if !isOpen(h.node(a)) || !isOpen(h.anything()) {
		t.Error("a wake-up is remembered for those who come later")
	}
}
