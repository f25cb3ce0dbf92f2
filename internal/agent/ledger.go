package agent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"farside/internal/capture"
	"farside/internal/dr"
	"farside/internal/frame"
)

// ledger remembers, for each frame that was built, where the stream stood behind
// it, and for each block of the disks, in which generation of frames it last changed.
// From that follows what a receiver lacks that stands at any of those frames. It lies in
// memory that may outlive the process (capture.Survivor), and can be killed between any two
// of its stores: what is not known for certain is not known at all.
//
//	offset  size
//	0       8       magic "FSLEDGR1"
//	8       16      machine
//	24      4       timeline
//	28      4       number of disks
//	32      8       frames ever added; the newest is count-1
//	40      8       exact: 1 + the sequence number since which the stream is exact, 0 if it is not
//	48      8       generation
//	56      8       whole: 1 while whole disks are being compared
//	64      4       block size as a power of two
//	128     32·16   disks: id (8), size (8)
//	1024    256·8   the sequence number behind which the generation began, by its byte
//	4096    n·32    frames, a ring: sequence (8), chain (8), source position (8), check (8)
//	…       blocks  the generation in which each block changed last, as a byte
//
// Generation g has the byte g mod 255 + 1; byte 0 means "long ago". The newest 254 generations are
// known. A change is entered before its room in the source's buffer is released, a range of
// the dirty set before it is taken, a frame before it can be sent.
//
// It belongs to one goroutine. Numbers are in the machine's byte order: nobody else reads them.
type ledger struct {
	mem    []byte
	disks  []ledgerDisk
	shift  uint
	frames uint64 // capacity
	blocks []byte

	fresh     bool  // nothing was known when it was opened
	maxFrames int   // of a generation
	genFrames int   // since the generation began
	genBytes  int64 // of frames, since then
}

type ledgerDisk struct {
	id    dr.DiskID
	size  int64
	first int64 // its first block
}

const (
	ledgerMagic  = "FSLEDGR1"
	ledgerBytes  = 16 << 20 // of all of it: also the size of Survivor.Memory
	ledgerFrames = 128 << 10
	frameEntry   = 32
	maxLedger    = 32 // disks

	offMachine  = 8
	offTimeline = 24
	offDisks    = 28
	offCount    = 32
	offExact    = 40
	offGen      = 48
	offWhole    = 56
	offShift    = 64
	offTable    = 128
	offStarts   = 1024
	offFrames   = 4096

	generations = 254 // that are known, the present one included

	// No machine gets that far, and nothing that is computed from less overflows.
	maxLedgerCount = 1 << 56

	// A generation ends after so many frames or bytes: what a resync reads too much is
	// at most what changed in one generation, and all of them should reach back as far as the frames.
	genMaxFrames = ledgerFrames / generations
	genMaxBytes  = 32 << 20

	minLedgerBlock = 12 // 4 KiB

	minLedger = offFrames + frameEntry*ledgerFrames + 1<<20 // bytes of all of it
)

var native = binary.NativeEndian

func (l *ledger) word(off int) *uint64 { return (*uint64)(unsafe.Pointer(&l.mem[off])) }

func (l *ledger) load(off int) uint64     { return atomic.LoadUint64(l.word(off)) }
func (l *ledger) store(off int, v uint64) { atomic.StoreUint64(l.word(off), v) }

// openLedger opens the ledger in mem, or begins one there if what mem holds is not
// that of the same machine, timeline and disks. mem is aligned to 8 bytes.
func openLedger(mem []byte, machine dr.MachineID, tl dr.Timeline, disks []capture.Disk) (*ledger, error) {
	l, err := layLedger(mem, disks)
	if err != nil {
		return nil, err
	}
	if !l.holds(machine, tl, disks) {
		l.format(machine, tl, disks)
		l.fresh = true
	}
	return l, nil
}

// ledgerSize returns how much memory a ledger of the disks is best given, at most
// ledgerBytes.
func ledgerSize(disks []capture.Disk) int {
	var blocks int64
	for _, d := range disks {
		blocks += d.Size>>minLedgerBlock + 1
	}
	return int(min(minLedger-1<<20+max(blocks, 1<<20), ledgerBytes))
}

// layLedger finds out where everything is.
func layLedger(mem []byte, disks []capture.Disk) (*ledger, error) {
	if len(disks) > maxLedger || len(mem) < minLedger {
		return nil, fmt.Errorf("ledger of %d disks in %d bytes: %w", len(disks), len(mem), dr.ErrInvalid)
	}
	l := &ledger{mem: mem, frames: ledgerFrames, maxFrames: genMaxFrames, shift: minLedgerBlock}
	room := int64(len(mem) - offFrames - frameEntry*ledgerFrames)
	for {
		total := int64(0)
		l.disks = l.disks[:0]
		for _, d := range disks {
			l.disks = append(l.disks, ledgerDisk{d.ID, d.Size, total})
			total += (d.Size + 1<<l.shift - 1) >> l.shift
		}
		if total <= room {
			l.blocks = mem[offFrames+frameEntry*ledgerFrames:][:total]
			return l, nil
		}
		l.shift++
	}
}

