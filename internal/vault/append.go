package vault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// Append adds a frame that continues Cursor. It is neither durable nor visible
// before Sync. The log keeps the frame until then. Errors wrap those of
// frame.Header.Check, dr.ErrInvalid (a disk or range that the vault doesn't
// have) or dr.ErrCorrupt, and leave the log as it was; any other error makes
// all Appends fail until Resume.
func (l *Log) Append(f *frame.Frame) error {
	l.appending.Lock()
	defer l.appending.Unlock()
	l.mu.Lock()
	head, err := l.mu.head, l.mu.failed
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if err := l.verify(f, head); err != nil {
		return err
	}
	if err := l.roll(f); err != nil {
		return l.fail(err)
	}
	entry, err := l.mu.writer.Append(f)
	if err != nil {
		return l.fail(fmt.Errorf("append frame %d:%d: %w", f.Timeline, f.First, err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.active.FirstTime == 0 {
		l.mu.active.FirstTime = f.FirstTime
	}
	l.mu.active.EndPoint = !f.Open
	l.mu.head = f.End()
	l.mu.pending = append(l.mu.pending, placedFrame{f, l.mu.active.First, entry.Off})
	return nil
}

// verify refuses what may not enter the log.
func (l *Log) verify(f *frame.Frame, head frame.Cursor) error {
	if err := f.Check(head); err != nil {
		return err
	}
	if l.v.opts.TrustChain {
		if err := f.Verify(); err != nil {
			return err
		}
	} else if err := f.VerifyChain(head.Chain); err != nil {
		return err
	}
	m := l.v.manifest.Load()
	for _, x := range f.All() {
		if d, ok := m.disk(x.Disk); !ok || x.End() > d.Size {
			return fmt.Errorf("frame %d:%d changes %v, which is not on a disk of machine %v: %w",
				f.Timeline, f.First, x.Extent, m.Machine, dr.ErrInvalid)
		}
	}
	return nil
}

// fail makes the log refuse everything until Resume.
func (l *Log) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.failed == nil {
		l.mu.failed = fmt.Errorf("log of timeline %d failed: %w", l.timeline, err)
	}
	return l.mu.failed
}

// roll makes sure that there is an active segment for f, sealing one that is
// big or old enough. Whoever calls it holds appending.
func (l *Log) roll(f *frame.Frame) error {
	w, active := l.mu.writer, l.mu.active
	if w != nil && (l.mu.head.Position.Seq < active.First || // empty: nothing to seal
		w.Size() < l.v.opts.SegmentSize && f.LastTime-active.FirstTime < l.v.opts.SegmentSpan) {
		return nil
	}
	var sealed segmentInfo
	if w != nil {
		if err := w.Seal(); err != nil {
			return fmt.Errorf("seal segment: %w", err)
		}
		var err error
		if sealed, err = describe(l.v, w.Reader()); err != nil {
			return fmt.Errorf("seal segment: %w", err)
		}
	}
	next := segmentInfo{Timeline: l.timeline, First: l.mu.head.Position.Seq + 1}
	dir, _ := next.key().file()
	dir = path.Join(l.v.dir, dir)
	if err := errors.Join(l.v.fs.MkdirAll(dir), l.v.fs.SyncDir(path.Dir(dir))); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if err := l.v.removeUnlisted(next.key()); err != nil {
		return err
	}
	// File, then manifest, then frames: a listed segment is always there, and what is not listed is empty.
	fresh, err := segment.Create(l.v.fs, dir, l.mu.head)
	if err != nil {
		return fmt.Errorf("create segment: %w", err)
	}
	err = l.v.update(func(m *manifest) error {
		if w != nil {
			m.addSegment(sealed)
		}
		m.addSegment(next)
		return nil
	})
	if err != nil {
		return errors.Join(err, fresh.Close())
	}
	if w != nil {
		l.v.segs.settle(active.key())
		if err := w.Close(); err != nil {
			return errors.Join(fmt.Errorf("close sealed segment: %w", err), fresh.Close())
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	head := l.mu.head
	l.useWriter(fresh, next)
	l.mu.head = head
	return nil
}

// removeUnlisted removes the file of a segment whose creation failed half-way.
func (v *Vault) removeUnlisted(k segmentKey) error {
	dir, name := k.file()
	err := v.fs.Remove(path.Join(v.dir, dir, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove unlisted segment: %w", err)
	}
	return nil
}

// Sync makes all frames that were appended before it durable, shows them to
// readers, and returns where the durable log ends. One fsync serves all frames
// that wait. After an error only Resume helps.
func (l *Log) Sync() (frame.Cursor, error) {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	pending, head, err := l.syncPending()
	if err != nil || len(pending) == 0 {
		return l.Durable(), err
	}
	if err := l.v.index.apply(l.timeline, pending); err != nil {
		return l.Durable(), l.fail(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.pending = append([]placedFrame(nil), l.mu.pending[len(pending):]...) // a copy, so that the others are freed
	l.mu.durable = head
	return head, nil
}

// syncPending makes what is pending durable and returns it.
func (l *Log) syncPending() ([]placedFrame, frame.Cursor, error) {
	l.appending.Lock()
	defer l.appending.Unlock()
	l.mu.Lock()
	w, pending, head, err := l.mu.writer, l.mu.pending, l.mu.head, l.mu.failed
	l.mu.Unlock()
	if err != nil || len(pending) == 0 {
		return nil, head, err
	}
	if err := w.Sync(); err != nil {
		return nil, head, l.fail(fmt.Errorf("sync segment: %w", err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.safe = w.Size()
	return pending, head, nil
}

// Resume makes a log that failed usable again, by going back to its durable
// end, and returns where the next frame must continue. After a failed fsync
// what the file holds behind that can't be trusted, so the sender sends it
// again. On a log that did not fail it only returns Cursor.
func (l *Log) Resume() (frame.Cursor, error) {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.appending.Lock()
	defer l.appending.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.failed == nil {
		return l.mu.head, nil
	}
	if err := l.v.index.err(); err != nil {
		return l.mu.durable, fmt.Errorf("resume log of timeline %d: the vault must be opened again: %w", l.timeline, err)
	}
	if err := l.healLocked(); err != nil {
		return l.mu.durable, fmt.Errorf("resume log of timeline %d: %w", l.timeline, err)
	}
	l.mu.failed = nil
	return l.mu.head, nil
}

// healLocked cuts the log off at its durable end and opens it again.
func (l *Log) healLocked() error {
	if w := l.mu.writer; w != nil {
		l.v.segs.drop(l.mu.active.key())
		l.mu.writer = nil
		w.Close() // its state is unknown; the file is judged anew below
	}
	l.mu.pending = nil
	all := l.live()
	if len(all) == 0 {
		l.mu.head = l.mu.durable
		return nil
	}
	// A segment that is listed but never became the active one has no frames yet.
	if s := all[len(all)-1]; !s.Sealed && s.key() == l.mu.active.key() {
		if err := l.cutBack(s); err != nil {
			return err
		}
	}
	durable := l.mu.durable.Position
	m := l.v.manifest.Load()
	t, _ := m.timeline(l.timeline)
	if err := l.findStart(m, t); err != nil { // a fold has moved it
		return err
	}
	l.mu.head = l.start
	if err := l.openSegments(); err != nil {
		return err
	}
	if l.mu.head.Position.Seq < durable.Seq {
		return fmt.Errorf("log ends at %v but was durable through %v: %w", l.mu.head.Position, durable, dr.ErrCorrupt)
	}
	// Sealing made more durable than Sync had told.
	if err := l.replay(context.Background(), durable.Seq); err != nil {
		return err
	}
	l.mu.durable = l.mu.head
	return nil
}

// cutBack truncates the active segment to its durable bytes.
func (l *Log) cutBack(s segmentInfo) error {
	dir, name := s.key().file()
	f, err := l.v.fs.OpenFile(path.Join(l.v.dir, dir, name))
	if err != nil {
		return fmt.Errorf("cut segment %s back: %w", name, err)
	}
	err = f.Truncate(l.mu.safe)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cut segment %s back: %w", name, err)
	}
	return nil
}
