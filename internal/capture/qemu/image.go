package qemu

import (
	"farside/internal/capture/tap"
	"farside/internal/nbd"
)

// image is what lies behind the tap of a guest's disk: the guest's image, read through
// QEMU. Changes are there before they come to the tap, so nothing is written.
type image struct{ *nbd.Client }

var (
	_ tap.Backing      = (*image)(nil)
	_ nbd.NoHoleZeroer = (*image)(nil)
)

func (i *image) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (i *image) Zero(_, _ int64) error                  { return nil }
func (i *image) ZeroNoHole(_, _ int64) error            { return nil }
func (i *image) Flush() error                           { return nil }

// Trim is never called: a target turns discards into what they did.
func (i *image) Trim(_, _ int64) error { return nil }

// target is a tapped disk to which QEMU mirrors.
type target struct {
	*tap.Device
	image *image
}

// Trim captures what a discard left on the image. That may be zeroes or what was there
// before: QEMU and the file system below it decide. Nobody else changes
// the range meanwhile: QEMU lets no other request of the guest begin there before this one ends.
func (t *target) Trim(off, n int64) error {
	return t.image.Map(off, n, func(off, n int64, zero, _ bool) error {
		if zero {
			return t.Zero(off, n)
		}
		return t.copy(off, n)
	})
}

// copyStep is how much of a discarded range is read at once, in bytes.
const copyStep = 1 << 20

func (t *target) copy(off, n int64) error {
	p := make([]byte, min(n, copyStep))
	for end := off + n; off < end; off += int64(len(p)) {
		p = p[:min(end-off, int64(len(p)))]
		if _, err := t.image.ReadAt(p, off); err != nil {
			return err
		}
		if _, err := t.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}
