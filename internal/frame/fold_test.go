package frame

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
)

const testSectors = 48 // of each of the two test disks

// image is what frames make of two small disks.
type image [2][testSectors * dr.SectorSize]byte

func (m *image) apply(t testing.TB, f *Frame) {
	t.Helper()
	raw, err := f.Payload(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range f.All() {
		to := m[e.Disk][e.Offset:min(e.End(), testSectors*dr.SectorSize)]
		if e.What == dr.Data {
			copy(to, raw[e.RawOff:])
			continue
		}
		clear(to)
	}
}

// history makes n frames, each of a few extents; opens tells which are open.
func history(t testing.TB, seed uint64, n int) (out []*Frame) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 11))
	e := NewEncoder(start(), Codec(rng.IntN(3)))
	open, now := rng.IntN(3) == 0, int64(1000)
	for range n {
		if rng.IntN(6) == 0 {
			open = !open
		}
		now += int64(rng.IntN(50))
		if rng.IntN(5) == 0 {
			out = append(out, parsed(t)(e.Heartbeat(now, open)))
			continue
		}
		kind, acc := Changes, dr.Exact
		if open && rng.IntN(2) == 0 {
			kind, acc = Resync, dr.Epoch
		}
		e.Begin(kind, acc, open)
		for range 1 + rng.IntN(5) {
			addRandom(t, e, rng, now)
			now += int64(rng.IntN(3))
		}
		out = append(out, parsed(t)(e.Finish()))
	}
	return out
}

func addRandom(t testing.TB, e *Encoder, rng *rand.Rand, now int64) {
	t.Helper()
	off := rng.Int64N(testSectors)
	x := dr.Extent{Disk: dr.DiskID(rng.IntN(2)), Offset: off * dr.SectorSize, Length: (1 + rng.Int64N(min(12, testSectors-off))) * dr.SectorSize}
	what, data := dr.What(1+rng.IntN(3)), []byte(nil)
	if what == dr.Data {
		data = make([]byte, x.Length)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
	}
	if _, err := e.Add(x, what, now, data); err != nil {
		t.Fatal(err)
	}
}

func parsed(t testing.TB) func([]byte, error) *Frame {
	return func(b []byte, err error) *Frame {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		f, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
}

// folded merges as many of the frames as may be, with small bounds.
func folded(t testing.TB, run []*Frame, maxRaw, maxExtents int) (out []*Frame, n int) {
	t.Helper()
	x := NewFolding()
	x.maxRaw, x.maxExtents = maxRaw, maxExtents
	for _, f := range run {
		if !x.Add(f) {
			break
		}
	}
	n, _ = x.Plan()
	for k := range n {
		var f *Frame
		if x.Needs(k) {
			f = run[k]
		}
		b, err := x.Merge(f, ZstdFastest)
		if err != nil {
			t.Fatal(err)
		}
		if b != nil {
			out = append(out, parsed(t)(b, nil))
		}
	}
	if b, err := x.Finish(ZstdFastest); b != nil || err != nil {
		out = append(out, parsed(t)(b, err))
	}
	return out, n
}

// Applying the merged frames gives what applying the originals gives, wherever
// a point is offered; every cursor is one of the originals'.
func TestFoldedAppliesLikeTheOriginals(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		run := history(t, rapid.Uint64().Draw(rt, "seed"), rapid.IntRange(1, 40).Draw(rt, "frames"))
		maxRaw := rapid.SampledFrom([]int{4 << 10, 12 << 10, 30 << 10, MaxRaw}).Draw(rt, "raw")
		if rapid.IntRange(0, 4).Draw(rt, "again") == 0 { // what was merged may be merged again
			again, n := folded(t, run[:len(run)/2], 12<<10, MaxExtents)
			run = append(again, run[n:]...)
		}
		out, n := folded(t, run, maxRaw, rapid.SampledFrom([]int{24, MaxExtents}).Draw(rt, "extents"))
		if err := sameEffect(t, run[:n], out); err != nil {
			rt.Fatal(err)
		}
	})
}

// sameEffect compares merged frames with the run that they stand for.
func sameEffect(t testing.TB, run, out []*Frame) error {
	t.Helper()
	var want, got image
	ends := map[Cursor]bool{}
	for _, f := range run {
		want.apply(t, f)
		ends[f.End()] = true
	}
	at := Cursor{Machine: run[0].Machine, Position: dr.Position{Timeline: run[0].Timeline, Seq: run[0].Prev}}
	beats := out[0].Kind == Heartbeat
	for i, f := range out {
		last := i == len(out)-1
		if err := f.Check(at); err != nil {
			return err
		}
		at = f.End()
		got.apply(t, f)
		switch {
		case !ends[at]:
			return fmt.Errorf("frame %d ends at %v, where no original does", i, at.Position)
		case beats:
		case f.Accuracy != dr.Epoch, !f.Folded, f.Open == last && !run[len(run)-1].Open:
			return fmt.Errorf("frame %d of %d: %+v", i, len(out), f.Header)
		}
	}
	switch {
	case at != run[len(run)-1].End() || out[0].FirstTime != run[0].FirstTime:
		return errors.New("begin or end differ")
	case want != got:
		return errors.New("the disks differ")
	}
	return nil
}

