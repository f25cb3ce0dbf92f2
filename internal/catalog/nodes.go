package catalog

import (
	"fmt"

	"farside/internal/dr"
)

// Node is a node that joined.
type Node struct {
	ID              dr.NodeID
	Role            string
	Name            string
	Machine         dr.MachineID // agents only
	Joined          int64        // UTC ns
	CertificateEnds int64        // UTC ns, of the newest certificate
	Removed         int64        // UTC ns; 0 = it is a member
}

const nodeColumns = `id, role, name, machine_id, joined_ns, certificate_ends_ns, removed_ns`

func scanNode(s scanner) (n Node, err error) {
	err = s.Scan(nodeColumn(&n.ID), &n.Role, &n.Name, machineColumn(&n.Machine), &n.Joined, &n.CertificateEnds, &n.Removed)
	return n, err
}

// AddNode adds a node.
func (t *Tx) AddNode(n Node) error {
	return t.change("add node", `INSERT INTO nodes (`+nodeColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)`,
		n.ID.String(), n.Role, n.Name, textOf(n.Machine), n.Joined, n.CertificateEnds, n.Removed)
}

// Node returns a member; the error wraps dr.ErrNotFound for a removed one too.
func (t *Tx) Node(id dr.NodeID) (Node, error) {
	return one(t, fmt.Sprintf("node %s", id), scanNode,
		`SELECT `+nodeColumns+` FROM nodes WHERE id = ? AND removed_ns = 0`, id.String())
}

// NodesNamed returns the members of a role, or of any if it is "", with a name.
func (t *Tx) NodesNamed(role, name string) ([]Node, error) {
	return list(t, "nodes", scanNode, `SELECT `+nodeColumns+` FROM nodes
		WHERE name = ? AND (role = ? OR ? = '') AND removed_ns = 0 ORDER BY id`, name, role, role)
}

// Nodes returns up to limit members of a role, or of any if it is "", ordered by
// name and id, after the given ones.
func (t *Tx) Nodes(role string, after Cursor, limit int) ([]Node, error) {
	return list(t, "nodes", scanNode, `SELECT `+nodeColumns+` FROM nodes
		WHERE removed_ns = 0 AND (role = ? OR ? = '') AND (name, id) > (?, ?) ORDER BY name, id LIMIT ?`,
		role, role, after.Name, after.ID, limit)
}

// Cursor is where a listing by name and id goes on: behind that row.
type Cursor struct{ Name, ID string }

// SetCertificate notes when the newest certificate of a node ends.
func (t *Tx) SetCertificate(id dr.NodeID, ends int64) error {
	return t.change("set certificate of node", `UPDATE nodes SET certificate_ends_ns = ? WHERE id = ?`, ends, id.String())
}

// RemoveNode ends a node's membership; it stays in the catalog.
func (t *Tx) RemoveNode(id dr.NodeID, now int64) error {
	return t.change("remove node", `UPDATE nodes SET removed_ns = ? WHERE id = ? AND removed_ns = 0`, now, id.String())
}

// Report is what a node said last.
type Report struct {
	Node     dr.NodeID
	Received int64 // UTC ns
	Body     []byte
}

func scanReport(s scanner) (r Report, err error) {
	err = s.Scan(nodeColumn(&r.Node), &r.Received, &r.Body)
	return r, err
}

// SaveReport replaces a node's report.
func (t *Tx) SaveReport(r Report) error {
	return t.change("save report", `INSERT INTO reports (node_id, received_ns, body) VALUES (?, ?, ?)
		ON CONFLICT (node_id) DO UPDATE SET received_ns = excluded.received_ns, body = excluded.body`,
		r.Node.String(), r.Received, r.Body)
}

// Report returns a node's report.
func (t *Tx) Report(node dr.NodeID) (Report, error) {
	return one(t, "report", scanReport, `SELECT node_id, received_ns, body FROM reports WHERE node_id = ?`, node.String())
}

// Reports returns all nodes' reports.
func (t *Tx) Reports() ([]Report, error) {
	return list(t, "reports", scanReport, `SELECT node_id, received_ns, body FROM reports`)
}

// Assignment is what the catalog remembers of a node's assignment: enough to
// number its versions.
type Assignment struct {
	Revision uint64
	Digest   []byte // of the content without the revision
}

// Assignment returns the newest assignment of a node; a zero value if it never had one.
func (t *Tx) Assignment(node dr.NodeID) (Assignment, error) {
	all, err := list(t, "assignment", func(s scanner) (a Assignment, err error) {
		err = s.Scan(&a.Revision, &a.Digest)
		return a, err
	}, `SELECT revision, digest FROM assignments WHERE node_id = ?`, node.String())
	if err != nil || len(all) == 0 {
		return Assignment{}, err
	}
	return all[0], nil
}

// SaveAssignment replaces the newest assignment of a node.
func (t *Tx) SaveAssignment(node dr.NodeID, a Assignment) error {
	return t.change("save assignment", `INSERT INTO assignments (node_id, revision, digest) VALUES (?, ?, ?)
		ON CONFLICT (node_id) DO UPDATE SET revision = excluded.revision, digest = excluded.digest`,
		node.String(), int64(a.Revision), a.Digest)
}
