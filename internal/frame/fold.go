package frame

import (
	"cmp"
	"container/heap"
	"fmt"
	"slices"

	"farside/internal/dr"
)

// Bounds of one Folding, so of its memory: about 80 bytes per extent and 250
// per frame at the most, besides one frame that is read and one that is made.
const (
	MaxFoldExtents = 1 << 18
	MaxFoldFrames  = 1 << 14
)

// Folding merges a run of consecutive frames of one stream into as few epoch
// frames as can hold what is left: where they wrote the same sectors, only the
// newest stays. docs/format/frame.md says what may be merged with what.
//
// It goes over the run twice, so that no more than one frame's payload is in
// memory: Add each frame, of which the tables are enough; Plan; then Merge each
// that Needs it, in the same order, and Finish. It is not safe for concurrent use.
type Folding struct {
	heads []Header
	items []foldItem // of all extents before Plan, of what is left after it
	next  int        // frame to be merged next
	lo    int        // first item of it
	keep  []bool     // by frame: something of it is left

	maxRaw, maxExtents int // of a frame: smaller in tests

	from  int // first frame of the one under construction
	table []byte
	raw   []byte
	part  unpacked
}

// foldItem is an extent, or what is left of it. Its order is that of frame and index.
type foldItem struct {
	off, end int64
	frame    uint32
	index    uint32 // in the frame's table
	disk     dr.DiskID
	what     dr.What
}

// NewFolding returns a Folding without frames.
func NewFolding() *Folding { return &Folding{maxRaw: MaxRaw, maxExtents: MaxExtents} }

// LimitData makes merged frames shorter: at most n bytes of data, 64 KiB to
// MaxRaw, but as much as is left of one original. It comes before the first Merge.
func (x *Folding) LimitData(n int) { x.maxRaw = min(max(n, BlockSize), MaxRaw) }

// Add appends a frame to the run and reports true, or reports false when the run
// must end before it: because f does not continue it, is a tag, opens a sync behind a
// recovery point, or because the run is as long as memory allows.
func (x *Folding) Add(f *Frame) bool {
	if f.Kind == TagKind || len(x.heads) == MaxFoldFrames || len(x.items)+f.Extents > MaxFoldExtents {
		return false
	}
	if n := len(x.heads); n > 0 {
		last := x.heads[n-1]
		if f.Check(last.End()) != nil || f.Last-x.heads[0].First > 1<<32-1 {
			return false
		}
		if f.Open && !f.Folded && !last.Open {
			return false // else the point before the sync would only come after it
		}
	}
	k := uint32(len(x.heads))
	x.heads = append(x.heads, f.Header)
	for i, e := range f.All() {
		x.items = append(x.items, foldItem{e.Offset, e.End(), k, uint32(i), e.Disk, e.What})
	}
	return true
}

// Frames returns how many frames the run has.
func (x *Folding) Frames() int { return len(x.heads) }

// Plan ends the run and finds out what is left of it: n is how many frames will be
// merged, the first of those added, and left the bytes of their data that stay.
// Frames behind the last recovery point of the run are not merged, unless it has none.
func (x *Folding) Plan() (n int, left int64) {
	n = len(x.heads)
	for n > 0 && x.heads[n-1].Open {
		n--
	}
	if n == 0 {
		n = len(x.heads)
	}
	x.heads = x.heads[:n]
	for len(x.items) > 0 && int(x.items[len(x.items)-1].frame) >= n {
		x.items = x.items[:len(x.items)-1]
	}
	x.items = visible(x.items)
	x.keep = make([]bool, n)
	for _, it := range x.items {
		x.keep[it.frame] = true
		if it.what == dr.Data {
			left += it.end - it.off
		}
	}
	return n, left
}

// Needs reports whether Merge of the k-th frame of the run needs the frame.
func (x *Folding) Needs(k int) bool { return x.keep[k] || len(x.items) == 0 }

