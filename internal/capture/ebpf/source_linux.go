//go:build linux && amd64

package ebpf

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

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
	opened  uint64 // ns of the monotonic clock

	state, settled *uint32 // in the programs' control; see bpf/capture.c

	// Positions of the stream: bytes of the ring plus Lost events.
	consumed atomic.Uint64 // bytes of the ring that were handed over
	emitted  atomic.Uint64 // Lost events that were handed over

	resuming sync.Mutex    // one Resume at a time
	calm     bool          // what was in flight at Open has landed; of Resume
	given    atomic.Uint64 // completions that Resume gave up on
	swept    uint64        // when leaked flights were last looked for; of Next

	lost struct {
		sync.Mutex
		noticed uint64   // overflows for which a place in the ring is known
		at      []uint64 // places of those that were not handed over
	}

	life struct {
		sync.Mutex
		users  int
		closed chan struct{}
		idle   *sync.Cond
		err    error
	}
}

var _ capture.Source = (*source)(nil)

// Open begins to capture. Each disk's Path names a block device; its Size is
// found, or compared if it is not 0. The error wraps dr.ErrUnsupported if this
// machine or device can't be captured, dr.ErrDenied without the privileges,
// dr.ErrNotFound, dr.ErrInvalid or dr.ErrExists if the disks are wrong.
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
	return s, nil
}

func openDevices(disks []capture.Disk) (devs []*device, err error) {
	for _, d := range disks {
		dev, err := openDevice(d)
		if err != nil {
			closeDevices(devs)
			return nil, fmt.Errorf("capture disk %d, %s: %w", d.ID, d.Path, err)
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
	s := &source{devs: devs, disks: disksOf(devs), opts: o, prog: l}
	s.life.closed = make(chan struct{})
	s.life.idle = sync.NewCond(&s.life)
	s.state, s.settled = word32(l.control[controlState:]), word32(l.control[controlSettled:])
	if err := s.start(); err != nil {
		l.close()
		return nil, err
	}
	return s, nil
}

// start attaches the programs and waits where that is the only way to know what
// was in flight.
func (s *source) start() error {
	words := unsafe.Slice(word64(s.prog.bitmap), len(s.prog.bitmap)/8)
	var err error
	if s.bitmap, err = capture.NewBitmap(s.disks, s.opts.BlockSize, words); err != nil {
		return err
	}
	atomic.StoreUint32(s.settled, neverSettled)
	if s.opts.BitmapOnly {
		atomic.StoreUint32(s.state, 1)
	}
	if err := s.prog.attach(); err != nil {
		return err
	}
	s.opened = monotonic()
	for _, d := range s.devs {
		if d.base, err = d.writtenBytes(); err != nil {
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
func (s *source) TakeDirty(limit int64) ([]dr.Extent, error) {
	if err := s.enter("take dirty ranges"); err != nil {
		return nil, err
	}
	defer s.leave()
	xs := s.bitmap.Take(limit)
	// A change that overflowed was marked after the state changed: if what was taken
	// holds one whose Lost was not handed over, this sees it.
	if overflows(atomic.LoadUint32(s.state)) == s.emitted.Load() {
		return xs, nil
	}
	for _, x := range xs {
		if err := s.bitmap.Mark(x); err != nil {
			return nil, err
		}
	}
	return nil, nil
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
	deadline := time.Now().Add(wait)
	for pause := pollShort; ; {
		n, err := s.batch(fn)
		if n > 0 || err != nil {
			return n, err
		}
		s.sweep()
		left := time.Until(deadline)
		if left <= 0 {
			return 0, ctx.Err()
		}
		timer := time.NewTimer(min(pause, left))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return 0, ctx.Err()
		case <-s.life.closed:
			timer.Stop()
			return 0, fmt.Errorf("next event: capture closed: %w", dr.ErrUnavailable)
		}
		pause = min(pause+pause/8, pollLong)
	}
}

// The programs wake nobody, which would cost the writers; an idle reader looks
// again after these times.
const (
	pollShort = 500 * time.Microsecond
	pollLong  = 5 * time.Millisecond
)

// batch hands over what is in the ring, within bounds.
func (s *source) batch(fn func(capture.Event) error) (n int, err error) {
	r := &s.prog.ring
	defer r.release(true)
	clock := time.Now().UnixNano() - int64(monotonic())
	for size := 0; size < capture.MaxBatch; {
		if s.lostHere(r.pos) {
			err := fn(capture.Event{Kind: capture.Lost, Time: time.Now().UnixNano()})
			s.emitted.Add(1)
			if n++; err != nil {
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
		e, err := parseRecord(rec, s.disks)
		if err != nil {
			return n, err
		}
		e.Time += clock
		size += len(rec)
		n++
		err = fn(e)
		s.consumed.Store(r.pos)
		r.release(false)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// lostHere reports whether a Lost belongs before the record at pos, and takes it off
// the list.
func (s *source) lostHere(pos uint64) bool {
	s.lost.Lock()
	defer s.lost.Unlock()
	s.noticeLocked()
	if len(s.lost.at) == 0 || pos < s.lost.at[0] {
		return false
	}
	s.lost.at = s.lost.at[1:]
	return true
}

// noticeLocked finds the place of a new overflow in the ring. Every program that
// saw data mode has ended after the grace period, so all captured changes are below the
// producer's position; they may precede the Lost, since each was submitted before
// the change that overflowed was issued. Nothing follows before Resume, which
// notices first. So there is never more than one to notice.
func (s *source) noticeLocked() {
	if n := overflows(atomic.LoadUint32(s.state)); n > s.lost.noticed {
		grace()
		s.lost.at = append(s.lost.at, atomic.LoadUint64(s.prog.ring.producer))
		s.lost.noticed = n
	}
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
	return atomic.LoadUint64(s.prog.ring.producer) + s.lost.noticed
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
		LostCompletions: atomic.LoadUint64(word64(c[controlLost:])) + s.given.Load(),
		Failed:          atomic.LoadUint64(word64(c[controlFailed:])),
		Unreadable:      atomic.LoadUint64(word64(c[controlUnreadable:])),
	}
	if state%2 == 1 {
		st.Mode = capture.ModeBitmap
	}
	consumed := s.consumed.Load() // before the producer's position, which is never below
	st.RingUsed = int64(atomic.LoadUint64(s.prog.ring.producer) - consumed)
	if p, err := s.prog.objs.OnQueue.Stats(); err == nil {
		st.Missed = p.RecursionMisses
	}
	for i, d := range s.devs {
		s.addCounters(&st, uint32(i), d)
	}
	return st
}

func (s *source) addCounters(st *capture.Stats, i uint32, d *device) {
	one := capture.DiskStats{ID: d.disk.ID}
	var perCPU []counters
	if err := s.prog.objs.Counts.Lookup(i, &perCPU); err == nil {
		for _, c := range perCPU {
			st.Writes += c.Writes
			st.Bytes += c.Bytes
			st.Flushes += c.Flushes
			st.Marked += c.Marked
			one.SeenWrites += c.Seen
			one.SeenBytes += c.SeenBytes
		}
	}
	if n, err := d.writtenBytes(); err == nil {
		one.KernelBytes = n - d.base
	}
	st.Disks = append(st.Disks, one)
}
