package simtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"

	"farside/internal/dr"
	"farside/internal/export"
	"farside/internal/mastertarget"
	"farside/internal/procserver"
	"farside/internal/transport"
	"farside/internal/vault"
	"farside/internal/vfs"
)

var errDead = errors.New("the process is dead")

// process is one run of a role on a computer with a disk. What a killed one still tries to do has no
// effect.
type process struct {
	w    *World
	name string
	peer transport.Peer
	disk *vfs.Mem
	full atomic.Bool // the disk is

	ctx  context.Context // of the run; nil while there is none
	end  context.CancelFunc
	done chan struct{}
	dead *atomic.Bool // of the run
}

// begin starts a run; fs is its disk, and l takes its connections in.
func (p *process) begin() (fs vfs.FS, l net.Listener) {
	p.ctx, p.end = context.WithCancel(context.Background())
	p.done, p.dead = make(chan struct{}), new(atomic.Bool)
	dead := p.dead
	fs = vfs.NewFault(p.disk, func(op vfs.Op) error {
		if dead.Load() {
			return errDead
		}
		if p.full.Load() && (op.Kind == vfs.OpWrite || op.Kind == vfs.OpCreate) {
			return fmt.Errorf("%s %s: %w", op.Kind, op.Name, syscall.ENOSPC)
		}
		return nil
	})
	return fs, p.w.net.listen(p.name, p.peer)
}

func (p *process) runs() bool { return p.ctx != nil }

// halt ends the run: in good order, or as kill -9 does.
func (p *process) halt(kill bool) {
	if p.ctx == nil {
		return
	}
	if kill {
		p.dead.Store(true)
		for _, line := range p.w.net.of(p.name) {
			line.Reset()
		}
	}
	p.end()
	<-p.done
	p.ctx = nil
}

// powerCut ends the run and what the disk had not been told to keep.
func (p *process) powerCut(seed uint64) {
	p.dead.Store(true)
	left := p.disk.Crash(seed)
	p.halt(true)
	p.disk = left
}

// fill makes the disk full, or not.
func (p *process) fill(full bool) { p.full.Store(full) }

// processServer is the process server of a World.
type processServer struct {
	process
	node *procserver.Node
}

const spoolDir = "/spool"

func newProcessServer(w *World) *processServer {
	return &processServer{process: process{w: w, name: "ps", peer: peerOf(transport.RoleProcessServer, 100), disk: vfs.NewMem()}}
}

// start starts it unless it runs.
func (s *processServer) start() error {
	if s.runs() {
		return nil
	}
	fs, l := s.begin()
	n, err := procserver.New(procserver.Options{
		FS: fs, Spool: spoolDir, Limit: s.w.conf.SpoolLimit, Log: s.w.conf.Log.With("role", s.name),
		Dial: func(ctx context.Context, _ dr.NodeID, addr string) (net.Conn, error) {
			return s.w.net.dial(ctx, s.name, s.peer, addr)
		},
	})
	if err != nil {
		l.Close()
		s.ctx = nil
		return err
	}
	s.node = n
	ctx, done := s.ctx, s.done
	go func() {
		defer close(done)
		_ = n.Run(ctx, l) // that it ended is known
	}()
	return nil
}

func (s *processServer) stop() { s.halt(false); s.node = nil }
func (s *processServer) kill() { s.halt(true); s.node = nil }

// masterTarget is the master target of a World.
type masterTarget struct {
	process
	node    *mastertarget.Node
	exports *export.Server
	clients *listener // of the exports
}

func newMasterTarget(w *World) *masterTarget {
	return &masterTarget{process: process{w: w, name: "mt", peer: peerOf(transport.RoleMasterTarget, 101), disk: vfs.NewMem()}}
}

// start starts it unless it runs.
func (s *masterTarget) start() (err error) {
	if s.runs() {
		return nil
	}
	fs, l := s.begin()
	s.clients = s.w.net.listen("exports", s.peer)
	if s.exports, err = export.Listen(export.Options{Listener: s.clients}); err != nil {
		return err
	}
	cache := vault.NewCache(8 << 20)
	n, err := mastertarget.New(mastertarget.Options{
		FS: fs, Vaults: "/vaults", Vault: vault.Options{SegmentSize: s.w.conf.SegmentSize, Cache: cache}, History: s.w.conf.History,
		Exports: s.exports, Soon: func() {}, Log: s.w.conf.Log.With("role", s.name),
	})
	ctx, done, exports := s.ctx, s.done, s.exports
	if err != nil {
		err = errors.Join(err, l.Close(), exports.Close(ctx))
		cache.Close()
		s.ctx = nil
		return err
	}
	s.node = n
	go func() {
		defer close(done)
		defer cache.Close()
		_ = n.Run(ctx, l) // that it ended is known
		_ = exports.Close(context.WithoutCancel(ctx))
	}()
	return nil
}

func (s *masterTarget) stop() { s.halt(false); s.node = nil }
func (s *masterTarget) kill() { s.halt(true); s.node = nil }
