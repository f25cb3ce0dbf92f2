package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
	"farside/internal/fsmap"
	"farside/internal/link"
)

// server is a process server and where it may be found.
type server struct {
	node  string   // its id; "" if any will do
	addrs []string // in the order to try
}

// dialer connects to a process server at one of its addresses.
type dialer func(ctx context.Context, node, addr string) (net.Conn, error)

// stream is the running replication of one machine: a replicator and a link,
// each in a goroutine of run. Its methods are safe for concurrent use.
type stream struct {
	machine  dr.MachineID
	timeline dr.Timeline
	first    Reason // of the sync if the far side holds something already
	src      capture.Source
	out      *outbox
	rep      *replicator // belongs to the goroutine that steps it
	dial     dialer
	boot     func() link.Boot // of this system; may be nil
	log      *slog.Logger
	notices  *chronicle // outlives the stream
	news     func()     // called when something happened that people wait for
	comparer *comparer
	rate     int64 // of comparisons, bytes a second; 0: no bound
	// background compares while the stream is exact; nil: nothing does.
	background *background
	points     *pointMaker
	barriers   barriers
	// tornKnown is told which disks' copies are no states that they were in, when that changes; may be nil.
	tornKnown func(map[dr.DiskID]bool)
	torn      map[dr.DiskID]bool // what it was told last

	mu struct {
		sync.Mutex
		server      server
		serverNew   chan struct{} // closed and replaced when server is
		tags        []dr.Tag      // wanted
		tagsNew     bool
		tagsChanged chan struct{} // closed and replaced when others are wanted
		fallen      []dr.Tag      // to be placed though they are not what was wanted
		outcomes    map[[16]byte]outcome
		orders      []*order // that the replicator has not seen yet
		status      status
		safeTags    int
		connected   string
		linkErr     error
		far         *link.Caller // of the newest link; nil before the first
		chores      []chore      // that the replicator is asked to do
		distrust    Reason       // why everything is to be compared as soon as can be; "" = it is not
		leaving     *departure   // how the stream is to end; nil: it is not
	}
}

// streamConfig is what a stream needs to begin.
type streamConfig struct {
	machine  dr.MachineID
	timeline dr.Timeline
	first    Reason
	used     bool // events of the source were taken over before

	compareRate int64 // bytes a second that comparisons read; 0: no bound
	background  *background
	skipFree    []fsmap.Kind
	freeTaker   *fsmap.Taker
	driver      string // of the source

	absent    []capture.Disk                // protected, but not captured now
	hold      error                         // why nothing may be a point; nil if it may
	torn      map[dr.DiskID]bool            // disks whose copy is no state that they were in
	tornKnown func(torn map[dr.DiskID]bool) // is told when that changes; may be nil

	tune     tuning
	dial     dialer
	boot     func() link.Boot // of this system; nil if that can't be told
	log      *slog.Logger
	notices  *chronicle
	news     func()
	still    *stillness // nil: every point is only crash consistent
	schedule *schedule
}

func newStream(src capture.Source, c streamConfig) *stream {
	s := &stream{
		machine: c.machine, timeline: c.timeline, first: c.first,
		src: src, out: newOutbox(), dial: c.dial, boot: c.boot, log: c.log, notices: c.notices, news: c.news,
	}
	// What is dirty is read while the buffer takes what is written meanwhile: a quarter of it is not
	// much to wait for, and a machine that writes quickly would never have less.
	c.tune.resumeBelow = max(c.tune.resumeBelow, src.Stats().RingSize/4)
	s.rep = newReplicator(src, s.out, c.tune)
	s.rep.stats.consumed = c.used
	s.comparer, s.rate, s.background = newComparer(src), c.compareRate, c.background
	s.comparer.spare = newSparing(c.skipFree, c.freeTaker, c.driver, s.note)
	s.rep.compare = s.comparer
	s.rep.absent, s.rep.hold, s.tornKnown = c.absent, c.hold, c.tornKnown
	for _, d := range s.rep.disks {
		d.torn = c.torn[d.ID]
	}
	s.mu.serverNew, s.mu.tagsChanged = make(chan struct{}), make(chan struct{})
	s.points = &pointMaker{stream: s, stillness: cmp.Or(c.still, newStillness(never, nil)), schedule: cmp.Or(c.schedule, &schedule{})}
	s.barriers.prepare = s.points.prepareGroup
	s.barriers.place = func(ctx context.Context, t dr.Tag) (dr.Position, error) { return s.place(ctx, t, nil) }
	s.mu.status = s.rep.status()
	return s
}

