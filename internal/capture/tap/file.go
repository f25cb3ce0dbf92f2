package tap

import (
	"fmt"
	"io"
	"os"
)

// File is a Backing: a regular file or a block device. It is a Zeroer, a
// NoHoleZeroer, a Trimmer and a Mapper; where the system can't punch holes it
// writes zeroes, and where it can't tell holes all is data.
type File struct {
	f    *os.File
	size int64
}

// OpenFile opens path for reading and writing. Its size is fixed from then on.
func OpenFile(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd) // Stat says 0 for block devices
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("find size of %s: %w", path, err)
	}
	return &File{f: f, size: size}, nil
}

// Size returns the size in bytes.
func (f *File) Size() int64 { return f.size }

// ReadAt reads.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// WriteAt writes. Nothing is durable before Flush.
func (f *File) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

// MultiConn says that Flush covers all writers.
func (f *File) MultiConn() bool { return true }

// Zero makes a range read as zeroes, as a hole if possible.
func (f *File) Zero(off, n int64) error {
	if err := f.punch(off, n); err == nil {
		return nil
	}
	return f.writeZeroes(off, n)
}

// ZeroNoHole makes a range read as zeroes and keeps its space.
func (f *File) ZeroNoHole(off, n int64) error {
	if err := f.zeroRange(off, n); err == nil {
		return nil
	}
	return f.writeZeroes(off, n)
}

// Trim is Zero: a discarded range must read the same here and in the replica.
func (f *File) Trim(off, n int64) error { return f.Zero(off, n) }

func (f *File) writeZeroes(off, n int64) error {
	p := make([]byte, min(n, 1<<20))
	for end := off + n; off < end; off += int64(len(p)) {
		if _, err := f.f.WriteAt(p[:min(end-off, int64(len(p)))], off); err != nil {
			return err
		}
	}
	return nil
}

// Close closes the file; it flushes nothing.
func (f *File) Close() error { return f.f.Close() }
