package view

import (
	"farside/internal/dr"
	"farside/internal/extent"
	"farside/internal/frame"
)

const (
	pageSize    = 4096
	pageSectors = pageSize / dr.SectorSize
)

// layer is what was written and is not in the vault's index yet: pages are
// newer than the zeroed ranges beneath them. Its view guards it; a layer that is
// being flushed doesn't change any more.
type layer struct {
	frames []*frame.Frame
	pages  map[pageKey]*page
	zeros  map[dr.DiskID]*extent.Set // bytes
	bytes  int
}

type pageKey struct {
	disk   dr.DiskID
	number int64
}

type page struct {
	mask uint8 // sectors that count
	data [pageSize]byte
}

func newLayer() *layer {
	return &layer{pages: map[pageKey]*page{}, zeros: map[dr.DiskID]*extent.Set{}}
}

// put takes a change; data is nil when it zeroes.
func (l *layer) put(x dr.Extent, data []byte) {
	l.bytes += len(data) + 64
	if data == nil {
		l.zero(x)
		return
	}
	for off := x.Offset; off < x.End(); {
		k := pageKey{x.Disk, off / pageSize}
		p := l.pages[k]
		if p == nil {
			p = &page{}
			l.pages[k] = p
		}
		from := off - k.number*pageSize
		n := copy(p.data[from:], data)
		p.mask |= sectors(from, from+int64(n))
		data, off = data[n:], off+int64(n)
	}
}

// zero lets the range read as zeroes and forgets what pages had for it.
func (l *layer) zero(x dr.Extent) {
	z := l.zeros[x.Disk]
	if z == nil {
		z = &extent.Set{}
		l.zeros[x.Disk] = z
	}
	z.Add(x.Offset, x.End())
	clip := func(k pageKey, p *page) {
		start := k.number * pageSize
		from, to := max(x.Offset, start), min(x.End(), start+pageSize)
		if from >= to {
			return
		}
		if p.mask &^= sectors(from-start, to-start); p.mask == 0 {
			delete(l.pages, k)
		}
	}
	if x.Length/pageSize > int64(len(l.pages)) {
		for k, p := range l.pages {
			if k.disk == x.Disk {
				clip(k, p)
			}
		}
		return
	}
	for n := x.Offset / pageSize; n*pageSize < x.End(); n++ {
		k := pageKey{x.Disk, n}
		if p := l.pages[k]; p != nil {
			clip(k, p)
		}
	}
}

// fill copies those of the wanted sectors of a page that the layer has to dst,
// which is the whole page, and returns those that it lacks.
func (l *layer) fill(k pageKey, want uint8, dst *[pageSize]byte) uint8 {
	if p := l.pages[k]; p != nil {
		for s := range pageSectors {
			if want&p.mask&(1<<s) != 0 {
				copy(dst[s*dr.SectorSize:(s+1)*dr.SectorSize], p.data[s*dr.SectorSize:])
			}
		}
		want &^= p.mask
	}
	z := l.zeros[k.disk]
	if want == 0 || z == nil || !z.Overlaps(k.number*pageSize, (k.number+1)*pageSize) {
		return want
	}
	for s := range int64(pageSectors) {
		at := k.number*pageSize + s*dr.SectorSize
		if want&(1<<s) != 0 && z.Overlaps(at, at+dr.SectorSize) {
			clear(dst[s*dr.SectorSize : (s+1)*dr.SectorSize])
			want &^= 1 << s
		}
	}
	return want
}

// sectors has the bits of the sectors that the bytes [from, to) of a page touch.
func sectors(from, to int64) uint8 {
	return uint8(1<<((to+dr.SectorSize-1)/dr.SectorSize)-1) &^ uint8(1<<(from/dr.SectorSize)-1)
}
