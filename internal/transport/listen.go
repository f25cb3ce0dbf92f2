package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// maxHandshakes bounds how many clients may prove themselves at a time.
const maxHandshakes = 256

// Listener accepts connections whose peers have proved who they are. Handshakes
// run beside each other, so that a slow or hostile client holds up no other.
type Listener struct {
	raw     net.Listener
	config  *tls.Config
	ready   chan net.Conn
	ctx     context.Context // ended by Close
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	log     atomic.Pointer[slog.Logger]
	refused atomic.Int64
	mu      struct {
		sync.Mutex
		err error // why accepting ended
	}
}

// Listen takes connections at addr ("host:port") from clients with a certificate
// of one of the roles; none means any role.
func (id *Identity) Listen(addr string, roles ...string) (*Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive()}
	raw, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", addr, err)
	}
	return id.Serve(raw, roles...), nil
}

// Serve is Listen on a listener that there is already, which it owns from now on.
func (id *Identity) Serve(raw net.Listener, roles ...string) *Listener {
	l := &Listener{raw: raw, config: id.ServerConfig(roles...), ready: make(chan net.Conn)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Add(1)
	go l.run()
	return l
}

// SetLogger has refused clients logged.
func (l *Listener) SetLogger(log *slog.Logger) { l.log.Store(log) }

// Refused returns how many clients failed to prove themselves.
func (l *Listener) Refused() int64 { return l.refused.Load() }

// Addr returns the address that the listener listens at.
func (l *Listener) Addr() net.Addr { return l.raw.Addr() }

// Accept returns the next connection whose peer has proved itself; a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.ctx.Done():
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.mu.err != nil {
			return nil, l.mu.err
		}
		return nil, net.ErrClosed
	}
}

// Close stops listening and waits for the handshakes to end. Connections that
// Accept returned stay open.
func (l *Listener) Close() error {
	l.cancel()
	err := l.raw.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil // closed before
	}
	return err
}

func (l *Listener) run() {
	defer l.wg.Done()
	slots := make(chan struct{}, maxHandshakes)
	for {
		raw, err := l.raw.Accept()
		if err != nil {
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() && l.ctx.Err() == nil {
				l.pause() // out of descriptors, or the client went away
				continue
			}
			l.mu.Lock()
			if l.ctx.Err() == nil {
				l.mu.err = fmt.Errorf("accept at %s: %w", l.raw.Addr(), err)
			}
			l.mu.Unlock()
			l.cancel()
			return
		}
		select {
		case slots <- struct{}{}:
		case <-l.ctx.Done():
			raw.Close()
			continue
		}
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			defer func() { <-slots }()
			l.prove(raw)
		}()
	}
}

// pause waits a moment, so that a lack of descriptors does not spin.
func (l *Listener) pause() {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.ctx.Done():
	}
}

// prove does the handshake with one client and hands it over.
func (l *Listener) prove(raw net.Conn) {
	ctx, cancel := context.WithTimeout(l.ctx, handshakeTimeout)
	defer cancel()
	c := tls.Server(raw, l.config)
	err := c.HandshakeContext(ctx)
	state := c.ConnectionState()
	var peer Peer
	if err == nil {
		peer, err = PeerOfState(&state)
	}
	if err != nil {
		_ = c.Close() // nobody is there to tell
		l.refused.Add(1)
		if log := l.log.Load(); log != nil && l.ctx.Err() == nil {
			log.Warn("refused a connection", "from", raw.RemoteAddr().String(), "error", err)
		}
		return
	}
	select {
	case l.ready <- &Conn{Conn: c, peer: peer}:
	case <-l.ctx.Done():
		_ = c.Close() // nobody is there to tell
	}
}
