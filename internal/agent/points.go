package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/quiesce"
)

// still is a session of standing still, as quiesce makes them.
type still interface {
	Hold(ctx context.Context, limit time.Duration) error
	Held() error
	Release() (quiesce.Report, error)
}

// stiller prepares a session.
type stiller func(ctx context.Context, o quiesce.Options) (still, error)

// stillness is how this machine stands still. It outlives the streams.
type stillness struct {
	prepare stiller
	hooks   *quiesce.Hooks // for application points
	turn    chan struct{}  // has room for one: who stands still
}

func newStillness(prepare stiller, hooks *quiesce.Hooks) *stillness {
	return &stillness{prepare: prepare, hooks: hooks, turn: make(chan struct{}, 1)}
}

// quiesceWith returns the stiller of this machine, which notes in a file what it freezes.
func quiesceWith(ledger string) stiller {
	return func(ctx context.Context, o quiesce.Options) (still, error) {
		o.Ledger = ledger
		s, err := quiesce.Prepare(ctx, o)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
}

// never is the stiller of a machine that can't stand still.
func never(context.Context, quiesce.Options) (still, error) {
	return nil, fmt.Errorf("freeze file systems: %w", dr.ErrUnsupported)
}

// begin prepares a session when it is nobody else's turn any more: two would find each
// other's file systems frozen. After Release the caller calls end.
func (x *stillness) begin(ctx context.Context, o quiesce.Options) (s still, end func(), err error) {
	select {
	case x.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("wait for another point to be made: %w", ctx.Err())
	}
	end = func() { <-x.turn }
	if s, err = x.prepare(ctx, o); err != nil {
		end()
		return nil, nil, err
	}
	return s, end, nil
}

// The times of making a point.
const (
	defaultFreezeLimit = 10 * time.Second
	// calmLimit bounds how long the writes that the preparation caused may take to
	// drain; heldLimit, where hooks hold applications meanwhile.
	calmLimit = 30 * time.Second
	heldLimit = 5 * time.Second
	calmPoll  = 20 * time.Millisecond
	// retryPoints is the pause before a point that waits for a stream looks again.
	retryPoints = time.Second
)

// outcome is what became of a tag for which the file systems were to stand still.
type outcome struct {
	reached dr.Consistency
	detail  string // what should be known of it; "" for nothing
}

// pointMaker makes the points for which the file systems stand still, one after the
// other: those that are asked for and those of the schedule. It belongs to one
// goroutine of a stream.
type pointMaker struct {
	*stream
	*stillness
	schedule *schedule
}

// run makes points until ctx ends.
func (m *pointMaker) run(ctx context.Context) error {
	for ctx.Err() == nil {
		changed := m.watchTags()
		if t, ok := m.nextWanted(); ok {
			m.serve(ctx, t)
			continue
		}
		now := time.Now()
		if t, ok := m.schedule.next(now); ok {
			if m.calm() == nil {
				m.scheduled(ctx, t, now)
			} else {
				sleep(ctx, retryPoints, changed) // why it is not exact is reported elsewhere
			}
			continue
		}
		sleep(ctx, max(m.schedule.wait(now), calmPoll), changed)
	}
	return ctx.Err()
}

// serve makes a point that was asked for. It waits for a calm stream as long as
// that is so.
func (m *pointMaker) serve(ctx context.Context, t dr.Tag) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for m.calm() != nil {
		if m.scanning() {
			m.finish(ctx, t, fmt.Errorf("the capture finds changes by comparing, so no moment can be marked: %w", dr.ErrUnsupported))
			return
		}
		changed := m.watchTags()
		if !m.isWanted(t.ID) {
			return
		}
		sleep(ctx, calmPoll, changed)
		if ctx.Err() != nil {
			return
		}
	}
	m.finish(ctx, t, m.make(ctx, t))
}

// scheduled makes a point of the schedule.
func (m *pointMaker) scheduled(ctx context.Context, t dr.Tag, now time.Time) {
	err := m.make(ctx, t)
	if ctx.Err() != nil {
		return
	}
	m.finish(ctx, t, err)
	for _, n := range m.schedule.made(t.Consistency, err, now, time.Now()) {
		m.notices.add(n)
		m.log.Warn(n.text, "code", n.code)
		m.news()
	}
}

