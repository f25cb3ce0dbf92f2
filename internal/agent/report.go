package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
)

// wantedTags returns the tags of an assignment whose time is not up.
func wantedTags(p *pb.AgentAssignment, now time.Time) []dr.Tag {
	var out []dr.Tag
	for _, t := range p.GetTags() {
		if tag, err := tagOf(t); err == nil && !late(t, now) {
			out = append(out, tag)
		}
	}
	return out
}

func late(t *pb.TagRequest, now time.Time) bool {
	return t.GetDeadlineNs() != 0 && now.UnixNano() > t.GetDeadlineNs()
}

// tagOf reads a request. The tag says what is wanted of it.
func tagOf(t *pb.TagRequest) (dr.Tag, error) {
	id, err := dr.ParseNodeID(t.GetId())
	if err != nil {
		return dr.Tag{}, err
	}
	tag := dr.Tag{ID: id, Consistency: dr.Crash, Name: t.GetName()}
	switch t.GetConsistency() {
	case pb.Consistency_CONSISTENCY_FILESYSTEM:
		tag.Consistency = dr.FileSystem
	case pb.Consistency_CONSISTENCY_APPLICATION:
		tag.Consistency = dr.Application
	}
	if t.GetGroupId() != "" {
		group, err := dr.ParseNodeID(t.GetGroupId())
		if err != nil {
			return dr.Tag{}, err
		}
		tag.Group = group
	}
	return tag, checkTagName(tag.Name)
}

// report says what the agent does, as of now.
func (a *agent) report(now time.Time) *pb.AgentReport {
	a.mu.Lock()
	p, s, driver := a.mu.assigned, a.mu.stream, a.mu.driver
	r := &pb.AgentReport{MachineId: p.GetMachineId(), Phase: a.mu.phase}
	if a.mu.err != nil {
		r.Error = a.mu.err.Error()
	}
	aside := a.devices.asideStatus()
	a.mu.Unlock()
	r.Events = noticesOf(a.notices.list())
	if s == nil {
		r.Disks = aside
		return r
	}
	snap := s.snapshot(now)
	fillStream(r, &snap)
	for _, d := range aside {
		if !slices.ContainsFunc(r.Disks, func(x *pb.DiskStatus) bool { return x.GetDiskId() == d.GetDiskId() }) {
			r.Disks = append(r.Disks, d)
		}
	}
	r.Capture = &pb.CaptureStatus{
		Driver: driver, Mode: snap.source.Mode.String(), RingBytes: snap.source.RingSize, RingUsed: snap.source.RingUsed,
	}
	r.Tags = tagResults(p, &snap, a.now())
	r.Background = a.background.report(snap.disks)
	return r
}

func fillStream(r *pb.AgentReport, s *snapshot) {
	r.Phase = phaseOf(&s.status)
	if s.phase == Syncing {
		r.Reason = string(s.why)
		done, total := s.progress()
		r.Progress = &pb.Progress{BytesDone: done, BytesTotal: total, StartedNs: s.started.UnixNano(), Reason: string(s.why)}
	}
	switch {
	case s.fault != nil:
		r.Error = s.fault.Error()
	case s.hold != nil:
		r.Error = s.hold.Error()
	case s.linkErr != nil:
		r.Error = s.linkErr.Error()
	}
	r.ConnectedTo = s.connected
	r.Rpo = &pb.Rpo{
		Known: s.rpoKnown, NowMs: s.rpo.Milliseconds(), P50Ms: s.p50.Milliseconds(), P99Ms: s.p99.Milliseconds(),
		MaxMs: s.max.Milliseconds(), Samples: int64(s.samples),
	}
	r.Counters = &pb.Counters{
		Writes: int64(s.source.Writes), BytesCaptured: int64(s.source.Bytes), Flushes: int64(s.source.Flushes),
		FramesSent: int64(s.stats.frames), BytesSent: int64(s.stats.bytes), Overflows: int64(s.stats.overflows),
		Resyncs: int64(s.stats.syncs), Missed: int64(s.source.Missed),
	}
	for _, d := range s.disks {
		r.Disks = append(r.Disks, diskOf(&d, s))
		r.Counters.BytesRead += d.Read
	}
	if s.timeline != 0 {
		r.Built, r.Stored, r.Durable = position(s, s.built), position(s, s.stored), position(s, s.durable)
	}
	if !s.point.IsZero() {
		r.DurableTimeNs = s.point.UnixNano()
	}
}

