// Package blockdev knows the block devices of a Linux machine: what each is, which lie on
// which, how to tell that one is still the same, and at which of them writes can be
// captured so that the copy starts.
//
// Main types: Machine, all devices as they are now, made by Scan; Device;
// Identity and its Compare; Verdict, the answer of Machine.Judge. docs/disks.md is
// the table of decisions for people.
//
// The package reads sysfs, procfs and udev's data through an fs.FS and nothing else. It
// opens no device, captures nothing and does not watch: whoever wants to know of changes
// scans again.
//
// Concurrency: values; nothing is shared.
package blockdev

import (
	"fmt"
	"slices"
	"strings"
)

// Kind says what a device is.
type Kind string

// The kinds.
const (
	Disk      Kind = "disk"
	Partition Kind = "partition"
	Loop      Kind = "loop"
	LVM       Kind = "lvm"       // a logical volume, or a part of one
	Crypt     Kind = "crypt"     // the plain side of dm-crypt
	Multipath Kind = "multipath" // one disk that is reached over several paths
	Mapper    Kind = "device-mapper"
	MD        Kind = "md"
	BCache    Kind = "bcache"
	DRBD      Kind = "drbd"
	PMem      Kind = "pmem"
	NBD       Kind = "nbd"
	Zram      Kind = "zram"
	RAM       Kind = "ram"
	Optical   Kind = "optical"
	Floppy    Kind = "floppy"
)

// Device is a block device as it is now.
type Device struct {
	Name     string // of the kernel, e.g. "sda1"
	Path     string // e.g. "/dev/sda1"
	Kind     Kind
	Whole    string // the Name of the disk that a partition lies on
	Model    string
	MapName  string   // of device mapper, e.g. "vg0-root"
	Level    string   // of MD, e.g. "raid1"
	Holders  []string // Names of the devices that lie on this one
	Slaves   []string // Names of the devices below this one
	Mounts   []string
	Swap     bool
	ReadOnly bool
	Zoned    string // the model of zones; "" or "none" if there are none
	DAX      bool   // can be written past the block layer
	Paths    bool   // NVMe with paths that the kernel hides
	Backing  string // the file of a loop device
	Leaving  bool   // a loop device that ends when nobody has it open any more
	Identity
}

// Native4K reports whether the device takes no write smaller than 4 KiB.
func (d *Device) Native4K() bool { return d.Logical == 4096 }

// Emulates512 reports whether the device takes writes of 512 bytes but works in 4 KiB.
func (d *Device) Emulates512() bool { return d.Logical == 512 && d.Physical >= 4096 }

// Machine is what a machine has, sorted by Path.
type Machine struct {
	Devices   []Device
	SwapFiles []string
}

// Find returns the device of a path.
func (m *Machine) Find(path string) (Device, bool) {
	i := slices.IndexFunc(m.Devices, func(d Device) bool { return d.Path == path })
	if i < 0 {
		return Device{}, false
	}
	return m.Devices[i], true
}

func (m *Machine) named(name string) (Device, bool) {
	i := slices.IndexFunc(m.Devices, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return Device{}, false
	}
	return m.Devices[i], true
}

// parts returns the partitions of d.
func (m *Machine) parts(d *Device) (out []Device) {
	for _, p := range m.Devices {
		if p.Whole == d.Name {
			out = append(out, p)
		}
	}
	return out
}

// Table describes the partitions of the disk at a path: where each begins and ends, and its
// UUID. It is another text when anything of that changed, and "" if there are none.
func (m *Machine) Table(path string) string {
	d, ok := m.Find(path)
	if !ok {
		return ""
	}
	var b strings.Builder
	for _, p := range m.parts(&d) {
		fmt.Fprintf(&b, "%s %d+%d %s\n", p.Name, p.Start, p.Size, p.PartUUID)
	}
	return b.String()
}

// maxDepth bounds how far stacks are followed: what sysfs says may be wrong.
const maxDepth = 16

// Below returns the Paths of the disks at the bottom of d, sorted; of a disk or
// partition that lies on nothing, its own. A multipath map is a disk, its paths are not.
func (m *Machine) Below(d Device) []string {
	found := make(map[string]bool)
	m.descend(d, found, 0)
	out := make([]string, 0, len(found))
	for p := range found {
		out = append(out, p)
	}
	slices.Sort(out)
	return out
}

func (m *Machine) descend(d Device, found map[string]bool, depth int) {
	if len(d.Slaves) == 0 || d.Kind == Multipath || depth == maxDepth {
		found[d.Path] = true
		return
	}
	for _, s := range d.Slaves {
		if x, ok := m.named(s); ok {
			m.descend(x, found, depth+1)
		}
	}
}

// above returns what lies on d or on its partitions, at any height, that pick accepts.
func (m *Machine) above(d Device, pick func(Device) bool) []Device {
	var out []Device
	seen := map[string]bool{d.Name: true}
	queue := []Device{d}
	for len(queue) > 0 {
		d, queue = queue[0], queue[1:]
		next := slices.Clone(d.Holders)
		for _, p := range m.parts(&d) {
			next = append(next, p.Name)
		}
		for _, n := range next {
			x, ok := m.named(n)
			if !ok || seen[n] {
				continue
			}
			seen[n] = true
			queue = append(queue, x)
			if pick(x) {
				out = append(out, x)
			}
		}
	}
	return out
}

func paths(ds []Device) string {
	var out []string
	for _, d := range ds {
		out = append(out, d.Path)
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), ", ")
}
