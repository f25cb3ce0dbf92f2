//go:build linux && amd64

package ebpf

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/testenv"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	capturetest.Run(t, newTarget)
}

// TestConformanceBioBased runs the suite on zram, whose bios become no requests.
func TestConformanceBioBased(t *testing.T) {
	t.Parallel()
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{Block: 4096, NoFlush: true}
		var paths []string
		for _, size := range c.Sizes {
			paths = append(paths, newZram(t, size))
		}
		target.Source = openDisks(t, Options{RingBytes: cmp.Or(c.Ring, 64<<20)}, paths...)
		for _, p := range paths {
			target.Devices = append(target.Devices, openBlock(t, p))
		}
		return target
	})
}

// TestConformanceLargeSectors runs the suite on disks with sectors of 4 KiB (4Kn).
func TestConformanceLargeSectors(t *testing.T) {
	t.Parallel()
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{Block: 4096}
		var paths []string
		for _, size := range c.Sizes {
			paths = append(paths, newLoop(t, size, "--sector-size", "4096"))
		}
		target.Source = openDisks(t, Options{RingBytes: cmp.Or(c.Ring, 64<<20)}, paths...)
		for _, p := range paths {
			target.Devices = append(target.Devices, openBlock(t, p))
		}
		return target
	})
}

// TestConformancePartitions runs the suite on several partitions of one disk and another whole
// disk: one order over all of them.
func TestConformancePartitions(t *testing.T) {
	t.Parallel()
	testenv.NeedTool(t, "addpart")
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{}
		parts, total := c.Sizes[:max(1, len(c.Sizes)-1)], int64(1<<20)
		for _, size := range parts {
			total += size + 1<<20
		}
		whole := newLoop(t, total, "--partscan")
		var paths []string
		at := int64(1 << 20)
		for i, size := range parts {
			number := strconv.Itoa(i + 1)
			run(t, "addpart", whole, number, strconv.FormatInt(at/512, 10), strconv.FormatInt(size/512, 10))
			paths = append(paths, whole+"p"+number)
			at += size + 1<<20
		}
		for _, size := range c.Sizes[len(parts):] {
			paths = append(paths, newLoop(t, size))
		}
		target.Source = openDisks(t, Options{RingBytes: cmp.Or(c.Ring, 64<<20)}, paths...)
		for _, p := range paths {
			target.Devices = append(target.Devices, openBlock(t, p))
		}
		return target
	})
}

// newZram makes a compressed memory disk; t removes it.
func newZram(t *testing.T, size int64) string {
	t.Helper()
	testenv.NeedEBPF(t)
	id, err := os.ReadFile("/sys/class/zram-control/hot_add")
	if err != nil {
		t.Skipf("skipped: needs zram: %v", err)
	}
	n := strings.TrimSpace(string(id))
	t.Cleanup(func() {
		for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) { // a process that is being started may have it open
			err := os.WriteFile("/sys/class/zram-control/hot_remove", []byte(n), 0)
			if err == nil {
				return
			}
			if time.Since(begin) > 10*time.Second {
				t.Error(err)
				return
			}
		}
	})
	if err := os.WriteFile("/sys/block/zram"+n+"/disksize", []byte(strconv.FormatInt(size, 10)), 0); err != nil {
		t.Fatal(err)
	}
	return "/dev/zram" + n
}

