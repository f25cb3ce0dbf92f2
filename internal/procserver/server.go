package procserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/link"
	"farside/internal/spool"
	"farside/internal/transport"
	"farside/internal/vfs"
)

// server is all streams of an assignment.
type server struct {
	fs    vfs.FS
	dir   string
	limit int64 // bytes of each spool
	total int64 // bytes of all, unless the assignment says otherwise; 0 means no bound
	room  spool.Budget
	env   env
	log   *slog.Logger
	links link.Server
	group groups
	known clones

	assigning sync.Mutex // one assign, retry or close at a time changes which streams there are
	assigned  *pb.ProcessServerAssignment
	failed    bool // some stream of it could not begin
	ended     bool // nothing is assigned any more

	mu struct {
		sync.Mutex
		streams map[dr.MachineID]*running
		notices []*pb.Notice // newest last
	}
}

const maxNotices = 32

// running is a stream with the goroutine that forwards it.
type running struct {
	*stream
	cancel context.CancelFunc
	done   chan struct{}
}

func newServer(fsys vfs.FS, dir string, limit int64, dial dialer, log *slog.Logger) *server {
	s := &server{fs: fsys, dir: dir, limit: limit, log: log}
	workers := runtime.GOMAXPROCS(0)
	s.env = env{
		dial: dial, notice: s.notice, work: make(chan struct{}, workers), meter: &meter{width: workers},
		folding: make(chan struct{}, 1),
	}
	s.links.Authorize, s.links.Open = s.authorize, s.open
	s.mu.streams = map[dr.MachineID]*running{}
	s.known.notice = s.notice
	s.env.heard = func(id dr.MachineID) { s.known.heard(id, time.Now()) }
	s.group.notice, s.group.log = s.notice, log
	s.group.stream = func(id dr.MachineID) *stream {
		if r := s.stream(id); r != nil {
			return r.stream
		}
		return nil
	}
	return s
}

func (s *server) stream(id dr.MachineID) *running {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.streams[id]
}

// authorize lets an agent send its own machine's stream and no other.
func (s *server) authorize(conn net.Conn, h link.Hello) error {
	p, err := transport.PeerOf(conn)
	if err != nil {
		return err
	}
	if p.Role != transport.RoleAgent || p.Machine != h.Machine {
		return fmt.Errorf("%v may not send the stream of machine %v: %w", p, h.Machine, dr.ErrDenied)
	}
	r := s.stream(h.Machine)
	if r == nil {
		return fmt.Errorf("machine %v is not assigned to this process server: %w", h.Machine, dr.ErrNotFound)
	}
	if r.agent != p.Node {
		return fmt.Errorf("machine %v has another agent now: %w", h.Machine, dr.ErrDenied)
	}
	if h.Timeline != r.timeline {
		return nil // open says why it may not
	}
	// Before the connection of the sender that is known makes room.
	return s.known.admit(h, time.Now())
}

func (s *server) open(ctx context.Context, h link.Hello) (link.Sink, error) {
	r := s.stream(h.Machine)
	if r == nil {
		return nil, fmt.Errorf("machine %v is not assigned to this process server: %w", h.Machine, dr.ErrNotFound)
	}
	return r.open(ctx, h)
}

// assign makes the streams those of an assignment.
func (s *server) assign(ctx context.Context, a *pb.ProcessServerAssignment) {
	s.assigning.Lock()
	defer s.assigning.Unlock()
	if s.ended {
		return
	}
	s.assigned = a
	s.applyAssigned(ctx)
	s.group.assign(ctx, a.GetGroups())
}

// retry begins the streams that could not begin before: the disk was full, say.
func (s *server) retry(ctx context.Context) {
	s.assigning.Lock()
	defer s.assigning.Unlock()
	if s.failed {
		s.applyAssigned(ctx)
	}
}

func (s *server) applyAssigned(ctx context.Context) {
	want := map[dr.MachineID]route{}
	for _, p := range s.assigned.GetStreams() {
		r, err := routeOf(p)
		if err != nil {
			s.log.Error("assignment is not understood", "error", err)
			continue
		}
		want[r.machine] = r
	}
	s.room.SetTotal(cmp.Or(s.assigned.GetLimits().GetTotalBytes(), s.total))
	s.endOthers(want)
	before := s.failed
	s.failed = false
	for id, r := range want {
		if ctx.Err() != nil || s.stream(id) != nil {
			continue
		}
		if err := s.begin(ctx, r, s.assigned.GetLimits().GetPerMachineBytes()); err != nil {
			s.failed = true
			if !before { // said already
				s.notice("spool-failed", pb.Severity_SEVERITY_ERROR, fmt.Sprintf("spool of machine %v; trying again: %v", id, err))
			}
		}
	}
}

// endOthers ends the streams that are not wanted as they are.
func (s *server) endOthers(want map[dr.MachineID]route) {
	s.mu.Lock()
	var stop []*running
	for id, r := range s.mu.streams {
		if want[id] != r.route {
			stop = append(stop, r)
			delete(s.mu.streams, id)
		}
	}
	s.mu.Unlock()
	for _, r := range stop {
		_, again := want[r.machine]
		s.end(r, again)
	}
}

