//go:build linux && amd64

package ebpf

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"farside/internal/capture/capturetest"
	"farside/internal/dr"
)

func TestPending(t *testing.T) {
	const now = uint64(time.Hour)
	for _, c := range []struct {
		age   time.Duration
		quiet bool
		want  bool
	}{
		{0, false, true},
		{0, true, true}, // it may wait for a request
		{quietAge - 1, true, true},
		{quietAge, true, false},
		{quietAge, false, true},
		{giveUpAge - 1, false, true},
		{giveUpAge, false, false},
		{-time.Second, true, true}, // submitted after now was read
	} {
		if got := pending(now, now-uint64(c.age), giveUpAge, c.quiet); got != c.want {
			t.Errorf("age %v, quiet %v: %v", c.age, c.quiet, got)
		}
	}
}

// lose notes a write in flight whose completion will never come, at a place of the table.
func lose(t *testing.T, s *source, at int, f flight) {
	t.Helper()
	f.Bio, f.Dev = uint64(at)<<8, s.devs[0].dev
	table(s)[at] = f
}

func table(s *source) []flight {
	return unsafe.Slice((*flight)(unsafe.Pointer(&s.prog.flying[0])), maxFlying)
}

func isNoted(s *source, at int) bool { return table(s)[at].Bio == uint64(at)<<8 }

func TestResumeLostCompletion(t *testing.T) {
	src := openDisks(t, Options{RingBytes: 1 << 20}, newLoop(t, 8<<20))
	r := capturetest.NewReplicator(src)
	closeExact(t, r)
	for range 600 { // go to bitmap mode and on
		if _, err := openBlock(t, src.disks[0].Path).WriteAt(capturetest.Pattern(1, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	lose(t, src, 1, flight{From: 2048, To: 2056, Left: 4096, Time: monotonic(), State: 1})
	begin := time.Now()
	if err := src.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < quietAge || d > giveUpAge {
		t.Errorf("resumed after %v", d)
	}
	// The note stays, as the completion may come after all: it must be found to be late.
	if n := src.Stats().LostCompletions; n != 1 || !isNoted(src, 1) || table(src)[1].State != givenUp {
		t.Errorf("%d lost completions, still noted: %v, %x", n, isNoted(src, 1), table(src)[1].State)
	}
	if err := src.Resume(t.Context()); err != nil || src.Stats().LostCompletions != 1 {
		t.Errorf("it is given up again: %v, %+v", err, src.Stats())
	}
	capturedUpTo(t, r, src)
	xs, err := src.TakeDirty(1 << 40)
	found := false
	for _, x := range xs {
		found = found || x.Offset <= 1<<20 && x.End() >= 1<<20+4096
	}
	if err != nil || !found {
		t.Errorf("its range is not dirty: %v, %v", xs, err)
	}
}

func TestResumeStops(t *testing.T) {
	src := openDisks(t, Options{RingBytes: 1 << 20}, newLoop(t, 8<<20))
	lose(t, src, 1, flight{To: 8, Left: 4096, Time: monotonic() + uint64(time.Hour), State: 99}) // for ever young
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := src.Resume(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("resume: %v", err)
	}
	done := make(chan error)
	go func() { done <- src.Resume(context.Background()) }()
	time.Sleep(20 * time.Millisecond)
	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, dr.ErrUnavailable) {
		t.Errorf("resume during close: %v", err)
	}
}

// TestSweep drops what has been captured long ago and never completed, nothing else.
func TestSweep(t *testing.T) {
	loop := newLoop(t, 8<<20)
	src := openDisks(t, Options{}, loop)
	closeExact(t, capturetest.NewReplicator(src))
	src.opened -= min(src.opened, uint64(2*leakAge)) // as if a minute had passed
	lose(t, src, 1, flight{To: 8, Left: 4096, Time: src.opened, State: 0})
	lose(t, src, 2, flight{To: 8, Left: 4096, Time: monotonic(), State: 0})
	lose(t, src, 3, flight{To: 8, Left: 4096, Time: src.opened, State: givenUp})
	lose(t, src, 4, flight{To: 8, Left: 4096, Time: monotonic(), State: givenUp})
	src.sweep()
	old := isNoted(src, 1) || isNoted(src, 3)
	if old && monotonic() > uint64(2*leakAge) || !isNoted(src, 2) || !isNoted(src, 4) {
		t.Error("sweep dropped the wrong one")
	}
}

// TestLateCompletion: a write that Resume gave up on reaches the disk after all.
func TestLateCompletion(t *testing.T) {
	dir := mountExt4(t, newLoop(t, 64<<20))
	name := filepath.Join(dir, "disk")
	if err := os.WriteFile(name, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	loop := attachLoop(t, name)
	dev := openBlock(t, loop)
	src := openDisks(t, Options{RingBytes: 1 << 20}, loop)
	src.giveUp = 300 * time.Millisecond
	r := capturetest.NewReplicator(src)
	closeExact(t, r)

	thaw := freeze(t, dir) // what is written to the device waits
	time.AfterFunc(20*time.Second, thaw)
	done := make(chan error)
	begin := time.Now() // the age of the write counts
	go func() {
		_, err := dev.WriteAt(capturetest.Pattern(9, 4096), 8192)
		done <- err
	}()
	for src.Stats().Writes == 0 {
		time.Sleep(time.Millisecond)
	}
	src.Overflow()
	if err := src.Resume(t.Context()); err != nil { // reads wait as well, so no bulk
		t.Fatal(err)
	}
	if d, s := time.Since(begin), src.Stats(); d < src.giveUp || s.LostCompletions != 1 || !s.Settled {
		t.Errorf("resumed after %v, %+v", d, s)
	}
	capturedUpTo(t, r, src)
	thaw()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); src.Stats().Overflows < 2; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("no overflow: %+v", src.Stats())
		}
	}
	if n := atomic.LoadUint64(word64(src.prog.control[controlLate:])); n != 1 {
		t.Errorf("%d late completions", n)
	}
	capturedUpTo(t, r, src)
	if r.Losts() != 2 {
		t.Errorf("%d losts", r.Losts())
	}
	closeExact(t, r)
	mustEqual(t, r)
}

// TestCrowdedTable leaves no place in which writes could be noted.
func TestCrowdedTable(t *testing.T) {
	if testing.Short() {
		t.Skip("not with -short: the race detector makes the consumer slower than the writers")
	}
	loop := newLoop(t, 32<<20)
	src := openDisks(t, Options{RingBytes: 1 << 20}, loop)
	src.giveUp = 300 * time.Millisecond
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	state := atomic.LoadUint32(src.state)
	for i := range table(src) {
		table(src)[i] = flight{Bio: uint64(i)<<8 | 2, To: 8, Left: 4096, Time: monotonic(), State: state, Dev: 1}
	}
	stop := writers(t, openBlock(t, loop), 32<<20, 4, 100*time.Microsecond)
	for src.Stats().Overflows == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		closeExact(t, r)
		src.Overflow()
	}
	if atomic.LoadUint64(word64(src.prog.control[controlUntrackedAt:])) == 0 {
		t.Error("writes were noted: nothing was tested")
	}
	stop()
	closeExact(t, r)
	mustEqual(t, r)
}
