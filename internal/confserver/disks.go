package confserver

import (
	"slices"

	farsidev1 "farside/internal/api/farside/v1"
	"farside/internal/catalog"
	"farside/internal/dr"
)

// concludeDisks follows disks that have grown: their new size goes to agent and master target
// with the next assignment. A disk that shrank, or another one at the same path, changes
// nothing: the agent says what is wrong with it.
func concludeDisks(tx *catalog.Tx, n catalog.Node, r *farsidev1.AgentReport) ([]dr.NodeID, error) {
	if len(r.GetDiscovered()) == 0 {
		return nil, nil
	}
	disks, err := tx.Disks(n.Machine)
	if err != nil {
		return nil, err
	}
	grown := false
	for _, d := range disks {
		size := sizeNow(d, r.GetDiscovered())
		if size <= d.Size {
			continue
		}
		if err := tx.GrowDisk(d.Machine, d.ID, size); err != nil {
			return nil, err
		}
		grown = true
	}
	if !grown {
		return nil, nil
	}
	m, err := tx.Machine(n.Machine)
	if err != nil {
		return nil, err
	}
	return []dr.NodeID{m.Node, m.MasterTarget}, nil
}

// maxDisk is the largest size that is followed, bytes: what an agent says may be anything.
const maxDisk = 1 << 50

// sizeNow returns how large a protected disk is according to its agent; 0 if that is not known.
func sizeNow(d catalog.Disk, seen []*farsidev1.DiscoveredDisk) int64 {
	same := func(x *farsidev1.DiscoveredDisk) bool { return x.GetPath() == d.Path }
	if d.Identity != "" {
		same = func(x *farsidev1.DiscoveredDisk) bool { return x.GetIdentity() == d.Identity }
	}
	i := slices.IndexFunc(seen, same)
	if i < 0 || slices.ContainsFunc(seen[i+1:], same) {
		return 0 // gone, or one of two that say they are the same
	}
	x := seen[i]
	if !x.GetProtectable() || x.GetSize()%dr.SectorSize != 0 || x.GetSize() > maxDisk {
		return 0
	}
	return x.GetSize()
}
