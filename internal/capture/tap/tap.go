package tap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Backing is the disk behind a tap. It is called concurrently. It may also have
// the abilities of nbd.Zeroer, nbd.NoHoleZeroer, nbd.Trimmer (whose ranges must
// read as zeroes afterwards) and nbd.Mapper.
type Backing interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	Flush() error
}

// Disk is a disk to capture.
type Disk struct {
	ID      dr.DiskID
	Path    string // for people and as the name of the export
	Backing Backing
}

// DefaultQueue is how many bytes of changes wait for the consumer.
const DefaultQueue = 64 << 20

// granularity of the dirty set, in bytes.
const granularity = 4096

// Tap is a capture.Source in front of some disks. Make it with New.
type Tap struct {
	disks   []capture.Disk
	devices []*Device
	dirty   *capture.Bitmap
	clock   func() int64
	wake    chan struct{} // an event may be ready; one consumer
	closed  chan struct{} // closed by Close
	gate    func() error  // see SetGate; may be nil

	mu struct {
		sync.Mutex
		queue    *queue
		mode     uint64         // even: data; odd: bitmap; rises at each change of mode
		inflight map[uint64]int // changes not yet on the backing, by the mode at their start
		stats    capture.Stats
		seen     []capture.DiskStats
		lostDue  int           // how many Lost wait in the queue
		landed   chan struct{} // closed and replaced when a stale change has landed
		over     bool
	}
}

var _ capture.Source = (*Tap)(nil)

// New makes a Tap. queue bounds the bytes of changes that wait for the
// consumer, 2 MiB at least; zero chooses DefaultQueue. clock gives UTC nanoseconds; nil is the
// time of day.
func New(disks []Disk, queue int64, clock func() int64) (*Tap, error) {
	if queue <= 0 {
		queue = DefaultQueue
	}
	if clock == nil {
		clock = func() int64 { return time.Now().UnixNano() }
	}
	t := &Tap{clock: clock, wake: make(chan struct{}, 1), closed: make(chan struct{})}
	for i, d := range disks {
		size := d.Backing.Size()
		if size <= 0 || size%dr.SectorSize != 0 {
			return nil, fmt.Errorf("tap disk %d of %d bytes: not whole sectors: %w", d.ID, size, dr.ErrInvalid)
		}
		if t.find(d.ID) != nil {
			return nil, fmt.Errorf("tap disk %d: given twice: %w", d.ID, dr.ErrInvalid)
		}
		t.disks = append(t.disks, capture.Disk{ID: d.ID, Path: d.Path, Size: size})
		t.devices = append(t.devices, &Device{tap: t, index: i, id: d.ID, size: size, backing: d.Backing})
		t.mu.seen = append(t.mu.seen, capture.DiskStats{ID: d.ID})
	}
	var err error
	if t.dirty, err = capture.NewBitmap(t.disks, granularity, nil); err != nil {
		return nil, err
	}
	t.mu.queue = newQueue(max(queue, 2*capture.MaxEventData))
	t.mu.inflight = map[uint64]int{}
	t.mu.landed = make(chan struct{})
	return t, nil
}

func (t *Tap) find(id dr.DiskID) *Device {
	for _, d := range t.devices {
		if d.id == id {
			return d
		}
	}
	return nil
}

// SetGate makes Next ask f before it hands anything over: nil says that no change is
// missing among those that were submitted before the call. An error ends Next,
// and what waits is not handed over. For writers that can be cut off from one disk of
// several. Call it before the first Next.
func (t *Tap) SetGate(f func() error) { t.gate = f }

// Device returns the disk as its writers must see it, or nil.
func (t *Tap) Device(id dr.DiskID) *Device { return t.find(id) }

// pending is a change between its submission and its landing.
type pending struct {
	extent dr.Extent
	mode   uint64
}

