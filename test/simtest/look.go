package simtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/nbd"
	"farside/internal/transport"
)

// look opens a machine's disks at a position, the newest if at is nil, reads them and tells which state
// they are. It holds the answer against those about other positions.
func (w *World) look(m *machine, at *pb.Position) (interval, dr.Position, error) {
	w.lastView++
	v := &pb.ViewAssignment{
		ViewId: dr.MachineID{byte(w.lastView), byte(w.lastView >> 8), 0xee}.String(), MachineId: m.id.String(),
		Selector: &pb.Selector{Point: &pb.Selector_Latest{Latest: true}},
	}
	if at != nil {
		v.Selector.Point = &pb.Selector_Position{Position: at}
	}
	w.views = append(w.views, v)
	w.assign()
	defer func() {
		w.views = slices.DeleteFunc(w.views, func(o *pb.ViewAssignment) bool { return o == v })
		w.assign()
	}()
	var got *pb.ViewStatus
	if !w.until(time.Minute, func() bool {
		got = w.viewStatus(v.GetViewId())
		return got.GetState() == pb.ViewState_VIEW_STATE_OPEN || got.GetState() == pb.ViewState_VIEW_STATE_FAILED
	}) {
		return interval{}, dr.Position{}, fmt.Errorf("the view does not open within a minute: %v", got)
	}
	if got.GetState() == pb.ViewState_VIEW_STATE_FAILED {
		return interval{}, dr.Position{}, fmt.Errorf("the view does not open: %s", got.GetError())
	}
	images := map[dr.DiskID][]byte{}
	for _, e := range got.GetExports() {
		b, err := w.read(e)
		if err != nil {
			return interval{}, dr.Position{}, fmt.Errorf("read %s: %w", e.GetName(), err)
		}
		images[dr.DiskID(e.GetDiskId())] = b
	}
	is, err := m.oracle.judge(images)
	if err != nil {
		return is, positionOf(got.GetPosition()), err
	}
	return is, positionOf(got.GetPosition()), m.compare(judgement{positionOf(got.GetPosition()), is})
}

// compare holds a judgement against the earlier ones: a later position is no earlier state.
func (m *machine) compare(j judgement) error {
	for _, o := range m.judged {
		if o.at.Seq <= j.at.Seq && o.is.first > j.is.last || o.at.Seq >= j.at.Seq && o.is.last < j.is.first {
			return fmt.Errorf("%v is as after write %d to %d, but %v as after %d to %d", j.at, j.is.first, j.is.last, o.at, o.is.first, o.is.last)
		}
	}
	m.judged = append(m.judged, j)
	return nil
}

func (w *World) viewStatus(id string) *pb.ViewStatus {
	if w.target.node == nil {
		return nil
	}
	for _, v := range w.target.node.Report().GetMasterTarget().GetViews() {
		if v.GetViewId() == id {
			return v
		}
	}
	return nil
}

// read returns the content of an export.
func (w *World) read(e *pb.Export) (b []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := w.net.dial(ctx, "client", transport.Peer{Role: transport.RoleClient}, "exports")
	if err != nil {
		return nil, err
	}
	c, err := nbd.NewClient(ctx, conn, e.GetName())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	b = make([]byte, e.GetSize())
	_, err = io.ReadFull(io.NewSectionReader(c, 0, e.GetSize()), b)
	return b, err
}

// lookSomewhere looks at a position that is offered: a tag, or one of a span.
func (w *World) lookSomewhere(m *machine, pick func(n int) int) {
	if w.fault != nil || w.target.node == nil {
		return
	}
	if n := len(m.tags); n > 0 && pick(3) == 0 {
		w.lookAtTag(m, m.tags[pick(n)])
		return
	}
	spans := slices.DeleteFunc(slices.Clone(w.spansOf(m)), func(s *pb.Span) bool { return s.GetOpen() })
	if len(spans) == 0 {
		return
	}
	s := spans[pick(len(spans))]
	at := s.GetLast()
	if n := int(at.GetSeq() - s.GetFirst().GetSeq()); s.GetAccuracy() == pb.Accuracy_ACCURACY_EXACT && n > 0 {
		at = &pb.Position{Timeline: at.GetTimeline(), Seq: s.GetFirst().GetSeq() + uint64(pick(n+1))}
	}
	_, _, err := w.look(m, at)
	if err != nil && w.horizonPassed(m, at) {
		return
	}
	if err != nil {
		w.broken("%s: %v of span %v: %v", m.name, at, s, err)
	}
}

// horizonPassed reports whether a position has left the history meanwhile, so that it may be refused.
func (w *World) horizonPassed(m *machine, at *pb.Position) bool {
	spans := w.spansOf(m)
	return len(spans) == 0 || spans[0].GetFirst().GetSeq() > at.GetSeq()
}

// lookAtTag checks that a tag holds all that was submitted before it was asked for.
func (w *World) lookAtTag(m *machine, t *wantedTag) {
	if t.at == nil || positionOf(t.at).Seq > m.durable.Seq || w.horizonPassed(m, t.at) {
		return
	}
	is, at, err := w.look(m, t.at)
	switch {
	case err != nil && (w.horizonPassed(m, t.at) || strings.Contains(err.Error(), "does not open")): // it may lie in a sync
	case err != nil:
		w.broken("%s: tag %q at %v: %v", m.name, t.req.GetName(), at, err)
	case is.last < t.writes:
		w.broken("%s: tag %q was asked for after write %d, but is as after write %d", m.name, t.req.GetName(), t.writes, is.last)
	}
}
