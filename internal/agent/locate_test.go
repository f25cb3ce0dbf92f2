package agent

import (
	"errors"
	"testing"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// TestLocate: disks that changed places are found; another disk is never taken.
func TestLocate(t *testing.T) {
	dev := func(path, wwid string) blockdev.Device {
		return blockdev.Device{Path: path, Identity: blockdev.Identity{WWID: wwid, Size: 512}}
	}
	for name, c := range map[string]struct {
		there  []blockdev.Device
		wanted string
		path   string // "" is an error
	}{
		"as it was":           {[]blockdev.Device{dev("/dev/xda", "1"), dev("/dev/xdb", "2")}, "wwid:1", "/dev/xda"},
		"changed places":      {[]blockdev.Device{dev("/dev/xda", "2"), dev("/dev/xdb", "1")}, "wwid:1", "/dev/xdb"},
		"moved":               {[]blockdev.Device{dev("/dev/xdb", "1")}, "wwid:1", "/dev/xdb"},
		"another":             {[]blockdev.Device{dev("/dev/xda", "2")}, "wwid:1", ""},
		"clones":              {[]blockdev.Device{dev("/dev/xdb", "1"), dev("/dev/xdc", "1")}, "wwid:1", ""},
		"nothing names it":    {[]blockdev.Device{dev("/dev/xda", "2")}, "", "/dev/xda"},
		"no longer named":     {[]blockdev.Device{dev("/dev/xda", "")}, "wwid:1", "/dev/xda"},
		"nothing can be read": {nil, "wwid:1", "/dev/xda"},
		"taken out":           {[]blockdev.Device{dev("/dev/xdb", "2")}, "wwid:1", ""},
	} {
		m := &blockdev.Machine{Devices: c.there}
		got, err := locate(m, []capture.Disk{{ID: 3, Path: "/dev/xda"}}, []string{c.wanted})
		switch {
		case c.path == "":
			if !errors.Is(err, dr.ErrInvalid) {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		case err != nil || len(got) != 1 || got[0] != (capture.Disk{ID: 3, Path: c.path}):
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
