package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"farside/internal/dr"
	"farside/internal/extent"
)

// ranges is a set of byte ranges of one disk.
type ranges struct{ extent.Set }

func (s *ranges) add(x dr.Extent) { s.Add(x.Offset, x.End()) }
func (s *ranges) clear()          { s.Clear() }

// syncState is what the drain of the dirty set keeps.
type syncState struct {
	resumed    bool // Resume returned and no Lost came since: what was not captured is dirty
	retreating bool // the source was made to overflow; no bulk read until it has passed await
	await      uint64
	bulkFrom   time.Time // no bulk read before: nothing that is dirty can be read
	unread     int64     // bytes taken one after the other that can't be read
	closing    bool      // all was drained; waiting for the source to pass mark
	mark       uint64
	markedAt   time.Time

	dirty   int64 // bytes, as of the last count less what was taken since
	counted bool

	dataless   bool      // the source only marks; the phase stays Syncing, see offer
	offered    time.Time // moment of the newest point of a dataless source
	unverified error     // why the source does not vouch for a point
	idle       bool      // nothing to do before the source finds something or vouches

	suspect   bool      // everything is to be compared once the source has passed await
	comparing comparing // what finds out what differs; nil: it is known
	marking   bool      // comparing marks what is used, for a far side that holds nothing

	empty   bool // the far side held nothing when the stream began
	started time.Time
	fault   error // the last failure to read a disk
}

// begin opens the stream: from here to finish, no position is a point.
func (r *replicator) begin(why Reason) {
	r.phase, r.why = Syncing, why
	r.led.setSyncing()
	r.sync = syncState{started: r.now}
	r.stats.syncs++
	for _, d := range r.disks {
		d.Total, d.Done = 0, 0
	}
}

// note remembers that x was captured. A sector that is in the stream must not
// be overwritten by a bulk read: the write may be captured but not have reached
// the disk.
func (r *replicator) note(d *disk, x dr.Extent) {
	if r.phase != Syncing {
		return
	}
	if !r.sync.retreating {
		d.written.add(x)
	}
	r.touch(d, x)
}

// touch remembers that the far side may hold something else than zeroes at x.
func (r *replicator) touch(d *disk, x dr.Extent) {
	if !r.sync.empty {
		return
	}
	d.touched.add(x)
	if d.touched.Len() > r.tune.written {
		r.sync.empty = false // too much to remember: send zeroes as well
		for _, d := range r.disks {
			d.touched.clear()
		}
	}
}

// forgetWritten empties the written sets. After a Lost they would hide newer
// writes that were not captured. While a Lost is on its way they can't have done so:
// the source hands out nothing dirty then.
func (r *replicator) forgetWritten() {
	for _, d := range r.disks {
		d.written.clear()
	}
}

func (r *replicator) writtenRanges() (n int) {
	for _, d := range r.disks {
		n += d.written.Len()
	}
	return n
}

// retreat gives up knowing which captured writes may still be in flight: when
// there are too many to remember, or when none were remembered because the stream was
// exact or another one. The source is made to overflow, so that what is in
// flight marks its sectors when it lands; with the Lost, bulk reads may go on.
func (r *replicator) retreat() {
	r.stats.retreats++
	r.forgetWritten()
	r.sync.closing, r.sync.counted = false, false
	r.src.Overflow()
	r.sync.retreating, r.sync.await = true, r.src.Tail()
}

// drain does one piece of a sync: a chunk of bulk data, or the step back to
// data mode, or the end.
func (r *replicator) drain(ctx context.Context) error {
	r.sync.idle = false
	if r.writtenRanges() > r.tune.written {
		r.retreat()
	}
	if r.sync.retreating = r.sync.retreating && r.src.Consumed() < r.sync.await; r.sync.retreating {
		return nil
	}
	if err := r.compareSuspect(); err != nil {
		return err
	}
	r.noteMarked()
	if r.now.Before(r.sync.bulkFrom) {
		return nil
	}
	if err := r.count(); err != nil {
		return err
	}
	if !r.sync.resumed && r.sync.dirty <= r.tune.resumeBelow {
		if err := r.resume(ctx); err != nil {
			return err
		}
	}
	switch {
	case r.sync.dirty > 0:
		r.sync.closing = false
		return r.readChunk()
	case r.sync.resumed && r.compared():
		return r.finish(ctx)
	}
	return nil
}

