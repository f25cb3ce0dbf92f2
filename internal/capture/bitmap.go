package capture

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"farside/internal/dr"
)

// Bitmap is a dirty set: one bit for each block of each disk, in words that may
// be shared with a kernel. Marking and taking are atomic for each word and never
// wait. The zero value is of no use; see NewBitmap. Safe for concurrent use.
type Bitmap struct {
	block int64
	disks []bitmapDisk
	words []uint64

	mu struct {
		sync.Mutex
		next int // word where the next Take begins
	}
}

type bitmapDisk struct {
	id    dr.DiskID
	size  int64
	first int // its first word
	end   int // behind its last word
}

// BitmapLayout returns for each disk the number of its first word, and how many
// words a Bitmap of these disks has: every disk begins a new word.
func BitmapLayout(disks []Disk, block int64) (first []int, words int) {
	for _, d := range disks {
		first = append(first, words)
		words += int((d.Size + 64*block - 1) / (64 * block))
	}
	return first, words
}

// NewBitmap makes an empty dirty set of blocks of block bytes, a power of two
// of at least dr.SectorSize. It lives in words, laid out as by BitmapLayout and
// zero at first, or in memory of its own if words is nil.
func NewBitmap(disks []Disk, block int64, words []uint64) (*Bitmap, error) {
	if block < dr.SectorSize || block&(block-1) != 0 {
		return nil, fmt.Errorf("make dirty set: block size %d: %w", block, dr.ErrInvalid)
	}
	first, n := BitmapLayout(disks, block)
	if words == nil {
		words = make([]uint64, n)
	}
	if len(words) < n {
		return nil, fmt.Errorf("make dirty set: %d words, need %d: %w", len(words), n, dr.ErrInvalid)
	}
	b := &Bitmap{block: block, words: words[:n]}
	for i, d := range disks {
		end := n
		if i+1 < len(disks) {
			end = first[i+1]
		}
		b.disks = append(b.disks, bitmapDisk{d.ID, d.Size, first[i], end})
	}
	return b, nil
}

// BlockSize returns the granularity in bytes.
func (b *Bitmap) BlockSize() int64 { return b.block }

// Mark adds x, rounded outwards to whole blocks.
func (b *Bitmap) Mark(x dr.Extent) error {
	for i := range b.disks {
		d := &b.disks[i]
		if d.id != x.Disk {
			continue
		}
		if x.Offset < 0 || x.Length < 0 || x.Offset > d.size-x.Length {
			return fmt.Errorf("mark %v of a disk of %d bytes: %w", x, d.size, dr.ErrInvalid)
		}
		if x.Length > 0 {
			b.set(d, x.Offset/b.block, (x.End()-1)/b.block)
		}
		return nil
	}
	return fmt.Errorf("mark %v: disk: %w", x, dr.ErrNotFound)
}

// set marks the blocks lo to hi, both included, of d.
func (b *Bitmap) set(d *bitmapDisk, lo, hi int64) {
	for w := lo / 64; w <= hi/64; w++ {
		mask := ^uint64(0)
		if w == lo/64 {
			mask &= ^uint64(0) << (lo % 64)
		}
		if w == hi/64 {
			mask &= ^uint64(0) >> (63 - hi%64)
		}
		atomic.OrUint64(&b.words[d.first+int(w)], mask)
	}
}

// Take removes and returns ranges of at most limit bytes (but at least one block
// if there is one), going round from where the last Take ended.
func (b *Bitmap) Take(limit int64) []dr.Extent { return b.TakeNoted(limit, nil) }

// TakeNoted is Take, but calls note, unless it is nil or there is nothing to take, with
// what will be returned before it is removed. note must not call b's methods that take.
func (b *Bitmap) TakeNoted(limit int64, note func([]dr.Extent)) []dr.Extent {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, next := b.peek(limit)
	if note != nil && len(t.out) > 0 {
		note(t.out)
	}
	for _, p := range t.parts {
		// Nobody else clears. Cleared here, read by the caller later: a change in
		// between sets it again.
		atomic.AndUint64(&b.words[p.word], ^p.set)
	}
	b.mu.next = next
	return t.out
}

// peek finds what a Take takes, and where the next one begins.
func (b *Bitmap) peek(limit int64) (t taker, next int) {
	blocks := max(limit/b.block, 1)
	next = b.mu.next
	for start, i := next, 0; i < len(b.words) && blocks > 0; i++ {
		w := (start + i) % len(b.words)
		old := atomic.LoadUint64(&b.words[w])
		want := lowest(old, blocks)
		next = w
		if want == old {
			next = w + 1
		}
		if want != 0 {
			blocks -= int64(bits.OnesCount64(want))
			t.word(b, w, want)
		}
	}
	return t, next
}

// lowest returns the n lowest bits that are set in w.
func lowest(w uint64, n int64) uint64 {
	for rest, i := w, int64(0); rest != 0; i++ {
		if i == n {
			return w &^ rest
		}
		rest &= rest - 1
	}
	return w
}

// taker collects the ranges of a Take, and the bits of which they are made.
type taker struct {
	out   []dr.Extent
	parts []takenBits
}

type takenBits struct {
	word int
	set  uint64
}

func (t *taker) word(b *Bitmap, w int, set uint64) {
	d := b.diskOf(w)
	t.parts = append(t.parts, takenBits{w, set})
	for set != 0 {
		lo := bits.TrailingZeros64(set)
		n := bits.TrailingZeros64(^(set >> lo))
		set &^= (1<<n - 1) << lo
		off := (int64(w-d.first)*64 + int64(lo)) * b.block
		t.add(dr.Extent{Disk: d.id, Offset: off, Length: min(int64(n)*b.block, d.size-off)})
	}
}

func (t *taker) add(x dr.Extent) {
	if n := len(t.out); n > 0 && t.out[n-1].Disk == x.Disk && t.out[n-1].End() == x.Offset {
		t.out[n-1].Length += x.Length
		return
	}
	t.out = append(t.out, x)
}

// diskOf returns the disk that has word w.
func (b *Bitmap) diskOf(w int) *bitmapDisk {
	for i := range b.disks {
		if w < b.disks[i].end {
			return &b.disks[i]
		}
	}
	panic("capture: word of no disk")
}

// Dirty returns how many bytes are in the set.
func (b *Bitmap) Dirty() int64 {
	var sum int64
	for i := range b.disks {
		d := &b.disks[i]
		blocks := 0
		for w := d.first; w < d.end; w++ {
			blocks += bits.OnesCount64(atomic.LoadUint64(&b.words[w]))
		}
		sum += int64(blocks) * b.block
		if last := (d.size - 1) / b.block; d.size > 0 && d.size%b.block != 0 &&
			atomic.LoadUint64(&b.words[d.first+int(last/64)])&(1<<(last%64)) != 0 {
			sum -= b.block - d.size%b.block
		}
	}
	return sum
}
