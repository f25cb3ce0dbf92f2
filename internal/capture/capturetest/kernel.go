package capturetest

import (
	"fmt"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Kernel is a machine with disks in memory, which outlives the processes that
// capture them: Open stands for the start of such a process, PinnedMem.Kill for
// its end by kill -9, Reboot for the end of everything but the disks. A change is submitted
// (and captured or marked at that moment, if anybody captures) and lands on the
// disk later, in any order, as on a real device; Write and its like do both at
// once. A new Kernel has disks of zeroes. Safe for concurrent use.
type Kernel struct {
	disks []capture.Disk
	mu    struct {
		sync.Mutex
		image    [][]byte
		ring     int64 // of captures
		inflight map[*MemWrite]struct{}
		capture  *memCapture // nil: nothing captures
		memory   []byte      // of Survivor.Memory
		clock    func() int64
		changed  chan struct{} // closed and replaced whenever something changes
	}
}

// memCapture is what captures in a Kernel: what a driver pins. Guarded by Kernel.mu.
type memCapture struct {
	disks   []capture.Disk
	bitmap  *capture.Bitmap
	events  []capture.Event // not released; [0] is at position floor, one position for each
	floor   uint64
	used    int64  // bytes of data in events
	state   uint64 // even: data mode; odd: bitmap mode; rises at each change
	stats   capture.Stats
	seen    []capture.DiskStats
	owner   *Mem // the process that has it open, nil after its end
	pinned  bool
	removed bool
}

// MemWrite is a change that was submitted to a Kernel.
type MemWrite struct {
	k       *Kernel
	extent  dr.Extent
	what    dr.What
	data    []byte
	capture *memCapture // that saw it submitted, nil: none
	state   uint64      // of that then; odd: not captured
}

// NewKernel makes a Kernel with the given disks; their Path is ignored.
func NewKernel(disks ...capture.Disk) *Kernel {
	k := &Kernel{disks: disks}
	for _, d := range disks {
		k.mu.image = append(k.mu.image, make([]byte, d.Size))
	}
	k.mu.ring = 16 << 20
	k.mu.inflight = make(map[*MemWrite]struct{})
	k.mu.clock = func() int64 { return time.Now().UnixNano() }
	k.mu.changed = make(chan struct{})
	return k
}

// SetRing sets how many bytes of data are held for Next, or until Release, before the
// capture overflows.
func (k *Kernel) SetRing(bytes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.ring = bytes
}

// SetClock makes now the source of the events' times.
func (k *Kernel) SetClock(now func() int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.clock = now
}

// Reboot ends every capture and everything that was pinned, and drops what is in
// flight: it never lands. The disks stay.
func (k *Kernel) Reboot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mu.capture != nil {
		k.removeLocked(k.mu.capture)
	}
	k.mu.memory = nil
	clear(k.mu.inflight)
	k.wakeLocked()
}

func (k *Kernel) removeLocked(c *memCapture) {
	c.removed = true
	if k.mu.capture == c {
		k.mu.capture = nil
	}
}

func (k *Kernel) index(id dr.DiskID) int {
	for i := range k.disks {
		if k.disks[i].ID == id {
			return i
		}
	}
	panic(fmt.Sprintf("capturetest: no disk %d", id))
}

// Submit begins a write of data at off, which it copies. It panics if the extent
// is not within the disk.
func (k *Kernel) Submit(disk dr.DiskID, off int64, data []byte) *MemWrite {
	return k.submit(dr.Extent{Disk: disk, Offset: off, Length: int64(len(data))}, dr.Data, append([]byte(nil), data...))
}

// SubmitZero begins to write zeroes.
func (k *Kernel) SubmitZero(x dr.Extent) *MemWrite { return k.submit(x, dr.Zero, nil) }

// SubmitDiscard begins to discard; when it lands the extent reads as zeroes.
func (k *Kernel) SubmitDiscard(x dr.Extent) *MemWrite { return k.submit(x, dr.Discard, nil) }

func (k *Kernel) submit(x dr.Extent, what dr.What, data []byte) *MemWrite {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := k.index(x.Disk)
	if x.Offset < 0 || x.Length <= 0 || x.End() > k.disks[i].Size || x.Offset%dr.SectorSize != 0 || x.Length%dr.SectorSize != 0 {
		panic(fmt.Sprintf("capturetest: bad extent %v", x))
	}
	w := &MemWrite{k: k, extent: x, what: what, data: data}
	k.mu.inflight[w] = struct{}{}
	if c := k.mu.capture; c != nil && c.has(x.Disk) {
		k.captureLocked(c, w)
	}
	return w
}

// captureLocked puts w into the stream of c, or marks it.
func (k *Kernel) captureLocked(c *memCapture, w *MemWrite) {
	x := w.extent
	if w.what == dr.Data {
		c.count(x)
	}
	if c.state%2 == 0 && c.used+int64(len(w.data)) > k.mu.ring {
		k.overflowLocked(c)
	}
	w.capture, w.state = c, c.state
	if w.state%2 == 1 {
		c.stats.Marked++
		c.mark(x)
		return
	}
	c.stats.Writes++
	c.stats.Bytes += uint64(len(w.data))
	now := k.mu.clock()
	for rest := x; rest.Length > 0; {
		part := rest
		e := capture.Event{Kind: capture.Change, What: w.what, Time: now}
		if w.what == dr.Data {
			part.Length = min(part.Length, capture.MaxEventData)
			e.Data = w.data[part.Offset-x.Offset:][:part.Length]
		}
		e.Extent = part
		k.pushLocked(c, e)
		rest.Offset, rest.Length = part.End(), rest.Length-part.Length
	}
}

