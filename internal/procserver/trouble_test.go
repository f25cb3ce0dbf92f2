package procserver

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/vfs"
)

// during runs fn while agents are connected to a process server of the site.
func (s *site) during(ctx context.Context, agents []*agent, fn func(srv *server)) {
	ctx, cancel := context.WithCancel(ctx)
	srv, stop := s.start(ctx)
	done := make(chan struct{})
	for _, a := range agents {
		go func() { keepConnected(ctx, srv, a); done <- struct{}{} }()
	}
	fn(srv)
	cancel()
	stop()
	for range agents {
		<-done
	}
}

func status(srv *server) *pb.StreamStatus { return srv.report().GetProcessServer().Streams[0] }

// A full spool holds the agent back, says so, loses nothing, and flows again.
func TestFullSpoolHoldsTheAgentBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.limit = 200_000
		var cut atomic.Bool
		s.cut = cut.Load
		s.breakAt = func() int { return 50_000 }
		a := &agent{frames: frames(t, origin, 2000)}
		s.during(t.Context(), nil, func(*server) { time.Sleep(time.Second) }) // learns where the stream stands
		cut.Store(true)
		s.during(t.Context(), []*agent{a}, func(srv *server) {
			time.Sleep(10 * time.Minute)
			st := status(srv)
			if !strings.Contains(st.Error, "full") || !st.AgentConnected || st.Stored.Seq == 0 || st.Stored.Seq == 2000 ||
				st.BacklogBytes == 0 || st.BacklogBytes > s.limit || st.BacklogAgeMs < 600_000 {
				t.Errorf("status %v", st)
			}
			cut.Store(false)
			waitDurable(t, a)
			checkTarget(t, s.target, a.frames)
			if st := status(srv); st.Error != "" || st.BacklogBytes != 0 {
				t.Errorf("afterwards: %v", st)
			}
		})
	})
}

// The disk of the spool is full for a minute: the stream waits and goes on by
// itself.
func TestDiskFullForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		var full atomic.Bool
		s.fs = vfs.NewFault(s.fs, func(op vfs.Op) error {
			if full.Load() && (op.Kind == vfs.OpWrite || op.Kind == vfs.OpSync || op.Kind == vfs.OpCreate) {
				return syscall.ENOSPC
			}
			return nil
		})
		a := &agent{frames: frames(t, origin, 500), pause: 100 * time.Millisecond}
		full.Store(true)
		s.during(t.Context(), []*agent{a}, func(*server) {
			time.Sleep(time.Minute)
			if a.durable() != 0 {
				t.Error("durable without a disk")
			}
			full.Store(false)
			time.Sleep(12 * time.Second)
			full.Store(true)
			time.Sleep(time.Minute)
			full.Store(false)
			waitDurable(t, a)
		})
		checkTarget(t, s.target, a.frames)
		if a.lost != 0 {
			t.Errorf("change %d was stored, and asked for again", a.lost)
		}
	})
}

// An fsync that fails once, in mid-stream.
func TestFailingSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		var syncs atomic.Int64
		s.fs = vfs.NewFault(s.fs, func(op vfs.Op) error {
			if op.Kind == vfs.OpSync && syncs.Add(1)%7 == 0 {
				return syscall.EIO
			}
			return nil
		})
		a := &agent{frames: frames(t, origin, 300), every: time.Millisecond}
		s.during(t.Context(), []*agent{a}, func(*server) { waitDurable(t, a) })
		checkTarget(t, s.target, a.frames)
		if a.lost != 0 || syncs.Load() < 100 {
			t.Errorf("change %d was stored, and asked for again; %d syncs", a.lost, syncs.Load())
		}
	})
}

// The backlog is known also right after a restart.
func TestBacklogAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		var cut atomic.Bool
		s.cut = cut.Load
		s.during(t.Context(), nil, func(*server) { time.Sleep(time.Second) })
		cut.Store(true)
		a := &agent{frames: frames(t, origin, 100)}
		s.during(t.Context(), []*agent{a}, func(*server) { time.Sleep(time.Minute) })
		s.during(t.Context(), nil, func(srv *server) {
			if st := status(srv); st.BacklogBytes == 0 || st.BacklogAgeMs < 60_000 || st.Stored.Seq != 100 {
				t.Errorf("status %v", st)
			}
			cut.Store(false)
			time.Sleep(time.Minute)
			if st := status(srv); st.BacklogBytes != 0 || st.Durable.Seq != 100 || st.DurableTimeNs != 99 || st.BacklogAgeMs != 0 {
				t.Errorf("afterwards: %v", st)
			}
		})
		checkTarget(t, s.target, a.frames)
	})
}

