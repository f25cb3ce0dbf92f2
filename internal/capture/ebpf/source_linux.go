//go:build linux && amd64

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/dr"
)

// source is the capture of some disks.
type source struct {
	devs    []*device
	disks   []capture.Disk
	opts    Options
	prog    *loaded
	bitmap  *capture.Bitmap
	buffers directBuffers
	opened  uint64  // ns of the monotonic clock
	pins    *pinned // nil: nothing survives

	state, settled *uint32 // in the programs' control; see bpf/state.h

	// Positions of the stream: bytes of the ring plus Lost events.
	consumed atomic.Uint64 // bytes of the ring that were handed over
	emitted  atomic.Uint64 // Lost events that were handed over

	resuming sync.Mutex    // one Resume at a time
	giveUp   time.Duration // giveUpAge, but in tests

	// Of Resume: when a write that it may wait for last found no place to be noted.
	span      uint32 // state for which that holds, plus one
	untracked uint64 // ns of the monotonic clock, 0: never

	swept   uint64      // when leaked flights were last looked for; of Next
	started atomic.Bool // Next was called

	lost sync.Mutex // guards the places of Lost events in the notes, and what is released
	soft softWrites // guarded by lost; only Next changes it

	life struct {
		sync.Mutex
		users  int
		closed chan struct{}
		idle   *sync.Cond
		err    error
	}
}

var _ capture.Source = (*source)(nil)

// Open begins to capture, or goes on with what an earlier process pinned. Each
// disk's Path names a block device; its Size is found, or compared if it is not 0. With
// Options.Pin the Source is a capture.Survivor. The error wraps dr.ErrUnsupported if this
// machine or device can't be captured, dr.ErrDenied without the privileges,
// dr.ErrNotFound, dr.ErrInvalid or dr.ErrExists if the disks are wrong; dr.ErrExists, too,
// while another process has the pins.
func Open(disks []capture.Disk, o Options) (capture.Source, error) {
	if len(disks) == 0 || len(disks) > MaxDisks {
		return nil, fmt.Errorf("capture %d disks: want 1 to %d: %w", len(disks), MaxDisks, dr.ErrInvalid)
	}
	devs, err := openDevices(disks)
	if err != nil {
		return nil, err
	}
	s, err := open(devs, o)
	if err != nil {
		closeDevices(devs)
		return nil, fmt.Errorf("capture by eBPF: %w", err)
	}
	if s.pins != nil {
		return survivor{s}, nil
	}
	return s, nil
}

func openDevices(disks []capture.Disk) (devs []*device, err error) {
	for _, d := range disks {
		dev, err := openDevice(d)
		if err != nil {
			closeDevices(devs)
			return nil, &capture.DiskError{Disk: d.ID, Err: fmt.Errorf("%s: %w", d.Path, err)}
		}
		devs = append(devs, dev)
		for _, o := range devs[:len(devs)-1] {
			if o.disk.ID == d.ID || o.overlaps(dev) {
				closeDevices(devs)
				return nil, fmt.Errorf("capture disk %d, %s: disk %d, %s is the same or overlaps: %w", d.ID, d.Path, o.disk.ID, o.disk.Path, dr.ErrExists)
			}
		}
	}
	return devs, nil
}

func closeDevices(devs []*device) {
	for _, d := range devs {
		_ = unix.Close(d.fd) // nothing was written through it
	}
}

func open(devs []*device, o Options) (*source, error) {
	var total int64
	for _, d := range devs {
		total += d.disk.Size
	}
	o, err := o.withDefaults(total, memory())
	if err != nil {
		return nil, err
	}
	if o.BitmapOnly {
		o.RingBytes = minRing
	}
	if o.Pin != "" {
		return openPinned(devs, o)
	}
	return openNew(devs, o, nil)
}

