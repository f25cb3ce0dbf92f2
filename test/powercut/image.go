package powercut

import "maps"

const (
	sectorSize = 512
	pageSize   = 4096
)

// Image is the content of a disk; what was never written is zero. Pages are never
// changed in place, so copies share them. It is not safe for concurrent use.
type Image struct{ pages map[int64]*[pageSize]byte }

// NewImage returns a disk of zeros.
func NewImage() *Image { return &Image{pages: map[int64]*[pageSize]byte{}} }

// Clone returns a copy; it costs one map entry a page.
func (m *Image) Clone() *Image { return &Image{pages: maps.Clone(m.pages)} }

// ReadAt fills p with what is at off.
func (m *Image) ReadAt(p []byte, off int64) {
	for len(p) > 0 {
		in := off % pageSize
		n := min(int64(len(p)), pageSize-in)
		if page := m.pages[off/pageSize]; page != nil {
			copy(p[:n], page[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// WriteAt puts p at off.
func (m *Image) WriteAt(p []byte, off int64) {
	for len(p) > 0 {
		in := off % pageSize
		n := min(int64(len(p)), pageSize-in)
		page := new([pageSize]byte)
		if old := m.pages[off/pageSize]; old != nil && n < pageSize {
			*page = *old
		}
		copy(page[in:], p[:n])
		m.pages[off/pageSize] = page
		p, off = p[n:], off+n
	}
}

// Zero makes n bytes at off zero.
func (m *Image) Zero(off, n int64) {
	var zeros [pageSize]byte
	for n > 0 {
		in := off % pageSize
		k := min(n, pageSize-in)
		if k == pageSize {
			delete(m.pages, off/pageSize)
		} else if m.pages[off/pageSize] != nil {
			m.WriteAt(zeros[:k], off)
		}
		off, n = off+k, n-k
	}
}

// Equal says whether both hold the same bytes.
func (m *Image) Equal(o *Image) bool {
	var zeros [pageSize]byte
	for _, pair := range [][2]*Image{{m, o}, {o, m}} {
		for at, page := range pair[0].pages {
			other := pair[1].pages[at]
			if other == nil {
				other = &zeros
			}
			if *page != *other {
				return false
			}
		}
	}
	return true
}
