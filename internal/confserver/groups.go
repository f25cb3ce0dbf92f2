package confserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
)

// Bounds of a group.
const (
	defaultHold = 300 * time.Millisecond
	maxHold     = 10 * time.Second
	maxTagEvery = 7 * 24 * 3600 // s
	maxMembers  = 256
)

// SetGroup implements the call.
func (s farsideService) SetGroup(ctx context.Context, req *farsidev1.SetGroupRequest) (*farsidev1.SetGroupResponse, error) {
	if err := checkGroup(req); err != nil {
		return nil, fmt.Errorf("set group: %w", err)
	}
	res := &farsidev1.SetGroupResponse{}
	var wake []dr.NodeID
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		g, err := s.groupToSet(tx, req.GetName())
		if err != nil {
			return err
		}
		wake = append(wake, leadersOf(tx, g.ID)...)
		changeGroup(&g, req)
		if err := tx.SaveGroup(g); err != nil {
			return err
		}
		if err := setMembers(tx, g, req.GetMachines()); err != nil {
			return err
		}
		wake = append(wake, leadersOf(tx, g.ID)...)
		res.Group, err = describeGroup(tx, g)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("set group: %w", err)
	}
	s.log.Info("group changed", "group", res.Group.GetId(), "name", res.Group.GetName(), "machines", len(res.Group.GetMachineIds()), "by", callerOf(ctx).user.Name)
	s.hub.wake(wake...)
	return res, nil
}

func checkGroup(req *farsidev1.SetGroupRequest) error {
	if err := checkName("name of group", req.GetName()); err != nil {
		return err
	}
	c := req.GetConsistency()
	switch {
	case req.GetName() == "":
		return fmt.Errorf("no group is named: %w", dr.ErrInvalid)
	case len(req.GetMachines()) > maxMembers:
		return fmt.Errorf("%d machines, at most %d: %w", len(req.GetMachines()), maxMembers, dr.ErrInvalid)
	case req.GetHoldLimitMs() < 0 || req.GetHoldLimitMs() > maxHold.Milliseconds():
		return fmt.Errorf("hold limit of %d ms: must be at most %v: %w", req.GetHoldLimitMs(), maxHold, dr.ErrInvalid)
	case req.GetTagEverySeconds() > maxTagEvery:
		return fmt.Errorf("a tag every %d s: must be at most %d: %w", req.GetTagEverySeconds(), maxTagEvery, dr.ErrInvalid)
	case c != farsidev1.Consistency_CONSISTENCY_UNSPECIFIED && !groupConsistency(c):
		return fmt.Errorf("consistency %v: a group is tagged with its file systems frozen, so it can be filesystem or application: %w", c, dr.ErrInvalid)
	}
	return nil
}

func groupConsistency(c farsidev1.Consistency) bool {
	return c == farsidev1.Consistency_CONSISTENCY_FILESYSTEM || c == farsidev1.Consistency_CONSISTENCY_APPLICATION
}

// groupToSet finds the group of that name or adds it.
func (s *server) groupToSet(tx *catalog.Tx, name string) (catalog.Group, error) {
	g, err := tx.Group(name)
	if errors.Is(err, dr.ErrNotFound) {
		g = catalog.Group{
			ID: newUUID(), Name: name, HoldLimit: defaultHold.Milliseconds(), Consistency: dr.FileSystem, Created: s.now().UnixNano(),
		}
		err = tx.AddGroup(g)
	}
	return g, err
}

func changeGroup(g *catalog.Group, req *farsidev1.SetGroupRequest) {
	if n := req.GetHoldLimitMs(); n != 0 {
		g.HoldLimit = n
	}
	if n := req.GetTagEverySeconds(); n != 0 {
		g.TagEvery = max(n, 0)
	}
	if c := req.GetConsistency(); c != farsidev1.Consistency_CONSISTENCY_UNSPECIFIED {
		g.Consistency = dr.Consistency(c)
	}
}

