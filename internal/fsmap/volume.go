package fsmap

import (
	"fmt"
	"slices"
	"strings"

	"farside/internal/blockdev"
	"farside/internal/dr"
)

// volume is a Volume and where it lies.
type volume struct {
	Volume
	dev    string   // "major:minor"
	mounts []string // where it can be asked
	start  int64    // on the disk, bytes
	size   int64    // bytes
	// unsynced leaves the sync out: a negative control of the tests.
	unsynced bool
}

// volumesOf returns what may hold file systems on d: the disk itself, or its partitions. What lies
// between them, or behind device mapper and the like, is in none of them.
func volumesOf(m *blockdev.Machine, d Disk) []*volume {
	disk, ok := m.Find(d.Path)
	if !ok {
		return nil
	}
	var out []*volume
	for _, x := range m.Devices {
		if x.Path != disk.Path && (x.Whole == "" || x.Whole != disk.Name) {
			continue
		}
		start := x.Start
		if x.Path == disk.Path {
			start = 0 // a partition may be a disk of ours
		}
		if x.Path == disk.Path && len(x.Mounts) == 0 && partitioned(m, &disk) {
			continue
		}
		v := &volume{Volume: Volume{Device: x.Path}, dev: x.Dev, mounts: x.Mounts, start: start, size: x.Size}
		v.Err = unfit(&x, v, d.Size)
		out = append(out, v)
	}
	apart(out)
	return out
}

func partitioned(m *blockdev.Machine, disk *blockdev.Device) bool {
	return slices.ContainsFunc(m.Devices, func(x blockdev.Device) bool { return x.Whole != "" && x.Whole == disk.Name })
}

// unfit says why nothing that is mounted from x tells what is free on it.
func unfit(x *blockdev.Device, v *volume, disk int64) error {
	switch {
	case len(x.Slaves) > 0:
		return fmt.Errorf("%s lies on other devices: %w", x.Path, dr.ErrUnsupported)
	case len(x.Holders) > 0:
		return fmt.Errorf("%s is used by %s: %w", x.Path, strings.Join(x.Holders, ", "), dr.ErrUnsupported)
	case x.Swap:
		return fmt.Errorf("%s is swap space: %w", x.Path, dr.ErrUnsupported)
	case len(x.Mounts) == 0:
		return fmt.Errorf("%s is not mounted where the agent can see it: %w", x.Path, dr.ErrNotFound)
	case v.start < 0 || v.size < superblockEnd || v.start > disk-v.size:
		return fmt.Errorf("%s, %d bytes at %d, lies beyond the end of the disk at %d: %w", x.Path, v.size, v.start, disk, dr.ErrInvalid)
	}
	return nil
}

// apart refuses volumes that overlap: one of them is not what it seems to be.
func apart(vs []*volume) {
	for i, a := range vs {
		for _, b := range vs[i+1:] {
			if a.start < b.start+b.size && b.start < a.start+a.size && (a.Err == nil || b.Err == nil) {
				err := fmt.Errorf("%s and %s overlap: %w", a.Device, b.Device, dr.ErrUnsupported)
				a.Err, b.Err = err, err
			}
		}
	}
}
