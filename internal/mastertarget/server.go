package mastertarget

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"path"
	"runtime"
	"slices"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/export"
	"farside/internal/link"
	"farside/internal/transport"
	"farside/internal/vault"
	"farside/internal/vfs"
)

// retryEvery is how often what failed is tried again.
const retryEvery = time.Second

// server is everything that the assignment asks for. Only reconcile, called by
// one goroutine, changes which machines and views there are.
type server struct {
	fs      vfs.FS
	dir     string // of the vaults
	options vault.Options
	history time.Duration // if the assignment doesn't say
	exports *export.Server
	log     *slog.Logger
	links   link.Server
	hash    chan struct{} // has room for as many as may read and hash at a time
	changed chan struct{} // has a token when there is a new assignment
	soon    func()        // asks for a report

	mu struct {
		sync.Mutex
		assignment *pb.MasterTargetAssignment
		machines   map[dr.MachineID]*machine
		faults     map[dr.MachineID]error // machines whose vault can't be opened
		views      map[string]*openView
		failed     map[string]failedView // wanted views that are not open
	}
}

// failedView is why a wanted view is not open.
type failedView struct {
	wanted wantedView
	err    error
}

func newServer(fsys vfs.FS, dir string, o vault.Options, history time.Duration, exports *export.Server, soon func(), log *slog.Logger) *server {
	s := &server{
		fs: fsys, dir: dir, options: o, history: history, exports: exports, log: log,
		changed: make(chan struct{}, 1), soon: soon, hash: make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
	s.links.Authorize = s.authorize
	s.links.Open = s.open
	s.mu.machines = map[dr.MachineID]*machine{}
	s.mu.faults = map[dr.MachineID]error{}
	s.mu.views = map[string]*openView{}
	s.mu.failed = map[string]failedView{}
	return s
}

// assign notes an assignment for run.
func (s *server) assign(a *pb.MasterTargetAssignment) {
	s.mu.Lock()
	s.mu.assignment = a
	s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// run reconciles until ctx ends, then closes everything; branches stay.
func (s *server) run(ctx context.Context) error {
	defer s.close()
	retry := time.NewTicker(retryEvery)
	defer retry.Stop()
	for {
		select {
		case <-s.changed:
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
		if s.reconcile(ctx) {
			s.soon()
		}
	}
}

// reconcile brings machines and views to what the assignment says, as far as
// that goes now. It reports whether anything changed.
func (s *server) reconcile(ctx context.Context) (changed bool) {
	s.mu.Lock()
	a := s.mu.assignment
	s.mu.Unlock()
	if a == nil {
		return false
	}
	machines, views := s.understand(a)
	for id, v := range s.openViews() {
		m := s.machine(v.wanted.machine)
		_, keep := machines[v.wanted.machine]
		_, want := views[id]
		if m.usable() && keep && want {
			continue
		}
		s.closeView(id, v, keep && !want)
		changed = true
	}
	for id, m := range s.allMachines() {
		if _, want := machines[id]; !want || !m.usable() {
			s.closeMachine(id, m)
			changed = true
		}
	}
	for id, w := range machines {
		s.keepMachine(ctx, id, w)
	}
	changed = s.keepViews(views) || changed
	s.discardLeftovers(views)
	return changed
}

// understand reads the assignment; what it can't read it says and leaves out.
func (s *server) understand(a *pb.MasterTargetAssignment) (map[dr.MachineID]wanted, map[string]wantedView) {
	machines, views := map[dr.MachineID]wanted{}, map[string]wantedView{}
	for _, p := range a.GetMachines() {
		w, err := wantedOf(p)
		if err != nil {
			s.log.Error("assignment is not understood", "error", err)
			continue
		}
		if w.window == 0 {
			w.window = s.history
		}
		machines[w.id] = w
	}
	for _, p := range a.GetViews() {
		w, err := wantedViewOf(p)
		if err != nil {
			s.log.Error("assignment is not understood", "error", err)
			continue
		}
		views[w.id] = w
	}
	return machines, views
}

func (s *server) machine(id dr.MachineID) *machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.machines[id]
}

func (s *server) allMachines() map[dr.MachineID]*machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.mu.machines)
}

func (s *server) openViews() map[string]*openView {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.mu.views)
}

