package procserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	pb "farside/internal/api/farside/v1"
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/vfs"
)

const reportEvery = time.Second

// Run is the process server: it serves its assignment until ctx ends. The node
// must have joined; otherwise the error wraps dr.ErrNotFound, or dr.ErrInvalid if it
// joined in another role.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	client, err := control.Open(control.Options{DataDir: cfg.Data, Version: cfg.Version, Log: log})
	if err != nil {
		return fmt.Errorf("process server: %w", err)
	}
	defer client.Close()
	id := client.Identity()
	if role := id.Peer().Role; role != transport.RoleProcessServer {
		return fmt.Errorf("process server: %s holds the identity of a %s: %w", cfg.Data, role, dr.ErrInvalid)
	}
	listener, err := id.Listen(cfg.Listen, transport.RoleAgent)
	if err != nil {
		return fmt.Errorf("process server: listen for agents: %w", err)
	}
	listener.SetLogger(log)
	disk, _ := vfs.Space(vfs.OS(), cfg.Spool)
	n, err := New(Options{
		FS: vfs.OS(), Spool: cfg.Spool, Limit: int64(cfg.SpoolLimit), Total: int64(cfg.SpoolTotal), Reserve: cfg.reserve(disk),
		Dial: func(ctx context.Context, node dr.NodeID, addr string) (net.Conn, error) {
			conn, err := id.DialPeer(ctx, addr, transport.Peer{Role: transport.RoleMasterTarget, Node: node})
			if err == nil {
				limitUnsent(conn)
			}
			return conn, err
		},
		Log: log,
	})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	advertise := cfg.Advertise
	if advertise == "" {
		advertise = listener.Addr().String()
	}
	log.Info("process server runs", "listen", listener.Addr(), "advertise", advertise, "spool", cfg.Spool)

	asked := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.Run(ctx, listener) })
	g.Go(func() error {
		return client.Watch(ctx, func(a *pb.Assignment) { n.Assign(ctx, a.GetProcessServer()) })
	})
	g.Go(func() error {
		return client.Report(ctx, func() *pb.Report {
			r := n.Report()
			r.Addresses = []string{advertise}
			return r
		}, reportEvery)
	})
	if err := g.Wait(); err != nil && asked.Err() == nil {
		return fmt.Errorf("process server: %w", err)
	}
	return nil
}
