package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
)

// cabinet is a machine whose disks are taken out and put in.
func cabinet(l *lab) (in func(id dr.DiskID, seq uint64), out func(id dr.DiskID)) {
	at := map[dr.DiskID]blockdev.Device{}
	in = func(id dr.DiskID, seq uint64) {
		l.lock.Lock()
		defer l.lock.Unlock()
		name := fmt.Sprintf("xd%d", id)
		d := blockdev.Device{Name: name, Path: "/dev/" + name, Kind: blockdev.Disk}
		d.Serial, d.DiskSeq = name, seq
		for _, x := range twoDisks {
			if x.ID == id {
				d.Size = x.Size
			}
		}
		at[id] = d
	}
	out = func(id dr.DiskID) {
		l.lock.Lock()
		defer l.lock.Unlock()
		delete(at, id)
	}
	l.scan = func() (m blockdev.Machine) {
		l.lock.Lock()
		defer l.lock.Unlock()
		m.Devices = append(m.Devices, blockdev.Device{Name: "root", Path: "/dev/root"})
		for _, d := range at {
			m.Devices = append(m.Devices, d)
		}
		return m
	}
	for i, d := range twoDisks {
		in(d.ID, uint64(i+1))
	}
	return in, out
}

// watch watches the devices until stop; t is not that of the bubble.
func (l *lab) watch(t *testing.T, offered func(*blockdev.Machine) []found) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.watchDevices(ctx, offered); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func (l *lab) withSerials(p *pb.AgentAssignment) {
	for _, d := range p.Disks {
		d.Path = fmt.Sprintf("/dev/xd%d", d.Id)
		d.Identity = fmt.Sprintf("serial:xd%d", d.Id)
	}
}

func eventCodes(r *pb.AgentReport) string {
	var out []string
	for _, e := range r.GetEvents() {
		out = append(out, e.GetCode())
	}
	return strings.Join(out, " ")
}

// TestAgentWithoutADisk: one disk is taken out of a running agent, and comes back: the other goes on
// all the time, and the agent says what it lacks.
func TestAgentWithoutADisk(t *testing.T) {
	play(t, func(l *lab) {
		in, out := cabinet(l)
		defer l.watch(t, offerOf(wanted{}))()
		l.assign(l.assignment(l.withSerials))
		time.Sleep(3 * time.Second)
		l.expect(t, "both", pb.Phase_PHASE_EXACT)
		out(2)
		time.Sleep(4 * time.Second)
		r := l.expect(t, "one", pb.Phase_PHASE_EXACT)
		if d := r.GetDisks(); len(d) != 2 || d[0].GetState() != "ok" || d[1].GetState() != "missing" || d[1].GetDiskId() != 2 || !strings.Contains(d[1].GetError(), "since") {
			t.Errorf("disks %v", d)
		}
		if got := eventCodes(r); got != "initial exact disk-missing disks-changed exact" {
			t.Error(got)
		}
		l.mem().Write(1, 512, sector(7))
		time.Sleep(time.Second)
		l.server.set(func() {
			if !bytes.Equal(l.server.mu.disks[1][512:1024], sector(7)) {
				t.Error("the other disk is not replicated")
			}
		})
		id := dr.NewNodeID().String()
		l.assign(l.assignment(func(p *pb.AgentAssignment) {
			l.withSerials(p)
			p.Tags = []*pb.TagRequest{{Id: id, Name: "asked", Consistency: pb.Consistency_CONSISTENCY_FILESYSTEM}}
		}))
		time.Sleep(time.Second)
		if x := l.report(time.Now()).GetTags(); len(x) != 1 || x[0].GetConsistency() != pb.Consistency_CONSISTENCY_CRASH || !strings.Contains(x[0].GetDetail(), "/dev/xd2 is not captured") {
			t.Errorf("a point without a disk: %v", x)
		}
		l.assign(l.assignment(l.withSerials))
		in(2, 9)
		time.Sleep(6 * time.Second)
		r = l.expect(t, "both again", pb.Phase_PHASE_EXACT)
		if got := eventCodes(r); !strings.HasSuffix(got, "disk-returned disks-changed exact") || len(r.GetDisks()) != 2 || r.GetDisks()[1].GetState() != "ok" {
			t.Error(got, r.GetDisks())
		}
		if !l.server.same(l.mem()) {
			t.Error("the far side differs")
		}
		in(3, 10)
		time.Sleep(2 * time.Second)
		if got := eventCodes(l.report(time.Now())); !strings.HasSuffix(got, "disk-new") || strings.Count(got, "disk-new") != 1 {
			t.Error(got)
		}
		out(1)
		out(2)
		time.Sleep(10 * time.Second)
		r = l.expect(t, "none", pb.Phase_PHASE_FAILED)
		if len(r.GetDisks()) != 2 || r.GetError() == "" {
			t.Errorf("%v", r)
		}
		in(1, 11)
		in(2, 12)
		time.Sleep(20 * time.Second)
		l.expect(t, "all back", pb.Phase_PHASE_EXACT)
	})
}

// TestAgentStartsWithoutADisk: what is not known of a missing disk's copy keeps points away, and nothing else.
func TestAgentStartsWithoutADisk(t *testing.T) {
	play(t, func(l *lab) {
		_, out := cabinet(l)
		out(2)
		l.assign(l.assignment(l.withSerials))
		time.Sleep(3 * time.Second)
		r := l.report(time.Now())
		if r.GetPhase() == pb.Phase_PHASE_EXACT || !strings.Contains(r.GetError(), "no points") || !strings.Contains(eventCodes(r), "no-point") {
			t.Errorf("%v", r)
		}
		l.mem().Write(1, 0, sector(3))
		time.Sleep(time.Second)
		l.server.set(func() {
			if !bytes.Equal(l.server.mu.disks[1][:512], sector(3)) {
				t.Error("the other disk is not replicated")
			}
		})
		l.assign(l.assignment(func(p *pb.AgentAssignment) { l.withSerials(p); p.Disks = p.Disks[:1] }))
		time.Sleep(3 * time.Second)
		if r := l.expect(t, "the other one is no longer protected", pb.Phase_PHASE_EXACT); len(r.GetDisks()) != 1 {
			t.Errorf("%v", r)
		}
	})
}

