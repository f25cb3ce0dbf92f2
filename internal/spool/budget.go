package spool

import (
	"sync"
	"time"

	"farside/internal/vfs"
)

// Budget is the room that spools share: bytes of all of them together, and space
// that must stay free on their disk. Each may go over it by the frame that it is at. The zero value
// has no bounds. It is safe for concurrent use.
type Budget struct {
	mu struct {
		sync.Mutex
		total  int64
		floor  int64
		spools map[*Spool]struct{}
	}
}

// Bound is what an Append waits for.
type Bound string

// The bounds.
const (
	NoBound    Bound = ""
	OwnLimit   Bound = "limit" // the spool's own
	TotalLimit Bound = "total" // of all spools
	DiskFloor  Bound = "disk"  // too little is free
)

// budgetPoll is how often an Append looks whether a shared bound has gone.
const budgetPoll = 250 * time.Millisecond

// SetTotal bounds the bytes of all spools; 0 means no bound. A spool that
// holds nothing that the far side lacks takes a frame nevertheless, lest one machine stops all others.
func (b *Budget) SetTotal(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.total = n
}

// SetFloor says how many bytes must stay free on the disk; 0 means none.
func (b *Budget) SetFloor(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.floor = n
}

// Total returns the bound of all spools together.
func (b *Budget) Total() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.total
}

func (b *Budget) add(s *Spool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.spools == nil {
		b.mu.spools = map[*Spool]struct{}{}
	}
	b.mu.spools[s] = struct{}{}
}

func (b *Budget) remove(s *Spool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.mu.spools, s)
}

// allows reports what keeps s from taking n more bytes. s must not be locked.
func (b *Budget) allows(s *Spool, n int64, empty bool) Bound {
	if b == nil {
		return NoBound
	}
	b.mu.Lock()
	total, floor := b.mu.total, b.mu.floor
	all := make([]*Spool, 0, len(b.mu.spools))
	for x := range b.mu.spools {
		all = append(all, x)
	}
	b.mu.Unlock()
	if !enough(s, n, floor) {
		return DiskFloor
	}
	if total == 0 || empty {
		return NoBound
	}
	for _, x := range all {
		n += x.Bytes()
	}
	if n > total {
		return TotalLimit
	}
	return NoBound
}

// enough reports whether floor bytes are free after n more.
func enough(s *Spool, n, floor int64) bool {
	if floor == 0 {
		return true
	}
	total, free := vfs.Space(s.fs, s.dir)
	return total == 0 || free-n >= floor
}

// allowsFold reports whether there is space for a fold of a run of n bytes. It
// brings room, so it may use half of what is to stay free.
func (b *Budget) allowsFold(s *Spool, n int64) bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	floor := b.mu.floor
	b.mu.Unlock()
	return enough(s, n, floor/2)
}
