package vault

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/vfs"
)

// indexBatch is about how many bytes of keys are applied at once.
const indexBatch = 1 << 20

// index finds the frames that hold a block. It is derived from the segments:
// whatever is wrong with it, rebuilding it from them is right. apply and
// remove are called by one goroutine per timeline; reading is safe at any time.
type index struct {
	db     *pebble.DB
	broken atomic.Pointer[error] // Pebble failed in the background
	gone   chan struct{}         // closed once broken is set

	mu struct {
		sync.Mutex
		lines map[dr.Timeline]*indexLine
	}
}

// indexLine is what the index holds of one timeline.
type indexLine struct {
	levels  [levels]bool // whether there may be keys of the level
	mark    dr.Seq       // indexed through
	run     span         // the last span, which more frames may extend
	segment dr.Seq       // first sequence number of the segment that run lies in
}

// placedFrame is a frame and where it lies; its payload may be absent.
type placedFrame struct {
	frame   *frame.Frame
	segment dr.Seq // first sequence number of the segment
	off     int64  // within the segment
}

// openIndex opens the index at dir. One that is missing or can't be used is
// made anew, empty.
func openIndex(fsys vfs.FS, dir string, cache *Cache) (*index, error) {
	x, err := tryIndex(fsys, dir, cache, false)
	if err == nil {
		if x.hasForm() && x.readLines() == nil {
			return x, nil
		}
		x.close() // it is thrown away
	}
	if err := fsys.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("remove unusable index: %w", err)
	}
	if x, err = tryIndex(fsys, dir, cache, false); err != nil {
		return nil, err
	}
	if err := x.db.Set([]byte{classMark}, []byte{indexForm}, pebble.NoSync); err != nil {
		return nil, errors.Join(fmt.Errorf("write index: %w", err), x.close())
	}
	return x, nil
}

func tryIndex(fsys vfs.FS, dir string, cache *Cache, readOnly bool) (*index, error) {
	x := &index{gone: make(chan struct{})}
	x.mu.lines = map[dr.Timeline]*indexLine{}
	opts := &pebble.Options{
		FS: indexFS{fsys, &failStop{}}, Cache: cache.index, DisableWAL: true, ReadOnly: readOnly, ErrorIfNotExists: readOnly,
		FormatMajorVersion: pebble.FormatNewest,
		MemTableSize:       8 << 20, MemTableStopWritesThreshold: 8,
		L0CompactionThreshold: 4, L0StopWritesThreshold: 1000,
		MaxOpenFiles: 256,
		Logger:       indexLog{x},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) { x.fail(err) },
		},
	}
	// The usual scheduler has a goroutine that looks ten times a second whether more may be compacted now,
	// and that stays when Open fails. Nothing changes what may be compacted but the ends of compactions.
	opts.Experimental.CompactionScheduler = pebble.NewConcurrencyLimitSchedulerWithNoPeriodicGrantingForTest()
	opts.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionFastest })
	if err := fsys.MkdirAll(dir); err != nil && !readOnly {
		return nil, fmt.Errorf("make %s: %w", dir, err)
	}
	if !readOnly {
		if err := dropLogs(fsys, dir); err != nil {
			return nil, fmt.Errorf("open index %s: %w", dir, err)
		}
	}
	db, err := pebble.Open(dir, opts)
	if err != nil {
		return nil, fmt.Errorf("open index %s: %w", dir, err)
	}
	x.db = db
	return x, nil
}

// dropLogs removes the write-ahead logs that Pebble makes and that stay empty, as they are not used. If it
// finds one it writes a table and a manifest before Open returns, and tries for ever if that fails: a
// vault on a full disk would neither open nor be given up.
func dropLogs(fsys vfs.FS, dir string) error {
	names, err := fsys.List(dir)
	for _, name := range names {
		if err == nil && strings.HasSuffix(name, ".log") {
			err = fsys.Remove(path.Join(dir, name))
		}
	}
	return err
}

// indexLog drops what Pebble tells, and takes what it calls fatal for a broken
// index instead of the end of the process.
type indexLog struct{ x *index }

func (indexLog) Infof(string, ...any)  {}
func (indexLog) Errorf(string, ...any) {}

func (l indexLog) Fatalf(format string, args ...any) { l.x.fail(fmt.Errorf(format, args...)) }

func (x *index) fail(err error) {
	err = fmt.Errorf("index failed: %w", err)
	if x.broken.CompareAndSwap(nil, &err) {
		close(x.gone)
	}
}

func (x *index) err() error {
	if p := x.broken.Load(); p != nil {
		return *p
	}
	return nil
}

func (x *index) close() error {
	if err := x.db.Close(); err != nil {
		return fmt.Errorf("close index: %w", err)
	}
	return nil
}

func (x *index) hasForm() bool {
	v, closer, err := x.db.Get([]byte{classMark})
	if err != nil {
		return false
	}
	defer closer.Close()
	return bytes.Equal(v, []byte{indexForm})
}

