package confserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

const (
	catalogFile  = "catalog.db"
	maxRequest   = 32 << 20 // bytes of a call: a master target reports much
	maxJoin      = 64 << 10 // bytes of a call without credentials
	shutdownTime = 5 * time.Second
	sweepEvery   = time.Second
	tidyEvery    = time.Hour
	keepTags     = 7 * 24 * time.Hour  // the master target has them; here they only answer retries
	keepTokens   = 30 * 24 * time.Hour // after they expired
)

// server is a running configuration server.
type server struct {
	config    Config
	advertise []string // where nodes and people find it
	log       *slog.Logger
	now       func() time.Time
	catalog   *catalog.Catalog
	ca        *transport.CA
	identity  *transport.Identity
	hub       *hub
	errors    *connect.ErrorWriter
	stopping  context.Context // ends long polls when the server stops

	mu struct {
		sync.Mutex
		reports map[dr.NodeID]*lastReport
	}
}

// Run runs a configuration server until ctx ends, and stops it in good order: the
// error is nil then.
func Run(ctx context.Context, config Config, log *slog.Logger) error {
	return run(ctx, config, log, time.Now)
}

func run(ctx context.Context, config Config, log *slog.Logger, now func() time.Time) (err error) {
	if err := config.check(); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if config.ReportEvery == 0 {
		config.ReportEvery = defaultReportEvery
	}
	cat, err := catalog.Open(ctx, filepath.Join(config.DataDir, catalogFile))
	if err != nil {
		return fmt.Errorf("start configuration server: %w", err)
	}
	defer func() { err = errors.Join(err, cat.Close()) }()
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", config.Listen)
	if err != nil {
		return fmt.Errorf("start configuration server: %w", err)
	}
	defer ln.Close()
	s, err := newServer(ctx, config, ln.Addr().String(), cat, log, now)
	if err != nil {
		return fmt.Errorf("start configuration server: %w", err)
	}
	log.Info("configuration server is ready", "listen", ln.Addr().String(), "advertise", s.advertise)
	return s.serve(ctx, ln)
}

func newServer(ctx context.Context, config Config, addr string, cat *catalog.Catalog, log *slog.Logger, now func() time.Time) (*server, error) {
	s := &server{
		config: config, advertise: config.Advertise, log: log, now: now, catalog: cat,
		hub: newHub(), errors: connect.NewErrorWriter(), stopping: ctx,
	}
	if len(s.advertise) == 0 {
		s.advertise = []string{addr}
	}
	s.mu.reports = make(map[dr.NodeID]*lastReport)
	if err := s.bootstrap(ctx); err != nil {
		return nil, err
	}
	return s, s.loadReports(ctx)
}

// handler returns the API.
func (s *server) handler() http.Handler {
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxRequest),
		connect.WithInterceptors(connect.UnaryInterceptorFunc(s.tellErrors)),
		connect.WithRecover(s.recovered),
	}
	mux := http.NewServeMux()
	mux.Handle(farsidev1connect.NewNodeServiceHandler(nodeService{s}, options...))
	mux.Handle(farsidev1connect.NewFarsideServiceHandler(farsideService{s}, options...))
	return s.authenticate(mux)
}

// tellErrors gives errors of calls their codes.
func (s *server) tellErrors(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if err == nil {
			return res, nil
		}
		e := wireError(err)
		if e.Code() == connect.CodeInternal || e.Code() == connect.CodeDataLoss {
			s.log.Error("call failed", "call", req.Spec().Procedure, "error", err)
		}
		return nil, e
	}
}

func (s *server) recovered(_ context.Context, spec connect.Spec, _ http.Header, v any) error {
	s.log.Error("call panicked", "call", spec.Procedure, "panic", v, "stack", string(debug.Stack()))
	return api.NewError(connect.CodeInternal, api.KindInternal, errors.New("internal error: see the server's log"))
}

