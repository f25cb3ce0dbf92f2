package scan

import (
	"io"
	"os"
	"syscall"
)

// openRaw opens a file, or a block device past its cache: that doesn't see what a file system on the device
// writes.
func openRaw(path string) (f *os.File, cold bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, false, err
	}
	flags := os.O_RDONLY
	if cold = info.Mode()&os.ModeDevice != 0; cold {
		flags |= syscall.O_DIRECT
	}
	f, err = os.OpenFile(path, flags, 0)
	return f, cold, err
}

// sizeOf returns the size of a file or device. Nothing else uses the file's offset.
func sizeOf(f *os.File) (int64, error) { return f.Seek(0, io.SeekEnd) }
