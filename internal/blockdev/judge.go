package blockdev

import (
	"fmt"
	"strings"
)

// Verdict says whether a device should be protected.
type Verdict struct {
	Refused string   // why it can't be protected, and what to choose instead; "" if it can
	Notes   []string // what a person should know who protects it
}

// Judge says at which layer the writes of d are captured right. The rows of
// docs/disks.md, in order: the first that fits refuses.
func (m *Machine) Judge(d Device) Verdict {
	for _, rule := range []func(*Machine, Device) string{
		stacked, ofMultipath, memory, unwritable, swapped, pastTheBlockLayer,
	} {
		if why := rule(m, d); why != "" {
			return Verdict{Refused: why}
		}
	}
	return Verdict{Notes: m.notes(d)}
}

// stacked refuses devices that lie on others: the copy of the disks below starts as it is,
// and only there one order covers what the layers themselves write.
func stacked(m *Machine, d Device) string {
	below := strings.Join(m.Below(d), ", ")
	if below == d.Path || below == "" {
		below = "which the kernel does not tell"
	}
	switch d.Kind {
	case LVM:
		return fmt.Sprintf("it is a logical volume: protect all disks of its volume group (%s), whose copy starts as it is", below)
	case Crypt:
		return fmt.Sprintf("it is the plain side of dm-crypt: protect what lies below (%s); the copy stays encrypted and is unlocked as the machine is", below)
	case Multipath:
		return "it is reached over several paths: the capture is not proven on device mapper, and the paths don't show all writes; capture it by scanning, or below, at the storage"
	case MD:
		return fmt.Sprintf("it is an MD array: protect all its members (%s), whose copy assembles as they do", below)
	case Mapper:
		return fmt.Sprintf("it is a device of device mapper: protect what lies below (%s)", below)
	case BCache:
		return fmt.Sprintf("it is a cache and what it caches: protect both together (%s)", below)
	case DRBD:
		return fmt.Sprintf("it is replicated by DRBD: protect what lies below (%s)", below)
	}
	return ""
}

// ofMultipath refuses a single path: device mapper hands requests to it behind the place
// where the capture looks.
func ofMultipath(m *Machine, d Device) string {
	if d.Whole != "" {
		if whole, ok := m.named(d.Whole); ok {
			d = whole
		}
	}
	for _, h := range d.Holders {
		if x, ok := m.named(h); ok && x.Kind == Multipath {
			return fmt.Sprintf("it is one of the paths of %s (%s): writes through the others would be missed, and so would those through this one", x.Path, x.MapName)
		}
	}
	return ""
}

func memory(_ *Machine, d Device) string {
	switch d.Kind {
	case Zram, RAM:
		return "it is memory: nothing of it is left after a restart"
	case Optical, Floppy:
		return "it is a removable medium"
	}
	return ""
}

func unwritable(_ *Machine, d Device) string {
	if d.ReadOnly {
		return "it is read-only"
	}
	return ""
}

func swapped(_ *Machine, d Device) string {
	if d.Swap {
		return "it is swap space: nothing of it is of use after a restart (mkswap makes it anew)"
	}
	return ""
}

func pastTheBlockLayer(_ *Machine, d Device) string {
	switch {
	case d.DAX:
		return "it can be written past the block layer (DAX), where no capture sees it"
	case d.Zoned != "" && d.Zoned != "none":
		return "it is a zoned disk (" + d.Zoned + "): the place of a write is the disk's choice"
	}
	return ""
}

// notes are what is right but should be known.
func (m *Machine) notes(d Device) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, p := range m.parts(&d) {
		if p.Swap {
			add("%s on it is swap space, bytes %d to %d: what is swapped out is replicated too", p.Path, p.Start, p.Start+p.Size)
		}
	}
	for _, x := range m.above(d, func(x Device) bool { return x.Swap && x.Kind != Partition }) {
		add("%s on it is swap space: what is swapped out is replicated too", x.Path)
	}
	for _, k := range []Kind{MD, LVM, BCache} {
		for _, x := range m.above(d, func(x Device) bool { return x.Kind == k }) {
			if others := m.partners(d, x); len(others) > 0 {
				add("%s lies on it and on %s: protect them together", x.Path, strings.Join(others, ", "))
			}
		}
	}
	if c := m.above(d, func(x Device) bool { return x.Kind == Crypt }); len(c) > 0 {
		add("its copy is encrypted as it is (%s): keep the key or passphrase where the copy is to start; a key in this machine's TPM does not travel", paths(c))
	}
	if d.Kind == NBD {
		add("it is another machine's disk: better protect it there")
	}
	if d.Paths {
		add("it is NVMe with several paths: recognised, not proven")
	}
	if d.Native4K() {
		add("it has sectors of 4096 bytes: its copy starts only on a disk that has them too")
	}
	if d.Stable() == "" && d.Kind != Loop {
		add("it has neither serial number nor world-wide name: if another disk comes up at %s, only its size can tell", d.Path)
	}
	return out
}

// partners returns what x lies on besides d.
func (m *Machine) partners(d, x Device) []string {
	var out []string
	for _, p := range m.Below(x) {
		below, ok := m.Find(p)
		if ok && below.Path != d.Path && below.Whole != d.Name {
			out = append(out, p)
		}
	}
	return out
}

// Twins returns groups of paths whose devices say that they are the same: cloned disks, or
// one disk reached twice without a map.
func (m *Machine) Twins() [][]string {
	by := make(map[string][]string)
	var order []string
	for i := range m.Devices {
		d := &m.Devices[i]
		id := d.Stable()
		if id == "" || len(d.Slaves) > 0 || ofMultipath(m, *d) != "" {
			continue
		}
		if by[id] == nil {
			order = append(order, id)
		}
		by[id] = append(by[id], d.Path)
	}
	var out [][]string
	for _, id := range order {
		if len(by[id]) > 1 {
			out = append(out, by[id])
		}
	}
	return out
}
