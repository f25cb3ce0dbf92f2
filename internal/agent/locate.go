package agent

import (
	"fmt"

	"farside/internal/blockdev"
	"farside/internal/capture"
	"farside/internal/dr"
)

// locate returns the disks at the paths where they are now: a path is no identity, and
// names may change places when a machine boots. Disks that nothing names stay where they
// were said to be. An error, which wraps dr.ErrInvalid, means that at a path is another disk and
// the right one is nowhere, or is there twice: the wrong one must not be replicated.
func locate(m *blockdev.Machine, disks []capture.Disk, identities []string) ([]capture.Disk, error) {
	out := make([]capture.Disk, 0, len(disks))
	for i, d := range disks {
		at, here := m.Find(canonical(d.Path))
		want := identities[i]
		if want == "" || !here && len(m.Devices) == 0 || here && (at.Stable() == want || at.Stable() == "") {
			out = append(out, d)
			continue
		}
		var same []string
		for _, x := range m.Devices {
			if x.Stable() == want {
				same = append(same, x.Path)
			}
		}
		if len(same) != 1 {
			return nil, fmt.Errorf("disk %d is %s; at %s is %q, and %d others say that they are it: %w",
				d.ID, want, d.Path, at.Stable(), len(same), dr.ErrInvalid)
		}
		d.Path = same[0]
		out = append(out, d)
	}
	return out, nil
}
