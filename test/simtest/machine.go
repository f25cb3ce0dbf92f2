package simtest

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"farside/internal/agent"
	pb "farside/internal/api/farside/v1"
	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/transport"
)

// machine is a protected machine: a kernel with disks, an agent, and who knows what was written.
type machine struct {
	w      *World
	id     dr.MachineID
	name   string
	peer   transport.Peer
	disks  []capture.Disk
	kernel *capturetest.Kernel
	oracle *oracle

	node *agent.Node                           // nil: the agent does not run
	src  atomic.Pointer[capturetest.PinnedMem] // the newest; nil: the agent never had one
	end  context.CancelFunc
	done chan struct{}

	sneaked bool // something was written behind the capture's back
	flying  []*flying
	tags    []*wantedTag
	durable dr.Position // highest that the agent was told is durable
	judged  []judgement
}

// flying is a write that was submitted and has not landed.
type flying struct {
	write  *capturetest.MemWrite
	extent dr.Extent
	before []uint64 // stamps of the sectors
	since  time.Time
}

// wantedTag is a tag that was asked for.
type wantedTag struct {
	req    *pb.TagRequest
	writes int // that had been submitted then
	at     *pb.Position
}

// judgement is what a position was found to be.
type judgement struct {
	at dr.Position
	is interval
}

// slowest is how long a write takes at most.
const slowest = 2 * time.Second

// memoryOfCapture is what a capture keeps for the agent, in bytes.
const memoryOfCapture = 6 << 20

func newMachine(w *World, i int) *machine {
	m := &machine{w: w, name: fmt.Sprintf("m%d", i), id: dr.MachineID{byte(i + 1), 7}}
	m.peer = transport.Peer{Role: transport.RoleAgent, Node: dr.NodeID{byte(i + 1)}, Machine: m.id}
	sizes := map[dr.DiskID]int64{}
	for d := range w.conf.Disks {
		m.disks = append(m.disks, capture.Disk{ID: dr.DiskID(d + 1), Path: fmt.Sprintf("/sim/%d", d), Size: w.conf.DiskSize})
		sizes[dr.DiskID(d+1)] = w.conf.DiskSize
	}
	m.kernel, m.oracle = capturetest.NewKernel(m.disks...), newOracle(sizes)
	m.kernel.SetRing(w.conf.Ring)
	return m
}

func (m *machine) diskList() (all []*pb.Disk) {
	for _, d := range m.disks {
		all = append(all, &pb.Disk{Id: uint32(d.ID), Path: d.Path, Size: d.Size})
	}
	return all
}

func (m *machine) assignment() *pb.AgentAssignment {
	a := &pb.AgentAssignment{
		MachineId: m.id.String(), MachineName: m.name, Timeline: 1, Disks: m.diskList(),
		ProcessServer: &pb.Peer{NodeId: m.w.source.peer.Node.String(), Addresses: []string{m.w.source.name}},
	}
	for _, t := range m.tags {
		if t.at == nil {
			a.Tags = append(a.Tags, t.req)
		}
	}
	return a
}

// start starts the agent unless it runs.
func (m *machine) start() {
	if m.node != nil {
		return
	}
	m.node = agent.New(agent.Options{
		Open: func([]capture.Disk) (capture.Source, error) {
			src, err := m.kernel.Open(capturetest.MemOptions{Hold: true, Memory: memoryOfCapture})
			if err != nil {
				return nil, err
			}
			m.src.Store(src)
			return src, nil
		},
		Dial: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return m.w.net.dial(ctx, m.name, m.peer, addr)
		},
		Memory: m.w.conf.Memory, CompareEvery: m.w.conf.CompareEvery, Log: m.w.conf.Log.With("role", m.name),
	})
	ctx, end := context.WithCancel(context.Background())
	m.end, m.done = end, make(chan struct{})
	n, done := m.node, m.done
	n.Assign(m.assignment())
	go func() {
		defer close(done)
		n.Run(ctx)
	}()
}

// stop ends the agent in good order.
func (m *machine) stop() {
	if m.node == nil {
		return
	}
	m.end()
	<-m.done
	m.node = nil
}

// kill ends it as kill -9 does. What it captured by stays.
func (m *machine) kill() {
	if m.node == nil {
		return
	}
	if src := m.src.Load(); src != nil {
		src.Kill()
	}
	for _, line := range m.w.net.of(m.name) {
		line.Reset()
	}
	m.stop()
}

// reboot ends the machine without warning: nothing but its disks is left, and of the writes in
// flight those that have landed.
func (m *machine) reboot() {
	m.kill()
	m.kernel.Reboot()
	for _, f := range slices.Backward(m.flying) {
		m.oracle.revert(f.extent, f.before)
	}
	m.flying = nil
}

