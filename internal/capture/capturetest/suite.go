package capturetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Device writes to a disk through the path that a Source captures. A call has
// reached the disk when it returns. Zero and Discard may answer
// dr.ErrUnsupported.
type Device interface {
	WriteAt(p []byte, off int64) (int, error)
	Zero(off, n int64) error
	Discard(off, n int64) error // the range reads as zeroes afterwards
	Flush() error
}

// Config is what a test wants captured.
type Config struct {
	Sizes []int64 // of the disks, in bytes; their ids are 1, 2, ...
	Ring  int64   // bytes that wait for Next before the Source overflows, about; 0: plenty
}

// Target is a Source under test with a way to write to each of its disks.
type Target struct {
	Source  capture.Source
	Devices []Device // in the order of Config.Sizes
	Block   int64    // the devices' smallest write, a power of two; 0: dr.SectorSize
	NoFlush bool     // the devices have no volatile cache, so that flushes are no events
}

// round grows [off, off+n) to whole blocks.
func (t *Target) round(off, n int64) (int64, int64) {
	block := max(t.Block, dr.SectorSize)
	from := off &^ (block - 1)
	return from, (off + n - from + block - 1) &^ (block - 1)
}

// Factory makes a Target and lets t clean it up.
type Factory func(t *testing.T, c Config) *Target

const mib = 1 << 20

// Run checks that the Sources of a driver keep the invariants of package capture.
func Run(t *testing.T, f Factory) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Factory)
	}{
		{"Disks", testDisks},
		{"Changes", testChanges},
		{"Order", testOrder},
		{"Dirty", testDirty},
		{"Tail", testTail},
		{"Wait", testWait},
		{"Huge", testHuge},
		{"Overflow", testOverflow},
		{"ReadAt", testReadAt},
		{"Close", testClose},
		{"Protocol", testProtocol},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, f) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// collect consumes the stream up to its tail of now and returns copies.
func collect(t *testing.T, src capture.Source) (events []capture.Event) {
	t.Helper()
	ctx := deadline(t, time.Minute)
	for tail := src.Tail(); src.Consumed() < tail; {
		_, err := src.Next(ctx, 10*time.Millisecond, func(e capture.Event) error {
			e.Data = append([]byte(nil), e.Data...)
			events = append(events, e)
			return nil
		})
		must(t, err)
	}
	return events
}

// settle waits until what was in flight at the start has landed, and forgets it.
func settle(t *testing.T, src capture.Source) {
	t.Helper()
	r := NewReplicator(src)
	must(t, r.Close(deadline(t, time.Minute)))
}

// writer makes changes on a Target and lets an Oracle know.
type writer struct {
	t       *testing.T
	target  *Target
	oracle  *Oracle
	counter uint64
}

func newWriter(t *testing.T, target *Target) *writer {
	images := make(map[dr.DiskID][]byte)
	for _, d := range target.Source.Disks() {
		images[d.ID] = make([]byte, d.Size)
		must(t, ReadFull(target.Source, images[d.ID], d.ID, 0))
	}
	return &writer{t: t, target: target, oracle: NewOracle(images)}
}

func (w *writer) write(disk int, off, n int64) {
	w.t.Helper()
	w.counter++
	off, n = w.target.round(off, n)
	data := Pattern(w.counter, n)
	w.oracle.Record(w.extent(disk, off, n), data)
	_, err := w.target.Devices[disk].WriteAt(data, off)
	must(w.t, err)
}

func (w *writer) extent(disk int, off, n int64) dr.Extent {
	return dr.Extent{Disk: w.target.Source.Disks()[disk].ID, Offset: off, Length: n}
}

// zero calls change, Zero or Discard of a disk, if the device can do it.
func (w *writer) zero(disk int, off, n int64, change func(off, n int64) error) bool {
	w.t.Helper()
	err := change(off, n)
	if errors.Is(err, dr.ErrUnsupported) {
		w.t.Logf("left out: %v", err)
		return false
	}
	must(w.t, err)
	w.oracle.Record(w.extent(disk, off, n), nil)
	return true
}

// check lets the oracle judge events: every change, in order, and none missing.
func (w *writer) check(events []capture.Event) {
	w.t.Helper()
	for _, e := range events {
		if e.Kind == capture.Lost {
			w.t.Fatalf("lost: %+v", w.target.Source.Stats())
		}
		if e.Kind == capture.Change {
			must(w.t, w.oracle.Event(e))
		}
	}
	if n := w.oracle.Due(); n > 0 {
		w.t.Fatalf("%d writes are missing", n)
	}
}

