package confserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
)

// OpenView implements the call.
func (s farsideService) OpenView(ctx context.Context, req *farsidev1.OpenViewRequest) (*farsidev1.OpenViewResponse, error) {
	v, err := s.newView(req)
	if err != nil {
		return nil, fmt.Errorf("open view: %w", err)
	}
	patience, err := period("time-out in ms", req.GetTimeoutMs(), time.Millisecond, defaultPatience, maxPatience)
	if err != nil {
		return nil, fmt.Errorf("open view: %w", err)
	}
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error { return s.addView(tx, &v, req) })
	if err != nil {
		return nil, fmt.Errorf("open view: %w", err)
	}
	s.log.Info("a view is opened", "view", v.ID, "machine", v.Machine, "writable", v.Writable, "by", callerOf(ctx).user.Name)
	s.hub.wake(v.MasterTarget)
	if !req.GetWait() {
		m, err := s.viewByID(ctx, v.ID)
		return &farsidev1.OpenViewResponse{View: m}, err
	}
	res := &farsidev1.OpenViewResponse{}
	err = s.waitUntil(ctx, patience, func() (bool, error) {
		res.View, err = s.viewByID(ctx, v.ID)
		if err != nil {
			return true, err
		}
		switch res.GetView().GetStatus().GetState() {
		case farsidev1.ViewState_VIEW_STATE_OPEN:
			return true, nil
		case farsidev1.ViewState_VIEW_STATE_FAILED:
			return true, errors.Join(viewError(res.GetView().GetStatus()), s.dropView(ctx, v.ID))
		}
		return false, nil
	})
	if errors.Is(err, errTimeout) {
		err = fmt.Errorf("view %s is not open yet: %w", v.ID, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open view: %w", err)
	}
	return res, nil
}

// newView makes the row of a view, but for its machine.
func (s *server) newView(req *farsidev1.OpenViewRequest) (catalog.View, error) {
	v := catalog.View{ID: newUUID(), Name: req.GetName(), Writable: req.GetWritable(), Created: s.now().UnixNano()}
	if err := checkName("name of view", v.Name); err != nil {
		return v, err
	}
	var err error
	if v.Selector, err = selectorOf(req.GetSelector()); err != nil {
		return v, err
	}
	for _, id := range req.GetDiskIds() {
		if id == 0 || id > 65535 {
			return v, fmt.Errorf("disk %d: %w", id, dr.ErrInvalid)
		}
		v.Disks = append(v.Disks, dr.DiskID(id))
	}
	if req.GetRequestId() != "" {
		v.ID, err = checkUUID("request id", req.GetRequestId())
	}
	return v, err
}

// addView adds a view, or finds that the same request added it before.
func (s *server) addView(tx *catalog.Tx, v *catalog.View, req *farsidev1.OpenViewRequest) error {
	m, err := findMachine(tx, req.GetMachine())
	if err != nil {
		return err
	}
	if m.MasterTarget.IsZero() {
		return fmt.Errorf("machine %q was never protected: %w", m.Name, dr.ErrNoPoint)
	}
	v.Machine, v.MasterTarget = m.ID, m.MasterTarget
	old, err := tx.View(v.ID)
	switch {
	case err == nil && (old.Machine != v.Machine || old.Writable != v.Writable || old.Selector != v.Selector):
		return fmt.Errorf("request id %s was used for another view: %w", v.ID, dr.ErrExists)
	case err == nil || !errors.Is(err, dr.ErrNotFound):
		return err
	}
	if v.Writable {
		// Even a branch that is thrown away uses a timeline up: none may ever mean two things.
		m.LastTimeline++
		v.Branch = m.LastTimeline
		if err := tx.SaveMachine(m); err != nil {
			return err
		}
	}
	return tx.AddView(*v)
}

