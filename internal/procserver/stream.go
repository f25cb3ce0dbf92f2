package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/spool"
)

// route is where a stream comes from and where it goes: the part of an
// assignment that a stream needs.
type route struct {
	machine  dr.MachineID
	agent    dr.NodeID
	timeline dr.Timeline
	target   string // node id of the master target
	addrs    string // its addresses, joined by commas
	codec    frame.Codec
}

// dialer connects to the master target of a route.
type dialer func(ctx context.Context, r route) (net.Conn, error)

// stream is one machine's way through the process server: its spool, filled by
// the agent's connection and emptied by the connection to the master target.
type stream struct {
	route
	spool *spool.Spool
	dial  dialer
	drop  func() // cuts the agent's connection and waits until its sink is unused
	log   *slog.Logger

	mu struct {
		sync.Mutex
		progress  *link.Progress // of the spool since its last reset
		ready     bool           // agents may connect: the spool has a beginning and is not being reset
		connected bool           // to the master target
		err       error          // of the last connection to it
		received  int64          // frames from the agent
		bytesIn   int64          // of them, as they came
		bytesOut  int64          // sent to the master target
		durable   frame.Cursor   // as far as known: position and time
		pending   []span         // spooled and not durable, oldest first
	}
}

// span is what the status needs to know of frames in the spool: consecutive
// frames are joined, so that there are few.
type span struct {
	last dr.Seq
	time int64 // of the oldest frame
	end  int64 // of the newest
	size int64
}

const maxSpans = 1024

func newStream(r route, sp *spool.Spool, dial dialer, drop func(), log *slog.Logger) *stream {
	s := &stream{route: r, spool: sp, dial: dial, drop: drop, log: log.With("machine", r.machine)}
	c, ok := sp.Cursor()
	s.mu.ready = ok
	s.mu.progress = link.NewProgress(link.Ack{Stored: c.Position.Seq})
	return s
}

// open is the link.Open of the agent's connection.
func (s *stream) open(_ context.Context, h link.Hello) (link.Sink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, _ := s.spool.Cursor()
	switch {
	case !s.mu.ready:
		return nil, &link.Refused{
			Code: link.CodeNotReady, RetryAfter: time.Second,
			Text: "the process server does not know yet where the stream stands: it has not reached the master target",
		}
	case h.Timeline != c.Position.Timeline:
		return nil, fmt.Errorf("stream of timeline %d, current is %d: %w", h.Timeline, c.Position.Timeline, dr.ErrTimeline)
	}
	return &sink{s, s.mu.progress, c}, nil
}

// sink takes an agent's frames into the spool.
type sink struct {
	s        *stream
	progress *link.Progress
	at       frame.Cursor // when it was opened
}

// Cursor implements link.Sink.
func (k *sink) Cursor() frame.Cursor { return k.at }

// Progress implements link.Sink.
func (k *sink) Progress() *link.Progress { return k.progress }

// Append implements link.Sink: it compresses the frames and spools them.
func (k *sink) Append(ctx context.Context, frames []*frame.Frame) error {
	packed, err := recode(frames, k.s.codec)
	if err != nil {
		return err
	}
	if err := k.s.spool.Append(ctx, packed); err != nil {
		return err
	}
	k.s.note(frames, packed)
	return nil
}

// Sync implements link.Sink.
func (k *sink) Sync() error {
	if err := k.s.spool.Sync(); err != nil {
		return err
	}
	k.progress.Raise(k.s.spool.Synced().Position.Seq, 0)
	return nil
}

// recode compresses frames on all processors and keeps their order.
func recode(frames []*frame.Frame, codec frame.Codec) ([]*frame.Frame, error) {
	out := make([]*frame.Frame, len(frames))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, f := range frames {
		if f.Codec == codec || f.RawLen == 0 {
			out[i] = f
			continue
		}
		g.Go(func() error {
			b, err := f.Recode(codec)
			if err == nil {
				out[i], err = frame.Parse(b)
			}
			return err
		})
	}
	return out, g.Wait()
}

func (s *stream) note(in, packed []*frame.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range in {
		s.mu.received++
		s.mu.bytesIn += f.Size()
		s.mu.pending = append(s.mu.pending, span{f.Last, f.FirstTime, f.LastTime, packed[i].Size()})
	}
	for len(s.mu.pending) > maxSpans {
		s.mu.pending = joinPairs(s.mu.pending)
	}
}

// joinPairs halves the number of spans.
func joinPairs(spans []span) []span {
	out := spans[:0]
	for i := 0; i < len(spans); i += 2 {
		x := spans[i]
		if i+1 < len(spans) {
			next := spans[i+1]
			x.last, x.end, x.size = next.last, next.end, x.size+next.size
		}
		out = append(out, x)
	}
	return out
}

// Pauses between attempts to reach the master target.
const (
	retryMin = 100 * time.Millisecond
	retryMax = 10 * time.Second
)

// forward keeps the spool flowing to the master target until ctx ends.
func (s *stream) forward(ctx context.Context) error {
	pause := retryMin
	for ctx.Err() == nil {
		began := time.Now()
		err := s.forwardOnce(ctx)
		s.setTarget(false, err)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > retryMax {
			pause = retryMin
		}
		s.log.Warn("connection to the master target ended; will connect again", "error", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, retryMax)
		if r := (*link.Refused)(nil); errors.As(err, &r) && link.IsFinal(err) {
			pause = retryMax
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
// spool can't continue it, the spool starts over there, and the agent learns
// the new cursor and sends again what is missing.
func (x *source) Resume(at frame.Cursor, durable dr.Seq) (err error) {
	s := x.s
	if at.Position.Timeline != s.timeline {
		return fmt.Errorf("master target stands on timeline %d, assigned is %d: %w", at.Position.Timeline, s.timeline, dr.ErrTimeline)
	}
	if _, ok := s.spool.Cursor(); ok {
		x.r, err = s.spool.ReadFrom(at)
		if err == nil || !errors.Is(err, dr.ErrGap) {
			s.setTarget(true, err)
			return err
		}
		c, _ := s.spool.Cursor()
		s.log.Error("the spool does not continue the master target; starting over from there, the agent will resync",
			"spool", c.Position, "master_target", at.Position, "dropped_bytes", s.spool.Bytes())
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

// reset starts the spool over at a cursor, with no agent connected meanwhile.
func (s *stream) reset(at frame.Cursor, durable dr.Seq) error {
	s.mu.Lock()
	s.mu.ready = false // whoever connects now is told to come back
	s.mu.Unlock()
	s.drop()
	if err := s.spool.Reset(at); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.ready, s.mu.pending = true, nil
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
	x.s.mu.Unlock()
	return f.Bytes(), nil
}

// Acked implements link.Source.
func (x *source) Acked(a link.Ack) {
	s := x.s
	s.mu.Lock()
	n := 0
	for n < len(s.mu.pending) && s.mu.pending[n].last <= a.Durable {
		s.mu.durable.Time = s.mu.pending[n].end
		n++
	}
	s.mu.pending = s.mu.pending[n:]
	s.mu.durable.Position = dr.Position{Timeline: s.timeline, Seq: a.Durable}
	progress := s.mu.progress
	s.mu.Unlock()
	if err := s.spool.Trim(a.Durable); err != nil {
		s.log.Error("trim spool", "error", err)
	}
	progress.Raise(0, a.Durable)
}
