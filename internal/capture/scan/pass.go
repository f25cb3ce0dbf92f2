package scan

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/zeebo/blake3"

	"farside/internal/dr"
)

const (
	// drainedEvery is how often the scanner looks whether the consumer has taken all over.
	drainedEvery = 50 * time.Millisecond
	// patience is how long a consumer may read nothing while there are blocks that it never read.
	// After that they are marked: it doesn't compare them.
	patience = time.Minute
)

// scan runs cycles until ctx ends or the Source fails.
func (s *Source) scan(ctx context.Context) {
	defer close(s.done)
	for ctx.Err() == nil {
		begun := time.Now()
		if err := s.cycle(ctx); err != nil {
			s.fail(err)
			return
		}
		select {
		case <-ctx.Done():
		case <-s.kicked:
		case <-time.After(time.Until(begun.Add(s.opts.Every))):
		}
	}
}

// cycle looks for changes and then for a moment that can be proven. Errors end the Source.
func (s *Source) cycle(ctx context.Context) error {
	var found int64
	var err error
	for range 1 + s.opts.Tries { // the first one looks for what the last cycle's proof is not about
		if !s.waitDrained(ctx) {
			return nil
		}
		select {
		case <-s.kicked: // that was waited for
		default:
		}
		begun, gen := time.Now(), s.generation()
		if found, err = s.pass(ctx); err != nil {
			break
		}
		if found == 0 && s.prove(begun, gen) {
			return nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, dr.ErrInvalid), errors.Is(err, dr.ErrNotFound):
		return err
	case err == nil:
		err = fmt.Errorf("%d passes, the last one found %d changed blocks: nothing shows that the content was ever one state",
			1+s.opts.Tries, found)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.why = fmt.Errorf("no point by this scan, the next begins within %v: %w: %w", s.opts.Every, err, dr.ErrNoPoint)
	return nil
}

func (s *Source) generation() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.gen
}

// prove takes note that a pass which began at a moment found everything as the consumer has it, unless the consumer
// got something else meanwhile.
func (s *Source) prove(begun time.Time, gen uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.gen != gen || !s.settledLocked() {
		return false
	}
	s.mu.proven, s.mu.at, s.mu.why = begun, gen, nil
	return true
}

// waitDrained waits until the consumer has read all that is marked, and every block once. False: ctx ended.
func (s *Source) waitDrained(ctx context.Context) bool {
	for !s.drained(time.Now()) {
		select {
		case <-time.After(drainedEvery):
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

func (s *Source) drained(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.active.IsZero() || !s.settledLocked() {
		return false
	}
	for _, d := range s.disks {
		if d.sums.known < d.sums.count && now.Sub(s.mu.active) < patience {
			return false
		}
	}
	return true
}

// pass reads all disks once, marks what differs from what the consumer has, and returns how many blocks that were.
func (s *Source) pass(ctx context.Context) (found int64, err error) {
	h, err := blake3.NewKeyed(s.key)
	if err != nil {
		return 0, err
	}
	buf := aligned(chunk)
	p := pace{rate: s.opts.Rate, begun: time.Now()}
	for _, d := range s.disks {
		if err := d.stillThere(); err != nil {
			return found, err
		}
		for off := int64(0); off < d.Size; off += chunk {
			part := buf[:min(chunk, d.Size-off)]
			if err := d.read(part, off); err != nil {
				return found, err
			}
			n, err := s.compare(d, off, part, h)
			if found += n; err != nil {
				return found, err
			}
			if err := p.wait(ctx, int64(len(part))); err != nil {
				return found, err
			}
		}
	}
	return found, nil
}

// compare marks the blocks of p that are not what the consumer has.
func (s *Source) compare(d *disk, off int64, p []byte, h *blake3.Hasher) (found int64, err error) {
	err = d.blocks(off, int64(len(p)), func(b int64) error {
		at := b*block - off
		is := sumOf(h, p[at:at+d.length(b)])
		s.mu.Lock()
		defer s.mu.Unlock()
		has, err := d.sums.get(b)
		if err != nil || has == is {
			return err
		}
		found++
		s.mu.gen++
		s.mu.marked++
		return s.dirty.Mark(dr.Extent{Disk: d.ID, Offset: b * block, Length: d.length(b)})
	})
	return found, err
}

// pace keeps a pass to a rate.
type pace struct {
	rate  int64 // bytes per second; 0: any
	begun time.Time
	sum   int64
}

// wait waits until n more bytes may have been read.
func (p *pace) wait(ctx context.Context, n int64) error {
	if p.sum += n; p.rate <= 0 {
		return ctx.Err()
	}
	due := p.begun.Add(time.Duration(float64(p.sum) / float64(p.rate) * float64(time.Second)))
	select {
	case <-time.After(time.Until(due)):
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}
