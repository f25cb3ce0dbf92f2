package confserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"farside/internal/api"
	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

// Bounds of what a report may hold.
const (
	maxAddresses = 16
	lateWithin   = 30 * time.Second
)

// Report implements the call: it replaces the node's report and draws the
// conclusions, all of which the next report would bring about too.
func (s nodeService) Report(ctx context.Context, req *farsidev1.ReportRequest) (*farsidev1.ReportResponse, error) {
	node, r := callerOf(ctx).node, req.GetReport()
	if err := checkReport(node, r); err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	now := s.now()
	answer := &farsidev1.ReportResponse{ServerTimeNs: now.UnixNano()}
	last := s.report(node.ID)
	if late(last, r, now) {
		return answer, nil
	}
	body, err := proto.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	var wake []dr.NodeID
	err = s.catalog.Note(ctx, func(tx *catalog.Tx) (err error) {
		if err := tx.SaveReport(catalog.Report{Node: node.ID, Received: now.UnixNano(), Body: body}); err != nil {
			return err
		}
		wake, err = conclude(tx, node, r, last)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	s.mu.Lock()
	s.mu.reports[node.ID] = &lastReport{Report: r, received: now}
	s.mu.Unlock()
	s.hub.wake(wake...)
	return answer, nil
}

// late reports whether r was sent before the report that is known already.
func late(last *lastReport, r *farsidev1.Report, now time.Time) bool {
	return last != nil && last.GetStartedNs() == r.GetStartedNs() && r.GetClockNs() < last.GetClockNs() &&
		now.Sub(last.received) < lateWithin // later than that, the node's clock was set back
}

func checkReport(n catalog.Node, r *farsidev1.Report) error {
	if r == nil {
		return fmt.Errorf("there is none in the message: %w", dr.ErrInvalid)
	}
	if len(r.GetAddresses()) > maxAddresses {
		return fmt.Errorf("%d addresses: %w", len(r.GetAddresses()), dr.ErrInvalid)
	}
	for _, a := range r.GetAddresses() {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return fmt.Errorf("address %q: %w: %w", a, dr.ErrInvalid, err)
		}
	}
	var role string
	switch w := r.GetWork().(type) {
	case nil:
		return nil // a node that is still starting
	case *farsidev1.Report_Agent:
		role = transport.RoleAgent
		if id := w.Agent.GetMachineId(); id != "" && id != n.Machine.String() {
			return fmt.Errorf("agent of machine %s reports of machine %q: %w", n.Machine, id, dr.ErrDenied)
		}
	case *farsidev1.Report_ProcessServer:
		role = transport.RoleProcessServer
	case *farsidev1.Report_MasterTarget:
		role = transport.RoleMasterTarget
	}
	if role != n.Role {
		return fmt.Errorf("a %s reports as a %s: %w", n.Role, role, dr.ErrDenied)
	}
	return nil
}

// conclude draws the conclusions from a report and returns whose assignment may change.
func conclude(tx *catalog.Tx, n catalog.Node, r *farsidev1.Report, last *lastReport) ([]dr.NodeID, error) {
	var wake []dr.NodeID
	var err error
	switch w := r.GetWork().(type) {
	case *farsidev1.Report_Agent:
		var more []dr.NodeID
		wake, err = concludeAgent(tx, n, w.Agent)
		if err == nil {
			more, err = concludeDisks(tx, n, w.Agent)
		}
		wake = append(wake, more...)
	case *farsidev1.Report_ProcessServer:
		wake, err = concludeGroups(tx, n, w.ProcessServer)
	case *farsidev1.Report_MasterTarget:
		wake, err = concludeTarget(tx, n, r, w.MasterTarget)
	}
	if err != nil {
		return nil, err
	}
	if last == nil || !slices.Equal(last.GetAddresses(), r.GetAddresses()) {
		more, err := whoDials(tx, n)
		if err != nil {
			return nil, err
		}
		wake = append(wake, more...)
	}
	return wake, nil
}

// whoDials returns the nodes that need a node's addresses.
func whoDials(tx *catalog.Tx, n catalog.Node) ([]dr.NodeID, error) {
	var machines []catalog.Machine
	var err error
	switch n.Role {
	case transport.RoleProcessServer:
		machines, err = tx.MachinesVia(n.ID)
	case transport.RoleMasterTarget:
		machines, err = tx.MachinesAt(n.ID)
	}
	var ids []dr.NodeID
	for _, m := range machines {
		if n.Role == transport.RoleProcessServer {
			ids = append(ids, m.Node)
		} else if !m.ProcessServer.IsZero() {
			ids = append(ids, m.ProcessServer)
		}
	}
	return ids, err
}

// maxDetail bounds what is kept of an agent's explanation, in bytes.
const maxDetail = 4 << 10

// concludeAgent notes which tags the agent could not place, and why others are less
// than was asked. Those that it placed count when the master target has them.
func concludeAgent(tx *catalog.Tx, n catalog.Node, r *farsidev1.AgentReport) ([]dr.NodeID, error) {
	var wake []dr.NodeID
	for _, t := range r.GetTags() {
		if t.GetError() == "" && t.GetDetail() == "" {
			continue
		}
		row, err := tx.Tag(t.GetId())
		if errors.Is(err, dr.ErrNotFound) || err == nil && row.Machine != n.Machine {
			continue
		}
		if err == nil {
			err = concludeTag(tx, row, t)
		}
		if err != nil {
			return nil, err
		}
		wake = append(wake, n.ID)
	}
	return wake, nil
}

func concludeTag(tx *catalog.Tx, row catalog.Tag, t *farsidev1.TagResult) error {
	if t.GetError() != "" {
		return tx.FailTag(row.ID, t.GetError())
	}
	detail := strings.ToValidUTF8(t.GetDetail()[:min(len(t.GetDetail()), maxDetail)], "")
	if detail == row.Detail {
		return nil
	}
	return tx.NoteTag(row.ID, detail)
}

// concludeTarget notes which tags are durable, where views were opened, and which are closed.
func concludeTarget(tx *catalog.Tx, n catalog.Node, r *farsidev1.Report, t *farsidev1.MasterTargetReport) ([]dr.NodeID, error) {
	wake, err := concludeTags(tx, n, t)
	if err != nil {
		return nil, err
	}
	views, err := tx.ViewsAt(n.ID)
	if err != nil || len(views) == 0 {
		return wake, err
	}
	current, err := tx.Assignment(n.ID)
	if err != nil {
		return nil, err
	}
	for _, v := range views {
		status := viewStatus(t, v.ID)
		switch {
		case v.Closing && r.GetAssignmentRevision() >= current.Revision && notOpen(status):
			// It works by an assignment that lacks the view, and has none open.
			err = tx.DeleteView(v.ID)
		case !v.Resolved && status.GetState() == farsidev1.ViewState_VIEW_STATE_OPEN && status.GetPosition() != nil:
			err = tx.ResolveView(v.ID, positionOf(status.GetPosition()))
			wake = append(wake, n.ID)
		}
		if err != nil {
			return nil, err
		}
	}
	return wake, nil
}

// notOpen reports whether a master target does not hold a view open.
func notOpen(v *farsidev1.ViewStatus) bool {
	return v == nil || v.GetState() == farsidev1.ViewState_VIEW_STATE_CLOSED || v.GetState() == farsidev1.ViewState_VIEW_STATE_FAILED
}

func viewStatus(t *farsidev1.MasterTargetReport, id string) *farsidev1.ViewStatus {
	for _, v := range t.GetViews() {
		if v.GetViewId() == id {
			return v
		}
	}
	return nil
}

func concludeTags(tx *catalog.Tx, n catalog.Node, t *farsidev1.MasterTargetReport) ([]dr.NodeID, error) {
	pending, err := tx.TagsPending()
	if err != nil || len(pending) == 0 {
		return nil, err
	}
	wanted := make(map[string]catalog.Tag, len(pending))
	for _, g := range pending {
		wanted[g.ID] = g
	}
	var wake []dr.NodeID
	for _, m := range t.GetMachines() {
		for _, g := range m.GetTags() {
			w, ok := wanted[g.GetId()]
			if !ok || w.Machine.String() != m.GetMachineId() {
				continue
			}
			row, err := tx.Machine(w.Machine)
			if err != nil {
				return nil, err
			}
			if row.MasterTarget != n.ID {
				continue // a master target speaks only for its own machines
			}
			reached := w.Consistency
			if c := dr.Consistency(g.GetConsistency()); c != 0 {
				reached = c
			}
			if err := tx.PlaceTag(w.ID, positionOf(g.GetPosition()), g.GetTimeNs(), reached); err != nil {
				return nil, err
			}
			wake = append(wake, row.Node)
		}
	}
	return wake, nil
}

// viewError makes an error of a view's failure.
func viewError(v *farsidev1.ViewStatus) error {
	kind := kindError(v.GetErrorKind())
	if kind == nil {
		kind = kindError(api.KindUnavailable)
	}
	return fmt.Errorf("view %s can't be opened: %s: %w", v.GetViewId(), v.GetError(), kind)
}
