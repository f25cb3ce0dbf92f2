//go:build linux && amd64

package ebpf

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/testenv"
)

// mountExt4 makes a file system on dev and mounts it; t unmounts it.
func mountExt4(t *testing.T, dev string) string {
	t.Helper()
	testenv.NeedTool(t, "mkfs.ext4", "mount", "umount", "fstrim")
	run(t, "mkfs.ext4", "-q", "-F", dev)
	dir := t.TempDir()
	run(t, "mount", "-o", "discard", dev, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// freeze freezes the file system of dir until thaw is called; t makes sure of it.
func freeze(t *testing.T, dir string) (thaw func()) {
	t.Helper()
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil {
		t.Fatal(err)
	}
	thaw = sync.OnceFunc(func() {
		if err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0); err != nil {
			t.Error(err)
		}
		f.Close()
	})
	t.Cleanup(thaw)
	return thaw
}

// A habit writes to files in dir as one kind of application does, again and again.
type habit func(dir string, rng *rand.Rand, round int) error

var habits = map[string]habit{
	"direct": func(dir string, rng *rand.Rand, round int) error {
		f, err := os.OpenFile(filepath.Join(dir, "direct"), os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		p := aligned(4096)
		copy(p, capturetest.Pattern(uint64(round), 4096))
		for range 20 {
			if _, err := f.WriteAt(p, rng.Int64N(4096)*4096); err != nil {
				return err
			}
		}
		return nil
	},
	"buffered": func(dir string, rng *rand.Rand, round int) error {
		f, err := os.OpenFile(filepath.Join(dir, "buffered"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		n := rng.Int64N(20000) + 1
		if _, err := f.WriteAt(capturetest.Pattern(uint64(round), n&^7+8), rng.Int64N(8<<20)); err != nil {
			return err
		}
		return f.Sync()
	},
	"sequential": func(dir string, rng *rand.Rand, round int) error {
		name := filepath.Join(dir, fmt.Sprint("sequential", round%4))
		if err := os.WriteFile(name, capturetest.Pattern(uint64(round), 1<<20), 0o600); err != nil {
			return err
		}
		return unix.Access(name, unix.R_OK)
	},
	"mapped": func(dir string, rng *rand.Rand, round int) error {
		f, err := os.OpenFile(filepath.Join(dir, "mapped"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		const size = 4 << 20
		if err := f.Truncate(size); err != nil {
			return err
		}
		mem, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer unix.Munmap(mem)
		for range 50 {
			mem[rng.IntN(size)]++
		}
		return unix.Msync(mem, unix.MS_ASYNC)
	},
	"names": func(dir string, rng *rand.Rand, round int) error {
		name := filepath.Join(dir, fmt.Sprint("name", rng.IntN(50)))
		if err := os.WriteFile(name, capturetest.Pattern(uint64(round), 4096), 0o600); err != nil {
			return err
		}
		if err := os.Rename(name, filepath.Join(dir, fmt.Sprint("renamed", rng.IntN(50)))); err != nil {
			return err
		}
		if round%40 == 0 {
			unix.Sync()
		}
		return nil
	},
	"removes": func(dir string, _ *rand.Rand, round int) error {
		name := filepath.Join(dir, "large")
		if err := os.WriteFile(name, capturetest.Pattern(uint64(round), 3<<20), 0o600); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
		return os.Remove(name)
	},
}

// startLoads runs all loads at once until stop is called.
func startLoads(t *testing.T, dir string, seed uint64) (stop func()) {
	var wg sync.WaitGroup
	quit := make(chan struct{})
	for name, one := range habits {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(len(name))))
			for round := 1; ; round++ {
				select {
				case <-quit:
					return
				case <-time.After(4 * time.Millisecond):
				}
				if err := one(dir, rng, round); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { close(quit); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// dropping leaves out every n-th change.
type dropping struct {
	capture.Source
	n, count int
}

func (d *dropping) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	return d.Source.Next(ctx, wait, func(e capture.Event) error {
		if e.Kind == capture.Change {
			if d.count++; d.count%d.n == 0 {
				return nil
			}
		}
		return fn(e)
	})
}

// follow consumes for a while.
func follow(t *testing.T, r *capturetest.Replicator, d time.Duration) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < d; {
		if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
}

// replicateExt4 replicates a file system in use, then follows it by the stream alone,
// freezes it and compares.
func replicateExt4(t *testing.T, o Options, dropEvery int) (*source, *capturetest.Replicator, error) {
	loop := newLoop(t, 192<<20)
	dir := mountExt4(t, loop)
	stop := startLoads(t, dir, uint64(dropEvery))
	src := openDisks(t, o, loop)
	d := &dropping{Source: src, n: dropEvery}
	r := capturetest.NewReplicator(d)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	for o.RingBytes != 0 && src.Stats().Overflows == 0 { // nobody consumes
		time.Sleep(10 * time.Millisecond)
	}
	closeExact(t, r)
	follow(t, r, time.Second)
	run(t, "fstrim", dir)
	follow(t, r, 200*time.Millisecond)
	thaw := freeze(t, dir)
	capturedUpTo(t, r, src)
	if !r.Exact() {
		t.Logf("overflowed: %+v", src.Stats())
		closeExact(t, r)
	}
	err := r.CompareDisks()
	thaw()
	stop()
	return src, r, err
}

func TestExt4(t *testing.T) {
	src, r, err := replicateExt4(t, Options{}, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	s := src.Stats()
	t.Logf("stats: %+v", s)
	if s.Missed != 0 || s.Flushes == 0 || s.Unreadable != 0 || s.Failed != 0 {
		t.Error("the stream was not whole")
	}
	if r.Losts() != 0 {
		t.Log("overflowed: the machine is busy; the stream alone was not judged")
	}
}

// TestExt4Overflow does the same through a ring that is too small.
func TestExt4Overflow(t *testing.T) {
	src, r, err := replicateExt4(t, Options{RingBytes: 32 << 20, BlockSize: 64 << 10}, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if s := src.Stats(); s.Overflows == 0 || r.Losts() == 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestExt4Power shows that the comparison finds what is missing.
func TestExt4Power(t *testing.T) {
	if _, _, err := replicateExt4(t, Options{}, 20); err == nil {
		t.Error("every 20th change was dropped and the copy is equal")
	} else {
		t.Log(err)
	}
}
