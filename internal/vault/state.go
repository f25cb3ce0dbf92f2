package vault

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"farside/internal/dr"
)

// State is all disks of the machine at a position, for reading. It keeps the
// vault from folding past it until Close. It is safe for concurrent use.
type State struct {
	v        *Vault
	timeline dr.Timeline
	through  dr.Seq // MaxUint64 on a branch that is being written
	point    dr.RecoveryPoint
	chain    atomic.Pointer[stateChain]

	mu struct {
		sync.Mutex
		changes uint64 // calls of Changed
	}
}

// stateChain is what a State knows until the next fold.
type stateChain struct {
	links []link
	folds uint64 // Vault.folds when it was made
	owner uint64 // of the chunks in the cache
}

// links returns the way from a position to the base.
func (m *manifest) links(tl dr.Timeline, through dr.Seq) []link {
	var out []link
	for {
		t, ok := m.timeline(tl)
		if !ok {
			return out
		}
		if t.Parent == 0 || through > t.Fork {
			k := link{timeline: tl, through: through}
			if tl == m.BaseTimeline {
				k.after = m.Base
			}
			out = append(out, k)
		}
		if tl == m.BaseTimeline || t.Parent == 0 {
			return out
		}
		tl, through = t.Parent, min(through, t.Fork)
	}
}

// At opens the state at a recovery point, which Resolve gave. Errors wrap
// dr.ErrNoPoint.
func (v *Vault) At(p dr.Position) (*State, error) {
	point, err := v.Resolve(SelectPosition(p))
	if err != nil {
		return nil, err
	}
	s := &State{v: v, timeline: p.Timeline, through: p.Seq, point: point}
	if err := v.pin(s); err != nil {
		return nil, err
	}
	return s, nil
}

// Newest opens the state behind everything that is durable, whether that is a
// recovery point or not. For comparing only: what a stream is still syncing may be
// neither what the disks were nor what they will be.
func (v *Vault) Newest() (*State, error) {
	head := v.Head()
	s := &State{
		v: v, timeline: head.Position.Timeline, through: head.Position.Seq,
		point: dr.RecoveryPoint{Position: head.Position},
	}
	if err := v.pin(s); err != nil {
		return nil, err
	}
	return s, nil
}

// pin keeps the horizon from passing s and makes s ready.
func (v *Vault) pin(s *State) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	m := v.manifest.Load()
	links := m.links(s.timeline, s.through)
	last := links[len(links)-1]
	if last.timeline == m.BaseTimeline && last.through < m.Horizon {
		return fmt.Errorf("open %v: the history now begins at %d: %w", s.point.Position, m.Horizon, dr.ErrNoPoint)
	}
	v.mu.pins[s] = last.through
	s.refresh(v.folds.Load())
	return nil
}

// Close lets the vault fold past the state.
func (s *State) Close() {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	delete(s.v.mu.pins, s)
}

// Point returns where the state is.
func (s *State) Point() dr.RecoveryPoint { return s.point }

// refresh forgets what folds since then made stale.
func (s *State) refresh(folds uint64) *stateChain {
	c := &stateChain{
		links: s.v.manifest.Load().links(s.timeline, s.through), folds: folds, owner: s.v.opts.Cache.owner(),
	}
	s.chain.Store(c)
	return c
}

func (s *State) current() *stateChain {
	c := s.chain.Load()
	if folds := s.v.folds.Load(); c.folds != folds {
		return s.refresh(folds)
	}
	return c
}

// ReadAt fills p with the content of a disk from off on; any alignment. Errors
// wrap dr.ErrNotFound, dr.ErrInvalid (beyond the disk) or dr.ErrCorrupt.
func (s *State) ReadAt(p []byte, disk dr.DiskID, off int64) error {
	img := s.v.image(disk)
	if img == nil {
		return fmt.Errorf("read disk %d: %w", disk, dr.ErrNotFound)
	}
	if off < 0 || off+int64(len(p)) > img.disk.Size {
		return fmt.Errorf("read disk %d at [%d,%d): beyond its end %d: %w", disk, off, off+int64(len(p)), img.disk.Size, dr.ErrInvalid)
	}
	for {
		c := s.current()
		err := s.readAt(c, img, p, off)
		// A segment that a fold removed since it was looked up: what it held is in the base now.
		if errors.Is(err, fs.ErrNotExist) && s.v.folds.Load() != c.folds {
			continue
		}
		return err
	}
}

func (s *State) readAt(c *stateChain, img *image, p []byte, off int64) (err error) {
	finder := chunkFinder{s: s, chain: c, disk: img.disk.ID}
	defer func() { err = errors.Join(err, finder.close()) }()
	for len(p) > 0 {
		n := off / chunkSize
		pieces, err := finder.find(n)
		if err != nil {
			return err
		}
		at := uint32(off - n*chunkSize)
		i, _ := slices.BinarySearchFunc(pieces, at, func(x piece, at uint32) int {
			if x.end <= at {
				return -1
			}
			return 1
		})
		for ; i < len(pieces) && len(p) > 0; i++ {
			part := p[:min(int64(len(p)), int64(pieces[i].end-at))]
			if err := s.readPiece(img, &pieces[i], part, at, off); err != nil {
				return err
			}
			p, off, at = p[len(part):], off+int64(len(part)), at+uint32(len(part))
		}
	}
	return nil
}

