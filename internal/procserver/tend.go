package procserver

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/spool"
)

// pace is what is known of the speed of a stream, and what the controller made
// of it. The stream guards it.
type pace struct {
	settings
	linkRate float64
	stored   int64    // bytes put into the spool
	sent     int64    // bytes sent that are durable
	flying   []flying // sent, not durable
	marks    []mark   // when the spool had stored what is not durable
	folded   spool.Folded
	folds    int
}

// flying is a frame that was sent.
type flying struct {
	last dr.Seq
	size int64
}

// mark says that everything up to seq was stored at a time.
type mark struct {
	seq dr.Seq
	at  time.Time
}

// maxMarks bounds the marks: 4,096 ticks are 17 minutes; after that every second
// one goes, so the age gets coarser.
const maxMarks = 4096

// acked counts what has become durable.
func (p *pace) acked(durable dr.Seq) {
	n := 0
	for n < len(p.flying) && p.flying[n].last <= durable {
		p.sent += p.flying[n].size
		n++
	}
	p.flying = append(p.flying[:0], p.flying[n:]...)
}

// age returns how long ago the oldest of what is stored and not durable was
// stored, by this machine's clock: that of the changes is the agent's and may be wrong.
func (p *pace) age(stored, durable dr.Seq, now time.Time) time.Duration {
	n := 0
	for n < len(p.marks) && p.marks[n].seq <= durable {
		n++
	}
	p.marks = append(p.marks[:0], p.marks[n:]...)
	if k := len(p.marks); stored > durable && (k == 0 || p.marks[k-1].seq < stored) {
		if k == maxMarks {
			for i := range maxMarks / 2 {
				p.marks[i] = mark{p.marks[2*i+1].seq, p.marks[2*i].at} // older rather than younger
			}
			p.marks = p.marks[:maxMarks/2]
		}
		p.marks = append(p.marks, mark{stored, now})
	}
	if len(p.marks) == 0 {
		return 0
	}
	return now.Sub(p.marks[0].at)
}

// meter counts the time that the workers spend compressing.
type meter struct {
	spent atomic.Int64 // nanoseconds
	width int          // workers
}

// busyMeter turns a meter into a share.
type busyMeter struct {
	m     *meter
	spent int64
	at    time.Time
}

func (b *busyMeter) share(now time.Time) float64 {
	spent, dt := b.m.spent.Load(), now.Sub(b.at)
	part := float64(spent-b.spent) / (float64(dt) * float64(b.m.width))
	if b.at.IsZero() || dt <= 0 {
		part = 0
	}
	b.spent, b.at = spent, now
	return part
}

// tend measures the stream, asks the controller and does what it says, until
// ctx ends.
func (s *stream) tend(ctx context.Context) {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	c := newController(s.codec)
	busy := busyMeter{m: s.meter}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		x := c.next(s.measure(now, busy.share(now)))
		s.mu.Lock()
		before := s.mu.pace.behind
		s.mu.pace.settings, s.mu.pace.linkRate = x, c.linkRate
		s.mu.Unlock()
		if before != x.behind {
			s.log.Info("the link has fallen behind, or caught up", "behind", x.behind, "link_rate", int64(c.linkRate), "backlog", s.spool.Status().Backlog)
		}
		if x.cut {
			if err := s.spool.Cut(); err != nil {
				s.log.Debug("cut spool", "error", err) // the next Sync heals it
			}
		}
		if x.fold {
			s.fold(ctx, c, x)
		}
	}
}

func (s *stream) measure(now time.Time, busy float64) measures {
	sp := s.spool.Status()
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.mu.pace
	return measures{
		now: now, connected: s.mu.connected, stored: p.stored, sent: p.sent, backlog: sp.Backlog,
		age: p.age(sp.Synced.Position.Seq, sp.Durable, now), ahead: sp.Ahead, foldable: sp.Foldable,
		used: sp.Bytes, limit: sp.Limit, busy: busy,
	}
}

// fold folds a run of the spool. One stream of the process server does so at a
// time, which bounds the memory.
func (s *stream) fold(ctx context.Context, c *controller, x settings) {
	select {
	case s.folding <- struct{}{}:
		defer func() { <-s.folding }()
	default:
		return // another stream folds; the next tick asks again
	}
	before := s.spool.Status()
	began := time.Now()
	done, err := s.spool.Fold(ctx, spool.FoldOptions{Compression: x.level, FrameData: x.frameData, MaxBytes: foldRun(before.Limit)})
	c.folded(before.Foldable, done.Before-done.After)
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, dr.ErrUnavailable) {
			s.log.Warn("fold spool; it stays as it is", "error", err)
		}
		return
	}
	s.mu.Lock()
	p := &s.mu.pace
	p.folded.Frames += done.Frames
	p.folded.Epochs += done.Epochs
	p.folded.Before += done.Before
	p.folded.After += done.After
	if done.Frames > 0 {
		p.folds++
	}
	s.mu.Unlock()
	s.log.Debug("folded", "frames", done.Frames, "epochs", done.Epochs, "before", done.Before, "after", done.After, "took", time.Since(began))
}

// foldRun bounds a run, so that the room that a fold needs beside the spool
// stays a small part of it.
func foldRun(limit int64) int64 {
	const most = 512 << 20
	if limit == 0 {
		return most
	}
	return min(most, max(limit/4, 1))
}

// packing says how frames are compressed now.
func (s *stream) packing() frame.Compression {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.pace.level
}
