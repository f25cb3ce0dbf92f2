package agent

import (
	"bytes"
	"errors"
	"runtime"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
)

// hooked is a Mem that lets a test act at certain calls, once each.
type hooked struct {
	*capturetest.Mem
	beforeTake, beforeConsumed, beforeRead func()
}

func once(f *func()) {
	if g := *f; g != nil {
		*f = nil
		g()
	}
}

func (h *hooked) TakeDirty(n int64) ([]dr.Extent, error) {
	once(&h.beforeTake)
	return h.Mem.TakeDirty(n)
}

func (h *hooked) Consumed() uint64 {
	once(&h.beforeConsumed)
	return h.Mem.Consumed()
}

func (h *hooked) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	once(&h.beforeRead)
	return h.Mem.ReadAt(p, disk, off)
}

// scene is one replicator on a hooked source with one disk, and the far side.
type scene struct {
	t    *testing.T
	src  *hooked
	out  *outbox
	rep  *replicator
	now  time.Time
	far  []byte
	at   frame.Cursor
	seen []*frame.Frame
}

const sceneDisk = 1 << 20

func newScene(t *testing.T, seq dr.Seq) *scene {
	s := &scene{t: t, now: time.Unix(1_000_000, 0), out: newOutbox(), far: make([]byte, sceneDisk)}
	s.src = &hooked{Mem: capturetest.NewMem(capture.Disk{ID: 1, Size: sceneDisk})}
	s.src.SetClock(func() int64 { return s.now.UnixNano() })
	s.at = frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1, Seq: seq}}
	tune := defaultTuning()
	tune.resumeWait = 1
	s.rep = newReplicator(s.src, s.out, tune)
	return s
}

// connect lets the receiver say where it stands.
func (s *scene) connect() { s.out.resume(s.at, 0, ReasonInitial) }

func (s *scene) step() {
	s.t.Helper()
	s.now = s.now.Add(time.Millisecond)
	if _, err := s.rep.step(s.t.Context(), s.now, 0); err != nil {
		s.t.Fatal(err)
	}
}

// receive takes and applies all frames that are there, and acknowledges them.
func (s *scene) receive() []*frame.Frame {
	s.t.Helper()
	var got []*frame.Frame
	for {
		b, _ := s.out.take()
		if b == nil {
			break
		}
		f, err := frame.Parse(b)
		if err != nil {
			s.t.Fatal(err)
		}
		if err := errors.Join(f.Check(s.at), f.VerifyChain(s.at.Chain)); err != nil {
			s.t.Fatal(err)
		}
		raw, err := f.Payload(nil)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, x := range f.All() {
			if clear(s.far[x.Offset:x.End()]); x.What == dr.Data {
				copy(s.far[x.Offset:x.End()], raw[x.RawOff:])
			}
		}
		s.at = f.End()
		got = append(got, f)
	}
	s.out.acked(s.at.Position.Seq, s.at.Position.Seq, s.now)
	s.seen = append(s.seen, got...)
	return got
}

// untilExact steps until the stream is exact and everything has arrived.
func (s *scene) untilExact() {
	s.t.Helper()
	for range 1000 {
		s.step()
		s.receive()
		if s.rep.phase == Exact {
			return
		}
	}
	s.t.Fatalf("not exact: %+v", s.rep.sync)
}

func (s *scene) same() {
	s.t.Helper()
	if !bytes.Equal(s.far, s.src.Image(1)) {
		s.t.Error("the far side differs from the disk")
	}
}

func sector(v byte) []byte { return bytes.Repeat([]byte{v}, dr.SectorSize) }

func TestInitialSendsNoZeroes(t *testing.T) {
	s := newScene(t, 0)
	image := make([]byte, sceneDisk)
	copy(image[300<<10:], bytes.Repeat([]byte{7}, 8192))
	s.src.SetImage(1, image)
	s.connect()
	s.untilExact()
	s.same()
	var extents int
	for _, f := range s.seen {
		extents += f.Extents
	}
	if d := s.rep.disks[0]; extents != 1 || d.Sent != 8192 || d.Read != sceneDisk || d.Done != sceneDisk || d.Total != sceneDisk {
		t.Errorf("%d extents, %+v; want one extent of 8192 bytes", extents, d.DiskCounters)
	}
}