// Merge takes the next frame of the run, nil if it is not needed, and returns a
// merged frame whenever one is complete. c says how its data is stored. Errors wrap dr.ErrInvalid
// (another frame than the one added) or dr.ErrCorrupt.
func (x *Folding) Merge(f *Frame, c Compression) (out []byte, err error) {
	k := x.next
	if k >= len(x.heads) || f != nil && f.End() != x.heads[k].End() || f == nil && x.Needs(k) {
		return nil, fmt.Errorf("fold frames: not the %d-th frame of the run: %w", k, dr.ErrInvalid)
	}
	if len(x.items) == 0 { // heartbeats only
		x.next++
		x.from = x.next
		return f.Bytes(), nil
	}
	hi := x.lo
	for hi < len(x.items) && int(x.items[hi].frame) == k {
		hi++
	}
	mine := x.items[x.lo:hi]
	if len(mine) > x.maxExtents {
		mine = whole(f, k) // it fits uncut; what comes behind it hides the rest
	}
	if len(mine) > 0 && len(x.table) > 0 && !x.room(mine) {
		out = x.emit(c, true)
	}
	if err := x.take(f, mine); err != nil {
		return nil, fmt.Errorf("fold frames: %w", err)
	}
	x.lo = hi
	x.next++
	return out, nil
}

// Finish returns the last merged frame, nil if there is none.
func (x *Folding) Finish(c Compression) ([]byte, error) {
	if x.next != len(x.heads) {
		return nil, fmt.Errorf("fold frames: %d of %d are merged: %w", x.next, len(x.heads), dr.ErrInvalid)
	}
	if x.from == x.next {
		return nil, nil
	}
	return x.emit(c, x.heads[x.next-1].Open), nil
}

// room reports whether the items fit into the frame under construction.
func (x *Folding) room(items []foldItem) bool {
	n := len(x.raw)
	for _, it := range items {
		if it.what == dr.Data {
			n += int(it.end - it.off)
		}
	}
	return n <= x.maxRaw && len(x.table)/entrySize+len(items) <= x.maxExtents
}

// take copies what is left of a frame into the one under construction.
func (x *Folding) take(f *Frame, items []foldItem) error {
	if len(items) == 0 {
		return nil
	}
	x.part.reset(f)
	first := x.heads[x.from]
	for _, it := range items {
		e := f.Extent(int(it.index))
		if it.what == dr.Data {
			data, err := x.part.read(e.RawOff+int(it.off-e.Offset), int(it.end-it.off))
			if err != nil {
				return err
			}
			x.raw = append(x.raw, data...)
		}
		e.Offset, e.Length = it.off, it.end-it.off
		x.table = appendEntry(x.table, e, first.First, first.FirstTime)
	}
	return nil
}

// emit returns the frame under construction, which ends where the last frame
// that was taken ends, and begins another one.
func (x *Folding) emit(c Compression, open bool) []byte {
	first, last := x.heads[x.from], x.heads[x.next-1]
	h := Header{
		Kind: Changes, Accuracy: dr.Epoch, Codec: c.Codec(), Open: open, Folded: true,
		Machine: first.Machine, Timeline: first.Timeline, Prev: first.Prev, First: first.First, Last: last.Last,
		FirstTime: first.FirstTime, LastTime: last.LastTime,
		Extents: len(x.table) / entrySize, RawLen: len(x.raw), Chain: last.Chain,
	}
	for _, b := range x.heads[x.from:x.next] {
		if b.Kind == Resync {
			h.Kind = Resync
		}
	}
	b := assemble(&h, x.table, x.raw, c)
	x.table, x.raw, x.from = x.table[:0], x.raw[:0], x.next
	return b
}

func appendEntry(table []byte, e Extent, first dr.Seq, firstTime int64) []byte {
	var b [entrySize]byte
	le.PutUint16(b[0:], uint16(e.Disk))
	b[2] = byte(e.What)
	le.PutUint32(b[4:], uint32(e.Length/dr.SectorSize))
	le.PutUint64(b[8:], uint64(e.Offset))
	le.PutUint32(b[16:], uint32(e.Seq-first))
	le.PutUint64(b[24:], uint64(e.Time-firstTime))
	return append(table, b[:]...)
}

// whole returns the items of an uncut frame.
func whole(f *Frame, k int) (out []foldItem) {
	for i, e := range f.All() {
		out = append(out, foldItem{e.Offset, e.End(), uint32(k), uint32(i), e.Disk, e.What})
	}
	return out
}

