package agent

import (
	"io/fs"
	"path"
	"slices"
	"strings"

	"farside/internal/blockdev"
	"farside/internal/dr"
)

// found is a block device or file of this machine that might be protected.
type found struct {
	path     string
	size     int64  // bytes
	kind     string // disk, partition, loop, file, …
	model    string
	serial   string
	mounts   []string
	why      string   // not protectable because of that; "" if it is
	identity string   // see blockdev.Identity.Stable
	notes    []string // what should be known of it
}

// wanted says what to look for besides what everybody wants.
type wanted struct {
	loops bool
	paths []string // to be offered whatever they are
}

// discover lists the block devices of a machine whose root directory is root, sorted by
// path, and what is named besides.
func discover(root fs.FS, w wanted) []found {
	m := blockdev.Scan(root)
	out := devicesOf(&m, w)
	for _, p := range w.paths {
		if !slices.ContainsFunc(out, func(f found) bool { return f.path == p }) {
			out = append(out, named(root, p))
		}
	}
	slices.SortFunc(out, func(a, b found) int { return strings.Compare(a.path, b.path) })
	return out
}

// devicesOf lists the block devices that are offered.
func devicesOf(m *blockdev.Machine, w wanted) (out []found) {
	twins := m.Twins()
	for i := range m.Devices {
		d := &m.Devices[i]
		if slices.Contains(hidden(w), d.Kind) && !slices.Contains(w.paths, d.Path) {
			continue
		}
		out = append(out, offer(m, d, twins))
	}
	return out
}

// offerOf returns what lists the block devices that are offered of a machine.
func offerOf(w wanted) func(m *blockdev.Machine) []found {
	return func(m *blockdev.Machine) []found { return devicesOf(m, w) }
}

// hidden returns the kinds that are not offered.
func hidden(w wanted) []blockdev.Kind {
	kinds := []blockdev.Kind{blockdev.RAM, blockdev.Zram, blockdev.Floppy, blockdev.Optical, blockdev.NBD}
	if !w.loops {
		kinds = append(kinds, blockdev.Loop)
	}
	return kinds
}

func offer(m *blockdev.Machine, d *blockdev.Device, twins [][]string) found {
	v := m.Judge(*d)
	f := found{
		path: d.Path, size: d.Size, kind: string(d.Kind), model: d.Model, serial: d.Serial, mounts: d.Mounts,
		why: v.Refused, identity: d.Stable(), notes: v.Notes,
	}
	if d.Whole != "" {
		f.serial = "" // the disk's
	}
	for _, t := range twins {
		if slices.Contains(t, d.Path) {
			f.notes = append(f.notes, "these say that they are the same disk: "+strings.Join(t, ", "))
		}
	}
	return f
}

// named returns what is known of a path that the configuration names.
func named(root fs.FS, p string) found {
	f := found{path: p, kind: "file"}
	if size, ok, err := statNamed(p); ok {
		f.size = size
		if err != nil {
			f.why = "it can't be read: " + err.Error()
		}
		return f
	}
	info, err := fs.Stat(root, strings.TrimPrefix(path.Clean(p), "/"))
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
