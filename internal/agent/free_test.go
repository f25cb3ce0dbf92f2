package agent

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	blocks "farside/internal/compare"
	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/fsmap"
)

// simFree is what the file systems of a sim say is free.
type simFree struct {
	old   []extent.Range // what was free of the first disk before the capture began
	taken int            // maps
	bytes int64
}

// choose returns some blocks of a disk.
func (f *simFree) choose(rng *rand.Rand, d capture.Disk) (out []extent.Range) {
	for off := int64(0); off+4096 <= d.Size; off += 4096 {
		if rng.IntN(3) == 0 {
			out = append(out, extent.Range{Start: off, End: off + 4096})
		}
	}
	return out
}

// takeFree says that some blocks are free now: what they hold matters to nobody until they
// are written again. The disks of a sim have different sizes.
func (s *sim) takeFree(_ context.Context, d fsmap.Disk, _ ...fsmap.Kind) *fsmap.Map {
	m := &fsmap.Map{}
	for i, disk := range s.disksOf() {
		if disk.Size != d.Size {
			continue
		}
		free := s.free.old
		if !s.oldMap || i > 0 {
			s.tick++
			free = s.free.choose(s.rng, disk)
		}
		for _, r := range free {
			m.Free.Add(r.Start, r.End)
			if !s.oldMap {
				s.ops = append(s.ops, op{tick: s.tick, x: dr.Extent{Disk: disk.ID, Offset: r.Start, Length: r.Len()}, free: true})
			}
		}
	}
	s.free.taken++
	s.free.bytes += m.Free.Bytes()
	return m
}

// matter notes whether what x holds matters.
func (o *oracle) matter(x dr.Extent, does bool) {
	if o.idle[x.Disk] == nil {
		if does {
			return
		}
		if o.idle == nil {
			o.idle = make(map[dr.DiskID][]byte)
		}
		o.idle[x.Disk] = make([]byte, len(o.disks[x.Disk]))
	}
	v := byte(1)
	if does {
		v = 0
	}
	part := o.idle[x.Disk][x.Offset:x.End()]
	for i := range part {
		part[i] = v
	}
}

// holds reports whether b is what the disk holds, as far as it matters.
func (o *oracle) holds(id dr.DiskID, b []byte) bool {
	if o.idle[id] == nil || bytes.Equal(b, o.disks[id]) {
		return bytes.Equal(b, o.disks[id])
	}
	for i, v := range o.idle[id] {
		if v == 0 && b[i] != o.disks[id][i] {
			return false
		}
	}
	return true
}

// Leaving out what is free, in comparisons and for a far side that holds nothing, harms no
// point: all that was written behind the map is right.
func TestSparingAgainstOracle(t *testing.T) {
	taken, spared := 0, int64(0)
	rapid.Check(t, func(t *rapid.T) {
		o := drawOptions(t)
		o.compares, o.spares = true, true
		sim := newSim(o)
		if err := sim.run(); err != nil {
			t.Fatal(err)
		}
		taken, spared = taken+sim.free.taken, spared+sim.free.bytes
	})
	t.Logf("%d maps, %d bytes free", taken, spared)
	if spared == 0 {
		t.Error("nothing was free")
	}
}