// capturedUpTo consumes the stream up to now.
func capturedUpTo(t *testing.T, r *capturetest.Replicator, src capture.Source) {
	t.Helper()
	for tail := src.Tail(); src.Consumed() < tail; {
		if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
}

func closeExact(t *testing.T, r *capturetest.Replicator) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := r.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

func mustEqual(t *testing.T, r *capturetest.Replicator) {
	t.Helper()
	if err := r.CompareDisks(); err != nil {
		t.Fatal(err)
	}
}

// TestOverflowUnderLoad returns to data mode while four writers never stop.
func TestOverflowUnderLoad(t *testing.T) {
	loop := newLoop(t, 128<<20)
	src := openDisks(t, Options{RingBytes: 8 << 20}, loop)
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	stop := writers(t, openBlock(t, loop), 128<<20, 4, 300*time.Microsecond)
	for cycle := range 5 {
		for src.Stats().Overflows <= uint64(cycle) { // nobody consumes
			time.Sleep(time.Millisecond)
		}
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		err := r.Close(ctx)
		cancel()
		if err != nil {
			t.Fatalf("%v; %+v", err, src.Stats())
		}
		t.Logf("%d losts, exact after %v", r.Losts(), time.Since(begin).Round(time.Millisecond))
	}
	stop()
	capturedUpTo(t, r, src)
	if !r.Exact() {
		closeExact(t, r)
	}
	mustEqual(t, r)
	s := src.Stats()
	if s.Overflows < 5 || s.Missed != 0 {
		t.Error("few overflows, or missed writes")
	}
	t.Logf("stats: %+v", s)
}

// TestOpenUnderLoad begins while writes are on their way.
func TestOpenUnderLoad(t *testing.T) {
	loop := newLoop(t, 64<<20)
	stop := writers(t, openBlock(t, loop), 64<<20, 4, 0)
	for range 3 {
		src := openDisks(t, Options{}, loop)
		r := capturetest.NewReplicator(src)
		if err := r.MarkAll(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		err := r.Close(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		if err := src.Close(); err != nil { // in full flight, too
			t.Fatal(err)
		}
	}
	src := openDisks(t, Options{}, loop)
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	time.Sleep(100 * time.Millisecond)
	stop()
	capturedUpTo(t, r, src)
	if !r.Exact() {
		t.Logf("overflowed: %+v", src.Stats())
		closeExact(t, r)
	}
	mustEqual(t, r)
}

// partitions makes two partitions of 8 MiB on a loop device.
func partitions(t *testing.T) (loop, first, second string) {
	t.Helper()
	testenv.NeedTool(t, "addpart")
	loop = newLoop(t, 32<<20, "--partscan")
	run(t, "addpart", loop, "1", "2048", "16384")
	run(t, "addpart", loop, "2", "18432", "16384")
	return loop, loop + "p1", loop + "p2"
}

func TestPartitions(t *testing.T) {
	loop, first, second := partitions(t)
	src := openDisks(t, Options{RingBytes: 1 << 20}, first, second)
	if d := src.Disks(); d[0].Size != 8<<20 || d[1].Size != 8<<20 {
		t.Fatalf("disks: %+v", d)
	}
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	closeExact(t, r)
	write := func(path string, off, n int64) {
		t.Helper()
		if _, err := openBlock(t, path).WriteAt(capturetest.Pattern(uint64(off)+7, n), off); err != nil {
			t.Fatal(err)
		}
	}
	var got []dr.Extent
	r.OnExact = func(e capture.Event) error { got = append(got, e.Extent); return nil }
	write(first, 0, 4096)
	write(second, 8<<20-512, 512)
	write(loop, 1<<20+8192, 4096) // in the first, by the whole disk
	write(loop, 0, 1<<20)         // before both
	write(loop, 17<<20, 4096)     // behind both
	capturedUpTo(t, r, src)
	want := []dr.Extent{{Disk: 1, Offset: 0, Length: 4096}, {Disk: 2, Offset: 8<<20 - 512, Length: 512}, {Disk: 1, Offset: 8192, Length: 4096}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("captured %v, want %v", got, want)
	}
	mustEqual(t, r)
	write(loop, 9<<20-8192, 16384) // across both: marked
	capturedUpTo(t, r, src)
	if r.Exact() || r.Losts() != 1 {
		t.Errorf("a write across partitions: exact %v, %d losts", r.Exact(), r.Losts())
	}
	closeExact(t, r)
	mustEqual(t, r)
}

// TestWholeDisk captures what is written through a partition.
func TestWholeDisk(t *testing.T) {
	loop, first, _ := partitions(t)
	src := openDisks(t, Options{RingBytes: 1 << 20}, loop)
	r := capturetest.NewReplicator(src)
	closeExact(t, r)
	if _, err := openBlock(t, first).WriteAt(capturetest.Pattern(1, 8192), 4096); err != nil {
		t.Fatal(err)
	}
	var got []dr.Extent
	r.OnExact = func(e capture.Event) error { got = append(got, e.Extent); return nil }
	capturedUpTo(t, r, src)
	if len(got) == 0 || got[0].Offset != 1<<20+4096 {
		t.Errorf("captured %v", got)
	}
	mustEqual(t, r)
	if _, err := Open([]capture.Disk{{ID: 1, Path: loop}, {ID: 2, Path: first}}, Options{}); !errors.Is(err, dr.ErrExists) {
		t.Errorf("a disk and its partition: %v", err)
	}
}

// hugePages returns memory of n bytes in pages of 2 MiB, if the kernel has them.
func hugePages(t *testing.T, n int) []byte {
	t.Helper()
	const huge = 2 << 20
	mem, err := unix.Mmap(-1, 0, n+huge, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	if err := unix.Madvise(mem, unix.MADV_HUGEPAGE); err != nil {
		t.Logf("no huge pages: %v", err)
	}
	return mem[-uintptr(unsafe.Pointer(&mem[0]))&(huge-1):][:n]
}

// TestHugeBio writes 64 MiB at once: into a large ring it is captured, past a small
// one it is marked.
func TestHugeBio(t *testing.T) {
	const n = 64 << 20
	for _, ring := range []int64{256 << 20, 4 << 20} {
		loop := newLoop(t, n)
		src := openDisks(t, Options{RingBytes: ring}, loop)
		r := capturetest.NewReplicator(src)
		closeExact(t, r)
		mem := hugePages(t, n)
		copy(mem, capturetest.Pattern(5, n))
		if _, err := unix.Pwrite(int(openBlock(t, loop).f.Fd()), mem, 0); err != nil {
			t.Fatal(err)
		}
		s := src.Stats()
		t.Logf("ring %d MiB: %d captured with %d bytes, %d marked", ring>>20, s.Writes, s.Bytes, s.Marked)
		capturedUpTo(t, r, src)
		if large := ring > n; r.Exact() != large || large && s.Bytes != n {
			t.Errorf("ring %d MiB: exact %v, %+v", ring>>20, r.Exact(), s)
		}
		closeExact(t, r)
		mustEqual(t, r)
	}
}

func TestBitmapOnly(t *testing.T) {
	loop := newLoop(t, 64<<20)
	src := openDisks(t, Options{BitmapOnly: true, BlockSize: 64 << 10}, loop)
	r := capturetest.NewReplicator(src)
	if err := r.MarkAll(); err != nil {
		t.Fatal(err)
	}
	stop := writers(t, openBlock(t, loop), 64<<20, 2, 0)
	for range 50 {
		if _, err := r.Events(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Bulk(2 << 20); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	for n := int64(1); n > 0; {
		var err error
		if n, err = r.Bulk(64 << 20); err != nil {
			t.Fatal(err)
		}
	}
	mustEqual(t, r)
	if err := src.Resume(t.Context()); !errors.Is(err, dr.ErrUnsupported) {
		t.Errorf("resume: %v", err)
	}
	if s := src.Stats(); s.Mode != capture.ModeBitmap || s.Marked == 0 || s.Writes != 0 || r.Losts() != 1 {
		t.Errorf("%d losts, stats: %+v", r.Losts(), s)
	}
}

// TestAccounting compares with the kernel's own counters.
func TestAccounting(t *testing.T) {
	loop := newLoop(t, 64<<20)
	src := openDisks(t, Options{RingBytes: 1 << 20}, loop)
	stop := writers(t, openBlock(t, loop), 64<<20, 4, 0)
	time.Sleep(300 * time.Millisecond)
	stop()
	s := src.Stats()
	if d := s.Disks[0]; d.SeenBytes == 0 || d.SeenBytes != d.KernelBytes {
		t.Errorf("seen %d bytes, the kernel counted %d", d.SeenBytes, d.KernelBytes)
	}
	if s.Writes+s.Marked != s.Disks[0].SeenWrites || s.Missed != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestFailedWrites fills the file system below a loop device: what the device
// refused must not stay in the copy.
func TestFailedWrites(t *testing.T) {
	testenv.NeedLoop(t)
	testenv.NeedEBPF(t)
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=2m", "farside-test", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	name := filepath.Join(dir, "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, 8<<20); err != nil {
		t.Fatal(err)
	}
	loop := attachLoop(t, name)
	src := openDisks(t, Options{RingBytes: 16 << 20}, loop)
	r := capturetest.NewReplicator(src)
	closeExact(t, r)
	dev, failed := openBlock(t, loop), 0
	for i := range int64(64) {
		if _, err := dev.WriteAt(capturetest.Pattern(uint64(i), 128<<10), i*(128<<10)); err != nil {
			failed++
		}
	}
	if failed == 0 {
		testenv.Missing(t, "a file system that refuses writes when it is full: none failed")
	}
	capturedUpTo(t, r, src)
	if r.Exact() {
		t.Error("exact after a write failed")
	}
	closeExact(t, r)
	mustEqual(t, r)
	if s := src.Stats(); s.Failed == 0 || s.Overflows == 0 {
		t.Errorf("stats: %+v", s)
	}
}

// TestCloseLeavesNothing looks for the programs in the kernel afterwards.
func TestCloseLeavesNothing(t *testing.T) {
	src := openDisks(t, Options{RingBytes: 1 << 20}, newLoop(t, 1<<20))
	var ids []ebpf.ProgramID
	for _, p := range []*ebpf.Program{src.prog.objs.OnQueue, src.prog.objs.OnRequestComplete, src.prog.objs.OnBioComplete} {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, ok := info.ID()
		if !ok {
			t.Fatal("program without an id")
		}
		ids = append(ids, id)
	}
	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, ids)
}

// awaitGone waits until the kernel has freed programs, which takes it a grace period.
func awaitGone(t *testing.T, ids []ebpf.ProgramID) {
	t.Helper()
	for _, id := range ids {
		for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) { // freed after a grace period
			p, err := ebpf.NewProgramFromID(id)
			if errors.Is(err, os.ErrNotExist) {
				break
			}
			if err == nil {
				p.Close()
			}
			if time.Since(begin) > 10*time.Second {
				t.Fatalf("program %d is still there: %v", id, err)
			}
		}
	}
}

func TestReadAtLargeBlocks(t *testing.T) {
	loop := newLoop(t, 8<<20, "--sector-size", "4096")
	src := openDisks(t, Options{}, loop)
	data := capturetest.Pattern(3, 4<<20)
	if _, err := openBlock(t, loop).WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]int64{{512, 512}, {4096 - 512, 1024}, {0, 4096}, {1536, 2<<20 + 512}, {0, 4 << 20}} {
		p := make([]byte, c[1])
		if n, err := src.ReadAt(p, 1, c[0]); n != len(p) || err != nil || string(p) != string(data[c[0]:c[0]+c[1]]) {
			t.Errorf("read %d bytes at %d: %d, %v", c[1], c[0], n, err)
		}
	}
	for _, c := range [][2]int64{{1, 512}, {0, 100}, {-512, 512}, {8 << 20, 512}} {
		if _, err := src.ReadAt(make([]byte, c[1]), 1, c[0]); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("read %d bytes at %d: %v", c[1], c[0], err)
		}
	}
}

// detachedLoop makes a loop device that has no file, and takes the device itself away
// afterwards: without its node it would be in the way of whoever asks for a free one.
func detachedLoop(t *testing.T) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	for i := 200; i < 256; i++ {
		if unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_ADD, i) == nil {
			t.Cleanup(func() { _ = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, i) })
			return "/dev/loop" + strconv.Itoa(i)
		}
	}
	t.Fatal("no number for a loop device is left")
	return ""
}

