package spool

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

func (s *Spool) load() error {
	names, err := s.segments()
	if err != nil {
		return err
	}
	if err := s.removeTemp(); err != nil {
		return err
	}
	for i, name := range names {
		if done, err := s.replaced(name); err != nil {
			return err
		} else if done {
			continue
		}
		if err := s.loadSegment(name, i == len(names)-1); err != nil {
			return err
		}
	}
	for i, p := range s.mu.parts[min(1, len(s.mu.parts)):] {
		if before := s.mu.parts[i].reader.End(); before != p.reader.Start() {
			return fmt.Errorf("segment %s does not continue the one before, which ends at %v: %w", p.name, before.Position, dr.ErrCorrupt)
		}
	}
	if err := s.tidyLocked(); err != nil {
		return err
	}
	if n := len(s.mu.parts); n > 0 {
		s.mu.synced = s.mu.parts[n-1].reader.End()
		// What lay before the first segment was dropped because the far side has it.
		start := s.mu.parts[0].reader.Start()
		s.mu.durable, s.mu.durableTime = start.Position.Seq, start.Time
	}
	return nil
}

// replaced reports whether a segment is one of those that the one before it was
// folded from, and notes that it is to be removed.
func (s *Spool) replaced(name string) (bool, error) {
	n := len(s.mu.parts)
	if n == 0 || !s.mu.parts[n-1].folded {
		return false, nil
	}
	end := s.mu.parts[n-1].reader.End().Position
	if tl, first, _ := segment.ParseName(name); tl != end.Timeline || first > end.Seq {
		return false, nil
	}
	r, err := segment.Open(s.fs, s.dir, name)
	if err != nil {
		return false, err
	}
	if err := r.Close(); err != nil {
		return false, err
	}
	if !r.Sealed() || r.End().Position.Seq > end.Seq {
		return false, fmt.Errorf("segment %s overlaps the one before, which ends at %v: %w", name, end, dr.ErrCorrupt)
	}
	s.mu.stale, s.mu.untidy = append(s.mu.stale, name), true
	return true, nil
}

func (s *Spool) loadSegment(name string, last bool) error {
	r, err := segment.Open(s.fs, s.dir, name)
	if err != nil && last && errors.Is(err, dr.ErrCorrupt) {
		return s.restart(name, err)
	}
	if err != nil {
		return err
	}
	if r.Sealed() {
		info, err := s.fs.Stat(path.Join(s.dir, name))
		s.mu.parts = append(s.mu.parts, &part{name, r, info.Size, hasFolded(r)})
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

// hasFolded reports whether a segment was made by Fold.
func hasFolded(r *segment.Reader) bool {
	return slices.ContainsFunc(r.Entries(), func(e segment.Entry) bool { return e.Folded })
}

// restart replaces the last segment, without a valid header, by a fresh one,
// if a crash while it was made explains that: it is used only once its header is durable.
func (s *Spool) restart(name string, damage error) error {
	full := path.Join(s.dir, name)
	info, err := s.fs.Stat(full)
	if err != nil {
		return err
	}
	if info.Size >= frame.HeaderSize {
		return damage // it may have held frames
	}
	if err := s.fs.Remove(full); err != nil {
		return err
	}
	if len(s.mu.parts) == 0 {
		return nil // the spool has no beginning yet
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

// segments returns the names of all segments, oldest first.
func (s *Spool) segments() ([]string, error) {
	names, err := s.fs.List(s.dir)
	return slices.DeleteFunc(names, func(name string) bool {
		_, _, err := segment.ParseName(name)
		return err != nil
	}), err
}
