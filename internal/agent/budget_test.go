package agent

import (
	"bytes"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/frame"
)

// Everything that a replicator holds is within the memory that it was given: frames that nobody
// takes, full sets of ranges, the ledger, records of many small frames.
func TestBudgetHolds(t *testing.T) {
	for _, memory := range []int64{minMemory, defaultMemory} {
		const size, ring = 96 << 20, 1 << 20
		mem := capturetest.NewMem(capture.Disk{ID: 1, Size: size})
		mem.SetImage(1, bytes.Repeat([]byte{1}, size))
		mem.SetRing(ring)
		before := heap()
		tune := defaultTuning()
		tune.budget(memory, mem)
		out := newOutbox()
		rep := newReplicator(mem, out, tune)
		out.resume(frame.Cursor{Machine: dr.MachineID{1}, Position: dr.Position{Timeline: 1}}, 0, ReasonInitial)
		now, data := time.Unix(1_000_000, 0), bytes.Repeat([]byte{1}, dr.SectorSize)
		var peak, ranges int64
		for i := range 130_000 { // every other sector: no two ranges join
			mem.Write(1, int64(i%(size/dr.SectorSize/2))*2*dr.SectorSize, data)
			if i%1000 > 0 {
				continue
			}
			now = now.Add(time.Millisecond)
			if _, err := rep.step(t.Context(), now, 0); err != nil {
				t.Fatal(err)
			}
			ranges = max(ranges, int64(rep.writtenRanges()))
			if i%10_000 == 0 {
				peak = max(peak, heap()-before)
			}
		}
		peak = max(peak, heap()-before)
		used, _ := out.used()
		t.Logf("memory %d: %d held at most, %d of it frames (limit %d), %d ranges, ledger %d", memory, peak, used, tune.memory, ranges, tune.ledger)
		if peak > memory+ring {
			t.Errorf("%d bytes held, given %d and a ring of %d", peak, memory, ring)
		}
		if used < tune.memory/2 || ranges < 10_000 {
			t.Errorf("only %d bytes of frames and %d ranges: the test shows nothing", used, ranges)
		}
		runtime.KeepAlive(rep)
		runtime.KeepAlive(mem)
	}
}

// The smallest memory has room for a batch beside what is not frames.
func TestBudgetOfTheSmallest(t *testing.T) {
	big := bigSource{}
	var tune tuning
	tune.budget(minMemory, big)
	if tune.memory < 2*batchRoom || tune.ledger < minLedger || tune.memory+int64(tune.ledger) > minMemory {
		t.Errorf("%d bytes for frames, ledger of %d", tune.memory, tune.ledger)
	}
	if _, err := openLedger(make([]byte, tune.ledger), dr.MachineID{1}, 1, big.Disks()); err != nil {
		t.Error(err)
	}
}

// bigSource has a disk of a terabyte, and nothing else.
type bigSource struct{ capture.Source }

func (bigSource) Disks() []capture.Disk { return []capture.Disk{{ID: 1, Size: 1 << 40}} }

func TestLimitGo(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	t.Setenv("GOMEMLIMIT", "")
	os.Unsetenv("GOMEMLIMIT")
	limitGo(minMemory)
	if got := debug.SetMemoryLimit(-1); got != minMemory+besideMemory {
		t.Errorf("limit %d", got)
	}
	t.Setenv("GOMEMLIMIT", "1GiB")
	limitGo(defaultMemory)
	if got := debug.SetMemoryLimit(-1); got != minMemory+besideMemory {
		t.Errorf("GOMEMLIMIT was overridden: %d", got)
	}
}
