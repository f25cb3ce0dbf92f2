package simtest

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/transport"
)

// Config says what a World consists of.
type Config struct {
	Machines, Disks int
	DiskSize        int64 // bytes of each disk
	Ring            int64 // bytes of each capture's buffer
	Memory          int64 // bytes that each agent's replication may hold
	SpoolLimit      int64 // bytes of each spool
	SegmentSize     int64 // bytes of the vaults' segments
	History         time.Duration
	CompareEvery    time.Duration // that a pass of the background comparison takes; 0: there is none
	Codec           pb.Codec
	Log             *slog.Logger // nil: none
}

// World is a deployment: machines with their agents, a process server and a master target.
type World struct {
	conf     Config
	net      *network
	source   *processServer
	target   *masterTarget
	machines []*machine
	views    []*pb.ViewAssignment
	lastView int
	fault    error // the first promise that was broken
}

// newWorld makes a World in which everything runs and nothing has been written.
func newWorld(c Config) (*World, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	w := &World{conf: c, net: newNetwork()}
	w.source, w.target = newProcessServer(w), newMasterTarget(w)
	for i := range c.Machines {
		w.machines = append(w.machines, newMachine(w, i))
	}
	err := errors.Join(w.source.start(), w.target.start())
	for _, m := range w.machines {
		m.start()
	}
	w.assign()
	return w, err
}

// close ends everything.
func (w *World) close() error {
	for _, m := range w.machines {
		m.stop()
	}
	w.source.stop()
	w.target.stop()
	for _, m := range w.machines {
		m.landAll()
	}
	return w.net.close()
}

// broken notes that a promise was broken.
func (w *World) broken(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf(format, args...)
	}
}

// assign tells everybody who runs what is to be done, as the configuration server would.
func (w *World) assign() {
	for _, m := range w.machines {
		if m.node != nil {
			m.node.Assign(m.assignment())
		}
	}
	if n := w.source.node; n != nil {
		a := &pb.ProcessServerAssignment{}
		for _, m := range w.machines {
			a.Streams = append(a.Streams, &pb.Stream{
				MachineId: m.id.String(), MachineName: m.name, AgentNodeId: m.peer.Node.String(), Timeline: 1,
				MasterTarget: &pb.Peer{NodeId: w.target.peer.Node.String(), Addresses: []string{w.target.name}}, Codec: w.conf.Codec,
			})
		}
		n.Assign(w.source.ctx, a)
	}
	if n := w.target.node; n != nil {
		a := &pb.MasterTargetAssignment{Views: w.views}
		for _, m := range w.machines {
			a.Machines = append(a.Machines, &pb.TargetMachine{
				MachineId: m.id.String(), MachineName: m.name, Timeline: 1, Disks: m.diskList(),
				Writers: []string{w.source.peer.Node.String()}, HistoryWindowSeconds: int64(w.conf.History / time.Second),
			})
		}
		n.Assign(a)
	}
}

// observe looks at what everybody reports.
func (w *World) observe() {
	for _, m := range w.machines {
		m.observe()
	}
	if w.target.node == nil {
		return
	}
	for _, s := range w.target.node.Report().GetMasterTarget().GetMachines() {
		for _, m := range w.machines {
			if m.id.String() == s.GetMachineId() && s.GetHead() != nil {
				m.head(s)
			}
		}
	}
}

// sleep lets time pass, and observes meanwhile.
func (w *World) sleep(d time.Duration) {
	for d > 0 && w.fault == nil {
		part := min(d, 200*time.Millisecond)
		time.Sleep(part)
		d -= part
		for _, m := range w.machines {
			m.landLate()
		}
		w.observe()
	}
}

// until lets time pass until ok, and reports whether that came about within the limit.
func (w *World) until(limit time.Duration, ok func() bool) bool {
	for end := time.Now().Add(limit); w.fault == nil; {
		if ok() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		w.sleep(50 * time.Millisecond)
	}
	return false
}

// recover ends all faults and waits until everything is well again, which nobody has to do anything about.
func (w *World) recover() {
	w.net.heal()
	w.source.fill(false)
	w.target.fill(false)
	err := errors.Join(w.source.start(), w.target.start())
	if err != nil {
		w.broken("a role does not start again: %v", err)
		return
	}
	for _, m := range w.machines {
		m.start()
		m.kernel.SetRing(w.conf.Ring)
	}
	w.assign()
	for _, m := range w.machines {
		// What is reported may be a little old, so it is asked twice.
		if !w.until(5*time.Minute, func() bool {
			if !m.well() {
				return false
			}
			w.sleep(time.Second)
			return w.until(time.Second, m.well)
		}) && w.fault == nil {
			w.broken("%s is not well 5 minutes after the last fault: %s: %v", m.name, m.captured(), m.node.Report())
		}
	}
}

// judge checks at the end that the newest state is the machines', and that what is offered is right.
func (w *World) judge(pick func(n int) int) {
	for _, m := range w.machines {
		m.landAll()
	}
	w.recover()
	for _, m := range w.machines {
		if w.fault != nil {
			return
		}
		v, at, err := w.look(m, nil)
		if err != nil {
			w.broken("%s: the newest position: %v", m.name, err)
			return
		}
		if v.last != m.oracle.writes {
			w.broken("%s: at %v, the newest position, the disks are as after write %d of %d", m.name, at, v.last, m.oracle.writes)
		}
		for range 4 {
			w.lookSomewhere(m, pick)
		}
		if w.conf.CompareEvery > 0 && pick(4) == 0 {
			w.sneak(m, pick)
		}
	}
}

// sneak writes behind the capture's back of a machine at rest, and checks that this is found and repaired.
func (w *World) sneak(m *machine, pick func(n int) int) {
	m.sneak(pick)
	if !w.until(time.Minute, func() bool {
		b := m.node.Report().GetBackground()
		return b.GetFound()+b.GetLastFound() > 0
	}) {
		w.broken("%s: the background comparison does not find what was written behind the capture's back: %v", m.name, m.node.Report())
		return
	}
	w.recover()
	if w.fault != nil {
		return
	}
	if v, at, err := w.look(m, nil); err != nil || v.last != m.oracle.writes {
		w.broken("%s: what was written behind the capture's back is not in %v: as after write %d of %d, %v", m.name, at, v.last, m.oracle.writes, err)
	}
}

// peerOf makes an identity of which nothing but the numbers matters.
func peerOf(role string, n byte) transport.Peer {
	return transport.Peer{Role: role, Node: dr.NodeID{n, 1}}
}

// spansOf returns what the master target offers of a machine's history.
func (w *World) spansOf(m *machine) []*pb.Span {
	if w.target.node == nil {
		return nil
	}
	all := w.target.node.Report().GetMasterTarget().GetMachines()
	i := slices.IndexFunc(all, func(s *pb.TargetStatus) bool { return s.GetMachineId() == m.id.String() })
	if i < 0 {
		return nil
	}
	return all[i].GetSpans()
}
