package capture

import "farside/internal/dr"

// Survivor is a Source whose state outlives the process that opened it: the
// programs go on capturing, and the stream, the dirty set and the counters
// stay where they are until a later process of the same boot opens the same
// disks and goes on with them. To that process it is as if there were one Source
// all the time, except that it may ask for events again.
//
// # Positions
//
// Tail, Consumed and Position of a Survivor are positions of one stream that
// goes on from process to process as long as Adopted is true, and mean nothing
// beyond. Three of them rise, in this order:
//
//	released ≤ Position ≤ Tail
//
// What was released is gone. What lies between released and Tail is there, also for
// a later process, which begins at released unless it calls Rewind. Events
// that were not released keep their room in the buffer, which overflows when it is full:
// release soon.
//
// A Source that was opened to hold releases nothing by itself; otherwise Next
// releases what it handed over, a little later.
//
// # Overflows and crashes
//
// A Lost keeps its place in the stream. As long as the Source has not returned
// to data mode behind it, it is never released: a process that adopts a Source
// in bitmap mode gets that Lost (again), before it can take anything dirty.
//
// The dirty set outlives the process, but what was taken of it does not. A
// consumer that must not forget what it took uses TakeDirtyNoted and keeps its note in
// Memory, or marks the ranges again.
//
// Events that come again may be older than what was read from the disk since they came
// first. A consumer that does not rewind to where it stood marks what they change.
//
// A consumer that adopts a Source in data mode doesn't know which captured changes
// are still on their way to the disk. If it is going to read from the disk, it calls
// Overflow first, as after any loss of its count (see Stream.Overflow).
type Survivor interface {
	Source

	// Memory returns memory that outlives the process, of the size that the
	// driver was told, nil if none was asked for. Its layout is the caller's. It
	// is zero when there was no earlier process in this boot, or when that asked
	// for another size. It is kept when the capture of an earlier process was
	// replaced rather than adopted; positions in it mean nothing then.
	// It is valid until Close. A store that was done when the process was killed
	// is in it; which of two stores without synchronization came first can't be told.
	Memory() []byte

	// Adopted reports whether this Source goes on with what an earlier process
	// opened: nothing was missed in between, and positions of that process
	// mean the same. Otherwise the capture is new.
	Adopted() bool

	// Inherited returns the disks of which nothing was missed since an earlier
	// process opened them. If the Source was adopted, that is all of them. If it replaced
	// a capture of other disks, it is the disks that are in both: what was in that
	// one's stream (and not released), dirty set, or in flight is in the dirty
	// set. So is what such a disk has grown by. Of the others, everything may have changed.
	Inherited() []dr.DiskID

	// Position is where the stream stands: behind the last event that was handed
	// over, and during a call of Next's fn, before the event of that call.
	Position() uint64

	// Rewind makes the event at pos, or behind it, the next one: a Position of this process
	// or of an earlier one. It works before the first Next only. The
	// error wraps dr.ErrNotFound if pos was released and dr.ErrInvalid if there can be no
	// event there, or after a Next.
	Rewind(pos uint64) error

	// Release lets go of the events before pos: their room is free, and
	// neither this nor a later process gets them again. Positions that were released
	// already, and those behind Position, change nothing.
	Release(pos uint64)

	// TakeDirtyNoted is TakeDirty, but calls note before anything is cleared, with
	// what will be removed: if the process is killed at any moment, the ranges are in
	// the dirty set, or note has returned. It may call note and then return none, when a
	// Lost came meanwhile. note must not call the Source.
	TakeDirtyNoted(max int64, note func([]dr.Extent)) ([]dr.Extent, error)

	// Forget ends the survival: Close then removes everything, and so does the end of the
	// process. Without it, Close and the end of the process leave the capture
	// running.
	Forget()
}