// noteMarked notes that everything is dirty that a far side which held nothing is to get.
func (r *replicator) noteMarked() {
	if !r.sync.marking || !r.sync.comparing.Done() {
		return
	}
	r.sync.marking = false
	r.led.setWhole(false) // what is dirty stays so beyond this process
	if s, ok := r.sync.comparing.(spares); ok {
		for _, d := range r.disks {
			d.Total -= s.Spared(d.ID)
		}
	}
}

// compared reports whether it is known what differs.
func (r *replicator) compared() bool {
	if r.sync.comparing == nil {
		return true
	}
	if !r.sync.comparing.Done() {
		r.sync.closing, r.sync.idle = false, true
		return false
	}
	r.noteMarked()
	if _, total := r.sync.comparing.Progress(); total > 0 {
		for _, d := range r.disks {
			d.Total, d.Done = 0, 0 // what is left is dirty
		}
	}
	// What differs was marked before Done was true: count it.
	r.sync.comparing, r.sync.counted = nil, false
	return false
}

// count finds out how much is dirty. Counting walks the whole set, which takes
// milliseconds for a terabyte, so it is left out while much is known to remain.
func (r *replicator) count() (err error) {
	if r.sync.counted && r.sync.dirty > r.tune.resumeBelow {
		return nil
	}
	if r.sync.dirty, err = r.src.Dirty(); err != nil {
		return fmt.Errorf("count dirty bytes: %w", err)
	}
	r.sync.counted = true
	return nil
}

// resume has the source capture with data again and waits a little for writes
// that were not captured to land. If that is not enough, the next step goes on
// waiting; meanwhile events are taken over, so that the buffer does not overflow.
func (r *replicator) resume(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, r.tune.resumeWait)
	defer cancel()
	err := r.src.Resume(short)
	if err == nil {
		r.sync.resumed = true
		return r.recount()
	}
	if errors.Is(err, dr.ErrUnsupported) {
		r.sync.resumed, r.sync.dataless = true, true
		return r.recount()
	}
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("resume capture: %w", err)
}

// recount counts what is dirty now.
func (r *replicator) recount() error {
	r.sync.counted = false
	return r.count()
}

// finish ends the sync when everything that was submitted before the last bulk
// read has been handed over: the stream is what the disks are.
func (r *replicator) finish(ctx context.Context) error {
	if !r.sync.closing {
		r.sync.closing, r.sync.mark, r.sync.markedAt = true, r.src.Tail(), r.now
	}
	if r.src.Consumed() < r.sync.mark {
		return nil
	}
	// What was submitted until now and not captured has been marked by now.
	if err := r.recount(); err != nil || r.sync.dirty > 0 {
		return err
	}
	if r.hold != nil {
		r.sync.unverified, r.sync.idle = r.hold, true
		return nil
	}
	at, ok, err := r.vouched(ctx)
	if r.sync.idle = !ok; err != nil || !ok {
		return err
	}
	if r.sync.dataless {
		return r.offer(at)
	}
	if err := r.putHeartbeat(at); err != nil {
		return err
	}
	r.phase = Exact
	r.led.setWhole(false)
	r.led.setExact(r.enc.Cursor().Position.Seq)
	r.sync = syncState{}
	for _, d := range r.disks {
		d.written.clear()
		d.touched.clear()
		d.Done, d.torn = d.Total, false
	}
	return nil
}

// bulkRoom reports whether bulk data may be read: it uses at most half of the
// outbox, so that it never makes captured writes wait for room.
func (r *replicator) bulkRoom() bool {
	bytes, _ := r.out.used()
	return bytes+2*r.tune.chunk <= r.tune.memory/2 && !r.sync.retreating && !r.now.Before(r.sync.bulkFrom)
}

