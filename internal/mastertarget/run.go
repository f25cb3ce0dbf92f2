package mastertarget

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
	"farside/internal/export"
	"farside/internal/transport"
	"farside/internal/vault"
	"farside/internal/vfs"
)

const (
	reportEvery = time.Second
	// stopTimeout is how long clients of exports may take to finish at the end.
	stopTimeout = 5 * time.Second
)

// Run is the master target: it serves its assignment until ctx ends. The node
// must have joined; otherwise the error wraps dr.ErrNotFound.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	client, err := control.Open(control.Options{DataDir: cfg.Data, Version: cfg.Version, Log: log})
	if err != nil {
		return fmt.Errorf("master target: %w", err)
	}
	defer client.Close()
	id := client.Identity()
	if err := vfs.OS().MkdirAll(cfg.Vaults); err != nil {
		return fmt.Errorf("master target: %w", err)
	}
	exports, err := export.Listen(export.Options{
		Socket: cfg.NBD.Socket, Listen: cfg.NBD.Listen, Host: cfg.NBD.Host, TLS: id.ServerConfig(transport.RoleClient),
		Plain: cfg.NBD.Plaintext,
		Log:   func(err error) { log.Debug("export connection", "error", err) },
	})
	if err != nil {
		return fmt.Errorf("master target: %w", err)
	}
	listener, err := id.Listen(cfg.Listen, transport.RoleProcessServer)
	if err != nil {
		return errors.Join(fmt.Errorf("master target: listen for process servers: %w", err), exports.Close(ctx))
	}
	listener.SetLogger(log)
	cache := vault.NewCache(int64(cfg.Cache))
	defer cache.Close()
	s := newServer(vfs.OS(), cfg.Vaults, vault.Options{Cache: cache}, cfg.History, exports, client.ReportSoon, log)
	advertise := cfg.Advertise
	if advertise == "" {
		advertise = listener.Addr().String()
	}
	log.Info("master target runs", "listen", listener.Addr(), "advertise", advertise, "vaults", cfg.Vaults)
	err = s.serve(ctx, client, listener, advertise)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if closeErr := exports.Close(stop); closeErr != nil {
		log.Warn("close exports", "error", closeErr)
	}
	return err
}

// serve runs everything until ctx ends.
func (s *server) serve(ctx context.Context, client *control.Client, l net.Listener, advertise string) error {
	asked := ctx
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	g.Go(func() error {
		return s.links.Accept(ctx, l, func(c net.Conn, err error) {
			s.log.Info("process server's connection ended", "from", c.RemoteAddr(), "error", err)
		})
	})
	g.Go(func() error { return s.run(ctx) })
	g.Go(func() error {
		return client.Watch(ctx, func(a *pb.Assignment) { s.assign(a.GetMasterTarget()) })
	})
	g.Go(func() error {
		return client.Report(ctx, func() *pb.Report {
			r := s.report()
			r.Addresses = []string{advertise}
			return r
		}, reportEvery)
	})
	if err := g.Wait(); err != nil && asked.Err() == nil {
		return fmt.Errorf("master target: %w", err)
	}
	return nil
}