// Data that a later frame overwrites is gone; the result does not depend on how the
// input was stored.
func TestFoldIsSmallAndCanonical(t *testing.T) {
	e := NewEncoder(start(), None)
	var run, packed []*Frame
	for i := range 100 {
		e.Begin(Changes, dr.Exact, false)
		e.Add(dr.Extent{Disk: 1, Offset: 4096 * int64(i%10), Length: 4096}, dr.Data, int64(i), fill(4096, uint64(i)))
		run = append(run, parsed(t)(e.Finish()))
		packed = append(packed, parsed(t)(run[i].Compress(ZstdBetter)))
	}
	a, n, err := Fold(run, S2Fast)
	b, _, err2 := Fold(packed, S2Fast)
	if err = errors.Join(err, err2); err != nil || n != 100 || len(a) != 1 || !bytes.Equal(a[0], b[0]) {
		t.Fatalf("%d frames of %d, %v", len(a), n, err)
	}
	f := parsed(t)(a[0], nil)
	if f.RawLen != 10*4096 || f.Extents != 10 || f.First != 1 || f.Last != 100 || f.LastTime != 99 || f.Extent(0).Seq != 91 {
		t.Errorf("%+v", f.Header)
	}
}

func TestWhatEndsARun(t *testing.T) {
	e := NewEncoder(start(), None)
	write := func(open bool) *Frame {
		e.Begin(Changes, dr.Exact, open)
		e.Add(dr.Extent{Length: 512}, dr.Data, 0, make([]byte, 512))
		return parsed(t)(e.Finish())
	}
	a, b := write(false), write(false)
	tag := parsed(t)(e.Tag(dr.Tag{Consistency: dr.Crash}, 0, false))
	c, open, open2 := write(false), write(true), write(true)
	beat := parsed(t)(e.Heartbeat(0, false))
	all := []*Frame{a, b, tag, c, open, open2, beat}
	for from, want := range []int{2, 1, 0, 1, 3, 2, 1} {
		x, n := NewFolding(), 0
		for n < len(all)-from && x.Add(all[from+n]) {
			n++
		}
		if n != want {
			t.Errorf("from %d: a run of %d, want %d", from, n, want)
		}
	}
	x := NewFolding()
	if !x.Add(a) || x.Add(tag) || x.Add(c) {
		t.Error("a gap was bridged")
	}
	if out, n, err := Fold([]*Frame{open, open2}, Plain); err != nil || n != 2 || !parsed(t)(out[0], nil).Open {
		t.Errorf("open frames alone: %d, %v", n, err)
	}
	if out, n, err := Fold([]*Frame{open, open2, beat}, Plain); err != nil || n != 3 || len(out) != 1 || parsed(t)(out[0], nil).Open {
		t.Errorf("the end of a sync: %d, %v", n, err)
	}
}

func TestMergeRefusesAnotherFrame(t *testing.T) {
	run := history(t, 4, 6)
	x := NewFolding()
	for _, f := range run {
		x.Add(f)
	}
	if n, _ := x.Plan(); n < 2 {
		t.Fatal(n)
	}
	if _, err := x.Finish(Plain); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("finish too early: %v", err)
	}
	if _, err := x.Merge(run[1], Plain); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("the second first: %v", err)
	}
}

// FuzzFold folds frames that a hostile peer may have made: whatever parses can be
// folded, and the result parses.
func FuzzFold(f *testing.F) {
	for seed := range uint64(3) {
		var all []byte
		for _, fr := range history(f, seed, 4) {
			all = append(all, fr.Bytes()...)
		}
		f.Add(all)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var run []*Frame
		for len(b) >= HeaderSize {
			h, err := ParseHeader(repaired(b))
			if err != nil || h.Size() > int64(len(b)) {
				break
			}
			fr, err := Parse(repaired(b[:h.Size()]))
			if err != nil {
				break
			}
			run, b = append(run, fr), b[h.Size():]
		}
		out, n, err := Fold(run, S2Fast)
		if err != nil {
			if !errors.Is(err, dr.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for i, o := range out {
			fr, err := Parse(o)
			if err == nil {
				err = fr.Verify()
			}
			if err != nil {
				t.Fatalf("made a bad frame: %v", err)
			}
			if last := i == len(out)-1; last && fr.End() != run[n-1].End() {
				t.Fatalf("ends at %v", fr.End())
			}
		}
	})
}

func BenchmarkFold(b *testing.B) {
	for _, hot := range []int64{256, 1 << 20} { // pages that are written again and again
		b.Run(fmt.Sprintf("%dMiB", hot>>8), func(b *testing.B) {
			e := NewEncoder(start(), Zstd)
			rng := rand.New(rand.NewPCG(1, 1))
			var run []*Frame
			page := fill(BlockSize, 1)[BlockSize-4096:]
			for range 64 {
				e.Begin(Changes, dr.Exact, false)
				for range 256 {
					e.Add(dr.Extent{Offset: rng.Int64N(hot) * 4096, Length: 4096}, dr.Data, 0, page)
				}
				run = append(run, parsed(b)(e.Finish()))
			}
			b.SetBytes(64 << 20)
			for b.Loop() {
				if _, _, err := Fold(run, ZstdFastest); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCompress(b *testing.B) {
	f := parsed(b)(encodeDatabase(), nil)
	for c := range MostCompression + 1 {
		b.Run(c.String(), func(b *testing.B) {
			b.SetBytes(int64(f.RawLen))
			for b.Loop() {
				out, err := f.Compress(c)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(len(out))/float64(f.RawLen), "ratio")
			}
		})
	}
}

// encodeDatabase makes a frame of pages as a database has them: rows of text and numbers.
func encodeDatabase() []byte {
	rng := rand.New(rand.NewPCG(5, 5))
	e := NewEncoder(start(), None)
	e.Begin(Changes, dr.Exact, false)
	for i := range 128 {
		var page []byte
		for len(page) < 8192 {
			page = fmt.Appendf(page, "%08d\x00\x01%d\x00%-40s", rng.IntN(1e6), rng.IntN(1e9), []string{"", "abalance", "filler"}[rng.IntN(3)])
		}
		e.Add(dr.Extent{Offset: int64(i) * 8192, Length: 8192}, dr.Data, 0, page[:8192])
	}
	b, _ := e.Finish()
	return b
}
