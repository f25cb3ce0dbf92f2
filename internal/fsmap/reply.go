package fsmap

import (
	"encoding/binary"
	"fmt"
	"slices"

	"farside/internal/dr"
	"farside/internal/extent"
)

// The layout of FS_IOC_GETFSMAP, linux/include/uapi/linux/fsmap.h, in the machine's byte order:
//
//	 0  iflags, oflags, count, entries: 4 bytes each
//	16  reserved
//	64  the lowest and the highest record wanted
//	192 records
//
// A record: device and flags, 4 bytes each; physical, owner, offset, length, 8 bytes
// each, all in bytes; reserved up to 64.
const (
	headSize   = 192
	recordSize = 64
	lowKeyAt   = 64
	highKeyAt  = lowKeyAt + recordSize

	oflagDevT    = 0x1  // devices are those of stat(2)
	flagSpecial  = 0x10 // the owner is a name, not an inode
	flagLast     = 0x20 // there is no further record
	ownerFree    = 1
	recordsAsked = 1024 // at a time
)

var ne = binary.NativeEndian

type record struct {
	dev, flags              uint32
	physical, owner, length uint64
}

func (r *record) free() bool { return r.flags&flagSpecial != 0 && r.owner == ownerFree }

// newQuestion returns the buffer for all records.
func newQuestion() []byte {
	b := make([]byte, headSize+recordsAsked*recordSize)
	ne.PutUint32(b[8:], recordsAsked)
	for i := highKeyAt; i < highKeyAt+32; i++ { // all but the length, which xfs wants to be zero
		b[i] = 0xFF
	}
	return b
}

// goOn makes the buffer, which holds an answer, ask for what follows. It reports whether
// anything does.
func goOn(b []byte) bool {
	n := int(ne.Uint32(b[12:]))
	if n == 0 {
		return false
	}
	last := b[headSize+(n-1)*recordSize:][:recordSize]
	if ne.Uint32(last[4:])&flagLast != 0 {
		return false
	}
	copy(b[lowKeyAt:highKeyAt], last)
	return true
}

// parseReply returns the records of an answer. Errors wrap dr.ErrCorrupt.
func parseReply(b []byte) ([]record, error) {
	if len(b) < headSize {
		return nil, fmt.Errorf("map of %d bytes: %w", len(b), dr.ErrCorrupt)
	}
	n := ne.Uint32(b[12:])
	if uint64(n)*recordSize > uint64(len(b)-headSize) {
		return nil, fmt.Errorf("map of %d records in %d bytes: %w", n, len(b), dr.ErrCorrupt)
	}
	if n > 0 && ne.Uint32(b[4:])&oflagDevT == 0 {
		return nil, fmt.Errorf("map with unknown device numbers: %w", dr.ErrUnsupported)
	}
	out := make([]record, n)
	for i := range out {
		r := b[headSize+i*recordSize:]
		out[i] = record{
			dev: ne.Uint32(r), flags: ne.Uint32(r[4:]),
			physical: ne.Uint64(r[8:]), owner: ne.Uint64(r[16:]), length: ne.Uint64(r[32:]),
		}
	}
	return out, nil
}

// gatherer takes records in their order and keeps the longest free ranges.
type gatherer struct {
	dev   uint32 // of the volume
	size  int64  // of it, bytes
	limit int    // ranges
	least int64  // bytes of the shortest range that is kept

	begun  uint64       // where the last record began
	seen   uint64       // behind the end of every record
	run    extent.Range // the free records that touch, at the end of what was seen
	ranges []extent.Range
}

// add takes a record. What contradicts itself is an error that wraps dr.ErrCorrupt.
func (g *gatherer) add(r record) error {
	switch {
	case r.dev != g.dev:
		return fmt.Errorf("part of it lies on device %#x: %w", r.dev, dr.ErrUnsupported)
	case r.physical > uint64(g.size) || r.length > uint64(g.size)-r.physical:
		return fmt.Errorf("record of %d bytes at %d, of %d: %w", r.length, r.physical, g.size, dr.ErrCorrupt)
	case r.physical < g.begun,
		r.free() && r.physical < g.seen,                   // free and used
		g.run.Len() > 0 && r.physical < uint64(g.run.End): // used and free: owners may share, but not with nobody
		return fmt.Errorf("record at %d, behind one at %d that ends at %d: %w", r.physical, g.begun, g.seen, dr.ErrCorrupt)
	}
	if r.free() && r.length > 0 {
		start, end := int64(r.physical), int64(r.physical+r.length)
		if start != g.run.End {
			g.keep()
			g.run.Start = start
		}
		g.run.End = end
	}
	g.begun, g.seen = r.physical, max(g.seen, r.physical+r.length)
	return nil
}

// keep puts the run among the ranges if it is long enough. When there are too many,
// only longer ones count from there on.
func (g *gatherer) keep() {
	if g.run.Len() >= g.least {
		g.ranges = append(g.ranges, g.run)
	}
	for len(g.ranges) > g.limit {
		g.least *= 2
		g.ranges = slices.DeleteFunc(g.ranges, func(r extent.Range) bool { return r.Len() < g.least })
	}
	g.run = extent.Range{Start: g.run.End, End: g.run.End}
}

// done returns what is free.
func (g *gatherer) done() []extent.Range {
	g.keep()
	return g.ranges
}
