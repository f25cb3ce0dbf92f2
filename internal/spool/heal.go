package spool

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// heal makes a spool usable again after its disk failed: an fsync, or a step
// from one segment to the next. After a failed fsync nobody knows what the disk has of
// the bytes since the one before, whatever the page cache shows: they are cut off.
// They were neither reported as stored nor shown to a reader.
func (s *Spool) heal() error {
	s.appending.Lock()
	defer s.appending.Unlock()
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || !s.mu.broken {
		return nil
	}
	if err := s.healLocked(); err != nil {
		return fmt.Errorf("heal spool: %w", err)
	}
	s.mu.broken = false
	s.notifyLocked()
	return nil
}

func (s *Spool) healLocked() error {
	n := len(s.mu.parts)
	if n == 0 {
		return nil
	}
	if s.mu.writer == nil { // sealed, and the next one could not be begun
		at := s.mu.parts[n-1].reader.End()
		err := s.fs.Remove(path.Join(s.dir, segment.Name(at)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return s.begin(at)
	}
	p := s.mu.parts[n-1]
	_ = s.mu.writer.Close() // it failed before; what counts is read again
	if err := s.cut(p, s.mu.synced); err != nil {
		return err
	}
	w, err := segment.Recover(s.fs, s.dir, p.name)
	if err != nil {
		return err
	}
	if err := w.Sync(); err != nil {
		return errors.Join(err, w.Close())
	}
	if end := w.Cursor(); end != s.mu.synced {
		return errors.Join(fmt.Errorf("segment %s ends at %v after the cut, not at %v: %w",
			p.name, end.Position, s.mu.synced.Position, dr.ErrCorrupt), w.Close())
	}
	_ = p.reader.Close() // it only read
	p.reader, s.mu.writer = w.Reader(), w
	return nil
}

// cut truncates the segment behind the frame that ends at c.
func (s *Spool) cut(p *part, c frame.Cursor) error {
	f, err := s.fs.OpenFile(path.Join(s.dir, p.name))
	if err != nil {
		return err
	}
	defer f.Close()
	if e, ok := p.reader.Find(c.Position.Seq); ok {
		return f.Truncate(e.Off + e.Len)
	}
	entries := p.reader.Entries()
	if len(entries) == 0 {
		return nil // the header is durable since it was made; Recover cuts what follows it
	}
	return f.Truncate(entries[0].Off)
}
