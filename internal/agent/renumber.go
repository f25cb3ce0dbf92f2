package agent

import (
	"context"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// renumbered is some of the disks of a Source under other ids. The Source stays
// open when it is closed.
type renumbered struct {
	capture.Source
	outer map[dr.DiskID]dr.DiskID // by id in the Source
	inner map[dr.DiskID]dr.DiskID // by id as seen from outside
	disks []capture.Disk
}

// renumber gives the disks of src that are keys of names the ids that are its
// values, and hides the others.
func renumber(src capture.Source, names map[dr.DiskID]dr.DiskID) capture.Source {
	r := &renumbered{Source: src, outer: names, inner: make(map[dr.DiskID]dr.DiskID)}
	for _, d := range src.Disks() {
		if id, ok := names[d.ID]; ok {
			r.inner[id] = d.ID
			d.ID = id
			r.disks = append(r.disks, d)
		}
	}
	return r
}

// Disks implements capture.Source.
func (r *renumbered) Disks() []capture.Disk { return r.disks }

// Next implements capture.Stream.
func (r *renumbered) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	return r.Source.Next(ctx, wait, func(e capture.Event) error {
		if e.Kind == capture.Lost {
			return fn(e)
		}
		id, ok := r.outer[e.Extent.Disk]
		if !ok {
			return nil
		}
		e.Extent.Disk = id
		return fn(e)
	})
}

// Mark implements capture.DirtySet.
func (r *renumbered) Mark(x dr.Extent) error {
	id, ok := r.inner[x.Disk]
	if !ok {
		return fmt.Errorf("mark %v: disk: %w", x, dr.ErrNotFound)
	}
	x.Disk = id
	return r.Source.Mark(x)
}

// TakeDirty implements capture.DirtySet. What is dirty of hidden disks is
// dropped on the way, so there may be more when nothing is returned.
func (r *renumbered) TakeDirty(limit int64) ([]dr.Extent, error) {
	taken, err := r.Source.TakeDirty(limit)
	out := taken[:0]
	for _, x := range taken {
		if id, ok := r.outer[x.Disk]; ok {
			x.Disk = id
			out = append(out, x)
		}
	}
	return out, err
}

// ReadAt implements capture.Source.
func (r *renumbered) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	id, ok := r.inner[disk]
	if !ok {
		return 0, fmt.Errorf("read disk %d: %w", disk, dr.ErrNotFound)
	}
	return r.Source.ReadAt(p, id, off)
}

// Stats implements capture.Source.
func (r *renumbered) Stats() capture.Stats {
	s := r.Source.Stats()
	var disks []capture.DiskStats
	for _, d := range s.Disks {
		if id, ok := r.outer[d.ID]; ok {
			d.ID = id
			disks = append(disks, d)
		}
	}
	s.Disks = disks
	return s
}

// Close implements capture.Source.
func (r *renumbered) Close() error { return nil }
