package view

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vault"
	"farside/internal/vfs"
)

var (
	disks   = []dr.Disk{{ID: 1, Size: 3<<20 + 512, Name: "a"}, {ID: 2, Size: 1 << 40, Name: "b"}}
	machine = dr.MachineID{7}
	options = vault.Options{SegmentSize: 1 << 20, SegmentSpan: 1 << 62}
)

const dir = "/m"

// newVault makes a vault in which sectors 0 to 2047 of disk 1 hold their number, at position 1:2048.
func newVault(t fataler) (*vfs.Mem, *vault.Vault) {
	mem := vfs.NewMem()
	v, err := vault.Create(mem, dir, machine, disks, options)
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	e := frame.NewEncoder(v.Log().Cursor(), frame.Zstd)
	e.Begin(frame.Changes, dr.Exact, false)
	for n := range int64(2048) {
		x := dr.Extent{Disk: 1, Offset: n * 512, Length: 512}
		if _, err := e.Add(x, dr.Data, 1000+n, numbered(n)); err != nil {
			t.Fatalf("add: %v", err)
		}
	}
	b, _ := e.Finish()
	f, err := frame.Parse(b)
	if err == nil {
		err = v.Log().Append(f)
	}
	if err == nil {
		_, err = v.Log().Sync()
	}
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	return mem, v
}

func numbered(n int64) []byte { return bytes.Repeat([]byte{byte(n), byte(n >> 8), 0x55, 0xaa}, 128) }

type fataler interface {
	Fatalf(format string, args ...any)
}

func disk(t fataler, w *View, id dr.DiskID) *Disk {
	d, err := w.Disk(id)
	if err != nil {
		t.Fatalf("disk: %v", err)
	}
	return d
}

func TestReadOnly(t *testing.T) {
	_, v := newVault(t)
	defer v.Close()
	w, err := Open(v, dr.Position{Timeline: 1, Seq: 1000})
	if err != nil {
		t.Fatal(err)
	}
	d := disk(t, w, 1)
	buf := make([]byte, 512)
	for _, tc := range []struct {
		sector int64
		want   []byte
	}{{0, numbered(0)}, {999, numbered(999)}, {1000, make([]byte, 512)}, {6144, make([]byte, 512)}} {
		if _, err := d.ReadAt(buf, tc.sector*512); err != nil || !bytes.Equal(buf, tc.want) {
			t.Errorf("sector %d: %v, first bytes %x", tc.sector, err, buf[:4])
		}
	}
	if n, err := d.ReadAt(make([]byte, 1024), d.Size()-512); n != 512 || !errors.Is(err, io.EOF) {
		t.Errorf("read across the end: %d, %v", n, err)
	}
	if _, err := d.ReadAt(buf, -1); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("read before the start: %v", err)
	}
	_, err = d.WriteAt(buf, 0)
	for what, err := range map[string]error{"write": err, "zero": d.Zero(0, 512), "trim": d.Trim(0, 512)} {
		if !errors.Is(err, dr.ErrDenied) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if !d.ReadOnly() || !d.MultiConn() || w.Writable() || d.Flush() != nil || d.Info() != disks[0] || len(w.Disks()) != 2 {
		t.Error("a read-only disk says what it is not")
	}
	if _, err := w.Disk(9); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("unknown disk: %v", err)
	}
	for _, err := range []error{w.Close(), w.Close(), w.Discard()} {
		if err != nil {
			t.Errorf("close: %v", err)
		}
	}
	for _, open := range []func() error{
		func() error { _, err := Open(v, dr.Position{Timeline: 1, Seq: 9999}); return err },
		func() error { _, err := OpenWritable(v, dr.Position{Timeline: 1, Seq: 9999}, 0); return err },
	} {
		if err := open(); !errors.Is(err, dr.ErrNoPoint) {
			t.Errorf("open what is no point: %v", err)
		}
	}
	if _, err := Reopen(v, 77); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("reopen unknown branch: %v", err)
	}
}

