package powercut

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"farside/test/load"
)

// Disk is a loop device over a file that this process serves.
type Disk struct {
	Device string // its path

	size   int64
	dir    string
	server *fuse.Server
	loop   *load.Loop
	mu     struct {
		sync.Mutex
		image *Image
		log   *Log // nil: not recorded
	}
}

// NewDisk makes a disk of zeros of size bytes; its server is mounted at dir, which it makes. What is sent to it is recorded
// in log, unless that is nil. It needs root, FUSE and loop devices.
func NewDisk(dir string, size int64, log *Log) (d *Disk, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	d = &Disk{size: size, dir: dir}
	d.mu.image, d.mu.log = NewImage(), log
	o := &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "powercut", Name: "powercut", MaxWrite: 1 << 20}}
	if d.server, err = fs.Mount(dir, &folder{disk: d}, o); err != nil {
		return nil, fmt.Errorf("serve a disk at %s: %w", dir, err)
	}
	if d.loop, err = load.NewLoop(filepath.Join(dir, "disk"), 0); err != nil {
		return nil, errors.Join(err, d.server.Unmount())
	}
	d.Device = d.loop.Device
	return d, nil
}

// Close takes the device and its server away. Nothing may be mounted on it.
func (d *Disk) Close() error { return errors.Join(d.loop.Close(), d.server.Unmount()) }

// Use makes m, which the disk then owns, its content and ends the recording. Nothing may have the device open.
func (d *Disk) Use(m *Image) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.image, d.mu.log = m, nil
}

// Image returns a copy of the content.
func (d *Disk) Image() *Image {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.image.Clone()
}

// change records an entry and does it; both in one step, so that the log has the order of the disk.
func (d *Disk) change(e entry) syscall.Errno {
	if e.off < 0 || e.n < 0 || e.off+e.n > d.size {
		return syscall.EINVAL
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.log != nil {
		if err := d.mu.log.add(e); err != nil {
			return syscall.EIO
		}
	}
	apply(d.mu.image, e, nil)
	return 0
}

// folder is the directory with the one file.
type folder struct {
	fs.Inode
	disk *Disk
}

var _ = fs.NodeOnAdder((*folder)(nil))

// OnAdd puts the file into the directory.
func (r *folder) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, &file{disk: r.disk}, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

// file is the content of the disk. The kernel caches none of it.
type file struct {
	fs.Inode
	disk *Disk
}

var (
	_ = fs.NodeOpener((*file)(nil))
	_ = fs.NodeGetattrer((*file)(nil))
	_ = fs.NodeReader((*file)(nil))
	_ = fs.NodeWriter((*file)(nil))
	_ = fs.NodeFsyncer((*file)(nil))
	_ = fs.NodeAllocater((*file)(nil))
)

func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, uint64(f.disk.size)
	return 0
}

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off < 0 || off >= f.disk.size {
		return fuse.ReadResultData(nil), 0
	}
	p = p[:min(int64(len(p)), f.disk.size-off)]
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	f.disk.mu.image.ReadAt(p, off)
	return fuse.ReadResultData(p), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if len(p) == 0 {
		return 0, 0
	}
	return uint32(len(p)), f.disk.change(entry{off: off, n: int64(len(p)), data: slices.Clone(p)})
}

// Fsync is what a flush of the device becomes.
func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return f.disk.change(entry{})
}

// Allocate is what a discard and a write of zeros become.
func (f *file) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 || size == 0 || off+size > uint64(f.disk.size) {
		return syscall.EOPNOTSUPP
	}
	return f.disk.change(entry{off: int64(off), n: int64(size)})
}
