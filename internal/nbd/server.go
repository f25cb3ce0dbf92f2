package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// TLSMode says whether clients encrypt.
type TLSMode uint8

// The modes of TLS.
const (
	TLSOff      TLSMode = iota // STARTTLS is refused
	TLSAllowed                 // the client chooses
	TLSRequired                // nothing but STARTTLS is answered before it
)

// ErrUnknownExport is what a Lookup answers for a name that it doesn't know.
var ErrUnknownExport = errors.New("unknown export")

// ErrServerClosed is returned by Serve after Shutdown or Close.
var ErrServerClosed = errors.New("nbd: server closed")

// Config is how a server behaves. Zero values choose the defaults.
type Config struct {
	// Lookup finds the export that a client names; "" is the default export.
	// It is called for each connection, so exports can come and go.
	Lookup func(name string) (*Export, error)
	// List names the exports to clients that ask; nil refuses to list.
	List func() []string
	// TLS and Mode: see TLSMode. TLS must be set unless the mode is TLSOff.
	TLS  *tls.Config
	Mode TLSMode
	// Log is told about connections that end in an error. May be nil.
	Log func(error)
	// Workers is how many requests of one connection run at once (16).
	Workers int
	// Memory bounds the bytes of all requests being served (256 MiB; at
	// least two requests of MaxRequest).
	Memory int64
	// MaxConns is how many connections are served at once (256); more are
	// closed at once.
	MaxConns int
	// Handshake is how long negotiation may take (30 s).
	Handshake time.Duration
	// Stall is how long a client may stop in the middle of a request, or not
	// take its replies, before it is dropped (60 s).
	Stall time.Duration
}

func (c Config) withDefaults() Config {
	if c.Workers <= 0 {
		c.Workers = 16
	}
	if c.Memory <= 0 {
		c.Memory = 256 << 20
	}
	c.Memory = max(c.Memory, 2*MaxRequest)
	if c.MaxConns <= 0 {
		c.MaxConns = 256
	}
	if c.Handshake <= 0 {
		c.Handshake = 30 * time.Second
	}
	if c.Stall <= 0 {
		c.Stall = time.Minute
	}
	if c.Log == nil {
		c.Log = func(error) {}
	}
	return c
}

// Server serves exports to clients. Make it with NewServer.
type Server struct {
	cfg Config
	mem *memory
	// ctx ends with Close: nothing waits for memory after that.
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup // connections
	zeroes []byte         // constant

	mu struct {
		sync.Mutex
		conns     map[*session]struct{}
		listeners map[net.Listener]struct{}
		closed    bool
	}
}

// NewServer checks c and returns a server that serves once it has a listener.
func NewServer(c Config) (*Server, error) {
	if c.Lookup == nil {
		return nil, errors.New("make nbd server: no lookup function")
	}
	if c.Mode != TLSOff && c.TLS == nil {
		return nil, errors.New("make nbd server: TLS without a configuration")
	}
	s := &Server{cfg: c.withDefaults(), zeroes: make([]byte, pieceSize)}
	s.mem = newMemory(s.cfg.Memory)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.conns = map[*session]struct{}{}
	s.mu.listeners = map[net.Listener]struct{}{}
	return s, nil
}

// Serve accepts clients on l until the server is shut down, which it answers
// with ErrServerClosed, or the listener fails. It closes l. It may run for
// several listeners at once.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	if !s.track(l) {
		return ErrServerClosed
	}
	defer s.untrack(l)
	for delay := time.Duration(0); ; {
		c, err := l.Accept()
		if s.isClosed() {
			if err == nil {
				c.Close()
			}
			return ErrServerClosed
		}
		if err != nil {
			if delay = nextDelay(delay); errors.Is(err, net.ErrClosed) || delay > time.Second {
				return fmt.Errorf("accept nbd client: %w", err)
			}
			s.cfg.Log(fmt.Errorf("accept nbd client, trying again: %w", err))
			time.Sleep(delay)
			continue
		}
		delay = 0
		if !s.start(c) {
			s.cfg.Log(fmt.Errorf("refuse nbd client %s: too many connections", remote(c)))
			c.Close()
		}
	}
}

// nextDelay backs off while accepting fails, as it does without descriptors.
func nextDelay(d time.Duration) time.Duration { return max(5*time.Millisecond, 2*d) }

// start serves c in a goroutine of the server.
func (s *Server) start(c net.Conn) bool {
	ss := newSession(s, c)
	if !s.add(ss) {
		return false
	}
	go func() {
		defer s.remove(ss)
		s.report(ss)
	}()
	return true
}

// ServeConn serves one client and returns when it is gone. It closes c.
func (s *Server) ServeConn(c net.Conn) error {
	ss := newSession(s, c)
	if !s.add(ss) {
		c.Close()
		return ErrServerClosed
	}
	defer s.remove(ss)
	return ss.run()
}

func (s *Server) report(ss *session) {
	if err := ss.run(); err != nil {
		s.cfg.Log(fmt.Errorf("serve nbd client %s: %w", remote(ss.raw), err))
	}
}

// Shutdown stops accepting, lets every connection answer what it has read,
// closes them, and returns when all are gone. When ctx ends first, the rest
// is cut off and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, ss := range s.stop() {
		ss.drain()
	}
	done := make(chan struct{})
	go func() { // ends with the connections, which Close cuts
		s.work.Wait()
		close(done)
	}()
	select {
	case <-done:
		s.cancel()
		return nil
	case <-ctx.Done():
		return errors.Join(ctx.Err(), s.Close())
	}
}

// Close cuts all connections and returns when all are gone.
func (s *Server) Close() error {
	s.cancel()
	for _, ss := range s.stop() {
		ss.raw.Close()
	}
	s.work.Wait()
	return nil
}

// stop marks the server closed, closes its listeners, returns its sessions.
func (s *Server) stop() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.closed = true
	for l := range s.mu.listeners {
		l.Close()
	}
	all := make([]*session, 0, len(s.mu.conns))
	for ss := range s.mu.conns {
		all = append(all, ss)
	}
	return all
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.closed
}

func (s *Server) track(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.closed {
		s.mu.listeners[l] = struct{}{}
	}
	return !s.mu.closed
}

func (s *Server) untrack(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.listeners, l)
}

func (s *Server) add(ss *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || len(s.mu.conns) >= s.cfg.MaxConns {
		return false
	}
	s.mu.conns[ss] = struct{}{}
	s.work.Add(1)
	return true
}

func (s *Server) remove(ss *session) {
	s.mu.Lock()
	delete(s.mu.conns, ss)
	s.mu.Unlock()
	s.work.Done()
}

func remote(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" {
		return a.String()
	}
	return "(local)"
}
