package agent

import (
	"cmp"
	"fmt"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
)

// comparing finds out in which ranges the far side differs, and marks them in the
// source. Its work may go on while the stream syncs.
type comparing interface {
	// Begin forgets what was and compares all of the disks with what the far side holds at from or
	// later. Everything that is read before does not count, so whatever was captured and is no longer
	// known must mark what it changes when it lands.
	Begin(from dr.Position, disks []dr.DiskID) error
	// Done reports whether everything was compared, and what differs was marked.
	Done() bool
	// Progress returns how many bytes were compared, of how many.
	Progress() (done, total int64)
	// Fault returns why it does not get on; nil if it does.
	Fault() error
}

// wholesale takes everything for different: it needs nothing from the far side.
type wholesale struct{ src capture.Source }

// Begin implements comparing.
func (w wholesale) Begin(_ dr.Position, disks []dr.DiskID) error {
	for _, id := range disks {
		for _, d := range w.src.Disks() {
			if d.ID != id {
				continue
			}
			if err := w.src.Mark(dr.Extent{Disk: id, Length: d.Size}); err != nil {
				return fmt.Errorf("mark disk %d: %w", id, err)
			}
		}
	}
	return nil
}

// Done implements comparing.
func (wholesale) Done() bool { return true }

// Progress implements comparing.
func (wholesale) Progress() (done, total int64) { return 0, 0 }

// Fault implements comparing.
func (wholesale) Fault() error { return nil }

// course is how a stream goes on from where its receiver stands.
type course struct {
	exact  bool         // nothing is missing: the next event follows the cursor
	known  bool         // what may differ is known: ranges, besides what is dirty
	ranges []dr.Extent  // of it
	pos    uint64       // known: where the events behind the cursor begin, if the source still has them
	frame  uint64       // known: the number of the frame that ends at the cursor
	whole  []dr.DiskID  // disks of which nothing is known
	empty  bool         // the receiver holds nothing: everything is sent, but no zeroes
	cursor frame.Cursor // of the receiver
}

// plan decides about a start. docs/agent.md has the table and the argument.
func (r *replicator) plan(s start) (course, error) {
	c := course{cursor: s.cursor, empty: s.cursor.Position.Seq == 0}
	if err := r.openLedger(s.cursor); err != nil {
		return c, err
	}
	n, ok := r.led.find(s.cursor)
	var ranges []dr.Extent
	if ok {
		ranges, ok = r.led.since(s.cursor.Position.Seq)
	}
	if !ok || c.empty || r.led.whole() || s.reason == ReasonAsked {
		for _, d := range r.disks {
			c.whole = append(c.whole, d.ID)
		}
		return c, nil
	}
	_, _, pos, _ := r.led.entry(n)
	c.known, c.ranges, c.frame, c.pos = true, ranges, n, pos
	if v, survives := r.src.(capture.Survivor); survives && !r.stats.consumed && v.Adopted() {
		err := v.Rewind(pos)
		c.exact = err == nil && (r.led.exactAt(s.cursor.Position.Seq) || r.reckless)
	}
	return c, nil
}

// openLedger opens the ledger when the first stream begins: only then is it known
// whose it is.
func (r *replicator) openLedger(c frame.Cursor) error {
	if r.led != nil && !r.led.fresh {
		return nil
	}
	if r.led == nil {
		var mem []byte
		if v, ok := r.src.(capture.Survivor); ok && v.Adopted() {
			mem = v.Memory()
		} else if ok {
			mem = v.Memory()
			clear(mem[:min(len(mem), len(ledgerMagic))]) // another capture's
		}
		if mem == nil {
			mem = make([]byte, cmp.Or(r.tune.ledger, ledgerSize(r.src.Disks())))
		}
		var err error
		if r.led, err = openLedger(mem, c.Machine, c.Position.Timeline, r.src.Disks()); err != nil {
			return err
		}
		r.led.maxFrames = r.tune.generation
	}
	return nil
}

// take begins the stream anew as the plan says.
func (r *replicator) take(c course, why Reason) error {
	if c.exact {
		// The ledger's newest frames may not have reached the receiver: they are built again.
		r.led.cutExact(c.frame, c.cursor.Position.Seq)
		r.phase, r.why = Exact, why
		return nil
	}
	if c.known {
		r.led.cut(c.frame, c.cursor.Position.Seq)
	} else {
		r.led.begin(c.cursor.Machine, r.src.Disks(), c.cursor, r.position())
		r.led.setWhole(!c.empty)
	}
	r.begin(why)
	r.sync.empty = c.empty
	for _, x := range c.ranges {
		if err := r.src.Mark(x); err != nil {
			return fmt.Errorf("mark %v: %w", x, err)
		}
	}
	r.expect(c)
	if v, ok := r.src.(capture.Survivor); r.stats.consumed || ok && v.Adopted() {
		r.retreat() // writes of the old stream may still be in flight: from here on they mark what they change
	}
	return r.beginCompare(c)
}

// beginCompare compares what nothing is known of.
func (r *replicator) beginCompare(c course) error {
	if len(c.whole) == 0 {
		return nil
	}
	compare := r.compare
	if c.empty {
		compare = wholesale{r.src}
	}
	if err := compare.Begin(c.cursor.Position, c.whole); err != nil {
		return err
	}
	r.sync.comparing = compare
	return nil
}

// expect says how much the sync has to look at.
func (r *replicator) expect(c course) {
	for _, d := range r.disks {
		d.Total = 0
		for _, x := range c.ranges {
			if x.Disk == d.ID {
				d.Total += x.Length
			}
		}
		for _, id := range c.whole {
			if id == d.ID {
				d.Total = d.Size
			}
		}
	}
}

// position returns where the source's stream stands, for a later process.
func (r *replicator) position() uint64 {
	if v, ok := r.src.(capture.Survivor); ok {
		return v.Position()
	}
	return 0
}

// heldEvents are the events of a frame that the process server has not stored yet.
type heldEvents struct {
	last dr.Seq
	pos  uint64 // all its events lie before
}

// release lets the source forget the events of frames that are stored.
func (r *replicator) release() {
	v, ok := r.src.(capture.Survivor)
	if !ok || len(r.held) == 0 {
		return
	}
	stored := r.out.stored()
	n := 0
	for n < len(r.held) && r.held[n].last <= stored {
		n++
	}
	if n > 0 {
		v.Release(r.held[n-1].pos)
		r.held = r.held[n:]
	}
}

// takeDirty takes ranges of the dirty set; they are in the ledger before they are
// gone from the set. The frame of captured changes is finished first: if that ends a generation,
// the ranges belong to the next one. What is taken fills two frames at most, and the
// ledger covers a generation that ends with the first of them (see since).
func (r *replicator) takeDirty() ([]dr.Extent, error) {
	if r.cut.begun && r.cut.kind != frame.Resync {
		if err := r.cutFrame(); err != nil {
			return nil, err
		}
	}
	note := func(xs []dr.Extent) {
		for _, x := range xs {
			r.led.changed(x)
		}
	}
	if r.forgetful {
		note = func([]dr.Extent) {}
	}
	if v, ok := r.src.(capture.Survivor); ok {
		return v.TakeDirtyNoted(r.tune.chunk, note)
	}
	xs, err := r.src.TakeDirty(r.tune.chunk)
	note(xs)
	return xs, err
}
