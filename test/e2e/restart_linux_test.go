package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	// Smaller, and the load would overflow it also while an agent runs, on a fast machine.
	burn(t, labOptions{size: fireDisk, pin: true, ring: "16MiB"}, func(f *fire) {
		// What a receiver may lack is known by generations, and the newest reaches back to the first copy so far.
		for began, first := time.Now(), written(t, f.loop.Device); written(t, f.loop.Device)-first < 96<<20; time.Sleep(100 * time.Millisecond) {
			if time.Since(began) > time.Minute {
				t.Fatal("the load is too slow")
			}
		}
		before, killed, thaw := written(t, f.loop.Device), int64(0), func() error { return nil }
		f.kill("agent", func() {
			killed = time.Now().UnixNano()
			for began := time.Now(); written(t, f.loop.Device)-before < 32<<20; time.Sleep(100 * time.Millisecond) {
				if time.Since(began) > 30*time.Second {
					t.Fatal("the load is too slow to overflow the ring")
				}
			}
			thaw = frozen(t, f.mount) // what is written later could be read as well
		})
		m := f.exactSince(killed)
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
		f.began = time.Now()
		wrote, again := written(t, f.loop.Device)-before, m.GetCounters().GetBytesRead() // by the new agent
		t.Logf("%d bytes were read again, of a disk of %d; %d were written while no agent ran", again, fireDisk, wrote)
		// Besides what the ring had no room for: what changed in the generation that the receiver stood in, and in the next.
		const generation = 32 << 20
		if again == 0 || again > wrote+2*generation {
			t.Errorf("%d bytes were read again", again)
		}
	}, "overflow")
}

// written returns how many bytes a block device was written since it is there.
func written(t *testing.T, device string) int64 {
	t.Helper()
	text, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	sectors, err := strconv.ParseInt(strings.Fields(string(text))[6], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return sectors * 512
}
