package demo

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
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
