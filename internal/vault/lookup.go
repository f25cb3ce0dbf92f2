package vault

import (
	"errors"
	"fmt"
	"math"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"

	"farside/internal/dr"
)

const (
	// chunkSize is the range of a disk that is looked up at once.
	chunkSize    = 256 << 10
	chunkUnits   = chunkSize >> unitShift0
	chunkSectors = chunkSize >> sectorShift
	unitSectors  = 1 << (unitShift0 - sectorShift)
)

// link is one timeline of the way from a position to the base: of its changes,
// those behind after and up to through count.
type link struct {
	timeline dr.Timeline
	after    dr.Seq
	through  dr.Seq
}

// pieceKind says where the content of a piece is.
type pieceKind uint8

const (
	inBase pieceKind = iota
	inZero
	inData
)

// piece says where the content of some bytes of a chunk is.
type piece struct {
	start, end uint32 // bytes, from the start of the chunk
	kind       pieceKind
	segment    segmentKey // inData, as the rest
	frame      int64      // offset in the segment
	raw        uint32     // offset of start in the decoded payload
}

// follows reports whether p continues q without a seam.
func (p *piece) follows(q *piece) bool {
	if p.kind != q.kind || p.kind != inData {
		return p.kind == q.kind
	}
	return p.segment == q.segment && p.frame == q.frame && p.raw == q.raw+(q.end-q.start)
}

// version is one change that may fill sectors of a chunk.
type version struct {
	seq    dr.Seq
	entry  uint16
	origin int   // sector of the chunk at which piece.raw is
	piece  piece // without start and end
}

func (v *version) newer(seq dr.Seq, entry uint16) bool {
	return v.seq > seq || v.seq == seq && v.entry > entry
}

// lookup finds where the content of chunks of a disk is, in rising order of
// chunks. It belongs to one goroutine and sees the index as it was when it was
// made.
type lookup struct {
	disk  dr.DiskID
	links []lookupLink

	sectors  [chunkSectors]int16 // which version; -1: none yet
	missing  int                 // sectors without a version
	versions []version
	key      []byte
}

// lookupLink is a link with its iterator and what that has told.
type lookupLink struct {
	link
	it    *pebble.Iterator
	has   [levels]bool
	quiet [levels]int64 // no key of the level that was not seen begins before this offset
	upper [levels]upperUnit
}

// upperUnit is the newest change of a unit of a higher level.
type upperUnit struct {
	known, found bool
	unit         uint64
	version      version // piece.raw is that of the unit's start
}

func newLookup(x *index, links []link, disk dr.DiskID) (*lookup, error) {
	l := &lookup{disk: disk, links: make([]lookupLink, 0, len(links)), key: make([]byte, 0, changeKeySize)}
	for _, k := range links {
		// A level is published before its first key is applied: what the iterator has and the levels lack
		// is newer than any position that could be asked for.
		has := x.hasLevels(k.timeline)
		if has == ([levels]bool{}) {
			continue
		}
		it, err := x.changes(k.timeline)
		if err != nil {
			return nil, errors.Join(err, l.close())
		}
		l.links = append(l.links, lookupLink{link: k, it: it, has: has})
	}
	return l, nil
}

func (l *lookup) close() error {
	var errs []error
	for i := range l.links {
		errs = append(errs, l.links[i].it.Close())
	}
	return errors.Join(errs...)
}

// chunk returns the pieces of chunk number n in order; they cover it.
func (l *lookup) chunk(n int64) ([]piece, error) {
	for i := range l.sectors {
		l.sectors[i] = -1
	}
	l.missing = chunkSectors
	l.versions = l.versions[:0]
	for i := range l.links {
		if err := l.fill(&l.links[i], n*chunkSize); err != nil {
			return nil, fmt.Errorf("look up disk %d at %d: %w", l.disk, n*chunkSize, err)
		}
		if l.missing == 0 {
			break
		}
	}
	return l.pieces(), nil
}

// quietUntil returns the number of a chunk behind n before which all chunks
// are like n, if n lies in the base wholly.
func (l *lookup) quietUntil(n int64) int64 {
	until := int64(math.MaxInt64)
	for i := range l.links {
		for level, has := range l.links[i].has {
			if has {
				until = min(until, l.links[i].quiet[level])
			}
		}
	}
	return max(until/chunkSize, n+1)
}

// fill takes what one timeline knows of the chunk at off.
func (l *lookup) fill(k *lookupLink, off int64) error {
	var best *version // of the higher levels; a chunk lies in one unit of each
	for level := uint8(1); level < levels; level++ {
		if !k.has[level] {
			continue
		}
		u, err := l.newest(k, level, uint64(off>>unitShift(level)))
		if err != nil {
			return err
		}
		if u.found && (best == nil || u.version.newer(best.seq, best.entry)) {
			v := u.version
			v.piece.raw += uint32(off - int64(u.unit)<<unitShift(level))
			best = &v
		}
	}
	if k.has[0] && k.quiet[0] < off+chunkSize {
		if err := l.fine(k, off, best); err != nil {
			return err
		}
	}
	if best != nil {
		l.take(*best, 0, chunkSectors)
	}
	return nil
}

