//go:build linux && amd64

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"farside/internal/capture"
	"farside/internal/dr"
)

// Names of pins in a subdirectory of a pinDir.
const (
	pinNotes   = "notes"
	pinProgram = "program"
)

var pinLinks = []string{pinLink + "bio-complete", pinLink + "request-complete", pinLink + "queue"} // as attach makes them

// maps names the maps that a later process needs. The others belong to the programs.
func (l *loaded) maps() map[string]**ebpf.Map {
	return map[string]**ebpf.Map{
		"control": &l.objs.Control, "bitmap": &l.objs.Bitmap, "ring": &l.objs.Ring,
		"flying": &l.objs.Flying, "counts": &l.objs.Counts, pinNotes: &l.notesMap,
	}
}

// pin makes everything survive, in the new of p; the programs are attached.
func (l *loaded) pin(p *pinDir) error {
	for name, m := range l.maps() {
		if err := (*m).Pin(p.in(pinNew, name)); err != nil {
			return explain("pin "+name, err)
		}
	}
	if err := l.objs.OnQueue.Pin(p.in(pinNew, pinProgram)); err != nil {
		return explain("pin program", err)
	}
	for i, name := range pinLinks {
		if err := l.links[i].Pin(p.in(pinNew, name)); err != nil {
			return explain("pin "+name, err)
		}
	}
	return nil
}

// whole reports whether all pins are there.
func (p *pinDir) whole() bool {
	for name := range new(loaded).maps() {
		if !p.has(filepath.Join(pinLive, name)) {
			return false
		}
	}
	for _, name := range append([]string{pinProgram}, pinLinks...) {
		if !p.has(filepath.Join(pinLive, name)) {
			return false
		}
	}
	return true
}

// loadPinned opens what is in the live of p. The error wraps dr.ErrUnsupported or
// dr.ErrCorrupt if it can't be gone on with; then nobody knows what it missed.
func loadPinned(p *pinDir) (_ *loaded, _ meta, err error) {
	l := &loaded{}
	defer func() {
		if err != nil {
			_ = l.close()
		}
	}()
	for name, m := range l.maps() {
		if *m, err = ebpf.LoadPinnedMap(p.in(pinLive, name), nil); err != nil {
			return nil, meta{}, broken(name, err)
		}
	}
	if l.objs.OnQueue, err = ebpf.LoadPinnedProgram(p.in(pinLive, pinProgram), nil); err != nil {
		return nil, meta{}, broken(pinProgram, err)
	}
	for _, name := range pinLinks {
		k, err := link.LoadPinnedLink(p.in(pinLive, name), nil)
		if err != nil {
			return nil, meta{}, broken(name, err)
		}
		l.links = append(l.links, k)
	}
	m, err := l.check()
	if err != nil {
		return nil, meta{}, err
	}
	return l, m, nil
}

func broken(name string, err error) error {
	return fmt.Errorf("pinned %s: %w: %w", name, err, dr.ErrCorrupt)
}

// check maps what was pinned and makes sure that it is what it should be.
func (l *loaded) check() (meta, error) {
	if size := l.notesMap.MaxEntries() * l.notesMap.ValueSize(); int(size) != notesSize {
		return meta{}, fmt.Errorf("pinned notes of %d bytes: %w", size, dr.ErrUnsupported)
	}
	var err error
	if l.notesMem, err = unix.Mmap(l.notesMap.FD(), 0, notesSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return meta{}, fmt.Errorf("map notes: %w", err)
	}
	l.notes = notesIn(l.notesMem)
	m, err := l.notes.meta()
	if err != nil {
		return m, err
	}
	_, words := capture.BitmapLayout(m.disks(), m.Block)
	if int(l.objs.Bitmap.MaxEntries()) < words || int64(l.objs.Ring.MaxEntries()) != m.Ring ||
		l.objs.Control.ValueSize() < controlSize || l.objs.Flying.MaxEntries() != maxFlying || l.objs.Flying.ValueSize() != uint32(unsafe.Sizeof(flight{})) || int(l.objs.Counts.MaxEntries()) != MaxDisks {
		return m, fmt.Errorf("pinned maps have other sizes: %w", dr.ErrCorrupt)
	}
	if err := l.mapMemory(words, m.Ring); err != nil {
		return m, fmt.Errorf("map memory: %w", err)
	}
	place, losts := l.notes.split(l.notes.Floor)
	producer := atomic.LoadUint64(l.ring.producer)
	if place > producer || producer-place > l.ring.size || place%8 != 0 || place < atomic.LoadUint64(l.ring.consumer) || losts > l.notes.Noticed {
		return m, fmt.Errorf("pinned ring ends at %d, and is released to %d: %w", producer, place, dr.ErrCorrupt)
	}
	return m, l.checkLinks()
}