func routeOf(p *pb.Stream) (route, error) {
	machine, err1 := dr.ParseMachineID(p.GetMachineId())
	agent, err2 := dr.ParseNodeID(p.GetAgentNodeId())
	if err := errors.Join(err1, err2); err != nil {
		return route{}, err
	}
	codec := frame.Zstd
	switch p.GetCodec() {
	case pb.Codec_CODEC_NONE:
		codec = frame.None
	case pb.Codec_CODEC_S2:
		codec = frame.S2
	}
	return route{
		machine: machine, agent: agent, timeline: dr.Timeline(p.GetTimeline()), codec: codec,
		target: p.GetMasterTarget().GetNodeId(), addrs: strings.Join(p.GetMasterTarget().GetAddresses(), ","),
	}, nil
}

// begin opens the spool of a route and starts forwarding.
func (s *server) begin(ctx context.Context, r route, limit int64) error {
	if limit <= 0 {
		limit = s.limit
	}
	dir := path.Join(s.dir, r.machine.String())
	o := spool.Options{Limit: limit, Budget: &s.room}
	sp, err := spool.Open(s.fs, dir, o)
	if errors.Is(err, dr.ErrCorrupt) {
		sp, err = s.setAside(dir, o, err)
	}
	if err != nil {
		return err
	}
	if at, lost := sp.Lost(); lost {
		c, _ := sp.Cursor()
		s.notice("spool-lost", pb.Severity_SEVERITY_ERROR, fmt.Sprintf(
			"machine %v: the spool ends at %v, though frames up to %v had been acknowledged; its disk has lost them, and the machine sends again what is missing",
			r.machine, c.Position, at))
	}
	ctx, cancel := context.WithCancel(ctx)
	run := &running{cancel: cancel, done: make(chan struct{})}
	run.stream = newStream(r, s.env, sp, func() { s.links.Drop(r.machine) }, s.log)
	s.mu.Lock()
	s.mu.streams[r.machine] = run
	s.mu.Unlock()
	go func() {
		defer close(run.done)
		var tending sync.WaitGroup
		tending.Go(func() { run.tend(ctx) })
		_ = run.forward(ctx) // ends with ctx only
		tending.Wait()
	}()
	return nil
}

// setAside renames a damaged spool, so that its bytes can be looked at, and
// opens an empty one: the stream starts over where the master target stands.
func (s *server) setAside(dir string, o spool.Options, damage error) (*spool.Spool, error) {
	aside := dir + ".damaged"
	for n := 2; ; n++ {
		if _, err := s.fs.Stat(aside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		aside = fmt.Sprintf("%s.damaged-%d", dir, n)
	}
	if err := errors.Join(s.fs.Rename(dir, aside), s.fs.SyncDir(s.dir)); err != nil {
		return nil, fmt.Errorf("%w; setting it aside: %w", damage, err)
	}
	s.notice("spool-damaged", pb.Severity_SEVERITY_ERROR, fmt.Sprintf("%v; kept as %s, the machine will resync", damage, aside))
	return spool.Open(s.fs, dir, o)
}

// end stops a stream. Unless it begins again, its spool is removed, provided
// that the master target has all of it.
func (s *server) end(r *running, again bool) {
	r.cancel()
	<-r.done
	s.links.Drop(r.machine)
	c, ok := r.spool.Cursor()
	durable := r.spool.Status().Durable
	if err := r.spool.Close(); err != nil {
		s.log.Error("close spool", "machine", r.machine, "error", err)
	}
	switch {
	case again:
	case !ok || c.Position.Seq <= durable:
		if err := spool.Destroy(s.fs, path.Join(s.dir, r.machine.String())); err != nil {
			s.log.Error("remove spool", "machine", r.machine, "error", err)
		}
	default:
		s.notice("spool-kept", pb.Severity_SEVERITY_WARNING,
			fmt.Sprintf("machine %v is no longer assigned here; its spool holds frames that the master target has not confirmed, and is kept", r.machine))
	}
}

// close stops all streams and keeps their spools.
func (s *server) close() {
	s.group.close()
	s.assigning.Lock()
	defer s.assigning.Unlock()
	s.assigned, s.failed, s.ended = nil, false, true
	s.mu.Lock()
	all := s.mu.streams
	s.mu.streams = map[dr.MachineID]*running{}
	s.mu.Unlock()
	for _, r := range all {
		s.end(r, true)
	}
}

func (s *server) notice(code string, severity pb.Severity, text string) {
	s.log.Warn(text, "code", code)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.notices = append(s.mu.notices, &pb.Notice{Code: code, Severity: severity, Text: text, TimeNs: time.Now().UnixNano()})
	s.mu.notices = s.mu.notices[max(0, len(s.mu.notices)-maxNotices):]
}

// report describes all streams.
func (s *server) report() *pb.Report {
	s.mu.Lock()
	all := make([]*running, 0, len(s.mu.streams))
	for _, r := range s.mu.streams {
		all = append(all, r)
	}
	notices := slices.Clone(s.mu.notices)
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *running) int { return strings.Compare(a.machine.String(), b.machine.String()) })
	work := &pb.ProcessServerReport{GroupTags: s.group.report()}
	_, work.DiskFreeBytes = vfs.Space(s.fs, s.dir)
	for _, r := range all {
		sp := r.spool.Status()
		work.Streams = append(work.Streams, r.status(sp, time.Now(), s.links.Connected(r.machine)))
		work.SpoolUsedBytes += sp.Bytes
		work.SpoolLimitBytes += sp.Limit
	}
	if total := s.room.Total(); total > 0 {
		work.SpoolLimitBytes = min(work.SpoolLimitBytes, total)
	}
	return &pb.Report{Notices: notices, Work: &pb.Report_ProcessServer{ProcessServer: work}}
}