func testDisks(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{8 * mib, 4 * mib}})
	disks := target.Source.Disks()
	if len(disks) != 2 || disks[0].ID != 1 || disks[1].ID != 2 || disks[0].Size != 8*mib || disks[1].Size != 4*mib {
		t.Errorf("disks: %+v", disks)
	}
	s := target.Source.Stats()
	if s.Mode != capture.ModeData || s.Overflows != 0 || len(s.Disks) != 2 || s.Disks[1].ID != 2 {
		t.Errorf("stats of a new source: %+v", s)
	}
}

func testChanges(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{16 * mib}})
	settle(t, target.Source)
	w, dev := newWriter(t, target), target.Devices[0]
	before := time.Now().Add(-time.Second).UnixNano()
	w.write(0, 0, 4096)
	w.write(0, 512, 512)           // below a page
	w.write(0, 8192-512, 1024)     // across blocks, aligned to nothing
	w.write(0, 3*512, 37*512)      // odd in both
	w.write(0, 16*mib-512, 512)    // the last sector
	w.write(0, mib+512, mib-3*512) // large and odd
	zeroed := w.zero(0, 4096, 8192, dev.Zero)
	discarded := w.zero(0, mib, 64<<10, dev.Discard)
	w.write(0, mib, 4096)
	must(t, dev.Flush())
	events := collect(t, target.Source)
	w.check(events)
	after := time.Now().Add(time.Second).UnixNano()
	whats, flushes := map[dr.What]int{}, 0
	for _, e := range events {
		if e.Time < before || e.Time > after {
			t.Errorf("%v of %v at %d, want about now", e.Kind, e.Extent, e.Time)
		}
		if e.Kind == capture.Flush {
			flushes++
		}
		whats[e.What]++
	}
	if flushes == 0 && !target.NoFlush {
		t.Error("no flush")
	}
	if discarded && whats[dr.Discard] == 0 {
		t.Error("no discard")
	}
	if zeroed && whats[dr.Zero] == 0 {
		t.Log("zeroes came as data")
	}
	s := target.Source.Stats()
	if s.Writes < 7 || s.Bytes < uint64(mib) || s.Flushes != uint64(flushes) || s.Marked != 0 {
		t.Errorf("stats: %+v", s)
	}
}

func testOrder(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{4 * mib, 8 * mib, 2 * mib}})
	settle(t, target.Source)
	w := newWriter(t, target)
	rng := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		n := (1 + rng.Int64N(32)) * 512
		w.write(rng.IntN(3), rng.Int64N((2*mib-n)/512+1)*512, n)
	}
	w.check(collect(t, target.Source))
}

func testDirty(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{8 * mib, 4 * mib}})
	src := target.Source
	settle(t, src)
	if n, err := src.Dirty(); n != 0 || err != nil {
		t.Fatalf("dirty at first: %d, %v", n, err)
	}
	must(t, src.Mark(dr.Extent{Disk: 1, Offset: mib, Length: 2 * mib}))
	must(t, src.Mark(dr.Extent{Disk: 2, Length: 4 * mib}))
	if n, err := src.Dirty(); n != 6*mib || err != nil {
		t.Errorf("dirty %d, %v; want %d", n, err, 6*mib)
	}
	if err := src.Mark(dr.Extent{Disk: 1, Offset: 8 * mib, Length: 512}); !errors.Is(err, dr.ErrInvalid) {
		t.Errorf("mark behind the end: %v", err)
	}
	if err := src.Mark(dr.Extent{Disk: 9, Length: 512}); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("mark of an unknown disk: %v", err)
	}
	got := map[dr.DiskID]int64{}
	for sum := int64(0); sum < 6*mib; {
		xs, err := src.TakeDirty(mib)
		must(t, err)
		before := sum
		for _, x := range xs {
			got[x.Disk] += x.Length
			sum += x.Length
		}
		if sum == before || sum-before > mib {
			t.Fatalf("took %d bytes", sum-before)
		}
	}
	if got[1] != 2*mib || got[2] != 4*mib {
		t.Errorf("took %v", got)
	}
	if xs, err := src.TakeDirty(mib); len(xs) != 0 || err != nil {
		t.Errorf("took more: %v, %v", xs, err)
	}
}

