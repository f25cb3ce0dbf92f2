package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"sync"
	"sync/atomic"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// Options tune a vault. The zero value is good.
type Options struct {
	// SegmentSize is the size in bytes at which a segment is sealed; 0 is DefaultSegmentSize.
	SegmentSize int64
	// SegmentSpan is the time in ns between the first and the last change of a segment at which it is
	// sealed; 0 is DefaultSegmentSpan. Only sealed segments are folded.
	SegmentSpan int64
	// TrustChain leaves out the proof, on arrival, that each frame follows the hash chain. Checksums are
	// verified in any case.
	TrustChain bool
	// Cache is shared with other vaults; nil makes one of DefaultCacheBytes for this vault alone.
	Cache *Cache
}

// Defaults of Options.
const (
	DefaultSegmentSize = 128 << 20
	DefaultSegmentSpan = int64(10 * 60 * 1e9)
)

// Vault is the kept past of one machine. Open and Create make it, Close ends it.
type Vault struct {
	fs       vfs.FS
	dir      string
	opts     Options
	ownCache bool
	lock     io.Closer
	index    *index
	segs     *segments
	lost     []error // that Open found; see Lost

	images     atomic.Pointer[map[dr.DiskID]*image] // replaced as a whole
	manifest   atomic.Pointer[manifest]
	manifestMu sync.Mutex    // serialises changes of the manifest
	folding    sync.Mutex    // one fold at a time
	folds      atomic.Uint64 // rises whenever what reads know of segments may be stale

	mu struct {
		sync.Mutex
		logs     map[dr.Timeline]*Log
		pins     map[*State]dr.Seq // on the base timeline: the horizon stays at or before
		outgrown []*image          // of disks that have grown since, to be closed in the end
	}
}

// Create makes an empty vault at dir, which must not hold one yet. Errors wrap
// dr.ErrExists or dr.ErrInvalid.
func Create(fsys vfs.FS, dir string, machine dr.MachineID, disks []dr.Disk, opts Options) (*Vault, error) {
	if machine.IsZero() {
		return nil, fmt.Errorf("create vault: no machine: %w", dr.ErrInvalid)
	}
	if _, err := loadManifest(fsys, dir); !errors.Is(err, dr.ErrNotFound) {
		return nil, errors.Join(fmt.Errorf("create vault at %s: %w", dir, dr.ErrExists), err)
	}
	m := &manifest{
		Machine: machine, Current: firstTimeline, Next: firstTimeline + 1, BaseTimeline: firstTimeline,
		Timelines: []timelineInfo{{ID: firstTimeline}},
	}
	for _, d := range []string{"", baseDir, logDir, branchDir} {
		if err := fsys.MkdirAll(path.Join(dir, d)); err != nil {
			return nil, fmt.Errorf("create vault: %w", err)
		}
	}
	if err := errors.Join(fsys.SyncDir(dir), fsys.SyncDir(path.Dir(dir)), storeManifest(fsys, dir, m)); err != nil {
		return nil, fmt.Errorf("create vault: %w", err)
	}
	v, err := Open(context.Background(), fsys, dir, opts)
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		if err := v.AddDisk(d); err != nil {
			return nil, errors.Join(err, v.Close())
		}
	}
	return v, nil
}