// readChunk takes some dirty ranges, reads them and adds them to the stream.
func (r *replicator) readChunk() error {
	if !r.bulkRoom() {
		return nil
	}
	taken, err := r.takeDirty()
	if err != nil {
		return fmt.Errorf("take dirty ranges: %w", err)
	}
	for _, x := range taken {
		if err := r.readOrMark(x); err != nil {
			return err
		}
	}
	if len(taken) == 0 {
		return r.recount()
	}
	if r.sync.unread >= max(r.sync.dirty, 1) { // all round, and nothing could be read
		r.sync.unread, r.sync.bulkFrom = 0, r.now.Add(r.tune.retry)
	}
	return nil
}

// readOrMark sends what x holds, or marks it again if it can't be read. A disk that can't be read
// holds up nothing but itself, and the points.
func (r *replicator) readOrMark(x dr.Extent) error {
	d, err := r.disk(x.Disk)
	if err != nil {
		return err
	}
	err = d.fault
	if !r.now.Before(d.readFrom) {
		err = r.readDirty(x)
	}
	switch {
	case errors.Is(err, errRead):
		if d.fault == nil {
			d.faultSince = r.now
		}
		if d.fault = err; !r.now.Before(d.readFrom) {
			d.readFrom = r.now.Add(r.tune.retry)
		}
		r.sync.unread += x.Length
		if err := r.src.Mark(x); err != nil {
			return fmt.Errorf("mark %v again: %w", x, err)
		}
	case err != nil:
		return err
	default:
		r.sync.dirty -= x.Length
		r.sync.unread, d.fault = 0, nil
	}
	r.sync.fault = r.readFault()
	return nil
}

// readFault returns why some disk can't be read; nil if all can.
func (r *replicator) readFault() error {
	for _, d := range r.disks {
		if d.fault != nil {
			return d.fault
		}
	}
	return nil
}

// errRead says that a disk could not be read. It doesn't end the stream.
var errRead = errors.New("disk can't be read")

// readDirty sends what x holds on the disk, without the sectors that were
// captured before: those are newer in the stream than they may be on the disk.
// Sectors captured later overwrite what is sent here. No event is taken over
// between the read and the sending, so "before" and "later" are all there is.
func (r *replicator) readDirty(x dr.Extent) error {
	d, err := r.disk(x.Disk)
	if err != nil {
		return err
	}
	parts := d.written.Subtract(x.Offset, x.End())
	if r.blind {
		parts = []extent.Range{{Start: x.Offset, End: x.End()}}
	}
	for _, p := range parts {
		for off := p.Start; off < p.End; off += r.tune.chunk {
			if err := r.readPart(d, off, min(off+r.tune.chunk, p.End)); err != nil {
				return err
			}
		}
	}
	d.Done = min(d.Done+x.Length, d.Total)
	return nil
}

// readPart reads [off, end) of d and sends it.
func (r *replicator) readPart(d *disk, off, end int64) error {
	if r.buf == nil {
		r.buf = make([]byte, r.tune.chunk)
	}
	b := r.buf[:end-off]
	if _, err := r.src.ReadAt(b, d.ID, off); err != nil {
		return fmt.Errorf("%w: disk %d at %d: %w", errRead, d.ID, off, err)
	}
	d.Read += int64(len(b))
	d.torn = true
	for _, p := range pieces(b) {
		x := dr.Extent{Disk: d.ID, Offset: off + int64(p.off), Length: int64(p.end - p.off)}
		if err := r.sendPiece(d, x, b[p.off:p.end], p.zero); err != nil {
			return err
		}
	}
	r.touch(d, dr.Extent{Disk: d.ID, Offset: off, Length: end - off})
	return nil
}

// sendPiece sends one run of zeroes or of data.
func (r *replicator) sendPiece(d *disk, x dr.Extent, data []byte, zero bool) error {
	if !zero {
		d.Sent += x.Length
		return r.addBulk(x, dr.Data, data)
	}
	if r.sync.empty {
		for _, known := range d.touched.Intersect(x.Offset, x.End()) {
			part := dr.Extent{Disk: d.ID, Offset: known.Start, Length: known.Len()}
			if err := r.addBulk(part, dr.Zero, nil); err != nil {
				return err
			}
		}
		return nil
	}
	return r.addBulk(x, dr.Zero, nil)
}