// setMembers makes the machines, unless there are none, the members of a group.
func setMembers(tx *catalog.Tx, g catalog.Group, keys []string) error {
	if len(keys) > 0 {
		if err := tx.RemoveMembers(g.ID); err != nil {
			return err
		}
	}
	for _, key := range keys {
		m, err := findMachine(tx, key)
		if err != nil {
			return err
		}
		if other, err := tx.GroupOf(m.ID); err == nil && other.ID != g.ID {
			return fmt.Errorf("machine %q is in group %q already: %w", m.Name, other.Name, dr.ErrExists)
		}
		if err := tx.AddMember(g.ID, m.ID); err != nil {
			return fmt.Errorf("machine %q: %w", m.Name, err)
		}
	}
	_, err := leader(tx, g.ID)
	return err
}

// leader returns the process server that leads a group's barriers.
func leader(tx *catalog.Tx, group string) (dr.NodeID, error) {
	members, err := tx.Members(group)
	if err != nil {
		return dr.NodeID{}, err
	}
	if len(members) == 0 {
		return dr.NodeID{}, fmt.Errorf("the group has no machines: %w", dr.ErrInvalid)
	}
	for _, m := range members {
		switch {
		case !m.Protected:
			return dr.NodeID{}, fmt.Errorf("machine %q is not protected: protect it, or leave it out of the group: %w", m.Name, dr.ErrInvalid)
		case m.ProcessServer != members[0].ProcessServer:
			return dr.NodeID{}, fmt.Errorf("machines %q and %q have different process servers; one must lead the group: %w", members[0].Name, m.Name, dr.ErrInvalid)
		}
	}
	return members[0].ProcessServer, nil
}

// leadersOf returns the process servers of a group's machines, as far as they can be told.
func leadersOf(tx *catalog.Tx, group string) (nodes []dr.NodeID) {
	members, err := tx.Members(group)
	if err != nil {
		return nil // the wake-up would only have hurried what polls anyway
	}
	for _, m := range members {
		if !m.ProcessServer.IsZero() && !slices.Contains(nodes, m.ProcessServer) {
			nodes = append(nodes, m.ProcessServer)
		}
	}
	return nodes
}

// groupsLedBy returns the groups whose barriers a process server leads.
func groupsLedBy(tx *catalog.Tx, node dr.NodeID) (led []groupRows, err error) {
	groups, err := tx.Groups()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		if lead, err := leader(tx, g.ID); err != nil || lead != node {
			continue // also a group that no one can lead
		}
		rows := groupRows{Group: g}
		if rows.members, err = tx.Members(g.ID); err != nil {
			return nil, err
		}
		if rows.tags, err = tx.GroupTagsWanted(g.ID); err != nil {
			return nil, err
		}
		led = append(led, rows)
	}
	return led, nil
}

func describeGroup(tx *catalog.Tx, g catalog.Group) (*farsidev1.Group, error) {
	members, err := tx.Members(g.ID)
	if err != nil {
		return nil, err
	}
	out := &farsidev1.Group{
		Id: g.ID, Name: g.Name, HoldLimitMs: g.HoldLimit, TagEverySeconds: g.TagEvery, Consistency: farsidev1.Consistency(g.Consistency),
	}
	for _, m := range members {
		out.MachineIds = append(out.MachineIds, m.ID.String())
	}
	if lead, err := leader(tx, g.ID); err == nil {
		out.ProcessServerId = lead.String()
	}
	return out, nil
}

// DeleteGroup implements the call.
func (s farsideService) DeleteGroup(ctx context.Context, req *farsidev1.DeleteGroupRequest) (*farsidev1.DeleteGroupResponse, error) {
	var wake []dr.NodeID
	err := s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		g, err := tx.Group(req.GetGroup())
		if err != nil {
			return err
		}
		wake = leadersOf(tx, g.ID)
		return tx.DeleteGroup(g.ID)
	})
	if err != nil {
		return nil, fmt.Errorf("delete group: %w", err)
	}
	s.log.Info("group deleted", "group", req.GetGroup(), "by", callerOf(ctx).user.Name)
	s.hub.wake(wake...)
	return &farsidev1.DeleteGroupResponse{}, nil
}

