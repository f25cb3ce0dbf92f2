package simtest

import (
	"encoding/binary"
	"fmt"
	"slices"

	"farside/internal/dr"
)

// oracle knows every state that a machine's disks were in, between any two of its writes.
// Each write has a number, which fills every sector that it writes; a state is known by a hash over all
// sectors that changes with one of them by two exclusive ors. So it costs little to tell of
// any image which state it is, if it is one.
type oracle struct {
	sectors map[dr.DiskID][]uint64 // number of the write that each sector is of; 0: zeroes
	hash    uint64
	writes  int                 // that were submitted
	states  map[uint64]interval // by hash
}

// interval is the writes behind which a state was the disks' state, first and last.
type interval struct{ first, last int }

func newOracle(disks map[dr.DiskID]int64) *oracle {
	o := &oracle{sectors: map[dr.DiskID][]uint64{}, states: map[uint64]interval{0: {}}}
	for id, size := range disks {
		o.sectors[id] = make([]uint64, size/dr.SectorSize)
	}
	return o
}

// mix hashes one sector: that of zeroes is 0.
func mix(disk dr.DiskID, sector int64, stamp uint64) uint64 {
	if stamp == 0 {
		return 0
	}
	x := stamp*0x9e3779b97f4a7c15 + uint64(sector)*0xbf58476d1ce4e5b9 + uint64(disk)*0x94d049bb133111eb
	x ^= x >> 31
	x *= 0xd6e8feb86659fd93
	x ^= x >> 29
	x *= 0xd6e8feb86659fd93
	return x ^ x>>32
}

// next returns the number of the next write.
func (o *oracle) next() uint64 { return uint64(o.writes + 1) }

// record notes a write as submitted: of data filled with the next number, or of zeroes.
func (o *oracle) record(x dr.Extent, zero bool) {
	stamp := o.next()
	if zero {
		stamp = 0
	}
	o.writes++
	s := o.sectors[x.Disk]
	for i := x.Offset / dr.SectorSize; i < x.End()/dr.SectorSize; i++ {
		o.hash ^= mix(x.Disk, i, s[i]) ^ mix(x.Disk, i, stamp)
		s[i] = stamp
	}
	o.note()
}

// note remembers the present state.
func (o *oracle) note() {
	v, ok := o.states[o.hash]
	if !ok {
		v.first = o.writes
	}
	v.last = o.writes
	o.states[o.hash] = v
}

// stamps returns what the sectors of x are of.
func (o *oracle) stamps(x dr.Extent) []uint64 {
	return slices.Clone(o.sectors[x.Disk][x.Offset/dr.SectorSize : x.End()/dr.SectorSize])
}

// revert notes that a write to x never landed: the sectors are what they were.
func (o *oracle) revert(x dr.Extent, before []uint64) {
	s := o.sectors[x.Disk][x.Offset/dr.SectorSize:]
	for i, stamp := range before {
		at := x.Offset/dr.SectorSize + int64(i)
		o.hash ^= mix(x.Disk, at, s[i]) ^ mix(x.Disk, at, stamp)
		s[i] = stamp
	}
	o.writes++
	o.note()
}

// pattern is what a write of a number puts into sectors.
func pattern(stamp uint64, length int64) []byte {
	b := make([]byte, length)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], stamp)
	}
	return b
}

// judge tells which state the images of all disks are.
func (o *oracle) judge(images map[dr.DiskID][]byte) (interval, error) {
	hash, newest := uint64(0), uint64(0)
	for id, s := range o.sectors {
		image := images[id]
		if len(image) != len(s)*dr.SectorSize {
			return interval{}, fmt.Errorf("disk %d has %d bytes, not %d", id, len(image), len(s)*dr.SectorSize)
		}
		for i := range s {
			b := image[i*dr.SectorSize : (i+1)*dr.SectorSize]
			stamp := binary.LittleEndian.Uint64(b)
			for j := 8; j < len(b); j += 8 {
				if binary.LittleEndian.Uint64(b[j:]) != stamp {
					return interval{}, fmt.Errorf("disk %d, sector %d is of two writes: %d and %d", id, i, stamp, binary.LittleEndian.Uint64(b[j:]))
				}
			}
			hash ^= mix(id, int64(i), stamp)
			newest = max(newest, stamp)
		}
	}
	v, ok := o.states[hash]
	if !ok {
		return v, fmt.Errorf("the disks were never in this state; the newest write in it is %d of %d", newest, o.writes)
	}
	return v, nil
}
