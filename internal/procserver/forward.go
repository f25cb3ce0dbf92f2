package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/spool"
)

// Pauses between attempts to reach the master target.
const (
	retryMin = 100 * time.Millisecond
	retryMax = 10 * time.Second
)

// forward keeps the spool flowing to the master target until ctx ends.
func (s *stream) forward(ctx context.Context) error {
	next := retryMin
	for ctx.Err() == nil {
		began := time.Now()
		err := s.forwardOnce(ctx)
		s.setTarget(false, err)
		if ctx.Err() != nil {
			break
		}
		pause := next
		if time.Since(began) > retryMax {
			pause = retryMin
		}
		next = min(2*pause, retryMax)
		if r := (*link.Refused)(nil); errors.As(err, &r) {
			pause = max(pause, min(r.RetryAfter, retryMax))
			if link.IsFinal(err) {
				pause = retryMax // it takes another assignment, here or there
			}
		}
		pause -= pause / 2 * time.Duration(s.machine[15]) / 256 // not all streams at once
		level := slog.LevelWarn
		if errors.Is(err, dr.ErrNotFound) { // it has not got its assignment yet: usual right after protecting
			level = slog.LevelInfo
		}
		s.log.Log(ctx, level, "connection to the master target ended; will connect again", "error", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func (s *stream) forwardOnce(ctx context.Context) error {
	conn, err := s.dial(ctx, s.route)
	if err != nil {
		return err
	}
	return link.Send(ctx, conn, link.SenderOptions{
		Hello: link.Hello{Machine: s.machine, Timeline: s.timeline}, Source: &source{s: s},
		Connected: s.setCaller,
	})
}

func (s *stream) setTarget(connected bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.connected, s.mu.err = connected, err
}

// source gives the spool's frames to the master target.
type source struct {
	s *stream
	r *spool.Reader
}

// Resume implements link.Source. The master target is always right: where the
// spool can't continue it, nothing in the spool can ever be applied there; it starts over,
// and the agent learns the new cursor and sends again what is missing.
func (x *source) Resume(at frame.Cursor, durable dr.Seq) (err error) {
	s := x.s
	if at.Position.Timeline != s.timeline {
		return fmt.Errorf("master target stands on timeline %d, assigned is %d: %w", at.Position.Timeline, s.timeline, dr.ErrTimeline)
	}
	s.mu.Lock()
	s.mu.pace.flying = nil
	s.mu.Unlock()
	if s.isReady() {
		x.r, err = s.spool.ReadFrom(at)
		if err == nil || !errors.Is(err, dr.ErrGap) {
			s.setTarget(err == nil, err)
			return err
		}
	}
	if err := s.reset(at, durable); err != nil {
		return err
	}
	if x.r, err = s.spool.ReadFrom(at); err != nil {
		return err
	}
	s.setTarget(true, nil)
	return nil
}

func (s *stream) isReady() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.ready
}

// reset starts the spool over at a cursor, with no agent connected meanwhile.
func (s *stream) reset(at frame.Cursor, durable dr.Seq) error {
	s.mu.Lock()
	s.mu.ready = false // whoever connects now is told to come back
	s.mu.Unlock()
	s.drop()
	if c, ok := s.spool.Cursor(); ok {
		s.notice("spool-restarted", pb.Severity_SEVERITY_WARNING,
			fmt.Sprintf("machine %v: the spool, which ends at %v, does not continue the master target, which stands at %v; %d bytes are dropped, the machine resyncs",
				s.machine, c.Position, at.Position, s.spool.Status().Backlog))
	}
	if err := s.spool.Reset(at); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.ready = true
	s.mu.pace.marks = nil
	s.mu.progress = link.NewProgress(link.Ack{Stored: at.Position.Seq, Durable: durable})
	return nil
}

// Next implements link.Source.
func (x *source) Next(ctx context.Context) ([]byte, error) {
	f, err := x.r.Next(ctx)
	if err != nil {
		return nil, err
	}
	x.s.mu.Lock()
	x.s.mu.bytesOut += f.Size()
	x.s.mu.pace.flying = append(x.s.mu.pace.flying, flying{f.Last, f.Size()})
	x.s.mu.Unlock()
	return f.Bytes(), nil
}

// Ready implements link.ReadySource.
func (x *source) Ready() bool { return x.r.Ready() }

// Acked implements link.Source.
func (x *source) Acked(a link.Ack) {
	s := x.s
	if err := s.spool.Trim(a.Durable); err != nil {
		s.log.Error("trim spool; the next acknowledgement tries again", "error", err)
	}
	s.mu.Lock()
	progress := s.mu.progress
	s.mu.pace.acked(a.Durable)
	s.mu.Unlock()
	progress.Raise(0, a.Durable)
}
