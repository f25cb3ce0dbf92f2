package capturetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Replicator keeps a copy of a Source's disks by the rules of package capture:
// the reference for the agent, without frames, links and bounds. In an exact span
// the copy is, after each event, a state that the disks could have been left in.
type Replicator struct {
	// During, if set, is called now and then while Close waits.
	During func()
	// OnExact, if set, is called after each change that was applied in an exact span.
	OnExact func(capture.Event) error

	src     capture.Source
	replica map[dr.DiskID][]byte
	written map[dr.DiskID][]byte // 1 for each sector captured since data mode began, while open
	open    bool
	losts   int

	forgetWritten bool // a mistake, for negative controls
	dropEvery     int  // another one: leave out every n-th change
	applied       int
}

// NewReplicator makes a Replicator with empty copies; its stream is open.
func NewReplicator(src capture.Source) *Replicator {
	r := &Replicator{src: src, open: true, replica: make(map[dr.DiskID][]byte)}
	for _, d := range src.Disks() {
		r.replica[d.ID] = make([]byte, d.Size)
	}
	r.clearWritten()
	return r
}

func (r *Replicator) clearWritten() {
	r.written = make(map[dr.DiskID][]byte)
	for _, d := range r.src.Disks() {
		r.written[d.ID] = make([]byte, d.Size/dr.SectorSize)
	}
}

// MarkAll begins an initial replication.
func (r *Replicator) MarkAll() error {
	for _, d := range r.src.Disks() {
		if err := r.MarkDisk(d.ID); err != nil {
			return err
		}
	}
	return nil
}

// MarkDisk begins the initial replication of a disk.
func (r *Replicator) MarkDisk(id dr.DiskID) error {
	return r.src.Mark(dr.Extent{Disk: id, Length: int64(len(r.replica[id]))})
}

// Adopt goes on with src, which goes on with what the last Source left; copies of new
// disks are empty. What was taken as dirty has been applied.
func (r *Replicator) Adopt(src capture.Source) {
	r.src = src
	for _, d := range src.Disks() {
		if r.replica[d.ID] == nil {
			r.replica[d.ID] = make([]byte, d.Size)
		}
	}
	if r.open {
		src.Overflow() // what was captured may be on its way to the disk
	}
	r.clearWritten()
}

// MustSync says that changes may be missing: the copy is exact after the next Close.
func (r *Replicator) MustSync() { r.open = true }

// Exact reports whether the copy stands at an exact position.
func (r *Replicator) Exact() bool { return !r.open }

// Losts returns how many Lost events came.
func (r *Replicator) Losts() int { return r.losts }

// Replica returns the copy of a disk; it is not a copy of it.
func (r *Replicator) Replica(disk dr.DiskID) []byte { return r.replica[disk] }

// Events applies what the Source has, waiting at most wait for the first event.
func (r *Replicator) Events(ctx context.Context, wait time.Duration) (int, error) {
	return r.src.Next(ctx, wait, r.apply)
}

func (r *Replicator) apply(e capture.Event) error {
	switch e.Kind {
	case capture.Lost:
		r.losts++
		r.open = true
		r.clearWritten()
		return nil
	case capture.Flush:
		return nil
	case capture.Change:
	default:
		return fmt.Errorf("event of kind %v", e.Kind)
	}
	x := e.Extent
	image, ok := r.replica[x.Disk]
	if !ok || x.Length <= 0 || x.Offset < 0 || x.End() > int64(len(image)) || x.Offset%dr.SectorSize != 0 || x.Length%dr.SectorSize != 0 {
		return fmt.Errorf("change of %v: no such extent", x)
	}
	if e.What == dr.Data && int64(len(e.Data)) != x.Length || e.What != dr.Data && e.Data != nil || len(e.Data) > capture.MaxEventData {
		return fmt.Errorf("change of %v: %v of %d bytes", x, e.What, len(e.Data))
	}
	r.applied++
	if r.dropEvery == 0 || r.applied%r.dropEvery != 0 {
		put(image, e)
	}
	if !r.open {
		if r.OnExact != nil {
			return r.OnExact(e)
		}
		return nil
	}
	fill := r.written[x.Disk][x.Offset/dr.SectorSize : x.End()/dr.SectorSize]
	fill[0] = 1
	for n := 1; n < len(fill); n *= 2 {
		copy(fill[n:], fill[:n])
	}
	return nil
}

