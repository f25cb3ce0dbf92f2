package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/fsmap"
)

// freeTimeout bounds how long a comparison waits for the file systems of a disk to say what they do not
// use; most of it is their sync.
const freeTimeout = time.Minute

// sparing leaves out of a comparison what file systems say is free. docs/used-blocks.md
// says when that is right.
type sparing struct {
	kinds []fsmap.Kind
	take  func(ctx context.Context, d fsmap.Disk, kinds ...fsmap.Kind) *fsmap.Map
	tell  func(notice)
}

// newSparing returns what asks file systems of the kinds, or nil if there are none or the
// driver is not one that captures the writes to the devices that they are mounted from.
func newSparing(kinds []fsmap.Kind, taker *fsmap.Taker, driver string, tell func(notice)) *sparing {
	if len(kinds) == 0 || taker == nil || driver != driverEBPF {
		return nil
	}
	return &sparing{kinds: kinds, take: taker.Take, tell: tell}
}

// asked returns the kinds that a pass asks. Over zeroes any will do. Over what the far side holds
// already, which may be newer than the disk if that was set back, only those whose recovery does not look
// at what a block held.
func (s *sparing) asked(empty bool) []fsmap.Kind {
	return slices.DeleteFunc(slices.Clone(s.kinds), func(k fsmap.Kind) bool { return !empty && !k.Blind() })
}

// spared is what is free on the disks of one pass, taken when the pass has begun. The
// zero value is for a pass that reads everything.
type spared struct {
	by    *sparing
	kinds []fsmap.Kind
	mu    sync.Mutex
	maps  map[dr.DiskID]*extent.Set
}

// of returns what is free on a disk; who comes first asks, the others wait for it. The set is not
// changed any more.
func (s *spared) of(ctx context.Context, src capture.Source, id dr.DiskID) *extent.Set {
	if len(s.kinds) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := s.maps[id]; ok {
		return m
	}
	m := s.by.ask(ctx, src, id, s.kinds)
	if ctx.Err() != nil {
		return nil // the pass goes on in another run, which asks again
	}
	if s.maps == nil {
		s.maps = make(map[dr.DiskID]*extent.Set)
	}
	s.maps[id] = m
	return m
}

// ask asks the file systems of a disk, and tells what they said.
func (s *sparing) ask(ctx context.Context, src capture.Source, id dr.DiskID, kinds []fsmap.Kind) *extent.Set {
	ctx, cancel := context.WithTimeout(ctx, freeTimeout)
	defer cancel()
	for _, d := range src.Disks() {
		if d.ID != id {
			continue
		}
		m := s.take(ctx, fsmap.Disk{Path: canonical(d.Path), Size: d.Size, ReadAt: func(b []byte, off int64) (int, error) {
			return src.ReadAt(b, id, off)
		}}, kinds...)
		s.tell(told(d, m))
		return &m.Free
	}
	return nil
}

// told says what a map is worth.
func told(d capture.Disk, m *fsmap.Map) notice {
	var asked, not []string
	for _, v := range m.Volumes {
		if v.Err != nil {
			not = append(not, v.Err.Error())
		} else {
			asked = append(asked, fmt.Sprintf("%s on %s", v.Kind, v.Mount))
		}
	}
	if len(m.Volumes) == 0 {
		not = append(not, "it is no block device that is known here")
	}
	n := notice{code: "free-blocks", at: time.Now()}
	if len(asked) == 0 {
		n.code, n.warn = "free-unknown", true
		n.text = fmt.Sprintf("%s is read as a whole: nobody says what is free: %s", d.Path, strings.Join(not, "; "))
		return n
	}
	n.text = fmt.Sprintf("%d of %d bytes of %s are free, says %s: blocks of them are not read", m.Free.Bytes(), d.Size, d.Path, strings.Join(asked, ", "))
	if len(not) > 0 {
		n.text += "; the rest is read: " + strings.Join(not, "; ")
	}
	return n
}

// BeginEmpty implements spares: the far side holds zeroes. Nothing is asked of it; what is used is marked.
func (c *comparer) BeginEmpty(disks []dr.DiskID) error {
	return c.begin(&pass{empty: true}, disks)
}

// Spares implements spares.
func (c *comparer) Spares() bool { return c.spare != nil }

// Spared implements spares.
func (c *comparer) Spared(id dr.DiskID) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.pass == nil {
		return 0
	}
	return c.mu.pass.spared[id]
}

// markUsed marks what is not free of a part, for a far side that holds nothing.
func (c *comparer) markUsed(p *part) error {
	used := []extent.Range{{Start: p.Offset, End: p.End()}}
	if p.free != nil {
		used = p.free.Subtract(p.Offset, p.End())
	}
	p.spared = p.Length
	for _, r := range used {
		x := dr.Extent{Disk: p.Disk, Offset: r.Start, Length: r.Len()}
		if err := c.src.Mark(x); err != nil {
			return fmt.Errorf("mark %v: %w", x, err)
		}
		p.spared -= x.Length
	}
	return nil
}

// stretches cuts [off, off+n) into runs of blocks that are free as a whole and others. The ends
// of all but the last are multiples of the block size, as off is.
func stretches(free *extent.Set, off, n, block int64) []stretch {
	if free == nil {
		return []stretch{{off: off, end: off + n}}
	}
	var out []stretch
	for at := off; at < off+n; at += block {
		end := min(at+block, off+n)
		skip := free.Contains(at, end)
		if k := len(out); k > 0 && out[k-1].skip == skip {
			out[k-1].end = end
			continue
		}
		out = append(out, stretch{at, end, skip})
	}
	return out
}

// stretch is a piece of a disk that is read, or is not because it is free.
type stretch struct {
	off, end int64
	skip     bool
}
