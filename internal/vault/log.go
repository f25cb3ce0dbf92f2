package vault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// replayBatch is about how many bytes of frames are indexed at once when a log
// is opened.
const replayBatch = 16 << 20

// Log is the append-only run of segments of one timeline. Append takes frames,
// Sync makes them durable and readable. It is safe for concurrent use; Sync may
// run while frames are appended.
type Log struct {
	v        *Vault
	timeline dr.Timeline
	start    frame.Cursor // before the first frame that the log holds

	syncing   sync.Mutex // held while frames become durable and indexed
	appending sync.Mutex // held while the active segment is used; taken after syncing

	mu struct {
		sync.Mutex
		writer  *segment.Writer // nil before the first frame
		active  segmentInfo     // of writer
		head    frame.Cursor    // after the last frame appended
		pending []placedFrame   // appended, not durable
		safe    int64           // bytes of the active segment that are durable
		durable frame.Cursor    // after the last frame that is durable and indexed
		failed  error           // since then nothing was appended; Resume heals
	}
}

// openLog recovers the log of a timeline and indexes what the index lacks.
func openLog(ctx context.Context, v *Vault, t timelineInfo) (*Log, error) {
	l := &Log{v: v, timeline: t.ID}
	m := v.manifest.Load()
	if err := l.findStart(m, t); err != nil {
		return nil, err
	}
	l.mu.head = l.start
	if err := l.openSegments(); err != nil {
		return nil, fmt.Errorf("open log of timeline %d: %w", t.ID, err)
	}
	from := v.index.mark(t.ID)
	if end := l.mu.head.Position.Seq; from > end {
		if err := v.forget(t.ID, end, from); err != nil {
			l.close() // nothing was written yet
			return nil, err
		}
		from = 0 // what is left of it is indexed anew
	}
	if t.ID == m.BaseTimeline {
		from = max(from, m.Base)
	}
	if err := l.replay(ctx, from); err != nil {
		l.close() // nothing was written yet
		return nil, fmt.Errorf("index log of timeline %d: %w", t.ID, err)
	}
	l.mu.durable = l.mu.head
	return l, nil
}

// forget accepts that the newest bytes of a log are gone although they had been durable:
// a disk that lied, or somebody's hand. What is left is whole, and the sender, which is told
// the position that is left, sends again what it lacks. Lost tells of it. A log from which another one
// forks behind its end can't be accepted.
func (v *Vault) forget(tl dr.Timeline, end, durable dr.Seq) error {
	for _, t := range v.manifest.Load().Timelines {
		if t.Parent == tl && t.Fork > end {
			return fmt.Errorf("log of timeline %d ends at %d but was durable through %d, and timeline %d forks in between: %w", tl, end, durable, t.ID, dr.ErrCorrupt)
		}
	}
	if err := v.index.removeTimeline(tl); err != nil {
		return err
	}
	v.lost = append(v.lost, fmt.Errorf("log of timeline %d ends at %d but was durable through %d: what lay behind is gone: %w", tl, end, durable, dr.ErrCorrupt))
	return nil
}

// findStart sets the cursor that the log's first frame continues.
func (l *Log) findStart(m *manifest, t timelineInfo) error {
	l.start = frame.Cursor{Machine: m.Machine, Position: dr.Position{Timeline: t.ID, Seq: t.Fork}, Time: t.ForkTime}
	if t.ID == m.BaseTimeline {
		l.start.Position.Seq, l.start.Time, l.start.Chain = m.Base, m.BaseTime, m.BaseChain
		return nil
	}
	if t.Parent == 0 {
		return nil
	}
	chain, err := l.v.chainAt(t.Parent, t.Fork)
	l.start.Chain = chain
	return err
}

// chainAt returns the chain value of the frame that holds a position.
func (v *Vault) chainAt(tl dr.Timeline, seq dr.Seq) ([32]byte, error) {
	m := v.manifest.Load()
	if tl == m.BaseTimeline && seq == m.Base {
		return m.BaseChain, nil
	}
	if t, _ := m.timeline(tl); seq <= t.Fork {
		if t.Parent == 0 {
			return [32]byte{}, nil
		}
		return v.chainAt(t.Parent, seq)
	}
	f, err := v.frameAt(tl, seq)
	if err != nil {
		return [32]byte{}, err
	}
	return f.Chain, nil
}

// live returns the listed segments that are not folded.
func (l *Log) live() []segmentInfo {
	m := l.v.manifest.Load()
	all := m.segments(l.timeline)
	for len(all) > 0 && l.timeline == m.BaseTimeline && all[0].Sealed && all[0].Last <= m.Base {
		all = all[1:]
	}
	return all
}

