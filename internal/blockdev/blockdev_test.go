package blockdev

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

var update = flag.Bool("update", false, "write what is found into the recorded topologies, to be read before it is committed")

// recorded reads a topology: a file a line, "path = content", then what is expected.
func recorded(text string) (fstest.MapFS, string) {
	files, want, _ := strings.Cut(text, "---\n")
	m := fstest.MapFS{}
	for line := range strings.Lines(files) {
		name, content, ok := strings.Cut(line, " = ")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		f := m[name]
		if f == nil {
			f = &fstest.MapFile{}
			m[name] = f
		}
		f.Data = append(f.Data, content...)
	}
	return m, want
}

func render(m Machine) string {
	var b strings.Builder
	for i := range m.Devices {
		d := &m.Devices[i]
		fmt.Fprintf(&b, "%s %s %d, blocks %d/%d, %q, below %v\n", d.Path, d.Kind, d.Size, d.Logical, d.Physical, d.Stable(), m.Below(*d))
		v := m.Judge(*d)
		if v.Refused != "" {
			fmt.Fprintf(&b, "  refused: %s\n", v.Refused)
		}
		for _, n := range v.Notes {
			fmt.Fprintf(&b, "  note: %s\n", n)
		}
	}
	for _, t := range m.Twins() {
		fmt.Fprintf(&b, "twins: %v\n", t)
	}
	for _, f := range m.SwapFiles {
		fmt.Fprintf(&b, "swap file: %s\n", f)
	}
	return b.String()
}

