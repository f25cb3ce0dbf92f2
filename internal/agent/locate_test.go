package agent

import (
	"os"
	"path/filepath"
	"testing"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// TestLocate: disks that changed places are found; another disk is never taken.
func TestLocate(t *testing.T) {
	dev := func(path, wwid string) blockdev.Device {
		return blockdev.Device{Path: path, Identity: blockdev.Identity{WWID: wwid, Size: 4096, DiskSeq: 3}}
	}
	for name, c := range map[string]struct {
		there  []blockdev.Device
		wanted string
		path   string
		code   string // why not
	}{
		"as it was":           {[]blockdev.Device{dev("/dev/xda", "1"), dev("/dev/xdb", "2")}, "wwid:1", "/dev/xda", ""},
		"changed places":      {[]blockdev.Device{dev("/dev/xda", "2"), dev("/dev/xdb", "1")}, "wwid:1", "/dev/xdb", ""},
		"moved":               {[]blockdev.Device{dev("/dev/xdb", "1")}, "wwid:1", "/dev/xdb", ""},
		"another":             {[]blockdev.Device{dev("/dev/xda", "2")}, "wwid:1", "", diskReplaced},
		"clones":              {[]blockdev.Device{dev("/dev/xdb", "1"), dev("/dev/xdc", "1")}, "wwid:1", "", diskDoubled},
		"nothing names it":    {[]blockdev.Device{dev("/dev/xda", "2")}, "", "/dev/xda", ""},
		"no longer named":     {[]blockdev.Device{dev("/dev/xda", "")}, "wwid:1", "/dev/xda", ""},
		"nothing can be read": {nil, "wwid:1", "/dev/xda", ""},
		"taken out":           {[]blockdev.Device{dev("/dev/xdb", "2")}, "wwid:1", "", diskMissing},
		"unnamed, taken out":  {[]blockdev.Device{dev("/dev/xdb", "")}, "", "", diskMissing},
		"smaller":             {[]blockdev.Device{{Path: "/dev/xda", Identity: blockdev.Identity{WWID: "1", Size: 512}}}, "wwid:1", "", diskShrunk},
		"larger":              {[]blockdev.Device{{Path: "/dev/xda", Identity: blockdev.Identity{WWID: "1", Size: 8192}}}, "wwid:1", "/dev/xda", ""},
	} {
		m := &blockdev.Machine{Devices: c.there}
		disks := []capture.Disk{{ID: 3, Path: "/dev/xda", Size: 1024}}
		got := locate(m, disks, []string{c.wanted}, nil, func(string) bool { return true })
		if len(got) != 1 || got[0].code != c.code || (got[0].why == "") != (c.code == "") || c.code == "" && got[0].Path != c.path {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestLocateFiles: what is no block device of the machine is taken as it is.
func TestLocateFiles(t *testing.T) {
	m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xda"}}}
	got := locate(m, []capture.Disk{{ID: 1, Path: "/srv/disk.img", Size: 512}, {ID: 2, Path: "qemu:root"}}, []string{"", ""}, nil, blockPath)
	for i, p := range got {
		if p.code != "" || p.here != nil {
			t.Errorf("%d: %+v", i, p)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{file: false, "/dev/null": true, "/dev/no-such-disk": true, "tap:one": false} {
		if blockPath(path) != want {
			t.Errorf("%s: %v", path, !want)
		}
	}
}

// TestLocateAnew: a disk that nothing names and that came anew is taken only if it has its size.
func TestLocateAnew(t *testing.T) {
	known := map[dr.DiskID]blockdev.Device{3: {Identity: blockdev.Identity{Size: 4096, DiskSeq: 7}}}
	for code, now := range map[string]blockdev.Identity{
		"":           {Size: 4096, DiskSeq: 8},
		diskReplaced: {Size: 8192, DiskSeq: 8},
		diskShrunk:   {Size: 2048, DiskSeq: 8},
	} {
		m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xda", Identity: now}}}
		if got := locate(m, []capture.Disk{{ID: 3, Path: "/dev/xda", Size: 4096}}, []string{""}, known, blockPath); got[0].code != code {
			t.Errorf("%s: %+v", code, got)
		}
	}
	m := &blockdev.Machine{Devices: []blockdev.Device{{Path: "/dev/xda", Identity: blockdev.Identity{Size: 8192, DiskSeq: 7}}}}
	if got := locate(m, []capture.Disk{{ID: 3, Path: "/dev/xda", Size: 4096}}, []string{""}, known, blockPath); got[0].code != "" {
		t.Errorf("grown: %+v", got)
	}
}
