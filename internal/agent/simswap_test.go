package agent

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"farside/internal/capture"
	"farside/internal/dr"
)

// swap takes a disk out, or puts it back, perhaps written to meanwhile. The agent opens its capture anew, as
// it does when its watch says so.
func (s *sim) swap() error {
	if s.away != 0 {
		return s.putBack()
	}
	all := s.disksOf()
	d := all[s.rng.IntN(len(all))]
	s.landAll(d.ID)
	drained := s.rng.IntN(3) > 0
	if drained {
		for range 300 { // as long as a stream lingers
			s.tick++
			if err := errors.Join(s.step(), s.receive(20)); err != nil {
				return err
			}
			s.ack()
		}
		drained = s.mem.Consumed() == s.mem.Tail() && s.rep.phase == Exact && s.far.at == s.rep.enc.Cursor() && !s.rep.cut.begun
	}
	if s.away != 0 { // taken out meanwhile, by nobody else
		return errors.New("two disks are away")
	}
	s.landAll(d.ID)
	s.pinned.Kill()
	s.away = d.ID
	if !drained { // its copy is some state of it, or torn
		s.far.blind = d.ID
	}
	s.swaps0++
	return s.reopen()
}

// landAll lets what is on its way to a disk land.
func (s *sim) landAll(id dr.DiskID) {
	for i := len(s.inflight) - 1; i >= 0; i-- {
		if s.inflight[i].Extent().Disk == id {
			s.land(i)
		}
	}
}

func (s *sim) putBack() error {
	s.pinned.Kill()
	if s.rng.IntN(2) == 0 {
		image := s.kernel.Image(s.away)
		x := dr.Extent{Disk: s.away, Offset: s.rng.Int64N(40) * 4096, Length: 4096}
		fill(s.rng, image[x.Offset:x.End()])
		s.kernel.SetImage(s.away, image)
		s.ops = append(s.ops, op{tick: s.tick, x: x, data: bytes.Clone(image[x.Offset:x.End()])})
	}
	s.tick++
	s.away, s.far.blind = 0, 0
	return s.reopen()
}

// here returns the ids of the disks that are not away.
func (s *sim) here() (ids []dr.DiskID) {
	for _, d := range s.disksOf() {
		if d.ID != s.away {
			ids = append(ids, d.ID)
		}
	}
	return ids
}

// tellAbsent tells the replicator what the agent does.
func (s *sim) tellAbsent() {
	for _, d := range s.rep.disks {
		d.torn = s.torn[d.ID]
	}
	s.far.held = false
	if s.away == 0 {
		return
	}
	for _, d := range s.disksOf() {
		if d.ID == s.away {
			s.rep.absent = []capture.Disk{d}
		}
	}
	s.far.held = s.torn[s.away]
	if s.far.held && !s.hasty {
		s.rep.hold = fmt.Errorf("disk %d: %w", s.away, dr.ErrNoPoint)
	}
}

// noteTorn keeps what the agent's file keeps.
func (s *sim) noteTorn() {
	if s.rep == nil {
		return
	}
	if s.torn == nil {
		s.torn = make(map[dr.DiskID]bool)
	}
	for _, d := range s.rep.disks {
		s.torn[d.ID] = d.torn
	}
}

// TestSwapsAgainstOracle: disks are taken out and put back, under everything else that may happen: every
// point is a state of the disks that are there and of the others as they were, and in the end all copies are right.
func TestSwapsAgainstOracle(t *testing.T) {
	t.Parallel()
	swaps := 0
	rapid.Check(t, func(t *rapid.T) {
		o := drawOptions(t)
		o.disks = max(o.disks, 2)
		o.plain, o.swaps = false, true
		o.compares = rapid.Bool().Draw(t, "compares")
		s := newSim(o)
		if err := s.run(); err != nil {
			t.Fatal(err)
		}
		swaps += s.swaps0
	})
	t.Logf("%d times a disk was taken out", swaps)
	if swaps == 0 {
		t.Error("no disk was taken out")
	}
}

// The check above has power.
func TestOracleFindsBadSwaps(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]simOptions{
		"a disk that came back is not compared": {trusting: true},
		"what was sent counts as stored":        {careless: true, losses: true},
		"points with a torn copy":               {hasty: true},
	} {
		found := 0
		for seed := range uint64(30) {
			o.seed, o.steps, o.disks, o.written, o.room = seed, 600, 2, 1000, 40<<10
			o.swaps, o.overflows = true, true
			if err := newSim(o).run(); errors.Is(err, errMismatch) {
				found++
			} else if err != nil {
				t.Fatalf("%s, seed %d: %v", name, seed, err)
			}
		}
		t.Logf("%s: %d of 30 histories show it", name, found)
		if found < 1 {
			t.Errorf("%s: %d of 30 histories show it; want at least 1", name, found)
		}
	}
}
