package spool

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"farside/internal/dr"
	"farside/internal/segment"
)

// Trim says that the far side holds every frame up to durable, and drops the
// segments that only have such frames. When that is all there is and the
// active segment has grown, a fresh one is begun so that the space comes back.
func (s *Spool) Trim(durable dr.Seq) error {
	s.mu.Lock()
	if durable <= s.mu.durable {
		s.mu.Unlock()
		return nil
	}
	s.mu.durable, s.mu.durableTime = durable, s.timeLocked(durable)
	s.notifyLocked() // an Append that waits trims by itself
	s.mu.Unlock()
	if !s.appending.TryLock() {
		return s.dropDurable()
	}
	defer s.appending.Unlock()
	return s.trimAppending()
}

// trimAppending is the work of Trim for whoever holds appending.
func (s *Spool) trimAppending() error {
	return s.trimWhen(s.opts.SegmentSize / 2)
}

// trimWhen begins a fresh segment if all is durable and the active one has at
// least so many bytes, and drops what is durable.
func (s *Spool) trimWhen(size int64) error {
	if w := s.worthRolling(size); w != nil {
		if _, err := s.roll(w); err != nil {
			return fmt.Errorf("trim spool: %w", err)
		}
	}
	return s.dropDurable()
}

// worthRolling returns the active segment if all its frames are durable on the
// far side and it has so many bytes.
func (s *Spool) worthRolling(size int64) *segment.Writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.mu.writer
	if w == nil || s.mu.broken || w.Size() < size || w.Reader().End().Position.Seq > s.mu.durable || w.Reader().Start() == w.Reader().End() {
		return nil
	}
	return w
}

// dropDurable drops the oldest segments that the far side has.
func (s *Spool) dropDurable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.tidyLocked(); err != nil { // else a crash could leave what was replaced without what replaces it
		return fmt.Errorf("trim spool: %w", err)
	}
	dropped := false
	for len(s.mu.parts) > 1 && s.mu.parts[0].reader.End().Position.Seq <= s.mu.durable {
		p := s.mu.parts[0]
		err := s.fs.Remove(path.Join(s.dir, p.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("trim spool: %w", err)
		}
		_ = p.reader.Close() // it only read
		s.mu.parts = s.mu.parts[1:]
		dropped = true
		s.notifyLocked()
	}
	if dropped {
		if err := s.fs.SyncDir(s.dir); err != nil {
			return fmt.Errorf("trim spool: %w", err)
		}
	}
	return nil
}
