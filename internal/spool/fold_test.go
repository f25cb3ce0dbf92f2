package spool

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"syscall"
	"testing"
	"testing/synctest"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// churn makes n frames that continue c and write a few places again and again.
func churn(c frame.Cursor, n int) (out []*frame.Frame) {
	e := frame.NewEncoder(c, frame.None)
	for i := range n {
		e.Begin(frame.Changes, dr.Exact, false)
		must(e.Add(dr.Extent{Offset: int64(i%3) * 512, Length: 512}, dr.Data, c.Time+int64(i), bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 256)))
		out = append(out, must(frame.Parse(must(e.Finish()))))
	}
	return out
}

// effect is what frames make of a disk.
func effect(all []*frame.Frame) map[int64]string {
	disk := map[int64]string{}
	for _, f := range all {
		raw := must(f.Payload(nil))
		for _, x := range f.All() {
			disk[x.Offset] = string(raw[x.RawOff:][:x.Length])
		}
	}
	return disk
}

// drain reads all that is ready behind c.
func drain(t testing.TB, s *Spool, c frame.Cursor) (out []*frame.Frame) {
	t.Helper()
	r, err := s.ReadFrom(c)
	if err != nil {
		t.Fatal(err)
	}
	for r.Ready() {
		f, err := r.Next(context.Background())
		if err == nil {
			err = f.Check(c)
		}
		if err != nil {
			t.Fatal(err)
		}
		out, c = append(out, f), f.End()
	}
	return out
}

func TestFold(t *testing.T) {
	mem, s := fresh(t, Options{SegmentSize: 3000})
	all := churn(origin, 60)
	must(0, errors.Join(s.Append(t.Context(), all), s.Sync()))
	if done, err := s.Fold(t.Context(), FoldOptions{}); err != nil || done != (Folded{}) {
		t.Errorf("folded before it is known what the far side has: %+v, %v", done, err)
	}
	r := must(s.ReadFrom(origin))
	for range 10 {
		must(r.Next(t.Context()))
	}
	before := s.Bytes()
	done, err := s.Fold(t.Context(), FoldOptions{})
	if err != nil || done.Epochs != 1 || done.Frames < 40 || done.After*4 > done.Before || done.DataAfter != 3*512 || s.Bytes() >= before {
		t.Fatalf("%+v, %v", done, err)
	}
	for i := range all { // whoever was sent something can go on from there, and from nowhere else that is folded
		if _, err := s.ReadFrom(all[i].End()); (err == nil) != (i < 12 || i == 59) && !errors.Is(err, dr.ErrGap) {
			t.Errorf("read from frame %d: %v", i, err)
		}
	}
	got := drain(t, s, all[9].End())
	if last := got[len(got)-1]; len(got) > 5 || !last.Folded || last.Accuracy != dr.Epoch || last.End() != all[59].End() {
		t.Errorf("%d frames, the last is %+v", len(got), last.Header)
	}
	if !maps.Equal(effect(append(all[:10:10], got...)), effect(all)) {
		t.Error("the effect differs")
	}
	must(0, s.Close())
	again := open(t, mem, Options{})
	if rest := drain(t, again, all[9].End()); len(rest) != len(got) {
		t.Errorf("%d frames after opening again", len(rest))
	}
	must(0, again.Trim(all[59].Last))
	if c, _ := again.Cursor(); c != all[59].End() || again.Status().Backlog != 0 {
		t.Errorf("after a trim: %v, %+v", c.Position, again.Status())
	}
}

// Where nothing is overwritten, every point stays.
func TestFoldLeavesAloneWhatItCantShrink(t *testing.T) {
	_, s := fresh(t, Options{SegmentSize: 3000})
	all := stream(origin, 30)
	must(0, errors.Join(s.Append(t.Context(), all), s.Sync()))
	must(s.ReadFrom(origin))
	if done, err := s.Fold(t.Context(), FoldOptions{}); err != nil || done != (Folded{}) {
		t.Errorf("%+v, %v", done, err)
	}
	expect(t, s, origin, all)
}

