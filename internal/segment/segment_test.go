package segment

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var origin = frame.Cursor{Machine: dr.MachineID{7}, Position: dr.Position{Timeline: 1}}

// stream makes n frames that continue c: changes, tags and heartbeats.
func stream(t testing.TB, c frame.Cursor, n int, seed uint64) []*frame.Frame {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	e := frame.NewEncoder(c, frame.None)
	var out []*frame.Frame
	for i := range n {
		var b []byte
		var err error
		switch i % 4 {
		case 3:
			b, err = e.Heartbeat(int64(i), i%8 == 3)
		case 2:
			b, err = e.Tag(dr.Tag{Consistency: dr.Crash, Name: "t"}, int64(i), false)
		default:
			e.Begin(frame.Changes, dr.Exact, false)
			data := make([]byte, 512*(1+rng.IntN(8)))
			for k := range data {
				data[k] = byte(rng.Uint32())
			}
			if _, err := e.Add(dr.Extent{Disk: 1, Offset: 512 * rng.Int64N(1000), Length: int64(len(data))}, dr.Data, int64(i), data); err != nil {
				t.Fatal(err)
			}
			b, err = e.Finish()
		}
		if err != nil {
			t.Fatal(err)
		}
		f, err := frame.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, f)
	}
	return out
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fill appends frames, syncing after each group of three.
func fill(t testing.TB, w *Writer, frames []*frame.Frame) {
	t.Helper()
	for i, f := range frames {
		if _, err := w.Append(f); err != nil {
			t.Fatal(err)
		}
		if i%3 == 2 {
			if err := w.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func verify(t testing.TB, r *Reader, frames []*frame.Frame) {
	t.Helper()
	entries := r.Entries()
	if len(entries) != len(frames) {
		t.Fatalf("%d entries, want %d", len(entries), len(frames))
	}
	for i, e := range entries {
		f, err := r.Frame(e.Off)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f.Bytes(), frames[i].Bytes()) {
			t.Fatalf("frame %d differs", i)
		}
		if got, ok := r.Find(f.Last); !ok || got != e {
			t.Fatalf("find %d: %+v", f.Last, got)
		}
	}
	if n := len(frames); n > 0 && r.End() != frames[n-1].End() {
		t.Fatalf("end %+v", r.End())
	}
}

func TestNames(t *testing.T) {
	c := frame.Cursor{Position: dr.Position{Timeline: 3, Seq: 0xabc}}
	tl, seq, err := ParseName(Name(c))
	if err != nil || tl != 3 || seq != 0xabd || Name(c) != "00000003-0000000000000abd.seg" {
		t.Errorf("%s: %d %d %v", Name(c), tl, seq, err)
	}
	for _, bad := range []string{"", "x.seg", "1-2.seg", "00000001-000000000000000A.seg", "00000001-0000000000000001"} {
		if _, _, err := ParseName(bad); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestWriteSealRead(t *testing.T) {
	fsys := vfs.NewMem()
	w := must(Create(fsys, "/", origin))
	if _, err := Create(fsys, "/", origin); !errors.Is(err, dr.ErrExists) {
		t.Errorf("created twice: %v", err)
	}
	frames := stream(t, origin, 20, 1)
	fill(t, w, frames)
	verify(t, w.Reader(), frames)
	if err := w.Reader().Check(t.Context()); err != nil {
		t.Error(err)
	}
	growing := must(Open(fsys, "/", Name(origin)))
	verify(t, growing, frames)
	if growing.Sealed() {
		t.Error("sealed too early")
	}
	if err := errors.Join(w.Seal(), w.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Append(frames[0]); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("append to a closed segment: %v", err)
	}
	r := must(Open(fsys, "/", Name(origin)))
	verify(t, r, frames)
	if err := r.Check(t.Context()); err != nil || !r.Sealed() || r.Start() != origin || r.Torn() != 0 {
		t.Errorf("sealed: %v", err)
	}
	if _, ok := r.Find(frames[19].Last + 1); ok {
		t.Error("found what is not there")
	}
	if _, err := Recover(fsys, "/", Name(origin)); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("recovered a sealed segment: %v", err)
	}
	if err := errors.Join(r.Close(), r.Close(), growing.Close()); err != nil {
		t.Error(err)
	}
}

func TestReadBlocks(t *testing.T) {
	fsys := vfs.NewMem()
	w := must(Create(fsys, "/", origin))
	frames := stream(t, origin, 6, 2)
	fill(t, w, frames)
	r := w.Reader()
	for i, e := range r.Entries() {
		tables, err := r.Tables(e.Off)
		if err != nil {
			t.Fatal(err)
		}
		var raw []byte
		for b := range tables.NumBlocks() {
			if raw, err = r.ReadBlock(tables, e.Off, b, raw); err != nil {
				t.Fatal(err)
			}
		}
		if want := must(frames[i].Payload(nil)); !bytes.Equal(raw, want) {
			t.Errorf("frame %d: payload differs", i)
		}
	}
	if _, err := r.Tables(0); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("tables at 0: %v", err)
	}
	if _, err := r.Frame(1 << 40); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("frame behind the end: %v", err)
	}
}

func TestAppendRefuses(t *testing.T) {
	w := must(Create(vfs.NewMem(), "/", origin))
	frames := stream(t, origin, 3, 3)
	if _, err := w.Append(frames[1]); !errors.Is(err, dr.ErrGap) {
		t.Errorf("gap: %v", err)
	}
	fill(t, w, frames[:1])
	if _, err := w.Append(frames[0]); !errors.Is(err, dr.ErrRepeat) {
		t.Errorf("repeat: %v", err)
	}
	fill(t, w, frames[1:])
}

// A power cut at every call: what was synced is there, what is there is a
// prefix, and the segment goes on.
func TestCrashEverywhere(t *testing.T) {
	frames := stream(t, origin, 10, 4)
	for stop := 1; ; stop++ {
		done := crashAt(t, frames, stop)
		if done {
			return
		}
	}
}

func crashAt(t *testing.T, frames []*frame.Frame, stop int) (done bool) {
	mem := vfs.NewMem()
	cut := errors.New("power cut")
	n := 0
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if op.Kind.Changes() {
			n++
		}
		if n >= stop {
			return cut
		}
		return nil
	})
	synced, created := 0, false
	w, err := Create(fsys, "/", origin)
	if err == nil {
		created = true
		synced, err = fillUntil(w, frames)
	}
	for seed := range uint64(8) {
		after := mem.Crash(seed)
		w, rerr := Recover(after, "/", Name(origin))
		if rerr != nil {
			if created && err == nil || synced > 0 {
				if r, oerr := Open(after, "/", Name(origin)); oerr == nil && r.Sealed() {
					verify(t, r, frames)
					continue
				}
				t.Fatalf("stop %d seed %d: synced %d frames, recovery: %v", stop, seed, synced, rerr)
			}
			continue
		}
		got := len(w.Reader().Entries())
		if got < synced {
			t.Fatalf("stop %d seed %d: %d frames left of %d synced", stop, seed, got, synced)
		}
		verify(t, w.Reader(), frames[:got])
		fill(t, w, frames[got:])
		if err := errors.Join(w.Sync(), w.Reader().Check(context.Background())); err != nil {
			t.Fatalf("stop %d seed %d: %v", stop, seed, err)
		}
	}
	return err == nil
}