// TestTopologies holds the rows of docs/disks.md against recorded machines.
func TestTopologies(t *testing.T) {
	names, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(names) < 10 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			root, want := recorded(string(b))
			got := render(Scan(root))
			if *update {
				files, _, _ := strings.Cut(string(b), "---\n")
				if err := os.WriteFile(name, []byte(files+"---\n"+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// TestPathsAreRefused: a path of a multipath map shows no writes, so nothing may make it
// protectable, not its partitions either.
func TestPathsAreRefused(t *testing.T) {
	m := Machine{Devices: []Device{
		{Name: "sda", Path: "/dev/sda", Kind: Disk, Holders: []string{"dm-0"}},
		{Name: "sda1", Path: "/dev/sda1", Kind: Partition, Whole: "sda"},
		{Name: "dm-0", Path: "/dev/dm-0", Kind: Multipath, Slaves: []string{"sda"}},
	}}
	for _, d := range m.Devices {
		if m.Judge(d).Refused == "" {
			t.Errorf("%s is not refused", d.Path)
		}
	}
}

// TestCircles: what sysfs says is followed only so far.
func TestCircles(t *testing.T) {
	m := Machine{Devices: []Device{
		{Name: "dm-0", Path: "/dev/dm-0", Kind: LVM, Slaves: []string{"dm-1"}, Holders: []string{"dm-1"}},
		{Name: "dm-1", Path: "/dev/dm-1", Kind: LVM, Slaves: []string{"dm-0", "gone"}, Holders: []string{"dm-0", "gone"}},
	}}
	if got := m.Below(m.Devices[0]); len(got) != 1 {
		t.Error(got)
	}
	if got := m.above(m.Devices[0], func(Device) bool { return true }); len(got) != 1 {
		t.Error(got)
	}
}

func TestCompare(t *testing.T) {
	was := Identity{Serial: "S", WWID: "W", PartUUID: "P", DiskSeq: 7, Start: 512, Size: 4096, Logical: 512}
	for _, c := range []struct {
		want   Difference
		change func(*Identity)
	}{
		{Same, func(*Identity) {}},
		{Same, func(d *Identity) { d.Dev = "8:16" }},
		{Same, func(d *Identity) { *d = Identity{Start: d.Start, Size: d.Size} }},
		{Grown, func(d *Identity) { d.Size++ }},
		{Shrunk, func(d *Identity) { d.Size-- }},
		{Reshaped, func(d *Identity) { d.Logical, d.Size = 4096, 8192 }},
		{Moved, func(d *Identity) { d.Start, d.Size = 1024, 8192 }},
		{Replaced, func(d *Identity) { d.Serial = "T" }},
		{Replaced, func(d *Identity) { d.WWID, d.Size = "T", 8192 }},
		{Replaced, func(d *Identity) { d.PartUUID = "T" }},
		{Replaced, func(d *Identity) { d.DiskSeq, d.Size = 8, 8192 }},
	} {
		now := was
		c.change(&now)
		if got := was.Compare(&now); got != c.want {
			t.Errorf("%+v: %v, want %v", now, got, c.want)
		}
	}
}

func TestStable(t *testing.T) {
	for want, id := range map[string]Identity{
		"":                      {Dev: "8:0", DiskSeq: 4, Size: 512},
		"serial:S":              {Serial: "S"},
		"wwid:W":                {Serial: "S", WWID: "W"},
		"wwid:W/start:1024":     {WWID: "W", Start: 1024},
		"wwid:W/partuuid:ab-01": {WWID: "W", PartUUID: "AB-01", Start: 1024},
		"partuuid:ab-01":        {PartUUID: "AB-01", Start: 1024},
	} {
		if got := id.Stable(); got != want {
			t.Errorf("%+v: %q, want %q", id, got, want)
		}
	}
}

func TestPageSerial(t *testing.T) {
	for want, page := range map[string]string{
		"ABC": "\x00\x80\x00\x05 ABC ", "AB": "\x00\x80\x00\xffAB", "": "\x00\x83\x00\x02AB",
	} {
		if got := pageSerial([]byte(page)); got != want {
			t.Errorf("%q: %q, want %q", page, got, want)
		}
	}
}

// FuzzScan: whatever lies in sysfs, there is an answer.
func FuzzScan(f *testing.F) {
	names, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Fuzz(func(t *testing.T, text string) {
		root, _ := recorded(text)
		m := Scan(root)
		_ = render(m)
		for i := range m.Devices {
			d := &m.Devices[i]
			if d.Size <= 0 && d.Kind != Partition || d.Identity.Compare(&d.Identity) != Same {
				t.Errorf("%+v", d)
			}
		}
	})
}

// TestScanHere: on this machine, whatever it is, nothing is contradictory.
func TestScanHere(t *testing.T) {
	m := Scan(os.DirFS("/"))
	for _, d := range m.Devices {
		if d.Path == "" || d.Kind == "" || d.Size%sector != 0 {
			t.Errorf("%+v", d)
		}
	}
}

func TestInFlight(t *testing.T) {
	root := fstest.MapFS{
		"sys/class/block/sda/inflight":        {Data: []byte("       3        7\n")},
		"sys/class/block/cciss!c0d0/inflight": {Data: []byte("0 0\n")},
		"sys/class/block/bad/inflight":        {Data: []byte("0\n")},
	}
	for device, want := range map[string]int{"/dev/sda": 7, "/dev/cciss/c0d0": 0, "/dev/bad": -1, "/dev/none": -1, "/srv/../x": -1} {
		n, ok := InFlight(root, device)
		if ok != (want >= 0) || ok && n != want {
			t.Errorf("%s: %d, %v", device, n, ok)
		}
	}
}

func TestWritten(t *testing.T) {
	root := fstest.MapFS{
		"sys/class/block/sda/stat":  {Data: []byte("  10 0 80 5 7 2 96 1 0 4 6 0 0 0 0 0 0\n")},
		"sys/class/block/few/stat":  {Data: []byte("10 0 80 5 7 2\n")},
		"sys/class/block/bad/stat":  {Data: []byte("10 0 80 5 7 2 x 1\n")},
		"sys/class/block/huge/stat": {Data: []byte("10 0 80 5 7 2 18446744073709551615 1\n")},
	}
	if n, ok := Written(root, "/dev/sda"); !ok || n != 96*512 {
		t.Errorf("%d, %v", n, ok)
	}
	for _, device := range []string{"/dev/few", "/dev/bad", "/dev/huge", "/dev/none", "/srv/../x"} {
		if n, ok := Written(root, device); ok {
			t.Errorf("%s: %d", device, n)
		}
	}
}

// TestTable: any change of the partition table is another text, and that of another disk is none.
func TestTable(t *testing.T) {
	made := func(change func(files fstest.MapFS)) string {
		b, err := os.ReadFile("testdata/plain.txt")
		if err != nil {
			t.Fatal(err)
		}
		root, _ := recorded(string(b))
		change(root)
		m := Scan(root)
		return m.Table("/dev/vda")
	}
	was := made(func(fstest.MapFS) {})
	if was == "" || was != made(func(m fstest.MapFS) { m["sys/block/vda/ro"].Data = []byte("1") }) {
		t.Errorf("%q", was)
	}
	for file, content := range map[string]string{
		"sys/block/vda/vda1/size": "7", "sys/block/vda/vda2/start": "4096", "sys/block/vda/vda2/partition": "",
		"run/udev/data/b253:1": "E:ID_PART_ENTRY_UUID=2",
	} {
		if now := made(func(m fstest.MapFS) { m[file].Data = []byte(content) }); now == was {
			t.Errorf("%s is %s: %q", file, content, now)
		}
	}
	m := Machine{}
	if m.Table("/dev/vda") != "" {
		t.Error("a table of nothing")
	}
}
