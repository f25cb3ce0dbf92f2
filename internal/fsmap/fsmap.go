// Package fsmap asks mounted file systems which parts of a disk they do not use, so that a
// comparison need not read them.
//
// Main types: Taker, which takes maps; Map, what is free on a disk and what each of its file
// systems said. docs/used-blocks.md has the argument when such a map may be used: it must be taken
// behind the moment from which on every write is captured, and what it calls free
// is free on the disk too, because the file system was synced before it is handed over.
//
// The package knows ext4 and xfs, and only what the kernel has mounted: it reads
// no metadata of a file system but the superblock. It does not watch, keeps nothing, and
// decides nothing: whatever it can't tell counts as used.
//
// Concurrency: a Taker is safe for concurrent use; a Map belongs to who asked for it.
package fsmap

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"

	"farside/internal/blockdev"
	"farside/internal/dr"
	"farside/internal/extent"
)

// Kind is a kind of file system.
type Kind string

// The kinds that can be asked.
const (
	Ext4 Kind = "ext4"
	XFS  Kind = "xfs"
)

// Blind reports whether the recovery of a file system overwrites blocks without looking at what they
// held. xfs does not: it leaves a block alone that says that it is newer than the log.
func (k Kind) Blind() bool { return k == Ext4 }

// ParseKind reads the name of a kind. Errors wrap dr.ErrInvalid.
func ParseKind(s string) (Kind, error) {
	if k := Kind(s); k == Ext4 || k == XFS {
		return k, nil
	}
	return "", fmt.Errorf("file system %q is none of ext4, xfs: %w", s, dr.ErrInvalid)
}

// Disk is a disk of which the map is wanted.
type Disk struct {
	Path string // the kernel's name of the device, e.g. /dev/sda
	Size int64  // bytes
	// ReadAt reads the disk, from off, as io.ReaderAt does.
	ReadAt func(b []byte, off int64) (int, error)
}

// Map is what is free on a disk.
type Map struct {
	// Free is in bytes of the disk. Short ranges may be missing: they count as used.
	Free    extent.Set
	Volumes []Volume
}

// Volume is a file system, or a place where one could be, and what it said.
type Volume struct {
	Device string // e.g. /dev/sda1
	Mount  string // where it was asked; "" if it was not
	Kind   Kind   // "" if it is not known
	Free   int64  // bytes that count as free
	Err    error  // why all of it counts as used; nil if it was asked
}

// The bounds of a Map.
const (
	// Grain is the length in bytes of the shortest range that is told.
	Grain = 64 << 10
	// MaxRanges bounds the ranges of a volume: if there are more, the shortest are left out.
	MaxRanges = 64 << 10
)

// Taker takes maps.
type Taker struct {
	scan func() blockdev.Machine
	ask  func(v *volume) ([]extent.Range, error)
	mu   struct {
		sync.Mutex
		hung map[string]bool // devices whose file systems have not answered yet
	}
}

// NewTaker returns a Taker.
func NewTaker() *Taker {
	t := &Taker{scan: func() blockdev.Machine { return blockdev.Scan(os.DirFS("/")) }, ask: ask}
	t.mu.hung = make(map[string]bool)
	return t
}

// Take asks file systems of the kinds and returns what is free on a disk, as of some moment between the call and
// the return, and free on the disk itself by then. A file system that does not answer before
// ctx ends counts as used.
//
// The kernel can't be told to stop: who asks a file system that hangs is left behind, one
// goroutine for each device, and as long as it is, the device is not asked again.
func (t *Taker) Take(ctx context.Context, d Disk, kinds ...Kind) *Map {
	m := t.scan()
	out := &Map{}
	for _, v := range volumesOf(&m, d) {
		var free []extent.Range
		if free, v.Err = t.one(ctx, d, v, kinds); v.Err != nil {
			free = nil
		}
		for _, r := range free {
			out.Free.Add(v.start+r.Start, v.start+r.End)
			v.Free += r.Len()
		}
		out.Volumes = append(out.Volumes, v.Volume)
	}
	return out
}

// one returns what is free in a volume, in bytes from its beginning.
func (t *Taker) one(ctx context.Context, d Disk, v *volume, kinds []Kind) ([]extent.Range, error) {
	if v.Err != nil {
		return nil, v.Err
	}
	head := make([]byte, superblockEnd)
	if _, err := d.ReadAt(head, v.start); err != nil {
		return nil, fmt.Errorf("read superblock of %s: %w", v.Device, err)
	}
	var err error
	if v.Kind, err = judge(head); err != nil {
		return nil, fmt.Errorf("look at %s: %w", v.Device, err)
	}
	if !slices.Contains(kinds, v.Kind) {
		return nil, fmt.Errorf("%s is not among the kinds that are to be asked: %w", v.Kind, dr.ErrUnsupported)
	}
	return t.bounded(ctx, v)
}

// bounded asks a volume, at most until ctx ends.
func (t *Taker) bounded(ctx context.Context, v *volume) ([]extent.Range, error) {
	if !t.enter(v.Device) {
		return nil, fmt.Errorf("%s has not answered the last question: %w", v.Device, dr.ErrUnavailable)
	}
	type answer struct {
		free  []extent.Range
		mount string
		err   error
	}
	done := make(chan answer, 1)
	own := *v
	go func() {
		free, err := t.ask(&own)
		t.leave(own.Device) // before anybody knows, and asks again
		done <- answer{free, own.Mount, err}
	}()
	select {
	case a := <-done:
		v.Mount = a.mount
		return a.free, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("ask %s: %w: %w", v.Device, context.Cause(ctx), dr.ErrUnavailable)
	}
}

func (t *Taker) enter(device string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.hung[device] {
		return false
	}
	t.mu.hung[device] = true
	return true
}

func (t *Taker) leave(device string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.mu.hung, device)
}
