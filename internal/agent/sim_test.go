package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
)

// simOptions choose what a simulated history may contain.
type simOptions struct {
	seed      uint64
	steps     int // actions before the quiet end
	disks     int
	written   int   // limit of the written sets
	room      int64 // bytes of the outbox that can be used
	overflows bool
	breaks    bool // the link breaks
	losses    bool // the receiver forgets its newest frames
	blind     bool // negative control: bulk reads ignore the written sets
	plain     bool // the source can't be told to overflow
	empty     bool // the disks begin as zeroes
	marks     bool // somebody marks ranges dirty, or has everything compared
	badReads  bool // a bulk read fails now and then
	kills     bool // the agent is killed and begins again; the capture goes on
	reboots   bool // the machine crashes
	compares  bool // what is not known is compared, not read
	early     bool // negative control: any answer counts, however old
	lazy      bool // negative control: what differs is not marked
	forgetful bool // negative control: what is taken of the dirty set is not noted
	reckless  bool // negative control: any restart goes on as if it were exact
	swaps     bool // disks are taken out and put back
	trusting  bool // negative control: a disk that came back is taken as it was
	careless  bool // negative control: what the ledger says is ignored when a disk is taken out or put back
	hasty     bool // negative control: points are made though the copy of a disk that is away is torn
	gen       int  // frames of a generation of the ledger; 0: as usual
	spares    bool // file systems say what is free
	oldMap    bool // negative control: they said it before the capture began
}

// sim drives a replicator against a capturetest.Mem, with a far side that
// checks every frame and every recovery point. Time is a tick per action.
type sim struct {
	simOptions
	rng *rand.Rand
	mem *capturetest.Mem
	// With kills or reboots: what outlives agents, and the capture that is open.
	kernel *capturetest.Kernel
	pinned *capturetest.PinnedMem
	killed int
	failed error // of what happened in the middle of a step
	out    *outbox
	rep    *replicator
	tick   int64

	ops      []op
	inflight []flight
	truth    *oracle
	far      *farSide
	saved    []*farSide // what the far side held before
	away     dr.DiskID  // the disk that was taken out
	torn     map[dr.DiskID]bool
	swaps0   int // times that one was
	tags     int
	asked    map[[16]byte]int64 // tick
	cmp      simCompare
	free     simFree
	still    bool  // nothing happens besides the calls of the test
	peak     int64 // largest use of the outbox
}

type op struct {
	tick int64
	x    dr.Extent
	data []byte // nil: zeroes
	free bool   // nothing was written: what was there does not matter from here on
}

type flight struct {
	*capturetest.MemWrite
	tick int64
}

var errMismatch = errors.New("far side differs")

const simDisk = 192 << 10

func newSim(o simOptions) *sim {
	s := &sim{simOptions: o, rng: rand.New(rand.NewPCG(o.seed, 1)), asked: make(map[[16]byte]int64)}
	disks := s.disksOf()
	if o.kills || o.reboots || o.swaps {
		s.kernel = capturetest.NewKernel(disks...)
	} else {
		s.mem = capturetest.NewMem(disks...)
		s.kernel = s.mem.Kernel
	}
	s.kernel.SetClock(func() int64 { return s.at().UnixNano() })
	s.truth = &oracle{disks: map[dr.DiskID][]byte{}}
	s.far = &farSide{disks: map[dr.DiskID][]byte{}, at: frame.Cursor{Machine: dr.MachineID{7}, Position: dr.Position{Timeline: 1}}}
	for _, d := range disks {
		s.far.disks[d.ID] = make([]byte, d.Size)
		image := make([]byte, d.Size)
		if !o.empty {
			s.scribble(image)
		}
		s.kernel.SetImage(d.ID, image)
		s.truth.disks[d.ID] = image
	}
	if s.mem != nil {
		s.start()
	} else if err := s.reopen(); err != nil {
		panic(err)
	}
	return s
}

func (s *sim) disksOf() (disks []capture.Disk) {
	for i := range s.disks {
		disks = append(disks, capture.Disk{ID: dr.DiskID(i + 3), Size: simDisk + int64(i)*dr.SectorSize*5})
	}
	return disks
}

func (s *sim) tuning() tuning {
	return tuning{
		memory: batchRoom + s.room, fold: true, frameBytes: 32 << 10, frameAge: 50 * time.Millisecond, heartbeat: 100 * time.Millisecond,
		chunk: 16 << 10, resumeBelow: 32 << 10, written: s.written,
		wait: 10 * time.Millisecond, resumeWait: 1, retry: time.Millisecond, generation: cmp.Or(s.gen, genMaxFrames),
	}
}

