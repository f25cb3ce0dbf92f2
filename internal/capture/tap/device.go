package tap

import (
	"errors"
	"fmt"

	"farside/internal/dr"
	"farside/internal/nbd"
)

// Device is a disk behind a Tap as its writers see it: an nbd.Device with all
// abilities. Ranges are whole sectors. Every change goes through it or is not
// captured.
type Device struct {
	tap     *Tap
	index   int
	id      dr.DiskID
	size    int64
	backing Backing
	locks   rangeLock
}

var (
	_ nbd.Device      = (*Device)(nil)
	_ nbd.Zeroer      = (*Device)(nil)
	_ nbd.Trimmer     = (*Device)(nil)
	_ nbd.Mapper      = (*Device)(nil)
	_ nbd.MultiConner = (*Device)(nil)
)

// Size returns the size in bytes.
func (d *Device) Size() int64 { return d.size }

// MultiConn says that Flush covers all connections: there is one backing.
func (d *Device) MultiConn() bool { return true }

// ReadAt reads the backing.
func (d *Device) ReadAt(p []byte, off int64) (int, error) { return d.backing.ReadAt(p, off) }

// WriteAt changes the backing and the stream.
func (d *Device) WriteAt(p []byte, off int64) (n int, err error) {
	err = d.change(off, int64(len(p)), dr.Data, p, func() error {
		n, err = d.backing.WriteAt(p, off)
		return err
	})
	return n, err
}

// Zero makes a range read as zeroes. If the backing has no such ability,
// nothing has happened and the error is errors.ErrUnsupported.
func (d *Device) Zero(off, n int64) error {
	z, ok := d.backing.(nbd.Zeroer)
	if !ok {
		return errors.ErrUnsupported
	}
	return d.change(off, n, dr.Zero, nil, func() error { return z.Zero(off, n) })
}

// ZeroNoHole is Zero for a range that must stay allocated.
func (d *Device) ZeroNoHole(off, n int64) error {
	z, ok := d.backing.(nbd.NoHoleZeroer)
	if !ok {
		return errors.ErrUnsupported
	}
	return d.change(off, n, dr.Zero, nil, func() error { return z.ZeroNoHole(off, n) })
}

// Trim discards a range; it reads as zeroes afterwards. If the backing can't,
// nothing happens: a client's wish to discard binds nobody.
func (d *Device) Trim(off, n int64) error {
	tr, ok := d.backing.(nbd.Trimmer)
	if !ok {
		return nil
	}
	return d.change(off, n, dr.Discard, nil, func() error { return tr.Trim(off, n) })
}

// Flush makes what was written durable on the backing.
func (d *Device) Flush() error {
	d.tap.flushed(d.id)
	return d.backing.Flush()
}

// Map describes the backing, or all as data if it can't tell.
func (d *Device) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if m, ok := d.backing.(nbd.Mapper); ok {
		return m.Map(off, n, fn)
	}
	return fn(off, n, false, false)
}

// change does the four steps of the package comment.
func (d *Device) change(off, n int64, what dr.What, data []byte, apply func() error) error {
	if off < 0 || n < 0 || off > d.size-n || (off|n)%dr.SectorSize != 0 {
		return fmt.Errorf("change [%d,%d) of disk %d: %w", off, off+n, d.id, nbd.EINVAL)
	}
	if n == 0 {
		return nil
	}
	x := dr.Extent{Disk: d.id, Offset: off, Length: n}
	held := d.locks.lock(off, off+n)
	defer d.locks.unlock(held)
	w, err := d.tap.submit(d.index, x, what, data)
	if err != nil {
		return err
	}
	err = apply()
	if err != nil {
		d.amend(x)
	}
	d.tap.land(d.index, w, what, err)
	return err
}

// amend puts into the stream what a refused change really left on the backing.
// Its range is still locked. What can't be read stays marked.
func (d *Device) amend(x dr.Extent) {
	p := make([]byte, min(x.Length, amendStep))
	for rest := x; rest.Length > 0; {
		part := rest
		part.Length = min(rest.Length, amendStep)
		if _, err := d.backing.ReadAt(p[:part.Length], part.Offset); err != nil {
			return
		}
		w, err := d.tap.submit(d.index, part, dr.Data, p[:part.Length])
		if err != nil {
			return
		}
		d.tap.land(d.index, w, dr.Data, nil)
		rest.Offset, rest.Length = part.End(), rest.Length-part.Length
	}
}

const amendStep = 1 << 20
