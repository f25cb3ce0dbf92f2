package catalog

import (
	"fmt"

	"farside/internal/dr"
)

// Machine is a machine that has an agent.
type Machine struct {
	ID            dr.MachineID
	Name          string
	Node          dr.NodeID // its agent
	Created       int64     // UTC ns
	Protected     bool
	Retired       bool        // was protected once: its history may still be wanted
	Timeline      dr.Timeline // the current one
	LastTimeline  dr.Timeline // the highest that was ever given out
	LastDisk      dr.DiskID   // the highest that was ever given out
	ProcessServer dr.NodeID
	MasterTarget  dr.NodeID
	HistoryWindow int64 // seconds
	Codec         string
	RingBytes     int64
	MemoryBytes   int64
	CaptureDriver string
	Points        PointSchedule
}

// PointSchedule says how often points are made without being asked for.
type PointSchedule struct {
	FileSystemEvery  int64 // ms; 0 = never
	ApplicationEvery int64 // ms; 0 = never
	FreezeLimit      int64 // ms; 0 = the agent's default
}

const machineColumns = `id, name, node_id, created_ns, protected, retired, timeline, last_timeline, last_disk,
	process_server, master_target, history_window_s, codec, ring_bytes, memory_bytes, capture_driver,
	filesystem_points_ms, application_points_ms, freeze_limit_ms`

func scanMachine(s scanner) (m Machine, err error) {
	err = s.Scan(machineColumn(&m.ID), &m.Name, nodeColumn(&m.Node), &m.Created, &m.Protected, &m.Retired, &m.Timeline,
		&m.LastTimeline, &m.LastDisk, nodeColumn(&m.ProcessServer), nodeColumn(&m.MasterTarget), &m.HistoryWindow,
		&m.Codec, &m.RingBytes, &m.MemoryBytes, &m.CaptureDriver,
		&m.Points.FileSystemEvery, &m.Points.ApplicationEvery, &m.Points.FreezeLimit)
	return m, err
}

func (m Machine) values() []any {
	return []any{
		m.ID.String(), m.Name, m.Node.String(), m.Created, m.Protected, m.Retired, m.Timeline,
		m.LastTimeline, m.LastDisk, textOf(m.ProcessServer), textOf(m.MasterTarget), m.HistoryWindow,
		m.Codec, m.RingBytes, m.MemoryBytes, m.CaptureDriver,
		m.Points.FileSystemEvery, m.Points.ApplicationEvery, m.Points.FreezeLimit,
	}
}

// AddMachine adds a machine; its node must be there already.
func (t *Tx) AddMachine(m Machine) error {
	return t.change("add machine", `INSERT INTO machines (`+machineColumns+`)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, m.values()...)
}

// SaveMachine replaces a machine's row.
func (t *Tx) SaveMachine(m Machine) error {
	return t.change("save machine", `UPDATE machines SET (`+machineColumns+`)
		= (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ?`, append(m.values(), m.ID.String())...)
}

// Machine returns a machine.
func (t *Tx) Machine(id dr.MachineID) (Machine, error) {
	return one(t, fmt.Sprintf("machine %s", id), scanMachine, `SELECT `+machineColumns+` FROM machines WHERE id = ?`, id.String())
}

// MachinesNamed returns the machines with a name.
func (t *Tx) MachinesNamed(name string) ([]Machine, error) {
	return list(t, "machines", scanMachine, `SELECT `+machineColumns+` FROM machines WHERE name = ? ORDER BY id`, name)
}

// Machines returns up to limit machines ordered by name and id, after the given ones.
func (t *Tx) Machines(after Cursor, limit int) ([]Machine, error) {
	return list(t, "machines", scanMachine, `SELECT `+machineColumns+` FROM machines
		WHERE (name, id) > (?, ?) ORDER BY name, id LIMIT ?`, after.Name, after.ID, limit)
}

// MachinesVia returns the machines whose process server is the node.
func (t *Tx) MachinesVia(node dr.NodeID) ([]Machine, error) {
	return list(t, "machines", scanMachine, `SELECT `+machineColumns+` FROM machines WHERE process_server = ? ORDER BY id`, node.String())
}

// MachinesAt returns the machines whose master target is the node.
func (t *Tx) MachinesAt(node dr.NodeID) ([]Machine, error) {
	return list(t, "machines", scanMachine, `SELECT `+machineColumns+` FROM machines WHERE master_target = ? ORDER BY id`, node.String())
}

// Load returns how many protected machines each process server and master target has.
func (t *Tx) Load() (map[dr.NodeID]int, error) {
	type count struct {
		node dr.NodeID
		n    int
	}
	all, err := list(t, "load", func(s scanner) (c count, err error) {
		err = s.Scan(nodeColumn(&c.node), &c.n)
		return c, err
	}, `SELECT process_server, COUNT(*) FROM machines WHERE protected GROUP BY process_server
		UNION ALL SELECT master_target, COUNT(*) FROM machines WHERE protected GROUP BY master_target`)
	load := make(map[dr.NodeID]int, len(all))
	for _, c := range all {
		load[c.node] += c.n
	}
	return load, err
}

// Disk is a disk that is or was protected.
type Disk struct {
	Machine dr.MachineID
	ID      dr.DiskID
	Path    string
	Size    int64 // bytes
	Added   int64 // UTC ns
	Removed int64 // UTC ns; 0 = it is protected
	// Identity names the disk whatever its path, as its agent said; "" if nothing does.
	Identity string
}

func scanDisk(s scanner) (d Disk, err error) {
	err = s.Scan(machineColumn(&d.Machine), &d.ID, &d.Path, &d.Size, &d.Added, &d.Removed, &d.Identity)
	return d, err
}

// AddDisk adds a disk. The error wraps dr.ErrExists if its id was ever used or its
// path is protected.
func (t *Tx) AddDisk(d Disk) error {
	return t.change("add disk", `INSERT INTO disks (machine_id, id, path, size, added_ns, removed_ns, identity) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		d.Machine.String(), d.ID, d.Path, d.Size, d.Added, d.Removed, d.Identity)
}

// RemoveDisk ends the protection of a disk; its id stays taken.
func (t *Tx) RemoveDisk(m dr.MachineID, id dr.DiskID, now int64) error {
	return t.change("remove disk", `UPDATE disks SET removed_ns = ? WHERE machine_id = ? AND id = ? AND removed_ns = 0`, now, m.String(), id)
}

// GrowDisk notes that a protected disk is larger now. One that is not larger stays as it is.
func (t *Tx) GrowDisk(m dr.MachineID, id dr.DiskID, size int64) error {
	return t.change("grow disk", `UPDATE disks SET size = ? WHERE machine_id = ? AND id = ? AND removed_ns = 0 AND size < ?`, size, m.String(), id, size)
}

// Disks returns the protected disks of a machine, by id.
func (t *Tx) Disks(m dr.MachineID) ([]Disk, error) {
	return list(t, "disks", scanDisk, `SELECT machine_id, id, path, size, added_ns, removed_ns, identity FROM disks
		WHERE machine_id = ? AND removed_ns = 0 ORDER BY id`, m.String())
}
