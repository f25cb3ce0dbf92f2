package vault

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// op is one change as the oracle remembers it.
type op struct {
	disk     dr.DiskID
	off, end int64
	data     []byte // nil: zero
	seq      dr.Seq
	time     int64
}

// oracle says what a history must read as.
type oracle struct {
	ops    []op
	frames []frame.Header
	tags   map[dr.Seq]string
}

func (o *oracle) add(f *frame.Frame) {
	payload, err := f.Payload(nil)
	if err != nil {
		panic(err)
	}
	o.frames = append(o.frames, f.Header)
	for _, x := range f.All() {
		p := op{disk: x.Disk, off: x.Offset, end: x.End(), seq: x.Seq, time: x.Time}
		if x.What == dr.Data {
			p.data = payload[x.RawOff:][:x.Length]
		}
		o.ops = append(o.ops, p)
	}
	if f.Kind == frame.TagKind {
		t, _ := f.Tag()
		o.tags[f.Last] = t.Name
	}
}

// read returns a range of a disk after change seq.
func (o *oracle) read(disk dr.DiskID, off, n int64, seq dr.Seq) []byte {
	buf := make([]byte, n)
	for _, p := range o.ops {
		if p.disk != disk || p.seq > seq || p.end <= off || p.off >= off+n {
			continue
		}
		from, to := max(p.off, off), min(p.end, off+n)
		if p.data == nil {
			clear(buf[from-off : to-off])
		} else {
			copy(buf[from-off:to-off], p.data[from-p.off:])
		}
	}
	return buf
}

// isPoint says whether a position can be recovered, folding aside.
func (o *oracle) isPoint(seq dr.Seq) bool {
	for _, h := range o.frames {
		if h.First <= seq && seq <= h.Last {
			return !h.Open && (h.Accuracy == dr.Exact || seq == h.Last)
		}
	}
	return false
}

// timeOf returns the time of a point.
func (o *oracle) timeOf(seq dr.Seq) int64 {
	for _, h := range o.frames {
		if h.Last == seq {
			return h.LastTime
		}
	}
	t := int64(0)
	for _, p := range o.ops {
		if p.seq <= seq {
			t = p.time
		}
	}
	return t
}

// truncate forgets what is behind a position.
func (o *oracle) truncate(end dr.Seq) {
	o.frames = slices.DeleteFunc(o.frames, func(h frame.Header) bool { return h.Last > end })
	o.ops = slices.DeleteFunc(o.ops, func(p op) bool { return p.seq > end })
}

func (o *oracle) clone() *oracle {
	return &oracle{ops: slices.Clone(o.ops), frames: slices.Clone(o.frames), tags: o.tags}
}

// source makes frames of random changes.
type source struct {
	rng   *rand.Rand
	enc   *frame.Encoder
	disks []dr.Disk
	now   int64
	hot   []int64 // offsets around which large disks are written
}

var testDisks = []dr.Disk{
	{ID: 0, Size: 1<<20 + 300<<10 + 512, Name: "small"},
	{ID: 3, Size: 5 << 20, Name: "middle"},
	{ID: 700, Size: 1 << 40, Name: "large"},
}

var testMachine = dr.MachineID{1, 2, 3}

func newSource(seed uint64, at frame.Cursor) *source {
	s := &source{rng: rand.New(rand.NewPCG(seed, 1)), disks: testDisks, now: max(at.Time, 1e9)}
	s.enc = frame.NewEncoder(at, []frame.Codec{frame.None, frame.Zstd, frame.S2}[s.rng.IntN(3)])
	s.hot = []int64{0, 256 << 20, 64 << 30, 1<<40 - 2<<20, 300<<30 - 12288}
	return s
}

