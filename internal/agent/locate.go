package agent

import (
	"fmt"
	"os"
	"strings"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// place is where a disk of the assignment is now.
type place struct {
	capture.Disk                  // with the path where it is
	here         *blockdev.Device // nil if it is no block device of this machine: a file, a guest's disk
	code         string           // why it can't be captured, one of the codes below; "" if it can
	why          string           // for people
}

// The codes of what keeps a disk from being captured. They go into events; don't change them.
const (
	diskMissing    = "disk-missing"    // it is not there
	diskReplaced   = "disk-replaced"   // another one is there
	diskDoubled    = "disk-doubled"    // several say that they are it
	diskShrunk     = "disk-shrunk"     // it is smaller than what is protected
	diskUnreadable = "disk-unreadable" // it is there but can't be opened
)

// locate says where the disks are now: a path is no identity, and names may change places when a machine
// boots. Disks that nothing names stay where they were said to be. known holds the devices as they were when
// they were captured last in this boot, by id. isBlock says whether there must be a block device at a path if there is
// anything. The wrong disk is never taken for one that has an identity.
func locate(m *blockdev.Machine, disks []capture.Disk, identities []string, known map[dr.DiskID]blockdev.Device, isBlock func(string) bool) []place {
	out := make([]place, 0, len(disks))
	for i, d := range disks {
		p := placeOf(m, d, identities[i], isBlock)
		if was, ok := known[d.ID]; ok {
			p.doubt(&was)
		}
		out = append(out, p)
	}
	return out
}

func placeOf(m *blockdev.Machine, d capture.Disk, want string, isBlock func(string) bool) place {
	p := place{Disk: d}
	at, here := m.Find(canonical(d.Path))
	switch {
	case len(m.Devices) == 0: // a system that does not tell
		return p
	case want != "" && (!here || at.Stable() != want && at.Stable() != ""):
		if !p.find(m, want) {
			return p.absent(want, at, here)
		}
	case here:
		p.here = &at
	case isBlock(d.Path):
		p.code, p.why = diskMissing, fmt.Sprintf("%s is not there", d.Path)
		return p
	}
	if p.here != nil && p.here.Size < d.Size {
		p.code, p.why = diskShrunk, fmt.Sprintf("%s has %d bytes, not %d any more: protect it anew, or give it back its size", p.Path, p.here.Size, d.Size)
	}
	return p
}

// find looks for the device of an identity.
func (p *place) find(m *blockdev.Machine, want string) bool {
	n := 0
	for i := range m.Devices {
		if m.Devices[i].Stable() == want {
			p.here = &m.Devices[i]
			n++
		}
	}
	switch n {
	case 0:
		return false
	case 1:
		p.Path = p.here.Path
	default:
		p.here, p.code = nil, diskDoubled
		p.why = fmt.Sprintf("%d disks say that they are %s: which is the right one can't be known", n, want)
	}
	return true
}

// absent says that the right disk is nowhere.
func (p *place) absent(want string, at blockdev.Device, here bool) place {
	p.code, p.why = diskMissing, fmt.Sprintf("%s (%s) is not there", p.Path, want)
	if here {
		p.code, p.why = diskReplaced, fmt.Sprintf("%s is another disk (%s) than the protected one (%s), which is nowhere: it is not replicated", p.Path, at.Stable(), want)
	}
	return *p
}

// doubt refuses a disk that nothing names, if what is at its path can't be what was: it came anew, with another size.
func (p *place) doubt(was *blockdev.Device) {
	if p.here == nil || p.code != "" || was.Stable() != "" || p.here.DiskSeq == was.DiskSeq || p.here.Size == was.Size {
		return
	}
	p.code = diskReplaced
	p.why = fmt.Sprintf("%s is another disk: it has %d bytes, the protected one had %d", p.Path, p.here.Size, was.Size)
}

// blockPath reports whether a path is one of a block device, or of nothing.
func blockPath(path string) bool {
	if !strings.HasPrefix(path, "/dev/") {
		return false
	}
	info, err := os.Stat(path)
	return err != nil || !info.Mode().IsRegular()
}
