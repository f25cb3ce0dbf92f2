package agent

import (
	"context"
	"fmt"

	"farside/internal/dr"
	"farside/internal/extent"
)

// glance is a look at an exact stream: blocks are read and compared with what the far side
// holds. What differs was written from about then on, or differs in earnest; a vigil knows. docs/agent.md has the
// argument.
type glance struct {
	floor dr.Position // an answer about less counts for nothing

	gen, overflows, syncs uint64 // of the stream when it began: another one knows nothing of it
	marked                bool   // the glance is about to end
	mark                  uint64 // then: what was submitted before
}

// vigil notes which of some blocks are written. It belongs to the replicator.
type vigil struct{ watched, touched map[dr.DiskID]*extent.Set }

// watch begins to note what is written to x.
func (v *vigil) watch(x dr.Extent) {
	if v.watched == nil {
		v.watched, v.touched = map[dr.DiskID]*extent.Set{}, map[dr.DiskID]*extent.Set{}
	}
	if v.watched[x.Disk] == nil {
		v.watched[x.Disk], v.touched[x.Disk] = &extent.Set{}, &extent.Set{}
	}
	v.watched[x.Disk].Add(x.Offset, x.End())
	v.touched[x.Disk].Remove(x.Offset, x.End())
}

// forget ends that.
func (v *vigil) forget(x dr.Extent) {
	if w := v.watched[x.Disk]; w != nil {
		w.Remove(x.Offset, x.End())
		v.touched[x.Disk].Remove(x.Offset, x.End())
	}
}

// note is told of each write.
func (v *vigil) note(x dr.Extent) {
	if w := v.watched[x.Disk]; w != nil {
		for _, r := range w.Intersect(x.Offset, x.End()) {
			v.touched[x.Disk].Add(r.Start, r.End)
		}
	}
}

// take reports whether x was written since it is watched, or since the last take.
func (v *vigil) take(x dr.Extent) bool {
	t := v.touched[x.Disk]
	if t == nil {
		return true
	}
	was := t.Overlaps(x.Offset, x.End())
	t.Remove(x.Offset, x.End())
	return was
}

// chore is something that the replicator does for somebody between two steps. It is asked again
// until it is done; an error ends the stream.
type chore func(*replicator) (done bool, err error)

// ask has the replicator do a chore, and waits until it is done.
func (s *stream) ask(ctx context.Context, c chore) error {
	finished := make(chan struct{})
	s.mu.Lock()
	s.mu.chores = append(s.mu.chores, func(r *replicator) (bool, error) {
		if ctx.Err() != nil {
			return true, nil // nobody waits any more
		}
		done, err := c(r)
		if done {
			close(finished)
		}
		return done, err
	})
	s.mu.Unlock()
	select {
	case <-finished:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// passChores does what was asked of the replicator, as far as that goes now.
func (s *stream) passChores() error {
	s.mu.Lock()
	chores := s.mu.chores
	s.mu.chores = nil
	s.mu.Unlock()
	var left []chore
	for _, c := range chores {
		done, err := c(s.rep)
		if err != nil {
			return err
		}
		if !done {
			left = append(left, c)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.chores = append(left, s.mu.chores...)
	return nil
}

// errDisturbed says that a glance came to nothing, since the stream was not exact all the time.
var errDisturbed = fmt.Errorf("the stream is not exact: %w", dr.ErrUnavailable)

// beginGlance returns a glance. All that the replicator took over before is in the stream up to its floor.
func (s *stream) beginGlance(ctx context.Context) (g *glance, err error) {
	g = &glance{}
	askErr := s.ask(ctx, func(r *replicator) (bool, error) {
		if r.phase != Exact {
			err = errDisturbed
			return true, nil
		}
		if cut := r.cutFrame(); cut != nil {
			return true, cut
		}
		g.floor, g.gen = r.enc.Cursor().Position, uint64(r.gen)
		g.overflows, g.syncs = r.stats.overflows, r.stats.syncs
		return true, nil
	})
	if askErr != nil {
		return nil, askErr
	}
	return g, err
}

// endGlance waits until the replicator has taken over what was submitted before the call, and does what
// then is to be done, if the stream was exact all the time.
func (s *stream) endGlance(ctx context.Context, g *glance, then func(*vigil)) (err error) {
	askErr := s.ask(ctx, func(r *replicator) (bool, error) {
		if r.phase != Exact || uint64(r.gen) != g.gen || r.stats.overflows != g.overflows || r.stats.syncs != g.syncs {
			err = errDisturbed
			return true, nil
		}
		if !g.marked {
			g.marked, g.mark = true, r.src.Tail()
		}
		if r.src.Consumed() < g.mark {
			return false, nil
		}
		then(&r.vigil)
		return true, nil
	})
	if askErr != nil {
		return askErr
	}
	return err
}

// repair has ranges read and sent again that the far side holds otherwise.
func (s *stream) repair(ctx context.Context, why Reason, ranges []dr.Extent) error {
	return s.ask(ctx, func(r *replicator) (bool, error) {
		for _, x := range ranges {
			if err := r.src.Mark(x); err != nil {
				return true, fmt.Errorf("mark %v: %w", x, err)
			}
		}
		if r.phase != Exact {
			return true, nil // the sync that is under way reads them
		}
		if err := r.cutFrame(); err != nil {
			return true, err
		}
		r.begin(why)
		r.retreat()
		return true, nil
	})
}
