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
	for i, name := range names {
		if err := s.loadSegment(name, i == len(names)-1); err != nil {
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
		// What lay before the first segment was dropped because the far side has it.
		start := s.mu.parts[0].reader.Start()
		s.mu.durable, s.mu.durableTime = start.Position.Seq, start.Time
	}
	return nil
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
