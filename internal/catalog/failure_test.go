package catalog_test

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"farside/internal/catalog"
	"farside/internal/dr"
)

// calls is every question and change that a transaction offers.
func calls() map[string]func(*catalog.Tx) error {
	node, machine := dr.NewNodeID(), dr.NewMachineID()
	drop := func(_ any, err error) error { return err }
	return map[string]func(*catalog.Tx) error{
		"AddNode":          func(tx *catalog.Tx) error { return tx.AddNode(catalog.Node{ID: node}) },
		"Node":             func(tx *catalog.Tx) error { return drop(tx.Node(node)) },
		"NodesNamed":       func(tx *catalog.Tx) error { return drop(tx.NodesNamed("", "n")) },
		"Nodes":            func(tx *catalog.Tx) error { return drop(tx.Nodes("", catalog.Cursor{}, 1)) },
		"SetCertificate":   func(tx *catalog.Tx) error { return tx.SetCertificate(node, 1) },
		"RemoveNode":       func(tx *catalog.Tx) error { return tx.RemoveNode(node, 1) },
		"SaveReport":       func(tx *catalog.Tx) error { return tx.SaveReport(catalog.Report{Node: node}) },
		"Report":           func(tx *catalog.Tx) error { return drop(tx.Report(node)) },
		"Reports":          func(tx *catalog.Tx) error { return drop(tx.Reports()) },
		"Assignment":       func(tx *catalog.Tx) error { return drop(tx.Assignment(node)) },
		"SaveAssignment":   func(tx *catalog.Tx) error { return tx.SaveAssignment(node, catalog.Assignment{}) },
		"AddMachine":       func(tx *catalog.Tx) error { return tx.AddMachine(catalog.Machine{ID: machine}) },
		"SaveMachine":      func(tx *catalog.Tx) error { return tx.SaveMachine(catalog.Machine{ID: machine}) },
		"Machine":          func(tx *catalog.Tx) error { return drop(tx.Machine(machine)) },
		"MachinesNamed":    func(tx *catalog.Tx) error { return drop(tx.MachinesNamed("m")) },
		"Machines":         func(tx *catalog.Tx) error { return drop(tx.Machines(catalog.Cursor{}, 1)) },
		"MachinesVia":      func(tx *catalog.Tx) error { return drop(tx.MachinesVia(node)) },
		"MachinesAt":       func(tx *catalog.Tx) error { return drop(tx.MachinesAt(node)) },
		"Load":             func(tx *catalog.Tx) error { return drop(tx.Load()) },
		"AddDisk":          func(tx *catalog.Tx) error { return tx.AddDisk(catalog.Disk{Machine: machine}) },
		"RemoveDisk":       func(tx *catalog.Tx) error { return tx.RemoveDisk(machine, 1, 1) },
		"Disks":            func(tx *catalog.Tx) error { return drop(tx.Disks(machine)) },
		"AddView":          func(tx *catalog.Tx) error { return tx.AddView(catalog.View{ID: "v"}) },
		"View":             func(tx *catalog.Tx) error { return drop(tx.View("v")) },
		"ViewsNamed":       func(tx *catalog.Tx) error { return drop(tx.ViewsNamed("v")) },
		"Views":            func(tx *catalog.Tx) error { return drop(tx.Views()) },
		"ViewsOf":          func(tx *catalog.Tx) error { return drop(tx.ViewsOf(machine)) },
		"ViewsAt":          func(tx *catalog.Tx) error { return drop(tx.ViewsAt(node)) },
		"CloseView":        func(tx *catalog.Tx) error { return tx.CloseView("v") },
		"ResolveView":      func(tx *catalog.Tx) error { return tx.ResolveView("v", dr.Position{}) },
		"DeleteView":       func(tx *catalog.Tx) error { return tx.DeleteView("v") },
		"AddTag":           func(tx *catalog.Tx) error { return tx.AddTag(catalog.Tag{ID: "t"}) },
		"Tag":              func(tx *catalog.Tx) error { return drop(tx.Tag("t")) },
		"TagsWanted":       func(tx *catalog.Tx) error { return drop(tx.TagsWanted(machine)) },
		"TagsPending":      func(tx *catalog.Tx) error { return drop(tx.TagsPending()) },
		"TagsOverdue":      func(tx *catalog.Tx) error { return drop(tx.TagsOverdue(1)) },
		"PlaceTag":         func(tx *catalog.Tx) error { return tx.PlaceTag("t", dr.Position{}, 1, dr.Crash) },
		"FailTag":          func(tx *catalog.Tx) error { return tx.FailTag("t", "x") },
		"ForgetTags":       func(tx *catalog.Tx) error { return tx.ForgetTags(1) },
		"AddUser":          func(tx *catalog.Tx) error { return tx.AddUser(catalog.User{ID: "u"}) },
		"User":             func(tx *catalog.Tx) error { return drop(tx.User("u")) },
		"AddGroup":         func(tx *catalog.Tx) error { return tx.AddGroup(catalog.Group{ID: "g"}) },
		"SaveGroup":        func(tx *catalog.Tx) error { return tx.SaveGroup(catalog.Group{ID: "g"}) },
		"DeleteGroup":      func(tx *catalog.Tx) error { return tx.DeleteGroup("g") },
		"Group":            func(tx *catalog.Tx) error { return drop(tx.Group("g")) },
		"Groups":           func(tx *catalog.Tx) error { return drop(tx.Groups()) },
		"GroupOf":          func(tx *catalog.Tx) error { return drop(tx.GroupOf(machine)) },
		"Members":          func(tx *catalog.Tx) error { return drop(tx.Members("g")) },
		"AddMember":        func(tx *catalog.Tx) error { return tx.AddMember("g", machine) },
		"RemoveMembers":    func(tx *catalog.Tx) error { return tx.RemoveMembers("g") },
		"AddGroupTag":      func(tx *catalog.Tx) error { return tx.AddGroupTag(catalog.GroupTag{ID: "t"}) },
		"GroupTag":         func(tx *catalog.Tx) error { return drop(tx.GroupTag("t")) },
		"GroupTagsWanted":  func(tx *catalog.Tx) error { return drop(tx.GroupTagsWanted("g")) },
		"ConcludeGroupTag": func(tx *catalog.Tx) error { return tx.ConcludeGroupTag(catalog.GroupTag{ID: "t"}) },
		"ExpireGroupTags":  func(tx *catalog.Tx) error { return drop(tx.ExpireGroupTags(1, "late")) },
		"ForgetGroupTags":  func(tx *catalog.Tx) error { return tx.ForgetGroupTags(1) },
		"UserNamed":        func(tx *catalog.Tx) error { return drop(tx.UserNamed("u")) },
		"AddAPIToken":      func(tx *catalog.Tx) error { return tx.AddAPIToken(catalog.APIToken{ID: "a"}) },
		"APIToken":         func(tx *catalog.Tx) error { return drop(tx.APIToken("a")) },
		"DeleteAPITokens":  func(tx *catalog.Tx) error { return tx.DeleteAPITokens("u", "n") },
		"AddJoinToken":     func(tx *catalog.Tx) error { return tx.AddJoinToken(catalog.JoinToken{ID: "j"}) },
		"JoinToken":        func(tx *catalog.Tx) error { return drop(tx.JoinToken("j")) },
		"UseJoinToken":     func(tx *catalog.Tx) error { return tx.UseJoinToken("j", node, []byte{1}, 1) },
		"ForgetJoinTokens": func(tx *catalog.Tx) error { return tx.ForgetJoinTokens(1) },
		"Setting":          func(tx *catalog.Tx) error { return drop(tx.Setting("s")) },
		"SetSetting":       func(tx *catalog.Tx) error { return tx.SetSetting("s", "1") },
	}
}

