package agent

import (
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"farside/internal/dr"
)

// found is a block device or file of this machine that might be protected.
type found struct {
	path   string
	size   int64  // bytes
	kind   string // disk, partition, loop, file, …
	model  string
	serial string
	mounts []string
	why    string // not protectable because of that; "" if it is
}

// wanted says what to look for besides what everybody wants.
type wanted struct {
	loops bool
	paths []string // to be offered whatever they are
}

// discover lists the block devices of a machine whose root directory is root, sorted by
// path: disks and partitions from sysfs, with mount points and swap from proc.
func discover(root fs.FS, w wanted) []found {
	s := scan{root: root, mounts: mountPoints(root), swaps: swaps(root)}
	names, err := fs.ReadDir(root, "sys/block")
	if err != nil {
		names = nil // not Linux, or sysfs is not mounted: only what is named
	}
	var out []found
	for _, n := range names {
		out = append(out, s.device(n.Name())...)
	}
	out = slices.DeleteFunc(out, func(f found) bool {
		return slices.Contains(hidden(w), f.kind) && !slices.Contains(w.paths, f.path)
	})
	for _, p := range w.paths {
		if !slices.ContainsFunc(out, func(f found) bool { return f.path == p }) {
			out = append(out, s.named(p))
		}
	}
	slices.SortFunc(out, func(a, b found) int { return strings.Compare(a.path, b.path) })
	return out
}

// hidden returns the kinds that are not offered.
func hidden(w wanted) []string {
	kinds := []string{"ram", "zram", "floppy", "optical", "nbd"}
	if !w.loops {
		kinds = append(kinds, "loop")
	}
	return kinds
}

type scan struct {
	root   fs.FS
	mounts map[string][]string // by "major:minor"
	swaps  map[string]bool     // by path
}

// device returns the disk of that name and its partitions.
func (s *scan) device(name string) []found {
	dir := path.Join("sys/block", name)
	disk := s.node(dir, name, kindOf(name))
	if disk.size == 0 {
		return nil // an empty slot: no medium, or an unused loop device
	}
	disk.model, disk.serial = s.text(dir, "device/model"), s.text(dir, "device/serial")
	out := []found{disk}
	entries, err := fs.ReadDir(s.root, dir)
	if err != nil {
		return out
	}
	for _, e := range entries {
		if s.text(dir, e.Name()+"/partition") != "" {
			out = append(out, s.node(path.Join(dir, e.Name()), e.Name(), "partition"))
		}
	}
	return out
}

func (s *scan) node(dir, name, kind string) found {
	sectors, err := strconv.ParseInt(s.text(dir, "size"), 10, 64)
	if err != nil {
		sectors = 0
	}
	f := found{
		path: "/dev/" + strings.ReplaceAll(name, "!", "/"), size: sectors * dr.SectorSize, kind: kind,
		mounts: s.mounts[s.text(dir, "dev")],
	}
	switch {
	case s.swaps[f.path]:
		f.why = "it is swap space"
	case s.text(dir, "ro") == "1":
		f.why = "it is read-only"
	case kind == "device-mapper" || kind == "md":
		f.why = "stacked devices are not supported yet: protect the disks below"
	}
	return f
}

// named returns what is known of a path that the configuration names.
func (s *scan) named(p string) found {
	f := found{path: p, kind: "file"}
	if size, ok, err := statNamed(p); ok {
		f.size = size
		if err != nil {
			f.why = "it can't be read: " + err.Error()
		}
		return f
	}
	info, err := fs.Stat(s.root, strings.TrimPrefix(path.Clean(p), "/"))
	switch {
	case err != nil:
		f.why = "it can't be found"
	case info.Mode().IsRegular():
		f.size = info.Size()
	default:
		f.kind, f.why = "other", "it is neither a known block device nor a file"
	}
	if f.why == "" && (f.size == 0 || f.size%dr.SectorSize != 0) {
		f.why = "its size is not a multiple of 512 bytes"
	}
	return f
}

// text returns the trimmed content of a small file, or "".
func (s *scan) text(dir, name string) string {
	b, err := fs.ReadFile(s.root, path.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func kindOf(name string) string {
	for _, k := range []struct{ prefix, kind string }{
		{"loop", "loop"},
		{"zram", "zram"},
		{"ram", "ram"},
		{"sr", "optical"},
		{"fd", "floppy"},
		{"dm-", "device-mapper"},
		{"md", "md"},
		{"nbd", "nbd"},
	} {
		if strings.HasPrefix(name, k.prefix) {
			return k.kind
		}
	}
	return "disk"
}

// mountPoints reads /proc/self/mountinfo.
func mountPoints(root fs.FS) map[string][]string {
	out := make(map[string][]string)
	b, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil {
		return out
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			out[f[2]] = append(out[f[2]], unescape.Replace(f[4]))
		}
	}
	return out
}

// swaps reads /proc/swaps.
func swaps(root fs.FS) map[string]bool {
	out := make(map[string]bool)
	b, err := fs.ReadFile(root, "proc/swaps")
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "/") {
			out[f[0]] = true
		}
	}
	return out
}