// openNew makes a new capture, and calls pin when it is attached.
func openNew(devs []*device, o Options, pin func(*source) error) (*source, error) {
	kernel, err := kernelTypes()
	if err != nil {
		return nil, err
	}
	var at addresses
	if !o.BitmapOnly {
		if at, err = calibrate(devs[0], kernel); err != nil {
			return nil, explain("learn where the kernel keeps pages (data can't be captured; bitmap only may work)", err)
		}
	}
	l, err := load(kernel, devs, o, at)
	if err != nil {
		return nil, err
	}
	s, err := newSource(devs, o, l)
	if err == nil {
		err = s.start(pin)
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return s, nil
}

// newSource makes a source of what is in the kernel.
func newSource(devs []*device, o Options, l *loaded) (*source, error) {
	s := &source{devs: devs, disks: disksOf(devs), opts: o, prog: l, opened: l.notes.Opened, giveUp: giveUpAge}
	s.life.closed = make(chan struct{})
	s.life.idle = sync.NewCond(&s.life)
	s.state, s.settled = word32(l.control[controlState:]), word32(l.control[controlSettled:])
	var err error
	s.bitmap, err = capture.NewBitmap(s.disks, s.opts.BlockSize, words64(l.bitmap))
	return s, err
}

// start attaches the programs and waits where that is the only way to know what
// was in flight.
func (s *source) start(pin func(*source) error) (err error) {
	atomic.StoreUint32(s.settled, neverSettled)
	if s.opts.BitmapOnly {
		atomic.StoreUint32(s.state, 1)
	}
	atomic.StoreUint64(word64(s.prog.control[controlStrangers:]), monotonic()+uint64(openAge))
	if err := s.prog.attach(s.takeBaselines); err != nil {
		return err
	}
	s.opened = monotonic()
	s.notes().Opened = s.opened
	if pin != nil {
		if err := pin(s); err != nil {
			return err
		}
	}
	return s.awaitBioBased()
}

// memory returns the machine's memory in bytes.
func memory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// monotonic returns the clock of the programs, in ns.
func monotonic() uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // every Linux has it
	}
	return uint64(t.Nano())
}

// enter keeps Close waiting until leave; it fails after Close.
func (s *source) enter(what string) error {
	s.life.Lock()
	defer s.life.Unlock()
	select {
	case <-s.life.closed:
		return fmt.Errorf("%s: capture closed: %w", what, dr.ErrUnavailable)
	default:
		s.life.users++
		return nil
	}
}

func (s *source) leave() {
	s.life.Lock()
	defer s.life.Unlock()
	if s.life.users--; s.life.users == 0 {
		s.life.idle.Broadcast()
	}
}

// Close implements capture.Source. It must not be called by Next's fn.
func (s *source) Close() error {
	s.life.Lock()
	defer s.life.Unlock()
	select {
	case <-s.life.closed:
		return s.life.err
	default:
	}
	close(s.life.closed)
	for s.life.users > 0 {
		s.life.idle.Wait()
	}
	s.life.err = s.prog.close()
	closeDevices(s.devs)
	if s.pins != nil {
		s.life.err = errors.Join(s.life.err, s.pins.close())
	}
	return s.life.err
}

// Disks implements capture.Source.
func (s *source) Disks() []capture.Disk { return append([]capture.Disk(nil), s.disks...) }

// Mark implements capture.DirtySet.
func (s *source) Mark(x dr.Extent) error {
	if err := s.enter("mark"); err != nil {
		return err
	}
	defer s.leave()
	return s.bitmap.Mark(x)
}

// TakeDirty implements capture.DirtySet.
func (s *source) TakeDirty(limit int64) ([]dr.Extent, error) { return s.takeDirty(limit, nil) }