// Damage before a sync mark is reported, never cut off.
func TestDamageOfSyncedDataIsNotCutOff(t *testing.T) {
	fsys := vfs.NewMem()
	w := must(Create(fsys, "/", origin))
	frames := stream(t, origin, 9, 5)
	fill(t, w, frames)
	entries := w.Reader().Entries()
	f := must(fsys.OpenFile("/" + Name(origin)))
	flip(t, f, entries[1].Off+200)
	if _, err := Recover(fsys, "/", Name(origin)); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("damage to a synced frame: %v", err)
	}
	flip(t, f, entries[1].Off+200)
	flip(t, f, entries[8].Off+10) // behind the last mark: it looks torn
	again, err := Recover(fsys, "/", Name(origin))
	if err != nil {
		t.Fatal(err)
	}
	verify(t, again.Reader(), frames[:8])
}

func flip(t *testing.T, f vfs.File, off int64) {
	t.Helper()
	var b [1]byte
	must(f.ReadAt(b[:], off))
	b[0] ^= 0x40
	must(f.WriteAt(b[:], off))
}

// Every flipped byte of a sealed segment is found by Open or Check.
func TestCheckFindsEveryFlip(t *testing.T) {
	fsys := vfs.NewMem()
	w := must(Create(fsys, "/", origin))
	frames := stream(t, origin, 8, 6)
	fill(t, w, frames)
	if err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	f := must(fsys.OpenFile("/" + Name(origin)))
	size := must(f.Size())
	for off := int64(0); off < size; off += 1 + off%5 {
		flip(t, f, off)
		r, err := Open(fsys, "/", Name(origin))
		if err == nil {
			if r.Sealed() {
				err = r.Check(t.Context())
			} else {
				err = errors.New("not sealed any more: its owner knows that it was")
			}
			r.Close()
		}
		if err == nil {
			t.Fatalf("flip at %d of %d not found", off, size)
		}
		flip(t, f, off)
	}
	for _, n := range []int64{0, 5, headerSize, size / 2, size - 1} {
		f2 := must(fsys.Create("/x"))
		b := make([]byte, n)
		must(f.ReadAt(b, 0))
		must(f2.WriteAt(b, 0))
		if r, err := Open(fsys, "/", "x"); err == nil && r.Sealed() {
			t.Errorf("truncated to %d: still sealed", n)
		}
	}
}

