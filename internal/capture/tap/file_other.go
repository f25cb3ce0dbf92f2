//go:build !linux

package tap

import "farside/internal/dr"

func (f *File) punch(_, _ int64) error     { return dr.ErrUnsupported }
func (f *File) zeroRange(_, _ int64) error { return dr.ErrUnsupported }

// Flush makes all data durable.
func (f *File) Flush() error { return f.f.Sync() }

// Map tells nothing: all is data.
func (f *File) Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error {
	return fn(off, n, false, false)
}
