package confserver

import (
	"fmt"
	"strings"
	"time"

	"farside/internal/catalog"
	"farside/internal/dr"

	farsidev1 "farside/internal/api/farside/v1"
)

// freshFor is how long a node counts as there after its last report, beyond
// several report intervals.
const freshFor = 5 * time.Second

// lastReport is what a node said last and when.
type lastReport struct {
	*farsidev1.Report
	received time.Time
}

// facts is all that the description of a machine follows from.
type facts struct {
	machine  catalog.Machine
	disks    []catalog.Disk
	now      time.Time
	freshFor time.Duration
	agent    *lastReport // nil: never heard of
	process  *lastReport
	target   *lastReport
}

func (f facts) fresh(r *lastReport) bool { return r != nil && f.now.Sub(r.received) <= f.freshFor }

// describe says what is known of a machine. It is a function of f alone.
func describe(f facts) *farsidev1.Machine {
	m := f.machine
	out := &farsidev1.Machine{
		Id: m.ID.String(), Name: m.Name, NodeId: m.Node.String(), Timeline: uint32(m.Timeline),
		HistoryWindowSeconds: m.HistoryWindow, Settings: settingsOf(m),
		ProcessServerId: idText(m.ProcessServer), MasterTargetId: idText(m.MasterTarget),
	}
	target, stream := f.targetStatus(), f.streamStatus()
	if target != nil {
		out.Head, out.HeadTimeNs = target.GetHead(), target.GetHeadTimeNs()
		out.Newest, out.UsedBytes = target.GetNewest(), target.GetUsedBytes()
		out.Horizon, out.HorizonTimeNs = target.GetHorizon(), target.GetHorizonTimeNs()
	}
	out.Stream = stream
	agent := &farsidev1.AgentReport{}
	if f.agent != nil {
		if a := f.agent.GetAgent(); a != nil {
			agent = a
		}
		out.Host, out.LastSeenNs = f.agent.GetHost(), f.agent.received.UnixNano()
		out.Discovered, out.Progress, out.Counters = agent.GetDiscovered(), agent.GetProgress(), agent.GetCounters()
		out.Capture, out.Events, out.Background = agent.GetCapture(), agent.GetEvents(), agent.GetBackground()
	}
	out.State, out.Reason = f.state(agent)
	out.Rpo, out.RpoFromAgent = f.rpo(agent)
	for _, d := range f.disks {
		out.Disks = append(out.Disks, f.disk(d, agent, out.Rpo))
	}
	out.Warnings = f.warnings(agent, target, stream)
	return out
}

