package tap

import (
	"errors"
	"os"
	"syscall"
)

// From linux/falloc.h and the lseek manual.
const (
	fallocKeepSize  = 0x1
	fallocPunchHole = 0x2
	fallocZeroRange = 0x10
	seekData        = 3
	seekHole        = 4
)

func (f *File) fallocate(mode uint32, off, n int64) error {
	raw, err := f.f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	err = raw.Control(func(fd uintptr) {
		for {
			if errno = syscall.Fallocate(int(fd), mode, off, n); errno != syscall.EINTR {
				return
			}
		}
	})
	return errors.Join(err, errno)
}

func (f *File) punch(off, n int64) error {
	return f.fallocate(fallocPunchHole|fallocKeepSize, off, n)
}

func (f *File) zeroRange(off, n int64) error {
	return f.fallocate(fallocZeroRange|fallocKeepSize, off, n)
}

// Flush makes all data durable. Metadata that isn't needed to read it, like
// times, may follow later.
func (f *File) Flush() error {
	raw, err := f.f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	if err := raw.Control(func(fd uintptr) { errno = syscall.Fdatasync(int(fd)) }); err != nil {
		return err
	}
	if errno != nil {
		return &os.PathError{Op: "fdatasync", Path: f.f.Name(), Err: errno}
	}
	return nil
}

// Map tells holes from data as the file system does.
func (f *File) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	for end := off + n; off < end; {
		data, err := f.f.Seek(off, seekData)
		switch {
		case errors.Is(err, syscall.ENXIO):
			data = f.size // a hole up to the end
		case err != nil:
			return fn(off, end-off, false, false)
		}
		if data = min(data, f.size); data > off {
			if err := fn(off, data-off, true, true); err != nil {
				return err
			}
		}
		if off = data; off >= end {
			return nil
		}
		next, err := f.f.Seek(off, seekHole)
		if err != nil {
			next = f.size
		}
		if next = min(next, f.size); next <= off {
			continue // the hole came this moment: ask again
		}
		if err := fn(off, next-off, false, false); err != nil {
			return err
		}
		off = next
	}
	return nil
}
