package agent

import (
	"fmt"
	"slices"
	"strings"

	"farside/internal/blockdev"
	"farside/internal/capture"
)

// response is what a change of a device asks for.
type response uint8

const (
	tell   response = iota // the capture goes on as it is
	anew                   // it is opened anew: with the disk, and then that is compared, or without it
	letOff                 // it is opened anew, and waits until the disk can be captured again
)

// change is what became of a device, and what to do. The zero value: nothing.
type change struct {
	code string
	text string
	warn bool
	response
}

// capturedDisk is a protected disk as it was when its capture was opened.
type capturedDisk struct {
	capture.Disk
	was   blockdev.Device
	table string // of its partitions
}

// changeOf says what became of a captured disk: the rows of docs/disks.md ("While the capture runs"), in
// order; the first that fits counts.
func changeOf(c *capturedDisk, now place, table string) change {
	path := c.Path
	switch {
	case now.code != "":
		return change{now.code, now.why + "; the other disks go on", true, letOff}
	case now.here == nil:
		return change{} // not a device of this machine, or the machine does not tell
	case now.here.Leaving && !c.was.Leaving && len(now.here.Mounts)+len(now.here.Holders) == 0:
		return change{diskMissing, path + " is being detached: it is let go, and waited for; the other disks go on", true, letOff}
	}
	switch c.was.Compare(&now.here.Identity) {
	case blockdev.Replaced:
		if c.was.Stable() != "" && c.was.Stable() == now.here.Stable() {
			return change{"disk-returned", path + " was taken out and is back: it is compared", true, anew}
		}
		return change{diskReplaced, fmt.Sprintf("%s came anew, and nothing names it (%s): it has the right size, so it is taken for the protected one and compared",
			path, orUnknown(now.here.Backing)), true, anew}
	case blockdev.Moved:
		return change{"partition-moved", fmt.Sprintf("%s begins at byte %d of its disk, not at %d any more: it is compared", path, now.here.Start, c.was.Start), true, anew}
	case blockdev.Reshaped:
		return change{"disk-reshaped", fmt.Sprintf("%s has sectors of %d bytes, not of %d any more", path, now.here.Logical, c.was.Logical), true, anew}
	case blockdev.Shrunk:
		return change{diskShrunk, fmt.Sprintf("%s has %d bytes, not %d any more; the other disks go on", path, now.here.Size, c.was.Size), true, letOff}
	case blockdev.Grown:
		return change{"disk-grown", fmt.Sprintf("%s has grown from %d to %d bytes: it is followed", path, c.was.Size, now.here.Size), false, tell}
	}
	switch {
	case now.Path != c.Path:
		return change{"disk-renamed", fmt.Sprintf("the disk at %s is at %s now: it is followed", path, now.Path), true, anew}
	case now.here.ReadOnly != c.was.ReadOnly:
		return change{"disk-read-only", fmt.Sprintf("%s is read-only: %v", path, now.here.ReadOnly), now.here.ReadOnly, tell}
	case table != c.table:
		return change{"disk-repartitioned", "the partitions of " + path + " are others now. It is captured as a whole, its partition table included", false, tell}
	}
	return change{}
}

func orUnknown(s string) string {
	if s == "" {
		return "no file or number is known"
	}
	return s
}

// newDisks finds disks that are not protected and appeared after the first look: each is told once.
type newDisks struct {
	seen map[string]bool // nil before the first look
}

// maxSeen bounds what is remembered; beyond it a disk may be told again.
const maxSeen = 4096

// look returns what is new in fs, what discover offers. isProtected tells by path and identity.
func (n *newDisks) look(fs []found, seqs map[string]uint64, isProtected func(f *found) bool) []change {
	first := n.seen == nil
	if first || len(n.seen) > maxSeen {
		n.seen = make(map[string]bool)
	}
	var out []change
	for i := range fs {
		f := &fs[i]
		if f.why != "" || f.kind != string(blockdev.Disk) && f.kind != string(blockdev.Loop) && f.kind != string(blockdev.PMem) {
			continue
		}
		key := f.identity
		if key == "" {
			key = fmt.Sprintf("%s %d", f.path, seqs[f.path])
		}
		if n.seen[key] {
			continue
		}
		n.seen[key] = true
		if !first && !isProtected(f) {
			out = append(out, change{"disk-new", fmt.Sprintf("%s is new (%d bytes%s), and not protected: protect it if it belongs to the machine",
				f.path, f.size, modelOf(f.model)), false, tell})
		}
	}
	return out
}

func modelOf(model string) string {
	if model == "" {
		return ""
	}
	return ", " + model
}

// protects returns what tells whether a disk is one of the assignment.
func (w *work) protects(places []place) func(f *found) bool {
	return func(f *found) bool {
		return f.identity != "" && slices.Contains(w.identities, f.identity) ||
			slices.ContainsFunc(places, func(p place) bool { return p.Path == f.path || canonical(p.Path) == f.path })
	}
}

// pathsOf names disks for people.
func pathsOf(disks []capture.Disk) string {
	out := make([]string, 0, len(disks))
	for _, d := range disks {
		out = append(out, d.Path)
	}
	return strings.Join(out, ", ")
}