// openSegments finds the end of the log: it verifies that the sealed segments
// are there and recovers the last.
func (l *Log) openSegments() error {
	all := l.live()
	for i, s := range all {
		if i == 0 && s.First != l.mu.head.Position.Seq+1 {
			return fmt.Errorf("first segment begins at %d, the history before ends at %d: %w", s.First, l.mu.head.Position.Seq, dr.ErrCorrupt)
		}
		if !s.Sealed {
			return l.openActive(s)
		}
		dir, name := s.key().file()
		info, err := l.v.fs.Stat(path.Join(l.v.dir, dir, name))
		if err != nil || info.Size != s.Size {
			return fmt.Errorf("segment %s is missing or has %d bytes instead of %d: %w", name, info.Size, s.Size, dr.ErrCorrupt)
		}
		l.mu.head = s.end(l.v.Machine())
	}
	return nil
}

// end returns the cursor after a sealed segment.
func (s segmentInfo) end(machine dr.MachineID) frame.Cursor {
	return frame.Cursor{
		Machine: machine, Position: dr.Position{Timeline: s.Timeline, Seq: s.Last}, Time: s.LastTime, Chain: s.Chain,
	}
}

// openActive recovers the segment that the manifest lists as not sealed; a
// crash may have come between its sealing and the manifest.
func (l *Log) openActive(s segmentInfo) error {
	dir, name := s.key().file()
	dir = path.Join(l.v.dir, dir)
	r, err := segment.Open(l.v.fs, dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("segment %s is missing: %w", name, dr.ErrCorrupt)
	}
	if err == nil && r.Sealed() {
		info, err := describe(l.v, r)
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
		l.mu.head = info.end(l.v.Machine())
		return l.v.update(func(m *manifest) error {
			m.addSegment(info)
			return nil
		})
	}
	if err == nil {
		if err := r.Close(); err != nil {
			return err
		}
	}
	w, err := segment.Recover(l.v.fs, dir, name)
	if err != nil {
		return fmt.Errorf("recover segment %s: %w", name, err)
	}
	if start := w.Reader().Start(); start != l.mu.head {
		return errors.Join(fmt.Errorf("segment %s does not continue the one before: %w", name, dr.ErrCorrupt), w.Close())
	}
	if err := w.Sync(); err != nil { // what recovery read may have been in the page cache only
		return errors.Join(fmt.Errorf("sync segment %s: %w", name, err), w.Close())
	}
	l.useWriter(w, s)
	return nil
}

// useWriter makes w the active segment.
func (l *Log) useWriter(w *segment.Writer, s segmentInfo) {
	if entries := w.Reader().Entries(); len(entries) > 0 {
		s.FirstTime, s.EndPoint = entries[0].FirstTime, !entries[len(entries)-1].Open
	}
	l.mu.writer, l.mu.active, l.mu.head, l.mu.safe = w, s, w.Cursor(), w.Size()
	l.v.segs.put(s.key(), w.Reader())
}

// describe tells what the manifest says of a sealed segment.
func describe(v *Vault, r *segment.Reader) (segmentInfo, error) {
	start, end, entries := r.Start(), r.End(), r.Entries()
	s := segmentInfo{
		Timeline: start.Position.Timeline, Sealed: true, First: start.Position.Seq + 1, Last: end.Position.Seq,
		LastTime: end.Time, Chain: end.Chain,
	}
	dir, name := s.key().file()
	if len(entries) == 0 {
		return s, fmt.Errorf("sealed segment %s is empty: %w", name, dr.ErrCorrupt)
	}
	s.FirstTime, s.EndPoint = entries[0].FirstTime, !entries[len(entries)-1].Open
	info, err := v.fs.Stat(path.Join(v.dir, dir, name))
	s.Size = info.Size
	return s, err
}

// replay indexes the frames behind a sequence number.
func (l *Log) replay(ctx context.Context, after dr.Seq) error {
	batch, bytes := []placedFrame(nil), int64(0)
	flush := func() error {
		err := l.v.index.apply(l.timeline, batch)
		batch, bytes = nil, 0
		return errors.Join(err, ctx.Err())
	}
	for _, s := range l.live() {
		if s.Sealed && s.Last <= after {
			continue
		}
		err := l.v.segs.each(s.key(), func(p placedFrame) error {
			if p.frame.Last <= after {
				return nil
			}
			batch = append(batch, p)
			if bytes += p.frame.Size(); bytes < replayBatch {
				return nil
			}
			return flush()
		})
		if err != nil {
			return err
		}
	}
	return flush()
}

// Cursor returns where the log ends, durable or not: what the next frame must
// continue.
func (l *Log) Cursor() frame.Cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.head
}

// Durable returns where the durable and readable part of the log ends.
func (l *Log) Durable() frame.Cursor {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.durable
}

// Timeline returns the log's timeline.
func (l *Log) Timeline() dr.Timeline { return l.timeline }

func (l *Log) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.writer == nil {
		return nil
	}
	l.v.segs.drop(l.mu.active.key())
	err := l.mu.writer.Close()
	l.mu.writer = nil
	return err
}

// activeBytes returns the durable size of the active segment.
func (l *Log) activeBytes() int64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.safe
}
