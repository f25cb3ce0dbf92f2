package e2e

import (
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
)

// spans counts the spans of the machine's history by what they are.
func (f *fire) spanKinds() map[string]int {
	f.t.Helper()
	r, err := f.stage.Far.Client.ListPoints(f.t.Context(), &farsidev1.ListPointsRequest{Machine: f.stage.Far.Machine})
	if err != nil {
		f.t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, s := range r.GetSpans() {
		kind := s.GetAccuracy().String()
		if s.GetOpen() {
			kind = "open"
		}
		kinds[kind]++
	}
	return kinds
}

// TestRestartStaysExact: an agent that is killed, or replaced, under load and comes back
// while the ring lasts loses no write and no point: the history shows one exact span, and nothing
// is read from the disk again.
func TestRestartStaysExact(t *testing.T) {
	var before, after map[string]int
	var last *fire
	burn(t, labOptions{size: fireDisk, pin: true}, func(f *fire) {
		before = f.spanKinds()
		for i := range 5 {
			if i == 2 {
				if err := f.stage.Halt("agent", false); err != nil {
					t.Fatal(err)
				}
				f.pause(500*time.Millisecond, time.Second)
				if err := f.stage.Again("agent"); err != nil {
					t.Fatal(err)
				}
			} else {
				f.kill("agent", func() { f.pause(0, 500*time.Millisecond) })
			}
			m := f.exact(time.Minute)
			for _, e := range m.GetEvents() {
				if e.GetSeverity() != farsidev1.Severity_SEVERITY_INFO {
					t.Errorf("restart %d: %s: %s", i, e.GetCode(), e.GetText())
				}
			}
			f.pause(300*time.Millisecond, time.Second)
		}
		after = f.spanKinds()
		last = f
	})
	if t.Failed() {
		return
	}
	if last.spanKinds()["ACCURACY_EPOCH"] > 0 {
		// On a busy machine what waits is folded: the spans say nothing of the restarts then, whose
		// events were judged above.
		t.Logf("folded; spans before %v, after the restarts %v", before, after)
		return
	}
	if before["open"] != after["open"] || after["ACCURACY_EXACT"] != before["ACCURACY_EXACT"] {
		t.Errorf("spans before %v, after the restarts %v", before, after)
	}
}

// TestRestartWithASmallRing: the ring overflows while no agent runs. What it marked is
// read again, and nothing else.
func TestRestartWithASmallRing(t *testing.T) {
	burn(t, labOptions{size: fireDisk, pin: true, ring: "1MiB"}, func(f *fire) {
		f.kill("agent", func() { time.Sleep(3 * time.Second) })
		m := f.exact(time.Minute)
		// The counters are those of the new agent.
		if sent := m.GetCounters().GetBytesSent(); sent == 0 || sent > fireDisk/2 {
			t.Errorf("%d bytes were sent again, of a disk of %d", sent, fireDisk)
		} else {
			t.Logf("%d bytes were sent again, of a disk of %d", sent, fireDisk)
		}
	}, "overflow")
}
