package quiesce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"farside/internal/dr"
)

// Options say what is to stand still, and how long anything may take.
type Options struct {
	// Disks are the paths of the captured disks.
	Disks []string
	// Hooks run around the freeze; nil for none.
	Hooks *Hooks
	// Point is what the hooks are told.
	Point Point
	// SyncLimit bounds the syncfs before the freeze. Default 30 s.
	SyncLimit time.Duration
	// Ledger is a file that says what is frozen, for ThawLeft; "" for none. It must not lie
	// on a captured disk: /run is the right place.
	Ledger string
	// Watchdog are the arguments that make this program run RunWatchdog. Default
	// WatchdogVerb.
	Watchdog []string
}

// WatchdogVerb is the argument that makes this program the watchdog.
const WatchdogVerb = "freeze-watchdog"

const (
	defaultSyncLimit = 30 * time.Second
	// watchdogMargin is how much later than the agent the watchdog thaws.
	watchdogMargin = time.Second
)

// Errors on which callers act, besides those of package dr.
var (
	// ErrTimeout: freezing took longer than allowed, or what was frozen was thawed
	// because its time was up.
	ErrTimeout = errors.New("not in time")
	// ErrNothing: no mounted file system lies on the disks.
	ErrNothing = errors.New("no mounted file system lies on the disks")
	// ErrHook: a hook failed, or there is none.
	ErrHook = errors.New("hook failed")

	errFrozen = errors.New("frozen already")
	errThawed = errors.New("not frozen")
	errBroken = errors.New("something else thawed it meanwhile")
)

// volume is a file system that can be frozen. Its methods block as long as the
// kernel does.
type volume interface {
	FileSystem() FileSystem
	File0() *os.File // for the watchdog; nil in tests
	Sync() error
	Freeze() error // wraps errFrozen if it is; dr.ErrUnsupported if it can't be
	Thaw() error   // wraps errThawed if it is not frozen
	Close() error
}

// guard is the watchdog as the session sees it. The indices are those of the
// files that it was started with.
type guard interface {
	Arm(limit time.Duration) error // returns when the watchdog has said that it watches
	Freezing(i int) error          // i may be frozen from now on
	Thawed(i int)                  // i is not frozen by us any more
	Gone() <-chan struct{}         // closed when the watchdog has died
	Close() error                  // ends it: nothing is frozen any more
}

// Session is one round of standing still.
type Session struct {
	hooks  *hookRun // nil: none
	ledger string   // file that says what may be frozen; "": none
	guard  guard
	slots  []*slot
	levels [][]*slot // by depth, the deepest first

	mu struct {
		sync.Mutex
		state    state
		deadline time.Time
		began    time.Time // when the first file system was told to freeze
		frozen   time.Duration
		cause    error // why the hold ended before Release
		report   Report
		timer    *time.Timer
		over     chan struct{} // closed when the hold ends
	}
	settled sync.WaitGroup // calls of the kernel that have not returned
	guarded sync.WaitGroup // the goroutine that watches the watchdog
}

type state uint8

const (
	prepared state = iota
	holding        // some or all are frozen, or on their way
	held
	over
)

// slot is one volume and how far it is.
type slot struct {
	volume
	index int
	mu    struct {
		sync.Mutex
		state    slotState
		reported error // of freezing
	}
}

type slotState uint8

const (
	liquid   slotState = iota
	freezing           // the kernel was asked
	frozen
	abandoned // to be thawed by who froze it, as soon as it is frozen
	unable    // it can't be frozen: it was synced, that is all
)

// Report says what a session did.
type Report struct {
	Frozen   []string      // mount points of what was frozen
	Unfrozen []string      // mount points of what the kernel can't freeze, such as vfat
	Duration time.Duration // from the first freeze to the last thaw
	Hooks    []HookResult
	Log      string // file with the output of the hooks; "" for none
}

// prepare is Prepare with the machine's parts given. It owns the volumes.
func prepare(ctx context.Context, o Options, vols []volume, start func([]*os.File) (guard, error)) (*Session, error) {
	s := newSession(vols)
	if err := s.prepare(ctx, o, start); err != nil {
		s.abort(err)
		return nil, err
	}
	return s, nil
}

func (s *Session) prepare(ctx context.Context, o Options, start func([]*os.File) (guard, error)) (err error) {
	if len(s.slots) == 0 {
		return ErrNothing
	}
	s.ledger = o.Ledger
	var files []*os.File
	for _, sl := range s.slots {
		files = append(files, sl.File0())
	}
	if s.guard, err = start(files); err != nil {
		return fmt.Errorf("start the watchdog, without which nothing is frozen: %w", err)
	}
	s.watch()
	if o.Hooks != nil {
		if s.hooks, err = o.Hooks.begin(o.Point, s.mounts()); err != nil {
			return err
		}
		if err := s.hooks.before(ctx); err != nil {
			return err
		}
	}
	return s.sync(ctx, cmp.Or(o.SyncLimit, defaultSyncLimit))
}

