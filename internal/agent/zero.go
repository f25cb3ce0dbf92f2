package agent

import (
	"bytes"

	"farside/internal/dr"
)

// zeroGrain is the unit in which runs of zeroes are looked for: small enough to
// find the free blocks of file systems, large enough that a table entry of a
// frame (32 bytes) is small against it.
const zeroGrain = 4096

// piece is a part of a buffer that is all zero or is not.
type piece struct {
	off, end int
	zero     bool
}

// pieces cuts b into runs of zero and other grains.
func pieces(b []byte) []piece {
	var out []piece
	for off := 0; off < len(b); off += zeroGrain {
		end := min(off+zeroGrain, len(b))
		zero := allZero(b[off:end])
		if n := len(out); n > 0 && out[n-1].zero == zero {
			out[n-1].end = end
			continue
		}
		out = append(out, piece{off, end, zero})
	}
	return out
}

// allZero reports whether b holds nothing but zeroes. It looks at the first
// bytes, then compares b with itself one sector on, which runs at the speed of
// the memory.
func allZero(b []byte) bool {
	head := min(len(b), dr.SectorSize)
	for _, c := range b[:head] {
		if c != 0 {
			return false
		}
	}
	return bytes.Equal(b[head:], b[:len(b)-head])
}
