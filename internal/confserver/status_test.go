package confserver

import (
	"strings"
	"testing"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
)

// scene is a machine in exact replication, to be varied.
func scene() facts {
	now := time.Unix(1000, 0)
	machine := dr.MachineID{7}
	report := func(r *farsidev1.Report) *lastReport { return &lastReport{Report: r, received: now.Add(-time.Second)} }
	return facts{
		machine: catalog.Machine{ID: machine, Name: "m", Protected: true}, now: now, freshFor: 10 * time.Second,
		disks: []catalog.Disk{{ID: 1, Path: "/dev/sda", Size: 512}, {ID: 2, Path: "/dev/sdb", Size: 512}},
		agent: report(agentWork(&farsidev1.AgentReport{
			Phase: farsidev1.Phase_PHASE_EXACT, Rpo: &farsidev1.Rpo{Known: true, NowMs: 40, P99Ms: 90, Samples: 5},
			Disks: []*farsidev1.DiskStatus{{DiskId: 1, State: "ok", LagMs: 60}},
		})),
		process: report(&farsidev1.Report{Work: &farsidev1.Report_ProcessServer{ProcessServer: &farsidev1.ProcessServerReport{
			Streams: []*farsidev1.StreamStatus{{MachineId: machine.String(), BacklogBytes: 5}},
		}}}),
		target: report(targetWork(&farsidev1.MasterTargetReport{Machines: []*farsidev1.TargetStatus{
			{MachineId: "other"},
			{MachineId: machine.String(), Newest: &farsidev1.Point{TimeNs: now.Add(-3 * time.Second).UnixNano()}, UsedBytes: 9},
		}})),
	}
}

func TestDescribe(t *testing.T) {
	old := func(r *lastReport) *lastReport {
		return &lastReport{Report: r.Report, received: r.received.Add(-time.Minute)}
	}
	phase := func(f *facts, p farsidev1.Phase) { f.agent.GetAgent().Phase = p }
	noPoint := func(f *facts) { f.target.GetMasterTarget().Machines[1].Newest = nil }
	for _, tc := range []struct {
		name      string
		change    func(*facts)
		state     farsidev1.MachineState
		known     bool
		nowMs     int64
		fromAgent bool
		warnings  string
	}{
		{"exact", func(*facts) {}, farsidev1.MachineState_MACHINE_STATE_PROTECTED, true, 40, true, ""},
		{"unprotected", func(f *facts) { f.machine.Protected = false }, farsidev1.MachineState_MACHINE_STATE_UNPROTECTED, false, 0, false, ""},
		{"agent never seen", func(f *facts) { f.agent = nil }, farsidev1.MachineState_MACHINE_STATE_WAITING, true, 3000, false, "agent-offline"},
		{"agent silent", func(f *facts) { f.agent = old(f.agent) }, farsidev1.MachineState_MACHINE_STATE_OFFLINE, true, 3000, false, "agent-offline"},
		{"agent silent, target too", func(f *facts) { f.agent, f.target = old(f.agent), old(f.target) }, farsidev1.MachineState_MACHINE_STATE_OFFLINE, true, 3000, false, "agent-offline master-target-offline"},
		{"nothing is known", func(f *facts) { f.agent, f.target, f.process = nil, nil, nil }, farsidev1.MachineState_MACHINE_STATE_WAITING, false, 0, false, "agent-offline process-server-offline master-target-offline"},
		{"initial", func(f *facts) { phase(f, farsidev1.Phase_PHASE_INITIAL); noPoint(f); f.agent.GetAgent().Rpo = nil }, farsidev1.MachineState_MACHINE_STATE_INITIAL, false, 0, false, ""},
		{"resync", func(f *facts) { phase(f, farsidev1.Phase_PHASE_RESYNC) }, farsidev1.MachineState_MACHINE_STATE_RESYNC, true, 40, true, ""},
		{"exact, not there yet", func(f *facts) { noPoint(f); f.agent.GetAgent().Rpo = nil }, farsidev1.MachineState_MACHINE_STATE_INITIAL, false, 0, false, ""},
		{"waiting", func(f *facts) { phase(f, farsidev1.Phase_PHASE_WAITING) }, farsidev1.MachineState_MACHINE_STATE_WAITING, true, 40, true, ""},
		{"fenced", func(f *facts) { phase(f, farsidev1.Phase_PHASE_FENCED) }, farsidev1.MachineState_MACHINE_STATE_FENCED, true, 40, true, ""},
		{"failed", func(f *facts) { phase(f, farsidev1.Phase_PHASE_FAILED); f.agent.GetAgent().Error = "boom" }, farsidev1.MachineState_MACHINE_STATE_FAILED, true, 40, true, "agent-error"},
		{"disk error", func(f *facts) { f.agent.GetAgent().Disks[0].Error = "gone" }, farsidev1.MachineState_MACHINE_STATE_PROTECTED, true, 40, true, "disk-error"},
		{"disk missing", func(f *facts) {
			f.agent.GetAgent().Disks[0].State, f.agent.GetAgent().Disks[0].Error = "missing", "gone"
		}, farsidev1.MachineState_MACHINE_STATE_DEGRADED, true, 40, true, "disk-error"},
		{"stream error", func(f *facts) { f.process.GetProcessServer().Streams[0].Error = "full" }, farsidev1.MachineState_MACHINE_STATE_PROTECTED, true, 40, true, "process-server-error"},
		{"link behind", func(f *facts) { f.process.GetProcessServer().Streams[0].Behind = true }, farsidev1.MachineState_MACHINE_STATE_PROTECTED, true, 40, true, "link-behind"},
		{"agent's notice", func(f *facts) { f.agent.Notices = []*farsidev1.Notice{{Code: "low-memory"}} }, farsidev1.MachineState_MACHINE_STATE_PROTECTED, true, 40, true, "low-memory"},
		{"clock of the target ahead", func(f *facts) {
			f.agent = old(f.agent)
			f.target.GetMasterTarget().Machines[1].Newest.TimeNs = f.now.Add(time.Hour).UnixNano()
		}, farsidev1.MachineState_MACHINE_STATE_OFFLINE, true, 0, false, "agent-offline"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := scene()
			tc.change(&f)
			m := describe(f)
			if m.GetState() != tc.state {
				t.Errorf("state %v (%s), want %v", m.GetState(), m.GetReason(), tc.state)
			}
			if m.GetRpo().GetKnown() != tc.known || m.GetRpo().GetNowMs() != tc.nowMs || m.GetRpoFromAgent() != tc.fromAgent {
				t.Errorf("RPO %v, from agent %v", m.GetRpo(), m.GetRpoFromAgent())
			}
			var codes []string
			for _, w := range m.GetWarnings() {
				codes = append(codes, w.GetCode())
				if tc.name != "agent's notice" && w.GetText() == "" {
					t.Errorf("%s has no text", w.GetCode())
				}
			}
			if got := strings.Join(codes, " "); got != tc.warnings {
				t.Errorf("warnings %q, want %q", got, tc.warnings)
			}
		})
	}
}

