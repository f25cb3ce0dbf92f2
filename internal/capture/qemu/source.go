package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/tap"
	"farside/internal/dr"
	"farside/internal/nbd"
)

// How long QEMU may take, and how often its jobs are looked at while nothing happens.
const (
	askTimeout   = time.Second // for a question
	openTimeout  = 30 * time.Second
	closeTimeout = 10 * time.Second
	watchEvery   = 250 * time.Millisecond
	lastWait     = 10 * time.Millisecond // for events after the end
)

// Source captures disks of a running guest. It ends, with an error of Next, when QEMU ends or
// a mirror of ours does.
type Source struct {
	*tap.Tap
	monitor  *Monitor
	guest    *Guest
	server   *nbd.Server
	writers  *tracked
	images   map[dr.DiskID]*image
	jobs     []string
	serving  bool // QEMU's NBD server was started
	served   chan error
	sessions atomic.Int32       // connections whose requests may still be at work
	stop     context.CancelFunc // of the watcher
	watched  chan struct{}
	once     sync.Once

	mu struct {
		sync.Mutex
		broken error // why changes may be missing
	}
}

var _ capture.Verifier = (*Source)(nil)

// Open begins to capture disks, whose paths are PathPrefix and a configured name. Anything
// that an earlier process left in this QEMU is removed before. queue is the tap's. Errors wrap
// dr.ErrUnavailable if QEMU does not run, dr.ErrNotFound if it has no such disk, dr.ErrUnsupported on
// systems without the needed socket calls.
func (g *Guest) Open(ctx context.Context, disks []capture.Disk, queue int64) (_ *Source, err error) {
	if !canTrack {
		return nil, fmt.Errorf("capture a guest on this system: %w", dr.ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	m, err := g.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := clean(ctx, m, false); err != nil {
		return nil, fmt.Errorf("remove what an earlier run left in qemu: %w", err)
	}
	s := &Source{guest: g, monitor: m, images: make(map[dr.DiskID]*image)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.attach(ctx, disks, queue); err != nil {
		return nil, fmt.Errorf("mirror the guest's disks: %w", err)
	}
	watch, stop := context.WithCancel(context.Background())
	s.stop, s.watched = stop, make(chan struct{})
	g.mu.Lock()
	g.mu.source = s
	g.mu.Unlock()
	go s.watch(watch) // Close waits for it
	return s, nil
}

// attach sets all up. The order matters: the exports stand before the mirrors, so that
// whatever the tap is asked to read can be read; the drain comes last.
func (s *Source) attach(ctx context.Context, disks []capture.Disk, queue int64) error {
	nodes, err := findNodes(ctx, s.monitor)
	if err != nil {
		return err
	}
	if err := s.export(ctx, disks, nodes); err != nil {
		return fmt.Errorf("read the images: %w", err)
	}
	if err := s.serve(disks, queue); err != nil {
		return err
	}
	for _, d := range disks {
		if err := s.mirror(ctx, d, nodes[nameOf(d)]); err != nil {
			return err
		}
	}
	if err := s.ready(ctx); err != nil {
		return err
	}
	// The start of a mirror drains its disk, but the mirror repeats writes from a little later on. A
	// transaction begins with a drain of all disks, also one without actions: what came between is on
	// the images behind it.
	if err := s.monitor.Run(ctx, "transaction", map[string]any{"actions": []any{}}, nil); err != nil {
		return fmt.Errorf("drain the guest's disks: %w", err)
	}
	return s.alive()
}

func nameOf(d capture.Disk) string { return strings.TrimPrefix(d.Path, PathPrefix) }

func ourID(what string, id dr.DiskID) string {
	return ourPrefix + what + "-" + strconv.Itoa(int(id))
}

// unixAddress is a socket address as nbd-server-start wants it.
func unixAddress(path string) map[string]any {
	return map[string]any{"type": "unix", "data": map[string]any{"path": path}}
}

// export has QEMU serve the disks for reading, and connects.
func (s *Source) export(ctx context.Context, disks []capture.Disk, nodes map[string]node) error {
	socket := filepath.Join(s.guest.opts.Dir, "image.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := s.monitor.Run(ctx, "nbd-server-start", map[string]any{"addr": unixAddress(socket)}, nil); err != nil {
		return fmt.Errorf("%w (QEMU has one NBD server; it must not be in use)", err)
	}
	s.serving = true
	for _, d := range disks {
		n, ok := nodes[nameOf(d)]
		if !ok || !strings.HasPrefix(d.Path, PathPrefix) {
			return fmt.Errorf("find disk %s of the guest: %w", d.Path, dr.ErrNotFound)
		}
		name := ourID("image", d.ID)
		if err := s.monitor.Run(ctx, "block-export-add", map[string]any{
			"type": "nbd", "id": name, "node-name": n.name, "name": name, "writable": false,
		}, nil); err != nil {
			return err
		}
		c, err := nbd.Dial(ctx, nbd.URI{Network: "unix", Address: socket, Name: name}.String(), nil)
		if err != nil {
			return err
		}
		s.images[d.ID] = &image{Client: c}
	}
	return nil
}

// serve makes the tap and its server.
func (s *Source) serve(disks []capture.Disk, queue int64) error {
	var behind []tap.Disk
	for _, d := range disks {
		behind = append(behind, tap.Disk{ID: d.ID, Path: d.Path, Backing: s.images[d.ID]})
	}
	var err error
	if s.Tap, err = tap.New(behind, queue, nil); err != nil {
		return err
	}
	if len(disks) > 1 {
		s.SetGate(s.alive) // what came of one disk must not go without what was lost of another
	}
	socket := filepath.Join(s.guest.opts.Dir, "tap.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s.writers = &tracked{Listener: l}
	if s.server, err = nbd.NewServer(nbd.Config{Lookup: s.lookup}); err != nil {
		return errors.Join(err, l.Close())
	}
	s.served = make(chan error, 1)
	go func() { s.served <- s.server.Serve(s.writers) }() // Close waits for it
	return nil
}

// lookup finds the target of a mirror.
func (s *Source) lookup(name string) (*nbd.Export, error) {
	for id, i := range s.images {
		if ourID("target", id) == name {
			s.sessions.Add(1)
			return &nbd.Export{
				Device: &target{Device: s.Device(id), image: i}, MinBlock: dr.SectorSize,
				Release: func() { s.sessions.Add(-1) },
			}, nil
		}
	}
	return nil, nbd.ErrUnknownExport
}

// mirror begins to repeat the writes of a disk.
func (s *Source) mirror(ctx context.Context, d capture.Disk, n node) error {
	to, id := ourID("target", d.ID), ourID("mirror", d.ID)
	if err := s.monitor.Run(ctx, "blockdev-add", map[string]any{
		"driver": "nbd", "node-name": to, "export": to, "discard": "unmap",
		"server": map[string]any{"type": "unix", "path": filepath.Join(s.guest.opts.Dir, "tap.sock")},
	}, nil); err != nil {
		return err
	}
	s.jobs = append(s.jobs, id)
	return s.monitor.Run(ctx, "blockdev-mirror", map[string]any{
		"job-id": id, "device": n.name, "target": to, "sync": "none", "copy-mode": "write-blocking",
		"on-target-error": "report", "on-source-error": "report",
	}, nil)
}

// ready waits until all mirrors repeat writes.
func (s *Source) ready(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		jobs, err := ourJobs(ctx, s.monitor)
		if err != nil {
			return false, err
		}
		for _, id := range s.jobs {
			switch j, ok := jobs[id]; {
			case !ok || j.Error != "":
				return false, fmt.Errorf("mirror %s ended: %s: %w", id, j.Error, dr.ErrUnavailable)
			case j.Status != "ready":
				return false, nil
			}
		}
		return true, nil
	})
}

// fail notes that changes may be missing. Only the first reason counts.
func (s *Source) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.broken == nil {
		s.mu.broken = err
	}
}

// alive returns nil if no change is missing of those that were submitted before.
func (s *Source) alive() error {
	if s.writers != nil && s.writers.gone() {
		s.fail(fmt.Errorf("a connection from qemu ended: %w", dr.ErrUnavailable))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.broken
}

// Verify implements capture.Verifier: it asks QEMU whether all mirrors run.
func (s *Source) Verify(ctx context.Context) (time.Time, error) {
	now := time.Now()
	if err := s.alive(); err != nil {
		return now, s.ended(err)
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	jobs, err := ourJobs(ctx, s.monitor)
	if err != nil {
		if ctx.Err() != nil && s.monitor.Err() == nil {
			return now, err // slow: ask again later
		}
		s.fail(err)
	}
	for _, id := range s.jobs {
		if j := jobs[id]; err == nil && j.Status != "ready" {
			s.fail(fmt.Errorf("mirror %s is %q, not ready: %w", id, j.Status, dr.ErrUnavailable))
		}
	}
	// Asked last: a job that failed because of its connection says so only some time later.
	if err := s.alive(); err != nil {
		return now, s.ended(err)
	}
	return now, nil
}

// ended says that the Source is of no use any more. It hides the kind of err: to Verify, unavailable
// means that it is worth asking again.
func (s *Source) ended(err error) error { return fmt.Errorf("capture of the guest ended: %v", err) } //nolint:errorlint // see above

// Next implements capture.Stream. Of an only disk it hands over all that came before the end.
func (s *Source) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	err := s.alive()
	if err == nil {
		return s.Tap.Next(ctx, wait, fn)
	}
	if len(s.images) == 1 {
		settled := s.sessions.Load() == 0
		n, e := s.Tap.Next(ctx, min(wait, lastWait), fn)
		if n > 0 || e != nil || !settled {
			return n, e
		}
	}
	return 0, fmt.Errorf("capture of the guest ended: %w", err)
}

// Stats implements capture.Source.
func (s *Source) Stats() capture.Stats {
	st := s.Tap.Stats()
	st.Detached = s.alive() != nil
	return st
}

// event takes note of what QEMU says of our jobs.
func (s *Source) event(e Event) {
	if e.Name != "JOB_STATUS_CHANGE" {
		return
	}
	var j job
	if json.Unmarshal(e.Data, &j) != nil || !ours(j.ID) {
		return
	}
	switch j.Status {
	case "aborting", "concluded", "null", "waiting", "pending":
		s.fail(fmt.Errorf("mirror %s ended: %w", j.ID, dr.ErrUnavailable))
	}
}

// watch looks for the end of the capture while nothing is written.
func (s *Source) watch(ctx context.Context) {
	defer close(s.watched)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for s.alive() == nil {
		select {
		case <-ctx.Done():
			return
		case <-s.monitor.Done():
			s.fail(s.monitor.Err())
		case <-tick.C:
			_, _ = s.Verify(ctx) // notes what it finds
		}
	}
}

// Close ends the mirrors and leaves nothing behind in QEMU, if it still runs.
func (s *Source) Close() (err error) {
	s.once.Do(func() {
		s.guest.mu.Lock()
		if s.guest.mu.source == s {
			s.guest.mu.source = nil
		}
		s.guest.mu.Unlock()
		if s.watched != nil {
			s.stop()
			<-s.watched
		}
		s.fail(fmt.Errorf("closed: %w", dr.ErrUnavailable))
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if s.monitor.Err() == nil {
			if e := clean(ctx, s.monitor, s.serving); e != nil && s.monitor.Err() == nil {
				err = fmt.Errorf("end capture of the guest: %w", e)
			}
		}
		err = errors.Join(err, s.closeServer(ctx))
	})
	return err
}

func (s *Source) closeServer(ctx context.Context) (err error) {
	if s.server != nil && s.served != nil {
		err = s.server.Shutdown(ctx)
		if e := <-s.served; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	if s.Tap != nil {
		err = errors.Join(err, s.Tap.Close())
	}
	for _, i := range s.images {
		_ = i.Client.Close() // QEMU may have ended it
	}
	return err
}
