package e2e

import (
	"slices"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// TestRestartCompares: the capture ends with the agent, and the load goes on. The
// next agent compares the disk with the far side while the load goes on, and the far side is
// right in the end. What is sent includes what the load, which fills much of the disk, has written.
func TestRestartCompares(t *testing.T) {
	burn(t, labOptions{size: fireDisk}, func(f *fire) {
		for range 2 {
			var killed int64
			f.kill("agent", func() {
				killed = time.Now().UnixNano()
				time.Sleep(2 * time.Second)
			})
			m := f.until(time.Minute, "the new agent is exact", func(m *farsidev1.Machine) bool {
				return slices.ContainsFunc(m.GetEvents(), func(e *farsidev1.Notice) bool {
					return e.GetCode() == "exact" && e.GetTimeNs() > killed
				})
			})
			// The counters are those of the new agent.
			sent := m.GetCounters().GetBytesSent()
			if sent == 0 || sent > fireDisk/2 {
				t.Errorf("%d bytes were sent again, of a disk of %d", sent, fireDisk)
			}
			t.Logf("%d bytes were sent again, of a disk of %d", sent, fireDisk)
		}
	}, "agent-restart")
}