// extent makes up a change; the large disk is changed near hot spots, but also
// zeroed in large pieces.
func (s *source) extent() (dr.Extent, dr.What) {
	d := s.disks[s.rng.IntN(len(s.disks))]
	base, room := int64(0), d.Size
	if d.Size > 100<<20 {
		base = s.hot[s.rng.IntN(len(s.hot))]
		room = min(2<<20, d.Size-base)
	}
	sectors := []int64{1, 1 + s.rng.Int64N(16), 8, 128, 1 + s.rng.Int64N(600)}[s.rng.IntN(5)]
	off := base + s.rng.Int64N(room/512)*512
	if s.rng.IntN(2) == 0 {
		off = off &^ 4095
	}
	x := dr.Extent{Disk: d.ID, Offset: off, Length: min(sectors*512, d.Size-off)}
	what := dr.Data
	if s.rng.IntN(5) == 0 {
		what = dr.Zero + dr.What(s.rng.IntN(2))
		if s.rng.IntN(3) == 0 { // large, aligned now and then
			x.Offset &^= []int64{0xfff, 1<<20 - 1, 1<<28 - 1}[s.rng.IntN(3)]
			x.Length = min([]int64{1 << 20, 2 << 20, 256 << 20, 64 << 30}[s.rng.IntN(4)], d.Size-x.Offset)
		}
	}
	if s.rng.IntN(20) == 0 && what == dr.Data { // a whole unit of 1 MiB
		x.Offset &^= 1<<20 - 1
		x.Length = min(1<<20, d.Size-x.Offset)
	}
	return x, what
}

func (s *source) data(n int64) []byte {
	b := make([]byte, n)
	for i := 0; i < len(b); i += 512 {
		v := byte(s.rng.Uint32())
		for j := i; j < i+512; j++ {
			b[j] = v + byte(j*int(v)>>3)
		}
	}
	return b
}

func (s *source) frame(kind frame.Kind, acc dr.Accuracy, open bool, changes int) *frame.Frame {
	s.enc.Begin(kind, acc, open)
	for range changes {
		x, what := s.extent()
		s.now += s.rng.Int64N(1000)
		var data []byte
		if what == dr.Data {
			data = s.data(x.Length)
		}
		if _, err := s.enc.Add(x, what, s.now, data); err != nil && !errors.Is(err, dr.ErrFull) {
			panic(err)
		}
	}
	return s.finish(s.enc.Finish())
}

func (s *source) finish(b []byte, err error) *frame.Frame {
	if err != nil {
		panic(err)
	}
	f, err := frame.Parse(b)
	if err != nil {
		panic(err)
	}
	return f
}

func (s *source) tag(name string, open bool) *frame.Frame {
	s.now += 100
	return s.finish(s.enc.Tag(dr.Tag{ID: [16]byte{9}, Consistency: dr.FileSystem, Name: name}, s.now, open))
}

func (s *source) heartbeat(open bool) *frame.Frame {
	s.now += 100
	return s.finish(s.enc.Heartbeat(s.now, open))
}

// anything makes a random frame.
func (s *source) anything() *frame.Frame {
	open := s.rng.IntN(4) == 0
	switch s.rng.IntN(8) {
	case 0:
		return s.tag(fmt.Sprintf("t%d", s.rng.IntN(5)), open)
	case 1:
		return s.heartbeat(open)
	case 2:
		return s.frame(frame.Resync, dr.Epoch, true, 1+s.rng.IntN(4))
	case 3:
		return s.frame(frame.Changes, dr.Epoch, open, 1+s.rng.IntN(6))
	}
	return s.frame(frame.Changes, dr.Exact, open, 1+s.rng.IntN(10))
}

// model drives a vault and an oracle side by side.
type model struct {
	mem    *vfs.Mem
	v      *Vault
	src    *source
	o      *oracle
	synced dr.Seq
	opts   Options
	held   []heldState
	branch *modelBranch
	acked  chan dr.Seq // of one: synced, for those who look from other goroutines; or nil
}

type heldState struct {
	s   *State
	seq dr.Seq
}

type modelBranch struct {
	b   *Branch
	src *source
	o   *oracle
}

