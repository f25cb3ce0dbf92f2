//go:build linux && amd64

package ebpf

import (
	"encoding/json"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"farside/internal/capture"
	"farside/internal/dr"
)

// layoutVersion is the version of everything that is pinned: notes, and the maps of
// bpf/state.h and what they hold. Whatever changes any of it, or what a
// process must know to go on with it, changes the number.
const layoutVersion = 1

// notesMagic begins notes ("fsdnotes").
const notesMagic = 0x7365746f6e647366

// maxLosts is how many Lost events are kept in the stream at most until they are released.
const maxLosts = 1024

// notes is what a process must leave to the next one besides the programs' own
// maps. It lies in memory that is pinned if the capture is. Members that change
// after the start are accessed atomically.
type notes struct {
	Magic, Version uint64

	// Floor is the position of the first event that was not released: bytes of
	// the ring plus Lost events.
	Floor uint64
	// Noticed counts the overflows whose places in the ring are in Lost: number n,
	// from 1 on, at Lost[n%maxLosts].
	Noticed uint64
	Opened  uint64 // when the programs were attached, ns of the monotonic clock
	Calm    uint64 // 1: what was in flight then has landed
	Given   uint64 // completions that Resume gave up on
	Gone    uint64 // 1: it is certain that changes were missed
	Base    [MaxDisks]baseline
	Lost    [maxLosts]uint64

	MetaLength uint64
	Meta       [maxMeta]byte // JSON of meta
}

// baseline is where the counters of a disk stood at the start: what the kernel counted, and
// the completions that were not known to the programs.
type baseline struct {
	Bytes, Writes, Foreign uint64
}

const (
	maxMeta   = 8192
	notesSize = (int(unsafe.Sizeof(notes{})) + pageSize - 1) &^ (pageSize - 1)
)

// meta says what is captured and how: what must be the same for an adoption.
type meta struct {
	Ring       int64      `json:"ring"`
	Block      int64      `json:"block"`
	BitmapOnly bool       `json:"bitmapOnly,omitempty"`
	Disks      []metaDisk `json:"disks"`
}

// metaDisk identifies a disk within this boot. A disk that is removed and comes back,
// and a loop device that gets another file, have another Seq.
type metaDisk struct {
	ID    uint32 `json:"id"`
	Dev   uint32 `json:"dev"`   // of the whole disk
	Start uint64 `json:"start"` // sector
	Size  int64  `json:"size"`  // bytes
	Seq   uint64 `json:"seq"`
}

// becomes reports whether is may be d at a later time: the same disk, or the same after it
// has grown. Of the tail that it grew by nothing is known.
func (d metaDisk) becomes(is metaDisk) (tail dr.Extent, ok bool) {
	tail = dr.Extent{Disk: dr.DiskID(is.ID), Offset: d.Size, Length: is.Size - d.Size}
	d.Size = is.Size
	return tail, d == is && tail.Length >= 0
}

func metaOf(devs []*device, o Options) meta {
	m := meta{Ring: o.RingBytes, Block: o.BlockSize, BitmapOnly: o.BitmapOnly}
	for _, d := range devs {
		m.Disks = append(m.Disks, metaDisk{uint32(d.disk.ID), d.dev, d.start, d.disk.Size, d.seq})
	}
	return m
}

func (m meta) equal(o meta) bool {
	return m.Ring == o.Ring && m.Block == o.Block && m.BitmapOnly == o.BitmapOnly && slices.Equal(m.Disks, o.Disks)
}

// disks returns them as the ring's records number them.
func (m meta) disks() (disks []capture.Disk) {
	for _, d := range m.Disks {
		disks = append(disks, capture.Disk{ID: dr.DiskID(d.ID), Size: d.Size})
	}
	return disks
}

// notesIn returns the notes in mem, which has notesSize bytes.
func notesIn(mem []byte) *notes { return (*notes)(unsafe.Pointer(unsafe.SliceData(mem[:notesSize]))) }

// begin writes the notes of a new capture.
func (n *notes) begin(m meta) error {
	text, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("describe capture: %w", err)
	}
	if len(text) > maxMeta {
		return fmt.Errorf("describe capture: %d bytes: %w", len(text), dr.ErrInvalid)
	}
	*n = notes{Magic: notesMagic, Version: layoutVersion, MetaLength: uint64(len(text))}
	copy(n.Meta[:], text)
	return nil
}

// meta reads what an earlier process wrote.
func (n *notes) meta() (meta, error) {
	if n.Magic != notesMagic || n.Version != layoutVersion {
		return meta{}, fmt.Errorf("pinned capture of layout %d, not %d: %w", n.Version, layoutVersion, dr.ErrUnsupported)
	}
	return parseMeta(n.Meta[:min(n.MetaLength, maxMeta)])
}

// parseMeta reads and checks a description.
func parseMeta(text []byte) (m meta, err error) {
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("description of pinned capture: %w: %w", err, dr.ErrCorrupt)
	}
	var total int64
	for _, d := range m.Disks {
		if d.Size <= 0 || d.Size > 1<<60 || d.Size%dr.SectorSize != 0 || d.Start > 1<<60 {
			return m, fmt.Errorf("description of pinned capture: disk of %d bytes: %w", d.Size, dr.ErrCorrupt)
		}
		total += d.Size / MaxDisks
	}
	if len(m.Disks) == 0 || len(m.Disks) > MaxDisks || m.Ring == 0 || m.Block == 0 || total/m.Block > 1<<40 {
		return m, fmt.Errorf("description of pinned capture: %d disks: %w", len(m.Disks), dr.ErrCorrupt)
	}
	if _, err := (Options{RingBytes: m.Ring, BlockSize: m.Block}).withDefaults(0, 0); err != nil {
		return m, fmt.Errorf("description of pinned capture: %w: %w", err, dr.ErrCorrupt)
	}
	return m, nil
}

// place returns where in the ring overflow number k lies.
func (n *notes) place(k uint64) uint64 { return atomic.LoadUint64(&n.Lost[k%maxLosts]) }

// split returns the place in the ring and the number of Lost events before a position
// that is not released.
func (n *notes) split(pos uint64) (place, losts uint64) {
	noticed := atomic.LoadUint64(&n.Noticed)
	k := noticed
	for ; k > 0 && k+maxLosts > noticed; k-- {
		if n.place(k)+k <= pos {
			break
		}
	}
	return pos - k, k
}

// position returns the position of the event at a place of the ring that is not released.
func (n *notes) position(place uint64) uint64 {
	noticed := atomic.LoadUint64(&n.Noticed)
	k := noticed
	for ; k > 0 && k+maxLosts > noticed; k-- {
		if n.place(k) <= place {
			break
		}
	}
	return place + k
}
