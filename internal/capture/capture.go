// Package capture is the seam between Farside and what it copies: a Source
// hands over every change of a machine's disks, in order, while the machine
// goes on working.
//
// Main types: Source (what a driver implements: a Stream of Events, a DirtySet
// and reads of the disk below the capture), Survivor (a Source that goes on when the
// process ends), Event, Stats, and Bitmap, the dirty set that drivers share. The drivers are in the packages below this one (ebpf,
// tap); capturetest holds their conformance suite and an in-memory Source.
//
// The package builds no frames, keeps no history and knows no network: what is
// done with the events is the agent's business.
//
// # Invariants
//
// A driver keeps these, and the conformance suite checks them:
//
//  1. Order. If a write completed before another one was submitted, its events
//     come first. There is one order over all disks of a Source.
//  2. Nothing is lost. Every change is handed over as events, or is in the dirty
//     set before it can reach the disk. Both may happen.
//  3. Lost comes once for each overflow, behind every event that was captured
//     before it and before every event captured after the Resume that follows.
//     Between a Lost and the call of that Resume there is no Change.
//  4. The state right before a Lost is exact: a state in which a power cut could
//     have left the disks.
//  5. A change that is not in the events enters the dirty set when it is submitted
//     and again when it has reached the disk; so does, the second time, a change
//     that was captured before a Lost and reaches the disk after it. Taking a
//     dirty range clears it before the disk is read. Therefore a range that was
//     read too early is dirty again.
//  6. While a Lost waits to be handed over, nothing is taken from the dirty set:
//     what is in it may be newer than captured changes that were handed over, and
//     only the Lost says so.
//  7. When Resume has returned nil and no Lost follows, all changes of (5) are in
//     the dirty set or were taken from it after they had reached the disk.
//
// What follows for the consumer: a bulk read may be older than a captured write
// that is still on its way to the disk, so sectors with a captured write since
// data mode began must be left out of bulk data that is sent behind that write.
//
// # Concurrency
//
// All methods of a Source may be called concurrently, except that Next is called
// by one goroutine at a time. Resume waits for the disk; keep calling Next from
// another goroutine meanwhile or the buffer overflows again.
package capture

import (
	"context"
	"fmt"
	"time"

	"farside/internal/dr"
)

// Disk is a disk of a Source.
type Disk struct {
	ID   dr.DiskID
	Path string // where the driver finds it; never an identity
	Size int64  // bytes, a multiple of dr.SectorSize
}

// EventKind says what an Event is.
type EventKind uint8

// The kinds of event.
const (
	Change EventKind = iota + 1 // Extent, What and, for dr.Data, Data hold a change
	Flush                       // the disk Extent.Disk was told to make completed writes durable
	Lost                        // changes may be missing from here on; they are in the dirty set
)

// String returns the name of k.
func (k EventKind) String() string {
	switch k {
	case Change:
		return "change"
	case Flush:
		return "flush"
	case Lost:
		return "lost"
	}
	return fmt.Sprintf("event(%d)", uint8(k))
}

// Event is one thing that happened, in stream order. A large write comes as
// several consecutive or interleaved Changes, each a prefix of the rest.
type Event struct {
	Kind   EventKind
	Extent dr.Extent // Change: what changed, within the disk; Flush: only Disk
	What   dr.What   // Change only
	Time   int64     // UTC nanoseconds, by the machine's clock; may go back
	Data   []byte    // dr.Data: Extent.Length bytes, valid only during the call
}

// MaxEventData is the most data that one Event carries, in bytes.
const MaxEventData = 1 << 20

// MaxBatch bounds the data that one call of Next hands over, in bytes; the last
// event may go beyond it.
const MaxBatch = 4 << 20

// Mode says how a Source records changes at present.
type Mode uint8

// The modes. A driver that cannot carry data at all stays in ModeBitmap.
const (
	ModeData   Mode = iota + 1 // changes become events
	ModeBitmap                 // changes only enter the dirty set
)