// finish notes what became of a point; if it failed, its place is taken by one that is crash consistent.
func (m *pointMaker) finish(ctx context.Context, t dr.Tag, err error) {
	var partly *partly
	switch {
	case err == nil:
		m.setOutcome(t.ID, outcome{reached: t.Consistency})
		return
	case errors.As(err, &partly):
		m.setOutcome(t.ID, outcome{reached: t.Consistency, detail: partly.Error()})
	case ctx.Err() != nil:
		return // the next stream tries again
	default:
		m.setOutcome(t.ID, outcome{reached: dr.Crash, detail: err.Error()})
		crash := t
		crash.Consistency = dr.Crash
		m.fallBack(crash)
		m.notices.add(notice{"point-fallback", true, fmt.Sprintf("point %q is only crash consistent: %v", t.Name, err), time.Now()})
		m.log.Warn("a point is only crash consistent", "point", t.Name, "error", err)
	}
	m.news()
}

// partly says that a point is what was asked for, and something besides.
type partly struct{ text string }

func (p *partly) Error() string { return p.text }

// complete reports why a point can't promise more than crash consistency: it has a disk as that was before it was taken out.
func (m *pointMaker) complete() error {
	if len(m.rep.absent) > 0 {
		return fmt.Errorf("%s is not captured now, the point has it as it was: %w", pathsOf(m.rep.absent), dr.ErrUnavailable)
	}
	return nil
}

// make makes one point. Nothing is frozen when it returns.
func (m *pointMaker) make(ctx context.Context, t dr.Tag) error {
	if err := m.complete(); err != nil {
		return err
	}
	limit := m.schedule.freezeLimit()
	o := quiesce.Options{Point: quiesce.Point{Machine: m.machine.String(), ID: dr.NodeID(t.ID).String(), Name: t.Name}}
	for _, d := range m.src.Disks() {
		o.Disks = append(o.Disks, d.Path)
	}
	if t.Consistency == dr.Application {
		if o.Hooks = m.hooks; o.Hooks == nil {
			return fmt.Errorf("this machine has no hooks: %w", quiesce.ErrHook)
		}
	}
	s, end, err := m.begin(ctx, o)
	if err != nil {
		return err
	}
	defer end()
	err = m.hold(ctx, s, t, limit)
	report, released := s.Release()
	m.log.Info("made a point", "point", t.Name, "consistency", t.Consistency, "frozen", report.Frozen, "for", report.Duration, "hooks", report.Log, "error", err)
	if err != nil {
		return err
	}
	return remarks(report, released)
}

// hold places the tag while everything stands still.
func (m *pointMaker) hold(ctx context.Context, s still, t dr.Tag, limit time.Duration) error {
	patience := calmLimit
	if t.Consistency == dr.Application {
		patience = heldLimit
	}
	if err := m.waitCalm(ctx, patience); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := s.Hold(ctx, limit); err != nil {
		return err
	}
	// From here to Release nothing may wait for a disk.
	_, err := m.place(ctx, t, s.Held)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the tag did not get into the stream while the file systems were frozen: %w", quiesce.ErrTimeout)
	}
	return err
}

// remarks returns what should be known of a point that was made.
func remarks(r quiesce.Report, released error) error {
	var all []string
	if len(r.Unfrozen) > 0 {
		all = append(all, "written out but not frozen, since the kernel can't: "+strings.Join(r.Unfrozen, ", "))
	}
	for _, h := range r.Hooks {
		if h.Err != nil {
			all = append(all, "behind the point: "+h.Err.Error())
		}
	}
	if released != nil {
		all = append(all, "behind the point: "+released.Error())
	}
	if len(all) == 0 {
		return nil
	}
	return &partly{strings.Join(all, "; ")}
}