// Open opens the vault at dir, recovers what a crash left and brings the index
// up to the log, which takes a time only if the index was lost. Errors wrap
// dr.ErrNotFound, dr.ErrCorrupt, dr.ErrVersion, or what the lock says when
// another program has the vault open.
func Open(ctx context.Context, fsys vfs.FS, dir string, opts Options) (*Vault, error) {
	if opts.SegmentSize == 0 {
		opts.SegmentSize = DefaultSegmentSize
	}
	if opts.SegmentSpan == 0 {
		opts.SegmentSpan = DefaultSegmentSpan
	}
	v := &Vault{fs: fsys, dir: dir, opts: opts, ownCache: opts.Cache == nil}
	_, err := loadManifest(fsys, dir)
	if err != nil {
		return nil, fmt.Errorf("open vault: %w", err)
	}
	if v.lock, err = fsys.Lock(path.Join(dir, lockName)); err != nil {
		return nil, fmt.Errorf("open vault %s: %w", dir, err)
	}
	m, err := loadManifest(fsys, dir)
	if err != nil { // again: now nobody changes it
		return nil, errors.Join(fmt.Errorf("open vault: %w", err), v.lock.Close())
	}
	if v.ownCache {
		v.opts.Cache = NewCache(DefaultCacheBytes)
	}
	v.manifest.Store(m)
	v.segs = newSegments(fsys, dir, v.opts.Cache)
	v.mu.logs = map[dr.Timeline]*Log{}
	v.images.Store(&map[dr.DiskID]*image{})
	v.mu.pins = map[*State]dr.Seq{}
	if err := v.recover(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open vault %s: %w", dir, err), v.Close())
	}
	return v, nil
}

// recover brings everything to what the manifest says.
func (v *Vault) recover(ctx context.Context) error {
	m := v.manifest.Load()
	for _, d := range m.Disks {
		if err := v.openImage(d); err != nil {
			return err
		}
	}
	if err := v.removeStray(m); err != nil {
		return err
	}
	var err error
	if v.index, err = openIndex(v.fs, indexPath(v.dir), v.opts.Cache); err != nil {
		return err
	}
	for _, tl := range v.index.timelines() {
		if _, ok := m.timeline(tl); !ok { // a branch was being discarded
			if err := v.index.removeTimeline(tl); err != nil {
				return err
			}
		}
	}
	for _, t := range m.Timelines {
		l, err := openLog(ctx, v, t)
		if err != nil {
			return err
		}
		v.mu.logs[t.ID] = l
	}
	return nil
}

// removeStray removes segment files that the manifest doesn't list: nothing in
// them was ever acknowledged, or they have been folded or discarded.
func (v *Vault) removeStray(m *manifest) error {
	names, err := v.fs.List(path.Join(v.dir, branchDir))
	if err != nil {
		return fmt.Errorf("list branches: %w", err)
	}
	for _, name := range names {
		known := slices.ContainsFunc(m.Timelines, func(t timelineInfo) bool {
			return segmentDir(t.ID) == path.Join(branchDir, name)
		})
		if !known {
			if err := v.fs.RemoveAll(path.Join(v.dir, branchDir, name)); err != nil {
				return fmt.Errorf("remove discarded branch: %w", err)
			}
		}
	}
	for _, t := range m.Timelines {
		dir := path.Join(v.dir, segmentDir(t.ID))
		if err := v.fs.MkdirAll(dir); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
		names, err := v.fs.List(dir)
		if err != nil {
			return fmt.Errorf("list segments: %w", err)
		}
		listed := m.segments(t.ID)
		for _, name := range names {
			tl, first, err := segment.ParseName(name)
			if err != nil || tl != t.ID || slices.ContainsFunc(listed, func(s segmentInfo) bool { return s.First == first }) {
				continue // listed, or not ours: Check names it
			}
			if err := v.fs.Remove(path.Join(dir, name)); err != nil {
				return fmt.Errorf("remove unlisted segment: %w", err)
			}
		}
	}
	return nil
}

// Close ends the vault. States and Logs must not be used any more.
func (v *Vault) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var errs []error
	for _, l := range v.mu.logs {
		errs = append(errs, l.close())
	}
	errs = append(errs, v.segs.close())
	for _, i := range append(v.mu.outgrown, slices.Collect(maps.Values(*v.images.Load()))...) {
		errs = append(errs, i.close())
	}
	if v.index != nil {
		// Not needed, but the next Open has nothing to index then.
		errs = append(errs, v.index.flush(), v.index.close())
	}
	if v.ownCache {
		v.opts.Cache.Close()
	}
	errs = append(errs, v.lock.Close())
	return errors.Join(errs...)
}

