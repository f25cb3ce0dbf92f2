// Package agent is the role that runs on every protected machine: it captures
// each write of the machine's disks and sends them, in order, to the process
// server, after and beside a copy of what the disks held before.
//
// Main types: Config, the configuration file; Run, the role. Within: replicator,
// a state machine that makes one stream of captured writes and bulk reads;
// outbox, the frames that are not stored yet; stream, a replicator and its link;
// pointMaker and schedule, which have the file systems stand still for a point;
// agent, which does what the configuration server assigns. docs/agent.md shows the
// states and why bulk reads and captured writes can't harm each other.
//
// The agent keeps nothing of the stream on disk: what must outlive it lies in the
// kernel (ledger, capture.Survivor). It freezes nothing itself (package quiesce does) and decides nothing about
// policy.
//
// Concurrency: Run owns all goroutines and waits for them. A replicator belongs
// to one goroutine; outbox, stream and agent are safe for concurrent use.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/fsmap"
	"farside/internal/link"
)

// agent replicates what it is told to.
type agent struct {
	open   opener
	dial   dialer
	memory int64
	log    *slog.Logger
	news   func()           // called when something happened that people wait for
	now    func() time.Time // the clock that deadlines are set by
	still  *stillness
	points schedule
	first  Reason             // of the sync behind a start, if the stream can't go on
	limit  func(memory int64) // holds the process to its memory; nil if it is not the agent's alone
	// compareRate bounds what comparisons read, in bytes a second; 0 sets no bound.
	compareRate int64
	// background compares while the stream is exact; nil: nothing does.
	background *background
	// skipFree are the kinds of file systems whose free blocks are not read.
	skipFree  []fsmap.Kind
	freeTaker *fsmap.Taker // outlives the streams, as what it asks may
	// release ends a capture that goes on without a stream; nil if there is none such.
	release func() error

	// How the machine's devices are seen.
	scan    func() blockdev.Machine
	isBlock func(path string) bool
	boot    func() link.Boot // of this system; may be nil

	notices chronicle
	record  *record // for the agent after this one; may be nil
	devices devices // guarded by mu
	mu      struct {
		sync.Mutex
		assigned *pb.AgentAssignment
		changed  chan struct{}
		stream   *stream
		driver   string
		phase    pb.Phase // as long as there is no stream
		err      error
	}
}

func newAgent(open opener, dial dialer, memory int64, log *slog.Logger) *agent {
	a := &agent{first: ReasonRestart, open: open, dial: dial, memory: memory, log: log, news: func() {}, now: time.Now}
	a.scan, a.isBlock = func() blockdev.Machine { return blockdev.Scan(os.DirFS("/")) }, blockPath
	a.mu.changed = make(chan struct{})
	a.mu.phase = pb.Phase_PHASE_IDLE
	return a
}

// assign replaces what is to be done.
func (a *agent) assign(w *pb.AgentAssignment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.assigned = w
	a.points.set(w.GetSettings().GetPoints(), time.Now())
	if s := a.mu.stream; s != nil {
		s.setTags(wantedTags(w, a.now()))
		s.setServer(serverOf(w))
	}
	close(a.mu.changed)
	a.mu.changed = make(chan struct{})
}

func (a *agent) assignment() (*pb.AgentAssignment, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.assigned, a.mu.changed
}

func serverOf(p *pb.AgentAssignment) server {
	ps := p.GetProcessServer()
	return server{node: ps.GetNodeId(), addrs: ps.GetAddresses()}
}

// work is what makes a stream what it is: if any of it changes, another one
// must begin.
type work struct {
	settings
	disks      []capture.Disk
	identities []string // of the disks; "" for one that nothing names
}

type settings struct {
	machine  dr.MachineID
	timeline dr.Timeline
	driver   string
	ring     int64
	memory   int64
	codec    frame.Codec
}

func (w *work) same(o *work) bool {
	return w.settings == o.settings && slices.Equal(w.disks, o.disks) && slices.Equal(w.identities, o.identities)
}

// workOf reads an assignment; nil means that there is nothing to replicate. Errors wrap
// dr.ErrInvalid.
func workOf(p *pb.AgentAssignment, memory int64) (*work, error) {
	if len(p.GetDisks()) == 0 {
		return nil, nil //nolint:nilnil // nothing to do is neither an error nor work
	}
	machine, err := dr.ParseMachineID(p.GetMachineId())
	if err != nil {
		return nil, fmt.Errorf("read assignment: %w", err)
	}
	s := p.GetSettings()
	w := &work{settings: settings{
		machine: machine, timeline: dr.Timeline(p.GetTimeline()), memory: memory,
		driver: s.GetCaptureDriver(), ring: s.GetRingBytes(), codec: codecOf(s.GetCodec()),
	}}
	if m := s.GetMemoryBytes(); m != 0 {
		w.memory = max(m, minMemory)
	}
	for _, d := range p.GetDisks() {
		if d.GetId() > 1<<16-1 || d.GetSize() < 0 {
			return nil, fmt.Errorf("read assignment: disk %d of %d bytes: %w", d.GetId(), d.GetSize(), dr.ErrInvalid)
		}
		w.disks = append(w.disks, capture.Disk{ID: dr.DiskID(d.GetId()), Path: d.GetPath(), Size: d.GetSize()})
		w.identities = append(w.identities, d.GetIdentity())
	}
	return w, nil
}

