package catalog

import (
	"encoding/json"
	"fmt"

	"farside/internal/dr"
)

// The ways to select a point.
const (
	SelectLatest   = "latest"
	SelectPosition = "position"
	SelectTime     = "time"
	SelectTag      = "tag"
)

// Selector names a point of a machine's history.
type Selector struct {
	Kind     string // one of Select*
	Position dr.Position
	Time     int64 // UTC ns
	Tag      string
}

// View is a view that is wanted, or is being closed.
type View struct {
	ID           string // UUID
	Machine      dr.MachineID
	MasterTarget dr.NodeID
	Name         string
	Selector     Selector
	Writable     bool
	Disks        []dr.DiskID // none = all
	Created      int64       // UTC ns
	Closing      bool
	Resolved     bool        // the master target said where the selector came to
	Position     dr.Position // that is where
	Branch       dr.Timeline // of a writable view
}

const viewColumns = `id, machine_id, master_target, name, selector, selector_timeline, selector_seq, selector_time_ns,
	selector_tag, writable, disks, created_ns, closing, resolved, resolved_timeline, resolved_seq, branch_timeline`

func scanView(s scanner) (v View, err error) {
	var disks string
	err = s.Scan(&v.ID, machineColumn(&v.Machine), nodeColumn(&v.MasterTarget), &v.Name, &v.Selector.Kind,
		&v.Selector.Position.Timeline, seqColumn{&v.Selector.Position.Seq}, &v.Selector.Time, &v.Selector.Tag, &v.Writable,
		&disks, &v.Created, &v.Closing, &v.Resolved, &v.Position.Timeline, seqColumn{&v.Position.Seq}, &v.Branch)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal([]byte(disks), &v.Disks); err != nil {
		return v, fmt.Errorf("disks of view %s: %w: %w", v.ID, dr.ErrCorrupt, err)
	}
	return v, nil
}

// AddView adds a view. The error wraps dr.ErrExists if its id is taken.
func (t *Tx) AddView(v View) error {
	disks, err := json.Marshal(v.Disks)
	if err != nil {
		return fmt.Errorf("add view: %w", err)
	}
	return t.change("add view", `INSERT INTO views (`+viewColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		v.ID, v.Machine.String(), v.MasterTarget.String(), v.Name, v.Selector.Kind, v.Selector.Position.Timeline,
		int64(v.Selector.Position.Seq), v.Selector.Time, v.Selector.Tag, v.Writable, string(disks), v.Created, v.Closing, v.Resolved,
		v.Position.Timeline, int64(v.Position.Seq), v.Branch)
}

// View returns a view.
func (t *Tx) View(id string) (View, error) {
	return one(t, fmt.Sprintf("view %s", id), scanView, `SELECT `+viewColumns+` FROM views WHERE id = ?`, id)
}

// ViewsNamed returns the views with a name.
func (t *Tx) ViewsNamed(name string) ([]View, error) {
	return list(t, "views", scanView, `SELECT `+viewColumns+` FROM views WHERE name = ? ORDER BY created_ns, id`, name)
}

// Views returns all views, oldest first.
func (t *Tx) Views() ([]View, error) {
	return list(t, "views", scanView, `SELECT `+viewColumns+` FROM views ORDER BY created_ns, id`)
}

// ViewsOf returns the views of a machine, oldest first.
func (t *Tx) ViewsOf(m dr.MachineID) ([]View, error) {
	return list(t, "views", scanView, `SELECT `+viewColumns+` FROM views WHERE machine_id = ? ORDER BY created_ns, id`, m.String())
}

// ViewsAt returns the views at a master target, oldest first.
func (t *Tx) ViewsAt(node dr.NodeID) ([]View, error) {
	return list(t, "views", scanView, `SELECT `+viewColumns+` FROM views WHERE master_target = ? ORDER BY created_ns, id`, node.String())
}

// CloseView marks a view to be closed; again is without effect.
func (t *Tx) CloseView(id string) error {
	return t.change("close view", `UPDATE views SET closing = TRUE WHERE id = ?`, id)
}

// ResolveView notes where a view's selector came to. Only the first time counts.
func (t *Tx) ResolveView(id string, p dr.Position) error {
	_, err := t.exec(`UPDATE views SET resolved = TRUE, resolved_timeline = ?, resolved_seq = ? WHERE id = ? AND NOT resolved`,
		p.Timeline, int64(p.Seq), id)
	if err != nil {
		return fmt.Errorf("resolve view: %w", err)
	}
	return nil
}

// DeleteView forgets a view that is closed.
func (t *Tx) DeleteView(id string) error {
	return t.change("delete view", `DELETE FROM views WHERE id = ?`, id)
}
