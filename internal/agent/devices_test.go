package agent

import (
	"testing"
	"time"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// TestChanges holds each row of docs/disks.md ("While the capture runs") against changeOf.
func TestChanges(t *testing.T) {
	was := blockdev.Device{
		Path: "/dev/xda1", Kind: blockdev.Partition,
		Identity: blockdev.Identity{Serial: "S", PartUUID: "P", DiskSeq: 7, Start: 512, Size: 4096, Logical: 512},
	}
	for name, c := range map[string]struct {
		code     string
		response response
		now      func(p *place, was *blockdev.Device)
		table    string
	}{
		"as it was":              {"", tell, func(*place, *blockdev.Device) {}, ""},
		"not of this machine":    {"", tell, func(p *place, _ *blockdev.Device) { p.here = nil }, ""},
		"taken out":              {diskMissing, letOff, func(p *place, _ *blockdev.Device) { p.here, p.code = nil, diskMissing }, ""},
		"another":                {diskReplaced, letOff, func(p *place, _ *blockdev.Device) { p.here, p.code = nil, diskReplaced }, ""},
		"there twice":            {diskDoubled, letOff, func(p *place, _ *blockdev.Device) { p.here, p.code = nil, diskDoubled }, ""},
		"smaller than protected": {diskShrunk, letOff, func(p *place, _ *blockdev.Device) { p.code = diskShrunk }, ""},
		"smaller":                {diskShrunk, letOff, func(p *place, _ *blockdev.Device) { p.here.Size-- }, ""},
		"being detached":         {diskMissing, letOff, func(p *place, _ *blockdev.Device) { p.here.Leaving = true }, ""},
		"detached but in use": {"", tell, func(p *place, _ *blockdev.Device) {
			p.here.Leaving, p.here.Mounts = true, []string{"/srv"}
		}, ""},
		"was to be detached": {"", tell, func(p *place, was *blockdev.Device) { p.here.Leaving, was.Leaving = true, true }, ""},
		"out and back":       {"disk-returned", anew, func(p *place, _ *blockdev.Device) { p.here.DiskSeq++ }, ""},
		"out and back, and nothing names it": {diskReplaced, anew, func(p *place, was *blockdev.Device) {
			p.here.DiskSeq++
			p.here.Serial, p.here.PartUUID, was.Serial, was.PartUUID = "", "", "", ""
		}, ""},
		"begins elsewhere":  {"partition-moved", anew, func(p *place, _ *blockdev.Device) { p.here.Start = 1024 }, ""},
		"other sectors":     {"disk-reshaped", anew, func(p *place, _ *blockdev.Device) { p.here.Logical = 4096 }, ""},
		"larger":            {"disk-grown", tell, func(p *place, _ *blockdev.Device) { p.here.Size++ }, ""},
		"another name":      {"disk-renamed", anew, func(p *place, _ *blockdev.Device) { p.Path = "/dev/xdb1" }, ""},
		"read-only":         {"disk-read-only", tell, func(p *place, _ *blockdev.Device) { p.here.ReadOnly = true }, ""},
		"other partitions":  {"disk-repartitioned", tell, func(*place, *blockdev.Device) {}, "xda1 512+1 P\n"},
		"larger, and moved": {"partition-moved", anew, func(p *place, _ *blockdev.Device) { p.here.Size, p.here.Start = 8192, 1024 }, ""},
	} {
		before, now := was, was
		p := place{Disk: capture.Disk{ID: 3, Path: "/dev/xda1", Size: 4096}, here: &now, why: "why"}
		c.now(&p, &before)
		got := changeOf(&capturedDisk{Disk: capture.Disk{ID: 3, Path: "/dev/xda1", Size: 4096}, was: before}, p, c.table)
		if got.code != c.code || got.response != c.response || (got.text == "") != (c.code == "") {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestNewDisks: a disk that appears is told once, whatever path it comes up at; what Farside makes
// itself, and what can't be protected, is not.
func TestNewDisks(t *testing.T) {
	disk := func(path, id string) found { return found{path: path, identity: id, kind: "disk", size: 512} }
	here := []found{disk("/dev/xda", "a"), disk("/dev/xdb", "")}
	seqs := map[string]uint64{"/dev/xdb": 4}
	var n newDisks
	look := func(fs ...found) (codes []string) {
		t.Helper()
		for _, c := range n.look(fs, seqs, func(f *found) bool { return f.identity == "mine" }) {
			codes = append(codes, c.code)
		}
		return codes
	}
	if got := look(here...); got != nil {
		t.Error("told at the first look:", got)
	}
	if got := look(append(here, disk("/dev/xdc", "c"), disk("/dev/xdd", "mine"))...); len(got) != 1 || got[0] != "disk-new" {
		t.Error("a new one:", got)
	}
	if got := look(disk("/dev/xde", "c"), disk("/dev/xda", "a")); got != nil {
		t.Error("told again:", got)
	}
	part, refused, crypt := disk("/dev/xda1", "p"), disk("/dev/md0", "r"), disk("/dev/dm-0", "q")
	part.kind, refused.why, crypt.kind = "partition", "it is an array", "crypt"
	if got := look(part, refused, crypt); got != nil {
		t.Error("no disks that could be protected:", got)
	}
	seqs["/dev/xdb"] = 5 // another medium
	if got := look(here...); len(got) != 1 {
		t.Error("another at the same path, and nothing names it:", got)
	}
}

// TestNewDisksOfAgent: views over NBD, memory and, unless they are asked for, loop devices, are nothing new.
func TestNewDisksOfAgent(t *testing.T) {
	m := blockdev.Machine{}
	offered := offerOf(wanted{})
	var n newDisks
	n.look(offered(&m), nil, nil)
	for _, k := range []blockdev.Kind{blockdev.NBD, blockdev.Loop, blockdev.RAM, blockdev.Zram, blockdev.Optical, blockdev.Floppy, blockdev.LVM, blockdev.Partition} {
		m.Devices = append(m.Devices, blockdev.Device{Path: "/dev/" + string(k), Kind: k})
	}
	if got := n.look(offered(&m), nil, func(*found) bool { return false }); got != nil {
		t.Error(got)
	}
	m.Devices = append(m.Devices, blockdev.Device{Path: "/dev/xda", Kind: blockdev.Disk})
	if got := n.look(offered(&m), nil, func(*found) bool { return false }); len(got) != 1 {
		t.Error(got)
	}
}

// looker plays looks of devices, one a second.
type looker struct {
	*devices
	t   *testing.T
	w   *work
	now time.Time
	m   blockdev.Machine
}

func newLooker(t *testing.T) *looker {
	l := &looker{devices: &devices{}, t: t, now: time.Unix(1000, 0)}
	l.w = &work{identities: []string{"serial:A", ""}}
	for i, path := range []string{"/dev/xda", "/dev/xdb"} {
		l.w.disks = append(l.w.disks, capture.Disk{ID: dr.DiskID(i + 1), Path: path, Size: 4096})
		l.m.Devices = append(l.m.Devices, blockdev.Device{Path: path, Name: path[5:], Identity: blockdev.Identity{DiskSeq: uint64(i + 1), Size: 4096}})
	}
	l.m.Devices[0].Serial = "A"
	l.open(2)
	return l
}

func (l *looker) places() []place {
	return locate(&l.m, l.w.disks, l.w.identities, l.known, func(string) bool { return true })
}

// open opens the capture as the agent does, and wants so many disks in it.
func (l *looker) open(want int) {
	l.t.Helper()
	places := l.places()
	present, _ := l.choose(l.w, places, l.now)
	l.opened(&l.m, places, present)
	if len(present) != want {
		l.t.Fatalf("captured %v, want %d disks", present, want)
	}
}

// sees takes a look and wants an event, and the capture to be opened anew or not.
func (l *looker) sees(code string, again bool) {
	l.t.Helper()
	l.now = l.now.Add(time.Second)
	news, got := l.look(l.places(), l.m.Table, l.now)
	said := ""
	if len(news) > 0 {
		said = news[0].code
	}
	if said != code || got != again || len(news) > 1 {
		l.t.Fatalf("at %v: %+v, opened anew: %v; want %q, %v", l.now, news, got, code, again)
	}
}

// TestDiskLeavesAndReturns: the other disk goes on; what was told is not told again.
func TestDiskLeavesAndReturns(t *testing.T) {
	l := newLooker(t)
	l.sees("", false)
	all := l.m.Devices
	l.m.Devices = all[1:]
	l.sees(diskMissing, true)
	l.sees("", false)
	l.open(1)
	l.sees("", false)
	if s := l.asideStatus(); len(s) != 1 || s[0].GetDiskId() != 1 || s[0].GetState() != "missing" || s[0].GetError() == "" {
		t.Errorf("%v", s)
	}
	absent, hold := l.absent(l.w, l.w.disks[1:])
	if len(absent) != 1 || hold == nil {
		t.Error("points without a disk of which nothing is known", absent, hold)
	}
	l.whole = map[dr.DiskID]bool{1: true}
	if _, hold := l.absent(l.w, l.w.disks[1:]); hold != nil {
		t.Error(hold)
	}
	l.m.Devices = append([]blockdev.Device{{Path: "/dev/xda", Name: "xda", Identity: blockdev.Identity{Serial: "B", Size: 4096, DiskSeq: 8}}}, all[1:]...)
	l.sees(diskReplaced, false)
	l.sees("", false)
	l.m.Devices = all
	l.sees("", false)
	l.m.Devices = all[1:] // it comes and goes
	l.sees(diskMissing, false)
	l.m.Devices = all
	l.sees("", false)
	l.sees("disk-returned", true)
	l.open(2)
	l.sees("", false)
	if s := l.asideStatus(); len(s) != 0 {
		t.Errorf("%v", s)
	}
}

// TestDetachedDiskIsLeftAlone: a device that waits for the agent to let go is not taken again at once; if somebody else
// keeps it, it is.
func TestDetachedDiskIsLeftAlone(t *testing.T) {
	l := newLooker(t)
	l.m.Devices[1].Leaving = true
	l.sees(diskMissing, true)
	l.open(1)
	l.sees("", false)
	l.sees("disk-returned", true)
	l.open(2)
	for range 5 {
		l.sees("", false)
	}
}

// TestUnopenedDisk: a disk that can't be opened is tried again ever later.
func TestUnopenedDisk(t *testing.T) {
	l := newLooker(t)
	var pauses []time.Duration
	for range 12 {
		l.unopened(l.w.disks[1], dr.ErrUnavailable, l.now)
		places := l.places()
		if present, _ := l.choose(l.w, places, l.now); len(present) != 1 {
			t.Fatal("tried again at once")
		}
		l.opened(&l.m, places, l.w.disks[:1])
		began := l.now
		for again := false; !again; l.now = l.now.Add(time.Second) {
			_, again = l.look(l.places(), l.m.Table, l.now)
		}
		pauses = append(pauses, l.now.Sub(began))
	}
	if pauses[0] < minReopen || pauses[0] > minReopen+2*time.Second || pauses[1] < 2*minReopen || pauses[11] < maxReopen || pauses[11] > maxReopen+2*time.Second {
		t.Error(pauses)
	}
	l.forget(&work{disks: l.w.disks[:1]})
	if len(l.aside) != 0 {
		t.Error("a disk that is not protected any more is missed")
	}
}
