package qemu

import (
	"net"
	"sync"
)

// tracked is a listener that remembers the connections that it accepted.
type tracked struct {
	net.Listener

	mu struct {
		sync.Mutex
		conns []net.Conn
	}
}

// Accept implements net.Listener.
func (t *tracked) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err == nil {
		t.mu.Lock()
		t.mu.conns = append(t.mu.conns, c)
		t.mu.Unlock()
	}
	return c, err
}

// gone reports whether any of the connections has ended, or is being ended by the other side, as of the call.
func (t *tracked) gone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.mu.conns {
		if hungUp(c) {
			return true
		}
	}
	return false
}