func testTail(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{4 * mib}})
	src := target.Source
	settle(t, src)
	if src.Consumed() < src.Tail() {
		t.Error("nothing was written and the stream has a tail")
	}
	w := newWriter(t, target)
	for i := range int64(10) {
		w.write(0, i*4096, 4096)
		if tail := src.Tail(); src.Consumed() >= tail {
			t.Fatalf("write %d is not covered by the tail", i)
		}
		w.check(collect(t, src))
	}
}

func testWait(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{4 * mib}})
	src := target.Source
	settle(t, src)
	none := func(e capture.Event) error { return fmt.Errorf("unexpected %v", e.Kind) }
	start := time.Now()
	if n, err := src.Next(t.Context(), 50*time.Millisecond, none); n != 0 || err != nil {
		t.Errorf("next on an idle source: %d, %v", n, err)
	}
	if d := time.Since(start); d < 40*time.Millisecond || d > 5*time.Second {
		t.Errorf("waited %v", d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := src.Next(ctx, time.Hour, none); !errors.Is(err, context.Canceled) {
		t.Errorf("next with a canceled context: %v", err)
	}
	w := newWriter(t, target)
	w.write(0, 0, 4096)
	w.write(0, 4096, 4096)
	stop := errors.New("stop")
	n, err := src.Next(t.Context(), time.Second, func(capture.Event) error { return stop })
	if n != 1 || !errors.Is(err, stop) {
		t.Errorf("next with a failing consumer: %d, %v", n, err)
	}
	if events := collect(t, src); len(events) != 1 || events[0].Extent.Offset != 4096 {
		t.Errorf("after a failing consumer: %v", events)
	}
	must(t, src.Resume(deadline(t, time.Minute))) // data mode: nothing to do
}

func testHuge(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{64 * mib}, Ring: 64 * mib})
	settle(t, target.Source)
	w := newWriter(t, target)
	w.write(0, 512, 15*mib) // where memory is whole that is one bio; a quarter of the ring is what one may have
	w.write(0, 0, mib)
	w.check(collect(t, target.Source))
	r := NewReplicator(target.Source)
	must(t, r.MarkAll())
	w.write(0, 0, 64*mib) // may go round the ring
	must(t, r.Close(deadline(t, time.Minute)))
	must(t, r.CompareDisks())
}

func testOverflow(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{16 * mib, 4 * mib}, Ring: mib})
	src := target.Source
	ctx := deadline(t, 2*time.Minute)
	r := NewReplicator(src)
	must(t, r.MarkAll())
	must(t, r.Close(ctx))
	for cycle := range uint64(3) {
		w := newWriter(t, target)
		r.OnExact = func(e capture.Event) error { return w.oracle.Event(e) }
		w.counter = cycle << 16
		rng := rand.New(rand.NewPCG(cycle, 9))
		for src.Stats().Mode == capture.ModeData || w.counter%64 != 0 { // and on in bitmap mode
			w.write(rng.IntN(2), rng.Int64N(1000)*4096, 4096)
		}
		if r.Losts() != int(cycle) || src.Consumed() >= src.Tail() {
			t.Fatalf("%d losts, %d < %d", r.Losts(), src.Consumed(), src.Tail())
		}
		xs, err := src.TakeDirty(1 << 40)
		must(t, err)
		if n, _ := src.Dirty(); n == 0 || len(xs) > 0 {
			t.Fatalf("%d bytes dirty, took %v before the lost was handed over", n, xs)
		}
		for src.Consumed() < src.Tail() {
			_, err := r.Events(ctx, 0)
			must(t, err)
		}
		if r.Losts() != int(cycle)+1 || r.Exact() || w.oracle.Due() == 0 {
			t.Fatalf("%d losts, exact %v, %d writes were not captured", r.Losts(), r.Exact(), w.oracle.Due())
		}
		for _, d := range src.Disks() { // everything up to the Lost was exact
			must(t, r.Compare(d.ID, w.oracle.Image(d.ID)))
		}
		must(t, r.Close(ctx))
		must(t, r.CompareDisks())
		w.oracle.Sync()
		for range 50 { // exact again
			w.write(rng.IntN(2), rng.Int64N(1000)*4096, 512)
		}
		_, err = r.Events(ctx, 0)
		must(t, err)
		if n := w.oracle.Due(); n != 0 || !r.Exact() {
			t.Fatalf("%d writes are missing after the return, exact %v", n, r.Exact())
		}
	}
	if s := src.Stats(); s.Overflows != 3 || s.Marked == 0 || !s.Settled || s.RingSize == 0 {
		t.Errorf("stats: %+v", s)
	}
}