func TestDescribeDisks(t *testing.T) {
	m := describe(scene())
	if len(m.GetDisks()) != 2 || m.GetStream().GetBacklogBytes() != 5 || m.GetUsedBytes() != 9 {
		t.Fatalf("%v", m)
	}
	if d := m.GetDisks()[0]; d.GetState() != "ok" || d.GetRpo().GetNowMs() != 60 || d.GetLagMs() != 60 {
		t.Errorf("first disk %v", d)
	}
	if d := m.GetDisks()[1]; d.GetState() != "waiting" || d.GetRpo().GetNowMs() != 40 {
		t.Errorf("second disk %v", d)
	}
}

func TestSelectPoints(t *testing.T) {
	status := &farsidev1.TargetStatus{}
	for i := range int64(10) {
		status.Spans = append(status.Spans, &farsidev1.Span{FirstTimeNs: 10 * i, LastTimeNs: 10*i + 9})
		status.Tags = append(status.Tags, &farsidev1.TagPoint{TimeNs: 10*i + 5})
	}
	for _, tc := range []struct {
		name        string
		req         *farsidev1.ListPointsRequest
		spans, tags int
		firstSpan   int64
		truncated   bool
	}{
		{"all", &farsidev1.ListPointsRequest{}, 10, 10, 0, false},
		{"newest", &farsidev1.ListPointsRequest{Limit: 3}, 3, 3, 70, true},
		{"from", &farsidev1.ListPointsRequest{FromNs: 46}, 6, 5, 40, false},
		{"to", &farsidev1.ListPointsRequest{ToNs: 45}, 5, 4, 0, false},
		{"within a span", &farsidev1.ListPointsRequest{FromNs: 41, ToNs: 42}, 1, 0, 40, false},
		{"before all", &farsidev1.ListPointsRequest{FromNs: 1000}, 0, 0, 0, false},
	} {
		got := selectPoints(status, tc.req)
		if len(got.GetSpans()) != tc.spans || len(got.GetTags()) != tc.tags || got.GetTruncated() != tc.truncated {
			t.Errorf("%s: %d spans, %d tags, truncated %v", tc.name, len(got.GetSpans()), len(got.GetTags()), got.GetTruncated())
		}
		if len(got.GetSpans()) > 0 && got.GetSpans()[0].GetFirstTimeNs() != tc.firstSpan {
			t.Errorf("%s: first span at %d", tc.name, got.GetSpans()[0].GetFirstTimeNs())
		}
	}
	if len(status.GetSpans()) != 10 || status.GetSpans()[0] == nil {
		t.Error("the report was changed")
	}
	if got := selectPoints(nil, &farsidev1.ListPointsRequest{}); len(got.GetSpans()) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}
