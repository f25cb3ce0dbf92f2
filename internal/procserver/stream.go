package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	pb "farside/internal/api/farside/v1"
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
	env
	spool *spool.Spool
	drop  func() // cuts the agent's connection and waits until its sink is unused
	log   *slog.Logger

	mu struct {
		sync.Mutex
		progress  *link.Progress // of the spool since its last reset
		ready     bool           // agents may connect: the spool stands on the route's timeline and is not being reset
		connected bool           // to the master target
		agent     *link.Caller   // of the newest connection of the agent; nil before the first
		target    *link.Caller   // of the newest connection to the master target; nil before the first
		err       error          // of the last connection to it
		received  int64          // frames from the agent
		bytesIn   int64          // of them, as they came
		bytesOut  int64          // sent to the master target
		pace      pace
	}
}

// env is what all streams of a process server share.
type env struct {
	dial    dialer
	heard   func(machine dr.MachineID) // its agent sent something; may be nil
	notice  func(code string, severity pb.Severity, text string)
	work    chan struct{} // has room for as many as may compress at a time
	meter   *meter        // of the time that they take
	folding chan struct{} // has room for as many as may fold at a time
}

func newStream(r route, e env, sp *spool.Spool, drop func(), log *slog.Logger) *stream {
	s := &stream{route: r, env: e, spool: sp, drop: drop, log: log.With("machine", r.machine)}
	s.mu.pace.level = r.codec.Compression()
	c, ok := sp.Cursor()
	// Another timeline's frames are of no use; the master target says where to start over.
	s.mu.ready = ok && c.Position.Timeline == r.timeline
	s.mu.progress = link.NewProgress(link.Ack{Stored: c.Position.Seq, Durable: sp.Status().Durable})
	return s
}

// open is the link.Open of the agent's connection.
func (s *stream) open(_ context.Context, h link.Hello) (link.Sink, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wait := func(text string) error {
		return &link.Refused{Code: link.CodeNotReady, RetryAfter: time.Second, Text: text}
	}
	switch {
	case h.Timeline < s.timeline:
		return nil, fmt.Errorf("stream of timeline %d, current is %d: %w", h.Timeline, s.timeline, dr.ErrTimeline)
	case h.Timeline > s.timeline:
		return nil, wait(fmt.Sprintf("the process server has not been told yet of timeline %d", h.Timeline))
	case !s.mu.ready:
		return nil, wait("the process server does not know yet where the stream stands: it has not reached the master target")
	}
	return &sink{s, s.mu.progress}, nil
}

var _ link.CallSink = (*sink)(nil)

// sink takes an agent's frames into the spool.
type sink struct {
	s        *stream
	progress *link.Progress
}

// Cursor implements link.Sink.
func (k *sink) Cursor() frame.Cursor {
	c, _ := k.s.spool.Cursor()
	return c
}

// Progress implements link.Sink.
func (k *sink) Progress() *link.Progress { return k.progress }

// Connected implements link.CallSink.
func (k *sink) Connected(c *link.Caller) {
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	k.s.mu.agent = c
}

// Append implements link.Sink: it compresses the frames and spools them.
func (k *sink) Append(ctx context.Context, frames []*frame.Frame) error {
	if k.s.heard != nil {
		k.s.heard(k.s.machine)
	}
	packed, err := recode(ctx, frames, k.s.packing(), k.s.env)
	if err != nil {
		return err
	}
	if err := k.s.spool.Append(ctx, packed); err != nil {
		return err
	}
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	for _, f := range packed {
		k.s.mu.pace.stored += f.Size()
	}
	for _, f := range frames {
		k.s.mu.received++
		k.s.mu.bytesIn += f.Size()
	}
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

// recode compresses frames beside each other and keeps their order. The workers
// are those of all streams.
func recode(ctx context.Context, frames []*frame.Frame, c frame.Compression, e env) ([]*frame.Frame, error) {
	out := make([]*frame.Frame, len(frames))
	g, ctx := errgroup.WithContext(ctx)
	for i, f := range frames {
		packed := f.Codec == c.Codec() || f.Codec != frame.None && c != frame.Plain // by the agent: done is done
		if packed || f.RawLen == 0 || f.Kind == frame.TagKind {
			out[i] = f
			continue
		}
		select {
		case e.work <- struct{}{}:
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), g.Wait())
		}
		g.Go(func() error {
			began := time.Now()
			defer func() {
				e.meter.spent.Add(int64(time.Since(began)))
				<-e.work
			}()
			b, err := f.Compress(c)
			if err == nil {
				out[i], err = frame.Parse(b)
			}
			return err
		})
	}
	return out, g.Wait()
}