func position(s *snapshot, seq dr.Seq) *pb.Position {
	return &pb.Position{Timeline: uint32(s.timeline), Seq: uint64(seq)}
}

func diskOf(d *diskStatus, s *snapshot) *pb.DiskStatus {
	out := &pb.DiskStatus{
		DiskId: uint32(d.ID), Path: d.Path, Size: d.Size, State: "ok", LagMs: s.rpo.Milliseconds(),
		Counters: &pb.Counters{Writes: int64(d.Writes), BytesCaptured: d.Captured, BytesRead: d.Read},
	}
	if s.phase == Syncing {
		out.State, out.DirtyBytes = "syncing", d.Total-d.Done
	}
	if d.fault != nil {
		out.State, out.Error = "failed", fmt.Sprintf("since %s: %v", d.faultSince.UTC().Format(time.RFC3339), d.fault)
	}
	return out
}

// asideStatus says which disks are not captured, why and since when.
func (d *devices) asideStatus() (out []*pb.DiskStatus) {
	for _, x := range d.aside {
		state := "missing"
		switch x.code {
		case diskShrunk:
			state = "resized"
		case diskUnreadable:
			state = "failed"
		}
		out = append(out, &pb.DiskStatus{
			DiskId: uint32(x.ID), Path: x.Path, Size: x.Size, State: state,
			Error: fmt.Sprintf("not captured since %s: %s", x.since.UTC().Format(time.RFC3339), x.why),
		})
	}
	slices.SortFunc(out, func(a, b *pb.DiskStatus) int { return cmp.Compare(a.GetDiskId(), b.GetDiskId()) })
	return out
}

// phaseOf tells a first copy from later ones.
func phaseOf(s *status) pb.Phase {
	switch s.phase {
	case Exact:
		return pb.Phase_PHASE_EXACT
	case Fenced:
		return pb.Phase_PHASE_FENCED
	case Syncing:
		if s.why == ReasonInitial {
			return pb.Phase_PHASE_INITIAL
		}
		return pb.Phase_PHASE_RESYNC
	}
	return pb.Phase_PHASE_WAITING
}

// tagResults says what became of the tags that are assigned: placed and durable,
// or given up.
func tagResults(p *pb.AgentAssignment, s *snapshot, now time.Time) []*pb.TagResult {
	var out []*pb.TagResult
	for _, t := range p.GetTags() {
		tag, err := tagOf(t)
		at, placed := s.placed[tag.ID]
		outcome, known := s.outcomes[tag.ID]
		switch {
		case err != nil:
			out = append(out, &pb.TagResult{Id: t.GetId(), Error: err.Error()})
		case placed && at.Timeline == s.timeline && at.Seq <= s.durable:
			out = append(out, &pb.TagResult{
				Id: t.GetId(), Position: position(s, at.Seq), Consistency: reached(outcome), Detail: outcome.detail,
			})
		case known && outcome.detail != "":
			// Said before the tag is durable: who asked must hear of it when it is.
			out = append(out, &pb.TagResult{Id: t.GetId(), Consistency: reached(outcome), Detail: outcome.detail})
		case !placed && late(t, now):
			out = append(out, &pb.TagResult{Id: t.GetId(), Error: "not placed in time: the stream is " + s.phase.String()})
		}
	}
	return out
}

// reached returns the consistency of a tag that was placed.
func reached(o outcome) pb.Consistency {
	return pb.Consistency(max(o.reached, dr.Crash))
}

func noticesOf(ns []notice) []*pb.Notice {
	var out []*pb.Notice
	for _, n := range ns {
		severity := pb.Severity_SEVERITY_INFO
		if n.warn {
			severity = pb.Severity_SEVERITY_WARNING
		}
		out = append(out, &pb.Notice{Code: n.code, Severity: severity, Text: n.text, TimeNs: n.at.UnixNano()})
	}
	return out
}

// discovered lists the disks of this machine that may be protected.
func discovered(fs []found) []*pb.DiscoveredDisk {
	var out []*pb.DiscoveredDisk
	for _, f := range fs {
		out = append(out, &pb.DiscoveredDisk{
			Path: f.path, Size: f.size, Kind: f.kind, Model: f.model, Serial: f.serial, Mountpoints: f.mounts,
			Protectable: f.why == "", Reason: f.why, Identity: f.identity, Notes: f.notes,
		})
	}
	return out
}
