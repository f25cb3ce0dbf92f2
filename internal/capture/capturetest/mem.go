// Package capturetest tests drivers of package capture and stands in for them.
//
// Main types: Kernel, a machine whose disks are in memory and whose writes reach
// them when the test says so; Mem and PinnedMem, the Sources that capture it;
// Workload, a seeded mix of changes for a Kernel; Replicator, the smallest program
// that follows the rules of package capture and ends with an exact copy; Run, the
// conformance suite that every driver passes, and RunSurvivor, the one of those
// that outlive their process.
//
// It is for tests only and holds whole disks in memory. Kernel and Mem are safe for
// concurrent use; Workload and Replicator belong to one goroutine.
package capturetest

import (
	"context"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Mem is a capture.Source of a Kernel. The Kernel is embedded, so that a test
// writes to the disks by the Mem.
type Mem struct {
	*Kernel
	capture *memCapture

	// What a process knows, guarded by Kernel.mu.
	pos     uint64 // of the next event
	started bool   // Next was called
	hold    bool
	closed  bool
}

var _ capture.Source = (*Mem)(nil)

// NewMem makes a Kernel with the given disks and captures all of them, in data
// mode with a ring of 16 MiB. It doesn't outlive its process.
func NewMem(disks ...capture.Disk) *Mem {
	k := NewKernel(disks...)
	return k.open(newMemCapture(disks))
}

// open makes a process that has c open.
func (k *Kernel) open(c *memCapture) *Mem {
	m := &Mem{Kernel: k, capture: c, pos: c.floor}
	c.owner = m
	k.mu.capture = c
	return m
}

// usableLocked fails after the end of the process, and of the capture.
func (m *Mem) usableLocked(what string) error {
	if m.closed || m.capture.removed {
		return fmt.Errorf("%s: capture closed: %w", what, dr.ErrUnavailable)
	}
	return nil
}

// Overflow forces the Mem into bitmap mode, as a full ring does. It does nothing
// in bitmap mode.
func (m *Mem) Overflow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.capture.state%2 == 0 && m.usableLocked("overflow") == nil {
		m.overflowLocked(m.capture)
	}
}

// Disks implements capture.Source.
func (m *Mem) Disks() []capture.Disk { return m.capture.disks }

// Next implements capture.Source.
func (m *Mem) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for n, size := 0, 0; ; {
		e, changed, err := m.peek()
		if err != nil {
			return n, err
		}
		if e != nil && size < capture.MaxBatch {
			err := fn(*e)
			m.step()
			if n, size = n+1, size+len(e.Data); err != nil {
				return n, err
			}
			continue
		}
		if n > 0 {
			return n, nil
		}
		select {
		case <-changed:
		case <-timeout.C:
			return 0, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// peek returns the next event, nil if there is none before changed is closed.
func (m *Mem) peek() (e *capture.Event, changed chan struct{}, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.started = true
	if err := m.usableLocked("next event"); err != nil {
		return nil, nil, err
	}
	if c := m.capture; m.pos < c.tail() {
		e := c.events[m.pos-c.floor]
		return &e, nil, nil
	}
	return nil, m.mu.changed, nil
}

// step goes behind the event that was handed over.
func (m *Mem) step() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pos++
	if !m.hold && !m.closed {
		m.releaseLocked(m.pos)
	}
}

func (m *Mem) releaseLocked(pos uint64) {
	if pos <= m.pos {
		m.capture.release(pos)
	}
}

// Mark implements capture.DirtySet.
func (m *Mem) Mark(x dr.Extent) error { return m.capture.bitmap.Mark(x) }

// TakeDirty implements capture.DirtySet.
func (m *Mem) TakeDirty(limit int64) ([]dr.Extent, error) { return m.takeDirty(limit, nil) }

func (m *Mem) takeDirty(limit int64, note func([]dr.Extent)) ([]dr.Extent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked("take dirty ranges"); err != nil {
		return nil, err
	}
	if m.capture.lostFrom(max(m.pos, m.capture.floor)) {
		return nil, nil
	}
	return m.capture.bitmap.TakeNoted(limit, note), nil
}

// Dirty implements capture.DirtySet.
func (m *Mem) Dirty() (int64, error) { return m.capture.bitmap.Dirty(), nil }

// ReadAt implements capture.Source: it reads what has landed.
func (m *Mem) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.capture.has(disk) {
		return 0, fmt.Errorf("read disk %d: %w", disk, dr.ErrNotFound)
	}
	i := m.index(disk)
	if off < 0 || off > m.disks[i].Size-int64(len(p)) {
		return 0, fmt.Errorf("read disk %d at %d: %w", disk, off, dr.ErrInvalid)
	}
	return copy(p, m.mu.image[i][off:]), nil
}

// Resume implements capture.Stream.
func (m *Mem) Resume(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.capture
	if err := m.usableLocked("resume"); err != nil {
		return err
	}
	if c.state%2 == 1 {
		c.state++
	}
	for c.state%2 == 0 && !m.settledLocked(c) {
		changed := m.mu.changed
		m.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		m.mu.Lock()
		if err := m.usableLocked("resume"); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// Tail implements capture.Stream.
func (m *Mem) Tail() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.capture.tail()
}

// Consumed implements capture.Stream.
func (m *Mem) Consumed() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pos
}

// Stats implements capture.Source.
func (m *Mem) Stats() capture.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.capture
	s := c.stats
	s.Mode = capture.ModeData
	if c.state%2 == 1 {
		s.Mode = capture.ModeBitmap
	}
	s.Settled = s.Mode == capture.ModeData && m.settledLocked(c)
	s.RingUsed, s.RingSize = c.used, m.mu.ring
	s.Disks = append([]capture.DiskStats(nil), c.seen...)
	for i := range s.Disks {
		s.Disks[i].KernelBytes = s.Disks[i].SeenBytes
	}
	return s
}

// Close implements capture.Source.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.endLocked()
	return nil
}

// endLocked is the end of the process, or of its interest.
func (m *Mem) endLocked() {
	if m.closed {
		return
	}
	m.closed = true
	if m.capture.owner == m {
		m.capture.owner = nil
		if !m.capture.pinned {
			m.removeLocked(m.capture)
		}
	}
	m.wakeLocked()
}
