package spool

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// Append adds frames behind the last; they are durable after the next Sync. It
// waits while the spool is full, until Trim makes room or ctx ends. Errors of
// frame.Check mean that the frames do not continue the spool.
func (s *Spool) Append(ctx context.Context, frames []*frame.Frame) error {
	s.appending.Lock()
	defer s.appending.Unlock()
	for _, f := range frames {
		if err := s.waitRoom(ctx, f.Size()); err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
		w, err := s.active()
		if err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
		if _, err := w.Append(f); err != nil {
			return fmt.Errorf("append to spool: %w", err)
		}
	}
	return nil
}

// waitRoom waits until n more bytes fit. A spool that holds nothing that the
// far side lacks takes any frame.
func (s *Spool) waitRoom(ctx context.Context, n int64) error {
	for {
		if err := s.trimAppending(); err != nil {
			return err
		}
		bound, changed, err := s.room(n)
		if err != nil || bound == NoBound {
			return err
		}
		// What is to be forwarded must be synced first, or nothing makes room.
		if err := s.sync(); err != nil {
			return err
		}
		if s.worthRolling(0) != nil {
			if err := s.trimWhen(0); err != nil {
				return err
			}
			continue
		}
		if err := s.await(ctx, bound, changed); err != nil {
			return err
		}
	}
}

// room reports what keeps n more bytes out, and the channel that tells of changes.
func (s *Spool) room(n int64) (Bound, <-chan struct{}, error) {
	s.mu.Lock()
	empty := s.emptyLocked()
	own := s.opts.Limit == 0 || s.bytesLocked()+n <= s.opts.Limit || empty
	changed, closed, broken := s.mu.changed, s.mu.closed, s.mu.broken
	s.mu.Unlock()
	bound := OwnLimit
	if own {
		bound = s.opts.Budget.allows(s, n, empty)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.waiting = NoBound
	switch {
	case closed:
		return bound, nil, fmt.Errorf("spool is closed: %w", dr.ErrInvalid)
	case broken:
		return bound, nil, errBroken
	}
	s.mu.waiting = bound
	return bound, changed, nil
}

// await waits for a change, or a little: a bound that is shared goes without one.
func (s *Spool) await(ctx context.Context, bound Bound, changed <-chan struct{}) error {
	var poll <-chan time.Time
	if bound != OwnLimit {
		t := time.NewTimer(budgetPoll)
		defer t.Stop()
		poll = t.C
	}
	select {
	case <-changed:
	case <-poll:
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.waiting = NoBound
		return fmt.Errorf("%w: %w", dr.ErrFull, context.Cause(ctx))
	}
	return nil
}

func (s *Spool) emptyLocked() bool {
	n := len(s.mu.parts)
	return n == 0 || s.mu.parts[0].reader.Start() == s.mu.parts[n-1].reader.End()
}

// active returns the segment to append to, after sealing a full one.
func (s *Spool) active() (*segment.Writer, error) {
	s.mu.Lock()
	w, none, broken := s.mu.writer, len(s.mu.parts) == 0, s.mu.broken
	cut := s.mu.cut
	s.mu.cut = false
	s.mu.Unlock()
	switch {
	case none:
		return nil, fmt.Errorf("spool has no beginning yet: %w", dr.ErrInvalid)
	case broken:
		return nil, errBroken
	case w.Size() < s.opts.SegmentSize && (!cut || w.Reader().Start() == w.Reader().End()):
		return w, nil
	}
	return s.roll(w)
}

// errBroken is the error of whoever still appends to what heal will take back.
var errBroken = fmt.Errorf("spool must sync first, after a failure of its disk: %w", dr.ErrUnavailable)

// roll seals the active segment and begins the next.
func (s *Spool) roll(w *segment.Writer) (*segment.Writer, error) {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	next, err := s.rollSyncing(w)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.broken = true
	}
	return next, err
}

func (s *Spool) rollSyncing(w *segment.Writer) (*segment.Writer, error) {
	if err := w.Seal(); err != nil {
		return nil, err
	}
	end := w.Cursor()
	info, err := s.fs.Stat(path.Join(s.dir, s.lastPart().name))
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.parts[len(s.mu.parts)-1].size = info.Size
	s.mu.writer, s.mu.synced = nil, end
	s.notifyLocked()
	if err := s.begin(end); err != nil {
		return nil, err
	}
	return s.mu.writer, nil
}

func (s *Spool) lastPart() *part {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.parts[len(s.mu.parts)-1]
}

// Sync makes durable what was appended before the call, and shows it to
// readers. After a failure of the disk it heals the spool instead, and what was appended since
// the last Sync is gone: see Cursor.
func (s *Spool) Sync() error {
	s.mu.Lock()
	broken := s.mu.broken
	s.mu.Unlock()
	work := s.sync
	if broken {
		work = s.heal
	}
	if err := work(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteLocked()
	return nil
}

func (s *Spool) sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	w, broken := s.mu.writer, s.mu.broken
	s.mu.Unlock()
	switch {
	case broken:
		return errBroken
	case w == nil:
		return nil
	}
	end := w.Reader().End() // before the fsync, so that it covers no later frame
	err := w.Sync()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		s.mu.broken = true
		s.notifyLocked()
		return fmt.Errorf("sync spool: %w", err)
	case s.mu.synced != end:
		s.mu.synced = end
		s.notifyLocked()
	}
	return nil
}
