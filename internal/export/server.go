package export

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"farside/internal/dr"
	"farside/internal/nbd"
)

// Options say where a Server listens. At least one of Socket, Listen and Listener is set.
type Options struct {
	// Socket is the path of a Unix socket, in the clear: who may open it may
	// use the exports. Its directory is made for the owner only.
	Socket string
	// Listen is a TCP address, host:port; port 0 chooses one. Clients must
	// use TLS there, unless Plain.
	Listen string
	// Plain makes Listen speak in the clear, to everyone who reaches it: only
	// for a network that nobody else is on.
	Plain bool
	// TLS is the configuration for Listen; it decides who may come.
	TLS *tls.Config
	// Host stands in the URIs of the TCP exports instead of Listen's host,
	// so that it fits the certificate.
	Host string
	// Listener is served in the clear as well, and closed by Close; the URIs don't name it. May be nil.
	Listener net.Listener
	// Listed lets clients ask for the names of all exports.
	Listed bool
	// Log is told of connections that failed. May be nil.
	Log func(error)
}

// Server offers devices as NBD exports. Make it with Listen.
type Server struct {
	unix, tcp *nbd.Server // nil if it doesn't listen there
	other     *nbd.Server // of Options.Listener
	socket    string
	address   string // host:port for URIs
	plain     bool   // no TLS there
	accepting sync.WaitGroup
	log       func(error)

	mu struct {
		sync.Mutex
		exports map[string]*export
		closed  bool
	}
}

// export is a device under a name.
type export struct {
	device   device
	readOnly bool
	gone     chan struct{}
	users    sync.WaitGroup
}

// Listen starts a server without exports.
func Listen(o Options) (_ *Server, err error) {
	s := &Server{log: o.Log}
	if s.log == nil {
		s.log = func(error) {}
	}
	s.mu.exports = map[string]*export{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close(context.Background()))
		}
	}()
	if o.Socket == "" && o.Listen == "" && o.Listener == nil {
		return nil, fmt.Errorf("listen for exports: neither socket nor address: %w", dr.ErrInvalid)
	}
	conf := nbd.Config{Lookup: s.lookup, Log: s.log}
	if o.Listed {
		conf.List = s.Names
	}
	if o.Socket != "" {
		if err := s.listenUnix(o, conf); err != nil {
			return nil, err
		}
	}
	if o.Listen != "" {
		if err := s.listenTCP(o, conf); err != nil {
			return nil, err
		}
	}
	if o.Listener != nil {
		if s.other, err = nbd.NewServer(conf); err != nil {
			return nil, err
		}
		s.accept(s.other, o.Listener)
	}
	return s, nil
}

func (s *Server) listenUnix(o Options, conf nbd.Config) error {
	if err := os.MkdirAll(filepath.Dir(o.Socket), 0o700); err != nil {
		return fmt.Errorf("make directory of export socket: %w", err)
	}
	if c, err := net.Dial("unix", o.Socket); err == nil {
		c.Close()
		return fmt.Errorf("listen for exports on %s: somebody does: %w", o.Socket, dr.ErrExists)
	}
	// Left behind by a server that was killed.
	if err := os.Remove(o.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old export socket: %w", err)
	}
	l, err := net.Listen("unix", o.Socket)
	if err != nil {
		return fmt.Errorf("listen for exports: %w", err)
	}
	if s.unix, err = nbd.NewServer(conf); err != nil {
		l.Close()
		return err
	}
	s.socket = o.Socket
	s.accept(s.unix, l)
	return nil
}

func (s *Server) listenTCP(o Options, conf nbd.Config) error {
	if s.plain = o.Plain; !o.Plain {
		conf.TLS, conf.Mode = o.TLS, nbd.TLSRequired
	}
	var err error
	if s.tcp, err = nbd.NewServer(conf); err != nil {
		return err
	}
	l, err := net.Listen("tcp", o.Listen)
	if err != nil {
		return fmt.Errorf("listen for exports: %w", err)
	}
	s.address = l.Addr().String()
	if o.Host != "" {
		_, port, err := net.SplitHostPort(s.address)
		if err != nil {
			l.Close()
			return err
		}
		s.address = net.JoinHostPort(o.Host, port)
	}
	s.accept(s.tcp, l)
	return nil
}

func (s *Server) accept(n *nbd.Server, l net.Listener) {
	s.accepting.Go(func() { // ends when n is shut down
		if err := n.Serve(l); !errors.Is(err, nbd.ErrServerClosed) {
			s.log(err)
		}
	})
}

// Add offers d as name until Remove or Close. The error is dr.ErrExists if the
// name is taken, dr.ErrInvalid if it is no name.
func (s *Server) Add(name string, d Device, readOnly bool) error {
	if name == "" || len(name) > nbd.MaxName {
		return fmt.Errorf("add export %q: %w", name, dr.ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mu.closed:
		return fmt.Errorf("add export %q: server closed: %w", name, dr.ErrUnavailable)
	case s.mu.exports[name] != nil:
		return fmt.Errorf("add export %q: %w", name, dr.ErrExists)
	}
	s.mu.exports[name] = &export{device: device{d}, readOnly: readOnly, gone: make(chan struct{})}
	return nil
}

// Remove ends the connections of an export, answering what is in flight, and
// returns when nothing uses its device any more, or ctx ends. The error is
// dr.ErrNotFound if there is no such export.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	e := s.mu.exports[name]
	delete(s.mu.exports, name)
	s.mu.Unlock()
	if e == nil {
		return fmt.Errorf("remove export %q: %w", name, dr.ErrNotFound)
	}
	close(e.gone)
	idle := make(chan struct{})
	go func() { // ends with the connections
		e.users.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("remove export %q: %w", name, ctx.Err())
	}
}

// Names returns the names of all exports, sorted.
func (s *Server) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.mu.exports))
	for name := range s.mu.exports {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// URIs returns where clients find the export of that name, local first. It
// doesn't matter whether it is there.
func (s *Server) URIs(name string) (uris []string) {
	if s.socket != "" {
		uris = append(uris, nbd.URI{Network: "unix", Address: s.socket, Name: name}.String())
	}
	if s.address != "" {
		uris = append(uris, nbd.URI{Network: "tcp", Address: s.address, Name: name, TLS: !s.plain}.String())
	}
	return uris
}

func (s *Server) lookup(name string) (*nbd.Export, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.mu.exports[name]
	if e == nil {
		return nil, nbd.ErrUnknownExport
	}
	e.users.Add(1)
	return &nbd.Export{
		Device: e.device, ReadOnly: e.readOnly, MinBlock: dr.SectorSize,
		Gone: e.gone, Release: e.users.Done,
	}, nil
}

// Close answers what is in flight and ends all connections and listeners. When
// ctx ends first, it cuts them off. The devices stay open.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	s.mu.closed = true
	s.mu.Unlock()
	var err error
	for _, n := range []*nbd.Server{s.unix, s.tcp, s.other} {
		if n != nil {
			err = errors.Join(err, n.Shutdown(ctx))
		}
	}
	s.accepting.Wait()
	return err
}
