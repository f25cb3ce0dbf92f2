// Package export gives disks to others: as NBD exports that come and go, and
// as image files.
//
// Main types: [Server] listens and offers each [Device] under a name; [WriteRaw]
// and [WriteQcow2] copy a [Source] into an image that needs no Farside.
//
// It does not know what is behind a Device, opens no views and keeps no list of
// what was exported before a restart. A raw image can be continued after a
// break, a qcow2 image is begun again.
//
// Concurrency: a Server is safe for concurrent use. The image writers read the
// source from a few goroutines, which have ended when they return, and write
// the file from the caller's.
package export

import (
	"context"
	"errors"
	"io"

	"farside/internal/dr"
	"farside/internal/nbd"
)

// Source is a disk to read. ReadAt is called concurrently.
type Source interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Device is a disk to use. Offsets and lengths of calls are multiples of
// dr.SectorSize. It may also have the abilities of nbd.Zeroer,
// nbd.NoHoleZeroer, nbd.Trimmer, nbd.Mapper, nbd.Prefetcher, nbd.MultiConner
// and nbd.ReadOnlyer.
type Device interface {
	Source
	io.WriterAt
	// Flush returns when every write that returned before the call is durable.
	Flush() error
}

// device tells NBD clients what the kinds of error of package dr mean to them.
// What the Device can't do it answers so that it is harmless.
type device struct{ d Device }

func wire(err error) error {
	for kind, e := range map[error]nbd.Errno{
		dr.ErrFull:        nbd.ENOSPC,
		dr.ErrDenied:      nbd.EPERM,
		dr.ErrInvalid:     nbd.EINVAL,
		dr.ErrUnavailable: nbd.ESHUTDOWN,
	} {
		if errors.Is(err, kind) {
			return errors.Join(e, err)
		}
	}
	if errors.Is(err, dr.ErrUnsupported) || errors.Is(err, errors.ErrUnsupported) {
		return errors.ErrUnsupported
	}
	if errors.Is(err, context.Canceled) {
		return errors.Join(nbd.ESHUTDOWN, err)
	}
	return err
}

func (d device) Size() int64  { return d.d.Size() }
func (d device) Flush() error { return wire(d.d.Flush()) }

func (d device) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.d.ReadAt(p, off)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	return n, wire(err)
}

func (d device) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.d.WriteAt(p, off)
	if err == nil {
		return n, nil
	}
	return n, wire(err)
}

func (d device) Zero(off, n int64) error {
	if z, ok := d.d.(nbd.Zeroer); ok {
		return wire(z.Zero(off, n))
	}
	return errors.ErrUnsupported // then zeroes are written
}

func (d device) ZeroNoHole(off, n int64) error {
	if z, ok := d.d.(nbd.NoHoleZeroer); ok {
		return wire(z.ZeroNoHole(off, n))
	}
	return errors.ErrUnsupported
}

func (d device) Trim(off, n int64) error {
	t, ok := d.d.(nbd.Trimmer)
	if !ok {
		return nil // a wish, not an order
	}
	if err := wire(t.Trim(off, n)); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

func (d device) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	if m, ok := d.d.(nbd.Mapper); ok {
		return m.Map(off, n, fn)
	}
	return fn(off, n, false, false)
}

func (d device) Prefetch(off, n int64) error {
	if p, ok := d.d.(nbd.Prefetcher); ok {
		return wire(p.Prefetch(off, n))
	}
	return nil
}

func (d device) MultiConn() bool {
	m, ok := d.d.(nbd.MultiConner)
	return ok && m.MultiConn()
}

func (d device) ReadOnly() bool {
	r, ok := d.d.(nbd.ReadOnlyer)
	return ok && r.ReadOnly()
}