func TestResyncSendsZeroes(t *testing.T) {
	s := newScene(t, 40)
	for i := range s.far {
		s.far[i] = 9 // what the far side still holds
	}
	s.connect()
	s.untilExact()
	s.same()
	if f := s.seen[0]; f.Kind != frame.Resync || !f.Open || f.RawLen != 0 || f.First != 41 {
		t.Errorf("first frame %+v", f.Header)
	}
	if s.rep.why != ReasonInitial || s.seen[len(s.seen)-1].Open {
		t.Errorf("reason %q, last frame %+v", s.rep.why, s.seen[len(s.seen)-1].Header)
	}
}

// A write that was captured, but lands after the bulk read of its sectors, is
// what the far side ends up with.
func TestBulkReadOlderThanCapturedWrite(t *testing.T) {
	for _, blind := range []bool{false, true} {
		s := newScene(t, 0)
		s.rep.blind = blind
		s.src.SetImage(1, bytes.Repeat([]byte{1}, sceneDisk))
		s.connect()
		w := s.src.Submit(1, 4096, sector(2)) // captured, in flight
		s.untilExact()
		w.Land()
		if got := bytes.Equal(s.far, s.src.Image(1)); got == blind {
			t.Errorf("blind %v: equal %v", blind, got)
		}
	}
}

// A mark that was made while a Lost is on its way is not hidden by a captured
// write: the write that it stands for is newer.
func TestMarkHiddenByCapturedWrite(t *testing.T) {
	s := newScene(t, 0)
	s.src.SetImage(1, bytes.Repeat([]byte{1}, sceneDisk))
	s.connect()
	s.src.Write(1, 4096, sector(2))
	s.src.beforeTake = func() {
		s.src.Overflow()
		s.src.Write(1, 4096, sector(3)) // not captured
	}
	s.untilExact()
	s.same()
}

// An overflow while the agent waits for the source to settle in data mode.
func TestOverflowBeforeResume(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.src.beforeConsumed = func() {
		s.src.Overflow()
		s.src.Write(1, 0, sector(3))
	}
	s.untilExact()
	s.same()
	s.src.Write(1, 512, sector(4))
	s.now = s.now.Add(s.rep.tune.frameRest)
	s.step()
	s.receive()
	s.same()
}

func TestMarkKeepsStreamOpen(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	for !s.rep.sync.closing {
		s.src.beforeConsumed = func() { _ = s.src.Mark(dr.Extent{Disk: 1, Length: 4096}) }
		s.step()
		if s.rep.phase == Exact {
			t.Fatal("exact with a range still dirty")
		}
		if s.src.beforeConsumed == nil {
			break // the mark came while closing
		}
	}
	s.untilExact()
	s.same()
}

// A mark is noticed although the stream never rests.
func TestMarkUnderLoad(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.untilExact()
	s.far[8192] = 1 // whatever the reason
	if err := s.src.Mark(dr.Extent{Disk: 1, Offset: 8192, Length: 4096}); err != nil {
		t.Fatal(err)
	}
	for i := range 700 {
		s.src.Write(1, 0, sector(byte(i)))
		s.step()
		s.receive()
	}
	s.now = s.now.Add(s.rep.tune.frameRest) // for the last write
	s.untilExact()
	s.same()
	if s.rep.stats.syncs != 2 || s.rep.why != ReasonMarked {
		t.Errorf("%d syncs, the last because of %q", s.rep.stats.syncs, s.rep.why)
	}
}

func TestHeartbeatOnlyWhenAllIsSent(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.untilExact()
	s.seen = nil
	s.now = s.now.Add(time.Second)
	s.src.beforeConsumed = func() { s.src.Write(1, 0, sector(5)) }
	s.step()
	if got := s.receive(); len(got) != 0 {
		t.Fatalf("a %v frame went before a write that was older", got[0].Kind)
	}
	s.step()
	if got := s.receive(); len(got) != 1 || got[0].Kind != frame.Changes || got[0].Open {
		t.Fatalf("got %d frames", len(got))
	}
	for range 1100 {
		s.step()
	}
	if got := s.receive(); len(got) != 2 || got[0].Kind != frame.Heartbeat || got[0].Open {
		t.Errorf("%d frames in 1.1 s of silence, want 2 heartbeats", len(got))
	}
}