type fataler interface {
	Fatalf(format string, args ...any)
	Helper()
}

func newModel(t fataler, seed uint64) *model {
	m := &model{
		mem: vfs.NewMem(), o: &oracle{tags: map[dr.Seq]string{}},
		opts: Options{SegmentSize: 200 << 10, SegmentSpan: 1 << 62},
	}
	if err := errors.Join(m.mem.MkdirAll("/vaults"), m.mem.SyncDir("/")); err != nil {
		t.Fatalf("%v", err)
	}
	v, err := Create(m.mem, "/vaults/m", testMachine, testDisks, m.opts)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	m.v = v
	m.src = newSource(seed, v.Log().Cursor())
	return m
}

func (m *model) append(t fataler, n int) {
	t.Helper()
	for range n {
		f := m.src.anything()
		if err := m.v.Log().Append(f); err != nil {
			t.Fatalf("append: %v", err)
		}
		m.o.add(f)
	}
}

func (m *model) sync(t fataler) {
	t.Helper()
	c, err := m.v.Log().Sync()
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	if m.synced = c.Position.Seq; m.synced != m.src.enc.Cursor().Position.Seq {
		t.Fatalf("synced through %d of %v", m.synced, m.src.enc.Cursor().Position)
	}
}

// reopened checks what a new Vault holds and goes on from there.
func (m *model) reopened(t fataler, seed uint64) {
	t.Helper()
	m.held, m.branch = nil, nil
	v, err := Open(context.Background(), m.mem, "/vaults/m", m.opts)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	m.v = v
	c := v.Log().Cursor()
	if c.Position.Seq < m.synced {
		t.Fatalf("log ends at %d, was synced through %d", c.Position.Seq, m.synced)
	}
	m.synced = c.Position.Seq
	m.o.truncate(c.Position.Seq)
	if n := len(m.o.frames); n > 0 && m.o.frames[n-1].End() != c {
		t.Fatalf("log ends with %+v, want %+v", c, m.o.frames[n-1].End())
	}
	m.src = newSource(seed, c)
}

