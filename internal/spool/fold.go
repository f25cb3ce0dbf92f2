package spool

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

// FoldOptions say what is folded.
type FoldOptions struct {
	Compression frame.Compression // of what is made
	MaxBytes    int64             // of the segments of one run; 0 means 512 MiB
	FrameData   int               // bytes of data in each merged frame, about; 0 means as much as fits
	Worth       float64           // an epoch is made only if at most this share of the data is left; 0 means 0.9
}

const (
	defaultFoldBytes = 512 << 20
	defaultWorth     = 0.9
	foldTemp         = "fold.new" // no name of a segment
)

// Folded says what a Fold did.
type Folded struct {
	Frames, Epochs  int   // frames merged, and the epochs that they became
	Before, After   int64 // bytes of the run's segments, zero if nothing was folded
	Data, DataAfter int64 // bytes of the data in the merged frames, decoded
}

// run is a run of segments that is being folded.
type run struct {
	parts []*part
	start frame.Cursor
	end   dr.Seq
	size  int64 // bytes
	era   int
}

// Fold replaces segments that no reader has come to yet by one in which frames are
// merged to epochs. It begins a fresh segment first, see Cut. A reader that
// comes to the run meanwhile waits. When there is nothing worth folding, Folded is zero. After an
// error the spool holds what it held.
func (s *Spool) Fold(ctx context.Context, o FoldOptions) (Folded, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultFoldBytes
	}
	if o.Worth == 0 {
		o.Worth = defaultWorth
	}
	s.folding.Lock()
	defer s.folding.Unlock()
	if err := s.tidy(); err != nil {
		return Folded{}, fmt.Errorf("fold spool: %w", err)
	}
	if err := s.Cut(); err != nil {
		return Folded{}, fmt.Errorf("fold spool: %w", err)
	}
	r := s.claim(o.MaxBytes)
	if r == nil {
		return Folded{}, nil
	}
	defer s.unclaim()
	if !s.opts.Budget.allowsFold(s, r.size) {
		return Folded{}, nil
	}
	done, next, err := s.merge(ctx, r, o)
	if err == nil && next != nil {
		err = s.replace(r, next)
		done.After = next.size
	}
	if err != nil {
		return Folded{}, fmt.Errorf("fold spool: %w", err)
	}
	return done, nil
}

// Cut begins a fresh segment, unless the active one is empty; if something is just
// being appended, or waits for room, the next Append does so.
func (s *Spool) Cut() error {
	s.mu.Lock()
	s.mu.cut = true
	s.mu.Unlock()
	if !s.appending.TryLock() {
		return nil
	}
	defer s.appending.Unlock()
	s.mu.Lock()
	w, broken, closed := s.mu.writer, s.mu.broken, s.mu.closed
	s.mu.cut = false
	s.mu.Unlock()
	switch {
	case broken:
		return errBroken
	case w == nil, closed, w.Reader().Start() == w.Reader().End():
		return nil
	}
	_, err := s.roll(w)
	return err
}

// claim chooses the run: sealed segments that nobody has been shown anything of. One
// that was folded before is taken again only if much has been added to it, so that the work
// stays in proportion to what arrives.
func (s *Spool) claim(limit int64) *run {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || s.mu.broken || !s.mu.met {
		return nil
	}
	all := s.unshownLocked()
	if len(all) > 1 && all[0].folded {
		fresh := int64(0)
		for _, p := range all[1:] {
			fresh += p.size
		}
		if fresh < all[0].size/2 {
			all = all[1:]
		}
	}
	n, size := 0, int64(0)
	for n < len(all) && (n == 0 || size+all[n].size <= limit) {
		size += all[n].size
		n++
	}
	if n == 0 || n == 1 && all[0].folded {
		return nil
	}
	r := &run{parts: all[:n:n], start: all[0].reader.Start(), end: all[n-1].reader.End().Position.Seq, size: size, era: s.mu.era}
	s.mu.fold = r
	return r
}

// unshownLocked returns the sealed segments of which no reader was shown
// anything and that hold frames.
func (s *Spool) unshownLocked() []*part {
	sealed := s.mu.parts
	if s.mu.writer != nil {
		sealed = sealed[:len(sealed)-1]
	}
	for len(sealed) > 0 {
		if p := sealed[0].reader; p.Start().Position.Seq >= s.mu.shown && p.Start() != p.End() {
			return sealed
		}
		sealed = sealed[1:]
	}
	return nil
}

func (s *Spool) unclaim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fold = nil
	s.notifyLocked()
}

// merge writes the run into a segment of its own; there is none if nothing in it
// was worth it.
func (s *Spool) merge(ctx context.Context, r *run, o FoldOptions) (Folded, *part, error) {
	m := merger{ctx: ctx, o: o, parts: r.parts}
	for i, p := range r.parts {
		m.done.Before += p.size
		for j := range p.reader.Entries() {
			m.at = append(m.at, place{i, j})
		}
	}
	if worth, err := m.survey(); err != nil || !worth {
		return Folded{}, nil, err
	}
	if err := s.removeTemp(); err != nil {
		return Folded{}, nil, err
	}
	w, err := segment.CreateAs(s.fs, s.dir, foldTemp, r.start)
	if err != nil {
		return Folded{}, nil, err
	}
	m.w = w
	if err = m.write(); err == nil {
		err = w.Seal()
	}
	size := w.Size()
	if err = errors.Join(err, w.Close()); err != nil {
		return Folded{}, nil, errors.Join(err, w.Reader().Close(), s.removeTemp())
	}
	return m.done, &part{name: r.parts[0].name, reader: w.Reader(), size: size, folded: true}, nil
}

