package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"

	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/frame"
	"farside/internal/segment"
	"farside/internal/vfs"
)

// Finding is one thing that is wrong with a vault.
type Finding struct {
	File   string `json:"file"`   // within the vault's directory
	Offset int64  `json:"offset"` // bytes; -1: the file as a whole
	Text   string `json:"text"`
}

// String returns "file: text" or "file at offset: text".
func (f Finding) String() string {
	if f.Offset < 0 {
		return fmt.Sprintf("%s: %s", f.File, f.Text)
	}
	return fmt.Sprintf("%s at %d: %s", f.File, f.Offset, f.Text)
}

// Report is what Check found.
type Report struct {
	Machine  dr.MachineID `json:"machine"`
	Findings []Finding    `json:"findings"` // nil: the vault is whole
	Segments int          `json:"segments"`
	Frames   int          `json:"frames"`
	Keys     int          `json:"keys"`  // of the index
	Bytes    int64        `json:"bytes"` // read and proven
}

// Check proves the vault at dir, which nobody may have open: every file is
// listed and there, every frame whole, continuous and in the hash chain, every
// change in the index and nothing else, every block of the base images as it was
// folded. It changes nothing. progress, if not nil, is called with the bytes of
// segments and images checked and those to check. The error says why the
// vault could not be checked; what is wrong with it is in the report.
//
// The index is derived: it is judged by what it answers, and a finding in it is
// mended by removing it.
func Check(ctx context.Context, fsys vfs.FS, dir string, progress func(done, total int64)) (*Report, error) {
	if progress == nil {
		progress = func(_, _ int64) {}
	}
	c := &checker{fs: fsys, dir: dir, progress: progress, ends: map[dr.Timeline]frame.Cursor{}}
	m, err := loadManifest(fsys, dir)
	switch {
	case errors.Is(err, dr.ErrCorrupt), errors.Is(err, dr.ErrVersion):
		c.find(manifestName, -1, err) // without it nothing else can be said
		return &c.report, nil
	case err != nil:
		return nil, fmt.Errorf("check vault: %w", err)
	}
	lock, err := fsys.Lock(path.Join(dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("check vault %s: %w", dir, err)
	}
	defer lock.Close()
	c.m, c.report.Machine = m, m.Machine
	if err := c.run(ctx); err != nil {
		return nil, fmt.Errorf("check vault %s: %w", dir, err)
	}
	return &c.report, nil
}

type checker struct {
	fs       vfs.FS
	dir      string
	m        *manifest
	report   Report
	progress func(done, total int64)
	total    int64
	ends     map[dr.Timeline]frame.Cursor // where each log was found to end
	whole    []segmentKey                 // segments without a finding
}

func (c *checker) find(file string, off int64, err error) {
	c.report.Findings = append(c.report.Findings, Finding{file, off, err.Error()})
}

func (c *checker) done(n int64) {
	c.report.Bytes += n
	c.progress(min(c.report.Bytes, c.total), c.total)
}

func (c *checker) run(ctx context.Context) error {
	if err := c.files(); err != nil {
		return err
	}
	for _, s := range c.m.Segments {
		if info, err := c.fs.Stat(path.Join(c.dir, segmentPath(s.key()))); err == nil {
			c.total += info.Size
		}
	}
	for _, t := range c.m.Timelines {
		if err := c.log(ctx, t); err != nil {
			return err
		}
	}
	if err := c.index(ctx); err != nil {
		return err
	}
	for _, d := range c.m.Disks {
		if err := c.image(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

func segmentPath(k segmentKey) string {
	dir, name := k.file()
	return path.Join(dir, name)
}

// files finds what doesn't belong to the vault.
func (c *checker) files() error {
	known := map[string][]string{
		"":      {lockName, manifestName, manifestTemp, baseDir, logDir, branchDir, indexDir},
		baseDir: nil, logDir: nil, branchDir: nil,
	}
	for _, d := range c.m.Disks {
		known[baseDir] = append(known[baseDir], path.Base(imageName(d.ID)), path.Base(sumsName(d.ID)))
	}
	for _, t := range c.m.Timelines {
		dir := segmentDir(t.ID)
		if t.ID != firstTimeline {
			known[branchDir] = append(known[branchDir], path.Base(dir))
		}
		known[dir] = nil
		for _, s := range c.m.segments(t.ID) {
			known[dir] = append(known[dir], path.Base(segmentPath(s.key())))
		}
	}
	for dir, names := range known {
		there, err := c.fs.List(path.Join(c.dir, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, name := range there {
			if !slices.Contains(names, name) {
				c.find(path.Join(dir, name), -1, errors.New("does not belong to the vault"))
			}
		}
	}
	return nil
}

// log checks the segments of a timeline and that each continues the one before.
func (c *checker) log(ctx context.Context, t timelineInfo) error {
	all := c.m.segments(t.ID)
	at := frame.Cursor{Machine: c.m.Machine, Position: dr.Position{Timeline: t.ID, Seq: t.Fork}, Time: t.ForkTime}
	if t.ID == c.m.BaseTimeline {
		at.Position.Seq, at.Time, at.Chain = c.m.Base, c.m.BaseTime, c.m.BaseChain
	}
	known := t.ID == c.m.BaseTimeline || t.Parent == 0 // a branch continues the chain from within its parent
	for i, s := range all {
		if s.Sealed && t.ID == c.m.BaseTimeline && s.Last <= c.m.Base {
			continue // folded, about to be removed
		}
		c.report.Segments++
		end, err := c.segment(ctx, s, i == len(all)-1)
		if err != nil {
			return err
		}
		if end == nil { // not readable; go on behind it
			at, known = s.end(c.m.Machine), s.Sealed
			continue
		}
		if start := end.start; known && start != at || start.Position != at.Position {
			c.find(segmentPath(s.key()), 0, fmt.Errorf("starts at %v with chain %x, what is before ends at %v with chain %x",
				start.Position, start.Chain[:4], at.Position, at.Chain[:4]))
		}
		at, known = end.end, true
	}
	c.ends[t.ID] = at
	return nil
}

// segmentEnds is where a readable segment starts and ends.
type segmentEnds struct{ start, end frame.Cursor }

// segment checks one segment; nil means that it can't be read.
func (c *checker) segment(ctx context.Context, s segmentInfo, last bool) (*segmentEnds, error) {
	file := segmentPath(s.key())
	dir, name := path.Split(path.Join(c.dir, file))
	r, err := segment.Open(c.fs, dir, name)
	if err != nil {
		return nil, c.judge(file, err)
	}
	defer r.Close()
	before := len(c.report.Findings)
	info, err := c.fs.Stat(path.Join(c.dir, file))
	if err != nil {
		return nil, err
	}
	end := r.End()
	switch {
	case s.Sealed && (!r.Sealed() || info.Size != s.Size):
		c.find(file, -1, fmt.Errorf("has %d bytes (sealed: %v), the manifest says %d, sealed", info.Size, r.Sealed(), s.Size))
	case s.Sealed && end != s.end(c.m.Machine):
		c.find(file, -1, fmt.Errorf("ends at %v with chain %x, the manifest says %d with chain %x",
			end.Position, end.Chain[:4], s.Last, s.Chain[:4]))
	case !s.Sealed && !last:
		c.find(file, -1, errors.New("is not sealed, though others follow"))
	}
	if err := r.Check(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		c.find(file, firstBadFrame(r), err)
	}
	c.report.Frames += len(r.Entries())
	if len(c.report.Findings) == before {
		c.whole = append(c.whole, s.key())
	}
	c.done(info.Size)
	return &segmentEnds{r.Start(), end}, nil
}

// judge makes a finding of an error that speaks of what is stored.
func (c *checker) judge(file string, err error) error {
	for _, kind := range []error{fs.ErrNotExist, io.ErrUnexpectedEOF, dr.ErrCorrupt, dr.ErrVersion, dr.ErrInvalid} {
		if errors.Is(err, kind) {
			c.find(file, -1, err)
			return nil
		}
	}
	return err
}

// firstBadFrame returns the offset of the first frame that is not whole, or
// where the good ones end.
func firstBadFrame(r *segment.Reader) int64 {
	at := r.Start()
	off := int64(-1)
	for _, e := range r.Entries() {
		f, err := r.Frame(e.Off)
		if err != nil || f.Check(at) != nil || f.VerifyChain(at.Chain) != nil {
			return e.Off
		}
		at, off = f.End(), e.Off+e.Len
	}
	return off
}

// image checks the base image of a disk against its checksums.
func (c *checker) image(ctx context.Context, d dr.Disk) error {
	img := &image{disk: d}
	var err error
	for _, x := range []struct {
		file *vfs.File
		name string
		size int64
	}{{&img.file, imageName(d.ID), d.Size}, {&img.sums, sumsName(d.ID), sumsLength(d.Size)}} {
		if *x.file, err = c.fs.Open(path.Join(c.dir, x.name)); err != nil {
			return c.judge(x.name, err)
		}
		defer (*x.file).Close()
		n, err := (*x.file).Size()
		if err != nil {
			return err
		}
		if n != x.size {
			c.find(x.name, -1, fmt.Errorf("has %d bytes instead of %d", n, x.size))
		}
		if n < x.size {
			return nil
		}
	}
	head := make([]byte, sumsHeader)
	if err := readFull(img.sums, head, 0); err != nil {
		return err
	}
	if string(head) != string(sumsHead(d.ID)) {
		c.find(sumsName(d.ID), 0, errors.New("damaged header"))
	}
	skip, err := c.inFlux(d.ID)
	if err != nil {
		return err
	}
	return c.blocks(ctx, img, skip)
}

// blocks compares the blocks that hold data, or have a checksum.
func (c *checker) blocks(ctx context.Context, img *image, skip *extent.Set) error {
	var look extent.Set
	if err := dataRanges(img.file, 0, img.disk.Size, func(from, to int64) { look.Add(from/sumBlock, (to+sumBlock-1)/sumBlock) }); err != nil {
		return err
	}
	if err := dataRanges(img.sums, sumsHeader, sumsLength(img.disk.Size), func(from, to int64) {
		look.Add((from-sumsHeader)/sumSize, (to-sumsHeader+sumSize-1)/sumSize)
	}); err != nil {
		return err
	}
	c.total += look.Bytes() * sumBlock
	buf, word := make([]byte, sumBlock), make([]byte, sumSize)
	for r := range look.All() {
		for n := r.Start; n < r.End; n++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			sum, err := img.sum(n, buf)
			if err == nil {
				err = readFull(img.sums, word, sumsHeader+sumSize*n)
			}
			if err != nil {
				return err
			}
			if le.Uint32(word) != sum && !skip.Contains(n, n+1) {
				c.find(imageName(img.disk.ID), n*sumBlock, fmt.Errorf("block differs from its checksum in %s", sumsName(img.disk.ID)))
			}
			c.done(sumBlock)
		}
	}
	return nil
}

// dataRanges calls fn for the parts of [off, end) that are no holes.
func dataRanges(f vfs.File, off, end int64, fn func(from, to int64)) error {
	for off < end {
		from, to, err := vfs.NextData(f, off)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if from = max(from, off); from < end {
			fn(from, min(to, end))
		}
		off = to
	}
	return nil
}

// inFlux returns the blocks of an image that an unfinished fold may have
// changed.
func (c *checker) inFlux(disk dr.DiskID) (*extent.Set, error) {
	blocks := &extent.Set{}
	if c.m.Horizon == c.m.Base {
		return blocks, nil
	}
	segs := newSegments(c.fs, c.dir, nil)
	defer segs.close()
	for _, s := range c.m.segments(c.m.BaseTimeline) {
		if s.Last <= c.m.Base || s.Last > c.m.Horizon || !slices.Contains(c.whole, s.key()) {
			continue
		}
		err := segs.each(s.key(), func(p placedFrame) error {
			for _, x := range p.frame.All() {
				if x.Disk == disk {
					blocks.Add(x.Offset/sumBlock, (x.End()+sumBlock-1)/sumBlock)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return blocks, nil
}
