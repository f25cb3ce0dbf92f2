package frame

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Compression says how a payload is packed: a codec, and how much work is put
// into it. A higher one makes less of the same data and costs more CPU.
type Compression uint8

// The steps of compression, rising in effect and cost.
const (
	Plain Compression = iota
	S2Fast
	ZstdFastest
	ZstdDefault
	ZstdBetter

	MostCompression = ZstdBetter
)

// String returns the name of c.
func (c Compression) String() string {
	if n := [...]string{"none", "s2", "zstd-1", "zstd-2", "zstd-3"}; int(c) < len(n) {
		return n[c]
	}
	return fmt.Sprintf("compression(%d)", uint8(c))
}

// Codec returns the codec of c.
func (c Compression) Codec() Codec {
	switch {
	case c == Plain:
		return None
	case c == S2Fast:
		return S2
	}
	return Zstd
}

// Compression returns the least work for a codec.
func (c Codec) Compression() Compression {
	switch c {
	case Zstd:
		return ZstdFastest
	case S2:
		return S2Fast
	}
	return Plain
}

// The zstd coders are made once and used by all: EncodeAll is safe for
// concurrent use.
var zstdEncoders = [...]func() *zstd.Encoder{
	sync.OnceValue(func() *zstd.Encoder { return newZstd(zstd.SpeedFastest) }),
	sync.OnceValue(func() *zstd.Encoder { return newZstd(zstd.SpeedDefault) }),
	sync.OnceValue(func() *zstd.Encoder { return newZstd(zstd.SpeedBetterCompression) }),
}

func newZstd(level zstd.EncoderLevel) *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(false), zstd.WithWindowSize(BlockSize))
	if err != nil {
		panic(err) // the options are constants
	}
	return e
}

// encode stores part at the start of room, which has space for it as it is,
// and says how long it is and whether it is plain in spite of the codec.
func encode(c Compression, part, room []byte) (n int, plain bool) {
	var out []byte
	switch c {
	case Plain:
		return copy(room, part), false
	case S2Fast:
		out = s2.Encode(nil, part) // it wants more room than part has
	default:
		out = zstdEncoders[c-ZstdFastest]().EncodeAll(part, room[:0:len(part)])
	}
	if len(out) >= len(part) {
		return copy(room, part), true
	}
	if &out[0] != &room[0] {
		copy(room, out)
	}
	return len(out), false
}
