// Package segment is a file of consecutive frames: the unit in which the
// process server's spool and the master target's log lie on disk. The bytes
// are described in docs/format/segment.md.
//
// A Writer appends frames and seals; Recover continues after a crash; a Reader
// finds and reads frames of a sealed or a growing segment. One goroutine may
// append while another syncs, so that frames gather during an fsync, and any
// number may use the Reader; the other methods of a Writer want it for themselves.
//
// The package does not choose when to sync, to seal or to delete, and holds no
// index of disk blocks.
package segment

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"farside/internal/dr"
	"farside/internal/frame"
)

const (
	version     = 1
	headerSize  = 128
	markSize    = 32
	entrySize   = 40
	trailerSize = 96

	magicHeader  = "FSSG"
	magicMark    = "FSSM"
	magicTrailer = "FSSX"

	suffix = ".seg"

	flagOpen   = 1
	flagFolded = 2
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// Name returns the file name of the segment that starts at c.
func Name(c frame.Cursor) string {
	return fmt.Sprintf("%08x-%016x%s", uint32(c.Position.Timeline), uint64(c.Position.Seq)+1, suffix)
}

// ParseName returns timeline and first sequence number of a file name that
// Name made. Errors wrap dr.ErrInvalid.
func ParseName(name string) (dr.Timeline, dr.Seq, error) {
	base, ok := strings.CutSuffix(name, suffix)
	tl, seq, _ := strings.Cut(base, "-")
	t, err1 := strconv.ParseUint(tl, 16, 32)
	s, err2 := strconv.ParseUint(seq, 16, 64)
	c := frame.Cursor{Position: dr.Position{Timeline: dr.Timeline(t), Seq: dr.Seq(s - 1)}}
	if !ok || err1 != nil || err2 != nil || Name(c) != name {
		return 0, 0, fmt.Errorf("segment name %q: %w", name, dr.ErrInvalid)
	}
	return dr.Timeline(t), dr.Seq(s), nil
}

// Entry is what the index of a segment knows of a frame.
type Entry struct {
	Off, Len            int64 // bytes, in the file
	Kind                frame.Kind
	Accuracy            dr.Accuracy
	Open, Folded        bool
	First, Last         dr.Seq
	FirstTime, LastTime int64 // UTC ns
}

func entryOf(off int64, h *frame.Header) Entry {
	return Entry{
		Off: off, Len: h.Size(), Kind: h.Kind, Accuracy: h.Accuracy, Open: h.Open, Folded: h.Folded,
		First: h.First, Last: h.Last, FirstTime: h.FirstTime, LastTime: h.LastTime,
	}
}

func putHeader(c frame.Cursor) []byte {
	b := make([]byte, headerSize)
	copy(b, magicHeader)
	le.PutUint16(b[4:], version)
	le.PutUint16(b[6:], headerSize)
	le.PutUint32(b[8:], uint32(c.Position.Timeline))
	copy(b[16:], c.Machine[:])
	le.PutUint64(b[32:], uint64(c.Position.Seq))
	le.PutUint64(b[40:], uint64(c.Time))
	copy(b[48:], c.Chain[:])
	le.PutUint32(b[124:], checksum(b[:124]))
	return b
}

func parseHeader(b []byte) (frame.Cursor, error) {
	if string(b[:4]) != magicHeader {
		return frame.Cursor{}, fmt.Errorf("segment magic %q: %w", b[:4], dr.ErrCorrupt)
	}
	if v := le.Uint16(b[4:]); v != version {
		return frame.Cursor{}, fmt.Errorf("segment version %d, this program knows %d: %w", v, version, dr.ErrVersion)
	}
	c := frame.Cursor{
		Machine: dr.MachineID(b[16:32]), Time: int64(le.Uint64(b[40:])), Chain: [32]byte(b[48:]),
		Position: dr.Position{Timeline: dr.Timeline(le.Uint32(b[8:])), Seq: dr.Seq(le.Uint64(b[32:]))},
	}
	if string(putHeader(c)) != string(b) {
		return frame.Cursor{}, fmt.Errorf("segment header checksum: %w", dr.ErrCorrupt)
	}
	return c, nil
}

// putMark returns the mark that lies at off and says that the bytes before
// synced were durable when it was written.
func putMark(off, synced int64) []byte {
	b := make([]byte, markSize)
	copy(b, magicMark)
	le.PutUint16(b[4:], version)
	le.PutUint16(b[6:], markSize)
	le.PutUint64(b[8:], uint64(off))
	le.PutUint64(b[16:], uint64(synced))
	le.PutUint32(b[28:], checksum(b[:28]))
	return b
}

// parseMark returns what the mark at off says; ok is false when b does not
// begin with one that belongs there.
func parseMark(b []byte, off int64) (synced int64, ok bool) {
	if len(b) < markSize || string(b[:4]) != magicMark {
		return 0, false
	}
	synced = int64(le.Uint64(b[16:]))
	ok = synced >= 0 && synced <= off && string(putMark(off, synced)) == string(b[:markSize])
	return synced, ok
}

// putFooter returns footer and trailer for entries of a segment that ends at
// end; the footer begins at off.
func putFooter(off int64, entries []Entry, end frame.Cursor) []byte {
	b := make([]byte, entrySize*len(entries)+trailerSize)
	for i, e := range entries {
		x := b[entrySize*i:]
		le.PutUint64(x, uint64(e.Off))
		le.PutUint32(x[8:], uint32(e.Len))
		x[12], x[13] = byte(e.Kind), byte(e.Accuracy)
		if e.Open {
			x[14] |= flagOpen
		}
		if e.Folded {
			x[14] |= flagFolded
		}
		le.PutUint64(x[16:], uint64(e.Last))
		le.PutUint64(x[24:], uint64(e.FirstTime))
		le.PutUint64(x[32:], uint64(e.LastTime))
	}
	footer, t := b[:entrySize*len(entries)], b[entrySize*len(entries):]
	copy(t, magicTrailer)
	le.PutUint16(t[4:], version)
	le.PutUint16(t[6:], trailerSize)
	le.PutUint32(t[8:], uint32(len(entries)))
	le.PutUint32(t[12:], checksum(footer))
	le.PutUint64(t[16:], uint64(off))
	copy(t[24:], end.Chain[:])
	le.PutUint32(t[92:], checksum(t[:92]))
	return b
}

// trailer is what the last bytes of a sealed segment say.
type trailer struct {
	entries int
	footer  int64 // its offset
	sum     uint32
	chain   [32]byte
}

// parseTrailer reports false when b is no valid trailer of a file of size bytes.
func parseTrailer(b []byte, size int64) (trailer, bool) {
	if string(b[:4]) != magicTrailer || le.Uint16(b[4:]) != version || checksum(b[:92]) != le.Uint32(b[92:]) {
		return trailer{}, false
	}
	t := trailer{
		entries: int(le.Uint32(b[8:])), sum: le.Uint32(b[12:]),
		footer: int64(le.Uint64(b[16:])), chain: [32]byte(b[24:]),
	}
	fits := t.footer >= headerSize+frame.HeaderSize*int64(t.entries) &&
		t.footer == size-trailerSize-entrySize*int64(t.entries)
	return t, fits
}

// parseFooter reports false unless the checksum is right and the entries
// follow one another from start, with nothing but marks between, up to the footer.
func parseFooter(b []byte, t trailer, start frame.Cursor) ([]Entry, bool) {
	if checksum(b) != t.sum {
		return nil, false
	}
	entries := make([]Entry, t.entries)
	at, seq, time := int64(headerSize), start.Position.Seq, start.Time
	for i := range entries {
		x := b[entrySize*i:]
		e := Entry{
			Off: int64(le.Uint64(x)), Len: int64(le.Uint32(x[8:])), Kind: frame.Kind(x[12]), Accuracy: dr.Accuracy(x[13]),
			Open: x[14]&flagOpen != 0, Folded: x[14]&flagFolded != 0, First: seq + 1, Last: dr.Seq(le.Uint64(x[16:])),
			FirstTime: int64(le.Uint64(x[24:])), LastTime: int64(le.Uint64(x[32:])),
		}
		if e.Off != at && e.Off != at+markSize || e.Len < frame.HeaderSize || e.Len > frame.MaxSize || e.Off+e.Len > t.footer ||
			e.Last < e.First || e.FirstTime < time || e.LastTime < e.FirstTime {
			return nil, false
		}
		at, seq, time = e.Off+e.Len, e.Last, e.LastTime
		entries[i] = e
	}
	return entries, at == t.footer
}