// holds reports whether the memory is a ledger of these.
func (l *ledger) holds(machine dr.MachineID, tl dr.Timeline, disks []capture.Disk) bool {
	if string(l.mem[:8]) != ledgerMagic || [16]byte(l.mem[offMachine:]) != machine || native.Uint32(l.mem[offTimeline:]) != uint32(tl) ||
		native.Uint32(l.mem[offDisks:]) != uint32(len(disks)) || native.Uint32(l.mem[offShift:]) != uint32(l.shift) {
		return false
	}
	for i, d := range disks {
		at := offTable + 16*i
		if native.Uint64(l.mem[at:]) != uint64(d.ID) || native.Uint64(l.mem[at+8:]) != uint64(d.Size) {
			return false
		}
	}
	return l.sound()
}

// sound checks that what it says can be.
func (l *ledger) sound() bool {
	count, gen := l.load(offCount), l.load(offGen)
	if count == 0 || count > maxLedgerCount || gen > maxLedgerCount {
		return false
	}
	var last uint64
	for g := oldestOf(gen); g <= gen; g++ {
		s := l.load(offStarts + 8*int(byteOf(g)))
		if s < last {
			return false
		}
		last = s
	}
	seq, _, _, ok := l.entry(count - 1)
	return ok && last <= seq && l.load(offExact) <= seq+1
}

func byteOf(gen uint64) byte { return byte(gen%255) + 1 }

func oldestOf(gen uint64) uint64 { return gen - min(gen, generations-1) }

// format begins anew: nothing is known.
func (l *ledger) format(machine dr.MachineID, tl dr.Timeline, disks []capture.Disk) {
	clear(l.mem[:8]) // from here on it is none
	clear(l.mem[8:offFrames])
	clear(l.blocks)
	copy(l.mem[offMachine:], machine[:])
	native.PutUint32(l.mem[offTimeline:], uint32(tl))
	native.PutUint32(l.mem[offDisks:], uint32(len(disks)))
	native.PutUint32(l.mem[offShift:], uint32(l.shift))
	for i, d := range disks {
		native.PutUint64(l.mem[offTable+16*i:], uint64(d.ID))
		native.PutUint64(l.mem[offTable+16*i+8:], uint64(d.Size))
	}
	l.genFrames, l.genBytes = 0, 0
	copy(l.mem, ledgerMagic)
}

// entry returns what is known of the n-th frame; ok is false if it is overwritten or
// was being written.
func (l *ledger) entry(n uint64) (seq, chain, pos uint64, ok bool) {
	count := l.load(offCount)
	if n >= count || count-n > l.frames {
		return 0, 0, 0, false
	}
	b := l.mem[offFrames+frameEntry*int(n%l.frames):][:frameEntry]
	seq, chain, pos = native.Uint64(b), native.Uint64(b[8:]), native.Uint64(b[16:])
	return seq, chain, pos, native.Uint64(b[24:]) == entryCheck(seq, chain, pos)
}

func entryCheck(seq, chain, pos uint64) uint64 {
	return (seq*0x9e3779b97f4a7c15 ^ chain) + pos*0xc2b2ae3d27d4eb4f + 1
}

// add enters a frame that ends at c, of n bytes, of which all events lie before the
// source's position pos. It must be there before the frame can be sent.
func (l *ledger) add(c frame.Cursor, pos uint64, n int64) {
	count := l.load(offCount)
	b := l.mem[offFrames+frameEntry*int(count%l.frames):][:frameEntry]
	seq, chain := uint64(c.Position.Seq), native.Uint64(c.Chain[:])
	native.PutUint64(b[24:], 0)
	native.PutUint64(b, seq)
	native.PutUint64(b[8:], chain)
	native.PutUint64(b[16:], pos)
	native.PutUint64(b[24:], entryCheck(seq, chain, pos))
	l.store(offCount, count+1)
	l.genFrames++
	if l.genBytes += n; l.genFrames >= l.maxFrames || l.genBytes >= genMaxBytes {
		l.advance(seq)
	}
}

// advance begins a generation behind seq.
func (l *ledger) advance(seq uint64) {
	next := l.load(offGen) + 1
	b := byteOf(next)
	for rest := l.blocks; ; { // they changed 255 generations ago
		i := bytes.IndexByte(rest, b)
		if i < 0 {
			break
		}
		rest[i] = 0
		rest = rest[i+1:]
	}
	l.store(offStarts+8*int(b), seq)
	l.store(offGen, next)
	l.genFrames, l.genBytes = 0, 0
}

