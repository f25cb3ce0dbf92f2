package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// BaseURL is the URL to give to the generated clients with a Dialer: its host is
// a name for people, the Dialer knows the addresses.
const BaseURL = "https://config-server"

// dialTimeout bounds how long one server may take to answer.
const dialTimeout = 5 * time.Second

// Dialer connects to the first configuration server of several that answers,
// beginning with the last that did. It is safe for concurrent use.
type Dialer struct {
	mu struct {
		sync.Mutex
		servers []string // host:port
		first   int      // where to begin
	}
}

// NewDialer makes a dialer for the servers, each host:port.
func NewDialer(servers ...string) *Dialer {
	d := &Dialer{}
	d.mu.servers = slices.Clone(servers)
	return d
}

// SetServers replaces the servers, if there are any.
func (d *Dialer) SetServers(servers []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(servers) == 0 || slices.Equal(servers, d.mu.servers) {
		return
	}
	d.mu.servers, d.mu.first = slices.Clone(servers), 0
}

// Skip has the next connection begin with another server: the one in use answers
// but does not work.
func (d *Dialer) Skip() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.mu.servers); n > 0 {
		d.mu.first = (d.mu.first + 1) % n
	}
}

// Dial connects. It ignores the address that it is given, as http.Transport does
// not know better.
func (d *Dialer) Dial(ctx context.Context, network, _ string) (net.Conn, error) {
	d.mu.Lock()
	order := slices.Concat(d.mu.servers[d.mu.first:], d.mu.servers[:d.mu.first])
	d.mu.Unlock()
	var errs []error
	for _, addr := range order {
		c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
		if err == nil {
			d.works(addr)
			return c, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil, errors.New("no configuration server is known")
	}
	return nil, fmt.Errorf("no configuration server answers: %w", errors.Join(errs...))
}

func (d *Dialer) works(addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if i := slices.Index(d.mu.servers, addr); i >= 0 {
		d.mu.first = i
	}
}