func (m *model) close(t fataler) {
	t.Helper()
	if err := m.v.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// horizon is what can't be opened any more.
func (m *model) horizon() dr.Seq { p, _ := m.v.Horizon(); return p.Seq }

// checkPosition compares what a position reads as, or that it is refused.
func (m *model) checkPosition(t fataler, seq dr.Seq) {
	t.Helper()
	h := m.horizon()
	want := m.o.isPoint(seq) && seq <= m.synced && seq > h || seq == h && h > 0
	s, err := m.v.At(dr.Position{Timeline: 1, Seq: seq})
	if !want {
		if !errors.Is(err, dr.ErrNoPoint) {
			t.Fatalf("position %d (horizon %d, synced %d) opened: %v", seq, h, m.synced, err)
		}
		return
	}
	if err != nil {
		t.Fatalf("open %d (horizon %d, synced %d): %v", seq, h, m.synced, err)
	}
	defer s.Close()
	if seq > h {
		if p := s.Point(); p.Time != m.o.timeOf(seq) || p.Tag != m.o.tags[seq] && m.o.tags[seq] != "" && p.Tag != "" {
			t.Fatalf("point %+v, want time %d tag %q", p, m.o.timeOf(seq), m.o.tags[seq])
		}
	}
	compareState(t, m.o, s, seq, m.src.rng, 6)
}

// compareState reads random ranges, and all of the small disk.
func compareState(t fataler, o *oracle, s *State, seq dr.Seq, rng *rand.Rand, n int) {
	t.Helper()
	compareRange(t, o, s, seq, 0, 0, testDisks[0].Size)
	for range n {
		d := testDisks[rng.IntN(len(testDisks))]
		off := rng.Int64N(d.Size)
		if rng.IntN(8) > 0 && len(o.ops) > 0 { // where something was written
			p := o.ops[rng.IntN(len(o.ops))]
			d = testDisks[slices.IndexFunc(testDisks, func(d dr.Disk) bool { return d.ID == p.disk })]
			off = min(max(0, p.off+rng.Int64N(9000)-4500), d.Size-1)
		}
		compareRange(t, o, s, seq, d.ID, off, min(1+rng.Int64N(700<<10), d.Size-off))
	}
}

func compareRange(t fataler, o *oracle, s *State, seq dr.Seq, disk dr.DiskID, off, n int64) {
	t.Helper()
	got := make([]byte, n)
	for i := range got {
		got[i] = 0xee
	}
	if err := s.ReadAt(got, disk, off); err != nil {
		t.Fatalf("read disk %d at %d: %v", disk, off, err)
	}
	want := o.read(disk, off, n, seq)
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("position %d: disk %d differs at %d: got %#x, want %#x", seq, disk, off+int64(i), got[i], want[i])
	}
	at := off
	err := s.Map(disk, off, n, func(o2, n2 int64, zero bool) bool {
		if o2 != at || n2 <= 0 {
			t.Fatalf("map of disk %d from %d: got [%d,+%d) after %d", disk, off, o2, n2, at)
		}
		if at += n2; zero && !allZero(want[o2-off:at-off]) {
			t.Fatalf("map of disk %d calls [%d,%d) zero", disk, o2, at)
		}
		return true
	})
	if err != nil || at != off+n {
		t.Fatalf("map of disk %d [%d,%d) ended at %d: %v", disk, off, off+n, at, err)
	}
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func TestModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		m := newModel(rt, rapid.Uint64().Draw(rt, "seed"))
		seed := func() uint64 { return rapid.Uint64().Draw(rt, "seed") }
		position := func() dr.Seq {
			return dr.Seq(rapid.Uint64Range(0, uint64(m.src.enc.Cursor().Position.Seq)+1).Draw(rt, "seq"))
		}
		reopen := func() {
			m.close(rt)
			m.reopened(rt, seed())
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) { m.append(rt, rapid.IntRange(1, 6).Draw(rt, "frames")) },
			"sync":   func(rt *rapid.T) { m.sync(rt) },
			"check":  func(rt *rapid.T) { m.checkPosition(rt, position()) },
			"reopen": func(*rapid.T) { reopen() },
			"crash": func(rt *rapid.T) {
				old, mem := m.v, m.mem.Crash(seed())
				old.Close()
				m.mem = mem
				m.reopened(rt, seed())
			},
			"lose index": func(rt *rapid.T) {
				m.close(rt)
				if err := m.mem.RemoveAll("/vaults/m/index"); err != nil {
					rt.Fatalf("%v", err)
				}
				m.reopened(rt, seed())
			},
			"fold": func(rt *rapid.T) {
				at := rapid.Int64Range(1e9-1, m.src.now+1).Draw(rt, "time")
				before := m.horizon()
				if _, err := m.v.FoldTo(context.Background(), at); err != nil {
					rt.Fatalf("fold: %v", err)
				}
				if h := m.horizon(); h < before || h > before && !m.o.isPoint(h) {
					rt.Fatalf("horizon went from %d to %d", before, h)
				}
			},
			"hold": func(rt *rapid.T) {
				seq := position()
				if s, err := m.v.At(dr.Position{Timeline: 1, Seq: seq}); err == nil {
					m.held = append(m.held, heldState{s, seq})
				}
			},
			"look at held": func(rt *rapid.T) {
				for _, h := range m.held {
					compareState(rt, m.o, h.s, h.seq, m.src.rng, 2)
				}
			},
			"release": func(rt *rapid.T) {
				for _, h := range m.held {
					h.s.Close()
				}
				m.held = nil
			},
			"time": func(rt *rapid.T) { m.checkTime(rt, rapid.Int64Range(1e9-1, m.src.now+1).Draw(rt, "time")) },
			"prove": func(rt *rapid.T) {
				m.close(rt)
				m.prove(rt)
				m.reopened(rt, seed())
			},
			"branch":  func(rt *rapid.T) { m.stepBranch(rt, position()) },
			"discard": func(rt *rapid.T) { m.discard(rt) },
		})
		m.checkSpans(rt)
		reopen()
		for range 5 {
			m.checkPosition(rt, position())
		}
		m.discard(rt)
		m.close(rt)
		m.prove(rt)
	})
}

