package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/api/farside/v1/farsidev1connect"
	"farside/internal/dr"
	"farside/internal/transport"
)

// assignmentFile holds, in a node's data directory, the last assignment that it got.
const assignmentFile = "assignment.json"

const (
	pollTime    = 25 * time.Second // of one Watch call, as the server waits
	callTimeout = 15 * time.Second // of any other call, and on top of pollTime
	maxMessage  = 64 << 20         // bytes of a reply
)

// Options say how to open a Client.
type Options struct {
	DataDir string
	Version string           // of the program, for reports; "" = what its build says
	Log     *slog.Logger     // nil = none
	Now     func() time.Time // nil = time.Now
}

// Client is a node's connection to the configuration servers.
type Client struct {
	dir     string
	version string
	log     *slog.Logger
	now     func() time.Time
	started time.Time
	id      *transport.Identity
	dialer  *api.Dialer
	poke    chan struct{} // asks Report to report at once
	disk    *keeper

	mu struct {
		sync.Mutex
		assignment *farsidev1.Assignment // never nil, never changed in place
		applied    uint64                // the newest revision that Watch's function has seen
		serverTime time.Time             // that the server named last; zero: never
		heardAt    time.Time             // when
		http       *http.Client
		node       farsidev1connect.NodeServiceClient
	}
}

// Open opens the client of the node in a data directory. The error wraps
// dr.ErrNotFound if that node has not joined.
func Open(o Options) (*Client, error) {
	c := &Client{dir: o.DataDir, version: o.Version, log: o.Log, now: o.Now, poke: make(chan struct{}, 1)}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	if c.version == "" {
		c.version = buildVersion()
	}
	c.started = c.now()
	c.disk = &keeper{failed: func(name string, err error) {
		c.log.Error("can't keep a file, a restart will find an older one", "file", name, "error", err)
	}}
	var err error
	if c.id, err = transport.LoadIdentity(o.DataDir, c.now); err != nil {
		return nil, fmt.Errorf("open control in %s: %w", o.DataDir, err)
	}
	a, err := loadAssignment(o.DataDir)
	if err != nil {
		return nil, fmt.Errorf("open control in %s: %w", o.DataDir, err)
	}
	c.dialer = api.NewDialer(a.GetConfigServers()...)
	c.mu.assignment = a
	c.connect()
	return c, nil
}

func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	return info.Main.Version
}

// Identity returns the node's identity, which Watch renews in time.
func (c *Client) Identity() *transport.Identity { return c.id }

// Assignment returns the last assignment; one without work if there never was any.
// It must not be changed.
func (c *Client) Assignment() *farsidev1.Assignment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.assignment
}

// applied returns the revision that the node works by; 0 for none.
func (c *Client) applied() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.applied
}

func (c *Client) setApplied(revision uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.applied = revision
}

// Close ends the client's idle connections, and waits a little for what is still to be
// written to disk.
func (c *Client) Close() error {
	c.disk.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.http.CloseIdleConnections()
	return nil
}

// connect makes new connections from here on: with the identity as it is now.
func (c *Client) connect() {
	h := &http.Client{Transport: newTransport(c.dialer, c.id)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.http != nil {
		c.mu.http.CloseIdleConnections()
	}
	c.mu.http = h
	c.mu.node = farsidev1connect.NewNodeServiceClient(h, api.BaseURL, connect.WithReadMaxBytes(maxMessage))
}

func newTransport(d *api.Dialer, id *transport.Identity) *http.Transport {
	t := baseTransport(d)
	t.TLSClientConfig = id.ClientConfig(transport.RoleConfigServer)
	return t
}

func baseTransport(d *api.Dialer) *http.Transport {
	return &http.Transport{
		DialContext:         d.Dial,
		TLSHandshakeTimeout: callTimeout,
		ForceAttemptHTTP2:   true,
		IdleConnTimeout:     2 * pollTime,
		// A server that vanished without a word is found out by pings.
		HTTP2: &http.HTTP2Config{SendPingTimeout: callTimeout, PingTimeout: callTimeout},
	}
}

// call makes one call with a time limit. A failure that another server might not
// have makes the next connection go there.
func (c *Client) call(ctx context.Context, limit time.Duration, fn func(context.Context, farsidev1connect.NodeServiceClient) error) error {
	c.mu.Lock()
	node, h := c.mu.node, c.mu.http
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := explain(fn(ctx, node))
	if errors.Is(err, dr.ErrUnavailable) {
		c.dialer.Skip()
		h.CloseIdleConnections()
	}
	return err
}

// explain gives an error of a call the domain's kind.
func explain(err error) error {
	if err == nil {
		return nil
	}
	err = transport.ExplainAlert(err)
	if errors.Is(err, dr.ErrDenied) { // by a certificate, on either side
		return err
	}
	kind, ok := map[string]error{
		api.KindInvalid: dr.ErrInvalid, api.KindNotFound: dr.ErrNotFound, api.KindExists: dr.ErrExists,
		api.KindDenied: dr.ErrDenied, api.KindCorrupt: dr.ErrCorrupt, api.KindVersion: dr.ErrVersion,
		api.KindTimeline: dr.ErrTimeline, api.KindFull: dr.ErrFull, api.KindUnsupported: dr.ErrUnsupported,
		api.KindNoPoint: dr.ErrNoPoint,
	}[api.ErrorKind(err)]
	if !ok {
		kind = dr.ErrUnavailable
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// loadAssignment reads the kept assignment. It is a copy of what the server has,
// but it also says where the server is: a broken one is an error.
func loadAssignment(dir string) (*farsidev1.Assignment, error) {
	name := filepath.Join(dir, assignmentFile)
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load assignment: %w: %w", dr.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load assignment: %w", err)
	}
	a := &farsidev1.Assignment{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, a); err != nil {
		return nil, fmt.Errorf("load assignment %s: %w: %w", name, dr.ErrCorrupt, err)
	}
	return a, nil
}

func saveAssignment(dir string, a *farsidev1.Assignment) error {
	text, err := protojson.MarshalOptions{Multiline: true}.Marshal(a)
	if err != nil {
		return fmt.Errorf("save assignment: %w", err)
	}
	if err := transport.WriteFile(filepath.Join(dir, assignmentFile), text); err != nil {
		return fmt.Errorf("save assignment: %w", err)
	}
	return nil
}

// Keep writes a small file of the node into its data directory, whole or not at all. It
// does not wait for a disk that makes it wait: the newest content is written when it can be. name is
// a plain file name that is not one of this package's.
func (c *Client) Keep(name string, content []byte) error {
	if err := c.disk.keep(name, func() error { return transport.WriteFile(filepath.Join(c.dir, name), content) }); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}

// Kept reads what Keep wrote; the error wraps fs.ErrNotExist if there is nothing.
func (c *Client) Kept(name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		return nil, fmt.Errorf("read kept file: %w", err)
	}
	return b, nil
}

// accept takes over a new assignment: on disk first, so that a restart knows it too, unless
// the disk makes it wait.
func (c *Client) accept(a *farsidev1.Assignment) {
	if len(a.GetConfigServers()) == 0 {
		a = proto.CloneOf(a)
		a.ConfigServers = c.Assignment().GetConfigServers()
	}
	if err := c.disk.keep(assignmentFile, func() error { return saveAssignment(c.dir, a) }); err != nil {
		// Working by it matters more than knowing it after a restart.
		c.log.Error("can't keep the assignment on disk", "error", err)
	}
	c.dialer.SetServers(a.GetConfigServers())
	if len(a.GetAuthorities()) > 0 {
		c.trust(a.GetAuthorities())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.assignment = a
}