// put does to image what e says.
func put(image []byte, e capture.Event) {
	dst := image[e.Extent.Offset:e.Extent.End()]
	if e.What == dr.Data {
		copy(dst, e.Data)
	} else {
		clear(dst)
	}
}

// Bulk reads at most limit dirty bytes into the copy and returns how many
// it took. The copy is no exact position from here to the next Close.
func (r *Replicator) Bulk(limit int64) (int64, error) {
	xs, err := r.src.TakeDirty(limit)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, x := range xs {
		r.open = true
		buf := make([]byte, x.Length)
		if _, err := r.src.ReadAt(buf, x.Disk, x.Offset); err != nil {
			return sum, err
		}
		r.putBulk(x, buf)
		sum += x.Length
	}
	return sum, nil
}

// putBulk copies what was read of x, except sectors that were captured.
func (r *Replicator) putBulk(x dr.Extent, buf []byte) {
	image := r.replica[x.Disk][x.Offset:x.End()]
	written := r.written[x.Disk][x.Offset/dr.SectorSize : x.End()/dr.SectorSize]
	if r.forgetWritten {
		copy(image, buf)
		return
	}
	for at := 0; at < len(written); {
		n := bytes.IndexByte(written[at:], 1)
		if n < 0 {
			n = len(written) - at
		}
		copy(image[at*dr.SectorSize:(at+n)*dr.SectorSize], buf[at*dr.SectorSize:])
		for at += n; at < len(written) && written[at] == 1; at++ {
		}
	}
}

// Close makes the copy exact: resume, drain, and consume the stream up to its tail of
// that moment.
func (r *Replicator) Close(ctx context.Context) error {
	for ctx.Err() == nil {
		losts := r.losts
		if err := r.resume(ctx); err != nil {
			return err
		}
		for {
			n, err := r.Bulk(8 << 20)
			if err != nil {
				return err
			}
			if _, err := r.Events(ctx, 0); err != nil {
				return err
			}
			if n == 0 {
				break
			}
		}
		for t := r.src.Tail(); r.src.Consumed() < t; {
			if _, err := r.Events(ctx, time.Millisecond); err != nil {
				return err
			}
		}
		dirty, err := r.src.Dirty()
		if err != nil {
			return err
		}
		if dirty == 0 && r.losts == losts {
			r.open = false
			r.clearWritten()
			return nil
		}
	}
	return ctx.Err()
}

// resume calls the Source's Resume and goes on consuming while it waits.
func (r *Replicator) resume(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- r.src.Resume(ctx) }()
	for {
		_, err := r.Events(ctx, time.Millisecond)
		if err != nil {
			cancel()
			return errors.Join(err, <-done)
		}
		if r.During != nil {
			r.During()
		}
		select {
		case err := <-done:
			cancel()
			return err
		default:
		}
	}
}

// Compare says where the copy differs from want, which holds a disk's bytes.
func (r *Replicator) Compare(disk dr.DiskID, want []byte) error {
	got := r.replica[disk]
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("disk %d: copy of %d bytes, want %d", disk, len(got), len(want))
	}
	first, sectors := int64(-1), 0
	for off := 0; off < len(got); off += dr.SectorSize {
		if !bytes.Equal(got[off:off+dr.SectorSize], want[off:off+dr.SectorSize]) {
			sectors++
			if first < 0 {
				first = int64(off)
			}
		}
	}
	return fmt.Errorf("disk %d: copy differs in %d sectors, first at %d", disk, sectors, first)
}

// CompareDisks reads every disk of the Source and compares; nothing may be
// writing.
func (r *Replicator) CompareDisks() error {
	for _, d := range r.src.Disks() {
		want := make([]byte, d.Size)
		if err := ReadFull(r.src, want, d.ID, 0); err != nil {
			return err
		}
		if err := r.Compare(d.ID, want); err != nil {
			return err
		}
	}
	return nil
}

// ReadFull fills p from a disk of src, in steps.
func ReadFull(src capture.Source, p []byte, disk dr.DiskID, off int64) error {
	for len(p) > 0 {
		n := min(len(p), 4<<20)
		if _, err := src.ReadAt(p[:n], disk, off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