func (s *sim) source() capture.Source {
	m := simSource{s.mem, s}
	if s.pinned != nil {
		return simSurvivor{m, s.pinned}
	}
	if s.plain {
		return struct{ capture.Source }{m} // hides Overflow
	}
	return m
}

func (s *sim) at() time.Time {
	return time.Unix(1_000_000, 0).Add(time.Duration(s.tick) * time.Millisecond)
}

func tickOf(t int64) int64 { return time.Unix(0, t).Sub(time.Unix(1_000_000, 0)).Milliseconds() }

// scribble fills image with a mix of data and runs of zeroes.
func (s *sim) scribble(image []byte) {
	for off := 0; off < len(image); off += 4096 {
		if s.rng.IntN(3) > 0 {
			fill(s.rng, image[off:min(off+4096, len(image))])
		}
	}
}

func fill(rng *rand.Rand, b []byte) {
	v := byte(rng.IntN(255) + 1)
	for i := range b {
		b[i] = v
	}
}

// run plays the history and returns what was wrong.
func (s *sim) run() error {
	for range s.steps {
		s.tick++
		if err := s.act(); err != nil {
			return fmt.Errorf("tick %d: %w", s.tick, err)
		}
	}
	return s.quiet()
}

func (s *sim) act() error {
	if s.compares && s.rng.IntN(3) == 0 {
		return s.compareStep()
	}
	if s.swaps && s.rng.IntN(40) == 0 {
		return s.swap()
	}
	switch n := s.rng.IntN(100); {
	case n < 35:
		s.submit()
	case n < 50:
		s.land(s.rng.IntN(len(s.inflight) + 1))
	case n < 80:
		return s.step()
	case n < 90:
		return s.receive(1 + s.rng.IntN(4))
	case n < 93:
		s.ack()
	case n == 93 && s.kills && s.rng.IntN(3) == 0:
		return s.kill()
	case n == 94 && s.reboots && (s.compares || s.rng.IntN(5) == 0):
		return s.reboot()
	case n < 95 && s.overflows:
		s.mem.Overflow()
	case n == 95 && s.breaks:
		s.reconnect()
	case n == 96 && s.losses:
		s.lose()
	case n == 97:
		s.askTag()
	case n == 98:
		s.mem.Flush(s.mem.Disks()[0].ID)
		return s.calm()
	case n == 99 && s.marks:
		if s.rep.phase != Waiting && s.rng.IntN(6) == 0 {
			return s.mortal(func() error { return s.rep.distrust(ReasonAccounting) })
		}
		return s.mem.Mark(dr.Extent{Disk: s.mem.Disks()[0].ID, Offset: s.rng.Int64N(40) * 4096, Length: 4096})
	}
	return nil
}

// calm lets the stream catch up, with few writes.
func (s *sim) calm() error {
	for range s.rng.IntN(60) {
		s.tick++
		if s.rng.IntN(4) == 0 {
			s.submit()
		}
		for len(s.inflight) > 2 {
			s.land(0)
		}
		if err := s.step(); err != nil {
			return err
		}
		if err := s.receive(5); err != nil {
			return err
		}
		s.ack()
	}
	return nil
}

// submit begins a write that doesn't overlap one that is on its way: what
// such a pair leaves on a disk is anybody's guess.
func (s *sim) submit() {
	d := s.mem.Disks()[s.rng.IntN(len(s.mem.Disks()))]
	sectors := d.Size / dr.SectorSize
	first := s.rng.Int64N(sectors)
	if s.rng.IntN(2) == 0 {
		first = s.rng.Int64N(min(sectors, 64)) // a hot spot
	}
	n := 1 + s.rng.Int64N(min(24, sectors-first))
	x := dr.Extent{Disk: d.ID, Offset: first * dr.SectorSize, Length: n * dr.SectorSize}
	for _, f := range s.inflight {
		if y := f.Extent(); y.Disk == x.Disk && y.Offset < x.End() && x.Offset < y.End() {
			return
		}
	}
	o := op{tick: s.tick, x: x}
	var w *capturetest.MemWrite
	switch s.rng.IntN(8) {
	case 0:
		w = s.mem.SubmitZero(x)
	case 1:
		w = s.mem.SubmitDiscard(x)
	default:
		o.data = make([]byte, x.Length)
		fill(s.rng, o.data)
		w = s.mem.Submit(x.Disk, x.Offset, o.data)
	}
	s.ops = append(s.ops, o)
	s.inflight = append(s.inflight, flight{w, s.tick})
}

