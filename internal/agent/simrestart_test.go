package agent

import (
	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
)

// simSurvivor is a simSource that outlives the agent.
type simSurvivor struct {
	simSource
	pinned *capturetest.PinnedMem
}

var _ capture.Survivor = simSurvivor{}

func (m simSurvivor) Memory() []byte          { return m.pinned.Memory() }
func (m simSurvivor) Adopted() bool           { return m.pinned.Adopted() }
func (m simSurvivor) Inherited() []dr.DiskID  { return m.pinned.Inherited() }
func (m simSurvivor) Position() uint64        { return m.pinned.Position() }
func (m simSurvivor) Rewind(pos uint64) error { return m.pinned.Rewind(pos) }
func (m simSurvivor) Forget()                 { m.pinned.Forget() }
func (m simSurvivor) Release(pos uint64)      { m.meanwhile(); m.pinned.Release(pos); m.meanwhile() }

func (m simSurvivor) TakeDirtyNoted(limit int64, note func([]dr.Extent)) ([]dr.Extent, error) {
	m.meanwhile()
	defer m.meanwhile()
	return m.pinned.TakeDirtyNoted(limit, note)
}

// start begins an agent: its first one, or one behind a dead one.
func (s *sim) start() {
	s.noteTorn()
	s.out = newOutbox()
	s.rep = newReplicator(s.source(), s.out, s.tuning())
	s.rep.trusting, s.rep.careless = s.trusting, s.careless
	s.tellAbsent()
	if s.compares {
		s.cmp.start(s)
	}
	s.rep.blind, s.rep.forgetful, s.rep.reckless = s.blind, s.forgetful, s.reckless
}

// kill ends the agent as kill -9 does, and starts another.
func (s *sim) kill() error {
	s.pinned.Kill()
	s.killed++
	return s.reopen()
}

func (s *sim) reopen() (err error) {
	if s.pinned, err = s.kernel.Open(capturetest.MemOptions{Disks: s.here(), Hold: true, Memory: ledgerSize(s.disksOf())}); err != nil {
		return err
	}
	s.mem = s.pinned.Mem
	s.start()
	s.reconnect()
	return nil
}

// reboot ends everything; what was on its way to the disks never gets there.
func (s *sim) reboot() error {
	s.pinned.Kill()
	s.kernel.Reboot()
	s.free.old = s.free.choose(s.rng, s.disksOf()[0])
	s.inflight, s.ops = nil, nil
	s.far.blind = s.away
	s.truth = &oracle{disks: map[dr.DiskID][]byte{}}
	for _, d := range s.disksOf() {
		s.truth.disks[d.ID] = s.kernel.Image(d.ID)
	}
	// No point that was offered before is compared any more; those behind are.
	for _, f := range append(s.saved, s.far) {
		f.truth = nil
	}
	if s.rng.IntN(2) == 0 { // somebody writes before the agent runs
		d := s.disksOf()[0]
		image := s.kernel.Image(d.ID)
		fill(s.rng, image[:4096*(1+s.rng.IntN(8))])
		s.kernel.SetImage(d.ID, image)
		s.truth.disks[d.ID] = s.kernel.Image(d.ID)
	}
	return s.reopen()
}