// serve serves ln until ctx ends.
func (s *server) serve(ctx context.Context, ln net.Listener) error {
	tlsConfig := s.identity.OpenServerConfig(transport.RoleAgent, transport.RoleProcessServer, transport.RoleMasterTarget)
	tlsConfig.NextProtos = []string{"h2", "http/1.1"}
	h := &http.Server{
		Handler:           s.handler(),
		TLSConfig:         tlsConfig,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := h.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		graceful, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
		defer cancel()
		if h.Shutdown(graceful) != nil {
			return h.Close() // whoever is still waiting will call again
		}
		return nil
	})
	g.Go(func() error { return s.housekeeping(ctx) })
	return g.Wait()
}

// housekeeping does what only time brings about.
func (s *server) housekeeping(ctx context.Context) error {
	sweep, tidy := time.NewTicker(sweepEvery), time.NewTicker(tidyEvery)
	defer sweep.Stop()
	defer tidy.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-sweep.C:
			err = errors.Join(s.expireTags(ctx), s.expireGroupTags(ctx), s.renewOwn())
		case <-tidy.C:
			err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
				now := s.now()
				return errors.Join(tx.ForgetTags(now.Add(-keepTags).UnixNano()), tx.ForgetGroupTags(now.Add(-keepTags).UnixNano()), tx.ForgetJoinTokens(now.Add(-keepTokens).UnixNano()))
			})
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("housekeeping failed; it is tried again", "error", err)
		}
	}
}

// expireTags gives up the tags that were not placed in time.
func (s *server) expireTags(ctx context.Context) error {
	var overdue []catalog.Tag
	find := func(tx *catalog.Tx) (err error) {
		overdue, err = tx.TagsOverdue(s.now().UnixNano())
		return err
	}
	if err := s.catalog.Read(ctx, find); err != nil || len(overdue) == 0 {
		return err
	}
	var wake []dr.NodeID
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		for _, t := range overdue {
			m, err := tx.Machine(t.Machine)
			if err != nil {
				return err
			}
			wake = append(wake, m.Node)
			if err := tx.FailTag(t.ID, tagNotInTime); err != nil {
				return err
			}
		}
		return nil
	})
	s.hub.wake(wake...)
	return err
}

// expireGroupTags gives up the tags of groups that were not durable in time.
func (s *server) expireGroupTags(ctx context.Context) error {
	var wake []dr.NodeID
	err := s.catalog.Note(ctx, func(tx *catalog.Tx) (err error) {
		wake, err = tx.ExpireGroupTags(s.now().UnixNano(), tagNotInTime)
		return err
	})
	if len(wake) > 0 {
		s.hub.wake(wake...)
	}
	return err
}

// renewOwn renews the server's own certificate in time.
func (s *server) renewOwn() error {
	if s.now().Before(s.identity.RenewAt()) {
		return nil
	}
	key, csr, err := transport.NewRequest()
	if err != nil {
		return err
	}
	chain, err := s.ca.Issue(csr, s.identity.Peer(), transport.NodeLifetime, s.identity.Names()...)
	if err != nil {
		return err
	}
	return s.identity.Replace(key, chain, s.ca.Authorities())
}

// loadReports fills the cache of reports.
func (s *server) loadReports(ctx context.Context) error {
	return s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		all, err := tx.Reports()
		if err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, row := range all {
			r := &farsidev1.Report{}
			if err := proto.Unmarshal(row.Body, r); err != nil {
				s.log.Warn("a kept report can't be read; the next replaces it", "node", row.Node, "error", err)
				continue
			}
			s.mu.reports[row.Node] = &lastReport{Report: r, received: time.Unix(0, row.Received)}
		}
		return nil
	})
}

// report returns a node's last report; nil if there is none. It must not be changed.
func (s *server) report(id dr.NodeID) *lastReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.reports[id]
}

func (s *server) freshFor() time.Duration { return freshFor + 3*s.config.ReportEvery }

// online reports whether a node has reported lately.
func (s *server) online(r *lastReport) bool {
	return r != nil && s.now().Sub(r.received) <= s.freshFor()
}

// hosts returns the hosts of the advertised addresses, for the certificate.
func (s *server) hosts() []string {
	names := []string{"localhost", "127.0.0.1", "::1"}
	for _, a := range s.advertise {
		host, _, err := net.SplitHostPort(a)
		if err == nil && !slices.Contains(names, host) && !strings.Contains(host, "%") && len(names) < 16 {
			names = append(names, host)
		}
	}
	return names
}
