//go:build linux && amd64

package ebpf

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/testenv"
)

// newPins mounts a BPF file system of its own and returns a directory in it that doesn't
// exist yet. At the end t fails if a pin is left.
func newPins(t testing.TB) string {
	t.Helper()
	testenv.NeedEBPF(t)
	mount := t.TempDir()
	if err := MountFileSystem(mount); err != nil {
		testenv.Missing(t, "a BPF file system that can be mounted: "+err.Error())
	}
	t.Cleanup(func() {
		left, err := os.ReadDir(mount)
		if err != nil {
			t.Error(err)
		}
		for _, e := range left {
			if pins, _ := filepath.Glob(filepath.Join(mount, e.Name(), "*", "*")); len(pins) > 0 {
				t.Errorf("pins are left: %v", pins)
			}
		}
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(mount, "farside", "capture")
}

func TestSurvivor(t *testing.T) {
	capturetest.RunSurvivor(t, func(t *testing.T, c capturetest.Config) *capturetest.Machine {
		pins := newPins(t)
		var paths []string
		m := &capturetest.Machine{}
		for _, size := range c.Sizes {
			paths = append(paths, newLoop(t, size))
			m.Devices = append(m.Devices, openBlock(t, paths[len(paths)-1]))
		}
		m.Open = func(o capturetest.MemOptions) (capture.Survivor, error) {
			var disks []capture.Disk
			for i, p := range paths {
				disks = append(disks, capture.Disk{ID: dr.DiskID(i + 1), Path: p})
			}
			if len(o.Disks) > 0 {
				disks = nil
				for _, id := range o.Disks {
					disks = append(disks, capture.Disk{ID: id, Path: paths[id-1]})
				}
			}
			return openSurvivor(disks, Options{RingBytes: cmp.Or(c.Ring, 64<<20), Pin: pins, Hold: o.Hold, Memory: o.Memory})
		}
		return m
	})
}

func openSurvivor(disks []capture.Disk, o Options) (capture.Survivor, error) {
	src, err := Open(disks, o)
	if err != nil {
		return nil, err
	}
	return src.(capture.Survivor), nil
}

// programsOf returns the numbers of the programs that are pinned.
func programsOf(t *testing.T, pins string) (ids []ebpf.ProgramID) {
	t.Helper()
	for _, name := range pinLinks {
		k, err := link.LoadPinnedLink(filepath.Join(pins, pinLive, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := k.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, info.Program)
		k.Close()
	}
	return ids
}

// TestForgetLeavesNothing looks for programs and pins afterwards, and shows that they were
// there before.
func TestForgetLeavesNothing(t *testing.T) {
	pins, disks := newPins(t), []capture.Disk{{ID: 1, Path: newLoop(t, 8<<20)}}
	o := Options{RingBytes: 1 << 20, Pin: pins, Memory: 100}
	s, err := openSurvivor(disks, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	ids := programsOf(t, pins)
	if s, err = openSurvivor(disks, o); err != nil || !s.Adopted() || len(s.Memory()) != 100 {
		t.Fatalf("not adopted: %v", err)
	}
	s.Forget()
	s.Forget()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, ids)
	if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

// TestGrown: of a disk that has grown nothing is missed, and its tail is dirty.
func TestGrown(t *testing.T) {
	pins := newPins(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	loop := attachLoop(t, file)
	disks, o := []capture.Disk{{ID: 1, Path: loop}}, Options{RingBytes: 16 << 20, Pin: pins, Hold: true}
	s, err := openSurvivor(disks, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Forget(); s.Close() }()
	r := capturetest.NewReplicator(s)
	closeExact(t, r)
	s.Release(s.Position())
	dev := openBlock(t, loop)
	write := func(off int64) {
		if _, err := dev.WriteAt(capturetest.Pattern(uint64(off), 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	write(8192)
	if err := os.Truncate(file, 6<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "losetup", "--set-capacity", loop)
	for range 3 {
		if _, err := dev.WriteAt(make([]byte, 2<<20), 4<<20); err != nil { // in the tail, which nobody watches
			t.Fatal(err)
		}
	}
	write(5 << 20)
	write(1 << 20)
	if s.Stats().Detached {
		t.Error("a disk that has grown counts as detached")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openSurvivor(disks, o); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Dirty(); s.Adopted() || len(s.Inherited()) != 1 || n != 2<<20+2*4096 || err != nil {
		t.Errorf("adopted %v, inherited %v, %d bytes dirty, %v", s.Adopted(), s.Inherited(), n, err)
	}
	r = capturetest.NewReplicator(s) // of zeroes, as the disk was
	closeExact(t, r)
	mustEqual(t, r)
}

// TestRemove takes pins away whose disk is gone.
func TestRemove(t *testing.T) {
	pins := newPins(t)
	s, err := openSurvivor([]capture.Disk{{ID: 1, Path: newLoop(t, 8<<20)}}, Options{RingBytes: 1 << 20, Pin: pins, Memory: 8})
	if err != nil {
		t.Fatal(err)
	}
	if err := Remove(pins); !errors.Is(err, dr.ErrExists) {
		t.Errorf("remove while it captures: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	ids := programsOf(t, pins)
	for range 2 {
		if err := Remove(pins); err != nil {
			t.Error(err)
		}
	}
	awaitGone(t, ids)
	if exists(pins) {
		t.Error("the directory is left")
	}
}

// TestReplaceLeavesNothing: the programs of a capture that was replaced end.
func TestReplaceLeavesNothing(t *testing.T) {
	pins, loop := newPins(t), newLoop(t, 8<<20)
	disks := []capture.Disk{{ID: 1, Path: loop}}
	s, err := openSurvivor(disks, Options{RingBytes: 1 << 20, Pin: pins})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	ids := programsOf(t, pins)
	if s, err = openSurvivor(disks, Options{RingBytes: 2 << 20, Pin: pins}); err != nil {
		t.Fatal(err)
	}
	defer func() { s.Forget(); s.Close() }()
	if in := s.Inherited(); s.Adopted() || len(in) != 1 {
		t.Errorf("another ring: adopted %v, inherited %v", s.Adopted(), in)
	}
	awaitGone(t, ids)
}

// TestBrokenPins: pins that somebody removed or replaced are not gone on with.
func TestBrokenPins(t *testing.T) {
	loop := newLoop(t, 8<<20)
	disks := []capture.Disk{{ID: 1, Path: loop}}
	for name, harm := range map[string]func(t *testing.T, live string){
		"a link is gone":   func(t *testing.T, live string) { os.Remove(filepath.Join(live, pinLinks[2])) },
		"the ring is gone": func(t *testing.T, live string) { os.Remove(filepath.Join(live, "ring")) },
		"a link is another one": func(t *testing.T, live string) {
			os.Remove(filepath.Join(live, pinLinks[2]))
			k, err := link.LoadPinnedLink(filepath.Join(live, pinLinks[0]), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			if err := k.Pin(filepath.Join(live, pinLinks[2])); err != nil { // moves it
				t.Fatal(err)
			}
		},
		"another version": func(t *testing.T, live string) { editNotes(t, live, func(n *notes) { n.Version++ }) },
		"no description": func(t *testing.T, live string) {
			editNotes(t, live, func(n *notes) { n.MetaLength = 1 << 40; n.Meta[0] = 0 })
		},
		"a place behind the ring": func(t *testing.T, live string) { editNotes(t, live, func(n *notes) { n.Floor = 1 << 40 }) },
		"a crooked place":         func(t *testing.T, live string) { editNotes(t, live, func(n *notes) { n.Floor = 3 }) },
	} {
		t.Run(name, func(t *testing.T) {
			pins := newPins(t)
			o := Options{RingBytes: 1 << 20, Pin: pins, Memory: 8}
			s, err := openSurvivor(disks, o)
			if err != nil {
				t.Fatal(err)
			}
			s.Memory()[0] = 1
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = openSurvivor(disks, o); err != nil || !s.Adopted() || s.Stats().Unpinned {
				t.Fatalf("unharmed: %v", err)
			}
			harm(t, filepath.Join(pins, pinLive))
			if missing := strings.HasPrefix(name, "a link") || strings.HasSuffix(name, "gone"); s.Stats().Unpinned != missing {
				t.Errorf("unpinned: %v", s.Stats().Unpinned)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = openSurvivor(disks, o); err != nil {
				t.Fatal(err)
			}
			defer func() { s.Forget(); s.Close() }()
			if s.Adopted() || len(s.Inherited()) > 0 || s.Memory()[0] != 0 {
				t.Errorf("adopted %v, inherited %v", s.Adopted(), s.Inherited())
			}
		})
	}
}

// editNotes changes pinned notes.
func editNotes(t *testing.T, live string, edit func(*notes)) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(live, pinNotes), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	mem, err := unix.Mmap(m.FD(), 0, notesSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	edit(notesIn(mem))
}

func TestPinRefuses(t *testing.T) {
	disks := []capture.Disk{{ID: 1, Path: newLoop(t, 1<<20)}}
	for name, o := range map[string]Options{
		"not a BPF file system": {Pin: filepath.Join(t.TempDir(), "pins")},
		"hold without pins":     {Hold: true},
		"memory without pins":   {Memory: 8},
		"too much memory":       {Memory: 1 << 30, Pin: "/x"},
	} {
		if src, err := Open(disks, o); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				src.Close()
			}
		}
	}
}

// TestDetached: hooks that vanish and a disk that is another one are noticed, and
// remembered by the next process.
func TestDetached(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, s *source, loop string){
		"a hook is gone": func(t *testing.T, s *source, loop string) {
			os.Remove(s.pins.dir.in(pinLive, pinLinks[2]))
			if err := s.prog.links[2].Close(); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, err := openBlock(t, loop).WriteAt(make([]byte, 2<<20), 0); err != nil {
					t.Fatal(err)
				}
			}
		},
		"another disk": func(t *testing.T, s *source, loop string) {
			unix.Close(s.devs[0].fd) // it would keep the device as it is
			s.devs[0].fd = -1
			file, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
			if err != nil {
				t.Fatal(err)
			}
			run(t, "losetup", "--detach", loop)
			run(t, "losetup", loop, strings.TrimSpace(string(file)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			pins, loop := newPins(t), newLoop(t, 8<<20)
			s, err := openSurvivor([]capture.Disk{{ID: 1, Path: loop}}, Options{RingBytes: 1 << 20, Pin: pins})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { s.Forget(); s.Close() }()
			settled := capturetest.NewReplicator(s)
			closeExact(t, settled)
			run(t, "dd", "if=/dev/zero", "of="+loop, "bs=1M", "count=4", "oflag=direct", "status=none") // more than the ring holds
			if st := s.Stats(); st.Detached || st.Disks[0].KernelBytes != 4<<20 || st.Disks[0].KernelBytes != st.Disks[0].SeenBytes {
				t.Fatalf("before: %+v", st)
			}
			harm(t, s.(survivor).source, loop)
			if st := s.Stats(); st.Detached == st.Disks[0].Gone || st.Disks[0].Gone != (name == "another disk") {
				t.Fatalf("after: %+v", st)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = openSurvivor([]capture.Disk{{ID: 1, Path: loop}}, Options{RingBytes: 1 << 20, Pin: pins}); err != nil {
				t.Fatal(err)
			}
			if s.Adopted() || len(s.Inherited()) > 0 || s.Stats().Detached {
				t.Errorf("adopted %v, inherited %v", s.Adopted(), s.Inherited())
			}
		})
	}
}

// TestAccountingUnderLoad opens while writes are in flight, many times, and compares with the
// kernel's counters when nothing is.
func TestAccountingUnderLoad(t *testing.T) {
	pins, loop := newPins(t), newLoop(t, 64<<20)
	o := Options{RingBytes: 1 << 20, Pin: pins}
	for round := range 5 {
		stop := writers(t, openBlock(t, loop), 64<<20, 4, 0)
		time.Sleep(10 * time.Millisecond)
		s, err := openSurvivor([]capture.Disk{{ID: 1, Path: loop}}, o)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 { // through processes
			time.Sleep(10 * time.Millisecond)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = openSurvivor([]capture.Disk{{ID: 1, Path: loop}}, o); err != nil || !s.Adopted() {
				t.Fatal(err)
			}
		}
		stop()
		st := s.Stats()
		if d := st.Disks[0]; d.SeenBytes == 0 || d.KernelBytes > d.SeenBytes+256<<10 || d.SeenBytes > d.KernelBytes+256<<10 || st.Detached {
			t.Errorf("round %d: seen %d, kernel %d", round, d.SeenBytes, d.KernelBytes)
		} else {
			t.Logf("seen - kernel: %d of %d", int64(d.SeenBytes)-int64(d.KernelBytes), d.SeenBytes)
		}
		s.Forget()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
