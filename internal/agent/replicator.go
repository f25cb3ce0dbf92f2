package agent

import (
	"context"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
)

// tuning holds the numbers by which a replicator trades latency, throughput
// and memory against each other.
type tuning struct {
	memory      int64         // bytes of frames that may wait for the process server
	fold        bool          // frames that wait are folded before the source has to overflow
	codec       frame.Codec   // of the frames
	frameBytes  int           // a frame is cut when it holds that much data …
	frameAge    time.Duration // … or when it is that old: bounds what batching adds to the RPO
	frameRest   time.Duration // an idle link gets frames no closer than this: bounds what each write costs
	heartbeat   time.Duration // between frames of an idle stream
	chunk       int64         // bytes read from the disks between two batches of events
	resumeBelow int64         // bytes dirty at which capture with data begins again
	written     int           // ranges in the written sets, see drain
	wait        time.Duration // longest wait for events, so the delay of anything else
	resumeWait  time.Duration // longest wait within a step for the source to resume
	retry       time.Duration // pause of the bulk after a disk could not be read
	ledger      int           // bytes of the ledger, if the source does not bring its memory
	generation  int           // frames of a generation of the ledger
}

// batchRoom is what one call of Source.Next may add to the outbox: a batch, the
// frame that was begun before it, and their tables.
const batchRoom = 2 * capture.MaxBatch

func defaultTuning() tuning {
	return tuning{
		memory: 64 << 20, fold: true, codec: frame.None, frameBytes: 1 << 20, frameAge: 50 * time.Millisecond,
		frameRest: 10 * time.Millisecond, heartbeat: 500 * time.Millisecond, chunk: 1 << 20, resumeBelow: 16 << 20,
		written: 64 << 10, wait: 10 * time.Millisecond,
		resumeWait: 5 * time.Millisecond, retry: time.Second, generation: genMaxFrames,
	}
}

// replicator turns what a Source captures into the stream of one machine. It
// is a state machine that is driven by step: it starts no goroutine and reads
// no clock. See docs/agent.md for its states and for why the bulk copy
// and the captured writes can't get in each other's way.
//
// It is not safe for concurrent use.
type replicator struct {
	src  capture.Source
	out  *outbox
	tune tuning

	gen   int // of the stream
	enc   *frame.Encoder
	phase Phase
	why   Reason // of the newest sync
	disks []*disk
	tags  tagQueue

	cut    cutter
	sync   syncState
	led    *ledger      // nil before the first stream
	held   []heldEvents // of frames that are not stored yet, if the source survives
	buf    []byte       // for bulk reads
	last   time.Time    // when the newest frame was put
	looked time.Time    // when an exact stream last looked for dirty ranges
	now    time.Time    // of this step
	stats  counters

	absent   []capture.Disk     // that are protected but not captured now
	hold     error              // why nothing may be a point: an absent disk's copy is not whole
	replaced bool               // the source took over from the capture of other disks, see claim
	planned  bool               // a stream began
	inherits map[dr.DiskID]bool // the disks of which it missed nothing

	// blind makes the drain ignore the written sets: the negative control of
	// the tests, which must then find differences.
	blind bool
	// forgetful takes ranges of the dirty set without entering them in the ledger:
	// another.
	forgetful bool
	// reckless goes on exactly behind any frame of the ledger, exact or not: another.
	reckless bool

	// trusting takes every disk for inherited: another.
	trusting bool
	// careless takes what an earlier capture of other disks had taken for sent: another.
	careless bool

	compare comparing
	vigil   vigil
}

// cutter is what is known of the frame under construction.
type cutter struct {
	begun bool
	kind  frame.Kind
	open  bool
	at    time.Time // when it was begun
	born  time.Time // when the oldest change in it was captured
	quiet bool      // only bulk data
}

// disk is what the replicator keeps per disk.
type disk struct {
	capture.Disk
	written    ranges    // captured in data mode since the sync began, see drain
	touched    ranges    // what the far side may hold of it, as long as that is little
	fault      error     // why it can't be read; nil if it can
	faultSince time.Time // when that began
	readFrom   time.Time // it is not read before

	torn bool // its copy is no state that it was in: some of it was read and sent, some is still to be
	DiskCounters
}

// DiskCounters counts what happened to one disk since the stream began.
type DiskCounters struct {
	Writes   uint64 // captured changes
	Captured int64  // bytes of them
	Read     int64  // bytes read by syncs
	Sent     int64  // bytes of those that were sent as data
	Total    int64  // bytes that the running sync has to look at; zero when unknown
	Done     int64  // bytes of them that it has looked at
}

// counters counts what happened to the stream since the source was opened.
type counters struct {
	frames    uint64
	bytes     uint64 // of them
	overflows uint64
	syncs     uint64
	retreats  uint64
	folds     uint64
	flushes   uint64
	consumed  bool // an event was handed over
}

func newReplicator(src capture.Source, out *outbox, t tuning) *replicator {
	r := &replicator{src: src, out: out, tune: t, compare: wholesale{src}}
	for _, d := range src.Disks() {
		r.disks = append(r.disks, &disk{Disk: d})
	}
	r.claim()
	return r
}