// submit gives a change its place in the stream, or marks it. The backing must
// not be changed before. data is copied.
func (t *Tap) submit(disk int, x dr.Extent, what dr.What, data []byte) (pending, error) {
	t.mu.Lock()
	if t.mu.over {
		t.mu.Unlock()
		return pending{}, errClosed
	}
	if what != dr.Discard {
		t.mu.seen[disk].SeenWrites++
		t.mu.seen[disk].SeenBytes += uint64(x.Length)
	}
	var taken []*slot
	if t.mu.mode%2 == 0 {
		if taken = t.placeLocked(x, what); taken == nil {
			t.overflowLocked()
		}
	}
	w := pending{x, t.mu.mode}
	t.mu.inflight[w.mode]++
	if taken == nil {
		t.mu.stats.Marked++
	} else {
		t.mu.stats.Writes++
		t.mu.stats.Bytes += uint64(len(data))
	}
	t.mu.Unlock()
	if taken == nil {
		return w, t.dirty.Mark(x) // x was checked by the device
	}
	for _, s := range taken {
		if what == dr.Data {
			copy(s.ev.Data, data[s.ev.Extent.Offset-x.Offset:])
		}
		s.ready.Store(true)
	}
	t.signal()
	return w, nil
}

// placeLocked takes slots for x, all or none (nil).
func (t *Tap) placeLocked(x dr.Extent, what dr.What) (taken []*slot) {
	q := t.mu.queue
	undo := q.mark()
	ev := capture.Event{Kind: capture.Change, What: what, Time: t.clock()}
	for rest := x; rest.Length > 0; {
		ev.Extent = rest
		n := 0
		if what == dr.Data {
			n = int(min(rest.Length, capture.MaxEventData))
			ev.Extent.Length = int64(n)
		}
		s := q.push(ev, n, false)
		if s == nil {
			q.reset(undo)
			return nil
		}
		taken = append(taken, s)
		rest.Offset, rest.Length = ev.Extent.End(), rest.Length-ev.Extent.Length
	}
	return taken
}

// Overflow implements capture.Stream.
func (t *Tap) Overflow() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.mode%2 == 0 {
		t.overflowLocked()
	}
}

// overflowLocked leaves data mode. If there is no slot even for the Lost, then
// the last event that waits is one: nothing came between, so it says it all.
func (t *Tap) overflowLocked() {
	t.mu.mode++
	t.mu.stats.Overflows++
	if s := t.mu.queue.push(capture.Event{Kind: capture.Lost, Time: t.clock()}, 0, true); s != nil {
		t.mu.lostDue++
		s.ready.Store(true)
	}
	t.signal()
}

// land is called when a change is on the backing, whole, in part or not at all.
func (t *Tap) land(disk int, w pending, what dr.What, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.inflight[w.mode]--; t.mu.inflight[w.mode] == 0 {
		delete(t.mu.inflight, w.mode)
	}
	if what != dr.Discard {
		t.mu.seen[disk].KernelBytes += uint64(w.extent.Length)
	}
	if err != nil {
		t.mu.stats.Failed++
	}
	if stale := w.mode%2 == 1 || w.mode != t.mu.mode; stale || err != nil {
		if err := t.dirty.Mark(w.extent); err != nil {
			panic(err) // submit has marked or placed the same extent
		}
		close(t.mu.landed)
		t.mu.landed = make(chan struct{})
	}
}

// flushed notes that a disk was told to flush. Without room it is left out: it
// changes nothing.
func (t *Tap) flushed(id dr.DiskID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.mode%2 != 0 {
		return
	}
	ev := capture.Event{Kind: capture.Flush, Extent: dr.Extent{Disk: id}, Time: t.clock()}
	if s := t.mu.queue.push(ev, 0, false); s != nil {
		t.mu.stats.Flushes++
		s.ready.Store(true)
		t.signal()
	}
}

func (t *Tap) signal() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

var errClosed = fmt.Errorf("tap closed: %w", dr.ErrUnavailable)

// Disks implements capture.Source.
func (t *Tap) Disks() []capture.Disk { return t.disks }

