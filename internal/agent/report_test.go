package agent

import (
	"errors"
	"testing"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/capture"
	"farside/internal/dr"
)

func TestReportOfSync(t *testing.T) {
	now := time.Unix(2000, 0)
	s := snapshot{
		status: status{
			phase: Syncing, why: ReasonGap, started: time.Unix(1000, 0), fault: errRead,
			disks: []diskStatus{
				{Disk: capture.Disk{ID: 1, Path: "/dev/a", Size: 100}, DiskCounters: DiskCounters{Total: 100, Done: 30}},
				{Disk: capture.Disk{ID: 2, Path: "/dev/b", Size: 50}, DiskCounters: DiskCounters{Total: 50, Done: 50, Writes: 3, Captured: 9}},
			},
		},
		delivery: delivery{timeline: 2, built: 9, stored: 7, durable: 5, rpo: time.Second, rpoKnown: true, point: now},
	}
	var r pb.AgentReport
	fillStream(&r, &s)
	if p := r.GetProgress(); p.GetBytesDone() != 80 || p.GetBytesTotal() != 150 || p.GetStartedNs() != time.Unix(1000, 0).UnixNano() || p.GetReason() != "receiver-gap" {
		t.Errorf("progress %v", p)
	}
	if r.GetPhase() != pb.Phase_PHASE_RESYNC || r.GetReason() != "receiver-gap" || r.GetError() != errRead.Error() ||
		r.GetStored().GetSeq() != 7 || r.GetDurable().GetTimeline() != 2 || r.GetRpo().GetNowMs() != 1000 || r.GetDurableTimeNs() != now.UnixNano() {
		t.Errorf("report %v", &r)
	}
	if d := r.GetDisks(); len(d) != 2 || d[0].GetState() != "syncing" || d[0].GetDirtyBytes() != 70 || d[1].GetCounters().GetWrites() != 3 {
		t.Errorf("disks %v", d)
	}
}

func TestProgressOfOverflow(t *testing.T) {
	s := status{phase: Syncing, why: ReasonOverflow, dirty: 60, disks: []diskStatus{{DiskCounters: DiskCounters{Read: 40}}}}
	if done, total := s.progress(); done != 40 || total != 100 {
		t.Errorf("progress %d of %d, want 40 of 100", done, total)
	}
}

func TestPhases(t *testing.T) {
	for _, c := range []struct {
		phase Phase
		why   Reason
		want  pb.Phase
		text  string
	}{
		{Waiting, "", pb.Phase_PHASE_WAITING, "waiting"},
		{Syncing, ReasonInitial, pb.Phase_PHASE_INITIAL, "syncing"},
		{Syncing, ReasonOverflow, pb.Phase_PHASE_RESYNC, "syncing"},
		{Exact, ReasonInitial, pb.Phase_PHASE_EXACT, "exact"},
		{Fenced, ReasonInitial, pb.Phase_PHASE_FENCED, "fenced"},
	} {
		if got := phaseOf(&status{phase: c.phase, why: c.why}); got != c.want || c.phase.String() != c.text {
			t.Errorf("%v because of %q: %v, want %v", c.phase, c.why, got, c.want)
		}
	}
}

func TestReasons(t *testing.T) {
	texts := map[string]Reason{}
	for _, r := range []Reason{ReasonInitial, ReasonRestart, ReasonReopened, ReasonOverflow, ReasonGap, ReasonAhead, ReasonMarked} {
		if other, ok := texts[r.text()]; ok || r.text() == string(r) {
			t.Errorf("%q reads %q, as does %q", r, r.text(), other)
		}
		texts[r.text()] = r
	}
	if Reason("later").text() != "later" {
		t.Error("an unknown reason is not told as it is")
	}
}

func TestSteps(t *testing.T) {
	var a, b status
	codes := func() (out []string) {
		for _, n := range steps(&a, &b, time.Unix(1, 0)) {
			out = append(out, n.code)
		}
		a = b
		return out
	}
	expect := func(what string, want ...string) {
		t.Helper()
		got := codes()
		if len(got) != len(want) {
			t.Errorf("%s: %v, want %v", what, got, want)
			return
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
	}
	expect("nothing")
	b.phase, b.why, b.stats.syncs = Syncing, ReasonInitial, 1
	expect("began", "initial")
	b.stats.overflows = 1
	expect("overflow while syncing", "overflow")
	b.fault = errRead
	expect("fault", "read-failed")
	b.fault = errors.Join(errRead)
	expect("the same again")
	b.phase = Exact
	expect("done", "exact")
	b.stats.syncs, b.why = 2, ReasonOverflow
	expect("a sync between two looks", "overflow", "exact")
	b.phase = Fenced
	expect("fenced", "fenced")
}

func TestChronicleIsBounded(t *testing.T) {
	var c chronicle
	for i := range 3 * maxNotices {
		c.add(notice{at: time.Unix(int64(i), 0)})
	}
	if l := c.list(); len(l) != maxNotices || l[len(l)-1].at.Unix() != 3*maxNotices-1 {
		t.Errorf("%d notices, the last of %v", len(l), l[len(l)-1].at)
	}
}

func TestTagOf(t *testing.T) {
	id := dr.NewNodeID().String()
	tag, err := tagOf(&pb.TagRequest{Id: id, Name: "n", GroupId: id})
	if err != nil || tag.Name != "n" || tag.Group != tag.ID || tag.Consistency != dr.Crash {
		t.Errorf("tag %+v, %v", tag, err)
	}
	for c := pb.Consistency_CONSISTENCY_UNSPECIFIED; c < 9; c++ {
		want := max(dr.Crash, dr.Consistency(c))
		if want > dr.Application {
			want = dr.Crash // asked for by a newer configuration server
		}
		if tag, err := tagOf(&pb.TagRequest{Id: id, Consistency: c}); err != nil || tag.Consistency != want {
			t.Errorf("%v is taken for %v, %v", c, tag.Consistency, err)
		}
	}
	for name, r := range map[string]*pb.TagRequest{
		"id":        {Id: "x"},
		"group":     {Id: id, GroupId: "x"},
		"not UTF-8": {Id: id, Name: "\xff"},
		"long":      {Id: id, Name: string(make([]byte, 256))},
	} {
		if _, err := tagOf(r); !errors.Is(err, dr.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
