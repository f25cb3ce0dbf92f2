package catalog

import (
	"fmt"

	"farside/internal/dr"
)

// The states of a tag.
const (
	TagWanted  = "wanted"  // the agent is asked for it
	TagDurable = "durable" // the far side has it
	TagFailed  = "failed"  // it can't be placed, or not in time
)

// Tag is a tag that was asked for.
type Tag struct {
	ID          string // UUID
	Machine     dr.MachineID
	Group       string // UUID of the group tag, or ""
	Name        string
	Consistency dr.Consistency
	Created     int64 // UTC ns
	Deadline    int64 // UTC ns; 0 = none
	State       string
	Position    dr.Position // when durable
	Time        int64       // UTC ns, when durable
	Error       string      // when failed
	Detail      string      // why it is not as consistent as was asked
}

const tagColumns = `id, machine_id, group_id, name, consistency, created_ns, deadline_ns, state, timeline, seq, time_ns, error, detail`

func scanTag(s scanner) (g Tag, err error) {
	err = s.Scan(&g.ID, machineColumn(&g.Machine), &g.Group, &g.Name, &g.Consistency, &g.Created, &g.Deadline, &g.State,
		&g.Position.Timeline, seqColumn{&g.Position.Seq}, &g.Time, &g.Error, &g.Detail)
	return g, err
}

// AddTag adds a tag. The error wraps dr.ErrExists if its id is taken.
func (t *Tx) AddTag(g Tag) error {
	return t.change("add tag", `INSERT INTO tags (`+tagColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		g.ID, g.Machine.String(), g.Group, g.Name, g.Consistency, g.Created, g.Deadline, g.State,
		g.Position.Timeline, int64(g.Position.Seq), g.Time, g.Error, g.Detail)
}

// Tag returns a tag.
func (t *Tx) Tag(id string) (Tag, error) {
	return one(t, fmt.Sprintf("tag %s", id), scanTag, `SELECT `+tagColumns+` FROM tags WHERE id = ?`, id)
}

// TagsWanted returns the tags that a machine's agent is asked for, oldest first.
func (t *Tx) TagsWanted(m dr.MachineID) ([]Tag, error) {
	return list(t, "tags", scanTag, `SELECT `+tagColumns+` FROM tags WHERE machine_id = ? AND state = ? ORDER BY created_ns, id`,
		m.String(), TagWanted)
}

// TagsPending returns the wanted tags of all machines.
func (t *Tx) TagsPending() ([]Tag, error) {
	return list(t, "tags", scanTag, `SELECT `+tagColumns+` FROM tags WHERE state = ?`, TagWanted)
}

// PlaceTag notes where a wanted tag is durable and which consistency it reached.
func (t *Tx) PlaceTag(id string, p dr.Position, time int64, c dr.Consistency) error {
	_, err := t.exec(`UPDATE tags SET state = ?, timeline = ?, seq = ?, time_ns = ?, consistency = ? WHERE id = ? AND state = ?`,
		TagDurable, p.Timeline, int64(p.Seq), time, c, id, TagWanted)
	if err != nil {
		return fmt.Errorf("place tag: %w", err)
	}
	return nil
}

// FailTag notes why a wanted tag can't be placed.
func (t *Tx) FailTag(id, why string) error {
	if _, err := t.exec(`UPDATE tags SET state = ?, error = ? WHERE id = ? AND state = ?`, TagFailed, why, id, TagWanted); err != nil {
		return fmt.Errorf("fail tag: %w", err)
	}
	return nil
}

// NoteTag notes why a tag is not as consistent as was asked.
func (t *Tx) NoteTag(id, detail string) error {
	if _, err := t.exec(`UPDATE tags SET detail = ? WHERE id = ?`, detail, id); err != nil {
		return fmt.Errorf("note on tag: %w", err)
	}
	return nil
}

// TagsOverdue returns the wanted tags whose deadline has passed.
func (t *Tx) TagsOverdue(now int64) ([]Tag, error) {
	return list(t, "tags", scanTag, `SELECT `+tagColumns+` FROM tags WHERE state = ? AND deadline_ns <> 0 AND deadline_ns <= ?`,
		TagWanted, now)
}

// ForgetTags deletes the tags that are no longer wanted and were made before t0:
// their history is the master target's.
func (t *Tx) ForgetTags(t0 int64) error {
	if _, err := t.exec(`DELETE FROM tags WHERE state <> ? AND created_ns < ?`, TagWanted, t0); err != nil {
		return fmt.Errorf("forget tags: %w", err)
	}
	return nil
}
