package vault

import (
	"errors"
	"path"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

const vaultDir = "/vaults/m"

// A vault whose newest durable bytes are gone opens with what is left, says so, is
// whole, and takes what follows that.
func TestLostEnd(t *testing.T) {
	fsys := vfs.NewMem()
	v, err := Create(fsys, vaultDir, dr.NewMachineID(), testDisks, Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := newSource(7, v.Head())
	fill := func(v *Vault) {
		t.Helper()
		for range 60 {
			if err := v.Log().Append(s.frame(frame.Changes, dr.Exact, false, 3)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := v.Log().Sync(); err != nil {
			t.Fatal(err)
		}
	}
	fill(v)
	before := v.Head().Position
	m := v.manifest.Load()
	segment := m.Segments[len(m.Segments)-1]
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	dir, name := segment.key().file()
	truncate(t, fsys, path.Join(vaultDir, dir, name), 0.4)
	v, err = Open(t.Context(), fsys, vaultDir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	left := v.Head().Position
	if left.Seq >= before.Seq || left.Seq == 0 {
		t.Errorf("head at %v, was at %v", left, before)
	}
	if lost := v.Lost(); len(lost) != 1 || !errors.Is(lost[0], dr.ErrCorrupt) {
		t.Errorf("lost: %v", lost)
	}
	if _, err := v.Resolve(SelectPosition(before)); err == nil {
		t.Error("a position that is gone can be recovered")
	}
	s = newSource(8, v.Head())
	fill(v)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	mustCheck(t, fsys)
	if v, err = Open(t.Context(), fsys, vaultDir, Options{}); err != nil || len(v.Lost()) != 0 {
		t.Fatalf("opened again: %v, %v", v.Lost(), err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, fsys vfs.FS, name string, share float64) {
	t.Helper()
	f, err := fsys.OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	info, err := fsys.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(int64(float64(info.Size)*share)), f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}
