package blockdev

import (
	"fmt"
	"strings"
)

// Identity is what tells one device from another, as far as the kernel knows it. Empty
// and zero mean unknown.
type Identity struct {
	Dev      string // major:minor; another one after a reboot, perhaps
	Serial   string
	WWID     string // world-wide name
	PartUUID string // of a partition, in its table
	DiskSeq  uint64 // of the whole disk: the kernel counts media, anew at each boot
	Start    int64  // of a partition on its disk, bytes
	Size     int64  // bytes
	Logical  int    // block sizes, bytes
	Physical int
}

// Stable returns what names the device beyond reboots and whatever path it comes up
// at, or "" if nothing does (a loop device, say). Two devices with the same one are copies of
// each other, or one that is reached twice.
func (id *Identity) Stable() string {
	whole := ""
	switch {
	case id.WWID != "":
		whole = "wwid:" + id.WWID
	case id.Serial != "":
		whole = "serial:" + id.Serial
	}
	if id.PartUUID == "" {
		if whole != "" && id.Start > 0 {
			whole += fmt.Sprintf("/start:%d", id.Start)
		}
		return whole
	}
	return strings.TrimPrefix(whole+"/partuuid:"+strings.ToLower(id.PartUUID), "/")
}

// Difference says what became of a device.
type Difference uint8

// The differences, mildest first. If several are true, the gravest is said.
const (
	Same     Difference = iota
	Grown               // it has become larger
	Shrunk              // it has become smaller
	Reshaped            // its block size is another one
	Moved               // the partition begins elsewhere
	Replaced            // it is another device
)

// String returns the name of d.
func (d Difference) String() string {
	return [...]string{"same", "grown", "shrunk", "reshaped", "moved", "replaced"}[d]
}

// Compare says what became of a device that was id and is now. What is unknown of
// either is no difference. Both must be of the same boot, or their DiskSeq zero.
func (id *Identity) Compare(now *Identity) Difference {
	differ := func(a, b string) bool { return a != "" && b != "" && a != b }
	switch {
	case differ(id.WWID, now.WWID), differ(id.Serial, now.Serial), differ(id.PartUUID, now.PartUUID),
		id.DiskSeq != 0 && now.DiskSeq != 0 && id.DiskSeq != now.DiskSeq:
		return Replaced
	case id.Start != now.Start:
		return Moved
	case id.Logical != 0 && now.Logical != 0 && id.Logical != now.Logical:
		return Reshaped
	case now.Size < id.Size:
		return Shrunk
	case now.Size > id.Size:
		return Grown
	}
	return Same
}
