package vault

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"path"
	"sync"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// maxOpenSegments bounds the segments kept open without being in use.
const maxOpenSegments = 256

// segmentKey names a segment of the vault.
type segmentKey struct {
	Timeline dr.Timeline
	First    dr.Seq
}

func (k segmentKey) compare(o segmentKey) int {
	return cmp.Or(cmp.Compare(k.Timeline, o.Timeline), cmp.Compare(k.First, o.First))
}

// file returns the directory, relative to the vault, and the name of the segment.
func (k segmentKey) file() (dir, name string) {
	at := frame.Cursor{Position: dr.Position{Timeline: k.Timeline, Seq: k.First - 1}}
	return segmentDir(k.Timeline), segment.Name(at)
}

// segments is the table of open segments. It is safe for concurrent use.
type segments struct {
	fs    vfs.FS
	dir   string
	cache *Cache

	mu struct {
		sync.Mutex
		open map[segmentKey]*openSegment
		idle list.List // of *openSegment without users, most recently used first
	}
}

// openSegment is a segment that can be read. It stays open while it has users.
type openSegment struct {
	key    segmentKey
	reader *segment.Reader
	owner  uint64 // of its entries in the cache

	users   int           // guarded by segments.mu, as are:
	dropped bool          // not in the table any more
	active  bool          // one of the users is put
	idle    *list.Element // nil while it has users
}

func newSegments(fsys vfs.FS, dir string, cache *Cache) *segments {
	t := &segments{fs: fsys, dir: dir, cache: cache}
	t.mu.open = map[segmentKey]*openSegment{}
	return t
}

// acquire returns an open segment; the caller releases it. The error wraps
// fs.ErrNotExist when the segment has been folded away.
func (t *segments) acquire(k segmentKey) (*openSegment, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.mu.open[k]; s != nil {
		if s.idle != nil {
			t.mu.idle.Remove(s.idle)
			s.idle = nil
		}
		s.users++
		return s, nil
	}
	dir, name := k.file()
	r, err := segment.Open(t.fs, path.Join(t.dir, dir), name)
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", name, err)
	}
	s := &openSegment{key: k, reader: r, owner: t.cache.owner(), users: 1}
	t.mu.open[k] = s
	return s, nil
}

// put enters the reader of the active segment, which stays open until settle
// or drop.
func (t *segments) put(k segmentKey, r *segment.Reader) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.open[k] = &openSegment{key: k, reader: r, owner: t.cache.owner(), users: 1, active: true}
}

// settle says that the active segment is one like any other from now on.
func (t *segments) settle(k segmentKey) {
	t.mu.Lock()
	s := t.mu.open[k]
	s.active = false
	t.mu.Unlock()
	t.release(s)
}

func (t *segments) release(s *openSegment) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.users--
	if s.users > 0 {
		return
	}
	if s.dropped {
		s.reader.Close() // nothing was written through it
		return
	}
	s.idle = t.mu.idle.PushFront(s)
	for t.mu.idle.Len() > maxOpenSegments {
		t.removeLocked(t.mu.idle.Back().Value.(*openSegment))
	}
}

// drop takes a segment out of the table; it is closed when its last user
// releases it.
func (t *segments) drop(k segmentKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.mu.open[k]
	if s == nil {
		return
	}
	if s.active {
		s.users--
	}
	t.removeLocked(s)
}

func (t *segments) removeLocked(s *openSegment) {
	delete(t.mu.open, s.key)
	s.dropped = true
	if s.idle != nil {
		t.mu.idle.Remove(s.idle)
		s.idle = nil
	}
	if s.users == 0 {
		s.reader.Close() // nothing was written through it
	}
}

// close closes all segments. No one may use them any more.
func (t *segments) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for k, s := range t.mu.open {
		errs = append(errs, s.reader.Close())
		delete(t.mu.open, k)
	}
	return errors.Join(errs...)
}

// each calls fn for the frames of a segment, in order; only tags have their
// payload.
func (t *segments) each(k segmentKey, fn func(placedFrame) error) error {
	s, err := t.acquire(k)
	if err != nil {
		return err
	}
	defer t.release(s)
	for _, e := range s.reader.Entries() {
		read := s.reader.Tables
		if e.Kind == frame.TagKind {
			read = s.reader.Frame
		}
		f, err := read(e.Off)
		if err != nil {
			return s.wrap(e.Off, err)
		}
		if err := fn(placedFrame{f, k.First, e.Off}); err != nil {
			return err
		}
	}
	return nil
}

// tables returns header and tables of the frame at off.
func (s *openSegment) tables(c *Cache, off int64) (*frame.Frame, error) {
	k := cacheKey{owner: s.owner, at: uint64(off), kind: cachedTables}
	if v, ok := c.get(k); ok {
		return v.(*frame.Frame), nil
	}
	f, err := s.reader.Tables(off)
	if err != nil {
		return nil, s.wrap(off, err)
	}
	c.put(k, f, int64(f.TablesSize()+8*f.Extents))
	return f, nil
}

// block returns decoded block i of the frame at off.
func (s *openSegment) block(c *Cache, off int64, i int) ([]byte, error) {
	k := cacheKey{owner: s.owner, at: uint64(off), part: uint32(i), kind: cachedBlock}
	if v, ok := c.get(k); ok {
		return v.([]byte), nil
	}
	f, err := s.tables(c, off)
	if err != nil {
		return nil, err
	}
	if i >= f.NumBlocks() {
		return nil, s.wrap(off, fmt.Errorf("no block %d: %w", i, dr.ErrCorrupt))
	}
	b, err := s.reader.ReadBlock(f, off, i, nil)
	if err != nil {
		return nil, s.wrap(off, err)
	}
	c.put(k, b, int64(cap(b)))
	return b, nil
}

// readAt fills p from offset raw of the decoded payload of the frame at off.
func (s *openSegment) readAt(c *Cache, p []byte, off, raw int64) error {
	for len(p) > 0 {
		i := raw / frame.BlockSize
		b, err := s.block(c, off, int(i))
		if err != nil {
			return err
		}
		within := raw - i*frame.BlockSize
		if within >= int64(len(b)) {
			return s.wrap(off, fmt.Errorf("payload ends before %d: %w", raw, dr.ErrCorrupt))
		}
		n := copy(p, b[within:])
		p, raw = p[n:], raw+int64(n)
	}
	return nil
}

func (s *openSegment) wrap(off int64, err error) error {
	_, name := s.key.file()
	return fmt.Errorf("read frame at %d of segment %s: %w", off, name, err)
}
