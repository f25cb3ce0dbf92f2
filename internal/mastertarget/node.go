package mastertarget

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	pb "farside/internal/api/farside/v1"
	"farside/internal/export"
	"farside/internal/vault"
	"farside/internal/vfs"
)

// Options say what a Node lives on.
type Options struct {
	FS      vfs.FS
	Vaults  string        // directory of the vaults in FS; made if it is missing
	Vault   vault.Options // of each
	History time.Duration // that is kept where the assignment says nothing
	Exports *export.Server
	Soon    func() // called when something happened that people wait for
	Log     *slog.Logger
}

// Node is a master target without its surroundings: where assignments come from, reports
// go to and connections come in is its owner's business. Run gives it the real ones; a simulation others.
type Node struct{ s *server }

// New makes a Node that has nothing to do yet. The Exports stay the owner's.
func New(o Options) (*Node, error) {
	if err := vfs.MakeDir(o.FS, o.Vaults); err != nil {
		return nil, fmt.Errorf("master target: %w", err)
	}
	return &Node{newServer(o.FS, o.Vaults, o.Vault, o.History, o.Exports, o.Soon, o.Log)}, nil
}

// Assign notes an assignment; Run follows it.
func (n *Node) Assign(a *pb.MasterTargetAssignment) { n.s.assign(a) }

// Report tells how machines and views are.
func (n *Node) Report() *pb.Report { return n.s.report() }

// Run serves process servers that come in by l, which it closes, until ctx ends. The error is
// that of l.
func (n *Node) Run(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	g.Go(func() error {
		return n.s.links.Accept(ctx, l, func(c net.Conn, err error) {
			n.s.log.Info("process server's connection ended", "from", c.RemoteAddr(), "error", err)
		})
	})
	g.Go(func() error { return n.s.run(ctx) })
	return g.Wait()
}