// update replaces the manifest by a changed clone, durably; an error of change
// is returned and changes nothing.
func (v *Vault) update(change func(*manifest) error) error {
	v.manifestMu.Lock()
	defer v.manifestMu.Unlock()
	m := v.manifest.Load().clone()
	if err := change(m); err != nil {
		return err
	}
	if err := storeManifest(v.fs, v.dir, m); err != nil {
		return err
	}
	v.manifest.Store(m)
	return nil
}

// Machine returns whose vault it is.
func (v *Vault) Machine() dr.MachineID { return v.manifest.Load().Machine }

// Disks returns the disks by rising id.
func (v *Vault) Disks() []dr.Disk { return slices.Clone(v.manifest.Load().Disks) }

// AddDisk adds a disk, which is zero at all positions until it is written. A
// disk that is there already may only have grown. Errors wrap dr.ErrInvalid.
func (v *Vault) AddDisk(d dr.Disk) error {
	old, there := v.manifest.Load().disk(d.ID)
	if d.Size <= 0 || d.Size%dr.SectorSize != 0 || len(d.Name) > maxDiskName || d.Size < old.Size {
		return fmt.Errorf("add disk %d of %d bytes (has %d): %w", d.ID, d.Size, old.Size, dr.ErrInvalid)
	}
	if there && old == d {
		return nil
	}
	if err := v.makeImage(d); err != nil {
		return err
	}
	err := v.update(func(m *manifest) error {
		m.Disks = slices.DeleteFunc(m.Disks, func(x dr.Disk) bool { return x.ID == d.ID })
		m.Disks = append(m.Disks, d)
		slices.SortFunc(m.Disks, func(a, b dr.Disk) int { return int(a.ID) - int(b.ID) })
		return nil
	})
	if err != nil {
		return fmt.Errorf("add disk %d: %w", d.ID, err)
	}
	return nil
}

// Timeline returns the timeline on which the machine's stream is received.
func (v *Vault) Timeline() dr.Timeline { return v.manifest.Load().Current }

// Log returns the log of the machine's stream.
func (v *Vault) Log() *Log {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.mu.logs[v.Timeline()]
}

// log returns the log of a timeline, or nil.
func (v *Vault) log(tl dr.Timeline) *Log {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.mu.logs[tl]
}

// Lost tells what had been durable and was gone when the vault was opened. The
// vault is whole without it.
func (v *Vault) Lost() []error { return v.lost }

// Head returns where the durable stream of the machine ends.
func (v *Vault) Head() frame.Cursor { return v.Log().Durable() }

// Stats are the sizes of a vault, in bytes.
type Stats struct {
	LogBytes    int64                 // sealed segments of the machine's stream
	BaseBytes   int64                 // that the base images occupy
	IndexBytes  int64                 // that the index occupies
	BranchBytes map[dr.Timeline]int64 // segments of each branch
}

// Stats returns the sizes of the vault.
func (v *Vault) Stats() Stats {
	m := v.manifest.Load()
	s := Stats{BranchBytes: map[dr.Timeline]int64{}, IndexBytes: int64(v.index.db.Metrics().DiskSpaceUsage())}
	for _, seg := range m.Segments {
		if seg.Timeline == m.Current || seg.Timeline == m.BaseTimeline {
			s.LogBytes += seg.Size
		} else {
			s.BranchBytes[seg.Timeline] += seg.Size
		}
	}
	for _, tl := range v.Branches() {
		s.BranchBytes[tl] += v.log(tl).activeBytes()
	}
	s.LogBytes += v.Log().activeBytes()
	for _, i := range *v.images.Load() {
		if a, ok := i.file.(vfs.AllocatedSizer); ok {
			n, err := a.AllocatedBytes()
			if err == nil {
				s.BaseBytes += n
			}
		}
	}
	return s
}