// The check above has power: a map that is older than the capture is found.
func TestOracleFindsOldMaps(t *testing.T) {
	found := 0
	for seed := range uint64(40) {
		o := simOptions{seed: seed, steps: 400, disks: 1, written: 1000, room: 200 << 10}
		o.compares, o.reboots, o.spares, o.oldMap = true, true, true, true
		if err := newSim(o).run(); errors.Is(err, errMismatch) {
			found++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("found in %d of 40 histories", found)
	if found < 4 {
		t.Errorf("found in %d of 40 histories", found)
	}
}

func TestStretches(t *testing.T) {
	var free extent.Set
	free.Add(4096, 3*4096+100) // blocks 1 and 2
	free.Add(5*4096, 6*4096+512)
	want := []stretch{{0, 4096, false}, {4096, 3 * 4096, true}, {3 * 4096, 5 * 4096, false}, {5 * 4096, 6*4096 + 512, true}}
	if got := stretches(&free, 0, 6*4096+512, 4096); !reflect.DeepEqual(got, want) {
		t.Errorf("%v", got)
	}
	if got := stretches(nil, 8192, 4096, 4096); !reflect.DeepEqual(got, []stretch{{8192, 12288, false}}) {
		t.Errorf("nothing free: %v", got)
	}
}

func TestTold(t *testing.T) {
	d := capture.Disk{Path: "/dev/sda", Size: 1000}
	m := &fsmap.Map{Volumes: []fsmap.Volume{{Device: "/dev/sda1", Mount: "/", Kind: fsmap.Ext4}, {Err: errors.New("why not")}}}
	m.Free.Add(0, 600)
	if n := told(d, m); n.code != "free-blocks" || n.warn || !strings.Contains(n.text, "600 of 1000 bytes of /dev/sda are free, says ext4 on /") || !strings.Contains(n.text, "why not") {
		t.Errorf("%+v", n)
	}
	for _, m := range []*fsmap.Map{{}, {Volumes: m.Volumes[1:]}} {
		if n := told(d, m); n.code != "free-unknown" || !n.warn {
			t.Errorf("%+v", n)
		}
	}
}

// TestKindsAsked: what the far side holds already may be newer than the disk; xfs would mind.
func TestKindsAsked(t *testing.T) {
	both := []fsmap.Kind{fsmap.XFS, fsmap.Ext4}
	s := newSparing(both, fsmap.NewTaker(), driverEBPF, nil)
	if got := s.asked(true); !reflect.DeepEqual(got, both) {
		t.Errorf("over zeroes: %v", got)
	}
	if got := s.asked(false); !reflect.DeepEqual(got, []fsmap.Kind{fsmap.Ext4}) {
		t.Errorf("over something: %v", got)
	}
	if newSparing(nil, fsmap.NewTaker(), driverEBPF, nil) != nil || newSparing(both, fsmap.NewTaker(), driverScan, nil) != nil {
		t.Error("something is spared that can't be, or need not be")
	}
}

// sparingComparer compares one disk, of which the second half is free.
func sparingComparer(t *testing.T) (*comparer, *capturetest.Mem, int64) {
	const size = 64 << 16
	mem := capturetest.NewMem(capture.Disk{ID: 1, Size: size})
	t.Cleanup(func() { mem.Close() })
	c := newComparer(mem)
	c.spare = &sparing{kinds: []fsmap.Kind{fsmap.Ext4}, tell: func(notice) {}, take: func(context.Context, fsmap.Disk, ...fsmap.Kind) *fsmap.Map {
		m := &fsmap.Map{}
		m.Free.Add(size/2+1, size) // the first block of that half is used
		return m
	}}
	return c, mem, size
}

// reads counts what is read.
type reads struct {
	capture.Source
	bytes int64
}

func (r *reads) ReadAt(p []byte, d dr.DiskID, off int64) (int, error) {
	r.bytes += int64(len(p))
	return r.Source.ReadAt(p, d, off)
}

func TestFreeIsNotRead(t *testing.T) {
	c, mem, size := sparingComparer(t)
	r := &reads{Source: mem}
	c.src = r
	if err := c.Begin(dr.Position{}, []dr.DiskID{1}); err != nil {
		t.Fatal(err)
	}
	p, _ := c.claim()
	p.free = p.of.free.of(t.Context(), r, p.Disk)
	if err := c.look(p, make([]byte, c.read), func(int64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if want := size/2 + 1<<16; r.bytes != want {
		t.Errorf("%d bytes were read, want %d", r.bytes, want)
	}
	n := 0
	for _, k := range p.req.Kinds {
		if k == blocks.Skip {
			n++
		}
	}
	if _, err := p.req.Encode(); err != nil || n != 31 || len(p.req.Kinds) != 64 {
		t.Errorf("%d of %d blocks are skipped, %v", n, len(p.req.Kinds), err)
	}
	a := blocks.NewAnswer(p.req.Floor, 64)
	if done, err := c.settle(p, a.Encode(), nil); !done || err != nil || !c.Done() {
		t.Errorf("done %v, %v", done, err)
	}
	if done, total := c.Progress(); done != size || total != size {
		t.Errorf("%d of %d", done, total)
	}
}

// TestEmptyFarSide: what is used is marked, without a question and without a read.
func TestEmptyFarSide(t *testing.T) {
	c, mem, size := sparingComparer(t)
	if !c.Spares() {
		t.Fatal("spares nothing")
	}
	if err := c.BeginEmpty([]dr.DiskID{1}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- c.run(ctx, func(context.Context, []byte) ([]byte, error) { return nil, errors.New("asked") }, func() bool { return false }, 0)
	}()
	for !c.Done() {
		sleep(t.Context(), 1, nil)
	}
	cancel()
	<-done
	dirty, err := mem.Dirty()
	if err != nil || dirty < size/2+1 || dirty > size/2+1<<16 {
		t.Errorf("%d of %d bytes are dirty, %v", dirty, size, err)
	}
	if c.Spared(1) != size/2-1 {
		t.Errorf("%d spared", c.Spared(1))
	}
}
