package segment

import (
	"errors"
	"testing"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// bigFrame is one frame with n bytes of data that continues c.
func bigFrame(t testing.TB, c frame.Cursor, n int, fill byte) *frame.Frame {
	t.Helper()
	e := frame.NewEncoder(c, frame.None)
	e.Begin(frame.Changes, dr.Exact, false)
	data := make([]byte, n)
	for i := range data {
		data[i] = fill
	}
	must(e.Add(dr.Extent{Disk: 1, Length: int64(n)}, dr.Data, c.Time+1, data))
	return must(frame.Parse(must(e.Finish())))
}

// An Append that failed half-way leaves bytes behind the end that are longer
// than the footer; sealing must not leave them behind the trailer.
func TestSealAfterFailedAppend(t *testing.T) {
	mem, full := vfs.NewMem(), errors.New("disk full")
	failing := false
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if failing && op.Kind == vfs.OpWrite {
			return &vfs.ShortWrite{N: 64 << 10, Err: full}
		}
		return nil
	})
	w := must(Create(fsys, "/", origin))
	frames := stream(t, origin, 7, 11)
	fill(t, w, frames)
	failing = true
	if _, err := w.Append(bigFrame(t, w.Cursor(), 128<<10, 1)); !errors.Is(err, full) {
		t.Fatal(err)
	}
	failing = false
	if err := errors.Join(w.Seal(), w.Close()); err != nil {
		t.Fatal(err)
	}
	r := must(Open(mem, "/", Name(origin)))
	defer r.Close()
	if !r.Sealed() {
		t.Errorf("sealed, and not recognised as such: %d bytes torn", r.Torn())
	}
	verify(t, r, frames)
	if err := r.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// Frames that a recovery cut off must not come back behind other frames that
// took their place, whatever the next power cut keeps.
func TestCutFramesStayCut(t *testing.T) {
	for seed := range uint64(300) {
		mem := vfs.NewMem()
		w := must(Create(mem, "/", origin))
		for range 47 { // so that the next frame ends where a sector does
			must(w.Append(bigFrame(t, w.Cursor(), 512, 1)))
		}
		lost := bigFrame(t, w.Cursor(), 512, 2)
		stale := bigFrame(t, lost.End(), 512, 3)
		torn, back := must(w.Append(lost)), must(w.Append(stale))
		if back.Off%512 != 0 {
			t.Fatalf("stale frame at %d: the test lost its power", back.Off)
		}
		// As a power cut may leave it: the frame in the middle is torn, the last is whole.
		flip(t, w.file, torn.Off+300)
		if err := w.file.Sync(); err != nil {
			t.Fatal(err)
		}
		again := must(Recover(mem, "/", Name(origin)))
		must(again.Append(bigFrame(t, again.Cursor(), 512, 4)))
		r := must(Open(mem.Crash(seed), "/", Name(origin)))
		if r.End().Position.Seq >= stale.Last {
			t.Fatalf("seed %d: a frame that was cut off is back", seed)
		}
	}
}

// A footer is written only once all frames are durable, so a good trailer proves
// that a bad frame before it is damage, also when a crash tore the footer.
func TestTrailerVouchesForFrames(t *testing.T) {
	mem := vfs.NewMem()
	w := must(Create(mem, "/", origin))
	fill(t, w, stream(t, origin, 2, 12))
	entries, footer := w.Reader().Entries(), w.Size()
	if err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	f := must(mem.OpenFile("/" + Name(origin)))
	flip(t, f, footer+3)
	again, err := Recover(mem, "/", Name(origin))
	if err != nil || len(again.Reader().Entries()) != 2 {
		t.Fatalf("a torn footer alone: %v", err)
	}
	if err := again.Seal(); err != nil {
		t.Fatal(err)
	}
	flip(t, f, footer+3)
	flip(t, f, entries[1].Off+170)
	if _, err := Recover(mem, "/", Name(origin)); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("damage to a frame of a sealed segment: %v", err)
	}
}

// What a newer program wrote is refused, not cut off as if it were torn.
func TestNewerFrameIsNotCutOff(t *testing.T) {
	mem := vfs.NewMem()
	w := must(Create(mem, "/", origin))
	fill(t, w, stream(t, origin, 2, 13))
	last := w.Reader().Entries()[1]
	must(w.file.WriteAt([]byte{99}, last.Off+4))
	if _, err := Recover(mem, "/", Name(origin)); !errors.Is(err, dr.ErrVersion) {
		t.Errorf("recover: %v", err)
	}
	if _, err := Open(mem, "/", Name(origin)); !errors.Is(err, dr.ErrVersion) {
		t.Errorf("open: %v", err)
	}
}

// The index of a sealed segment covers every byte up to the footer.
func TestFooterCoversAll(t *testing.T) {
	frames := stream(t, origin, 2, 14)
	for name, gap := range map[string]int64{"whole": 0, "a mark at the end": markSize, "some bytes at the end": 8} {
		mem := vfs.NewMem()
		w := must(Create(mem, "/", origin))
		fill(t, w, frames)
		size := w.Size() + gap
		must(w.file.WriteAt(putFooter(size, w.Reader().Entries(), w.Cursor()), size))
		r := must(Open(mem, "/", Name(origin)))
		if r.Sealed() != (gap == 0) {
			t.Errorf("%s: sealed is %v", name, r.Sealed())
		}
	}
}

// A file whose creation failed before its name was durable is not lost later.
func TestRecoverMakesNameDurable(t *testing.T) {
	mem, boom := vfs.NewMem(), errors.New("boom")
	dying := vfs.NewFault(mem, func(op vfs.Op) error {
		if op.Kind == vfs.OpSyncDir || op.Kind == vfs.OpRemove {
			return boom
		}
		return nil
	})
	if _, err := Create(dying, "/", origin); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	w := must(Recover(mem, "/", Name(origin)))
	frames := stream(t, origin, 3, 15)
	fill(t, w, frames)
	for seed := range uint64(20) {
		verify(t, must(Open(mem.Crash(seed), "/", Name(origin))), frames)
	}
}

// What recovery kept is durable, and protected by a mark from the next Append on.
func TestRecoveredFramesAreDurableAndMarked(t *testing.T) {
	mem := vfs.NewMem()
	w := must(Create(mem, "/", origin))
	frames := stream(t, origin, 5, 16)
	for _, f := range frames[:4] {
		must(w.Append(f))
	}
	again := must(Recover(mem, "/", Name(origin)))
	for seed := range uint64(20) {
		verify(t, must(Open(mem.Crash(seed), "/", Name(origin))), frames[:4])
	}
	must(again.Append(frames[4]))
	flip(t, again.file, again.Reader().Entries()[2].Off+20)
	if _, err := Recover(mem, "/", Name(origin)); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("damage to a recovered frame: %v", err)
	}
}