func newSession(vols []volume) *Session {
	s := &Session{}
	s.mu.over = make(chan struct{})
	depth := -1
	for i, v := range vols {
		sl := &slot{volume: v, index: i}
		s.slots = append(s.slots, sl)
		if d := v.FileSystem().depth; d != depth {
			s.levels, depth = append(s.levels, nil), d
		}
		last := len(s.levels) - 1
		s.levels[last] = append(s.levels[last], sl)
	}
	return s
}

func (s *Session) mounts() []string {
	var out []string
	for _, sl := range s.slots {
		out = append(out, sl.FileSystem().Mount)
	}
	return out
}

// sync writes out what is dirty, so that the freeze has little to write.
func (s *Session) sync(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, len(s.slots))
	for _, sl := range s.slots {
		s.settled.Go(func() { done <- sl.Sync() })
	}
	for range s.slots {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("sync file systems within %s: %w", limit, cause(ctx))
		}
	}
	return nil
}

// cause makes ErrTimeout of a deadline.
func cause(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ErrTimeout
	}
	return ctx.Err()
}

// Hold freezes all file systems; when it returns nil they all are. They stay so
// until Release, but never longer than limit from the start of this call. After an
// error nothing stays frozen and Release is still to be called. Errors wrap ErrTimeout,
// dr.ErrUnavailable if the watchdog does not answer, or tell of a file system.
func (s *Session) Hold(ctx context.Context, limit time.Duration) error {
	if err := keepLedger(s.ledger, s.slots); err != nil {
		return err
	}
	if err := s.begin(limit); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, level := range s.levels {
		if err := s.freeze(ctx, level); err != nil {
			s.end(err)
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.state != holding {
		return s.mu.cause
	}
	s.mu.report = s.report()
	if len(s.mu.report.Frozen) == 0 {
		return ErrNothing // and nothing is to be thawed
	}
	s.mu.state = held
	return nil
}

// begin arms the watchdog and starts the clock.
func (s *Session) begin(limit time.Duration) error {
	if err := s.guard.Arm(limit + watchdogMargin); err != nil {
		return fmt.Errorf("arm the watchdog, without which nothing is frozen: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.state != prepared {
		return fmt.Errorf("freeze file systems: %w: %w", cmpErr(s.mu.cause, errBroken), dr.ErrInvalid)
	}
	s.mu.state, s.mu.began = holding, time.Now()
	s.mu.deadline = s.mu.began.Add(limit)
	s.mu.timer = time.AfterFunc(limit, func() {
		s.end(fmt.Errorf("thawed, since they were frozen for %s: %w", limit, ErrTimeout))
	})
	return nil
}

func cmpErr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// freeze freezes the volumes of one level side by side.
func (s *Session) freeze(ctx context.Context, level []*slot) error {
	done := make(chan *slot, len(level))
	for _, sl := range level {
		if err := s.start(sl, done); err != nil {
			return err
		}
	}
	for range level {
		select {
		case sl := <-done:
			if err := sl.problem(); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("freeze %s: %w", strings.Join(pending(level), ", "), cause(ctx))
		case <-s.mu.over:
			return s.ended()
		}
	}
	return nil
}

// start has the kernel freeze one volume, unless the hold has ended meanwhile.
func (s *Session) start(sl *slot, done chan<- *slot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.state != holding {
		return s.mu.cause
	}
	if err := s.guard.Freezing(sl.index); err != nil {
		return fmt.Errorf("tell the watchdog: %w", err)
	}
	sl.change(liquid, freezing)
	s.settled.Go(func() {
		s.freezeOne(sl)
		done <- sl
	})
	return nil
}

func pending(level []*slot) []string {
	var out []string
	for _, sl := range level {
		if sl.is(freezing) {
			out = append(out, sl.FileSystem().Mount)
		}
	}
	return out
}

// freezeOne asks the kernel, which may take its time: who waits may have gone
// on. Then it is thawed at once.
func (s *Session) freezeOne(sl *slot) {
	err := sl.Freeze()
	sl.mu.Lock()
	late := sl.mu.state == abandoned
	switch {
	case errors.Is(err, dr.ErrUnsupported):
		sl.mu.state = unable
	case err != nil:
		sl.mu.state, sl.mu.reported = liquid, err
	case !late:
		sl.mu.state = frozen
	}
	sl.mu.Unlock()
	if err == nil && late {
		err = sl.Thaw()
		sl.change(abandoned, liquid)
		if err != nil && !errors.Is(err, errThawed) {
			return // the watchdog goes on trying
		}
	}
	if err != nil || late {
		s.guard.Thawed(sl.index)
	}
}

func (sl *slot) is(want slotState) bool {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return sl.mu.state == want
}

func (sl *slot) change(from, to slotState) bool {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.mu.state != from {
		return false
	}
	sl.mu.state = to
	return true
}

func (sl *slot) problem() error {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return sl.mu.reported
}

// Held reports whether everything is still frozen and has been since Hold returned,
// and if not, why. What was written to the disks before a call that returns nil was
// written before the freeze, or past the file systems. It asks the kernel and takes
// microseconds.
func (s *Session) Held() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mu.state == over:
		return cmpErr(s.mu.cause, errThawed)
	case s.mu.state != held:
		return errThawed
	case !time.Now().Before(s.mu.deadline):
		return ErrTimeout
	}
	for _, sl := range s.slots {
		// Freezing what is frozen is refused. If it is not, somebody thawed it
		// meanwhile; it is frozen again now, which Release undoes as well.
		if sl.is(frozen) && !errors.Is(sl.Freeze(), errFrozen) {
			s.mu.cause = fmt.Errorf("%s: %w", sl.FileSystem().Mount, errBroken)
			s.mu.state = holding
			return s.mu.cause
		}
	}
	return nil
}

// watch ends the hold when the watchdog dies: nothing stays frozen without one.
func (s *Session) watch() {
	s.guarded.Go(func() {
		select {
		case <-s.guard.Gone():
			s.end(fmt.Errorf("the watchdog died: %w", dr.ErrUnavailable))
		case <-s.mu.over:
		}
	})
}

// end thaws whatever is frozen, once; a second caller waits for the first. Nothing
// is frozen when it returns, but for what the kernel is still freezing: that
// is thawed as soon as it is.
func (s *Session) end(why error) []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.state == over {
		return nil
	}
	var errs []error
	if s.mu.state != prepared {
		s.mu.timer.Stop()
		errs = s.thawLocked()
		s.mu.frozen = time.Since(s.mu.began)
	}
	s.mu.state, s.mu.cause = over, cmpErr(s.mu.cause, why)
	close(s.mu.over)
	return errs
}