// step does one bounded piece of work as of now and returns how long the caller
// may sleep when there is nothing to do before the outbox changes. maxWait bounds
// how long it waits for events. An error ends the stream.
func (r *replicator) step(ctx context.Context, now time.Time, maxWait time.Duration) (time.Duration, error) {
	r.now = now
	if s := r.out.starting(); s.generation != r.gen {
		if err := r.restart(s); err != nil {
			return 0, err
		}
	}
	if r.phase == Waiting {
		return r.tune.wait, nil
	}
	r.release()
	if err := r.cutAged(); err != nil {
		return 0, err
	}
	if bytes, _ := r.out.used(); bytes+batchRoom > r.tune.memory {
		if room, err := r.makeRoom(); !room || err != nil {
			return r.tune.wait, err // take no more events: the source will use its bitmap
		}
	}
	if _, err := r.src.Next(ctx, min(maxWait, r.patience()), r.event); err != nil {
		return 0, fmt.Errorf("take captured writes: %w", err)
	}
	if err := r.advance(ctx); err != nil {
		return 0, err
	}
	return 0, r.cutAged()
}

// patience returns how long to wait for events before something else is due.
func (r *replicator) patience() time.Duration {
	switch {
	case r.phase == Syncing && r.sync.idle:
		return r.tune.wait
	case r.phase == Syncing && r.bulkRoom(), r.tags.pending():
		return 0
	case r.cut.begun:
		return min(r.tune.wait, r.untilCut())
	}
	return r.tune.wait
}

// advance does what is next in the phase.
func (r *replicator) advance(ctx context.Context) error {
	if err := r.putOrders(); err != nil {
		return err
	}
	if r.phase == Syncing {
		return r.drain(ctx)
	}
	return r.keepExact()
}

// restart begins the stream anew at s: nothing of the old one counts.
func (r *replicator) restart(s start) error {
	r.gen = s.generation
	r.enc = frame.NewEncoder(s.cursor, r.tune.codec)
	r.cut, r.held = cutter{}, nil
	r.tags.restart(s.cursor.Position)
	for _, d := range r.disks {
		d.touched.clear()
	}
	c, err := r.plan(s)
	if err != nil {
		return err
	}
	return r.take(c, s.reason)
}

// event takes one event over into the stream.
func (r *replicator) event(e capture.Event) error {
	r.stats.consumed = true
	switch e.Kind {
	case capture.Lost:
		return r.lost()
	case capture.Flush:
		r.stats.flushes++
		return nil
	}
	d, err := r.disk(e.Extent.Disk)
	if err != nil {
		return err
	}
	d.Writes++
	d.Captured += e.Extent.Length
	r.note(d, e.Extent)
	r.vigil.note(e.Extent)
	what, data := e.What, e.Data
	if what == dr.Data && allZero(data) {
		what, data = dr.Zero, nil
	}
	return r.addChange(e.Extent, what, e.Time, data)
}

func (r *replicator) disk(id dr.DiskID) (*disk, error) {
	for _, d := range r.disks {
		if d.ID == id {
			return d, nil
		}
	}
	return nil, fmt.Errorf("find disk %d: %w", id, dr.ErrNotFound)
}

// lost handles the loss of events: the stream is exact up to here.
func (r *replicator) lost() error {
	r.stats.overflows++
	if r.phase == Exact {
		if err := r.cutFrame(); err != nil {
			return err
		}
		r.begin(ReasonOverflow)
	}
	r.sync.resumed, r.sync.closing, r.sync.counted = false, false, false
	r.sync.bulkFrom = time.Time{}
	r.forgetWritten()
	return nil
}

// keepExact does what an exact stream needs besides events: tags, heartbeats,
// and a look at the dirty set, which must be empty.
func (r *replicator) keepExact() error {
	quiet := !r.cut.begun && r.now.Sub(r.last) >= r.tune.heartbeat
	if !quiet && !r.tags.pending() && r.now.Sub(r.looked) < r.tune.heartbeat {
		return nil
	}
	r.looked = r.now
	caught, err := r.caughtUp(r.tags.mark(r.src, r.now))
	if err != nil || !caught || r.phase != Exact {
		return err
	}
	if done, err := r.putTags(); done || err != nil {
		return err
	}
	if !quiet || r.src.Consumed() < r.src.Tail() {
		return nil
	}
	return r.putHeartbeat(r.now)
}

// caughtUp reports whether everything that was submitted before the ring stood
// at mark is in the stream. If something is dirty, it was not captured:
// an overflow, of which the event is still to come, or somebody's mark.
func (r *replicator) caughtUp(mark uint64) (bool, error) {
	if r.src.Consumed() < mark {
		return false, nil
	}
	dirty, err := r.src.Dirty()
	if err != nil {
		return false, fmt.Errorf("look for dirty ranges: %w", err)
	}
	if dirty == 0 {
		return true, nil
	}
	if r.src.Stats().Mode == capture.ModeBitmap {
		return false, nil
	}
	if err := r.cutFrame(); err != nil {
		return false, err
	}
	r.begin(ReasonMarked)
	r.retreat()
	return false, nil
}

// putHeartbeat says that the stream holds all that was submitted before at.
func (r *replicator) putHeartbeat(at time.Time) error {
	if err := r.cutFrame(); err != nil {
		return err
	}
	b, err := r.enc.Heartbeat(at.UnixNano(), false)
	if err != nil {
		return fmt.Errorf("make heartbeat: %w", err)
	}
	r.put(b, lagRecord{born: at, end: at, quiet: true})
	return nil
}

// put hands a finished frame to the outbox. It reports false if the stream has begun
// anew meanwhile: the next step will see that.
func (r *replicator) put(b []byte, l lagRecord) bool {
	end, pos := r.enc.Cursor(), r.position()
	r.led.add(end, pos, int64(len(b))) // before it can be sent
	if pos != 0 {
		r.held = append(r.held, heldEvents{end.Position.Seq, pos})
	}
	if !r.out.put(r.gen, b, r.enc.Cursor(), l) {
		return false
	}
	r.stats.frames++
	r.stats.bytes += uint64(len(b))
	r.last = r.now
	return true
}