// write submits a write, unless one to the same place is in flight: what that would leave nobody could say.
// It lands after a while.
func (m *machine) write(x dr.Extent, what dr.What, after time.Duration) {
	for _, f := range m.flying {
		if f.extent.Disk == x.Disk && f.extent.Offset < x.End() && x.Offset < f.extent.End() {
			return
		}
	}
	f := &flying{extent: x, before: m.oracle.stamps(x), since: time.Now()}
	stamp := m.oracle.next()
	m.oracle.record(x, what != dr.Data)
	switch what {
	case dr.Data:
		f.write = m.kernel.Submit(x.Disk, x.Offset, pattern(stamp, x.Length))
	case dr.Zero:
		f.write = m.kernel.SubmitZero(x)
	default:
		f.write = m.kernel.SubmitDiscard(x)
	}
	m.flying = append(m.flying, f)
	if after == 0 {
		m.land(f)
	}
}

func (m *machine) land(f *flying) {
	f.write.Land()
	m.flying = slices.DeleteFunc(m.flying, func(o *flying) bool { return o == f })
}

// landSome lets the n-th write in flight land, and every third.
func (m *machine) landSome(n int) {
	for i, f := range slices.Clone(m.flying) {
		if (i+n)%3 == 0 {
			m.land(f)
		}
	}
}

// landLate lets those land that have been on their way for as long as a device may take.
func (m *machine) landLate() {
	for _, f := range slices.Clone(m.flying) {
		if time.Since(f.since) > slowest {
			m.land(f)
		}
	}
}

func (m *machine) landAll() {
	for _, f := range slices.Clone(m.flying) {
		m.land(f)
	}
}

// tag asks for a tag.
func (m *machine) tag(id byte) {
	t := &wantedTag{
		req:    &pb.TagRequest{Id: dr.MachineID{id, m.id[0], 0xff}.String(), Name: fmt.Sprintf("tag %d", id), Consistency: pb.Consistency_CONSISTENCY_CRASH},
		writes: m.oracle.writes,
	}
	m.tags = append(m.tags, t)
	m.w.assign()
}

// observe notes what the agent reports.
func (m *machine) observe() {
	if m.node == nil {
		return
	}
	r := m.node.Report()
	if d := positionOf(r.GetDurable()); d.Seq > m.durable.Seq {
		m.durable = d
	}
	if n := r.GetBackground().GetFound() + r.GetBackground().GetLastFound(); n > 0 && !m.sneaked {
		m.w.broken("%s: the background comparison found %d blocks, but nobody wrote behind the capture's back: %v", m.name, n, r.GetEvents())
	}
	for _, t := range r.GetTags() {
		for _, want := range m.tags {
			if want.req.GetId() == t.GetId() && t.GetPosition() != nil {
				want.at = t.GetPosition()
			}
		}
	}
}

// sneak writes behind the capture's back: only the background comparison can find that.
func (m *machine) sneak(pick func(int) int) {
	d := m.disks[pick(len(m.disks))]
	x := dr.Extent{Disk: d.ID, Offset: int64(pick(int(d.Size/dr.SectorSize))) * dr.SectorSize, Length: dr.SectorSize}
	m.kernel.Sneak(x.Disk, x.Offset, pattern(m.oracle.next(), x.Length))
	m.oracle.record(x, false)
	m.sneaked = true
}

// head holds what the master target has against what it had said is durable.
func (m *machine) head(s *pb.TargetStatus) {
	if at := positionOf(s.GetHead()); at.Seq < m.durable.Seq {
		m.w.broken("%s: %v was called durable, but the master target stands at %v: %s", m.name, m.durable, at, s.GetError())
	}
}

// captured tells for people where the capture stands.
func (m *machine) captured() string {
	src := m.src.Load()
	if src == nil {
		return "no capture"
	}
	dirty, err := src.Dirty()
	return fmt.Sprintf("consumed %d of %d, %d dirty (%v), %+v", src.Consumed(), src.Tail(), dirty, err, src.Stats())
}

// well reports whether every write is a point and the far side has them all.
func (m *machine) well() bool {
	r := m.node.Report()
	return r.GetPhase() == pb.Phase_PHASE_EXACT && r.GetBuilt().GetSeq() == r.GetDurable().GetSeq() &&
		m.src.Load().Consumed() == m.src.Load().Tail() && r.GetDurable().GetSeq() > 0
}

func positionOf(p *pb.Position) dr.Position {
	return dr.Position{Timeline: dr.Timeline(p.GetTimeline()), Seq: dr.Seq(p.GetSeq())}
}