func TestRefuse(t *testing.T) {
	loop := newLoop(t, 1<<20)
	detached := detachedLoop(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	one := func(path string) []capture.Disk { return []capture.Disk{{ID: 1, Path: path}} }
	for _, c := range []struct {
		name  string
		disks []capture.Disk
		o     Options
		want  error
	}{
		{"no disk", nil, Options{}, dr.ErrInvalid},
		{"too many disks", make([]capture.Disk, MaxDisks+1), Options{}, dr.ErrInvalid},
		{"a missing disk", one("/dev/no-such-disk"), Options{}, dr.ErrNotFound},
		{"a file", one(file), Options{}, dr.ErrInvalid},
		{"a character device", one("/dev/null"), Options{}, dr.ErrInvalid},
		{"a directory", one("/dev"), Options{}, dr.ErrInvalid},
		{"a loop device without a file", one(detached), Options{}, dr.ErrUnavailable},
		{"another size", []capture.Disk{{ID: 1, Path: loop, Size: 4096}}, Options{}, dr.ErrInvalid},
		{"a disk twice", []capture.Disk{{ID: 1, Path: loop}, {ID: 2, Path: loop}}, Options{}, dr.ErrExists},
		{"an id twice", []capture.Disk{{ID: 1, Path: loop}, {ID: 1, Path: newLoop(t, 1<<20)}}, Options{}, dr.ErrExists},
		{"an odd ring", one(loop), Options{RingBytes: 100000}, dr.ErrInvalid},
		{"an odd block size", one(loop), Options{BlockSize: 100}, dr.ErrInvalid},
	} {
		src, err := Open(c.disks, c.o)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil {
			src.Close()
		}
	}
}
