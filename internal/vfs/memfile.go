package vfs

import (
	"fmt"
	"io"
	"io/fs"
)

// memFile is an open file of a Mem. Its node is guarded by the Mem's mutex.
type memFile struct {
	m        *Mem
	n        *node
	name     string
	writable bool
	closed   bool
}

// enter locks the file system; the caller calls the function it returns.
func (f *memFile) enter(op string, write bool, off int64) (leave func(), err error) {
	f.m.mu.Lock()
	switch {
	case f.closed:
		err = pathErr(op, f.name, fs.ErrClosed)
	case write && !f.writable:
		err = pathErr(op, f.name, fs.ErrPermission)
	case off < 0:
		err = pathErr(op, f.name, fmt.Errorf("negative offset %d: %w", off, fs.ErrInvalid))
	default:
		return f.m.mu.Unlock, nil
	}
	f.m.mu.Unlock()
	return nil, err
}

// ReadAt implements io.ReaderAt.
func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	leave, err := f.enter("read", false, off)
	if err != nil {
		return 0, err
	}
	defer leave()
	return f.n.read(p, off)
}

// WriteAt implements io.WriterAt.
func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	leave, err := f.enter("write", true, off)
	if err != nil {
		return 0, err
	}
	defer leave()
	if len(p) > 0 {
		f.n.write(p, off)
	}
	return len(p), nil
}

// Truncate implements File.
func (f *memFile) Truncate(size int64) error {
	leave, err := f.enter("truncate", true, size)
	if err != nil {
		return err
	}
	defer leave()
	f.n.cut(size)
	return nil
}

// Sync implements File.
func (f *memFile) Sync() error {
	leave, err := f.enter("sync", false, 0)
	if err != nil {
		return err
	}
	defer leave()
	f.n.sync()
	return nil
}

// Size implements File.
func (f *memFile) Size() (int64, error) {
	leave, err := f.enter("stat", false, 0)
	if err != nil {
		return 0, err
	}
	defer leave()
	return f.n.size, nil
}

// PunchHole implements HolePuncher.
func (f *memFile) PunchHole(off, n int64) error {
	leave, err := f.enter("punch", true, min(off, n))
	if err != nil {
		return err
	}
	defer leave()
	end := min(off+n, f.n.size)
	for off < end {
		no, at := off/pageSize, off%pageSize
		k := min(pageSize-at, end-off)
		if k == pageSize {
			delete(f.n.pages, no)
		} else if f.n.pages[no] != nil {
			f.n.write(make([]byte, k), off)
		}
		off += k
	}
	return nil
}

// NextData implements DataSeeker.
func (f *memFile) NextData(off int64) (start, end int64, err error) {
	leave, err := f.enter("seek", false, off)
	if err != nil {
		return 0, 0, err
	}
	defer leave()
	first := int64(-1)
	for no := range f.n.pages {
		if (no+1)*pageSize > off && (first < 0 || no < first) {
			first = no
		}
	}
	if first < 0 || off >= f.n.size {
		return 0, 0, io.EOF
	}
	last := first
	for f.n.pages[last+1] != nil {
		last++
	}
	return max(off, first*pageSize), min((last+1)*pageSize, f.n.size), nil
}

// AllocatedBytes implements AllocatedSizer.
func (f *memFile) AllocatedBytes() (int64, error) {
	leave, err := f.enter("stat", false, 0)
	if err != nil {
		return 0, err
	}
	defer leave()
	return int64(len(f.n.pages)) * pageSize, nil
}

// Close implements io.Closer. It syncs nothing.
func (f *memFile) Close() error {
	leave, err := f.enter("close", false, 0)
	if err != nil {
		return err
	}
	defer leave()
	f.closed = true
	return nil
}
