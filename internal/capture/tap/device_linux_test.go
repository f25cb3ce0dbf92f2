package tap

import (
	"os/exec"
	"strings"
	"testing"

	"farside/internal/capture/capturetest"
	"farside/internal/dr"
	"farside/internal/testenv"
)

// TestConformance4Kn runs the suite in front of block devices with sectors of 4 KiB: writes of 512 bytes must still do what
// they say, since the writers were promised that.
func TestConformance4Kn(t *testing.T) {
	testenv.NeedLoop(t)
	capturetest.Run(t, func(t *testing.T, c capturetest.Config) *capturetest.Target {
		target := &capturetest.Target{}
		var disks []Disk
		for i, size := range c.Sizes {
			out, err := exec.Command("losetup", "--find", "--show", "--sector-size", "4096", tempPath(t, size)).Output()
			if err != nil {
				t.Fatal(err)
			}
			path := strings.TrimSpace(string(out))
			t.Cleanup(func() { exec.Command("losetup", "--detach", path).Run() })
			f, err := OpenFile(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			disks = append(disks, Disk{ID: dr.DiskID(i + 1), Backing: f})
		}
		tap, err := New(disks, c.Ring, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tap.Close() })
		target.Source = tap
		for _, d := range disks {
			target.Devices = append(target.Devices, writer{tap.Device(d.ID)})
		}
		return target
	})
}
