// Package spool is a crash-safe queue of the frames of one machine: appended at
// one end, read in order, and trimmed once the far side has them.
//
// A Spool is a directory of segments (docs/format/segment.md) that follow one
// another, and nothing else: the header of its first segment says where an
// empty spool stands. One goroutine may append, one sync, one trim and any
// number read at the same time.
//
// It doesn't decide what is stored or forwarded, and never drops a frame to
// make room: a full spool makes Append wait.
package spool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// Options bound a spool.
type Options struct {
	Limit       int64 // bytes of all segments; 0 means no limit
	SegmentSize int64 // bytes after which a segment is sealed; 0 means 64 MiB
}

const defaultSegmentSize = 64 << 20

// Spool is an open spool.
type Spool struct {
	fs   vfs.FS
	dir  string
	opts Options
	lock io.Closer

	appending sync.Mutex // one Append, Reset or roll at a time
	syncing   sync.Mutex // one Sync or roll at a time

	mu struct {
		sync.Mutex
		parts   []*part // oldest first; the last is active
		writer  *segment.Writer
		synced  frame.Cursor
		durable dr.Seq        // the far side has all up to here
		changed chan struct{} // closed when something is synced, trimmed or reset
		era     int           // counts resets
		closed  bool
	}
}

// part is a segment of the spool.
type part struct {
	name   string
	reader *segment.Reader
	size   int64 // of a sealed one
}

// Open opens the spool in dir, which it makes, and recovers it after a crash.
// Errors wrap dr.ErrCorrupt when stored frames are damaged: the owner then
// chooses between an administrator's help and Destroy.
func Open(fsys vfs.FS, dir string, opts Options) (*Spool, error) {
	if opts.SegmentSize == 0 {
		opts.SegmentSize = defaultSegmentSize
	}
	if err := errors.Join(fsys.MkdirAll(dir), fsys.SyncDir(path.Dir(dir))); err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	lock, err := fsys.Lock(path.Join(dir, "LOCK"))
	if err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	s := &Spool{fs: fsys, dir: dir, opts: opts, lock: lock}
	s.mu.changed = make(chan struct{})
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open spool %s: %w", dir, err), s.Close())
	}
	return s, nil
}

// Destroy removes the spool in dir and all its frames. It must not be open.
func Destroy(fsys vfs.FS, dir string) error {
	if err := fsys.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("destroy spool: %w", err)
	}
	return fsys.SyncDir(path.Dir(dir))
}

func (s *Spool) load() error {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return err
	}
	var segments []string
	for _, name := range names {
		if _, _, err := segment.ParseName(name); err == nil {
			segments = append(segments, name)
		}
	}
	for i, name := range segments {
		if err := s.loadSegment(name, i == len(segments)-1); err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		if before, at := s.mu.parts[i-1].reader.End(), s.mu.parts[i].reader.Start(); before != at {
			return fmt.Errorf("segment %s does not continue the one before, which ends at %v: %w", name, before.Position, dr.ErrCorrupt)
		}
	}
	if n := len(s.mu.parts); n > 0 {
		s.mu.synced = s.mu.parts[n-1].reader.End()
	}
	return nil
}

func (s *Spool) loadSegment(name string, last bool) error {
	r, err := segment.Open(s.fs, s.dir, name)
	if err != nil && last && errors.Is(err, dr.ErrCorrupt) && len(s.mu.parts) > 0 {
		// A crash while it was made: a segment is used once its header is durable.
		return s.restart(name)
	}
	if err != nil {
		return err
	}
	if r.Sealed() {
		info, err := s.fs.Stat(path.Join(s.dir, name))
		s.mu.parts = append(s.mu.parts, &part{name, r, info.Size})
		if err != nil || !last {
			return err
		}
		return s.begin(r.End())
	}
	if err := r.Close(); err != nil {
		return err
	}
	if !last {
		return fmt.Errorf("segment %s is not sealed, but others follow: %w", name, dr.ErrCorrupt)
	}
	w, err := segment.Recover(s.fs, s.dir, name)
	if err != nil {
		return err
	}
	s.mu.writer = w
	s.mu.parts = append(s.mu.parts, &part{name: name, reader: w.Reader()})
	return w.Sync() // what recovery read may not have been durable
}

