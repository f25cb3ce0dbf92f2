package vault

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"farside/internal/dr"
	"farside/internal/frame"
)

// The index's keys and values; docs/format/vault.md has them byte by byte.

const (
	classMark   = 0
	classChange = 1
	classSpan   = 2
	classTag    = 3

	indexForm = 1 // version of keys and values

	changeKeySize = 26
	levels        = 4
	unitShift0    = 12 // 4 KiB
	levelShift    = 8  // each level's unit is 256 of the level below
	sectorShift   = 9
	fullMask      = 0xff
)

var be = binary.BigEndian

// unitShift is the binary logarithm of a level's unit in bytes.
func unitShift(level uint8) uint { return unitShift0 + levelShift*uint(level) }

// changeKey orders the changes of a unit newest first.
type changeKey struct {
	Timeline dr.Timeline
	Level    uint8
	Disk     dr.DiskID
	Unit     uint64
	Seq      dr.Seq
	Entry    uint16 // of the extent table: order within one sequence number
}

// append appends the key's 26 bytes.
func (k changeKey) append(b []byte) []byte {
	b = append(b, classChange)
	b = be.AppendUint32(b, uint32(k.Timeline))
	b = append(b, k.Level)
	b = be.AppendUint16(b, uint16(k.Disk))
	b = be.AppendUint64(b, k.Unit)
	b = be.AppendUint64(b, ^uint64(k.Seq))
	return be.AppendUint16(b, ^k.Entry)
}

// decodeChangeKey reads what append wrote; the error wraps dr.ErrCorrupt.
func decodeChangeKey(b []byte) (changeKey, error) {
	if len(b) != changeKeySize || b[0] != classChange || b[5] >= levels {
		return changeKey{}, fmt.Errorf("index key %x: %w", b, dr.ErrCorrupt)
	}
	return changeKey{
		Timeline: dr.Timeline(be.Uint32(b[1:])), Level: b[5], Disk: dr.DiskID(be.Uint16(b[6:])),
		Unit: be.Uint64(b[8:]), Seq: dr.Seq(^be.Uint64(b[16:])), Entry: ^be.Uint16(b[24:]),
	}, nil
}

// change is where the content of a unit lies after a change.
type change struct {
	Zero  bool
	Mask  uint8  // sectors of the unit that it covers; fullMask on higher levels
	Back  uint64 // sequence − first sequence of the segment
	Frame int64  // offset of the frame in the segment
	Raw   uint32 // offset of the first covered sector in the decoded payload; data only
}

func (c change) append(b []byte) []byte {
	what := byte(dr.Data)
	if c.Zero {
		what = byte(dr.Zero)
	}
	b = append(b, what, c.Mask)
	b = binary.AppendUvarint(b, c.Back)
	b = binary.AppendUvarint(b, uint64(c.Frame))
	if !c.Zero {
		b = binary.AppendUvarint(b, uint64(c.Raw))
	}
	return b
}

// decodeChange reads what append wrote; the error wraps dr.ErrCorrupt.
func decodeChange(b []byte) (change, error) {
	bad := func() (change, error) { return change{}, fmt.Errorf("index value %x: %w", b, dr.ErrCorrupt) }
	if len(b) < 4 || b[0] != byte(dr.Data) && b[0] != byte(dr.Zero) || b[1] == 0 {
		return bad()
	}
	c := change{Zero: b[0] == byte(dr.Zero), Mask: b[1]}
	r := uvarints{b: b[2:]}
	c.Back = r.next()
	at := r.next()
	c.Frame = int64(at)
	var raw uint64
	if !c.Zero {
		raw = r.next()
		c.Raw = uint32(raw)
	}
	if !r.done() || at > 1<<62 || raw >= frame.MaxRaw || !oneRun(c.Mask) {
		return bad()
	}
	return c, nil
}

// oneRun reports whether the set bits of m follow one another.
func oneRun(m uint8) bool {
	m >>= bits.TrailingZeros8(m)
	return m&(m+1) == 0
}

// uvarints reads LEB128 numbers in their shortest form; a fault sticks.
type uvarints struct {
	b   []byte
	bad bool
}

func (r *uvarints) next() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 || n > 1 && r.b[n-1] == 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// done reports whether all was read without a fault.
func (r *uvarints) done() bool { return !r.bad && len(r.b) == 0 }

// cut calls fn for each unit that the bytes [off, end) are cut into: the
// largest aligned units covered wholly, and parts of level 0 units at the
// edges. at is the offset of the first byte covered.
func cut(off, end int64, fn func(level uint8, unit uint64, mask uint8, at int64)) {
	for off < end {
		level := uint8(levels - 1)
		for ; level > 0; level-- {
			if unit := int64(1) << unitShift(level); off&(unit-1) == 0 && end-off >= unit {
				break
			}
		}
		shift := unitShift(level)
		unit := off >> shift
		next := min(end, (unit+1)<<shift)
		mask := uint8(fullMask)
		if level == 0 {
			mask = sectorMask(off-unit<<shift, next-unit<<shift)
		}
		fn(level, uint64(unit), mask, off)
		off = next
	}
}