// Folding again what was folded before merges the epochs.
func TestFoldAgain(t *testing.T) {
	_, s := fresh(t, Options{SegmentSize: 3000})
	must(s.ReadFrom(origin))
	var all []*frame.Frame
	for at := origin; len(all) < 200; at = all[len(all)-1].End() {
		more := churn(at, 40)
		all = append(all, more...)
		must(0, errors.Join(s.Append(t.Context(), more), s.Sync()))
		must(s.Fold(t.Context(), FoldOptions{}))
	}
	got := drain(t, s, origin)
	if len(got) > 2 || !maps.Equal(effect(got), effect(all)) {
		t.Errorf("%d epochs", len(got))
	}
}

// A reader that comes to what is being folded waits; a reset ends the fold.
func TestReaderWaitsForAFold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s := fresh(t, Options{SegmentSize: 3000})
		all := churn(origin, 60)
		must(0, errors.Join(s.Append(t.Context(), all), s.Sync(), s.Cut()))
		r := must(s.ReadFrom(origin))
		claimed := s.claim(1 << 30)
		if claimed == nil || r.Ready() {
			t.Fatal("the run must be kept from the reader")
		}
		got := make(chan *frame.Frame)
		go func() { got <- must(r.Next(t.Context())) }()
		synctest.Wait()
		select {
		case <-got:
			t.Fatal("read what was being folded")
		default:
		}
		s.unclaim()
		if f := <-got; f.Last != all[0].Last {
			t.Errorf("then got %d", f.Last)
		}
		must(0, s.Reset(origin))
		done, next, err := s.merge(t.Context(), claimed, FoldOptions{Worth: 1})
		if err == nil {
			err = s.replace(claimed, next)
		}
		if err == nil {
			t.Errorf("a fold outlived the reset: %+v", done)
		}
		must(0, errors.Join(s.Append(t.Context(), all), s.Sync()))
		expect(t, s, origin, all)
	})
}

// foldScript fills a spool, lets a far side take some of it, folds the rest, trims
// and goes on. It returns how many frames were synced and how many trimmed.
func foldScript(fsys vfs.FS, all []*frame.Frame) (synced, trimmed int, err error) {
	s, err := Open(fsys, "/spool/m", Options{SegmentSize: 2500})
	if err != nil {
		return -1, 0, err
	}
	if err := s.Reset(origin); err != nil {
		return -1, 0, err
	}
	if _, err := s.ReadFrom(origin); err != nil {
		return 0, 0, err
	}
	half := len(all) / 2
	if err := errors.Join(s.Append(context.Background(), all[:half]), s.Sync()); err != nil {
		return 0, 0, err
	}
	if _, err := s.Fold(context.Background(), FoldOptions{}); err != nil {
		return half, 0, err
	}
	r, err := s.ReadFrom(origin)
	for err == nil && r.Ready() { // all of it is sent
		_, err = r.Next(context.Background())
	}
	if err != nil {
		return half, 0, err
	}
	if err := errors.Join(s.Append(context.Background(), all[half:]), s.Sync()); err != nil {
		return half, 0, err
	}
	if _, err := s.Fold(context.Background(), FoldOptions{MaxBytes: 8000}); err != nil {
		return len(all), 0, err
	}
	trimmed = half
	return len(all), trimmed, s.Trim(all[half-1].Last)
}

// A power cut at each call of a fold: what was synced is there, once, and in order.
func TestCrashInAFold(t *testing.T) {
	all := churn(origin, 40)
	for stop := 1; ; stop++ {
		mem := vfs.NewMem()
		must(0, errors.Join(mem.MkdirAll("/spool"), mem.SyncDir("/")))
		n := 0
		fsys := vfs.NewFault(mem, func(op vfs.Op) error {
			if op.Kind.Changes() {
				n++
			}
			if n >= stop {
				return errors.New("power cut")
			}
			return nil
		})
		synced, trimmed, err := foldScript(fsys, all)
		for seed := range uint64(8) {
			afterFoldCrash(t, mem.Crash(seed), all, synced, trimmed)
		}
		if err == nil {
			return
		}
	}
}

