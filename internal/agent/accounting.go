package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
)

// reading is what is known of a Source's accounts at a moment.
type reading struct {
	capture.Stats
	at       time.Time
	inflight map[dr.DiskID]int // writes that the driver of a disk has; a disk that is not there is unknown
}

// reaction is what a finding asks for.
type reaction uint8

const (
	justSay  reaction = iota // nothing is wrong with the copy
	compare                  // changes were missed: hold the disks against the copy
	openAnew                 // the capture sees no longer everything
)

// finding is something that the accounts say.
type finding struct {
	notice
	reaction reaction
}

// settling is how long after its start a capture may still find writes that began
// before it, see docs/capture.md.
const settling = 30 * time.Second

// accountant holds what the capture saw against what the kernel counted. It is pure: the
// same readings give the same findings.
//
// The kernel counts a write when it completes, the capture when it is submitted, and the
// kernel's counter is read first. So the capture is ahead, by what is in flight and by what
// the kernel never counts: writes that failed before they became requests, and writes
// into a partition by way of its disk. That lead never falls by itself when nothing
// is in flight. If it does, writes completed that the capture did not see. And if the kernel
// is ahead at any moment, load or none, that is certain without waiting for quiet. What it
// can't see: a missed write, if as many bytes failed without being counted since the quiet moment before.
type accountant struct {
	calm  time.Duration // how long nothing may move before a moment is quiet; 0 = 3 s
	began time.Time
	moved map[dr.DiskID]time.Time // when a disk's accounts moved last, or something was in flight
	last  *reading
	lead  map[dr.DiskID]int64 // of each disk at its last quiet moment
	floor map[dr.DiskID]int64 // the lead that is not worth an alarm: 0, or less after the start
	said  map[string]time.Time
	gone  int // readings one after the other in which a disk was gone
}

// goneReadings is how long the watch of the devices has to find out what became of a disk that is gone.
const goneReadings = 5

// check takes a reading and returns what it says that was not said before.
func (a *accountant) check(r reading) []finding {
	if a.last == nil {
		a.began = r.at
		a.lead, a.floor, a.said = make(map[dr.DiskID]int64), make(map[dr.DiskID]int64), make(map[string]time.Time)
		a.moved = make(map[dr.DiskID]time.Time)
		for _, d := range r.Disks {
			a.moved[d.ID] = r.at
			a.floor[d.ID] = min(0, leadOf(d))
		}
		a.last = &r
		return a.whole(&reading{}, &r)
	}
	out := a.whole(a.last, &r)
	for i, d := range r.Disks {
		if i >= len(a.last.Disks) || a.last.Disks[i].ID != d.ID {
			continue
		}
		if f := a.disk(a.last, &r, i); f != nil {
			out = append(out, *f)
		}
	}
	a.last = &r
	return out
}

func leadOf(d capture.DiskStats) int64 { return int64(d.SeenBytes - d.KernelBytes) }

// disk returns what the accounts of a disk say.
func (a *accountant) disk(last, r *reading, i int) *finding {
	d := r.Disks[i]
	lead := leadOf(d)
	if lead < a.floor[d.ID] {
		missed := a.floor[d.ID] - lead
		a.floor[d.ID] = lead
		if r.at.Sub(a.began) < settling {
			return nil
		}
		a.lead[d.ID] = lead
		return missedBytes(r, d, missed)
	}
	if !unmoved(last, r, i) {
		a.moved[d.ID] = r.at
	}
	if r.at.Sub(a.moved[d.ID]) < cmp.Or(a.calm, 3*time.Second) {
		return nil
	}
	before, known := a.lead[d.ID]
	a.lead[d.ID] = lead
	if known && lead < before && r.at.Sub(a.began) >= settling {
		return missedBytes(r, d, before-lead)
	}
	return nil
}

// unmoved reports whether two readings are equal and the driver has nothing either time. A
// write may be on its way to the driver all the same, if the machine is busy.
func unmoved(last, r *reading, i int) bool {
	a, b := last.Disks[i], r.Disks[i]
	n, known := r.inflight[b.ID]
	m, knownLast := last.inflight[b.ID]
	return a == b && known && knownLast && n == 0 && m == 0
}

func missedBytes(r *reading, d capture.DiskStats, missed int64) *finding {
	return &finding{notice{
		code: string(ReasonAccounting), warn: true, at: r.at,
		text: fmt.Sprintf("disk %d: the kernel wrote %d bytes that were not captured (it counts %d, the capture %d): the disks are read again",
			d.ID, missed, d.KernelBytes, d.SeenBytes),
	}, compare}
}

// sayAgain is how often the same thing is said while it goes on.
const sayAgain = 10 * time.Minute

// whole returns what the counters of the whole Source say.
func (a *accountant) whole(last, r *reading) []finding {
	var out []finding
	add := func(code string, what reaction, format string, args ...any) {
		out = append(out, finding{notice{code: code, warn: true, at: r.at, text: fmt.Sprintf(format, args...)}, what})
	}
	if r.Missed > last.Missed {
		add("missed-events", compare, "the kernel did not run the capture for %d writes: the disks are read again", r.Missed-last.Missed)
	}
	if r.Detached && !last.Detached {
		add("capture-detached", openAnew, "the capture was taken out of the kernel: it is opened anew")
	}
	if a.gone++; !slices.ContainsFunc(r.Disks, func(d capture.DiskStats) bool { return d.Gone }) {
		a.gone = 0
	}
	if a.gone == goneReadings {
		add("capture-detached", openAnew, "a disk was taken away or exchanged: the capture is opened anew")
	}
	if r.Unpinned && !last.Unpinned {
		add("capture-unpinned", justSay, "the capture would not survive a restart of the agent any more: somebody removed its pins")
	}
	if n := r.LostCompletions - last.LostCompletions; n > 100 && n > (r.Writes-last.Writes)/10 && a.mayBeSaid("lost-completions", r.at) {
		add("lost-completions", justSay, "the kernel did not tell of the end of %d writes of %d; their ranges are read again", n, r.Writes-last.Writes)
	}
	return out
}

func (a *accountant) mayBeSaid(code string, at time.Time) bool {
	if t, ok := a.said[code]; ok && at.Sub(t) < sayAgain {
		return false
	}
	a.said[code] = at
	return true
}