// prove checks the closed vault.
func (m *model) prove(t fataler) {
	t.Helper()
	r, err := Check(context.Background(), m.mem, "/vaults/m", nil)
	if err != nil || r.Findings != nil {
		t.Fatalf("check: %v, %v", err, r.Findings)
	}
}

// checkTime compares the point that a time resolves to.
func (m *model) checkTime(t fataler, at int64) {
	want, h := dr.Seq(0), m.horizon()
	for seq := h + 1; seq <= m.synced; seq++ {
		if m.o.isPoint(seq) && m.o.timeOf(seq) <= at {
			want = seq
		}
	}
	if _, ht := m.v.Horizon(); want == 0 && h > 0 && ht <= at {
		want = h
	}
	p, err := m.v.Resolve(SelectTime(at))
	if want == 0 && errors.Is(err, dr.ErrNoPoint) {
		return
	}
	if err != nil || p.Position.Seq != want || p.Time > at {
		t.Fatalf("time %d resolves to %+v (%v), want %d", at, p, err, want)
	}
}

// checkSpans compares the spans with what each position is.
func (m *model) checkSpans(t fataler) {
	spans, err := m.v.Spans()
	if err != nil {
		t.Fatalf("spans: %v", err)
	}
	next := m.horizon() + 1
	for i, s := range spans {
		if i > 0 && s.Open && spans[i-1].Open {
			t.Fatalf("spans %+v and %+v are one", spans[i-1], s)
		}
		if s.First.Seq != next || s.Last.Seq < s.First.Seq {
			t.Fatalf("span %+v, want it to begin at %d", s, next)
		}
		for ; next <= s.Last.Seq; next++ {
			i := slices.IndexFunc(m.o.frames, func(h frame.Header) bool { return h.First <= next && next <= h.Last })
			// Of an open span the accuracy is the lowest in it.
			if h := m.o.frames[i]; h.Open != s.Open || h.Accuracy != s.Accuracy && !s.Open || h.Accuracy > s.Accuracy {
				t.Fatalf("position %d in span %+v, its frame is %+v", next, s, h)
			}
		}
	}
	if next != m.synced+1 {
		t.Fatalf("spans end at %d, synced through %d", next-1, m.synced)
	}
}

// stepBranch makes a branch or writes to the one that is there.
func (m *model) stepBranch(t fataler, at dr.Seq) {
	if m.branch == nil {
		b, err := m.v.NewBranch(dr.Position{Timeline: 1, Seq: at}, 0)
		if errors.Is(err, dr.ErrNoPoint) {
			return
		}
		if err != nil {
			t.Fatalf("branch at %d: %v", at, err)
		}
		m.branch = &modelBranch{b, newSource(uint64(at), b.Cursor()), m.o.clone()}
		m.branch.o.truncate(at)
	}
	x := m.branch
	f := x.src.frame(frame.Changes, dr.Exact, false, 5)
	if err := x.b.Apply([]*frame.Frame{f}); err != nil {
		t.Fatalf("apply to branch: %v", err)
	}
	x.o.add(f)
	compareState(t, x.o, x.b.State(), f.Last, x.src.rng, 3)
}

func (m *model) discard(t fataler) {
	if m.branch != nil {
		m.branch.b.Close()
		m.branch = nil
	}
	for _, tl := range m.v.Branches() {
		if err := m.v.DiscardBranch(tl); err != nil {
			t.Fatalf("discard %d: %v", tl, err)
		}
	}
}
