package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
)

// simSource is the Mem of a sim on a machine with several processors: whenever
// the replicator calls it, writes may begin and land and the link may break, before the
// call and after it. It also hands over few events at a time, and fails some reads.
type simSource struct {
	*capturetest.Mem
	s *sim
}

var errEnough = errors.New("enough events")

// agentKilled unwinds an agent that is killed in the middle of a step.
type agentKilled struct{}

// meanwhile lets something happen at the same time.
func (m simSource) meanwhile() {
	s := m.s
	if s.still || s.rng.IntN(8) > 0 {
		return
	}
	s.tick++
	switch n := s.rng.IntN(40); {
	case n == 3 && s.kills && !s.cmp.busy: // the step of the replicator ends here
		panic(agentKilled{})
	case n == 4: // the link works beside the replicator
		s.failed = errors.Join(s.failed, s.receive(1+s.rng.IntN(2)))
	case n == 0 && s.breaks:
		s.reconnect()
	case n == 1 && s.losses:
		s.lose()
	case n == 2 && s.overflows:
		s.mem.Overflow()
	case n < 6 && s.compares && !s.cmp.busy:
		s.failed = errors.Join(s.failed, s.compareStep())
	case n < 25:
		s.submit()
	default:
		s.land(s.rng.IntN(len(s.inflight) + 1))
	}
}

func (m simSource) Next(ctx context.Context, wait time.Duration, fn func(capture.Event) error) (n int, err error) {
	m.meanwhile()
	limit := 1 + m.s.rng.IntN(6)
	n, err = m.Mem.Next(ctx, wait, func(e capture.Event) error {
		if err := fn(e); err != nil {
			return err
		}
		if limit--; limit == 0 {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	m.meanwhile()
	return n, err
}

func (m simSource) ReadAt(p []byte, disk dr.DiskID, off int64) (int, error) {
	m.meanwhile()
	defer m.meanwhile()
	if m.s.badReads && m.s.rng.IntN(10) == 0 {
		return 0, fmt.Errorf("read of the test: %w", dr.ErrUnavailable)
	}
	return m.Mem.ReadAt(p, disk, off)
}

func (m simSource) Mark(x dr.Extent) error {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Mark(x)
}

func (m simSource) TakeDirty(limit int64) ([]dr.Extent, error) {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.TakeDirty(limit)
}

func (m simSource) Dirty() (int64, error) {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Dirty()
}

func (m simSource) Resume(ctx context.Context) error {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Resume(ctx)
}

func (m simSource) Tail() uint64 {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Tail()
}

func (m simSource) Consumed() uint64 {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Consumed()
}

func (m simSource) Stats() capture.Stats {
	m.meanwhile()
	defer m.meanwhile()
	return m.Mem.Stats()
}
