package qemu

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// PathPrefix begins the path of each disk of a guest; the name of a block device or block node of
// QEMU follows.
const PathPrefix = "qemu:"

// Options say which guest.
type Options struct {
	// Monitor is the Unix socket of a QMP monitor that nobody else uses.
	Monitor string
	// Dir is an existing directory for two sockets, tap.sock and image.sock. QEMU must be able to
	// connect to the first and to make the second. Whoever may use them sees and changes
	// the replica.
	Dir string
	// Disks are the names of block devices (-drive id=...) or of block nodes right below a
	// device (-blockdev node-name=...).
	Disks []string
}

// Guest is a QEMU that may run or not. It keeps one connection to its monitor.
type Guest struct {
	opts Options

	mu struct {
		sync.Mutex
		monitor *Monitor
		source  *Source // the open one
	}
}

// New returns a Guest. Nothing is asked of QEMU before Disks or Open.
func New(o Options) *Guest { return &Guest{opts: o} }

// Close ends the connection to the monitor. Close the Source before.
func (g *Guest) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.monitor == nil {
		return nil
	}
	err := g.mu.monitor.Close()
	g.mu.monitor = nil
	return err
}

// connect returns the connection to the monitor, a new one if the last has ended.
func (g *Guest) connect(ctx context.Context) (*Monitor, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m := g.mu.monitor; m != nil {
		if m.Err() == nil {
			return m, nil
		}
		m.Close()
		g.mu.monitor = nil
	}
	m, err := DialMonitor(ctx, g.opts.Monitor, g.event)
	if err != nil {
		return nil, err
	}
	g.mu.monitor = m
	return m, nil
}

// event passes an event on to the open Source.
func (g *Guest) event(e Event) {
	if s := g.open(); s != nil {
		s.event(e)
	}
}

func (g *Guest) open() *Source {
	if !g.mu.TryLock() {
		// Somebody connects, opens or closes. An event that is missed now is
		// found in the job's state by the Source's watcher.
		return nil
	}
	defer g.mu.Unlock()
	return g.mu.source
}

// Disks returns the configured disks with their sizes; ids are left at zero. Errors
// wrap dr.ErrUnavailable if QEMU can't be asked, and dr.ErrNotFound if it has no such disk.
func (g *Guest) Disks(ctx context.Context) ([]capture.Disk, error) {
	m, err := g.connect(ctx)
	if err != nil {
		return nil, err
	}
	nodes, err := findNodes(ctx, m)
	if err != nil {
		return nil, err
	}
	var out []capture.Disk
	for _, name := range g.opts.Disks {
		n, ok := nodes[name]
		if !ok {
			return nil, fmt.Errorf("find disk %s of the guest: %w", name, dr.ErrNotFound)
		}
		out = append(out, capture.Disk{Path: PathPrefix + name, Size: n.size})
	}
	return out, nil
}

// node is a block node that a guest's device or something else uses.
type node struct {
	name string
	size int64 // bytes
}

// findNodes returns the block nodes by their own names and by those of their devices.
func findNodes(ctx context.Context, m *Monitor) (map[string]node, error) {
	var named []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := m.Run(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &named); err != nil {
		return nil, err
	}
	out := make(map[string]node)
	for _, n := range named {
		out[n.Name] = node{n.Name, n.Image.Size}
	}
	var devices []struct {
		Device   string `json:"device"`
		Inserted struct {
			Name string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := m.Run(ctx, "query-block", nil, &devices); err != nil {
		return nil, err
	}
	for _, d := range devices {
		if n, ok := out[d.Inserted.Name]; ok && d.Device != "" {
			out[d.Device] = n
		}
	}
	return out, nil
}

// ourPrefix begins the name of everything that is ours in a QEMU.
const ourPrefix = "farside-"

func ours(name string) bool { return strings.HasPrefix(name, ourPrefix) }

// job is a block job as query-jobs shows it.
type job struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Error  string `json:"error"`
}

// ourJobs returns our block jobs by id.
func ourJobs(ctx context.Context, m *Monitor) (map[string]job, error) {
	var jobs []job
	if err := m.Run(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	out := make(map[string]job)
	for _, j := range jobs {
		if ours(j.ID) {
			out[j.ID] = j
		}
	}
	return out, nil
}

// clean removes from a QEMU all that is ours, also what an earlier process left. stop says that
// QEMU's NBD server is ours even if it has no export.
func clean(ctx context.Context, m *Monitor, stop bool) error {
	if err := endJobs(ctx, m); err != nil {
		return fmt.Errorf("end mirrors: %w", err)
	}
	if err := removeNodes(ctx, m); err != nil {
		return fmt.Errorf("remove mirror targets: %w", err)
	}
	if err := removeExports(ctx, m, stop); err != nil {
		return fmt.Errorf("remove exports: %w", err)
	}
	return nil
}

func endJobs(ctx context.Context, m *Monitor) error {
	return poll(ctx, func() (bool, error) {
		jobs, err := ourJobs(ctx, m)
		if err != nil {
			return false, err
		}
		for id, j := range jobs {
			command, args := "job-cancel", map[string]any{"id": id}
			if j.Status == "concluded" {
				command = "job-dismiss"
			}
			if err := m.Run(ctx, command, args, nil); err != nil && !refused(err) {
				return false, err
			}
		}
		return len(jobs) == 0, nil
	})
}

// refused reports whether QEMU could not do a command, as when something is gone already.
func refused(err error) bool {
	var ce *CommandError
	return errors.As(err, &ce)
}

func removeNodes(ctx context.Context, m *Monitor) error {
	nodes, err := findNodes(ctx, m)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if !ours(n.name) {
			continue
		}
		if err := m.Run(ctx, "blockdev-del", map[string]any{"node-name": n.name}, nil); err != nil {
			return err
		}
	}
	return nil
}

// removeExports removes our exports. If there were any, or stop, it ends QEMU's NBD server unless that
// serves something else.
func removeExports(ctx context.Context, m *Monitor, stop bool) error {
	others := 0
	err := poll(ctx, func() (bool, error) {
		var exports []struct {
			ID   string `json:"id"`
			Type string `json:"type"`
		}
		if err := m.Run(ctx, "query-block-exports", nil, &exports); err != nil {
			return false, err
		}
		left := 0
		others = 0
		for _, e := range exports {
			if !ours(e.ID) {
				others++
				continue
			}
			left++
			stop = true
			args := map[string]any{"id": e.ID, "mode": "hard"}
			if err := m.Run(ctx, "block-export-del", args, nil); err != nil && !refused(err) {
				return false, err
			}
		}
		return left == 0, nil
	})
	if err != nil || !stop || others > 0 {
		return err
	}
	return m.Run(ctx, "nbd-server-stop", nil, nil)
}

// poll calls f until it says that it is done.
func poll(ctx context.Context, f func() (done bool, err error)) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		done, err := f()
		if done || err != nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