// restart replaces a segment without a valid header by a fresh one.
func (s *Spool) restart(name string) error {
	if err := s.fs.Remove(path.Join(s.dir, name)); err != nil {
		return err
	}
	return s.begin(s.mu.parts[len(s.mu.parts)-1].reader.End())
}

// begin adds a fresh active segment that continues at.
func (s *Spool) begin(at frame.Cursor) error {
	w, err := segment.Create(s.fs, s.dir, at)
	if err != nil {
		return err
	}
	s.mu.writer = w
	s.mu.parts = append(s.mu.parts, &part{name: segment.Name(at), reader: w.Reader()})
	return nil
}

// Cursor returns what the next frame must continue; ok is false before the
// first Reset of a new spool.
func (s *Spool) Cursor() (c frame.Cursor, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.mu.parts) == 0 {
		return frame.Cursor{}, false
	}
	return s.mu.parts[len(s.mu.parts)-1].reader.End(), true
}

// Synced returns the end of what is durable here.
func (s *Spool) Synced() frame.Cursor {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.synced
}

// Bytes returns the size of all segments.
func (s *Spool) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytesLocked()
}

func (s *Spool) bytesLocked() (n int64) {
	for _, p := range s.mu.parts {
		n += p.size
	}
	if s.mu.writer != nil {
		n += s.mu.writer.Size()
	}
	return n
}

func (s *Spool) notifyLocked() {
	close(s.mu.changed)
	s.mu.changed = make(chan struct{})
}

// Reset drops all frames and starts over at c. Readers fail with dr.ErrGap. It
// must not run together with Append.
func (s *Spool) Reset(c frame.Cursor) error {
	s.appending.Lock()
	defer s.appending.Unlock()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return fmt.Errorf("reset spool: closed: %w", dr.ErrInvalid)
	}
	old, w := s.mu.parts, s.mu.writer
	s.mu.parts, s.mu.writer = nil, nil
	s.mu.era++
	s.notifyLocked()
	if w != nil {
		if err := w.Close(); err != nil {
			return fmt.Errorf("reset spool: %w", err)
		}
	}
	// Newest first: what a crash leaves is a spool that ends earlier.
	for i := len(old) - 1; i >= 0; i-- {
		if err := s.drop(old[i]); err != nil {
			return fmt.Errorf("reset spool: %w", err)
		}
	}
	if err := s.fs.SyncDir(s.dir); err != nil {
		return fmt.Errorf("reset spool: %w", err)
	}
	if err := s.begin(c); err != nil {
		return fmt.Errorf("reset spool: %w", err)
	}
	s.mu.synced, s.mu.durable = c, c.Position.Seq
	return nil
}

func (s *Spool) drop(p *part) error {
	return errors.Join(p.reader.Close(), s.fs.Remove(path.Join(s.dir, p.name)))
}

// Append adds frames behind the last; they are durable after the next Sync. It
// waits while the spool is full, until Trim makes room or ctx ends. Errors of
// frame.Check mean that the frames do not continue the spool.
func (s *Spool) Append(ctx context.Context, frames []*frame.Frame) error {
	s.appending.Lock()
	defer s.appending.Unlock()
	for _, f := range frames {
		if err := s.waitRoom(ctx, f.Size()); err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
		w, err := s.active()
		if err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
		if _, err := w.Append(f); err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
	}
	return nil
}

// waitRoom waits until n more bytes fit. A spool that holds nothing that the
// far side lacks takes any frame.
func (s *Spool) waitRoom(ctx context.Context, n int64) error {
	for {
		if err := s.trimAppending(); err != nil {
			return err
		}
		s.mu.Lock()
		room := s.opts.Limit == 0 || s.bytesLocked()+n <= s.opts.Limit || s.emptyLocked()
		changed, closed := s.mu.changed, s.mu.closed
		s.mu.Unlock()
		if closed {
			return fmt.Errorf("spool is closed: %w", dr.ErrInvalid)
		}
		if room {
			return nil
		}
		// What is to be forwarded must be synced first, or nothing makes room.
		if err := s.Sync(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", dr.ErrFull, context.Cause(ctx))
		}
	}
}

