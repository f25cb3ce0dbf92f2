//go:build linux && amd64

package ebpf

import (
	"fmt"
	"slices"
	"sync/atomic"

	"farside/internal/capture"
	"farside/internal/dr"
)

// survivor is a source that is pinned.
type survivor struct {
	*source
}

var _ capture.Survivor = survivor{}

// pinned is what a source has if it is a survivor.
type pinned struct {
	dir       *pinDir
	memory    []byte
	adopted   bool
	inherited []dr.DiskID
	forget    atomic.Bool
	cleared   error // of the removal of the pins
}

// Memory implements capture.Survivor.
func (s survivor) Memory() []byte { return s.pins.memory }

// Adopted implements capture.Survivor.
func (s survivor) Adopted() bool { return s.pins.adopted }

// Inherited implements capture.Survivor.
func (s survivor) Inherited() []dr.DiskID { return slices.Clone(s.pins.inherited) }

// Position implements capture.Survivor.
func (s survivor) Position() uint64 { return s.Consumed() }

// Forget implements capture.Survivor.
func (s survivor) Forget() {
	if s.enter("forget") != nil {
		return
	}
	defer s.leave()
	if s.pins.forget.Swap(true) {
		return
	}
	s.pins.cleared = s.pins.dir.clear() // Close reports it
}

// Rewind implements capture.Survivor.
func (s survivor) Rewind(pos uint64) error {
	if err := s.enter("rewind"); err != nil {
		return err
	}
	defer s.leave()
	s.lost.Lock()
	defer s.lost.Unlock()
	s.noticeLocked()
	floor := atomic.LoadUint64(&s.notes().Floor)
	if s.started.Load() {
		return fmt.Errorf("rewind to %d: after the first event: %w", pos, dr.ErrInvalid)
	}
	if pos < floor {
		return fmt.Errorf("rewind to %d: released up to %d: %w", pos, floor, dr.ErrNotFound)
	}
	from, _ := s.notes().split(floor)
	place, losts := s.notes().split(pos)
	if !s.prog.ring.begins(from, place) {
		return fmt.Errorf("rewind to %d: no event begins there: %w", pos, dr.ErrInvalid)
	}
	return s.skipTo(from, place, losts)
}

// skipTo goes over the records from one place to another, for what they say of writes
// that failed.
func (s survivor) skipTo(from, place, losts uint64) error {
	s.soft.list = nil
	r := s.prog.ring
	for r.pos = from; r.pos < place; {
		at := r.pos
		rec := r.next()
		if rec == nil {
			break
		}
		switch e, err := parseRecord(rec, s.disks); {
		case err != nil:
			return err
		case e.Kind == softFailure:
			s.soft.add(softWrite{e.Extent, monotonic() + uint64(softAge), s.notes().position(at)})
		case e.Kind == capture.Change:
			s.soft.cover(e.Extent)
		}
	}
	s.standAt(place, losts)
	return nil
}

// Release implements capture.Survivor.
func (s survivor) Release(pos uint64) {
	if s.enter("release") != nil {
		return
	}
	defer s.leave()
	s.release(pos)
}

// TakeDirtyNoted implements capture.Survivor.
func (s survivor) TakeDirtyNoted(limit int64, note func([]dr.Extent)) ([]dr.Extent, error) {
	return s.takeDirty(limit, note)
}

// standAt makes the record at place of the ring the next event, behind a number of Lost events.
func (s *source) standAt(place, losts uint64) {
	s.prog.ring.pos = place
	s.consumed.Store(place)
	s.emitted.Store(losts)
}

func (s *source) notes() *notes { return s.prog.notes }

// release lets go of the events before pos. While the programs are in bitmap mode, the
// Lost that says so stays: nothing is behind it.
func (s *source) release(pos uint64) {
	s.lost.Lock()
	defer s.lost.Unlock()
	n := s.notes()
	if n.Noticed > 0 && overflows(atomic.LoadUint32(s.state)) == n.Noticed && atomic.LoadUint32(s.state)%2 == 1 {
		pos = min(pos, n.place(n.Noticed)+n.Noticed-1)
	}
	if pos = s.soft.hold(pos); pos <= n.Floor || pos > s.Consumed() {
		return
	}
	// In this order: what the kernel was told is free may be overwritten.
	atomic.StoreUint64(&n.Floor, pos)
	place, _ := n.split(pos)
	s.prog.ring.release(place)
}
