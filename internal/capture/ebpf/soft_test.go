package ebpf

import (
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
)

// TestSoftModel compares with a set of sectors.
func TestSoftModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s softWrites
		model := map[[2]int64]bool{}
		extent := func() dr.Extent {
			return dr.Extent{
				Disk:   dr.DiskID(rapid.IntRange(1, 2).Draw(t, "disk")),
				Offset: rapid.Int64Range(0, 30).Draw(t, "sector") * 512, Length: rapid.Int64Range(1, 8).Draw(t, "sectors") * 512,
			}
		}
		for n := range uint64(rapid.IntRange(1, 40).Draw(t, "steps")) {
			x := extent()
			add := rapid.IntRange(0, 2).Draw(t, "step") == 0
			if add {
				s.add(softWrite{x, n, n})
			} else {
				s.cover(x)
			}
			for off := x.Offset; off < x.End(); off += 512 {
				if key := [2]int64{int64(x.Disk), off}; add {
					model[key] = true
				} else {
					delete(model, key)
				}
			}
			got := map[[2]int64]bool{}
			for i, w := range s.list {
				if w.extent.Length <= 0 || i > 0 && w.pos < s.list[i-1].pos {
					t.Fatalf("%+v", s.list)
				}
				for off := w.extent.Offset; off < w.extent.End(); off += 512 {
					got[[2]int64{int64(w.extent.Disk), off}] = true
				}
			}
			if len(got) != len(model) {
				t.Fatalf("%d sectors, want %d", len(got), len(model))
			}
			if (len(model) > 0) != s.due(1<<60) || s.hold(1<<60) < 1<<60 != (len(model) > 0) || s.due(0) && s.list[0].until > 0 {
				t.Fatalf("due %v, hold %d of %+v", s.due(1<<60), s.hold(1<<60), s.list)
			}
		}
	})
}
