package agent

import (
	"fmt"
	"time"

	"farside/internal/dr"
	"farside/internal/frame"
)

// addChange appends a captured change to the stream.
func (r *replicator) addChange(x dr.Extent, what dr.What, at int64, data []byte) error {
	// The age is taken from the wall clock once, then runs on the monotonic one,
	// so that setting the clock does not disturb the RPO for longer than a frame.
	born := r.now.Add(-max(0, time.Duration(r.now.UnixNano()-at)))
	return r.add(frame.Changes, dr.Exact, x, what, at, data, born)
}

// addBulk appends content that was read from a disk.
func (r *replicator) addBulk(x dr.Extent, what dr.What, data []byte) error {
	return r.add(frame.Resync, dr.Epoch, x, what, r.now.UnixNano(), data, r.now)
}

// add appends one extent, in pieces if it is longer than an encoder takes, and
// begins and cuts frames as needed.
func (r *replicator) add(k frame.Kind, a dr.Accuracy, x dr.Extent, what dr.What, at int64, data []byte, born time.Time) error {
	for x.Length > 0 {
		part, n := x, 0
		if what == dr.Data {
			part.Length = min(x.Length, frame.MaxData)
			n = int(part.Length)
		}
		if err := r.ensure(k, a, n, born); err != nil {
			return err
		}
		r.led.changed(part) // in the generation of its frame, which ensure may have begun
		if _, err := r.enc.Add(part, what, at, data[:n]); err != nil {
			return fmt.Errorf("add to frame: %w", err)
		}
		x.Offset, x.Length, data = x.Offset+part.Length, x.Length-part.Length, data[n:]
		if _, raw := r.enc.Pending(); raw >= r.tune.frameBytes {
			if err := r.cutFrame(); err != nil {
				return err
			}
		}
	}
	return nil
}

// ensure makes the frame under construction one of kind k with room for n bytes.
func (r *replicator) ensure(k frame.Kind, a dr.Accuracy, n int, born time.Time) error {
	open := r.phase != Exact
	if r.cut.begun && (r.cut.kind != k || r.cut.open != open || !r.enc.Room(n)) {
		if err := r.cutFrame(); err != nil {
			return err
		}
	}
	if !r.cut.begun {
		r.enc.Begin(k, a, open)
		r.cut = cutter{begun: true, kind: k, open: open, at: r.now, born: born, quiet: k != frame.Changes}
	}
	return nil
}

// cutFrame finishes the frame under construction, if any.
func (r *replicator) cutFrame() error {
	if !r.cut.begun {
		return nil
	}
	c := r.cut
	r.cut = cutter{}
	b, err := r.enc.Finish()
	if err != nil {
		return fmt.Errorf("finish frame: %w", err)
	}
	if b != nil {
		r.put(b, lagRecord{born: c.born, end: r.now, quiet: c.quiet, open: c.open})
	}
	return nil
}

// cutAged finishes the frame under construction if it is due.
func (r *replicator) cutAged() error {
	if !r.cut.begun || r.untilCut() > 0 {
		return nil
	}
	return r.cutFrame()
}

// untilCut returns how long the frame under construction may still grow: until it is old
// enough, or, if the process server has stored everything else, until the frame before is
// frameRest old. So a write after a pause goes at once, under load there is one frame per round
// trip, and where the round trip is shorter than the pauses between writes, each of them is
// not a frame of its own, with its system calls and wake-ups in every role.
func (r *replicator) untilCut() time.Duration {
	left := r.tune.frameAge - r.now.Sub(r.cut.at)
	if _, waiting := r.out.used(); waiting == 0 {
		left = min(left, r.tune.frameRest-r.now.Sub(r.last))
	}
	return max(0, left)
}
