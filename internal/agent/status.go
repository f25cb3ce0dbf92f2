package agent

import (
	"maps"
	"slices"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// status is what a replicator says of itself. It is a copy.
type status struct {
	phase               Phase
	why                 Reason
	started             time.Time // of the newest sync
	dirty               int64     // bytes, while syncing
	disks               []diskStatus
	stats               counters
	source              capture.Stats
	fault               error // why a sync makes no progress
	compared, toCompare int64 // bytes, of a comparison that is under way

	hold    error // why there can be no points for now: an absent disk
	noPoint error // why the source does not vouch for a point
	placed  map[[16]byte]dr.Position
}

type diskStatus struct {
	capture.Disk
	DiskCounters
	torn       bool
	fault      error
	faultSince time.Time
}

// torn returns which disks' copies are no states that they were in.
func (s *status) torn() map[dr.DiskID]bool {
	out := make(map[dr.DiskID]bool)
	for _, d := range s.disks {
		out[d.ID] = d.torn
	}
	return out
}

func (r *replicator) status() status {
	s := status{
		phase: r.phase, why: r.why, started: r.sync.started, dirty: r.sync.dirty, stats: r.stats,
		source: r.src.Stats(), fault: r.sync.fault, hold: r.hold, noPoint: r.sync.unverified, placed: maps.Clone(r.tags.placed),
	}
	if c := r.sync.comparing; c != nil {
		s.compared, s.toCompare = c.Progress()
		if s.fault == nil {
			s.fault = c.Fault()
		}
	}
	for _, d := range r.disks {
		s.disks = append(s.disks, diskStatus{d.Disk, d.DiskCounters, d.torn, d.fault, d.faultSince})
	}
	return s
}

// progress returns how far a sync has come: bytes of all disks while they are compared or
// copied as a whole, the rest of what is dirty for another.
func (s *status) progress() (done, total int64) {
	if s.toCompare > 0 {
		return s.compared, s.toCompare
	}
	for _, d := range s.disks {
		done, total = done+d.Done, total+d.Total
	}
	if total == 0 {
		for _, d := range s.disks {
			done += d.Read
		}
		return done, done + s.dirty
	}
	return done, total
}

// notice is one step down or up of a stream.
type notice struct {
	code string
	warn bool
	text string
	at   time.Time
}

// chronicle keeps the newest notices. It is safe for concurrent use.
type chronicle struct {
	mu struct {
		sync.Mutex
		notices []notice
	}
}

const maxNotices = 64

func (c *chronicle) add(n notice) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.mu.notices) >= maxNotices {
		c.mu.notices = append(c.mu.notices[:0], c.mu.notices[1:]...)
	}
	c.mu.notices = append(c.mu.notices, n)
}

// list returns the notices, newest last.
func (c *chronicle) list() []notice {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.mu.notices)
}

// steps returns what is worth a notice between two statuses of a stream.
func steps(a, b *status, now time.Time) []notice {
	var out []notice
	switch {
	case b.stats.syncs != a.stats.syncs:
		out = append(out, notice{string(b.why), b.why != ReasonInitial, "sync began: " + b.why.text(), now})
	case b.stats.overflows != a.stats.overflows && b.phase == Syncing:
		out = append(out, notice{string(ReasonOverflow), false, "capture changed to the bitmap during the sync", now})
	}
	if b.phase == Exact && (a.phase != Exact || b.stats.syncs != a.stats.syncs) {
		out = append(out, notice{"exact", false, "every write is a recovery point", now})
	}
	if b.fault != nil && a.fault == nil {
		out = append(out, notice{"read-failed", true, b.fault.Error(), now})
	}
	if b.noPoint != nil && a.noPoint == nil {
		out = append(out, notice{"no-point", true, b.noPoint.Error(), now})
	}
	if b.phase == Fenced && a.phase != Fenced {
		out = append(out, notice{"fenced", true, "another timeline of this machine is current: stood down", now})
	}
	return out
}
