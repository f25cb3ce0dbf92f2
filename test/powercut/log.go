package powercut

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
)

// ErrFull is returned when a log has reached its bound.
var ErrFull = errors.New("the log of the disk is full")

// entry is a change of the disk, or a flush if n is 0.
type entry struct {
	off, n int64
	data   []byte // nil: zeros
}

// Log is what was sent to a disk, in order. It is safe for concurrent use.
type Log struct {
	limit int64 // of bytes of data
	mu    struct {
		sync.Mutex
		entries []entry
		bytes   int64
	}
}

// NewLog returns an empty log that takes at most limit bytes of data.
func NewLog(limit int64) *Log { return &Log{limit: limit} }

// Len returns how many changes and flushes were recorded. What was acknowledged to a peer that
// saw it before this call must be in every legal state at a cut from here on.
func (l *Log) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.mu.entries)
}

// add records a change whose data it keeps, or a flush. It fails with ErrFull.
func (l *Log) add(e entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.bytes+int64(len(e.data)) > l.limit {
		return ErrFull
	}
	l.mu.bytes += int64(len(e.data))
	l.mu.entries = append(l.mu.entries, e)
	return nil
}

// all returns what was recorded so far.
func (l *Log) all() []entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clip(l.mu.entries)
}

// Replay makes states of a disk after a power cut. It belongs to one goroutine.
type Replay struct {
	entries []entry
	stable  *Image // everything before entries[next], which is the first after a flush
	next    int
}

// NewReplay begins with an empty disk and what l holds now.
func NewReplay(l *Log) *Replay { return &Replay{entries: l.all(), stable: NewImage()} }

// Whole returns the disk with all that was recorded.
func (r *Replay) Whole() *Image {
	m := r.stable.Clone()
	for _, e := range r.entries[r.next:] {
		apply(m, e, nil)
	}
	return m
}

// Cut returns a state after a power cut behind the first cut entries, which rng chooses.
// Cuts must not go back. open is how many changes were not covered by a flush.
func (r *Replay) Cut(cut int, rng *rand.Rand) (m *Image, open int) {
	cut = min(cut, len(r.entries))
	for i := cut - 1; i >= r.next; i-- {
		if r.entries[i].n == 0 {
			for _, e := range r.entries[r.next:i] {
				apply(r.stable, e, nil)
			}
			r.next = i + 1
			break
		}
	}
	m = r.stable.Clone()
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[rng.IntN(5)]
	for _, e := range r.entries[r.next:cut] {
		switch {
		case rng.Float64() >= keep:
		case rng.IntN(4) == 0:
			apply(m, e, rng)
		default:
			apply(m, e, nil)
		}
	}
	return m, cut - r.next
}

// superblock is the end of what is never torn: ext4 can't be mounted when its superblock, which is two sectors with a
// checksum, is half old and half new. That is nothing that a role could do anything about.
const superblock = 4096

// apply does a change; with rng only to some of its sectors.
func apply(m *Image, e entry, rng *rand.Rand) {
	if e.off < superblock {
		rng = nil
	}
	step := e.n
	if rng != nil {
		step = sectorSize
	}
	for at := int64(0); at < e.n; at += step {
		n := min(step, e.n-at)
		switch {
		case rng != nil && rng.IntN(2) == 0:
		case e.data == nil:
			m.Zero(e.off+at, n)
		default:
			m.WriteAt(e.data[at:at+n], e.off+at)
		}
	}
}