// A failover raises the timeline: the old side's agent is told to stand down,
// and the spool starts over on the new one.
func TestNewTimeline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		old := &agent{frames: frames(t, origin, 50)}
		s.during(t.Context(), []*agent{old}, func(srv *server) {
			waitDurable(t, old)
			fork := frame.Cursor{Machine: machine, Position: dr.Position{Timeline: 2, Seq: 30}, Chain: [32]byte{4}, Time: 1 << 40}
			next := &agent{frames: frames(t, fork, 20)}
			// An agent may hear of it first: it is to come back.
			if err := connect(t.Context(), srv, next, agentPeer); !errors.Is(err, dr.ErrUnavailable) || link.IsFinal(err) {
				t.Errorf("too early: %v", err)
			}
			s.target = newTarget(fork)
			a := assignment()
			a.Streams[0].Timeline = 2
			srv.assign(t.Context(), a)
			err := connect(t.Context(), srv, old, agentPeer)
			for errors.Is(err, io.EOF) { // pushed out by the agent's own next attempt
				err = connect(t.Context(), srv, old, agentPeer)
			}
			if !errors.Is(err, dr.ErrTimeline) {
				t.Errorf("the old side: %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { keepConnected(ctx, srv, next); close(done) }()
			waitDurable(t, next)
			cancel()
			<-done
			checkTarget(t, s.target, next.frames)
			if n := srv.report().Notices; len(n) != 1 || n[0].Code != "spool-restarted" {
				t.Errorf("notices %v", n)
			}
		})
	})
}

// The master target has lost its newest bytes: what the spool still has is sent
// again, and otherwise the agent starts from there.
func TestTargetGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, trimmed := range []bool{false, true} {
			s := newSite(t)
			a := &agent{frames: frames(t, origin, 300)}
			s.during(t.Context(), []*agent{a}, func(*server) { waitDurable(t, a) })
			s.target.got = s.target.got[:100]
			s.target.at = s.target.got[99].End()
			s.target.progress = link.NewProgress(link.Ack{Stored: 100, Durable: 100})
			if trimmed {
				if err := s.fs.RemoveAll("/spool/" + machine.String()); err != nil {
					t.Fatal(err)
				}
			}
			a.ack = link.Ack{}
			s.during(t.Context(), []*agent{a}, func(*server) { waitDurable(t, a) })
			checkTarget(t, s.target, a.frames)
		}
	})
}

// A stream that can't begin is tried again.
func TestBeginsLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		broken := true
		s.fs = vfs.NewFault(s.fs, func(vfs.Op) error {
			if broken {
				return syscall.EIO
			}
			return nil
		})
		s.during(t.Context(), nil, func(srv *server) {
			srv.retry(t.Context())
			r := srv.report()
			if len(r.GetProcessServer().Streams) != 0 || len(r.Notices) != 1 || r.Notices[0].Code != "spool-failed" {
				t.Errorf("report %v", r)
			}
			broken = false
			srv.retry(t.Context())
			a := &agent{frames: frames(t, origin, 5)}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { keepConnected(ctx, srv, a); close(done) }()
			waitDurable(t, a)
			cancel()
			<-done
		})
	})
}

// The total of all spools that the assignment names holds agents back, and a spool that
// comes back with less than it had acknowledged is a notice.
func TestTotalAndLostPromises(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		var cut atomic.Bool
		s.cut = cut.Load
		a := &agent{frames: frames(t, origin, 400)}
		s.during(t.Context(), nil, func(*server) { time.Sleep(time.Second) })
		cut.Store(true)
		s.during(t.Context(), []*agent{a}, func(srv *server) {
			full := assignment()
			full.Limits = &pb.SpoolLimits{TotalBytes: 8000}
			srv.assign(t.Context(), full)
			time.Sleep(time.Minute)
			if st := status(srv); !strings.Contains(st.Error, "all spools together") || st.Stored.Seq == 400 || st.BacklogBytes == 0 {
				t.Errorf("status %v", st)
			}
			srv.assign(t.Context(), assignment())
			time.Sleep(time.Minute)
			if st := status(srv); st.Stored.Seq != 400 {
				t.Errorf("without the bound: %v", st)
			}
		})
		dir := "/spool/" + machine.String()
		names, err := s.fs.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		f, err := s.fs.OpenFile(dir + "/" + names[0])
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err := errors.Join(err, f.Truncate(size-10), f.Close()); err != nil {
			t.Fatal(err)
		}
		cut.Store(false)
		s.during(t.Context(), []*agent{a}, func(srv *server) {
			if n := srv.report().Notices; len(n) != 1 || n[0].Code != "spool-lost" {
				t.Errorf("notices %v", n)
			}
			waitDurable(t, a)
		})
		checkTarget(t, s.target, a.frames)
	})
}
