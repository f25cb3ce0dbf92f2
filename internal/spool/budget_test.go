package spool

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// small is a file system that says how much space it has.
type small struct {
	vfs.FS
	free atomic.Int64
}

func (s *small) Space(string) (total, free int64, err error) { return 1 << 20, s.free.Load(), nil }

// together opens spools that share a budget.
func together(t *testing.T, fsys vfs.FS, b *Budget, n int) (out []*Spool) {
	t.Helper()
	must(0, fsys.MkdirAll("/spool"))
	for i := range n {
		s := must(Open(fsys, "/spool/"+string(rune('a'+i)), Options{SegmentSize: 2000, Budget: b}))
		must(0, s.Reset(origin))
		out = append(out, s)
	}
	return out
}

// A bound of all spools holds back those that fill it, but not one that is empty;
// room in one is room for the others.
func TestTotalOfAllSpools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Budget
		b.SetTotal(10_000)
		all := together(t, vfs.NewMem(), &b, 3)
		frames := stream(origin, 30)
		done := make(chan error, 2)
		for _, s := range all[:2] {
			go func() { done <- s.Append(t.Context(), frames) }()
		}
		synctest.Wait()
		if sum := all[0].Bytes() + all[1].Bytes(); sum > 10_000+2*frames[0].Size() || sum < 8_000 {
			t.Errorf("%d bytes under a bound of 10,000", sum)
		}
		if all[0].Status().Full != TotalLimit && all[1].Status().Full != TotalLimit {
			t.Errorf("%q, %q", all[0].Status().Full, all[1].Status().Full)
		}
		must(0, all[2].Append(t.Context(), frames[:1])) // what is empty is not held back
		for range 60 {
			for _, s := range all {
				must(0, errors.Join(s.Sync(), s.Trim(s.Synced().Position.Seq)))
			}
			synctest.Wait()
			<-after()
		}
		must(0, errors.Join(<-done, <-done))
		for _, s := range all {
			must(0, s.Close())
		}
	})
}

func after() <-chan struct{} {
	ctx, cancel := context.WithTimeout(context.Background(), 2*budgetPoll)
	context.AfterFunc(ctx, cancel)
	return ctx.Done()
}

// Space that must stay free on the disk stays free, and appending goes on when
// somebody has made room.
func TestFloorOfTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := &small{FS: vfs.NewMem()}
		fsys.free.Store(5000)
		var b Budget
		b.SetFloor(4900)
		s := together(t, fsys, &b, 1)[0]
		defer s.Close()
		done := make(chan error)
		go func() { done <- s.Append(t.Context(), stream(origin, 3)) }()
		synctest.Wait()
		if st := s.Status(); st.Full != DiskFloor || st.Bytes > 200 {
			t.Errorf("%+v", st)
		}
		fsys.free.Store(50_000)
		if err := <-done; err != nil || s.Status().Full != NoBound {
			t.Errorf("%v, %q", err, s.Status().Full)
		}
		fsys.free.Store(2000)
		must(s.ReadFrom(origin))
		must(0, errors.Join(s.Sync(), s.Cut()))
		if b.allowsFold(s, 1) {
			t.Error("a fold may use half of the reserve, not more")
		}
	})
}

// A spool that comes back with less than it promised says so; one that lost only what
// it had not promised doesn't.
func TestBrokenPromise(t *testing.T) {
	mem, s := fresh(t, Options{})
	all := stream(origin, 9)
	must(0, errors.Join(s.Append(t.Context(), all[:6]), s.Sync(), s.Append(t.Context(), all[6:])))
	crashed := mem.Crash(3)
	again := open(t, crashed, Options{})
	if at, ok := again.Lost(); ok {
		t.Errorf("lost %v by a power cut", at)
	}
	must(0, again.Close())
	must(0, errors.Join(s.Sync(), s.Close()))
	name := "/spool/m/" + must(mem.List("/spool/m"))[0]
	f := must(mem.OpenFile(name))
	size := must(f.Size())
	must(0, errors.Join(f.Truncate(size-all[8].Size()), f.Close()))
	short := open(t, mem, Options{})
	if at, ok := short.Lost(); !ok || at != all[8].End().Position {
		t.Errorf("lost %v, %v", at, ok)
	}
	if c, _ := short.Cursor(); c != all[7].End() {
		t.Errorf("ends at %v", c.Position)
	}
	must(0, short.Reset(origin))
	if _, ok := short.Lost(); ok {
		t.Error("after a reset nothing is promised")
	}
	must(0, short.Close())
	if _, ok := open(t, mem, Options{}).Lost(); ok {
		t.Error("the reset was not noted")
	}
}

func FuzzPromise(f *testing.F) {
	f.Add(putPromise(origin))
	f.Add(make([]byte, promiseSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		at, ok := parsePromise(b)
		if ok && string(putPromise(frame.Cursor{Position: at, Chain: [32]byte(b[24:56])})) != string(b) {
			t.Fatalf("took %x for %v", b, at)
		}
		if !ok && at != (dr.Position{}) && len(b) != promiseSize {
			t.Fatal("a position of nothing")
		}
	})
}
