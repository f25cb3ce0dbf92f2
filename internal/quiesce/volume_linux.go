package quiesce

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"farside/internal/dr"
)

// The requests of linux/fs.h.
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// openVolume opens the directory, or the file if only files of it are mounted, by which a
// file system is frozen. A mount that is hidden by another one is passed over for the next.
func openVolume(f FileSystem) (volume, error) {
	var last error
	for _, m := range f.mounts {
		d, err := openMount(m)
		if err == nil {
			return &directory{File: d, fs: f}, nil
		}
		last = err
	}
	return nil, fmt.Errorf("open %s: %w", f.Mount, last)
}

func openMount(m mount) (*os.File, error) {
	// Not waiting for the other end of a pipe, and not following a link to elsewhere.
	fd, err := unix.Open(m.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NOATIME, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID|unix.STATX_TYPE, &st)
	switch {
	case err != nil:
	case strconv.FormatUint(st.Mnt_id, 10) != m.id:
		err = fmt.Errorf("another file system is mounted over it: %w", dr.ErrUnavailable)
	case !plain(uint32(st.Mode)):
		err = fmt.Errorf("it is neither a directory nor a file: %w", dr.ErrUnsupported)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), m.path), nil
}

// plain reports whether a mode is that of a directory or file: a request to any other would
// go to a device.
func plain(mode uint32) bool {
	return mode&unix.S_IFMT == unix.S_IFDIR || mode&unix.S_IFMT == unix.S_IFREG
}

// directory is a directory, or a file, of a file system that is to be frozen.
type directory struct {
	*os.File
	fs FileSystem
}

func (d *directory) FileSystem() FileSystem { return d.fs }

func (d *directory) File0() *os.File { return d.File }

func (d *directory) Sync() error {
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", d.fs.Mount, err)
	}
	return nil
}

func (d *directory) Freeze() error {
	switch err := ioctl(d.Fd(), fiFreeze); {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("freeze %s: somebody else holds it frozen: %w", d.fs.Mount, errFrozen)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		return fmt.Errorf("freeze %s (%s): %w", d.fs.Mount, d.fs.Type, dr.ErrUnsupported)
	default:
		return fmt.Errorf("freeze %s: %w", d.fs.Mount, err)
	}
}

func (d *directory) Thaw() error {
	switch err := ioctl(d.Fd(), fiThaw); {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("thaw %s: somebody else did: %w", d.fs.Mount, errThawed)
	default:
		return fmt.Errorf("thaw %s: %w", d.fs.Mount, err)
	}
}

// ioctl is not interrupted by anything: it is called with the descriptors of
// directories only.
func ioctl(fd uintptr, request uint) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

// thawMount thaws the file system of a mount and reports whether it was frozen.
func thawMount(e ledgerEntry) bool {
	d, err := openMount(mount{id: e.ID, path: e.Mount})
	if err != nil {
		return false
	}
	defer d.Close()
	return ioctl(d.Fd(), fiThaw) == nil
}