func TestTags(t *testing.T) {
	s := newScene(t, 0)
	tag := dr.Tag{ID: [16]byte{1}, Consistency: dr.Crash, Name: "before the upgrade"}
	s.rep.tags.ask(tag)
	s.connect()
	s.step()
	if got := s.receive(); len(got) > 0 && got[0].Kind == frame.TagKind {
		t.Fatal("tagged while syncing")
	}
	s.untilExact()
	s.rep.tags.ask(tag)
	s.src.Write(1, 0, sector(1))
	for range 3 {
		s.step()
		s.rep.tags.ask(tag)
		s.receive()
	}
	var tags []*frame.Frame
	for _, f := range s.seen {
		if f.Kind == frame.TagKind {
			tags = append(tags, f)
		}
	}
	if len(tags) != 1 || s.rep.tags.pending() {
		t.Fatalf("%d tags", len(tags))
	}
	got, err := tags[0].Tag()
	if err != nil || got != tag || s.rep.tags.placed[tag.ID] != tags[0].End().Position {
		t.Errorf("tag %+v at %v, %v; noted at %v", got, tags[0].End().Position, err, s.rep.tags.placed[tag.ID])
	}
	s.rep.tags.restart(dr.Position{Timeline: 1, Seq: tags[0].Prev})
	if s.rep.tags.ask(tag); !s.rep.tags.pending() {
		t.Error("a tag that got lost with the frames behind the cursor can't be asked for again")
	}
}

// A link that stores each frame at once is not sent each write alone: 20 writes in as many
// milliseconds are a frame at once and then one per frameRest.
func TestFramesOfAFastLinkRest(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.untilExact()
	s.now = s.now.Add(s.rep.tune.frameRest)
	before, writes, frames := s.rep.stats.frames, 2*int(s.rep.tune.frameRest/time.Millisecond), 0
	for i := range writes {
		s.src.Write(1, int64(i)*4096, bytes.Repeat([]byte{byte(i + 1)}, 4096))
		s.step() // a millisecond
		frames += len(s.receive())
		if i == 0 && frames != 1 {
			t.Errorf("a write after a pause: %d frames, want 1 at once", frames)
		}
		if w := s.rep.untilCut(); s.rep.cut.begun && w > s.rep.tune.frameRest {
			t.Errorf("write %d waits for %v", i, w)
		}
	}
	if n := s.rep.stats.frames - before; n < 2 || n > 3 {
		t.Errorf("%d writes are %d frames", writes, n)
	}
}

func TestFramesAreCut(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.untilExact()
	write := func(n int) {
		for i := range n {
			s.src.Write(1, int64(i)*4096, bytes.Repeat([]byte{byte(i + 1)}, 4096))
		}
	}
	s.now = s.now.Add(s.rep.tune.frameRest)
	write(1)
	s.step()
	if _, n := s.out.used(); n != 1 {
		t.Errorf("idle: %d frames, want 1 at once", n)
	}
	write(1)
	s.step()
	if _, n := s.out.used(); n != 1 {
		t.Errorf("one frame is on its way: %d frames, want 1", n)
	}
	s.now = s.now.Add(s.rep.tune.frameAge)
	s.step()
	if _, n := s.out.used(); n != 2 {
		t.Errorf("the frame is old: %d frames, want 2", n)
	}
	write(250)
	write(250)
	s.step()
	if _, n := s.out.used(); n != 3 {
		t.Errorf("2 MB of writes: %d frames, want one more", n)
	}
	s.receive()
	s.step()
	s.receive()
	s.same()
	for _, f := range s.seen {
		if f.RawLen > s.rep.tune.frameBytes+4096 {
			t.Errorf("a frame of %d bytes", f.RawLen)
		}
	}
}

func TestClockJumps(t *testing.T) {
	s := newScene(t, 0)
	s.connect()
	s.untilExact()
	for _, jump := range []time.Duration{10 * time.Minute, -2 * time.Hour, 0} {
		s.src.SetClock(func() int64 { return s.now.Add(jump).UnixNano() })
		s.src.Write(1, 0, sector(byte(jump)))
		s.step()
		s.now = s.now.Add(3 * time.Millisecond)
		s.receive()
		s.same()
	}
}