func (k *Kernel) pushLocked(c *memCapture, e capture.Event) {
	c.events = append(c.events, e)
	c.used += int64(len(e.Data))
	k.wakeLocked()
}

func (k *Kernel) wakeLocked() {
	close(k.mu.changed)
	k.mu.changed = make(chan struct{})
}

func (k *Kernel) overflowLocked(c *memCapture) {
	c.state++
	c.stats.Overflows++
	k.pushLocked(c, capture.Event{Kind: capture.Lost, Time: k.mu.clock()})
}

// Land lets the change reach the disk. Landing twice does nothing.
func (w *MemWrite) Land() {
	k := w.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.mu.inflight[w]; !ok {
		return
	}
	delete(k.mu.inflight, w)
	dst := k.mu.image[k.index(w.extent.Disk)][w.extent.Offset:w.extent.End()]
	if w.what == dr.Data {
		copy(dst, w.data)
	} else {
		clear(dst)
	}
	if c := k.mu.capture; c != nil && c.stale(w) {
		c.mark(w.extent)
	}
	k.wakeLocked()
}

// Extent returns what w changes.
func (w *MemWrite) Extent() dr.Extent { return w.extent }

// Write submits data and lets it land.
func (k *Kernel) Write(disk dr.DiskID, off int64, data []byte) { k.Submit(disk, off, data).Land() }

// Zero submits zeroes and lets them land.
func (k *Kernel) Zero(x dr.Extent) { k.SubmitZero(x).Land() }

// Discard submits a discard and lets it land.
func (k *Kernel) Discard(x dr.Extent) { k.SubmitDiscard(x).Land() }

// Flush tells a disk to make its completed writes durable.
func (k *Kernel) Flush(disk dr.DiskID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c := k.mu.capture; c != nil && c.has(disk) && c.state%2 == 0 {
		c.stats.Flushes++
		k.pushLocked(c, capture.Event{Kind: capture.Flush, Extent: dr.Extent{Disk: disk}, Time: k.mu.clock()})
	}
}

// Image returns a copy of what is on a disk now.
func (k *Kernel) Image(disk dr.DiskID) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]byte(nil), k.mu.image[k.index(disk)]...)
}

// SetImage fills a disk without anybody noticing: what was there before the
// capture began.
func (k *Kernel) SetImage(disk dr.DiskID, image []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	copy(k.mu.image[k.index(disk)], image)
}

// Sneak changes what is on a disk without anybody noticing, as a program does that changes the buffer
// of a direct write while it is written.
func (k *Kernel) Sneak(disk dr.DiskID, off int64, data []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	copy(k.mu.image[k.index(disk)][off:], data)
}

// settledLocked reports whether nothing is in flight that a Resume of c waits for.
func (k *Kernel) settledLocked(c *memCapture) bool {
	for w := range k.mu.inflight {
		if c.stale(w) {
			return false
		}
	}
	return true
}

func newMemCapture(disks []capture.Disk) *memCapture {
	b, err := capture.NewBitmap(disks, 4096, nil)
	if err != nil {
		panic(err) // 4096 is valid
	}
	c := &memCapture{disks: disks, bitmap: b}
	for _, d := range disks {
		c.seen = append(c.seen, capture.DiskStats{ID: d.ID})
	}
	return c
}

func (c *memCapture) has(id dr.DiskID) bool {
	for _, d := range c.disks {
		if d.ID == id {
			return true
		}
	}
	return false
}

func (c *memCapture) count(x dr.Extent) {
	for i := range c.seen {
		if c.seen[i].ID == x.Disk {
			c.seen[i].SeenWrites++
			c.seen[i].SeenBytes += uint64(x.Length)
		}
	}
}

func (c *memCapture) mark(x dr.Extent) {
	if err := c.bitmap.Mark(x); err != nil {
		panic(err) // extents are checked when submitted
	}
}

// stale reports whether w was not captured in the present span of data mode, so
// that its landing must be marked and waited for.
func (c *memCapture) stale(w *MemWrite) bool {
	return c.has(w.extent.Disk) && (w.capture != c || w.state%2 == 1 || w.state != c.state)
}

// tail is the position behind the last event.
func (c *memCapture) tail() uint64 { return c.floor + uint64(len(c.events)) }

// lostFrom reports whether there is a Lost at or behind pos.
func (c *memCapture) lostFrom(pos uint64) bool {
	for _, e := range c.events[pos-c.floor:] {
		if e.Kind == capture.Lost {
			return true
		}
	}
	return false
}

// release drops the events before pos, but never the Lost that ended the last data mode
// while there is no new one.
func (c *memCapture) release(pos uint64) {
	for c.floor < pos && len(c.events) > 0 {
		e := c.events[0]
		if e.Kind == capture.Lost && c.state%2 == 1 && !c.lostFrom(c.floor+1) {
			return
		}
		c.events = c.events[1:]
		c.used -= int64(len(e.Data))
		c.floor++
	}
}

// inherit takes over what is due in old: everything that is not released, dirty or
// in flight.
func (c *memCapture) inherit(old *memCapture, inflight map[*MemWrite]struct{}) (disks []dr.DiskID) {
	for _, d := range old.disks {
		for _, mine := range c.disks {
			if mine.ID == d.ID && mine.Size == d.Size {
				disks = append(disks, d.ID)
			}
		}
	}
	keep := func(x dr.Extent) {
		if x.Length > 0 && c.has(x.Disk) {
			c.mark(x)
		}
	}
	for _, e := range old.events {
		keep(e.Extent)
	}
	for _, x := range old.bitmap.Take(1 << 62) {
		keep(x)
	}
	for w := range inflight {
		keep(w.extent)
	}
	return disks
}
