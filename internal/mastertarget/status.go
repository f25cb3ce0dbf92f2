package mastertarget

import (
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	"farside/internal/api"
	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/vault"
)

// maxListed bounds the spans and the tags of a machine in a report.
const maxListed = 500

// errorKinds maps kinds of error to what the API calls them.
func errorKinds() map[error]string {
	return map[error]string{
		dr.ErrInvalid: api.KindInvalid, dr.ErrNotFound: api.KindNotFound, dr.ErrExists: api.KindExists,
		dr.ErrDenied: api.KindDenied, dr.ErrCorrupt: api.KindCorrupt, dr.ErrVersion: api.KindVersion,
		dr.ErrTimeline: api.KindTimeline, dr.ErrFull: api.KindFull, dr.ErrUnsupported: api.KindUnsupported,
		dr.ErrUnavailable: api.KindUnavailable, dr.ErrNoPoint: api.KindNoPoint,
	}
}

// report describes everything.
func (s *server) report() *pb.Report {
	work := &pb.MasterTargetReport{}
	work.DiskTotalBytes, work.DiskFreeBytes = diskSpace(s.dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	branches := map[dr.MachineID]map[dr.Timeline]int64{}
	for id, m := range s.mu.machines {
		t, stats := m.status()
		branches[id] = stats.BranchBytes
		work.Machines = append(work.Machines, t)
	}
	for id, err := range s.mu.faults {
		work.Machines = append(work.Machines, &pb.TargetStatus{MachineId: id.String(), Error: err.Error()})
	}
	for id, v := range s.mu.views {
		work.Views = append(work.Views, &pb.ViewStatus{
			ViewId: id, MachineId: v.wanted.machine.String(), State: pb.ViewState_VIEW_STATE_OPEN,
			Position: position(v.point.Position), TimeNs: v.point.Time, Timeline: uint32(v.view.Timeline()),
			Exports: v.exports, OpenMs: float64(v.took) / float64(time.Millisecond),
			BranchBytes: branches[v.wanted.machine][v.view.Timeline()],
		})
	}
	for id, f := range s.mu.failed {
		state := pb.ViewState_VIEW_STATE_FAILED
		if errors.Is(f.err, dr.ErrUnavailable) {
			state = pb.ViewState_VIEW_STATE_OPENING
		}
		work.Views = append(work.Views, &pb.ViewStatus{
			ViewId: id, MachineId: f.wanted.machine.String(), State: state, Error: f.err.Error(), ErrorKind: errorKind(f.err),
		})
	}
	slices.SortFunc(work.Machines, func(a, b *pb.TargetStatus) int { return strings.Compare(a.GetMachineId(), b.GetMachineId()) })
	slices.SortFunc(work.Views, func(a, b *pb.ViewStatus) int { return strings.Compare(a.GetViewId(), b.GetViewId()) })
	return &pb.Report{Work: &pb.Report_MasterTarget{MasterTarget: work}}
}

// history keeps what is costly to tell until the history changes.
type history struct {
	head, horizon dr.Position
	spans         []*pb.Span
	tags          []*pb.TagPoint
	cut           bool
	newest        *pb.Point
	open          bool
}

// status describes the machine.
func (m *machine) status() (*pb.TargetStatus, vault.Stats) {
	head := m.vault.Head()
	horizon, horizonTime := m.vault.Horizon()
	stats := m.vault.Stats()
	t := &pb.TargetStatus{
		MachineId: m.wanted().id.String(), Head: position(head.Position), HeadTimeNs: head.Time,
		Horizon: position(horizon), HorizonTimeNs: horizonTime,
		UsedBytes: stats.LogBytes + stats.BaseBytes + stats.IndexBytes, IndexBytes: stats.IndexBytes,
		FramesReceived: m.frames.Load(), BytesReceived: m.bytes.Load(),
	}
	for _, n := range stats.BranchBytes {
		t.UsedBytes += n
	}
	for _, d := range m.vault.Disks() {
		t.Disks = append(t.Disks, &pb.Disk{Id: uint32(d.ID), Path: d.Name, Size: d.Size})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.mu.err
	if c := &m.mu.history; c.head != head.Position || c.horizon != horizon {
		if next, tellErr := tellHistory(m.vault); tellErr == nil {
			next.head, next.horizon = head.Position, horizon
			*c = next
		} else if err == nil {
			err = tellErr
		}
	}
	c := &m.mu.history
	t.Spans, t.Tags, t.SpansCut, t.Newest, t.HeadOpen = c.spans, c.tags, c.cut, c.newest, c.open
	if err != nil {
		t.Error = err.Error()
	}
	return t, stats
}

// joinEpochs makes one span of a run of epochs: those that don't fit into one frame
// begin with frames that are open.
func joinEpochs(spans []vault.Span) []vault.Span {
	var out []vault.Span
	for _, s := range spans {
		if s.Accuracy == dr.Epoch && !s.Open {
			for n := len(out) - 1; n >= 0 && out[n].Accuracy == dr.Epoch && out[n].Last.Timeline == s.Last.Timeline; n-- {
				s.First, s.FirstTime = out[n].First, out[n].FirstTime
				out = out[:n]
			}
		}
		out = append(out, s)
	}
	return out
}

// tellHistory describes spans, tags and the newest point of a vault.
func tellHistory(v *vault.Vault) (out history, err error) {
	spans, err1 := v.Spans()
	tags, err2 := v.Tags()
	if err := errors.Join(err1, err2); err != nil {
		return out, err
	}
	spans = joinEpochs(spans)
	out.cut = len(spans) > maxListed
	for _, s := range spans[max(0, len(spans)-maxListed):] {
		p := &pb.Span{
			Accuracy: accuracy(s.Accuracy), First: position(s.First), Last: position(s.Last),
			FirstTimeNs: s.FirstTime, LastTimeNs: s.LastTime, Open: s.Open,
		}
		switch {
		case s.Open:
			p.Reason = "sync"
		case s.Accuracy == dr.Epoch: // only folding makes those
			p.First, p.Reason = p.Last, "link-behind"
		}
		out.spans, out.open = append(out.spans, p), s.Open
	}
	for _, t := range tags[max(0, len(tags)-maxListed):] {
		out.tags = append(out.tags, &pb.TagPoint{
			Id: uuid(t.ID), Name: t.Name, Consistency: pb.Consistency(t.Consistency), GroupId: uuid(t.Group),
			Position: position(t.Position), TimeNs: t.Time,
		})
	}
	switch p, err := v.Resolve(vault.SelectLatest()); {
	case err == nil:
		out.newest = &pb.Point{Position: position(p.Position), TimeNs: p.Time, Accuracy: accuracy(p.Accuracy)}
	case !errors.Is(err, dr.ErrNoPoint):
		return out, err
	}
	return out, nil
}

func position(p dr.Position) *pb.Position {
	return &pb.Position{Timeline: uint32(p.Timeline), Seq: uint64(p.Seq)}
}

func accuracy(a dr.Accuracy) pb.Accuracy {
	if a == dr.Exact {
		return pb.Accuracy_ACCURACY_EXACT
	}
	return pb.Accuracy_ACCURACY_EPOCH
}

// uuid writes an id in text form; the zero id is "".
func uuid(id [16]byte) string {
	if id == ([16]byte{}) {
		return ""
	}
	h := hex.EncodeToString(id[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