// waitCalm waits until the stream is calm, at most for limit.
func (m *pointMaker) waitCalm(ctx context.Context, limit time.Duration) error {
	for end := time.Now().Add(limit); ; {
		err := m.calm()
		switch {
		case err == nil || ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(end):
			return fmt.Errorf("wait %s for a calm stream: %w", limit, err)
		}
		sleep(ctx, calmPoll, nil)
	}
}

// calm reports why a tag would not get into the stream at once: everything that the
// capture's buffer holds must be taken over while the file systems stand still.
func (s *stream) calm() error {
	s.mu.Lock()
	phase := s.mu.status.phase
	s.mu.Unlock()
	if phase != Exact {
		return errNotExact
	}
	st := s.src.Stats()
	if st.Mode != capture.ModeData || st.RingUsed > max(1<<20, st.RingSize/64) {
		return fmt.Errorf("%d bytes wait in the capture's buffer: %w", st.RingUsed, dr.ErrUnavailable)
	}
	if bytes, _ := s.out.used(); bytes > 0 && bytes+2*batchRoom > s.rep.tune.memory {
		return fmt.Errorf("%d bytes wait for the process server: %w", bytes, dr.ErrUnavailable)
	}
	return nil
}

// scanning reports whether the source finds changes by comparing: it has no moments.
func (s *stream) scanning() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.status.phase == Syncing && s.mu.status.why == ReasonScan
}

// watchTags returns a channel that is closed when other tags are wanted.
func (s *stream) watchTags() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.tagsChanged
}

// nextWanted returns a tag that is wanted and needs stillness.
func (s *stream) nextWanted() (dr.Tag, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.mu.tags {
		if _, done := s.mu.outcomes[t.ID]; t.Consistency > dr.Crash && !done {
			return t, true
		}
	}
	return dr.Tag{}, false
}

func (s *stream) isWanted(id [16]byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.mu.tags, func(t dr.Tag) bool { return t.ID == id })
}

// fallBack has t placed as a crash-consistent tag.
func (s *stream) fallBack(t dr.Tag) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.mu.fallen) >= maxFallen {
		s.mu.fallen = slices.Delete(s.mu.fallen, 0, 1)
	}
	s.mu.fallen, s.mu.tagsNew = append(s.mu.fallen, t), true
}

// maxFallen bounds the tags that wait for a place after a failure: while the stream
// is exact there is at most one.
const maxFallen = 16

func (s *stream) setOutcome(id [16]byte, o outcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.mu.outcomes) >= maxPlaced || s.mu.outcomes == nil {
		s.mu.outcomes = make(map[[16]byte]outcome)
	}
	s.mu.outcomes[id] = o
}

// crashTagsLocked returns the tags that need no stillness, or could not have it.
func (s *stream) crashTagsLocked() []dr.Tag {
	s.mu.fallen = slices.DeleteFunc(s.mu.fallen, func(t dr.Tag) bool {
		_, placed := s.mu.status.placed[t.ID]
		return placed
	})
	out := slices.Clone(s.mu.fallen)
	for _, t := range s.mu.tags {
		if t.Consistency <= dr.Crash {
			out = append(out, t)
		}
	}
	return out
}

// forgetOutcomesLocked forgets what became of tags that are in the stream no more, since it
// begins anew before them: who still wants them gets others.
func (s *stream) forgetOutcomesLocked(now *status) {
	for id := range s.mu.status.placed {
		if _, ok := now.placed[id]; !ok {
			delete(s.mu.outcomes, id)
		}
	}
}

// recoverHooks makes it the turn of the hooks that an earlier agent, which was killed, did not run any
// more, and returns what runs them. No point is prepared before that returns.
func (a *agent) recoverHooks(machine dr.MachineID) func() {
	a.still.turn <- struct{}{}
	return func() {
		defer func() { <-a.still.turn }()
		for _, r := range a.still.hooks.Recover(quiesce.Point{Machine: machine.String()}) {
			text := "ran " + r.Phase + "/" + r.Name + " for a point that was cut off"
			if r.Err != nil {
				text += ": " + r.Err.Error()
			}
			a.notices.add(notice{"hooks-recovered", r.Err != nil, text, time.Now()})
			a.log.Warn(text)
		}
	}
}