// newest finds the newest change of a unit of a higher level.
func (l *lookup) newest(k *lookupLink, level uint8, unit uint64) (*upperUnit, error) {
	u := &k.upper[level]
	if u.known && u.unit == unit {
		return u, nil
	}
	*u = upperUnit{known: true, unit: unit}
	shift := unitShift(level)
	if k.quiet[level] >= int64(unit+1)<<shift {
		return u, nil
	}
	got, err := l.seek(k, level, unit)
	if err != nil || got == nil || got.Unit != unit {
		return u, err
	}
	k.quiet[level] = int64(unit+1) << shift
	if got.Seq <= k.after {
		return u, nil
	}
	c, err := decodeChange(k.it.Value())
	u.found, u.version = true, newVersion(*got, c, 0)
	return u, err
}

// fine takes the changes of level 0 in the chunk at off that are newer than best.
func (l *lookup) fine(k *lookupLink, off int64, best *version) error {
	first, end := uint64(off>>unitShift0), uint64((off+chunkSize)>>unitShift0)
	got, err := l.seek(k, 0, first)
	for err == nil && got != nil && got.Unit < end {
		if got.Seq > k.through {
			got, err = l.seek(k, 0, got.Unit)
			continue
		}
		full := true // nothing older of this unit counts
		if got.Seq > k.after && (best == nil || !best.newer(got.Seq, got.Entry)) {
			c, err := decodeChange(k.it.Value())
			if err != nil {
				return err
			}
			at := int(got.Unit-first)*unitSectors + bits.TrailingZeros8(c.Mask)
			l.take(newVersion(*got, c, at), at, at+bits.OnesCount8(c.Mask))
			full = l.full(int(got.Unit-first) * unitSectors)
		}
		was := got.Unit
		k.it.Next()
		if got, err = l.at(k, 0); err == nil && got != nil && got.Unit == was && full {
			got, err = l.seek(k, 0, was+1)
		}
	}
	return err
}

// seek goes to the newest change of the unit that counts or, if there is none,
// to some later key of the level, and returns its key; nil is the level's end.
func (l *lookup) seek(k *lookupLink, level uint8, unit uint64) (*changeKey, error) {
	l.key = changeKey{k.timeline, level, l.disk, unit, k.through, math.MaxUint16}.append(l.key[:0])
	k.it.SeekGE(l.key)
	return l.at(k, level)
}

// at reads the key at which the iterator stands and notes how far the level is quiet.
func (l *lookup) at(k *lookupLink, level uint8) (*changeKey, error) {
	if !k.it.Valid() {
		k.quiet[level] = math.MaxInt64
		return nil, k.it.Error()
	}
	got, err := decodeChangeKey(k.it.Key())
	if err != nil {
		return nil, err
	}
	if got.Level != level || got.Disk != l.disk {
		k.quiet[level] = math.MaxInt64
		return nil, nil
	}
	k.quiet[level] = int64(got.Unit << unitShift(level))
	return &got, nil
}

func newVersion(k changeKey, c change, origin int) version {
	v := version{seq: k.Seq, entry: k.Entry, origin: origin, piece: piece{kind: inZero}}
	if !c.Zero {
		v.piece = piece{
			kind: inData, segment: segmentKey{k.Timeline, k.Seq - dr.Seq(c.Back)}, frame: c.Frame, raw: c.Raw,
		}
	}
	return v
}

// take gives the sectors [from, to) of the chunk that have no version yet to v.
func (l *lookup) take(v version, from, to int) {
	used := false
	for s := from; s < to; s++ {
		if l.sectors[s] < 0 {
			l.sectors[s] = int16(len(l.versions))
			l.missing--
			used = true
		}
	}
	if used {
		l.versions = append(l.versions, v)
	}
}

// full reports whether each sector of the unit that begins at sector s has a version.
func (l *lookup) full(s int) bool {
	for _, v := range l.sectors[s : s+unitSectors] {
		if v < 0 {
			return false
		}
	}
	return true
}

// pieces joins what the sectors found; the slice is the caller's.
func (l *lookup) pieces() []piece {
	out := make([]piece, 0, min(len(l.versions)+1, chunkSectors))
	for s, n := range l.sectors {
		p := piece{kind: inBase}
		if n >= 0 {
			v := &l.versions[n]
			p = v.piece
			if p.kind == inData {
				p.raw += uint32(s-v.origin) << sectorShift
			}
		}
		p.start, p.end = uint32(s)<<sectorShift, uint32(s+1)<<sectorShift
		if i := len(out) - 1; i >= 0 && p.follows(&out[i]) {
			out[i].end = p.end
			continue
		}
		out = append(out, p)
	}
	return out
}
