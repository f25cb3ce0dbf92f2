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
	"farside/internal/control"
	"farside/internal/dr"
	"farside/internal/transport"
	"farside/internal/vfs"
)

const (
	reportEvery = time.Second
	retryEvery  = 5 * time.Second // streams that could not begin
)

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
	if err := vfs.OS().MkdirAll(cfg.Spool); err != nil {
		return errors.Join(fmt.Errorf("process server: %w", err), listener.Close())
	}
	s := newServer(vfs.OS(), cfg.Spool, int64(cfg.SpoolLimit), dialTarget(id), log)
	s.total = int64(cfg.SpoolTotal)
	disk, _ := vfs.Space(vfs.OS(), cfg.Spool)
	s.room.SetFloor(cfg.reserve(disk))
	advertise := cfg.Advertise
	if advertise == "" {
		advertise = listener.Addr().String()
	}
	log.Info("process server runs", "listen", listener.Addr(), "advertise", advertise, "spool", cfg.Spool)

	asked := ctx
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	g.Go(func() error {
		return s.links.Accept(ctx, listener, func(c net.Conn, err error) {
			log.Info("agent's connection ended", "from", c.RemoteAddr(), "error", err)
		})
	})
	g.Go(func() error {
		defer s.close()
		return client.Watch(ctx, func(a *pb.Assignment) { s.assign(ctx, a.GetProcessServer()) })
	})
	g.Go(func() error { return retryStreams(ctx, s) })
	g.Go(func() error {
		return client.Report(ctx, func() *pb.Report {
			r := s.report()
			r.Addresses = []string{advertise}
			return r
		}, reportEvery)
	})
	if err := g.Wait(); err != nil && asked.Err() == nil {
		return fmt.Errorf("process server: %w", err)
	}
	return nil
}

func retryStreams(ctx context.Context, s *server) error {
	tick := time.NewTicker(retryEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.retry(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// dialTarget connects to the master target of a route, trying its addresses in
// turn.
func dialTarget(id *transport.Identity) dialer {
	return func(ctx context.Context, r route) (net.Conn, error) {
		node, err := dr.ParseNodeID(r.target)
		if err != nil || r.addrs == "" {
			return nil, fmt.Errorf("no master target with an address is assigned: %w", dr.ErrUnavailable)
		}
		var errs []error
		for addr := range strings.SplitSeq(r.addrs, ",") {
			conn, err := id.DialPeer(ctx, addr, transport.Peer{Role: transport.RoleMasterTarget, Node: node})
			if err == nil {
				limitUnsent(conn)
				return conn, nil
			}
			errs = append(errs, err)
		}
		return nil, errors.Join(errs...)
	}
}
