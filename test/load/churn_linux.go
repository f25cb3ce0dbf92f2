package load

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Churn overwrites a file of size bytes, which it makes, at random, 4 to 64 KiB at a time,
// past the page cache and at a rate in bytes per second, until ctx ends. It returns how many
// bytes it has written. The data can't be compressed.
func Churn(ctx context.Context, file string, size, rate int64, seed uint64) (written int64, err error) {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT|unix.O_CLOEXEC, 0o600) // others may start processes meanwhile
	if err != nil {
		return 0, fmt.Errorf("open for churn: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Fallocate(fd, 0, 0, size); err != nil {
		return 0, fmt.Errorf("allocate %s: %w", file, err)
	}
	data := noise(4<<20, seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for began := time.Now(); ctx.Err() == nil; {
		if early := time.Duration(float64(written)/float64(rate)*1e9) - time.Since(began); early > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(early):
			}
		}
		n := page * (1 + rng.Int64N(16))
		from := page * rng.Int64N((4<<20-n)/page)
		if _, err := unix.Pwrite(fd, data[from:from+n], page*rng.Int64N((size-n)/page)); err != nil {
			return written, fmt.Errorf("churn: %w", err)
		}
		written += n
	}
	return written, nil
}

// noise returns bytes that can't be compressed, aligned for direct writes.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n+page)
	b = b[(page-int(uintptr(unsafe.Pointer(&b[0]))%page))%page:][:n]
	rand.NewChaCha8([32]byte{byte(seed)}).Read(b)
	return b
}