// Fold merges a run of frames that are all in memory and returns the merged
// ones, and how many of the run they stand for. See Folding.
func Fold(run []*Frame, c Compression) (out [][]byte, n int, err error) {
	x := NewFolding()
	for _, f := range run {
		if !x.Add(f) {
			break
		}
	}
	n, _ = x.Plan()
	if n < 2 {
		return nil, 0, nil
	}
	for _, f := range run[:n] {
		b, err := x.Merge(f, c)
		if err != nil {
			return nil, 0, err
		}
		if b != nil {
			out = append(out, b)
		}
	}
	b, err := x.Finish(c)
	if b != nil {
		out = append(out, b)
	}
	return out, n, err
}

// byOrder sorts by order in the stream, then by offset.
func byOrder(a, b foldItem) int {
	return cmp.Or(cmp.Compare(a.frame, b.frame), cmp.Compare(a.index, b.index), cmp.Compare(a.off, b.off))
}

// visible returns what is left of the items where newer ones cover older ones,
// in stream order. Zeroes and discards are shortened but not cut to pieces: they cost the
// same however long they are, and what hides a part of them comes behind them.
func visible(items []foldItem) []foldItem {
	slices.SortFunc(items, func(a, b foldItem) int {
		return cmp.Or(cmp.Compare(a.disk, b.disk), cmp.Compare(a.off, b.off))
	})
	var out []foldItem
	for len(items) > 0 {
		n := 1
		for n < len(items) && items[n].disk == items[0].disk {
			n++
		}
		out = sweep(items[:n], out)
		items = items[n:]
	}
	slices.SortFunc(out, byOrder)
	return joined(out)
}

// sweep goes over the items of one disk, sorted by offset, and appends what can
// be seen of them.
func sweep(items, out []foldItem) []foldItem {
	var over newest // those that reach past at
	at := items[0].off
	for {
		for len(items) > 0 && (items[0].off <= at || len(over) == 0) {
			at = max(at, items[0].off)
			heap.Push(&over, items[0])
			items = items[1:]
		}
		for len(over) > 0 && over[0].end <= at {
			heap.Pop(&over)
		}
		if len(over) == 0 {
			if len(items) == 0 {
				return out
			}
			continue
		}
		top := over[0]
		end := top.end
		if len(items) > 0 {
			end = min(end, items[0].off)
		}
		top.off, top.end = at, end
		if n := len(out) - 1; n >= 0 && out[n].end == at && out[n].frame == top.frame && out[n].index == top.index {
			out[n].end = end
		} else {
			out = append(out, top)
		}
		at = end
	}
}

// joined makes one of the pieces of each zero or discard.
func joined(items []foldItem) []foldItem {
	out := items[:0]
	for _, it := range items {
		if n := len(out) - 1; n >= 0 && it.what != dr.Data && out[n].frame == it.frame && out[n].index == it.index {
			out[n].end = it.end
			continue
		}
		out = append(out, it)
	}
	return out
}

// newest is a heap with the newest item on top.
type newest []foldItem

func (h newest) Len() int           { return len(h) }
func (h newest) Less(i, j int) bool { return byOrder(h[i], h[j]) > 0 }
func (h newest) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *newest) Push(v any)        { *h = append(*h, v.(foldItem)) }

func (h *newest) Pop() any {
	v := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return v
}

// unpacked gives parts of a frame's payload and decodes each block at most once.
type unpacked struct {
	f    *Frame
	raw  []byte
	have []bool
}

func (u *unpacked) reset(f *Frame) {
	u.f = f
	u.raw = slices.Grow(u.raw[:0], f.RawLen)[:f.RawLen]
	u.have = append(u.have[:0], make([]bool, f.blocks())...)
}

func (u *unpacked) read(off, n int) ([]byte, error) {
	for i := off / BlockSize; i*BlockSize < off+n; i++ {
		if u.have[i] {
			continue
		}
		stored, err := u.f.block(i)
		if err != nil {
			return nil, err
		}
		at, size := u.f.rawBlock(i)
		if _, err := u.f.DecodeBlock(i, stored, u.raw[at:at:at+size]); err != nil {
			return nil, err
		}
		u.have[i] = true
	}
	return u.raw[off : off+n], nil
}
