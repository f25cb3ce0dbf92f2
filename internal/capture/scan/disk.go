package scan

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"farside/internal/capture"
	"farside/internal/dr"
)

// disk is one disk of a Source. The file is read by any goroutine; the rest is guarded by the
// Source's mutex.
type disk struct {
	capture.Disk
	file  *os.File
	cold  bool // read past the cache: in whole pages, to memory that is aligned
	sums  *table
	taken map[int64]struct{} // blocks that were handed out as dirty and not read since
}

// openDisk opens the file or device of d and finds its size.
func openDisk(d capture.Disk) (*disk, error) {
	f, cold, err := openRaw(d.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", d.Path, kindOf(err))
	}
	size, err := sizeOf(f)
	if err == nil && (size <= 0 || size%dr.SectorSize != 0) {
		err = fmt.Errorf("it has %d bytes, not whole sectors of 512: %w", size, dr.ErrInvalid)
	}
	if err == nil && d.Size != 0 && size != d.Size {
		err = fmt.Errorf("it has %d bytes, not %d: %w", size, d.Size, dr.ErrInvalid)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", d.Path, errors.Join(err, f.Close()))
	}
	d.Size = size
	return &disk{Disk: d, file: f, cold: cold, taken: make(map[int64]struct{})}, nil
}

// Size returns the size of a file or device in bytes, as Open finds it.
func Size(path string) (int64, error) {
	d, err := openDisk(capture.Disk{Path: path})
	if err != nil {
		return 0, err
	}
	return d.Size, d.file.Close()
}

// kindOf adds our kind to an error of the system.
func kindOf(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return errors.Join(err, dr.ErrNotFound)
	case errors.Is(err, os.ErrPermission):
		return errors.Join(err, dr.ErrDenied)
	}
	return errors.Join(err, dr.ErrUnavailable)
}

// read reads p at off, wholly.
func (d *disk) read(p []byte, off int64) error {
	n, err := d.file.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF // it has shrunk
	}
	return fmt.Errorf("read %s at %d: %w", d.Path, off, errors.Join(err, dr.ErrUnavailable))
}

// readAny reads p at off; neither need suit the kernel.
func (d *disk) readAny(p []byte, off int64) error {
	if !d.cold {
		return d.read(p, off)
	}
	var buf []byte
	for len(p) > 0 {
		from := off &^ (page - 1)
		end := min((off+int64(len(p))+page-1)&^(page-1), from+chunk, d.Size)
		if buf == nil {
			buf = aligned(int(end - from))
		}
		if err := d.read(buf[:end-from], from); err != nil {
			return err
		}
		n := copy(p, buf[off-from:end-from])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// page is what every system can read to and from, in bytes.
const page = 4096

// aligned returns n bytes that the kernel can read into past its cache.
func aligned(n int) []byte {
	p := make([]byte, n+page)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) & (page - 1)
	return p[skip : skip+n : skip+n]
}

// stillThere returns an error if the disk has another size now.
func (d *disk) stillThere() error {
	size, err := sizeOf(d.file)
	if err != nil {
		return fmt.Errorf("look at %s: %w", d.Path, kindOf(err))
	}
	if size != d.Size {
		return fmt.Errorf("%s has %d bytes now, not %d: protect it anew: %w", d.Path, size, d.Size, dr.ErrInvalid)
	}
	return nil
}

// length returns how many bytes block b has: the last one may be short.
func (d *disk) length(b int64) int64 { return min(block, d.Size-b*block) }

// blocks calls fn for each block that [off, off+n) covers wholly.
func (d *disk) blocks(off, n int64, fn func(b int64) error) error {
	for b := (off + block - 1) / block; b*block < off+n; b++ {
		if b*block+d.length(b) > off+n {
			return nil
		}
		if err := fn(b); err != nil {
			return err
		}
	}
	return nil
}