// ListGroups implements the call.
func (s farsideService) ListGroups(ctx context.Context, _ *farsidev1.ListGroupsRequest) (*farsidev1.ListGroupsResponse, error) {
	res := &farsidev1.ListGroupsResponse{}
	err := s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		groups, err := tx.Groups()
		for _, g := range groups {
			if err != nil {
				break
			}
			var one *farsidev1.Group
			one, err = describeGroup(tx, g)
			res.Groups = append(res.Groups, one)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list groups: %w", err)
	}
	return res, nil
}

// TagGroup implements the call.
func (s farsideService) TagGroup(ctx context.Context, req *farsidev1.TagGroupRequest) (*farsidev1.TagGroupResponse, error) {
	// A group's tag is checked as a machine's is.
	row, patience, err := s.newTag(&farsidev1.TagPointRequest{
		Name: req.GetName(), Consistency: req.GetConsistency(), RequestId: req.GetRequestId(), TimeoutMs: req.GetTimeoutMs(),
	})
	if err != nil {
		return nil, fmt.Errorf("tag group: %w", err)
	}
	if c := req.GetConsistency(); c != farsidev1.Consistency_CONSISTENCY_UNSPECIFIED && !groupConsistency(c) {
		return nil, fmt.Errorf("tag group: consistency %v: want filesystem or application: %w", c, dr.ErrInvalid)
	}
	tag := catalog.GroupTag{
		ID: row.ID, Name: row.Name, Consistency: dr.Consistency(req.GetConsistency()), Created: row.Created, Deadline: row.Deadline, State: catalog.TagWanted,
	}
	var lead dr.NodeID
	err = s.catalog.Write(ctx, func(tx *catalog.Tx) error {
		g, err := tx.Group(req.GetGroup())
		if err != nil {
			return err
		}
		if lead, err = leader(tx, g.ID); err != nil {
			return err
		}
		if tag.Group = g.ID; tag.Consistency == 0 {
			tag.Consistency = g.Consistency
		}
		err = tx.AddGroupTag(tag)
		if errors.Is(err, dr.ErrExists) {
			return sameGroupTag(tx, tag)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tag group: %w", err)
	}
	s.hub.wake(lead)
	if tag, err = s.waitForGroupTag(ctx, tag.ID, patience); err != nil {
		return nil, fmt.Errorf("tag group %q: %w", req.GetName(), err)
	}
	return &farsidev1.TagGroupResponse{Tag: &farsidev1.GroupTagResult{
		Id: tag.ID, GroupId: tag.Group, Name: tag.Name, Consistency: farsidev1.Consistency(tag.Consistency), TimeNs: tag.Time,
		State: farsidev1.GroupTagState_GROUP_TAG_STATE_DURABLE, HeldMs: tag.Held.Seconds() * 1000,
	}}, nil
}

func sameGroupTag(tx *catalog.Tx, tag catalog.GroupTag) error {
	old, err := tx.GroupTag(tag.ID)
	if err == nil && (old.Group != tag.Group || old.Name != tag.Name) {
		err = fmt.Errorf("request id %s was used for another tag: %w", tag.ID, dr.ErrExists)
	}
	return err
}

// waitForGroupTag waits until a group's tag is durable everywhere.
func (s *server) waitForGroupTag(ctx context.Context, id string, patience time.Duration) (tag catalog.GroupTag, err error) {
	err = s.waitUntil(ctx, patience, func() (bool, error) {
		err := s.catalog.Read(ctx, func(tx *catalog.Tx) (err error) {
			tag, err = tx.GroupTag(id)
			return err
		})
		switch {
		case err != nil || tag.State == catalog.TagDurable:
			return true, err
		case tag.State == catalog.TagFailed && tag.Error == tagNotInTime:
			return true, fmt.Errorf("%s: %w", tag.Error, errTimeout)
		case tag.State == catalog.TagFailed:
			return true, fmt.Errorf("%s: %w", strings.TrimSpace(tag.Error), dr.ErrUnavailable)
		}
		return false, nil
	})
	return tag, err
}

// concludeGroups notes what became of the tags of groups that a process server leads.
func concludeGroups(tx *catalog.Tx, n catalog.Node, r *farsidev1.ProcessServerReport) (wake []dr.NodeID, err error) {
	for _, t := range r.GetGroupTags() {
		tag, err := tx.GroupTag(t.GetId())
		if errors.Is(err, dr.ErrNotFound) || err == nil && tag.State != catalog.TagWanted {
			continue // made by the process server's own schedule, or known
		}
		if err != nil {
			return nil, err
		}
		if lead, err := leader(tx, tag.Group); err != nil || lead != n.ID {
			continue // another leads the group now
		}
		switch t.GetState() {
		case farsidev1.GroupTagState_GROUP_TAG_STATE_DURABLE:
			tag.State, tag.Time, tag.Consistency = catalog.TagDurable, t.GetTimeNs(), dr.Consistency(t.GetConsistency())
			tag.Held = time.Duration(t.GetHeldMs() * float64(time.Millisecond))
		case farsidev1.GroupTagState_GROUP_TAG_STATE_FAILED:
			tag.State, tag.Error = catalog.TagFailed, t.GetError()
		default:
			continue
		}
		if err := tx.ConcludeGroupTag(tag); err != nil {
			return nil, err
		}
		wake = append(wake, n.ID)
	}
	return wake, nil
}

// ListGroupPoints implements the call.
func (s farsideService) ListGroupPoints(ctx context.Context, req *farsidev1.ListGroupPointsRequest) (*farsidev1.ListGroupPointsResponse, error) {
	if req.GetLimit() < 0 {
		return nil, fmt.Errorf("list group points: limit is negative: %w", dr.ErrInvalid)
	}
	var members []catalog.Machine
	err := s.catalog.Read(ctx, func(tx *catalog.Tx) error {
		g, err := tx.Group(req.GetGroup())
		if err != nil {
			return err
		}
		members, err = tx.Members(g.ID)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list group points: %w", err)
	}
	histories := make(map[dr.MachineID]*farsidev1.TargetStatus, len(members))
	for _, m := range members {
		histories[m.ID] = facts{machine: m, target: s.report(m.MasterTarget)}.targetStatus()
	}
	points := groupPoints(histories)
	limit := defaultPoints
	if n := int(req.GetLimit()); n != 0 {
		limit = min(n, maxPoints)
	}
	return &farsidev1.ListGroupPointsResponse{Points: points[max(0, len(points)-limit):]}, nil
}

// groupPoints puts together the tags of a group's machines, oldest first. Only one that
// each machine holds is complete.
func groupPoints(histories map[dr.MachineID]*farsidev1.TargetStatus) []*farsidev1.GroupPoint {
	points := map[string]*farsidev1.GroupPoint{}
	for id, h := range histories {
		for _, t := range h.GetTags() {
			if t.GetGroupId() == "" {
				continue
			}
			p := points[t.GetGroupId()]
			if p == nil {
				p = &farsidev1.GroupPoint{Id: t.GetGroupId(), Name: t.GetName(), Consistency: t.GetConsistency()}
				points[p.GetId()] = p
			}
			p.TimeNs, p.Consistency = max(p.GetTimeNs(), t.GetTimeNs()), min(p.GetConsistency(), t.GetConsistency())
			p.Members = append(p.Members, &farsidev1.GroupMemberPoint{MachineId: id.String(), Position: t.GetPosition(), TimeNs: t.GetTimeNs()})
			p.Complete = len(p.GetMembers()) == len(histories)
		}
	}
	var out []*farsidev1.GroupPoint
	for _, p := range points {
		slices.SortFunc(p.GetMembers(), func(a, b *farsidev1.GroupMemberPoint) int { return strings.Compare(a.GetMachineId(), b.GetMachineId()) })
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *farsidev1.GroupPoint) int {
		return cmp.Or(cmp.Compare(a.GetTimeNs(), b.GetTimeNs()), strings.Compare(a.GetId(), b.GetId()))
	})
	return out
}
