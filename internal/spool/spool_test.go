package spool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

var origin = frame.Cursor{Machine: dr.MachineID{5}, Position: dr.Position{Timeline: 2, Seq: 100}}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// stream makes n frames of about 1 KiB that continue c.
func stream(c frame.Cursor, n int) (out []*frame.Frame) {
	e := frame.NewEncoder(c, frame.None)
	for i := range n {
		e.Begin(frame.Changes, dr.Exact, false)
		must(e.Add(dr.Extent{Offset: int64(i) * 512, Length: 512}, dr.Data, int64(i), bytes.Repeat([]byte{byte(i)}, 512)))
		out = append(out, must(frame.Parse(must(e.Finish()))))
	}
	return out
}

func open(t testing.TB, fsys vfs.FS, o Options) *Spool {
	t.Helper()
	s, err := Open(fsys, "/spool/m", o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func fresh(t testing.TB, o Options) (*vfs.Mem, *Spool) {
	t.Helper()
	mem := vfs.NewMem()
	must(0, mem.MkdirAll("/spool"))
	s := open(t, mem, o)
	if err := s.Reset(origin); err != nil {
		t.Fatal(err)
	}
	return mem, s
}

// expect reads the frames that continue c and compares them with want.
func expect(t testing.TB, s *Spool, c frame.Cursor, want []*frame.Frame) {
	t.Helper()
	r, err := s.ReadFrom(c)
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range want {
		if !r.Ready() {
			t.Fatalf("frame %d is not ready", i)
		}
		f, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f.Bytes(), w.Bytes()) {
			t.Fatalf("frame %d differs", i)
		}
	}
}

func TestQueue(t *testing.T) {
	mem, s := fresh(t, Options{SegmentSize: 3000})
	all := stream(origin, 40)
	for i := 0; i < len(all); i += 4 {
		if err := errors.Join(s.Append(t.Context(), all[i:i+4]), s.Sync()); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, s, origin, all)
	for i := range all {
		expect(t, s, all[i].End(), all[i+1:])
	}
	before := s.Bytes()
	if err := s.Trim(all[20].Last); err != nil {
		t.Fatal(err)
	}
	if s.Bytes() >= before {
		t.Error("trimming freed nothing")
	}
	expect(t, s, all[20].End(), all[21:])
	if _, err := s.ReadFrom(origin); !errors.Is(err, dr.ErrGap) {
		t.Errorf("read of what is trimmed: %v", err)
	}
	other := all[30].End()
	other.Chain[0]++
	if _, err := s.ReadFrom(other); !errors.Is(err, dr.ErrGap) {
		t.Errorf("read from another history: %v", err)
	}
	if err := s.Append(t.Context(), all[:1]); !errors.Is(err, dr.ErrRepeat) {
		t.Errorf("append of a repeated frame: %v", err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	again := open(t, mem, Options{SegmentSize: 3000})
	if c, ok := again.Cursor(); !ok || c != all[39].End() || again.Synced() != c {
		t.Errorf("after opening again: %+v", c)
	}
	expect(t, again, all[20].End(), all[21:])
	if _, err := Open(mem, "/spool/m", Options{}); err == nil {
		t.Error("opened twice")
	}
	must(0, again.Close())
	if err := Destroy(mem, "/spool/m"); err != nil {
		t.Fatal(err)
	}
	if _, ok := open(t, mem, Options{}).Cursor(); ok {
		t.Error("a destroyed spool has a cursor")
	}
}

func TestAllTrimmedSpoolKnowsWhereItStands(t *testing.T) {
	mem, s := fresh(t, Options{SegmentSize: 2000})
	all := stream(origin, 10)
	must(0, errors.Join(s.Append(t.Context(), all), s.Sync(), s.Trim(all[9].Last)))
	if s.Bytes() > 2000 {
		t.Errorf("%d bytes left", s.Bytes())
	}
	again := open(t, mem.Crash(1), Options{})
	if c, _ := again.Cursor(); c != all[9].End() {
		t.Errorf("cursor %+v", c)
	}
}

func TestReadersSeeOnlyWhatIsSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s := fresh(t, Options{})
		all := stream(origin, 2)
		r := must(s.ReadFrom(origin))
		if r.Ready() {
			t.Error("ready with nothing there")
		}
		got := make(chan *frame.Frame, 2)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			for {
				f, err := r.Next(ctx)
				if err != nil {
					close(got)
					return
				}
				got <- f
			}
		}()
		must(0, s.Append(ctx, all))
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("a frame was given out before it was durable")
		}
		must(0, s.Sync())
		synctest.Wait()
		if len(got) != 2 {
			t.Fatalf("%d frames after Sync", len(got))
		}
		must(0, s.Reset(frame.Cursor{Machine: origin.Machine, Position: dr.Position{Timeline: 2, Seq: 500}}))
		<-got
		<-got
		if _, open := <-got; open {
			t.Error("a reader outlived the reset")
		}
	})
}

func TestFullSpoolWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s := fresh(t, Options{Limit: 10_000, SegmentSize: 2000})
		all := stream(origin, 60)
		done := make(chan error, 1)
		go func() { done <- s.Append(t.Context(), all) }()
		synctest.Wait()
		if s.Status().Full != OwnLimit {
			t.Error("a full spool must say so")
		}
		for i := range all { // the far side takes one frame after the other
			synctest.Wait()
			if s.Bytes() > 10_000 {
				t.Fatalf("%d bytes: over the limit", s.Bytes())
			}
			if s.Synced().Position.Seq < all[i].Last {
				must(0, s.Sync())
			}
			if err := s.Trim(all[i].Last); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		more := stream(all[59].End(), 60)
		if err := s.Append(ctx, more); !errors.Is(err, dr.ErrFull) {
			t.Errorf("full and cancelled: %v", err)
		}
	})
}

// Power cuts at every call, under appends, syncs, trims and rolls.
func TestCrashEverywhere(t *testing.T) {
	all := stream(origin, 24)
	for stop := 1; ; stop += 1 + stop/40 {
		if crashAt(t, all, stop) {
			return
		}
	}
}

func crashAt(t *testing.T, all []*frame.Frame, stop int) (done bool) {
	mem := vfs.NewMem()
	must(0, errors.Join(mem.MkdirAll("/spool"), mem.SyncDir("/")))
	n := 0
	cut := errors.New("power cut")
	fsys := vfs.NewFault(mem, func(op vfs.Op) error {
		if op.Kind.Changes() {
			n++
		}
		if n >= stop {
			return cut
		}
		return nil
	})
	synced, trimmed, err := script(fsys, all)
	for seed := range uint64(6) {
		after := mem.Crash(seed)
		s, rerr := Open(after, "/spool/m", Options{SegmentSize: 2500})
		if rerr != nil {
			if synced >= 0 {
				t.Fatalf("stop %d seed %d: %v", stop, seed, rerr)
			}
			continue
		}
		c, ok := s.Cursor()
		if !ok {
			if synced > 0 {
				t.Fatalf("stop %d seed %d: an empty spool after %d synced frames", stop, seed, synced)
			}
			continue
		}
		have := int(c.Position.Seq - origin.Position.Seq)
		if have < synced {
			t.Fatalf("stop %d seed %d: %d frames of %d synced", stop, seed, have, synced)
		}
		from := origin
		if trimmed > 0 {
			from = all[trimmed-1].End()
		}
		expect(t, s, from, all[trimmed:have])
		must(0, errors.Join(s.Append(t.Context(), all[have:]), s.Sync()))
		expect(t, s, from, all[trimmed:])
	}
	return err == nil
}

