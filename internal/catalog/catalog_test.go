package catalog_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"farside/internal/catalog"
	"farside/internal/dr"
)

func open(t *testing.T, name string) *catalog.Catalog {
	t.Helper()
	c, err := catalog.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func fresh(t *testing.T) *catalog.Catalog {
	t.Helper()
	return open(t, filepath.Join(t.TempDir(), "catalog.db"))
}

func write(t *testing.T, c *catalog.Catalog, fn func(*catalog.Tx) error) {
	t.Helper()
	if err := c.Write(t.Context(), fn); err != nil {
		t.Fatal(err)
	}
}

// get reads one thing in a transaction of its own.
func get[T any](t *testing.T, c *catalog.Catalog, fn func(*catalog.Tx) (T, error)) T {
	t.Helper()
	var v T
	err := c.Read(t.Context(), func(tx *catalog.Tx) (err error) {
		v, err = fn(tx)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func addMachine(t *testing.T, c *catalog.Catalog, name string) catalog.Machine {
	t.Helper()
	n := catalog.Node{ID: dr.NewNodeID(), Role: "agent", Name: name, Machine: dr.NewMachineID(), Joined: 1, CertificateEnds: 2}
	m := catalog.Machine{
		ID: n.Machine, Name: name, Node: n.ID, Created: 3, Timeline: 1, LastTimeline: 1, HistoryWindow: 60,
		Codec: "zstd", RingBytes: 4, MemoryBytes: 5, CaptureDriver: "tap",
	}
	write(t, c, func(tx *catalog.Tx) error { return errors.Join(tx.AddNode(n), tx.AddMachine(m)) })
	return m
}

func TestOpen(t *testing.T) {
	for _, name := range []string{"catalog.db", "odd name ?#%41ü.db"} {
		path := filepath.Join(t.TempDir(), "below", name)
		c := open(t, path)
		write(t, c, func(tx *catalog.Tx) error { return tx.SetSetting("a", "1") })
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%q: %v, %v", name, info, err)
		}
		c = open(t, path)
		if got := get(t, c, func(tx *catalog.Tx) (string, error) { return tx.Setting("a") }); got != "1" {
			t.Errorf("%q: kept %q", name, got)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.Open(t.Context(), garbage); !errors.Is(err, dr.ErrCorrupt) {
		t.Errorf("garbage: %v", err)
	}
	newer := filepath.Join(dir, "newer.db")
	open(t, newer).Close()
	db, err := sql.Open("sqlite", newer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)`); err != nil {
		t.Fatal(err)
	}
	db.Close()
	if _, err := catalog.Open(t.Context(), newer); !errors.Is(err, dr.ErrVersion) {
		t.Errorf("newer: %v", err)
	}
	if _, err := catalog.Open(t.Context(), filepath.Join(garbage, "x.db")); err == nil {
		t.Error("a file as directory was accepted")
	}
}

func TestTransactions(t *testing.T) {
	c := fresh(t)
	boom := errors.New("boom")
	err := c.Write(t.Context(), func(tx *catalog.Tx) error {
		if err := tx.SetSetting("a", "1"); err != nil {
			return err
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if got := get(t, c, func(tx *catalog.Tx) (string, error) { return tx.Setting("a") }); got != "" {
		t.Errorf("a failed transaction left %q", got)
	}
	if err := c.Read(t.Context(), func(tx *catalog.Tx) error { return tx.SetSetting("a", "1") }); err == nil {
		t.Error("a reading transaction wrote")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Write(ctx, func(*catalog.Tx) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestConcurrentWriters(t *testing.T) {
	c := fresh(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for k := range 20 {
				do := c.Write
				if k%2 == 0 {
					do = c.Note
				}
				if err := do(t.Context(), func(tx *catalog.Tx) error {
					return tx.SetSetting(fmt.Sprintf("%d/%d", i, k), "x")
				}); err != nil {
					t.Error(err)
				}
				if err := c.Read(t.Context(), func(tx *catalog.Tx) error {
					_, err := tx.Setting(fmt.Sprintf("%d/%d", i, k))
					return err
				}); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
}

func TestNodes(t *testing.T) {
	c := fresh(t)
	long := strings.Repeat("ж", 300)
	var nodes []catalog.Node
	for i, name := range []string{"a", "a", long, "z' OR '1'='1"} {
		n := catalog.Node{ID: dr.NewNodeID(), Role: "process-server", Name: name, Joined: int64(i), CertificateEnds: 7}
		nodes = append(nodes, n)
		write(t, c, func(tx *catalog.Tx) error { return tx.AddNode(n) })
	}
	for _, n := range nodes {
		if got := get(t, c, func(tx *catalog.Tx) (catalog.Node, error) { return tx.Node(n.ID) }); got != n {
			t.Errorf("got %+v, want %+v", got, n)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Node, error) { return tx.NodesNamed("process-server", "a") }); len(got) != 2 {
		t.Errorf("named a: %v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Node, error) { return tx.NodesNamed("master-target", "a") }); len(got) != 0 {
		t.Errorf("of another role: %v", got)
	}
	var after catalog.Cursor
	seen := 0
	for {
		page := get(t, c, func(tx *catalog.Tx) ([]catalog.Node, error) { return tx.Nodes("", after, 1) })
		if len(page) == 0 {
			break
		}
		seen++
		after = catalog.Cursor{Name: page[0].Name, ID: page[0].ID.String()}
	}
	if seen != len(nodes) {
		t.Errorf("pages showed %d nodes", seen)
	}
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.AddNode(nodes[0]) }); !errors.Is(err, dr.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.SetCertificate(nodes[1].ID, 9), tx.RemoveNode(nodes[0].ID, 5))
	})
	err := c.Read(t.Context(), func(tx *catalog.Tx) error {
		_, err := tx.Node(nodes[0].ID)
		return err
	})
	if !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("removed: %v", err)
	}
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.RemoveNode(nodes[0].ID, 5) }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestReportsAndAssignments(t *testing.T) {
	c := fresh(t)
	m := addMachine(t, c, "m")
	for _, body := range []string{"first", "second"} {
		want := catalog.Report{Node: m.Node, Received: 5, Body: []byte(body)}
		if err := c.Note(t.Context(), func(tx *catalog.Tx) error { return tx.SaveReport(want) }); err != nil {
			t.Fatal(err)
		}
		if got := get(t, c, func(tx *catalog.Tx) (catalog.Report, error) { return tx.Report(m.Node) }); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Report, error) { return tx.Reports() }); len(got) != 1 {
		t.Errorf("%d reports", len(got))
	}
	if err := c.Note(t.Context(), func(tx *catalog.Tx) error {
		return tx.SaveReport(catalog.Report{Node: dr.NewNodeID()})
	}); err == nil {
		t.Error("report of nobody was kept")
	}
	if got := get(t, c, func(tx *catalog.Tx) (catalog.Assignment, error) { return tx.Assignment(m.Node) }); got.Revision != 0 {
		t.Errorf("never assigned: %+v", got)
	}
	for rev := range uint64(3) {
		want := catalog.Assignment{Revision: rev, Digest: []byte{byte(rev)}}
		write(t, c, func(tx *catalog.Tx) error { return tx.SaveAssignment(m.Node, want) })
		if got := get(t, c, func(tx *catalog.Tx) (catalog.Assignment, error) { return tx.Assignment(m.Node) }); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
	}
}

func TestMachines(t *testing.T) {
	c := fresh(t)
	m := addMachine(t, c, "web")
	addMachine(t, c, "web")
	m.Protected, m.ProcessServer, m.MasterTarget, m.LastDisk = true, dr.NewNodeID(), dr.NewNodeID(), 3
	write(t, c, func(tx *catalog.Tx) error { return tx.SaveMachine(m) })
	if got := get(t, c, func(tx *catalog.Tx) (catalog.Machine, error) { return tx.Machine(m.ID) }); got != m {
		t.Errorf("got %+v, want %+v", got, m)
	}
	for name, find := range map[string]func(*catalog.Tx) ([]catalog.Machine, error){
		"via": func(tx *catalog.Tx) ([]catalog.Machine, error) { return tx.MachinesVia(m.ProcessServer) },
		"at":  func(tx *catalog.Tx) ([]catalog.Machine, error) { return tx.MachinesAt(m.MasterTarget) },
	} {
		if got := get(t, c, find); len(got) != 1 || got[0] != m {
			t.Errorf("%s: %v", name, got)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Machine, error) { return tx.MachinesNamed("web") }); len(got) != 2 {
		t.Errorf("named: %v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Machine, error) { return tx.Machines(catalog.Cursor{}, 10) }); len(got) != 2 {
		t.Errorf("all: %v", got)
	}
	load := get(t, c, func(tx *catalog.Tx) (map[dr.NodeID]int, error) { return tx.Load() })
	if len(load) != 2 || load[m.ProcessServer] != 1 || load[m.MasterTarget] != 1 {
		t.Errorf("load %v", load)
	}
	stranger := m
	stranger.ID = dr.NewMachineID()
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.SaveMachine(stranger) }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("saving a stranger: %v", err)
	}
}

func TestDiskIDsAreNeverReused(t *testing.T) {
	c := fresh(t)
	m := addMachine(t, c, "m")
	disk := catalog.Disk{Machine: m.ID, ID: 1, Path: "/dev/sda", Size: 512, Added: 1}
	write(t, c, func(tx *catalog.Tx) error { return tx.AddDisk(disk) })
	again := disk
	again.ID = 2
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.AddDisk(again) }); !errors.Is(err, dr.ErrExists) {
		t.Errorf("path twice: %v", err)
	}
	write(t, c, func(tx *catalog.Tx) error { return tx.RemoveDisk(m.ID, 1, 9) })
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.AddDisk(disk) }); !errors.Is(err, dr.ErrExists) {
		t.Errorf("id of a removed disk: %v", err)
	}
	write(t, c, func(tx *catalog.Tx) error { return tx.AddDisk(again) })
	got := get(t, c, func(tx *catalog.Tx) ([]catalog.Disk, error) { return tx.Disks(m.ID) })
	if !reflect.DeepEqual(got, []catalog.Disk{again}) {
		t.Errorf("disks %+v", got)
	}
}

func TestViews(t *testing.T) {
	c := fresh(t)
	m := addMachine(t, c, "m")
	v := catalog.View{
		ID: dr.NewNodeID().String(), Machine: m.ID, MasterTarget: dr.NewNodeID(), Name: "drill", Writable: true, Created: 4, Branch: 7,
		Selector: catalog.Selector{Kind: catalog.SelectPosition, Position: dr.Position{Timeline: 1, Seq: 1<<63 + 5}, Time: 6, Tag: "t"},
		Disks:    []dr.DiskID{1, 2},
	}
	write(t, c, func(tx *catalog.Tx) error { return tx.AddView(v) })
	check := func(want catalog.View) {
		t.Helper()
		for name, find := range map[string]func(*catalog.Tx) ([]catalog.View, error){
			"all": (*catalog.Tx).Views,
			"at":  func(tx *catalog.Tx) ([]catalog.View, error) { return tx.ViewsAt(v.MasterTarget) },
			"of":  func(tx *catalog.Tx) ([]catalog.View, error) { return tx.ViewsOf(m.ID) },
			"as":  func(tx *catalog.Tx) ([]catalog.View, error) { return tx.ViewsNamed("drill") },
		} {
			if got := get(t, c, find); !reflect.DeepEqual(got, []catalog.View{want}) {
				t.Errorf("%s: got %+v, want %+v", name, got, want)
			}
		}
		if got := get(t, c, func(tx *catalog.Tx) (catalog.View, error) { return tx.View(v.ID) }); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
	}
	check(v)
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.ResolveView(v.ID, dr.Position{Timeline: 1, Seq: 9}), tx.ResolveView(v.ID, dr.Position{Timeline: 1, Seq: 10}), tx.CloseView(v.ID), tx.CloseView(v.ID))
	})
	v.Resolved, v.Position, v.Closing = true, dr.Position{Timeline: 1, Seq: 9}, true
	check(v)
	write(t, c, func(tx *catalog.Tx) error { return tx.DeleteView(v.ID) })
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.CloseView(v.ID) }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("closing what is gone: %v", err)
	}
}

func TestTags(t *testing.T) {
	c := fresh(t)
	m := addMachine(t, c, "m")
	tag := func(id string, deadline int64) catalog.Tag {
		return catalog.Tag{ID: id, Machine: m.ID, Name: "n", Consistency: dr.FileSystem, Created: 1, Deadline: deadline, State: catalog.TagWanted}
	}
	a, b, f := tag("a", 10), tag("b", 0), tag("f", 20)
	write(t, c, func(tx *catalog.Tx) error { return errors.Join(tx.AddTag(a), tx.AddTag(b), tx.AddTag(f)) })
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Tag, error) { return tx.TagsOverdue(10) }); !reflect.DeepEqual(got, []catalog.Tag{a}) {
		t.Errorf("overdue: %+v", got)
	}
	p := dr.Position{Timeline: 2, Seq: 3}
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.PlaceTag("a", p, 4, dr.Crash), tx.FailTag("f", "no"),
			tx.FailTag("a", "late"), tx.PlaceTag("f", p, 4, dr.Crash)) // both too late
	})
	a.State, a.Position, a.Time, a.Consistency = catalog.TagDurable, p, 4, dr.Crash
	f.State, f.Error = catalog.TagFailed, "no"
	for _, want := range []catalog.Tag{a, b, f} {
		if got := get(t, c, func(tx *catalog.Tx) (catalog.Tag, error) { return tx.Tag(want.ID) }); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Tag, error) { return tx.TagsWanted(m.ID) }); !reflect.DeepEqual(got, []catalog.Tag{b}) {
		t.Errorf("wanted: %+v", got)
	}
	if got := get(t, c, (*catalog.Tx).TagsPending); !reflect.DeepEqual(got, []catalog.Tag{b}) {
		t.Errorf("pending: %+v", got)
	}
	write(t, c, func(tx *catalog.Tx) error { return tx.ForgetTags(100) })
	if err := c.Read(t.Context(), func(tx *catalog.Tx) error { _, err := tx.Tag("a"); return err }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("forgotten: %v", err)
	}
}

func TestGroups(t *testing.T) {
	c := fresh(t)
	a, b := addMachine(t, c, "a"), addMachine(t, c, "b")
	a.ProcessServer = dr.NewNodeID()
	g := catalog.Group{ID: "g", Name: "shop", HoldLimit: 300, TagEvery: 60, Consistency: dr.FileSystem, Created: 1}
	other := catalog.Group{ID: "o", Name: "other", Consistency: dr.Application}
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.SaveMachine(a), tx.AddGroup(g), tx.AddGroup(other), tx.AddMember("g", a.ID), tx.AddMember("g", b.ID))
	})
	for what, fn := range map[string]func(*catalog.Tx) error{
		"a second group of the name": func(tx *catalog.Tx) error { return tx.AddGroup(catalog.Group{ID: "x", Name: "shop"}) },
		"a machine in two groups":    func(tx *catalog.Tx) error { return tx.AddMember("o", a.ID) },
	} {
		if err := c.Write(t.Context(), fn); !errors.Is(err, dr.ErrExists) {
			t.Errorf("%s: %v", what, err)
		}
	}
	g.HoldLimit, g.TagEvery, g.Consistency = 100, 0, dr.Application
	write(t, c, func(tx *catalog.Tx) error { return tx.SaveGroup(g) })
	for _, key := range []string{"g", "shop"} {
		if got := get(t, c, func(tx *catalog.Tx) (catalog.Group, error) { return tx.Group(key) }); got != g {
			t.Errorf("group %q: %+v", key, got)
		}
	}
	if got := get(t, c, func(tx *catalog.Tx) (catalog.Group, error) { return tx.GroupOf(b.ID) }); got != g {
		t.Errorf("group of b: %+v", got)
	}
	if got := get(t, c, (*catalog.Tx).Groups); len(got) != 2 || got[0] != other {
		t.Errorf("groups: %+v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.Machine, error) { return tx.Members("g") }); len(got) != 2 {
		t.Errorf("members: %+v", got)
	}

	tag := func(id string, deadline int64) catalog.GroupTag {
		return catalog.GroupTag{ID: id, Group: "g", Name: "n", Consistency: dr.FileSystem, Created: 2, Deadline: deadline, State: catalog.TagWanted}
	}
	first, late := tag("1", 100), tag("2", 50)
	write(t, c, func(tx *catalog.Tx) error { return errors.Join(tx.AddGroupTag(first), tx.AddGroupTag(late)) })
	leaders := []dr.NodeID{}
	write(t, c, func(tx *catalog.Tx) (err error) {
		leaders, err = tx.ExpireGroupTags(50, "late")
		return err
	})
	if !slices.Contains(leaders, a.ProcessServer) {
		t.Errorf("leaders %v", leaders)
	}
	late.State, late.Error = catalog.TagFailed, "late"
	if got := get(t, c, func(tx *catalog.Tx) ([]catalog.GroupTag, error) { return tx.GroupTagsWanted("g") }); !reflect.DeepEqual(got, []catalog.GroupTag{first}) {
		t.Errorf("wanted: %+v", got)
	}
	first.State, first.Time, first.Held = catalog.TagDurable, 7, 12*time.Millisecond
	write(t, c, func(tx *catalog.Tx) error {
		wrong := late
		wrong.State = catalog.TagDurable // too late
		return errors.Join(tx.ConcludeGroupTag(first), tx.ConcludeGroupTag(wrong))
	})
	for _, want := range []catalog.GroupTag{first, late} {
		if got := get(t, c, func(tx *catalog.Tx) (catalog.GroupTag, error) { return tx.GroupTag(want.ID) }); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.ForgetGroupTags(100), tx.RemoveMembers("g"), tx.DeleteGroup("g"))
	})
	if err := c.Read(t.Context(), func(tx *catalog.Tx) error { _, err := tx.GroupTag("1"); return err }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("forgotten: %v", err)
	}
}

func TestAccess(t *testing.T) {
	c := fresh(t)
	u := catalog.User{ID: "u", Name: "admin", Role: "administrator", Created: 1}
	a := catalog.APIToken{ID: "t", User: "u", Name: "first", Hash: []byte{1}, Created: 2, Expires: 3}
	j := catalog.JoinToken{ID: "j", Hash: []byte{2}, Role: "agent", Name: "n", Created: 1, Expires: 9}
	write(t, c, func(tx *catalog.Tx) error { return errors.Join(tx.AddUser(u), tx.AddAPIToken(a), tx.AddJoinToken(j)) })
	if got := get(t, c, func(tx *catalog.Tx) (catalog.User, error) { return tx.UserNamed("admin") }); got != u {
		t.Errorf("user %+v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) (catalog.User, error) { return tx.User("u") }); got != u {
		t.Errorf("user %+v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) (catalog.APIToken, error) { return tx.APIToken("t") }); !reflect.DeepEqual(got, a) {
		t.Errorf("API token %+v", got)
	}
	if got := get(t, c, func(tx *catalog.Tx) (catalog.JoinToken, error) { return tx.JoinToken("j") }); !reflect.DeepEqual(got, j) {
		t.Errorf("join token %+v", got)
	}
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.AddUser(catalog.User{ID: "v", Name: "admin"}) }); !errors.Is(err, dr.ErrExists) {
		t.Errorf("second admin: %v", err)
	}
	node := dr.NewNodeID()
	write(t, c, func(tx *catalog.Tx) error { return tx.UseJoinToken("j", node, []byte{8}, 5) })
	if err := c.Write(t.Context(), func(tx *catalog.Tx) error { return tx.UseJoinToken("j", node, []byte{8}, 5) }); !errors.Is(err, dr.ErrNotFound) {
		t.Errorf("used twice: %v", err)
	}
	got := get(t, c, func(tx *catalog.Tx) (catalog.JoinToken, error) { return tx.JoinToken("j") })
	if got.Used != 5 || got.UsedBy != node || string(got.UsedKey) != "\x08" {
		t.Errorf("used %+v", got)
	}
	write(t, c, func(tx *catalog.Tx) error {
		return errors.Join(tx.DeleteAPITokens("u", "first"), tx.ForgetJoinTokens(10))
	})
	for name, find := range map[string]func(*catalog.Tx) error{
		"API token":  func(tx *catalog.Tx) error { _, err := tx.APIToken("t"); return err },
		"join token": func(tx *catalog.Tx) error { _, err := tx.JoinToken("j"); return err },
		"user":       func(tx *catalog.Tx) error { _, err := tx.UserNamed("x"); return err },
	} {
		if err := c.Read(t.Context(), find); !errors.Is(err, dr.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
