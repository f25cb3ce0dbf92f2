package frame

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"farside/internal/dr"
)

// The zstd decoder is made once and used by all: DecodeAll is safe for
// concurrent use.
var (
	zstdDecoder = sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true),
			zstd.WithDecoderMaxWindow(1<<20))
		if err != nil {
			panic(err) // the options are constants
		}
		return d
	})
)

// NumBlocks returns the number of blocks of the payload.
func (f *Frame) NumBlocks() int { return f.blocks() }

// Block says where block i lies: off from the frame's first byte and its
// stored length, and which part of the decoded payload it holds.
func (f *Frame) Block(i int) (off int64, storedLen, rawOff, rawLen int) {
	rawOff, rawLen = f.rawBlock(i)
	return int64(f.stored[i]), int(f.stored[i+1] - f.stored[i]), rawOff, rawLen
}

// DecodeBlock verifies the stored bytes of block i, which the caller read from
// where Block says, and appends the decoded block to dst. Errors wrap
// dr.ErrCorrupt.
func (f *Frame) DecodeBlock(i int, stored, dst []byte) ([]byte, error) {
	if err := f.verifyBlock(i, stored); err != nil {
		return nil, err
	}
	_, rawLen := f.rawBlock(i)
	codec := f.Codec
	if le.Uint32(f.blockEntry(i))&plainBit != 0 {
		codec = None
	}
	if codec == None {
		return append(dst, stored...), nil
	}
	dst = grow(dst, rawLen)
	out, err := decode(codec, stored, dst[len(dst):len(dst):len(dst)+rawLen])
	if err != nil || len(out) != rawLen {
		return nil, fmt.Errorf("decode block %d (%v) to %d bytes, got %d: %w", i, codec, rawLen, len(out), dr.ErrCorrupt)
	}
	return dst[:len(dst)+rawLen], nil
}

func (f *Frame) verifyBlock(i int, stored []byte) error {
	if int(f.stored[i+1]-f.stored[i]) != len(stored) ||
		checksum(stored) != le.Uint32(f.blockEntry(i)[4:]) {
		return fmt.Errorf("block %d of frame %d:%d: checksum: %w", i, f.Timeline, f.Last, dr.ErrCorrupt)
	}
	return nil
}

// decode appends what stored decodes to, and never writes past dst's capacity.
func decode(codec Codec, stored, dst []byte) ([]byte, error) {
	if codec == Zstd {
		return zstdDecoder().DecodeAll(stored, dst)
	}
	n, err := s2.DecodedLen(stored)
	if err != nil || n > cap(dst) {
		return nil, fmt.Errorf("s2 length %d: %w", n, dr.ErrCorrupt)
	}
	return s2.Decode(dst[:n], stored)
}

// block returns the stored bytes of block i.
func (f *Frame) block(i int) ([]byte, error) {
	if int64(len(f.b)) < f.Size() {
		return nil, fmt.Errorf("frame was parsed without its payload: %w", dr.ErrInvalid)
	}
	return f.b[f.stored[i]:f.stored[i+1]], nil
}

// Payload verifies and decodes the payload and appends it to dst.
func (f *Frame) Payload(dst []byte) ([]byte, error) {
	dst = grow(dst, f.RawLen)
	for i := range f.blocks() {
		stored, err := f.block(i)
		if err != nil {
			return nil, err
		}
		if dst, err = f.DecodeBlock(i, stored, dst); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

// Verify checks the checksum of every block without decoding it.
func (f *Frame) Verify() error {
	for i := range f.blocks() {
		stored, err := f.block(i)
		if err != nil {
			return err
		}
		if err := f.verifyBlock(i, stored); err != nil {
			return err
		}
	}
	return nil
}

// VerifyChain decodes the payload and checks that the frame's chain value
// follows prev, the value of the frame before. A folded frame passes: its
// value can't be recomputed.
func (f *Frame) VerifyChain(prev [32]byte) error {
	if f.Folded {
		return f.Verify()
	}
	raw, err := f.Payload(nil)
	if err != nil {
		return err
	}
	table := f.b[HeaderSize : HeaderSize+entrySize*f.Header.Extents]
	if chain(prev, &f.Header, table, raw) != f.Chain {
		return fmt.Errorf("frame %d:%d does not follow the hash chain: %w", f.Timeline, f.Last, dr.ErrCorrupt)
	}
	return nil
}

// chain computes the chain value of a frame after prev.
func chain(prev [32]byte, h *Header, table, raw []byte) (out [32]byte) {
	canonical := *h
	canonical.Codec, canonical.StoredLen = None, 0
	var head [HeaderSize]byte
	canonical.put(head[:])
	x := blake3.New()
	for _, part := range [][]byte{prev[:], head[:chainAt], table, raw} {
		x.Write(part) // never fails
	}
	x.Sum(out[:0])
	return out
}

// Recode returns the same frame with its payload stored by codec c, with the
// least work. A block that does not shrink is stored plain; the chain stays.
func (f *Frame) Recode(c Codec) ([]byte, error) {
	if c == f.Codec || c > S2 {
		return f.b, f.Verify()
	}
	return f.Compress(c.Compression())
}

// Compress is Recode with a choice of how much work is done. It works on a
// frame of any codec.
func (f *Frame) Compress(c Compression) ([]byte, error) {
	if f.Kind == TagKind || f.RawLen == 0 || c > MostCompression {
		return f.b, f.Verify()
	}
	raw, err := f.plain()
	if err != nil {
		return nil, err
	}
	h := f.Header
	h.Codec = c.Codec()
	return assemble(&h, f.b[HeaderSize:HeaderSize+entrySize*h.Extents], raw, c), nil
}

// plain returns the verified payload, without a copy if it lies there as it is.
func (f *Frame) plain() ([]byte, error) {
	if f.Codec != None {
		return f.Payload(make([]byte, 0, f.RawLen))
	}
	if err := f.Verify(); err != nil {
		return nil, err
	}
	return f.b[f.TablesSize():f.Size()], nil
}

// assemble lays out a frame: it fills in StoredLen, both checksums and the
// block table. h, table and raw must agree otherwise, and c with the codec of h.
func assemble(h *Header, table, raw []byte, c Compression) []byte {
	h.StoredLen = len(raw) // the most it can be
	b := make([]byte, h.Size())
	copy(b[HeaderSize:], table)
	at := h.TablesSize()
	entries := b[HeaderSize+len(table) : at]
	for i := range h.blocks() {
		part := raw[i*BlockSize : min(len(raw), (i+1)*BlockSize)]
		n, plain := encode(c, part, b[at:])
		le.PutUint32(entries[blockSize*i+4:], checksum(b[at:at+n]))
		word := uint32(n)
		if plain {
			word |= plainBit
		}
		le.PutUint32(entries[blockSize*i:], word)
		at += n
	}
	h.StoredLen = at - h.TablesSize()
	h.tables = checksum(b[HeaderSize:h.TablesSize()])
	h.put(b)
	le.PutUint32(b[156:], checksum(b[:156]))
	if at < len(b)/2 {
		return append([]byte(nil), b[:at]...) // don't hold twice the memory while it is queued
	}
	return b[:at:at]
}

func grow(b []byte, n int) []byte {
	if cap(b)-len(b) >= n {
		return b
	}
	return append(make([]byte, 0, len(b)+n), b...)
}
