package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
)

// lab is an agent with a made-up capture and process server.
type lab struct {
	*agent
	server  *fakeServer
	machine dr.MachineID
	lock    sync.Mutex
	last    *capturetest.Mem // the one that was opened last
	images  map[dr.DiskID][]byte
	opens   int
	failing error
}

// mem returns the capture that runs.
func (l *lab) mem() *capturetest.Mem {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.last
}

// opened returns how often a capture was opened.
func (l *lab) opened() int {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.opens
}

// fail lets opening a capture fail, or work again.
func (l *lab) fail(err error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.failing = err
}

func newLab(t *testing.T) *lab {
	l := &lab{machine: dr.NewMachineID(), images: map[dr.DiskID][]byte{}}
	l.server = newFakeServer(t, l.machine, twoDisks)
	l.agent = newAgent(l.open, l.server.dial, minMemory, slog.New(slog.DiscardHandler))
	l.scan = func() blockdev.Machine { return blockdev.Machine{} } // this machine's are not the test's
	return l
}

func (l *lab) open(disks []capture.Disk, driver string, _ int64) (opened, error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	l.opens++
	if l.failing != nil {
		return opened{}, l.failing
	}
	old := l.last
	l.last = capturetest.NewMem(disks...)
	if old != nil {
		for _, d := range old.Disks() {
			l.images[d.ID] = old.Image(d.ID)
		}
	}
	for _, d := range disks {
		l.last.SetImage(d.ID, l.images[d.ID])
	}
	return opened{src: l.last, driver: "mem" + driver}, nil
}

func (l *lab) assignment(change func(*pb.AgentAssignment)) *pb.AgentAssignment {
	p := &pb.AgentAssignment{
		MachineId: l.machine.String(), Timeline: 1,
		ProcessServer: &pb.Peer{NodeId: "ps", Addresses: []string{"ps:1"}},
	}
	for _, d := range twoDisks {
		p.Disks = append(p.Disks, &pb.Disk{Id: uint32(d.ID), Path: d.Path, Size: d.Size})
	}
	if change != nil {
		change(p)
	}
	return p
}

// play runs the agent in a bubble while the test does something.
func play(t *testing.T, do func(*lab)) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- l.run(ctx) }()
		do(l)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
		l.server.hangUp()
		l.server.wg.Wait()
	})
}

func (l *lab) expect(t *testing.T, what string, phase pb.Phase) *pb.AgentReport {
	t.Helper()
	r := l.report(time.Now())
	if r.GetPhase() != phase {
		t.Errorf("%s: phase %v, want %v; %v", what, r.GetPhase(), phase, r)
	}
	return r
}

func TestAgentLife(t *testing.T) {
	play(t, func(l *lab) {
		time.Sleep(time.Second)
		l.expect(t, "nothing assigned", pb.Phase_PHASE_IDLE)

		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.ProcessServer = nil }))
		time.Sleep(time.Second)
		l.expect(t, "no process server", pb.Phase_PHASE_WAITING)

		l.assign(l.assignment(nil))
		time.Sleep(time.Second)
		l.mem().Write(1, 512, sector(1))
		time.Sleep(time.Second)
		r := l.expect(t, "replicating", pb.Phase_PHASE_EXACT)
		if !r.GetRpo().GetKnown() || r.GetRpo().GetSamples() != 1 || r.GetConnectedTo() != "ps:1" || len(r.GetDisks()) != 2 ||
			r.GetDurable().GetSeq() != r.GetBuilt().GetSeq() || r.GetDurable().GetSeq() == 0 || r.GetCapture().GetDriver() != "mem" ||
			r.GetCounters().GetWrites() != 1 || r.GetDurableTimeNs() == 0 {
			t.Errorf("report %v", r)
		}
		if n := len(r.GetEvents()); n < 2 || r.GetEvents()[0].GetCode() != "initial" || r.GetEvents()[n-1].GetCode() != "exact" {
			t.Errorf("events %v", r.GetEvents())
		}

		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.ProcessServer.Addresses = []string{"ps:2"} }))
		time.Sleep(time.Second)
		if r := l.expect(t, "moved", pb.Phase_PHASE_EXACT); r.GetConnectedTo() != "ps:2" || l.opened() != 1 {
			t.Errorf("connected to %q, opened %d times", r.GetConnectedTo(), l.opened())
		}

		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Disks = p.Disks[:1] }))
		time.Sleep(2 * time.Second)
		r = l.expect(t, "other disks", pb.Phase_PHASE_EXACT)
		if len(r.GetDisks()) != 1 || l.opened() != 2 || r.GetEvents()[len(r.GetEvents())-2].GetCode() != string(ReasonReopened) {
			t.Errorf("opened %d times; %v", l.opened(), r)
		}

		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Disks = nil }))
		time.Sleep(time.Second)
		l.expect(t, "unprotected", pb.Phase_PHASE_IDLE)

		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.MachineId = "mine" }))
		time.Sleep(time.Second)
		l.expect(t, "nonsense", pb.Phase_PHASE_FAILED)
	})
}