// CloseView implements the call.
func (s farsideService) CloseView(ctx context.Context, req *farsidev1.CloseViewRequest) (*farsidev1.CloseViewResponse, error) {
	patience, err := period("time-out in ms", req.GetTimeoutMs(), time.Millisecond, defaultPatience, maxPatience)
	if err != nil {
		return nil, fmt.Errorf("close view: %w", err)
	}
	var v catalog.View
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
		v, err = findView(tx, req.GetView())
		return err
	})
	if err == nil {
		err = s.dropView(ctx, v.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("close view: %w", err)
	}
	s.log.Info("a view is closed", "view", v.ID, "by", callerOf(ctx).user.Name)
	res := &farsidev1.CloseViewResponse{}
	look := func() (gone bool, err error) {
		m, err := s.viewByID(ctx, v.ID)
		if errors.Is(err, dr.ErrNotFound) {
			res.View.Status = &farsidev1.ViewStatus{
				ViewId: v.ID, MachineId: v.Machine.String(), State: farsidev1.ViewState_VIEW_STATE_CLOSED,
			}
			return true, nil
		}
		if err == nil {
			res.View = m
		}
		return false, err
	}
	res.View = &farsidev1.View{Id: v.ID, Name: v.Name, MachineId: v.Machine.String(), Writable: v.Writable, Closing: true}
	if !req.GetWait() {
		_, err = look()
	} else {
		err = s.waitUntil(ctx, patience, look)
	}
	if err != nil {
		return nil, fmt.Errorf("close view %s: %w", v.ID, err)
	}
	return res, nil
}

// dropView has a view closed. Its master target's assignment gets a new revision
// at once, by which later reports can be told from earlier ones.
func (s *server) dropView(ctx context.Context, id string) error {
	var target dr.NodeID
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		v, err := tx.View(id)
		if err != nil {
			return err
		}
		target = v.MasterTarget
		if err := tx.CloseView(id); err != nil {
			return err
		}
		_, err = s.revise(tx, target)
		if errors.Is(err, dr.ErrNotFound) {
			return tx.DeleteView(id) // its master target is no member any more
		}
		return err
	})
	s.hub.wake(target)
	return err
}

// ListViews implements the call.
func (s farsideService) ListViews(ctx context.Context, req *farsidev1.ListViewsRequest) (*farsidev1.ListViewsResponse, error) {
	res := &farsidev1.ListViewsResponse{}
	err := s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		var rows []catalog.View
		var err error
		if req.GetMachine() == "" {
			rows, err = tx.Views()
		} else {
			var m catalog.Machine
			if m, err = findMachine(tx, req.GetMachine()); err == nil {
				rows, err = tx.ViewsOf(m.ID)
			}
		}
		if err != nil {
			return err
		}
		for _, row := range rows {
			v, err := s.viewMessage(tx, row)
			if err != nil {
				return err
			}
			res.Views = append(res.Views, v)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list views: %w", err)
	}
	return res, nil
}

func (s *server) viewByID(ctx context.Context, id string) (m *farsidev1.View, err error) {
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		row, err := tx.View(id)
		if err != nil {
			return err
		}
		m, err = s.viewMessage(tx, row)
		return err
	})
	return m, err
}

// viewMessage describes a view by its row and what its master target said of it.
func (s *server) viewMessage(tx *catalog.Tx, v catalog.View) (*farsidev1.View, error) {
	m, err := tx.Machine(v.Machine)
	if err != nil {
		return nil, err
	}
	out := &farsidev1.View{
		Id: v.ID, Name: v.Name, MachineId: v.Machine.String(), MachineName: m.Name, MasterTargetId: v.MasterTarget.String(),
		Selector: selectorMessage(v.Selector), Writable: v.Writable, CreatedNs: v.Created, Closing: v.Closing,
	}
	if r := s.report(v.MasterTarget); r != nil {
		out.Status = viewStatus(r.GetMasterTarget(), v.ID)
	}
	if out.GetStatus() == nil {
		out.Status = &farsidev1.ViewStatus{ViewId: v.ID, MachineId: out.GetMachineId(), State: farsidev1.ViewState_VIEW_STATE_OPENING}
	}
	return out, nil
}
