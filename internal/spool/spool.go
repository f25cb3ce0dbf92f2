// Package spool is a crash-safe queue of the frames of one machine: appended at
// one end, read in order, and trimmed once the far side has them.
//
// A Spool is a directory of segments (docs/format/segment.md) that follow one
// another, and nothing else: the header of its first segment says where an
// empty spool stands. One goroutine may append, one sync, one trim and any
// number read at the same time.
//
// After an error of the disk a spool heals itself: it goes back to what is known to
// be durable, so that its user has to start over from Cursor; nothing that was
// synced is lost. DESIGN.md has the crash argument.
//
// It doesn't decide what is stored or forwarded, and never drops a frame to
// make room: a full spool makes Append wait.
package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// Options bound a spool.
type Options struct {
	Limit       int64   // bytes of all segments; 0 means no limit
	Budget      *Budget // shared with other spools; nil means none
	SegmentSize int64   // bytes after which a segment is sealed; 0 means 64 MiB, less under a low limit
}

const (
	defaultSegmentSize = 64 << 20
	// Space comes back by whole segments: a bounded spool has room for so many.
	leastSegments = 8
)

// Spool is an open spool.
type Spool struct {
	fs   vfs.FS
	dir  string
	opts Options
	lock io.Closer

	promise vfs.File // once it was written; guarded by mu

	appending sync.Mutex // one Append, Reset or roll at a time
	syncing   sync.Mutex // one Sync or roll at a time
	folding   sync.Mutex // one Fold at a time; taken before the others

	mu struct {
		sync.Mutex
		parts       []*part // oldest first; the last is active, unless writer is nil
		writer      *segment.Writer
		synced      frame.Cursor
		durable     dr.Seq        // the far side has all up to here
		durableTime int64         // UTC ns of that frame; 0 if not known
		changed     chan struct{} // closed when something is synced, trimmed or reset
		era         int           // counts resets
		waiting     Bound         // an Append waits for room
		noted       frame.Cursor  // what the promise says
		lost        dr.Position   // promised before the spool was opened, and not there
		broken      bool          // heal must come first
		closed      bool

		met    bool     // a reader has been made since the spool was opened: shown is known
		shown  dr.Seq   // readers were shown nothing behind it
		fold   *run     // being folded: readers wait before it
		stale  []string // segments that a folded one replaces, still to be removed
		cut    bool     // the next Append begins a fresh segment
		untidy bool     // their removal, or the replacement, is not durable yet
	}
}

// part is a segment of the spool.
type part struct {
	name   string
	reader *segment.Reader // another one after heal
	size   int64           // of a sealed one
	folded bool            // made by Fold
}

// Open opens the spool in dir, which it makes, and recovers it after a crash.
// Errors wrap dr.ErrCorrupt when stored frames are damaged: the owner then
// chooses between an administrator's help and Destroy.
func Open(fsys vfs.FS, dir string, opts Options) (*Spool, error) {
	if opts.SegmentSize == 0 {
		opts.SegmentSize = defaultSegmentSize
	}
	if opts.Limit > 0 {
		opts.SegmentSize = max(1, min(opts.SegmentSize, opts.Limit/leastSegments))
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
	if err := errors.Join(s.load(), s.loadPromise()); err != nil {
		return nil, errors.Join(fmt.Errorf("open spool %s: %w", dir, err), s.Close())
	}
	opts.Budget.add(s)
	return s, nil
}

// Destroy removes the spool in dir and all its frames. It must not be open.
func Destroy(fsys vfs.FS, dir string) error {
	if err := fsys.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("destroy spool: %w", err)
	}
	return fsys.SyncDir(path.Dir(dir))
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
	s.releaseLocked()
	s.mu.parts, s.mu.broken = nil, false
	s.mu.met, s.mu.shown, s.mu.stale, s.mu.untidy = false, 0, nil, false
	s.mu.era++
	s.notifyLocked()
	if err := s.forgetPromise(); err != nil {
		return fmt.Errorf("reset spool: %w", err)
	}
	if err := s.removeAll(); err != nil {
		return fmt.Errorf("reset spool: %w", err)
	}
	if err := s.begin(c); err != nil {
		return fmt.Errorf("reset spool: %w", err)
	}
	s.mu.synced, s.mu.durable, s.mu.durableTime = c, c.Position.Seq, c.Time
	return nil
}

// releaseLocked closes all files. What was not synced is of no interest any more.
func (s *Spool) releaseLocked() {
	for _, p := range s.mu.parts {
		_ = p.reader.Close() // it only read
	}
	if s.mu.writer != nil {
		_ = s.mu.writer.Close()
		s.mu.writer = nil
	}
}

// removeAll removes the files of all segments, also those that a failure left
// over. Newest first: what a crash leaves is a spool that ends earlier.
func (s *Spool) removeAll() error {
	names, err := s.segments()
	if err != nil {
		return err
	}
	for _, name := range slices.Backward(names) {
		if err := s.fs.Remove(path.Join(s.dir, name)); err != nil {
			return err
		}
	}
	return s.fs.SyncDir(s.dir)
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
	s.opts.Budget.remove(s)
	s.appending.Lock()
	defer s.appending.Unlock()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked()
	if s.promise != nil {
		_ = s.promise.Close() // what it says is advice
	}
	return s.lock.Close()
}
