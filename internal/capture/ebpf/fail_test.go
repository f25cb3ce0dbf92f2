//go:build linux && amd64

package ebpf

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/capture/capturetest"
	"farside/internal/testenv"
)

// narrow makes the queue of a loop device as short as it gets, so that writes that
// don't want to wait fail.
func narrow(t *testing.T, loop string) {
	t.Helper()
	name := filepath.Join("/sys/block", filepath.Base(loop), "queue/nr_requests")
	if err := os.WriteFile(name, []byte("4"), 0); err != nil {
		testenv.Missing(t, "a queue of four requests: "+err.Error())
	}
}

// impatient writes n different blocks by eight threads that don't want to wait. again says
// whether they try again, with patience, if a write fails. It returns how many failed.
func impatient(t *testing.T, dev *blockDevice, size int64, n int, again bool) (failed int64) {
	t.Helper()
	var count atomic.Int64
	var wg sync.WaitGroup
	const threads, block = 8, 32 << 10
	for g := range int64(threads) {
		wg.Go(func() {
			for i := range int64(n / threads) {
				off := (i*threads + g) * block % size
				data := aligned(block)
				copy(data, capturetest.Pattern(uint64(g<<32|i)+1, block))
				_, err := unix.Pwritev2(int(dev.f.Fd()), [][]byte{data}, off, unix.RWF_NOWAIT)
				if errors.Is(err, unix.EAGAIN) {
					if count.Add(1); again {
						_, err = dev.f.WriteAt(data, off)
					} else {
						err = nil
					}
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return count.Load()
}

// TestImpatientWrites: writes that fail because they would have to wait. If they are tried
// again the stream stays exact; if not, it overflows, and the copy loses what the disk
// never had.
func TestImpatientWrites(t *testing.T) {
	const size = 32 << 20
	loop := newLoop(t, size)
	narrow(t, loop)
	dev := openBlock(t, loop)
	src := openDisks(t, Options{RingBytes: 256 << 20}, loop)
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	if impatient(t, dev, size, 2000, true) == 0 {
		testenv.Missing(t, "a kernel that fails impatient writes to a busy loop device")
	}
	failed := src.Stats().Failed
	capturedUpTo(t, r, src)
	time.Sleep(softAge + 100*time.Millisecond)
	capturedUpTo(t, r, src)
	if s := src.Stats(); !r.Exact() || s.Overflows != 0 || s.Failed == 0 {
		t.Errorf("tried again: exact %v, %+v", r.Exact(), s)
	}
	mustEqual(t, r)

	r.MustSync() // an open stream: what was captured is left out of bulk reads
	impatient(t, dev, size, 2000, false)
	// A write that failed may be covered by a later one to the same place: of 30, hardly all are.
	if n := src.Stats().Failed - failed; n < 30 {
		t.Skipf("only %d writes failed this time", n)
	}
	for begin := time.Now(); src.Stats().Overflows == 0; { // the tries do not come
		if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("no overflow: %+v", src.Stats())
		}
	}
	closeExact(t, r)
	mustEqual(t, r)
	t.Logf("%d writes failed", src.Stats().Failed)
}

// TestImpatientKill: the process that waits for a next try is killed.
func TestImpatientKill(t *testing.T) {
	b := newBench(t, 32<<20)
	narrow(t, b.disks[0].Path)
	o := Options{RingBytes: 256 << 20, Pin: b.pins, Hold: true}
	s, r := b.exact(t, o)
	for try := 0; s.Stats().Failed == 0; try++ {
		if impatient(t, b.devs[0], 32<<20, 2000, false); try == 5 {
			testenv.Missing(t, "a kernel that fails impatient writes to a busy loop device")
		}
	}
	capturedUpTo(t, r, s)
	s.Release(s.Position()) // but the failures stay
	for rewind := range 2 {
		at := s.Position()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = b.open(t, o, b.disks...)
		if s.Stats().RingUsed == 0 || !s.Adopted() {
			t.Fatalf("adopted %v, the failures are gone: %+v", s.Adopted(), s.Stats())
		}
		if rewind == 1 {
			if err := s.Rewind(at); err != nil {
				t.Fatal(err)
			}
		}
		r.Adopt(s)
		capturedUpTo(t, r, s)
	}
	for begin := time.Now(); r.Losts() == 0; {
		if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("no overflow: %+v", s.Stats())
		}
	}
	closeExact(t, r)
	mustEqual(t, r)
}
