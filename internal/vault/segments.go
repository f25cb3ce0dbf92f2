package vault

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// maxOpenSegments is how many segments are open before those that nobody uses
// are closed.
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
		sync.RWMutex
		open map[segmentKey]*openSegment
	}
}

// openSegment is a segment that can be read. Whoever acquired it is a user; it
// is closed once it is out of the table and has none.
type openSegment struct {
	key    segmentKey
	reader *segment.Reader
	owner  uint64 // of its entries in the cache

	users   atomic.Int64 // rises only under segments.mu
	dropped atomic.Bool  // out of the table
	closing sync.Once
	active  bool // one of the users is put; guarded by segments.mu
}

func newSegments(fsys vfs.FS, dir string, cache *Cache) *segments {
	t := &segments{fs: fsys, dir: dir, cache: cache}
	t.mu.open = map[segmentKey]*openSegment{}
	return t
}

// acquire returns an open segment; the caller releases it. The error wraps
// fs.ErrNotExist when the segment has been folded away.
func (t *segments) acquire(k segmentKey) (*openSegment, error) {
	t.mu.RLock()
	s := t.mu.open[k]
	if s != nil {
		s.users.Add(1)
	}
	t.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	return t.open(k)
}

// open opens a segment that was not in the table a moment ago.
func (t *segments) open(k segmentKey) (*openSegment, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.mu.open[k]; s != nil {
		s.users.Add(1)
		return s, nil
	}
	dir, name := k.file()
	r, err := segment.Open(t.fs, path.Join(t.dir, dir), name)
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", name, err)
	}
	t.evictLocked()
	return t.addLocked(k, r), nil
}

func (t *segments) addLocked(k segmentKey, r *segment.Reader) *openSegment {
	s := &openSegment{key: k, reader: r, owner: t.cache.owner()}
	s.users.Store(1)
	t.mu.open[k] = s
	return s
}

// evictLocked makes room for one more: a segment that nobody uses goes.
func (t *segments) evictLocked() {
	if len(t.mu.open) < maxOpenSegments {
		return
	}
	for _, s := range t.mu.open {
		if s.users.Load() == 0 {
			t.removeLocked(s)
			return
		}
	}
}

// put enters the reader of the active segment, which stays open until settle
// or drop.
func (t *segments) put(k segmentKey, r *segment.Reader) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.addLocked(k, r).active = true
}

// settle says that the active segment is one like any other from now on.
func (t *segments) settle(k segmentKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.mu.open[k]; s != nil && s.active {
		s.active = false
		t.release(s)
	}
}

func (t *segments) release(s *openSegment) {
	if s.users.Add(-1) == 0 && s.dropped.Load() {
		s.close()
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
		s.active = false
		s.users.Add(-1)
	}
	t.removeLocked(s)
}

// removeLocked takes s out of the table. Of it and the last release, the one
// that comes later sees what the other did; if both do, close is once only.
func (t *segments) removeLocked(s *openSegment) {
	delete(t.mu.open, s.key)
	s.dropped.Store(true)
	if s.users.Load() == 0 {
		s.close()
	}
}

func (s *openSegment) close() {
	s.closing.Do(func() { _ = s.reader.Close() }) // nothing was written through it
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

// frameTables are header and tables of a frame, and which of its blocks are known
// to be good and stored as they are: those are read in place.
type frameTables struct {
	*frame.Frame
	plain []atomic.Bool
}

// tables returns header and tables of the frame at off.
func (s *openSegment) tables(c *Cache, off int64) (*frameTables, error) {
	k := cacheKey{owner: s.owner, at: uint64(off), kind: cachedTables}
	if v, ok := c.get(k); ok {
		return v.(*frameTables), nil
	}
	f, err := s.reader.Tables(off)
	if err != nil {
		return nil, s.wrap(off, err)
	}
	t := &frameTables{f, make([]atomic.Bool, f.NumBlocks())}
	c.put(k, t, int64(f.TablesSize()+8*f.Extents+8*f.NumBlocks()))
	return t, nil
}

// readAt fills p from offset raw of the decoded payload of the frame at off.
func (s *openSegment) readAt(c *Cache, p []byte, off, raw int64) error {
	f, err := s.tables(c, off)
	if err != nil {
		return err
	}
	for len(p) > 0 {
		i := int(raw / frame.BlockSize)
		if i >= f.NumBlocks() {
			return s.wrap(off, fmt.Errorf("payload ends before %d: %w", raw, dr.ErrCorrupt))
		}
		_, _, start, size := f.Block(i)
		within := int(raw) - start
		if within >= size {
			return s.wrap(off, fmt.Errorf("payload ends before %d: %w", raw, dr.ErrCorrupt))
		}
		n := min(len(p), size-within)
		if err := s.readBlock(c, f, off, i, within, p[:n]); err != nil {
			return s.wrap(off, err)
		}
		p, raw = p[n:], raw+int64(n)
	}
	return nil
}

// readBlock fills p from a decoded block of the frame at off. A block is verified
// when it is first read. One that is stored as it is, is left to the page cache
// after that; others are kept decoded.
func (s *openSegment) readBlock(c *Cache, f *frameTables, off int64, i, within int, p []byte) error {
	at, stored, _, size := f.Block(i)
	if f.plain[i].Load() {
		return s.reader.ReadRaw(p, off+at+int64(within))
	}
	k := cacheKey{owner: s.owner, at: uint64(off), part: uint32(i), kind: cachedBlock}
	if v, ok := c.get(k); ok {
		copy(p, v.([]byte)[within:])
		return nil
	}
	buf := c.buffers.Get().(*[frame.BlockSize]byte)
	defer c.buffers.Put(buf)
	if err := s.reader.ReadRaw(buf[:stored], off+at); err != nil {
		return err
	}
	out, err := f.DecodeBlock(i, buf[:stored], make([]byte, 0, size))
	if err != nil {
		return err
	}
	copy(p, out[within:])
	if bytes.Equal(out, buf[:stored]) {
		f.plain[i].Store(true)
		return nil
	}
	c.put(k, out, int64(cap(out)))
	return nil
}

func (s *openSegment) wrap(off int64, err error) error {
	_, name := s.key.file()
	return fmt.Errorf("read frame at %d of segment %s: %w", off, name, err)
}
