package vault

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// foldSegments is how many segments are folded in one step, unless more are
// needed to reach a recovery point.
const foldSegments = 8

// FoldTo moves the horizon forward: segments whose changes are all before a
// time (UTC ns) become part of the base image, as far as that ends at a recovery
// point and no open State and no branch needs what is before. It returns how
// many segments it folded. It first finishes what an earlier FoldTo left when
// it was interrupted. Reading goes on meanwhile.
func (v *Vault) FoldTo(ctx context.Context, time int64) (int, error) {
	v.folding.Lock()
	defer v.folding.Unlock()
	folded := 0
	for {
		if err := v.finishFold(ctx); err != nil {
			return folded, fmt.Errorf("fold: %w", err)
		}
		n, err := v.planFold(time)
		if err != nil {
			return folded, fmt.Errorf("fold: %w", err)
		}
		if n == 0 {
			return folded, nil
		}
		folded += n
	}
}

// planFold moves the horizon in the manifest: from then on nothing before it
// can be opened, and finishFold brings the base there.
func (v *Vault) planFold(time int64) (int, error) {
	// Held through the update, so that no State is opened before the new horizon.
	v.mu.Lock()
	defer v.mu.Unlock()
	m := v.manifest.Load()
	limit := v.foldLimitLocked(m)
	n, last := 0, segmentInfo{}
	for i, s := range m.segments(m.BaseTimeline) {
		if !s.Sealed || s.LastTime >= time || s.Last > limit || n >= foldSegments {
			break
		}
		if s.EndPoint {
			n, last = i+1, s
		}
	}
	if n == 0 {
		return 0, nil
	}
	return n, v.update(func(m *manifest) error {
		m.Horizon, m.HorizonTime, m.HorizonPoint = last.Last, last.LastTime, true
		return nil
	})
}

// foldLimitLocked returns the last position of the base timeline to which the
// horizon may move: it is indexed, and nobody needs what is before.
func (v *Vault) foldLimitLocked(m *manifest) dr.Seq {
	limit := v.mu.logs[m.BaseTimeline].Durable().Position.Seq
	for _, t := range m.Timelines {
		if t.Parent == m.BaseTimeline {
			limit = min(limit, t.Fork)
		}
	}
	for _, pin := range v.mu.pins {
		limit = min(limit, pin)
	}
	return limit
}

// finishFold brings the base to the horizon and removes what it then holds.
// Every step can be repeated.
func (v *Vault) finishFold(ctx context.Context) error {
	m := v.manifest.Load()
	if m.Horizon > m.Base {
		if err := v.foldIntoBase(ctx, m); err != nil {
			return err
		}
		last := m.segments(m.BaseTimeline)
		i := slices.IndexFunc(last, func(s segmentInfo) bool { return s.Last == m.Horizon })
		err := v.update(func(m *manifest) error {
			m.Base, m.BaseTime, m.BaseChain = m.Horizon, m.HorizonTime, last[i].Chain
			return nil
		})
		if err != nil {
			return err
		}
	}
	return v.dropFolded()
}

// folder applies frames to the base images, newest first, each sector once.
type folder struct {
	v       *Vault
	covered map[dr.DiskID]*extent.Set // bytes that hold what they should
	touched map[dr.DiskID]*extent.Set // blocks whose checksums change
}

// foldIntoBase writes the newest content at the horizon of all that changed
// since the base.
func (v *Vault) foldIntoBase(ctx context.Context, m *manifest) error {
	f := folder{v, map[dr.DiskID]*extent.Set{}, map[dr.DiskID]*extent.Set{}}
	for _, d := range m.Disks {
		f.covered[d.ID], f.touched[d.ID] = &extent.Set{}, &extent.Set{}
	}
	all := m.segments(m.BaseTimeline)
	for i := len(all) - 1; i >= 0; i-- {
		if !all[i].Sealed || all[i].Last > m.Horizon || all[i].Last <= m.Base {
			continue
		}
		if err := f.segment(ctx, all[i].key()); err != nil {
			return err
		}
	}
	return f.finish()
}

