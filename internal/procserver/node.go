package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/vfs"
)

// Options say what a Node lives on.
type Options struct {
	FS    vfs.FS
	Spool string // directory of the spools in FS; made if it is missing
	// Limit, Total and Reserve are bytes: of each spool, of all of them, and what is left free on their disk.
	// 0 means no bound.
	Limit, Total, Reserve int64
	// Dial connects to a master target at one of its addresses.
	Dial func(ctx context.Context, target dr.NodeID, addr string) (net.Conn, error)
	Log  *slog.Logger
}

// Node is a process server without its surroundings: where assignments come from, reports
// go to and connections come in is its owner's business. Run gives it the real ones; a simulation others.
type Node struct{ s *server }

// New makes a Node that has nothing to do yet.
func New(o Options) (*Node, error) {
	if err := vfs.MakeDir(o.FS, o.Spool); err != nil {
		return nil, fmt.Errorf("process server: %w", err)
	}
	s := newServer(o.FS, o.Spool, o.Limit, dialTarget(o.Dial), o.Log)
	s.total = o.Total
	s.room.SetFloor(o.Reserve)
	return &Node{s}, nil
}

// Assign makes the streams those of a. Only as long as Run runs.
func (n *Node) Assign(ctx context.Context, a *pb.ProcessServerAssignment) { n.s.assign(ctx, a) }

// Report tells how the streams are.
func (n *Node) Report() *pb.Report { return n.s.report() }

// retryEvery is how often streams are begun again that could not begin.
const retryEvery = 5 * time.Second

// Run serves agents that come in by l, which it closes, until ctx ends. The error is that of l.
func (n *Node) Run(ctx context.Context, l net.Listener) error {
	defer n.s.close()
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	g.Go(func() error {
		return n.s.links.Accept(ctx, l, func(c net.Conn, err error) {
			n.s.log.Info("agent's connection ended", "from", c.RemoteAddr(), "error", err)
		})
	})
	g.Go(func() error {
		tick := time.NewTicker(retryEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				n.s.retry(ctx)
			case <-ctx.Done():
				return nil
			}
		}
	})
	return g.Wait()
}

// dialTarget connects to the master target of a route, trying its addresses in
// turn.
func dialTarget(dial func(ctx context.Context, target dr.NodeID, addr string) (net.Conn, error)) dialer {
	return func(ctx context.Context, r route) (net.Conn, error) {
		node, err := dr.ParseNodeID(r.target)
		if err != nil || r.addrs == "" {
			return nil, fmt.Errorf("no master target with an address is assigned: %w", dr.ErrUnavailable)
		}
		var errs []error
		for addr := range strings.SplitSeq(r.addrs, ",") {
			conn, err := dial(ctx, node, addr)
			if err == nil {
				return conn, nil
			}
			errs = append(errs, err)
		}
		return nil, errors.Join(errs...)
	}
}
