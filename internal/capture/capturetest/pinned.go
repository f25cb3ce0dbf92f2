package capturetest

import (
	"fmt"
	"slices"

	"farside/internal/capture"
	"farside/internal/dr"
)

// MemOptions say how a process opens the capture of a Kernel.
type MemOptions struct {
	Disks  []dr.DiskID // empty: all of the Kernel
	Hold   bool        // events stay until Release
	Memory int         // bytes of Survivor.Memory
}

// PinnedMem is a Mem that outlives its process.
type PinnedMem struct {
	*Mem
	memory    []byte
	adopted   bool
	inherited []dr.DiskID
}

var _ capture.Survivor = (*PinnedMem)(nil)

// Open is the start of a process that captures k: it adopts the capture of an
// earlier one if the disks are the same, and replaces it otherwise. The error
// wraps dr.ErrExists while another process has a capture open.
func (k *Kernel) Open(o MemOptions) (*PinnedMem, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	old := k.mu.capture
	if old != nil && old.owner != nil {
		return nil, fmt.Errorf("open capture: another process has it: %w", dr.ErrExists)
	}
	if len(k.mu.memory) != o.Memory {
		k.mu.memory = nil
		if o.Memory > 0 {
			k.mu.memory = make([]byte, o.Memory)
		}
	}
	p := &PinnedMem{memory: k.mu.memory}
	disks := k.chosen(o.Disks)
	switch {
	case old == nil:
		p.Mem = k.open(newMemCapture(disks))
	case slices.Equal(old.disks, disks):
		p.adopted, p.Mem = true, k.open(old)
		for _, d := range disks {
			p.inherited = append(p.inherited, d.ID)
		}
	default:
		k.removeLocked(old)
		p.Mem = k.open(newMemCapture(disks))
		p.inherited = p.capture.inherit(old, k.mu.inflight)
	}
	p.hold, p.capture.pinned = o.Hold, true
	return p, nil
}

func (k *Kernel) chosen(ids []dr.DiskID) (disks []capture.Disk) {
	if len(ids) == 0 {
		return k.disks
	}
	for _, id := range ids {
		disks = append(disks, k.disks[k.index(id)])
	}
	return disks
}

// Kill ends the process as kill -9 does: p is of no use any more, and what it
// opened stays, unless Forget was called.
func (p *PinnedMem) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked()
}

// Memory implements capture.Survivor.
func (p *PinnedMem) Memory() []byte { return p.memory }

// Adopted implements capture.Survivor.
func (p *PinnedMem) Adopted() bool { return p.adopted }

// Inherited implements capture.Survivor.
func (p *PinnedMem) Inherited() []dr.DiskID { return slices.Clone(p.inherited) }

// Position implements capture.Survivor.
func (p *PinnedMem) Position() uint64 { return p.Consumed() }

// Rewind implements capture.Survivor.
func (p *PinnedMem) Rewind(pos uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.started:
		return fmt.Errorf("rewind to %d: after the first event: %w", pos, dr.ErrInvalid)
	case pos < p.capture.floor:
		return fmt.Errorf("rewind to %d: released up to %d: %w", pos, p.capture.floor, dr.ErrNotFound)
	case pos > p.capture.tail():
		return fmt.Errorf("rewind to %d: behind the end at %d: %w", pos, p.capture.tail(), dr.ErrInvalid)
	}
	p.pos = pos
	return nil
}

// Release implements capture.Survivor.
func (p *PinnedMem) Release(pos uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.usableLocked("release") == nil {
		p.releaseLocked(pos)
	}
}

// TakeDirtyNoted implements capture.Survivor.
func (p *PinnedMem) TakeDirtyNoted(limit int64, note func([]dr.Extent)) ([]dr.Extent, error) {
	return p.takeDirty(limit, note)
}

// Forget implements capture.Survivor.
func (p *PinnedMem) Forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.capture.pinned = false
	p.mu.memory = nil
}