// TestFailuresAreTold: no call hides that the database failed under it, and each
// error says what it was about.
func TestFailuresAreTold(t *testing.T) {
	c := fresh(t)
	for name, call := range calls() {
		ctx, cancel := context.WithCancel(t.Context())
		err := c.Write(ctx, func(tx *catalog.Tx) error {
			cancel()
			return call(tx)
		})
		if err == nil {
			t.Errorf("%s: no error", name)
		} else if !strings.Contains(err.Error(), ":") {
			t.Errorf("%s: error without a verb: %v", name, err)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) (string, error) { return tx.Setting("s") }); got != "" {
		t.Error("a failed transaction left something")
	}
}

// TestCorruptRows: what can't be in the database is told as corruption.
func TestCorruptRows(t *testing.T) {
	name := filepath.Join(t.TempDir(), "c.db")
	c := open(t, name)
	m := addMachine(t, c, "m")
	write(t, c, func(tx *catalog.Tx) error { return tx.AddView(catalog.View{ID: "v", Machine: m.ID}) })
	db, err := sql.Open("sqlite", name)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for statement, call := range map[string]func(*catalog.Tx) error{
		`UPDATE nodes SET machine_id = 'x'`:      func(tx *catalog.Tx) error { _, err := tx.Node(m.Node); return err },
		`UPDATE machines SET process_server = 5`: func(tx *catalog.Tx) error { _, err := tx.Machine(m.ID); return err },
		`UPDATE views SET disks = '['`:           func(tx *catalog.Tx) error { _, err := tx.View("v"); return err },
	} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
		if err := c.Read(t.Context(), call); err == nil || !strings.Contains(err.Error(), "corrupt") && !strings.Contains(err.Error(), "invalid") {
			t.Errorf("%s: %v", statement, err)
		}
	}
}