func afterFoldCrash(t *testing.T, mem *vfs.Mem, all []*frame.Frame, synced, trimmed int) {
	t.Helper()
	s, err := Open(mem, "/spool/m", Options{SegmentSize: 2500})
	if err != nil {
		if synced >= 0 {
			t.Fatalf("open: %v", err)
		}
		return
	}
	defer s.Close()
	c, ok := s.Cursor()
	if !ok {
		if synced > 0 {
			t.Fatalf("empty after %d synced frames", synced)
		}
		return
	}
	have := int(c.Position.Seq - origin.Position.Seq)
	if have < synced {
		t.Fatalf("%d frames of %d synced", have, synced)
	}
	from := origin
	if trimmed > 0 {
		from = all[trimmed-1].End()
	}
	must(0, errors.Join(s.Append(t.Context(), all[have:]), s.Sync()))
	got := drain(t, s, from)
	if !maps.Equal(effect(append(all[:trimmed:trimmed], got...)), effect(all)) {
		t.Fatalf("synced %d, trimmed %d: the effect differs", synced, trimmed)
	}
	must(s.Fold(t.Context(), FoldOptions{}))
	must(0, s.Trim(c.Position.Seq))
	for _, name := range must(mem.List("/spool/m")) {
		if name == foldTemp {
			t.Fatal("left over")
		}
	}
}

// A disk that fails at any call of a fold, once or for a while: nothing is lost, and the
// next fold works.
func TestFailuresInAFold(t *testing.T) {
	all := churn(origin, 40)
	for _, n := range []int{1, 3, 8} {
		for from := 0; ; from++ {
			mem, s := fresh(t, Options{SegmentSize: 2500})
			must(0, errors.Join(s.Append(t.Context(), all), s.Sync(), s.Close()))
			made := 0
			fsys := vfs.NewFault(mem, func(op vfs.Op) error {
				if op.Kind.Changes() {
					if made++; made > from && made <= from+n {
						return syscall.EIO
					}
				}
				return nil
			})
			s, err := Open(fsys, "/spool/m", Options{SegmentSize: 2500})
			for try := 0; err != nil && try < 20; try++ {
				s, err = Open(fsys, "/spool/m", Options{SegmentSize: 2500})
			}
			if err != nil {
				t.Fatal(err)
			}
			must(s.ReadFrom(origin))
			for range 20 {
				if _, err := s.Fold(t.Context(), FoldOptions{}); err != nil {
					_ = s.Sync() // heals, perhaps later
				}
			}
			got := drain(t, s, origin)
			if len(got) > 2 || !maps.Equal(effect(got), effect(all)) {
				t.Fatalf("%d failures from call %d: %d frames", n, from, len(got))
			}
			for s.Trim(all[39].Last) != nil { // it tries again with the next acknowledgement
				continue
			}
			if err := s.tidy(); err != nil || s.Status().Backlog != 0 {
				t.Fatalf("after the trim: %v, %+v", err, s.Status())
			}
			must(0, s.Close())
			if made <= from {
				break
			}
		}
	}
}

// BenchmarkFold folds 256 MiB of random 4 KiB writes to 16 MiB, of which zstd leaves half, on the disk.
func BenchmarkFold(b *testing.B) {
	const frames, writes, places = 256, 256, 4096
	rng := rand.New(rand.NewPCG(1, 1))
	page, noise := make([]byte, 4096), rand.NewChaCha8([32]byte{})
	for b.Loop() {
		b.StopTimer()
		s := must(Open(vfs.OS(), b.TempDir()+"/m", Options{}))
		must(0, s.Reset(origin))
		must(s.ReadFrom(origin))
		e := frame.NewEncoder(origin, frame.Zstd)
		for range frames {
			e.Begin(frame.Changes, dr.Exact, false)
			for range writes {
				must(noise.Read(page[:2048]))
				must(e.Add(dr.Extent{Offset: rng.Int64N(places) << 12, Length: 4096}, dr.Data, 0, page))
			}
			must(0, s.Append(b.Context(), []*frame.Frame{must(frame.Parse(must(e.Finish())))}))
		}
		must(0, s.Sync())
		b.StartTimer()
		done := must(s.Fold(b.Context(), FoldOptions{Compression: frame.ZstdFastest}))
		b.StopTimer()
		b.ReportMetric(float64(done.Data)/float64(done.DataAfter), "times-less")
		b.ReportMetric(float64(done.Before)/(1<<20), "MiB-stored")
		must(0, s.Close())
		b.StartTimer()
	}
	b.SetBytes(frames * writes * 4096)
}
