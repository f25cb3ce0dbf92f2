package compare

import (
	"fmt"

	"farside/internal/dr"
)

// Answer says which blocks of a request differ.
type Answer struct {
	// At is the position that was compared: the floor of the request, or later.
	At     dr.Position
	blocks int
	bits   []byte
}

// NewAnswer returns an answer about a number of blocks, none of which differs.
func NewAnswer(at dr.Position, blocks int) *Answer {
	return &Answer{At: at, blocks: blocks, bits: make([]byte, (blocks+7)/8)}
}

// Blocks returns how many blocks the answer is about.
func (a *Answer) Blocks() int { return a.blocks }

// Set says that block i differs.
func (a *Answer) Set(i int) { a.bits[i/8] |= 1 << (i % 8) }

// Differs reports whether block i differs.
func (a *Answer) Differs(i int) bool { return a.bits[i/8]>>(i%8)&1 != 0 }

// Any reports whether a block differs.
func (a *Answer) Any() bool {
	for _, b := range a.bits {
		if b != 0 {
			return true
		}
	}
	return false
}

// Encode returns the bytes of a.
func (a *Answer) Encode() []byte {
	b := make([]byte, answerHeader, answerHeader+len(a.bits))
	copy(b, answerMagic)
	le.PutUint16(b[4:], version)
	le.PutUint32(b[8:], uint32(a.At.Timeline))
	le.PutUint32(b[12:], uint32(a.blocks))
	le.PutUint64(b[16:], uint64(a.At.Seq))
	return append(b, a.bits...)
}

// ParseAnswer reads the answer to r. Errors wrap dr.ErrCorrupt or
// dr.ErrVersion; also an answer about something else than r is corrupt.
func ParseAnswer(r *Request, b []byte) (*Answer, error) {
	a, err := parseAnswer(b)
	if err != nil {
		return nil, fmt.Errorf("read compare answer of %d bytes: %w", len(b), err)
	}
	if a.blocks != r.Blocks() || a.At.Timeline != r.Floor.Timeline || a.At.Seq < r.Floor.Seq {
		return nil, fmt.Errorf("read compare answer: %d blocks at %v for %d blocks at %v or later: %w",
			a.blocks, a.At, r.Blocks(), r.Floor, dr.ErrCorrupt)
	}
	return a, nil
}

func parseAnswer(b []byte) (*Answer, error) {
	if err := checkHead(b, answerMagic, answerHeader); err != nil {
		return nil, err
	}
	a := &Answer{
		At:     dr.Position{Timeline: dr.Timeline(le.Uint32(b[8:])), Seq: dr.Seq(le.Uint64(b[16:]))},
		blocks: int(le.Uint32(b[12:])),
	}
	if a.blocks > MaxSums || len(b) != answerHeader+(a.blocks+7)/8 || le.Uint16(b[6:]) != 0 {
		return nil, dr.ErrCorrupt
	}
	a.bits = append([]byte(nil), b[answerHeader:]...)
	if rest := a.blocks % 8; rest != 0 && a.bits[len(a.bits)-1]>>rest != 0 {
		return nil, dr.ErrCorrupt
	}
	return a, nil
}
