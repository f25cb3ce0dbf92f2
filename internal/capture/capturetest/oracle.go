package capturetest

import (
	"bytes"
	"fmt"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Oracle knows what was written, in what order, and judges a stream of changes
// by it: each must be the next piece of the next write. It is fed by whoever
// writes, at submission, so it knows nothing of capture.
type Oracle struct {
	images map[dr.DiskID][]byte // all writes before next applied, and part of next
	log    []Op
	next   int   // the write that is due in the stream
	part   int64 // bytes of it that came
}

// Op is a change as its writer sees it.
type Op struct {
	Extent dr.Extent
	Data   []byte // nil: zeroes
}

// NewOracle makes an Oracle that knows the disks' content before the first write.
func NewOracle(images map[dr.DiskID][]byte) *Oracle { return &Oracle{images: images} }

// Record notes a write; data (nil for zeroes and discards) must not change later.
func (o *Oracle) Record(x dr.Extent, data []byte) { o.log = append(o.log, Op{x, data}) }

// Sync takes all writes so far as handed over: the stream stands behind them.
func (o *Oracle) Sync() {
	for ; o.next < len(o.log); o.next++ {
		op := o.log[o.next]
		o.put(op, 0, op.Extent.Length)
	}
	o.log, o.next, o.part = o.log[:0], 0, 0
}

// Again takes back n of the writes that were handed over: they come once more. The
// images are right again when the stream has passed where it was.
func (o *Oracle) Again(n int) { o.next, o.part = o.next-n, 0 }

// Skip takes the next n writes as handed over.
func (o *Oracle) Skip(n int) {
	for ; n > 0; n-- {
		o.put(o.log[o.next], 0, o.log[o.next].Extent.Length)
		o.next, o.part = o.next+1, 0
	}
}

// Rest returns the writes that the stream still owes.
func (o *Oracle) Rest() []Op { return o.log[o.next:] }

// Due returns how many writes the stream still owes.
func (o *Oracle) Due() int { return len(o.log) - o.next }

// Image returns what a disk holds at the stream's position; it is not a copy.
func (o *Oracle) Image(disk dr.DiskID) []byte { return o.images[disk] }

func (o *Oracle) put(op Op, from, n int64) {
	dst := o.images[op.Extent.Disk][op.Extent.Offset+from:][:n]
	if op.Data == nil {
		clear(dst)
		return
	}
	copy(dst, op.Data[from:])
}

// repeats reports whether e zeroes once more what the last write zeroed: a kernel
// that fails to do it by one operation does it by another.
func (o *Oracle) repeats(e capture.Event) bool {
	if o.next == 0 || o.part > 0 {
		return false
	}
	last := o.log[o.next-1]
	return last.Data == nil && e.Extent.Disk == last.Extent.Disk && e.Extent.Offset >= last.Extent.Offset &&
		e.Extent.End() <= last.Extent.End() && len(bytes.TrimLeft(e.Data, "\x00")) == 0
}

// Event accepts the next change of the stream or says what is wrong with it.
func (o *Oracle) Event(e capture.Event) error {
	if o.next == len(o.log) {
		if o.repeats(e) {
			return nil
		}
		return fmt.Errorf("change of %v that nobody made", e.Extent)
	}
	op := o.log[o.next]
	due := op.Extent
	due.Offset, due.Length = due.Offset+o.part, due.Length-o.part
	if e.Extent.Disk != due.Disk || e.Extent.Offset != due.Offset || e.Extent.Length > due.Length {
		if o.repeats(e) {
			return nil
		}
		return fmt.Errorf("change of %v, but %v is next", e.Extent, due)
	}
	o.put(op, o.part, e.Extent.Length)
	got := make([]byte, e.Extent.Length)
	copy(got, e.Data)
	if want := o.images[due.Disk][due.Offset:][:e.Extent.Length]; !bytes.Equal(got, want) {
		return fmt.Errorf("change of %v: %v has other content than was written", e.Extent, e.What)
	}
	if o.part += e.Extent.Length; o.part == op.Extent.Length {
		o.next, o.part = o.next+1, 0
	}
	return nil
}
