package confserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
	"farside/internal/transport"
)

// maxWindow is the longest history window, in seconds: ten years.
const maxWindow = 10 * 365 * 24 * 3600

// ListMachines implements the call.
func (s farsideService) ListMachines(ctx context.Context, req *farsidev1.ListMachinesRequest) (*farsidev1.ListMachinesResponse, error) {
	limit, after, err := page(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	res := &farsidev1.ListMachinesResponse{}
	err = s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		rows, err := tx.Machines(after, limit)
		if err != nil {
			return err
		}
		for _, row := range rows {
			m, err := s.describe(tx, row)
			if err != nil {
				return err
			}
			m.Discovered, m.Events = nil, nil
			res.Machines = append(res.Machines, m)
		}
		if len(rows) == limit {
			last := rows[len(rows)-1]
			res.NextPageToken = pageToken(catalog.Cursor{Name: last.Name, ID: last.ID.String()})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	return res, nil
}

// GetMachine implements the call.
func (s farsideService) GetMachine(ctx context.Context, req *farsidev1.GetMachineRequest) (*farsidev1.GetMachineResponse, error) {
	res := &farsidev1.GetMachineResponse{}
	err := s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		row, err := findMachine(tx, req.GetMachine())
		if err != nil {
			return err
		}
		res.Machine, err = s.describe(tx, row)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("get machine: %w", err)
	}
	return res, nil
}

// describe collects what the description of a machine follows from.
func (s *server) describe(tx *catalog.Tx, m catalog.Machine) (*farsidev1.Machine, error) {
	disks, err := tx.Disks(m.ID)
	if err != nil {
		return nil, err
	}
	return describe(facts{
		machine: m, disks: disks, now: s.now(), freshFor: s.freshFor(),
		agent: s.report(m.Node), process: s.report(m.ProcessServer), target: s.report(m.MasterTarget),
	}), nil
}

// ProtectMachine implements the call.
func (s farsideService) ProtectMachine(ctx context.Context, req *farsidev1.ProtectMachineRequest) (*farsidev1.ProtectMachineResponse, error) {
	if w := req.GetHistoryWindowSeconds(); w < 0 || w > maxWindow {
		return nil, fmt.Errorf("protect machine: history window of %d s: %w", w, dr.ErrInvalid)
	}
	res := &farsidev1.ProtectMachineResponse{}
	var wake []dr.NodeID
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		m, err := findMachine(tx, req.GetMachine())
		if err != nil {
			return err
		}
		wake = []dr.NodeID{m.Node, m.ProcessServer, m.MasterTarget}
		if err := errors.Join(applySettings(&m, req.GetSettings()), applyPoints(&m, req.GetPoints())); err != nil {
			return err
		}
		if w := req.GetHistoryWindowSeconds(); w != 0 {
			m.HistoryWindow = w
		}
		if err := s.place(tx, &m, req); err != nil {
			return err
		}
		if err := s.changeDisks(tx, &m, req); err != nil {
			return err
		}
		m.Protected, m.Retired = true, true
		wake = append(wake, m.ProcessServer, m.MasterTarget)
		if err := tx.SaveMachine(m); err != nil {
			return err
		}
		res.Machine, err = s.describe(tx, m)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("protect machine: %w", err)
	}
	s.log.Info("protection changed", "machine", res.Machine.GetId(), "name", res.Machine.GetName(), "disks", len(res.Machine.GetDisks()), "by", callerOf(ctx).user.Name)
	s.hub.wake(wake...)
	return res, nil
}

// place chooses process server and master target: those that are asked for, those
// that are, or the least loaded ones.
func (s *server) place(tx *catalog.Tx, m *catalog.Machine, req *farsidev1.ProtectMachineRequest) error {
	load, err := tx.Load()
	if err != nil {
		return err
	}
	process, err := s.chosen(tx, transport.RoleProcessServer, req.GetProcessServer(), m.ProcessServer, load)
	if err != nil {
		return err
	}
	target, err := s.chosen(tx, transport.RoleMasterTarget, req.GetMasterTarget(), m.MasterTarget, load)
	if err != nil {
		return err
	}
	if !m.MasterTarget.IsZero() && target != m.MasterTarget {
		return fmt.Errorf("the history of machine %q is at master target %s, moving it: %w", m.Name, m.MasterTarget, dr.ErrUnsupported)
	}
	m.ProcessServer, m.MasterTarget = process, target
	return nil
}

func (s *server) chosen(tx *catalog.Tx, role, asked string, have dr.NodeID, load map[dr.NodeID]int) (dr.NodeID, error) {
	if asked != "" {
		n, err := findNode(tx, role, asked)
		return n.ID, err
	}
	if !have.IsZero() {
		return have, nil
	}
	all, err := tx.Nodes(role, catalog.Cursor{}, math.MaxInt32)
	if err != nil {
		return dr.NodeID{}, err
	}
	if len(all) == 0 {
		return dr.NodeID{}, fmt.Errorf("no %s has joined: %w", role, dr.ErrUnavailable)
	}
	// Those that are there before those that are not, then by load; ids settle the rest.
	best := slices.MinFunc(all, func(a, b catalog.Node) int {
		return cmp.Or(s.absence(a.ID)-s.absence(b.ID), load[a.ID]-load[b.ID], strings.Compare(a.ID.String(), b.ID.String()))
	})
	return best.ID, nil
}