// sectorMask has the bits of the sectors in the bytes [from, to) of a unit of
// level 0.
func sectorMask(from, to int64) uint8 {
	return uint8(1<<(to>>sectorShift)-1) &^ uint8(1<<(from>>sectorShift)-1)
}

// eachChange calls fn for every key that the extents of f make in the index.
// f lies at offset at of the segment whose first sequence number is first.
func eachChange(f *frame.Frame, first dr.Seq, at int64, fn func(changeKey, change) error) error {
	for i, x := range f.All() {
		var err error
		cut(x.Offset, x.End(), func(level uint8, unit uint64, mask uint8, off int64) {
			if err != nil {
				return
			}
			k := changeKey{f.Timeline, level, x.Disk, unit, x.Seq, uint16(i)}
			c := change{Zero: x.What != dr.Data, Mask: mask, Back: uint64(x.Seq - first), Frame: at}
			if !c.Zero {
				c.Raw = uint32(int64(x.RawOff) + off - x.Offset)
			}
			err = fn(k, c)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// span is a run of frames of one segment, or of several in Spans, that have
// the same accuracy.
type span struct {
	Timeline            dr.Timeline
	Accuracy            dr.Accuracy
	Open                bool
	First, Last         dr.Seq
	FirstTime, LastTime int64
}

func spanKey(tl dr.Timeline, first dr.Seq) []byte { return sequenceKey(classSpan, tl, first) }

func tagKey(tl dr.Timeline, seq dr.Seq) []byte { return sequenceKey(classTag, tl, seq) }

func sequenceKey(class byte, tl dr.Timeline, seq dr.Seq) []byte {
	b := make([]byte, 0, 13)
	b = append(b, class)
	b = be.AppendUint32(b, uint32(tl))
	return be.AppendUint64(b, uint64(seq))
}

func decodeSequenceKey(class byte, b []byte) (dr.Timeline, dr.Seq, error) {
	if len(b) != 13 || b[0] != class {
		return 0, 0, fmt.Errorf("index key %x: %w", b, dr.ErrCorrupt)
	}
	return dr.Timeline(be.Uint32(b[1:])), dr.Seq(be.Uint64(b[5:])), nil
}

func (s span) value() []byte {
	b := []byte{byte(s.Accuracy), byte(bit(s.Open, 1))}
	b = binary.AppendUvarint(b, uint64(s.Last-s.First))
	b = binary.AppendUvarint(b, uint64(s.FirstTime))
	return binary.AppendUvarint(b, uint64(s.LastTime-s.FirstTime))
}

// decodeSpan reads a span's key and value; the error wraps dr.ErrCorrupt.
func decodeSpan(key, b []byte) (span, error) {
	tl, first, err := decodeSequenceKey(classSpan, key)
	if err != nil {
		return span{}, err
	}
	bad := fmt.Errorf("index span %x: %w", b, dr.ErrCorrupt)
	if len(b) < 5 || b[1] > 1 || dr.Accuracy(b[0]) != dr.Exact && dr.Accuracy(b[0]) != dr.Epoch {
		return span{}, bad
	}
	s := span{Timeline: tl, Accuracy: dr.Accuracy(b[0]), Open: b[1] == 1, First: first}
	r := uvarints{b: b[2:]}
	s.Last = first + dr.Seq(r.next())
	s.FirstTime = int64(r.next())
	s.LastTime = s.FirstTime + int64(r.next())
	if !r.done() || s.Last < first || s.FirstTime < 0 || s.LastTime < s.FirstTime {
		return span{}, bad
	}
	return s, nil
}

// markKey is where the last indexed sequence number of a timeline is kept.
func markKey(tl dr.Timeline) []byte { return be.AppendUint32([]byte{classMark}, uint32(tl)) }

// tagFixed is the length of a tag's value without its name.
const tagFixed = 8 + 16 + 16 + 1

func tagValue(t dr.Tag, time int64) []byte {
	b := be.AppendUint64(make([]byte, 0, tagFixed+len(t.Name)), uint64(time))
	b = append(b, t.ID[:]...)
	b = append(b, t.Group[:]...)
	b = append(b, byte(t.Consistency))
	return append(b, t.Name...)
}

// decodeTag reads a tag's key and value; the error wraps dr.ErrCorrupt.
func decodeTag(key, b []byte) (Tagged, error) {
	tl, seq, err := decodeSequenceKey(classTag, key)
	if err != nil {
		return Tagged{}, err
	}
	if len(b) < tagFixed || len(b) > tagFixed+dr.MaxTagName {
		return Tagged{}, fmt.Errorf("index tag %x: %w", b, dr.ErrCorrupt)
	}
	return Tagged{
		Tag: dr.Tag{
			ID: [16]byte(b[8:]), Group: [16]byte(b[24:]), Consistency: dr.Consistency(b[40]), Name: string(b[tagFixed:]),
		},
		Position: dr.Position{Timeline: tl, Seq: seq}, Time: int64(be.Uint64(b)),
	}, nil
}