func codecOf(c pb.Codec) frame.Codec {
	switch c {
	case pb.Codec_CODEC_ZSTD:
		return frame.Zstd
	case pb.Codec_CODEC_S2:
		return frame.S2
	}
	return frame.None
}

// reopenAfter is the pause before a stream that failed is begun again.
const reopenAfter = 5 * time.Second

// run does what is assigned until ctx ends.
func (a *agent) run(ctx context.Context) error {
	reason := a.first
	for ctx.Err() == nil {
		p, changed := a.assignment()
		w, err := workOf(p, a.memory)
		switch {
		case err != nil:
			a.rest(pb.Phase_PHASE_FAILED, err)
			sleep(ctx, time.Hour, changed)
		case w == nil:
			a.rest(pb.Phase_PHASE_IDLE, a.letGo(p))
			sleep(ctx, time.Hour, changed)
		default:
			err := a.replicate(ctx, w, reason)
			a.afterwards(ctx, w, err)
			reason = ReasonReopened
			if errors.Is(err, errDisks) {
				reason = ReasonDisks
			}
		}
	}
	return ctx.Err()
}

// letGo ends a capture that outlived its stream, when it was said that nothing
// is to be replicated: not as long as nothing was said.
func (a *agent) letGo(p *pb.AgentAssignment) error {
	if p == nil || a.release == nil {
		return nil
	}
	if err := a.release(); err != nil {
		return fmt.Errorf("end the capture: %w", err)
	}
	return nil
}

// rest notes that there is no stream, and why.
func (a *agent) rest(phase pb.Phase, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.stream, a.mu.phase, a.mu.err = nil, phase, err
	a.news()
}

// afterwards waits for the right moment to begin anew after a stream ended.
func (a *agent) afterwards(ctx context.Context, w *work, err error) {
	switch {
	case ctx.Err() != nil || errors.Is(err, errReassigned) || errors.Is(err, errDisks):
	case errors.Is(err, dr.ErrTimeline):
		a.log.Warn("stood down: another timeline of this machine is current", "timeline", w.timeline)
		a.rest(pb.Phase_PHASE_FENCED, err)
		a.until(ctx, w, nil)
	default:
		a.log.Error("replication failed; will try again", "error", err)
		a.rest(pb.Phase_PHASE_FAILED, err)
		short, cancel := context.WithTimeout(ctx, reopenAfter)
		defer cancel()
		a.until(short, w, nil)
	}
}

// errReassigned ends a stream because the assignment wants another one.
var errReassigned = errors.New("assigned anew")

// until returns when ctx ends, done is closed, or the assignment is no longer w.
func (a *agent) until(ctx context.Context, w *work, done <-chan struct{}) {
	for ctx.Err() == nil {
		p, changed := a.assignment()
		if now, err := workOf(p, a.memory); err != nil || now == nil || !now.same(w) {
			return
		}
		select {
		case <-ctx.Done():
		case <-done:
			return
		case <-changed:
		}
	}
}

// replicate runs one stream until it fails or the assignment changes.
func (a *agent) replicate(ctx context.Context, w *work, first Reason) (err error) {
	m := a.scan()
	o, present, err := a.openPresent(w, &m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.src.Close()) }()
	if o.remark != nil {
		a.notices.add(notice{"capture-not-kept", true, o.remark.Error(), a.now()})
		a.log.Warn("capture", "remark", o.remark)
	}

	tune := defaultTuning()
	tune.budget(w.memory, o.src)
	tune.codec = w.codec
	if a.limit != nil {
		a.limit(w.memory)
	}
	a.mu.Lock()
	absent, hold := a.devices.absent(w, present)
	s := newStream(o.src, streamConfig{
		machine: w.machine, timeline: w.timeline, first: first, used: o.used, tune: tune,
		dial: a.dial, log: a.log, notices: &a.notices, news: a.news, still: a.still, schedule: &a.points,
		compareRate: a.compareRate, background: a.background, absent: absent, hold: hold, torn: a.devices.torn(), tornKnown: a.setTorn,
		boot: a.boot, skipFree: a.skipFree, freeTaker: a.freeTaker, driver: o.driver,
	})
	a.mu.stream, a.mu.driver, a.mu.err, a.devices.running = s, o.driver, nil, true
	p := a.mu.assigned
	a.mu.Unlock()
	s.setTags(wantedTags(p, a.now()))
	s.setServer(serverOf(p))

	defer a.unwatched()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = s.run(ctx)
	}()
	a.until(ctx, w, done)
	select {
	case <-done:
		return err
	default:
	}
	cancel()
	<-done
	if errors.Is(err, context.Canceled) {
		return errReassigned
	}
	return err
}