// readLines learns what the index holds of each timeline.
func (x *index) readLines() error {
	it, err := x.db.NewIter(&pebble.IterOptions{LowerBound: []byte{classMark, 0}, UpperBound: []byte{classChange}})
	if err != nil {
		return fmt.Errorf("read index: %w", err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		k, v := it.Key(), it.Value()
		if len(k) != 5 || len(v) != 8 {
			return errors.Join(fmt.Errorf("index mark %x=%x: %w", k, v, dr.ErrCorrupt), it.Close())
		}
		x.mu.lines[dr.Timeline(be.Uint32(k[1:]))] = &indexLine{mark: dr.Seq(be.Uint64(v))}
	}
	if err := it.Close(); err != nil {
		return fmt.Errorf("read index: %w", err)
	}
	for tl, line := range x.mu.lines {
		if err := x.readLevels(tl, line); err != nil {
			return err
		}
	}
	return nil
}

func (x *index) readLevels(tl dr.Timeline, line *indexLine) error {
	it, err := x.changes(tl)
	if err != nil {
		return err
	}
	for l := range line.levels {
		line.levels[l] = it.SeekGE(levelPrefix(tl, uint8(l))) && it.Key()[5] == uint8(l)
	}
	return it.Close()
}

// changes returns an iterator over the changes of a timeline.
func (x *index) changes(tl dr.Timeline) (*pebble.Iterator, error) {
	if err := x.err(); err != nil {
		return nil, err
	}
	it, err := x.db.NewIter(&pebble.IterOptions{LowerBound: levelPrefix(tl, 0), UpperBound: levelPrefix(tl+1, 0)})
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	return it, nil
}

func levelPrefix(tl dr.Timeline, level uint8) []byte {
	return append(be.AppendUint32([]byte{classChange}, uint32(tl)), level)
}

// mark returns how far a timeline is indexed; zero if nothing of it is.
func (x *index) mark(tl dr.Timeline) dr.Seq {
	x.mu.Lock()
	defer x.mu.Unlock()
	if line := x.mu.lines[tl]; line != nil {
		return line.mark
	}
	return 0
}

// timelines returns the timelines of which the index holds something.
func (x *index) timelines() []dr.Timeline {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Collect(maps.Keys(x.mu.lines))
}

// hasLevels reports whether a timeline may have keys of a level.
func (x *index) hasLevels(tl dr.Timeline) (has [levels]bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if line := x.mu.lines[tl]; line != nil {
		return line.levels
	}
	return has
}

// apply adds frames of one timeline in order. Frames must be durable in their
// segments before. Frames at or before the mark are left out.
func (x *index) apply(tl dr.Timeline, frames []placedFrame) error {
	if len(frames) == 0 {
		return nil
	}
	if err := x.err(); err != nil {
		return err
	}
	x.mu.Lock()
	line := indexLine{}
	if l := x.mu.lines[tl]; l != nil {
		line = *l
	}
	x.mu.Unlock()
	w := indexWriter{batch: x.db.NewBatch()}
	defer func() { _ = w.batch.Close() }() // it only frees memory
	for _, p := range frames {
		if p.frame.Last <= line.mark {
			continue
		}
		if err := w.add(p, &line); err != nil {
			return err
		}
		if w.batch.Len() < indexBatch {
			continue
		}
		if err := x.commit(tl, &w, line); err != nil {
			return err
		}
		w.batch.Close()
		w.batch = x.db.NewBatch()
	}
	return x.commit(tl, &w, line)
}

// commit applies a batch with the mark and publishes the line.
func (x *index) commit(tl dr.Timeline, w *indexWriter, line indexLine) error {
	if w.batch.Empty() {
		return nil
	}
	err := w.batch.Set(markKey(tl), be.AppendUint64(nil, uint64(line.mark)), nil)
	if err == nil {
		// Levels first: a reader must not skip a level that has keys.
		x.publish(tl, func(l *indexLine) { l.levels = line.levels })
		err = x.db.Apply(w.batch, pebble.NoSync)
	}
	if err == nil {
		err = x.err()
	}
	if err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	x.publish(tl, func(l *indexLine) { *l = line })
	return nil
}

func (x *index) publish(tl dr.Timeline, change func(*indexLine)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	l := x.mu.lines[tl]
	if l == nil {
		l = &indexLine{}
		x.mu.lines[tl] = l
	}
	change(l)
}

// indexWriter fills a batch.
type indexWriter struct {
	batch *pebble.Batch
	value []byte
}

func (w *indexWriter) add(p placedFrame, line *indexLine) error {
	err := eachChange(p.frame, p.segment, p.off, func(k changeKey, c change) error {
		line.levels[k.Level] = true
		w.value = c.append(w.value[:0])
		op := w.batch.SetDeferred(changeKeySize, len(w.value))
		k.append(op.Key[:0])
		copy(op.Value, w.value)
		return op.Finish()
	})
	if err == nil {
		err = w.addSpan(p, line)
	}
	if err == nil && p.frame.Kind == frame.TagKind {
		err = w.addTag(p.frame)
	}
	if err != nil {
		return fmt.Errorf("index frame %d:%d: %w", p.frame.Timeline, p.frame.First, err)
	}
	line.mark = p.frame.Last
	return nil
}

// addSpan extends the last span by the frame, or begins one.
func (w *indexWriter) addSpan(p placedFrame, line *indexLine) error {
	s := frameSpan(&p.frame.Header)
	if r := line.run; line.segment == p.segment && r.Last+1 == s.First && r.Accuracy == s.Accuracy && r.Open == s.Open {
		s.First, s.FirstTime = r.First, r.FirstTime
	}
	line.run, line.segment = s, p.segment
	return w.batch.Set(spanKey(s.Timeline, s.First), s.value(), nil)
}

func frameSpan(h *frame.Header) span {
	return span{h.Timeline, h.Accuracy, h.Open, h.First, h.Last, h.FirstTime, h.LastTime}
}

func (w *indexWriter) addTag(f *frame.Frame) error {
	t, err := f.Tag()
	if err != nil {
		return err
	}
	return w.batch.Set(tagKey(f.Timeline, f.Last), tagValue(t, f.LastTime), nil)
}

// remove takes the keys of frames out again, and the spans and tags of the
// sequence numbers first to last.
func (x *index) remove(tl dr.Timeline, first, last dr.Seq, frames func(func(placedFrame) error) error) error {
	if err := x.err(); err != nil {
		return err
	}
	b := x.db.NewBatch()
	defer func() { _ = b.Close() }() // it only frees memory
	key := make([]byte, 0, changeKeySize)
	err := frames(func(p placedFrame) error {
		if b.Len() > indexBatch {
			if err := x.db.Apply(b, pebble.NoSync); err != nil {
				return err
			}
			b.Close()
			b = x.db.NewBatch()
		}
		return eachChange(p.frame, p.segment, p.off, func(k changeKey, _ change) error {
			return b.Delete(k.append(key[:0]), nil)
		})
	})
	if err == nil {
		err = errors.Join(
			b.DeleteRange(spanKey(tl, first), spanKey(tl, last+1), nil),
			b.DeleteRange(tagKey(tl, first), tagKey(tl, last+1), nil),
			x.db.Apply(b, pebble.NoSync))
	}
	if err != nil {
		return fmt.Errorf("remove %d:[%d,%d] from index: %w", tl, first, last, err)
	}
	return nil
}

// removeTimeline takes all keys of a timeline out.
func (x *index) removeTimeline(tl dr.Timeline) error {
	if err := x.err(); err != nil {
		return err
	}
	b := x.db.NewBatch()
	defer b.Close()
	err := errors.Join(
		b.DeleteRange(levelPrefix(tl, 0), levelPrefix(tl+1, 0), nil),
		b.DeleteRange(spanKey(tl, 0), spanKey(tl+1, 0), nil),
		b.DeleteRange(tagKey(tl, 0), tagKey(tl+1, 0), nil),
		b.Delete(markKey(tl), nil),
		x.db.Apply(b, pebble.NoSync))
	if err != nil {
		return fmt.Errorf("remove timeline %d from index: %w", tl, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.mu.lines, tl)
	return nil
}

// flush makes all that was applied durable.
func (x *index) flush() error {
	if err := x.err(); err != nil {
		return err
	}
	done, err := x.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("flush index: %w", err)
	}
	select {
	case <-done:
	case <-x.gone: // Pebble tries again for ever
	}
	return x.err()
}

// spans returns the spans of a timeline within [from, to], in order, those of
// neighbouring segments joined.
func (x *index) spans(tl dr.Timeline, from, to dr.Seq) ([]span, error) {
	if err := x.err(); err != nil {
		return nil, err
	}
	it, err := x.db.NewIter(&pebble.IterOptions{LowerBound: spanKey(tl, 0), UpperBound: spanKey(tl+1, 0)})
	if err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	var out []span
	ok := it.SeekLT(spanKey(tl, from+1)) || it.First()
	for ; ok; ok = it.Next() {
		s, err := decodeSpan(it.Key(), it.Value())
		if err != nil {
			return nil, errors.Join(err, it.Close())
		}
		if s.First > to {
			break
		}
		if s.Last >= from {
			out = append(out, s)
		}
	}
	if err := it.Close(); err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	return out, nil
}

// joinSpans joins neighbours that differ in nothing but their place.
func joinSpans(all []span) []span {
	var out []span
	for _, s := range all {
		if n := len(out) - 1; n >= 0 && out[n].Accuracy == s.Accuracy && out[n].Open == s.Open {
			out[n].Last, out[n].LastTime = s.Last, s.LastTime
			continue
		}
		out = append(out, s)
	}
	return slices.Clip(out)
}

func indexPath(dir string) string { return path.Join(dir, indexDir) }