// absence is 0 for a node that is there, 1 for one that is not.
func (s *server) absence(id dr.NodeID) int {
	if s.online(s.report(id)) {
		return 0
	}
	return 1
}

// changeDisks adds and removes the disks that are asked for.
func (s *server) changeDisks(tx *catalog.Tx, m *catalog.Machine, req *farsidev1.ProtectMachineRequest) error {
	have, err := tx.Disks(m.ID)
	if err != nil {
		return err
	}
	now := s.now().UnixNano()
	for _, path := range req.GetRemoveDiskPaths() {
		i := slices.IndexFunc(have, func(d catalog.Disk) bool { return d.Path == path })
		if i < 0 {
			return fmt.Errorf("disk %q of machine %q is not protected: %w", path, m.Name, dr.ErrNotFound)
		}
		if err := tx.RemoveDisk(m.ID, have[i].ID, now); err != nil {
			return err
		}
		have = slices.Delete(have, i, i+1)
	}
	for _, path := range req.GetDiskPaths() {
		if slices.ContainsFunc(have, func(d catalog.Disk) bool { return d.Path == path }) {
			continue
		}
		found, err := s.discovered(*m, path)
		if err != nil {
			return err
		}
		if m.LastDisk == math.MaxUint16 {
			return fmt.Errorf("machine %q has used up its disk ids: %w", m.Name, dr.ErrFull)
		}
		m.LastDisk++
		d := catalog.Disk{Machine: m.ID, ID: m.LastDisk, Path: path, Size: found.GetSize(), Added: now, Identity: found.GetIdentity()}
		if err := tx.AddDisk(d); err != nil {
			return err
		}
		have = append(have, d)
	}
	if len(have) == 0 {
		return fmt.Errorf("name at least one disk of machine %q: %w", m.Name, dr.ErrInvalid)
	}
	return nil
}

// discovered returns what the agent said of the disk at a path.
func (s *server) discovered(m catalog.Machine, path string) (*farsidev1.DiscoveredDisk, error) {
	r := s.report(m.Node)
	if r == nil {
		return nil, fmt.Errorf("the agent of machine %q has not reported its disks yet: %w", m.Name, dr.ErrUnavailable)
	}
	var paths []string
	for _, d := range r.GetAgent().GetDiscovered() {
		switch {
		case d.GetPath() != path:
			paths = append(paths, d.GetPath())
		case !d.GetProtectable():
			return nil, fmt.Errorf("disk %q of machine %q can't be protected: %s: %w", path, m.Name, d.GetReason(), dr.ErrInvalid)
		case d.GetSize() <= 0 || d.GetSize()%dr.SectorSize != 0:
			return nil, fmt.Errorf("disk %q of machine %q has %d bytes: %w", path, m.Name, d.GetSize(), dr.ErrInvalid)
		default:
			return d, nil
		}
	}
	return nil, fmt.Errorf("machine %q has no disk %q, but %s: %w", m.Name, path, strings.Join(paths, ", "), dr.ErrNotFound)
}

// UnprotectMachine implements the call.
func (s farsideService) UnprotectMachine(ctx context.Context, req *farsidev1.UnprotectMachineRequest) (*farsidev1.UnprotectMachineResponse, error) {
	res := &farsidev1.UnprotectMachineResponse{}
	var m catalog.Machine
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) (err error) {
		if m, err = findMachine(tx, req.GetMachine()); err != nil {
			return err
		}
		if err := errors.Join(removeDisks(tx, m.ID, s.now().UnixNano()), failTags(tx, m.ID, "the machine is no longer protected")); err != nil {
			return err
		}
		m.Protected = false
		if err := tx.SaveMachine(m); err != nil {
			return err
		}
		res.Machine, err = s.describe(tx, m)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("unprotect machine: %w", err)
	}
	s.log.Info("protection ended", "machine", m.ID, "name", m.Name, "by", callerOf(ctx).user.Name)
	s.hub.wake(m.Node, m.ProcessServer, m.MasterTarget)
	return res, nil
}

func removeDisks(tx *catalog.Tx, id dr.MachineID, now int64) error {
	disks, err := tx.Disks(id)
	if err != nil {
		return err
	}
	for _, d := range disks {
		if err := tx.RemoveDisk(id, d.ID, now); err != nil {
			return err
		}
	}
	return nil
}

func failTags(tx *catalog.Tx, id dr.MachineID, why string) error {
	tags, err := tx.TagsWanted(id)
	if err != nil {
		return err
	}
	for _, t := range tags {
		if err := tx.FailTag(t.ID, why); err != nil {
			return err
		}
	}
	return nil
}
