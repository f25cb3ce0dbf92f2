package simtest

import (
	"context"
	"fmt"
	"net"
	"sync"

	"farside/internal/dr"
	"farside/internal/transport"
	"farside/test/wan"
)

// network connects the nodes of a World. Between each two there is a line that can be made
// slow, cut, reset or half-open.
type network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	lines     map[string]*wan.Proxy
}

func newNetwork() *network {
	return &network{listeners: map[string]*listener{}, lines: map[string]*wan.Proxy{}}
}

// listener takes in connections in memory.
type listener struct {
	of     string
	who    transport.Peer
	on     *network
	in     chan net.Conn
	closed chan struct{}
	once   sync.Once
}

type simAddr string

func (simAddr) Network() string  { return "sim" }
func (a simAddr) String() string { return string(a) }

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.in:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.on.mu.Lock()
		defer l.on.mu.Unlock()
		if l.on.listeners[l.of] == l {
			delete(l.on.listeners, l.of)
		}
	})
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return simAddr(l.of) }

// listen makes a node reachable by its name.
func (n *network) listen(name string, who transport.Peer) *listener {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := &listener{of: name, who: who, on: n, in: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[name] = l
	return l
}

// dial connects who, known as from, to the node of a name.
func (n *network) dial(ctx context.Context, from string, who transport.Peer, to string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[to]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: nobody listens: %w", to, dr.ErrUnavailable)
	}
	near, mine := transport.Pipe(who, l.who)
	n.line(from, to, who).Serve(mine)
	return near, ctx.Err()
}

// line returns the line between two nodes.
func (n *network) line(from, to string, who transport.Peer) *wan.Proxy {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := from + ">" + to
	if p := n.lines[key]; p != nil {
		return p
	}
	p := wan.New(func(ctx context.Context) (net.Conn, error) {
		n.mu.Lock()
		l := n.listeners[to]
		n.mu.Unlock()
		if l == nil {
			return nil, fmt.Errorf("connect to %s: nobody listens: %w", to, dr.ErrUnavailable)
		}
		mine, far := transport.Pipe(who, l.who)
		select {
		case l.in <- far:
			return mine, nil
		case <-l.closed:
		case <-ctx.Done():
		}
		far.Close()
		return nil, fmt.Errorf("connect to %s: %w", to, dr.ErrUnavailable)
	})
	n.lines[key] = p
	return p
}

// of returns the lines from or to a node.
func (n *network) of(name string) (all []*wan.Proxy) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, p := range n.lines {
		if len(key) > len(name) && (key[:len(name)+1] == name+">" || key[len(key)-len(name)-1:] == ">"+name) {
			all = append(all, p)
		}
	}
	return all
}

// heal makes all lines perfect.
func (n *network) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.lines {
		p.Set(wan.Line{})
	}
}

// close ends everything.
func (n *network) close() error {
	n.mu.Lock()
	lines := n.lines
	n.lines = map[string]*wan.Proxy{}
	n.mu.Unlock()
	for _, p := range lines {
		if err := p.Close(); err != nil {
			return err
		}
	}
	return nil
}
