package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// device is a loop device over a file, with an ext4 that is mounted. The loop device detaches itself when its
// last user is gone; the mount is meant to live in a mount namespace of the demo's own (see Isolate). So even
// a demo that is killed leaves nothing behind.
type device struct {
	path string // e.g. /dev/loop3
	size int64
	loop *os.File
	dir  string // the mount point, or "" while not mounted
	root *os.File
	gone bool // what lies on the device is no file system any more
}

// Requests of linux/fs.h: FIFREEZE, FITHAW, and FS_IOC_SHUTDOWN with the flag not to write anything.
const (
	fiFreeze        = 0xc0045877
	fiThaw          = 0xc0045878
	fsShutdown      = 0x8004587d
	withoutLogFlush = 2
)

// attach makes a loop device over the file image.
func attach(image string) (*device, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("make a loop device: %w", err)
	}
	defer control.Close()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("make a loop device: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("make a loop device: %w", err)
	}
	conf := unix.LoopConfig{Fd: uint32(f.Fd())}
	conf.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	copy(conf.Info.File_name[:len(conf.Info.File_name)-1], image)
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("open loop device: %w", err)
		}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &conf); err == nil {
			return &device{path: path, size: info.Size(), loop: loop}, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) || try == 10 { // somebody else took it meanwhile
			return nil, fmt.Errorf("set up %s: %w", path, err)
		}
	}
}

// newDevice makes an ext4 of size bytes in the file image and mounts it at dir.
func newDevice(ctx context.Context, image, dir string, size int64) (*device, error) {
	f, err := os.Create(image)
	if err != nil {
		return nil, fmt.Errorf("make the disk: %w", err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return nil, fmt.Errorf("make the disk: %w", err)
	}
	if err := tool(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", image); err != nil {
		return nil, err
	}
	d, err := attach(image)
	if err != nil {
		return nil, err
	}
	if err := d.mount(dir); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// mount mounts the device at dir, which it makes. The kernel replays the journal.
func (d *device) mount(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mount %s: %w", d.path, err)
	}
	if err := unix.Mount(d.path, dir, "ext4", 0, "errors=remount-ro"); err != nil {
		return fmt.Errorf("mount %s: %w", d.path, err)
	}
	d.dir = dir
	var err error
	if d.root, err = os.Open(dir); err != nil {
		return fmt.Errorf("mount %s: %w", d.path, errors.Join(err, d.unmount()))
	}
	return nil
}

// abandon makes the kernel give the file system up. Without it the kernel may try for ever to write back to
// where overwritten metadata points it, and the unmount hangs with it.
func (d *device) abandon() error {
	flags := uint32(withoutLogFlush)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.root.Fd(), fsShutdown, uintptr(unsafe.Pointer(&flags)))
	if errno != 0 {
		return fmt.Errorf("shut the file system on %s down: %w", d.path, errno)
	}
	return nil
}

// unmount unmounts the file system, and if somebody keeps it busy, hides it until they are gone.
func (d *device) unmount() error {
	if d.dir == "" {
		return nil
	}
	if d.root != nil {
		if d.gone {
			if err := d.abandon(); err != nil {
				return err
			}
		}
		d.root.Close()
		d.root = nil
	}
	err := unix.Unmount(d.dir, 0)
	for try := 0; errors.Is(err, unix.EBUSY) && try < 20; try++ {
		time.Sleep(50 * time.Millisecond)
		err = unix.Unmount(d.dir, 0)
	}
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(d.dir, unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	d.dir = ""
	return nil
}

// Close unmounts and lets go of the loop device.
func (d *device) Close() error {
	return errors.Join(d.unmount(), d.loop.Close())
}

// frozen calls fn while the file system is frozen, for at most limit: then a watchdog process, which has its own
// descriptor, thaws it whatever happened to us. fn must not write to it.
func (d *device) frozen(ctx context.Context, limit time.Duration, fn func(context.Context) error) (err error) {
	release, err := startWatchdog(d.dir, limit)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	if err := unix.IoctlSetInt(int(d.root.Fd()), fiFreeze, 0); err != nil {
		return fmt.Errorf("freeze %s: %w", d.dir, err)
	}
	defer func() {
		if e := unix.IoctlSetInt(int(d.root.Fd()), fiThaw, 0); e != nil {
			err = errors.Join(err, fmt.Errorf("thaw %s: it was not frozen to the end: %w", d.dir, e))
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return fn(ctx)
}

// startWatchdog starts Watchdog in a process of its own and returns when it is ready.
func startWatchdog(dir string, limit time.Duration) (release func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	cmd := exec.Command(self, "demo", "watchdog", dir, limit.String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start watchdog: %w", err)
	}
	release = func() error { return errors.Join(in.Close(), cmd.Wait()) }
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		return nil, fmt.Errorf("start watchdog: it answered %q: %w", line, errors.Join(err, release()))
	}
	return release, nil
}

// Watchdog thaws the file system at dir when in ends or the limit is over. It says "ready" on out once it holds
// what it needs.
func Watchdog(dir string, limit time.Duration, in io.Reader, out io.Writer) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	defer f.Close()
	ended := make(chan struct{})
	go func() { // ends with the process at the latest
		_, _ = io.Copy(io.Discard, in)
		close(ended)
	}()
	if _, err := io.WriteString(out, "ready\n"); err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	select {
	case <-ended:
	case <-time.After(limit):
	}
	if err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not frozen
		return fmt.Errorf("thaw %s: %w", dir, err)
	}
	return nil
}

// openDirect opens the device past the page cache, which is stale for a mounted device.
func (d *device) openDirect(flags int) (*os.File, error) {
	f, err := os.OpenFile(d.path, flags|unix.O_DIRECT, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", d.path, err)
	}
	return f, nil
}

// overwrite writes noise over the whole device, below the file system.
func (d *device) overwrite(ctx context.Context) error {
	f, err := d.openDirect(os.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, err := alignedBuffer(1 << 20)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(buf) }()
	d.gone = true
	noise := rand.NewChaCha8([32]byte{})
	for off := int64(0); off < d.size; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		noise.Read(buf)
		if _, err := f.WriteAt(buf[:min(int64(len(buf)), d.size-off)], off); err != nil {
			return fmt.Errorf("overwrite %s: %w", d.path, err)
		}
	}
	return nil
}

// alignedBuffer returns memory that direct I/O accepts.
func alignedBuffer(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("allocate buffer: %w", err)
	}
	return b, nil
}

// fsck runs e2fsck without repairs on an unmounted device.
func (d *device) fsck(ctx context.Context) (clean bool, what string) {
	err := tool(ctx, "e2fsck", "-fn", d.path)
	if err != nil {
		return false, err.Error()
	}
	return true, ""
}

// tool runs a program of the system and puts what it said into the error. Such programs often lie in sbin,
// which is not in everybody's path.
func tool(ctx context.Context, name string, args ...string) error {
	path, err := lookTool(name)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func lookTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: %w", name, dr.ErrUnsupported)
}