func TestReadErrorPausesSync(t *testing.T) {
	s := newScene(t, 0)
	s.src.SetImage(1, bytes.Repeat([]byte{1}, sceneDisk))
	s.connect()
	bad := &failing{hooked: s.src, left: 2}
	s.rep.src = bad
	s.step()
	if s.rep.sync.fault == nil {
		t.Fatal("no fault noted")
	}
	s.src.Write(1, 0, sector(3))
	s.step()
	if got := s.rep.disks[0].Writes; got != 1 {
		t.Errorf("%d writes taken while the disk can't be read, want 1", got)
	}
	s.now = s.now.Add(2 * time.Second)
	s.step()
	s.now = s.now.Add(2 * time.Second)
	s.untilExact()
	s.same()
	if s.rep.sync.fault != nil {
		t.Error("the fault stays")
	}
}

type failing struct {
	*hooked
	left int
}

func (f *failing) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	if f.left--; f.left >= 0 {
		return 0, dr.ErrUnavailable
	}
	return f.hooked.ReadAt(p, disk, off)
}

// However much is written while the link is down, the agent's memory stays
// within its bound; afterwards the far side catches up. Folding spares the source an overflow
// where the same places are written again and again.
func TestMemoryBound(t *testing.T) {
	t.Run("folded", func(t *testing.T) { memoryBound(t, true, 0) })
	t.Run("not folded", func(t *testing.T) { memoryBound(t, false, 1) })
}

func memoryBound(t *testing.T, fold bool, overflows uint64) {
	s := newScene(t, 0)
	s.rep.tune.fold = fold
	s.rep.tune.memory = 32 << 20
	s.src.SetRing(4 << 20)
	s.connect()
	s.untilExact()
	before := heap()
	var peak int64
	data := bytes.Repeat([]byte{1}, 64<<10)
	for i := range 4000 { // 250 MiB
		data[0] = byte(i)
		s.src.Write(1, int64(i%16)*(64<<10), data)
		if i%8 == 0 {
			s.step()
		}
		bytes, _ := s.out.used()
		peak = max(peak, bytes)
	}
	grown := heap() - before
	if peak > s.rep.tune.memory || grown > s.rep.tune.memory+16<<20 {
		t.Errorf("%d bytes waited, memory grew by %d; limit %d", peak, grown, s.rep.tune.memory)
	}
	if peak < 16<<20 {
		t.Errorf("only %d bytes of %d were used", peak, s.rep.tune.memory)
	}
	s.receive()
	s.step() // sees the Lost
	s.untilExact()
	for range 10 {
		s.step()
	}
	s.receive()
	s.same()
	if s.rep.stats.overflows != overflows || (s.rep.why == ReasonOverflow) != (overflows > 0) || (s.rep.stats.folds > 0) != fold {
		t.Errorf("%d overflows, %d folds, reason %q", s.rep.stats.overflows, s.rep.stats.folds, s.rep.why)
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestUnknownDisk(t *testing.T) {
	s := newScene(t, 0)
	err := s.rep.event(capture.Event{Kind: capture.Change, Extent: dr.Extent{Disk: 9, Length: 512}, What: dr.Zero})
	if !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("event of an unknown disk: %v", err)
	}
}

func BenchmarkStep(b *testing.B) {
	mem := capturetest.NewMem(capture.Disk{ID: 1, Size: 16 << 20})
	out := newOutbox()
	rep := newReplicator(mem, out, defaultTuning())
	out.resume(frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}, 0, ReasonInitial)
	data := bytes.Repeat([]byte{1, 2, 3, 4}, 1024)
	b.SetBytes(int64(len(data)))
	for i := 0; b.Loop(); i++ {
		mem.Write(1, int64(i%4096)*4096, data)
		if i%64 > 0 {
			continue
		}
		if _, err := rep.step(b.Context(), time.Now(), 0); err != nil {
			b.Fatal(err)
		}
		for f, _ := out.take(); f != nil; f, _ = out.take() {
		}
		out.acked(1<<60, 1<<60, time.Now())
	}
}

func BenchmarkInitial(b *testing.B) {
	const size = 64 << 20
	mem := capturetest.NewMem(capture.Disk{ID: 1, Size: size})
	mem.SetImage(1, bytes.Repeat([]byte{1, 2, 3, 4}, size/4))
	b.SetBytes(size)
	for b.Loop() {
		out := newOutbox()
		rep := newReplicator(mem, out, defaultTuning())
		out.resume(frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}, 0, ReasonInitial)
		for rep.phase != Exact {
			if _, err := rep.step(b.Context(), time.Now(), 0); err != nil {
				b.Fatal(err)
			}
			for f, _ := out.take(); f != nil; f, _ = out.take() {
			}
			out.acked(1<<60, 1<<60, time.Now())
		}
	}
}
