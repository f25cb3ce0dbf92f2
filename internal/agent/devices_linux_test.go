package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/testenv"
)

// bench is a loop device of a number that losetup does not choose by itself, and files for it.
type bench struct {
	*looker
	dir, device string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	testenv.NeedLoop(t)
	dir, err := os.MkdirTemp("/dev/shm", "farside-devices-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := 9000 + os.Getpid()%1000
	b := &bench{looker: &looker{devices: &devices{}, t: t, now: time.Unix(1000, 0), w: &work{}}, dir: dir, device: fmt.Sprintf("/dev/loop%d", n)}
	if _, err := os.Stat(b.device); err != nil {
		if err := unix.Mknod(b.device, unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(n)))); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(b.device) })
	}
	t.Cleanup(func() {
		b.detach()
		const remove = 0x4c81 // LOOP_CTL_REMOVE
		if f, err := os.Open("/dev/loop-control"); err == nil {
			defer f.Close()
			_ = unix.IoctlSetInt(int(f.Fd()), remove, n) // else an empty device stays
		}
	})
	return b
}

// attach attaches a file of that name and size.
func (b *bench) attach(name, size string, args ...string) {
	b.t.Helper()
	file := filepath.Join(b.dir, name)
	command(b.t, "truncate", "-s", size, file)
	command(b.t, "losetup", append(args, b.device, file)...)
}

// detach waits until the device is gone: others look at all devices now and then.
func (b *bench) detach() {
	b.t.Helper()
	for range 500 {
		if _, err := os.Stat("/sys/block/" + filepath.Base(b.device) + "/loop/backing_file"); err != nil {
			return
		}
		command(b.t, "losetup", "-d", b.device)
		time.Sleep(10 * time.Millisecond)
	}
	b.t.Fatal("the device is not detached")
}

// protect has the device, or a partition of it, captured as it is now.
func (b *bench) protect(path string) {
	b.t.Helper()
	b.m = blockdev.Scan(os.DirFS("/"))
	d, ok := b.m.Find(path)
	if !ok {
		b.t.Fatalf("there is no %s", path)
	}
	b.w.disks = []capture.Disk{{ID: 1, Path: path, Size: d.Size}}
	b.w.identities = []string{d.Stable()}
	clear(b.aside)
	clear(b.known)
	b.open(1)
}

// then looks at this machine and wants an event.
func (b *bench) then(code string, again bool) {
	b.t.Helper()
	b.m = blockdev.Scan(os.DirFS("/"))
	b.sees(code, again)
}

// TestDevicesForReal does to a loop device what can be done to a disk.
func TestDevicesForReal(t *testing.T) {
	b := newBench(t)
	n := newDisks{}
	fresh := func() bool {
		m := blockdev.Scan(os.DirFS("/"))
		for _, c := range n.look(offerOf(wanted{loops: true})(&m), seqsOf(&m), func(*found) bool { return false }) {
			if strings.HasPrefix(c.text, b.device+" ") {
				return true
			}
		}
		return false
	}
	if fresh() {
		t.Error("new before it is there")
	}
	b.attach("a", "8M")
	if !fresh() || fresh() {
		t.Error("a new disk is not told once")
	}
	b.protect(b.device)
	b.then("", false)

	command(t, "truncate", "-s", "12M", filepath.Join(b.dir, "a"))
	command(t, "losetup", "-c", b.device)
	b.then("disk-grown", false)
	b.then("", false)
	command(t, "truncate", "-s", "4M", filepath.Join(b.dir, "a"))
	command(t, "losetup", "-c", b.device)
	b.then(diskShrunk, true)
	b.open(0)
	command(t, "truncate", "-s", "8M", filepath.Join(b.dir, "a"))
	command(t, "losetup", "-c", b.device)
	b.then("", false)
	b.then("disk-returned", true)
	b.open(1)

	b.detach()
	b.then(diskMissing, true)
	b.attach("a", "8M")
	for range 3 {
		b.now = b.now.Add(time.Second)
		b.m = blockdev.Scan(os.DirFS("/"))
		b.look(b.places(), b.m.Table, b.now)
	}
	b.open(1)

	b.detach() // and, between two looks, another file of the same size
	b.attach("b", "8M")
	b.then(diskReplaced, true)
	b.open(1)
	b.detach()
	b.attach("c", "16M")
	b.then(diskReplaced, true)
	if b.open(0); !strings.Contains(b.aside[1].why, "another disk") {
		t.Error(b.aside[1].why)
	}
	b.detach()
	b.attach("d", "8M", "--sector-size", "4096")
	b.protect(b.device)
	command(t, "losetup", "--sector-size", "512", b.device)
	b.then("disk-reshaped", true)
	b.open(1)

	hold, err := os.Open(b.device)
	if err != nil {
		t.Fatal(err)
	}
	command(t, "losetup", "-d", b.device) // it goes when nobody has it open
	b.then(diskMissing, true)
	if err := hold.Close(); err != nil {
		t.Error(err)
	}
}

// TestPartitionsForReal changes the partition table under a captured disk, and under a captured partition.
func TestPartitionsForReal(t *testing.T) {
	testenv.NeedTool(t, "addpart", "delpart")
	b := newBench(t)
	b.attach("a", "8M", "--partscan")
	command(t, "addpart", b.device, "1", "2048", "4096")
	b.protect(b.device)
	b.then("", false)
	command(t, "addpart", b.device, "2", "8192", "4096")
	b.then("disk-repartitioned", false)
	b.then("", false)

	part := b.device + "p1"
	b.protect(part)
	b.then("", false)
	command(t, "delpart", b.device, "1")
	b.then(diskMissing, true)
	b.open(0)
	command(t, "addpart", b.device, "1", "2048", "4096")
	b.protect(part)
	command(t, "delpart", b.device, "1")
	command(t, "addpart", b.device, "1", "3072", "4096")
	b.then("partition-moved", true)
	b.open(1)
	command(t, "delpart", b.device, "1")
	command(t, "addpart", b.device, "1", "3072", "2048")
	b.then(diskShrunk, true)
	command(t, "delpart", b.device, "1")
	command(t, "delpart", b.device, "2")
}