// script returns how many frames were promised durable (-1: not even the
// beginning) and how many were given up by Trim.
func script(fsys vfs.FS, all []*frame.Frame) (synced, trimmed int, err error) {
	s, err := Open(fsys, "/spool/m", Options{SegmentSize: 2500})
	if err != nil {
		return -1, 0, err
	}
	if err := s.Reset(origin); err != nil {
		return -1, 0, err
	}
	for i := 0; i < len(all); i += 3 {
		if err := s.Append(context.Background(), all[i:i+3]); err != nil {
			return synced, trimmed, err
		}
		if err := s.Sync(); err != nil {
			return synced, trimmed, err
		}
		synced = i + 3
		if i%6 == 3 {
			trimmed = i - 1
			if err := s.Trim(all[trimmed-1].Last); err != nil {
				return synced, trimmed, err
			}
		}
	}
	return synced, trimmed, nil
}

func TestDamageIsReported(t *testing.T) {
	mem, s := fresh(t, Options{SegmentSize: 2000})
	all := stream(origin, 12)
	must(0, errors.Join(s.Append(t.Context(), all), s.Sync(), s.Close()))
	names := must(mem.List("/spool/m"))
	must(0, mem.Remove("/spool/m/"+names[2]))
	if _, err := Open(mem, "/spool/m", Options{}); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("a missing segment: %v", err)
	}
}

// One appends, one syncs, one reads and trims, at the same time.
func TestConcurrent(t *testing.T) {
	_, s := fresh(t, Options{Limit: 30_000, SegmentSize: 4000})
	all := stream(origin, 600)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			s.Sync()
		}
	}()
	go func() {
		rng := rand.New(rand.NewPCG(1, 1))
		for i := 0; i < len(all); {
			n := min(1+rng.IntN(9), len(all)-i)
			if err := s.Append(ctx, all[i:i+n]); err != nil {
				t.Error(err)
				return
			}
			i += n
		}
	}()
	r := must(s.ReadFrom(origin))
	for i, want := range all {
		f, err := r.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if f.Last != want.Last {
			t.Fatalf("frame %d out of order", i)
		}
		if err := s.Trim(f.Last); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStatus(t *testing.T) {
	mem, s := fresh(t, Options{SegmentSize: 3000})
	all := stream(origin, 12)
	must(0, errors.Join(s.Append(t.Context(), all), s.Sync()))
	size := int64(0)
	for _, f := range all[5:] {
		size += f.Size()
	}
	must(0, s.Trim(all[4].Last))
	st := s.Status()
	if st.Backlog < size || st.Backlog > size+200 || st.Oldest != all[5].FirstTime || st.Durable != all[4].Last || st.DurableTime != all[4].LastTime {
		t.Errorf("%d bytes behind: %+v", size, st)
	}
	must(0, s.Trim(all[11].Last))
	if st := s.Status(); st.Backlog != 0 || st.Oldest != 0 || st.DurableTime != all[11].LastTime || st.Synced != all[11].End() || st.Bytes != s.Bytes() || st.Full != NoBound {
		t.Errorf("all is durable: %+v", st)
	}
	must(0, s.Close())
	again := open(t, mem, Options{Limit: 5000})
	c, _ := again.Cursor()
	if st := again.Status(); st.Synced != all[11].End() || st.Limit != 5000 || st.Durable < all[4].Last || st.Durable > c.Position.Seq {
		t.Errorf("opened again: %+v", st)
	}
}

// A crash in the very first Reset leaves an empty spool, not a damaged one.
func TestTornFirstSegment(t *testing.T) {
	mem, s := fresh(t, Options{})
	must(0, s.Close())
	name := "/spool/m/" + must(mem.List("/spool/m"))[0]
	f := must(mem.OpenFile(name))
	must(0, errors.Join(f.Truncate(60), f.Close()))
	again := open(t, mem, Options{})
	if c, ok := again.Cursor(); ok {
		t.Errorf("cursor %v of a spool that never began", c)
	}
	must(0, again.Reset(origin))
}
