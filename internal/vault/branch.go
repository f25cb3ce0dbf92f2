package vault

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"farside/internal/dr"
	"farside/internal/frame"
)

// Branch is a timeline of its own that starts at a recovery point: a log to
// write and the state that the writing makes. It belongs to its opener; one
// branch must not be opened twice at a time.
type Branch struct {
	*Log
	state *State
}

// NewBranch makes a branch at a recovery point of the vault. Its timeline is
// tl, a number above all that the vault has seen, or chosen if tl is 0. Errors wrap
// dr.ErrNoPoint or dr.ErrInvalid.
func (v *Vault) NewBranch(p dr.Position, tl dr.Timeline) (*Branch, error) {
	at, err := v.At(p) // holds the horizon until the manifest names the fork
	if err != nil {
		return nil, err
	}
	defer at.Close()
	// The fork is named by the timeline that holds the position.
	links := v.manifest.Load().links(p.Timeline, p.Seq)
	fork := dr.Position{Timeline: links[0].timeline, Seq: links[0].through}
	t := timelineInfo{ID: tl, Parent: fork.Timeline, Fork: fork.Seq, ForkTime: at.point.Time}
	err = v.update(func(m *manifest) error {
		switch {
		case tl == 0:
			t.ID = m.Next
		case tl < m.Next:
			return fmt.Errorf("timeline %d was used before: %w", tl, dr.ErrInvalid)
		}
		m.Next = t.ID + 1
		m.Timelines = append(m.Timelines, t)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make branch at %v: %w", p, err)
	}
	if err := v.fs.MkdirAll(path.Join(v.dir, segmentDir(t.ID))); err != nil {
		return nil, fmt.Errorf("make branch at %v: %w", p, err)
	}
	l, err := openLog(context.Background(), v, t)
	if err != nil {
		return nil, fmt.Errorf("make branch at %v: %w", p, err)
	}
	v.mu.Lock()
	v.mu.logs[t.ID] = l
	v.mu.Unlock()
	return v.OpenBranch(t.ID)
}

// OpenBranch opens a branch that NewBranch made, with all that was synced to
// it. Errors wrap dr.ErrNotFound.
func (v *Vault) OpenBranch(tl dr.Timeline) (*Branch, error) {
	l := v.log(tl)
	if l == nil || tl == v.Timeline() {
		return nil, fmt.Errorf("open branch %d: %w", tl, dr.ErrNotFound)
	}
	s := &State{v: v, timeline: tl, through: everything}
	end := l.Durable()
	s.point = dr.RecoveryPoint{Position: end.Position, Time: end.Time, Accuracy: dr.Exact, Consistency: dr.Crash}
	if err := v.pin(s); err != nil {
		return nil, err
	}
	return &Branch{l, s}, nil
}

// State returns the disks as they are after all that Apply wrote.
func (b *Branch) State() *State { return b.state }

// Apply appends frames, makes them durable and shows them to State. After an
// error the branch ends where Resume says.
func (b *Branch) Apply(frames []*frame.Frame) error {
	for _, f := range frames {
		if err := b.Append(f); err != nil {
			return err
		}
	}
	if _, err := b.Sync(); err != nil {
		return err
	}
	var all []dr.Extent
	for _, f := range frames {
		for _, x := range f.All() {
			all = append(all, x.Extent)
		}
	}
	b.state.changed(all)
	return nil
}

// Close ends the use of the branch; what was synced stays.
func (b *Branch) Close() { b.state.Close() }

// Branches returns the timelines of all branches.
func (v *Vault) Branches() []dr.Timeline {
	var out []dr.Timeline
	m := v.manifest.Load()
	for _, t := range m.Timelines {
		if t.ID != m.Current && t.Parent != 0 {
			out = append(out, t.ID)
		}
	}
	return out
}

// DiscardBranch removes a branch that nobody has open. One that is not there
// is no error; one that others fork from, the current timeline included, is
// dr.ErrDenied.
func (v *Vault) DiscardBranch(tl dr.Timeline) error {
	m := v.manifest.Load()
	if _, ok := m.timeline(tl); !ok {
		return nil
	}
	if tl == m.Current || tl == m.BaseTimeline || slices.ContainsFunc(m.Timelines, func(t timelineInfo) bool { return t.Parent == tl }) {
		return fmt.Errorf("discard timeline %d: it is in use: %w", tl, dr.ErrDenied)
	}
	v.mu.Lock()
	for s := range v.mu.pins {
		if s.timeline == tl {
			v.mu.Unlock()
			return fmt.Errorf("discard timeline %d: it is open: %w", tl, dr.ErrDenied)
		}
	}
	l := v.mu.logs[tl]
	delete(v.mu.logs, tl)
	v.mu.Unlock()
	gone := slices.Clone(m.segments(tl))
	// The manifest first: what is left behind after a crash is swept up by Open.
	err := v.update(func(m *manifest) error {
		m.Timelines = slices.DeleteFunc(m.Timelines, func(t timelineInfo) bool { return t.ID == tl })
		m.Segments = slices.DeleteFunc(m.Segments, func(s segmentInfo) bool { return s.Timeline == tl })
		return nil
	})
	if err != nil {
		return fmt.Errorf("discard timeline %d: %w", tl, err)
	}
	errs := []error{l.close(), v.index.removeTimeline(tl)}
	for _, s := range gone {
		v.segs.drop(s.key())
	}
	errs = append(errs, v.fs.RemoveAll(path.Join(v.dir, segmentDir(tl))))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("discard timeline %d: %w", tl, err)
	}
	return nil
}

// Fork returns the point at which a branch starts; zero if there is no such
// branch.
func (v *Vault) Fork(tl dr.Timeline) dr.RecoveryPoint {
	t, _ := v.manifest.Load().timeline(tl)
	return dr.RecoveryPoint{
		Position: dr.Position{Timeline: t.Parent, Seq: t.Fork}, Time: t.ForkTime, Accuracy: dr.Exact, Consistency: dr.Crash,
	}
}