// keepMachine opens a machine's vault unless it is open, and hands it its
// assignment.
func (s *server) keepMachine(ctx context.Context, id dr.MachineID, w wanted) {
	m := s.machine(id)
	if m == nil {
		var err error
		m, err = openMachine(ctx, s.fs, path.Join(s.dir, id.String()), s.options, w, s.hash, s.log)
		s.mu.Lock()
		if err != nil {
			if s.mu.faults[id] == nil {
				s.log.Error("open vault", "machine", id, "error", err)
			}
			s.mu.faults[id] = err
			s.mu.Unlock()
			return
		}
		delete(s.mu.faults, id)
		s.mu.machines[id] = m
		s.mu.Unlock()
	}
	drop, err := m.assign(w)
	if err != nil {
		_ = m.failed(err)
	}
	if drop {
		s.links.Drop(id)
	}
}

func (s *server) closeMachine(id dr.MachineID, m *machine) {
	s.mu.Lock()
	delete(s.mu.machines, id)
	s.mu.Unlock()
	s.links.Drop(id)
	m.close()
}

// keepViews opens the views that are not open.
func (s *server) keepViews(views map[string]wantedView) (changed bool) {
	failed := map[string]failedView{}
	for id, w := range views {
		if s.openViews()[id] != nil {
			continue
		}
		m := s.machine(w.machine)
		if m == nil {
			failed[id] = failedView{w, fmt.Errorf("machine %v is not kept here, or its vault can't be opened: %w", w.machine, dr.ErrUnavailable)}
			continue
		}
		v, err := openNow(m, w, s.exports)
		if err != nil {
			failed[id] = failedView{w, err}
			continue
		}
		s.log.Info("view opened", "view", id, "machine", w.machine, "position", v.point.Position, "took", v.took)
		s.mu.Lock()
		s.mu.views[id] = v
		s.mu.Unlock()
		changed = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, f := range failed {
		changed = changed || s.mu.failed[id].err == nil
		if s.mu.failed[id].err == nil {
			s.log.Warn("view can't be opened", "view", id, "error", f.err)
		}
	}
	s.mu.failed = failed
	return changed
}

func (s *server) closeView(id string, v *openView, discard bool) {
	s.mu.Lock()
	delete(s.mu.views, id)
	s.mu.Unlock()
	if err := v.close(s.exports, discard); err != nil {
		s.log.Warn("close view", "view", id, "error", err)
	}
}

// discardLeftovers removes branches of views that are not wanted any more, but
// went on living through a crash.
func (s *server) discardLeftovers(views map[string]wantedView) {
	keep := map[dr.MachineID][]dr.Timeline{}
	for _, w := range views {
		keep[w.machine] = append(keep[w.machine], w.branch)
	}
	for _, v := range s.openViews() {
		keep[v.wanted.machine] = append(keep[v.wanted.machine], v.view.Timeline())
	}
	for id, m := range s.allMachines() {
		for _, tl := range m.vault.Branches() {
			if slices.Contains(keep[id], tl) {
				continue
			}
			if err := m.vault.DiscardBranch(tl); err != nil {
				s.log.Warn("discard branch", "machine", id, "timeline", tl, "error", err)
			}
		}
	}
}

// close ends everything and keeps what is stored.
func (s *server) close() {
	for id, v := range s.openViews() {
		s.closeView(id, v, false)
	}
	for id, m := range s.allMachines() {
		s.closeMachine(id, m)
	}
}

// authorize lets the assigned process servers write the streams of the
// machines that are kept here.
func (s *server) authorize(conn net.Conn, h link.Hello) error {
	p, err := transport.PeerOf(conn)
	if err != nil {
		return err
	}
	m := s.machine(h.Machine)
	if m == nil {
		return fmt.Errorf("machine %v is not kept on this master target: %w", h.Machine, dr.ErrNotFound)
	}
	w := m.wanted()
	switch {
	case p.Role != transport.RoleProcessServer || !slices.Contains(w.writers, p.Node):
		return fmt.Errorf("%v may not write the stream of machine %v: %w", p, h.Machine, dr.ErrDenied)
	case w.retired:
		return fmt.Errorf("machine %v is no longer protected: %w", h.Machine, dr.ErrDenied)
	case h.Timeline != w.timeline:
		return fmt.Errorf("stream of timeline %d, current is %d: %w", h.Timeline, w.timeline, dr.ErrTimeline)
	}
	return nil
}

func (s *server) open(_ context.Context, h link.Hello) (link.Sink, error) {
	m := s.machine(h.Machine)
	if m == nil {
		return nil, fmt.Errorf("machine %v is not kept on this master target: %w", h.Machine, dr.ErrNotFound)
	}
	return m.open(h)
}

// errorKind names the kind of an error as the API does.
func errorKind(err error) string {
	for kind, name := range errorKinds() {
		if errors.Is(err, kind) {
			return name
		}
	}
	return "internal"
}
