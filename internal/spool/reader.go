package spool

import (
	"context"
	"fmt"
	"sort"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/segment"
)

// Reader gives the durable frames of a spool in order, from one position on.
// It belongs to one goroutine.
type Reader struct {
	s    *Spool
	next dr.Seq // first sequence number of the next frame
	era  int

	part *part // that held the last frame
	at   int   // index of the next entry in it
}

// ReadFrom returns a reader whose first frame continues c. The error wraps
// dr.ErrGap when the spool does not hold a frame boundary at c with the same
// chain: the frames before it may be trimmed, or the histories differ.
func (s *Spool) ReadFrom(c frame.Cursor) (*Reader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.mu.parts {
		start, end := p.reader.Start(), p.reader.End()
		if c == start || c == end {
			return s.readerLocked(c), nil
		}
		if c.Position.Timeline != start.Position.Timeline || c.Position.Seq < start.Position.Seq || c.Position.Seq > end.Position.Seq {
			continue
		}
		if e, ok := p.reader.Find(c.Position.Seq); ok && e.Last == c.Position.Seq {
			f, err := p.reader.Tables(e.Off)
			if err != nil {
				return nil, fmt.Errorf("read spool: %w", err)
			}
			if f.End() == c {
				return s.readerLocked(c), nil
			}
		}
	}
	return nil, fmt.Errorf("read spool from %v: %w", c.Position, dr.ErrGap)
}

func (s *Spool) readerLocked(c frame.Cursor) *Reader {
	s.mu.met, s.mu.shown = true, max(s.mu.shown, c.Position.Seq)
	return &Reader{s: s, next: c.Position.Seq + 1, era: s.mu.era}
}

// Next waits for the next durable frame and returns it. The error wraps
// dr.ErrGap when the spool was reset or trimmed past it.
func (r *Reader) Next(ctx context.Context) (*frame.Frame, error) {
	for {
		from, e, changed, err := r.find()
		if err != nil {
			return nil, err
		}
		if from == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		f, err := from.Frame(e.Off)
		if err != nil {
			if r.gone(from) {
				continue // trimmed, reset or healed under our feet: find says which
			}
			return nil, fmt.Errorf("read spool: %w", err)
		}
		r.next = e.Last + 1
		return f, nil
	}
}

// Ready reports whether Next would return at once.
func (r *Reader) Ready() bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.s.mu.closed || r.s.mu.era != r.era || r.next <= r.s.mu.synced.Position.Seq && !r.waitsLocked()
}

// waitsLocked reports whether what comes next is being folded.
func (r *Reader) waitsLocked() bool {
	f := r.s.mu.fold
	return f != nil && f.era == r.era && r.next > f.start.Position.Seq && r.next <= f.end
}

// find returns where the next frame lies, or the channel to wait on.
func (r *Reader) find() (*segment.Reader, segment.Entry, chan struct{}, error) {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	from, e, changed, err := r.findLocked()
	if from != nil {
		s.mu.shown = max(s.mu.shown, e.Last)
	}
	return from, e, changed, err
}

func (r *Reader) findLocked() (*segment.Reader, segment.Entry, chan struct{}, error) {
	s := r.s
	switch {
	case s.mu.closed:
		return nil, segment.Entry{}, nil, fmt.Errorf("read spool: closed: %w", dr.ErrUnavailable)
	case s.mu.era != r.era, len(s.mu.parts) > 0 && r.next <= s.mu.parts[0].reader.Start().Position.Seq:
		return nil, segment.Entry{}, nil, fmt.Errorf("read spool at %d: %w", r.next, dr.ErrGap)
	case r.next > s.mu.synced.Position.Seq, r.waitsLocked():
		return nil, segment.Entry{}, s.mu.changed, nil
	}
	if r.part != nil {
		if entries := r.part.reader.Entries(); r.at < len(entries) && entries[r.at].First == r.next {
			r.at++
			return r.part.reader, entries[r.at-1], nil, nil
		}
	}
	for _, p := range s.mu.parts {
		if r.next > p.reader.End().Position.Seq {
			continue
		}
		if e, ok := p.reader.Find(r.next); ok && e.First == r.next {
			entries := p.reader.Entries()
			r.part, r.at = p, 1+sort.Search(len(entries), func(i int) bool { return entries[i].Last >= e.Last })
			return p.reader, e, nil, nil
		}
		break
	}
	return nil, segment.Entry{}, nil, fmt.Errorf("read spool: no frame begins at %d: %w", r.next, dr.ErrGap)
}

// gone reports whether the frame that was about to be read is there no more.
func (r *Reader) gone(from *segment.Reader) bool {
	r.part = nil
	now, _, _, err := r.find()
	r.part = nil // that find was only a look
	return now != from || err != nil
}