// Next implements capture.Stream.
func (t *Tap) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		n, err := t.batch(fn)
		if n > 0 || err != nil {
			return n, err
		}
		select {
		case <-t.wake:
		case <-t.closed:
		case <-timeout.C:
			return 0, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// batch hands over what is ready.
func (t *Tap) batch(fn func(capture.Event) error) (n int, err error) {
	tail := t.Tail()
	if t.gate != nil && t.Consumed() < tail {
		if err := t.gate(); err != nil {
			return 0, err
		}
	}
	for size := 0; size < capture.MaxBatch && err == nil; n++ {
		t.mu.Lock()
		if t.gate != nil && t.mu.queue.head == tail {
			t.mu.Unlock()
			return n, nil
		}
		if t.mu.over {
			t.mu.Unlock()
			return n, errClosed
		}
		s := t.mu.queue.first()
		t.mu.Unlock()
		if s == nil {
			return n, nil
		}
		size += len(s.ev.Data)
		err = fn(s.ev)
		t.mu.Lock()
		if s.ev.Kind == capture.Lost {
			t.mu.lostDue--
		}
		t.mu.queue.pop()
		t.mu.Unlock()
	}
	return n, err
}

// Tail implements capture.Stream.
func (t *Tap) Tail() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.queue.tail
}

// Consumed implements capture.Stream.
func (t *Tap) Consumed() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.queue.head
}

// Resume implements capture.Stream.
func (t *Tap) Resume(ctx context.Context) error {
	t.mu.Lock()
	if t.mu.mode%2 == 1 {
		t.mu.mode++
	}
	for t.mu.mode%2 == 0 && !t.settledLocked() {
		landed := t.mu.landed
		t.mu.Unlock()
		select {
		case <-landed:
		case <-t.closed:
			return fmt.Errorf("resume: %w", errClosed)
		case <-ctx.Done():
			return ctx.Err()
		}
		t.mu.Lock()
	}
	t.mu.Unlock()
	return nil
}

// settledLocked reports whether all changes in flight were captured in the
// present span of data mode.
func (t *Tap) settledLocked() bool {
	for mode := range t.mu.inflight {
		if mode != t.mu.mode || mode%2 == 1 {
			return false
		}
	}
	return true
}

// Mark implements capture.DirtySet.
func (t *Tap) Mark(x dr.Extent) error { return t.dirty.Mark(x) }

// TakeDirty implements capture.DirtySet.
func (t *Tap) TakeDirty(limit int64) ([]dr.Extent, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.lostDue > 0 {
		return nil, nil
	}
	return t.dirty.Take(limit), nil
}

// Dirty implements capture.DirtySet.
func (t *Tap) Dirty() (int64, error) { return t.dirty.Dirty(), nil }

// ReadAt implements capture.Source: it reads the backing.
func (t *Tap) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	d := t.find(disk)
	if d == nil {
		return 0, fmt.Errorf("read tapped disk %d: %w", disk, dr.ErrNotFound)
	}
	if off < 0 || off > d.size-int64(len(p)) {
		return 0, fmt.Errorf("read tapped disk %d at %d: %w", disk, off, dr.ErrInvalid)
	}
	n, err := d.ReadAt(p, off)
	if errors.Is(err, io.EOF) && n == len(p) {
		err = nil
	}
	return n, err
}

// Stats implements capture.Source.
func (t *Tap) Stats() capture.Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.mu.stats
	s.Mode = capture.ModeData
	if t.mu.mode%2 == 1 {
		s.Mode = capture.ModeBitmap
	}
	s.Settled = s.Mode == capture.ModeData && t.settledLocked()
	s.RingUsed, s.RingSize = t.mu.queue.inUse(), int64(len(t.mu.queue.bytes))
	s.Disks = append([]capture.DiskStats(nil), t.mu.seen...)
	return s
}

// Close ends the capture. Devices refuse changes from then on; the backings
// stay open.
func (t *Tap) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.mu.over {
		t.mu.over = true
		close(t.closed)
	}
	return nil
}
