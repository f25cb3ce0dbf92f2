//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/testenv"
)

// run runs a program and returns what it prints.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// newLoop makes a loop device over a file in memory; t removes both.
// args go to losetup.
func newLoop(t testing.TB, size int64, args ...string) string {
	t.Helper()
	testenv.NeedLoop(t)
	testenv.NeedEBPF(t)
	dir := t.TempDir()
	if shm, err := os.MkdirTemp("/dev/shm", "farside-ebpf-test-"); err == nil {
		dir = shm
		t.Cleanup(func() { os.RemoveAll(shm) })
	}
	name := filepath.Join(dir, "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return attachLoop(t, name, args...)
}

// attachLoop makes a loop device over a file; t removes it.
func attachLoop(t testing.TB, name string, args ...string) string {
	t.Helper()
	var loop string
	for tries := 0; ; tries++ { // somebody else may take the same free device
		out, err := exec.Command("losetup", append(args, "--find", "--show", name)...).CombinedOutput()
		if loop = strings.TrimSpace(string(out)); err == nil {
			break
		}
		if tries == 10 {
			t.Fatalf("losetup %s: %v: %s", name, err, loop)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", loop, err, out)
		}
	})
	return loop
}

// openDisks captures block devices as disks 1, 2, ...; t closes the Source.
func openDisks(t testing.TB, o Options, paths ...string) *source {
	t.Helper()
	var disks []capture.Disk
	for i, p := range paths {
		disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Path: p})
	}
	src, err := Open(disks, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return src.(*source)
}

// blockDevice writes to a block device by direct I/O.
type blockDevice struct {
	f *os.File
}

func openBlock(t testing.TB, path string) *blockDevice {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &blockDevice{f}
}

func (d *blockDevice) WriteAt(p []byte, off int64) (int, error) {
	q := aligned(len(p))
	copy(q, p)
	return d.f.WriteAt(q, off)
}

func (d *blockDevice) ioctl(req uintptr, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), req, uintptr(unsafe.Pointer(&arg))); e != 0 {
		if errors.Is(e, unix.EOPNOTSUPP) {
			return fmt.Errorf("%w: %w", e, dr.ErrUnsupported)
		}
		return e
	}
	return nil
}

const (
	blkDiscard = 0x1277
	blkZeroOut = 0x127f
)

func (d *blockDevice) Zero(off, n int64) error    { return d.ioctl(blkZeroOut, off, n) }
func (d *blockDevice) Discard(off, n int64) error { return d.ioctl(blkDiscard, off, n) }
func (d *blockDevice) Flush() error               { return d.f.Sync() }

// newTarget makes the conformance suite's target of loop devices.
func newTarget(t *testing.T, c capturetest.Config) *capturetest.Target {
	target := &capturetest.Target{}
	var paths []string
	for _, size := range c.Sizes {
		paths = append(paths, newLoop(t, size))
	}
	o := Options{RingBytes: 64 << 20}
	if c.Ring > 0 {
		o.RingBytes = c.Ring
	}
	target.Source = openDisks(t, o, paths...)
	for _, p := range paths {
		target.Devices = append(target.Devices, openBlock(t, p))
	}
	return target
}

// writers writes random blocks of 0.5 to 64 KiB with n goroutines, which pause after
// each, until stop is called. Calling stop again is harmless.
func writers(t *testing.T, d capturetest.Device, size int64, n int, pause time.Duration) (stop func()) {
	var wg sync.WaitGroup
	quit := make(chan struct{})
	for g := range uint64(n) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(g, 4))
			stripe := size / int64(n) &^ 511
			for i := uint64(0); ; i++ {
				select {
				case <-quit:
					return
				default:
				}
				length := (1 + rng.Int64N(1+rng.Int64N(128))) * 512
				off := int64(g)*stripe + rng.Int64N((stripe-length)/512)*512
				if _, err := d.WriteAt(capturetest.Pattern(g<<28|i, length), off); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(pause)
			}
		})
	}
	stop = sync.OnceFunc(func() { close(quit); wg.Wait() })
	t.Cleanup(stop)
	return stop
}