func TestReadWhileWriting(t *testing.T) {
	w := must(Create(vfs.NewMem(), "/", origin))
	frames := stream(t, origin, 300, 8)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			r := w.Reader()
			for seen := 0; seen < len(frames); seen = len(r.Entries()) {
				for i, e := range r.Entries() {
					if f, err := r.Frame(e.Off); err != nil || f.Last != frames[i].Last {
						t.Errorf("frame %d: %v", i, err)
						return
					}
				}
			}
		})
	}
	fill(t, w, frames)
	wg.Wait()
}

func TestGolden(t *testing.T) {
	mem := vfs.NewMem()
	frames := stream(t, origin, 6, 9)
	w := must(Create(mem, "/", origin))
	fill(t, w, frames)
	if err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	b := must(vfs.ReadFile(mem, path.Join("/", Name(origin)), 1<<20))
	file := filepath.Join("testdata", Name(origin))
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if want := must(os.ReadFile(file)); !bytes.Equal(b, want) {
		t.Error("the bytes of the format changed: raise the version")
	}
	r := must(Open(vfs.OS(), "testdata", Name(origin)))
	defer r.Close()
	verify(t, r, frames)
}

func FuzzOpen(f *testing.F) {
	mem := vfs.NewMem()
	w := must(Create(mem, "/", origin))
	fill(f, w, stream(f, origin, 4, 10))
	open := must(vfs.ReadFile(mem, "/"+Name(origin), 1<<20))
	if err := w.Seal(); err != nil {
		f.Fatal(err)
	}
	f.Add(open)
	f.Add(must(vfs.ReadFile(mem, "/"+Name(origin), 1<<20)))
	f.Fuzz(func(t *testing.T, b []byte) {
		fsys := vfs.NewMem()
		must(must(fsys.Create("/x")).WriteAt(b, 0))
		if r, err := Open(fsys, "/", "x"); err == nil {
			r.Check(t.Context())
			for _, e := range slices.All(r.Entries()) {
				r.Frame(e.Off)
			}
		}
		if w, err := Recover(fsys, "/", "x"); err == nil {
			for _, x := range stream(t, w.Cursor(), 1, 1) {
				w.Append(x)
			}
		}
	})
}