func (s *source) takeDirty(limit int64, note func([]dr.Extent)) ([]dr.Extent, error) {
	if err := s.enter("take dirty ranges"); err != nil {
		return nil, err
	}
	defer s.leave()
	if s.lostDue() {
		return nil, nil
	}
	xs := s.bitmap.TakeNoted(limit, note)
	// A change that overflowed was marked after the state changed: if what was taken
	// holds one whose Lost was not handed over, this sees it.
	if !s.lostDue() {
		return xs, nil
	}
	for _, x := range xs {
		if err := s.bitmap.Mark(x); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// lostDue reports whether a Lost waits to be handed over.
func (s *source) lostDue() bool {
	return overflows(atomic.LoadUint32(s.state)) != s.emitted.Load()
}

// Dirty implements capture.DirtySet.
func (s *source) Dirty() (int64, error) {
	if err := s.enter("count dirty ranges"); err != nil {
		return 0, err
	}
	defer s.leave()
	return s.bitmap.Dirty(), nil
}

// ReadAt implements capture.Source.
func (s *source) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	if err := s.enter("read"); err != nil {
		return 0, err
	}
	defer s.leave()
	for _, d := range s.devs {
		if d.disk.ID == disk {
			n, err := d.readAt(p, off, &s.buffers)
			if err != nil {
				return n, fmt.Errorf("read %s: %w", d.disk.Path, err)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("read disk %d: %w", disk, dr.ErrNotFound)
}

// Next implements capture.Stream.
func (s *source) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	if err := s.enter("next event"); err != nil {
		return 0, err
	}
	defer s.leave()
	s.started.Store(true)
	deadline := time.Now().Add(wait)
	for pause := firstPause(s.opts.RingBytes); ; pause = min(pause+pause/8, pollLong) {
		if err := s.checkSoft(); err != nil {
			return 0, err
		}
		s.sweep()
		n, err := s.batch(fn)
		if n > 0 || err != nil {
			return n, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return 0, ctx.Err()
		}
		if err := s.idle(ctx, min(pause, left)); err != nil {
			return 0, err
		}
	}
}

// idle waits for d, or until there is no more sense in it.
func (s *source) idle(ctx context.Context, d time.Duration) error {
	if d < pollShort { // Go's timers round up to a millisecond
		nap := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&nap, nil) // a signal may cut it short
		return ctx.Err()              // a Close is seen at the next turn
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.life.closed:
		return fmt.Errorf("next event: capture closed: %w", dr.ErrUnavailable)
	}
}

// The programs wake nobody, which would cost the writers; an idle reader looks
// again after these times.
const (
	pollShort = 500 * time.Microsecond
	pollLong  = 5 * time.Millisecond
	// pollLeast is the shortest pause. A small ring is full so soon that the reader looks
	// when an eighth may be, at 1 GB/s.
	pollLeast = 50 * time.Microsecond
)

// firstPause returns how long a reader of a ring waits at first.
func firstPause(ring int64) time.Duration {
	return max(pollLeast, min(pollShort, time.Duration(ring/8)))
}

// freeStep is how much is handed over before the kernel hears of it, bytes.
const freeStep = 1 << 20

// batch hands over what is in the ring, within bounds.
func (s *source) batch(fn func(capture.Event) error) (n int, err error) {
	r := &s.prog.ring
	freed := s.Consumed()
	defer func() {
		if now := s.Consumed(); !s.opts.Hold && now != freed {
			s.release(now)
		}
	}()
	clock := time.Now().UnixNano() - int64(monotonic())
	for size := 0; size < capture.MaxBatch; {
		if s.lostHere(r.pos) {
			n++
			if err := s.handLost(fn); err != nil {
				return n, err
			}
		}
		rec := r.next()
		if rec == nil {
			if n == 0 {
				s.consumed.Store(r.pos) // what was discarded counts as handed over
			}
			return n, nil
		}
		e, err := s.take(rec)
		if err != nil {
			return n, err
		}
		size += len(rec)
		if e.Kind == softFailure {
			continue
		}
		e.Time += clock
		n++
		err = fn(e)
		s.consumed.Store(r.pos)
		if now := s.Consumed(); !s.opts.Hold && now-freed >= min(freeStep, r.size/8) {
			s.release(now)
			freed = now
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// take makes an event of a record, and notes which writes failed softly.
func (s *source) take(rec []byte) (capture.Event, error) {
	e, err := parseRecord(rec, s.disks)
	switch {
	case err != nil:
	case e.Kind == softFailure:
		s.noteSoft(e.Extent, s.Consumed())
	case e.Kind == capture.Change:
		s.coverSoft(e.Extent)
	}
	return e, err
}

// handLost hands over a Lost.
func (s *source) handLost(fn func(capture.Event) error) error {
	err := s.markSoft() // the tries that are waited for are not captured any more
	if err == nil {
		err = fn(capture.Event{Kind: capture.Lost, Time: time.Now().UnixNano()})
	}
	s.emitted.Add(1)
	return err
}

// lostHere reports whether a Lost belongs before the record at pos.
func (s *source) lostHere(pos uint64) bool {
	s.lost.Lock()
	defer s.lost.Unlock()
	s.noticeLocked()
	due := s.emitted.Load() + 1
	return due <= s.notes().Noticed && pos >= s.notes().place(due)
}

// noticeLocked finds the place of a new overflow in the ring. Every program that
// saw data mode has ended after the grace period, so all captured changes are below the
// producer's position; they may precede the Lost, since each was submitted before
// the change that overflowed was issued. Nothing follows before Resume, which
// notices first. So there is never more than one to notice, also for a process that
// finds it.
func (s *source) noticeLocked() {
	n := s.notes()
	if k := overflows(atomic.LoadUint32(s.state)); k > n.Noticed {
		grace()
		atomic.StoreUint64(&n.Lost[k%maxLosts], atomic.LoadUint64(s.prog.ring.producer))
		atomic.StoreUint64(&n.Noticed, k)
	}
}

// lostRoom reports whether there is room to keep the place of one more Lost: places are
// kept until they are released.
func (s *source) lostRoom() bool {
	s.lost.Lock()
	defer s.lost.Unlock()
	_, released := s.notes().split(s.notes().Floor)
	return s.notes().Noticed-released < maxLosts-2
}

// overflows returns how often data mode was left on the way to state.
func overflows(state uint32) uint64 { return (uint64(state) + 1) / 2 }

// Tail implements capture.Stream.
func (s *source) Tail() uint64 {
	if s.enter("tail") != nil {
		return s.Consumed()
	}
	defer s.leave()
	s.lost.Lock()
	defer s.lost.Unlock()
	s.noticeLocked() // before the producer's position: a Lost that counts is below it
	return atomic.LoadUint64(s.prog.ring.producer) + s.notes().Noticed
}

// Consumed implements capture.Stream.
func (s *source) Consumed() uint64 { return s.consumed.Load() + s.emitted.Load() }

// Stats implements capture.Source.
func (s *source) Stats() capture.Stats {
	if s.enter("stats") != nil {
		return capture.Stats{}
	}
	defer s.leave()
	state := atomic.LoadUint32(s.state)
	c := s.prog.control
	st := capture.Stats{
		Mode:            capture.ModeData,
		Settled:         state == atomic.LoadUint32(s.settled),
		Overflows:       overflows(state),
		RingSize:        s.opts.RingBytes,
		LostCompletions: atomic.LoadUint64(word64(c[controlLost:])) + atomic.LoadUint64(&s.notes().Given),
		Failed:          atomic.LoadUint64(word64(c[controlFailed:])),
		Unreadable:      atomic.LoadUint64(word64(c[controlUnreadable:])),
	}
	if state%2 == 1 {
		st.Mode = capture.ModeBitmap
	}
	freed := atomic.LoadUint64(s.prog.ring.consumer) // before the producer's position, which is never below
	st.RingUsed = int64(atomic.LoadUint64(s.prog.ring.producer) - freed)
	if p, err := s.prog.objs.OnQueue.Stats(); err == nil {
		st.Missed = p.RecursionMisses
	}
	for i := range s.devs {
		s.addCounters(&st, i)
	}
	if s.pins != nil && !s.pins.forget.Load() {
		st.Unpinned = !s.pins.dir.whole()
	}
	st.Detached = atomic.LoadUint64(&s.notes().Gone) != 0
	return st
}
