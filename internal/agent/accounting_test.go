package agent

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// ledgerSim is a disk whose writes are seen when they are submitted and counted when
// they complete, or fail.
type ledgerSim struct {
	seen, kernel uint64
	inflight     []uint64
}

func (l *ledgerSim) submit(n uint64, seen bool) {
	if seen {
		l.seen += n
	}
	l.inflight = append(l.inflight, n)
}

func (l *ledgerSim) land(i int, ok bool) {
	if ok {
		l.kernel += l.inflight[i]
	}
	l.inflight = append(l.inflight[:i], l.inflight[i+1:]...)
}

func (l *ledgerSim) read(at time.Time) reading {
	return reading{
		Stats: capture.Stats{Disks: []capture.DiskStats{{ID: 1, SeenBytes: l.seen, KernelBytes: l.kernel}}},
		at:    at, inflight: map[dr.DiskID]int{1: len(l.inflight)},
	}
}

// playAccounts runs a history: load, quiet spells, failures; hidden says whether a write is hidden from the
// capture once, in the middle. It returns what was found, and how many quiet readings after the hidden write.
func playAccounts(seed uint64, hidden bool) (found []finding, late int) {
	rng := rand.New(rand.NewPCG(seed, 5))
	var l ledgerSim
	a := accountant{calm: time.Second}
	at := time.Unix(1000, 0)
	for tick := range 400 {
		busy := rng.IntN(3) > 0
		for range rng.IntN(20) {
			if busy {
				l.submit(512<<rng.IntN(8), true)
			}
		}
		if hidden && tick == 200 {
			l.submit(4096, false)
		}
		for len(l.inflight) > 0 && (!busy || rng.IntN(4) > 0) {
			// A write that fails raises the lead, and hides one that is missed before the next
			// quiet moment: so none fails around it.
			ok := rng.IntN(50) > 0 || hidden && tick >= 150
			l.land(rng.IntN(len(l.inflight)), ok)
		}
		at = at.Add(time.Second)
		fs := a.check(l.read(at))
		found = append(found, fs...)
		if tick > 200 && len(found) == 0 {
			late++
		}
	}
	return found, late
}

// TestAccountantIsSilent: load, slow writes, failures: never a false alarm.
func TestAccountantIsSilent(t *testing.T) {
	for seed := range uint64(300) {
		if found, _ := playAccounts(seed, false); len(found) > 0 {
			t.Fatalf("seed %d: %s", seed, found[0].text)
		}
	}
}

// TestAccountantFindsHiddenWrite: one write of 4 KiB that the capture did not see is
// found at the next quiet moments, whatever failed before the quiet moment ahead of it.
func TestAccountantFindsHiddenWrite(t *testing.T) {
	worst := 0
	for seed := range uint64(300) {
		found, late := playAccounts(seed, true)
		if len(found) != 1 || found[0].reaction != compare || !strings.Contains(found[0].text, "4096 bytes") {
			t.Fatalf("seed %d: %v", seed, found)
		}
		worst = max(worst, late)
	}
	t.Logf("found after at most %d readings, of which a third are quiet", worst)
}

// TestAccountantUnderLoad: if the kernel is ahead, nobody waits for quiet.
func TestAccountantUnderLoad(t *testing.T) {
	var a accountant
	at := time.Unix(0, 0)
	r := func(seen, kernel uint64) []finding {
		at = at.Add(settling)
		return a.check(reading{Stats: capture.Stats{Disks: []capture.DiskStats{{ID: 3, SeenBytes: seen, KernelBytes: kernel}}}, at: at})
	}
	if f := append(r(0, 0), r(8192, 4096)...); len(f) != 0 {
		t.Fatal(f)
	}
	if f := r(16384, 16896); len(f) != 1 || !strings.Contains(f[0].text, "disk 3: the kernel wrote 512 bytes") {
		t.Fatal(f)
	}
	if f := r(20480, 20992); len(f) != 0 {
		t.Error("said twice", f)
	}
	if f := r(20480, 21504); len(f) != 1 {
		t.Error("a second one is not found", f)
	}
}

// TestAccountantStart: what began before the capture is no alarm.
func TestAccountantStart(t *testing.T) {
	var a accountant
	at := time.Unix(0, 0)
	for i := range 20 {
		at = at.Add(time.Second)
		l := ledgerSim{seen: 0, kernel: uint64(min(i, 5)) * 512}
		if f := a.check(l.read(at)); len(f) != 0 {
			t.Fatal(i, f)
		}
	}
	l := ledgerSim{kernel: 6 * 512}
	if f := a.check(l.read(at.Add(time.Minute))); len(f) != 1 {
		t.Error(f)
	}
}

func TestAccountantWholeSource(t *testing.T) {
	at := time.Unix(0, 0)
	for code, c := range map[string]struct {
		stats capture.Stats
		want  reaction
	}{
		"missed-events":    {capture.Stats{Missed: 1}, compare},
		"capture-detached": {capture.Stats{Detached: true}, openAnew},
		"capture-unpinned": {capture.Stats{Unpinned: true}, justSay},
		"lost-completions": {capture.Stats{LostCompletions: 200, Writes: 1000}, justSay},
	} {
		var a accountant
		a.check(reading{at: at})
		f := a.check(reading{Stats: c.stats, at: at})
		if len(f) != 1 || f[0].code != code || f[0].reaction != c.want || f[0].text == "" {
			t.Errorf("%s: %v", code, f)
		}
		if f := a.check(reading{Stats: c.stats, at: at}); len(f) != 0 {
			t.Errorf("%s: said twice: %v", code, f)
		}
	}
	var a accountant
	a.check(reading{at: at})
	if f := a.check(reading{Stats: capture.Stats{LostCompletions: 200, Writes: 100000}, at: at}); len(f) != 0 {
		t.Errorf("as many as this kernel loses: %v", f)
	}
}

// TestAccountantGone: if nobody else says what became of a disk that is gone, the capture is opened anew.
func TestAccountantGone(t *testing.T) {
	var a accountant
	at := time.Unix(0, 0)
	gone := reading{Stats: capture.Stats{Disks: []capture.DiskStats{{ID: 1}, {ID: 2, Gone: true}}}, at: at}
	a.check(reading{Stats: capture.Stats{Disks: []capture.DiskStats{{ID: 1}, {ID: 2}}}, at: at})
	for i := range 3 * goneReadings {
		f := a.check(gone)
		if want := i+1 == goneReadings; (len(f) == 1) != want || want && f[0].reaction != openAnew {
			t.Errorf("reading %d: %v", i, f)
		}
	}
}