func (f *folder) segment(ctx context.Context, k segmentKey) error {
	s, err := f.v.segs.acquire(k)
	if err != nil {
		return err
	}
	defer f.v.segs.release(s)
	entries := s.reader.Entries()
	for i := len(entries) - 1; i >= 0; i-- {
		if err := ctx.Err(); err != nil {
			return err
		}
		if entries[i].Kind == frame.TagKind || entries[i].Kind == frame.Heartbeat {
			continue
		}
		fr, err := s.reader.Frame(entries[i].Off)
		if err != nil {
			return s.wrap(entries[i].Off, err)
		}
		if err := f.frame(fr); err != nil {
			return s.wrap(entries[i].Off, err)
		}
	}
	return nil
}

// frame writes those parts of a frame that nothing newer covers.
func (f *folder) frame(fr *frame.Frame) error {
	var payload []byte
	for i := fr.Extents - 1; i >= 0; i-- {
		x := fr.Extent(i)
		covered := f.covered[x.Disk]
		if covered == nil {
			return fmt.Errorf("change of unknown disk %d: %w", x.Disk, dr.ErrCorrupt)
		}
		parts := covered.Subtract(x.Offset, x.End())
		if len(parts) > 0 && x.What == dr.Data && payload == nil {
			var err error
			if payload, err = fr.Payload(nil); err != nil {
				return err
			}
		}
		for _, r := range parts {
			if err := f.write(x, r, payload); err != nil {
				return err
			}
		}
		covered.Add(x.Offset, x.End())
	}
	return nil
}

func (f *folder) write(x frame.Extent, r extent.Range, payload []byte) error {
	img := f.v.image(x.Disk)
	f.touched[x.Disk].Add(r.Start/sumBlock, (r.End+sumBlock-1)/sumBlock)
	var err error
	if x.What == dr.Data {
		from := int64(x.RawOff) + r.Start - x.Offset
		_, err = img.file.WriteAt(payload[from:from+r.Len()], r.Start)
	} else {
		err = vfs.PunchHole(img.file, r.Start, r.Len())
	}
	if err != nil {
		return fmt.Errorf("write image of disk %d at %d: %w", x.Disk, r.Start, err)
	}
	return nil
}

// finish makes images and checksums durable.
func (f *folder) finish() error {
	for disk, blocks := range f.touched {
		if blocks.Len() == 0 {
			continue
		}
		img := f.v.image(disk)
		if err := img.file.Sync(); err != nil {
			return fmt.Errorf("sync image of disk %d: %w", disk, err)
		}
		if err := img.updateSums(blocks); err != nil {
			return err
		}
		if err := img.sums.Sync(); err != nil {
			return fmt.Errorf("sync checksums of disk %d: %w", disk, err)
		}
	}
	return nil
}

// dropFolded removes the keys and files of segments that the base holds. The
// keys go first and durably: once a segment is gone nobody can tell any more
// which keys were its.
func (v *Vault) dropFolded() error {
	m := v.manifest.Load()
	var gone []segmentInfo
	for _, s := range m.segments(m.BaseTimeline) {
		if s.Sealed && s.Last <= m.Base {
			gone = append(gone, s)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	v.folds.Add(1)
	for _, s := range gone {
		err := v.index.remove(s.Timeline, s.First, s.Last, func(fn func(placedFrame) error) error {
			return v.segs.each(s.key(), fn)
		})
		if err != nil {
			return err
		}
	}
	if err := v.index.flush(); err != nil {
		return err
	}
	err := v.update(func(m *manifest) error {
		m.Segments = slices.DeleteFunc(m.Segments, func(s segmentInfo) bool {
			return s.Timeline == m.BaseTimeline && s.Sealed && s.Last <= m.Base
		})
		return nil
	})
	if err != nil {
		return err
	}
	return v.removeSegments(gone)
}

// removeSegments removes the files of segments that are not listed any more.
func (v *Vault) removeSegments(gone []segmentInfo) error {
	var errs []error
	for _, s := range gone {
		v.segs.drop(s.key())
		dir, name := s.key().file()
		errs = append(errs, v.fs.Remove(path.Join(v.dir, dir, name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove folded segments: %w", err)
	}
	return nil
}
