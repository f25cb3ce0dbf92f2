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
	n, err := New(Options{
		FS: vfs.OS(), Vaults: cfg.Vaults, Vault: vault.Options{Cache: cache}, History: cfg.History,
		Exports: exports, Soon: client.ReportSoon, Log: log,
	})
	if err != nil {
		return errors.Join(err, listener.Close(), exports.Close(ctx))
	}
	advertise := cfg.Advertise
	if advertise == "" {
		advertise = listener.Addr().String()
	}
	log.Info("master target runs", "listen", listener.Addr(), "advertise", advertise, "vaults", cfg.Vaults)
	err = n.serve(ctx, client, listener, advertise)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if closeErr := exports.Close(stop); closeErr != nil {
		log.Warn("close exports", "error", closeErr)
	}
	return err
}

// serve runs everything until ctx ends.
func (n *Node) serve(ctx context.Context, client *control.Client, l net.Listener, advertise string) error {
	asked := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.Run(ctx, l) })
	g.Go(func() error {
		return client.Watch(ctx, func(a *pb.Assignment) { n.Assign(a.GetMasterTarget()) })
	})
	g.Go(func() error {
		return client.Report(ctx, func() *pb.Report {
			r := n.Report()
			r.Addresses = []string{advertise}
			return r
		}, reportEvery)
	})
	if err := g.Wait(); err != nil && asked.Err() == nil {
		return fmt.Errorf("master target: %w", err)
	}
	return nil
}
