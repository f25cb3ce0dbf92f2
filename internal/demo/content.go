package demo

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
)

// maxContent is the longest content of a row, in bytes.
const maxContent = 8 << 10

// meanContent is their mean length, for estimates.
const meanContent = 5 << 10

// content returns the bytes that belong to row n: half noise, half text, 2 to 8 KiB, a function of n, so that
// what comes back can be compared without having been kept.
func content(n int64) []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], uint64(n))
	r := rand.NewChaCha8(seed)
	half := 1<<10 + int(r.Uint64()%(maxContent/2-1<<10))
	b := make([]byte, half, 2*half)
	r.Read(b) // never fails
	return append(b, bytes.Repeat([]byte("every write is a point. "), half/24+1)[:half]...)
}