// TestModel writes to a branch and compares each read with plain memory.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		mem, v := newVault(rt)
		w, err := OpenWritable(v, dr.Position{Timeline: 1, Seq: 2048}, 0)
		if err != nil {
			rt.Fatalf("open: %v", err)
		}
		tl := w.Timeline()
		want := make([]byte, disks[0].Size)
		for n := range int64(2048) {
			copy(want[n*512:], numbered(n))
		}
		flushed := bytes.Clone(want)
		ranges := func(rt *rapid.T) (off, n int64) {
			sectors := disks[0].Size / 512
			from := rapid.Int64Range(0, sectors-1).Draw(rt, "sector")
			n = rapid.Int64Range(1, min(sectors-from, rapid.SampledFrom([]int64{4, 20, 3000}).Draw(rt, "max"))).Draw(rt, "sectors")
			return from * 512, n * 512
		}
		flush := func(rt *rapid.T) {
			if err := w.Flush(); err != nil {
				rt.Fatalf("flush: %v", err)
			}
			copy(flushed, want)
		}
		reopen := func(rt *rapid.T, fsys *vfs.Mem) {
			v2, err := vault.Open(context.Background(), fsys, dir, options)
			if err != nil {
				rt.Fatalf("open vault: %v", err)
			}
			mem, v = fsys, v2
			if w, err = Reopen(v, tl); err != nil {
				rt.Fatalf("reopen: %v", err)
			}
		}
		read := func(rt *rapid.T) {
			got := make([]byte, len(want))
			if _, err := disk(rt, w, 1).ReadAt(got, 0); err != nil {
				rt.Fatalf("read: %v", err)
			}
			if i := differ(got, want); i >= 0 {
				rt.Fatalf("differs at %d: %#x, want %#x", i, got[i], want[i])
			}
			off, n := ranges(rt)
			off, n = off+3, n-7 // unaligned
			if _, err := disk(rt, w, 1).ReadAt(got[:n], off); err != nil || !bytes.Equal(got[:n], want[off:off+n]) {
				rt.Fatalf("read at %d: %v", off, err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				off, n := ranges(rt)
				p := bytes.Repeat([]byte{rapid.Byte().Draw(rt, "byte")}, int(n))
				if got, err := disk(rt, w, 1).WriteAt(p, off); int64(got) != n || err != nil {
					rt.Fatalf("write: %d, %v", got, err)
				}
				copy(want[off:], p)
			},
			"zero": func(rt *rapid.T) {
				off, n := ranges(rt)
				if err := disk(rt, w, 1).Zero(off, n); err != nil {
					rt.Fatalf("zero: %v", err)
				}
				clear(want[off : off+n])
			},
			"trim all": func(rt *rapid.T) {
				if err := errors.Join(disk(rt, w, 1).Trim(0, disks[0].Size), disk(rt, w, 2).Trim(0, disks[1].Size)); err != nil {
					rt.Fatalf("trim: %v", err)
				}
				clear(want)
			},
			"flush": flush,
			"read":  read,
			"map": func(rt *rapid.T) {
				at := int64(0)
				err := disk(rt, w, 1).Map(0, disks[0].Size, func(off, n int64, zero, hole bool) error {
					if off != at || zero != hole || zero && differ(want[off:off+n], make([]byte, n)) >= 0 {
						rt.Fatalf("map [%d,+%d) zero=%v", off, n, zero)
					}
					at += n
					return nil
				})
				if err != nil || at != disks[0].Size {
					rt.Fatalf("map ended at %d: %v", at, err)
				}
				copy(flushed, want) // Map flushes
			},
			"restart": func(rt *rapid.T) {
				if err := errors.Join(w.Close(), v.Close()); err != nil {
					rt.Fatalf("close: %v", err)
				}
				copy(flushed, want)
				reopen(rt, mem)
			},
			"crash": func(rt *rapid.T) {
				crashed := mem.Crash(rapid.Uint64().Draw(rt, "seed"))
				v.Close()
				reopen(rt, crashed)
				// Frames that were not flushed were never appended, so exactly the flushed remain.
				copy(want, flushed)
			},
		})
		read(rt)
		if err := w.Discard(); err != nil {
			rt.Fatalf("discard: %v", err)
		}
		if left := v.Branches(); len(left) != 0 {
			rt.Fatalf("branches %v remain", left)
		}
		if err := v.Close(); err != nil {
			rt.Fatalf("close: %v", err)
		}
	})
}

