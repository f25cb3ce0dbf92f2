package demo

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// blockSum is the length of the blocks whose sums stand for a disk's content, in bytes.
const blockSum = 1 << 20

// sums returns the SHA-256 of each block of a disk, in order. Two disks with equal sums are equal byte by byte.
func sums(ctx context.Context, disk io.ReaderAt, size int64, buf []byte) ([][32]byte, error) {
	var list [][32]byte
	for off := int64(0); off < size; off += blockSum {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b := buf[:min(blockSum, size-off)]
		if _, err := disk.ReadAt(b, off); err != nil {
			return nil, fmt.Errorf("read at %d: %w", off, err)
		}
		list = append(list, sha256.Sum256(b))
	}
	return list, nil
}

// differing returns the index of the first block that differs, or -1.
func differing(a, b [][32]byte) int {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return -1
}

// mapped is a disk that knows which of its parts hold data.
type mapped interface {
	io.ReaderAt
	Map(off, n int64, fn func(off, n int64, zero, hole bool) error) error
}

// sparse is a file that can be sized.
type sparse interface {
	io.WriterAt
	Truncate(size int64) error
}

// fetchers is how many reads of a disk are under way at once while it is fetched.
const fetchers = 8

// fetch copies what holds data on a disk into a sparse file and returns how many bytes that was.
func fetch(ctx context.Context, disk mapped, size int64, file sparse) (int64, error) {
	if err := file.Truncate(size); err != nil {
		return 0, fmt.Errorf("fetch the disk: %w", err)
	}
	var total atomic.Int64
	buffers := sync.Pool{New: func() any { return make([]byte, blockSum) }}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchers)
	err := disk.Map(0, size, func(off, n int64, zero, _ bool) error {
		end := min(off+n, size)
		for off := off; off < end && !zero; off += blockSum {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			g.Go(func() error {
				buf := buffers.Get().([]byte)
				defer buffers.Put(buf) //nolint:staticcheck // a slice header per MiB is nothing
				b := buf[:min(blockSum, end-off)]
				if _, err := disk.ReadAt(b, off); err != nil {
					return err
				}
				total.Add(int64(len(b)))
				_, err := file.WriteAt(b, off)
				return err
			})
		}
		return nil
	})
	if e := g.Wait(); e != nil {
		err = e // the first; Map's error may only say that the group ended
	}
	if err != nil {
		return total.Load(), fmt.Errorf("fetch the disk: %w", err)
	}
	return total.Load(), nil
}