// readPiece fills part from a piece, at byte at of the chunk, off of the disk.
func (s *State) readPiece(img *image, x *piece, part []byte, at uint32, off int64) error {
	switch x.kind {
	case inZero:
		clear(part)
		return nil
	case inBase:
		if err := readFull(img.file, part, off); err != nil {
			return fmt.Errorf("read image of disk %d at %d: %w", img.disk.ID, off, err)
		}
		return nil
	}
	seg, err := s.v.segs.acquire(x.segment)
	if err != nil {
		return err
	}
	defer s.v.segs.release(seg)
	return seg.readAt(s.v.opts.Cache, part, x.frame, int64(x.raw+at-x.start))
}

// Map tells which parts of [off, off+n) of a disk surely read as zeroes and
// which may not, in order, until yield returns false. Neighbours of one kind are joined.
func (s *State) Map(disk dr.DiskID, off, n int64, yield func(off, n int64, zero bool) bool) error {
	img := s.v.image(disk)
	if img == nil {
		return fmt.Errorf("map disk %d: %w", disk, dr.ErrNotFound)
	}
	if off < 0 || n < 0 || off+n > img.disk.Size {
		return fmt.Errorf("map disk %d at [%d,%d): beyond its end %d: %w", disk, off, off+n, img.disk.Size, dr.ErrInvalid)
	}
	j := joiner{yield: yield, off: off, end: off}
	err := s.mapRange(img, off, off+n, &j)
	if err == nil {
		j.flush()
	}
	return err
}

func (s *State) mapRange(img *image, off, end int64, j *joiner) (err error) {
	finder := chunkFinder{s: s, chain: s.current(), disk: img.disk.ID}
	defer func() { err = errors.Join(err, finder.close()) }()
	for off < end && !j.done {
		n := off / chunkSize
		pieces, err := finder.find(n)
		if err != nil {
			return err
		}
		if len(pieces) == 1 && pieces[0].kind == inBase {
			// Nothing but base up to the next key; skip what lies between at once.
			until := n + 1
			if finder.l != nil {
				until = finder.l.quietUntil(n)
			}
			off = j.base(img, off, min(end, until*chunkSize))
			continue
		}
		for i := range pieces {
			x := &pieces[i]
			from, to := max(off, n*chunkSize+int64(x.start)), min(end, n*chunkSize+int64(x.end))
			switch {
			case from >= to:
			case x.kind == inBase:
				j.base(img, from, to)
			default:
				j.add(to, x.kind == inZero)
			}
		}
		off = min(end, (n+1)*chunkSize)
	}
	return nil
}

// joiner joins neighbouring ranges of one kind.
type joiner struct {
	yield    func(off, n int64, zero bool) bool
	off, end int64 // what is collected
	zero     bool
	done     bool // yield wants no more
}

// add says that what follows up to end is zero or not.
func (j *joiner) add(end int64, zero bool) {
	if j.zero != zero {
		j.flush()
	}
	j.end, j.zero = end, zero
}

func (j *joiner) flush() {
	if !j.done && j.off < j.end {
		j.done = !j.yield(j.off, j.end-j.off, j.zero)
	}
	j.off = j.end
}

// base adds a range of the image and returns its end.
func (j *joiner) base(img *image, off, end int64) int64 {
	for off < end && !j.done {
		zero, until := img.hole(off, end)
		j.add(until, zero)
		off = until
	}
	return off
}

// chunkFinder finds chunks in the cache or the index during one read.
type chunkFinder struct {
	s       *State
	chain   *stateChain
	disk    dr.DiskID
	l       *lookup // made when the cache has not all
	changes uint64  // of the state when l was made
}

func (f *chunkFinder) find(n int64) ([]piece, error) {
	k := cacheKey{owner: f.chain.owner, at: uint64(f.disk)<<48 | uint64(n), kind: cachedChunk}
	cache := f.s.v.opts.Cache
	if v, ok := cache.get(k); ok {
		return v.([]piece), nil
	}
	if f.l == nil {
		f.s.mu.Lock()
		f.changes = f.s.mu.changes
		f.s.mu.Unlock()
		var err error
		if f.l, err = newLookup(f.s.v.index, f.chain.links, f.disk); err != nil {
			return nil, err
		}
	}
	pieces, err := f.l.chunk(n)
	if err != nil {
		return nil, err
	}
	pieces = slices.Clip(pieces)
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if f.changes == f.s.mu.changes { // else it may be stale already
		cache.put(k, pieces, int64(cap(pieces))*56)
	}
	return pieces, nil
}

func (f *chunkFinder) close() error {
	if f.l == nil {
		return nil
	}
	return f.l.close()
}

// changed makes a state of a branch forget what it knows of extents that were
// written since. It is called after they entered the index.
func (s *State) changed(all []dr.Extent) {
	owner := s.current().owner
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.changes++
	for _, x := range all {
		if x.Length/chunkSize > 1<<10 {
			s.refresh(s.v.folds.Load()) // all chunks at once
			return
		}
		for n := x.Offset / chunkSize; n*chunkSize < x.End(); n++ {
			s.v.opts.Cache.drop(cacheKey{owner: owner, at: uint64(x.Disk)<<48 | uint64(n), kind: cachedChunk})
		}
	}
}

// everything is the position behind all changes of a timeline.
const everything = dr.Seq(math.MaxUint64)