// run replicates until ctx ends or nothing more can be done: an error that
// wraps dr.ErrTimeline means that the machine was told to stand down.
func (s *stream) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, part := range []func(context.Context) error{
		s.replicate, s.keepLink, s.keepComparing, s.patrolling, s.points.run, s.barriers.run, s.account,
	} {
		wg.Go(func() { cancel(part(ctx)) })
	}
	wg.Wait()
	err := context.Cause(ctx)
	if errors.Is(err, dr.ErrTimeline) {
		s.publish(time.Now(), true)
	}
	return err
}

// publishEvery is how stale a status may be.
const publishEvery = 100 * time.Millisecond

// replicate steps the replicator.
func (s *stream) replicate(ctx context.Context) error {
	var published time.Time
	for ctx.Err() == nil {
		changed := s.out.watch()
		s.passTags()
		if err := s.passDistrust(); err != nil {
			return err
		}
		if err := s.passChores(); err != nil {
			return err
		}
		now := time.Now()
		pause, err := s.rep.step(ctx, now, s.rep.tune.wait)
		if now.Sub(published) >= publishEvery || err != nil {
			published = now
			s.publish(now, false)
		}
		if err != nil {
			s.linger(ctx, err)
			return err
		}
		if err := s.departed(now); err != nil {
			s.linger(ctx, err)
			s.publish(time.Now(), false)
			return err
		}
		if pause > 0 {
			sleep(ctx, pause, changed)
		}
	}
	return ctx.Err()
}

// sleep waits for d, for ctx to end, or for wake.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-wake:
	}
}

// passTags hands the wanted tags to the replicator if they are new.
func (s *stream) passTags() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.tagsNew {
		s.mu.tagsNew = false
		s.rep.tags.set(s.crashTagsLocked())
	}
	s.rep.tags.orders, s.mu.orders = append(s.rep.tags.orders, s.mu.orders...), nil
}

// publish makes the replicator's status visible and notes what changed.
func (s *stream) publish(now time.Time, fenced bool) {
	st := s.rep.status()
	if fenced {
		st.phase = Fenced
	}
	safe := s.safeTags(&st)
	if torn := st.torn(); s.tornKnown != nil && !maps.Equal(torn, s.torn) {
		s.torn = torn
		s.tornKnown(torn)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	news := steps(&s.mu.status, &st, now)
	for _, n := range news {
		s.notices.add(n)
		s.log.Info(n.text, "code", n.code)
	}
	if len(news) > 0 || safe != s.mu.safeTags {
		s.news()
	}
	s.forgetOutcomesLocked(&st)
	s.mu.status, s.mu.safeTags = st, safe
}

// note keeps a notice and logs it.
func (s *stream) note(n notice) {
	s.notices.add(n)
	s.log.Info(n.text, "code", n.code)
	s.news()
}

// safeTags counts the tags that are durable on the far side.
func (s *stream) safeTags(st *status) (n int) {
	durable := s.out.durable()
	for _, at := range st.placed {
		if at.Seq <= durable {
			n++
		}
	}
	return n
}

// setTags replaces the tags that are wanted.
func (s *stream) setTags(ts []dr.Tag) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.tags, s.mu.tagsNew = ts, true
	close(s.mu.tagsChanged)
	s.mu.tagsChanged = make(chan struct{})
}

// setServer says where the frames go. A link that stands elsewhere is given up;
// the stream goes on where the new receiver stands.
func (s *stream) setServer(v server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.node == s.mu.server.node && slices.Equal(v.addrs, s.mu.server.addrs) {
		return
	}
	s.mu.server = v
	close(s.mu.serverNew)
	s.mu.serverNew = make(chan struct{})
}

func (s *stream) server() (server, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.server, s.mu.serverNew
}

// noteLink notes the address of the link that stands, or why none does, and
// reports whether one stood before.
func (s *stream) noteLink(connected string, err error) (before bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before = s.mu.connected != ""
	s.mu.connected, s.mu.linkErr = connected, err
	return before
}

// source gives the frames of a stream to a link.
type source struct {
	*stream
	addr string
}

var _ link.Source = source{}

