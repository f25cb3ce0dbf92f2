package blockdev

import (
	"cmp"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// sector is the unit of sysfs, whatever the device's own is.
const sector = 512

// maxText bounds what is read of one file in sysfs.
const maxText = 4 << 10

// Scan reads what the machine has whose root directory is root. What can't be read is
// unknown: on another system than Linux the result is empty.
func Scan(root fs.FS) Machine {
	s := scanner{root: root, mounts: mountPoints(root)}
	s.swaps, s.m.SwapFiles = swaps(root)
	names, err := fs.ReadDir(root, "sys/block")
	if err != nil {
		return s.m
	}
	for _, n := range names {
		s.disk(n.Name())
	}
	slices.SortFunc(s.m.Devices, func(a, b Device) int { return cmp.Compare(a.Path, b.Path) })
	return s.m
}

type scanner struct {
	root   fs.FS
	mounts map[string][]string // by "major:minor"
	swaps  map[string]bool     // by path
	m      Machine
}

// disk adds the device of that name and its partitions.
func (s *scanner) disk(name string) {
	dir := path.Join("sys/block", name)
	if s.text(dir, "hidden") == "1" {
		return // a path of NVMe
	}
	d := s.node(dir, name)
	if d.Size == 0 {
		return // an empty slot: no medium, or an unused loop device
	}
	s.whole(dir, &d)
	s.m.Devices = append(s.m.Devices, d)
	entries, err := fs.ReadDir(s.root, dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if s.text(dir, e.Name()+"/partition") != "" {
			s.m.Devices = append(s.m.Devices, s.partition(path.Join(dir, e.Name()), e.Name(), &d))
		}
	}
}

// node reads what disks and partitions have alike.
func (s *scanner) node(dir, name string) Device {
	d := Device{
		Name: name, Path: "/dev/" + strings.ReplaceAll(name, "!", "/"),
		ReadOnly: s.text(dir, "ro") == "1", Holders: s.names(dir, "holders"), Slaves: s.names(dir, "slaves"),
	}
	d.Dev = s.text(dir, "dev")
	d.Mounts = s.mounts[d.Dev]
	d.Size = s.number(dir, "size") * sector
	d.Swap = s.swaps[d.Path]
	return d
}

func (s *scanner) whole(dir string, d *Device) {
	d.Kind = kindOf(d.Name)
	if d.Kind == Mapper {
		d.MapName = s.text(dir, "dm/name")
		d.Kind = mapKind(s.text(dir, "dm/uuid"))
		d.WWID = s.text(dir, "dm/uuid")
		d.Swap = d.Swap || s.swaps["/dev/mapper/"+d.MapName]
	}
	if d.Kind == MD {
		d.Level, d.WWID = s.text(dir, "md/level"), s.text(dir, "md/uuid")
	}
	d.Model = s.text(dir, "device/model")
	d.Serial = cmp.Or(s.text(dir, "serial"), s.text(dir, "device/serial"), pageSerial(s.raw(dir, "device/vpd_pg80")), s.udev(d.Dev, "ID_SERIAL_SHORT"))
	d.WWID = cmp.Or(d.WWID, s.text(dir, "wwid"), s.text(dir, "device/wwid"), s.udev(d.Dev, "ID_WWN_WITH_EXTENSION"))
	d.DiskSeq = uint64(s.number(dir, "diskseq")) // unknown before Linux 5.15
	d.Logical, d.Physical = int(s.number(dir, "queue/logical_block_size")), int(s.number(dir, "queue/physical_block_size"))
	d.Zoned, d.DAX = s.text(dir, "queue/zoned"), s.text(dir, "queue/dax") == "1"
	d.Backing, d.Leaving = s.text(dir, "loop/backing_file"), s.text(dir, "loop/autoclear") == "1"
	d.Paths = len(s.names(dir, "multipath")) > 0
}

func (s *scanner) partition(dir, name string, whole *Device) Device {
	d := s.node(dir, name)
	d.Kind, d.Whole = Partition, whole.Name
	d.Serial, d.WWID, d.DiskSeq = whole.Serial, whole.WWID, whole.DiskSeq
	d.Logical, d.Physical, d.Zoned, d.DAX, d.Paths = whole.Logical, whole.Physical, whole.Zoned, whole.DAX, whole.Paths
	d.ReadOnly = d.ReadOnly || whole.ReadOnly
	d.Start = s.number(dir, "start") * sector
	d.PartUUID = cmp.Or(value(s.text(dir, "uevent"), "PARTUUID="), s.udev(d.Dev, "ID_PART_ENTRY_UUID"))
	return d
}

// udev returns a property of the device as udev found it.
func (s *scanner) udev(dev, key string) string {
	return value(string(s.raw("run/udev/data", "b"+dev)), "E:"+key+"=")
}

// value returns what follows prefix on the line that begins with it.
func value(text, prefix string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, prefix); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// pageSerial reads a SCSI disk's page 0x80: a header of four bytes, the last two of
// which are the length, and the number in ASCII.
func pageSerial(b []byte) string {
	if len(b) < 4 || b[1] != 0x80 {
		return ""
	}
	n := min(int(b[2])<<8|int(b[3]), len(b)-4)
	return strings.ToValidUTF8(strings.Trim(string(b[4:4+n]), " \x00"), "")
}

func (s *scanner) raw(dir, name string) []byte {
	b, err := fs.ReadFile(s.root, path.Join(dir, name))
	if err != nil || len(b) > maxText && dir != "run/udev/data" {
		return nil
	}
	return b
}

// text returns the trimmed content of a small file, or "".
func (s *scanner) text(dir, name string) string {
	return strings.ToValidUTF8(strings.TrimSpace(string(s.raw(dir, name))), "")
}

func (s *scanner) number(dir, name string) int64 {
	n, err := strconv.ParseInt(s.text(dir, name), 10, 64)
	if err != nil || n < 0 || n > 1<<53 {
		return 0
	}
	return n
}

func (s *scanner) names(dir, name string) []string {
	entries, err := fs.ReadDir(s.root, path.Join(dir, name))
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func kindOf(name string) Kind {
	for _, k := range []struct {
		prefix string
		kind   Kind
	}{
		{"loop", Loop},
		{"zram", Zram},
		{"ram", RAM},
		{"sr", Optical},
		{"fd", Floppy},
		{"dm-", Mapper},
		{"md", MD},
		{"nbd", NBD},
		{"bcache", BCache},
		{"drbd", DRBD},
		{"pmem", PMem},
	} {
		if strings.HasPrefix(name, k.prefix) {
			return k.kind
		}
	}
	return Disk
}

// mapKind reads who made a map from the prefix of its UUID, as libdevmapper wants it.
func mapKind(uuid string) Kind {
	switch {
	case strings.HasPrefix(uuid, "LVM-"):
		return LVM
	case strings.HasPrefix(uuid, "CRYPT-"):
		return Crypt
	case strings.HasPrefix(uuid, "mpath-"):
		return Multipath
	}
	return Mapper // a partition of a map (partN-…), or a table by hand
}

// mountPoints reads /proc/self/mountinfo.
func mountPoints(root fs.FS) map[string][]string {
	out := make(map[string][]string)
	b, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			out[f[2]] = append(out[f[2]], unescape(f[4]))
		}
	}
	return out
}

