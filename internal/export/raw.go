package export

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// ImageFile is where an image is written to; a vfs.File is one.
type ImageFile interface {
	io.WriterAt
	Truncate(size int64) error
	Sync() error
}

// Progress is told how many of a disk's bytes are done. It is called often.
type Progress func(done, total int64)

func (p Progress) report(done, total int64) {
	if p != nil {
		p(done, total)
	}
}

// WriteRaw writes src to f as a plain image; zeroes become holes. It returns up
// to which offset the image is complete and durable, also with an error: when
// called again with that offset as from and the same content of src, it
// continues. With from 0 the file is emptied first.
func WriteRaw(ctx context.Context, f ImageFile, src Source, from int64, progress Progress) (done int64, err error) {
	size := src.Size()
	if from == 0 {
		if err := f.Truncate(0); err != nil {
			return 0, fmt.Errorf("empty image: %w", err)
		}
	}
	if err := f.Truncate(size); err != nil {
		return 0, fmt.Errorf("size image: %w", err)
	}
	done = from / unit * unit
	progress.report(done, size)
	err = pump(ctx, src, done, func(off int64, p []byte) error {
		if _, err := f.WriteAt(p, off); err != nil {
			return fmt.Errorf("write image at %d: %w", off, err)
		}
		return nil
	}, func(off int64) {
		done = off
		progress.report(done, size)
	})
	if e := f.Sync(); e != nil {
		return from, errors.Join(err, fmt.Errorf("sync image: %w", e))
	}
	if err == nil {
		done = size
		progress.report(done, size)
	}
	return done, err
}
