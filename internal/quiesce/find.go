package quiesce

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"farside/internal/dr"
)

// FileSystem is a mounted file system of which a part lies on a captured disk.
type FileSystem struct {
	Mount string // where it is mounted; one of the places if there are several
	Type  string // ext4, xfs, ...

	mounts []mount
	// depth is the number of file systems that this one lies on: it must be
	// frozen before those of a lower depth, since it writes to them.
	depth int
}

// mount is one line of mountinfo.
type mount struct {
	id      string
	dev     string // "major:minor" of the superblock
	root    string // what of the file system is mounted there
	path    string // where, seen from our root directory
	fsType  string
	source  string
	written bool // the file system is mounted for writing
}

// maxMounts and maxDepth bound what hostile tables can cost.
const (
	maxMounts     = 100_000
	maxDepth      = 16
	maxNamespaces = 1000
)

// parseMountinfo reads the text of a mountinfo file. Paths get the prefix. Lines
// that make no sense are left out.
func parseMountinfo(text, prefix string) []mount {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var out []mount
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		dash := slices.Index(f, "-")
		if dash < 6 || len(f) < dash+4 || len(out) >= maxMounts {
			continue
		}
		where := unescape.Replace(f[4])
		if prefix != "" {
			where = path.Join(prefix, where)
		}
		out = append(out, mount{
			id: f[0], dev: f[2], root: unescape.Replace(f[3]), path: where,
			fsType: f[dash+1], source: unescape.Replace(f[dash+2]),
			written: !slices.Contains(strings.Split(f[dash+3], ","), "ro"),
		})
	}
	return out
}

// system is what find asks of the machine.
type system struct {
	root  fs.FS                                 // the root directory, for proc and sys
	devno func(path string) (string, error)     // "major:minor" of a device node
	loop  func(dev string) (loopBacking, error) // what is behind a loop device
}

// loopBacking is what a loop device has its bytes from: a file of a file system, or
// another device.
type loopBacking struct {
	superblock string // "major:minor" of the file system; "" if it is a device
	device     string // "major:minor"
}

// find returns the mounted and writable file systems that lie on the disks, given
// by path, in the order in which they may be frozen. Each comes once, however
// often it is mounted and in whichever mount namespace.
func (s *system) find(disks []string) ([]FileSystem, error) {
	all := s.mounts()
	g := graph{system: s, below: s.blockDevices(), mounts: all, captured: make(map[string]bool), btrfs: s.btrfsDevices()}
	for _, d := range disks {
		dev, err := s.devno(d)
		if err != nil {
			return nil, fmt.Errorf("find file systems on %s: %w", d, err)
		}
		if dev != "" {
			g.captured[dev] = true
		}
	}
	var out []FileSystem
	for dev, at := range g.superblocks() {
		on, depth, err := g.superblock(dev, 0)
		if err != nil {
			return nil, err
		}
		if on {
			out = append(out, FileSystem{Mount: at[0].path, Type: at[0].fsType, mounts: at, depth: depth})
		}
	}
	slices.SortFunc(out, func(a, b FileSystem) int {
		return cmp.Or(cmp.Compare(b.depth, a.depth), strings.Compare(a.Mount, b.Mount))
	})
	return out, nil
}

// mounts lists the mounts of our mount namespace and, behind them, those of all
// others: what only a container has mounted writes to the disks as well.
func (s *system) mounts() []mount {
	text, err := fs.ReadFile(s.root, "proc/self/mountinfo")
	if err != nil {
		return nil
	}
	out := parseMountinfo(string(text), "")
	seen := map[string]bool{s.namespace("self"): true}
	entries, err := fs.ReadDir(s.root, "proc")
	if err != nil {
		return out
	}
	for _, e := range entries {
		if pid := e.Name(); pid[0] >= '1' && pid[0] <= '9' && len(seen) < maxNamespaces {
			ns := s.namespace(pid)
			if ns == "" || seen[ns] {
				continue
			}
			if text, err := fs.ReadFile(s.root, "proc/"+pid+"/mountinfo"); err == nil {
				seen[ns] = true
				out = append(out, parseMountinfo(string(text), "/proc/"+pid+"/root")...)
			}
		}
	}
	return out
}

// namespace names the mount namespace of a process; "" if that can't be known.
func (s *system) namespace(pid string) string {
	ns, err := fs.ReadLink(s.root, "proc/"+pid+"/ns/mnt")
	if err != nil {
		return ""
	}
	return ns
}

