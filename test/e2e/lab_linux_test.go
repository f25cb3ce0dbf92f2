package e2e

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/capture/ebpf"
	"farside/internal/demo/stage"
	"farside/internal/testenv"
	"farside/test/load"
)

// lab is a loop device with a file system under a mixed load, protected by real roles.
type lab struct {
	far
	loop    *load.Loop
	mount   string
	unmount func() error // nil once it was done
	slow    int          // pace of the load; 0 is 1
}

// labOptions say what a lab is made of. The zero value but for the size is a lab with ext4.
type labOptions struct {
	fs       string                       // ext4 (default), xfs, btrfs
	size     int64                        // of the disk
	ring     string                       // of the capture; "" is the driver's default
	pin      bool                         // the capture goes on without the agent
	settings map[string]map[string]string // see stage.Options
}

func newLab(t *testing.T, o labOptions) *lab {
	o.fs = cmp.Or(o.fs, "ext4")
	testenv.NeedEBPF(t)
	testenv.NeedLoop(t)
	testenv.NeedTool(t, "mkfs."+o.fs, "mount", "umount")
	testenv.NeedTool(t, load.Checkers(o.fs)...)
	l := &lab{far: far{t: t, dir: workDir(t), fs: o.fs, size: o.size}}
	l.mount = filepath.Join(l.dir, "mnt")
	var err error
	if l.loop, err = load.NewLoop(filepath.Join(l.dir, "disk.img"), o.size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.loop.Close() })
	if err := l.loop.Format(o.fs); err != nil {
		t.Fatal(err)
	}
	if l.unmount, err = l.loop.Mount(l.mount); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.leave)
	pins := ""
	if o.pin {
		pins = l.pinDir()
	}
	l.stage, err = stage.Raise(t.Context(), stage.Options{
		Dir: l.dir, Program: program(t), Driver: "ebpf", Disk: l.loop.Device, Ring: o.ring, Pin: pins, Settings: o.settings,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.stage.Strike(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, role := range []string{"agent", "process-server", "master-target", "config-server"} {
				t.Logf("%s: %s", role, stage.LastLines(filepath.Join(l.dir, role+".log"), 15))
			}
		}
	})
	return l
}

// pinDir mounts a BPF file system for the capture. When it is unmounted, after the
// agent has ended, nothing of the capture is left.
func (l *lab) pinDir() string {
	l.t.Helper()
	dir := filepath.Join(l.dir, "bpf")
	if err := os.Mkdir(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	if err := ebpf.MountFileSystem(dir); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			l.t.Error(err)
		}
	})
	return filepath.Join(dir, "farside")
}

// leave unmounts the disk. It must be done before an image of a btrfs is
// mounted, since that has the same identity.
func (l *lab) leave() {
	l.t.Helper()
	if l.unmount == nil {
		return
	}
	if err := l.unmount(); err != nil {
		l.t.Error(err)
	}
	l.unmount = nil
}

// load runs the mixed load while fn runs.
func (l *lab) load(fn func()) {
	l.t.Helper()
	stop, err := load.StartSlow(l.mount, max(1, l.slow), &l.oracle)
	if err != nil {
		l.t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			l.t.Error(err)
		}
	}()
	fn()
}

// headEqualsDevice freezes the file system, tags, reads the device, tags again,
// thaws, and compares the views of both tags with what was read.
func (l *lab) headEqualsDevice(name string) *farsidev1.TagPoint {
	l.t.Helper()
	ctx := l.t.Context()
	thaw, err := load.Freeze(l.mount)
	if err != nil {
		l.t.Fatal(err)
	}
	before, err1 := l.stage.Far.Tag(ctx, name)
	device, err2 := os.ReadFile(filepath.Join(l.dir, "disk.img"))
	after, err3 := l.stage.Far.Tag(ctx, name+", read")
	if err := errors.Join(err1, err2, err3, thaw()); err != nil {
		l.t.Fatal(err)
	}
	l.equal(device, before, after)
	return before
}
