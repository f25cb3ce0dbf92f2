package confserver

import (
	"time"

	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"

	farsidev1 "farside/internal/api/farside/v1"
)

// plan is all that a node's assignment follows from.
type plan struct {
	node          catalog.Node
	configServers []string
	authorities   [][]byte
	reportEvery   time.Duration
	machines      []machineRows          // those that concern the node
	views         []catalog.View         // those at the node
	groups        []groupRows            // those that the node leads
	addresses     map[dr.NodeID][]string // where nodes said that they take links
}

// machineRows is a machine with what belongs to it.
type machineRows struct {
	catalog.Machine
	disks []catalog.Disk
	tags  []catalog.Tag // wanted
}

// groupRows is a group with what belongs to it.
type groupRows struct {
	catalog.Group
	members []catalog.Machine
	tags    []catalog.GroupTag // wanted
}

// assign returns a node's assignment, without its revision. It is a function of
// its argument alone.
func assign(p plan) *farsidev1.Assignment {
	a := &farsidev1.Assignment{
		NodeId:        p.node.ID.String(),
		Role:          roleNumber(p.node.Role),
		ConfigServers: p.configServers,
		Authorities:   p.authorities,
		ReportEveryMs: p.reportEvery.Milliseconds(),
	}
	switch p.node.Role {
	case transport.RoleAgent:
		a.Work = &farsidev1.Assignment_Agent{Agent: p.agent()}
	case transport.RoleProcessServer:
		a.Work = &farsidev1.Assignment_ProcessServer{ProcessServer: p.processServer()}
	case transport.RoleMasterTarget:
		a.Work = &farsidev1.Assignment_MasterTarget{MasterTarget: p.masterTarget()}
	}
	return a
}

func (p plan) agent() *farsidev1.AgentAssignment {
	a := &farsidev1.AgentAssignment{MachineId: p.node.Machine.String()}
	for _, m := range p.machines {
		if m.ID != p.node.Machine || m.Node != p.node.ID {
			continue
		}
		a.MachineName, a.Timeline = m.Name, uint32(m.Timeline)
		a.Settings = settingsOf(m.Machine)
		if !m.Protected {
			continue
		}
		a.Disks = disksOf(m.disks)
		a.ProcessServer = p.peer(m.ProcessServer)
		for _, t := range m.tags {
			a.Tags = append(a.Tags, &farsidev1.TagRequest{
				Id: t.ID, Name: t.Name, Consistency: farsidev1.Consistency(t.Consistency), DeadlineNs: t.Deadline, GroupId: t.Group,
			})
		}
	}
	return a
}

func (p plan) processServer() *farsidev1.ProcessServerAssignment {
	a := &farsidev1.ProcessServerAssignment{Limits: &farsidev1.SpoolLimits{}}
	for _, m := range p.machines {
		if !m.Protected || m.ProcessServer != p.node.ID {
			continue
		}
		a.Streams = append(a.Streams, &farsidev1.Stream{
			MachineId: m.ID.String(), MachineName: m.Name, AgentNodeId: m.Node.String(), Timeline: uint32(m.Timeline),
			MasterTarget: p.peer(m.MasterTarget), Codec: codecNumber(m.Codec),
		})
	}
	for _, g := range p.groups {
		a.Groups = append(a.Groups, groupAssignment(g))
	}
	return a
}

func groupAssignment(g groupRows) *farsidev1.GroupAssignment {
	a := &farsidev1.GroupAssignment{
		GroupId: g.ID, Name: g.Name, HoldLimitMs: g.HoldLimit, TagEverySeconds: g.TagEvery, Consistency: farsidev1.Consistency(g.Consistency),
	}
	for _, m := range g.members {
		a.MachineIds = append(a.MachineIds, m.ID.String())
	}
	for _, t := range g.tags {
		a.Tags = append(a.Tags, &farsidev1.GroupTagRequest{
			Id: t.ID, Name: t.Name, Consistency: farsidev1.Consistency(t.Consistency), DeadlineNs: t.Deadline,
		})
	}
	return a
}

func (p plan) masterTarget() *farsidev1.MasterTargetAssignment {
	a := &farsidev1.MasterTargetAssignment{}
	for _, m := range p.machines {
		if m.MasterTarget != p.node.ID || !m.Protected && !m.Retired {
			continue
		}
		t := &farsidev1.TargetMachine{
			MachineId: m.ID.String(), MachineName: m.Name, Timeline: uint32(m.Timeline), Disks: disksOf(m.disks),
			HistoryWindowSeconds: m.HistoryWindow, Retired: !m.Protected,
		}
		if m.Protected {
			t.Writers = []string{m.ProcessServer.String()}
		}
		a.Machines = append(a.Machines, t)
	}
	for _, v := range p.views {
		if v.MasterTarget == p.node.ID && !v.Closing {
			a.Views = append(a.Views, viewAssignment(v))
		}
	}
	return a
}

func viewAssignment(v catalog.View) *farsidev1.ViewAssignment {
	a := &farsidev1.ViewAssignment{
		ViewId: v.ID, MachineId: v.Machine.String(), Selector: selectorMessage(v.Selector), Writable: v.Writable, Name: v.Name,
		BranchTimeline: uint32(v.Branch),
	}
	for _, d := range v.Disks {
		a.DiskIds = append(a.DiskIds, uint32(d))
	}
	if v.Resolved {
		a.Resolved = positionMessage(v.Position)
	}
	return a
}

// peer names a node that the assigned one is to dial; nil for none.
func (p plan) peer(id dr.NodeID) *farsidev1.Peer {
	if id.IsZero() {
		return nil
	}
	return &farsidev1.Peer{NodeId: id.String(), Addresses: p.addresses[id]}
}

func disksOf(rows []catalog.Disk) []*farsidev1.Disk {
	var disks []*farsidev1.Disk
	for _, d := range rows {
		disks = append(disks, &farsidev1.Disk{Id: uint32(d.ID), Path: d.Path, Size: d.Size, Identity: d.Identity})
	}
	return disks
}