// blockDevices returns, for each block device, the devices that it has its bytes from:
// of a partition its disk, of a stacked device those that it is made of.
func (s *system) blockDevices() map[string][]string {
	below := make(map[string][]string)
	names, err := fs.ReadDir(s.root, "sys/block")
	if err != nil {
		return below
	}
	for _, n := range names {
		dir := path.Join("sys/block", n.Name())
		dev := s.text(dir, "dev")
		if dev == "" {
			continue
		}
		below[dev] = append(below[dev], s.devices(path.Join(dir, "slaves"))...)
		entries, err := fs.ReadDir(s.root, dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			part := path.Join(dir, e.Name())
			if s.text(part, "partition") != "" {
				below[s.text(part, "dev")] = []string{dev}
			}
		}
	}
	return below
}

// devices returns the numbers of the devices that a directory of sysfs links to.
func (s *system) devices(dir string) []string {
	entries, err := fs.ReadDir(s.root, dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if dev := s.text(dir, e.Name()+"/dev"); dev != "" {
			out = append(out, dev)
		}
	}
	return out
}

// btrfsDevices returns the devices of each btrfs file system: its superblock has a
// number of its own that says nothing of them.
func (s *system) btrfsDevices() [][]string {
	entries, err := fs.ReadDir(s.root, "sys/fs/btrfs")
	if err != nil {
		return nil
	}
	var out [][]string
	for _, e := range entries {
		if devs := s.devices(path.Join("sys/fs/btrfs", e.Name(), "devices")); len(devs) > 0 {
			out = append(out, devs)
		}
	}
	return out
}

// text returns the trimmed content of a small file, or "".
func (s *system) text(dir, name string) string {
	b, err := fs.ReadFile(s.root, path.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// graph says what lies on what.
type graph struct {
	*system
	below    map[string][]string // devices by device
	mounts   []mount
	captured map[string]bool
	btrfs    [][]string
}

// superblocks returns the writable mounts of each superblock, those of whole file
// systems and of our own namespace first.
func (g *graph) superblocks() map[string][]mount {
	out := make(map[string][]mount)
	for _, m := range g.mounts {
		if m.written {
			out[m.dev] = append(out[m.dev], m)
		}
	}
	for _, at := range out {
		slices.SortStableFunc(at, func(a, b mount) int { return cmp.Compare(partial(a), partial(b)) })
	}
	return out
}

func partial(m mount) int {
	if m.root == "/" {
		return 0
	}
	return 1
}

// errDeep says that devices are stacked in a ring, or as good as.
var errDeep = errors.New("devices are stacked too deep")

// superblock says whether a file system lies on a captured disk, and on how many
// other file systems.
func (g *graph) superblock(dev string, level int) (on bool, depth int, err error) {
	return g.any(g.devicesOf(dev), level)
}

// devicesOf returns the devices that a mounted file system uses.
func (g *graph) devicesOf(dev string) []string {
	if !strings.HasPrefix(dev, "0:") {
		return []string{dev}
	}
	i := slices.IndexFunc(g.mounts, func(m mount) bool { return m.dev == dev })
	if i < 0 || !strings.HasPrefix(g.mounts[i].source, "/dev/") {
		return nil // no block device: proc, tmpfs, overlay, ...
	}
	source, err := g.devno(g.mounts[i].source)
	if err != nil {
		return nil
	}
	for _, devs := range g.btrfs {
		if slices.Contains(devs, source) {
			return devs
		}
	}
	return []string{source}
}

// device is superblock for a block device.
func (g *graph) device(dev string, level int) (on bool, depth int, err error) {
	if level > maxDepth {
		return false, 0, fmt.Errorf("find what %s lies on: %w: %w", dev, errDeep, dr.ErrUnsupported)
	}
	on, depth, err = g.any(g.below[dev], level)
	if err != nil {
		return false, 0, err
	}
	if strings.HasPrefix(dev, loopMajor) {
		lower, below, err := g.behindLoop(dev, level)
		if err != nil {
			return false, 0, err
		}
		on, depth = on || lower, max(depth, below)
	}
	return on || g.captured[dev], depth, nil
}

// loopMajor begins the numbers of loop devices.
const loopMajor = "7:"

func (g *graph) behindLoop(dev string, level int) (on bool, depth int, err error) {
	b, err := g.loop(dev)
	switch {
	case err != nil:
		return false, 0, nil // nothing is behind it any more
	case b.superblock == "" && b.device == "":
		return false, 0, fmt.Errorf("find what is behind loop device %s: %w", dev, dr.ErrUnsupported)
	case b.superblock == "":
		return g.device(b.device, level+1)
	}
	on, depth, err = g.superblock(b.superblock, level+1)
	return on, depth + 1, err
}

func (g *graph) any(devs []string, level int) (on bool, depth int, err error) {
	for _, d := range devs {
		one, deep, err := g.device(d, level+1)
		if err != nil {
			return false, 0, err
		}
		on, depth = on || one, max(depth, deep)
	}
	return on, depth, nil
}
