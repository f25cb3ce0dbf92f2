package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/demo/stage"
	"farside/internal/nbd"
	"farside/internal/testenv"
	"farside/test/load"
)

// highLoop attaches a file to a loop device of a number that losetup does not choose by itself, so that
// the device is there for the file when it is attached again.
func highLoop(t *testing.T, file string, n int) *load.Loop {
	t.Helper()
	n += 500 + os.Getpid()%1000*8
	l := &load.Loop{Device: fmt.Sprintf("/dev/loop%d", n), File: file}
	if _, err := os.Stat(l.Device); err != nil {
		if err := unix.Mknod(l.Device, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(l.Device) })
	}
	t.Cleanup(func() {
		const remove = 0x4c81 // LOOP_CTL_REMOVE
		if f, err := os.Open("/dev/loop-control"); err == nil {
			defer f.Close()
			_ = unix.IoctlSetInt(int(f.Fd()), remove, n) // else an empty device stays
		}
	})
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, outDisk)); err != nil {
		t.Fatal(err)
	}
	losetup(t, l.Device, file)
	t.Cleanup(func() { l.Close() })
	return l
}

func losetup(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("losetup", args...).CombinedOutput(); err != nil {
		t.Fatalf("losetup %v: %v\n%s", args, err, out)
	}
}

const outDisk = 32 << 20

// scribble writes random blocks to a disk, which it opens anew for each, until stop is closed: not while somebody
// else holds the lock.
func scribble(t *testing.T, device string, mayWrite sync.Locker, stop <-chan struct{}) (written int) {
	block := make([]byte, 4096)
	for i := 0; ; i++ {
		select {
		case <-stop:
			return written
		case <-time.After(2 * time.Millisecond):
		}
		if _, err := rand.Read(block); err != nil {
			t.Error(err)
		}
		mayWrite.Lock()
		err := writeAt(device, block, int64(i*37%(outDisk/4096))*4096)
		mayWrite.Unlock()
		if err != nil {
			t.Errorf("write to %s: %v", device, err)
			return written
		}
		written++
	}
}

// TestDiskTakenOut: one of two disks is taken out under load. The other is replicated on, with points, and
// the machine says what it lacks. When the disk is back, changed meanwhile, the copies of both equal the disks, and nobody had to do anything.
func TestDiskTakenOut(t *testing.T) {
	t.Parallel()
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	l := &lab{far: far{t: t, dir: workDir(t)}}
	pins := l.pinDir()
	a, b := highLoop(t, filepath.Join(l.dir, "a"), 0), highLoop(t, filepath.Join(l.dir, "b"), 1)
	s, err := stage.Raise(t.Context(), stage.Options{Dir: l.dir, Program: program(t), Driver: "ebpf", Disk: a.Device, Pin: pins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Strike(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(stage.LastLines(filepath.Join(l.dir, "agent.log"), 40))
		}
	})
	l.stage = s
	l.protect(a.Device)
	l.protect(b.Device)
	l.until(time.Minute, "both disks are protected", func(m *farsidev1.Machine) bool {
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_PROTECTED && len(m.GetDisks()) == 2 && m.GetNewest() != nil
	})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var once sync.Once
	rest := func() { once.Do(func() { close(stop); wg.Wait() }) }
	t.Cleanup(rest)
	var there sync.Mutex // the disk that is taken out
	for x, mayWrite := range map[*load.Loop]sync.Locker{a: &there, b: &sync.Mutex{}} {
		wg.Go(func() {
			if n := scribble(t, x.Device, mayWrite, stop); n < 100 {
				t.Errorf("only %d writes to %s", n, x.Device)
			}
		})
	}
	time.Sleep(time.Second)

	there.Lock() // a device that somebody has open is not detached
	losetup(t, "--detach", a.Device)
	out := l.until(time.Minute, "one disk is missing and the other goes on", func(m *farsidev1.Machine) bool {
		return m.GetState() == farsidev1.MachineState_MACHINE_STATE_DEGRADED
	})
	if !strings.Contains(out.GetReason(), a.Device) || out.GetDisks()[0].GetState() != "missing" || out.GetDisks()[1].GetState() != "ok" {
		t.Errorf("%s; %v", out.GetReason(), out.GetDisks())
	}
	without, err := s.Far.Tag(t.Context(), "without a disk")
	if err != nil {
		t.Fatal(err)
	}
	atFirst := l.disks(without.GetPosition())
	if held := readFile(t, a.File); !bytes.Equal(atFirst[0], held) {
		t.Error("the copy of the missing disk is not what it held")
	}
	changed := bytes.Repeat([]byte("written elsewhere"), 8192)
	if err := writeAt(a.File, changed, 5<<20); err != nil {
		t.Fatal(err)
	}
	losetup(t, a.Device, a.File)
	there.Unlock()
	l.exact(time.Minute)
	time.Sleep(time.Second)
	rest()
	after, err := s.Far.Tag(t.Context(), "both")
	if err != nil {
		t.Fatal(err)
	}
	m := l.exact(time.Minute)
	got := l.disks(after.GetPosition())
	for i, x := range []*load.Loop{a, b} {
		if !bytes.Equal(got[i], readFile(t, x.File)) {
			t.Errorf("the copy of %s differs from the disk", x.Device)
		}
	}
	if bytes.Equal(got[1], atFirst[1]) || !bytes.Contains(got[0], changed[:100]) { // the load may have overwritten some of it
		t.Error("nothing has changed since the disk was missing")
	}
	var codes []string
	for _, e := range m.GetEvents() {
		codes = append(codes, e.GetCode())
	}
	for _, want := range []string{"disk-missing", "disk-returned", "disks-changed"} {
		if !slices.Contains(codes, want) {
			t.Errorf("no %s among the events %v", want, codes)
		}
	}
	t.Logf("events %v; missing: %s", codes, out.GetReason())
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	unix.Sync()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeAt(name string, b []byte, off int64) error {
	f, err := os.OpenFile(name, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, off)
	return errors.Join(err, f.Close())
}

// disks returns what all disks held at a position.
func (f *far) disks(p *farsidev1.Position) (out [][]byte) {
	f.t.Helper()
	v := f.open(p, false)
	defer f.close(v)
	for _, x := range v.View.GetStatus().GetExports() {
		i := slices.IndexFunc(x.GetUris(), func(u string) bool { return strings.HasPrefix(u, "nbd") && !strings.HasPrefix(u, "nbds") })
		if i < 0 {
			f.t.Fatalf("no uri of %v can be used", x.GetUris())
		}
		c, err := nbd.Dial(f.t.Context(), x.GetUris()[i], nil)
		if err != nil {
			f.t.Fatal(err)
		}
		b := make([]byte, outDisk)
		_, err = io.ReadFull(io.NewSectionReader(c, 0, outDisk), b)
		if err := errors.Join(err, c.Close()); err != nil {
			f.t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}