// changed enters that x changes in a frame that is still to come.
func (l *ledger) changed(x dr.Extent) {
	for _, d := range l.disks {
		if d.id != x.Disk {
			continue
		}
		b := byteOf(l.load(offGen))
		from, to := d.first+x.Offset>>l.shift, d.first+(x.End()-1)>>l.shift
		for i := from; i <= to && i < int64(len(l.blocks)); i++ {
			l.blocks[i] = b
		}
	}
}

// find returns the number of the frame that ends at c, if that frame was built here.
func (l *ledger) find(c frame.Cursor) (n uint64, ok bool) {
	count := l.load(offCount)
	low, high := count-min(count, l.frames), count
	for low < high { // the first whose sequence number is not less
		mid := (low + high) / 2
		seq, _, _, _ := l.entry(mid)
		if seq < uint64(c.Position.Seq) {
			low = mid + 1
		} else {
			high = mid
		}
	}
	seq, chain, _, ok := l.entry(low)
	return low, ok && seq == uint64(c.Position.Seq) && chain == native.Uint64(c.Chain[:])
}

// since returns what changed in frames behind seq, in whole blocks. ok is false if
// that is too long ago.
func (l *ledger) since(seq dr.Seq) (out []dr.Extent, ok bool) {
	gen := l.load(offGen)
	oldest := oldestOf(gen)
	if uint64(seq) < l.load(offStarts+8*int(byteOf(oldest))) {
		return nil, false
	}
	var in [256]bool
	for g := oldest; g <= gen; g++ {
		// One that ends at seq may hold what changed behind it: see cut.
		in[byteOf(g)] = g == gen || l.load(offStarts+8*int(byteOf(g+1))) >= uint64(seq)
	}
	for i, d := range l.disks {
		end := int64(len(l.blocks))
		if i+1 < len(l.disks) {
			end = l.disks[i+1].first
		}
		out = l.rangesOf(out, d, l.blocks[d.first:end], &in)
	}
	return out, true
}

func (l *ledger) rangesOf(out []dr.Extent, d ledgerDisk, blocks []byte, in *[256]bool) []dr.Extent {
	for i := 0; i < len(blocks); i++ {
		if !in[blocks[i]] {
			continue
		}
		from := i
		for i < len(blocks) && in[blocks[i]] {
			i++
		}
		x := dr.Extent{Disk: d.id, Offset: int64(from) << l.shift}
		x.Length = min(int64(i)<<l.shift, d.size) - x.Offset
		out = append(out, x)
	}
	return out
}

// cut forgets the frames behind the n-th, which ends at seq. What changed in them
// still counts as changed behind seq: their generations begin and end there.
func (l *ledger) cut(n uint64, seq dr.Seq) {
	l.store(offExact, 0)
	gen := l.load(offGen)
	for g := gen; ; g-- {
		at := offStarts + 8*int(byteOf(g))
		if l.load(at) <= uint64(seq) {
			break
		}
		l.store(at, uint64(seq))
		if g == oldestOf(gen) {
			break
		}
	}
	l.store(offCount, n+1)
	l.advance(uint64(seq))
}

// cutExact is cut for a stream that goes on exactly behind that frame: its events
// will come again, and mark again what they change.
func (l *ledger) cutExact(n uint64, seq dr.Seq) {
	from := l.load(offExact)
	l.cut(n, seq)
	l.store(offExact, from)
}

// begin starts over at c: nothing that was is known any more.
func (l *ledger) begin(machine dr.MachineID, disks []capture.Disk, c frame.Cursor, pos uint64) {
	l.format(machine, c.Position.Timeline, disks)
	l.store(offStarts+8*int(byteOf(0)), uint64(c.Position.Seq))
	l.add(c, pos, 0)
}

// setExact notes that the stream is exact behind seq, until setSyncing.
func (l *ledger) setExact(seq dr.Seq) { l.store(offExact, uint64(seq)+1) }

// setSyncing notes that it is not. It must be there before anything dirty is taken.
func (l *ledger) setSyncing() { l.store(offExact, 0) }

// exactAt reports whether the stream was exact at seq and has been since.
func (l *ledger) exactAt(seq dr.Seq) bool {
	from := l.load(offExact)
	return from != 0 && uint64(seq)+1 >= from
}

// setWhole notes whether whole disks are being compared; whole tells.
func (l *ledger) setWhole(yes bool) {
	if yes {
		l.store(offWhole, 1)
	} else {
		l.store(offWhole, 0)
	}
}

// claim has whoever opens the ledger from here on compare whole disks, and reports whether that was not
// so before, and it is a ledger.
func (l *ledger) claim() bool {
	if string(l.mem[:len(ledgerMagic)]) != ledgerMagic || l.whole() {
		return false
	}
	l.setWhole(true)
	return true
}

func (l *ledger) whole() bool { return l.load(offWhole) != 0 }
