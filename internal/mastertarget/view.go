package mastertarget

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "farside/internal/api/farside/v1"
	"farside/internal/dr"
	"farside/internal/export"
	"farside/internal/vault"
	"farside/internal/view"
)

// closeTimeout is how long the clients of a view may take to finish what is in
// flight.
const closeTimeout = 10 * time.Second

// wantedView is what the assignment says of a view.
type wantedView struct {
	id       string
	machine  dr.MachineID
	selector vault.Selector
	resolved *dr.Position // where it was opened once
	writable bool
	branch   dr.Timeline // of a writable one; 0: ours to choose
	disks    []dr.DiskID // none: all
}

func wantedViewOf(p *pb.ViewAssignment) (wantedView, error) {
	id, err := dr.ParseMachineID(p.GetMachineId())
	w := wantedView{
		id: p.GetViewId(), machine: id, writable: p.GetWritable(), branch: dr.Timeline(p.GetBranchTimeline()),
	}
	switch s := p.GetSelector().GetPoint().(type) {
	case *pb.Selector_Position:
		w.selector = vault.SelectPosition(positionOf(s.Position))
	case *pb.Selector_TimeNs:
		w.selector = vault.SelectTime(s.TimeNs)
	case *pb.Selector_Tag:
		w.selector = vault.SelectTag(s.Tag)
	default:
		w.selector = vault.SelectLatest()
	}
	if r := p.GetResolved(); r != nil {
		at := positionOf(r)
		w.resolved = &at
	}
	for _, d := range p.GetDiskIds() {
		w.disks = append(w.disks, dr.DiskID(d))
	}
	return w, err
}

func positionOf(p *pb.Position) dr.Position {
	return dr.Position{Timeline: dr.Timeline(p.GetTimeline()), Seq: dr.Seq(p.GetSeq())}
}

// openView is a view with its exports.
type openView struct {
	wanted  wantedView
	view    *view.View
	point   dr.RecoveryPoint // where it was opened
	took    time.Duration
	exports []*pb.Export
}

// openNow opens a view and exports its disks.
func openNow(m *machine, w wantedView, server *export.Server) (_ *openView, err error) {
	begin := time.Now()
	o := &openView{wanted: w}
	if err := o.open(m.vault); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close(server, false))
		}
	}()
	for _, d := range m.vault.Disks() {
		if len(w.disks) > 0 && !slices.Contains(w.disks, d.ID) {
			continue
		}
		disk, err := o.view.Disk(d.ID)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("%s/%d", w.id, d.ID)
		if err := server.Add(name, disk, !w.writable); err != nil {
			return nil, err
		}
		o.exports = append(o.exports, &pb.Export{DiskId: uint32(d.ID), Size: d.Size, Name: name, Uris: server.URIs(name)})
	}
	if len(o.exports) == 0 {
		return nil, fmt.Errorf("view of machine %v has no disk: %w", w.machine, dr.ErrNotFound)
	}
	o.took = time.Since(begin)
	return o, nil
}

// open opens the view where it was opened before, or where its selector leads.
func (o *openView) open(v *vault.Vault) (err error) {
	w := o.wanted
	if w.writable && w.branch != 0 && slices.Contains(v.Branches(), w.branch) {
		if o.view, err = view.Reopen(v, w.branch); err != nil {
			return err
		}
		o.point = v.Fork(w.branch)
		return nil
	}
	selector := w.selector
	if w.resolved != nil {
		selector = vault.SelectPosition(*w.resolved)
	}
	if o.point, err = v.Resolve(selector); err != nil {
		return err
	}
	if w.writable {
		o.view, err = view.OpenWritable(v, o.point.Position, w.branch)
	} else {
		o.view, err = view.Open(v, o.point.Position)
	}
	return err
}

// close ends exports and view; discard removes its branch.
func (o *openView) close(server *export.Server, discard bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	for _, e := range o.exports {
		errs = append(errs, server.Remove(ctx, e.GetName()))
	}
	if discard && o.wanted.writable {
		return errors.Join(append(errs, o.view.Discard())...)
	}
	return errors.Join(append(errs, o.view.Close())...)
}