// checkLinks makes sure that all three programs are attached: a link lives as long as
// somebody has it open or pinned, and attaches its program as long as it lives.
func (l *loaded) checkLinks() error {
	want, err := l.objs.OnQueue.Info()
	if err != nil {
		return broken(pinProgram, err)
	}
	id, _ := want.ID()
	seen := map[ebpf.ProgramID]bool{}
	for i, k := range l.links {
		info, err := k.Info()
		if err != nil {
			return broken(pinLinks[i], err)
		}
		seen[info.Program] = true
	}
	if len(seen) != len(pinLinks) || !seen[id] {
		return fmt.Errorf("pinned links are those of other programs: %w", dr.ErrCorrupt)
	}
	return nil
}

// openMemory returns the memory of Survivor.Memory, made new if there is none of this
// size or fresh says so.
func openMemory(p *pinDir, size int, fresh bool) ([]byte, error) {
	name := p.in(pinMemory)
	if size == 0 {
		return nil, removePin(name)
	}
	m, err := ebpf.LoadPinnedMap(name, nil)
	if err == nil && (fresh || int(m.MaxEntries()) != (size+7)/8 || m.ValueSize() != 8) {
		_ = m.Close()
		err = fs.ErrNotExist
	}
	if err != nil {
		if err := removePin(name); err != nil {
			return nil, err
		}
		if m, err = newMemory("the agent", size); err != nil {
			return nil, err
		}
		if err := m.Pin(name); err != nil {
			_ = m.Close()
			return nil, explain("pin memory", err)
		}
	}
	defer m.Close()
	mem, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	return mem, nil
}

func removePin(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

// inherit marks in s what is due in old, which captured some of the same disks: what was
// not released, the dirty set, and what is in flight. s captures already, so that
// nothing is missed between the two. It returns the disks that are in both.
func (s *source) inherit(old *loaded, m meta) ([]dr.DiskID, error) {
	grace() // what the programs of both are about to do is done
	keep := &heirs{s: s, disks: m.disks(), same: map[dr.DiskID]bool{}}
	var ids []dr.DiskID
	for _, was := range m.Disks {
		for _, is := range metaOf(s.devs, s.opts).Disks {
			tail, ok := was.becomes(is)
			if !ok {
				continue
			}
			if err := s.bitmap.Mark(tail); err != nil {
				return nil, err
			}
			keep.same[tail.Disk] = true
			ids = append(ids, tail.Disk)
		}
	}
	if err := keep.ring(old); err != nil {
		return nil, err
	}
	if err := keep.bitmap(old, m.Block); err != nil {
		return nil, err
	}
	return ids, flights(old.flying, func(_ int, f flight) error { return s.markFlight(f) })
}

// heirs takes over what is due in an old capture.
type heirs struct {
	s     *source
	disks []capture.Disk // of the old one
	same  map[dr.DiskID]bool
}

func (h *heirs) mark(x dr.Extent) error {
	if x.Length == 0 || !h.same[x.Disk] {
		return nil
	}
	return h.s.bitmap.Mark(x)
}

// ring marks what is in the records that were not released.
func (h *heirs) ring(old *loaded) error {
	r := old.ring
	r.pos, _ = old.notes.split(old.notes.Floor)
	for end := atomic.LoadUint64(r.producer); r.pos < end; {
		rec := r.next()
		if rec == nil {
			if r.pos < end {
				return fmt.Errorf("take over ring: a record is busy: %w", dr.ErrUnavailable)
			}
			return nil
		}
		e, err := parseRecord(rec, h.disks)
		if err != nil {
			return fmt.Errorf("take over ring: %w", err)
		}
		if err := h.mark(e.Extent); err != nil {
			return fmt.Errorf("take over ring: %w", err)
		}
	}
	return nil
}

// bitmap marks what is dirty. It must stay in the old one: this process may be killed.
func (h *heirs) bitmap(old *loaded, block int64) error {
	words := words64(old.bitmap)
	snapshot := make([]uint64, len(words))
	for i := range words {
		snapshot[i] = atomic.LoadUint64(&words[i])
	}
	b, err := capture.NewBitmap(h.disks, block, snapshot)
	if err != nil {
		return fmt.Errorf("take over dirty set: %w", err)
	}
	for _, x := range b.Take(1 << 62) {
		if err := h.mark(x); err != nil {
			return fmt.Errorf("take over dirty set: %w", err)
		}
	}
	return nil
}