func differ(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestConcurrent has workers write, read back, flush and map disks of one view
// at once, while the stream goes on and is folded.
func TestConcurrent(t *testing.T) {
	_, v := newVault(t)
	defer v.Close()
	w, err := OpenWritable(v, dr.Position{Timeline: 1, Seq: 2048}, 0)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	const workers, region = 6, 512 << 10
	for n := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(n), 0))
			d := disk(t, w, dr.DiskID(1+n%2))
			start := int64(n) * region
			want := make([]byte, region)
			if _, err := d.ReadAt(want, start); err != nil && !errors.Is(err, io.EOF) {
				t.Error(err)
				return
			}
			for i := range 60 {
				off := rng.Int64N(region/512-64) * 512
				p := bytes.Repeat([]byte{byte(i)}, 512*(1+rng.IntN(64)))
				if _, err := d.WriteAt(p, start+off); err != nil {
					t.Error(err)
				}
				copy(want[off:], p)
				if i%10 == 3 {
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
				}
				got := make([]byte, region)
				if _, err := d.ReadAt(got, start); err != nil || !bytes.Equal(got, want) {
					t.Errorf("worker %d, round %d: %v, differs at %d", n, i, err, differ(got, want))
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if err := disk(t, w, 1).Map(0, 1<<20, func(_, _ int64, _, _ bool) error { return nil }); err != nil {
				t.Error(err)
			}
			if _, err := v.FoldTo(context.Background(), 1<<62); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// TestBranchesApart shows that neither the parent nor another branch sees what
// a branch writes.
func TestBranchesApart(t *testing.T) {
	_, v := newVault(t)
	defer v.Close()
	at := dr.Position{Timeline: 1, Seq: 1500}
	a, err1 := OpenWritable(v, at, 0)
	b, err2 := OpenWritable(v, at, 0)
	ro, err3 := Open(v, at)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	mine := bytes.Repeat([]byte{1}, 512)
	if _, err := disk(t, a, 1).WriteAt(mine, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.Flush(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		w    *View
		want []byte
	}{"a": {a, mine}, "b": {b, numbered(0)}, "parent": {ro, numbered(0)}} {
		got := make([]byte, 512)
		if _, err := disk(t, tc.w, 1).ReadAt(got, 0); err != nil || !bytes.Equal(got, tc.want) {
			t.Errorf("%s reads %x (%v)", name, got[:4], err)
		}
	}
	if err := v.DiscardBranch(a.Timeline()); !errors.Is(err, dr.ErrDenied) {
		t.Errorf("discard of an open branch: %v", err)
	}
	if _, err := disk(t, a, 1).WriteAt(mine[:100], 0); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("unaligned write: %v", err)
	}
	for _, err := range []error{a.Discard(), b.Close(), ro.Close()} {
		if err != nil {
			t.Error(err)
		}
	}
	if _, err := disk(t, b, 1).WriteAt(mine, 0); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("write after close: %v", err)
	}
}

// TestFlushFails shows that a failed flush is told, keeps what was written
// readable, and leaves the branch as of the last good flush.
func TestFlushFails(t *testing.T) {
	mem, v := newVault(t)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	var broken bool
	gone := errors.New("disk is gone")
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if broken && op.Kind.Changes() {
			return gone
		}
		return nil
	})
	v, err := vault.Open(context.Background(), fsys, dir, options)
	if err != nil {
		t.Fatal(err)
	}
	w, err := OpenWritable(v, dr.Position{Timeline: 1, Seq: 2048}, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, tl := disk(t, w, 1), w.Timeline()
	good, bad := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	if _, err := d.WriteAt(good, 0); err != nil || d.Flush() != nil {
		t.Fatal("first flush", err)
	}
	if _, err := d.WriteAt(bad, 0); err != nil {
		t.Fatal(err)
	}
	broken = true
	if err := d.Flush(); !errors.Is(err, gone) {
		t.Fatalf("flush: %v", err)
	}
	if _, err := d.WriteAt(bad, 0); !errors.Is(err, gone) {
		t.Errorf("write after a failed flush: %v", err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, bad) {
		t.Errorf("read after a failed flush: %v", err)
	}
	broken = false
	w.Close()
	v.Close()
	if v, err = vault.Open(context.Background(), mem, dir, options); err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if w, err = Reopen(v, tl); err != nil {
		t.Fatal(err)
	}
	if _, err := disk(t, w, 1).ReadAt(got, 0); err != nil || !bytes.Equal(got, good) {
		t.Errorf("read after reopening: %v, first byte %d", err, got[0])
	}
}