func idText(id dr.NodeID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// targetStatus is what the master target said of the machine.
func (f facts) targetStatus() *farsidev1.TargetStatus {
	if f.target == nil {
		return nil
	}
	for _, s := range f.target.GetMasterTarget().GetMachines() {
		if s.GetMachineId() == f.machine.ID.String() {
			return s
		}
	}
	return nil
}

// streamStatus is what the process server said of the machine.
func (f facts) streamStatus() *farsidev1.StreamStatus {
	if f.process == nil {
		return nil
	}
	for _, s := range f.process.GetProcessServer().GetStreams() {
		if s.GetMachineId() == f.machine.ID.String() {
			return s
		}
	}
	return nil
}

func (f facts) state(agent *farsidev1.AgentReport) (farsidev1.MachineState, string) {
	recoverable := f.targetStatus().GetNewest() != nil
	switch {
	case !f.machine.Protected:
		return farsidev1.MachineState_MACHINE_STATE_UNPROTECTED, ""
	case f.agent == nil:
		return farsidev1.MachineState_MACHINE_STATE_WAITING, "the agent has not reported yet"
	case !f.fresh(f.agent):
		return farsidev1.MachineState_MACHINE_STATE_OFFLINE, "the agent does not report"
	}
	why := agent.GetReason()
	if agent.GetError() != "" {
		why = agent.GetError()
	}
	switch agent.GetPhase() {
	case farsidev1.Phase_PHASE_FENCED:
		return farsidev1.MachineState_MACHINE_STATE_FENCED, why
	case farsidev1.Phase_PHASE_FAILED:
		return farsidev1.MachineState_MACHINE_STATE_FAILED, why
	case farsidev1.Phase_PHASE_EXACT:
		if missed := f.missed(agent); missed != "" && recoverable {
			return farsidev1.MachineState_MACHINE_STATE_DEGRADED, missed
		}
		if recoverable || agent.GetRpo().GetKnown() {
			return farsidev1.MachineState_MACHINE_STATE_PROTECTED, why
		}
		return farsidev1.MachineState_MACHINE_STATE_INITIAL, "no recovery point has reached the master target yet"
	case farsidev1.Phase_PHASE_INITIAL, farsidev1.Phase_PHASE_RESYNC:
		if recoverable {
			return farsidev1.MachineState_MACHINE_STATE_RESYNC, why
		}
		return farsidev1.MachineState_MACHINE_STATE_INITIAL, why
	}
	return farsidev1.MachineState_MACHINE_STATE_WAITING, why
}

// missed says which protected disks the agent does not replicate now, "" if it does all.
func (f facts) missed(agent *farsidev1.AgentReport) string {
	var out []string
	for _, s := range agent.GetDisks() {
		switch s.GetState() {
		case "missing", "resized", "failed":
			out = append(out, fmt.Sprintf("disk %d (%s) is %s, the points have it as it was: %s", s.GetDiskId(), s.GetPath(), s.GetState(), s.GetError()))
		}
	}
	return strings.Join(out, "; ")
}

// rpo returns the agent's own figure while its report is fresh. Otherwise what
// would be lost is all since the newest recovery point that the master target has.
func (f facts) rpo(agent *farsidev1.AgentReport) (rpo *farsidev1.Rpo, fromAgent bool) {
	if !f.machine.Protected {
		return nil, false
	}
	if f.fresh(f.agent) && agent.GetRpo().GetKnown() {
		return agent.GetRpo(), true
	}
	rpo = &farsidev1.Rpo{
		P50Ms: agent.GetRpo().GetP50Ms(), P99Ms: agent.GetRpo().GetP99Ms(),
		MaxMs: agent.GetRpo().GetMaxMs(), Samples: agent.GetRpo().GetSamples(),
	}
	if newest := f.targetStatus().GetNewest(); newest != nil {
		rpo.Known = true
		rpo.NowMs = max(0, f.now.Sub(time.Unix(0, newest.GetTimeNs())).Milliseconds())
	}
	return rpo, false
}

func (f facts) disk(d catalog.Disk, agent *farsidev1.AgentReport, machine *farsidev1.Rpo) *farsidev1.MachineDisk {
	out := &farsidev1.MachineDisk{Id: uint32(d.ID), Path: d.Path, Size: d.Size, State: "waiting", Rpo: machine}
	for _, s := range agent.GetDisks() {
		if s.GetDiskId() != uint32(d.ID) {
			continue
		}
		out.State, out.Error, out.Counters = s.GetState(), s.GetError(), s.GetCounters()
		out.LagMs, out.DirtyBytes = s.GetLagMs(), s.GetDirtyBytes()
		if f.fresh(f.agent) && machine.GetKnown() {
			// All disks are of one stream: one is as recoverable as the machine, or lags.
			out.Rpo = &farsidev1.Rpo{Known: true, NowMs: max(machine.GetNowMs(), s.GetLagMs())}
		}
	}
	return out
}

// warnings lists what holds now and a person should know.
func (f facts) warnings(agent *farsidev1.AgentReport, target *farsidev1.TargetStatus, stream *farsidev1.StreamStatus) []*farsidev1.Notice {
	var all []*farsidev1.Notice
	if f.agent != nil {
		all = append(all, f.agent.GetNotices()...)
	}
	if !f.machine.Protected {
		return all
	}
	for _, node := range []struct {
		what   string
		report *lastReport
		error  string
	}{
		{"agent", f.agent, agent.GetError()},
		{"process-server", f.process, stream.GetError()},
		{"master-target", f.target, target.GetError()},
	} {
		switch {
		case node.report == nil:
			all = append(all, failure(node.what+"-offline", 0, "the "+node.what+" has never reported"))
		case !f.fresh(node.report):
			all = append(all, failure(node.what+"-offline", node.report.received.UnixNano(), "the "+node.what+" does not report"))
		case node.error != "":
			all = append(all, failure(node.what+"-error", 0, node.what+": "+node.error))
		}
	}
	if stream.GetBehind() && f.fresh(f.process) {
		n := failure("link-behind", 0, fmt.Sprintf("the link to the master target is slower than the changes: %d MB wait, the oldest for %d s; the newest data goes first, without the points in between",
			stream.GetBacklogBytes()/1e6, stream.GetBacklogAgeMs()/1000))
		n.Severity = farsidev1.Severity_SEVERITY_WARNING
		all = append(all, n)
	}
	for _, s := range agent.GetDisks() {
		if s.GetError() != "" {
			n := failure("disk-error", 0, s.GetPath()+": "+s.GetError())
			n.DiskId, n.HasDisk = s.GetDiskId(), true
			all = append(all, n)
		}
	}
	return all
}

func failure(code string, since int64, text string) *farsidev1.Notice {
	return &farsidev1.Notice{Code: code, Severity: farsidev1.Severity_SEVERITY_ERROR, TimeNs: since, Text: text}
}