func (s *Spool) removeTemp() error {
	err := s.fs.Remove(path.Join(s.dir, foldTemp))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// replace puts the folded segment in the place of the run.
func (s *Spool) replace(r *run, next *part) error {
	err := s.replaceRun(r, next)
	if err != nil {
		return errors.Join(err, next.reader.Close(), s.removeTemp())
	}
	return s.tidy()
}

func (s *Spool) replaceRun(r *run, next *part) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := 0
	for i < len(s.mu.parts) && s.mu.parts[i] != r.parts[0] {
		i++
	}
	if s.mu.era != r.era || s.mu.closed || i == len(s.mu.parts) {
		return fmt.Errorf("the spool started over meanwhile: %w", dr.ErrUnavailable)
	}
	if err := next.reader.Moved(next.name); err != nil {
		return err
	}
	// From here on the old files are of no use, whatever fails: the name of the first leads to the new one.
	if err := s.fs.Rename(path.Join(s.dir, foldTemp), path.Join(s.dir, next.name)); err != nil {
		return err
	}
	for k, p := range r.parts {
		_ = p.reader.Close() // it only read
		if k > 0 {
			s.mu.stale = append(s.mu.stale, p.name)
		}
	}
	s.mu.untidy = true
	s.mu.parts = append(append(s.mu.parts[:i:i], next), s.mu.parts[i+len(r.parts):]...)
	return nil
}

// tidy makes a replacement durable and then removes what it replaced. Until it
// has succeeded nothing may be trimmed.
func (s *Spool) tidy() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tidyLocked()
}

func (s *Spool) tidyLocked() error {
	if !s.mu.untidy {
		return nil
	}
	if err := s.fs.SyncDir(s.dir); err != nil {
		return err
	}
	for len(s.mu.stale) > 0 {
		err := s.fs.Remove(path.Join(s.dir, s.mu.stale[0]))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s.mu.stale = s.mu.stale[1:]
	}
	if err := s.fs.SyncDir(s.dir); err != nil {
		return err
	}
	s.mu.untidy = false
	s.notifyLocked()
	return nil
}

// place is a frame of a run: segment and index of its entry.
type place struct{ part, entry int }

// merger writes a run of frames anew.
type merger struct {
	ctx   context.Context
	o     FoldOptions
	parts []*part
	at    []place
	w     *segment.Writer
	done  Folded
	plan  []int // lengths of the groups: n > 0 frames to merge, n < 0 to copy
}

// survey goes over the tables and plans which frames become an epoch; it
// reports whether any do.
func (m *merger) survey() (worth bool, err error) {
	for k := 0; k < len(m.at); {
		_, n, ok, err := m.group(k)
		if err != nil {
			return false, err
		}
		if !ok {
			m.plan = append(m.plan, -n)
		} else {
			m.plan = append(m.plan, n)
			worth = true
		}
		k += n
	}
	return worth, nil
}

// group plans the epoch that begins at frame k. If ok is false its n frames are
// to be copied as they are.
func (m *merger) group(k int) (x *frame.Folding, n int, ok bool, err error) {
	x = frame.NewFolding()
	if m.o.FrameData > 0 {
		x.LimitData(m.o.FrameData)
	}
	data := []int64{0}
	for i := k; i < len(m.at); i++ {
		if err := m.ctx.Err(); err != nil {
			return nil, 0, false, err
		}
		f, err := m.parts[m.at[i].part].reader.Tables(m.entry(i).Off)
		if err != nil {
			return nil, 0, false, err
		}
		if !x.Add(f) {
			break
		}
		data = append(data, data[len(data)-1]+int64(f.RawLen))
	}
	if x.Frames() < 2 {
		return x, 1, false, nil
	}
	n, left := x.Plan()
	ok = n > 1 && float64(left) <= m.o.Worth*float64(data[n])
	if ok && m.w != nil {
		m.done.Frames += n
		m.done.Epochs++
		m.done.Data += data[n]
		m.done.DataAfter += left
	}
	return x, n, ok, nil
}

func (m *merger) entry(i int) segment.Entry {
	return m.parts[m.at[i].part].reader.Entries()[m.at[i].entry]
}

func (m *merger) frame(i int) (*frame.Frame, error) {
	return m.parts[m.at[i].part].reader.Frame(m.entry(i).Off)
}

// write follows the plan.
func (m *merger) write() error {
	k := 0
	for _, n := range m.plan {
		var err error
		if n < 0 {
			n = -n
			err = m.copy(k, n)
		} else {
			err = m.epoch(k, n)
		}
		if err != nil {
			return err
		}
		k += n
	}
	return nil
}

func (m *merger) copy(k, n int) error {
	for i := k; i < k+n; i++ {
		if err := m.ctx.Err(); err != nil {
			return err
		}
		f, err := m.frame(i)
		if err == nil {
			_, err = m.w.Append(f)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *merger) epoch(k, n int) error {
	x, again, _, err := m.group(k)
	if err != nil {
		return err
	}
	if again != n {
		return fmt.Errorf("planned %d frames, then %d: %w", n, again, dr.ErrCorrupt)
	}
	for i := range n {
		if err := m.ctx.Err(); err != nil {
			return err
		}
		var f *frame.Frame
		if x.Needs(i) {
			if f, err = m.frame(k + i); err != nil {
				return err
			}
		}
		b, err := x.Merge(f, m.o.Compression)
		if err = errors.Join(err, m.put(b)); err != nil {
			return err
		}
	}
	b, err := x.Finish(m.o.Compression)
	return errors.Join(err, m.put(b))
}

func (m *merger) put(b []byte) error {
	if b == nil {
		return nil
	}
	f, err := frame.Parse(b)
	if err == nil {
		_, err = m.w.Append(f)
	}
	return err
}