func (s *sim) land(i int) {
	if i < len(s.inflight) {
		s.inflight[i].Land()
		s.inflight = append(s.inflight[:i], s.inflight[i+1:]...)
	}
}

// step lets the replicator work. A source that can't be told to overflow needs
// writes that land within its settling time.
func (s *sim) step() error {
	for s.plain && len(s.inflight) > 0 && s.inflight[0].tick < s.tick-200 {
		s.land(0)
	}
	err := s.mortal(func() error {
		_, err := s.rep.step(context.Background(), s.at(), 0)
		return err
	})
	used, _ := s.out.used()
	s.peak = max(s.peak, used)
	return err
}

// mortal lets the replicator do something in which it may be killed.
func (s *sim) mortal(do func() error) (err error) {
	defer func() {
		x := recover()
		if _, ok := x.(agentKilled); ok {
			err = s.kill()
		} else if x != nil {
			panic(x)
		}
		err = errors.Join(err, s.failed)
	}()
	return do()
}

// receive carries up to n frames to the far side.
func (s *sim) receive(n int) error {
	for range n {
		if s.out.starting().generation == 0 {
			s.reconnect()
		}
		b, _ := s.out.take()
		if b == nil {
			return nil
		}
		s.rememberVault()
		if err := s.far.apply(b, s); err != nil {
			return err
		}
	}
	return nil
}

func (s *sim) ack() {
	if s.out.starting().generation > 0 {
		s.out.acked(s.far.at.Position.Seq, s.far.at.Position.Seq, s.at())
	}
	if s.losses {
		s.saved = append(s.saved, s.far.clone())
	}
}

// reconnect breaks the link: what was sent and not received is sent again.
func (s *sim) reconnect() {
	s.out.resume(s.far.at, 0, ReasonInitial)
}

// lose throws the far side back to what it held at some moment.
func (s *sim) lose() {
	if n := len(s.saved); n > 0 {
		i := s.rng.IntN(n)
		held := s.far.held
		s.far, s.saved = s.saved[i].clone(), s.saved[:i+1]
		s.far.blind, s.far.held = s.away, held
		s.cmp.vault = nil
		s.reconnect()
	}
}

func (s *sim) askTag() {
	s.tags++
	id := [16]byte{byte(s.tags), byte(s.tags >> 8), 1}
	s.asked[id] = s.tick
	t := dr.Tag{ID: id, Consistency: dr.Crash, Name: fmt.Sprint("tag ", s.tags)}
	s.rep.tags.ask(t)
	s.rep.tags.ask(t)
}

// quiet ends the history: all writes land, everything is carried, and the far
// side must hold what the disks hold.
func (s *sim) quiet() error {
	s.still = true
	if s.away != 0 {
		if err := s.putBack(); err != nil {
			return err
		}
	}
	for len(s.inflight) > 0 {
		s.land(0)
	}
	for range 20_000 {
		s.tick += 5
		if err := s.step(); err != nil {
			return err
		}
		for s.compares && !s.cmp.Done() {
			if err := s.compareStep(); err != nil {
				return err
			}
			if s.rng.IntN(4) == 0 {
				break
			}
		}
		if err := s.receive(100); err != nil {
			return err
		}
		s.ack()
		if s.settled() {
			return errors.Join(s.compare(), s.checkMemory())
		}
	}
	return fmt.Errorf("stream did not become exact: %v %v %+v", s.rep.phase, s.rep.why, s.rep.sync)
}

func (s *sim) settled() bool {
	_, frames := s.out.used()
	dirty, err := s.mem.Dirty()
	return err == nil && dirty == 0 && s.rep.phase == Exact && frames == 0 && !s.rep.cut.begun && !s.rep.tags.pending() &&
		s.far.points > 0 && s.mem.Consumed() == s.mem.Tail()
}

func (s *sim) checkMemory() error {
	if s.peak > s.rep.tune.memory {
		return fmt.Errorf("%d bytes waited in the outbox, limit %d", s.peak, s.rep.tune.memory)
	}
	return nil
}

func (s *sim) compare() error {
	for _, d := range s.mem.Disks() {
		s.far.truth.forward(s.ops, s.tick)
		if !bytes.Equal(s.far.truth.disks[d.ID], s.mem.Image(d.ID)) || !s.far.truth.holds(d.ID, s.far.disks[d.ID]) {
			return fmt.Errorf("disk %d after the quiet end: %w", d.ID, errMismatch)
		}
	}
	return nil
}