// Resume makes the outbox go on from where the receiver stands.
func (s source) Resume(c frame.Cursor, durable dr.Seq) error {
	switch {
	case c.Position.Timeline > s.timeline:
		return fmt.Errorf("receiver is on timeline %d, this machine on %d: %w", c.Position.Timeline, s.timeline, dr.ErrTimeline)
	case c.Position.Timeline < s.timeline:
		return fmt.Errorf("receiver is on timeline %d still, this machine on %d: %w", c.Position.Timeline, s.timeline, dr.ErrUnavailable)
	}
	first := s.first
	if c.Position.Seq == 0 {
		first = ReasonInitial
	}
	s.out.resume(c, durable, first)
	s.noteLink(s.addr, nil)
	return nil
}

// Next implements link.Source.
func (s source) Next(ctx context.Context) ([]byte, error) { return s.out.next(ctx) }

// Acked implements link.Source.
func (s source) Acked(a link.Ack) { s.out.acked(a.Stored, a.Durable, time.Now()) }

// The pauses between two attempts to connect.
const (
	minRetry = 200 * time.Millisecond
	maxRetry = 5 * time.Second
)

// keepLink keeps a connection to the process server.
func (s *stream) keepLink(ctx context.Context) error {
	for try, pause := 0, minRetry; ctx.Err() == nil; try++ {
		to, changed := s.server()
		if len(to.addrs) == 0 {
			sleep(ctx, maxRetry, changed)
			continue
		}
		addr := to.addrs[try%len(to.addrs)]
		err := s.oneLink(ctx, to.node, addr, changed)
		if errors.Is(err, dr.ErrTimeline) {
			return err
		}
		if s.noteLink("", err) {
			pause = minRetry
		}
		if ctx.Err() == nil {
			s.log.Debug("link ended", "address", addr, "error", err, "pause", pause)
			sleep(ctx, pause, changed)
			pause = min(2*pause, maxRetry)
		}
	}
	return ctx.Err()
}

// oneLink runs the link until it breaks or the server changes.
func (s *stream) oneLink(ctx context.Context, node, addr string, changed <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.send(ctx, node, addr) }()
	select {
	case err := <-done:
		return err
	case <-changed:
		cancel()
		return <-done
	}
}

// dialTimeout bounds one attempt to connect.
const dialTimeout = 10 * time.Second

func (s *stream) send(ctx context.Context, node, addr string) error {
	short, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := s.dial(short, node, addr)
	if err != nil {
		return err
	}
	hello := link.Hello{Machine: s.machine, Timeline: s.timeline}
	if s.boot != nil {
		hello.Boot = s.boot()
	}
	return link.Send(ctx, conn, link.SenderOptions{
		Hello:  hello,
		Source: source{s, addr}, Window: s.rep.tune.memory,
		Connected: s.setFar, Handle: s.called,
	})
}

// keepComparing runs the comparisons that the replicator begins.
func (s *stream) keepComparing(ctx context.Context) error {
	return s.comparer.run(ctx, s.askFar, s.busy, s.rate)
}

// askFar asks the far side what differs.
func (s *stream) askFar(ctx context.Context, body []byte) ([]byte, error) {
	s.mu.Lock()
	far := s.mu.far
	s.mu.Unlock()
	if far == nil {
		return nil, fmt.Errorf("no process server is connected: %w", dr.ErrUnavailable)
	}
	return far.Call(ctx, link.CallCompare, body)
}

// busy reports whether captured writes need what comparing would take from them.
func (s *stream) busy() bool {
	waiting, _ := s.out.used()
	src := s.src.Stats()
	return waiting > s.rep.tune.memory/2 || src.RingUsed > src.RingSize/4
}

// setFar notes how to call the process server, and through it the master target.
func (s *stream) setFar(c *link.Caller) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.far = c
}

// called answers the process server.
func (s *stream) called(ctx context.Context, kind link.CallKind, body []byte) ([]byte, error) {
	if kind == link.CallBarrier {
		return s.barriers.handle(ctx, body)
	}
	return nil, fmt.Errorf("call of kind %d by the process server: %w", kind, dr.ErrUnsupported)
}

// snapshot is what a stream reports.
type snapshot struct {
	status
	delivery
	connected string
	linkErr   error
	outcomes  map[[16]byte]outcome
}

func (s *stream) snapshot(now time.Time) snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return snapshot{
		status: s.mu.status, delivery: s.out.delivery(now, s.mu.status.phase == Exact),
		connected: s.mu.connected, linkErr: s.mu.linkErr, outcomes: maps.Clone(s.mu.outcomes),
	}
}