func (s *Spool) emptyLocked() bool {
	n := len(s.mu.parts)
	return n == 0 || s.mu.parts[0].reader.Start() == s.mu.parts[n-1].reader.End()
}

// active returns the segment to append to, after sealing a full one.
func (s *Spool) active() (*segment.Writer, error) {
	s.mu.Lock()
	w := s.mu.writer
	s.mu.Unlock()
	if w == nil {
		return nil, fmt.Errorf("spool has no beginning yet: %w", dr.ErrInvalid)
	}
	if w.Size() < s.opts.SegmentSize {
		return w, nil
	}
	return s.roll(w)
}

// roll seals the active segment and begins the next.
func (s *Spool) roll(w *segment.Writer) (*segment.Writer, error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if err := w.Seal(); err != nil {
		return nil, err
	}
	end := w.Cursor()
	info, err := s.fs.Stat(path.Join(s.dir, s.lastPart().name))
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.parts[len(s.mu.parts)-1].size = info.Size
	s.mu.writer = nil
	if err := s.begin(end); err != nil {
		return nil, err
	}
	s.mu.synced = end
	s.notifyLocked()
	return s.mu.writer, nil
}

func (s *Spool) lastPart() *part {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.parts[len(s.mu.parts)-1]
}

// Sync makes durable what was appended before the call, and shows it to
// readers.
func (s *Spool) Sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	w := s.mu.writer
	s.mu.Unlock()
	if w == nil {
		return nil
	}
	end := w.Reader().End() // before the fsync, so that it covers no later frame
	if err := w.Sync(); err != nil {
		return fmt.Errorf("sync spool: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.writer == w && s.mu.synced != end {
		s.mu.synced = end
		s.notifyLocked()
	}
	return nil
}

// Trim says that the far side holds every frame up to durable, and drops the
// segments that only have such frames. When that is all there is and the
// active segment has grown, a fresh one is begun so that the space comes back.
func (s *Spool) Trim(durable dr.Seq) error {
	s.mu.Lock()
	if durable <= s.mu.durable {
		s.mu.Unlock()
		return nil
	}
	s.mu.durable = durable
	s.notifyLocked() // an Append that waits trims by itself
	s.mu.Unlock()
	if !s.appending.TryLock() {
		return s.dropDurable()
	}
	defer s.appending.Unlock()
	return s.trimAppending()
}

// trimAppending is the work of Trim for whoever holds appending.
func (s *Spool) trimAppending() error {
	if w := s.worthRolling(); w != nil {
		if _, err := s.roll(w); err != nil {
			return fmt.Errorf("trim spool: %w", err)
		}
	}
	return s.dropDurable()
}

// worthRolling returns the active segment if all its frames are durable on the
// far side and it has grown.
func (s *Spool) worthRolling() *segment.Writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.mu.writer
	if w == nil || w.Size() < min(s.opts.SegmentSize, max(s.opts.Limit/4, 1<<20)) || w.Reader().End().Position.Seq > s.mu.durable {
		return nil
	}
	return w
}

func (s *Spool) dropDurable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(s.mu.parts)-1 && s.mu.parts[n].reader.End().Position.Seq <= s.mu.durable {
		if err := s.drop(s.mu.parts[n]); err != nil {
			return fmt.Errorf("trim spool: %w", err)
		}
		n++
	}
	if n == 0 {
		return nil
	}
	s.mu.parts = s.mu.parts[n:]
	s.notifyLocked()
	if err := s.fs.SyncDir(s.dir); err != nil {
		return fmt.Errorf("trim spool: %w", err)
	}
	return nil
}

// Close ends all waiting and releases the directory.
func (s *Spool) Close() error {
	s.mu.Lock()
	closed := s.mu.closed
	s.mu.closed = true
	s.notifyLocked()
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.appending.Lock()
	defer s.appending.Unlock()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, p := range s.mu.parts {
		errs = append(errs, p.reader.Close())
	}
	if s.mu.writer != nil {
		errs = append(errs, s.mu.writer.Close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}
