package catalog

import (
	"fmt"
	"time"

	"farside/internal/dr"
)

// Group is a replication group: machines that are tagged at one instant.
type Group struct {
	ID          string // UUID
	Name        string
	HoldLimit   int64 // ms
	TagEvery    int64 // s; 0 = never
	Consistency dr.Consistency
	Created     int64 // UTC ns
}

const groupColumns = `id, name, hold_limit_ms, tag_every_s, consistency, created_ns`

func scanGroup(s scanner) (g Group, err error) {
	err = s.Scan(&g.ID, &g.Name, &g.HoldLimit, &g.TagEvery, &g.Consistency, &g.Created)
	return g, err
}

// AddGroup adds a group without members. The error wraps dr.ErrExists if its id or
// name is taken.
func (t *Tx) AddGroup(g Group) error {
	return t.change("add group", `INSERT INTO replication_groups (`+groupColumns+`) VALUES (?, ?, ?, ?, ?, ?)`,
		g.ID, g.Name, g.HoldLimit, g.TagEvery, g.Consistency, g.Created)
}

// SaveGroup changes what may change of a group.
func (t *Tx) SaveGroup(g Group) error {
	return t.change("save group", `UPDATE replication_groups SET hold_limit_ms = ?, tag_every_s = ?, consistency = ? WHERE id = ?`,
		g.HoldLimit, g.TagEvery, g.Consistency, g.ID)
}

// DeleteGroup removes a group, its memberships and its tags.
func (t *Tx) DeleteGroup(id string) error {
	return t.change("delete group", `DELETE FROM replication_groups WHERE id = ?`, id)
}

// Group returns a group by its id or its name.
func (t *Tx) Group(idOrName string) (Group, error) {
	return one(t, fmt.Sprintf("group %q", idOrName), scanGroup,
		`SELECT `+groupColumns+` FROM replication_groups WHERE id = ? OR name = ? ORDER BY id = ? DESC LIMIT 1`, idOrName, idOrName, idOrName)
}

// Groups returns all groups by name.
func (t *Tx) Groups() ([]Group, error) {
	return list(t, "groups", scanGroup, `SELECT `+groupColumns+` FROM replication_groups ORDER BY name`)
}

// GroupOf returns the group of a machine; the error wraps dr.ErrNotFound if it is in none.
func (t *Tx) GroupOf(m dr.MachineID) (Group, error) {
	return one(t, fmt.Sprintf("group of machine %v", m), scanGroup, `SELECT `+groupColumns+` FROM replication_groups
		WHERE id = (SELECT group_id FROM group_members WHERE machine_id = ?)`, m.String())
}

// Members returns the machines of a group, by id.
func (t *Tx) Members(group string) ([]Machine, error) {
	return list(t, "members", scanMachine, `SELECT `+machineColumns+` FROM machines
		WHERE id IN (SELECT machine_id FROM group_members WHERE group_id = ?) ORDER BY id`, group)
}

// AddMember makes a machine a member of a group; the error wraps dr.ErrExists if it
// is in one.
func (t *Tx) AddMember(group string, m dr.MachineID) error {
	return t.change("add member", `INSERT INTO group_members (machine_id, group_id) VALUES (?, ?)`, m.String(), group)
}

// RemoveMembers takes all machines out of a group.
func (t *Tx) RemoveMembers(group string) error {
	if _, err := t.exec(`DELETE FROM group_members WHERE group_id = ?`, group); err != nil {
		return fmt.Errorf("remove members: %w", err)
	}
	return nil
}

// GroupTag is a tag of a group that was asked for. Its states are those of a Tag.
type GroupTag struct {
	ID          string // UUID; each member's tag bears it as its group
	Group       string
	Name        string
	Consistency dr.Consistency
	Created     int64 // UTC ns
	Deadline    int64 // UTC ns
	State       string
	Time        int64         // UTC ns, when durable
	Held        time.Duration // longest time that a member was frozen
	Error       string        // when failed
}

const groupTagColumns = `id, group_id, name, consistency, created_ns, deadline_ns, state, time_ns, held_us, error`

func scanGroupTag(s scanner) (g GroupTag, err error) {
	var held int64
	err = s.Scan(&g.ID, &g.Group, &g.Name, &g.Consistency, &g.Created, &g.Deadline, &g.State, &g.Time, &held, &g.Error)
	g.Held = time.Duration(held) * time.Microsecond
	return g, err
}

// AddGroupTag adds a tag of a group. The error wraps dr.ErrExists if its id is taken.
func (t *Tx) AddGroupTag(g GroupTag) error {
	return t.change("add group tag", `INSERT INTO group_tags (`+groupTagColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		g.ID, g.Group, g.Name, g.Consistency, g.Created, g.Deadline, g.State, g.Time, g.Held.Microseconds(), g.Error)
}

// GroupTag returns a tag of a group.
func (t *Tx) GroupTag(id string) (GroupTag, error) {
	return one(t, fmt.Sprintf("group tag %s", id), scanGroupTag, `SELECT `+groupTagColumns+` FROM group_tags WHERE id = ?`, id)
}

// GroupTagsWanted returns the tags of a group that are asked for, oldest first.
func (t *Tx) GroupTagsWanted(group string) ([]GroupTag, error) {
	return list(t, "group tags", scanGroupTag, `SELECT `+groupTagColumns+` FROM group_tags
		WHERE group_id = ? AND state = ? ORDER BY created_ns, id`, group, TagWanted)
}

// ConcludeGroupTag notes what became of a wanted tag: State, Consistency, Time, Held and Error.
func (t *Tx) ConcludeGroupTag(g GroupTag) error {
	_, err := t.exec(`UPDATE group_tags SET state = ?, consistency = ?, time_ns = ?, held_us = ?, error = ? WHERE id = ? AND state = ?`,
		g.State, g.Consistency, g.Time, g.Held.Microseconds(), g.Error, g.ID, TagWanted)
	if err != nil {
		return fmt.Errorf("conclude group tag: %w", err)
	}
	return nil
}

// ExpireGroupTags fails the wanted tags whose deadline has passed, and returns the
// process servers that were asked for them.
func (t *Tx) ExpireGroupTags(now int64, why string) ([]dr.NodeID, error) {
	leaders, err := list(t, "leaders", func(s scanner) (n dr.NodeID, err error) {
		err = s.Scan(nodeColumn(&n))
		return n, err
	}, `SELECT DISTINCT process_server FROM machines WHERE id IN (SELECT machine_id FROM group_members WHERE group_id IN
		(SELECT group_id FROM group_tags WHERE state = ? AND deadline_ns <= ?))`, TagWanted, now)
	if err != nil {
		return nil, err
	}
	if _, err := t.exec(`UPDATE group_tags SET state = ?, error = ? WHERE state = ? AND deadline_ns <= ?`, TagFailed, why, TagWanted, now); err != nil {
		return nil, fmt.Errorf("expire group tags: %w", err)
	}
	return leaders, nil
}

// ForgetGroupTags deletes the tags that are no longer wanted and were made before t0.
func (t *Tx) ForgetGroupTags(t0 int64) error {
	if _, err := t.exec(`DELETE FROM group_tags WHERE state <> ? AND created_ns < ?`, TagWanted, t0); err != nil {
		return fmt.Errorf("forget group tags: %w", err)
	}
	return nil
}