// TestAgentSetsUnopenedAside: one disk can't be opened; when it can, it is.
func TestAgentSetsUnopenedAside(t *testing.T) {
	play(t, func(l *lab) {
		cabinet(l)
		var bad atomic.Bool
		bad.Store(true)
		open := l.agent.open
		l.agent.open = func(disks []capture.Disk, driver string, ring int64) (opened, error) {
			for _, d := range disks {
				if d.ID == 2 && bad.Load() {
					return opened{}, fmt.Errorf("open: %w", &capture.DiskError{Disk: 2, Err: dr.ErrUnavailable})
				}
			}
			return open(disks, driver, ring)
		}
		defer l.watch(t, nil)()
		l.assign(l.assignment(l.withSerials))
		time.Sleep(5 * time.Second)
		if d := l.report(time.Now()).GetDisks(); len(d) != 2 || d[1].GetState() != "failed" || d[0].GetState() == "failed" {
			t.Errorf("%v", d)
		}
		bad.Store(false)
		time.Sleep(15 * time.Second)
		if r := l.expect(t, "it can be opened", pb.Phase_PHASE_EXACT); len(r.GetDisks()) != 2 || r.GetDisks()[1].GetState() != "ok" {
			t.Errorf("%v", r.GetDisks())
		}
	})
}

// unreadable is a Mem of which one disk can't be read.
type unreadable struct {
	*capturetest.Mem
	disk dr.DiskID
}

func (u *unreadable) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	if disk == u.disk {
		return 0, fmt.Errorf("read: %w", dr.ErrUnavailable)
	}
	return u.Mem.ReadAt(p, disk, off)
}

// TestUnreadableDiskHoldsUpNothingElse: of a disk that can't be read nothing is sent, and no point is made; all of the other
// one arrives at once, and when it can be read the stream is exact.
func TestUnreadableDiskHoldsUpNothingElse(t *testing.T) {
	src := &unreadable{capturetest.NewMem(capture.Disk{ID: 1, Size: 8 << 20}, capture.Disk{ID: 2, Size: 8 << 20}), 1}
	for _, d := range src.Disks() {
		src.SetImage(d.ID, bytes.Repeat(sector(byte(d.ID)), int(d.Size/512)))
	}
	tune := defaultTuning()
	r := newReplicator(src, newOutbox(), tune)
	r.out.resume(frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}, 0, ReasonInitial)
	now := time.Unix(1000, 0)
	steps := 0
	step := func(n int) {
		for range n {
			if _, err := r.step(t.Context(), now, 0); err != nil {
				t.Fatal(err)
			}
			for b, _ := r.out.take(); b != nil; b, _ = r.out.take() {
				r.out.acked(r.enc.Cursor().Position.Seq, 0, now)
			}
			steps++
		}
	}
	step(200)
	st := r.status()
	if st.disks[1].Sent != 8<<20 || st.disks[0].Sent != 0 || st.phase != Syncing || st.disks[0].fault == nil || st.disks[1].fault != nil || !st.disks[0].faultSince.Equal(now) {
		t.Errorf("%+v", st.disks)
	}
	reads := r.sync.bulkFrom
	if !reads.After(now) {
		t.Error("it does not rest though nothing can be read")
	}
	src.disk = 0
	now = now.Add(2 * time.Second)
	step(300)
	if st := r.status(); st.phase != Exact || st.disks[0].Sent != 8<<20 || st.fault != nil || st.disks[0].fault != nil {
		t.Errorf("%v %+v", st.phase, st.disks)
	}
}

// TestDoubtAbsent: what the receiver lost of a disk that is not there can't be read again.
func TestDoubtAbsent(t *testing.T) {
	newStream := func() *replicator {
		r := newReplicator(capturetest.NewMem(capture.Disk{ID: 1, Size: 1 << 20}), newOutbox(), defaultTuning())
		r.absent = []capture.Disk{{ID: 2, Path: "/dev/xdb", Size: 1 << 20}}
		return r
	}
	at := func(seq dr.Seq) start {
		return start{cursor: frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1, Seq: seq}, Chain: [32]byte{byte(seq)}}}
	}
	r := newStream()
	begin := func(seq dr.Seq) {
		t.Helper()
		if _, err := r.plan(at(seq)); err != nil {
			t.Fatal(err)
		}
	}
	begin(5)
	if r.hold != nil {
		t.Error("at the first stream:", r.hold)
	}
	r.led.begin(dr.MachineID{1}, r.protected(), at(5).cursor, 0)
	r.led.add(at(6).cursor, 0, 1)
	begin(6)
	if r.hold != nil {
		t.Error("at the newest frame:", r.hold)
	}
	r.led.setExact(5)
	begin(5)
	if r.hold != nil {
		t.Error("where it was exact:", r.hold)
	}
	r.led.setSyncing()
	begin(5)
	if r.hold == nil {
		t.Error("before the newest frame, in a sync: nothing is held back")
	}
	r = newStream()
	begin(5)
	begin(4)
	if r.hold == nil {
		t.Error("at a frame that is not known: nothing is held back")
	}
}
