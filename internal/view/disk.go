package view

import (
	"fmt"
	"io"

	"farside/internal/dr"
	"farside/internal/frame"
)

// maxZero is the longest range that one change of a frame can zero.
const maxZero = int64(1) << 40

// Disk is a disk of a view. Offsets and lengths of changes are multiples of
// dr.SectorSize; reads may be anywhere.
type Disk struct {
	view *View
	disk dr.Disk
}

// Info describes the disk.
func (d *Disk) Info() dr.Disk { return d.disk }

// Size returns the size in bytes.
func (d *Disk) Size() int64 { return d.disk.Size }

// ReadOnly reports whether changes are refused.
func (d *Disk) ReadOnly() bool { return d.view.branch == nil }

// MultiConn reports that Flush covers the changes of all users of the disk.
func (d *Disk) MultiConn() bool { return true }

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	n := len(p)
	if off < 0 || off > d.disk.Size {
		return 0, fmt.Errorf("read disk %d at %d: %w", d.disk.ID, off, dr.ErrInvalid)
	}
	short := int64(n) > d.disk.Size-off
	if short {
		n = int(d.disk.Size - off)
	}
	if err := d.read(p[:n], off); err != nil {
		return 0, err
	}
	if short {
		return n, io.EOF
	}
	return n, nil
}

// read takes what the layers have and the rest from the vault. The order
// matters: what leaves a layer is in the vault by then.
func (d *Disk) read(p []byte, off int64) error {
	w := d.view
	w.mu.RLock()
	if w.branch == nil || len(w.mu.current.frames) == 0 && w.mu.current.bytes == 0 && w.mu.frozen == nil {
		w.mu.RUnlock()
		return w.state.ReadAt(p, d.disk.ID, off)
	}
	lacking := d.fromLayers(p, off)
	w.mu.RUnlock()
	for _, r := range lacking {
		if err := w.state.ReadAt(p[r.from-off:r.to-off], d.disk.ID, r.from); err != nil {
			return err
		}
	}
	return nil
}

// gap is a range of bytes of a disk.
type gap struct{ from, to int64 }

// fromLayers fills p as far as the layers can and returns what is lacking. The
// view is locked for reading.
func (d *Disk) fromLayers(p []byte, off int64) []gap {
	var lacking []gap
	var buf [pageSize]byte
	end := off + int64(len(p))
	for n := off / pageSize; n*pageSize < end; n++ {
		start := n * pageSize
		from, to := max(off, start), min(end, start+pageSize)
		want := sectors(from-start, to-start)
		k := pageKey{d.disk.ID, n}
		left := d.view.mu.current.fill(k, want, &buf)
		if f := d.view.mu.frozen; f != nil && left != 0 {
			left = f.fill(k, left, &buf)
		}
		for s := range int64(pageSectors) {
			a, b := max(from, start+s*dr.SectorSize), min(to, start+(s+1)*dr.SectorSize)
			switch {
			case a >= b:
			case left&(1<<s) == 0:
				copy(p[a-off:b-off], buf[a-start:])
			case len(lacking) > 0 && lacking[len(lacking)-1].to == a:
				lacking[len(lacking)-1].to = b
			default:
				lacking = append(lacking, gap{a, b})
			}
		}
	}
	return lacking
}

// check refuses what is no change of this disk.
func (d *Disk) check(verb string, off, n int64) error {
	switch {
	case d.view.branch == nil:
		return fmt.Errorf("%s disk %d of a read-only view: %w", verb, d.disk.ID, dr.ErrDenied)
	case off < 0 || n < 0 || off > d.disk.Size-n || (off|n)%dr.SectorSize != 0:
		return fmt.Errorf("%s disk %d at [%d,+%d), size %d: %w", verb, d.disk.ID, off, n, d.disk.Size, dr.ErrInvalid)
	}
	return nil
}

// WriteAt implements io.WriterAt. Errors wrap dr.ErrInvalid or dr.ErrDenied.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		part := p[done:min(len(p), done+frame.MaxData)]
		x := dr.Extent{Disk: d.disk.ID, Offset: off + int64(done), Length: int64(len(part))}
		if err := d.view.change(x, dr.Data, part); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// Zero makes a range read as zeroes. Errors are those of WriteAt.
func (d *Disk) Zero(off, n int64) error { return d.erase("zero", dr.Zero, off, n) }

// Trim forgets a range, which then reads as zeroes. Errors are those of WriteAt.
func (d *Disk) Trim(off, n int64) error { return d.erase("trim", dr.Discard, off, n) }

func (d *Disk) erase(verb string, what dr.What, off, n int64) error {
	if err := d.check(verb, off, n); err != nil {
		return err
	}
	for n > 0 {
		x := dr.Extent{Disk: d.disk.ID, Offset: off, Length: min(n, maxZero)}
		if err := d.view.change(x, what, nil); err != nil {
			return err
		}
		off, n = off+x.Length, n-x.Length
	}
	return nil
}

// Flush makes all changes durable that returned before, of all disks of the view.
func (d *Disk) Flush() error { return d.view.Flush() }

// Map tells which parts of [off, off+n) read as zeroes, in order, and calls
// them holes too; fn's error ends it and is returned.
func (d *Disk) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if err := d.view.Flush(); err != nil {
		return err
	}
	var failed error
	err := d.view.state.Map(d.disk.ID, off, n, func(off, n int64, zero bool) bool {
		failed = fn(off, n, zero, zero)
		return failed == nil
	})
	if failed != nil {
		return failed
	}
	return err
}