func (s *Session) thawLocked() (errs []error) {
	for _, sl := range slices.Backward(s.slots) {
		if sl.change(freezing, abandoned) || !sl.change(frozen, liquid) {
			continue
		}
		err := sl.Thaw()
		if err == nil || errors.Is(err, errThawed) {
			s.guard.Thawed(sl.index)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

func (s *Session) ended() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.cause
}

// Release thaws what is frozen, in reverse, and runs the hooks that come after. It
// returns nil if the file systems were frozen from Hold until now: else, what
// happened. Everything that the session had is freed.
func (s *Session) Release() (Report, error) {
	errs := s.end(nil)
	s.mu.Lock()
	r := s.mu.report
	err := errors.Join(append(errs, s.mu.cause)...)
	r.Duration = s.mu.frozen
	s.mu.Unlock()
	if s.hooks != nil {
		s.hooks.after(err)
		r.Hooks, r.Log = s.hooks.finish()
	}
	s.free(errs)
	return r, err
}

func (s *Session) report() (r Report) {
	for _, sl := range s.slots {
		switch {
		case sl.is(frozen):
			r.Frozen = append(r.Frozen, sl.FileSystem().Mount)
		case sl.is(unable):
			r.Unfrozen = append(r.Unfrozen, sl.FileSystem().Mount)
		}
	}
	return r
}

// abort is Release for a session that did not come about.
func (s *Session) abort(why error) {
	s.end(why)
	if s.hooks != nil {
		s.hooks.after(why)
		s.hooks.finish()
	}
	s.free(nil)
}

// free closes everything as soon as the kernel has answered all calls. A watchdog that
// is told nothing goes on watching: it does when something could not be thawed.
func (s *Session) free(failed []error) {
	unthawed := slices.ContainsFunc(failed, func(err error) bool { return !errors.Is(err, errThawed) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.settled.Wait()
		s.guarded.Wait()
		if s.guard != nil && !unthawed {
			s.guard.Close()
		}
		if s.ledger != "" && !unthawed {
			os.Remove(s.ledger) //nolint:errcheck // there is none if nothing was frozen
		}
		for _, sl := range s.slots {
			sl.Close()
		}
	}()
	select {
	case <-done:
	case <-time.After(settleLimit): // a kernel that does not answer: the goroutine ends when it does
	}
}

// settleLimit bounds how long Release waits for the kernel.
const settleLimit = 2 * time.Second