func TestAgentRetriesCapture(t *testing.T) {
	play(t, func(l *lab) {
		l.fail(fmt.Errorf("open: %w", dr.ErrUnsupported))
		l.assign(l.assignment(nil))
		time.Sleep(20 * time.Second)
		if r := l.expect(t, "capture fails", pb.Phase_PHASE_FAILED); r.GetError() == "" || l.opened() < 3 || l.opened() > 6 {
			t.Errorf("error %q after %d attempts", r.GetError(), l.opened())
		}
		l.fail(nil)
		time.Sleep(10 * time.Second)
		l.expect(t, "capture works", pb.Phase_PHASE_EXACT)
		if err := l.mem().Close(); err != nil { // the capture dies
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		l.expect(t, "capture died and came back", pb.Phase_PHASE_EXACT)
	})
}

func TestAgentFenced(t *testing.T) {
	play(t, func(l *lab) {
		l.assign(l.assignment(nil))
		time.Sleep(time.Second)
		l.server.set(func() { l.server.mu.at.Position = dr.Position{Timeline: 2, Seq: 100} })
		l.server.hangUp()
		time.Sleep(time.Minute)
		r := l.expect(t, "old timeline", pb.Phase_PHASE_FENCED)
		if n := len(r.GetEvents()); l.opened() != 1 || r.GetEvents()[n-1].GetCode() != "fenced" {
			t.Errorf("opened %d times, events %v", l.opened(), r.GetEvents())
		}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Timeline = 2 }))
		time.Sleep(10 * time.Second)
		l.expect(t, "new timeline", pb.Phase_PHASE_EXACT)
	})
}

func TestAgentTags(t *testing.T) {
	play(t, func(l *lab) {
		id, late, bad := dr.NewNodeID().String(), dr.NewNodeID().String(), "x"
		tags := []*pb.TagRequest{
			{Id: id, Name: "good", Consistency: pb.Consistency_CONSISTENCY_FILESYSTEM},
			{Id: late, Name: "late", DeadlineNs: time.Now().Add(-time.Second).UnixNano()},
			{Id: bad, Name: "bad"},
		}
		l.assign(l.assignment(func(p *pb.AgentAssignment) { p.Tags = tags }))
		time.Sleep(3 * time.Second)
		r := l.expect(t, "tags", pb.Phase_PHASE_EXACT)
		got := map[string]*pb.TagResult{}
		for _, x := range r.GetTags() {
			got[x.GetId()] = x
		}
		if x := got[id]; x.GetPosition().GetSeq() == 0 || x.GetConsistency() != pb.Consistency_CONSISTENCY_CRASH || !strings.Contains(x.GetDetail(), "not supported") {
			t.Errorf("good tag: %v", x)
		}
		if got[late].GetError() == "" || got[bad].GetError() == "" || len(got) != 3 {
			t.Errorf("other tags: %v", got)
		}
		l.assign(l.assignment(nil))
		time.Sleep(time.Second)
		if r := l.report(time.Now()); len(r.GetTags()) != 0 {
			t.Errorf("tags reported that nobody asks for: %v", r.GetTags())
		}
	})
}

func TestWorkOfRefuses(t *testing.T) {
	m := dr.NewMachineID().String()
	for name, p := range map[string]*pb.AgentAssignment{
		"machine": {MachineId: "x", Disks: []*pb.Disk{{Id: 1}}},
		"disk id": {MachineId: m, Disks: []*pb.Disk{{Id: 1 << 16}}},
		"size":    {MachineId: m, Disks: []*pb.Disk{{Id: 1, Size: -1}}},
	} {
		if w, err := workOf(p, 0); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, w, err)
		}
	}
	w, err := workOf(&pb.AgentAssignment{
		MachineId: m, Disks: []*pb.Disk{{Id: 1, Size: 512}},
		Settings: &pb.AgentSettings{MemoryBytes: 1, Codec: pb.Codec_CODEC_S2},
	}, 64<<20)
	if err != nil || w.memory != minMemory || w.codec.String() != "s2" {
		t.Errorf("settings: %+v, %v", w, err)
	}
}
