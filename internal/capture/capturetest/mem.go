// Package capturetest tests drivers of package capture and stands in for them.
//
// Main types: Mem, a Source whose disks are in memory and whose writes reach
// them when the test says so; Workload, a seeded mix of changes for a Mem;
// Replicator, the smallest program that follows the rules of package capture and
// ends with an exact copy; Run, the conformance suite that every driver passes.
//
// It is for tests only and holds whole disks in memory. Mem is safe for
// concurrent use; Workload and Replicator belong to one goroutine.
package capturetest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Mem is a capture.Source whose disks are in memory. A change is submitted (and
// captured or marked at that moment) and lands on the disk later, in any order,
// as on a real device; Write and its like do both at once. A new Mem is in data
// mode with disks of zeroes and a ring of 16 MiB.
type Mem struct {
	disks  []capture.Disk
	bitmap *capture.Bitmap
	mu     struct {
		sync.Mutex
		image    [][]byte
		events   []capture.Event // [0] is at position head
		head     uint64          // one for each event handed over
		lostDue  int             // Lost events in events
		used     int64           // bytes of data in events
		ring     int64
		state    uint64 // even: data mode; odd: bitmap mode; rises at each change
		inflight map[*MemWrite]struct{}
		stats    capture.Stats
		seen     []capture.DiskStats
		clock    func() int64
		changed  chan struct{} // closed and replaced whenever something changes
		closed   bool
	}
}

var _ capture.Source = (*Mem)(nil)

// MemWrite is a change that was submitted to a Mem.
type MemWrite struct {
	m      *Mem
	extent dr.Extent
	what   dr.What
	data   []byte
	state  uint64 // of the Mem when it was submitted; odd: not captured
}

// NewMem makes a Mem with the given disks; their Path is ignored.
func NewMem(disks ...capture.Disk) *Mem {
	b, err := capture.NewBitmap(disks, 4096, nil)
	if err != nil {
		panic(err) // 4096 is valid
	}
	m := &Mem{disks: disks, bitmap: b}
	for _, d := range disks {
		m.mu.image = append(m.mu.image, make([]byte, d.Size))
		m.mu.seen = append(m.mu.seen, capture.DiskStats{ID: d.ID})
	}
	m.mu.ring = 16 << 20
	m.mu.inflight = make(map[*MemWrite]struct{})
	m.mu.clock = func() int64 { return time.Now().UnixNano() }
	m.mu.changed = make(chan struct{})
	return m
}

// SetRing sets how many bytes of data wait for Next before the Mem overflows.
func (m *Mem) SetRing(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.ring = bytes
}

// SetClock makes now the source of the events' times.
func (m *Mem) SetClock(now func() int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.clock = now
}

func (m *Mem) index(id dr.DiskID) int {
	for i := range m.disks {
		if m.disks[i].ID == id {
			return i
		}
	}
	panic(fmt.Sprintf("capturetest: no disk %d", id))
}

// Submit begins a write of data at off, which it copies. It panics if the extent
// is not within the disk.
func (m *Mem) Submit(disk dr.DiskID, off int64, data []byte) *MemWrite {
	return m.submit(dr.Extent{Disk: disk, Offset: off, Length: int64(len(data))}, dr.Data, append([]byte(nil), data...))
}

// SubmitZero begins to write zeroes.
func (m *Mem) SubmitZero(x dr.Extent) *MemWrite { return m.submit(x, dr.Zero, nil) }

// SubmitDiscard begins to discard; when it lands the extent reads as zeroes.
func (m *Mem) SubmitDiscard(x dr.Extent) *MemWrite { return m.submit(x, dr.Discard, nil) }

func (m *Mem) submit(x dr.Extent, what dr.What, data []byte) *MemWrite {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.index(x.Disk)
	if x.Offset < 0 || x.Length <= 0 || x.End() > m.disks[i].Size || x.Offset%dr.SectorSize != 0 || x.Length%dr.SectorSize != 0 {
		panic(fmt.Sprintf("capturetest: bad extent %v", x))
	}
	if what == dr.Data {
		m.mu.seen[i].SeenWrites++
		m.mu.seen[i].SeenBytes += uint64(x.Length)
	}
	if m.mu.state%2 == 0 && m.mu.used+int64(len(data)) > m.mu.ring {
		m.overflowLocked()
	}
	w := &MemWrite{m: m, extent: x, what: what, data: data, state: m.mu.state}
	m.mu.inflight[w] = struct{}{}
	if w.state%2 == 1 {
		m.mu.stats.Marked++
		m.markLocked(x)
		return w
	}
	m.mu.stats.Writes++
	m.mu.stats.Bytes += uint64(len(data))
	now := m.mu.clock()
	for rest := x; rest.Length > 0; {
		part := rest
		e := capture.Event{Kind: capture.Change, What: what, Time: now}
		if what == dr.Data {
			part.Length = min(part.Length, capture.MaxEventData)
			e.Data = data[part.Offset-x.Offset:][:part.Length]
		}
		e.Extent = part
		m.pushLocked(e)
		rest.Offset, rest.Length = part.End(), rest.Length-part.Length
	}
	return w
}

func (m *Mem) pushLocked(e capture.Event) {
	m.mu.events = append(m.mu.events, e)
	m.mu.used += int64(len(e.Data))
	m.wakeLocked()
}

func (m *Mem) wakeLocked() {
	close(m.mu.changed)
	m.mu.changed = make(chan struct{})
}

func (m *Mem) markLocked(x dr.Extent) {
	if err := m.bitmap.Mark(x); err != nil {
		panic(err) // extents are checked when submitted
	}
}

// Overflow forces the Mem into bitmap mode, as a full ring does. It does nothing
// in bitmap mode.
func (m *Mem) Overflow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.state%2 == 0 {
		m.overflowLocked()
	}
}

