// Package frame encodes and decodes frames: runs of consecutive changes of one
// machine, the one format in which Farside's data travels and rests. The bytes
// are described in docs/format/frame.md.
//
// An Encoder makes the frames of a stream. Parse gives a Frame, which is
// immutable and safe for concurrent use; an Encoder is not. A Cursor says where
// a stream stands and so what the next frame must continue.
//
// The package does no I/O, reads no clock, and doesn't decide which positions
// are offered as recovery points; it only carries what the source said.
package frame

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"iter"

	"farside/internal/dr"
)

// Kind says what a frame is for.
type Kind uint8

// The kinds of frame.
const (
	Changes   Kind = iota + 1 // captured writes
	TagKind                   // a consistency marker
	Resync                    // content read from the disk: initial replication, resync
	Heartbeat                 // nothing changed up to its time
)

// String returns the name of k.
func (k Kind) String() string {
	if n := [...]string{"", "changes", "tag", "resync", "heartbeat"}; int(k) < len(n) && k > 0 {
		return n[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Codec says how the blocks of the payload are stored.
type Codec uint8

// The codecs.
const (
	None Codec = iota
	Zstd
	S2
)

// String returns the name of c.
func (c Codec) String() string {
	if n := [...]string{"none", "zstd", "s2"}; int(c) < len(n) {
		return n[c]
	}
	return fmt.Sprintf("codec(%d)", uint8(c))
}

// Bounds of the format, in bytes unless said otherwise.
const (
	HeaderSize = 160
	MaxRaw     = 4 << 20 // decoded payload
	MaxExtents = 65536   // entries of the extent table
	BlockSize  = 65536   // decoded bytes per block of the payload
	MaxSize    = HeaderSize + entrySize*MaxExtents + blockSize*(MaxRaw/BlockSize) + MaxRaw

	version   = 1
	entrySize = 32 // of the extent table
	blockSize = 8  // of an entry of the block table
	plainBit  = 1 << 31
	flagOpen  = 1
	flagFold  = 2
	chainAt   = 96
)

var (
	magic      = [4]byte{'F', 'S', 'F', 'R'}
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Cursor is where a stream stands: what the next frame must continue.
type Cursor struct {
	Machine  dr.MachineID
	Position dr.Position
	Time     int64    // UTC ns of the last frame; the next is not earlier
	Chain    [32]byte // of the last frame; zero before the first
}

// Header is what the fixed part of a frame says.
type Header struct {
	Kind                Kind
	Accuracy            dr.Accuracy
	Codec               Codec
	Open                bool // no position within is a recovery point
	Folded              bool // several frames merged; the chain can't be recomputed
	Machine             dr.MachineID
	Timeline            dr.Timeline
	Prev, First, Last   dr.Seq
	FirstTime, LastTime int64 // UTC ns
	Extents             int
	RawLen, StoredLen   int // bytes of the payload, decoded and as stored
	Chain               [32]byte

	tables uint32 // their checksum
}

// TablesSize returns the bytes of header, extent table and block table.
func (h *Header) TablesSize() int {
	return HeaderSize + entrySize*h.Extents + blockSize*h.blocks()
}

// Size returns the bytes of the whole frame.
func (h *Header) Size() int64 { return int64(h.TablesSize()) + int64(h.StoredLen) }

// End returns the cursor after the frame.
func (h *Header) End() Cursor {
	return Cursor{
		Machine: h.Machine, Position: dr.Position{Timeline: h.Timeline, Seq: h.Last},
		Time: h.LastTime, Chain: h.Chain,
	}
}

// Check reports whether the frame continues c. The error wraps dr.ErrDenied
// (another machine), dr.ErrTimeline, dr.ErrRepeat, dr.ErrGap, or dr.ErrCorrupt
// (it overlaps c, or its time is earlier).
func (h *Header) Check(c Cursor) error {
	at := c.Position
	fail := func(kind error) error {
		return fmt.Errorf("frame %d:(%d,%d] after %v: %w", h.Timeline, h.Prev, h.Last, at, kind)
	}
	switch {
	case h.Machine != c.Machine:
		return fmt.Errorf("frame of machine %v in the stream of %v: %w", h.Machine, c.Machine, dr.ErrDenied)
	case h.Timeline != at.Timeline:
		return fail(dr.ErrTimeline)
	case h.Last <= at.Seq:
		return fail(dr.ErrRepeat)
	case h.Prev > at.Seq:
		return fail(dr.ErrGap)
	case h.Prev < at.Seq, h.FirstTime < c.Time:
		return fail(dr.ErrCorrupt)
	}
	return nil
}

func (h *Header) blocks() int { return (h.RawLen + BlockSize - 1) / BlockSize }

// put writes the header without its own checksum.
func (h *Header) put(b []byte) {
	clear(b[:HeaderSize])
	copy(b, magic[:])
	le.PutUint16(b[4:], version)
	le.PutUint16(b[6:], HeaderSize)
	b[8], b[9], b[10] = byte(h.Kind), byte(h.Accuracy), byte(h.Codec)
	if h.Open {
		b[11] |= flagOpen
	}
	if h.Folded {
		b[11] |= flagFold
	}
	le.PutUint32(b[12:], uint32(h.Timeline))
	copy(b[16:], h.Machine[:])
	for i, v := range [...]uint64{
		uint64(h.Prev), uint64(h.First), uint64(h.Last), uint64(h.FirstTime), uint64(h.LastTime),
	} {
		le.PutUint64(b[32+8*i:], v)
	}
	for i, v := range [...]int{h.Extents, h.RawLen, h.StoredLen, BlockSize} {
		le.PutUint32(b[72+4*i:], uint32(v))
	}
	copy(b[chainAt:], h.Chain[:])
	le.PutUint32(b[152:], h.tables)
}

// ParseHeader reads and verifies the first HeaderSize bytes of a frame: its
// checksum and every bound, so that Size can be trusted. Errors wrap
// dr.ErrCorrupt or dr.ErrVersion.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, fmt.Errorf("frame header of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	if [4]byte(b) != magic {
		return Header{}, fmt.Errorf("frame magic %q: %w", b[:4], dr.ErrCorrupt)
	}
	if v := le.Uint16(b[4:]); v != version {
		return Header{}, fmt.Errorf("frame version %d, this program knows %d: %w", v, version, dr.ErrVersion)
	}
	if checksum(b[:156]) != le.Uint32(b[156:]) {
		return Header{}, fmt.Errorf("frame header checksum: %w", dr.ErrCorrupt)
	}
	h := Header{
		Kind: Kind(b[8]), Accuracy: dr.Accuracy(b[9]), Codec: Codec(b[10]),
		Open: b[11]&flagOpen != 0, Folded: b[11]&flagFold != 0,
		Machine: dr.MachineID(b[16:32]), Timeline: dr.Timeline(le.Uint32(b[12:])),
		Prev: dr.Seq(le.Uint64(b[32:])), First: dr.Seq(le.Uint64(b[40:])), Last: dr.Seq(le.Uint64(b[48:])),
		FirstTime: int64(le.Uint64(b[56:])), LastTime: int64(le.Uint64(b[64:])),
		Extents: int(le.Uint32(b[72:])), RawLen: int(le.Uint32(b[76:])), StoredLen: int(le.Uint32(b[80:])),
		Chain: [32]byte(b[chainAt:]), tables: le.Uint32(b[152:]),
	}
	// What put would write is the only form that counts, reserved bytes included.
	var again [HeaderSize]byte
	if h.put(again[:]); string(again[:152]) != string(b[:152]) {
		return Header{}, fmt.Errorf("frame header has unknown bits: %w", dr.ErrCorrupt)
	}
	if what := h.fault(); what != "" {
		return Header{}, fmt.Errorf("frame header: %s: %w", what, dr.ErrCorrupt)
	}
	return h, nil
}

// fault names the first bound that h breaks, or is empty.
func (h *Header) fault() string {
	switch {
	case h.Kind < Changes || h.Kind > Heartbeat:
		return "unknown kind"
	case h.Accuracy != dr.Exact && h.Accuracy != dr.Epoch:
		return "unknown accuracy"
	case h.Codec > S2:
		return "unknown codec"
	case h.Timeline == 0 || h.Machine.IsZero():
		return "no timeline or machine"
	case h.First != h.Prev+1 || h.Last < h.First || h.Last-h.First > 1<<32-1:
		return "sequence numbers"
	case h.FirstTime < 0 || h.LastTime < h.FirstTime:
		return "times"
	case h.Extents > MaxExtents || h.RawLen > MaxRaw || h.StoredLen > h.RawLen:
		return "lengths"
	}
	return h.kindFault()
}

// kindFault checks what depends on the kind.
func (h *Header) kindFault() string {
	switch h.Kind {
	case TagKind:
		if h.Extents != 0 || h.First != h.Last || h.RawLen < tagFixed || h.Codec != None {
			return "not a tag"
		}
	case Heartbeat:
		if h.Extents != 0 || h.First != h.Last || h.RawLen != 0 {
			return "not a heartbeat"
		}
	default:
		if h.Extents == 0 {
			return "no extents"
		}
	}
	return ""
}

// Extent is one change of a frame.
type Extent struct {
	dr.Extent
	What   dr.What
	Seq    dr.Seq
	Time   int64 // UTC ns
	RawOff int   // where its data begins in the decoded payload; data only
}

// Frame is a parsed frame over bytes that it doesn't copy.
type Frame struct {
	Header
	b      []byte // header and tables, and the payload unless from ParseTables
	rawOff []uint32
	stored []uint32 // where each block begins, from the frame's first byte; one more at the end
}

// Parse reads a whole frame that fills b exactly and verifies header and
// tables; the payload is verified by Verify, Payload, DecodeBlock. The frame
// keeps b. Errors wrap dr.ErrCorrupt or dr.ErrVersion.
func Parse(b []byte) (*Frame, error) {
	f, err := ParseTables(b)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != f.Size() {
		return nil, fmt.Errorf("frame of %d bytes says %d: %w", len(b), f.Size(), dr.ErrCorrupt)
	}
	return f, nil
}

// ParseTables is Parse for at least the first TablesSize bytes of a frame;
// without the payload, only DecodeBlock gives data.
func ParseTables(b []byte) (*Frame, error) {
	h, err := ParseHeader(b)
	if err != nil {
		return nil, err
	}
	n := h.TablesSize()
	if len(b) < n {
		return nil, fmt.Errorf("frame tables of %d bytes, have %d: %w", n, len(b), dr.ErrCorrupt)
	}
	if checksum(b[HeaderSize:n]) != h.tables {
		return nil, fmt.Errorf("frame tables checksum: %w", dr.ErrCorrupt)
	}
	f := &Frame{Header: h, b: b}
	if what := f.parseExtents(); what != "" {
		return nil, fmt.Errorf("frame extent table: %s: %w", what, dr.ErrCorrupt)
	}
	if what := f.parseBlocks(); what != "" {
		return nil, fmt.Errorf("frame block table: %s: %w", what, dr.ErrCorrupt)
	}
	return f, nil
}

func (f *Frame) parseExtents() string {
	f.rawOff = make([]uint32, f.Header.Extents)
	raw, seq, time := 0, uint32(0), uint64(0)
	for i := range f.rawOff {
		e := f.entry(i)
		sectors, off := uint64(le.Uint32(e[4:])), le.Uint64(e[8:])
		length := sectors * dr.SectorSize
		switch {
		case e[2] < byte(dr.Data) || e[2] > byte(dr.Discard) || e[3] != 0 || le.Uint32(e[20:]) != 0:
			return "unknown bits"
		case sectors == 0 || off%dr.SectorSize != 0 || off >= 1<<63-length:
			return "range"
		case le.Uint32(e[16:]) < seq || uint64(le.Uint32(e[16:])) > uint64(f.Last-f.First):
			return "sequence"
		case le.Uint64(e[24:]) < time || le.Uint64(e[24:]) > uint64(f.LastTime-f.FirstTime):
			return "time"
		}
		seq, time = le.Uint32(e[16:]), le.Uint64(e[24:])
		f.rawOff[i] = uint32(raw)
		if dr.What(e[2]) == dr.Data {
			if length > uint64(f.RawLen-raw) {
				return "more data than payload"
			}
			raw += int(length)
		}
	}
	if raw != f.RawLen && f.Kind != TagKind {
		return "less data than payload"
	}
	return ""
}

func (f *Frame) parseBlocks() string {
	n := f.blocks()
	f.stored = make([]uint32, n+1)
	at := uint32(f.TablesSize())
	end := at + uint32(f.StoredLen)
	for i := range n {
		word := le.Uint32(f.blockEntry(i))
		size, plain := word&^plainBit, word&plainBit != 0
		_, rawLen := f.rawBlock(i)
		if size > end-at || size > uint32(rawLen) {
			return "stored length"
		}
		if (plain || f.Codec == None) && size != uint32(rawLen) {
			return "plain block length"
		}
		f.stored[i] = at
		at += size
	}
	if f.stored[n] = at; at != end {
		return "blocks do not add up"
	}
	return ""
}

func (f *Frame) entry(i int) []byte { return f.b[HeaderSize+entrySize*i:][:entrySize] }

func (f *Frame) blockEntry(i int) []byte {
	return f.b[HeaderSize+entrySize*f.Header.Extents+blockSize*i:][:blockSize]
}

func (f *Frame) rawBlock(i int) (off, n int) {
	off = i * BlockSize
	return off, min(BlockSize, f.RawLen-off)
}

// Bytes returns what the frame was parsed from.
func (f *Frame) Bytes() []byte { return f.b }

// Extent returns entry i of the extent table, 0 ≤ i < Header.Extents.
func (f *Frame) Extent(i int) Extent {
	e := f.entry(i)
	return Extent{
		Extent: dr.Extent{
			Disk: dr.DiskID(le.Uint16(e)), Offset: int64(le.Uint64(e[8:])),
			Length: int64(le.Uint32(e[4:])) * dr.SectorSize,
		},
		What: dr.What(e[2]), Seq: f.First + dr.Seq(le.Uint32(e[16:])),
		Time: f.FirstTime + int64(le.Uint64(e[24:])), RawOff: int(f.rawOff[i]),
	}
}

// All yields the extent table in order.
func (f *Frame) All() iter.Seq2[int, Extent] {
	return func(yield func(int, Extent) bool) {
		for i := range f.Header.Extents {
			if !yield(i, f.Extent(i)) {
				return
			}
		}
	}
}

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
