package agent

import (
	"context"
	"log/slog"
	"net"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/blockdev"
	"farside/internal/capture"
)

// Options say what a Node lives on.
type Options struct {
	// Open begins or goes on to capture disks. The Node closes what it returns.
	Open func(disks []capture.Disk) (capture.Source, error)
	// Dial connects to a process server, "" for any, at one of its addresses.
	Dial   func(ctx context.Context, node, addr string) (net.Conn, error)
	Memory int64 // bytes that its replication may hold
	// CompareRate bounds what comparisons read, in bytes per second; 0 sets no bound.
	CompareRate int64
	// CompareEvery is how long a pass of the background comparison takes; 0: there is none.
	CompareEvery time.Duration
	Log          *slog.Logger
}

// Node is an agent without its surroundings: no devices, no file systems to freeze, and where assignments come
// from and reports go to is its owner's business. Simulations use it; Run is the agent of a real machine.
type Node struct{ a *agent }

// New makes a Node that has nothing to do yet.
func New(o Options) *Node {
	open := func(disks []capture.Disk, _ string, _ int64) (opened, error) {
		src, err := o.Open(disks)
		if err != nil {
			return opened{}, err
		}
		return checked(opened{src: src, driver: "memory"}, disks)
	}
	a := newAgent(open, o.Dial, o.Memory, o.Log)
	a.scan = func() blockdev.Machine { return blockdev.Machine{} } // a machine that does not tell
	a.compareRate, a.background = o.CompareRate, &background{every: o.CompareEvery}
	return &Node{a}
}

// Assign replaces what is to be done.
func (n *Node) Assign(w *pb.AgentAssignment) { n.a.assign(w) }

// Report tells how the replication is.
func (n *Node) Report() *pb.AgentReport { return n.a.report(time.Now()) }

// Run does what is assigned until ctx ends.
func (n *Node) Run(ctx context.Context) { _ = n.a.run(ctx) } // that ctx ended is no news
