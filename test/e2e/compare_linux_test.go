package e2e

import (
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// TestRestartCompares: the capture ends with the agent, and the load goes on. The
// next agent compares the disk with the far side while the load goes on, and the far side is
// right in the end.
func TestRestartCompares(t *testing.T) {
	burn(t, labOptions{size: fireDisk}, func(f *fire) {
		for range 2 {
			var killed int64
			before := written(t, f.loop.Device)
			f.kill("agent", func() {
				killed = time.Now().UnixNano()
				time.Sleep(2 * time.Second)
			})
			m := f.exactSince(killed)
			// Only what the load wrote while no agent ran, and behind the comparison's back, differs.
			wrote, again := written(t, f.loop.Device)-before, m.GetCounters().GetBytesRead() // by the new agent
			t.Logf("%d bytes were read to be sent again, of a disk of %d; the load wrote %d", again, fireDisk, wrote)
			if again == 0 || again > fireDisk*3/4 {
				t.Errorf("%d bytes were read to be sent again, of a disk of %d", again, fireDisk)
			}
		}
	}, "agent-restart")
}

// exactSince waits for a stream that has become exact after a moment: what is told of an agent may be
// of the one before.
func (f *fire) exactSince(ns int64) *farsidev1.Machine {
	f.t.Helper()
	return f.until(time.Minute, "the new agent is exact", func(m *farsidev1.Machine) bool {
		return slices.ContainsFunc(m.GetEvents(), func(e *farsidev1.Notice) bool {
			return e.GetCode() == "exact" && e.GetTimeNs() > ns
		})
	})
}