// String returns the name of m.
func (m Mode) String() string {
	switch m {
	case ModeData:
		return "data"
	case ModeBitmap:
		return "bitmap"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// Stream is the ordered side of a Source.
type Stream interface {
	// Next hands what is there to fn, at most about MaxBatch bytes, and waits at
	// most wait for the first event. It returns how many events fn was called
	// with. An error of fn ends the call and is returned as it is; the event
	// counts as handed over. After Close the error wraps dr.ErrUnavailable.
	Next(ctx context.Context, wait time.Duration, fn func(Event) error) (int, error)

	// Tail and Consumed are positions in the stream that never go back: once
	// Consumed is at least a Tail that was taken earlier, everything that had
	// been submitted when that Tail was taken (a Lost included) has been handed
	// over. They mean nothing beyond this Source's life.
	Tail() uint64
	Consumed() uint64

	// Resume returns a Source in bitmap mode to data mode. It returns when
	// neither a change that was not captured nor one that was captured before
	// the last Lost is on its way to the disk any more. In data mode it only
	// waits for that, which at once is true except shortly after the Source
	// was made. If the buffer overflows again meanwhile it returns nil and the
	// stream has another Lost. A driver that cannot carry data returns
	// dr.ErrUnsupported.
	Resume(ctx context.Context) error

	// Overflow makes the Source leave data mode, as a full buffer does; in
	// bitmap mode and after Close it does nothing. For a consumer that must
	// know which changes are in flight and has lost count of them.
	Overflow()
}

// DirtySet is the unordered side of a Source: ranges that must be read from the
// disk and sent.
type DirtySet interface {
	// Mark adds a range, rounded outwards to the set's granularity.
	Mark(x dr.Extent) error
	// TakeDirty removes and returns ranges of at most max bytes in all (but at
	// least one block if there is one), in order of disk and offset from where
	// the last call ended. The ranges lie within their disks. There are none
	// while a Lost waits to be handed over.
	TakeDirty(max int64) ([]dr.Extent, error)
	// Dirty returns how many bytes are in the set.
	Dirty() (int64, error)
}

// Source captures the changes of some disks of one machine. A new Source is in
// data mode with an empty dirty set; changes that were already on their way to
// the disk when it was made enter the dirty set when they reach it.
type Source interface {
	Stream
	DirtySet

	// Disks returns the captured disks in the order in which they were given.
	Disks() []Disk
	// ReadAt reads a disk below the capture and below any cache: what it returns
	// was on the disk at some moment during the call. Offset and length are
	// multiples of dr.SectorSize and lie within the disk.
	ReadAt(p []byte, disk dr.DiskID, off int64) (int, error)
	// Stats returns counters since the Source was made.
	Stats() Stats
	// Close ends the capture and frees everything. Closing twice is harmless.
	Close() error
}

// Stats are the counters of a Source. A driver leaves at zero what it does not
// have.
type Stats struct {
	Mode    Mode
	Settled bool // nothing that Resume would wait for

	Writes    uint64 // changes captured (events may be more: large ones are cut)
	Bytes     uint64 // bytes of data captured
	Flushes   uint64
	Marked    uint64 // changes that only entered the dirty set
	Overflows uint64 // times that data mode was left

	RingUsed int64 // bytes of buffer in use
	RingSize int64 // bytes of buffer

	// Detached says that the capture no longer sees every change, because somebody took
	// (some of) it out of the kernel. It never becomes
	// false again: open a new Source and compare.
	Detached bool

	// Unpinned says that a Survivor would not survive any more, because somebody removed
	// what is kept for the next process. This one captures as before.
	Unpinned bool

	Missed          uint64 // occasions on which the kernel did not run the capture: any is a reason to compare
	LostCompletions uint64 // completions that never came; their ranges were marked again
	Failed          uint64 // changes that the device refused; their ranges were marked
	Unreadable      uint64 // changes whose data could not be read; handled as an overflow

	Disks []DiskStats // in the order of Source.Disks
}

// DiskStats let the accounting cross-check compare what the driver saw with
// what the kernel counted, both since the capture was made (by an earlier process,
// if this one adopted it). docs/capture.md says when they may differ.
type DiskStats struct {
	ID           dr.DiskID
	SeenWrites   uint64 // submissions of data, zeroes or secure erase, captured or marked
	SeenBytes    uint64
	KernelWrites uint64 // writes that the kernel counted, each piece of a divided one
	KernelBytes  uint64 // bytes that the kernel counted as written

	// Gone says that the disk was taken away, or that another one is in its place. It
	// never becomes false again; the other disks are captured as before.
	Gone bool
}

// DiskError is why one disk of several can't be captured.
type DiskError struct {
	Disk dr.DiskID
	Err  error
}

// Error implements error.
func (e *DiskError) Error() string { return fmt.Sprintf("capture disk %d: %v", e.Disk, e.Err) }

// Unwrap returns what is wrong with the disk.
func (e *DiskError) Unwrap() error { return e.Err }
