package capture

import (
	"errors"
	"reflect"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
)

func TestBitmapRanges(t *testing.T) {
	disks := []Disk{{ID: 3, Size: 10*4096 + 512}, {ID: 1, Size: 300 * 4096}}
	b, err := NewBitmap(disks, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []dr.Extent{
		{Disk: 3, Offset: 512, Length: 512},
		{Disk: 3, Offset: 4095, Length: 2}, // touches two blocks
		{Disk: 3, Offset: 10 * 4096, Length: 512},
		{Disk: 1, Offset: 63 * 4096, Length: 130 * 4096}, // three words and a bit
		{Disk: 1, Offset: 100, Length: 0},
	} {
		if err := b.Mark(x); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := b.Dirty(), int64(2*4096+512+130*4096); got != want {
		t.Errorf("dirty %d, want %d", got, want)
	}
	want := []dr.Extent{
		{Disk: 3, Offset: 0, Length: 8192},
		{Disk: 3, Offset: 10 * 4096, Length: 512},
		{Disk: 1, Offset: 63 * 4096, Length: 130 * 4096},
	}
	if got := b.Take(1 << 40); !reflect.DeepEqual(got, want) {
		t.Errorf("take: %v, want %v", got, want)
	}
	if got := b.Take(1 << 40); got != nil || b.Dirty() != 0 {
		t.Errorf("take again: %v, dirty %d", got, b.Dirty())
	}
}

// TestBitmapNoted: what is noted is in the set still, and what is marked meanwhile in
// the same word stays.
func TestBitmapNoted(t *testing.T) {
	b, err := NewBitmap([]Disk{{ID: 1, Size: 1 << 20}}, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b.TakeNoted(1<<20, func([]dr.Extent) { t.Error("noted nothing") }) != nil {
		t.Error("took something of nothing")
	}
	mark := func(off int64) {
		if err := b.Mark(dr.Extent{Disk: 1, Offset: off, Length: 1}); err != nil {
			t.Error(err)
		}
	}
	mark(4096)
	mark(8 * 4096)
	var noted []dr.Extent
	got := b.TakeNoted(2*4096, func(xs []dr.Extent) {
		noted = append(noted, xs...)
		if n := b.Dirty(); n != 2*4096 {
			t.Errorf("%d bytes dirty while noted", n)
		}
		mark(2 * 4096)
	})
	want := []dr.Extent{{Disk: 1, Offset: 4096, Length: 4096}, {Disk: 1, Offset: 8 * 4096, Length: 4096}}
	if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(noted, want) || b.Dirty() != 4096 {
		t.Errorf("took %v, noted %v, %d bytes left", got, noted, b.Dirty())
	}
}

func TestBitmapRefuses(t *testing.T) {
	for _, block := range []int64{0, 256, 4095, 12288} {
		if _, err := NewBitmap(nil, block, nil); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("block size %d: %v", block, err)
		}
	}
	disks := []Disk{{ID: 1, Size: 1 << 20}}
	if _, err := NewBitmap(disks, 4096, make([]uint64, 3)); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("too few words: %v", err)
	}
	b, err := NewBitmap(disks, 4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []dr.Extent{{Disk: 1, Offset: -512, Length: 512}, {Disk: 1, Offset: 1 << 20, Length: 512}, {Disk: 1, Offset: 0, Length: -1}} {
		if err := b.Mark(x); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("mark %v: %v", x, err)
		}
	}
	if err := b.Mark(dr.Extent{Disk: 2, Length: 512}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("mark of a foreign disk: %v", err)
	}
}

// TestBitmapModel compares with a set of blocks, taking in small steps.
func TestBitmapModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const block = 1024
		disks := []Disk{
			{ID: 7, Size: rapid.Int64Range(1, 400).Draw(t, "size") * 512},
			{ID: 2, Size: rapid.Int64Range(1, 400).Draw(t, "size") * 512},
		}
		b, err := NewBitmap(disks, block, nil)
		if err != nil {
			t.Fatal(err)
		}
		type key struct {
			disk  dr.DiskID
			block int64
		}
		model := make(map[key]int64) // block to its size
		size := func() (sum int64) {
			for _, n := range model {
				sum += n
			}
			return sum
		}
		take := func(limit int64) {
			var sum int64
			for _, x := range b.Take(limit) {
				for off := x.Offset; off < x.End(); off += block {
					k := key{x.Disk, off / block}
					if model[k] != min(block, x.End()-off) {
						t.Fatalf("took %v: block %d: want %d bytes", x, off/block, model[k])
					}
					sum += model[k]
					delete(model, k)
				}
			}
			if sum == 0 && size() > 0 || sum > max(limit, block) {
				t.Fatalf("took %d bytes of %d, limit %d", sum, size(), limit)
			}
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "take?") {
				take(rapid.Int64Range(0, 20*block).Draw(t, "limit"))
				continue
			}
			d := disks[rapid.IntRange(0, 1).Draw(t, "disk")]
			off := rapid.Int64Range(0, d.Size-1).Draw(t, "off")
			n := rapid.Int64Range(1, d.Size-off).Draw(t, "len")
			if err := b.Mark(dr.Extent{Disk: d.ID, Offset: off, Length: n}); err != nil {
				t.Fatal(err)
			}
			for i := off / block; i*block < off+n; i++ {
				model[key{d.ID, i}] = min(block, d.Size-i*block)
			}
			if b.Dirty() != size() {
				t.Fatalf("dirty %d, want %d", b.Dirty(), size())
			}
		}
		for size() > 0 {
			take(3 * block)
		}
	})
}

// TestBitmapConcurrent: whatever is marked is taken, by one or the other.
func TestBitmapConcurrent(t *testing.T) {
	const blocks, block = 1 << 12, 4096
	b, err := NewBitmap([]Disk{{ID: 1, Size: blocks * block}}, block, nil)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	taken := make([][]bool, 3)
	done := make(chan struct{})
	for i := range taken {
		taken[i] = make([]bool, blocks)
		wg.Go(func() {
			for last := false; ; {
				for _, x := range b.Take(16 * block) {
					for o := x.Offset; o < x.End(); o += block {
						taken[i][o/block] = true
					}
				}
				if last && b.Dirty() == 0 {
					return
				}
				select {
				case <-done:
					last = true
				default:
				}
			}
		})
	}
	var markers sync.WaitGroup
	for m := range 4 {
		markers.Go(func() {
			for i := int64(m); i < blocks; i += 4 {
				if err := b.Mark(dr.Extent{Disk: 1, Offset: i * block, Length: block}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	markers.Wait()
	close(done)
	wg.Wait()
	for i := range blocks {
		if !taken[0][i] && !taken[1][i] && !taken[2][i] {
			t.Fatalf("block %d was marked and never taken", i)
		}
	}
}

func TestStrings(t *testing.T) {
	for want, got := range map[string]string{
		"change": Change.String(), "flush": Flush.String(), "lost": Lost.String(), "event(9)": EventKind(9).String(),
		"data": ModeData.String(), "bitmap": ModeBitmap.String(), "mode(9)": Mode(9).String(),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