// oracle knows the state of all disks at each tick, as if every change had
// landed when it was submitted. It only goes forward, unless it starts anew.
type oracle struct {
	disks map[dr.DiskID][]byte
	next  int // the first op that is not applied
	// idle are 1 where what a disk holds does not matter; there is none before something was free.
	idle map[dr.DiskID][]byte
}

func (o *oracle) clone() *oracle {
	return &oracle{disks: cloneDisks(o.disks), next: o.next, idle: cloneDisks(o.idle)}
}

// forward applies everything up to the tick.
func (o *oracle) forward(ops []op, tick int64) {
	for ; o.next < len(ops) && ops[o.next].tick <= tick; o.next++ {
		x := ops[o.next].x
		if o.matter(x, !ops[o.next].free); ops[o.next].free {
			continue
		}
		dst := o.disks[x.Disk][x.Offset:x.End()]
		clear(dst)
		copy(dst, ops[o.next].data)
	}
}

func cloneDisks(m map[dr.DiskID][]byte) map[dr.DiskID][]byte {
	c := make(map[dr.DiskID][]byte, len(m))
	for id, b := range m {
		c[id] = bytes.Clone(b)
	}
	return c
}

// farSide is the smallest receiver: it applies frames to images and compares
// them with the oracle wherever the stream offers a point.
type farSide struct {
	disks  map[dr.DiskID][]byte
	at     frame.Cursor
	truth  *oracle // at the newest point; nil before the first
	points int
	folded int // epochs whose end was checked
	tagged map[[16]byte]bool
	blind  dr.DiskID // a disk that was taken out in a state that is not known
	held   bool      // there must be no points
}

func (f *farSide) clone() *farSide {
	c := *f
	c.disks = cloneDisks(f.disks)
	c.tagged = make(map[[16]byte]bool)
	for id := range f.tagged {
		c.tagged[id] = true
	}
	if f.truth != nil {
		c.truth = f.truth.clone()
	}
	return &c
}

func (f *farSide) apply(b []byte, s *sim) error {
	fr, err := frame.Parse(bytes.Clone(b))
	if err != nil {
		return err
	}
	if err := fr.Check(f.at); err != nil {
		return err
	}
	if err := fr.VerifyChain(f.at.Chain); err != nil {
		return err
	}
	if f.truth == nil {
		f.truth = s.truth.clone()
	}
	payload, err := fr.Payload(nil)
	if err != nil {
		return err
	}
	for _, x := range fr.All() {
		dst := f.disks[x.Disk][x.Offset:x.End()]
		if clear(dst); x.What == dr.Data {
			copy(dst, payload[x.RawOff:])
		}
		if fr.Open || fr.Folded {
			continue
		}
		f.truth.forward(s.ops, tickOf(x.Time))
		if err := f.check(x.Seq); err != nil {
			return fmt.Errorf("%v frame at time %d: %w", fr.Kind, tickOf(x.Time), err)
		}
	}
	f.at = fr.End()
	if fr.Folded && !fr.Open { // only its end is a point
		f.folded++
		f.truth.forward(s.ops, tickOf(fr.LastTime))
		if err := f.check(fr.Last); err != nil {
			return fmt.Errorf("epoch at time %d: %w", tickOf(fr.LastTime), err)
		}
	}
	return f.marker(fr, s)
}

// marker checks heartbeats and tags, which are points as well.
func (f *farSide) marker(fr *frame.Frame, s *sim) error {
	switch fr.Kind {
	case frame.Heartbeat:
		f.truth.forward(s.ops, tickOf(fr.LastTime))
	case frame.TagKind:
		t, err := fr.Tag()
		if err != nil {
			return err
		}
		if f.tagged[t.ID] {
			return fmt.Errorf("tag %q placed twice", t.Name)
		}
		if f.tagged == nil {
			f.tagged = make(map[[16]byte]bool)
		}
		f.tagged[t.ID] = true
		f.truth.forward(s.ops, s.asked[t.ID])
	default:
		return nil
	}
	if fr.Open {
		return fmt.Errorf("open %v frame", fr.Kind)
	}
	return f.check(fr.Last)
}

func (f *farSide) check(seq dr.Seq) error {
	f.points++
	if f.held {
		return fmt.Errorf("point %d with a torn copy: %w", seq, errMismatch)
	}
	for id, b := range f.disks {
		if id == f.blind {
			continue
		}
		if !f.truth.holds(id, b) {
			return fmt.Errorf("disk %d at point %d: %w", id, seq, errMismatch)
		}
	}
	return nil
}