func testReadAt(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{4 * mib}})
	settle(t, target.Source)
	w := newWriter(t, target)
	w.write(0, 512, 1024)
	p := make([]byte, 2048)
	n, err := target.Source.ReadAt(p, 1, 0)
	w.oracle.Sync()
	if n != len(p) || err != nil || string(p) != string(w.oracle.Image(1)[:2048]) {
		t.Errorf("read %d, %v", n, err)
	}
	if _, err := target.Source.ReadAt(p, 1, 4*mib-512); err == nil {
		t.Error("read behind the end")
	}
	if _, err := target.Source.ReadAt(p, 7, 0); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("read of an unknown disk: %v", err)
	}
}

func testClose(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{4 * mib}})
	src := target.Source
	done := make(chan error)
	go func() {
		for {
			if _, err := src.Next(context.Background(), time.Hour, func(capture.Event) error { return nil }); err != nil {
				done <- err
				return
			}
		}
	}()
	time.Sleep(5 * time.Millisecond)
	must(t, src.Close())
	if err := <-done; !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("next during close: %v", err)
	}
	must(t, src.Close())
	if _, err := src.Next(t.Context(), 0, nil); !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("next after close: %v", err)
	}
	src.Stats() // harmless
}

// testProtocol replicates disks that are in use, with a ring that is too small,
// by several writers at once; then checks every position of a calm span.
func testProtocol(t *testing.T, f Factory) {
	target := f(t, Config{Sizes: []int64{16 * mib, 8 * mib}, Ring: 2 * mib})
	src := target.Source
	for i, d := range src.Disks() {
		_, err := target.Devices[i].WriteAt(Pattern(1<<30, d.Size/2), 0)
		must(t, err)
	}
	ctx := deadline(t, 2*time.Minute)
	r := NewReplicator(src)
	must(t, r.MarkAll())
	for round := range uint64(3) {
		stop := hammer(t, target, round)
		for begin := time.Now(); time.Since(begin) < 200*time.Millisecond; {
			_, err := r.Events(ctx, 0)
			must(t, err)
			_, err = r.Bulk(mib)
			must(t, err)
		}
		time.Sleep(20 * time.Millisecond) // nobody consumes: likely to overflow
		stop()
		must(t, r.Close(ctx))
		must(t, r.CompareDisks())
	}
	w := newWriter(t, target)
	r.OnExact = func(e capture.Event) error {
		if err := w.oracle.Event(e); err != nil {
			return err
		}
		return r.Compare(e.Extent.Disk, w.oracle.Image(e.Extent.Disk))
	}
	rng := rand.New(rand.NewPCG(3, 3))
	for range 40 {
		w.write(rng.IntN(2), rng.Int64N(1000)*512, (1+rng.Int64N(64))*512)
	}
	for tail := src.Tail(); src.Consumed() < tail; {
		_, err := r.Events(ctx, 0)
		must(t, err)
	}
	if w.oracle.Due() != 0 || !r.Exact() {
		t.Errorf("%d writes are missing, exact %v", w.oracle.Due(), r.Exact())
	}
	t.Logf("%d overflows", src.Stats().Overflows)
}

// hammer writes to the target from several goroutines, each in its own stripe,
// until the function that it returns is called.
func hammer(t *testing.T, target *Target, round uint64) (stop func()) {
	var wg sync.WaitGroup
	quit := make(chan struct{})
	for g := range uint64(4) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(round, g))
			dev := target.Devices[g%2]
			for i := uint64(0); ; i++ {
				select {
				case <-quit:
					return
				default:
				}
				n := (1 + rng.Int64N(16)) * 512
				off := int64(g/2)*4*mib + rng.Int64N((4*mib-n-4096)/512)*512
				off, n = target.round(off, n)
				if _, err := dev.WriteAt(Pattern(round<<24|g<<20|i, n), off); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() { close(quit); wg.Wait() }
}