func (m *Mem) overflowLocked() {
	m.mu.state++
	m.mu.stats.Overflows++
	m.mu.lostDue++
	m.pushLocked(capture.Event{Kind: capture.Lost, Time: m.mu.clock()})
}

// Land lets the change reach the disk. Landing twice does nothing.
func (w *MemWrite) Land() {
	m := w.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.mu.inflight[w]; !ok {
		return
	}
	delete(m.mu.inflight, w)
	dst := m.mu.image[m.index(w.extent.Disk)][w.extent.Offset:w.extent.End()]
	if w.what == dr.Data {
		copy(dst, w.data)
	} else {
		clear(dst)
	}
	if w.staleLocked() {
		m.markLocked(w.extent)
	}
	m.wakeLocked()
}

// Extent returns what w changes.
func (w *MemWrite) Extent() dr.Extent { return w.extent }

// staleLocked reports whether w was not captured in the present span of data
// mode, so that its landing must be marked and waited for.
func (w *MemWrite) staleLocked() bool { return w.state%2 == 1 || w.state != w.m.mu.state }

// Write submits data and lets it land.
func (m *Mem) Write(disk dr.DiskID, off int64, data []byte) { m.Submit(disk, off, data).Land() }

// Zero submits zeroes and lets them land.
func (m *Mem) Zero(x dr.Extent) { m.SubmitZero(x).Land() }

// Discard submits a discard and lets it land.
func (m *Mem) Discard(x dr.Extent) { m.SubmitDiscard(x).Land() }

// Flush tells a disk to make its completed writes durable.
func (m *Mem) Flush(disk dr.DiskID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.state%2 == 0 {
		m.mu.stats.Flushes++
		m.pushLocked(capture.Event{Kind: capture.Flush, Extent: dr.Extent{Disk: disk}, Time: m.mu.clock()})
	}
}

// Image returns a copy of what is on a disk now.
func (m *Mem) Image(disk dr.DiskID) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte(nil), m.mu.image[m.index(disk)]...)
}

// SetImage fills a disk without anybody noticing: what was there before the
// capture began.
func (m *Mem) SetImage(disk dr.DiskID, image []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.mu.image[m.index(disk)], image)
}

// Disks implements capture.Source.
func (m *Mem) Disks() []capture.Disk { return m.disks }

// Next implements capture.Source.
func (m *Mem) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (int, error) {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for n, size := 0, 0; ; {
		m.mu.Lock()
		if m.mu.closed {
			m.mu.Unlock()
			return n, fmt.Errorf("next event: capture closed: %w", dr.ErrUnavailable)
		}
		changed := m.mu.changed
		if len(m.mu.events) > 0 && size < capture.MaxBatch {
			e := m.mu.events[0]
			m.mu.Unlock()
			err := fn(e)
			m.mu.Lock()
			m.mu.events = m.mu.events[1:]
			m.mu.used -= int64(len(e.Data))
			if e.Kind == capture.Lost {
				m.mu.lostDue--
			}
			m.mu.head++
			m.mu.Unlock()
			n, size = n+1, size+len(e.Data)
			if err != nil {
				return n, err
			}
			continue
		}
		m.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		select {
		case <-changed:
		case <-timeout.C:
			return 0, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// Mark implements capture.DirtySet.
func (m *Mem) Mark(x dr.Extent) error { return m.bitmap.Mark(x) }

// TakeDirty implements capture.DirtySet.
func (m *Mem) TakeDirty(limit int64) ([]dr.Extent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.lostDue > 0 {
		return nil, nil
	}
	return m.bitmap.Take(limit), nil
}

// Dirty implements capture.DirtySet.
func (m *Mem) Dirty() (int64, error) { return m.bitmap.Dirty(), nil }

// ReadAt implements capture.Source: it reads what has landed.
func (m *Mem) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.disks {
		if m.disks[i].ID == disk {
			if off < 0 || off > m.disks[i].Size-int64(len(p)) {
				return 0, fmt.Errorf("read disk %d at %d: %w", disk, off, dr.ErrInvalid)
			}
			return copy(p, m.mu.image[i][off:]), nil
		}
	}
	return 0, fmt.Errorf("read disk %d: %w", disk, dr.ErrNotFound)
}

// Resume implements capture.Stream.
func (m *Mem) Resume(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.state%2 == 1 {
		m.mu.state++
	}
	for m.mu.state%2 == 0 && !m.settledLocked() {
		if m.mu.closed {
			return fmt.Errorf("resume: capture closed: %w", dr.ErrUnavailable)
		}
		changed := m.mu.changed
		m.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		m.mu.Lock()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

func (m *Mem) settledLocked() bool {
	for w := range m.mu.inflight {
		if w.staleLocked() {
			return false
		}
	}
	return true
}

// Tail implements capture.Stream.
func (m *Mem) Tail() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.head + uint64(len(m.mu.events))
}

// Consumed implements capture.Stream.
func (m *Mem) Consumed() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.head
}

// Stats implements capture.Source.
func (m *Mem) Stats() capture.Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.mu.stats
	s.Mode = capture.ModeData
	if m.mu.state%2 == 1 {
		s.Mode = capture.ModeBitmap
	}
	s.Settled = s.Mode == capture.ModeData && m.settledLocked()
	s.RingUsed, s.RingSize = m.mu.used, m.mu.ring
	s.Disks = append([]capture.DiskStats(nil), m.mu.seen...)
	for i := range s.Disks {
		s.Disks[i].KernelBytes = s.Disks[i].SeenBytes
	}
	return s
}

// Close implements capture.Source.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.closed = true
	m.wakeLocked()
	return nil
}
