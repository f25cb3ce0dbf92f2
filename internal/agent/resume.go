package agent

import (
	"cmp"
	"fmt"
	"slices"

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

// spares is a comparing that can leave out what file systems say is free.
type spares interface {
	// Spares reports whether it does.
	Spares() bool
	// BeginEmpty is Begin for a far side that holds zeroes: everything but what is free is marked.
	BeginEmpty(disks []dr.DiskID) error
	// Spared returns how many bytes of a disk BeginEmpty has not marked.
	Spared(id dr.DiskID) int64
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
	r.doubtAbsent(s.cursor.Position.Seq, n, ok)
	if !ok || c.empty || r.ledgerWhole() || s.reason == ReasonAsked {
		for _, d := range r.disks {
			c.whole = append(c.whole, d.ID)
		}
		return c, nil
	}
	if r.replaced {
		r.partly(&c, ranges)
		return c, nil
	}
	_, _, pos, _ := r.led.entry(n)
	c.known, c.ranges, c.frame, c.pos = true, r.captured(ranges), n, pos
	if v, survives := r.src.(capture.Survivor); survives && !r.stats.consumed && v.Adopted() {
		err := v.Rewind(pos)
		c.exact = err == nil && r.hold == nil && (r.led.exactAt(s.cursor.Position.Seq) || r.reckless)
	}
	return c, nil
}

// doubtAbsent holds back points if the receiver may stand where the copy of a disk that is absent was no
// state of it: it lost some of what it had, and that can't be read again. n is the number of the frame at which it
// stands, if ok. When the first stream begins and nothing is known, what the agent knows of the disk counts (hold).
func (r *replicator) doubtAbsent(seq dr.Seq, n uint64, ok bool) {
	first := !r.planned
	r.planned = true
	switch {
	case len(r.absent) == 0 || r.hold != nil, !ok && first, ok && (n+1 == r.led.load(offCount) || r.led.exactAt(seq)):
		return
	}
	r.hold = fmt.Errorf("no points are made: the receiver lost some of what it had of a disk that is not there (%s): %w", pathsOf(r.absent), dr.ErrNoPoint)
}

// captured returns those of the ranges that are of disks that are captured: what an absent disk
// lacks is compared when it is back.
func (r *replicator) captured(ranges []dr.Extent) (out []dr.Extent) {
	for _, x := range ranges {
		if _, err := r.disk(x.Disk); err == nil {
			out = append(out, x)
		}
	}
	return out
}

// partly plans the course behind a capture of other disks: of those that are in both
// the ledger says what may differ, besides what is dirty; the others are compared.
func (r *replicator) partly(c *course, ranges []dr.Extent) {
	for _, d := range r.disks {
		if !r.inherits[d.ID] && !r.trusting {
			c.whole = append(c.whole, d.ID)
		}
	}
	for _, x := range ranges {
		if r.inherits[x.Disk] && !r.careless {
			c.ranges = append(c.ranges, x)
		}
	}
}

// protected returns all disks of the machine, the absent ones too, by their ids.
func (r *replicator) protected() []capture.Disk {
	out := slices.Clone(r.absent)
	for _, d := range r.disks {
		out = append(out, d.Disk)
	}
	slices.SortFunc(out, func(a, b capture.Disk) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// claim makes sure, as soon as a source is open, that nobody takes the ledger of another capture for this one's. If this one took
// over from that, the ledger is good for the disks that are in both, until the stream begins (see plan). A process
// that comes after this one and before then compares everything.
func (r *replicator) claim() {
	v, ok := r.src.(capture.Survivor)
	if !ok || v.Adopted() {
		return
	}
	mem := v.Memory()
	if len(mem) < minLedger {
		return
	}
	r.replaced = len(v.Inherited()) > 0 && (&ledger{mem: mem}).claim()
	if !r.replaced {
		clear(mem[:len(ledgerMagic)])
		return
	}
	r.inherits = make(map[dr.DiskID]bool)
	for _, id := range v.Inherited() {
		r.inherits[id] = true
	}
}

// ledgerWhole reports whether the ledger says that whole disks must be compared.
func (r *replicator) ledgerWhole() bool { return r.led.whole() && !r.replaced }

// openLedger opens the ledger when the first stream begins: only then is it known
// whose it is.
func (r *replicator) openLedger(c frame.Cursor) error {
	if r.led != nil && !r.led.fresh {
		return nil
	}
	if r.led == nil {
		var mem []byte
		if v, ok := r.src.(capture.Survivor); ok {
			mem = v.Memory()
		}
		if mem == nil {
			mem = make([]byte, cmp.Or(r.tune.ledger, ledgerSize(r.protected())))
		}
		var err error
		if r.led, err = openLedger(mem, c.Machine, c.Position.Timeline, r.protected()); err != nil {
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
		for _, d := range r.disks {
			d.torn = false
		}
		return nil
	}
	for _, x := range c.ranges { // before the ledger forgets them
		if err := r.src.Mark(x); err != nil {
			return fmt.Errorf("mark %v: %w", x, err)
		}
	}
	if c.known {
		r.led.cut(c.frame, c.cursor.Position.Seq)
	} else {
		r.led.begin(c.cursor.Machine, r.protected(), c.cursor, r.position())
		r.led.setWhole(!c.empty && len(c.whole) > 0)
	}
	if v, ok := r.src.(capture.Survivor); ok {
		// What the events held that were handed over before is dirty now, or compared. Nobody needs them any more,
		// and on a machine that rests no frame would come whose storing lets go of them.
		v.Release(v.Position())
	}
	r.replaced = false
	r.begin(why)
	r.sync.empty = c.empty
	for _, d := range r.disks {
		d.torn = d.torn || c.empty
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
	if s, ok := compare.(spares); c.empty && ok && s.Spares() {
		// The ledger may not say that all the rest is dirty before it is: who continues after this
		// process compares.
		r.led.setWhole(true)
		r.sync.comparing, r.sync.marking = compare, true
		return s.BeginEmpty(c.whole)
	}
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
