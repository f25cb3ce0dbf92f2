package segment

import (
	"errors"
	"testing"

	"farside/internal/frame"
	"farside/internal/vfs"
)

// fillUntil appends and syncs in groups until an error, and seals in the end.
func fillUntil(w *Writer, frames []*frame.Frame) (synced int, err error) {
	for i, f := range frames {
		if _, err := w.Append(f); err != nil {
			return synced, err
		}
		if i%3 == 2 {
			if err := w.Sync(); err != nil {
				return synced, err
			}
			synced = i + 1
		}
	}
	if err := w.Seal(); err != nil {
		return synced, err
	}
	return len(frames), nil
}

// Each call fails in turn, cleanly or after a part of a write: the error
// surfaces, and after reopening nothing that was synced is lost, with and without a power cut.
func TestFaultEverywhere(t *testing.T) {
	frames := stream(t, origin, 7, 7)
	for _, part := range []int64{0, 1, 512, 1 << 20} {
		for stop := 1; ; stop++ {
			if done := faultAt(t, frames, stop, part); done {
				break
			}
		}
	}
}

func faultAt(t *testing.T, frames []*frame.Frame, stop int, part int64) (done bool) {
	t.Helper()
	boom := errors.New("boom")
	n := 0
	mem := vfs.NewMem()
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if n++; n == stop {
			return &vfs.ShortWrite{N: part, Err: boom}
		}
		return nil
	})
	w, err := Create(fsys, "/", origin)
	surfaced := err != nil
	if surfaced {
		if !errors.Is(err, boom) {
			t.Fatalf("call %d: %v", stop, err)
		}
		if w, err = Create(fsys, "/", origin); err != nil {
			t.Fatalf("call %d: once more after a failed creation: %v", stop, err)
		}
	}
	synced, err := fillUntil(w, frames)
	switch {
	case err == nil && n < stop:
		return true // every call has failed once
	case err == nil && !surfaced:
		t.Fatalf("call %d failed and no one said so", stop)
	case err != nil && !errors.Is(err, boom):
		t.Fatalf("call %d: %v", stop, err)
	}
	reopen(t, mem, frames, synced)
	for seed := range uint64(4) {
		reopen(t, mem.Crash(seed), frames, synced)
	}
	return false
}

// reopen checks that the synced frames are there and that the segment goes on.
func reopen(t *testing.T, fsys vfs.FS, frames []*frame.Frame, synced int) {
	t.Helper()
	r := must(Open(fsys, "/", Name(origin)))
	defer r.Close()
	if r.Sealed() {
		verify(t, r, frames)
		return
	}
	w := must(Recover(fsys, "/", Name(origin)))
	got := len(w.Reader().Entries())
	if got < synced {
		t.Fatalf("%d frames left of %d synced", got, synced)
	}
	verify(t, w.Reader(), frames[:got])
	fill(t, w, frames[got:])
	if err := errors.Join(w.Reader().Check(t.Context()), w.Seal()); err != nil {
		t.Fatal(err)
	}
}

// A failed Append changes nothing: the same writer takes the frame again, or another.
func TestAppendAgainAfterFailure(t *testing.T) {
	mem, boom := vfs.NewMem(), errors.New("boom")
	failing := false
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if failing && op.Kind == vfs.OpWrite {
			return &vfs.ShortWrite{N: 700, Err: boom}
		}
		return nil
	})
	w := must(Create(fsys, "/", origin))
	frames := stream(t, origin, 9, 8)
	for i, f := range frames {
		failing = true
		if _, err := w.Append(bigFrame(t, w.Cursor(), 8192, 9)); !errors.Is(err, boom) {
			t.Fatal(err)
		}
		failing = false
		must(w.Append(f))
		if i%2 == 0 {
			if err := w.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	verify(t, w.Reader(), frames)
	r := must(Open(mem, "/", Name(origin)))
	if verify(t, r, frames); r.Torn() != 0 {
		t.Errorf("%d bytes torn", r.Torn())
	}
}

// pageCache is a file system whose fsync, when it fails, forgets what was to be
// written, as Linux does: reads still show it, and the next fsync succeeds
// without it. Files are created once and not renamed.
type pageCache struct {
	vfs.FS // what reads show
	disk   *vfs.Mem
	dirty  map[string][][2]int64
	failed error // of the next Sync
}

type cachedFile struct {
	vfs.File
	c    *pageCache
	name string
}

func (c *pageCache) Create(name string) (vfs.File, error) {
	f, err := c.FS.Create(name)
	must(c.disk.Create(name))
	return &cachedFile{f, c, name}, errors.Join(err, c.disk.SyncDir("/"))
}

func (c *pageCache) OpenFile(name string) (vfs.File, error) {
	f, err := c.FS.OpenFile(name)
	return &cachedFile{f, c, name}, err
}

func (f *cachedFile) WriteAt(p []byte, off int64) (int, error) {
	f.c.dirty[f.name] = append(f.c.dirty[f.name], [2]int64{off, int64(len(p))})
	return f.File.WriteAt(p, off)
}

func (f *cachedFile) Sync() error {
	dirty := f.c.dirty[f.name]
	delete(f.c.dirty, f.name)
	if err := f.c.failed; err != nil {
		f.c.failed = nil
		return err
	}
	disk := must(f.c.disk.OpenFile(f.name))
	size := must(f.Size())
	for _, x := range dirty {
		b := make([]byte, max(0, min(x[1], size-x[0])))
		must(f.ReadAt(b, x[0]))
		must(disk.WriteAt(b, x[0]))
	}
	return errors.Join(disk.Truncate(size), disk.Sync())
}

// After a failed fsync the page cache shows what the disk lacks, and the next
// fsync reports success. What a restarted program recovers must be on the disk all the same.
func TestRecoverAfterFailedSync(t *testing.T) {
	eio := errors.New("input/output error")
	for failAt := range 4 {
		c := &pageCache{FS: vfs.NewMem(), disk: vfs.NewMem(), dirty: map[string][][2]int64{}}
		w := must(Create(c, "/", origin))
		frames := stream(t, origin, 12, uint64(20+failAt))
		for i, f := range frames[:3*(failAt+1)] {
			must(w.Append(f))
			if i%3 != 2 {
				continue
			}
			if i/3 == failAt {
				c.failed = eio
			}
			if err := w.Sync(); errors.Is(err, eio) != (i/3 == failAt) {
				t.Fatalf("sync of group %d: %v", i/3, err)
			}
		}
		again := must(Recover(c, "/", Name(origin)))
		if err := again.Sync(); err != nil {
			t.Fatal(err)
		}
		r := must(Open(c.disk, "/", Name(origin)))
		if r.End() != again.Cursor() {
			t.Errorf("group %d: the disk ends at %v, the recovered segment said %v", failAt, r.End().Position, again.Cursor().Position)
		}
	}
}