func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// swaps reads /proc/swaps: devices, and files.
func swaps(root fs.FS) (map[string]bool, []string) {
	devices, files := make(map[string]bool), []string(nil)
	b, err := fs.ReadFile(root, "proc/swaps")
	if err != nil {
		return devices, nil
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2 || !strings.HasPrefix(f[0], "/"):
		case f[1] == "file":
			files = append(files, unescape(f[0]))
		default:
			devices[unescape(f[0])] = true
		}
	}
	return devices, files
}

// InFlight returns how many writes the driver of a device has; ok is false if it is no
// block device of the machine. Writes that wait for the driver are not counted.
func InFlight(root fs.FS, device string) (n int, ok bool) {
	name := strings.ReplaceAll(strings.TrimPrefix(device, "/dev/"), "/", "!")
	b, err := fs.ReadFile(root, path.Join("sys/class/block", name, "inflight"))
	if err != nil {
		return 0, false
	}
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return 0, false
	}
	n, err = strconv.Atoi(f[1])
	return n, err == nil && n >= 0
}

// Written returns how many bytes the kernel has counted as written to a device since it came
// up; ok is false if it is no block device of the machine, or the kernel does not tell.
func Written(root fs.FS, device string) (bytes uint64, ok bool) {
	name := strings.ReplaceAll(strings.TrimPrefix(device, "/dev/"), "/", "!")
	b, err := fs.ReadFile(root, path.Join("sys/class/block", name, "stat"))
	if err != nil {
		return 0, false
	}
	f := strings.Fields(string(b))
	if len(f) < 7 {
		return 0, false
	}
	n, err := strconv.ParseUint(f[6], 10, 64)
	return n * sector, err == nil && n < 1<<53
}
