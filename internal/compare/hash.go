package compare

import (
	"bytes"

	"github.com/zeebo/blake3"
)

// SumSize is the length of a Sum in bytes. Two different blocks have the same
// 16 bytes with probability 2^-128. Finding two blocks that do takes 2^64 trials, but
// needs the key, which is new for each pass, before the second block is written.
const SumSize = 16

// Sum is the truncated hash of a block.
type Sum [SumSize]byte

// Key makes the hashes of one pass those of no other.
type Key [32]byte

// Hasher computes Sums.
type Hasher struct{ h *blake3.Hasher }

// NewHasher returns a Hasher of a pass.
func NewHasher(k Key) *Hasher {
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		panic(err) // only for a key of another length
	}
	return &Hasher{h}
}

// Sum returns the hash of a block: BLAKE3 with the key, truncated.
func (h *Hasher) Sum(block []byte) (s Sum) {
	h.h.Reset()
	_, _ = h.h.Write(block) // never fails
	var full [32]byte
	copy(s[:], h.h.Sum(full[:0]))
	return s
}

// IsZero reports whether a block is all zero.
func IsZero(b []byte) bool {
	// Most blocks that are not zero show it at once; the rest compares b with itself one
	// step on, at the speed of memory.
	head := min(len(b), 64)
	for _, c := range b[:head] {
		if c != 0 {
			return false
		}
	}
	return bytes.Equal(b[head:], b[:len(b)-head])
}
